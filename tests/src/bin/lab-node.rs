//! The first process of a lab node: it sets the node up, and the node ends with it.
//!
//! Run it as `unshare --mount --net --uts --pid --fork --kill-child lab-node NAME FOLDER BOOT_ID`. It prints `ready
//! PID` when the node is set up, with its process id on the host, and runs until its standard input ends. After the
//! line `keep` it continues to run.

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
    // While /proc is still the host's, the link has the process id on the host.
    let pid = fs::read_link("/proc/self").context("read /proc/self")?;
    set_up(name, Path::new(folder), boot_id)?;
    // A first process must reap all orphaned processes.
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

/// Mounts the host's `/etc`, except for files written in the node: they are in `own`, and are kept with the node.
fn own_etc(own: &Path, work: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(own)?;
    fs::create_dir_all(work)?;
    let layers = format!("lowerdir=/etc,upperdir={},workdir={}", own.display(), work.display());
    if mount_new("overlay", "/etc", Some(&layers)).is_ok() {
        return Ok(());
    }
    // An overlay cannot be mounted on an overlay, which is the root file system of a container.
    if !own.join("passwd").exists() {
        let copied = Command::new("cp").arg("-a").arg("/etc/.").arg(own).status().context("run cp")?;
        if !copied.success() {
            bail!("/etc cannot be copied");
        }
        let _ = fs::remove_file(own.join("machine-id"));
    }
    bind(own, Path::new("/etc"), MsFlags::empty())
}

/// Mounts a `/sys` with the node's own interfaces. The control groups in it are the host's.
fn own_sys() -> anyhow::Result<()> {
    let (groups, kept) = (Path::new("/sys/fs/cgroup"), Path::new("/run/cgroup"));
    fs::create_dir(kept)?;
    bind(groups, kept, MsFlags::MS_REC)?;
    mount_new("sysfs", "/sys", None)?;
    bind(kept, groups, MsFlags::MS_REC)?;
    umount2(kept, MntFlags::MNT_DETACH).context("take /run/cgroup away")?;
    Ok(fs::remove_dir(kept)?)
}
