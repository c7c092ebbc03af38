//! Finds the addresses of etcd members: of the configured names, and of the names in a domain's SRV records.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use domain::base::iana::Rcode;
use domain::base::name::FromStrError;
use domain::base::wire::ParseError;
use domain::base::{Name, Rtype};
use domain::rdata::Srv;
use domain::resolv::StubResolver;
use tokio::net::lookup_host;
use tokio::time::timeout;

use super::config::EtcdConfig;
use super::endpoint::{EtcdEndpoint, UrlHost};

/// Timeout for a name server.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);

/// A member, from the configuration and the name servers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedMember {
    /// URL of the member, with its IP address as the host.
    pub url: String,
    /// IP address of the member.
    pub address: IpAddr,
    /// TCP port of the member.
    pub port: u16,
    /// The name that resolved to the address; `None` if the configuration contains the address.
    pub origin: Option<LookupOrigin>,
}

/// A resolved name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LookupOrigin {
    /// The configured source of the member: an endpoint, or the name of the SRV records.
    pub source: String,
    /// The host name of the address, which must be in the member's certificate.
    pub host: String,
}

impl LookupOrigin {
    /// Whether the source is an SRV record.
    pub(super) fn is_record(&self) -> bool {
        !self.source.contains("://")
    }
}

/// A failed lookup: of the whole source, or of one of its names.
struct FailedLookup {
    source: String,
    host: Option<String>,
    why: NoMembers,
}

/// Members of etcd were not found. Those of an earlier lookup are kept.
#[derive(Debug, thiserror::Error)]
enum NoMembers {
    /// The name server did not return the SRV records of the domain.
    /// Remedy: check `etcd.discovery_srv` and the records: `dig SRV NAME`.
    #[error("cannot look up SRV records {name}: {why}")]
    Records {
        /// The name of the SRV records.
        name: String,
        /// The cause.
        why: NoResult,
    },
    /// An SRV record points to a host of another domain. That member is not used.
    /// Remedy: correct the SRV records of the domain.
    #[error("SRV records {name} point to {host}: {why}")]
    Target {
        /// The name of the SRV records.
        name: String,
        /// The host in the record.
        host: String,
        /// The rule for hosts.
        why: OtherDomain,
    },
    /// The host of an endpoint or of an SRV record has no address.
    /// Remedy: check the name and the name servers in /etc/resolv.conf: `getent ahosts HOST`.
    #[error("cannot look up host {host} of {origin}: {why}")]
    Host {
        /// The host name.
        host: String,
        /// The endpoint, or the name of the SRV records.
        origin: String,
        /// The cause.
        why: NoResult,
    },
}

