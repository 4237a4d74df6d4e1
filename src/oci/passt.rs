//! passt in a container's network namespace, for a container that asks for it by the annotation `mote.passt`: the guest
//! then has an interface of its own with the namespace's address, by which its UDP servers are reached and it can ping.
//! Without it a box's connections are made, and its TCP servers mirrored, by mote itself.
//!
//! passt goes into the background once it is ready, and ends when mote does, which holds the other end of its only
//! connection.

use std::fs;
use std::io::{Read, Write, pipe};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use super::cgroup::Cgroup;
use crate::resolv_conf;
use crate::sys::routes::Routes;
use crate::sys::{self, container, process};

/// The annotation.
pub const ANNOTATION: &str = "mote.passt";

/// The ports of a namespace that passt passes on to the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ports {
    tcp: Vec<u16>,
    udp: Vec<u16>,
}

impl Ports {
    /// Reads a list such as `80,53/udp`; an empty one is no ports.
    ///
    /// # Errors
    /// An item is no port; the message goes on behind the annotation's name.
    pub fn parse(text: &str) -> Result<Ports, String> {
        let mut ports = Ports::default();
        for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let (number, list) = match item.split_once('/') {
                None => (item, &mut ports.tcp),
                Some((number, "tcp")) => (number, &mut ports.tcp),
                Some((number, "udp")) => (number, &mut ports.udp),
                Some(_) => ("", &mut ports.tcp),
            };
            let port = number.parse().ok().filter(|port| *port > 0).ok_or_else(|| {
                format!("has \"{item}\", must be a list of ports such as 80,53/udp, or empty")
            })?;
            if !list.contains(&port) {
                list.push(port);
            }
        }
        Ok(ports)
    }

    /// The options of passt's that pass them on.
    fn options(&self) -> [String; 4] {
        let list = |ports: &[u16]| match ports {
            [] => "none".into(),
            ports => ports.iter().map(u16::to_string).collect::<Vec<_>>().join(","),
        };
        ["--tcp-ports".into(), list(&self.tcp), "--udp-ports".into(), list(&self.udp)]
    }
}

/// The addresses of the interface by which this process's network namespace reaches the rest of the world.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Interface {
    address: Ipv4Addr,
    prefix_len: u8,
    gateway: Ipv4Addr,
}

/// Starts passt in this process's network namespace, in this cgroup. Returns the spec's `network` for mote, which
/// must be executed in this process: it finds its end of the connection open. Names are looked up at the servers of
/// this resolv.conf(5).
///
/// # Errors
/// The namespace has no default route, or passt is missing or does not start.
pub fn start(ports: &Ports, cgroup: Option<&Cgroup>, resolv_conf: Option<&Path>) -> Result<Value> {
    let interface = Interface::of_default_route().with_context(|| {
        format!("look at the container's network for the annotation {ANNOTATION}")
    })?;
    let (ours, passts) = UnixStream::pair().context("make a socket pair for passt")?;
    run(ports, cgroup, &passts)?;
    let servers: Vec<Ipv4Addr> = resolv_conf
        .and_then(|path| fs::read_to_string(path).ok())
        .map(|text| resolv_conf::name_servers(&text).filter_map(|ip| ip.parse().ok()).collect())
        .unwrap_or_default();
    // Of those that are given by whoever administers a network (IEEE 802), and no two containers' alike.
    let mut mac = [0; 6];
    sys::fill_random(&mut mac).context("choose a hardware address")?;
    mac[0] = mac[0] & 0xfc | 2;
    Ok(json!({
        "passt_socket_path": "",
        "net_socket_fd": keep(ours)?,
        "ip_address": interface.address,
        "gateway": interface.gateway,
        "prefix_len": interface.prefix_len,
        "mac_address": mac,
        "dns_servers": servers,
        // As a container's process is joined by others.
        "joinable": true,
    }))
}

/// Runs passt until it has gone into the background.
fn run(ports: &Ports, cgroup: Option<&Cgroup>, socket: &UnixStream) -> Result<()> {
    let (mut fault, faults) = pipe().context("make a pipe")?;
    let mut faults = Some(faults);
    let started = container::fork(|| match run_in(ports, cgroup, socket) {
        Ok(()) => 0,
        Err(error) => {
            let written = faults.take().map(|mut faults| write!(faults, "{error:#}"));
            u8::from(written.is_some())
        }
    });
    let pid = started.context("start a process for passt")?;
    drop(faults);
    let mut said = String::new();
    fault.read_to_string(&mut said).context("wait for passt")?;
    process::wait(pid).context("wait for passt")?;
    ensure!(said.is_empty(), "{said}");
    Ok(())
}

