//! Configuration of the connection to etcd.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Endpoints, certificates and user for etcd.
#[derive(Debug, Clone, Default)]
pub struct EtcdConfig {
    /// URLs of the members. A name means all members at its addresses.
    pub endpoints: Vec<String>,
    /// A domain whose SRV records name members. If `ca` is set, the records for TLS are used.
    pub discovery_srv: Option<String>,
    /// The CA that signed the members' certificates; the CAs of the system are not used.
    pub ca: Option<Pem>,
    /// The client certificate and its key.
    pub identity: Option<(Pem, Pem)>,
    /// The user for the login.
    pub credentials: Option<Credentials>,
}

impl EtcdConfig {
    /// Whether TLS is used. Only the configuration decides this, never a name server.
    pub fn is_secure(&self) -> bool {
        let is_secure = |endpoint: &String| endpoint.starts_with("https://");
        self.endpoints.iter().any(is_secure) || self.discovery_srv.is_some() && self.ca.is_some()
    }
}

/// Certificates or a key, as PEM blocks.
#[derive(Clone, PartialEq, Eq)]
pub enum Pem {
    /// The PEM text itself.
    Inline(Vec<u8>),
    /// A file with the PEM text. It is read again regularly, because certificates are renewed.
    File(PathBuf),
}

impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline(_) => f.write_str("Inline(_)"),
            Self::File(path) => write!(f, "File({})", path.display()),
        }
    }
}

/// A file with a certificate, a key or a password cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileNotRead {
    /// The file has no line that starts with `-----BEGIN `: it is empty, or not in PEM format.
    /// Remedy: convert the file to PEM: openssl x509 -inform der -in FILE for a certificate.
    #[error("{} contains no PEM block", path.display())]
    NoPem {
        /// The file.
        path: PathBuf,
    },
    /// The user of this process may not read the file. The agent's service runs as root, but cannot read files that
    /// only another user can read.
    #[error(
        "{0}: {reason}. The user of this process must own the file; for the agent: chown root: {0}",
        path.display()
    )]
    NotPermitted {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        reason: String,
    },
    /// The file does not exist, or the operating system cannot read it.
    /// Remedy: check the path of the file.
    #[error("{}: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        reason: String,
    },
    /// The file with the password has no characters before the line break at its end.
    /// Remedy: write the password to the file.
    #[error("{} is empty", path.display())]
    NoPassword {
        /// The file.
        path: PathBuf,
    },
}

impl FileNotRead {
    fn unreadable(path: &Path, error: &io::Error) -> Self {
        Self::Unreadable { path: path.to_owned(), reason: error.to_string() }
    }
}

impl Pem {
    /// Reads the PEM text. The error includes the remedy.
    pub fn read(&self) -> Result<Vec<u8>, FileNotRead> {
        let path = match self {
            Self::Inline(bytes) => return Ok(bytes.clone()),
            Self::File(path) => path,
        };
        match fs::read(path) {
            Ok(bytes) if String::from_utf8_lossy(&bytes).contains("-----BEGIN ") => Ok(bytes),
            Ok(_) => Err(FileNotRead::NoPem { path: path.clone() }),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                Err(FileNotRead::NotPermitted { path: path.clone(), reason: error.to_string() })
            }
            Err(error) => Err(FileNotRead::unreadable(path, &error)),
        }
    }
}

/// The CA and the client certificate of a TLS connection.
#[derive(Clone, PartialEq, Eq, Default)]
pub(super) struct Tls {
    /// The CA, as PEM; `None` if not configured.
    pub(super) ca: Option<Vec<u8>>,
    /// The client certificate and its key, as PEM.
    pub(super) identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl EtcdConfig {
    /// Reads the certificates and the key.
    pub(super) fn tls(&self) -> Result<Tls, FileNotRead> {
        let ca = self.ca.as_ref().map(Pem::read).transpose()?;
        let read = |(certificate, key): &(Pem, Pem)| Ok::<_, FileNotRead>((certificate.read()?, key.read()?));
        Ok(Tls { ca, identity: self.identity.as_ref().map(read).transpose()? })
    }

    /// Whether certificates are in files, which can be renewed.
    pub(super) fn is_renewable(&self) -> bool {
        let is_file = |pem: &Pem| matches!(pem, Pem::File(_));
        self.ca.as_ref().is_some_and(is_file) || self.identity.as_ref().is_some_and(|(pem, _)| is_file(pem))
    }
}

/// A user of etcd.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// Name of the user.
    pub user: String,
    /// The password of the user.
    pub password: Password,
}

/// A password. `Debug` does not print it.
#[derive(Clone)]
pub enum Password {
    /// The password itself.
    Inline(String),
    /// A file with the password. It is read for each login, because the password may change.
    File(PathBuf),
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline(_) => f.write_str("Inline(_)"),
            Self::File(path) => write!(f, "File({})", path.display()),
        }
    }
}

impl Password {
    /// Reads the password, without the line break at its end.
    pub fn read(&self) -> Result<String, FileNotRead> {
        match self {
            Self::Inline(password) => Ok(password.clone()),
            Self::File(path) => match fs::read_to_string(path) {
                Ok(text) if text.trim_end_matches(['\r', '\n']).is_empty() => {
                    Err(FileNotRead::NoPassword { path: path.clone() })
                }
                Ok(text) => Ok(text.trim_end_matches(['\r', '\n']).to_owned()),
                Err(error) => Err(FileNotRead::unreadable(path, &error)),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_file_is_read_without_the_final_line_break() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        let password = Password::File(path.clone());
        assert!(password.read().unwrap_err().to_string().contains("password: No such file"));
        fs::write(&path, "\n").unwrap();
        assert!(password.read().unwrap_err().to_string().contains("is empty"));
        fs::write(&path, " se cret \r\n").unwrap();
        assert_eq!(password.read().unwrap(), " se cret ");
        assert!(!format!("{:?}", Password::Inline("secret".to_owned())).contains("secret"));
    }
}
