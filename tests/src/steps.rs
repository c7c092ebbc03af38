//! A plugin that is killed after a given system call, like by a crash, the OOM killer or an impatient runtime.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// How a plugin ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It was killed.
    Killed,
    /// It ended earlier: it makes fewer system calls.
    Ended,
}

/// Runs a command that finally execs the plugin, with its standard input from a file, and kills the plugin after the
/// return of its `last`th system call.
///
/// Uses a separate thread: only the tracing thread can wait for its tracees, and it must not wait for children of other
/// threads.
pub fn kill_after(last: usize, command: &Command, input: &Path) -> End {
    std::thread::scope(|scope| {
        let traced = scope.spawn(|| trace(last, command, input));
        traced.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn trace(last: usize, command: &Command, input: &Path) -> End {
    let input = File::open(input).expect("the input is there");
    // The shell stops itself until it is traced, and then execs the command.
    let mut waiting = Command::new("sh");
    waiting
        .args(["-c", "kill -STOP $$; exec \"$@\"", "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    waiting.stdin(input).stdout(Stdio::null()).stderr(Stdio::null());
    let mut outer = waiting.spawn().expect("there is a shell");
    let first = Pid::from_raw(i32::try_from(outer.id()).expect("a process number"));
    let mut tracer = Tracer { last, calls: 0, inside: false, plugin: None, end: End::Ended };
    waitpid(first, Some(WaitPidFlag::WUNTRACED)).expect("it stops by itself");
    let options = Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_EXITKILL;
    ptrace::seize(first, options).expect("it can be traced");
    kill(first, Signal::SIGCONT).expect("it is there");
    loop {
        match waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)) {
            Ok(status) if status.pid() == Some(first) && is_end(status) => break,
            Ok(status) => tracer.step(status),
            Err(Errno::ECHILD) => break,
            Err(Errno::EINTR) => {}
            Err(errno) => panic!("wait for the plugin: {errno}"),
        }
    }
    // It has already ended; this updates its handle.
    let _ = outer.try_wait();
    tracer.end
}

fn is_end(status: WaitStatus) -> bool {
    matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..))
}

struct Tracer {
    last: usize,
    calls: usize,
    /// Whether the plugin is in a system call.
    inside: bool,
    plugin: Option<Pid>,
    end: End,
}

impl Tracer {
    fn step(&mut self, status: WaitStatus) {
        let Some(pid) = status.pid() else { return };
        let signal = match status {
            WaitStatus::PtraceEvent(..) => {
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                if self.plugin.is_none() && name.trim() == "polder" {
                    self.plugin = Some(pid);
                    self.inside = true;
                }
                None
            }
            WaitStatus::PtraceSyscall(_) => {
                self.inside = !self.inside;
                self.calls += usize::from(!self.inside);
                if !self.inside && self.calls == self.last {
                    self.end = End::Killed;
                    let _ = kill(pid, Signal::SIGKILL);
                    return;
                }
                None
            }
            // The first stop of a new child is only for the tracer.
            WaitStatus::Stopped(_, Signal::SIGSTOP | Signal::SIGTRAP) => None,
            WaitStatus::Stopped(_, signal) => Some(signal),
            _ => return,
        };
        // Fails if the process has ended meanwhile.
        let _ =
            if self.plugin == Some(pid) { ptrace::syscall(pid, signal) } else { ptrace::cont(pid, signal) };
    }
}
