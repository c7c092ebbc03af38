//! What etcd refuses: it has answered, and says that it does not do what it was asked.
//!
//! The codes and texts are those of etcd 3.4.23, 3.5.30 and 3.6.14. A code alone is not enough: the client's own HTTP/2
//! stack makes 7 and 8 of resets of the connection, and then nobody knows what became of the request.

use std::fmt;

use crate::prefix;

// Codes of gRPC.
const INVALID_ARGUMENT: i32 = 3;
const PERMISSION_DENIED: i32 = 7;
const RESOURCE_EXHAUSTED: i32 = 8;
const FAILED_PRECONDITION: i32 = 9;
const UNAVAILABLE: i32 = 14;
const UNAUTHENTICATED: i32 = 16;

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
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

    /// What the code and the words of an answer mean; `None` where the outcome is not known.
    pub fn read(code: i32, words: &str) -> Option<Self> {
        let has = |text: &str| words.contains(text);
        let cause = match code {
            PERMISSION_DENIED if has("etcdserver:") => Some(Cause::Permission),
            UNAUTHENTICATED if has("etcdserver:") => Some(Cause::Identity),
            RESOURCE_EXHAUSTED if has("database space exceeded") => Some(Cause::NoSpace),
            RESOURCE_EXHAUSTED if has("etcdserver: too many requests") => Some(Cause::Busy),
            RESOURCE_EXHAUSTED if has("received message larger than max") => Some(Cause::Request),
            INVALID_ARGUMENT if has("revision of auth store is old") => Some(Cause::StaleAuth),
            INVALID_ARGUMENT if has("etcdserver: authentication failed") => Some(Cause::Password),
            INVALID_ARGUMENT if is_one_of(words, &IDENTITY) => Some(Cause::Identity),
            INVALID_ARGUMENT if is_one_of(words, &ARGUMENTS) => Some(Cause::Request),
            FAILED_PRECONDITION | UNAVAILABLE if has("rpc not supported for learner") => Some(Cause::Learner),
            FAILED_PRECONDITION if is_one_of(words, &NOT_ENABLED) => Some(Cause::Identity),
            _ => None,
        };
        cause.map(|cause| Self::new(cause, words.to_owned()))
    }

    /// Whether a login may help.
    pub(super) fn wants_login(&self) -> bool {
        is_one_of(&self.words, &[WITHOUT_LOGIN, VOID_TOKEN, WITHOUT_USERS])
    }

    /// Whether etcd has no users, or does not ask for them.
    pub(super) fn is_without_users(&self) -> bool {
        self.words.contains(WITHOUT_USERS)
    }

    /// Whether the write may have happened all the same.
    pub fn effect(&self) -> Effect {
        if self.cause == Cause::NoSpace { Effect::Perhaps } else { Effect::None }
    }
}

/// Of code 3: etcd does not know who asks.
const IDENTITY: [&str; 2] = [WITHOUT_LOGIN, "etcdserver: invalid auth management"];

/// Of code 3: there is no token, and no certificate that counts.
const WITHOUT_LOGIN: &str = "etcdserver: user name is empty";

/// Of code 16: the token has run out, or the member was started anew.
const VOID_TOKEN: &str = "etcdserver: invalid auth token";

/// Of code 3: what etcd looks at before it proposes anything to the other members.
const ARGUMENTS: [&str; 4] = [
    "etcdserver: too many operations in txn request",
    "etcdserver: request is too large",
    "etcdserver: duplicate key given in txn request",
    "etcdserver: key is not provided",
];

/// Of code 9.
const NOT_ENABLED: [&str; 2] = [WITHOUT_USERS, "etcdserver: user name not found"];

/// Of code 9: nobody has to log in, and nobody can.
const WITHOUT_USERS: &str = "etcdserver: authentication is not enabled";

fn is_one_of(words: &str, texts: &[&str]) -> bool {
    texts.iter().any(|text| words.contains(text))
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

    fn cause(code: i32, words: &str) -> Option<Cause> {
        Refusal::read(code, words).map(|refusal| refusal.cause)
    }

    #[test]
    fn what_etcd_refuses_is_a_known_outcome() {
        // Each seen on 3.4.23, 3.5.30 and 3.6.14, unless another release is named.
        for (code, words, expected) in [
            (8, "etcdserver: mvcc: database space exceeded", Cause::NoSpace),
            (8, "etcdserver: too many requests", Cause::Busy),
            (8, "grpc: received message larger than max (2150410 vs. 2097152)", Cause::Request),
            (7, "etcdserver: permission denied", Cause::Permission),
            (16, "etcdserver: invalid auth token", Cause::Identity),
            (3, "etcdserver: revision of auth store is old", Cause::StaleAuth),
            (3, "etcdserver: user name is empty", Cause::Identity),
            (3, "etcdserver: authentication failed, invalid user ID or password", Cause::Password),
            (3, "etcdserver: too many operations in txn request", Cause::Request),
            (3, "etcdserver: request is too large", Cause::Request),
            (3, "etcdserver: duplicate key given in txn request", Cause::Request),
            (9, "etcdserver: authentication is not enabled", Cause::Identity),
            // 3.5.30, of a certificate whose name is no user.
            (9, "etcdserver: user name not found", Cause::Identity),
            // 3.4 and 3.5.
            (14, "etcdserver: rpc not supported for learner", Cause::Learner),
            // 3.6.
            (9, "etcdserver: rpc not supported for learner", Cause::Learner),
        ] {
            assert_eq!(cause(code, words), Some(expected), "{code} {words}");
        }
    }

    #[test]
    fn everything_else_is_not_known_to_have_had_no_effect() {
        for (code, words) in [
            (1, "context canceled"),
            (2, "transport error"),
            // By way of a grpc-proxy, which loses the code.
            (2, "etcdserver: permission denied"),
            (4, "context deadline exceeded"),
            (5, "etcdserver: requested lease not found"),
            (14, "etcdserver: request timed out"),
            (14, "etcdserver: no leader"),
            (14, "etcdserver: leader changed"),
            (14, "etcdserver: unhealthy cluster"),
            (14, "connection refused"),
            // What the client's own HTTP/2 stack makes of GOAWAY with ENHANCE_YOUR_CALM and INADEQUATE_SECURITY, and of
            // a proxy's 401 and 403.
            (8, "h2 protocol error: http2 error"),
            (7, "h2 protocol error: http2 error"),
            (7, "grpc-status header missing, mapped from HTTP status code 403"),
            (16, "grpc-status header missing, mapped from HTTP status code 401"),
            (3, "something that a later release says"),
            (9, "something that a later release says"),
        ] {
            assert_eq!(cause(code, words), None, "{code} {words}");
        }
    }

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
        let effect = |code, words| Refusal::read(code, words).map(|refusal| refusal.effect());
        assert_eq!(effect(8, "etcdserver: mvcc: database space exceeded"), Some(Effect::Perhaps));
        assert_eq!(effect(7, "etcdserver: permission denied"), Some(Effect::None));
        assert_eq!(effect(3, "etcdserver: revision of auth store is old"), Some(Effect::None));
        // And so it is worth a look.
        let needs_look = |code, words| {
            let refusal = Refusal::read(code, words).unwrap();
            StoreError::Refused { store: "etcd".to_owned(), refusal }.needs_look()
        };
        assert!(needs_look(8, "etcdserver: mvcc: database space exceeded"));
        assert!(!needs_look(7, "etcdserver: permission denied"));
    }
}