/// Runs it in a cgroup, which this process enters.
fn run_in(ports: &Ports, cgroup: Option<&Cgroup>, socket: &UnixStream) -> Result<()> {
    cgroup.map_or(Ok(()), Cgroup::join)?;
    container::keep_on_exec(socket).context("hand passt its socket")?;
    let run = Command::new("passt")
        .args(["--quiet", "--no-map-gw", "--fd", &socket.as_raw_fd().to_string()])
        .args(ports.options())
        .current_dir("/")
        .stdin(Stdio::null())
        .output();
    let run = run.with_context(|| {
        format!("run passt: install it, or leave the annotation {ANNOTATION} out")
    })?;
    let said = String::from_utf8_lossy(&run.stderr).trim().replace('\n', "; ");
    ensure!(run.status.success(), "passt did not start ({}): {said}", run.status);
    Ok(())
}

/// Has mote, which is executed next, find a socket open. Returns its number.
fn keep(socket: UnixStream) -> Result<RawFd> {
    container::keep_on_exec(&socket).context("keep passt's connection")?;
    Ok(socket.into_raw_fd())
}

impl Interface {
    fn of_default_route() -> Result<Interface> {
        let own = Routes::open().and_then(|routes| routes.own());
        let own = own.context("ask for the addresses")?;
        let routes = fs::read_to_string("/proc/self/net/route").context("read the routes")?;
        Interface::find(&routes, &own).ok_or_else(|| {
            anyhow!("it has no IPv4 default route by way of a gateway in a subnet of its own; give it one, or leave the annotation out")
        })
    }

    /// The interface by the table of routes that `/proc/net/route` is, and the namespace's own addresses.
    fn find(routes: &str, own: &[IpAddr]) -> Option<Interface> {
        let rows = || routes.lines().skip(1).filter_map(Route::parse);
        let default = rows().find(|route| route.mask == 0 && route.gateway != 0)?;
        let is_near = |route: &Route| {
            route.interface == default.interface
                && route.mask != 0
                && default.gateway & route.mask == route.destination
        };
        let near = rows().find(is_near)?;
        let addresses = own.iter().filter_map(|ip| match ip {
            IpAddr::V4(ip) => Some(*ip),
            IpAddr::V6(_) => None,
        });
        let mut in_subnet = addresses.filter(|ip| ip.to_bits() & near.mask == near.destination);
        Some(Interface {
            address: in_subnet.next()?,
            prefix_len: near.mask.leading_ones() as u8,
            gateway: Ipv4Addr::from_bits(default.gateway),
        })
    }
}

/// A row of `/proc/net/route`, in host byte order.
struct Route<'a> {
    interface: &'a str,
    destination: u32,
    gateway: u32,
    mask: u32,
}

impl Route<'_> {
    fn parse(row: &str) -> Option<Route<'_>> {
        let columns: Vec<&str> = row.split_whitespace().collect();
        // The kernel prints a number in network byte order as if it were in the host's.
        let number = |column: usize| {
            u32::from_str_radix(columns.get(column)?, 16).ok().map(u32::from_be).map(u32::to_le)
        };
        Some(Route {
            interface: columns.first()?,
            destination: number(1)?,
            gateway: number(2)?,
            mask: number(7)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_a_list() {
        let ports = Ports::parse("80, 53/udp,443/tcp,80").expect("ports");
        assert_eq!(ports.options(), ["--tcp-ports", "80,443", "--udp-ports", "53"]);
        assert_eq!(Ports::parse("").expect("none").options()[1], "none");
        for wrong in ["0", "70000", "53/sctp", "a", "1-2"] {
            assert!(Ports::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_interface_is_that_of_the_default_route() {
        let head =
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
        let default = "eth0\t00000000\t0100580A\t0003\t0\t0\t100\t00000000\t0\t0\t0\n";
        let subnet = "eth0\t0000580A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        let other = "eth1\t0000590A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        let own = ["127.0.0.1", "::1", "10.89.0.7", "10.88.0.5"]
            .map(|ip| ip.parse().expect("an address"));
        let interface = Interface::find(&format!("{head}{other}{default}{subnet}"), &own);
        let expected = Interface {
            address: Ipv4Addr::new(10, 88, 0, 5),
            prefix_len: 16,
            gateway: Ipv4Addr::new(10, 88, 0, 1),
        };
        assert_eq!(interface, Some(expected));
        assert_eq!(Interface::find(&format!("{head}{subnet}"), &own), None);
        assert_eq!(Interface::find(&format!("{head}{default}"), &own), None);
    }
}
