//! Test traffic between pods, and the source addresses that the receiver sees.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use crate::node::Node;
use crate::pod::Pod;
use crate::wait;

/// Port of the echo servers. Different pods use the same port.
pub const PORT: u16 = 7007;

/// Timeout of a probe.
fn max_wait() -> Duration {
    wait::scaled(Duration::from_secs(3))
}

/// Interval at which an idle server checks whether it must end.
const IDLE: TimeVal = TimeVal::new(0, 50_000);

/// An echo server whose reply contains the source address of the request.
#[derive(Debug)]
pub struct Echo {
    wanted: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Echo {
    /// Starts a TCP and a UDP server on the address, in the network namespace of the calling thread.
    pub fn start(address: IpAddr) -> Self {
        let wanted = Arc::new(AtomicBool::new(true));
        // A program that is just being started elsewhere briefly has copies of all open sockets, also of those of an
        // earlier server.
        let udp = wait::until(&format!("port {PORT} of {address} to be free"), || {
            UdpSocket::bind((address, PORT)).map_err(|error| error.to_string())
        });
        setsockopt(&udp, sockopt::ReceiveTimeout, &IDLE).expect("a time-out");
        let tcp = wait::until(&format!("port {PORT} of {address} to be free"), || {
            TcpListener::bind((address, PORT)).map_err(|error| error.to_string())
        });
        // Also limits the time of an accept.
        setsockopt(&tcp, sockopt::ReceiveTimeout, &IDLE).expect("a time-out");
        let (udp_wanted, tcp_wanted) = (Arc::clone(&wanted), Arc::clone(&wanted));
        let threads = vec![
            std::thread::spawn(move || {
                let mut buffer = [0; 65536];
                while udp_wanted.load(Ordering::Relaxed) {
                    if let Ok((length, from)) = udp.recv_from(&mut buffer) {
                        let _ = udp.send_to(&answer(from, &buffer[..length]), from);
                    }
                }
            }),
            std::thread::spawn(move || {
                while tcp_wanted.load(Ordering::Relaxed) {
                    match tcp.accept() {
                        Ok((stream, from)) => drop(std::thread::spawn(move || serve(stream, from))),
                        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                        Err(_) => std::thread::park_timeout(Duration::from_millis(50)),
                    }
                }
            }),
        ];
        Self { wanted, threads }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.wanted.store(false, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// The sender's address, and then as many bytes as it sent.
fn answer(from: SocketAddr, sent: &[u8]) -> Vec<u8> {
    let mut answer = format!("{}\n", from.ip()).into_bytes();
    answer.resize(answer.len().max(sent.len()), b'.');
    answer
}

fn serve(mut stream: TcpStream, from: SocketAddr) {
    let _ = stream.set_read_timeout(Some(max_wait()));
    let mut sent = Vec::new();
    // The client closes its side when it has sent everything.
    if stream.read_to_end(&mut sent).is_ok() {
        let _ = stream.write_all(&answer(from, &sent));
    }
}

fn seen(answer: &[u8]) -> Result<IpAddr, String> {
    let text = String::from_utf8_lossy(answer);
    text.lines().next().and_then(|line| line.parse().ok()).ok_or(format!("an answer that is none: {text:?}"))
}

/// A TCP connection on which both ends send something every millisecond.
#[derive(Debug)]
pub struct Dialogue {
    wanted: Arc<AtomicBool>,
    ends: Vec<End>,
}

/// One end of a dialogue.
#[derive(Debug)]
struct End {
    received: Arc<AtomicUsize>,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Dialogue {
    /// Starts a dialogue from the client to that address of the server.
    pub fn start(client: &Pod, server: &Node, address: IpAddr) -> Self {
        let listener = server.within(|| TcpListener::bind((address, PORT))).expect("a free port");
        let to = SocketAddr::new(address, PORT);
        let ours = client.within(|| TcpStream::connect_timeout(&to, max_wait())).expect("a connection");
        Self::over(ours, &listener)
    }

    /// Starts a dialogue over a connection to that listener.
    pub fn over(ours: TcpStream, listener: &TcpListener) -> Self {
        let (theirs, _) = listener.accept().expect("the connection");
        let wanted = Arc::new(AtomicBool::new(true));
        let ends = [ours, theirs].map(|stream| {
            let (wanted, received) = (Arc::clone(&wanted), Arc::<AtomicUsize>::default());
            let count = Arc::clone(&received);
            End { received, thread: std::thread::spawn(move || talk(stream, &wanted, &count)) }
        });
        Self { wanted, ends: ends.into() }
    }

    /// Waits until both ends have received a hundred more messages, and ends the dialogue. Fails if the connection was
    /// reset.
    pub fn finish(self) -> std::io::Result<()> {
        let received = || self.ends.iter().map(|end| end.received.load(Ordering::Relaxed));
        let before: Vec<usize> = received().collect();
        wait::until_true("the dialogue to go on, or to have been reset", || {
            let go_on = received().zip(&before).all(|(now, before)| now >= before + 100);
            go_on || self.ends.iter().any(|end| end.thread.is_finished())
        });
        self.wanted.store(false, Ordering::Relaxed);
        self.ends.into_iter().try_for_each(|end| end.thread.join().expect("no panic"))
    }
}

fn talk(mut stream: TcpStream, wanted: &AtomicBool, received: &AtomicUsize) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let is_error = |error: &std::io::Error| error.kind() != ErrorKind::WouldBlock;
    while wanted.load(Ordering::Relaxed) {
        if let Some(error) = stream.write(b".").err().filter(is_error) {
            return Err(error);
        }
        match stream.read(&mut [0; 4096]) {
            // The other end has finished.
            Ok(0) => return Ok(()),
            Err(error) if is_error(&error) => return Err(error),
            read => {
                received.fetch_add(read.unwrap_or_default(), Ordering::Relaxed);
                std::thread::park_timeout(Duration::from_millis(1));
            }
        }
    }
    Ok(())
}

/// Sends a datagram of that many bytes from the calling thread's namespace. Returns the source address that the echo
/// server saw, and the round-trip time.
pub fn udp(from: IpAddr, to: IpAddr, bytes: usize) -> Result<(IpAddr, Duration), String> {
    let error = |error: std::io::Error| format!("udp {from} to {to}: {error}");
    let socket = UdpSocket::bind((from, 0)).map_err(error)?;
    socket.connect((to, PORT)).map_err(error)?;
    socket.set_read_timeout(Some(max_wait())).map_err(error)?;
    let mut buffer = vec![0; 65536];
    let start = Instant::now();
    socket.send(&vec![b'.'; bytes]).map_err(error)?;
    let length = socket.recv(&mut buffer).map_err(error)?;
    Ok((seen(&buffer[..length])?, start.elapsed()))
}

/// A UDP socket of the calling thread's namespace with this destination, for [`ask`].
pub fn asker(to: SocketAddr) -> UdpSocket {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect(to)?;
        socket.set_read_timeout(Some(max_wait()))?;
        Ok(socket)
    });
    socket.unwrap_or_else(|error| panic!("a socket to {to}: {error}"))
}

/// Sends a datagram to the destination of the socket. Returns the source address that the echo server saw.
pub fn ask(socket: &UdpSocket) -> Result<IpAddr, String> {
    let error = |error: std::io::Error| format!("udp by {socket:?}: {error}");
    socket.send(&[b'.'; 100]).map_err(error)?;
    let mut buffer = vec![0; 65536];
    let length = socket.recv(&mut buffer).map_err(error)?;
    seen(&buffer[..length])
}

/// Connects, sends that many bytes, and reads as many. Returns the source address that the echo server saw.
pub fn tcp(to: IpAddr, bytes: usize) -> Result<IpAddr, String> {
    tcp_at(to, PORT, bytes)
}

/// Like [`tcp`], to a port that leads to the echo server.
pub fn tcp_at(to: IpAddr, port: u16, bytes: usize) -> Result<IpAddr, String> {
    let error = |error: std::io::Error| format!("tcp to {to}: {error}");
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(to, port), max_wait()).map_err(error)?;
    stream.set_read_timeout(Some(max_wait())).map_err(error)?;
    stream.write_all(&vec![b'.'; bytes]).map_err(error)?;
    stream.shutdown(std::net::Shutdown::Write).map_err(error)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).map_err(error)?;
    if answer.len() < bytes {
        return Err(format!("tcp to {to}: {} of {bytes} bytes came back", answer.len()));
    }
    seen(&answer)
}

