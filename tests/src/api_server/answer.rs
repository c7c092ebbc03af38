//! The answer to a request: a recorded one, with the stand-in's objects.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::Behaviour;
use super::connection::{Answer, Request};
use super::objects::Objects;
use super::patch::{self, Conflict};
use super::recording::{Recording, Recordings, renamed};
use super::server::State;

/// What happens with a request.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It is answered at once.
    Answer(Answer),
    /// It is answered with a stream of these lines: status, headers, lines.
    Lines(u16, BTreeMap<String, String>, Vec<Value>),
    /// It is answered with the changes from now on: the watch, and the headers.
    Watch(Watch, BTreeMap<String, String>),
}

/// A watch of Nodes.
#[derive(Debug)]
pub(super) struct Watch {
    /// The only Node that it is about.
    node: Option<String>,
    /// The revision that the client has.
    revision: u64,
    /// Whether the client wants bookmarks.
    bookmarks: bool,
    /// The time after which it ends.
    pub(super) timeout: Duration,
}

impl Watch {
    fn of(request: &Request) -> Self {
        let number = |key: &str| request.query.get(key).and_then(|value| value.parse().ok());
        Self {
            node: request.node().map(str::to_owned),
            revision: number("resourceVersion").unwrap_or(0),
            bookmarks: request.query.get("allowWatchBookmarks").is_some_and(|value| value == "true"),
            // The real server takes 30 to 60 minutes if the client names no time.
            timeout: Duration::from_secs(number("timeoutSeconds").unwrap_or(1800)),
        }
    }

    /// The changes that the client does not have yet.
    pub(super) fn next(&mut self, objects: &Objects) -> Vec<Value> {
        let changes: Vec<_> = objects.after(self.revision).collect();
        let Some(last) = changes.last() else { return Vec::new() };
        self.revision = last.revision;
        let is_wanted = |event: &Value| {
            self.node.as_ref().is_none_or(|node| event["object"]["metadata"]["name"] == node.as_str())
        };
        changes.iter().map(|change| change.event.clone()).filter(is_wanted).collect()
    }

    /// The bookmark with that revision, if the client wants one.
    pub(super) fn bookmark(&self, recordings: &Recordings, revision: u64) -> Option<Value> {
        self.bookmarks.then(|| {
            let mut bookmark = recordings.bookmark();
            bookmark["object"]["metadata"]["resourceVersion"] = revision.to_string().into();
            bookmark
        })
    }
}

/// Decides what happens with a request, and changes the objects accordingly.
pub(super) fn decide(recordings: &Recordings, token: &str, state: &mut State, request: &Request) -> Outcome {
    let found = attempt(recordings, token, state, request);
    found.unwrap_or_else(|| {
        state.uncovered.push(format!(
            "{} {} {:?}\n  {:?}\n  {}",
            request.method, request.path, request.query, request.headers, request.body
        ));
        let body = b"the stand-in has no recording of this request".to_vec();
        Outcome::Answer(Answer { status: 501, headers: BTreeMap::new(), body })
    })
}

fn attempt(recordings: &Recordings, token: &str, state: &mut State, request: &Request) -> Option<Outcome> {
    if request.header("authorization") != Some(&format!("Bearer {token}")) {
        return refuse(recordings, request, 401);
    }
    match state.behaviour {
        Behaviour::Failing(status) => return refuse(recordings, request, status),
        Behaviour::Garbage => {
            let headers = [("content-type".to_owned(), "application/json".to_owned())].into();
            return Some(Outcome::Answer(Answer {
                status: 200,
                headers,
                body: b"<html>\0{\"kind\":".to_vec(),
            }));
        }
        Behaviour::Stale if is_resumed_watch(request) => {
            let Recording { response, .. } = recordings.stale_watch();
            return Some(Outcome::Lines(response.status, response.headers.clone(), response.events.clone()));
        }
        _ => {}
    }
    let recorded = recordings.success(request)?;
    let path: Vec<_> = request.path.trim_start_matches('/').split('/').collect();
    match (request.method.as_str(), &path[..]) {
        ("GET", ["api", "v1", "nodes"]) if request.is_watch() => {
            Some(Outcome::Watch(Watch::of(request), recorded.response.headers.clone()))
        }
        ("GET", ["api", "v1", "nodes"]) => Some(with(recorded, list(recorded, &state.objects, request))),
        ("GET", ["api", "v1", "nodes", name]) => match state.objects.node(name) {
            Some(node) => Some(with(recorded, node.clone())),
            None => refuse(recordings, request, 404),
        },
        ("PATCH", ["api", "v1", "nodes", name, rest @ ..]) => {
            if state.objects.node(name).is_none() {
                return refuse(recordings, request, 404);
            }
            match patch_node(&mut state.objects, name, rest, request) {
                Ok(node) => Some(with(recorded, node)),
                Err(Conflict) => refuse(recordings, request, 409),
            }
        }
        ("POST", [.., "namespaces", _, "events"]) => {
            let name = &request.body["metadata"]["name"];
            if state.objects.events().any(|event| event["metadata"]["name"] == *name) {
                return refuse(recordings, request, 409);
            }
            let mut event = recorded.response.body.clone();
            patch::merge(&mut event, &request.body);
            Some(with(recorded, state.objects.create_event(event)))
        }
        ("PATCH", [.., "namespaces", _, "events", name]) => {
            let change = |event: &mut Value| patch::merge(event, &request.body);
            match state.objects.change_event(name, change) {
                Some(event) => Some(with(recorded, event)),
                None => refuse(recordings, request, 404),
            }
        }
        _ => None,
    }
}