/// A name server returned no result.
#[derive(Debug, thiserror::Error)]
enum NoResult {
    /// The system's resolver failed, or no name server is reachable.
    /// Remedy: check the name and the name servers in /etc/resolv.conf.
    #[error(transparent)]
    Resolver(#[from] io::Error),
    /// No name server answered in time.
    /// Remedy: check that the name servers in /etc/resolv.conf are reachable.
    #[error("no reply within {} s", LOOKUP_TIMEOUT.as_secs())]
    Timeout,
    /// The name exists, but has no address.
    /// Remedy: check the name.
    #[error("no address found")]
    NoAddress,
    /// The name has no SRV records, or they mean that the service is not available (RFC 2782).
    /// Remedy: create the records, or correct `etcd.discovery_srv`.
    #[error("no records found")]
    NoRecords,
    /// The name server returned an error, for example SERVFAIL.
    /// Remedy: check the name server and the zone of the domain.
    #[error("the name server returned {0}")]
    Code(Rcode),
    /// The name of the SRV records is not a domain name.
    /// Remedy: correct `etcd.discovery_srv`.
    #[error(transparent)]
    Name(#[from] FromStrError),
    /// The answer of the name server cannot be decoded.
    /// Remedy: check the name server.
    #[error(transparent)]
    Answer(#[from] ParseError),
}

/// An SRV record points to a host that is not in the domain.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("with TLS the host must be {domain} or end with .{domain} (etcd.discovery_srv): ignored")]
struct OtherDomain {
    /// The domain in the configuration.
    domain: String,
}

impl FailedLookup {
    fn concerns(&self, found: &ResolvedMember) -> bool {
        found.origin.as_ref().is_some_and(|origin| {
            origin.source == self.source && self.host.as_ref().is_none_or(|host| *host == origin.host)
        })
    }
}

/// A configured source of members.
#[derive(Debug, Clone)]
enum LookupSource {
    Endpoint(String),
    Records { scheme: &'static str, domain: String, name: String },
}

/// Looks up the members, and keeps the last result for failed lookups.
#[derive(Debug, Clone)]
pub struct MemberLookup {
    sources: Vec<LookupSource>,
    last: Vec<ResolvedMember>,
}

impl MemberLookup {
    /// Creates a lookup of the configured members, without a query.
    pub fn new(config: &EtcdConfig) -> Self {
        let mut sources: Vec<_> = config.endpoints.iter().cloned().map(LookupSource::Endpoint).collect();
        sources.extend(config.discovery_srv.iter().map(|domain| {
            // The configuration decides whether TLS is used. The records of the other service are not queried.
            let (scheme, service) = if config.is_secure() {
                ("https", "_etcd-client-ssl._tcp")
            } else {
                ("http", "_etcd-client._tcp")
            };
            let domain = domain.trim_end_matches('.').to_owned();
            LookupSource::Records { scheme, name: format!("{service}.{domain}"), domain }
        }));
        Self { sources, last: Vec::new() }
    }

    /// Whether the members can change: a source has names.
    pub fn has_names(&self) -> bool {
        let is_name = |endpoint: &String| {
            EtcdEndpoint::parse(endpoint).is_some_and(|endpoint| matches!(endpoint.host, UrlHost::Name(_)))
        };
        self.sources.iter().any(|source| match source {
            LookupSource::Endpoint(endpoint) => is_name(endpoint),
            LookupSource::Records { .. } => true,
        })
    }

    /// Looks up all members, in the order of the configuration. Also returns the last error. After a failed lookup the
    /// previous addresses of the name remain.
    pub async fn look_up(&mut self) -> (Vec<ResolvedMember>, Option<String>) {
        let (mut all, mut problem) = (Vec::new(), None);
        for source in &self.sources {
            for outcome in source.look_up().await {
                let found = match outcome {
                    Ok(found) => found,
                    Err(failed) => {
                        let earlier =
                            self.last.iter().filter(|found| failed.concerns(found)).cloned().collect();
                        problem = Some(failed.why.to_string());
                        earlier
                    }
                };
                for found in found {
                    if !all.contains(&found) {
                        all.push(found);
                    }
                }
            }
        }
        self.last.clone_from(&all);
        (all, problem)
    }
}

impl LookupSource {
    async fn look_up(&self) -> Vec<Result<Vec<ResolvedMember>, FailedLookup>> {
        match self {
            Self::Endpoint(url) => match EtcdEndpoint::parse(url) {
                Some(EtcdEndpoint { host: UrlHost::Address(address), port, .. }) => {
                    vec![Ok(vec![ResolvedMember { url: url.clone(), address, port, origin: None }])]
                }
                Some(endpoint) => vec![addresses(url, &endpoint).await],
                None => Vec::new(),
            },
            Self::Records { scheme, domain, name } => match records(name).await {
                Ok(targets) => {
                    let mut found = Vec::new();
                    for (host, port) in targets {
                        found.push(match check_target(scheme, domain, &host) {
                            Ok(()) => addresses(name, &EtcdEndpoint::of(scheme, &host, port)).await,
                            Err(why) => {
                                let why = NoMembers::Target { name: name.clone(), host: host.clone(), why };
                                Err(FailedLookup { source: name.clone(), host: Some(host), why })
                            }
                        });
                    }
                    found
                }
                Err(why) => {
                    let why = NoMembers::Records { name: name.clone(), why };
                    vec![Err(FailedLookup { source: name.clone(), host: None, why })]
                }
            },
        }
    }
}

/// With TLS the certificate must name the target. A forged record must not choose a name for which another party has a
/// certificate of the same CA, so the target must be in the domain.
fn check_target(scheme: &str, domain: &str, host: &str) -> Result<(), OtherDomain> {
    let [domain, host] = [domain, host].map(|name| name.trim_end_matches('.').to_ascii_lowercase());
    let is_below = host.strip_suffix(&domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    if scheme != "https" || is_below {
        return Ok(());
    }
    Err(OtherDomain { domain })
}

/// The members with the endpoint's name. A trailing dot marks the name as complete for the name server; names in
/// certificates have no trailing dot.
async fn addresses(source: &str, endpoint: &EtcdEndpoint) -> Result<Vec<ResolvedMember>, FailedLookup> {
    let name = endpoint.host.to_string();
    let host = name.trim_end_matches('.').to_owned();
    match resolve(&name, endpoint.port).await {
        Ok(addresses) => Ok(addresses
            .into_iter()
            .map(|address| ResolvedMember {
                url: endpoint.at(address),
                address,
                port: endpoint.port,
                origin: Some(LookupOrigin { source: source.to_owned(), host: host.clone() }),
            })
            .collect()),
        Err(why) => {
            let why = NoMembers::Host { host: host.clone(), origin: source.to_owned(), why };
            Err(FailedLookup { source: source.to_owned(), host: Some(host), why })
        }
    }
}

/// Resolves a name to its addresses, without duplicates.
async fn resolve(name: &str, port: u16) -> Result<Vec<IpAddr>, NoResult> {
    let found = timeout(LOOKUP_TIMEOUT, lookup_host((name, port))).await.map_err(|_| NoResult::Timeout)??;
    let mut addresses: Vec<IpAddr> = found.map(|address| address.ip().to_canonical()).collect();
    // Sort them: otherwise the order of the name server would look like a change of members.
    addresses.sort_unstable();
    addresses.dedup();
    if addresses.is_empty() { Err(NoResult::NoAddress) } else { Ok(addresses) }
}

/// Hosts and ports of the SRV records of that name, sorted by priority, then by host and port. Weights are ignored:
/// they balance load, but an agent stays at one member.
///
/// The system's resolver does not support SRV records. The name servers are those of `/etc/resolv.conf`, which is read
/// each time because it may have changed.
async fn records(name: &str) -> Result<Vec<(String, u16)>, NoResult> {
    let question = name.parse::<Name<Vec<u8>>>()?;
    let resolver = StubResolver::new();
    let asked = timeout(LOOKUP_TIMEOUT, resolver.query((question, Rtype::SRV))).await;
    let answer = asked.map_err(|_| NoResult::Timeout)??;
    match answer.header().rcode() {
        Rcode::NOERROR => {}
        Rcode::NXDOMAIN => return Err(NoResult::NoRecords),
        other => return Err(NoResult::Code(other)),
    }
    let section = answer.answer()?;
    let mut targets = Vec::new();
    for record in section.limit_to_in::<Srv<_>>() {
        let record = record?;
        let srv = record.data();
        targets.push((srv.priority(), srv.target().to_string(), srv.port()));
    }
    targets.sort();
    targets.dedup();
    // A target of a single dot means that the service is not available (RFC 2782).
    let targets: Vec<_> =
        targets.into_iter().filter(|(_, host, _)| host != "." && !host.is_empty()).collect();
    if targets.is_empty() {
        return Err(NoResult::NoRecords);
    }
    // Add a trailing dot: without it, the resolver would try the search domains of `/etc/resolv.conf` first.
    let whole = |host: String| format!("{}.", host.trim_end_matches('.'));
    Ok(targets.into_iter().map(|(_, host, port)| (whole(host), port)).collect())
}

/// Whether the text is a valid domain name.
pub fn is_domain(text: &str) -> bool {
    !text.is_empty() && text != "." && !text.contains(['/', ':']) && text.parse::<Name<Vec<u8>>>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::config::Pem;

    fn found(source: &str, host: &str, address: &str) -> ResolvedMember {
        let origin = Some(LookupOrigin { source: source.to_owned(), host: host.to_owned() });
        ResolvedMember {
            url: format!("http://{address}:1"),
            address: address.parse().unwrap(),
            port: 1,
            origin,
        }
    }

    #[test]
    fn a_failed_lookup_affects_only_its_own_names() {
        let (a, b) = (found("srv", "a", "192.0.2.1"), found("srv", "b", "192.0.2.2"));
        let other = found("http://etcd:1", "a", "192.0.2.3");
        let failed = |host: Option<&str>| FailedLookup {
            source: "srv".to_owned(),
            host: host.map(str::to_owned),
            why: NoMembers::Records { name: "srv".to_owned(), why: NoResult::NoRecords },
        };
        assert_eq!([&a, &b, &other].map(|found| failed(None).concerns(found)), [true, true, false]);
        assert_eq!([&a, &b, &other].map(|found| failed(Some("a")).concerns(found)), [true, false, false]);
    }

    #[test]
    fn the_srv_record_name_depends_on_tls() {
        let name = |ca: Option<&str>| {
            let config = EtcdConfig {
                discovery_srv: Some("example.org.".to_owned()),
                ca: ca.map(|ca| Pem::Inline(ca.as_bytes().to_vec())),
                ..EtcdConfig::default()
            };
            match MemberLookup::new(&config).sources.pop() {
                Some(LookupSource::Records { scheme, name, .. }) => (scheme, name),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(name(None), ("http", "_etcd-client._tcp.example.org".to_owned()));
        assert_eq!(name(Some("pem")), ("https", "_etcd-client-ssl._tcp.example.org".to_owned()));
    }

    #[test]
    fn with_tls_an_srv_target_must_be_in_the_same_domain() {
        let check = |scheme, host| check_target(scheme, "example.org", host);
        for good in ["example.org.", "a.example.org.", "A.b.Example.ORG"] {
            assert_eq!(check("https", good), Ok(()), "{good}");
        }
        for bad in ["etcd.example.net.", "badexample.org.", "org.", "example.org.evil.test."] {
            assert!(check("https", bad).unwrap_err().to_string().contains(".example.org"), "{bad}");
            assert_eq!(check("http", bad), Ok(()), "{bad}");
        }
    }

    #[test]
    fn a_url_is_not_accepted_as_a_domain() {
        assert!(is_domain("example.org") && is_domain("example.org.") && is_domain("etcd"));
        for wrong in ["", ".", "https://example.org", "example.org:2379", "a..b"] {
            assert!(!is_domain(wrong), "{wrong}");
        }
    }

    #[tokio::test]
    async fn an_address_in_the_configuration_needs_no_lookup() {
        let url = "http://192.0.2.1:2379/".to_owned();
        let mut lookup =
            MemberLookup::new(&EtcdConfig { endpoints: vec![url.clone()], ..EtcdConfig::default() });
        assert!(!lookup.has_names());
        let address = "192.0.2.1".parse().unwrap();
        assert_eq!(
            lookup.look_up().await,
            (vec![ResolvedMember { url, address, port: 2379, origin: None }], None)
        );
    }
}
