use std::os::unix::fs::symlink;

use super::*;

const SOCKET: &str = "/run/polder/agent.sock";

fn network(chain: Vec<Value>) -> Network {
    Network { name: None, versions: &VERSIONS, has_fixed_versions: false, chain }
}

/// A configuration file, and a state folder.
struct At {
    path: PathBuf,
    network: Network,
    state: tempfile::TempDir,
    written: PathBuf,
}

impl At {
    fn conflist(&self) -> Conflist<'_> {
        Conflist::new(&self.path, Path::new(SOCKET), &self.network, self.written.clone())
    }

    /// The types of the plugins in the file, and the number of offered versions.
    fn found(&self) -> (Vec<String>, usize) {
        let list = read(&self.path).unwrap();
        (
            plugins(&list).map(|plugin| type_of(plugin).to_owned()).collect(),
            list["cniVersions"].as_array().unwrap().len(),
        )
    }
}

fn with(path: PathBuf, network: Network) -> At {
    let state = tempfile::tempdir().unwrap();
    At { path, network, written: state.path().join("conflist"), state }
}

/// A configuration without further plugins.
fn at(folder: &Path) -> At {
    with(folder.join("10-polder.conflist"), network(Vec::new()))
}

/// Changes the plugins in the file, as other software does.
fn list_with(file: &At, change: impl FnOnce(&mut Vec<Value>)) {
    let mut list = read(&file.path).unwrap();
    change(list["plugins"].as_array_mut().unwrap());
    fs::write(&file.path, text(&list)).unwrap();
}

#[test]
fn an_agent_keeps_foreign_additions_and_deletes_plugins_that_it_no_longer_configures() {
    let folder = tempfile::tempdir().unwrap();
    let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
    let mut file = with(folder.path().join("10-polder.conflist"), network(vec![portmap]));
    assert!(file.conflist().write().unwrap());
    let mut list = read(&file.path).unwrap();
    list["disableCheck"] = true.into();
    list["plugins"][0]["capabilities"]["dns"] = true.into();
    fs::write(&file.path, text(&list)).unwrap();
    list_with(&file, |plugins| plugins.insert(1, json!({ "type": "istio-cni", "log_level": "info" })));
    // The next agent has no portmap in its configuration.
    file.network.chain.clear();
    assert_eq!(file.conflist().additions(), ["istio-cni"]);
    assert!(file.conflist().write().unwrap());
    assert_eq!(file.found(), (vec!["polder".to_owned(), "istio-cni".to_owned()], 3));
    let list = read(&file.path).unwrap();
    assert_eq!(
        (&list["disableCheck"], &list["plugins"][0]["capabilities"]["dns"]),
        (&json!(true), &json!(true))
    );
    assert_eq!(list["plugins"][1]["log_level"], "info");
    assert!(!file.conflist().write().unwrap(), "it is right");
    // The order of plugins, and a second plugin of a configured type.
    list_with(&file, |plugins| plugins.push(json!({ "type": "tuning", "sysctl": { "a": "1" } })));
    file.network.chain = vec![json!({ "type": "tuning" }), json!({ "type": "bandwidth" })];
    assert!(file.conflist().write().unwrap());
    assert_eq!(file.found().0, ["polder", "istio-cni", "tuning", "bandwidth"]);
    list_with(&file, |plugins| plugins.push(json!({ "type": "tuning", "sysctl": { "a": "1" } })));
    file.network.chain.reverse();
    assert!(file.conflist().write().unwrap());
    assert_eq!(file.found().0, ["polder", "istio-cni", "bandwidth", "tuning", "tuning"]);
    file.network.has_fixed_versions = true;
    assert!(file.conflist().write().unwrap());
    assert_eq!(file.found().1, 4);
    assert!(file.state.path().exists());
}

