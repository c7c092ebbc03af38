//! Kernel limits that a large cluster can reach.

use polder_api::{BRIDGE, Family};

use crate::kernel::foreign_state::NeighbourLimits;

/// Maximum number of ports of a bridge: port numbers have ten bits, and 0 is not used (`BR_PORT_BITS` in
/// `net/bridge/br_private.h`).
const PORTS: usize = 1023;

/// A warning is reported above this number of ports.
const MANY_PORTS: usize = PORTS * 9 / 10;

/// The problem, if the bridge is near its maximum number of ports.
pub fn ports(used: usize) -> Option<String> {
    (used > MANY_PORTS).then(|| {
        format!(
            "bridge {BRIDGE} has {used} of at most {PORTS} ports: when it is full, new pods on this node fail. Lower \
             maxPods of the kubelet on this node (a cluster created with attach = \"routed\" has no such limit)"
        )
    })
}

impl NeighbourLimits {
    /// The problem, if `needed` neighbour entries exceed the limits. A quarter is reserved for other uses.
    pub fn problem(self, family: Family, needed: usize) -> Option<String> {
        let Self { soft, hard } = self;
        if needed <= soft && needed <= hard / 4 * 3 {
            return None;
        }
        let settings = match family {
            Family::V4 => "net.ipv4.neigh.default",
            Family::V6 => "net.ipv6.neigh.default",
        };
        let ample = (needed * 2).next_power_of_two();
        Some(format!(
            "peers need {needed} {family} neighbour entries, but the kernel keeps at most {hard} for all uses \
             (gc_thresh3) and removes entries above {soft} (gc_thresh2): run `sysctl -w {settings}.gc_thresh3={ample} \
             {settings}.gc_thresh2={}` on the host and make it persistent",
            ample / 2
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suggested_neighbour_limits_are_sufficient() {
        let usual = NeighbourLimits { soft: 512, hard: 1024 };
        assert_eq!(usual.problem(Family::V4, 512), None);
        let problem = usual.problem(Family::V6, 5000).unwrap();
        assert!(problem.contains("net.ipv6.neigh.default.gc_thresh3=16384 "), "{problem}");
        assert!(problem.contains("net.ipv6.neigh.default.gc_thresh2=8192`"), "{problem}");
        for needed in [513, 800, 1024, 5000, 8192] {
            let ample = (needed * 2_usize).next_power_of_two();
            let done = NeighbourLimits { soft: ample / 2, hard: ample };
            assert!(usual.problem(Family::V4, needed).is_some(), "{needed}");
            assert_eq!(done.problem(Family::V4, needed), None, "{needed}");
        }
    }

    #[test]
    fn a_quarter_of_the_neighbour_entries_is_reserved_for_other_uses() {
        let even = NeighbourLimits { soft: 1000, hard: 1000 };
        assert_eq!(even.problem(Family::V4, 750), None);
        assert!(even.problem(Family::V4, 751).is_some());
    }

    #[test]
    fn a_bridge_is_reported_before_it_is_full() {
        assert_eq!(ports(920), None);
        let problem = ports(921).unwrap();
        for words in ["921", "1023", "polder0", "attach = \"routed\""] {
            assert!(problem.contains(words), "{problem}");
        }
    }
}
