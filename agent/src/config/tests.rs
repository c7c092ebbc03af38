use std::fs;

use super::*;

fn check(text: &str) -> Result<Config, ConfigError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.toml");
    fs::write(&path, text).unwrap();
    Config::load(&Flags { config: Some(path), node: Some("n1".parse().unwrap()), ..Flags::default() })
}

fn refused(text: &str) -> String {
    check(text).expect_err(text).to_string()
}

const ETCD: &str = "[etcd]\nendpoints = [\"http://127.0.0.1:2379\"]\n";

#[test]
fn unset_keys_have_the_documented_defaults() {
    let config = check(ETCD).unwrap();
    assert_eq!(config.state_dir, Path::new("/var/lib/polder"));
    assert_eq!(config.socket, Path::new("/run/polder/agent.sock"));
    assert_eq!(config.cni_file, Path::new("/etc/cni/net.d/10-polder.conflist"));
    assert_eq!(config.http.to_string(), "127.0.0.1:9474");
    assert_eq!((config.cooldown.as_secs(), config.resync.as_secs()), (60, 30));
    assert!(config.bootstrap.is_none());
}

#[test]
fn the_documented_configuration_is_valid() {
    let config = check(include_str!("../../../docs/agent.toml")).unwrap();
    assert_eq!(config.underlay.interface.as_deref(), Some("eth1"));
    assert_eq!(config.bootstrap.unwrap().pools.len(), 2);
}

#[test]
fn flags_override_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.toml");
    fs::write(&path, format!("node = \"file\"\nsocket = \"/file\"\n{ETCD}")).unwrap();
    let flags = ["polder-agent", "--node", "flag", "--etcd", "http://a:1,http://b:2", "--socket", "/flag"];
    let mut flags = Flags::parse_from(flags);
    flags.config = Some(path);
    let config = Config::load(&flags).unwrap();
    assert_eq!((config.node.as_str(), config.socket.as_path()), ("flag", Path::new("/flag")));
    let StoreConfig::Etcd(etcd) = config.store else { panic!("not etcd") };
    assert_eq!(etcd.endpoints, ["http://a:1", "http://b:2"]);
}

#[test]
fn an_unknown_key_or_a_wrong_type_is_reported_with_its_line() {
    let error = refused("node = \"n1\"\nsokcet = \"/x\"\n");
    assert!(error.contains("agent.toml:2: unknown field `sokcet`"), "{error}");
    let error = refused("[etcd]\nendpoint = []\n");
    assert!(error.contains("agent.toml:2: unknown field `endpoint`"), "{error}");
    let error = refused("mtu = \"big\"\n");
    assert!(
        error.contains("agent.toml:1: mtu: invalid type: string \"big\", expected a whole number"),
        "{error}"
    );
    let error = refused("node = \"a/b\"\n");
    assert!(error.contains("node name \"a/b\" is not valid"), "{error}");
}

#[test]
fn every_error_of_a_file_is_reported_with_its_line_and_key() {
    let error = refused(
        "resync_seconds = \"60s\"\nhttp = \":9474\"\n[ipam]\ncooldown_seconds = 60\ngrace_seconds = -1\n\
         [labels]\nzone = 1\n[etcd]\nendpoints = \"http://a:1\"\nsurprise = 1\n",
    );
    for expected in [
        "agent.toml:1: resync_seconds: invalid type: string \"60s\", expected a whole number: use a number of \
         seconds, e.g. 60",
        "agent.toml:2: http: \":9474\" is not an address with a port",
        "agent.toml:5: ipam.grace_seconds: ",
        "agent.toml:7: labels.zone: ",
        "agent.toml:9: etcd.endpoints: ",
        "agent.toml:10: unknown field `surprise`",
    ] {
        assert!(error.contains(expected), "{error} does not contain {expected:?}");
    }
    assert_eq!(error.lines().count(), 6, "{error}");
    assert_eq!(check(&format!("http = \"localhost:1\"\n{ETCD}")).unwrap().http.to_string(), "127.0.0.1:1");
}

