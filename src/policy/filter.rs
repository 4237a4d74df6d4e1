//! The policy at work: a [`Policy`], what the host's routing says at this moment, and a count of what was
//! refused.

use std::io;
use std::net::{IpAddr, SocketAddr};

use mote_agent::flow::Protocol;

use super::destination::Destination;
use super::refusals::SharedRefusals;
use super::{Policy, Refusal};
use crate::sys::routes::Routes;

/// Judges a box's destinations.
#[derive(Debug)]
pub struct Filter {
    policy: Policy,
    routes: Routes,
    refusals: SharedRefusals,
}

impl Filter {
    /// A filter in the network namespace that the caller is in, also when it leaves that later.
    ///
    /// # Errors
    /// The host refuses a socket to ask for routes.
    pub fn new(policy: Policy, refusals: SharedRefusals) -> io::Result<Self> {
        Ok(Filter { policy, routes: Routes::open()?, refusals })
    }

    /// The address to connect to for a destination that the guest has named.
    ///
    /// # Errors
    /// As [`Policy::resolve`].
    pub fn resolve(&self, protocol: Protocol, destination: SocketAddr) -> Result<SocketAddr, i32> {
        let Filter { policy, routes, .. } = self;
        let resolved = policy.resolve(protocol, destination, |ip| is_local(routes, ip));
        resolved.map_err(|refusal| self.errno(Destination::new(protocol, destination), refusal))
    }

    /// Whether the guest may send to a destination on a network of its own.
    ///
    /// # Errors
    /// As [`Policy::admit`].
    pub fn admit(&self, destination: Destination) -> Result<(), i32> {
        let Filter { policy, routes, .. } = self;
        // Whether there is a way is for those to say who have the network.
        let admitted = policy.admit(destination, |ip| match is_local(routes, ip) {
            Err(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL) => Ok(false),
            known => known,
        });
        admitted.map_err(|refusal| self.errno(destination, refusal))
    }

    fn errno(&self, destination: Destination, refusal: Refusal) -> i32 {
        if let Refusal::ByPolicy(_) = refusal {
            self.refusals.borrow_mut().add(destination);
        }
        refusal.errno()
    }
}

/// Whether packets to this address stay on the host.
fn is_local(routes: &Routes, ip: IpAddr) -> Result<bool, i32> {
    // What cannot be asked must not be connected to.
    routes.is_local(ip).map_err(|error| match error.raw_os_error() {
        // The host has no IPv6 at all.
        Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP) => libc::ENETUNREACH,
        Some(errno) => errno,
        None => libc::EIO,
    })
}
