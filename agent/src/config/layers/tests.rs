use clap::Parser;

use super::super::{Config, StoreConfig, print};
use super::*;

const ETCD: &str = "[etcd]\nendpoints = [\"http://file:1\"]\n";

fn layers(file: &str, variables: &[(&str, &str)], flags: &[&str]) -> Result<Layers, ConfigError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.toml");
    fs::write(&path, file).unwrap();
    let flags = [&["polder-agent", "--config", path.to_str().unwrap()], flags].concat();
    let variables = variables.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
    Layers::read(&Flags::parse_from(flags), variables)
}

fn load(file: &str, variables: &[(&str, &str)], flags: &[&str]) -> Result<Config, ConfigError> {
    Config::of(&layers(file, variables, flags)?)
}

fn refused(variables: &[(&str, &str)]) -> String {
    load(&format!("node = \"n\"\n{ETCD}"), variables, &[]).expect_err(&format!("{variables:?}")).to_string()
}

fn endpoints(config: Config) -> Vec<String> {
    let StoreConfig::Etcd(etcd) = config.store else { panic!("not etcd") };
    etcd.endpoints
}

#[test]
fn a_flag_overrides_a_variable_and_a_variable_overrides_the_file() {
    let file = format!("node = \"file\"\nsocket = \"/file\"\nmtu = 1400\n{ETCD}");
    let variables =
        [("POLDER__NODE", "variable"), ("POLDER__SOCKET", "/variable"), ("POLDER__IPAM__GRACE_SECONDS", "7")];
    let config = load(&file, &variables, &["--node", "flag"]).unwrap();
    assert_eq!((config.node.as_str(), config.socket.as_path()), ("flag", Path::new("/variable")));
    assert_eq!((config.mtu, config.grace.as_secs(), config.cooldown.as_secs()), (Some(1400), 7, 60));
    assert_eq!(endpoints(config), ["http://file:1"]);
}

#[test]
fn every_kind_of_value_can_be_set_by_a_variable() {
    let variables = [
        // A name of digits, and a name with a special character of TOML.
        ("POLDER__NODE", "1234"),
        ("POLDER__ETCD__ENDPOINTS", "[\"http://a:1\", \"http://b:1\"]"),
        ("POLDER__MTU", "1500"),
        ("POLDER__PROBE_PEERS", "false"),
        ("POLDER__IDENTITY", "ledger"),
        ("POLDER__UNDERLAY__INTERFACE", "\"eth9\""),
        ("POLDER__HTTP", "[::1]:9999"),
        ("POLDER__LABELS", "{ zone = \"a\", \"example.org/Rack\" = \"7\" }"),
        ("POLDER__LABELS__DISK", "2"),
        ("POLDER__BOOTSTRAP__POOLS", "[\"10.0.0.0/16\", { cidr = \"10.1.0.0/16\", name = \"b\" }]"),
        ("POLDER__BOOTSTRAP__VXLAN__VNI", "9"),
    ];
    let config = load("", &variables, &[]).unwrap();
    assert_eq!((config.node.as_str(), config.mtu, config.probe_peers), ("1234", Some(1500), false));
    assert_eq!(config.underlay.interface.as_deref(), Some("eth9"));
    assert_eq!(config.http.to_string(), "[::1]:9999");
    let labels: Vec<_> = config.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    assert_eq!(labels, [("disk", "2"), ("example.org/Rack", "7"), ("zone", "a")]);
    let bootstrap = config.bootstrap.as_ref().unwrap();
    assert_eq!((bootstrap.pools.len(), bootstrap.vxlan.vni, bootstrap.vxlan.port), (2, 9, 8472));
    assert_eq!(endpoints(config), ["http://a:1", "http://b:1"]);
}

