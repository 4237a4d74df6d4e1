//! How a box reaches the network: by one of its own, by the host's sockets, or not at all.

use std::fs;
use std::path::Path;

use super::egress;
use super::name_servers;
use super::network::{Network, PasstSocket, check_variables};
use super::networks_file;
use super::ports::{PublishedPort, has_udp};
use super::switch::Switch;
use crate::confine::NetworkAccess;
use crate::policy::Policy;
use crate::policy::rules::Rules;
use crate::spec::Spec;
use crate::spec::json::Report;
use crate::sys::container;

/// How the box reaches the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Networking {
    /// It has a network of its own.
    Own(Network),
    /// mote makes its connections with sockets of the host (TSI), as far as the policy lets it.
    Hosts(Policy),
    /// It has no network but loopback.
    None,
}

impl Networking {
    /// Checks the spec's network, egress rules, and the variables that describe the network to a guest init.
    /// Adds what is wrong to `report`. `host` is the host's resolv.conf.
    pub(super) fn new(spec: &Spec, host: &str, report: &mut Report) -> Networking {
        check_variables(spec, report);
        check_sharing(spec, report);
        let egress = spec.egress.as_deref();
        let Some(network) = &spec.network else {
            let rules = egress::plan(egress, None, report);
            if !spec.disable_tsi {
                let policy = Policy::of_host(host, rules);
                return Networking::Hosts(policy.sharing_loopback(spec.shares_loopback));
            }
            for (field, is_given) in
                [("port_map", !spec.port_map.is_empty()), ("egress", egress.is_some())]
            {
                if is_given {
                    report.error(field, "needs a network, which disable_tsi denies the box; leave out one of the two");
                }
            }
            return Networking::None;
        };
        let servers = name_servers::of_own_network(spec, network);
        let rules = match networks_file::plan(network, &servers, report) {
            Some(_) if egress.is_some() => {
                report.error("egress", "is given with network.networks_json, whose network has rules of its own; keep one");
                Rules::default()
            }
            Some(rules) => rules,
            None => egress::plan(egress, Some(network.gateway), report),
        };
        let policy = Policy::of_own_network(network.gateway, &servers, rules);
        Networking::Own(Network::new(network, policy, report))
    }

    /// The box's own network, if it has one.
    pub fn own(&self) -> Option<&Network> {
        match self {
            Networking::Own(network) => Some(network),
            Networking::Hosts(_) | Networking::None => None,
        }
    }

    /// Where the box may connect to; `None` is nowhere.
    pub fn policy(&self) -> Option<&Policy> {
        match self {
            Networking::Own(Network { policy, .. }) | Networking::Hosts(policy) => Some(policy),
            Networking::None => None,
        }
    }

    /// The path to connect to when the connection to passt is lost; `None` if that cannot be made again.
    pub fn passt_socket(&self) -> Option<&Path> {
        match &self.own()?.passt {
            PasstSocket::Path(path) => Some(path),
            PasstSocket::Inherited(_) => None,
        }
    }

    /// The way to the other boxes of the box's network, if there is one.
    pub fn switch(&self) -> Option<&Switch> {
        self.own()?.switch.as_ref()
    }

    /// What mote itself uses of the host's network while it runs the guest, which has these ports.
    pub fn access(&self, ports: &[PublishedPort]) -> NetworkAccess {
        NetworkAccess {
            connects: matches!(self, Networking::Hosts(_)),
            answers: has_udp(ports),
            stays: self.own().is_some_and(|network| network.joinable),
        }
    }
}

/// Checks what the box shares with the network namespace that mote is in.
fn check_sharing(spec: &Spec, report: &mut Report) {
    for (field, is_asked) in
        [("publish", spec.publish_listeners), ("loopback", spec.shares_loopback)]
    {
        if is_asked && (spec.network.is_some() || spec.disable_tsi) {
            report.error(
                field,
                "is about a box that uses the sockets of mote's network namespace, and this one does not; leave out network and disable_tsi, or this",
            );
        }
    }
    if spec.shares_loopback {
        check_namespace(report);
    }
    if spec.publish_listeners && spec.port_map.iter().any(|port| port.ends_with("/udp")) {
        report.error("publish", "is \"listeners\", which does not go with UDP ports in port_map; leave out one of the two");
    }
}

/// Checks that the network namespace which mote is in, and shares with the box, is not the host's own.
fn check_namespace(report: &mut Report) {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let (of_host, own) = (namespace("1"), namespace("self"));
    if of_host.is_some() && of_host == own {
        report.error(
            "loopback",
            "is \"netns\", but mote runs in the host's own network namespace, whose loopback is no box's; start mote in another (ip netns exec)",
        );
    } else if of_host.is_none() && !container::network_is_of_a_user().unwrap_or_default() {
        report.error(
            "loopback",
            "is \"netns\", and this user may not look at /proc/1/ns/net to see that mote is not in the host's own; run mote as root, or in a network namespace of a user's (unshare --user --net), or leave it out",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::testing;

    #[test]
    fn a_box_without_any_network_has_nothing_of_one() {
        let plan = testing::plan(|spec| spec.disable_tsi = true).expect("a plan");
        assert_eq!(plan.networking, Networking::None);
        assert!(plan.to_string().contains("\nnetwork    none but loopback\n"));
        let errors = testing::errors(|spec| {
            spec.disable_tsi = true;
            spec.port_map = vec!["80:80".into()];
            spec.egress = Some(vec!["allow".into()]);
        });
        assert!(errors[0].starts_with("port_map: needs a network"), "{errors:?}");
        assert!(errors[1].starts_with("egress: needs a network"), "{errors:?}");
    }
}
