//! Errors of the connection to the Kubernetes API server.

use std::error::Error;
use std::fmt;

use polder_ipam::cause::HostError;

/// A request to the API server, by the verb and resource of the role that permits it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Read Nodes.
    ListNodes,
    /// Watch the own Node.
    WatchNodes,
    /// Change a condition of the own Node.
    PatchStatus,
    /// Remove a taint of the own Node.
    PatchNode,
    /// Report an Event.
    CreateEvent,
    /// Report an Event again.
    PatchEvent,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ListNodes => "list nodes",
            Self::WatchNodes => "watch nodes",
            Self::PatchStatus => "patch nodes/status",
            Self::PatchNode => "patch nodes",
            Self::CreateEvent => "create events",
            Self::PatchEvent => "patch events",
        })
    }
}

/// A request to the API server failed. Pods and ADDs are not affected.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The files with the credentials cannot be read or used: the kubeconfig, or the files of the service account, which
    /// exist only in a pod.
    ///
    /// Remedy: correct the named file. Outside a pod, set `kubernetes.kubeconfig`.
    #[error("cannot use the credentials for the Kubernetes API server: {0}")]
    Credentials(#[source] HostError),
    /// The kubeconfig names a program that gets the credentials (`exec` or `auth-provider`). The agent runs no other
    /// programs.
    #[error(
        "kubernetes.kubeconfig needs another program for its credentials (exec or auth-provider), and the agent runs \
         none: use a kubeconfig with a client certificate, or with tokenFile"
    )]
    ExternalProgram,
    /// The connection failed, or ended before the answer.
    #[error(
        "the Kubernetes API server is unreachable ({action}: {cause}): check the network and its address, \
         kubernetes.api_server"
    )]
    Unreachable {
        /// The request.
        action: Action,
        /// The error.
        cause: HostError,
    },
    /// The answer did not arrive in time.
    #[error(
        "the Kubernetes API server did not answer within {seconds} s ({action}): check its load, and the network to it"
    )]
    NoAnswer {
        /// The request.
        action: Action,
        /// The timeout.
        seconds: u64,
    },
    /// Nothing arrived on a watch for so long that its connection must be lost.
    ///
    /// Remedy: check the network to the API server if this occurs often. The agent watches again.
    #[error("nothing arrived from the Kubernetes API server for {seconds} s")]
    Silent {
        /// The time.
        seconds: u64,
    },
    /// The role of the agent does not permit the request, or an admission policy refuses it.
    #[error(
        "the Kubernetes API server forbids the agent to {action}: apply the manifest of Polder again, which has the \
         role polder, and check that the name of this node is the name of its Node object ({message})"
    )]
    Forbidden {
        /// The request.
        action: Action,
        /// The answer.
        message: String,
    },
    /// The credentials are not valid, or no longer.
    #[error(
        "the Kubernetes API server refuses the agent's credentials ({message}): renew the token or the client \
         certificate"
    )]
    Unauthorized {
        /// The answer.
        message: String,
    },
    /// The API server answered with an error.
    #[error(
        "the Kubernetes API server refuses to {action} ({code} {reason}: {message}): check the API server; the agent \
         retries"
    )]
    Refused {
        /// The request.
        action: Action,
        /// The HTTP status.
        code: u16,
        /// The reason as one word, for example `Conflict`.
        reason: String,
        /// The answer.
        message: String,
    },
    /// The answer is not as Kubernetes documents it.
    #[error(
        "the answer of the Kubernetes API server is not understood ({action}: {cause}): check that kubernetes.api_server \
         is the address of an API server"
    )]
    NotUnderstood {
        /// The request.
        action: Action,
        /// The error.
        cause: HostError,
    },
}

impl ClientError {
    /// The error of a request.
    pub(super) fn of(action: Action, error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => match status.code {
                401 => Self::Unauthorized { message: status.message },
                403 => Self::Forbidden { action, message: status.message },
                code => Self::Refused { action, code, reason: status.reason, message: status.message },
            },
            kube::Error::SerdeError(error) => Self::NotUnderstood { action, cause: HostError::new(error) },
            kube::Error::Auth(error) => Self::Credentials(HostError::new(error)),
            error => Self::Unreachable { action, cause: innermost(&error) },
        }
    }

    /// Whether the connection, or its credentials, must be made again.
    pub(super) fn is_of_connection(&self) -> bool {
        match self {
            Self::Forbidden { .. } | Self::Refused { .. } | Self::NotUnderstood { .. } => false,
            Self::Credentials(_)
            | Self::ExternalProgram
            | Self::Unreachable { .. }
            | Self::NoAnswer { .. }
            | Self::Silent { .. }
            | Self::Unauthorized { .. } => true,
        }
    }

    fn has_answer(&self, wanted: u16) -> bool {
        matches!(self, Self::Refused { code, .. } if *code == wanted)
    }

    /// Whether the version of a watch or of a list is too old: it has to begin again.
    pub fn is_expired(&self) -> bool {
        self.has_answer(410)
    }

    /// Whether the object has changed since it was read, so that the precondition of the request is not met.
    pub fn is_outdated(&self) -> bool {
        self.has_answer(409) && !self.already_exists()
    }

    /// Whether an object of that name exists.
    pub fn already_exists(&self) -> bool {
        matches!(self, Self::Refused { reason, .. } if reason == "AlreadyExists")
    }
}

/// The cause without the layers of the HTTP client around it.
fn innermost(error: &(dyn Error + 'static)) -> HostError {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    HostError::new(cause.to_string())
}
