//! `polder-agent install-plugins`: copies the CNI plugins from an image to the host. No lab is needed.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use polder_tests::agent::dist;
use polder_tests::program::{combined_output, must, refused};

const PLUGINS: [&str; 2] = ["polder", "polder-ipam"];

fn install(to: &Path) -> Command {
    let mut command = Command::new(dist().join("polder-agent"));
    command.arg("install-plugins").arg("--to").arg(to).env_remove("container");
    command
}

#[test]
fn exactly_the_plugins_are_installed_complete_and_executable() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("cni/bin");
    must(&mut install(&to));
    for name in PLUGINS {
        assert_eq!(fs::read(to.join(name)).unwrap(), fs::read(dist().join(name)).unwrap(), "{name}");
        assert_eq!(fs::metadata(to.join(name)).unwrap().permissions().mode() & 0o7777, 0o755, "{name}");
    }
    assert_eq!(fs::read_link(to.join("loopback")).unwrap(), Path::new("polder"));
    assert_eq!(fs::read_dir(&to).unwrap().count(), PLUGINS.len() + 1);
    let version = Command::new(to.join("polder")).env("CNI_COMMAND", "VERSION").output().unwrap();
    assert!(combined_output(&version).contains("supportedVersions"), "{version:?}");
}

#[test]
fn an_up_to_date_plugin_is_kept_and_others_are_replaced_by_rename() {
    let folder = tempfile::tempdir().unwrap();
    let plugin = folder.path().join("polder");
    let inode = || fs::symlink_metadata(&plugin).unwrap().ino();
    must(&mut install(folder.path()));
    let first = inode();
    assert!(must(&mut install(folder.path())).contains("already up to date"));
    assert_eq!(inode(), first, "a runtime that watches the folder is told of nothing");

    // A runtime has the old file open: its content must not change.
    let open = folder.path().join("open");
    fs::write(&plugin, "an older one").unwrap();
    fs::hard_link(&plugin, &open).unwrap();
    must(&mut install(folder.path()));
    assert_eq!(fs::read_to_string(&open).unwrap(), "an older one");
    assert_ne!(inode(), first);

    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o600)).unwrap();
    must(&mut install(folder.path()));
    assert_eq!(fs::metadata(&plugin).unwrap().permissions().mode() & 0o7777, 0o755);

    fs::remove_file(&plugin).unwrap();
    symlink("/nowhere", &plugin).unwrap();
    must(&mut install(folder.path()));
    assert!(fs::symlink_metadata(&plugin).unwrap().is_file(), "what the link leads to is not written");
}

#[test]
fn a_foreign_loopback_plugin_is_kept_and_a_dangling_link_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let loopback = folder.path().join("loopback");
    fs::write(&loopback, "the reference plugin").unwrap();
    assert!(!must(&mut install(folder.path())).contains("loopback"));
    assert_eq!(fs::read_to_string(&loopback).unwrap(), "the reference plugin");

    fs::remove_file(&loopback).unwrap();
    symlink("/on/the/host/loopback", &loopback).unwrap();
    assert!(!must(&mut install(folder.path())).contains("loopback"), "there may be one on the host");

    fs::remove_file(&loopback).unwrap();
    symlink("nothing", &loopback).unwrap();
    assert!(must(&mut install(folder.path())).contains("loopback is installed"));
    assert_eq!(fs::read_link(&loopback).unwrap(), Path::new("polder"));
}

#[test]
fn a_failed_installation_reports_the_remedy_and_installs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::write(from.join("polder-ipam"), "one of the two").unwrap();
    let text = refused(install(&to).arg("--from").arg(&from));
    assert!(text.contains(&from.join("polder").display().to_string()) && text.contains("--from"), "{text}");
    assert!(!to.exists(), "the other one was written");

    fs::write(&to, "a file").unwrap();
    let text = refused(&mut install(&to));
    assert!(text.contains(&to.display().to_string()) && text.contains("--to"), "{text}");
}

#[test]
fn a_host_folder_that_is_not_mounted_into_the_container_is_reported() {
    let forgotten = Path::new("/polder-test-not-mounted/bin");
    let text = refused(install(forgotten).env("container", "oci"));
    assert!(text.contains("/polder-test-not-mounted/bin") && text.contains("hostPath"), "{text}");
    assert!(!forgotten.parent().unwrap().exists());
}

#[test]
fn a_state_folder_that_is_not_mounted_is_refused_before_any_change() {
    let forgotten = Path::new("/polder-test-not-mounted/state");
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("agent.toml");
    // If the agent continued, it would end at its socket, and not run on this machine.
    let text = format!(
        "node = \"n1\"\nstore = \"embedded\"\nstate_dir = {forgotten:?}\nsocket = \"/dev/null/agent.sock\"\n"
    );
    fs::write(&config, text).unwrap();
    let mut agent = Command::new(dist().join("polder-agent"));
    let text = refused(agent.arg("--config").arg(&config).env("container", "oci"));
    for expected in ["state_dir /polder-test-not-mounted/state", "Mount", "allow_ephemeral_state = true"] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    let mut uninstall = Command::new(dist().join("polderctl"));
    let text = refused(uninstall.args(["uninstall", "--config"]).arg(&config).env("container", "oci"));
    assert!(text.contains("state_dir /polder-test-not-mounted/state"), "{text}");
    assert!(!forgotten.parent().unwrap().exists(), "the folder was made");
}