#[test]
fn invalid_values_and_combinations_are_refused_with_the_reason() {
    for (text, problem) in [
        ("", "etcd.endpoints: no endpoint is set"),
        ("[etcd]\nendpoints = [\"127.0.0.1:2379\"]", "is not a URL"),
        ("[etcd]\nendpoints = [\"https://a:1\"]", "etcd.ca: TLS needs the CA"),
        ("[etcd]\nendpoints = [\"https://a:1\", \"http://b:1\"]", "mixed"),
        ("[etcd]\nendpoints = [\"http://a:1\"]\nca = \"/nowhere\"", "the endpoints are http://"),
        ("[etcd]\nendpoints = [\"https://a:1\"]\nca = \"/nowhere\"", "etcd.ca: /nowhere: No such file"),
        ("[etcd]\nendpoints = [\"https://a:1\"]\ncert = \"/x\"", "only one of etcd.cert and etcd.key is set"),
        ("[etcd]\nendpoints = [\"https://a:1\"]\nca = \"/proc/version\"", "contains no PEM block"),
        (
            "store = \"embedded\"\n[etcd]\nendpoints = [\"http://a:1\"]",
            "store: \"embedded\" cannot be combined with etcd.endpoints",
        ),
        ("[etcd]\nprefix = \"polder\"", "invalid prefix \"polder\": write names of"),
        (
            "[etcd]\nendpoints = [\"http://a:1\"]\ndiscovery_srv = \"example.org\"",
            "etcd.discovery_srv: etcd.endpoints is also set",
        ),
        ("[etcd]\ndiscovery_srv = \"https://example.org\"", "is not a domain name: use e.g. example.org"),
        (
            "[etcd]\ndiscovery_srv = \"example.org\"\ncert = \"/x\"\nkey = \"/x\"",
            "etcd.cert: /x: No such file",
        ),
        ("store = \"embedded\"\n[etcd]\ndiscovery_srv = \"a\"", "etcd.discovery_srv: not allowed with store"),
        ("store = \"embedded\"\n[etcd]\nprefix = \"/a/\"", "etcd.prefix: not allowed with store"),
        (
            "[etcd]\nendpoints = [\"http://a:1\"]\nuser = \"u\"",
            "etcd.password_file: etcd.user is set without a password",
        ),
        (
            "[etcd]\nendpoints = [\"http://a:1\"]\npassword = \"p\"",
            "etcd.user: a password is set without a user",
        ),
        (
            "[etcd]\nendpoints = [\"http://a:1\"]\nuser = \"u\"\npassword_file = \"/nowhere\"",
            "etcd.password_file: /nowhere: No such file",
        ),
        (
            "[etcd]\nendpoints = [\"http://a:1\"]\nuser = \"u\"\npassword = \"p\"\npassword_file = \"/x\"",
            "etcd.password is also set",
        ),
        ("mtu = 500", "mtu: 500 is out of range: use 576 to 65535"),
        ("resync_seconds = 0", "resync_seconds"),
        ("[ipam]\ncooldown_seconds = 9", "at least 10 s"),
        ("[underlay]\naddresses = [\"10.0.0.1\", \"10.0.0.2\"]", "more than one IPv4 address"),
    ] {
        let error = refused(text);
        assert!(error.contains(problem), "{text:?}: error {error:?} does not contain {problem:?}");
    }
}

#[test]
fn invalid_pools_are_refused_with_the_reason() {
    for (pools, problem) in [
        ("[]", "give at least one"),
        ("[\"10.0.0.0\"]", "is not a network"),
        ("[\"10.0.0.1/16\"]", "did you mean 10.0.0.0/16?"),
        ("[\"10.0.0.0/28\"]", "smaller than one block of /26"),
        (
            "[\"10.0.0.0/28\"]",
            "set a block length of at least 28 ({ cidr = \"10.0.0.0/28\", block_length = ... })",
        ),
        ("[{ cidr = \"10.0.0.0/16\", block_length = 32 }]", "too small"),
        ("[{ cidr = \"10.0.0.0/32\", block_length = 32 }]", "too small"),
        ("[{ cidr = \"fd00::/64\", block_length = 128 }]", "at most 126"),
        ("[{ cidr = \"10.0.0.0/16\", block_length = 8 }]", "smaller than one block"),
        (
            "[\"ff02::/64\"]",
            "ff02::/64 cannot be a pool: pods cannot use addresses of ff00::/8 (multicast, RFC 4291)",
        ),
        ("[\"10.0.0.0/16\", \"169.254.0.0/16\"]", "169.254.0.0/16 cannot be a pool"),
        ("[\"10.0.0.0/16\", { cidr = \"fd00::/64\", name = \"ipv4\" }]", "have the same name, ipv4"),
        ("[\"10.0.0.0/8\", \"10.1.0.0/16\"]", "10.1.0.0/16 and 10.0.0.0/8 overlap"),
    ] {
        let error = refused(&format!("{ETCD}[bootstrap]\npools = {pools}"));
        let has_problem = error.starts_with("bootstrap.pools: ") && error.contains(problem);
        assert!(has_problem, "{pools}: error {error:?} does not contain {problem:?}");
    }
}

