//! The bandwidth limits of a pod: the capability `bandwidth` of the CNI conventions.

use polder_netlink::qdisc::TokenBucket;
use serde_json::{Map, Value};

use super::BadOption;
use crate::error::Error;
use crate::netconf::field;

/// The key in `runtimeConfig`, which is also the name of the capability.
const BANDWIDTH: &str = "bandwidth";

/// Bursts that mean "not given": containerd sends Go's `math.MaxUint32` with each rate, older runtimes `MaxInt32`. As a
/// bucket they would let through 275 s of a rate of 10 Mbit/s at once.
const NOT_GIVEN: [u64; 3] = [0, i32::MAX as u64, u32::MAX as u64];

/// The size of the bucket if no burst is given, as parts of what the rate sends in a second: 5 ms.
const BUCKET_PER_SECOND: u64 = 200;

/// A bucket that holds two GSO packets of 64 KiB, in bytes. With a smaller bucket the kernel segments them; at 1 Gbit/s
/// that costs the receiver 52 to 62 % of a processor instead of 7 %.
const GSO_BUCKET: u64 = 128 << 10;

/// The most that a bucket is enlarged for GSO, as parts of what the rate sends in a second: 100 ms. The queue is as long
/// as the bucket: with 128 KiB at 1 Mbit/s, packets behind a TCP stream wait 0.8 s and 23 % are lost; with 16 KiB they
/// wait 0.06 s and none is lost. The throughput is the same.
const GSO_BUCKET_PER_SECOND: u64 = 10;

/// The smallest bucket if no burst is given, in bytes: ten full packets.
const SMALLEST_BUCKET: u64 = 16 << 10;

/// The size of the queue beyond the bucket, as parts of what the rate sends in a second: 25 ms.
const QUEUE_PER_SECOND: u64 = 40;

/// The longest time in which a given bucket fills, in seconds: the kernel reports this time in 32 bits of 64 ns.
const LONGEST_FILL: u64 = 274;

/// The length of an Ethernet header, in bytes. It counts as part of the packet.
const ETHERNET_HEADER: u64 = 14;

/// Why a value of `bandwidth` is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BandwidthProblem {
    /// The value has the wrong type, is fractional, or does not fit in 64 bits.
    /// Remedy: use a whole number of bits.
    #[error("{0} is not a whole number of bits")]
    NotWhole(String),
    /// The value is negative.
    /// Remedy: use a positive number, or remove the limit.
    #[error("{0} is negative")]
    Negative(i64),
    /// The rate is below one byte per second.
    /// Remedy: use a rate of at least 8 bit/s, or remove the limit.
    #[error("{0} bit/s is below 8 bit/s")]
    TooSlow(u64),
    /// A burst without a rate limits nothing.
    /// Remedy: add the rate of the same direction, or remove the burst.
    #[error("a burst of {0} bits needs a rate in the same direction")]
    NoRate(u64),
    /// The bucket fills in more than 274 s, or is larger than 4 GiB: the kernel cannot represent it.
    /// Remedy: use a smaller burst, or omit it.
    #[error("a burst of {burst} bits is too large for {rate} bit/s: the limits are 274 s and 4 GiB")]
    TooLarge {
        /// The burst, in bits.
        burst: u64,
        /// The rate, in bits per second.
        rate: u64,
    },
}

/// The bandwidth limits of one pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bandwidth {
    /// The limit for packets to the pod.
    pub ingress: Option<RateLimit>,
    /// The limit for packets from the pod.
    pub egress: Option<RateLimit>,
}

/// The limit for one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    /// The rate, in bytes per second, at least 1.
    pub rate: u64,
    /// The requested size of the bucket, in bytes.
    burst: Option<u32>,
}

