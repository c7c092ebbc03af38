//! The requests of `polderctl`, each with the type of its answer. They are sent as a [`Request`], and answered with a
//! [`Reply`].

use crate::ipam::{self, Checked, RepairMode, Shown, Subject};
use crate::message::{Removal, Reply, Request};
use crate::pool::{self, ClaimStatus, PoolStatus};
use crate::{NodeName, status};

/// A request with a typed answer.
pub trait Ask {
    /// Type of the answer.
    type Answer;

    /// Whether the request can change records that the etcd user of a node may not write. The caller can then pass its
    /// own etcd credentials.
    const NEEDS_CREDENTIALS: bool;

    /// The request as sent over the socket.
    fn request(self) -> Request;

    /// Extracts the answer from a reply, or returns the reply if it is of another type.
    fn answer(reply: Reply) -> Result<Self::Answer, Box<Reply>>;
}

/// Declares requests. Each has the name of its [`Request`] variant and the [`Reply`] variant that answers it.
macro_rules! asks {
    (@is operator) => { true };
    (@is) => { false };
    ($($(#[$about:meta])* $name:ident $(($field:ident: $wanted:ty))? => $reply:ident($answer:ty) $(by $who:ident)?;)+) => {
        $(
            $(#[$about])*
            #[derive(Debug, Clone, PartialEq, Eq)]
            pub struct $name $((pub $wanted))?;

            impl Ask for $name {
                type Answer = $answer;

                const NEEDS_CREDENTIALS: bool = asks!(@is $($who)?);

                fn request(self) -> Request {
                    let Self $(($field))? = self;
                    Request::$name $(($field))?
                }

                fn answer(reply: Reply) -> Result<$answer, Box<Reply>> {
                    match reply {
                        Reply::$reply(answer) => Ok(answer),
                        other => Err(Box::new(other)),
                    }
                }
            }
        )+
    };
}

asks! {
    /// Status of this node.
    Status => Status(Box<status::Status>);
    /// Liveness of the agent: names of stuck threads.
    Live => Live(Vec<String>);
    /// Kernel changes that the next pass would make.
    Plan => Planned(Vec<String>);
    /// Nodes of the cluster.
    Nodes => Nodes(Vec<status::NodeStatus>);
    /// Confirms that this machine replaces a lost machine as the node of that name.
    AdoptNode(name: NodeName) => Done(String);
    /// Pools of the cluster.
    Pools => Pools(Vec<PoolStatus>);
    /// Claimed blocks.
    Blocks => Blocks(Vec<ClaimStatus>);
    /// Changes a pool.
    ChangePool(change: pool::PoolChange) => Done(String) by operator;
    /// Changes cluster settings.
    ChangeSettings(change: status::SettingsChange) => Done(String) by operator;
    /// Address allocations, with the reason for each.
    Show(subject: Subject) => Shown(Box<Shown>);
    /// Checks the records of the cluster, and ledger and kernel of every node.
    Inspect(repairs: RepairMode) => Checked(Box<Checked>) by operator;
    /// Releases an address.
    Release(release: ipam::Release) => Done(String) by operator;
}

/// Removes a node from the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoveNode(pub Removal);

/// Result of a node removal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RemovalAnswer {
    /// The result, as text.
    Done(String),
    /// Nothing was done, because the node is alive and has pods. The request must give their number.
    Unconfirmed {
        /// Consequences, and how to confirm.
        message: String,
        /// Number of pods that would be disconnected.
        pods: u64,
    },
}

impl Ask for RemoveNode {
    type Answer = RemovalAnswer;

    const NEEDS_CREDENTIALS: bool = true;

    fn request(self) -> Request {
        Request::RemoveNode(self.0)
    }

    fn answer(reply: Reply) -> Result<RemovalAnswer, Box<Reply>> {
        match reply {
            Reply::Done(what) => Ok(RemovalAnswer::Done(what)),
            Reply::Unconfirmed { message, pods } => Ok(RemovalAnswer::Unconfirmed { message, pods }),
            other => Err(Box::new(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Backend;

    /// The JSON of the request, as sent over the socket.
    fn sent(ask: impl Ask) -> String {
        serde_json::to_string(&ask.request()).unwrap()
    }

    #[test]
    fn a_question_is_encoded_as_the_request_of_its_name() {
        assert_eq!(sent(Status), "\"status\"");
        assert_eq!(sent(Plan), "\"plan\"");
        assert_eq!(sent(Nodes), "\"nodes\"");
        assert_eq!(sent(AdoptNode("n1".parse().unwrap())), r#"{"adopt_node":"n1"}"#);
        assert_eq!(sent(Pools), "\"pools\"");
        assert_eq!(sent(Blocks), "\"blocks\"");
        let drain = pool::PoolChange::Drain("p".parse().unwrap());
        assert_eq!(sent(ChangePool(drain)), r#"{"change_pool":{"drain":"p"}}"#);
        let direct =
            status::SettingsChange { backend: Some(Backend::Direct), ..status::SettingsChange::default() };
        assert_eq!(sent(ChangeSettings(direct)), r#"{"change_settings":{"backend":"direct"}}"#);
        assert_eq!(sent(Show(Subject::Cluster)), r#"{"show":"cluster"}"#);
        assert_eq!(sent(Inspect(RepairMode::Safe)), r#"{"inspect":"safe"}"#);
        let release = ipam::Release { address: "10.0.0.5".parse().unwrap(), dead: true };
        assert_eq!(sent(Release(release)), r#"{"release":{"address":"10.0.0.5","dead":true}}"#);
        let removal =
            Removal { node: "n1".parse().unwrap(), dead: false, disconnect_pods: None, earlier: false };
        assert_eq!(
            sent(RemoveNode(removal)),
            r#"{"remove_node":{"node":"n1","dead":false,"earlier":false}}"#
        );
    }

    #[test]
    fn only_requests_that_change_the_cluster_use_operator_credentials() {
        const {
            assert!(
                RemoveNode::NEEDS_CREDENTIALS
                    && ChangePool::NEEDS_CREDENTIALS
                    && ChangeSettings::NEEDS_CREDENTIALS
            );
        };
        const { assert!(Inspect::NEEDS_CREDENTIALS && Release::NEEDS_CREDENTIALS) };
        const { assert!(!Status::NEEDS_CREDENTIALS && !Plan::NEEDS_CREDENTIALS && !AdoptNode::NEEDS_CREDENTIALS) };
        const { assert!(!Nodes::NEEDS_CREDENTIALS && !Pools::NEEDS_CREDENTIALS && !Blocks::NEEDS_CREDENTIALS) };
        const { assert!(!Show::NEEDS_CREDENTIALS) };
    }

    #[test]
    fn the_answer_to_another_question_is_refused() {
        assert_eq!(Plan::answer(Reply::Planned(Vec::new())), Ok(Vec::new()));
        assert_eq!(Plan::answer(Reply::Nodes(Vec::new())), Err(Box::new(Reply::Nodes(Vec::new()))));
        let done = || Reply::Done("node n1 is removed".to_owned());
        assert!(matches!(RemoveNode::answer(done()), Ok(RemovalAnswer::Done(_))));
        assert!(ChangeSettings::answer(done()).is_ok() && Pools::answer(done()).is_err());
    }
}