/// Pings once with that many bytes of data, without fragmentation. Returns the round-trip time as printed by `ping`, or
/// its complete output as the error.
pub fn ping(mut command: Command, to: IpAddr, bytes: usize) -> Result<String, String> {
    let max_wait = max_wait().as_secs().to_string();
    command.args(["-n", "-c", "1", "-W", &max_wait, "-M", "do", "-s", &bytes.to_string(), &to.to_string()]);
    let output = command.output().map_err(|error| error.to_string())?;
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let time = text.split_once("time=").and_then(|(_, rest)| rest.lines().next());
    if output.status.success() { time.map(str::to_owned).ok_or(text) } else { Err(text) }
}

/// Where the kernel has dropped packets in the namespaces that the command enters: counters of IP and ICMP, of
/// interfaces and of nftables rules that are not zero. For the message of a test that has failed.
pub fn drops(mut command: Command) -> String {
    let script = "awk 'NF == 2 && $2 > 0 && /Discards|NoRoutes|Err|Fails|Drop|Unreach/' /proc/net/snmp6; \
                  tail -n +3 /proc/net/dev | awk '$4 + $5 + $12 + $13 > 0'; \
                  awk '$2 != \"00000000\" { print \"backlog dropped 0x\" $2 }' /proc/net/softnet_stat; \
                  nft list ruleset | grep -E 'packets [1-9].* drop'; ip neigh show nud failed; \
                  ip neigh show nud incomplete";
    match command.args(["-c", script]).output() {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(error) => error.to_string(),
    }
}

