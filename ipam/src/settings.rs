//! Changes of the cluster settings.
//!
//! Pure: computed from all records at one revision.

use polder_api::Backend;
use polder_api::status::{AttachMode, SettingsChange};

use crate::Cidr;
use crate::change::Change;
use crate::cidr::ParseCidrError;
use crate::key::Key;
use crate::pools::{Decision, NotChanged};
use crate::record::{ClusterRecord, Masquerade, VxlanSettings};
use crate::view::View;

/// The largest VXLAN network identifier (RFC 7348: 24 bits).
const LARGEST_VNI: u32 = (1 << 24) - 1;

/// Requested settings that are invalid for any cluster.
#[derive(Debug, thiserror::Error)]
pub enum InvalidSettings {
    /// The VNI is out of range: it has 24 bits, and 0 is not allowed.
    #[error("VNI {0} is out of range: use 1 to {LARGEST_VNI}")]
    Vni(u32),
    /// The VXLAN port is 0.
    #[error("invalid VXLAN port 0: use 1 to 65535")]
    Port,
    /// An exception is not a valid network prefix.
    ///
    /// Remedy: write it as ADDRESS/LENGTH, without bits set behind the length, for example 10.0.0.0/8.
    #[error("masquerade exception {0}")]
    Exception(#[from] ParseCidrError),
}

/// Requested settings, validated. `None` keeps the current value.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ValidatedSettings {
    /// The transport between nodes.
    pub backend: Option<Backend>,
    /// The attach mode of pods.
    pub attach: Option<AttachMode>,
    /// The VXLAN port.
    pub port: Option<u16>,
    /// The VXLAN network identifier.
    pub vni: Option<u32>,
    /// Whether pod packets that leave the cluster get their node's address as source.
    pub masquerade: Option<bool>,
    /// The destinations for which they keep their own source address.
    pub except: Option<Vec<Cidr>>,
}

impl From<Backend> for ValidatedSettings {
    fn from(backend: Backend) -> Self {
        Self { backend: Some(backend), ..Self::default() }
    }
}

impl TryFrom<SettingsChange> for ValidatedSettings {
    type Error = InvalidSettings;

    fn try_from(change: SettingsChange) -> Result<Self, InvalidSettings> {
        if let Some(vni) = change.vni.filter(|vni| !(1..=LARGEST_VNI).contains(vni)) {
            return Err(InvalidSettings::Vni(vni));
        }
        if change.port == Some(0) {
            return Err(InvalidSettings::Port);
        }
        let parse = |ranges: Vec<ipnetwork::IpNetwork>| {
            ranges.iter().map(|range| range.to_string().parse()).collect::<Result<Vec<Cidr>, _>>()
        };
        Ok(Self {
            backend: change.backend,
            attach: change.attach,
            port: change.port,
            vni: change.vni,
            masquerade: change.masquerade,
            except: change.except.map(parse).transpose()?,
        })
    }
}

/// Changes all requested settings at once. Every node follows without further requests.
///
/// All nodes accept packets of every backend, so the order in which nodes switch does not matter. For port and VNI it
/// does: a tunnel between a node with the new values and a node with the old ones carries no packets.
pub fn change(view: &View, wanted: &ValidatedSettings) -> Result<Decision, NotChanged> {
    let key = Key::Cluster.to_string();
    if let Some(reason) = view.refused.get(&key) {
        return Err(NotChanged::Unreadable { key, reason: reason.clone() });
    }
    let Some(known) = &view.cluster else { return Err(NotChanged::NoCluster) };
    let before = &*known.record;
    if let Some(attach) = wanted.attach.filter(|attach| *attach != before.attach) {
        return Err(NotChanged::Attach { from: before.attach, to: attach });
    }
    let record = ClusterRecord {
        backend: wanted.backend.unwrap_or(before.backend),
        vxlan: VxlanSettings {
            vni: wanted.vni.unwrap_or(before.vxlan.vni),
            port: wanted.port.unwrap_or(before.vxlan.port),
        },
        masquerade: Masquerade {
            enabled: wanted.masquerade.unwrap_or(before.masquerade.enabled),
            except: wanted.except.clone().unwrap_or_else(|| before.masquerade.except.clone()),
        },
        ..before.clone()
    };
    let (differences, same) = compare(wanted, before, &record);
    if differences.is_empty() {
        return Ok(Decision::NothingToDo(same.join("; ")));
    }
    let mut success_message = differences.join("; ");
    if record.vxlan != before.vxlan {
        success_message += ". Tunnels carry nothing until both of their nodes use the new values; permit the new \
                            port in firewalls";
    }
    Ok(Decision::Commit {
        change: Box::new(Change::ReplaceSettings { record, revision: known.revision }),
        success_message,
    })
}

