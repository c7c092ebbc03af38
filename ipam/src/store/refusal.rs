//! Refusals: error replies of the datastore.

use std::fmt;

use crate::prefix;

/// Cause of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RefusalCause {
    /// The datastore accepts no writes because its quota is used up (NOSPACE alarm).
    NoSpace,
    /// The client's etcd user lacks permission.
    Permission,
    /// The datastore cannot identify the client.
    Identity,
    /// Wrong user or password.
    Password,
    /// Users or roles were changed while the request was under way.
    StaleAuth,
    /// The datastore is overloaded.
    Busy,
    /// The etcd member is a learner, which does not serve this request.
    Learner,
    /// The request is too large or malformed.
    Request,
    /// The datastore's file cannot be written.
    Disk,
}

/// The client of the request; the remedy depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Asker {
    /// The agent, for its node.
    #[default]
    Agent,
    /// An operator, with the credentials of the node's agent.
    Operator,
    /// An operator, with credentials of their own.
    OperatorWithCredentials,
    /// The agent, to compare the nodes of the cluster with Kubernetes, and to remove nodes.
    Leader,
}

/// A request that the datastore refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct StoreRefusal {
    /// Cause of the refusal.
    pub cause: RefusalCause,
    /// Message of the datastore.
    pub message: String,
    /// The client whose request was refused.
    pub asker: Asker,
}

/// Whether a refused write may have taken effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It did not and will not take effect.
    None,
    /// The write did not take effect, unless it is one of those that used up the quota: etcd executes these and returns
    /// the same message (`quotaApplierV3` of its `apply.go`, in all releases; of 16 concurrent writers, up to 15 writes
    /// on 3.4.23). One read shows the result.
    Perhaps,
}

impl StoreRefusal {
    /// The refusal of an agent's request.
    pub fn new(cause: RefusalCause, message: String) -> Self {
        Self { cause, message, asker: Asker::Agent }
    }

    /// Remedy, depending on the client.
    pub fn remedy(&self) -> String {
        let prefix = prefix::in_use();
        match (self.asker, self.cause) {
            (Asker::Operator, RefusalCause::Permission) => format!(
                "the etcd user of this node may not do that: give polderctl the credentials of an operator \
                 with --etcd-cert FILE --etcd-key FILE, or with --etcd-user NAME --etcd-password-file FILE; \
                 its role needs readwrite on all keys that start with {prefix}"
            ),
            (Asker::OperatorWithCredentials, RefusalCause::Permission) => format!(
                "the etcd user of polderctl (--etcd-user, or the common name of --etcd-cert) needs a role \
                 with readwrite on all keys that start with {prefix}: etcdctl role grant-permission ROLE \
                 --prefix=true readwrite {prefix}"
            ),
            (Asker::Leader, RefusalCause::Permission) => {
                "the etcd user of this node may not do that: run scripts/etcd-roles with --leader NODE for a few \
                 nodes, for example those of the control plane"
                    .to_owned()
            }
            (Asker::OperatorWithCredentials, RefusalCause::Identity) => {
                "etcd does not know the user of polderctl: make the common name of --etcd-cert an etcd user \
                 (with --client-cert-auth), or give --etcd-user NAME --etcd-password-file FILE"
                    .to_owned()
            }
            (Asker::OperatorWithCredentials, RefusalCause::Password) => {
                "etcd rejects --etcd-user with this password: correct --etcd-password-file or \
                 POLDERCTL_ETCD_PASSWORD"
                    .to_owned()
            }
            _ => self.cause.remedy(),
        }
    }

    /// Whether the write may have taken effect.
    pub fn effect(&self) -> Effect {
        if self.cause == RefusalCause::NoSpace { Effect::Perhaps } else { Effect::None }
    }
}

impl RefusalCause {
    /// Remedy for an agent's request.
    pub fn remedy(self) -> String {
        let prefix = prefix::in_use();
        let fixed = match self {
            Self::Permission => {
                return format!(
                    "the role of this client's etcd user needs readwrite on all keys that start with \
                     {prefix}: etcdctl role grant-permission ROLE --prefix=true readwrite {prefix}"
                );
            }
            Self::Identity => {
                return format!(
                    "etcd does not know this client: set etcd.user and etcd.password_file, or make the common \
                     name of etcd.cert an etcd user (with --client-cert-auth); its role needs readwrite on \
                     {prefix}"
                );
            }
            Self::Password => {
                "etcd rejects etcd.user with its password: correct etcd.password_file on this node, or set \
                 that password in etcd: etcdctl user passwd USER"
            }
            Self::NoSpace => {
                "the etcd database has used up its quota: compact and defragment it, then run etcdctl alarm \
                 disarm"
            }
            Self::StaleAuth => "etcd users or roles are being changed: the agent retries",
            Self::Busy => "etcd has too many pending requests: the agent retries",
            Self::Learner => "this member is a learner: promote it, or remove it from etcd.endpoints",
            Self::Request => {
                "check that --max-txn-ops and --max-request-bytes of etcd have at least their default values"
            }
            Self::Disk => "free space on the disk of state_dir, and check that the agent can write there",
        };
        fixed.to_owned()
    }

    /// Whether the cause persists until an operator corrects it.
    pub fn is_lasting(self) -> bool {
        !matches!(self, Self::StaleAuth | Self::Busy | Self::Learner)
    }

    /// Whether it affects certain records or requests only, not all writes.
    pub fn is_partial(self) -> bool {
        matches!(self, Self::Permission | Self::Request)
    }
}

impl fmt::Display for StoreRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.remedy())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreError;

    #[test]
    fn the_remedy_depends_on_whose_credentials_were_refused() {
        let remedy =
            |cause, asker| StoreRefusal { asker, ..StoreRefusal::new(cause, String::new()) }.remedy();
        let own = Asker::OperatorWithCredentials;
        assert!(
            remedy(RefusalCause::Permission, Asker::Operator).contains("--etcd-cert FILE --etcd-key FILE")
        );
        assert!(remedy(RefusalCause::Password, own).contains("--etcd-password-file"));
        assert!(remedy(RefusalCause::Identity, own).contains("--etcd-cert"));
        let grant = "etcdctl role grant-permission ROLE --prefix=true readwrite";
        assert!(remedy(RefusalCause::Permission, own).contains("--etcd-cert"));
        assert!(
            [Asker::Agent, own].iter().all(|asker| remedy(RefusalCause::Permission, *asker).contains(grant))
        );
        assert!(remedy(RefusalCause::Permission, Asker::Leader).contains("scripts/etcd-roles with --leader"));
        assert_eq!(remedy(RefusalCause::NoSpace, Asker::Operator), RefusalCause::NoSpace.remedy());
    }

    #[test]
    fn only_a_write_refused_for_lack_of_space_may_have_been_applied() {
        let needs_reread = |cause| {
            let refusal = StoreRefusal::new(cause, "no".to_owned());
            StoreError::Refused { store: "etcd".to_owned(), refusal }.needs_reread()
        };
        assert_eq!(StoreRefusal::new(RefusalCause::NoSpace, String::new()).effect(), Effect::Perhaps);
        // So its result must be read.
        assert!(needs_reread(RefusalCause::NoSpace));
        assert!(!needs_reread(RefusalCause::Permission));
        assert!(!needs_reread(RefusalCause::StaleAuth));
    }
}
