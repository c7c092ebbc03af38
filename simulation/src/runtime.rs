//! A container runtime that behaves like containerd: it repeats, delays, reorders and loses its calls.

use std::cell::{Cell, RefCell};
use std::net::IpAddr;
use std::rc::Rc;

use polder_api::Attachment;
use polder_api::message::{AddRequest, AddressSource, Collection};
use polder_ipam::invariants::{Deviation, Invariant};
use polder_ipam::ledger::AttachmentEntry;
use polder_ipam::tasks::{self, Caller, collect, teardown};

use crate::agent::{SimHost, spawn, spawn_plugin};
use crate::container::Container;
use crate::in_flight::Lock;
use crate::settings::{NETWORK, RESERVED};
use crate::task::Wait;
use crate::world::{ClosedPool, Shared, World};

/// Counted event: a plugin creates an interface after its addresses were released, because its DEL did not wait or
/// the agent was restarted.
pub const LATE_INTERFACE: &str = "interface made after its DEL";

/// The connection of a plugin to the agent during an ADD.
#[derive(Clone, Default)]
struct Connection {
    /// The agent has answered.
    answered: Rc<Cell<bool>>,
    answer: Rc<RefCell<Option<Vec<IpAddr>>>>,
    /// The plugin has sent a message, or has ended.
    plugin_done: Rc<Cell<bool>>,
    /// The plugin has reported that the interface is ready.
    attached: Rc<Cell<bool>>,
    /// The plugin requests the removal of the attachment.
    wants_del: Rc<Cell<bool>>,
    /// The removal is complete.
    deleted: Rc<Cell<bool>>,
}

impl Caller for Connection {
    fn is_gone(&self) -> bool {
        self.plugin_done.get()
    }
}

/// Closes the connection when the plugin ends, for any reason.
struct EndsOnDrop(Connection);

impl Drop for EndsOnDrop {
    fn drop(&mut self) {
        self.0.plugin_done.set(true);
    }
}

/// Starts an ADD.
pub fn add(world: &Shared, container: usize) {
    let (machine, request) = {
        let world = world.borrow();
        let Container { attachment, pod, reserved, machine, .. } = world.containers[container].clone();
        let pool = reserved.then(|| RESERVED.parse().expect("a name"));
        let source = AddressSource::Pools { pool, addresses: Vec::new() };
        let netns = attachment.container.to_string();
        (
            machine,
            AddRequest { attachment, netns, pod: Some(pod), source, mac: None, mtu: None, ports: Vec::new() },
        )
    };
    let number = spawn_plugin(world, machine, "ADD", |host, number| async move {
        let added = plugin_add(&host, request).await;
        host.with(|world| {
            let machine = &mut world.machines[host.machine];
            let this = &mut world.containers[container];
            this.plugins.retain(|plugin| *plugin != number);
            // An ADD that hung for so long that a DEL overtook it guarantees nothing.
            let is_overtaken = machine.kernel.deleted_meanwhile.contains(&this.attachment);
            if let (Some(addresses), true, false) = (&added, this.is_wanted, is_overtaken) {
                this.is_attached = true;
                machine.promised.insert(this.attachment.clone(), addresses.clone());
                *world.counts.entry("pod attached").or_default() += 1;
            }
        });
        host.note(|| format!("ADD of container {container} ends with {added:?}"));
    });
    let mut world = world.borrow_mut();
    world.containers[container].plugins.push(number);
    world.count("ADD");
    world.note(|| format!("runtime {machine}: ADD of container {container}"));
}

