//! Egress rules: a list in which the first match decides, and what is decided when none matches.
//!
//! ```text
//!   allow:CIDR[:tcp|udp[:PORT]]      deny:CIDR[:tcp|udp[:PORT]]      allow | deny  (the last: for the rest)
//! ```

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU16;
use std::str::FromStr;

use mote_agent::flow::Protocol;

use super::destination::{Destination, protocol_name};

/// What a rule does with its destinations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Lets them be reached.
    Allow,
    /// Makes them unreachable.
    Deny,
}

impl Action {
    fn parse(word: &str) -> Option<Action> {
        match word {
            "allow" => Some(Action::Allow),
            "deny" => Some(Action::Deny),
            _ => None,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Action::Allow => "allow",
            Action::Deny => "deny",
        })
    }
}

/// The addresses with a common prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cidr {
    first: IpAddr,
    prefix_len: u8,
}

impl Cidr {
    /// Those that have so many bits in common with this one.
    pub fn new(ip: IpAddr, prefix_len: u8) -> Cidr {
        let prefix_len = prefix_len.min(Cidr::max_len(ip));
        Cidr { first: masked(ip, prefix_len), prefix_len }
    }

    /// How long a prefix can be in this family.
    fn max_len(ip: IpAddr) -> u8 {
        if ip.is_ipv4() { 32 } else { 128 }
    }

    /// Its first address.
    pub fn first(&self) -> IpAddr {
        self.first
    }

    /// How many bits its addresses have in common.
    pub fn prefix_len(&self) -> u8 {
        self.prefix_len
    }

    /// Whether this is a single address.
    pub fn is_single(&self) -> bool {
        self.prefix_len == Cidr::max_len(self.first)
    }

    /// Whether it has this address, which must be written in its own family.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let differing = match (self.first, ip) {
            (IpAddr::V4(first), IpAddr::V4(ip)) => u128::from(first.to_bits() ^ ip.to_bits()) << 96,
            (IpAddr::V6(first), IpAddr::V6(ip)) => first.to_bits() ^ ip.to_bits(),
            _ => return false,
        };
        differing.leading_zeros() >= self.prefix_len.into()
    }

    /// Whether it means this address in particular, and not by the accident of a wide range: it is the address,
    /// or a range of link-local addresses.
    pub fn names(&self, ip: IpAddr) -> bool {
        let is_link_local =
            matches!(self.first, IpAddr::V4(ip) if ip.is_link_local()) && self.prefix_len >= 16;
        self.contains(ip) && (self.is_single() || is_link_local)
    }

    /// Whether it has only addresses of a host itself.
    pub fn is_loopback(&self) -> bool {
        self.first.is_loopback()
            && (self.is_single() || self.first.is_ipv4() && self.prefix_len >= 8)
    }

    /// Whether it has all addresses of another.
    pub fn covers(&self, other: &Cidr) -> bool {
        self.prefix_len <= other.prefix_len && self.contains(other.first)
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, len) = match text.split_once('/') {
            Some((address, len)) => (address, Some(len)),
            None => (text, None),
        };
        let first: IpAddr = address.parse().map_err(|_| {
            format!("\"{address}\" is no IPv4 or IPv6 address; names cannot be matched")
        })?;
        if first != first.to_canonical() {
            return Err(format!("{first} is an IPv4 address; write {}", first.to_canonical()));
        }
        let max = Cidr::max_len(first);
        let prefix_len = match len {
            None => max,
            Some(len) => len
                .parse()
                .ok()
                .filter(|len| *len <= max && len_is_plain(text))
                .ok_or_else(|| format!("/{len} is no prefix length, must be from 0 to {max}"))?,
        };
        let cidr = Cidr::new(first, prefix_len);
        if cidr.first != first {
            return Err(format!("{text} has bits set after its prefix; write {cidr}"));
        }
        Ok(cidr)
    }
}

/// Whether the prefix length is only digits: `u8` would also take a sign.
fn len_is_plain(text: &str) -> bool {
    text.bytes().last().is_some_and(|byte| byte.is_ascii_digit()) && !text.contains("/+")
}

