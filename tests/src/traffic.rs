//! Traffic between pods during a change of the network.

use crate::matrix::listen;
use crate::pod::Pod;
use crate::probe::Stream;

/// Sends from the first pod to all others during `action`. No packet may be lost.
pub fn without_packet_loss(pods: &[Pod], action: impl FnOnce()) {
    let _servers = listen(&pods[1..]);
    let streams =
        pods[1..].iter().map(|to| pods[0].within(|| Stream::start(pods[0].v4(), to.v4()))).collect();
    action();
    for (to, (sent, received)) in pods[1..].iter().zip(Stream::finish(streams)) {
        assert_eq!(received, sent, "packets to {} were lost", to.name());
    }
}
