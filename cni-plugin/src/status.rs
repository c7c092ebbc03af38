//! STATUS: whether the runtime should report the node's network as ready.
//!
//! Kubernetes evicts the running pods of a node whose STATUS fails for five minutes. So STATUS succeeds as long as pods
//! that were connected since the machine booted are connected in the kernel, even if an ADD would fail:
//! docs/architecture.md explains why.

use std::time::Duration;

use polder_api::message::{Health, HealthRequest, Needed, Reply, Request};

use crate::action::KernelAction;
use crate::agent::unexpected;
use crate::call::{Network, Program};
use crate::delegate;
use crate::environment::Verb;
use crate::error::Error;
use crate::node::NodeNetwork;

/// Timeout for the agent's answer, which comes from memory. Runtimes call STATUS every few seconds, under a lock.
const AGENT_TIMEOUT: Duration = Duration::from_millis(500);

/// STATUS: an ADD would fail.
#[derive(Debug, thiserror::Error)]
pub enum NotAvailable {
    /// The agent runs, but cannot attach pods. Each problem is listed by itself.
    /// Remedy: see each problem.
    #[error("{}", problems.join("; "))]
    Reported {
        /// The problems, as reported by the agent.
        problems: Vec<String>,
    },
    /// The agent is unreachable or did not answer. Its error is listed by itself.
    /// Remedy: see the error.
    #[error("{}", with_causes(.0))]
    NoAgent(Box<Error>),
    /// The agent is unreachable or did not answer, and no agent has set up this node since it was booted.
    /// Remedy: check that polder-agent runs on this node, and its log.
    #[error("this node has not been set up since it was booted, and {}", with_causes(.0))]
    NotSetUp(Box<Error>),
    /// An ADD would fail, and the kernel does not show whether pods are connected. Each error is listed by itself.
    /// Remedy: see each error.
    #[error("{obstacle}; {}", with_causes(unread))]
    Unread {
        /// Why an ADD would fail.
        obstacle: Box<Error>,
        /// Why the kernel's state is unknown.
        unread: Box<Error>,
    },
}

/// STATUS: an ADD would fail, and running pods may be disconnected.
#[derive(Debug, thiserror::Error)]
pub enum LimitedService {
    /// The agent runs, but its problems can affect running pods. Each problem is listed by itself.
    /// Remedy: see each problem.
    #[error("{}", problems.join("; "))]
    Reported {
        /// The problems, as reported by the agent.
        problems: Vec<String>,
    },
    /// An ADD would fail, and the routes of all pods of this node are missing in the kernel.
    /// Remedy: check that polder-agent runs on this node, and its log; it restores the routes.
    #[error("{pods} pods have no route: {}", with_causes(obstacle))]
    CutOff {
        /// The number of pods without a route.
        pods: usize,
        /// Why an ADD would fail.
        obstacle: Box<Error>,
    },
}

/// The reason why an ADD would fail.
#[derive(Debug)]
enum AgentProblem {
    /// The agent is not running, or does not answer in time.
    NoAgent(Error),
    /// The agent or the delegated IPAM plugin reported an error.
    Reported(Error),
}

impl AgentProblem {
    fn into_error(self) -> Error {
        match self {
            Self::NoAgent(error) => NotAvailable::NoAgent(Box::new(error)).into(),
            Self::Reported(error) => error,
        }
    }
}

/// Succeeds if an ADD would succeed, or if a failure could evict running pods.
pub fn status(program: Program, network: &Network) -> Result<(), Error> {
    let agent = ask(program, network);
    // CNI specification: a plugin that delegates must call STATUS of the delegated plugin too.
    let delegated = match &network.conf.delegate {
        Some(plugin) => {
            delegate::call(network, plugin, Verb::Status).map(drop).map_err(AgentProblem::Reported)
        }
        None => Ok(()),
    };
    let Err(obstacle) = agent.and(delegated) else { return Ok(()) };
    // Only after a failure: reading all interfaces takes longer than asking the agent.
    match NodeNetwork::read() {
        Ok(node) => judge(program, obstacle, node),
        Err(source) => {
            let unread = Error::Kernel { action: KernelAction::ReadNode, source };
            let obstacle = Box::new(obstacle.into_error());
            Err(NotAvailable::Unread { obstacle, unread: Box::new(unread) }.into())
        }
    }
}

