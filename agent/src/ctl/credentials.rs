//! Credentials that `polderctl` uses for etcd instead of those of the node's agent.

use std::env;
use std::path::{Path, PathBuf};

use clap::Args;
use polder_api::credentials::{ClientCertificate, EtcdCredentials, Secret, User};
use polder_store::etcd::config::{FileNotRead, Password, Pem};

/// Variable with the password of `--etcd-user`. Not a flag, because every user on the machine can read flags.
const PASSWORD: &str = "POLDERCTL_ETCD_PASSWORD";

/// Credentials for commands that change the cluster.
#[derive(Debug, Args)]
#[command(
    next_help_heading = "Operator credentials for etcd (only for node remove, cluster set, pool add/drain/remove, ipam \
                         check/release)"
)]
pub struct CredentialArguments {
    /// Client certificate, used instead of the certificate of this node's agent
    #[arg(long, value_name = "FILE", env = "POLDERCTL_ETCD_CERT", hide_env_values = true, global = true)]
    etcd_cert: Option<PathBuf>,
    /// Private key of --etcd-cert
    #[arg(long, value_name = "FILE", env = "POLDERCTL_ETCD_KEY", hide_env_values = true, global = true)]
    etcd_key: Option<PathBuf>,
    /// User name; set the password with --etcd-password-file or the variable `POLDERCTL_ETCD_PASSWORD`
    #[arg(long, value_name = "NAME", env = "POLDERCTL_ETCD_USER", hide_env_values = true, global = true)]
    etcd_user: Option<String>,
    /// File with the password of --etcd-user; use /dev/stdin to read it from standard input
    #[arg(
        long,
        value_name = "FILE",
        env = "POLDERCTL_ETCD_PASSWORD_FILE",
        hide_env_values = true,
        global = true
    )]
    etcd_password_file: Option<PathBuf>,
}

/// Why the credentials cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoCredentials {
    /// The arguments contradict each other or are incomplete.
    #[error(transparent)]
    Usage(#[from] CredentialUsage),
    /// A file cannot be read or has invalid content.
    #[error(transparent)]
    File(#[from] CredentialFile),
}

/// The arguments contradict each other or are incomplete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CredentialUsage {
    /// The password in the environment is not valid UTF-8.
    /// Remedy: set `POLDERCTL_ETCD_PASSWORD` to a password in UTF-8.
    #[error("POLDERCTL_ETCD_PASSWORD is not UTF-8")]
    PasswordNotUtf8,
    /// The password in the environment is empty.
    /// Remedy: set `POLDERCTL_ETCD_PASSWORD` to the password, or unset it.
    #[error("POLDERCTL_ETCD_PASSWORD is empty")]
    PasswordEmpty,
    /// Only one of certificate and key is given.
    #[error("a certificate needs its key: set both --etcd-cert and --etcd-key")]
    HalfCertificate,
    /// The password is given twice.
    #[error(
        "both are set: set the password of --etcd-user in either --etcd-password-file or POLDERCTL_ETCD_PASSWORD"
    )]
    TwoPasswords,
    /// A user is given without a password.
    /// Remedy: set one of the two, or omit `--etcd-user`.
    #[error("set the password of --etcd-user in either --etcd-password-file or POLDERCTL_ETCD_PASSWORD")]
    NoPassword,
    /// The given user name is the empty text.
    /// Remedy: set `--etcd-user` to the user name, or omit it and the password.
    #[error("--etcd-user is empty")]
    UserEmpty,
    /// A password is given without a user.
    #[error("a password is set, but no user: add --etcd-user NAME")]
    NoUser,
}

/// A file cannot be read or has invalid content.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CredentialFile {
    /// The file of an argument cannot be read, or is not of the expected format.
    /// Remedy: set the argument to the right file, and make it readable for the user that runs `polderctl`.
    #[error("{flag}: {problem}")]
    Unusable {
        /// The argument.
        flag: &'static str,
        /// The file and the problem.
        problem: FileNotRead,
    },
    /// A certificate or key has bytes that are not UTF-8, so it is not in PEM format.
    /// Remedy: set the argument to a file in PEM format.
    #[error("{flag}: {} is not valid UTF-8", path.display())]
    NotUtf8 {
        /// The argument.
        flag: &'static str,
        /// The file.
        path: PathBuf,
    },
}

impl CredentialArguments {
    /// Reads the files and returns the credentials; `None` if no argument is set.
    pub fn read(&self) -> Result<Option<EtcdCredentials>, NoCredentials> {
        let variable = env::var_os(PASSWORD)
            .map(|password| password.into_string().map_err(|_| CredentialUsage::PasswordNotUtf8));
        let credentials =
            EtcdCredentials { certificate: self.certificate()?, user: self.user(variable.transpose()?)? };
        let is_given = credentials.certificate.is_some() || credentials.user.is_some();
        Ok(is_given.then_some(credentials))
    }

