//! Removes Polder's kernel state, and nothing else.

use std::collections::BTreeSet;

use polder_netlink::route::ConflictingRoute;
use polder_netlink::{Error, IfIndex, address, link, route};

use super::{Kernel, ruleset};

impl Kernel {
    /// Deletes all devices, routes and tables of Polder. The kernel deletes dependent objects with their device.
    /// Returns the number of deleted objects, and the errors.
    pub fn remove_all(&mut self) -> (usize, Vec<Error>) {
        let parts = [self.remove_routes(), self.remove_devices(), self.remove_filter()];
        let (mut removed, mut failures) = (0, Vec::new());
        for outcome in parts.into_iter().flat_map(|part| part.unwrap_or_else(|error| vec![Err(error)])) {
            match outcome {
                Ok(()) => removed += 1,
                Err(error) if error.is_missing() => {}
                Err(error) => failures.push(error),
            }
        }
        (removed, failures)
    }

    /// Deletes the node's own addresses from the bridge.
    pub fn remove_gateways(&mut self) -> Result<(), Error> {
        let found = self.bridge_addresses()?;
        let deletes = found.into_iter().map(|found| address::delete(found.index, found.address));
        for outcome in self.routes.execute(deletes)? {
            outcome.or_else(|error| if error.is_missing() { Ok(()) } else { Err(error) })?;
        }
        Ok(())
    }

    fn remove_routes(&mut self) -> Result<Vec<Result<(), Error>>, Error> {
        let (routes, conflicting_routes) = self.routes.routes()?;
        let deletions = routes.iter().map(|route| route::delete(route.destination));
        self.routes.execute(deletions.chain(conflicting_routes.iter().map(ConflictingRoute::delete)))
    }

    fn remove_devices(&mut self) -> Result<Vec<Result<(), Error>>, Error> {
        let devices: BTreeSet<IfIndex> = self.own_devices()?;
        self.routes.execute(devices.into_iter().map(link::delete))
    }

    fn remove_filter(&mut self) -> Result<Vec<Result<(), Error>>, Error> {
        let table = ruleset::empty();
        Ok(if self.filter.has(&table)? { vec![self.filter.commit(table.delete())] } else { Vec::new() })
    }
}
