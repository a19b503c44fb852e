//! Addresses of guests, as the host has heard of them.

use std::net::IpAddr;

use xml_schemas::Domain as Definition;
use xml_schemas::domain::device::Interface;

use crate::error::{Error, Result};

/// A guest's network card with its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// The host's device.
    pub name: String,
    /// Hardware address.
    pub mac: String,
    /// What was heard, with the length of the network's prefix where that is known, else 0.
    pub addresses: Vec<(IpAddr, u32)>,
}

/// Looks the guest's cards up in the host's table of neighbours.
///
/// # Errors
/// The system's.
pub fn neighbours(definition: &Definition) -> Result<Vec<Card>> {
    let table = std::fs::read_to_string("/proc/net/arp")
        .map_err(|e| Error::system("cannot read the table of neighbours", &e))?;
    let mut found = Vec::new();
    for element in definition
        .devices
        .rest
        .iter()
        .filter(|e| e.name == "interface")
    {
        let Ok(card) = Interface::read(element) else {
            continue;
        };
        let mac = card.mac_text();
        let addresses = heard(&table, &mac);
        if let (Some(name), false) = (card.target, addresses.is_empty()) {
            found.push(Card {
                name,
                mac,
                addresses,
            });
        }
    }
    Ok(found)
}

/// Complete entries (proc(5), /proc/net/arp) of that hardware address.
fn heard(table: &str, mac: &str) -> Vec<(IpAddr, u32)> {
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let address = words.next()?.parse().ok()?;
        let flags = words.nth(1)?;
        let known = words.next()?;
        (flags != "0x0" && known.eq_ignore_ascii_case(mac)).then_some((address, 0))
    };
    table.lines().skip(1).filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_found_by_hardware_address() {
        let table = "IP address       HW type     Flags       HW address            Mask     Device\n\
                     10.0.0.2         0x1         0x2         52:54:00:00:00:01     *        br0\n\
                     10.0.0.3         0x1         0x0         52:54:00:00:00:01     *        br0\n\
                     10.0.0.4         0x1         0x2         52:54:00:00:00:02     *        br0\n";
        let expected: Vec<(IpAddr, u32)> = vec![("10.0.0.2".parse().unwrap(), 0)];
        assert_eq!(heard(table, "52:54:00:00:00:01"), expected);
    }
}