/// The first address with the same prefix.
fn masked(ip: IpAddr, prefix_len: u8) -> IpAddr {
    let kept = |bits: u32| u128::MAX.checked_shl(bits - u32::from(prefix_len)).unwrap_or(0);
    match ip {
        IpAddr::V4(ip) => IpAddr::V4((ip.to_bits() & kept(32) as u32).into()),
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & kept(128))),
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.prefix_len)
    }
}

/// One rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// What it does.
    pub action: Action,
    /// With which addresses.
    pub to: Cidr,
    /// Only by this protocol, and only at this port.
    pub by: Option<(Protocol, Option<NonZeroU16>)>,
}

impl Rule {
    /// Whether it is about this destination, with its address written like this.
    pub(super) fn matches(&self, destination: Destination, ip: IpAddr) -> bool {
        let by = match self.by {
            None => true,
            Some((protocol, port)) => {
                destination.protocol == Some(protocol)
                    && port.is_none_or(|port| port.get() == destination.port)
            }
        };
        by && self.to.contains(ip)
    }

    /// Whether nothing that comes to this rule gets on to another, later one.
    pub fn covers(&self, later: &Rule) -> bool {
        let by = match (self.by, later.by) {
            (None, _) => true,
            (Some((ours, port)), Some((theirs, their_port))) => {
                ours == theirs && (port.is_none() || port == their_port)
            }
            (Some(_), None) => false,
        };
        by && self.to.covers(&later.to)
    }
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (action, rest) = text.split_once(':').unwrap_or((text, ""));
        let action = Action::parse(action)
            .ok_or_else(|| format!("\"{action}\" is no action, must be allow or deny"))?;
        // An IPv6 address has colons of its own.
        let (cidr, by) = match (rest.find(":tcp"), rest.find(":udp")) {
            (Some(at), _) => (&rest[..at], Some((Protocol::Tcp, &rest[at + 4..]))),
            (None, Some(at)) => (&rest[..at], Some((Protocol::Udp, &rest[at + 4..]))),
            (None, None) => (rest, None),
        };
        let to: Cidr = cidr.parse()?;
        let by = match by {
            None => None,
            Some((protocol, "")) => Some((protocol, None)),
            Some((protocol, port)) => {
                let digits = port.strip_prefix(':').unwrap_or("");
                let number = digits.parse().ok().filter(|_| !digits.starts_with('+'));
                let port = number
                    .ok_or_else(|| format!("\"{digits}\" is no port, must be from 1 to 65535"))?;
                Some((protocol, Some(port)))
            }
        };
        Ok(Rule { action, to, by })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.action, self.to)?;
        let Some((protocol, port)) = self.by else { return Ok(()) };
        write!(f, ":{}", protocol_name(Some(protocol)))?;
        port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

/// All rules of a box, and what is done with the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// In the order in which they count.
    pub rules: Vec<Rule>,
    /// For what none of them is about.
    pub default: Action,
}

impl Rules {
    /// What the first rule about a destination with these spellings says, of which some are on the floor.
    pub(super) fn apply(
        &self,
        destination: Destination,
        spellings: &[IpAddr],
        on_floor: &[IpAddr],
    ) -> Action {
        let decisive = self.rules.iter().find(|rule| match rule.action {
            Action::Deny => spellings.iter().any(|spelling| rule.matches(destination, *spelling)),
            // Who allows an IPv4 address does not mean every IPv6 address that could be read as that one: some
            // of these are anybody's.
            Action::Allow => {
                rule.matches(destination, destination.ip)
                    && on_floor.iter().all(|ip| rule.to.names(*ip))
            }
        });
        match decisive {
            Some(rule) => rule.action,
            None if on_floor.is_empty() => self.default,
            None => Action::Deny,
        }
    }
}

impl Default for Rules {
    /// No rules: everything is allowed.
    fn default() -> Self {
        Rules { rules: Vec::new(), default: Action::Allow }
    }
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rules.iter().try_for_each(|rule| write!(f, "{rule}, "))?;
        write!(f, "{}", self.default)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Result<Rule, String> {
        text.parse()
    }

