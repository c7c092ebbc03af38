//! A real etcd on its own machines.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::path::{Path, PathBuf};

use crate::node::{Node, Process};
use crate::wait;

/// An etcd cluster, each member on its own machine. It can be empty.
#[derive(Debug)]
pub struct Etcd {
    members: Vec<Member>,
    tls: Option<Tls>,
    /// Client certificate and key of `etcdctl`.
    client: Option<(PathBuf, PathBuf)>,
    /// User of `etcdctl`, as `name:password`.
    user: Option<String>,
}

#[derive(Debug)]
struct Member {
    // Dropped first: a stopped process must be continued before its machine can end.
    process: Option<Process>,
    node: Node,
    address: IpAddr,
}

/// Certificates for etcd, in files that its machines can read.
#[derive(Debug, Clone)]
pub struct Tls {
    /// The authority that must have signed client certificates.
    pub ca: PathBuf,
    /// etcd's own certificate.
    pub certificate: PathBuf,
    /// Key of etcd's certificate.
    pub key: PathBuf,
}

impl Etcd {
    /// Starts a member on each of the machines.
    pub fn start(machines: Vec<(Node, IpAddr)>, tls: Option<Tls>) -> Self {
        let members =
            machines.into_iter().map(|(node, address)| Member { node, address, process: None }).collect();
        let mut etcd = Self { members, tls, client: None, user: None };
        etcd.start_again();
        etcd
    }

    /// Starts a member that is not running.
    pub fn start_member(&mut self, number: usize) {
        let scheme = self.scheme();
        let url = |member: &Member, port| format!("{scheme}://{}:{port}", bracketed(member.address));
        let peer = |member: &Member| format!("http://{}:2380", bracketed(member.address));
        let cluster: Vec<_> =
            self.members.iter().map(|member| format!("{}={}", member.node.name(), peer(member))).collect();
        let member = &self.members[number];
        let mut command = member.node.command("etcd");
        command.args(["--name", member.node.name(), "--data-dir", "/var/lib/etcd", "--logger", "zap"]);
        command.args([
            "--listen-client-urls",
            &url(member, 2379),
            "--advertise-client-urls",
            &url(member, 2379),
        ]);
        command.args(["--listen-peer-urls", &peer(member), "--initial-advertise-peer-urls", &peer(member)]);
        command.args(["--initial-cluster", &cluster.join(",")]);
        // The disk of a busy test machine is slow, which must not cause elections.
        command.args(["--heartbeat-interval", "200", "--election-timeout", "2000"]);
        if let Some(tls) = &self.tls {
            command.arg("--client-cert-auth");
            command.arg("--trusted-ca-file").arg(&tls.ca);
            command.arg("--cert-file").arg(&tls.certificate).arg("--key-file").arg(&tls.key);
        }
        let process = member.node.spawn(&mut command, "etcd.log");
        self.members[number].process = Some(process);
    }

    /// Kills a member with SIGKILL.
    pub fn kill_member(&mut self, number: usize) {
        if let Some(process) = self.members[number].process.take() {
            process.kill();
        }
    }

    /// Stops or continues all members, without ending them.
    pub fn freeze(&self, frozen: bool) {
        (0..self.members.len()).for_each(|number| self.freeze_member(number, frozen));
    }

    /// Stops or continues a member, without ending it.
    pub fn freeze_member(&self, number: usize, frozen: bool) {
        self.members[number].process.iter().for_each(|process| process.freeze(frozen));
    }

    /// The machine of a member.
    pub fn machine(&self, number: usize) -> &Node {
        &self.members[number].node
    }

    /// Kills all members with SIGKILL.
    pub fn kill(&mut self) {
        (0..self.members.len()).for_each(|number| self.kill_member(number));
    }

    /// Starts all members.
    pub fn start_again(&mut self) {
        (0..self.members.len()).for_each(|number| self.start_member(number));
        if !self.members.is_empty() {
            self.wait_until_healthy();
        }
    }

    /// Restarts all members with TLS and these certificates, in files that exist.
    pub fn restart_with_tls(&mut self, tls: Tls) {
        self.kill();
        self.tls = Some(tls);
        self.start_again();
    }

    /// The URLs of the members.
    pub fn endpoints(&self) -> Vec<String> {
        let scheme = self.scheme();
        self.members.iter().map(|member| format!("{scheme}://{}:2379", bracketed(member.address))).collect()
    }

