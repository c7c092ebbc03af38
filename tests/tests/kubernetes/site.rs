//! A lab with an API server that has a Node for each node.

use polder_tests::agent::Worker;
use polder_tests::api_server::{ApiServer, Request};
use polder_tests::fabric::address;
use polder_tests::{Lab, Node, Topology, wait};
use serde_json::Value;

/// The condition of a Node that says whether its pod network works.
pub(crate) const CONDITION: &str = "NetworkUnavailable";

/// The taint of a Node that has never been ready for pods.
pub(crate) const STARTUP_TAINT: &str = "node.polder.dev/not-ready";

/// Host number of the API server.
const HOST: u8 = 210;

/// The lab and its API server.
pub(crate) struct Site {
    // Dropped first, and its machine with it.
    pub(crate) api: ApiServer,
    pub(crate) lab: Lab,
}

impl Site {
    /// Builds the lab. Agents connect to the API server once they are started.
    pub(crate) fn build(topology: Topology) -> Self {
        let mut lab = Lab::build(topology);
        let v6 = !lab.topology.underlay.v4;
        let machine = Node::boot("api", lab.folder());
        lab.fabric.join(&machine, 1, HOST, lab.topology.mtu);
        let api = ApiServer::start(machine, address(1, HOST, v6), &lab.folder().join("api-certificates"));
        for worker in &mut lab.workers {
            api.add_node(worker.name());
            api.admit(worker);
            worker.configure(&format!("{}\n[kubernetes]\n", worker.configuration()));
        }
        Self { api, lab }
    }

    /// Builds the lab and starts all agents. Returns when all are ready, and every Node has its condition.
    pub(crate) fn start(topology: Topology) -> Self {
        let mut site = Self::build(topology);
        site.lab.start_agents();
        site.lab.workers.iter().for_each(|worker| site.wait_until_available(worker.name()));
        site
    }

    /// Waits until the condition of the Node says that the network works.
    pub(crate) fn wait_until_available(&self, name: &str) {
        self.api.wait_for_condition(name, CONDITION, |condition| condition["status"] == "False");
    }

    /// Waits until the agents send nothing more: one watch per agent, and no request during several checks.
    pub(crate) fn wait_until_quiet(&self) {
        let mut last = (0, 0);
        wait::until("the agents to send nothing more", || {
            let requests = self.api.requests().len();
            last = if last.0 == requests { (requests, last.1 + 1) } else { (requests, 0) };
            if last.1 >= 100 { Ok(()) } else { Err(format!("{requests} requests")) }
        });
    }
}

/// The changes among these requests.
pub(crate) fn writes(requests: &[Request]) -> Vec<&Request> {
    requests.iter().filter(|request| request.is_write()).collect()
}

/// The problems that the node reports.
pub(crate) fn problems(status: &Value) -> Vec<String> {
    let problems = status["problems"].as_array().into_iter().flatten();
    problems.map(|problem| problem.as_str().unwrap().to_owned()).collect()
}

/// Waits until the node reports a problem that contains these words. Returns its text.
pub(crate) fn problem(worker: &Worker, words: &str) -> String {
    worker.wait_for_status(&format!("a problem with {words:?}"), |status| {
        problems(status).into_iter().find(|problem| problem.contains(words))
    })
}