#[test]
fn a_capability_that_another_plugin_serves_is_not_declared() {
    let folder = tempfile::tempdir().unwrap();
    let mut file = at(folder.path());
    let declared = |file: &At| {
        let list = read(&file.path).unwrap();
        SHARED_CAPABILITIES.map(|(name, _)| own_plugin(&list)["capabilities"].get(name).is_some())
    };
    assert!(file.conflist().write().unwrap());
    assert_eq!(declared(&file), [true, true]);
    // Other software adds a plugin, by its type alone, and one with the capability.
    list_with(&file, |plugins| plugins.push(json!({ "type": "bandwidth" })));
    assert!(file.conflist().keep().unwrap() && !file.conflist().keep().unwrap());
    assert_eq!(declared(&file), [true, false]);
    fs::remove_file(&file.written).unwrap();
    list_with(&file, |plugins| {
        plugins.push(json!({ "type": "ports", "capabilities": { "portMappings": true } }));
    });
    assert!(file.conflist().write().unwrap());
    assert_eq!(declared(&file), [false, false]);
    list_with(&file, |plugins| plugins.truncate(1));
    assert!(file.conflist().write().unwrap());
    assert_eq!(declared(&file), [true, true], "they are gone");
    file.network.chain = vec![json!({ "type": "portmap", "capabilities": { "portMappings": true } })];
    assert!(file.conflist().write().unwrap());
    assert_eq!(declared(&file), [false, true]);
}

#[test]
fn a_capability_of_a_plugin_that_precedes_ours_is_not_declared() {
    let folder = tempfile::tempdir().unwrap();
    let file = at(folder.path());
    assert!(file.conflist().write().unwrap());
    list_with(&file, |plugins| plugins.insert(0, json!({ "type": "portmap" })));
    assert!(file.conflist().keep().unwrap() && !file.conflist().keep().unwrap());
    let list = read(&file.path).unwrap();
    assert_eq!(list["plugins"][0], json!({ "type": "portmap" }));
    let capabilities = &own_plugin(&list)["capabilities"];
    assert_eq!((&capabilities["portMappings"], &capabilities["bandwidth"]), (&Value::Null, &json!(true)));
}

#[test]
fn the_file_that_precedes_ours_by_name_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let file = at(folder.path());
    file.conflist().write().unwrap();
    for name in ["99-other.conflist", "10-polder.conflist.bak", "05-old.disabled", "a.conf"] {
        fs::write(folder.path().join(name), "{}").unwrap();
    }
    fs::write(folder.path().join("00-multus.conf"), r#"{"type":"multus"}"#).unwrap();
    assert_eq!(file.conflist().preceding(), None);
    for name in ["10-flannel.conflist", "05-x.conf", ".04-hidden.conflist"] {
        fs::write(folder.path().join(name), "{}").unwrap();
        assert_eq!(file.conflist().preceding(), Some(folder.path().join(name)));
    }
}

#[test]
fn a_link_to_our_file_is_no_other_file_and_is_deleted_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = with(folder.path().join("99-polder.conflist"), network(Vec::new()));
    file.conflist().write().unwrap();
    fs::write(folder.path().join("10-flannel.conflist"), "{}").unwrap();
    let [link, foreign] = ["00-polder.conflist", "00-foreign.conflist"].map(|name| folder.path().join(name));
    symlink("99-polder.conflist", &link).unwrap();
    assert_eq!(file.conflist().preceding(), None, "a runtime uses the link, which is ours");
    assert_eq!(file.conflist().others(), Vec::<PathBuf>::new());
    symlink("10-flannel.conflist", &foreign).unwrap();
    assert_eq!(file.conflist().preceding(), Some(foreign.clone()));
    assert!(file.conflist().withdraw().unwrap() && !file.path.exists());
    assert!(!link.is_symlink() && foreign.is_symlink(), "a link to nothing disables a runtime's network");
}

