//! What `polderctl` prints.

use std::time::{Duration, SystemTime};

use comfy_table::Table;
use comfy_table::presets::NOTHING;
use polder_api::status::{NodeStatus, Status, StoreStatus};

pub mod command;
pub mod credentials;
pub mod ipam;
pub mod pool;

/// A table without lines.
fn table<const COLUMNS: usize>(header: [&str; COLUMNS]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header);
    table
}

/// The table as text.
fn print(mut table: Table) -> String {
    table.column_iter_mut().for_each(|column| {
        column.set_padding((0, 2));
    });
    table.trim_fmt() + "\n"
}

/// The status of a node, for people.
pub fn status(status: &Status) -> String {
    let mut lines = vec![
        format!("node      {} (polder {})", status.node, status.version),
        format!("ready     {}", if status.ready { "yes" } else { "no" }),
    ];
    lines.extend(status.reasons.iter().map(|reason| format!("          {reason}")));
    lines.push(match &status.store {
        StoreStatus::Connected { store, revision } => format!("store     {store}, at revision {revision}"),
        StoreStatus::Disconnected { store, reason } => format!("store     {store} is away: {reason}"),
    });
    if let Some(cluster) = &status.cluster {
        lines.push(format!(
            "cluster   {}, backend {}, attach {}",
            cluster.id, cluster.backend, cluster.attach
        ));
    }
    for uplink in &status.underlay {
        lines.push(format!(
            "underlay  {} on {}, mtu {}, chosen by {}",
            uplink.address, uplink.interface, uplink.mtu, uplink.chosen_by
        ));
    }
    for other in &status.not_underlay {
        let interface = other.interface.as_ref().map(|name| format!(" on {name}")).unwrap_or_default();
        lines.push(format!("          not {}{interface}: {}", other.address, other.reason));
    }
    let mtu = status.mtu.map(|mtu| format!(", mtu {mtu}")).unwrap_or_default();
    lines.push(format!("pods      {}{mtu}", status.pods));
    for block in &status.blocks {
        lines.push(format!(
            "block     {} of pool {}: {} used, {} resting, {} free",
            block.block, block.pool, block.used, block.resting, block.free
        ));
    }
    if let Some(pass) = &status.last_pass {
        lines.push(format!(
            "kernel    pass {} made {} changes in {}.{:03} ms",
            pass.count,
            pass.writes,
            pass.took_us / 1000,
            pass.took_us % 1000
        ));
        lines.extend(pass.failures.iter().map(|failure| format!("          failed: {failure}")));
    }
    lines.extend(status.repairs.iter().map(|repair| {
        let ago = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(repair.at));
        let more = if repair.more > 0 { format!("; and {} more", repair.more) } else { String::new() };
        let by = if repair.by.is_empty() { "somebody".to_owned() } else { repair.by.join(", ") };
        let ago = ago.unwrap_or_default().as_secs();
        format!("repaired  {ago} s ago, after {by}: {}{more}", repair.changes.join("; "))
    }));
    lines.extend(status.missing_features.iter().map(|missing| format!("kernel    {missing}")));
    lines.extend(status.problems.iter().map(|problem| format!("problem   {problem}")));
    lines.join("\n") + "\n"
}

/// The nodes of the cluster, for people.
pub fn nodes(nodes: &[NodeStatus]) -> String {
    let header = ["NODE", "ALIVE", "STANDING", "UNDERLAY", "GATEWAYS", "BLOCKS", "PATH", "VERSION"];
    let mut table = table(header);
    for node in nodes {
        let join = |items: Vec<String>| if items.is_empty() { "-".to_owned() } else { items.join("\n") };
        let alive = match node.alive {
            Some(true) => "yes",
            Some(false) => "no",
            None => "?",
        };
        let paths = node.paths.iter();
        let paths = paths.map(|path| format!("{} {} {} {}", path.family, path.path, path.via, path.probe));
        table.add_row([
            node.name.to_string(),
            alive.to_owned(),
            node.standing.to_string(),
            join(node.underlay.iter().map(ToString::to_string).collect()),
            join(node.gateways.iter().map(ToString::to_string).collect()),
            join(node.blocks.iter().map(ToString::to_string).collect()),
            join(paths.map(|path| path.trim_end().to_owned()).collect()),
            node.version.clone(),
        ]);
    }
    print(table)
}
