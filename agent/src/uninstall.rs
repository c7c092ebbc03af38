//! Takes away everything that the agent has made on this machine, and puts back what was there before.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, bail};
use polder_api::tombstones;
use polder_ipam::ledger::Ledger;
use polder_ipam::ledger::sqlite::Sqlite;

use crate::agent::{LEDGER, STORE, lock_state};
use crate::config::Config;
use crate::conflist;
use crate::follower;
use crate::kernel::{Kernel, sysctl};

/// What becomes of pods that are still attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attached {
    /// Nothing is done as long as there are any.
    Stay,
    /// They are cut off.
    CutOff,
}

/// What SQLite keeps beside a file of its own.
const BESIDE: [&str; 3] = ["", "-wal", "-shm"];

/// Takes everything away. What is gone already is no error. Returns what was done, in words.
pub fn uninstall(config: &Config, attached: Attached) -> anyhow::Result<Vec<String>> {
    let state = &config.state_dir;
    let is_there = state.exists();
    let lock = is_there
        .then(|| lock_state(state).context("stop the agent first, and see to it that nobody starts it again"))
        .transpose()?;
    let mut kernel = Kernel::open()?;
    let pods = kernel.pod_interfaces()?;
    if attached == Attached::Stay && !pods.is_empty() {
        bail!("{} pods are attached: delete them first, or cut them off with --with-pods", pods.len());
    }
    let mut done = Vec::new();
    // First what lets others begin anything with us.
    if conflist::remove(&config.cni_conf_dir).context("the CNI configuration")? {
        done.push(format!("the CNI configuration in {} is deleted", config.cni_conf_dir.display()));
    }
    let removed = kernel.remove_all()?;
    if removed > 0 {
        done.push(format!("{removed} devices, routes and tables are deleted"));
    }
    let ledger = state.join(LEDGER);
    if ledger.exists() {
        put_settings_back(&ledger, &mut done)?;
    }
    let run = &config.socket;
    delete(run)?;
    delete_folder(&tombstones(run))?;
    for name in [LEDGER, STORE] {
        BESIDE.iter().try_for_each(|beside| delete(&state.join(format!("{name}{beside}"))))?;
    }
    delete(&state.join(follower::SNAPSHOT))?;
    delete(&state.join("lock"))?;
    drop(lock);
    // What else is in these is not ours.
    let leave = [run.parent(), Some(state)];
    leave.into_iter().flatten().for_each(|folder| drop(fs::remove_dir(folder)));
    if is_there {
        done.push(format!("the state in {} is deleted", state.display()));
        done.push(format!(
            "node {} is still in the cluster: say polderctl node remove {} --dead on another",
            config.node, config.node
        ));
    }
    Ok(done)
}

/// Puts kernel settings back to what they were, the last changed first. Those of devices that are gone went with them.
fn put_settings_back(ledger: &Path, done: &mut Vec<String>) -> anyhow::Result<()> {
    for (path, previous) in Sqlite::open(ledger)?.sysctls()? {
        match sysctl::get(&path) {
            Ok(now) if now != previous => {
                sysctl::set(&path, &previous).with_context(|| format!("set {path} back to {previous}"))?;
                done.push(format!("{path} is {previous} again"));
            }
            _ => {}
        }
    }
    Ok(())
}

fn delete(file: &Path) -> anyhow::Result<()> {
    gone(fs::remove_file(file)).with_context(|| format!("delete {}", file.display()))
}

fn delete_folder(folder: &Path) -> anyhow::Result<()> {
    gone(fs::remove_dir_all(folder)).with_context(|| format!("delete {}", folder.display()))
}

fn gone(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
