//! `scripts/install` with a folder as the root of another machine. No lab is needed.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use polder_tests::agent::dist;
use polder_tests::program::{combined_output, must, refused};
use tempfile::TempDir;

const PROGRAMS: [&str; 4] = ["polder", "polder-ipam", "polder-agent", "polderctl"];
const CONFIGURATION: &str = "etc/polder/agent.toml";

/// A folder as a machine, and two releases to install on it.
struct Machine {
    root: TempDir,
    releases: TempDir,
}

impl Machine {
    fn new() -> Self {
        let releases = tempfile::tempdir().unwrap();
        for release in ["first", "second"] {
            let folder = releases.path().join(release);
            fs::create_dir(&folder).unwrap();
            for name in PROGRAMS {
                let mut program = fs::read(dist().join(name)).unwrap();
                // The program still runs with these bytes at its end.
                program.extend(release.as_bytes());
                fs::write(folder.join(name), program).unwrap();
                fs::set_permissions(
                    folder.join(name),
                    fs::metadata(dist().join(name)).unwrap().permissions(),
                )
                .unwrap();
            }
        }
        Self { root: tempfile::tempdir().unwrap(), releases }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn release(&self, name: &str) -> PathBuf {
        self.releases.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/install"));
        command.arg("--root").arg(self.root.path()).args(arguments).stdin(Stdio::null());
        command
    }

    fn installing(&self, release: &str) -> Command {
        let mut command = self.command(&["--from"]);
        command.arg(self.release(release));
        command
    }

    fn install(&self, release: &str) -> String {
        must(&mut self.installing(release))
    }

    fn run(&self, arguments: &[&str]) -> String {
        must(&mut self.command(arguments))
    }

    /// The release of the program at that path. `None` if the file is missing or incomplete.
    fn release_of(&self, path: &str) -> Option<&'static str> {
        let program = fs::read(self.path(path)).ok()?;
        let is_of = |release: &&str| {
            fs::read(self.release(release).join(Path::new(path).file_name().unwrap())).unwrap() == program
        };
        ["first", "second"].into_iter().find(is_of)
    }

    /// The release that the machine would run.
    fn installed(&self) -> Option<&'static str> {
        let found = ["polder", "polder-ipam", "polder-agent", "polderctl"]
            .map(|name| self.release_of(&format!("usr/local/libexec/polder/current/{name}")));
        assert!(found.iter().all(|release| *release == found[0]), "a mixture: {found:?}");
        found[0]
    }

    fn assert_all_is_of(&self, release: &str) {
        assert_eq!(self.installed(), Some(release));
        for path in [
            "usr/local/bin/polder-agent",
            "usr/local/bin/polderctl",
            "opt/cni/bin/polder",
            "opt/cni/bin/polder-ipam",
        ] {
            assert_eq!(self.release_of(path), Some(release), "{path}");
        }
    }

    /// Every file with its inode number and its modification time in seconds and nanoseconds: they show whether it was
    /// written again.
    fn files(&self) -> BTreeMap<PathBuf, (u64, i64, i64)> {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.root.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let found = fs::symlink_metadata(&path).unwrap();
                if found.is_dir() {
                    folders.push(path);
                } else {
                    files.insert(path, (found.ino(), found.mtime(), found.mtime_nsec()));
                }
            }
        }
        files
    }
}

#[test]
fn a_second_installation_of_the_same_release_changes_nothing() {
    let machine = Machine::new();
    machine.install("first");
    machine.assert_all_is_of("first");
    let files = machine.files();
    assert!(machine.install("first").contains("nothing to do"));
    assert_eq!(machine.files(), files);
}

