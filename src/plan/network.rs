//! The spec's `network`, checked: the interface, and the socket of passt.

use std::fmt;
use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::RawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use mote_agent::instance::Interface;

use super::paths::{MAX_SOCKET_PATH, parent_problem};
use super::switch::{self, Switch};
use crate::policy::Policy;
use crate::spec::json::Report;
use crate::spec::{self, Spec};
use crate::sys;

/// Prefix lengths of subnets with room for a host and a gateway. In a /31 both addresses can be hosts
/// (RFC 3021); a /32 has no room for a gateway.
const PREFIX_LEN: std::ops::RangeInclusive<u8> = 1..=31;

/// A network of the box's own: one interface, on passt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// How to reach passt.
    pub passt: PasstSocket,
    /// The interface's hardware address.
    pub mac_address: [u8; 6],
    /// What the agent sets on the interface.
    pub interface: Interface,
    /// Which frames may go out.
    pub policy: Policy,
    /// The way to the other boxes of the network, if there is one.
    pub switch: Option<Switch>,
    /// Whether mote stays in its network namespace.
    pub joinable: bool,
}

/// How to reach passt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PasstSocket {
    /// The Unix socket that passt listens on.
    Path(PathBuf),
    /// A connected socket that mote was started with.
    Inherited(RawFd),
}

impl Network {
    /// Checks the spec's network.
    pub(super) fn new(network: &spec::Network, policy: Policy, report: &mut Report) -> Network {
        let mac = network.mac_address;
        if mac[0] & 1 != 0 {
            report.error(
                "network.mac_address",
                format!("is {}, a multicast address; make the first number even", Mac(mac)),
            );
        } else if mac == [0; 6] {
            report.error(
                "network.mac_address",
                "is all zeros, which is no address; use [2, 66] and the four numbers of ip_address",
            );
        }
        let interface = check_addresses(network, report);
        for (index, server) in network.dns_servers.iter().enumerate() {
            check_server(*server, &format!("network.dns_servers[{index}]"), report);
        }
        let passt = plan_passt(network, report);
        let switch = switch::plan(network, report);
        Network { passt, mac_address: mac, interface, policy, switch, joinable: network.joinable }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Interface { address, prefix_len, gateway } = self.interface;
        write!(f, "{address}/{prefix_len} via {gateway}, {}, ", Mac(self.mac_address))?;
        match &self.passt {
            PasstSocket::Path(path) => write!(f, "passt at {}", path.display()),
            PasstSocket::Inherited(fd) => write!(f, "passt on descriptor {fd}"),
        }?;
        match &self.switch {
            Some(switch) => write!(f, ", other boxes at {}", switch.directory.display()),
            None => Ok(()),
        }
    }
}

struct Mac([u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Without `net_proxy_fd`, `net_socket_fd` is connected to passt. With it, the two are the ends of one
/// socket pair: the reference's shim serves the other end with its switch, and connects to passt at the path.
/// mote's device needs no pair between itself and its switch, and connects to passt itself.
fn plan_passt(network: &spec::Network, report: &mut Report) -> PasstSocket {
    for (field, fd) in
        [("network.net_socket_fd", network.socket_fd), ("network.net_proxy_fd", network.proxy_fd)]
    {
        // The first three are the standard streams, never a network.
        if let Some(fd) = fd.filter(|fd| *fd < 3 || !sys::socket::is_unix_stream(*fd)) {
            report.error(
                field,
                format!("is {fd}, which is no Unix stream socket that mote was started with"),
            );
        }
    }
    if let (Some(fd), None) = (network.socket_fd, network.proxy_fd) {
        return PasstSocket::Inherited(fd);
    }
    let path = &network.passt_socket_path;
    if let Some(problem) = path_problem(path) {
        report.error("network.passt_socket_path", problem);
    }
    PasstSocket::Path(path.clone())
}

fn path_problem(path: &Path) -> Option<String> {
    let len = path.as_os_str().len();
    match fs::symlink_metadata(path).and_then(|_| fs::metadata(path)) {
        _ if len == 0 => Some("is empty, must be passt's socket".into()),
        _ if len > MAX_SOCKET_PATH => Some(format!(
            "has {len} bytes, a Unix socket's path can have {MAX_SOCKET_PATH}; use a shorter directory"
        )),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            Some(format!("{} is not a socket; name the one passt listens on", path.display()))
        }
        // It may not exist yet: passt may start a little later.
        _ => parent_problem(path),
    }
}

fn check_addresses(network: &spec::Network, report: &mut Report) -> Interface {
    let spec::Network { ip_address: address, gateway, prefix_len, .. } = *network;
    let interface = Interface { address, prefix_len, gateway };
    let fields = [("network.ip_address", address), ("network.gateway", gateway)];
    for (field, address) in fields {
        if let Some(kind) = special(address) {
            report.error(field, format!("is {address}, {kind}, which no host can have"));
        }
    }
    if !PREFIX_LEN.contains(&prefix_len) {
        let (min, max) = (PREFIX_LEN.start(), PREFIX_LEN.end());
        report.error(
            "network.prefix_len",
            format!("is {prefix_len}, must be from {min} to {max}, for an address and a gateway"),
        );
        return interface;
    }
    let mask = u32::MAX << (32 - prefix_len);
    // In a /31 every address is a host's.
    let of_hosts = fields.into_iter().filter(|(_, a)| prefix_len < 31 && special(*a).is_none());
    for (field, address) in of_hosts {
        let host = address.to_bits() & !mask;
        if host == 0 {
            report.error(
                field,
                format!("is {address}, the name of the subnet {address}/{prefix_len} itself"),
            );
        } else if host == !mask {
            report.error(field, format!("is {address}, the broadcast address of its subnet"));
        }
    }
    let subnet = Ipv4Addr::from_bits(address.to_bits() & mask);
    if !report.has_read("network.ip_address") {
        return interface;
    }
    if gateway.to_bits() & mask != subnet.to_bits() {
        report.error(
            "network.gateway",
            format!("is {gateway}, which is not in the subnet {subnet}/{prefix_len} of ip_address"),
        );
    } else if gateway == address {
        report.error("network.gateway", format!("is {gateway}, the box's own ip_address"));
    }
    interface
}

/// What kind of address this is, if no host can have it.
fn special(address: Ipv4Addr) -> Option<&'static str> {
    match address.octets()[0] {
        0 => Some("an address of \"this network\""),
        127 => Some("a loopback address"),
        224..=239 => Some("a multicast address"),
        240.. => Some("a reserved address"),
        _ => None,
    }
}

