//! The queueing discipline `tbf` (token bucket filter), which limits the rate at which an interface sends: `tc-tbf(8)`,
//! `net/sched/sch_tbf.c`, `include/uapi/linux/pkt_sched.h`.
//!
//! The filter sends a packet while the bucket has a token for each of its bytes. The bucket fills at the rate; a packet
//! that finds too few tokens waits in a queue, and is dropped if the queue is full.

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_ECHO, NLM_F_REPLACE, Nla};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};

use crate::error::attribute;
use crate::{Error, IfIndex, Operation, RouteSocket};

/// The name of the queueing discipline, which is also the name of its module after `sch_`.
const KIND: &str = "tbf";

/// Attributes of the options (`TCA_TBF_*`).
const PARAMETERS: u16 = 1;
const RATE_64: u16 = 4;
const BURST: u16 = 6;

/// `TC_LINKLAYER_ETHERNET`: a packet costs as many tokens as it has bytes, so the kernel needs no rate table.
const ETHERNET: u8 = 1;

/// The offsets in `struct tc_tbf_qopt`: `rate` and `peakrate` are a `struct tc_ratespec` of 12 bytes each, `limit`,
/// `buffer` and `mtu` have 4 bytes each.
const LINK_LAYER: usize = 1;
const RATE: std::ops::Range<usize> = 8..12;
const PEAK_LINK_LAYER: usize = 13;
const LIMIT: std::ops::Range<usize> = 24..28;
const LENGTH: usize = 36;

/// A token bucket filter. Packets count with their Ethernet header (14 bytes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBucket {
    /// The rate, in bytes per second.
    pub rate: u64,
    /// The size of the bucket, in bytes. Larger GSO packets are segmented; other larger packets are dropped, so the
    /// size must not be below MTU + 14.
    pub burst: u32,
    /// The size of the queue, in bytes.
    pub limit: u32,
}

impl TokenBucket {
    /// Limits the rate at which the interface sends: sets the root queueing discipline, or replaces another one. If it
    /// already is a token bucket filter, the kernel changes its rate, bucket and queue.
    ///
    /// If the interface is up, the kernel waits for an RCU grace period (`dev_deactivate` in
    /// `net/sched/sch_generic.c`), which took less than 0.1 ms on an idle machine.
    pub fn replace(&self, index: IfIndex) -> Operation {
        let mut message = root(index);
        let options = self.options().into_iter().map(TcOption::Other).collect();
        message.attributes = vec![TcAttribute::Kind(KIND.to_owned()), TcAttribute::Options(options)];
        Operation::new(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// The bucket is sent in bytes. In the older form, in ticks of 64 ns, it would be limited to 274 s.
    fn options(&self) -> Vec<DefaultNla> {
        let mut parameters = vec![0; LENGTH];
        parameters[LINK_LAYER] = ETHERNET;
        parameters[PEAK_LINK_LAYER] = ETHERNET;
        parameters[RATE].copy_from_slice(&u32::try_from(self.rate).unwrap_or(u32::MAX).to_ne_bytes());
        parameters[LIMIT].copy_from_slice(&self.limit.to_ne_bytes());
        let mut options = vec![
            DefaultNla::new(PARAMETERS, parameters),
            DefaultNla::new(BURST, self.burst.to_ne_bytes().to_vec()),
        ];
        if u32::try_from(self.rate).is_err() {
            options.push(DefaultNla::new(RATE_64, self.rate.to_ne_bytes().to_vec()));
        }
        options
    }
}

impl RouteSocket {
    /// The rate of the interface's token bucket filter, in bytes per second. `None` if the root queueing discipline is
    /// another one.
    pub fn token_bucket_rate(&mut self, index: IfIndex) -> Result<Option<u64>, Error> {
        // Without the flag, the kernel only sends a notification (`qdisc_notify` in `net/sched/sch_api.c`).
        match self.get_with(RouteNetlinkMessage::GetQueueDiscipline(root(index)), NLM_F_ECHO) {
            Ok(RouteNetlinkMessage::NewQueueDiscipline(message)) => Ok(rate(&message)),
            // The kernel does not send the discipline of an interface that was never up (`noop`).
            Ok(_) | Err(Error::NoAnswer) => Ok(None),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A message about the root queueing discipline of the interface.
fn root(index: IfIndex) -> TcMessage {
    let mut message = TcMessage::with_index(index.number().cast_signed());
    message.header.parent = TcHandle::ROOT;
    message
}

fn rate(message: &TcMessage) -> Option<u64> {
    let is_filter = |found: &TcAttribute| matches!(found, TcAttribute::Kind(kind) if kind == KIND);
    if !message.attributes.iter().any(is_filter) {
        return None;
    }
    // The library keeps the options of a kind that it does not know as one attribute, without its header.
    let options = message.attributes.iter().find_map(|found| match found {
        TcAttribute::Options(options) => options.iter().find_map(|option| match option {
            TcOption::Other(options) => Some(options),
            _ => None,
        }),
        _ => None,
    })?;
    let mut bytes = vec![0; options.value_len()];
    options.emit_value(&mut bytes);
    let value = |kind| bytes.get(attribute(&bytes, kind)?);
    match value(RATE_64) {
        Some(rate) => rate.try_into().ok().map(u64::from_ne_bytes),
        None => value(PARAMETERS)?.get(RATE)?.try_into().ok().map(u32::from_ne_bytes).map(u64::from),
    }
}
