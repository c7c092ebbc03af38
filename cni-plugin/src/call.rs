//! What a plugin is called with: which one, for which network, about which attachment.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use polder_api::Attachment;
use polder_api::client::Client;

use crate::environment::Environment;
use crate::error::Error;
use crate::netconf::NetConf;
use crate::wishes::Wishes;

/// Which of the plugins is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// `polder`: interfaces with addresses.
    Polder,
    /// `polder-ipam`: addresses for the interfaces of another plugin.
    PolderIpam,
    /// `loopback`: the interface of that name.
    Loopback,
}

impl Program {
    /// The program of a file that is called under several names, by the one that it was called.
    pub fn called(name: &OsStr) -> Self {
        if Path::new(name).file_name() == Some(OsStr::new("loopback")) {
            Self::Loopback
        } else {
            Self::Polder
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Polder => "polder",
            Self::PolderIpam => "polder-ipam",
            Self::Loopback => "loopback",
        }
    }
}

/// A network, and what a call says beside its configuration.
#[derive(Debug)]
pub struct Network {
    /// What the runtime passes on standard input.
    pub conf: NetConf,
    /// Where other plugins are.
    pub path: Vec<PathBuf>,
    /// What ties the call to others in a trace.
    pub trace: Option<String>,
    /// When the call began.
    pub began: Duration,
}

impl Network {
    /// Connects to the agent.
    pub fn agent(&self, patience: Duration) -> Result<Client, Error> {
        Ok(Client::connect(&self.conf.socket, patience)?.traced(self.trace.clone()))
    }
}

/// A call about an attachment.
#[derive(Debug)]
pub struct Call {
    /// What the runtime passes in the environment.
    pub environment: Environment,
    /// What is asked for this pod in particular.
    pub wishes: Wishes,
    /// The network.
    pub network: Network,
}

impl Call {
    /// What it is about.
    pub fn attachment(&self) -> Attachment {
        Attachment {
            network: self.network.conf.name.clone(),
            container: self.environment.container.clone(),
            interface: self.environment.interface.clone(),
        }
    }
}