/// The plugin's side of an ADD.
async fn plugin_add(host: &SimHost, request: AddRequest) -> Option<Vec<IpAddr>> {
    host.turn().await;
    let attachment = request.attachment.clone();
    let alias = polder_ipam::alias::write(&attachment, request.pod.as_ref());
    let epoch = host.with(|world| {
        let machine = &world.machines[host.machine];
        machine.agent.as_ref().filter(|agent| agent.is_open).map(|agent| agent.epoch)
    })?;
    let ending = EndsOnDrop(Connection::default());
    let connection = ending.0.clone();
    spawn(&host.world, host.machine, epoch, "serve ADD", |agent| serve(agent, request, connection));
    let EndsOnDrop(connection) = &ending;
    host.wait(Wait::Flag(Rc::clone(&connection.answered), epoch)).await;
    let addresses = connection.answer.borrow_mut().take()?;
    let holds = || host.with(|world| world.machines[host.machine].epoch_running() == Some(epoch));
    let mark = Lock::new(host.in_creation(), &attachment).filter(|_| holds())?;
    host.turn().await;
    let is_made = host.with(|world| {
        let machine = &mut world.machines[host.machine];
        let kernel = &mut machine.kernel;
        let is_new = !kernel.interfaces.contains_key(&attachment);
        let is_made = is_new && kernel.namespaces.contains(attachment.container.as_str());
        if is_made {
            kernel.interfaces.insert(attachment.clone(), addresses.clone());
            kernel.aliases.insert(attachment.clone(), alias.clone());
        }
        if is_made && !machine.disk.names(&attachment) {
            // Its DEL timed out waiting for the lock and continued. Only a DEL may do so.
            let is_free = kernel.deleted_meanwhile.contains(&attachment);
            machine.kernel.deleted_meanwhile.insert(attachment.clone());
            if is_free {
                world.count(LATE_INTERFACE);
            } else {
                let node = machine.name.clone();
                world.found.push(Deviation {
                    invariant: Invariant::NoEarlyFree,
                    what: format!("{attachment} on {node} was released while its ADD went on"),
                    remedy: "delete the pod".to_owned(),
                    node: Some(node),
                    repair: None,
                });
            }
        }
        is_made
    });
    host.turn().await;
    if is_made && holds() {
        connection.attached.set(true);
        return Some(addresses);
    }
    drop(mark);
    if holds() {
        connection.wants_del.set(true);
        connection.plugin_done.set(true);
        host.wait(Wait::Flag(Rc::clone(&connection.deleted), epoch)).await;
        if connection.deleted.get() {
            return None;
        }
    }
    plugin_del(host, &attachment).await;
    None
}

/// The agent's side of an ADD.
async fn serve(host: SimHost, request: AddRequest, connection: Connection) {
    let attachment = request.attachment.clone();
    let closed = host.with(|world| closed(world, host.machine, &attachment));
    let added = tasks::add(&host, &host.own_node(), request, &connection).await;
    if let Ok(added) = &added {
        host.with(|world| check_closed(world, &added.held, &closed));
    }
    host.note(|| match &added {
        Ok(added) => format!("agent gives {attachment} {:?}", added.held.addresses),
        Err(refusal) => format!("agent refuses {attachment}: {refusal}"),
    });
    let (addresses, lock) = added.map(|added| (added.held.addresses, added.lock)).ok().unzip();
    *connection.answer.borrow_mut() = addresses;
    connection.answered.set(true);
    if lock.is_none() {
        return;
    }
    host.wait(Wait::Flag(Rc::clone(&connection.plugin_done), host.epoch)).await;
    if connection.wants_del.get() {
        drop(lock);
        delete(&host, &attachment).await;
        connection.deleted.set(true);
    } else if connection.attached.get() {
        teardown::attached(&host, &attachment).await;
    } else {
        teardown::abandoned(&host, &attachment).await;
    }
}

/// The pools that must give no address to a new attachment: the node has seen that they are closed.
fn closed(world: &World, machine: usize, attachment: &Attachment) -> Vec<ClosedPool> {
    let machine = &world.machines[machine];
    // An existing attachment keeps its addresses.
    let agent = machine.agent.as_ref().filter(|_| !machine.disk.names(attachment));
    agent.map(|agent| agent.closed.clone()).unwrap_or_default()
}