#[test]
fn a_removed_node_deletes_its_own_file_but_no_foreign_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = at(folder.path());
    file.conflist().write().unwrap();
    assert!(file.conflist().withdraw().unwrap() && !file.path.exists());
    fs::write(&file.path, "{}").unwrap();
    assert!(!file.conflist().withdraw().unwrap() && file.path.exists());
}

#[test]
fn a_complete_file_is_written_and_no_temporary_file_remains() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("net.d");
    assert!(at(&target).conflist().write().unwrap());
    let text = fs::read_to_string(target.join("10-polder.conflist")).unwrap();
    let list: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(list["plugins"][0]["socket"], SOCKET);
    assert_eq!((&list["cniVersion"], list["cniVersions"].as_array().unwrap().len()), (&json!("1.0.0"), 4));
    assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
}

#[test]
fn chained_plugins_follow_polder_and_only_the_configured_versions_are_offered() {
    let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
    let network = Network {
        name: Some("pods".parse().unwrap()),
        versions: &VERSIONS[..2],
        has_fixed_versions: false,
        chain: vec![portmap.clone()],
    };
    let list = with("/x".into(), network).conflist().own();
    assert_eq!((&list["name"], &list["cniVersion"]), (&json!("pods"), &json!("0.4.0")));
    assert_eq!(list["cniVersions"], json!(["0.3.1", "0.4.0"]));
    assert_eq!((&list["plugins"][0]["type"], &list["plugins"][1]), (&json!("polder"), &portmap));
}

#[test]
fn our_file_with_another_name_is_found() {
    let folder = tempfile::tempdir().unwrap();
    at(folder.path()).conflist().write().unwrap();
    fs::write(folder.path().join("05-other.conflist"), "{}").unwrap();
    let path = folder.path().join("20-pods.conflist");
    let other = with(path.clone(), network(Vec::new()));
    other.conflist().write().unwrap();
    assert_eq!(other.conflist().others(), [folder.path().join("10-polder.conflist")]);
    assert!(remove(&path).unwrap() && !remove(&path).unwrap());
}

#[test]
fn a_missing_or_damaged_file_is_rewritten_but_one_with_additions_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let whole = text(&at(folder.path()).conflist().own());
    let file = folder.path().join("10-polder.conflist");
    assert!(at(folder.path()).conflist().keep().unwrap(), "there was none");
    for damaged in [
        String::new(),
        "garbage".to_owned(),
        whole[..whole.len() / 2].to_owned(),
        "{}".to_owned(),
        whole.replace("\"type\": \"polder\"", "\"type\": \"bridge\""),
        whole.replace("agent.sock", "other.sock"),
        whole.replace("plugins", "plugs"),
    ] {
        fs::write(&file, &damaged).unwrap();
        assert!(at(folder.path()).conflist().keep().unwrap(), "{damaged}");
        assert_eq!(fs::read_to_string(&file).unwrap(), whole, "{damaged}");
    }
    let more = whole.replace("\"plugins\": [", "\"plugins\": [{ \"type\": \"tuning\" },");
    assert_ne!(more, whole);
    fs::write(&file, &more).unwrap();
    assert!(!at(folder.path()).conflist().keep().unwrap());
    assert_eq!(fs::read_to_string(&file).unwrap(), more);
}

#[test]
fn a_file_that_cannot_be_written_is_reported_with_the_error_and_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = at(&file).conflist().keep().unwrap_err();
    let said = at(&file).conflist().not_written(error).to_string();
    for sign in ["file/10-polder.conflist", "(os error", "cni_conf_dir"] {
        assert!(said.contains(sign), "{said}");
    }
}

#[test]
fn a_correct_file_is_not_rewritten() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().unwrap();
    let inode = || fs::metadata(folder.path().join("10-polder.conflist")).unwrap().ino();
    assert!(at(folder.path()).conflist().write().unwrap());
    let before = inode();
    assert!(!at(folder.path()).conflist().write().unwrap());
    assert_eq!(inode(), before);
}
