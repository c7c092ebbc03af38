//! HTTP/1.1 over TLS, as far as an API server needs it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::Value;

/// A request.
#[derive(Debug, Clone)]
pub struct Request {
    /// Its method.
    pub method: String,
    /// Its path, without the query.
    pub path: String,
    /// The parameters of the query.
    pub query: BTreeMap<String, String>,
    /// Its headers, with names in lower case.
    pub headers: BTreeMap<String, String>,
    /// Its body, null if it is empty.
    pub body: Value,
}

/// An answer that is sent at once.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: BTreeMap<String, String>,
    pub(super) body: Vec<u8>,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection(BufReader<StreamOwned<ServerConnection, TcpStream>>);

impl Request {
    /// A header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Whether it is a watch.
    pub fn is_watch(&self) -> bool {
        self.query.get("watch").is_some_and(|watch| watch == "true")
    }

    /// Whether it changes an object.
    pub fn is_write(&self) -> bool {
        self.method != "GET"
    }

    /// The Node that it is about: in the path or in the field selector.
    pub fn node(&self) -> Option<&str> {
        let rest = self.path.strip_prefix("/api/v1/nodes/");
        let selected = || self.query.get("fieldSelector")?.strip_prefix("metadata.name=");
        rest.and_then(|rest| rest.split('/').next()).or_else(selected)
    }
}

/// The TLS configuration with this certificate and key, both in PEM files.
pub(super) fn tls(certificate: &Path, key: &Path) -> Arc<ServerConfig> {
    let read = |path: &Path| fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let certificate = CertificateDer::from_pem_slice(&read(certificate)).expect("a certificate");
    let key = PrivateKeyDer::from_pem_slice(&read(key)).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.expect("the provider has all protocols").with_no_client_auth();
    Arc::new(config.with_single_cert(vec![certificate], key).expect("the key is that of the certificate"))
}

impl Connection {
    /// The server's end. The handshake happens with the first read.
    pub(super) fn new(tls: Arc<ServerConfig>, stream: TcpStream) -> Option<Self> {
        let connection = ServerConnection::new(tls).ok()?;
        Some(Self(BufReader::new(StreamOwned::new(connection, stream))))
    }

    /// Reads a request. `None`: the client has closed the connection.
    pub(super) fn read(&mut self) -> io::Result<Option<Request>> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let Some(first) = self.line()? else { return Ok(None) };
        let mut words = first.split(' ');
        let (Some(method), Some(target)) = (words.next(), words.next()) else {
            return Err(invalid("a request line"));
        };
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let query = pairs.map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decoded(key), decoded(value))
        });
        let (method, path, query) = (method.to_owned(), decoded(path), query.collect());
        let mut headers = BTreeMap::new();
        while let Some(line) = self.line()?.filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once(':').ok_or_else(|| invalid("a header"))?;
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let length = headers.get("content-length").map_or(Ok(0), |length| length.parse());
        let mut body = vec![0; length.map_err(|_| invalid("a length"))?];
        self.0.read_exact(&mut body)?;
        let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body)? };
        Ok(Some(Request { method, path, query, headers, body }))
    }

    fn line(&mut self) -> io::Result<Option<String>> {
        let mut line = String::new();
        let read = self.0.read_line(&mut line)?;
        Ok((read > 0).then(|| line.trim_end().to_owned()))
    }

    /// Sends an answer.
    pub(super) fn send(&mut self, answer: &Answer) -> io::Result<()> {
        let length = format!("content-length: {}\r\n", answer.body.len());
        self.write(&[head(answer.status, &answer.headers, &length).as_bytes(), &answer.body].concat())
    }

    /// Sends the head of an answer whose body comes in chunks.
    pub(super) fn begin(&mut self, status: u16, headers: &BTreeMap<String, String>) -> io::Result<()> {
        self.write(head(status, headers, "transfer-encoding: chunked\r\n").as_bytes())
    }

    /// Sends a line of the body.
    pub(super) fn chunk(&mut self, line: &Value) -> io::Result<()> {
        let line = format!("{line}\n");
        self.write(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes())
    }

    /// Ends the body.
    pub(super) fn end(&mut self) -> io::Result<()> {
        self.write(b"0\r\n\r\n")
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.get_mut().write_all(bytes)?;
        self.0.get_mut().flush()
    }
}

fn head(status: u16, headers: &BTreeMap<String, String>, length: &str) -> String {
    let lines: Vec<_> = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    format!("HTTP/1.1 {status} .\r\n{}{length}\r\n", lines.concat())
}

/// Decodes a part of a URL.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let hex = after.get(..2).and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match (first, hex) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            (b'+', _) => {
                bytes.push(b' ');
                rest = after;
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
