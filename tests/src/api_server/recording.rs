//! Recorded exchanges with a real API server: which requests are known, and what was answered.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::connection::Request;
use super::patch;

/// The name of the Node in the recordings.
const RECORDED_NODE: &str = "recorded-node";

/// Query parameters whose value is free.
const FREE: [&str; 5] = ["continue", "fieldSelector", "limit", "resourceVersion", "timeoutSeconds"];

/// All recordings.
#[derive(Debug)]
pub(super) struct Recordings(Vec<Recording>);

/// One exchange.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Recording {
    /// Its file, without the ending.
    #[serde(skip)]
    pub(super) name: String,
    /// What happens here.
    #[expect(dead_code, reason = "for readers of the file")]
    about: String,
    request: RecordedRequest,
    pub(super) response: Response,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordedRequest {
    method: String,
    path: String,
    #[serde(default)]
    query: BTreeMap<String, String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    #[serde(default)]
    body: Value,
}

/// A recorded answer.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) headers: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) body: Value,
    /// Lines of a watch.
    #[serde(default)]
    pub(super) events: Vec<Value>,
}

impl Recordings {
    /// Reads all files of the folder.
    pub(super) fn read() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("stand-ins/api-server");
        let files = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut paths: Vec<_> = files.map(|file| file.expect("a readable folder").path()).collect();
        paths.retain(|path| path.extension().is_some_and(|ending| ending == "json"));
        paths.sort();
        let read = |path: &std::path::PathBuf| {
            let text = fs::read_to_string(path).expect("a readable file");
            let mut recording: Recording =
                serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            recording.name =
                path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            recording
        };
        Self(paths.iter().map(read).collect())
    }

    /// All of them, by file name.
    #[cfg(test)]
    pub(super) fn all(&self) -> &[Recording] {
        &self.0
    }

    /// The recording of a request like this one that succeeded.
    pub(super) fn success(&self, request: &Request) -> Option<&Recording> {
        let has_succeeded = |one: &&Recording| (200..300).contains(&one.response.status);
        self.0.iter().filter(has_succeeded).find(|one| {
            one.request.asks_like(request) && shape(&request.body).is_subset(&shape(&one.request.body))
        })
    }

    /// The recorded refusal with that status: of a request like this one with any body, if there is one, otherwise of any
    /// request. The text of some depends on the request, and these must have been recorded for it.
    pub(super) fn refusal(&self, request: &Request, status: u16) -> Option<&Recording> {
        let depends_on_request = matches!(status, 403 | 404 | 409 | 422);
        let mut recorded = self.0.iter().filter(|one| one.response.status == status);
        let any = recorded.clone().next().filter(|_| !depends_on_request);
        recorded.find(|one| one.request.asks_like(request)).or(any)
    }

    /// The recorded watch that ended with `410 Gone`.
    pub(super) fn stale_watch(&self) -> &Recording {
        let gone = |one: &&Recording| one.response.events.iter().any(|event| event["object"]["code"] == 410);
        self.0.iter().find(gone).expect("a recording of a stale watch")
    }

    /// The recorded bookmark.
    pub(super) fn bookmark(&self) -> Value {
        let mut events = self.0.iter().flat_map(|one| &one.response.events);
        events.find(|event| event["type"] == "BOOKMARK").expect("a recording of a bookmark").clone()
    }

    /// The recording of that name.
    pub(super) fn named(&self, name: &str) -> &Recording {
        let found = self.0.iter().find(|one| one.name == name);
        found.unwrap_or_else(|| panic!("there is no recording {name}.json"))
    }

    /// The recorded Node with another name.
    pub(super) fn node(&self, name: &str) -> Value {
        let recorded = self.named("own");
        // The objects of a list have no type of their own.
        let mut node = json!({ "kind": "Node", "apiVersion": "v1" });
        patch::merge(&mut node, &renamed(&recorded.response.body["items"][0], name));
        node
    }
}

/// The recorded object for the Node of that name.
pub(super) fn renamed(recorded: &Value, node: &str) -> Value {
    let text = recorded.to_string().replace(RECORDED_NODE, node);
    serde_json::from_str(&text).expect("JSON with another name is JSON")
}

impl RecordedRequest {
    /// Whether a request has the same method, path, parameters and types, with other names and revisions.
    fn asks_like(&self, request: &Request) -> bool {
        let header = |name: &str| self.headers.get(name).map(String::as_str);
        self.method == request.method
            && pattern(&self.path) == pattern(&request.path)
            && self.query.len() == request.query.len()
            && self.query.iter().all(|(key, value)| {
                let actual = request.query.get(key);
                actual == Some(value) || actual.is_some() && FREE.contains(&key.as_str())
            })
            && ["accept", "content-type"].iter().all(|name| header(name) == request.header(name))
    }
}

/// A path with its free parts replaced: the names of objects and namespaces.
fn pattern(path: &str) -> String {
    let mut previous = "";
    let mut parts = Vec::new();
    for part in path.split('/') {
        parts.push(if matches!(previous, "nodes" | "events" | "namespaces") { "*" } else { part });
        previous = part;
    }
    parts.join("/")
}

/// The places of all values in a body. Elements of a list have the same place.
fn shape(body: &Value) -> BTreeSet<String> {
    fn walk(value: &Value, place: &str, found: &mut BTreeSet<String>) {
        match value {
            Value::Null if place.is_empty() => {}
            Value::Object(fields) => {
                fields.iter().for_each(|(key, value)| walk(value, &format!("{place}/{key}"), found));
            }
            Value::Array(items) => items.iter().for_each(|item| walk(item, &format!("{place}/-"), found)),
            _ => {
                found.insert(place.to_owned());
            }
        }
    }
    let mut found = BTreeSet::new();
    walk(body, "", &mut found);
    found
}

#[cfg(test)]
impl Recording {
    /// The recorded request, as the stand-in would get it.
    pub(super) fn as_request(&self) -> Request {
        let RecordedRequest { method, path, query, headers, body } = self.request.clone();
        Request { method, path, query, headers, body }
    }
}
