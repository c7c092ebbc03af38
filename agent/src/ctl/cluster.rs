//! `polderctl cluster`: the settings that all nodes share.

use clap::{Args, Subcommand, ValueEnum};
use ipnetwork::{IpNetwork, IpNetworkError};
use polder_api::status::{AttachMode, ClusterStatus, SettingsChange};
use polder_api::{Backend, ask};

use super::{CommandOutput, Render, Run, Session};

/// Subcommands of `polderctl cluster`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the cluster settings
    Show,
    /// Change the given settings on all nodes; other settings stay unchanged
    Set(Changes),
}

/// Arguments of `polderctl cluster set`.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub struct Changes {
    /// Path to pods on other nodes: direct (routes only), vxlan (tunnels only), auto (direct on the same link,
    /// otherwise vxlan). A change loses no packets if all nodes can use the new path
    #[arg(long)]
    backend: Option<Backend>,
    /// UDP port of VXLAN tunnels, 1 to 65535. Tunnels are interrupted until all nodes have applied the change
    #[arg(long, value_name = "PORT")]
    vxlan_port: Option<u16>,
    /// VXLAN network identifier, 1 to 16777215. Tunnels are interrupted until all nodes have applied the change
    #[arg(long, value_name = "VNI")]
    vxlan_vni: Option<u32>,
    /// Replace the source address of pod packets to destinations outside the cluster by the node's address. Existing
    /// connections do not change
    #[arg(long, value_name = "on|off")]
    masquerade: Option<Switch>,
    /// Destinations, in addition to the pools, that see the pod's source address. Replaces the current list; none
    /// empties it
    #[arg(long, value_name = "CIDR[,CIDR]|none", value_parser = ranges)]
    masquerade_except: Option<Ranges>,
    /// Attachment of pods to their node: bridge or routed. It is set when the cluster is created; another value than
    /// the current one is refused
    #[arg(long, value_name = "KIND", value_parser = attachment)]
    attach: Option<AttachMode>,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Switch {
    On,
    Off,
}

/// A list of ranges as one argument: a plain `Vec` would make clap expect several arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ranges(Vec<IpNetwork>);

/// An argument of `polderctl cluster set` is invalid.
#[derive(Debug, thiserror::Error)]
enum InvalidSetting {
    /// The argument of `--attach` is not a kind of attachment.
    #[error("unknown attachment kind {given:?}: use bridge or routed")]
    Attach {
        /// The argument.
        given: String,
    },
    /// A part of the argument of `--masquerade-except` is not a range.
    /// Remedy: write ranges as address and prefix length, like `192.0.2.0/24`, separated by commas.
    #[error("{item:?}: {problem}")]
    Range {
        /// The part.
        item: String,
        /// The error.
        problem: IpNetworkError,
    },
}

/// The settings cannot be shown.
#[derive(Debug, thiserror::Error)]
enum SettingsUnknown {
    /// The agent has not read the cluster settings yet, or the cluster has none.
    #[error("the cluster settings are not known on this node yet: see polderctl status")]
    Unknown,
}

fn attachment(text: &str) -> Result<AttachMode, InvalidSetting> {
    let known = AttachMode::ALL.iter().find(|known| known.as_str() == text);
    known.copied().ok_or_else(|| InvalidSetting::Attach { given: text.to_owned() })
}

fn ranges(text: &str) -> Result<Ranges, InvalidSetting> {
    if text == "none" {
        return Ok(Ranges(Vec::new()));
    }
    let invalid = |item: &str, problem| InvalidSetting::Range { item: item.to_owned(), problem };
    let parse = |item: &str| item.trim().parse().map_err(|problem| invalid(item, problem));
    Ok(Ranges(text.split(',').map(parse).collect::<Result<_, _>>()?))
}

impl Run for Command {
    fn run(&self, session: &Session<'_>) -> anyhow::Result<CommandOutput> {
        match self {
            Self::Show => match session.ask(ask::Status)?.cluster {
                Some(cluster) => session.render(&cluster),
                None => Err(SettingsUnknown::Unknown.into()),
            },
            Self::Set(changes) => session.show(ask::ChangeSettings(SettingsChange {
                backend: changes.backend,
                attach: changes.attach,
                port: changes.vxlan_port,
                vni: changes.vxlan_vni,
                masquerade: changes.masquerade.map(|switch| switch == Switch::On),
                except: changes.masquerade_except.clone().map(|Ranges(ranges)| ranges),
            })),
        }
    }
}

impl Render for ClusterStatus {
    fn table(&self) -> String {
        let except: Vec<String> = self.masquerade_except.iter().map(ToString::to_string).collect();
        let except = if except.is_empty() { "none".to_owned() } else { except.join(", ") };
        format!(
            "id                 {}\nbackend            {}\nattach             {}\nvxlan port         {}\nvxlan \
             vni          {}\n\
             masquerade         {}\nmasquerade except  {except}\n",
            self.id,
            self.backend,
            self.attach,
            self.vxlan_port,
            self.vxlan_vni,
            if self.masquerade { "on" } else { "off" },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_masquerade_exceptions_are_a_list_of_ranges_or_none() {
        assert_eq!(ranges("none").unwrap(), Ranges(Vec::new()));
        let two = vec!["192.0.2.0/24".parse().unwrap(), "fd00::/8".parse().unwrap()];
        assert_eq!(ranges("192.0.2.0/24, fd00::/8").unwrap(), Ranges(two));
        assert!(ranges("192.0.2.0/24,here").unwrap_err().to_string().contains("here"));
    }
}