    fn certificate(&self) -> Result<Option<ClientCertificate>, NoCredentials> {
        let (cert, key) = match (&self.etcd_cert, &self.etcd_key) {
            (Some(cert), Some(key)) => (cert, key),
            (None, None) => return Ok(None),
            _ => return Err(CredentialUsage::HalfCertificate.into()),
        };
        let read = |flag: &'static str, path: &Path| {
            let unusable = |problem| CredentialFile::Unusable { flag, problem };
            let bytes = Pem::File(path.to_owned()).read().map_err(unusable)?;
            String::from_utf8(bytes).map_err(|_| CredentialFile::NotUtf8 { flag, path: path.to_owned() })
        };
        let certificate = read("--etcd-cert", cert)?;
        Ok(Some(ClientCertificate { certificate, key: Secret(read("--etcd-key", key)?) }))
    }

    fn user(&self, variable: Option<String>) -> Result<Option<User>, NoCredentials> {
        let password = match (variable, &self.etcd_password_file) {
            (Some(_), Some(_)) => return Err(CredentialUsage::TwoPasswords.into()),
            (Some(password), None) if password.is_empty() => {
                return Err(CredentialUsage::PasswordEmpty.into());
            }
            (Some(password), None) => Some(Password::Inline(password)),
            (None, Some(path)) => Some(Password::File(path.clone())),
            (None, None) => None,
        };
        let (name, password) = match (&self.etcd_user, password) {
            (None, None) => return Ok(None),
            (Some(name), Some(password)) if !name.is_empty() => (name.clone(), password),
            (Some(name), _) if name.is_empty() => return Err(CredentialUsage::UserEmpty.into()),
            (Some(_), _) => return Err(CredentialUsage::NoPassword.into()),
            (None, _) => return Err(CredentialUsage::NoUser.into()),
        };
        let unusable = |problem| CredentialFile::Unusable { flag: "--etcd-password-file", problem };
        let password = password.read().map_err(unusable)?;
        Ok(Some(User { name, password: Secret(password) }))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        credentials: CredentialArguments,
    }

    fn parse(arguments: &[&str]) -> CredentialArguments {
        Line::parse_from([&["polderctl"], arguments].concat()).credentials
    }

    fn assert_usage_error<T>(result: Result<T, NoCredentials>, part: &str) {
        match result {
            Err(NoCredentials::Usage(problem)) => assert!(problem.to_string().contains(part), "{problem}"),
            Err(NoCredentials::File(problem)) => panic!("{problem}"),
            Ok(_) => panic!("{part}: taken"),
        }
    }

    #[test]
    fn a_certificate_needs_its_key_and_a_user_one_password() {
        assert_usage_error(parse(&["--etcd-cert", "a"]).certificate(), "needs its key");
        assert_usage_error(parse(&["--etcd-key", "a"]).certificate(), "needs its key");
        assert_usage_error(parse(&["--etcd-user", "a"]).user(None), "set the password");
        assert_usage_error(parse(&["--etcd-user", ""]).user(Some("p".into())), "--etcd-user is empty");
        assert_usage_error(parse(&["--etcd-user", "a"]).user(Some(String::new())), "is empty");
        assert_usage_error(parse(&[]).user(Some("p".into())), "no user");
        let both = ["--etcd-user", "a", "--etcd-password-file", "/x"];
        assert_usage_error(parse(&both).user(Some("p".into())), "both are set");
        let user = parse(&["--etcd-user", "a"]).user(Some("p".into())).unwrap().unwrap();
        assert_eq!((user.name.as_str(), user.password.0.as_str()), ("a", "p"));
    }

    #[test]
    fn without_arguments_no_credentials_are_read_and_a_missing_file_is_reported() {
        assert_eq!(parse(&[]).read(), Ok(None));
        let arguments = parse(&["--etcd-cert", "/nowhere", "--etcd-key", "/nowhere"]);
        let Err(NoCredentials::File(problem)) = arguments.read() else { panic!("it was read") };
        let problem = problem.to_string();
        assert!(problem.starts_with("--etcd-cert: /nowhere: No such file"), "{problem}");
    }

    #[test]
    fn certificate_key_and_password_are_read_from_their_files() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let [cert, key] = ["cert", "key"].map(|name| file(name, &format!("-----BEGIN {name}-----\n")));
        let password = file("password", "secret\n");
        let arguments = ["--etcd-cert", &cert, "--etcd-key", &key, "--etcd-user", "a"];
        let arguments = [&arguments[..], &["--etcd-password-file", &password]].concat();
        let read = parse(&arguments).read().unwrap().unwrap();
        let shown = read.certificate.unwrap();
        assert_eq!(shown.certificate, "-----BEGIN cert-----\n");
        assert_eq!(shown.key.0, "-----BEGIN key-----\n");
        assert_eq!(read.user.unwrap().password.0, "secret");
        let plain = ["--etcd-cert", &password, "--etcd-key", &key];
        let Err(NoCredentials::File(problem)) = parse(&plain).certificate() else { panic!("it was taken") };
        let problem = problem.to_string();
        assert!(problem.contains("contains no PEM block"), "{problem}");
    }
}
