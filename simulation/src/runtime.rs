//! A container runtime that does what containerd does: it repeats, delays, reorders and loses its calls.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::rc::Rc;

use polder_api::Attachment;

use crate::agent::{Hand, service, spawn, spawn_plugin};
use crate::container::Container;
use crate::requests::Wanting;
use crate::task::Wait;
use crate::world::{Shared, World};

/// What a plugin and the agent say to each other about an ADD.
#[derive(Clone, Default)]
struct Connection {
    /// The agent has answered.
    answered: Rc<Cell<bool>>,
    answer: Rc<RefCell<Option<Vec<IpAddr>>>>,
    /// The plugin has said something, or ended.
    spoken: Rc<Cell<bool>>,
    /// It wants what it has been given taken away.
    wants_del: Rc<Cell<bool>>,
    /// That is done.
    deleted: Rc<Cell<bool>>,
}

/// What ends a connection, however the plugin ends.
struct Ending(Connection);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.spoken.set(true);
    }
}

/// Begins an ADD.
pub fn add(world: &Shared, container: usize) {
    let (machine, wanting) = {
        let world = world.borrow();
        let Container { attachment, pod, reserved, machine, .. } = world.containers[container].clone();
        (machine, Wanting { attachment, pod, reserved })
    };
    let number = spawn_plugin(world, machine, "ADD", |hand, number| async move {
        let added = wire(&hand, wanting).await;
        hand.with(|world| {
            let machine = &mut world.machines[hand.machine];
            let this = &mut world.containers[container];
            this.plugins.retain(|plugin| *plugin != number);
            if let (Some(addresses), true) = (&added, this.is_wanted) {
                this.is_attached = true;
                machine.promised.insert(this.attachment.clone(), addresses.clone());
                *world.counts.entry("pod attached").or_default() += 1;
            }
        });
        hand.note(|| format!("ADD of container {container} ends with {added:?}"));
    });
    let mut world = world.borrow_mut();
    world.containers[container].plugins.push(number);
    world.count("ADD");
    world.note(|| format!("runtime {machine}: ADD of container {container}"));
}

/// The plugin's part of an ADD.
async fn wire(hand: &Hand, wanting: Wanting) -> Option<Vec<IpAddr>> {
    hand.turn().await;
    let attachment = wanting.attachment.clone();
    let alias = polder_ipam::alias::write(&attachment, Some(&wanting.pod));
    let epoch = hand.with(|world| {
        let machine = &world.machines[hand.machine];
        machine.agent.as_ref().filter(|agent| agent.is_open).map(|agent| agent.epoch)
    })?;
    let ending = Ending(Connection::default());
    let connection = ending.0.clone();
    spawn(&hand.world, hand.machine, epoch, "serve ADD", |agent| serve(agent, wanting, connection));
    let Ending(connection) = &ending;
    hand.wait(Wait::Flag(Rc::clone(&connection.answered), epoch)).await;
    let addresses = connection.answer.borrow_mut().take()?;
    hand.turn().await;
    let is_made = hand.with(|world| {
        let kernel = &mut world.machines[hand.machine].kernel;
        let is_new = !kernel.interfaces.contains_key(&attachment);
        let is_made = is_new && kernel.namespaces.contains(attachment.container.as_str());
        if is_made {
            kernel.interfaces.insert(attachment.clone(), addresses.clone());
            kernel.aliases.insert(attachment.clone(), alias.clone());
        }
        is_made
    });
    hand.turn().await;
    let holds = || hand.with(|world| world.machines[hand.machine].epoch_running() == Some(epoch));
    if is_made && holds() {
        return Some(addresses);
    }
    if holds() {
        connection.wants_del.set(true);
        connection.spoken.set(true);
        hand.wait(Wait::Flag(Rc::clone(&connection.deleted), epoch)).await;
        if connection.deleted.get() {
            return None;
        }
    }
    take_down(hand, &attachment).await;
    None
}