/// Whether the client asks for the changes since a revision that it has.
fn is_resumed_watch(request: &Request) -> bool {
    let version = request.query.get("resourceVersion").map_or("", String::as_str);
    request.is_watch() && !matches!(version, "" | "0")
}

/// The recorded refusal with that status. `None`: there is none for such a request.
fn refuse(recordings: &Recordings, request: &Request, status: u16) -> Option<Outcome> {
    let recorded = recordings.refusal(request, status)?;
    Some(with(recorded, renamed(&recorded.response.body, request.node().unwrap_or_default())))
}

/// A recorded answer with another body.
fn with(recorded: &Recording, body: Value) -> Outcome {
    let status = recorded.response.status;
    let body = match &body {
        Value::String(text) => text.clone().into_bytes(),
        json => json.to_string().into_bytes(),
    };
    Outcome::Answer(Answer { status, headers: recorded.response.headers.clone(), body })
}

/// A list of Nodes, or a page of it.
fn list(recorded: &Recording, objects: &Objects, request: &Request) -> Value {
    let selected = |node: &&Value| request.node().is_none_or(|name| node["metadata"]["name"] == name);
    let all: Vec<_> = objects.nodes().iter().filter(selected).collect();
    let number = |key: &str| request.query.get(key).and_then(|value| value.parse().ok());
    let first = number("continue").unwrap_or(0).min(all.len());
    let end = number("limit").map_or(all.len(), |limit: usize| (first + limit).min(all.len()));
    let mut metadata = json!({ "resourceVersion": objects.revision().to_string() });
    if end < all.len() {
        metadata["continue"] = end.to_string().into();
        metadata["remainingItemCount"] = (all.len() - end).into();
    }
    let body = &recorded.response.body;
    json!({
        "kind": body["kind"], "apiVersion": body["apiVersion"], "metadata": metadata, "items": all[first..end],
    })
}

/// Changes a Node as the resource or as its status: each ignores the fields of the other.
fn patch_node(
    objects: &mut Objects,
    name: &str,
    subresource: &[&str],
    request: &Request,
) -> Result<Value, Conflict> {
    let mut outcome = Ok(());
    let node = objects.change(name, |node| {
        let mut new = node.clone();
        outcome = patch::apply(&mut new, request.header("content-type").unwrap_or_default(), &request.body);
        if outcome.is_ok() {
            let kept = if subresource == ["status"] { "spec" } else { "status" };
            new[kept] = node[kept].clone();
            *node = new;
        }
    });
    outcome.map(|()| node)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the real server changes by itself.
    fn comparable(mut node: Value) -> Value {
        node["metadata"]["resourceVersion"] = Value::Null;
        node
    }

    #[test]
    fn patches_change_a_node_as_the_real_api_server_changed_it() {
        let recordings = Recordings::read();
        let mut objects = Objects::new();
        objects.create(recordings.node("recorded-node"));
        let uid = recordings.node("recorded-node")["metadata"]["uid"].clone();
        // In the order in which they were recorded.
        for name in ["condition", "taint"] {
            let recorded = recordings.named(name);
            let mut request = recorded.as_request();
            if !request.body["metadata"].is_null() {
                let current = objects.node("recorded-node").unwrap()["metadata"]["resourceVersion"].clone();
                request.body["metadata"]["resourceVersion"] = current;
            }
            let rest = if request.path.ends_with("/status") { &["status"][..] } else { &[] };
            let mut node = patch_node(&mut objects, "recorded-node", rest, &request).unwrap();
            node["metadata"]["uid"] = uid.clone();
            assert_eq!(comparable(node), comparable(recorded.response.body.clone()), "{name}");
        }
        let refused = recordings.named("conflict").as_request();
        assert_eq!(patch_node(&mut objects, "recorded-node", &[], &refused), Err(Conflict));
    }

    #[test]
    fn every_recorded_request_is_one_that_the_stand_in_knows() {
        let recordings = Recordings::read();
        for recorded in recordings.all() {
            let status = recorded.response.status;
            let request = recorded.as_request();
            let found = match status {
                200..300 => recordings.success(&request),
                _ => recordings.refusal(&request, status),
            };
            assert!(found.is_some(), "{}", recorded.name);
        }
    }
}