    /// The machines of the members.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.members.iter().map(|member| &member.node)
    }

    /// Keeps the members running after the end of this program.
    pub fn keep(&mut self) {
        for member in &mut self.members {
            std::mem::forget(member.process.take());
            member.node.keep();
        }
    }

    /// Runs `etcdctl` and returns its output. Repeats a failed command, because a slow disk or an election can cause a
    /// timeout: the command must be idempotent.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        wait::until(&format!("etcdctl {arguments:?}"), || self.try_ctl(arguments))
    }

    /// Runs `etcdctl` and returns its output, or the error.
    pub fn try_ctl(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = self.members[0].node.command("env");
        command.args(["ETCDCTL_API=3", "etcdctl", "--endpoints", &self.endpoints().join(",")]);
        if let (Some(tls), Some((certificate, key))) = (&self.tls, &self.client) {
            command.arg("--cacert").arg(&tls.ca).arg("--cert").arg(certificate).arg("--key").arg(key);
        }
        command.args(self.user.iter().flat_map(|user| ["--user", user.as_str()]));
        let output = command.args(arguments).output().map_err(|error| error.to_string())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Runs a program that uses `etcdctl`, with the same connection settings.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String, String> {
        let mut command = self.members[0].node.command("env");
        command.arg(format!("ETCDCTL_ENDPOINTS={}", self.endpoints().join(",")));
        if let (Some(tls), Some((certificate, key))) = (&self.tls, &self.client) {
            let files = [("CACERT", &tls.ca), ("CERT", certificate), ("KEY", key)];
            command.args(files.map(|(name, path)| format!("ETCDCTL_{name}={}", path.display())));
        }
        let output = command.arg(program).args(arguments).output().map_err(|error| error.to_string())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Makes `etcdctl` use this certificate and key from now on.
    pub fn identify(&mut self, certificate: &Path, key: &Path) {
        self.client = Some((certificate.to_owned(), key.to_owned()));
    }

    /// Makes `etcdctl` log in as this user (`name:password`) from now on; `None` for no login.
    pub fn log_in(&mut self, user: Option<&str>) {
        self.user = user.map(str::to_owned);
    }

    /// Changes users or roles. A change by an earlier attempt without an answer counts as success.
    pub fn change_users(&self, arguments: &[&str]) {
        wait::until(&format!("etcdctl {arguments:?}"), || match self.try_ctl(arguments) {
            Err(error) if !error.contains("already exists") => Err(error),
            _ => Ok(()),
        });
    }

    /// Makes etcd refuse all writes, as when its quota is used up: raises the alarm through etcd's API.
    pub fn run_out_of_space(&self) {
        let body = r#"{"action":"ACTIVATE","memberID":0,"alarm":"NOSPACE"}"#;
        let Member { node, address, .. } = &self.members[0];
        wait::until("the alarm to be raised", || {
            let answer = node.within(|| {
                let mut stream = TcpStream::connect((*address, 2379)).map_err(|error| error.to_string())?;
                let head = "POST /v3/maintenance/alarm HTTP/1.0\r\nContent-Length";
                write!(stream, "{head}: {}\r\n\r\n{body}", body.len()).map_err(|error| error.to_string())?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer).map_err(|error| error.to_string())?;
                Ok::<_, String>(answer)
            })?;
            if answer.contains("NOSPACE") { Ok(()) } else { Err(answer) }
        });
    }

    /// Clears that alarm.
    pub fn have_space_again(&self) {
        self.ctl(&["alarm", "disarm"]);
    }

    /// The keys that start with a prefix.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let keys = self.ctl(&["get", "--prefix", "--keys-only", prefix]);
        keys.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    /// The current revision: the number of writes so far.
    pub fn revision(&self) -> u64 {
        let status = self.ctl(&["endpoint", "status", "-w", "json"]);
        let status: serde_json::Value = serde_json::from_str(&status).expect("etcdctl writes JSON");
        status[0]["Status"]["header"]["revision"].as_u64().expect("a revision")
    }

    /// Whether every member answers.
    pub fn is_healthy(&self) -> bool {
        self.health().is_ok()
    }

    fn health(&self) -> Result<(), String> {
        let endpoints = self.endpoints().join(",");
        let mut command = self.members[0].node.command("env");
        command.args(["ETCDCTL_API=3", "etcdctl", "--endpoints", &endpoints, "endpoint", "health"]);
        let health = command.output().map_err(|error| error.to_string())?;
        let message = || String::from_utf8_lossy(&health.stderr).into_owned();
        health.status.success().then_some(()).ok_or_else(message)
    }

    fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    fn wait_until_healthy(&self) {
        if self.tls.is_some() {
            // A request would need a client certificate, so only the listening socket is checked.
            return wait::until_true("etcd to listen", || {
                self.members[0].node.shell("ss -Hltn 'sport = :2379'").contains(":2379")
            });
        }
        wait::until("etcd to be healthy", || self.health());
    }
}

fn bracketed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    }
}
