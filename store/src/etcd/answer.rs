//! Interpretation of etcd's error replies.
//!
//! The codes and texts are those of etcd 3.4.23, 3.5.30 and 3.6.14. A code alone is not enough: the client's HTTP/2
//! stack returns 7 and 8 for resets of the connection, and then the outcome of the request is unknown.

use std::error::Error as _;

use polder_ipam::store::refusal::{RefusalCause, StoreRefusal};

// gRPC status codes.
const INVALID_ARGUMENT: i32 = 3;
const PERMISSION_DENIED: i32 = 7;
const RESOURCE_EXHAUSTED: i32 = 8;
const FAILED_PRECONDITION: i32 = 9;
const UNAVAILABLE: i32 = 14;
const UNAUTHENTICATED: i32 = 16;

/// Meaning of a gRPC code and message; `None` if the outcome of the request is unknown.
pub(super) fn read(code: i32, message: &str) -> Option<StoreRefusal> {
    let has = |text: &str| message.contains(text);
    let cause = match code {
        PERMISSION_DENIED if has("etcdserver:") => Some(RefusalCause::Permission),
        UNAUTHENTICATED if has("etcdserver:") => Some(RefusalCause::Identity),
        RESOURCE_EXHAUSTED if has("database space exceeded") => Some(RefusalCause::NoSpace),
        RESOURCE_EXHAUSTED if has("etcdserver: too many requests") => Some(RefusalCause::Busy),
        RESOURCE_EXHAUSTED if has("received message larger than max") => Some(RefusalCause::Request),
        INVALID_ARGUMENT if has("revision of auth store is old") => Some(RefusalCause::StaleAuth),
        INVALID_ARGUMENT if has("etcdserver: authentication failed") => Some(RefusalCause::Password),
        INVALID_ARGUMENT if is_one_of(message, &IDENTITY) => Some(RefusalCause::Identity),
        INVALID_ARGUMENT if is_one_of(message, &ARGUMENTS) => Some(RefusalCause::Request),
        FAILED_PRECONDITION | UNAVAILABLE if has("rpc not supported for learner") => {
            Some(RefusalCause::Learner)
        }
        FAILED_PRECONDITION if is_one_of(message, &NOT_ENABLED) => Some(RefusalCause::Identity),
        _ => None,
    };
    cause.map(|cause| StoreRefusal::new(cause, message.to_owned()))
}

/// Whether a login may help.
pub(super) fn wants_login(refusal: &StoreRefusal) -> bool {
    is_one_of(&refusal.message, &[WITHOUT_LOGIN, VOID_TOKEN, WITHOUT_USERS])
}

/// Whether authentication is not enabled in etcd.
pub(super) fn is_without_users(refusal: &StoreRefusal) -> bool {
    refusal.message.contains(WITHOUT_USERS)
}

/// Code 3: etcd cannot identify the client.
const IDENTITY: [&str; 2] = [WITHOUT_LOGIN, "etcdserver: invalid auth management"];

/// Code 3: no token and no accepted client certificate.
const WITHOUT_LOGIN: &str = "etcdserver: user name is empty";

/// Code 16: the token has expired, or the member was restarted.
const VOID_TOKEN: &str = "etcdserver: invalid auth token";

/// Code 3: checks before anything is proposed to other members.
const ARGUMENTS: [&str; 4] = [
    "etcdserver: too many operations in txn request",
    "etcdserver: request is too large",
    "etcdserver: duplicate key given in txn request",
    "etcdserver: key is not provided",
];

/// Code 9: etcd has no authentication, or no user of this name.
const NOT_ENABLED: [&str; 2] = [WITHOUT_USERS, "etcdserver: user name not found"];

/// Code 9: authentication is not enabled.
const WITHOUT_USERS: &str = "etcdserver: authentication is not enabled";

fn is_one_of(message: &str, texts: &[&str]) -> bool {
    texts.iter().any(|text| message.contains(text))
}

/// The refusal in the error; `None` if the error is not a refusal.
pub(super) fn refusal(error: &etcd_client::Error) -> Option<StoreRefusal> {
    match error {
        etcd_client::Error::GRpcStatus(status) => read(status.code().into(), status.message()),
        _ => None,
    }
}

/// The remedy for an error of the client. The message has it in parentheses after the cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Hint {
    /// The certificate of etcd was signed by another CA than `etcd.ca`.
    /// Remedy: set `etcd.ca` to the certificate of that CA.
    #[error("check that etcd.ca is the CA that signed etcd's certificate")]
    Ca,
    /// The certificate of etcd has neither the host name nor the address of the endpoint.
    /// Remedy: set `etcd.endpoints` to a host in the certificate, or add the host to the certificate.
    #[error("check that etcd's certificate includes the host of the endpoint")]
    Host,
    /// etcd closed the connection during the TLS handshake, probably because it does not accept the client certificate.
    #[error(
        "if etcd requires client certificates, etcd.cert and etcd.key (polderctl: --etcd-cert and --etcd-key) must be \
         signed by the CA that etcd trusts"
    )]
    ClientCertificate,
    /// The endpoint is https://, but the server does not use TLS.
    #[error("no TLS there: check whether the endpoint must be http://")]
    NoTls,
    /// No process accepts connections at the address and port of the endpoint.
    /// Remedy: start etcd there, or correct `etcd.endpoints`.
    #[error("check that etcd is running there")]
    NotRunning,
    /// A grpc-proxy removed the code of etcd's reply "permission denied".
    #[error("{}", RefusalCause::Permission.remedy())]
    Permission,
}

