//! Agents that inform Kubernetes about their nodes, with recordings of a real API server. The pod network works the same
//! whatever the API server does.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod kubernetes {
    mod facts;
    mod outage;
    mod removal;
    mod report;
    pub(crate) mod site;
}
