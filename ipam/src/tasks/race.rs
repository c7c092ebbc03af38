//! Runs two futures until one of them ends.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

/// Runs both futures until one of them ends, and drops the other one unfinished. Polls `first` first.
pub(super) async fn race(first: impl Future<Output = ()>, second: impl Future<Output = ()>) {
    let (mut first, mut second) = (pin!(first), pin!(second));
    poll_fn(|context| {
        let has_ended = first.as_mut().poll(context).is_ready() || second.as_mut().poll(context).is_ready();
        if has_ended { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}
