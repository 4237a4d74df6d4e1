//! The published ports: ports of the host whose clients reach ports of the guest.

use std::collections::HashMap;

use mote_agent::flow::Protocol;

use crate::spec::json::Report;

/// A port of the host whose clients reach a port of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedPort {
    /// TCP or UDP, on both sides.
    pub protocol: Protocol,
    /// The host's port, not 0.
    pub host: u16,
    /// The guest's port, not 0.
    pub guest: u16,
}

/// Whether there are UDP ports among these: their answers need more of the guest and of mote.
pub(super) fn has_udp(ports: &[PublishedPort]) -> bool {
    ports.iter().any(|port| port.protocol == Protocol::Udp)
}

/// Most published ports (contract §1.6).
const MAX_PUBLISHED_PORTS: usize = 4096;

/// The spec's `port_map`, in its order.
pub(super) fn plan(port_map: &[String], report: &mut Report) -> Vec<PublishedPort> {
    if port_map.len() > MAX_PUBLISHED_PORTS {
        let len = port_map.len();
        report.error(
            "port_map",
            format!("has {len} entries, mote can publish {MAX_PUBLISHED_PORTS} ports"),
        );
        return Vec::new();
    }
    let mut ports = Vec::new();
    let (mut host_ports, mut guest_ports) = (HashMap::new(), HashMap::new());
    for (index, text) in port_map.iter().enumerate() {
        let path = format!("port_map[{index}]");
        let port = match parse_published_port(text) {
            Ok(Some(port)) => port,
            Ok(None) => {
                report.warn(
                    path,
                    format!("is \"{text}\", which names no port of the host: it is not published"),
                );
                continue;
            }
            Err(problem) => {
                report.error(path, format!("is \"{text}\", {problem}"));
                continue;
            }
        };
        for (side, number, known) in
            [("host", port.host, &mut host_ports), ("guest", port.guest, &mut guest_ports)]
        {
            let first = *known.entry((port.protocol, number)).or_insert(index);
            if first != index {
                report.error(
                    &path,
                    format!(
                        "is \"{text}\", but {side} port {number} is in port_map[{first}] already; give each entry ports of its own"
                    ),
                );
            }
        }
        ports.push(port);
    }
    ports
}

/// Parses `HOST:GUEST[/tcp|/udp]`; `None` for one with the host's port 0, which the reference passes over. The error says
/// whether the text is wrong or asks for what mote does not do.
fn parse_published_port(text: &str) -> Result<Option<PublishedPort>, String> {
    let (pair, protocol) = text.split_once('/').map_or((text, None), |(p, q)| (p, Some(q)));
    let mut from_the_end = pair.rsplitn(3, ':');
    let (guest, host) = (from_the_end.next(), from_the_end.next());
    let (Some(guest), Some(host)) = (guest, host) else {
        return Err("must be HOST:GUEST, two port numbers like \"8080:80\"".into());
    };
    let protocol = match protocol {
        None => Protocol::Tcp,
        Some(name) if name.eq_ignore_ascii_case("tcp") => Protocol::Tcp,
        Some(name) if name.eq_ignore_ascii_case("udp") => Protocol::Udp,
        Some(name) => {
            return Err(format!(
                "but only ports of tcp and udp can be published, not those of {name}"
            ));
        }
    };
    if from_the_end.next().is_some() {
        return Err(format!(
            "but a port is published on all of the host's addresses; write \"{host}:{guest}\""
        ));
    }
    let port = |text: &str| {
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err("must be HOST:GUEST, two port numbers like \"8080:80\"".into());
        }
        text.parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| format!("but {text} is not a port; those are from 1 to {}", u16::MAX))
    };
    if host == "0" {
        return port(guest).map(|_| None);
    }
    Ok(Some(PublishedPort { protocol, host: port(host)?, guest: port(guest)? }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::testing::{errors, plan};

    #[test]
    fn published_ports_are_judged_strictly() {
        let ports = |entries: &[&str]| {
            let port_map: Vec<String> = entries.iter().map(|text| (*text).to_owned()).collect();
            plan(|s| s.port_map = port_map)
        };
        let planned = ports(&[
            "8080:80",
            "1:65535",
            "65535:1",
            "0:80",
            "81:81/tcp",
            "82:82/TCP",
            "8080:80/udp",
            "53:5353/UDP",
        ]);
        let planned = planned.expect("a plan");
        assert_eq!(planned.published_ports.len(), 7);
        let first = PublishedPort { protocol: Protocol::Tcp, host: 1, guest: 65_535 };
        assert_eq!(planned.published_ports[1], first);
        assert!(planned.to_string().contains("port       8080 -> guest port 80\n"));
        assert!(planned.to_string().contains("port       53/udp -> guest port 5353/udp\n"));
        let wanted = "must be HOST:GUEST, two port numbers like \"8080:80\"";
        for (text, problem) in [
            ("", wanted),
            ("8080", wanted),
            (":", wanted),
            ("8080:", wanted),
            (":80", wanted),
            (" 8080:80", wanted),
            ("+8080:80", wanted),
            ("-1:80", wanted),
            ("8080-8090:80", wanted),
            ("http:80", wanted),
            ("8080:80/", "but only ports of tcp and udp can be published, not those of "),
            ("8080:80/sctp", "but only ports of tcp and udp can be published, not those of sctp"),
            (
                "127.0.0.1:8080:80",
                "but a port is published on all of the host's addresses; write \"8080:80\"",
            ),
            (
                "[::1]:8080:80",
                "but a port is published on all of the host's addresses; write \"8080:80\"",
            ),
            ("0:0", "but 0 is not a port; those are from 1 to 65535"),
            ("8080:0", "but 0 is not a port; those are from 1 to 65535"),
            ("65536:80", "but 65536 is not a port; those are from 1 to 65535"),
            (
                "8080:99999999999999999999",
                "but 99999999999999999999 is not a port; those are from 1 to 65535",
            ),
        ] {
            let errors = ports(&["1:1", text]).expect_err(text);
            assert_eq!(errors, [format!("port_map[1]: is \"{text}\", {problem}")]);
        }
        assert_eq!(
            ports(&["80:80", "443:443", "80:8080", "81:443"]).expect_err("repeated"),
            [
                "port_map[2]: is \"80:8080\", but host port 80 is in port_map[0] already; give each entry ports of its own",
                "port_map[3]: is \"81:443\", but guest port 443 is in port_map[1] already; give each entry ports of its own",
            ]
        );
        let many: Vec<String> = (1..=4097).map(|port| format!("{port}:{port}")).collect();
        assert_eq!(
            errors(|s| s.port_map = many.clone()),
            ["port_map: has 4097 entries, mote can publish 4096 ports"]
        );
        assert!(plan(|s| s.port_map = many[1..].to_vec()).is_ok());
    }
}
