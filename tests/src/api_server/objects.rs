//! The objects of the stand-in: Nodes with their history, and Events.

use serde_json::{Value, json};

/// Nodes and Events.
#[derive(Debug)]
pub(super) struct Objects {
    /// The revision of the last change.
    revision: u64,
    nodes: Vec<Value>,
    events: Vec<Value>,
    history: Vec<Change>,
}

/// A change of a Node, as a watch sends it.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) revision: u64,
    pub(super) event: Value,
}

impl Objects {
    pub(super) fn new() -> Self {
        Self { revision: 1000, nodes: Vec::new(), events: Vec::new(), history: Vec::new() }
    }

    /// The revision of the last change.
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// All Nodes, by name.
    pub(super) fn nodes(&self) -> &[Value] {
        &self.nodes
    }

    /// The Node of that name.
    pub(super) fn node(&self, name: &str) -> Option<&Value> {
        self.nodes.iter().find(|node| node["metadata"]["name"] == name)
    }

    /// All Events.
    pub(super) fn events(&self) -> impl Iterator<Item = &Value> {
        self.events.iter()
    }

    /// The changes after that revision.
    pub(super) fn after(&self, revision: u64) -> impl Iterator<Item = &Change> {
        self.history.iter().filter(move |change| change.revision > revision)
    }

    /// Adds a Node, with a new uid.
    pub(super) fn create(&mut self, mut node: Value) {
        let name = node["metadata"]["name"].as_str().expect("a Node has a name");
        assert!(self.node(name).is_none(), "there is a Node {name} already");
        node["metadata"]["uid"] = self.next_uid().into();
        self.stamp(&mut node);
        self.record("ADDED", &node);
        self.nodes.push(node);
        self.nodes.sort_by_key(|node| node["metadata"]["name"].to_string());
    }

    /// Deletes a Node.
    pub(super) fn delete(&mut self, name: &str) {
        let position = self.nodes.iter().position(|node| node["metadata"]["name"] == name);
        let mut node = self.nodes.remove(position.unwrap_or_else(|| panic!("there is no Node {name}")));
        self.stamp(&mut node);
        self.record("DELETED", &node);
    }

    /// Changes a Node. A change that changes nothing has no new revision, as in the real server. Returns the Node.
    pub(super) fn change(&mut self, name: &str, change: impl FnOnce(&mut Value)) -> Value {
        let position = self.nodes.iter().position(|node| node["metadata"]["name"] == name);
        let position = position.unwrap_or_else(|| panic!("there is no Node {name}"));
        let mut node = self.nodes[position].clone();
        change(&mut node);
        if node != self.nodes[position] {
            self.stamp(&mut node);
            self.record("MODIFIED", &node);
            self.nodes[position] = node.clone();
        }
        node
    }

    /// Adds an Event. Returns it with the fields that the server sets.
    pub(super) fn create_event(&mut self, mut event: Value) -> Value {
        event["metadata"]["uid"] = self.next_uid().into();
        self.stamp(&mut event);
        self.events.push(event.clone());
        event
    }

    /// Changes an Event, if it exists. Returns it.
    pub(super) fn change_event(&mut self, name: &str, change: impl FnOnce(&mut Value)) -> Option<Value> {
        let position = self.events.iter().position(|event| event["metadata"]["name"] == name)?;
        let mut event = self.events[position].clone();
        change(&mut event);
        self.stamp(&mut event);
        self.events[position] = event.clone();
        Some(event)
    }

    fn next_uid(&self) -> String {
        format!("00000000-0000-4000-8000-{:012x}", self.revision + 1)
    }

    fn stamp(&mut self, object: &mut Value) {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = self.revision.to_string().into();
    }

    fn record(&mut self, kind: &str, node: &Value) {
        let event = json!({ "type": kind, "object": node });
        self.history.push(Change { revision: self.revision, event });
    }
}
