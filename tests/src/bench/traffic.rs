//! Traffic between two network namespaces: TCP with iperf3, the round trip of a spinning client, and small datagrams.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::TcpCongestion;
use nix::unistd::Pid;
use serde_json::Value;

use super::statistics::Statistic;
use crate::node::within;

/// The congestion control of all connections: the default of some machines (bbr) measures its own pacing.
const CUBIC: &str = "cubic";

/// Payload of a datagram, in bytes.
const DATAGRAM: usize = 64;

/// Longer than any connection takes.
const PATIENCE: Duration = Duration::from_secs(5);

/// One side of the traffic.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// The network namespace, as a path on the host.
    pub netns: PathBuf,
    /// The address.
    pub address: IpAddr,
}

impl Endpoint {
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.netns.display())).arg("--").arg(program);
        command
    }

    /// Runs a job in the namespace, on a processor of its own if there are two.
    fn run<T: Send>(
        &self,
        processor: usize,
        job: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        within(&self.netns, || {
            pin(processor)?;
            job()
        })
    }
}

/// The packets of a TCP connection on the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packets {
    /// Up to 64 KiB: a veth pair passes them whole, like a network card with segmentation offload. The default.
    Whole,
    /// Of the size of the MTU: the sending node divides them, the receiving one merges them (GRO).
    WireSize,
}

/// Sets the packets on the underlay of both nodes.
pub fn set_packets(hosts: &[Endpoint; 2], packets: Packets) -> anyhow::Result<()> {
    let (segmentation, merging) = match packets {
        Packets::Whole => ("on", "off"),
        Packets::WireSize => ("off", "on"),
    };
    for host in hosts {
        let mut ethtool = host.command("ethtool");
        let output = ethtool.args(["-K", "eth0", "tso", segmentation, "gro", merging]).output()?;
        ensure!(output.status.success(), "ethtool: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Throughput of TCP.
#[derive(Debug, Clone, Copy)]
pub struct Throughput {
    /// Gigabits per second, as received.
    pub gigabits: f64,
    /// Processor time of both sides, in seconds per gigabyte (10⁹ bytes).
    pub cpu: f64,
}

/// Sends data over this number of connections for that number of seconds. The scheduler chooses the processors: with
/// fixed ones, another busy process on one of them costs much more than its share.
pub fn tcp(from: &Endpoint, to: &Endpoint, streams: u32, seconds: u32) -> anyhow::Result<Throughput> {
    let mut server = to.command("iperf3");
    server.args(["--server", "--one-off", "--forceflush", "--bind", &to.address.to_string()]);
    let mut server = server.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let result = (|| {
        let mut output = BufReader::new(server.stdout.take().context("a pipe")?);
        let mut line = String::new();
        while !line.contains("listening") {
            line.clear();
            ensure!(output.read_line(&mut line)? > 0, "iperf3 --server has ended");
        }
        let mut client = from.command("iperf3");
        client.args(["--client", &to.address.to_string(), "--congestion", CUBIC, "--json"]);
        client.args(["--connect-timeout", "3000"]);
        client.args(["--time", &seconds.to_string(), "--parallel", &streams.to_string()]);
        let client = client.stdin(Stdio::null()).output()?;
        let text = String::from_utf8_lossy(&client.stdout);
        ensure!(client.status.success(), "iperf3 to {}: {text}", to.address);
        throughput(&serde_json::from_str(&text)?)
    })();
    // It ends with its only client; without one it would wait.
    if result.is_err() {
        end(&mut server);
    }
    server.wait()?;
    result
}

/// Ends a program that `nsenter` has started. `nsenter` without a process namespace becomes the program.
fn end(child: &mut std::process::Child) {
    let _ = child.kill();
}

fn throughput(report: &Value) -> anyhow::Result<Throughput> {
    let end = &report["end"];
    let received = &end["sum_received"];
    let number = |value: &Value| value.as_f64().context("a number in the report of iperf3");
    let (bytes, rate) = (number(&received["bytes"])?, number(&received["bits_per_second"])?);
    let load = &end["cpu_utilization_percent"];
    let share = (number(&load["host_total"])? + number(&load["remote_total"])?) / 100.0;
    let seconds = number(&end["sum_sent"]["seconds"])?;
    Ok(Throughput { gigabits: rate / 1e9, cpu: share * seconds / (bytes / 1e9) })
}

/// The median round trip of one byte over TCP, in microseconds. Both sides read without waiting, so that no wake-up
/// is measured.
pub fn round_trip(from: &Endpoint, to: &Endpoint, time: Duration) -> anyhow::Result<f64> {
    let listener = to.run(1, || Ok(TcpListener::bind((to.address, 0))?))?;
    let server = listener.local_addr()?;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let echo = scope.spawn(|| to.run(1, || echo(&listener, &is_over)));
        let trips = from.run(0, || client(server, time));
        is_over.store(true, Ordering::Relaxed);
        if trips.is_err() {
            // The server may still wait for a connection.
            let _ = from.run(0, || Ok(TcpStream::connect_timeout(&server, PATIENCE).map(drop)));
        }
        let echoed = echo.join().map_err(|_| anyhow::anyhow!("a panic"))?;
        let trips = trips?;
        echoed?;
        Statistic::Median.of(&trips).context("a round trip")
    })
}

fn prepare(stream: &TcpStream) -> anyhow::Result<()> {
    setsockopt(stream, TcpCongestion, &OsString::from(CUBIC))?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(())
}

fn echo(listener: &TcpListener, is_over: &AtomicBool) -> anyhow::Result<()> {
    listener.set_nonblocking(true)?;
    let mut stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                ensure!(!is_over.load(Ordering::Relaxed), "no client has come");
                std::thread::yield_now();
            }
            Err(error) => return Err(error.into()),
        }
    };
    prepare(&stream)?;
    let mut byte = [0];
    while !is_over.load(Ordering::Relaxed) {
        match stream.read(&mut byte) {
            Ok(0) => break,
            Ok(_) => stream.write_all(&byte)?,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn client(server: SocketAddr, time: Duration) -> anyhow::Result<Vec<f64>> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    prepare(&stream)?;
    let (begin, mut trips) = (Instant::now(), Vec::new());
    while begin.elapsed() < time {
        let sent = Instant::now();
        stream.write_all(&[1])?;
        let mut byte = [0];
        loop {
            match stream.read(&mut byte) {
                Ok(0) => anyhow::bail!("the connection was closed"),
                Ok(_) => break,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    ensure!(sent.elapsed() < PATIENCE, "no answer from {server}");
                }
                Err(error) => return Err(error.into()),
            }
        }
        trips.push(sent.elapsed().as_secs_f64() * 1e6);
    }
    Ok(trips)
}

