//! Errors of the plugins, with the codes of the CNI specification (section "Error").

use std::io::ErrorKind;

use polder_api::IfName;
use polder_api::client::ClientError;
use polder_api::frame::FrameError;
use polder_api::message::{Refusal, RefusalKind};
use serde_json::json;

use crate::action::{FileAction, KernelAction};
use crate::check::AttachmentDifference;
use crate::delegate::DelegateFailure;
use crate::environment::{BadEnvironment, Verb};
use crate::netconf::BadConfig;
use crate::options::BadOption;
use crate::pod::BadNamespace;
use crate::status::{LimitedService, NotAvailable};
use crate::version::Version;

/// An error reported to the container runtime.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The `cniVersion` of the configuration is not supported.
    #[error("unsupported cniVersion {given:?}: supported are {}", supported())]
    Version {
        /// The value of `cniVersion`.
        given: String,
    },
    /// The command does not exist in the version of the configuration.
    #[error("CNI {version} has no {command}: set cniVersion {} or later", command.since())]
    NoCommand {
        /// The value of `CNI_COMMAND`.
        command: Verb,
        /// The version of the configuration.
        version: Version,
    },
    /// The configuration has a key that this plugin does not know. It would not be applied.
    /// Remedy: remove the key from the network configuration, or correct its spelling.
    #[error("unknown key in the network configuration: {key:?} with value {value}")]
    UnknownKey {
        /// The key.
        key: String,
        /// Its value, as JSON.
        value: String,
    },
    /// An environment variable is missing or invalid.
    #[error(transparent)]
    Environment(#[from] BadEnvironment),
    /// The network namespace of `CNI_NETNS` cannot be used.
    #[error(transparent)]
    Namespace(#[from] BadNamespace),
    /// Standard input cannot be read, or is not UTF-8.
    /// Remedy: check the network configuration file of the runtime.
    #[error("cannot read the network configuration from standard input")]
    Input(#[source] std::io::Error),
    /// Standard input is not JSON.
    /// Remedy: correct the network configuration file of the runtime at the named line and column.
    #[error("the network configuration is not a JSON object: {0}")]
    Decode(serde_json::Error),
    /// A value in the configuration is invalid.
    #[error(transparent)]
    Config(#[from] BadConfig),
    /// A property that was requested for the pod is invalid.
    #[error(transparent)]
    Option(#[from] BadOption),
    /// The container already has an interface of that name, so this is a second ADD without a DEL.
    /// Remedy: delete the pod, or give each network of the pod its own interface name.
    #[error("the container already has an interface {0}")]
    InterfaceExists(IfName),
    /// The bridge has the maximum number of ports that the kernel allows (1023).
    #[error(
        "bridge {} is full (1023 ports): run pods on other nodes, or set attach to \"routed\" for the cluster",
        polder_api::BRIDGE
    )]
    BridgeFull,
    /// The pod requests a bandwidth limit, and the kernel of this node has no token bucket filter (`CONFIG_NET_SCH_TBF`).
    #[error("the kernel of this node cannot limit the bandwidth of a pod: load module sch_tbf")]
    NoTokenBucket(#[source] polder_netlink::Error),
    /// The agent is unreachable or did not answer.
    #[error(transparent)]
    Agent(#[from] ClientError),
    /// The agent refused the request.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A netlink request failed. Each action is listed by itself.
    /// Remedy: see the action, and correct the kernel's cause at the end of the message.
    #[error("cannot {action}")]
    Kernel {
        /// The action.
        action: KernelAction,
        /// The kernel's error.
        #[source]
        source: polder_netlink::Error,
    },
    /// A file or namespace operation failed. Each action is listed by itself.
    /// Remedy: see the action, and correct the kernel's cause at the end of the message.
    #[error("cannot {action}")]
    File {
        /// The action.
        action: FileAction,
        /// The kernel's error.
        #[source]
        source: std::io::Error,
    },
    /// A delegated IPAM plugin failed. Each failure is listed by itself.
    /// Remedy: check ipam in the network configuration, and the data directory of that plugin.
    #[error("{plugin}: {failure}")]
    Delegate {
        /// The name of the plugin.
        plugin: String,
        /// The failure.
        failure: DelegateFailure,
    },
    /// GC failed in this plugin and in the delegated IPAM plugin. Each error is listed by itself.
    /// Remedy: correct both errors; the runtime repeats the GC.
    #[error("{0}; {1}")]
    Both(Box<Error>, Box<Error>),
    /// STATUS: an ADD would fail (code 50).
    #[error(transparent)]
    NotAvailable(#[from] NotAvailable),
    /// STATUS: an ADD would fail, and running pods may be disconnected (code 51).
    #[error(transparent)]
    Limited(#[from] LimitedService),
    /// CHECK: the interface differs from what ADD made.
    #[error(transparent)]
    NotAsAttached(#[from] AttachmentDifference),
}

fn supported() -> String {
    Version::ALL.map(Version::as_str).join(", ")
}

impl Error {
    /// Maps a netlink error.
    pub fn kernel(action: KernelAction) -> impl FnOnce(polder_netlink::Error) -> Self {
        move |source| Self::Kernel { action, source }
    }

    /// Maps an I/O error.
    pub fn file(action: FileAction) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::File { action, source }
    }

    /// Whether a retry within seconds may succeed: the agent is restarting, or it answered "try again".
    pub fn passes(&self) -> bool {
        match self {
            Self::Agent(ClientError::Unreachable { source, .. }) => {
                matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
            }
            Self::Agent(ClientError::NoAnswer { source, .. }) => matches!(source, FrameError::Io(_)),
            Self::Refused(refusal) => refusal.kind == RefusalKind::TryAgain,
            _ => false,
        }
    }

    /// The error code: 1 to 99 are defined by the CNI specification, 100 and up by Polder.
    pub fn code(&self) -> u32 {
        match self {
            Self::Version { .. } | Self::NoCommand { .. } => 1,
            Self::UnknownKey { .. } => 2,
            Self::Environment(_) | Self::Namespace(_) => 4,
            Self::Input(_)
            | Self::Kernel { .. }
            | Self::File { .. }
            | Self::BridgeFull
            | Self::NoTokenBucket(_) => 5,
            Self::Decode(_) => 6,
            Self::Config(_) | Self::Option(_) => 7,
            Self::Agent(_) => 11,
            Self::InterfaceExists(_) => 102,
            Self::Both(first, _) => first.code(),
            Self::NotAvailable(_) => 50,
            Self::Limited(_) => 51,
            Self::Delegate { failure, .. } => failure.code(),
            Self::NotAsAttached(_) => 110,
            Self::Refused(refusal) => match refusal.kind {
                RefusalKind::Missing => 3,
                RefusalKind::Failed => 5,
                RefusalKind::Invalid => 7,
                RefusalKind::TryAgain => 11,
                RefusalKind::PoolExhausted => 100,
                RefusalKind::AddressTaken => 101,
                RefusalKind::Exists => 102,
                RefusalKind::Removed => 103,
            },
        }
    }

    /// The error as JSON for the runtime. `details` holds the chain of causes.
    pub fn to_json(&self, program: &str, version: Version) -> String {
        let mut details = Vec::new();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            details.push(cause.to_string());
            source = cause.source();
        }
        let error = json!({
            "cniVersion": version,
            "code": self.code(),
            "msg": format!("{program}: {self}"),
            "details": details.join(": "),
        });
        format!("{error:#}\n")
    }
}
