//! Bandwidth limits of a pod in the kernel: a token bucket filter on each end of its veth pair.

use nix::errno::Errno;
use polder_netlink::qdisc::TokenBucket;
use polder_netlink::{IfIndex, Operation, RouteSocket};

use crate::action::KernelAction;
use crate::error::Error;

/// A limit for the packets that one interface sends.
#[derive(Debug)]
pub(crate) struct Limit {
    /// The filter.
    pub bucket: TokenBucket,
    /// The interface.
    pub index: IfIndex,
    /// The action, for errors.
    pub action: KernelAction,
}

/// Sets the limit, if any, and executes the other operations after it, all in one batch. `action` is that of the others.
pub(crate) fn execute(
    socket: &mut RouteSocket,
    limit: Option<Limit>,
    operations: Vec<Operation>,
    action: KernelAction,
) -> Result<(), Error> {
    let Some(limit) = limit else {
        return socket.execute_all(operations).map_err(Error::kernel(action));
    };
    let all = std::iter::once(limit.bucket.replace(limit.index)).chain(operations);
    let mut outcomes = match socket.execute(all) {
        Ok(outcomes) => outcomes.into_iter(),
        Err(error) => return Err(Error::kernel(action)(error)),
    };
    outcomes.next().unwrap_or(Ok(())).map_err(|error| not_limited(error, limit.action))?;
    outcomes.collect::<Result<(), _>>().map_err(Error::kernel(action))
}

/// Why the limit was not set. The kernel loads the module itself if it is installed.
fn not_limited(error: polder_netlink::Error, action: KernelAction) -> Error {
    match error.errno() {
        // `qdisc_create` in net/sched/sch_api.c; the second if the kernel was built without any queueing disciplines.
        Some(Errno::ENOENT | Errno::EOPNOTSUPP) => Error::NoTokenBucket(error),
        _ => Error::kernel(action)(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_the_module_is_named_as_the_cause() {
        let action = || KernelAction::LimitToPod { host: "pld0".parse().unwrap() };
        let refused = |errno| not_limited(polder_netlink::Error::Refused { errno, text: None }, action());
        for errno in [Errno::ENOENT, Errno::EOPNOTSUPP] {
            let error = refused(errno);
            assert!(error.code() == 5 && error.to_string().contains("load module sch_tbf"), "{error}");
        }
        let other = refused(Errno::ENOMEM).to_string();
        assert_eq!(other, "cannot limit the bandwidth to the pod on pld0");
    }
}
