//! The guest's network interface, when it has one: address and default route as the spec says. The
//! MTU comes with the device.

use std::net::Ipv4Addr;

use mote_agent::instance::Interface;

use crate::sys::net;

/// What the kernel calls the first network device, and what a guest init expects (contract §7.2).
const NAME: &str = "eth0";

/// Configures the interface. An init of the image's own that does the same again finds it done.
///
/// # Errors
/// If the kernel refuses the address, the route, or to bring the interface up; there may be no such
/// device.
pub fn set_up(interface: &Interface) -> Result<(), String> {
    let Interface { address, prefix_len, gateway } = *interface;
    net::set_interface_address(NAME, address, mask(prefix_len))
        .map_err(|e| format!("give {NAME} the address {address}/{prefix_len} (network): {e}"))?;
    net::interface_up(NAME).map_err(|e| format!("bring up {NAME}: {e}"))?;
    net::add_default_route(NAME, gateway)
        .map_err(|e| format!("make {gateway} the default route of {NAME} (network.gateway): {e}"))
}

fn mask(prefix_len: u8) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(prefix_len)).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_as_many_bits_as_the_prefix() {
        for (prefix_len, expected) in
            [(0, "0.0.0.0"), (1, "128.0.0.0"), (24, "255.255.255.0"), (31, "255.255.255.254")]
        {
            assert_eq!(mask(prefix_len).to_string(), expected);
        }
    }
}