#[test]
fn an_invalid_variable_is_reported_with_its_name_and_the_remedy() {
    for (name, text, problem) in [
        ("POLDER__SOKCET", "/x", "unknown field `sokcet`"),
        ("POLDER__ETCD__ENDPOINT", "[]", "unknown field `endpoint`, expected one of `endpoints`"),
        ("POLDER__", "x", "unknown field ``"),
        ("POLDER__MTU", "big", "invalid type: string \"big\", expected a whole number"),
        ("POLDER__MTU", "-1", "invalid value: integer `-1`, expected a whole number"),
        ("POLDER__NODE", "a/b", "node name \"a/b\" is not valid"),
        ("POLDER__ETCD__ENDPOINTS", "http://a:1", "use a TOML list, e.g. [\"a\", \"b\"]"),
        ("POLDER__ETCD__ENDPOINTS", "[\"http://a:1\"", "use a TOML list, e.g. [\"a\", \"b\"]"),
        ("POLDER__ETCD", "http://a:1", "use a TOML table, e.g. { key = \"value\" }"),
        ("POLDER__LABELS", "zone=a", "use a TOML table, e.g. { key = \"value\" }"),
    ] {
        let error = refused(&[(name, text)]);
        assert!(error.starts_with(&format!("environment variable {name}: ")), "{error}");
        assert!(error.contains(problem), "{name}={text:?} says {error:?}, not {problem:?}");
    }
    let error = refused(&[("POLDER__MTU", "1400"), ("POLDER__mtu", "1500")]);
    assert!(error.contains("POLDER__MTU") && error.contains("sets the same key"), "{error}");
    // A value that is invalid only in combination is reported with its variable, too.
    let error = refused(&[("POLDER__RESYNC_SECONDS", "0")]);
    assert!(
        error.contains(
            "resync_seconds: 0 s is too short: set at least 1, or remove the key to use the default (set by the \
             environment variable POLDER__RESYNC_SECONDS)"
        ),
        "{error}"
    );
}

#[test]
fn variables_that_kubernetes_injects_for_a_service_named_polder_etcd_are_ignored() {
    let injected = [
        ("POLDER_ETCD_PORT", "tcp://10.96.0.7:2379"),
        ("POLDER_ETCD_SERVICE_HOST", "10.96.0.7"),
        ("POLDER_ETCD_PORT_2379_TCP_PROTO", "tcp"),
    ];
    let config = load(&format!("node = \"n\"\n{ETCD}"), &injected, &[]).unwrap();
    assert_eq!(endpoints(config), ["http://file:1"]);
}

#[test]
fn a_value_is_printed_with_its_origin() {
    let file = format!("mtu = 1400\n{ETCD}[labels]\nzone = \"a\"\n");
    let variables = [
        ("POLDER__HTTP", "127.0.0.1:1"),
        ("POLDER__LABELS__DISK", "ssd"),
        ("POLDER__ETCD__PASSWORD", "se\"cret"),
    ];
    let printed = print::print(&layers(&file, &variables, &["--node", "n7"]).unwrap()).unwrap();
    let line = |value: &str| {
        let line = printed.lines().find(|line| line.starts_with(value));
        line.unwrap_or_else(|| panic!("{value} is not in {printed}")).split("  # ").nth(1).unwrap().to_owned()
    };
    assert_eq!(line("node = \"n7\""), "flag --node");
    assert!(line("mtu = 1400").starts_with("file /") && line("labels.zone = \"a\"").starts_with("file /"));
    assert_eq!(line("http = \"127.0.0.1:1\""), "variable POLDER__HTTP");
    assert_eq!(line("labels.disk = \"ssd\""), "variable POLDER__LABELS__DISK");
    assert_eq!(line("state_dir = \"/var/lib/polder\""), "default");
    assert_eq!(line("etcd.password = \"(not shown)\""), "variable POLDER__ETCD__PASSWORD");
    assert!(!printed.contains("cret"), "{printed}");
    // The output is a valid configuration with the same values.
    let again = print::print(&layers(&printed, &[], &[]).unwrap()).unwrap();
    let values = |text: &str| {
        text.lines().map(|line| line.split("  # ").next().unwrap().trim().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(values(&again), values(&printed));
}
