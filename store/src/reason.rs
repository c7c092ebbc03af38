//! Reasons of a [`StoreError`]: why a datastore cannot be used or does not answer, and why a watch ended.

use polder_ipam::store::StoreError;
use tokio::task::JoinError;

use crate::etcd::config::FileNotRead;

/// Why a datastore cannot be used: the request was not sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unusable {
    /// The configuration has neither an endpoint nor a domain with SRV records, or no member is known.
    /// Remedy: set `etcd.endpoints` or `etcd.discovery_srv`.
    #[error("no endpoint is configured")]
    NoEndpoint,
    /// An operator gave a client certificate, but the traffic to etcd is not encrypted.
    #[error(
        "a client certificate needs TLS, but the endpoints are http://: enable TLS in etcd, and set etcd.ca and \
         https:// endpoints on this node"
    )]
    CertificateWithoutTls,
    /// An operator gave credentials for etcd, but the datastore is a file of this node.
    #[error("this node does not use etcd: do not give etcd credentials")]
    NotEtcd,
    /// The endpoint is an `etcd grpc-proxy`, not a member of etcd.
    #[error(
        "this is an etcd grpc-proxy: it hides errors and stalls watches; set etcd.endpoints to the addresses of the \
         etcd members"
    )]
    Proxy,
    /// The CA, the client certificate or its key cannot be read.
    #[error(transparent)]
    Certificate(#[from] FileNotRead),
    /// The file with the password of the agent's etcd user cannot be read.
    /// Remedy: correct `etcd.password_file`, or make that file readable for the agent.
    #[error("etcd.password_file: {0}")]
    Password(FileNotRead),
    /// The agent's login at etcd takes long, because a member checks one password at a time.
    #[error(
        "the login has taken more than {seconds} s and continues: many clients may be logging in at once; client \
         certificates (etcd.cert) need no login"
    )]
    SlowLogin {
        /// The time since the login started, in seconds.
        seconds: u64,
    },
    /// The agent's login at etcd did not end in time. It is repeated after a pause.
    /// Remedy: use client certificates (etcd.cert), which need no login.
    #[error("no reply to the login within {seconds} s")]
    NoLogin {
        /// The timeout, in seconds.
        seconds: u64,
    },
    /// The login of an operator did not end in time.
    #[error(
        "no reply to the login within {seconds} s: many clients may be logging in at once; a client certificate \
         (--etcd-cert) needs no login"
    )]
    NoLoginOfOperator {
        /// The timeout, in seconds.
        seconds: u64,
    },
    /// The login failed, and etcd did not say whether user or password are wrong. It is repeated after a pause.
    /// Remedy: check the cause, and the health of etcd: `etcdctl endpoint health`.
    #[error("cannot log in: {cause}")]
    LoginFailed {
        /// The last cause of the client's error, with a hint if one is known.
        cause: String,
    },
    /// The task that logs in has panicked.
    #[error(transparent)]
    LoginPanicked(#[from] JoinError),
}

impl Unusable {
    /// The error of that datastore.
    pub(crate) fn at(self, store: impl Into<String>) -> StoreError {
        StoreError::Unusable { store: store.into(), reason: self.to_string() }
    }
}

/// Why there is no answer: the outcome of the request is unknown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoReply {
    /// The member did not answer in time: it is overloaded or has no leader, or packets are lost.
    /// Remedy: check the health of etcd: `etcdctl endpoint health`. A read is repeated at the next member.
    #[error("no reply within {seconds} s")]
    Timeout {
        /// The timeout, in seconds.
        seconds: u64,
    },
    /// Two answers of etcd had no number of keys, although it was requested.
    /// Remedy: none, it is retried.
    #[error("the reply has no key count")]
    NoCount,
    /// etcd deleted the node's lease, because it was not renewed for its time to live.
    /// Remedy: none, the agent requests a new lease.
    #[error("the lease expired")]
    LeaseExpired,
    /// etcd did not answer the renewal of the node's lease in time.
    /// Remedy: check the health of etcd: `etcdctl endpoint health`. The renewal is repeated.
    #[error("the lease was not renewed in time")]
    LeaseNotRenewed,
}

impl NoReply {
    /// The error of that datastore.
    pub(crate) fn at(self, store: impl Into<String>) -> StoreError {
        StoreError::NoAnswer { store: store.into(), reason: self.to_string() }
    }
}

/// Why a watch ended. It resumes by itself, if necessary at another member.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WatchEnded {
    /// The member did not answer the request for a watch in time.
    /// Remedy: none, it is retried. If it repeats, check the health of etcd: `etcdctl endpoint health`.
    #[error("watch not opened within {seconds} s")]
    NotOpened {
        /// The timeout, in seconds.
        seconds: u64,
    },
    /// An address of this node was removed, which the connection may have used.
    /// Remedy: none, the agent connects again.
    #[error("an address of this node was removed")]
    AddressRemoved,
    /// The member closed the stream, for example because it stops or has no leader.
    /// Remedy: none, it is retried. If it repeats, check the health of etcd: `etcdctl endpoint health`.
    #[error("the watch was closed")]
    Closed,
    /// The stream has no messages, not even the progress reports that were requested, and the member answers no reads.
    /// Remedy: none, it is retried at the next member. If it repeats, check etcd: `etcdctl endpoint health`.
    #[error("no watch messages for {seconds} s")]
    Silent {
        /// The time without a message, in seconds.
        seconds: u64,
    },
    /// The stream has no messages, not even the progress reports that were requested, but the member answers reads.
    #[error(
        "no watch messages for {seconds} s, but reads are answered; if this is an etcd grpc-proxy: it hides errors and \
         stalls watches; set etcd.endpoints to the addresses of the etcd members"
    )]
    Stalled {
        /// The time without a message, in seconds.
        seconds: u64,
    },
}
