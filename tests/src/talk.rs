//! Traffic between pods during a change of the network.

use crate::matrix::listen;
use crate::pod::Pod;
use crate::probe::Stream;

/// Sends from the first pod to all others during `happen`. No packet may be lost.
pub fn while_talking(pods: &[Pod], happen: impl FnOnce()) {
    let _servers = listen(&pods[1..]);
    let streams =
        pods[1..].iter().map(|to| pods[0].within(|| Stream::start(pods[0].v4(), to.v4()))).collect();
    happen();
    for (to, (sent, received)) in pods[1..].iter().zip(Stream::finish(streams)) {
        assert_eq!(received, sent, "packets to {} were lost", to.name());
    }
}
