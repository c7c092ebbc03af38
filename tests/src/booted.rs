//! A machine booted by a real systemd, made of namespaces and this machine's files. Files written in it are lost at its
//! end.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

use crate::node::{child_of, helper};
use crate::{cgroup, wait};

/// The machine. It ends, with all its processes, when this is dropped.
#[derive(Debug)]
pub struct Booted {
    /// `unshare`, whose child is systemd.
    outer: Child,
    systemd: i32,
    folder: TempDir,
}

impl Booted {
    /// Boots the machine with these folders of this machine at the same path. Its only interface is `lo`.
    pub fn boot(shared: &[&Path]) -> Self {
        let folder = tempfile::tempdir().expect("a folder for the machine");
        let log = File::create(folder.path().join("console")).expect("a log file");
        let mut outer = Command::new("unshare")
            .args(["--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child=SIGKILL", "--"])
            .arg(helper("lab-systemd"))
            .arg(folder.path())
            .arg(cgroup::of_node(folder.path()))
            .args(shared)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("unshare of util-linux is installed, and this is root");
        let number = outer.id();
        let systemd = wait::until("unshare to start the machine", || match outer.try_wait() {
            Ok(Some(status)) => panic!("the machine did not boot: {status}"),
            _ => child_of(number),
        });
        let machine = Self { outer, systemd, folder };
        wait::until("systemd to have booted", || {
            let state = machine.attempt("systemctl is-system-running");
            let message = String::from_utf8_lossy(&state.stdout).trim().to_owned();
            // Failed units of this machine that cannot run in a lab do not matter.
            if ["running", "degraded"].contains(&message.as_str()) {
                Ok(())
            } else {
                Err(machine.console(&message))
            }
        });
        machine.shell("ip link set lo up");
        machine
    }

    fn console(&self, message: &str) -> String {
        let log = std::fs::read_to_string(self.folder.path().join("console")).unwrap_or_default();
        format!("{message} {log}")
    }

    /// Runs a shell command line in the machine, and returns its output. Fails if the command fails.
    pub fn shell(&self, line: &str) -> String {
        let output = self.attempt(line);
        let [text, error] =
            [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        assert!(output.status.success(), "{line}: {}\n{text}{error}", output.status);
        text
    }

    /// Runs a shell command line in the machine.
    pub fn attempt(&self, line: &str) -> Output {
        let mut command = Command::new("nsenter");
        command.args([
            "--target",
            &self.systemd.to_string(),
            "--mount",
            "--net",
            "--uts",
            "--ipc",
            "--pid",
            "--cgroup",
            "--",
        ]);
        command.args([
            "env",
            "-i",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "sh",
            "-ec",
            line,
        ]);
        command.stdin(Stdio::null()).output().expect("nsenter is installed")
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        let _ = self.outer.kill();
        let _ = self.outer.wait();
        // The groups become empty shortly after the last process has ended.
        wait::until_true("the machine's control groups to be gone", || {
            cgroup::remove(self.folder.path());
            !cgroup::is_there(self.folder.path())
        });
    }
}
