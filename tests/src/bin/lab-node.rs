//! The first process of a lab node: it sets the node up, and its end is the node's end.
//!
//! To be run as `unshare --mount --net --uts --pid --fork --kill-child lab-node NAME FOLDER BOOT_ID`. It says
//! `ready PID` when the node is there, with the process number that the host knows it by, and then lives until its
//! standard input ends. The line `keep` makes it outlive that.

use std::fs;
use std::io::{self, BufRead, Write};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::wait::wait;
use polder_tests::mounts::{bind, keep_apart, mount_new};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, folder, boot_id] = arguments.as_slice() else { bail!("NAME FOLDER BOOT_ID") };
    // While /proc is still the host's, it tells what the host calls this process.
    let pid = fs::read_link("/proc/self").context("read /proc/self")?;
    set_up(name, Path::new(folder), boot_id)?;
    // A first process has to take note of the end of every process that has lost its parent.
    std::thread::spawn(|| {
        loop {
            if wait().is_err() {
                std::thread::park_timeout(std::time::Duration::from_millis(50));
            }
        }
    });
    println!("ready {}", pid.display());
    io::stdout().flush()?;
    let mut keep = false;
    for line in io::stdin().lock().lines() {
        keep |= line.is_ok_and(|line| line == "keep");
    }
    if keep {
        loop {
            std::thread::park();
        }
    }
    Ok(())
}

fn set_up(name: &str, folder: &Path, boot_id: &str) -> anyhow::Result<()> {
    nix::unistd::sethostname(name).context("set the host name")?;
    keep_apart()?;
    mount_new("tmpfs", "/run", None)?;
    fs::create_dir_all("/run/netns")?;
    fs::create_dir_all("/run/lock")?;
    let var_lib = folder.join("var-lib");
    fs::create_dir_all(&var_lib)?;
    bind(&var_lib, Path::new("/var/lib"), MsFlags::empty())?;
    own_sys()?;
    let etc = folder.join("etc");
    own_etc(&etc, &folder.join("etc-work"))?;
    let machine_id = etc.join("machine-id");
    if !machine_id.exists() {
        fs::write("/etc/machine-id", fs::read_to_string("/proc/sys/kernel/random/uuid")?.replace('-', ""))?;
    }
    mount_new("proc", "/proc", None)?;
    fs::write("/run/boot-id", format!("{boot_id}\n"))?;
    bind(Path::new("/run/boot-id"), Path::new("/proc/sys/kernel/random/boot_id"), MsFlags::empty())?;
    if !Path::new("/etc/mtab").exists() {
        let _ = symlink("/proc/self/mounts", "/etc/mtab");
    }
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("run ip")?;
    if up.success() { Ok(()) } else { bail!("lo cannot be switched on") }
}

/// `/etc` is the host's, except for what is written in the node: that is in `own`, and stays with the node.
fn own_etc(own: &Path, work: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(own)?;
    fs::create_dir_all(work)?;
    let layers = format!("lowerdir=/etc,upperdir={},workdir={}", own.display(), work.display());
    if mount_new("overlay", "/etc", Some(&layers)).is_ok() {
        return Ok(());
    }
    // An overlay cannot be put on an overlay, which is what a container has for its files.
    if !own.join("passwd").exists() {
        let copied = Command::new("cp").arg("-a").arg("/etc/.").arg(own).status().context("run cp")?;
        if !copied.success() {
            bail!("/etc cannot be copied");
        }
        let _ = fs::remove_file(own.join("machine-id"));
    }
    bind(own, Path::new("/etc"), MsFlags::empty())
}

/// `/sys` names the node's own interfaces. The control groups in it are the host's.
fn own_sys() -> anyhow::Result<()> {
    let (groups, kept) = (Path::new("/sys/fs/cgroup"), Path::new("/run/cgroup"));
    fs::create_dir(kept)?;
    bind(groups, kept, MsFlags::MS_REC)?;
    mount_new("sysfs", "/sys", None)?;
    bind(kept, groups, MsFlags::MS_REC)?;
    umount2(kept, MntFlags::MNT_DETACH).context("take /run/cgroup away")?;
    Ok(fs::remove_dir(kept)?)
}
