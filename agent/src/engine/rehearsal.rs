//! What the first pass of an agent would do, without doing it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use polder_ipam::peers::believe;
use polder_ipam::registration::Registration;
use tokio::time::sleep_until;

use super::Engine;
use crate::agent::Agent;

/// Works out what the first pass would do, and publishes it as if it were done. Waits until the registrar is done, for so long;
/// then says what is still in the way.
pub async fn rehearse(agent: Arc<Agent>, patience: Duration) -> Result<Vec<String>, Vec<String>> {
    let deadline = Instant::now() + patience;
    let mut view = agent.board.view.subscribe();
    let mut holdings = agent.board.holdings.subscribe();
    let mut registration = agent.board.registration.subscribe();
    let mut endpoints = agent.board.endpoints.subscribe();
    let mut engine = Engine::new(Arc::clone(&agent));
    loop {
        view.mark_unchanged();
        holdings.mark_unchanged();
        endpoints.mark_unchanged();
        let state = registration.borrow_and_update().clone();
        if let Registration::Conflict(reason) | Registration::Removed(reason) = state {
            return Err(vec![reason]);
        }
        let believed = believe(&agent.board.view(), &agent.config.node);
        engine.choose_underlay(&believed.peers).await;
        let drafted = engine.draft_now().await;
        let reasons = match drafted {
            Ok(draft) => {
                let changes = draft.changes();
                agent.board.pass.send_replace(Some(Arc::new(draft.pass)));
                match agent.board.obstacles() {
                    obstacles if !obstacles.is_empty() => obstacles,
                    _ if state == Registration::Registered => return Ok(changes),
                    _ => vec!["the node is not registered yet".to_owned()],
                }
            }
            Err(reason) => vec![reason],
        };
        tokio::select! {
            _ = view.changed() => {}
            _ = holdings.changed() => {}
            _ = registration.changed() => {}
            _ = endpoints.changed() => {}
            () = sleep_until(deadline.into()) => return Err(reasons),
        }
    }
}