/// Datagrams sent in the background, a hundred per second. Each of them must come back.
#[derive(Debug)]
pub struct Stream {
    wanted: Arc<AtomicBool>,
    sender: JoinHandle<(u32, u32)>,
}

/// Interval between two datagrams.
const PACE: Duration = Duration::from_millis(10);

/// Number of datagrams before and after the tested event.
const BEFORE_AND_AFTER: u32 = 30;

impl Stream {
    /// Starts sending from the network namespace of the calling thread to an echo server. Returns after the first
    /// datagrams.
    pub fn start(from: IpAddr, to: IpAddr) -> Self {
        let socket = UdpSocket::bind((from, 0)).and_then(|socket| {
            socket.connect((to, PORT))?;
            socket.set_read_timeout(Some(PACE))?;
            Ok(socket)
        });
        let socket = socket.unwrap_or_else(|error| panic!("{from} to {to}: {error}"));
        let wanted = Arc::new(AtomicBool::new(true));
        let flag = Arc::clone(&wanted);
        let (flows, flowing) = std::sync::mpsc::channel();
        let sender = std::thread::spawn(move || {
            let (mut sent, mut received, mut left) = (0, 0, BEFORE_AND_AFTER);
            let mut receive = |until: Instant| {
                let mut buffer = [0; 64];
                while Instant::now() < until {
                    received += u32::from(socket.recv(&mut buffer).is_ok());
                }
                received
            };
            while left > 0 {
                let due = Instant::now() + PACE;
                sent += u32::from(socket.send(b"still there?").is_ok());
                receive(due);
                if sent == BEFORE_AND_AFTER {
                    let _ = flows.send(());
                }
                left -= u32::from(!flag.load(Ordering::Relaxed));
            }
            let deadline = Instant::now() + max_wait();
            while receive(Instant::now() + PACE) < sent && Instant::now() < deadline {}
            (sent, receive(Instant::now()))
        });
        flowing.recv().unwrap_or_else(|_| panic!("{from} to {to}: nothing flows"));
        Self { wanted, sender }
    }

    /// Ends the streams after some further datagrams. Returns the numbers of sent and returned datagrams of each.
    pub fn finish(streams: Vec<Self>) -> Vec<(u32, u32)> {
        streams.iter().for_each(|stream| stream.wanted.store(false, Ordering::Relaxed));
        let counts = streams.into_iter().map(|stream| stream.sender.join());
        counts.map(|count| count.expect("the sender does not panic")).collect()
    }
}