/// The keys of one direction. The second of each pair is the field name in Go, which containerd sends.
struct Keys {
    rate: [&'static str; 2],
    burst: [&'static str; 2],
}

const INGRESS: Keys = Keys { rate: ["ingressRate", "IngressRate"], burst: ["ingressBurst", "IngressBurst"] };
const EGRESS: Keys = Keys { rate: ["egressRate", "EgressRate"], burst: ["egressBurst", "EgressBurst"] };

/// The limits in `runtimeConfig`.
pub(super) fn read(runtime: &Map<String, Value>) -> Result<Bandwidth, Error> {
    let given = field::<Map<String, Value>>(runtime, BANDWIDTH)?.unwrap_or_default();
    Ok(Bandwidth { ingress: limit(&given, &INGRESS)?, egress: limit(&given, &EGRESS)? })
}

/// The limit for one direction: a rate of 0 is none.
fn limit(given: &Map<String, Value>, keys: &Keys) -> Result<Option<RateLimit>, BadOption> {
    let (rate_key, rate) = bits(given, keys.rate)?;
    let (burst_key, burst) = bits(given, keys.burst)?;
    let bad = |key, problem| Err(BadOption::Bandwidth { key, problem });
    let burst = Some(burst).filter(|burst| !NOT_GIVEN.contains(burst));
    let bytes_per_second = rate / 8;
    let fits = |bytes: &u32| u64::from(*bytes) <= bytes_per_second.saturating_mul(LONGEST_FILL);
    match (rate, burst) {
        (0, None) => Ok(None),
        (0, Some(burst)) => bad(burst_key, BandwidthProblem::NoRate(burst)),
        (1..8, _) => bad(rate_key, BandwidthProblem::TooSlow(rate)),
        (_, None) => Ok(Some(RateLimit { rate: bytes_per_second, burst: None })),
        (_, Some(burst)) => match u32::try_from(burst / 8).ok().filter(fits) {
            None => bad(burst_key, BandwidthProblem::TooLarge { burst, rate }),
            bytes => Ok(Some(RateLimit { rate: bytes_per_second, burst: bytes })),
        },
    }
}

/// The value of the first key that is set, in bits or bits per second, with its key; 0 if none is set.
fn bits(given: &Map<String, Value>, keys: [&'static str; 2]) -> Result<(&'static str, u64), BadOption> {
    let set = keys.into_iter().find_map(|key| Some((key, given.get(key).filter(|value| !value.is_null())?)));
    let Some((key, value)) = set else { return Ok((keys[0], 0)) };
    let problem = match (value.as_u64(), value.as_i64()) {
        (Some(bits), _) => return Ok((key, bits)),
        (None, Some(negative)) => BandwidthProblem::Negative(negative),
        (None, None) => BandwidthProblem::NotWhole(value.to_string()),
    };
    Err(BadOption::Bandwidth { key, problem })
}

impl RateLimit {
    /// The token bucket filter for an interface with that MTU, in bytes.
    ///
    /// The bucket holds a whole packet in any case: the kernel would drop each larger one.
    pub fn token_bucket(&self, mtu: u32) -> TokenBucket {
        let for_gso = GSO_BUCKET.min(self.rate / GSO_BUCKET_PER_SECOND);
        let usual = SMALLEST_BUCKET.max(for_gso).max(self.rate / BUCKET_PER_SECOND);
        let bucket = self.burst.map_or(usual, u64::from).max(u64::from(mtu) + ETHERNET_HEADER);
        let fitting = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
        TokenBucket {
            rate: self.rate,
            burst: fitting(bucket),
            limit: fitting(bucket.saturating_add(self.rate / QUEUE_PER_SECOND)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MTU: u32 = 1450;

    fn read(bandwidth: &Value) -> Result<Bandwidth, Error> {
        super::read(json!({ BANDWIDTH: bandwidth }).as_object().unwrap())
    }

    /// Rate, bucket and queue of the limit for packets to the pod, in bytes.
    fn ingress(rate: u64, burst: u64) -> (u64, u32, u32) {
        let bandwidth = read(&json!({ "ingressRate": rate, "ingressBurst": burst })).unwrap();
        let TokenBucket { rate, burst, limit } = bandwidth.ingress.unwrap().token_bucket(MTU);
        (rate, burst, limit)
    }

    #[test]
    fn both_spellings_of_the_fields_are_read() {
        let conventions = json!({ "ingressRate": 8_000_000, "ingressBurst": 1_600_000, "egressRate": 80, "egressBurst": 800 });
        let go = json!({ "IngressRate": 8_000_000, "IngressBurst": 1_600_000, "EgressRate": 80, "EgressBurst": 800 });
        let expected = Bandwidth {
            ingress: Some(RateLimit { rate: 1_000_000, burst: Some(200_000) }),
            egress: Some(RateLimit { rate: 10, burst: Some(100) }),
        };
        assert_eq!(read(&conventions).unwrap(), expected);
        assert_eq!(read(&go).unwrap(), expected);
    }

    #[test]
    fn a_direction_without_a_rate_is_not_limited() {
        for bandwidth in [
            json!({}),
            json!(null),
            json!({ "ingressRate": 0, "ingressBurst": 0, "egressRate": null }),
            json!({ "IngressRate": 0, "IngressBurst": u32::MAX, "EgressRate": 0, "EgressBurst": i32::MAX }),
        ] {
            assert_eq!(read(&bandwidth).unwrap(), Bandwidth::default(), "{bandwidth}");
        }
        let one = read(&json!({ "EgressRate": 8000, "EgressBurst": u32::MAX })).unwrap();
        assert_eq!((one.ingress, one.egress.unwrap().rate), (None, 1000));
    }

    #[test]
    fn a_burst_that_is_not_given_makes_a_bucket_of_128_kib_or_5_ms() {
        for burst in NOT_GIVEN {
            assert_eq!(ingress(20_000_000, burst), (2_500_000, 131_072, 131_072 + 62_500));
            assert_eq!(ingress(10_000_000_000, burst), (1_250_000_000, 6_250_000, 37_500_000));
        }
    }

    #[test]
    fn a_given_burst_is_the_bucket_but_a_packet_always_fits() {
        assert_eq!(ingress(20_000_000, 1_000_000), (2_500_000, 125_000, 125_000 + 62_500));
        assert_eq!(ingress(20_000_000, 8), (2_500_000, 1464, 1464 + 62_500));
    }

    #[test]
    fn the_bucket_of_a_low_rate_is_100_ms_and_at_least_16_kib() {
        assert_eq!(ingress(10_000_000, 0), (1_250_000, 125_000, 125_000 + 31_250));
        assert_eq!(ingress(1_000_000, 0), (125_000, 16_384, 16_384 + 3125));
        assert_eq!(ingress(1000, 0), (125, 16_384, 16_384 + 3), "the smallest rate that Kubernetes permits");
        assert_eq!(ingress(8, 0), (1, 16_384, 16_384));
    }

    #[test]
    fn rates_and_sizes_do_not_overflow() {
        assert_eq!(ingress(40_000_000_000, 0), (5_000_000_000, 25_000_000, 150_000_000), "more than 32 bits");
        let petabit = 1_000_000_000_000_000;
        assert_eq!(ingress(petabit, 0), (petabit / 8, u32::MAX, u32::MAX));
        assert_eq!(ingress(u64::MAX, 0), (u64::MAX / 8, u32::MAX, u32::MAX));
        assert_eq!(ingress(u64::MAX, (1 << 35) - 8), (u64::MAX / 8, u32::MAX, u32::MAX));
    }

    #[test]
    fn the_error_about_an_invalid_limit_has_its_key_and_the_cause() {
        for (bandwidth, expected) in [
            (json!({ "ingressRate": -1 }), "runtimeConfig.bandwidth: ingressRate: -1 is negative"),
            (json!({ "egressRate": 8000, "egressBurst": -9 }), "egressBurst: -9 is negative"),
            (json!({ "IngressRate": 1.5 }), "IngressRate: 1.5 is not a whole number"),
            (json!({ "ingressRate": 1e30 }), "ingressRate: 1e+30 is not a whole number"),
            (json!({ "egressRate": "10M" }), "egressRate: \"10M\" is not a whole number"),
            (json!({ "EgressRate": 7 }), "EgressRate: 7 bit/s is below 8 bit/s"),
            (json!({ "egressBurst": 8000 }), "egressBurst: a burst of 8000 bits needs a rate"),
            (
                json!({ "EgressRate": 0, "EgressBurst": 8000 }),
                "EgressBurst: a burst of 8000 bits needs a rate",
            ),
            (
                json!({ "ingressRate": 8000, "ingressBurst": 8000 * 275 }),
                "ingressBurst: a burst of 2200000 bits is",
            ),
            (
                json!({ "ingressRate": u64::MAX, "ingressBurst": 1_u64 << 35 }),
                "ingressBurst: a burst of 34359738368",
            ),
            (json!(1), "bandwidth: invalid type"),
        ] {
            let error = read(&bandwidth).expect_err(&bandwidth.to_string());
            assert!(error.code() == 7 && error.to_string().contains(expected), "{bandwidth}: {error}");
        }
        assert!(read(&json!({ "ingressRate": 8000, "ingressBurst": 8000 * 274 })).is_ok(), "274 s fit");
    }
}