/// The requested settings that change, and those that stay equal, as text.
fn compare(
    wanted: &ValidatedSettings,
    before: &ClusterRecord,
    after: &ClusterRecord,
) -> (Vec<String>, Vec<String>) {
    let on = |enabled: bool| if enabled { "on" } else { "off" }.to_owned();
    let list = |ranges: &[Cidr]| {
        let all: Vec<String> = ranges.iter().map(ToString::to_string).collect();
        if all.is_empty() { "none".to_owned() } else { all.join(", ") }
    };
    let settings = [
        ("the backend is", wanted.backend.is_some(), before.backend.to_string(), after.backend.to_string()),
        ("the attach mode is", wanted.attach.is_some(), before.attach.to_string(), after.attach.to_string()),
        (
            "the VXLAN port is",
            wanted.port.is_some(),
            before.vxlan.port.to_string(),
            after.vxlan.port.to_string(),
        ),
        ("the VNI is", wanted.vni.is_some(), before.vxlan.vni.to_string(), after.vxlan.vni.to_string()),
        (
            "masquerade is",
            wanted.masquerade.is_some(),
            on(before.masquerade.enabled),
            on(after.masquerade.enabled),
        ),
        (
            "masquerade exceptions are",
            wanted.except.is_some(),
            list(&before.masquerade.except),
            list(&after.masquerade.except),
        ),
    ];
    let (mut differences, mut same) = (Vec::new(), Vec::new());
    for (what, _, before, after) in settings.into_iter().filter(|(_, is_wanted, ..)| *is_wanted) {
        if before == after {
            same.push(format!("{what} already {after}"));
        } else {
            differences.push(format!("{what} now {after} (was {before})"));
        }
    }
    (differences, same)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::Revision;
    use crate::ids::ClusterId;
    use crate::view::Versioned;

    fn view() -> View {
        let record = Arc::new(ClusterRecord::new(ClusterId::new("c")));
        let mut view = View::default();
        view.cluster = Some(Versioned { record, revision: Revision::new(3) });
        view
    }

    fn changed(wanted: &ValidatedSettings) -> (ClusterRecord, String) {
        match change(&view(), wanted).unwrap() {
            Decision::Commit { change, success_message } => match *change {
                Change::ReplaceSettings { record, revision } => {
                    assert_eq!(revision, Revision::new(3));
                    (record, success_message)
                }
                other => panic!("{other:?}"),
            },
            Decision::NothingToDo(already) => panic!("{already}"),
        }
    }

    #[test]
    fn only_the_requested_settings_change_and_the_message_names_them() {
        let before = ClusterRecord::new(ClusterId::new("c"));
        let (record, success_message) = changed(&ValidatedSettings {
            port: Some(4789),
            masquerade: Some(false),
            ..ValidatedSettings::default()
        });
        let vxlan = VxlanSettings { port: 4789, ..before.vxlan };
        assert_eq!(
            record,
            ClusterRecord { vxlan, masquerade: Masquerade { enabled: false, except: Vec::new() }, ..before }
        );
        assert!(
            success_message.starts_with(
                "the VXLAN port is now 4789 (was 8472); masquerade is now off (was on). Tunnels"
            ),
            "{success_message}"
        );
        let except = Some(vec!["192.0.2.0/24".parse().unwrap()]);
        let (_, success_message) = changed(&ValidatedSettings { except, ..ValidatedSettings::default() });
        assert_eq!(success_message, "masquerade exceptions are now 192.0.2.0/24 (was none)");
        let same = change(&view(), &Backend::Auto.into()).unwrap();
        assert_eq!(same, Decision::NothingToDo("the backend is already auto".to_owned()));
    }

    #[test]
    fn a_fixed_or_invalid_setting_is_refused() {
        let attach = ValidatedSettings {
            attach: Some(AttachMode::Routed),
            port: Some(1),
            ..ValidatedSettings::default()
        };
        let refused = change(&view(), &attach).unwrap_err().to_string();
        assert!(refused.contains("bridge") && refused.contains("routed"), "{refused}");
        let same = ValidatedSettings { attach: Some(AttachMode::Bridge), ..ValidatedSettings::default() };
        assert!(matches!(change(&view(), &same), Ok(Decision::NothingToDo(_))));
        for wrong in [
            SettingsChange { vni: Some(0), ..SettingsChange::default() },
            SettingsChange { vni: Some(1 << 24), ..SettingsChange::default() },
            SettingsChange { port: Some(0), ..SettingsChange::default() },
            SettingsChange { except: Some(vec!["10.0.0.1/8".parse().unwrap()]), ..SettingsChange::default() },
        ] {
            assert!(ValidatedSettings::try_from(wrong.clone()).is_err(), "{wrong:?}");
        }
    }
}
