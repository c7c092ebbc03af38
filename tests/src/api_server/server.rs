//! The threads of the stand-in: one that accepts, one per connection.

use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use serde_json::Value;

use super::Behaviour;
use super::answer::{self, Outcome, Watch};
use super::connection::{Connection, Request};
use super::objects::Objects;
use super::recording::Recordings;

/// What all threads share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) recordings: Recordings,
    pub(super) token: &'static str,
    tls: Arc<ServerConfig>,
    state: Mutex<State>,
    changed: Condvar,
}

/// What changes.
#[derive(Debug)]
pub(super) struct State {
    pub(super) objects: Objects,
    pub(super) requests: Vec<Request>,
    /// Number of open watches.
    pub(super) watches: usize,
    /// Requests that no recording covers.
    pub(super) uncovered: Vec<String>,
    pub(super) behaviour: Behaviour,
    /// Watches of an earlier round end.
    round: u64,
    /// The process, counted from 1; 0 while none runs.
    process: u64,
    processes: u64,
    listener: Option<TcpListener>,
    connections: Vec<TcpStream>,
}

/// Listens at that place in this thread's network namespace.
pub(super) fn listen(place: SocketAddr) -> TcpListener {
    TcpListener::bind(place).unwrap_or_else(|error| panic!("{place}: {error}"))
}

impl Shared {
    pub(super) fn new(recordings: Recordings, tls: Arc<ServerConfig>, token: &'static str) -> Arc<Self> {
        let state = State {
            objects: Objects::new(),
            requests: Vec::new(),
            watches: 0,
            uncovered: Vec::new(),
            behaviour: Behaviour::Serving,
            round: 0,
            process: 0,
            processes: 0,
            listener: None,
            connections: Vec::new(),
        };
        Arc::new(Self { recordings, token, tls, state: Mutex::new(state), changed: Condvar::new() })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics with the lock")
    }

    /// Wakes the watches after a change of an object.
    pub(super) fn changed(&self) {
        self.changed.notify_all();
    }

    pub(super) fn behave(&self, behaviour: Behaviour) {
        let mut state = self.state();
        state.behaviour = behaviour;
        // A frozen process keeps its watches open and silent.
        if behaviour != Behaviour::Frozen {
            state.round += 1;
        }
        drop(state);
        self.changed();
    }

    pub(super) fn end_watches(&self) {
        self.state().round += 1;
        self.changed();
    }

    pub(super) fn stop(&self) {
        let mut state = self.state();
        state.process = 0;
        for connection in state.connections.drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
        if let Some(listener) = state.listener.take() {
            let _ = nix::sys::socket::shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
        drop(state);
        self.changed();
    }

    pub(super) fn serve(self: &Arc<Self>, listener: TcpListener) {
        let mut state = self.state();
        assert!(state.process == 0, "the API server runs already");
        state.processes += 1;
        state.process = state.processes;
        let process = state.process;
        state.listener = Some(listener.try_clone().expect("a second handle"));
        drop(state);
        let shared = Arc::clone(self);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                let shared = Arc::clone(&shared);
                let mut state = shared.state();
                if state.process != process {
                    return;
                }
                state.connections.push(stream.try_clone().expect("a second handle"));
                drop(state);
                thread::spawn(move || shared.talk(process, stream));
            }
        });
    }

    fn talk(&self, process: u64, stream: TcpStream) {
        // A frozen process does not even answer the handshake.
        self.pause(process, |behaviour| behaviour == Behaviour::Frozen);
        let Some(mut connection) = Connection::new(Arc::clone(&self.tls), stream) else { return };
        // An error is the client's end of the connection, or that of this process.
        let _ = self.converse(process, &mut connection);
    }

    fn converse(&self, process: u64, connection: &mut Connection) -> io::Result<()> {
        while let Some(request) = connection.read()? {
            self.state().requests.push(request.clone());
            self.pause(process, |behaviour| behaviour == Behaviour::Frozen);
            self.pause_for_slowness(process);
            let mut state = self.state();
            if state.process != process {
                break;
            }
            let outcome = answer::decide(&self.recordings, self.token, &mut state, &request);
            drop(state);
            self.changed();
            match outcome {
                Outcome::Answer(answer) => connection.send(&answer)?,
                Outcome::Lines(status, headers, lines) => {
                    connection.begin(status, &headers)?;
                    lines.iter().try_for_each(|line| connection.chunk(line))?;
                    connection.end()?;
                }
                Outcome::Watch(watch, headers) => self.watch(process, connection, watch, &headers)?,
            }
        }
        Ok(())
    }

    fn pause(&self, process: u64, condition: impl Fn(Behaviour) -> bool) {
        let state = self.state();
        let waiting = |state: &mut State| state.process == process && condition(state.behaviour);
        drop(self.changed.wait_while(state, waiting).expect("no thread panics with the lock"));
    }

    fn pause_for_slowness(&self, process: u64) {
        let state = self.state();
        let Behaviour::Slow(delay) = state.behaviour else { return };
        let slow = |state: &mut State| state.process == process && state.behaviour == Behaviour::Slow(delay);
        drop(self.changed.wait_timeout_while(state, delay, slow).expect("no thread panics with the lock"));
    }

    fn watch(
        &self,
        process: u64,
        connection: &mut Connection,
        watch: Watch,
        headers: &BTreeMap<String, String>,
    ) -> io::Result<()> {
        connection.begin(200, headers)?;
        let mut state = self.state();
        state.watches += 1;
        let round = state.round;
        drop(state);
        let outcome = self.follow(process, round, connection, watch);
        self.state().watches -= 1;
        outcome
    }

    fn follow(
        &self,
        process: u64,
        round: u64,
        connection: &mut Connection,
        mut watch: Watch,
    ) -> io::Result<()> {
        let deadline = Instant::now() + watch.timeout;
        loop {
            let mut state = self.state();
            let lines: Vec<Value> = loop {
                let ended = state.process != process || state.round != round || Instant::now() >= deadline;
                let frozen = state.behaviour == Behaviour::Frozen && state.process == process;
                let lines = watch.next(&state.objects);
                if !frozen && (ended || !lines.is_empty()) {
                    break lines;
                }
                // Short, because a client that has gone is noticed only by writing.
                let rest = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(50));
                state = self.changed.wait_timeout(state, rest).expect("no thread panics with the lock").0;
            };
            let process_ended = state.process != process;
            let last = watch.bookmark(&self.recordings, state.objects.revision());
            drop(state);
            if process_ended {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if lines.is_empty() {
                // The real server sends a bookmark shortly before the end.
                last.iter().try_for_each(|line| connection.chunk(line))?;
                return connection.end();
            }
            lines.iter().try_for_each(|line| connection.chunk(line))?;
        }
    }
}
