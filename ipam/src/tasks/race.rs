//! Two things at once, of which one ends the other.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

/// Goes on with both until one of them ends, and drops the other one where it is. The first is asked first.
pub(super) async fn race(first: impl Future<Output = ()>, second: impl Future<Output = ()>) {
    let (mut first, mut second) = (pin!(first), pin!(second));
    poll_fn(|context| {
        let has_ended = first.as_mut().poll(context).is_ready() || second.as_mut().poll(context).is_ready();
        if has_ended { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}