#[test]
fn pools_without_a_name_are_named_after_their_family() {
    let text = format!("{ETCD}[bootstrap]\npools = [\"10.0.0.0/16\", \"fd00::/56\", \"10.1.0.0/16\"]");
    let pools = check(&text).unwrap().bootstrap.unwrap().pools;
    let names: Vec<_> = pools.iter().map(|pool| pool.name.as_str()).collect();
    assert_eq!(names, ["ipv4", "ipv6", "ipv4-2"]);
}

#[test]
fn a_pool_can_be_configured_with_a_name_and_a_block_length() {
    let text = format!(
        "{ETCD}[bootstrap]\npools = [\"10.0.0.0/16\", {{ cidr = \"10.1.0.0/28\", name = \"small\", block_length = 28 \
         }}]"
    );
    let pools = check(&text).unwrap().bootstrap.unwrap().pools;
    let found: Vec<_> = pools.iter().map(|pool| (pool.name.as_str(), pool.block_length())).collect();
    assert_eq!(found, [("ipv4", 26), ("small", 28)]);
    let more = "purpose = \"reservations\"\nnodes = { zone = \"a\" }\n";
    let pool = format!("{ETCD}[[bootstrap.pools]]\ncidr = \"10.2.0.0/28\"\n{more}");
    let pool = check(&pool).unwrap().bootstrap.unwrap().pools.remove(0);
    // No node claims blocks of this pool: even a small pool needs no block length.
    assert_eq!((pool.purpose, pool.block_length()), (polder_ipam::pool::Purpose::Reservations, 28));
    assert_eq!(pool.nodes.get("zone").map(String::as_str), Some("a"));
    let error = refused(&format!("{ETCD}[[bootstrap.pools]]\ncidr = \"10.2.0.0/16\"\npurpose = \"pods\"\n"));
    assert!(error.contains("unknown variant `pods`, expected `blocks` or `reservations`"), "{error}");
    let tables =
        format!("{ETCD}[bootstrap]\nmasquerade = false\n[[bootstrap.pools]]\ncidr = \"10.0.0.0/16\"\n");
    assert_eq!(check(&tables).unwrap().bootstrap.unwrap().pools.len(), 1);
    let error = refused(&format!("{ETCD}[[bootstrap.pools]]\ncidr = \"10.0.0.0/16\"\nlength = 28\n"));
    assert!(error.contains("unknown field `length`"), "{error}");
    let error = refused(&format!("{ETCD}[bootstrap]\npools = [16]\n"));
    assert!(error.contains("a range like \"10.244.0.0/16\", or a table"), "{error}");
}

#[test]
fn a_pool_in_a_commonly_used_range_is_accepted_with_a_warning() {
    let config = check(&format!("{ETCD}[bootstrap]\npools = [\"10.96.0.0/16\", \"10.244.0.0/16\"]")).unwrap();
    let warnings = config.warnings();
    assert!(
        warnings.len() == 1 && warnings[0].contains("kubeadm's default range for Services"),
        "{warnings:?}"
    );
}

#[test]
fn other_plugins_can_be_chained_and_invalid_chains_are_refused() {
    let chain = |cni: &str| check(&format!("{ETCD}[cni]\n{cni}\n"));
    let alone = check(ETCD).unwrap().network;
    assert_eq!((alone.versions.last(), alone.chain.len()), (Some(&"1.1.0"), 0));
    let portmap = "{ type = \"portmap\", snat = true, capabilities = { portMappings = true } }";
    let config =
        chain(&format!("name = \"pods\"\nfile = \"00-pods.conflist\"\nchain = [{portmap}]")).unwrap();
    assert_eq!(config.cni_file, Path::new("/etc/cni/net.d/00-pods.conflist"));
    let network = config.network;
    assert_eq!((network.name.unwrap().as_str(), network.versions.last()), ("pods", Some(&"1.0.0")));
    assert_eq!(
        network.chain,
        [serde_json::json!({ "type": "portmap", "snat": true, "capabilities": { "portMappings": true } })]
    );
    let newer = chain(&format!("version = \"1.1.0\"\nchain = [{portmap}]")).unwrap().network;
    assert_eq!(newer.versions.last(), Some(&"1.1.0"));
    for (cni, problem) in [
        (
            format!("chain = [{portmap}, {portmap}]"),
            "portMappings is declared by two entries of plugin portmap",
        ),
        (
            "chain = [{ type = \"tuning\", capabilities = { mac = true } }]".to_owned(),
            "capability mac is declared by both polder and tuning: only one plugin may declare it, remove it from \
             tuning",
        ),
        ("chain = [{ type = \"polder\" }]".to_owned(), "polder is already in the chain"),
        ("chain = [{ snat = true }]".to_owned(), "has no type"),
        ("chain = [{ type = \"x\", capabilities = [\"mac\"] }]".to_owned(), "e.g. capabilities = {"),
        ("version = \"2.0.0\"".to_owned(), "cni.version: unsupported version \"2.0.0\": supported are 0.3.1"),
        ("file = \"polder.conf\"".to_owned(), "cni.file: \"polder.conf\" is not a valid file name"),
        ("file = \"../x.conflist\"".to_owned(), "cni.file"),
        ("name = \"polder.probe\"".to_owned(), "cni.name"),
    ] {
        let error = chain(&cni).expect_err(&cni).to_string();
        assert!(error.contains(problem), "{cni}: error {error:?} does not contain {problem:?}");
    }
}

