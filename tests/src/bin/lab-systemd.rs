//! The first process of a machine that systemd boots: it makes the machine out of this one's files, and becomes systemd.
//!
//! To be run as `unshare --mount --net --uts --ipc --pid --fork --kill-child lab-systemd FOLDER CONTROL_GROUP SHARED...`. Whatever
//! is written in the machine is in memory, and gone with it, except in the folders that are shared with it.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root, sethostname};
use polder_tests::mounts::{bind, keep_apart, mount_new};

/// What a machine without devices and without a user has no use for.
const LEFT_OUT: [&str; 8] = [
    "systemd-logind.service",
    "systemd-modules-load.service",
    "systemd-networkd.service",
    "systemd-resolved.service",
    "systemd-sysctl.service",
    "systemd-timesyncd.service",
    "systemd-udev-trigger.service",
    "systemd-udevd.service",
];

/// What is started.
const TARGET: &str = "[Unit]\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\n";

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, group, shared @ ..] = arguments.as_slice() else { bail!("FOLDER CONTROL_GROUP SHARED...") };
    let folder = Path::new(folder);
    keep_apart()?;
    enter_group(folder, group)?;
    let root = folder.join("root");
    lay_files(folder, &root)?;
    sethostname("booted").context("set the host name")?;
    // The first process has to know the machine by its number, which only a /proc of its own shows.
    mount_new("proc", root.join("proc"), None)?;
    mount_new("sysfs", root.join("sys"), None)?;
    mount_new("cgroup2", root.join("sys/fs/cgroup"), None)?;
    devices(&root.join("dev"))?;
    mount_new("tmpfs", root.join("run"), Some("mode=755"))?;
    units(&root.join("etc/systemd/system"))?;
    // Or /tmp is emptied at boot, where a shared folder may be.
    fs::create_dir_all(root.join("etc/tmpfiles.d"))?;
    symlink("/dev/null", root.join("etc/tmpfiles.d/tmp.conf"))?;
    for path in shared {
        let target = root.join(path.trim_start_matches('/'));
        fs::create_dir_all(&target)?;
        bind(Path::new(path), &target, MsFlags::MS_REC)?;
    }
    fs::write(
        root.join("etc/machine-id"),
        fs::read_to_string("/proc/sys/kernel/random/uuid")?.replace('-', ""),
    )?;
    chdir(&root)?;
    pivot_root(".", ".").context("change the root")?;
    umount2(".", MntFlags::MNT_DETACH).context("take the old root away")?;
    chdir("/")?;
    let mut systemd = Command::new("/lib/systemd/systemd");
    systemd
        .arg("--unit=lab.target")
        .env_clear()
        .env("container", "lab")
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    Err(systemd.exec()).context("run systemd")
}

/// Lets systemd see a control group of the machine's own as the root of all.
fn enter_group(folder: &Path, group: &str) -> anyhow::Result<()> {
    let all = folder.join("cgroup");
    fs::create_dir(&all)?;
    mount_new("cgroup2", &all, None)?;
    let own = all.join(group.trim_start_matches('/'));
    fs::create_dir(&own).with_context(|| format!("make {}", own.display()))?;
    fs::write(own.join("cgroup.procs"), "0").context("enter the control group")?;
    umount2(&all, MntFlags::MNT_DETACH)?;
    unshare(CloneFlags::CLONE_NEWCGROUP).context("see no other control group")
}

/// The files of this machine, with what is written kept in memory.
fn lay_files(folder: &Path, root: &Path) -> anyhow::Result<()> {
    let memory = folder.join("memory");
    fs::create_dir(&memory)?;
    fs::create_dir(root)?;
    mount_new("tmpfs", &memory, None)?;
    let [upper, work] = ["upper", "work"].map(|name| memory.join(name));
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    let layers = format!("lowerdir=/,upperdir={},workdir={}", upper.display(), work.display());
    mount_new("overlay", root, Some(&layers))?;
    // The agent's ledger must be on no layered file system.
    let var_lib = root.join("var/lib/polder");
    fs::create_dir_all(&var_lib)?;
    mount_new("tmpfs", &var_lib, None)
}

fn devices(dev: &Path) -> anyhow::Result<()> {
    mount_new("tmpfs", dev, Some("mode=755"))?;
    for name in ["null", "zero", "full", "random", "urandom", "tty"] {
        fs::write(dev.join(name), "")?;
        bind(&Path::new("/dev").join(name), &dev.join(name), MsFlags::empty())?;
    }
    fs::create_dir(dev.join("pts"))?;
    mount_new("devpts", dev.join("pts"), Some("newinstance,ptmxmode=0666,mode=620"))?;
    for (name, target) in [("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd")] {
        symlink(target, dev.join(name))?;
    }
    fs::create_dir(dev.join("shm"))?;
    mount_new("tmpfs", dev.join("shm"), None)
}

fn units(folder: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    // What the owner of this machine has switched on.
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "wants" || end == "requires") {
            fs::remove_dir_all(path)?;
        }
    }
    for name in LEFT_OUT {
        let _ = fs::remove_file(folder.join(name));
        symlink("/dev/null", folder.join(name))?;
    }
    Ok(fs::write(folder.join("lab.target"), TARGET)?)
}
