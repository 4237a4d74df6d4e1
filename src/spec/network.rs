//! The spec's `network`.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use super::json::{Node, Object};

/// A passt network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// passt's Unix stream socket.
    pub passt_socket_path: PathBuf,
    /// The guest's address.
    pub ip_address: Ipv4Addr,
    /// The gateway's address.
    pub gateway: Ipv4Addr,
    /// Length of the subnet prefix in bits.
    pub prefix_len: u8,
    /// The guest interface's hardware address.
    pub mac_address: [u8; 6],
    /// Name servers.
    pub dns_servers: Vec<Ipv4Addr>,
    /// A descriptor that mote was started with: a stream of frames like passt's (§1.8).
    pub socket_fd: Option<i32>,
    /// The other end of `socket_fd`, for a shim that puts a switch of its own between that and passt.
    pub proxy_fd: Option<i32>,
    /// Directory in which the switches of one network find each other.
    pub bridge_socket_dir: Option<PathBuf>,
    /// The runtime's file of networks, with their egress rules.
    pub networks_json: Option<PathBuf>,
    /// This network's name there.
    pub network_name: Option<String>,
    /// Whether mote stays in its network namespace, in which others look for the box.
    pub joinable: bool,
}

pub(super) fn read(node: &Node<'_>) -> Option<Network> {
    /// For an address that could not be read.
    const NO_ADDRESS: Ipv4Addr = Ipv4Addr::UNSPECIFIED;
    let mut o = node.object()?;
    let network = Network {
        passt_socket_path: read_passt_socket(&mut o).unwrap_or_default(),
        ip_address: o.required("ip_address", "an IPv4 address", ipv4).unwrap_or(NO_ADDRESS),
        gateway: o.required("gateway", "an IPv4 address", ipv4).unwrap_or(NO_ADDRESS),
        prefix_len: o
            .required("prefix_len", "the subnet's prefix length", Node::integer)
            .unwrap_or_default(),
        mac_address: o.required("mac_address", "an array of 6 numbers", mac).unwrap_or_default(),
        dns_servers: o.optional("dns_servers", |n| n.array(ipv4, || NO_ADDRESS)),
        socket_fd: o.nullable("net_socket_fd", Node::integer),
        proxy_fd: o.nullable("net_proxy_fd", Node::integer),
        bridge_socket_dir: o.nullable("bridge_socket_dir", path),
        networks_json: o.nullable("networks_json", path),
        network_name: o.nullable("network_name", Node::string),
        joinable: o.nullable("joinable", Node::boolean).unwrap_or_default(),
    };
    o.refuse("net_stats_path");
    o.finish();
    Some(network)
}

/// `passt_socket_path`, or `net_socket_path` as later versions call it.
fn read_passt_socket(o: &mut Object<'_>) -> Option<PathBuf> {
    let later = o.member("net_socket_path");
    match (o.member("passt_socket_path"), later) {
        (Some(_), Some(later)) => {
            later.error("is the later name of passt_socket_path, which is given too; keep one");
            o.unread("passt_socket_path")
        }
        (Some(node), None) => node.read(path),
        (None, Some(node)) => path(&node).or_else(|| o.unread("passt_socket_path")),
        (None, None) => o.required("passt_socket_path", "passt's socket path", path),
    }
}

fn ipv4(node: &Node<'_>) -> Option<Ipv4Addr> {
    let text = node.string()?;
    text.parse().ok().or_else(|| {
        node.error(format!("is \"{text}\", must be an IPv4 address like \"10.88.0.2\""));
        None
    })
}

fn mac(node: &Node<'_>) -> Option<[u8; 6]> {
    let bytes: Vec<Option<u8>> = node.items()?.iter().map(Node::integer).collect();
    let bytes: Vec<u8> = bytes.into_iter().collect::<Option<_>>()?;
    let count = bytes.len();
    bytes.try_into().ok().or_else(|| {
        node.error(format!("has {count} numbers, must have 6, each from 0 to 255"));
        None
    })
}

fn path(node: &Node<'_>) -> Option<PathBuf> {
    node.string().map(PathBuf::from)
}