/// Sends small datagrams as fast as one thread can. Returns how many thousand per second one thread has received.
pub fn datagrams(from: &Endpoint, to: &Endpoint, time: Duration) -> anyhow::Result<f64> {
    let receiver = to.run(1, || Ok(UdpSocket::bind((to.address, 0))?))?;
    let address = receiver.local_addr()?;
    receiver.set_read_timeout(Some(Duration::from_millis(100)))?;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let counter = scope.spawn(|| {
            to.run(1, || {
                let (mut buffer, mut count) = ([0; 2 * DATAGRAM], 0_u32);
                while !is_over.load(Ordering::Relaxed) {
                    count += u32::from(receiver.recv(&mut buffer).is_ok());
                }
                Ok(count)
            })
        });
        let sent = from.run(0, || {
            let sender = UdpSocket::bind((from.address, 0))?;
            sender.connect(address)?;
            let begin = Instant::now();
            while begin.elapsed() < time {
                // A full queue is part of the measurement.
                let _ = sender.send(&[0; DATAGRAM]);
            }
            Ok(begin.elapsed())
        });
        is_over.store(true, Ordering::Relaxed);
        let count = counter.join().map_err(|_| anyhow::anyhow!("a panic"))??;
        Ok(f64::from(count) / sent?.as_secs_f64() / 1e3)
    })
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Binds the calling thread to a processor, if there are at least two.
fn pin(processor: usize) -> anyhow::Result<()> {
    if processors() > 1 {
        let mut one = CpuSet::new();
        one.set(processor)?;
        sched_setaffinity(Pid::from_raw(0), &one)?;
    }
    Ok(())
}

/// The network namespace of a node, by its first process.
pub fn netns_of(pid: i32) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join("ns/net")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn throughput_is_what_was_received_and_processor_time_is_of_both_sides() {
        let report = json!({ "end": {
            "sum_sent": { "seconds": 2.0 },
            "sum_received": { "bytes": 4e9, "bits_per_second": 16e9 },
            "cpu_utilization_percent": { "host_total": 60.0, "remote_total": 40.0 },
        } });
        let throughput = throughput(&report).unwrap();
        assert!((throughput.gigabits - 16.0).abs() < 1e-9);
        assert!((throughput.cpu - 0.5).abs() < 1e-9);
    }
}
