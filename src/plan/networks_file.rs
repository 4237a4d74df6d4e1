//! The runtime's file of networks (`networks.json`, contract §1.8): its egress rules for one network, and what it
//! denies beside them.

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;

use mote_agent::flow::Protocol;
use serde_json::Value;

use crate::policy::DNS_PORT;
use crate::policy::rules::{Action, Cidr, Rule, Rules};
use crate::spec::Network;
use crate::spec::json::Report;

/// Where a box may not go unless a rule says so: the runtime's profile for what is not trusted. The box's own subnet is
/// excepted.
const DENIED: [(Ipv4Addr, u8); 6] = [
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
];

/// The rules of a network with these name servers, if it names the file: those of the file, then what the runtime denies to all
/// boxes. As in the runtime, a file or a network that is not there has no rules of its own, and what cannot be read
/// is an error.
pub(super) fn plan(network: &Network, servers: &[Ipv4Addr], report: &mut Report) -> Option<Rules> {
    let path = network.networks_json.as_ref()?;
    let Some(name) = &network.network_name else {
        report.error(
            "network.networks_json",
            "is given without network_name; name the network whose rules count",
        );
        return None;
    };
    let of_file = match fs::read_to_string(path) {
        Ok(text) => rules_of(&text, name),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(format!("cannot be read: {error}")),
    };
    match of_file {
        Ok(of_file) => Some(Rules {
            rules: [of_file, profile(network, servers)].concat(),
            default: Action::Allow,
        }),
        Err(problem) => {
            report.error("network.networks_json", format!("{} {problem}", path.display()));
            None
        }
    }
}

/// The rules of the network of this name.
fn rules_of(text: &str, name: &str) -> Result<Vec<Rule>, String> {
    let file: Value =
        serde_json::from_str(text).map_err(|error| format!("is not JSON: {error}"))?;
    let networks = file.get("networks").and_then(Value::as_object);
    let Some(network) = networks.ok_or("has no object \"networks\"")?.get(name) else {
        return Ok(Vec::new());
    };
    let Some(rules) = network.get("egress") else { return Ok(Vec::new()) };
    let rules = rules.as_array().ok_or_else(|| format!("has no array networks.{name}.egress"))?;
    let numbered = rules.iter().enumerate();
    let rules = numbered.map(|(index, rule)| {
        rule_of(rule).map_err(|problem| format!("has in networks.{name}.egress[{index}] {problem}"))
    });
    Ok(rules.collect::<Result<Vec<_>, String>>()?.concat())
}

/// One rule of the file: more than one of mote's, if it is about both families or for a port of both protocols.
fn rule_of(rule: &Value) -> Result<Vec<Rule>, String> {
    const KNOWN: [&str; 4] = ["action", "cidr", "protocol", "port"];
    let members = rule.as_object().ok_or_else(|| format!("{rule}, which is no rule"))?;
    if let Some(other) = members.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        return Err(format!("a member \"{other}\", which mote does not know"));
    }
    let member = |name: &str| members.get(name).filter(|value| !value.is_null());
    let action = match member("action").and_then(Value::as_str) {
        Some("allow") => Action::Allow,
        Some("deny") => Action::Deny,
        _ => return Err("no action \"allow\" or \"deny\"".into()),
    };
    let to = match member("cidr") {
        None => {
            vec![everything(Ipv4Addr::UNSPECIFIED.into()), everything(Ipv6Addr::UNSPECIFIED.into())]
        }
        Some(text) => {
            vec![cidr_of(text).ok_or_else(|| format!("the cidr {text}, which is no IPv4 prefix"))?]
        }
    };
    let port = match member("port") {
        None => None,
        Some(port) => {
            let number = port.as_u64().and_then(|port| NonZeroU16::new(port.try_into().ok()?));
            Some(number.ok_or_else(|| format!("the port {port}, must be from 1 to 65535"))?)
        }
    };
    let by = match (member("protocol").map_or(Some("any"), Value::as_str), port) {
        (Some("any"), None) => vec![None],
        (Some("any"), port) => [Protocol::Tcp, Protocol::Udp].map(|by| Some((by, port))).to_vec(),
        (Some("tcp"), port) => vec![Some((Protocol::Tcp, port))],
        (Some("udp"), port) => vec![Some((Protocol::Udp, port))],
        _ => return Err("a protocol that is not \"any\", \"tcp\" or \"udp\"".into()),
    };
    let rules = to.iter().flat_map(|to| by.iter().map(|by| Rule { action, to: *to, by: *by }));
    Ok(rules.collect())
}

fn cidr_of(text: &Value) -> Option<Cidr> {
    let (ip, len) = text.as_str()?.split_once('/')?;
    let (ip, len): (Ipv4Addr, u8) = (ip.parse().ok()?, len.parse().ok()?);
    (len <= 32).then(|| Cidr::new(ip.into(), len))
}

fn everything(unspecified: IpAddr) -> Cidr {
    Cidr::new(unspecified, 0)
}

