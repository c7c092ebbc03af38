//! The metric of Polder's routes.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::Family;

/// The lowest metric of Polder's routes.
const LOWEST: u32 = 84;

/// Number of metrics of Polder's routes.
const METRICS: u32 = 256;

/// The metric of Polder's route to the destination, 84 to 339.
///
/// Routes of other programs to the same destination almost certainly have another metric, so neither replaces the
/// other: the kernel replaces by destination and metric, not by protocol.
///
/// Neighbouring blocks have different metrics. The kernel hashes the next hops of IPv4 routes by metric but not by
/// gateway (`fib_info_hashfn_1` in `net/ipv4/fib_semantics.c`), and compares all of one hash at each change: with one
/// metric, the time for n peers grows with n².
pub fn metric(destination: IpNetwork) -> u32 {
    let host_bits = u32::from(Family::of(destination.ip()).bits() - destination.prefix());
    let network = match destination.network() {
        IpAddr::V4(network) => u128::from(network.to_bits()),
        IpAddr::V6(network) => network.to_bits(),
    };
    let block = network.checked_shr(host_bits).unwrap_or(0);
    LOWEST + u32::try_from(block % u128::from(METRICS)).expect("less than the number of metrics")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn of(destination: &str) -> u32 {
        metric(destination.parse().unwrap())
    }

    #[test]
    fn a_destination_always_has_the_same_metric_of_256() {
        assert_eq!(of("0.0.0.0/0"), 84);
        assert_eq!(of("::/0"), 84);
        assert_eq!(of("10.10.1.192/26"), 91);
        assert_eq!(of("255.255.255.255/32"), 339);
        assert_eq!(of("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"), 339);
        assert_eq!(of("10.244.0.77/26"), of("10.244.0.64/26"), "host bits do not matter");
    }

    #[test]
    fn neighbouring_blocks_have_different_metrics() {
        let blocks = (0..256_u32)
            .map(|number| IpNetwork::new(std::net::Ipv4Addr::from(0x0af4_0000 + number * 64).into(), 26));
        let blocks = blocks.map(|block: Result<IpNetwork, _>| metric(block.unwrap()));
        assert_eq!(blocks.collect::<BTreeSet<_>>().len(), 256);
    }
}
