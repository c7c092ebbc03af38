//! The first process of a machine booted by systemd: it sets the machine up from this machine's files, and execs
//! systemd.
//!
//! Run it as `unshare --mount --net --uts --ipc --pid --fork --kill-child lab-systemd FOLDER CONTROL_GROUP SHARED...`.
//! Files written in the machine are in memory and lost at its end, except in the shared folders.

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

/// Units that a machine without devices and without users does not need.
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

/// The target that is started.
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
    // The first process needs its process id in the machine, which only a new /proc shows.
    mount_new("proc", root.join("proc"), None)?;
    mount_new("sysfs", root.join("sys"), None)?;
    mount_new("cgroup2", root.join("sys/fs/cgroup"), None)?;
    devices(&root.join("dev"))?;
    mount_new("tmpfs", root.join("run"), Some("mode=755"))?;
    units(&root.join("etc/systemd/system"))?;
    // Keeps /tmp at boot, because it may contain a shared folder.
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

/// Makes a control group of the machine the root of all groups that systemd sees.
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

/// Mounts the files of this machine, with changes kept in memory.
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
    // The agent's ledger must not be on a layered file system.
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
    // Units that this machine's administrator has enabled.
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