#[test]
fn an_upgrade_keeps_the_configuration_and_a_rollback_restores_the_earlier_files() {
    let machine = Machine::new();
    machine.install("first");
    let own = "store = \"embedded\"\n[bootstrap]\npools = [\"10.244.0.0/16\"]\n";
    fs::write(machine.path(CONFIGURATION), own).unwrap();
    let text = refused(&mut machine.command(&["--rollback"]));
    assert!(text.contains("no release before"), "{text}");

    machine.install("second");
    machine.assert_all_is_of("second");
    machine.run(&["--rollback"]);
    machine.assert_all_is_of("first");
    machine.run(&["--rollback"]);
    machine.assert_all_is_of("second");
    assert_eq!(fs::read_to_string(machine.path(CONFIGURATION)).unwrap(), own);

    machine.run(&["--uninstall"]);
    let left: Vec<_> = machine.files().into_keys().collect();
    assert_eq!(left, [machine.path(CONFIGURATION)]);
    assert!(machine.run(&["--uninstall"]).contains("nothing to do"));
}

#[test]
fn the_installed_configuration_is_valid_once_etcd_and_pools_are_set() {
    let machine = Machine::new();
    machine.install("first");
    let text = fs::read_to_string(machine.path(CONFIGURATION)).unwrap();
    assert_eq!(text.lines().find(|line| !line.is_empty() && !line.starts_with('#')), None);
    let check = || {
        let mut command = Command::new(machine.path("usr/local/bin/polder-agent"));
        command.args(["--check-config", "--config"]).arg(machine.path(CONFIGURATION)).output().unwrap()
    };
    let output = check();
    let errors = combined_output(&output);
    assert!(!output.status.success() && errors.contains("etcd.endpoints"), "{errors}");
    let mut filled_in = text;
    for key in ["[etcd]", "endpoints = ", "[bootstrap]", "pools = "] {
        let line = format!("\n#{key}");
        assert_eq!(filled_in.matches(&line).count(), 1, "{key}");
        filled_in = filled_in.replace(&line, &format!("\n{key}"));
    }
    fs::write(machine.path(CONFIGURATION), filled_in).unwrap();
    let output = check();
    assert!(output.status.success(), "{}", combined_output(&output));
}

#[test]
fn a_release_whose_agent_refuses_the_configuration_is_not_installed() {
    let machine = Machine::new();
    machine.install("first");
    fs::write(machine.path(CONFIGURATION), "store = \"embedded\"\n").unwrap();
    let agent = machine.release("second").join("polder-agent");
    // A stand-in: no release refuses a configuration yet that another accepts.
    fs::write(
        &agent,
        "#!/bin/sh\n[ \"$1\" = --version ] && echo polder-agent 9 || { echo polder-agent: no such key; \
                       exit 3; }\n",
    )
    .unwrap();
    let files = machine.files();
    let text = refused(&mut machine.installing("second"));
    assert!(text.contains("no such key") && text.contains("nothing was changed"), "{text}");
    assert_eq!(machine.installed(), Some("first"));
    let stays = |path: &&PathBuf| !path.ends_with(".lock");
    let now = machine.files();
    assert!(files.iter().filter(|(path, _)| stays(path)).all(|(path, is)| now.get(path) == Some(is)));
}

#[test]
fn an_upgrade_that_is_killed_leaves_a_complete_release_and_can_be_repeated() {
    let machine = Machine::new();
    machine.install("first");
    let begun = Instant::now();
    machine.install("second");
    let whole = begun.elapsed();
    let mut releases = ["first", "second"].into_iter().cycle();
    for part in 0..6 {
        let (next, before) = (releases.next().unwrap(), machine.installed().unwrap());
        let mut child = machine.installing(next).stderr(Stdio::null()).process_group(0).spawn().unwrap();
        pause(whole * part / 6);
        // Together with all its child processes.
        killpg(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        let after = machine.installed().unwrap();
        assert!(after == before || after == next);
        machine.install(next);
        machine.assert_all_is_of(next);
    }
    let store: Vec<_> = fs::read_dir(machine.path("usr/local/libexec/polder")).unwrap().collect();
    assert_eq!(
        store.len(),
        5,
        "two releases, two links and a lock, and nothing of what was killed: {store:?}"
    );
}

#[expect(clippy::disallowed_methods, reason = "it kills at any moment, and waits for none")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}