fn check_server(server: Ipv4Addr, field: &str, report: &mut Report) {
    match special(server) {
        Some(_) if server.is_loopback() => report.warn(
            field,
            format!("{server} is the box itself: only a name server that runs in it answers there"),
        ),
        Some(kind) => report.error(field, format!("is {server}, {kind}, where no name server is")),
        None => {}
    }
}

/// A variable that is set and not empty: its path in the spec, and its value.
fn variable<'a>(spec: &'a Spec, name: &str) -> Option<(String, &'a str)> {
    let index = spec.entrypoint.variable(name)?;
    let value = spec.entrypoint.env[index].1.as_str();
    (!value.is_empty()).then(|| (format!("entrypoint.env[{index}]"), value))
}

/// Checks that the variables for the guest init say the same as `network`: the runtime sets both, and an
/// init that runs as given uses the variables.
pub(super) fn check_variables(spec: &Spec, report: &mut Report) {
    let network = spec.network.as_ref();
    let address = network.map(|n| format!("{}/{}", n.ip_address, n.prefix_len));
    for (name, fields, stated) in [
        ("A3S_NET_IP", &["network.ip_address", "network.prefix_len"][..], address),
        ("A3S_NET_GATEWAY", &["network.gateway"], network.map(|n| n.gateway.to_string())),
        ("A3S_NET_DNS", &["network.dns_servers"], network.map(|n| comma_list(&n.dns_servers))),
    ] {
        let are_read = fields.iter().all(|field| report.has_read(field));
        let Some((place, value)) = variable(spec, name).filter(|_| are_read) else { continue };
        match stated {
            None if name == "A3S_NET_IP" => report.error(
                place,
                format!("{name} gives the box an address, but network is null; set network or leave the variable out"),
            ),
            None => report.warn(place, format!("{name} has no effect without network")),
            // No servers in `network`: the variable's are used.
            Some(stated) if stated.is_empty() => {
                for server in value.split(',') {
                    match server.trim().parse() {
                        Ok(server) => check_server(server, &place, report),
                        Err(_) => report.error(
                            &place,
                            format!("{name} has \"{server}\", must be IPv4 addresses and commas"),
                        ),
                    }
                }
            }
            Some(stated) if stated != value.replace(' ', "") => report.error(
                place,
                format!("{name} is \"{value}\", but network says {stated}; make them the same"),
            ),
            Some(_) => {}
        }
    }
}