#[test]
fn a_password_without_encryption_is_accepted_with_a_warning() {
    let user = "user = \"u\"\npassword = \"secret\"\n";
    let warnings = check(&format!("{ETCD}{user}")).unwrap().warnings();
    assert!(warnings.len() == 1 && warnings[0].contains("without encryption"), "{warnings:?}");
    assert_eq!(check(ETCD).unwrap().warnings(), Vec::<String>::new());
}

#[test]
fn each_vxlan_setting_has_its_own_default() {
    for (lines, vni, port) in [("vni = 7", 7, 8472), ("port = 4789", 1, 4789), ("", 1, 8472)] {
        let text = format!("{ETCD}[bootstrap]\npools = [\"10.0.0.0/16\"]\n[bootstrap.vxlan]\n{lines}\n");
        let vxlan = check(&text).unwrap().bootstrap.unwrap().vxlan;
        assert_eq!((vxlan.vni, vxlan.port), (vni, port), "{lines}");
    }
}

#[test]
fn a_relative_path_is_refused_in_the_file_and_as_a_flag() {
    for key in ["socket", "state_dir", "cni_conf_dir"] {
        let error = refused(&format!("{key} = \"run/b\"\n{ETCD}"));
        assert!(error.starts_with(&format!("{key}: run/b is a relative path")), "{error}");
        let flag = format!("--{}", key.replace('_', "-"));
        let flags =
            Flags::parse_from(["polder-agent", "--node", "n", "--etcd", "http://a:1", &flag, "run/b"]);
        let error = Config::load(&flags).expect_err(&flag).to_string();
        assert!(error.starts_with(&format!("{key}: run/b is a relative path")), "{error}");
    }
    for (key, more) in [("ca", ""), ("cert", "key = \"/x\"\n")] {
        let error = refused(&format!("[etcd]\nendpoints = [\"https://a:1\"]\n{key} = \"tls/x\"\n{more}"));
        assert!(error.starts_with(&format!("etcd.{key}: tls/x is a relative path")), "{error}");
    }
}

#[test]
fn kubernetes_is_off_without_its_section_and_on_with_it() {
    use crate::kubernetes::settings::{Credentials, RemoveNodes};
    let of = |section: &str| check(&format!("{ETCD}{section}"));
    assert_eq!(check(ETCD).unwrap().kubernetes, None);
    assert_eq!(of("[kubernetes]\nenabled = false\n").unwrap().kubernetes, None);
    let usual = of("[kubernetes]\n").unwrap().kubernetes.unwrap();
    assert_eq!((usual.credentials, usual.remove_nodes), (Credentials::ServiceAccount, RemoveNodes::Manual));
    let all =
        "[kubernetes]\nkubeconfig = \"/k\"\napi_server = \"http://a:1\"\nremove_nodes = \"automatic\"\n";
    let all = of(all).unwrap();
    assert!(all.warnings()[0].starts_with("kubernetes.api_server: the agent's credentials"));
    let all = all.kubernetes.unwrap();
    assert_eq!(all.credentials, Credentials::Kubeconfig("/k".into()));
    assert_eq!((all.api_server.unwrap().as_str(), all.remove_nodes), ("http://a:1", RemoveNodes::Automatic));
    for (line, problem) in [
        ("api_server = \"a:1\"", "kubernetes.api_server: \"a:1\" is not a URL"),
        ("kubeconfig = \"k\"", "kubernetes.kubeconfig: k is a relative path"),
        ("remove_nodes = \"always\"", "kubernetes.remove_nodes"),
    ] {
        let error = refused(&format!("{ETCD}[kubernetes]\n{line}\n"));
        assert!(error.contains(problem), "{error}");
    }
}
