//! How to reach etcd, and as whom.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

/// How to reach etcd.
#[derive(Debug, Clone, Default)]
pub struct EtcdConfig {
    /// URLs of the members. A name stands for all members whose addresses it has.
    pub endpoints: Vec<String>,
    /// A domain whose SRV records name members. With an authority they are those for TLS.
    pub discovery_srv: Option<String>,
    /// The authority that signed the members' certificates; the system has none that would be right.
    pub ca: Option<Pem>,
    /// Our own certificate and its key.
    pub identity: Option<(Pem, Pem)>,
    /// A user to log in as.
    pub credentials: Option<Credentials>,
}

impl EtcdConfig {
    /// Whether TLS is used. That is never for a name server to say.
    pub fn is_secure(&self) -> bool {
        let is_secure = |endpoint: &String| endpoint.starts_with("https://");
        self.endpoints.iter().any(is_secure) || self.discovery_srv.is_some() && self.ca.is_some()
    }
}

/// Certificates or a key, in blocks of PEM.
#[derive(Clone, PartialEq, Eq)]
pub enum Pem {
    /// These.
    Inline(Vec<u8>),
    /// Those in this file. It is read for each connection: certificates are renewed.
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

impl Pem {
    /// The blocks; or why there are none, with the remedy.
    pub fn read(&self) -> Result<Vec<u8>, String> {
        let path = match self {
            Self::Inline(bytes) => return Ok(bytes.clone()),
            Self::File(path) => path,
        };
        match fs::read(path) {
            Ok(bytes) if String::from_utf8_lossy(&bytes).contains("-----BEGIN ") => Ok(bytes),
            Ok(_) => Err(format!("{} contains no PEM block", path.display())),
            // The agent's service is root without the right to read what is another user's.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => Err(format!(
                "{0}: {error}. The user of this process must own the file; for the agent: chown root: {0}",
                path.display()
            )),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }
}

/// What is shown in a TLS connection, and what is believed there.
#[derive(Clone, PartialEq, Eq, Default)]
pub(super) struct Tls {
    /// The authority.
    pub(super) ca: Option<Vec<u8>>,
    /// The client's certificate and key.
    pub(super) identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl EtcdConfig {
    /// Reads what a TLS connection takes.
    pub(super) fn tls(&self) -> Result<Tls, String> {
        let ca = self.ca.as_ref().map(Pem::read).transpose()?;
        let read = |(certificate, key): &(Pem, Pem)| Ok::<_, String>((certificate.read()?, key.read()?));
        Ok(Tls { ca, identity: self.identity.as_ref().map(read).transpose()? })
    }

    /// Whether what it takes can be renewed.
    pub(super) fn is_renewable(&self) -> bool {
        let is_file = |pem: &Pem| matches!(pem, Pem::File(_));
        self.ca.as_ref().is_some_and(is_file) || self.identity.as_ref().is_some_and(|(pem, _)| is_file(pem))
    }
}

/// A user of etcd.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The user's name.
    pub user: String,
    /// The password.
    pub password: Password,
}

/// A password, which is not printed.
#[derive(Clone)]
pub enum Password {
    /// It is this.
    Inline(String),
    /// It is in this file, and is read for each login: it may be changed meanwhile.
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
    /// The password, without the end of its line; or why there is none.
    pub fn read(&self) -> Result<String, String> {
        match self {
            Self::Inline(password) => Ok(password.clone()),
            Self::File(path) => match fs::read_to_string(path) {
                Ok(text) if text.trim_end_matches(['\r', '\n']).is_empty() => {
                    Err(format!("{} is empty", path.display()))
                }
                Ok(text) => Ok(text.trim_end_matches(['\r', '\n']).to_owned()),
                Err(error) => Err(format!("{}: {error}", path.display())),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_in_a_file_is_its_text_without_the_end_of_the_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        let password = Password::File(path.clone());
        assert!(password.read().unwrap_err().contains("password: No such file"));
        fs::write(&path, "\n").unwrap();
        assert!(password.read().unwrap_err().contains("is empty"));
        fs::write(&path, " se cret \r\n").unwrap();
        assert_eq!(password.read().unwrap(), " se cret ");
        assert!(!format!("{:?}", Password::Inline("secret".to_owned())).contains("secret"));
    }
}
