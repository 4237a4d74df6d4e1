//! The box's name servers, as the agent gets them.

use std::net::Ipv4Addr;

use mote_agent::instance::ResolvConf;

use crate::resolv_conf;
use crate::spec::{self, Spec};

/// Name server of a box with a network of its own that names none (contract §7.2 step 4).
const DEFAULT_SERVER: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);
/// Lines for a box without a network of its own, on a host without name servers (contract §2.7).
const DEFAULT_LINES: &str = "nameserver 8.8.8.8\nnameserver 8.8.4.4\n";

/// The box's name servers (contract §2.7, §7.2 step 4). A box with a network of its own gets those that
/// the spec names for it; any other keeps those that the runtime wrote into the image, or gets those of the
/// host, whose resolv.conf is `host`.
pub(super) fn plan(spec: &Spec, host: &str) -> ResolvConf {
    let Some(network) = &spec.network else {
        return ResolvConf::IfUnserved(nameserver_lines(host));
    };
    let servers = of_own_network(spec, network);
    ResolvConf::Always(servers.iter().map(|server| format!("nameserver {server}\n")).collect())
}

/// The name servers of a box with a network of its own.
pub(super) fn of_own_network(spec: &Spec, network: &spec::Network) -> Vec<Ipv4Addr> {
    let given = spec.entrypoint.variable("A3S_NET_DNS");
    let given = given.map_or("", |index| &spec.entrypoint.env[index].1);
    let given = given.split(',').filter_map(|server| server.trim().parse::<Ipv4Addr>().ok());
    let mut servers = network.dns_servers.clone();
    if servers.is_empty() {
        servers.extend(given);
    }
    if servers.is_empty() {
        servers.push(DEFAULT_SERVER);
    }
    servers
}

/// The lines of a resolv.conf(5) that name servers, or the default ones.
fn nameserver_lines(text: &str) -> String {
    let servers = resolv_conf::name_servers(text);
    let lines: String = servers.map(|server| format!("nameserver {server}\n")).collect();
    if lines.is_empty() { DEFAULT_LINES.into() } else { lines }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::testing::spec;
    use crate::spec::Network;

    /// The name servers of a box whose own network names these, and with this variable.
    fn own(dns_servers: &[Ipv4Addr], variable: Option<&str>) -> ResolvConf {
        let mut spec = spec();
        let [address, gateway] = [2, 1].map(|host| Ipv4Addr::new(10, 88, 0, host));
        spec.network = Some(Network {
            passt_socket_path: "/tmp/passt.sock".into(),
            ip_address: address,
            gateway,
            prefix_len: 24,
            mac_address: [2, 66, 10, 88, 0, 2],
            dns_servers: dns_servers.to_vec(),
            socket_fd: None,
            proxy_fd: None,
            bridge_socket_dir: None,
            networks_json: None,
            network_name: None,
            joinable: false,
        });
        let variable = variable.map(|value| ("A3S_NET_DNS".to_owned(), value.to_owned()));
        spec.entrypoint.env.extend(variable);
        plan(&spec, "")
    }

    #[test]
    fn name_servers_follow_the_contract() {
        let always = |text: &str| ResolvConf::Always(text.into());
        assert_eq!(own(&[], None), always("nameserver 8.8.8.8\n"));
        assert_eq!(
            own(&[], Some("1.1.1.1,9.9.9.9")),
            always("nameserver 1.1.1.1\nnameserver 9.9.9.9\n")
        );
        assert_eq!(own(&[Ipv4Addr::new(9, 9, 9, 9)], None), always("nameserver 9.9.9.9\n"));
        assert!(matches!(plan(&spec(), ""), ResolvConf::IfUnserved(_)));
        let host =
            "search x\nnameserver 127.0.0.53\n#nameserver 1.1.1.1\nnameserver\tfe80::1%eth0 \n";
        assert_eq!(nameserver_lines(host), "nameserver 127.0.0.53\nnameserver fe80::1%eth0\n");
        assert_eq!(nameserver_lines("search x\n"), DEFAULT_LINES);
    }
}
