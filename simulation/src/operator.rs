//! Operators: they send requests to an agent, as `polderctl` does, and production tasks execute them
//! ([`polder_ipam::tasks::operator`]). The agent can crash while it executes a request, and its store can fail.
//!
//! Every reply to an operator is checked against the records when it is sent.

mod direct;
mod reply_check;

use std::rc::Rc;

use polder_api::ipam::Release;
use polder_api::message::{Refusal, RefusalKind, Removal, Reply};
use polder_api::pool::PoolChange;
use polder_api::{Attachment, Backend, NodeName, PoolName};
use polder_ipam::ledger::Ledger as _;
use polder_ipam::pool::PoolState;
use polder_ipam::record::{Boot, Holder};
use polder_ipam::removal::OperatorConfirmation;
use polder_ipam::tasks::operator::{self, Adoption};

use crate::agent::{SimHost, spawn};
use crate::fault::Fault;
use crate::settings;
use crate::world::{Machine, Shared, World};

pub use self::direct::{change_pools, remove_node};
pub use self::reply_check::OUTCOMES;

/// A request of an operator.
#[derive(Debug, Clone)]
pub enum OperatorRequest {
    /// Add, drain or remove a pool.
    Pools(PoolChange),
    /// Set the backend that connects the nodes.
    Backend(Backend),
    /// Release an address.
    Release(Release),
    /// Remove a node.
    Remove(Removal),
}

/// Sends an operator request of that kind, about that machine, to an agent that serves. Returns false if no request
/// is possible, or if no agent serves.
pub fn send_request(shared: &Shared, machine: usize, kind: Fault) -> bool {
    let mut world = shared.borrow_mut();
    let Some(request) = random_request(&mut world, machine, kind) else { return false };
    let serves = |index: &usize| world.machines[*index].agent.as_ref().is_some_and(|agent| agent.is_open);
    let asked: Vec<usize> = (0..world.machines.len()).filter(serves).collect();
    if asked.is_empty() {
        return false;
    }
    // A node releases its own addresses. Any agent can execute all other requests.
    let is_its_own = matches!(request, OperatorRequest::Release(_)) && asked.contains(&machine);
    let asked = if is_its_own { machine } else { *world.random.one_of(&asked) };
    let Some(epoch) = world.machines[asked].epoch_running() else { return false };
    world.note(|| format!("operator asks {asked} for {request:?}"));
    drop(world);
    spawn(shared, asked, epoch, "operator", |host| serve(host, request));
    true
}

/// The agent's side of the request.
async fn serve(host: SimHost, request: OperatorRequest) {
    let started = host.with(|world| reply_check::RequestStart::new(world, &request));
    host.turn().await;
    let me = host.own_node();
    let answer = match request.clone() {
        OperatorRequest::Pools(change) => operator::change_pools(&host, &host.view(), change).await,
        OperatorRequest::Backend(backend) => operator::change_settings(&host, &backend.into()).await,
        OperatorRequest::Release(release) => operator::release(&host, &me, &host, release).await,
        OperatorRequest::Remove(removal) => remove(&host, removal).await,
    };
    host.note(|| format!("reply to the operator: {answer:?}"));
    host.with(|world| reply_check::check(world, &request, &started, &answer));
}

/// An operator who removes a node confirms the number of pods that are disconnected.
async fn remove(host: &SimHost, mut removal: Removal) -> Result<String, Refusal> {
    let me = host.own_node();
    loop {
        match operator::allow_removal(host, &me, host, &removal).await {
            Ok(()) => return operator::remove_node(host, host, removal).await,
            Err(Reply::Unconfirmed { pods, .. }) => removal.disconnect_pods = Some(pods),
            Err(Reply::Refused(refusal)) => return Err(refusal),
            Err(other) => unreachable!("{other:?} is no answer to that"),
        }
    }
}

/// A random request of that kind, if possible.
fn random_request(world: &mut World, machine: usize, kind: Fault) -> Option<OperatorRequest> {
    Some(match kind {
        Fault::PoolAdded => {
            // Without cluster settings, a new cluster would have other pools than those of the configuration.
            world.truth.cluster.as_ref()?;
            OperatorRequest::Pools(PoolChange::Add(world.random.one_of(&settings::more_pools()).clone()))
        }
        Fault::PoolDrained => OperatorRequest::Pools(PoolChange::Drain(any_pool(world, PoolState::Active)?)),
        Fault::PoolRemoved => {
            OperatorRequest::Pools(PoolChange::Remove(any_pool(world, PoolState::Draining)?))
        }
        Fault::SettingsChanged => {
            OperatorRequest::Backend(*world.random.one_of(&[Backend::Auto, Backend::Direct, Backend::Vxlan]))
        }
        Fault::AddressReleased => release(world, machine)?,
        Fault::NodeRemoved => OperatorRequest::Remove(Removal {
            node: world.machines[machine].name.clone(),
            dead: false,
            disconnect_pods: None,
            earlier: false,
        }),
        _ => return None,
    })
}

