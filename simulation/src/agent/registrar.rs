//! The registrar's task ([`polder_ipam::tasks`]) on a node of the simulation: each thing that it does outside is a step of its
//! own.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use polder_api::{Attachment, Mac};
use polder_ipam::Moment;
use polder_ipam::bootstrap::Bootstrap;
use polder_ipam::key::Range;
use polder_ipam::node::NodeIpam;
use polder_ipam::pool::Labels;
use polder_ipam::record::Alive;
use polder_ipam::registration::{Holdings, Registration};
use polder_ipam::steward::{Presence, Step};
use polder_ipam::store::{Contents, Outcome, StoreError, Txn};
use polder_ipam::tasks::{Host, Me, Registrar};
use polder_ipam::view::View;

use super::{Hand, service};
use crate::disk::Disk;
use crate::requests::{ClaimRequest, ReserveRequest};
use crate::settings;
use crate::task::Wait;
use crate::world::COOL_DOWN;

/// Between looks while something is waited for that no record announces.
const RETRY_MS: u64 = 5_000;

/// Runs as long as the agent.
pub async fn run(hand: Hand) {
    let me = hand.with(|world| {
        let machine = &world.machines[hand.machine];
        let settings = settings::first_settings();
        Me {
            name: machine.name.clone(),
            machine_id: machine.machine_id.clone(),
            boot_id: machine.boot_id.clone(),
            proof: world.proof(),
            labels: Labels::new(),
            bootstrap: Some(Bootstrap {
                pools: world.first_pools.clone(),
                backend: settings.backend,
                attach: settings.attach,
                vxlan: settings.vxlan,
                masquerade: settings.masquerade,
            }),
            cooldown: COOL_DOWN,
        }
    });
    let mut registrar = Registrar::new(hand.clone(), Arc::new(me));
    loop {
        hand.agent(|agent| agent.news = false);
        registrar.look().await;
        hand.wait(Wait::News(hand.clock() + RETRY_MS)).await;
        while let Some(ClaimRequest { wanted, reply }) = hand.agent(|agent| agent.claims.pop_front()) {
            let served = registrar.serve(wanted, reply.is_some()).await;
            reply.into_iter().for_each(|reply| reply.give(served.clone()));
        }
        let request = hand.agent(|agent| agent.reservations.pop_front());
        if let Some(ReserveRequest { wanted, owner, attachment, reply }) = request {
            reply.give(registrar.hand_over(&wanted, &owner, &attachment).await);
            hand.agent(|agent| agent.news = true);
        }
    }
}

fn brief(step: &Step) -> String {
    match step {
        Step::Commit(purpose, _) => format!("{purpose:?}"),
        other => format!("{other:?}"),
    }
}

impl Host for Hand {
    type Ledger = Disk;

    fn now(&self) -> Moment {
        self.with(|world| world.machines[self.machine].now())
    }

    fn fresh_name(&self) -> Result<String, String> {
        Ok(self.fresh())
    }

    fn view(&self) -> Arc<View> {
        Self::view(self)
    }

    async fn changed(&self, view: &Arc<View>, patience: Duration) {
        let millis = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        self.wait(Wait::Revision(view.revision + 1, self.clock() + millis)).await;
    }

    async fn caught_up(&self, revision: i64) -> Result<(), StoreError> {
        Self::caught_up(self, revision).await
    }

    async fn commit(&self, txn: &Txn) -> Result<Outcome, StoreError> {
        Self::commit(self, txn).await
    }

    async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        Self::range(self, range.clone()).await
    }

    async fn ledger<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut NodeIpam<Disk>, Moment) -> T + Send + 'static,
    ) -> T {
        self.turn().await;
        self.ipam(job)
    }

    fn presence(&self, _: &View) -> Result<Presence, String> {
        let number = 1 + u8::try_from(self.machine).unwrap_or(0);
        Ok(Presence {
            underlay: vec![Ipv4Addr::new(192, 0, 2, number).into()],
            vtep_mac: Mac([2, 0, 0, 0, 0, number]),
            mtu: 1450,
            version: "0".to_owned(),
        })
    }

    fn surroundings(&self, _: &View) -> Result<(), String> {
        Ok(())
    }

    fn adopted(&self) -> Option<Alive> {
        self.agent(|agent| agent.adopted.clone())
    }

    fn registration(&self) -> Registration {
        self.agent(|agent| agent.registration.clone())
    }

    fn register(&self, registration: Registration) {
        self.with(|world| {
            let machine = &mut world.machines[self.machine];
            if matches!(registration, Registration::Removed(_)) {
                // A node that was removed breaks its promises.
                machine.promised.clear();
            }
            let agent = machine.agent.as_mut().expect("a task of an agent ends with it");
            agent.registration = registration;
        });
    }

    fn announce(&self, holdings: Holdings) {
        self.agent(|agent| agent.holdings = holdings);
    }

    async fn detach(&self, attachment: &Attachment) -> Result<(), String> {
        if service::del(self, attachment).await {
            return Ok(());
        }
        Err(format!("{attachment} is being wired"))
    }

    async fn remove_gateways(&self) -> Result<(), String> {
        self.turn().await;
        self.with(|world| world.machines[self.machine].kernel.gateways.clear());
        Ok(())
    }

    fn observe(&self, step: &Step, losses: u64, caution: bool) {
        self.note(|| format!("steward: {}", brief(step)));
        self.agent(|agent| {
            agent.last_step = brief(step);
            agent.losses = losses;
            agent.caution = caution;
        });
    }
}
