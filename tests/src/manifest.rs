//! The pods of the `DaemonSets` in `deploy/kubernetes`, as kubelet reads them: the manifest is their only source.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::node::output;

/// The documents of a manifest.
#[derive(Debug, Clone)]
pub struct Manifest(Vec<Value>);

/// A container of a pod, from the manifest or changed by a test.
#[derive(Debug, Clone)]
pub struct Container(pub Value);

impl Manifest {
    /// Reads `deploy/kubernetes/NAME/polder.yaml`.
    pub fn read(name: &str) -> Self {
        Self::read_with(name, &[])
    }

    /// Reads it with these words replaced. Each of them must occur in the file.
    pub fn read_with(name: &str, replaced: &[(String, String)]) -> Self {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes").join(name).join("polder.yaml");
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self::parse(&replaced.iter().fold(text, |text, (from, to)| {
            assert!(text.contains(from), "{from} is not in {}", path.display());
            text.replace(from, to)
        }))
    }

    /// Reads the documents of a text.
    pub fn parse(text: &str) -> Self {
        Self(serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error} in {text}")))
    }

    /// A copy with only that `DaemonSet`.
    #[must_use]
    pub fn only(&self, daemonset: &str) -> Self {
        let is_other =
            |document: &Value| document["kind"] == "DaemonSet" && document["metadata"]["name"] != daemonset;
        Self(self.0.iter().filter(|document| !is_other(document)).cloned().collect())
    }

    /// The files of the Secret of that name.
    pub fn secret(&self, name: &str) -> Vec<(String, String)> {
        let is_it = |document: &&Value| document["kind"] == "Secret" && document["metadata"]["name"] == name;
        let secret = self.0.iter().find(is_it).unwrap_or_else(|| panic!("there is no Secret {name}"));
        let files = secret["data"].as_object().expect("a Secret has data");
        let decode = r#"printf %s "$1" | base64 --decode"#;
        let plain = |value| output(Command::new("sh").args(["-c", decode, "sh", &text(value)]));
        files.iter().map(|(name, value)| (name.clone(), plain(value))).collect()
    }

    /// The only document of that kind.
    pub fn document(&self, kind: &str) -> &Value {
        let mut found = self.0.iter().filter(|document| document["kind"] == kind);
        let document = found.next().unwrap_or_else(|| panic!("there is no {kind}"));
        assert!(found.next().is_none(), "there is more than one {kind}");
        document
    }

    /// A file of the ConfigMap.
    pub fn config(&self, file: &str) -> String {
        text(&self.document("ConfigMap")["data"][file])
    }

    /// The pod template's specification of the DaemonSet.
    pub fn pod(&self) -> &Value {
        &self.document("DaemonSet")["spec"]["template"]["spec"]
    }

    /// The pod's containers of that list, `initContainers` or `containers`.
    pub fn containers(&self, list: &str) -> Vec<Container> {
        self.pod()[list].as_array().into_iter().flatten().cloned().map(Container).collect()
    }

    /// The only container of that list.
    pub fn container(&self, list: &str) -> Container {
        let [container] = <[Container; 1]>::try_from(self.containers(list)).expect("one container");
        container
    }

    /// The pod's volume of that name.
    pub fn volume(&self, name: &str) -> &Value {
        let mut volumes = self.pod()["volumes"].as_array().into_iter().flatten();
        volumes.find(|volume| volume["name"] == name).unwrap_or_else(|| panic!("there is no volume {name}"))
    }
}

impl Container {
    /// Name of the container.
    pub fn name(&self) -> String {
        text(&self.0["name"])
    }

    /// A list of strings of the container, for example `args`.
    pub fn words(&self, list: &str) -> Vec<String> {
        self.0[list].as_array().into_iter().flatten().map(text).collect()
    }

    /// The names of the mounted volumes.
    pub fn mounts(&self) -> Vec<String> {
        self.0["volumeMounts"].as_array().into_iter().flatten().map(|mount| text(&mount["name"])).collect()
    }

    /// The added capabilities.
    pub fn capabilities(&self) -> Vec<String> {
        let added = self.0["securityContext"]["capabilities"]["add"].as_array();
        added.into_iter().flatten().map(text).collect()
    }

    /// A copy without that mount.
    #[must_use]
    pub fn without_mount(mut self, name: &str) -> Self {
        let mounts = self.0["volumeMounts"].as_array_mut().expect("it has mounts");
        mounts.retain(|mount| mount["name"] != name);
        self
    }

    /// A copy with that mount without propagation: later mounts of the host in it do not appear.
    #[must_use]
    pub fn without_propagation(mut self, name: &str) -> Self {
        let mounts = self.0["volumeMounts"].as_array_mut().into_iter().flatten();
        mounts
            .filter(|mount| mount["name"] == name)
            .for_each(|mount| mount["mountPropagation"] = "None".into());
        self
    }

    /// A copy with another program.
    #[must_use]
    pub fn with_command(mut self, command: &[String]) -> Self {
        self.0["command"] = json!(command);
        self.0["args"] = json!([]);
        self
    }

    /// A copy without that capability.
    #[must_use]
    pub fn without_capability(mut self, name: &str) -> Self {
        let added = self.0["securityContext"]["capabilities"]["add"].as_array_mut().expect("some are added");
        added.retain(|capability| capability != name);
        self
    }
}

/// The text of a string value.
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}