/// A random pool, usually in that state.
fn any_pool(world: &mut World, state: PoolState) -> Option<PoolName> {
    let pools = world.truth.pools.values();
    let (such, others): (Vec<_>, Vec<_>) =
        pools.map(|known| &*known.record).partition(|pool| pool.state == state);
    let such = if such.is_empty() || world.random.once_in(4) { others } else { such };
    (!such.is_empty()).then(|| world.random.one_of(&such).name.clone())
}

/// A random release: an address that is reserved, or held on the machine. Usually it can be released.
fn release(world: &mut World, machine: usize) -> Option<OperatorRequest> {
    let reserved = world.truth.reservations.iter().map(|(address, known)| {
        let holder = known.record.holder.as_ref();
        (*address, holder.is_none_or(|holder| is_gone(world, holder)))
    });
    let Machine { disk, kernel, .. } = &world.machines[machine];
    // A ledger in memory always answers.
    let held = disk.ledger().attachments().unwrap_or_default();
    let held = held.iter().flat_map(|held| {
        let is_gone = !kernel.interfaces.contains_key(&held.attachment);
        held.addresses.iter().map(move |address| (*address, is_gone))
    });
    let gateways = kernel.gateways.iter().map(|gateway| (*gateway, false));
    let (reserved, own): (Vec<_>, Vec<_>) = (reserved.collect(), held.chain(gateways).collect());
    let of = if reserved.is_empty() || world.random.once_in(2) { own } else { reserved };
    let gone: Vec<_> = of.iter().copied().filter(|(_, is_gone)| *is_gone).collect();
    let of = if gone.is_empty() || world.random.once_in(4) { of } else { gone };
    if of.is_empty() {
        return None;
    }
    let address = world.random.one_of(&of).0;
    // An operator does not declare a pod dead while it could still run.
    let holder = world.truth.reservations.get(&address).and_then(|known| known.record.holder.as_ref());
    let dead = holder.is_none_or(|holder| is_gone(world, holder));
    Some(OperatorRequest::Release(Release { address, dead }))
}

/// Whether the pod is gone with its node or with its boot, and no task works on it.
fn is_gone(world: &World, holder: &Holder) -> bool {
    let lives = |machine: &Machine| !machine.is_destroyed && machine.boot_id == holder.boot_id;
    !world.machines.iter().any(|machine| lives(machine) && could_have(machine, &holder.attachment))
}

fn could_have(machine: &Machine, attachment: &Attachment) -> bool {
    machine.kernel.namespaces.contains(attachment.container.as_str())
        || machine.kernel.interfaces.contains_key(attachment)
        || machine.disk.names(attachment)
}

/// Reactivates all pools that should exist, except `but`.
pub fn open_all_pools(world: &mut World, but: Option<&PoolName>) {
    if world.truth.cluster.is_none() {
        return;
    }
    let there = world.truth.pools.values().map(|known| (*known.record).clone());
    let pools: Vec<_> = world.first_pools.iter().cloned().chain(there).collect();
    for pool in pools {
        let known = world.truth.pools.get(&pool.name);
        if Some(&pool.name) != but && known.is_none_or(|known| known.record.state != PoolState::Active) {
            change_pools(world, PoolChange::Add(settings::new_pool(&pool)));
        }
    }
}

/// Lets a machine replace a failed one: with its ledger as the same node, without it as a new node.
pub fn replace_machine(shared: &Shared, index: usize) {
    let (name, epoch) = {
        let world = shared.borrow();
        let machine = &world.machines[index];
        let Some(node) = world.truth.nodes.get(&machine.name) else { return };
        let is_it = Boot::from(&*node.record) == machine.boot();
        let Some(agent) = machine.agent.as_ref().filter(|agent| agent.is_open && !is_it) else { return };
        (machine.name.clone(), agent.epoch)
    };
    spawn(shared, index, epoch, "operator", |host| adopt(host, name));
}

async fn adopt(host: SimHost, name: NodeName) {
    let me = Rc::clone(&host.own_node());
    let answer = operator::adopt(&host, &me, &name).await;
    host.note(|| format!("reply to the operator: {answer:?}"));
    match answer {
        Ok(Adoption::InPlaceOf(other, _)) => {
            host.agent(|agent| {
                agent.adopted = Some(other);
                agent.must_check_records = true;
            });
            host.with(|world| world.count("node adopted"));
        }
        // The machine has no ledger of that node.
        Err(Refusal { kind: RefusalKind::Invalid, .. }) => host.with(|world| {
            remove_node(world, &name, OperatorConfirmation::Yes);
        }),
        Ok(Adoption::AlreadyAdopted(_)) | Err(_) => {}
    }
}