/// What follows the file's rules: the box's name servers and its subnet are reached, and of the rest what is not
/// private; nothing by IPv6.
fn profile(network: &Network, servers: &[Ipv4Addr]) -> Vec<Rule> {
    let rule = |action, to, by| Rule { action, to, by };
    let dns = NonZeroU16::new(DNS_PORT);
    let servers = servers.iter().flat_map(|server| {
        let to = Cidr::new((*server).into(), 32);
        [Protocol::Tcp, Protocol::Udp].map(|by| rule(Action::Allow, to, Some((by, dns))))
    });
    let subnet = Cidr::new(network.ip_address.into(), network.prefix_len);
    let denied = DENIED.into_iter().map(|(first, len)| Cidr::new(first.into(), len));
    let denied = denied.chain([everything(Ipv6Addr::UNSPECIFIED.into())]);
    servers
        .chain([rule(Action::Allow, subnet, None)])
        .chain(denied.map(|to| rule(Action::Deny, to, None)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(file: Option<&str>, name: Option<&str>) -> (String, Vec<String>) {
        let path = std::env::temp_dir().join(format!("mote-networks-{}.json", std::process::id()));
        let _ = fs::remove_file(&path);
        if let Some(text) = file {
            fs::write(&path, text).expect("file");
        }
        let network = Network {
            passt_socket_path: "/tmp/passt.sock".into(),
            ip_address: [10, 88, 0, 2].into(),
            gateway: [10, 88, 0, 1].into(),
            prefix_len: 24,
            mac_address: [2, 66, 10, 88, 0, 2],
            dns_servers: vec![[192, 168, 1, 1].into()],
            socket_fd: None,
            proxy_fd: None,
            bridge_socket_dir: None,
            networks_json: Some(path.clone()),
            network_name: name.map(Into::into),
            joinable: false,
        };
        let mut report = Report::default();
        let rules = super::plan(&network, &network.dns_servers, &mut report);
        let errors = report
            .errors
            .iter()
            .map(|error| error.to_string().replace(&path.display().to_string(), "FILE"));
        (rules.map_or_else(String::new, |rules| rules.to_string()), errors.collect())
    }

    const PROFILE: &str = "allow:192.168.1.1/32:tcp:53, allow:192.168.1.1/32:udp:53, allow:10.88.0.0/24, \
        deny:127.0.0.0/8, deny:169.254.0.0/16, deny:100.64.0.0/10, deny:10.0.0.0/8, deny:172.16.0.0/12, \
        deny:192.168.0.0/16, deny:::/0, allow";

    #[test]
    fn a_networks_rules_come_before_the_runtimes_profile() {
        assert_eq!(plan(None, Some("n")), (PROFILE.into(), vec![]));
        assert_eq!(plan(Some(r#"{"networks":{}}"#), Some("n")), (PROFILE.into(), vec![]));
        let file = r#"{"networks":{"n":{"subnet":"10.88.0.0/24","egress":[
            {"cidr":"10.1.0.0/16","protocol":"tcp","port":443,"action":"allow"},
            {"cidr":"8.8.8.8/32","protocol":"any","port":53,"action":"deny"},
            {"protocol":"any","action":"deny"}]},"o":{}}}"#;
        let rules = "allow:10.1.0.0/16:tcp:443, deny:8.8.8.8/32:tcp:53, deny:8.8.8.8/32:udp:53, \
            deny:0.0.0.0/0, deny:::/0, ";
        assert_eq!(plan(Some(file), Some("n")), (format!("{rules}{PROFILE}"), vec![]));
    }

    #[test]
    fn rules_that_cannot_be_enforced_are_errors() {
        let egress = |rule: &str| format!(r#"{{"networks":{{"n":{{"egress":[{rule}]}}}}}}"#);
        for (text, problem) in [
            ("{", "is not JSON: "),
            ("{}", "has no object \"networks\""),
            (&egress("5"), "has in networks.n.egress[0] 5, which is no rule"),
            (&egress(r#"{"action":"log"}"#), "has in networks.n.egress[0] no action"),
            (
                &egress(r#"{"action":"deny","cidr":"example.org"}"#),
                "has in networks.n.egress[0] the cidr \"example.org\", which is no IPv4 prefix",
            ),
            (
                &egress(r#"{"action":"deny","port":0}"#),
                "has in networks.n.egress[0] the port 0, must be from 1 to 65535",
            ),
            (
                &egress(r#"{"action":"deny","protocol":"icmp"}"#),
                "has in networks.n.egress[0] a protocol that",
            ),
            (
                &egress(r#"{"action":"deny","domain":"x"}"#),
                "has in networks.n.egress[0] a member \"domain\"",
            ),
        ] {
            let (_, errors) = plan(Some(text), Some("n"));
            let expected = format!("network.networks_json: FILE {problem}");
            assert!(errors[0].starts_with(&expected), "{errors:?}");
        }
        assert!(plan(None, None).1[0].starts_with("network.networks_json: is given without"));
    }
}
