//! Certificates for an etcd with TLS.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};

use crate::etcd::Tls;

/// A certificate authority, and the folder for the certificates that it signs.
#[derive(Debug)]
pub struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Creates an authority. Its certificate is `ca.pem` in the folder.
    pub fn new(folder: &Path, name: &str) -> Self {
        fs::create_dir_all(folder).expect("a folder for certificates");
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("a certificate");
        fs::write(folder.join("ca.pem"), certificate.pem()).expect("a file");
        Self { folder: folder.to_owned(), issuer: Issuer::new(params, key) }
    }

    /// File of the authority's certificate.
    pub fn ca(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// Signs a certificate of that name for these addresses. Returns the files of certificate and key.
    pub fn sign(&self, name: &str, addresses: &[IpAddr]) -> (PathBuf, PathBuf) {
        self.sign_for(name, addresses.iter().copied().map(SanType::IpAddress).collect())
    }

    /// Signs a certificate of that name for these alternative names.
    fn sign_for(&self, name: &str, alternatives: Vec<SanType>) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = alternatives;
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let paths = (self.folder.join(format!("{name}.pem")), self.folder.join(format!("{name}.key")));
        fs::write(&paths.0, certificate.pem()).expect("a file");
        fs::write(&paths.1, key.serialize_pem()).expect("a file");
        paths
    }

    /// Certificates for an etcd at these addresses.
    pub fn for_etcd(&self, addresses: &[IpAddr]) -> Tls {
        let (certificate, key) = self.sign("etcd", addresses);
        Tls { ca: self.ca(), certificate, key }
    }

    /// Certificates for an etcd whose members are addressed by this name, which may begin with `*.`.
    pub fn for_etcd_named(&self, name: &str) -> Tls {
        let name = SanType::DnsName(name.try_into().expect("a name in ASCII"));
        let (certificate, key) = self.sign_for("etcd", vec![name]);
        Tls { ca: self.ca(), certificate, key }
    }
}
