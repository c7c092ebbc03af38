//! Taking away all that is ours, and nothing else.

use std::collections::BTreeSet;

use polder_netlink::route::Impostor;
use polder_netlink::{Error, Operation, link, route};

use super::{Kernel, ruleset};

impl Kernel {
    /// Deletes every device, route and table of ours. What hangs on a device goes with it. Returns how much there was.
    pub fn remove_all(&mut self) -> Result<usize, Error> {
        let (routes, impostors) = self.routes.routes()?;
        let ways = routes.iter().map(|route| route::delete(route.destination));
        let mut removed = self.remove(ways.chain(impostors.iter().map(Impostor::delete)))?;
        let devices: BTreeSet<u32> = self.own_devices()?;
        removed += self.remove(devices.into_iter().map(link::delete))?;
        let table = ruleset::empty();
        if self.filter.has(&table)? {
            self.filter.commit(table.delete())?;
            removed += 1;
        }
        Ok(removed)
    }

    /// How many of these there were.
    fn remove(&mut self, operations: impl Iterator<Item = Operation>) -> Result<usize, Error> {
        let mut removed = 0;
        for outcome in self.routes.execute(operations)? {
            match outcome {
                Ok(()) => removed += 1,
                Err(error) if error.is_missing() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }
}