    #[test]
    fn rules_are_read_as_they_are_written() {
        for text in [
            "allow:10.0.0.0/8",
            "deny:0.0.0.0/0",
            "deny:192.0.2.1/32:tcp",
            "allow:192.0.2.0/24:udp:53",
            "allow:::/0",
            "deny:2001:db8::/32:tcp:443",
            "allow:2001:db8::1/128:udp:65535",
        ] {
            assert_eq!(rule(text).map(|rule| rule.to_string()), Ok(text.into()));
        }
        let single = rule("allow:2001:db8::1:tcp:80").expect("a rule");
        assert_eq!(single.to_string(), "allow:2001:db8::1/128:tcp:80");
        assert!(single.to.is_single());
    }

    #[test]
    fn what_is_no_rule_is_said() {
        for (text, expected) in [
            ("", "\"\" is no action"),
            ("permit:10.0.0.0/8", "\"permit\" is no action"),
            ("Allow:10.0.0.0/8", "\"Allow\" is no action"),
            ("allow:", "\"\" is no IPv4 or IPv6 address"),
            ("allow:example.org", "\"example.org\" is no IPv4 or IPv6 address; names"),
            ("allow:10.0.0/8", "\"10.0.0\" is no"),
            ("allow:10.0.0.0/33", "/33 is no prefix length, must be from 0 to 32"),
            ("allow:10.0.0.0/+8", "/+8 is no prefix length"),
            ("allow:10.0.0.0/", "/ is no prefix length"),
            ("allow:::/129", "/129 is no prefix length, must be from 0 to 128"),
            ("allow:10.0.0.1/8", "10.0.0.1/8 has bits set after its prefix; write 10.0.0.0/8"),
            ("allow:fe80::1/10", "fe80::1/10 has bits set after its prefix; write fe80::/10"),
            ("allow:::ffff:10.0.0.0/104", "::ffff:10.0.0.0 is an IPv4 address; write 10.0.0.0"),
            ("allow:10.0.0.0/8:icmp", "/8:icmp is no prefix length"),
            ("allow:10.0.0.0/8:tcp:0", "\"0\" is no port"),
            ("allow:10.0.0.0/8:tcp:65536", "\"65536\" is no port"),
            ("allow:10.0.0.0/8:tcp:+80", "\"+80\" is no port"),
            ("allow:10.0.0.0/8:tcp:80:81", "\"80:81\" is no port"),
            ("allow:10.0.0.0/8:tcp80", "\"\" is no port"),
        ] {
            let error = rule(text).expect_err(text);
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }

    #[test]
    fn prefixes_end_where_they_say() {
        let contains = |cidr: &str, ip: &str| {
            let cidr: Cidr = cidr.parse().expect("a CIDR");
            cidr.contains(ip.parse().expect("an address"))
        };
        for (cidr, inside, outside) in [
            ("192.0.2.128/25", "192.0.2.128", "192.0.2.127"),
            ("192.0.2.1/32", "192.0.2.1", "192.0.2.0"),
            ("0.0.0.0/0", "255.255.255.255", "::"),
            ("::/0", "ffff::", "0.0.0.0"),
            ("2001:db8::/33", "2001:db8:7fff::", "2001:db8:8000::"),
        ] {
            assert!(contains(cidr, inside), "{cidr} {inside}");
            assert!(!contains(cidr, outside), "{cidr} {outside}");
        }
    }

    #[test]
    fn a_rule_covers_what_can_never_come_to_a_later_one() {
        for (first, later, covers) in [
            ("deny:10.0.0.0/8", "allow:10.1.0.0/16", true),
            ("deny:10.0.0.0/8", "allow:10.1.0.0/16:tcp:80", true),
            ("deny:10.0.0.0/8:tcp", "allow:10.1.0.0/16:tcp:80", true),
            ("deny:10.0.0.0/8:tcp:80", "allow:10.1.0.0/16:tcp:80", true),
            ("deny:10.0.0.0/8:tcp:80", "allow:10.1.0.0/16:tcp", false),
            ("deny:10.0.0.0/8:tcp", "allow:10.1.0.0/16", false),
            ("deny:10.0.0.0/8:udp", "allow:10.1.0.0/16:tcp", false),
            ("deny:10.1.0.0/16", "allow:10.0.0.0/8", false),
            ("deny:0.0.0.0/0", "allow:::/0", false),
        ] {
            let [first, later] = [first, later].map(|text| rule(text).expect("a rule"));
            assert_eq!(first.covers(&later), covers, "{first} {later}");
        }
    }
}