/// Checks that the ADD used no closed pool, unless the record of the pool has changed in the meantime.
fn check_closed(world: &mut World, held: &AttachmentEntry, closed: &[ClosedPool]) {
    let is_closed = |pool: &&ClosedPool| {
        world.truth.pools.get(&pool.name).is_some_and(|known| known.revision == pool.revision)
    };
    let of = |pool: &&ClosedPool| held.addresses.iter().any(|address| pool.cidr.has(*address));
    if let Some(pool) = closed.iter().filter(is_closed).find(of) {
        let what =
            format!("{} got {:?} of pool {}, which is drained", held.attachment, held.addresses, pool.name);
        world.found.push(Deviation {
            invariant: Invariant::BlockTree,
            what,
            remedy: "report it".to_owned(),
            node: None,
            repair: None,
        });
    }
}

/// The agent's side of a DEL. No fault in the simulation prevents a removal, so the runtime must never receive a
/// refusal.
async fn delete(host: &SimHost, attachment: &Attachment) {
    let Err(refusal) = teardown::del(host, attachment).await else { return };
    host.with(|world| {
        let node = world.machines[host.machine].name.clone();
        world.found.push(Deviation {
            invariant: Invariant::NoLeak,
            what: format!("the DEL of {attachment} on {node} is refused: {refusal}"),
            remedy: "none: the runtime cannot forget the pod".to_owned(),
            node: Some(node),
            repair: None,
        });
    });
}

/// Starts a DEL.
pub fn del(world: &Shared, container: usize) {
    let (machine, attachment) = {
        let mut world = world.borrow_mut();
        let Container { attachment, machine, .. } = world.containers[container].clone();
        mark_ended(&mut world, container);
        (machine, attachment)
    };
    let number = spawn_plugin(world, machine, "DEL", |host, number| async move {
        host.turn().await;
        plugin_del(&host, &attachment).await;
        host.with(|world| world.containers[container].plugins.retain(|plugin| *plugin != number));
        host.note(|| format!("DEL of container {container} ends"));
    });
    let mut world = world.borrow_mut();
    world.containers[container].plugins.push(number);
    world.count("DEL");
    world.note(|| format!("runtime {machine}: DEL of container {container}"));
}

/// Marks the container as ended, and ends the guarantee of its addresses.
pub fn mark_ended(world: &mut World, container: usize) {
    let Container { attachment, machine, .. } = world.containers[container].clone();
    world.containers[container].is_wanted = false;
    world.containers[container].is_attached = false;
    world.machines[machine].promised.remove(&attachment);
}

/// The plugin's side of a DEL.
async fn plugin_del(host: &SimHost, attachment: &Attachment) {
    let epoch = host.with(|world| {
        let machine = &world.machines[host.machine];
        machine.agent.as_ref().filter(|agent| agent.is_open).map(|agent| agent.epoch)
    });
    if let Some(epoch) = epoch {
        let done = Rc::new(Cell::new(false));
        let (finished, own) = (Rc::clone(&done), attachment.clone());
        spawn(&host.world, host.machine, epoch, "serve DEL", |agent| async move {
            delete(&agent, &own).await;
            finished.set(true);
        });
        host.wait(Wait::Flag(Rc::clone(&done), epoch)).await;
        if done.get() {
            return;
        }
    }
    // No agent is running: first write a tombstone, then delete the interface.
    host.with(|world| world.machines[host.machine].tombstones.insert(attachment.clone()));
    host.turn().await;
    host.with(|world| world.machines[host.machine].kernel.interfaces.remove(attachment));
}

/// Removes attachments that the runtime does not list, as a GC does. Attachments added after its start are kept.
pub fn collect(world: &Shared, machine: usize) {
    let Some(epoch) = world.borrow().machines[machine].epoch_running() else { return };
    let (valid, began_ms) = {
        let world = world.borrow();
        let boot_id = &world.machines[machine].boot_id;
        let here = world.containers.iter().filter(|one| one.machine == machine && one.boot_id == *boot_id);
        let valid: Vec<_> = here.filter(|one| one.is_wanted).map(|one| one.attachment.clone()).collect();
        (valid, world.machines[machine].clock)
    };
    world.borrow_mut().count("GC");
    spawn(world, machine, epoch, "GC", move |host| async move {
        host.turn().await;
        let network = NETWORK.parse().expect("a name");
        let collected = collect::collect(&host, Collection { network, valid, began_ms }).await;
        host.note(|| format!("GC ends with {collected:?}"));
    });
}
