//! What a store refuses: it has answered, and says that it does not do what it was asked.

use std::fmt;

use crate::prefix;

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// The store takes no writes because its quota is used up (the NOSPACE alarm).
    NoSpace,
    /// The client's user may not do that.
    Permission,
    /// The store does not accept who the client says it is, or wants to know who it is.
    Identity,
    /// The store does not take the client's user and password.
    Password,
    /// Users or roles were changed while the request was under way.
    StaleAuth,
    /// The store has too much to do.
    Busy,
    /// The member is a learner, which serves no such request.
    Learner,
    /// The store does not take such a request: it is too large, or malformed.
    Request,
    /// The store's file cannot be written.
    Disk,
}

/// Who has asked: what helps against a refusal depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Asker {
    /// The agent, for its node.
    #[default]
    Agent,
    /// An operator, with what the node's agent shows to the store.
    Operator,
    /// An operator, with credentials of their own.
    OperatorWithCredentials,
}

/// A request that the store has refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Refusal {
    /// Why.
    pub cause: Cause,
    /// The store's own words.
    pub words: String,
    /// Who was refused.
    pub asker: Asker,
}

/// Whether a write that was refused may have happened all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It did not happen, and will not.
    None,
    /// It did not happen, except that it is one of those that used up the quota: etcd carries these out and answers with the
    /// same words (`quotaApplierV3` of its `apply.go`, in all releases; of 16 writers at once, up to 15 writes on 3.4.23).
    /// One look tells.
    Perhaps,
}

impl Refusal {
    /// A refusal of what an agent has asked for.
    pub fn new(cause: Cause, words: String) -> Self {
        Self { cause, words, asker: Asker::Agent }
    }

    /// What helps whoever was refused.
    pub fn remedy(&self) -> String {
        let prefix = prefix::in_use();
        match (self.asker, self.cause) {
            (Asker::Operator, Cause::Permission) => format!(
                "this node's user of etcd may not do that: give polderctl the credentials of an operator, with \
                 --etcd-cert FILE --etcd-key FILE, or with --etcd-user NAME --etcd-password-file FILE; its role needs \
                 readwrite on all keys that start with {prefix}"
            ),
            (Asker::OperatorWithCredentials, Cause::Permission) => format!(
                "whom polderctl shows (--etcd-user, or the common name of --etcd-cert) must be a user of etcd with a role that has \
                 readwrite on all keys that start with {prefix}: etcdctl role grant-permission ROLE --prefix=true readwrite {prefix}"
            ),
            (Asker::OperatorWithCredentials, Cause::Identity) => {
                "etcd does not know whom polderctl shows: let the common name of --etcd-cert be a user of etcd (with \
                 --client-cert-auth), or give --etcd-user NAME --etcd-password-file FILE"
                    .to_owned()
            }
            (Asker::OperatorWithCredentials, Cause::Password) => {
                "etcd does not take --etcd-user with this password: correct --etcd-password-file or POLDERCTL_ETCD_PASSWORD"
                    .to_owned()
            }
            _ => self.cause.remedy(),
        }
    }

    /// Whether the write may have happened all the same.
    pub fn effect(&self) -> Effect {
        if self.cause == Cause::NoSpace { Effect::Perhaps } else { Effect::None }
    }
}

impl Cause {
    /// What helps.
    pub fn remedy(self) -> String {
        let prefix = prefix::in_use();
        let fixed = match self {
            Self::Permission => {
                return format!(
                    "the role of this client's user needs readwrite on all keys that start with {prefix}: \
                     etcdctl role grant-permission ROLE --prefix=true readwrite {prefix}"
                );
            }
            Self::Identity => {
                return format!(
                    "etcd must know this client: set etcd.user and etcd.password_file, or let the common name of etcd.cert be \
                     a user of etcd (with --client-cert-auth); its role needs readwrite on {prefix}"
                );
            }
            Self::Password => {
                "etcd does not take etcd.user with its password: correct etcd.password_file on this node, or give the user that \
                 password in etcd: etcdctl user passwd USER"
            }
            Self::NoSpace => {
                "the database of etcd has used up its quota: compact and defragment it, then run etcdctl alarm disarm"
            }
            Self::StaleAuth => "users or roles of etcd are being changed: the agent tries again",
            Self::Busy => "etcd has too many requests under way: the agent tries again",
            Self::Learner => "this member is a learner: promote it, or take it out of etcd.endpoints",
            Self::Request => {
                "have --max-txn-ops and --max-request-bytes of etcd at least their default values?"
            }
            Self::Disk => "make room on the disk of state_dir, and let the agent write there",
        };
        fixed.to_owned()
    }

    /// Whether it is not over by itself: something has to be done.
    pub fn is_lasting(self) -> bool {
        !matches!(self, Self::StaleAuth | Self::Busy | Self::Learner)
    }

    /// Whether it concerns certain records or requests only; else all writes.
    pub fn is_partial(self) -> bool {
        matches!(self, Self::Permission | Self::Request)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.words, self.remedy())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreError;

    #[test]
    fn an_operator_is_told_to_bring_credentials_and_one_who_did_what_is_wrong_with_them() {
        let remedy = |cause, asker| Refusal { asker, ..Refusal::new(cause, String::new()) }.remedy();
        let own = Asker::OperatorWithCredentials;
        assert!(remedy(Cause::Permission, Asker::Operator).contains("--etcd-cert FILE --etcd-key FILE"));
        assert!(remedy(Cause::Password, own).contains("--etcd-password-file"));
        assert!(remedy(Cause::Identity, own).contains("--etcd-cert"));
        let grant = "etcdctl role grant-permission ROLE --prefix=true readwrite";
        assert!(remedy(Cause::Permission, own).contains("--etcd-cert"));
        assert!([Asker::Agent, own].iter().all(|asker| remedy(Cause::Permission, *asker).contains(grant)));
        assert_eq!(remedy(Cause::NoSpace, Asker::Operator), Cause::NoSpace.remedy());
    }

    #[test]
    fn only_a_write_that_used_up_the_quota_may_have_happened_all_the_same() {
        let needs_look = |cause| {
            let refusal = Refusal::new(cause, "no".to_owned());
            StoreError::Refused { store: "etcd".to_owned(), refusal }.needs_look()
        };
        assert_eq!(Refusal::new(Cause::NoSpace, String::new()).effect(), Effect::Perhaps);
        // And so it is worth a look.
        assert!(needs_look(Cause::NoSpace));
        assert!(!needs_look(Cause::Permission));
        assert!(!needs_look(Cause::StaleAuth));
    }
}
