//! Destinations, as policies judge them.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use mote_agent::flow::Protocol;

/// Where a packet of the guest's goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Destination {
    /// How; `None` is neither TCP nor UDP.
    pub protocol: Option<Protocol>,
    /// The address. An address of IPv4 is never written as IPv4-mapped.
    pub ip: IpAddr,
    /// The port, if the protocol has one; else 0.
    pub port: u16,
}

impl Destination {
    /// A destination of TCP or UDP.
    pub fn new(protocol: Protocol, address: SocketAddr) -> Self {
        let ip = address.ip().to_canonical();
        Destination { protocol: Some(protocol), ip, port: address.port() }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            Some(_) => SocketAddr::new(self.ip, self.port).fmt(f),
            None => self.ip.fmt(f),
        }
    }
}

/// As rules and reports write it.
pub fn protocol_name(protocol: Option<Protocol>) -> &'static str {
    match protocol {
        Some(Protocol::Tcp) => "tcp",
        Some(Protocol::Udp) => "udp",
        None => "other",
    }
}
