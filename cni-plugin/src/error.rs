//! What can go wrong, and the code that the CNI specification (section "Error") gives it.

use std::io::ErrorKind;

use polder_api::IfName;
use polder_api::client::ClientError;
use polder_api::frame::FrameError;
use polder_api::message::{Refusal, RefusalKind};
use serde_json::json;

use crate::environment::Verb;
use crate::version::Version;

/// An error that the runtime is told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is of a version that is not spoken.
    #[error("cniVersion {given:?} is not spoken here: give one of {}", spoken())]
    Version {
        /// What it says.
        given: String,
    },
    /// The version of the configuration does not have the command.
    #[error("CNI {version} has no {command}: it needs cniVersion {} or later", command.since())]
    NoCommand {
        /// What was called.
        command: Verb,
        /// The version of the configuration.
        version: Version,
    },
    /// The configuration has a key that is not known.
    #[error("the configuration has a key that polder does not know: {key:?} with value {value}")]
    UnknownKey {
        /// The key.
        key: String,
        /// Its value.
        value: String,
    },
    /// The environment is not as it should be.
    #[error("{0}")]
    Environment(String),
    /// Standard input cannot be read.
    #[error("the configuration cannot be read from standard input")]
    Input(#[source] std::io::Error),
    /// Standard input is not JSON.
    #[error("the configuration is not a JSON object: {0}")]
    Decode(String),
    /// The configuration makes no sense.
    #[error("{0}")]
    Config(String),
    /// The container has an interface of that name already.
    #[error("the container has an interface {0} already")]
    InterfaceExists(IfName),
    /// The bridge has all the ports that a bridge can have.
    #[error(
        "{} has 1023 ports, and a bridge has no more: run pods on other nodes, or set attach to \"routed\" for the cluster",
        polder_api::BRIDGE
    )]
    BridgeFull,
    /// The agent cannot be asked.
    #[error(transparent)]
    Agent(#[from] ClientError),
    /// The agent said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The kernel said no.
    #[error("{action}")]
    Kernel {
        /// What was being done.
        action: String,
        /// What it said.
        #[source]
        source: polder_netlink::Error,
    },
    /// A file or a namespace cannot be used.
    #[error("{action}")]
    File {
        /// What was being done.
        action: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// Another plugin said no.
    #[error("{plugin}: {message}")]
    Delegate {
        /// The plugin.
        plugin: String,
        /// Its code.
        code: u32,
        /// What it said.
        message: String,
    },
    /// Two things went wrong, each by itself.
    #[error("{0}; {1}")]
    Both(Box<Error>, Box<Error>),
    /// An ADD would not be served.
    #[error("{0}")]
    NotAvailable(String),
    /// An ADD would not be served, and running pods may be cut off.
    #[error("{0}")]
    Limited(String),
    /// The interface is not as it was attached.
    #[error("{0}")]
    NotAsAttached(String),
}

fn spoken() -> String {
    Version::ALL.map(Version::as_str).join(", ")
}

impl Error {
    /// For a kernel that refuses: what was being done.
    pub fn kernel(action: impl Into<String>) -> impl FnOnce(polder_netlink::Error) -> Self {
        let action = action.into();
        move |source| Self::Kernel { action, source }
    }

    /// For a file that cannot be used: what was being done.
    pub fn file(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let action = action.into();
        move |source| Self::File { action, source }
    }

    /// Whether it may pass by itself within seconds: the agent is being replaced, or it says so.
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

    /// The code: 1 to 99 are the specification's, from 100 on they are ours.
    pub fn code(&self) -> u32 {
        match self {
            Self::Version { .. } | Self::NoCommand { .. } => 1,
            Self::UnknownKey { .. } => 2,
            Self::Environment(_) => 4,
            Self::Input(_) | Self::Kernel { .. } | Self::File { .. } | Self::BridgeFull => 5,
            Self::Decode(_) => 6,
            Self::Config(_) => 7,
            Self::Agent(_) => 11,
            Self::InterfaceExists(_) => 102,
            Self::Both(first, _) => first.code(),
            Self::NotAvailable(_) => 50,
            Self::Limited(_) => 51,
            Self::Delegate { code, .. } => *code,
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

    /// As the runtime reads it. What lies behind the error is in `details`.
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