/// The last cause of the error, with a hint if one is known; and whether one is known. The other causes only name
/// layers of the client and repeat the address.
pub(super) fn explain(error: &etcd_client::Error) -> (String, bool) {
    // The error of the client does not return its source.
    let (mut last, mut source) = match error {
        etcd_client::Error::GRpcStatus(status) => (status.message().to_owned(), status.source()),
        etcd_client::Error::TransportError(error) => (error.to_string(), error.source()),
        error => (error.to_string(), None),
    };
    let mut text = error.to_string();
    if last.is_empty() {
        last.clone_from(&text);
    }
    while let Some(cause) = source {
        last = cause.to_string();
        text = format!("{text}: {last}");
        source = cause.source();
    }
    let hints = [
        ("UnknownIssuer", Hint::Ca),
        ("NotValidForName", Hint::Host),
        ("CertificateRequired", Hint::ClientCertificate),
        ("BadCertificate", Hint::ClientCertificate),
        ("UnknownCA", Hint::ClientCertificate),
        ("DecryptError", Hint::ClientCertificate),
        ("InvalidContentType", Hint::NoTls),
        ("Connection refused", Hint::NotRunning),
        ("permission denied", Hint::Permission),
    ];
    match hints.iter().find(|(pattern, _)| text.contains(pattern)).map(|(_, hint)| hint) {
        Some(hint) => (format!("{last} ({hint})"), true),
        None => (last, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(code: i32, message: &str) -> Option<RefusalCause> {
        read(code, message).map(|refusal| refusal.cause)
    }

    #[test]
    fn each_refusal_of_etcd_has_a_known_cause() {
        // Each observed on 3.4.23, 3.5.30 and 3.6.14, unless another release is named.
        for (code, message, expected) in [
            (8, "etcdserver: mvcc: database space exceeded", RefusalCause::NoSpace),
            (8, "etcdserver: too many requests", RefusalCause::Busy),
            (8, "grpc: received message larger than max (2150410 vs. 2097152)", RefusalCause::Request),
            (7, "etcdserver: permission denied", RefusalCause::Permission),
            (16, "etcdserver: invalid auth token", RefusalCause::Identity),
            (3, "etcdserver: revision of auth store is old", RefusalCause::StaleAuth),
            (3, "etcdserver: user name is empty", RefusalCause::Identity),
            (3, "etcdserver: authentication failed, invalid user ID or password", RefusalCause::Password),
            (3, "etcdserver: too many operations in txn request", RefusalCause::Request),
            (3, "etcdserver: request is too large", RefusalCause::Request),
            (3, "etcdserver: duplicate key given in txn request", RefusalCause::Request),
            (9, "etcdserver: authentication is not enabled", RefusalCause::Identity),
            // 3.5.30, for a certificate whose name is not a user.
            (9, "etcdserver: user name not found", RefusalCause::Identity),
            // 3.4 and 3.5.
            (14, "etcdserver: rpc not supported for learner", RefusalCause::Learner),
            // 3.6.
            (9, "etcdserver: rpc not supported for learner", RefusalCause::Learner),
        ] {
            assert_eq!(cause(code, message), Some(expected), "{code} {message}");
        }
    }

    #[test]
    fn other_errors_may_have_had_an_effect() {
        for (code, message) in [
            (1, "context canceled"),
            (2, "transport error"),
            // Through a grpc-proxy, which loses the code.
            (2, "etcdserver: permission denied"),
            (4, "context deadline exceeded"),
            (5, "etcdserver: requested lease not found"),
            (14, "etcdserver: request timed out"),
            (14, "etcdserver: no leader"),
            (14, "etcdserver: leader changed"),
            (14, "etcdserver: unhealthy cluster"),
            (14, "connection refused"),
            // Results of the client's HTTP/2 stack for GOAWAY with ENHANCE_YOUR_CALM and INADEQUATE_SECURITY, and for
            // the codes 401 and 403 of a proxy.
            (8, "h2 protocol error: http2 error"),
            (7, "h2 protocol error: http2 error"),
            (7, "grpc-status header missing, mapped from HTTP status code 403"),
            (16, "grpc-status header missing, mapped from HTTP status code 401"),
            (3, "something that a later release says"),
            (9, "something that a later release says"),
        ] {
            assert_eq!(cause(code, message), None, "{code} {message}");
        }
    }

    #[tokio::test]
    async fn a_refused_connection_shows_the_kernel_error_and_a_hint() {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut client = etcd_client::Client::connect([format!("http://{closed}")], None).await.unwrap();
        let error = client.get("x", None).await.unwrap_err();
        assert_eq!(
            explain(&error),
            ("Connection refused (os error 111) (check that etcd is running there)".to_owned(), true)
        );
    }

    #[test]
    fn an_error_without_an_answer_is_no_refusal() {
        let error = etcd_client::Error::LeaseKeepAliveError("etcdserver: permission denied".to_owned());
        assert_eq!(refusal(&error), None);
    }
}