/// The agent's part of an ADD.
async fn serve(hand: Hand, wanting: Wanting, connection: Connection) {
    let given = service::add(&hand, &wanting).await;
    let attachment = wanting.attachment;
    hand.note(|| format!("agent gives {attachment} {given:?}"));
    let is_held = given.is_some();
    *connection.answer.borrow_mut() = given;
    connection.answered.set(true);
    if !is_held {
        return;
    }
    hand.wait(Wait::Flag(Rc::clone(&connection.spoken), hand.epoch)).await;
    if connection.wants_del.get() {
        service::release(&hand, &attachment).await;
        hand.let_go(&attachment);
        connection.deleted.set(true);
    } else {
        service::abandoned(&hand, &attachment).await;
    }
}

/// Begins a DEL.
pub fn del(world: &Shared, container: usize) {
    let (machine, attachment) = {
        let mut world = world.borrow_mut();
        let Container { attachment, machine, .. } = world.containers[container].clone();
        over(&mut world, container);
        (machine, attachment)
    };
    let number = spawn_plugin(world, machine, "DEL", |hand, number| async move {
        hand.turn().await;
        take_down(&hand, &attachment).await;
        hand.with(|world| world.containers[container].plugins.retain(|plugin| *plugin != number));
        hand.note(|| format!("DEL of container {container} ends"));
    });
    let mut world = world.borrow_mut();
    world.containers[container].plugins.push(number);
    world.count("DEL");
    world.note(|| format!("runtime {machine}: DEL of container {container}"));
}

/// From now on the container is none of the living.
pub fn over(world: &mut World, container: usize) {
    let Container { attachment, machine, .. } = world.containers[container].clone();
    world.containers[container].is_wanted = false;
    world.containers[container].is_attached = false;
    world.machines[machine].promised.remove(&attachment);
}

/// The plugin's part of a DEL.
async fn take_down(hand: &Hand, attachment: &Attachment) {
    let epoch = hand.with(|world| {
        let machine = &world.machines[hand.machine];
        machine.agent.as_ref().filter(|agent| agent.is_open).map(|agent| agent.epoch)
    });
    if let Some(epoch) = epoch {
        let done = Rc::new(Cell::new(false));
        let (told, whose) = (Rc::clone(&done), attachment.clone());
        spawn(&hand.world, hand.machine, epoch, "serve DEL", |agent| async move {
            service::del(&agent, &whose).await;
            told.set(true);
        });
        hand.wait(Wait::Flag(Rc::clone(&done), epoch)).await;
        if done.get() {
            return;
        }
    }
    // Nobody is there: first a note, then the interface.
    hand.with(|world| world.machines[hand.machine].notes.insert(attachment.clone()));
    hand.turn().await;
    hand.with(|world| world.machines[hand.machine].kernel.interfaces.remove(attachment));
}

/// Takes away what the runtime does not know: what a GC does. It keeps what was added since it began.
pub fn collect(world: &Shared, machine: usize) {
    let Some(epoch) = world.borrow().machines[machine].epoch_running() else { return };
    let (valid, began) = {
        let world = world.borrow();
        let boot_id = &world.machines[machine].boot_id;
        let here = world.containers.iter().filter(|one| one.machine == machine && one.boot_id == *boot_id);
        let valid: BTreeSet<_> = here.filter(|one| one.is_wanted).map(|one| one.attachment.clone()).collect();
        (valid, world.machines[machine].now())
    };
    world.borrow_mut().count("GC");
    spawn(world, machine, epoch, "GC", |hand| async move {
        hand.turn().await;
        let stale = hand.ipam(|ipam, _| polder_ipam::node::stale(ipam.attachments(), began, &valid));
        for attachment in stale {
            if hand.hold(&attachment) {
                service::release(&hand, &attachment).await;
                hand.let_go(&attachment);
            }
        }
    });
}
