//! Bridges of other software whose frames iptables rules no longer process, because Polder's bridge must not have them.

use std::collections::BTreeSet;

use polder_api::Family;

use crate::kernel::foreign_state::BridgeWithoutRules;
use crate::kernel::sysctl;

/// The families for which Polder has switched the setting of the whole host off, according to the previous values of
/// settings that the ledger has.
pub fn switched_off(previous: &[(String, String)]) -> BTreeSet<Family> {
    let was_on = |family: &Family| {
        let path = sysctl::bridge_calls(*family);
        previous.iter().any(|(known, value)| known == path && value == "1")
    };
    Family::BOTH.into_iter().filter(was_on).collect()
}

/// The problem with each of these bridges, if Polder has switched the setting off in a family that it needs.
pub fn problems(bridges: &[BridgeWithoutRules], switched_off: &BTreeSet<Family>) -> Vec<String> {
    let affected = bridges.iter().filter_map(|bridge| {
        let families = &bridge.families & switched_off;
        (!families.is_empty()).then(|| problem(&bridge.name, &families))
    });
    affected.collect()
}

fn problem(name: &str, families: &BTreeSet<Family>) -> String {
    let each = |text: fn(Family) -> String, between| {
        families.iter().copied().map(text).collect::<Vec<_>>().join(between)
    };
    format!(
        "iptables rules do not process frames between the ports of bridge {name}, which other software created: Polder \
         has set {} from 1 to 0, because its bridge needs 0. Services between pods or containers of {name} may fail, \
         and rules that separate them have no effect. Run `ip link set dev {name} type bridge {}`, and make it persistent",
        each(setting, " and "),
        each(|family| format!("{} 1", attribute(family)), " ")
    )
}

/// The name of the setting for `sysctl`.
fn setting(family: Family) -> String {
    sysctl::bridge_calls(family).replace('/', ".")
}

/// The setting of a single bridge, as `ip-link(8)` names it.
const fn attribute(family: Family) -> &'static str {
    match family {
        Family::V4 => "nf_call_iptables",
        Family::V6 => "nf_call_ip6tables",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bridge_is_a_problem_only_in_families_that_polder_switched_off() {
        let bridge = |families: &[Family]| BridgeWithoutRules {
            name: "cni0".to_owned(),
            families: families.iter().copied().collect(),
        };
        let (v4, v6) = ("net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables");
        let previous = |values: &[(&str, &str)]| {
            let owned = |(path, value): &(&str, &str)| ((*path).to_owned(), (*value).to_owned());
            switched_off(&values.iter().map(owned).collect::<Vec<_>>())
        };
        let both = previous(&[(v4, "1"), (v6, "1"), ("net/ipv4/ip_forward", "1")]);
        let found = problems(&[bridge(&[Family::V4]), bridge(&Family::BOTH)], &both);
        assert!(found[0].contains("`ip link set dev cni0 type bridge nf_call_iptables 1`"), "{found:?}");
        assert!(
            found[1].contains("`ip link set dev cni0 type bridge nf_call_iptables 1 nf_call_ip6tables 1`"),
            "{found:?}"
        );
        assert!(
            found[1].contains("net.bridge.bridge-nf-call-iptables and net.bridge.bridge-nf-call-ip6tables")
        );
        let v4_only = previous(&[(v4, "1"), (v6, "0")]);
        assert_eq!(problems(&[bridge(&[Family::V6])], &v4_only), Vec::<String>::new());
        assert_eq!(problems(&[bridge(&Family::BOTH)], &previous(&[])), Vec::<String>::new());
    }
}
