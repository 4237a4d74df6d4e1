//! The host's resolv.conf(5), as far as mote reads it.

/// The host's file.
const PATH: &str = "/etc/resolv.conf";

/// The text of the host's file; empty if there is none.
pub fn of_host() -> String {
    std::fs::read_to_string(PATH).unwrap_or_default()
}

/// The name servers, as written: addresses, and IPv6 addresses with the interface to reach them by. As in
/// the resolvers of glibc and musl, only a line that starts with `nameserver` counts.
pub fn name_servers(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        line.strip_prefix("nameserver")?.strip_prefix([' ', '\t'])?.split_whitespace().next()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_resolvers_do() {
        let text = "search x\nnameserver 127.0.0.53\n#nameserver 1.1.1.1\n nameserver 1.1.1.1\n\
            nameservers 1.1.1.1\nnameserver\tfe80::1%eth0 trailing\nnameserver";
        assert_eq!(name_servers(text).collect::<Vec<_>>(), ["127.0.0.53", "fe80::1%eth0"]);
    }
}
