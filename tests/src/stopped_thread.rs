//! Stops one thread of a process while the others continue.

use std::fs;

use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// Stops the thread of that name, runs the job, and continues the thread. After a panic of the job, it continues when
/// the caller's thread ends.
pub fn with_stopped_thread<T>(process: Pid, name: &str, job: impl FnOnce() -> T) -> T {
    let thread = find(process, name);
    ptrace::seize(thread, Options::empty()).expect("root traces any thread");
    ptrace::interrupt(thread).expect("it is traced");
    waitpid(thread, Some(WaitPidFlag::__WALL)).expect("it stops");
    let outcome = job();
    ptrace::detach(thread, None).expect("it is stopped");
    outcome
}

fn find(process: Pid, name: &str) -> Pid {
    let threads = fs::read_dir(format!("/proc/{process}/task")).expect("it runs");
    let mut found = threads.filter_map(|entry| {
        let path = entry.ok()?.path();
        let is_it = fs::read_to_string(path.join("comm")).ok()?.trim() == name;
        is_it.then(|| path.file_name()?.to_str()?.parse().ok()).flatten()
    });
    Pid::from_raw(found.next().unwrap_or_else(|| panic!("process {process} has no thread {name}")))
}
