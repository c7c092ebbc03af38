//! The requests of an ADD to the registrar.

use std::net::IpAddr;
use std::rc::Rc;

use polder_api::Attachment;
use polder_ipam::claim::{NoClaim, Unavailable};
use polder_ipam::pool::BlockRequest;
use polder_ipam::tasks::{CLAIM_TIMEOUT, NotHandedOver, Requests, ReservationRequest, RetryReason};

use super::SimHost;
use super::host::millis;
use crate::requests::{ClaimRequest, Reply, ReserveRequest};
use crate::task::Wait;

impl Requests for SimHost {
    async fn claim(&self, wanted: BlockRequest) -> Result<(), NoClaim> {
        let reply = Reply::default();
        self.agent(|agent| {
            agent.claims.push_back(ClaimRequest { wanted, reply: Some(reply.clone()) });
            agent.must_check_records = true;
        });
        let too_slow = || Err(Unavailable::TooSlow.into());
        wait(self, &reply).await.unwrap_or_else(too_slow)
    }

    fn claim_ahead(&self, wanted: BlockRequest) {
        self.agent(|agent| agent.claims.push_back(ClaimRequest { wanted, reply: None }));
    }

    async fn reserve(
        &self,
        wanted: ReservationRequest,
        owner: String,
        attachment: &Attachment,
    ) -> Result<IpAddr, NotHandedOver> {
        let (reply, attachment) = (Reply::default(), attachment.clone());
        self.agent(|agent| {
            agent.reservations.push_back(ReserveRequest { wanted, owner, attachment, reply: reply.clone() });
            agent.must_check_records = true;
        });
        let too_slow = || Err(RetryReason::Unavailable(Unavailable::TooSlow).into());
        wait(self, &reply).await.unwrap_or_else(too_slow)
    }
}

/// Waits for the answer, at most [`CLAIM_TIMEOUT`].
async fn wait<T>(host: &SimHost, reply: &Reply<T>) -> Option<T> {
    let until = host.clock() + millis(CLAIM_TIMEOUT);
    while !reply.is_sent.get() {
        if host.clock() >= until {
            reply.abandoned.set(true);
            return None;
        }
        host.wait(Wait::Flag(Rc::clone(&reply.is_sent), host.epoch)).await;
    }
    reply.answer.borrow_mut().take()
}