/// The result of STATUS on a node where an ADD would fail.
fn judge(program: Program, obstacle: AgentProblem, node: NodeNetwork) -> Result<(), Error> {
    if node.connected > 0 {
        return Ok(());
    }
    match (program, obstacle) {
        // Another plugin created the interfaces of pods with these addresses, and only the agent knows which ones. Some
        // may exist if the node was set up since its boot.
        (Program::PolderIpam, AgentProblem::NoAgent(_)) if node.set_up => Ok(()),
        // These pods were connected earlier in this boot.
        (Program::Polder, obstacle) if node.cut_off > 0 => {
            let obstacle = Box::new(obstacle.into_error());
            Err(LimitedService::CutOff { pods: node.cut_off, obstacle }.into())
        }
        (_, AgentProblem::NoAgent(error)) if !node.set_up => {
            Err(NotAvailable::NotSetUp(Box::new(error)).into())
        }
        (_, obstacle) => Err(obstacle.into_error()),
    }
}

/// Asks the agent whether an ADD would succeed.
fn ask(program: Program, network: &Network) -> Result<(), AgentProblem> {
    let pools = match network.conf.delegate {
        None => Needed::Addresses(network.conf.pool.clone()),
        Some(_) => Needed::Nothing,
    };
    let health =
        network.agent(AGENT_TIMEOUT).map(|mut agent| agent.ask(Request::Health(HealthRequest { pools })));
    let health: Health = match health {
        Ok(Ok(Reply::Health(health))) => health,
        Ok(Ok(other)) => return Err(AgentProblem::NoAgent(unexpected(other))),
        Ok(Err(error)) => return Err(AgentProblem::NoAgent(error.into())),
        Err(error) => return Err(AgentProblem::NoAgent(error)),
    };
    // The state of running pods is known only if Polder created their interfaces.
    if program == Program::Polder && !health.limited.is_empty() {
        return Err(AgentProblem::Reported(LimitedService::Reported { problems: health.limited }.into()));
    }
    if !health.unavailable.is_empty() {
        return Err(AgentProblem::Reported(NotAvailable::Reported { problems: health.unavailable }.into()));
    }
    Ok(())
}

fn with_causes(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use polder_api::client::ClientError;

    use super::*;

    const BOOTED: NodeNetwork = NodeNetwork { set_up: false, connected: 0, cut_off: 0 };
    const EMPTY: NodeNetwork = NodeNetwork { set_up: true, ..BOOTED };
    const PODS: NodeNetwork = NodeNetwork { connected: 1, cut_off: 1, ..EMPTY };
    const CUT_OFF: NodeNetwork = NodeNetwork { cut_off: 2, ..EMPTY };

    fn no_agent() -> AgentProblem {
        let source = std::io::ErrorKind::NotFound.into();
        let unreachable = ClientError::Unreachable { socket: "/nowhere".into(), source };
        AgentProblem::NoAgent(unreachable.into())
    }

    fn reported() -> AgentProblem {
        AgentProblem::Reported(NotAvailable::Reported { problems: vec!["no address".to_owned()] }.into())
    }

    fn code(program: Program, obstacle: AgentProblem, node: NodeNetwork) -> u32 {
        judge(program, obstacle, node).map_or_else(|error| error.code(), |()| 0)
    }

    #[test]
    fn status_succeeds_while_a_pod_is_connected() {
        for program in [Program::Polder, Program::PolderIpam] {
            assert_eq!((code(program, no_agent(), PODS), code(program, reported(), PODS)), (0, 0));
        }
    }

    #[test]
    fn status_fails_without_pods_when_an_add_would_fail() {
        for node in [BOOTED, EMPTY] {
            assert_eq!(code(Program::Polder, no_agent(), node), 50);
            assert_eq!(code(Program::Polder, reported(), node), 50);
            assert_eq!(code(Program::PolderIpam, reported(), node), 50);
        }
        let error = judge(Program::Polder, no_agent(), BOOTED).unwrap_err().to_string();
        assert!(error.contains("has not been set up since it was booted") && error.contains("not reachable"));
    }

    #[test]
    fn ipam_status_without_agent_succeeds_only_if_the_node_was_set_up() {
        assert_eq!(code(Program::PolderIpam, no_agent(), EMPTY), 0);
        assert_eq!(code(Program::PolderIpam, no_agent(), BOOTED), 50);
    }

    #[test]
    fn status_distinguishes_disconnected_pods_from_no_pods() {
        assert_eq!(code(Program::Polder, no_agent(), CUT_OFF), 51);
        assert_eq!(code(Program::Polder, no_agent(), NodeNetwork { set_up: false, ..CUT_OFF }), 51);
        assert_eq!(code(Program::Polder, reported(), CUT_OFF), 51);
    }
}