fn comma_list(servers: &[Ipv4Addr]) -> String {
    servers.iter().map(Ipv4Addr::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Networking;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    const SERVER: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);

    /// Plans with a change to a good network; what the report says.
    fn plan(change: impl FnOnce(&mut Spec)) -> (Option<Network>, Vec<String>, Vec<String>) {
        let text = r#"{"box_id":"b","vcpus":1,"memory_mib":256,"rootfs_path":"/",
            "exec_socket_path":"","fs_mounts":[],"workdir":"/",
            "entrypoint":{"executable":"/bin/true","args":[],"env":[]},
            "network":{"passt_socket_path":"/tmp/passt.sock","ip_address":"10.88.0.2",
                "gateway":"10.88.0.1","prefix_len":24,"mac_address":[2,66,10,88,0,2]}}"#;
        let mut report = Report::default();
        let mut spec = Spec::parse(text, &mut report).expect("a spec");
        change(&mut spec);
        let network = Networking::new(&spec, "", &mut report).own().cloned();
        let texts =
            |faults: &[crate::spec::json::Fault]| faults.iter().map(|f| f.to_string()).collect();
        (network, texts(&report.errors), texts(&report.warnings))
    }

    fn network(spec: &mut Spec) -> &mut spec::Network {
        spec.network.as_mut().expect("a network")
    }

    fn set(spec: &mut Spec, name: &str, value: &str) {
        spec.entrypoint.env.push((name.into(), value.into()));
    }

    #[test]
    fn a_good_network_is_planned() {
        let (network, errors, warnings) = plan(|_| ());
        assert_eq!((errors, warnings), (vec![], vec![]));
        assert_eq!(
            network.expect("a network").to_string(),
            "10.88.0.2/24 via 10.88.0.1, 02:42:0a:58:00:02, passt at /tmp/passt.sock"
        );
    }

    #[test]
    fn addresses_that_cannot_be_are_named() {
        for (address, gateway, prefix_len, expected) in [
            (
                "10.88.0.2",
                "10.88.1.1",
                24,
                Some("gateway: is 10.88.1.1, which is not in the subnet 10.88.0.0/24"),
            ),
            ("10.88.0.2", "10.88.1.1", 16, None),
            ("10.88.0.2", "10.88.0.2", 24, Some("gateway: is 10.88.0.2, the box's own ip_address")),
            (
                "10.88.0.0",
                "10.88.0.1",
                24,
                Some("ip_address: is 10.88.0.0, the name of the subnet"),
            ),
            ("10.88.0.255", "10.88.0.1", 24, Some("ip_address: is 10.88.0.255, the broadcast")),
            ("10.88.0.2", "10.88.0.255", 24, Some("gateway: is 10.88.0.255, the broadcast")),
            ("10.88.0.2", "10.88.0.3", 31, None),
            (
                "10.88.0.2",
                "10.88.0.1",
                31,
                Some("gateway: is 10.88.0.1, which is not in the subnet"),
            ),
            ("10.88.0.2", "10.88.0.1", 32, Some("prefix_len: is 32, must be from 1 to 31")),
            ("10.88.0.2", "10.88.0.1", 0, Some("prefix_len: is 0, must be from 1 to 31")),
            ("10.88.0.2", "10.88.0.1", 255, Some("prefix_len: is 255, must be from 1 to 31")),
            ("127.0.0.2", "127.0.0.1", 8, Some("ip_address: is 127.0.0.2, a loopback address")),
            ("224.0.0.2", "224.0.0.1", 24, Some("ip_address: is 224.0.0.2, a multicast address")),
            ("0.0.0.2", "0.0.0.1", 24, Some("ip_address: is 0.0.0.2, an address of")),
            (
                "255.255.255.255",
                "10.88.0.1",
                24,
                Some("ip_address: is 255.255.255.255, a reserved"),
            ),
        ] {
            let (_, errors, _) = plan(|spec| {
                let network = network(spec);
                network.ip_address = address.parse().expect("an address");
                network.gateway = gateway.parse().expect("an address");
                network.prefix_len = prefix_len;
            });
            match expected {
                Some(start) => {
                    let start = format!("network.{start}");
                    assert!(errors.iter().any(|e| e.starts_with(&start)), "{start}: {errors:?}");
                }
                None => assert_eq!(errors, Vec::<String>::new()),
            }
        }
    }

    #[test]
    fn hardware_addresses_of_no_single_device_are_refused() {
        for (mac, expected) in [
            ([1, 0, 0, 0, 0, 1], "is 01:00:00:00:00:01, a multicast address"),
            ([255; 6], "is ff:ff:ff:ff:ff:ff, a multicast address"),
            ([0; 6], "is all zeros"),
        ] {
            let (_, errors, _) = plan(|spec| network(spec).mac_address = mac);
            assert!(
                errors[0].starts_with(&format!("network.mac_address: {expected}")),
                "{errors:?}"
            );
        }
    }

    #[test]
    fn ways_to_passt_are_checked() {
        let long = format!("/tmp/{}", "s".repeat(103));
        for (path, expected) in [
            ("", "is empty"),
            (long.as_str(), "has 108 bytes"),
            ("/etc/passwd", "/etc/passwd is not a socket"),
            ("/no/such/s", "its directory /no/such does not exist"),
        ] {
            let (_, errors, _) = plan(|spec| network(spec).passt_socket_path = path.into());
            let expected = format!("network.passt_socket_path: {expected}");
            assert!(errors[0].starts_with(&expected), "{errors:?}");
        }
        for fd in [-1, 0, 1 << 20] {
            let (_, errors, _) = plan(|spec| network(spec).socket_fd = Some(fd));
            assert!(errors[0].starts_with("network.net_socket_fd: is "), "{errors:?}");
        }
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let (ours, theirs) = (ours.as_raw_fd(), theirs.as_raw_fd());
        let (planned, errors, _) = plan(|spec| {
            network(spec).socket_fd = Some(ours);
            network(spec).passt_socket_path = "".into();
        });
        assert_eq!(errors, Vec::<String>::new());
        assert_eq!(planned.expect("a network").passt, PasstSocket::Inherited(ours));
        let (planned, errors, warnings) = plan(|spec| {
            let network = network(spec);
            (network.socket_fd, network.proxy_fd) = (Some(ours), Some(theirs));
            network.bridge_socket_dir = Some("/tmp".into());
        });
        assert_eq!((errors, warnings), (vec![], vec![]));
        let planned = planned.expect("a network");
        assert_eq!(planned.passt, PasstSocket::Path("/tmp/passt.sock".into()));
        assert!(planned.to_string().ends_with(", other boxes at /tmp"), "{planned}");
        let switch = planned.switch.expect("a switch");
        assert_eq!(switch.socket, Path::new("/tmp/02-42-0a-58-00-02.sock"));
    }

    #[test]
    fn directories_where_no_boxes_can_meet_are_refused() {
        for (directory, expected) in [
            ("", Some("is empty, must be a host directory")),
            ("/etc/passwd", Some("/etc/passwd is not a directory; name one")),
            (&format!("/tmp/{}", "d".repeat(80)), Some("/tmp/ddd")),
            ("/tmp/not/there/yet", None),
        ] {
            let (_, errors, _) =
                plan(|spec| network(spec).bridge_socket_dir = Some(directory.into()));
            let start = expected.map(|expected| format!("network.bridge_socket_dir: {expected}"));
            assert!(errors.len() == usize::from(expected.is_some()), "{errors:?}");
            assert!(errors.iter().zip(&start).all(|(e, s)| e.starts_with(s)), "{errors:?}");
        }
    }

    #[test]
    fn variables_must_say_the_same() {
        let (_, errors, warnings) = plan(|spec| {
            network(spec).dns_servers = vec![SERVER, Ipv4Addr::new(1, 1, 1, 1)];
            set(spec, "A3S_NET_IP", "10.88.0.2/24");
            set(spec, "A3S_NET_GATEWAY", "10.88.0.1");
            set(spec, "A3S_NET_DNS", "8.8.8.8, 1.1.1.1");
        });
        assert_eq!((errors, warnings), (vec![], vec![]));
        let (_, errors, _) = plan(|spec| {
            set(spec, "A3S_NET_IP", "10.88.0.3/24");
            set(spec, "A3S_NET_GATEWAY", "10.88.0.9");
            set(spec, "A3S_NET_DNS", "8.8.8.8,here");
        });
        for (error, start) in errors.iter().zip([
            "entrypoint.env[0]: A3S_NET_IP is \"10.88.0.3/24\", but network says 10.88.0.2/24",
            "entrypoint.env[1]: A3S_NET_GATEWAY is \"10.88.0.9\", but",
            "entrypoint.env[2]: A3S_NET_DNS has \"here\"",
        ]) {
            assert!(error.starts_with(start), "{error}");
        }
        assert_eq!(errors.len(), 3);
        let (network, errors, warnings) = plan(|spec| {
            spec.network = None;
            set(spec, "A3S_NET_IP", "10.88.0.3/24");
            set(spec, "A3S_NET_DNS", "8.8.8.8");
        });
        assert_eq!(network, None);
        assert!(errors[0].contains("but network is null"), "{errors:?}");
        assert!(warnings[0].ends_with("A3S_NET_DNS has no effect without network"), "{warnings:?}");
    }

    #[test]
    fn name_servers_that_cannot_be_are_named() {
        for (server, is_error) in [([0; 4], true), ([224, 0, 0, 1], true), ([127, 0, 0, 53], false)]
        {
            let (_, errors, warnings) =
                plan(|spec| network(spec).dns_servers = vec![SERVER, server.into()]);
            let faults = if is_error { &errors } else { &warnings };
            assert!(faults[0].starts_with("network.dns_servers[1]: "), "{errors:?} {warnings:?}");
            assert_eq!(errors.len() + warnings.len(), 1);
        }
    }
}
