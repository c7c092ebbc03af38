//! The parameters of one plugin call: program, network, attachment.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use polder_api::Attachment;
use polder_api::client::Client;

use crate::environment::Environment;
use crate::error::Error;
use crate::netconf::NetConf;
use crate::options::PodOptions;

/// The plugin that the runtime called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// `polder`: creates interfaces with addresses.
    Polder,
    /// `polder-ipam`: allocates addresses for the interfaces of another plugin.
    PolderIpam,
    /// `loopback`: sets `lo` up.
    Loopback,
}

impl Program {
    /// The program for the file name of `argv[0]`: `polder` is also installed as `loopback`.
    pub fn called(name: &OsStr) -> Self {
        if Path::new(name).file_name() == Some(OsStr::new("loopback")) {
            Self::Loopback
        } else {
            Self::Polder
        }
    }

    /// The name of the executable.
    pub fn name(self) -> &'static str {
        match self {
            Self::Polder => "polder",
            Self::PolderIpam => "polder-ipam",
            Self::Loopback => "loopback",
        }
    }
}

/// A network configuration with the parameters of every verb.
#[derive(Debug)]
pub struct Network {
    /// The network configuration from standard input.
    pub conf: NetConf,
    /// The folders of `CNI_PATH`, for delegated plugins.
    pub path: Vec<PathBuf>,
    /// The W3C trace context of the call, for the agent's log.
    pub trace: Option<String>,
    /// When the call began, as time since boot.
    pub began: Duration,
}

impl Network {
    /// Connects to the agent. `max_wait` is the timeout of each answer.
    pub fn agent(&self, max_wait: Duration) -> Result<Client, Error> {
        Ok(Client::connect(&self.conf.socket, max_wait)?.traced(self.trace.clone()))
    }
}

/// A call for one attachment: ADD, DEL or CHECK.
#[derive(Debug)]
pub struct Call {
    /// The parameters from the environment.
    pub environment: Environment,
    /// The addresses, MAC address and pool requested for this pod.
    pub options: PodOptions,
    /// The network that the attachment belongs to.
    pub network: Network,
}

impl Call {
    /// The attachment: network, container and interface.
    pub fn attachment(&self) -> Attachment {
        Attachment {
            network: self.network.conf.name.clone(),
            container: self.environment.container.clone(),
            interface: self.environment.interface.clone(),
        }
    }
}
