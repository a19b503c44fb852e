//! What may pass between a network and the world: one nftables table for each network.
//!
//! A table of its own for each network means that starting or stopping one takes no lock and
//! touches nobody's rules, ours included, and that whoever flushes their own tables leaves ours
//! alone. A packet must be let through by every table; ours refuse and translate, they cannot
//! overrule another table's refusal.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use uuid::Uuid;
use xml_schemas::Network;
use xml_schemas::network::{ForwardMode, Nat, Rate, Subnet};

use super::program;
use crate::error::Result;

/// How long nft may take.
const LIMIT: Duration = Duration::from_secs(20);

/// The table of a network.
pub fn table(uuid: Uuid) -> String {
    format!("vireo_net_{}", uuid.simple())
}

/// Puts a network's rules in force, in place of earlier ones, all at once.
///
/// # Errors
/// nft is missing, refuses, or does not end.
pub fn apply(uuid: Uuid, network: &Network) -> Result<()> {
    let chains = chains(network);
    if chains.is_empty() {
        return Ok(());
    }
    let (table, comment) = (table(uuid), comment(network));
    // `delete` of what is not there would fail; what is there is replaced in one transaction.
    let rules = format!(
        "add table inet {table}\ndelete table inet {table}\n\
         table inet {table} {{\n{comment}{chains}}}\n"
    );
    program::run(&program::find("nft")?, &["-f", "-"], &rules, LIMIT).map(drop)
}

/// The same for a network that has none yet: the kernel makes a table much faster than it replaces
/// one.
///
/// # Errors
/// As [`apply`].
pub fn make(uuid: Uuid, network: &Network) -> Result<()> {
    let chains = chains(network);
    if chains.is_empty() {
        return Ok(());
    }
    let (table, comment) = (table(uuid), comment(network));
    // `create` fails where there is one.
    let rules =
        format!("create table inet {table} {{\n{comment}}}\ntable inet {table} {{\n{chains}}}\n");
    match program::run(&program::find("nft")?, &["-f", "-"], &rules, LIMIT) {
        Ok(_) => Ok(()),
        // Somebody's leftovers; by nft's words in the C locale.
        Err(error) if error.message.contains("File exists") => apply(uuid, network),
        Err(error) => Err(error),
    }
}

/// Takes them back; that there are none is fine.
///
/// # Errors
/// As [`apply`].
pub fn remove(uuid: Uuid) -> Result<()> {
    let table = table(uuid);
    let text = format!("add table inet {table}\ndelete table inet {table}\n");
    program::run(&program::find("nft")?, &["-f", "-"], &text, LIMIT).map(drop)
}

/// The names of all tables of the family we use.
///
/// # Errors
/// As [`apply`].
pub fn tables() -> Result<Vec<String>> {
    let text = program::run(
        &program::find("nft")?,
        &["list", "tables", "inet"],
        "",
        LIMIT,
    )?;
    let names = text.lines().filter_map(|line| line.split(' ').nth(2));
    Ok(names.map(str::to_owned).collect())
}

/// Whether a network has any rules.
pub fn needed(network: &Network) -> bool {
    let limited = network.bandwidth.inbound.is_some() || network.bandwidth.outbound.is_some();
    let mode = network.forward.mode;
    limited || (mode.has_own_bridge() && mode != ForwardMode::Open)
}

/// What a network's table says of itself.
fn comment(network: &Network) -> String {
    let name: String = network
        .name
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-_. ".contains(c) {
                c
            } else {
                '?'
            }
        })
        .take(100)
        .collect();
    format!("comment \"network {name}\"\n")
}

/// A network's rules for nft; empty if it has none.
fn chains(network: &Network) -> String {
    let mut text = String::new();
    if !needed(network) {
        return text;
    }
    let bridge = network.bridge.as_deref().unwrap_or_default();
    if network.forward.mode != ForwardMode::Open {
        forward(&mut text, network, bridge);
    }
    if network.forward.mode == ForwardMode::Nat {
        translate(&mut text, network);
    }
    limit(&mut text, network, bridge);
    text
}

fn subnets(network: &Network) -> impl Iterator<Item = Subnet> {
    network.ips.iter().filter_map(|ip| ip.subnet())
}

fn ip_word(subnet: Subnet) -> &'static str {
    if subnet.address.is_ipv4() {
        "ip"
    } else {
        "ip6"
    }
}

/// Only what is the guests' own leaves, and only what is meant for them comes.
fn forward(text: &mut String, network: &Network, bridge: &str) {
    text.push_str("chain forward {\ntype filter hook forward priority filter; policy accept;\n");
    let _ = writeln!(
        text,
        "iifname \"{bridge}\" oifname \"{bridge}\" counter accept"
    );
    let mode = network.forward.mode;
    let dev = network.forward.interfaces.first();
    let by =
        |direction: &str| dev.map_or_else(String::new, |dev| format!(" {direction} \"{dev}\""));
    if mode != ForwardMode::None {
        for subnet in subnets(network) {
            let ip = ip_word(subnet);
            let translated =
                mode == ForwardMode::Nat && (subnet.address.is_ipv4() || network.forward.nat.ipv6);
            let state = if translated {
                " ct state established,related"
            } else {
                ""
            };
            let _ = writeln!(
                text,
                "oifname \"{bridge}\"{} {ip} daddr {subnet}{state} counter accept",
                by("iifname")
            );
            let _ = writeln!(
                text,
                "iifname \"{bridge}\"{} {ip} saddr {subnet} counter accept",
                by("oifname")
            );
        }
    }
    let _ = writeln!(text, "oifname \"{bridge}\" counter reject");
    let _ = writeln!(text, "iifname \"{bridge}\" counter reject\n}}");
}

/// The guests' addresses become the host's.
fn translate(text: &mut String, network: &Network) {
    let nat = &network.forward.nat;
    text.push_str(
        "chain postrouting {\ntype nat hook postrouting priority srcnat; policy accept;\n",
    );
    for subnet in subnets(network) {
        let ip = ip_word(subnet);
        if subnet.address.is_ipv6() && !nat.ipv6 {
            continue;
        }
        let dev = network.forward.interfaces.first();
        let out = dev.map_or_else(String::new, |dev| format!("oifname \"{dev}\" "));
        let local: &[&str] = if subnet.address.is_ipv4() {
            &["224.0.0.0/24", "255.255.255.255"]
        } else {
            &["ff02::/16"]
        };
        for target in local {
            let _ = writeln!(
                text,
                "{out}{ip} saddr {subnet} {ip} daddr {target} counter return"
            );
        }
        let from = format!("{out}{ip} saddr {subnet} {ip} daddr != {subnet}");
        let to = |ports: bool| target(nat, subnet, ports);
        for protocol in ["tcp", "udp"] {
            let _ = writeln!(text, "meta l4proto {protocol} {from} counter {}", to(true));
        }
        let _ = writeln!(text, "{from} counter {}", to(false));
    }
    text.push_str("}\n");
}

fn target(nat: &Nat, subnet: Subnet, with_ports: bool) -> String {
    let (first, last) = nat.ports.unwrap_or((1024, 65535));
    let ports = if with_ports {
        format!(":{first}-{last}")
    } else {
        String::new()
    };
    match nat.addresses.filter(|_| subnet.address.is_ipv4()) {
        Some((start, end)) if start == end => format!("snat ip to {start}{ports}"),
        Some((start, end)) => format!("snat ip to {start}-{end}{ports}"),
        None if with_ports => format!("masquerade to {ports}"),
        None => "masquerade".to_owned(),
    }
}

/// KiB that surely hold what the kernel moves as one packet: one that is larger than a burst would
/// never pass.
const PACKET: u64 = 128;

/// The network's limits, by dropping what is beyond them.
fn limit(text: &mut String, network: &Network, bridge: &str) {
    let line = |rate: Rate, direction: &str| {
        let over = |average: u64, burst: u64| {
            // libvirt's kilobytes are 1000 bytes, nft's 1024; its counters have 32 bits.
            let bytes = average.saturating_mul(1000).clamp(1, u64::from(u32::MAX));
            let burst = burst.saturating_mul(1024).clamp(1, u64::from(u32::MAX));
            format!(
                "{direction} \"{bridge}\" limit rate over {bytes} bytes/second burst {burst} bytes counter drop\n"
            )
        };
        let burst = if rate.burst > 0 {
            rate.burst
        } else {
            rate.average.max(PACKET)
        };
        let mut lines = over(rate.average, burst);
        if rate.peak > rate.average {
            // What a burst may be sent at.
            lines.push_str(&over(rate.peak, PACKET));
        }
        lines
    };
    let average = |rate: Option<Rate>| rate.filter(|rate| rate.average > 0);
    if let Some(rate) = average(network.bandwidth.outbound) {
        text.push_str(
            "chain from_guests {\ntype filter hook prerouting priority mangle; policy accept;\n",
        );
        text.push_str(&line(rate, "iifname"));
        text.push_str("}\n");
    }
    if let Some(rate) = average(network.bandwidth.inbound) {
        text.push_str(
            "chain to_guests {\ntype filter hook postrouting priority mangle; policy accept;\n",
        );
        text.push_str(&line(rate, "oifname"));
        text.push_str("}\n");
    }
}

/// Calls `gone` whenever tables of anybody's have been deleted, or may have been. Returns only if
/// the kernel does not tell.
///
/// # Errors
/// The system's.
pub fn watch(gone: impl Fn()) -> io::Result<()> {
    /// NFNLGRP_NFTABLES
    static GROUP: libc::c_int = 7;
    /// NFNL_SUBSYS_NFTABLES and NFT_MSG_DELTABLE
    const DELTABLE: u16 = 10 << 8 | 2;
    /// A whole ruleset goes table by table.
    const SETTLE: Duration = Duration::from_millis(200);
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: socket(2) takes numbers and returns a descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_NETFILTER) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    let mut socket = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    // SAFETY: a sockaddr_nl of zeroes is valid: numbers only.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    // Without an address of its own it would be taken for the sender, and told nothing.
    // SAFETY: the address lives here and has the size that is named.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_nl>() as libc::socklen_t,
        )
    };
    if bound < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number lives here and has the size that is named.
    let joined = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_NETLINK,
            libc::NETLINK_ADD_MEMBERSHIP,
            (&raw const GROUP).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if joined < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut buffer = vec![0; 256 << 10];
    loop {
        let tell = match socket.read(&mut buffer) {
            Ok(n) => has_message(&buffer[..n], DELTABLE),
            // More was going on than the socket holds.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => false,
            Err(error) => return Err(error),
        };
        if tell {
            std::thread::sleep(SETTLE);
            gone();
        }
    }
}

/// Whether a message of that type is among those in `bytes` (struct nlmsghdr).
fn has_message(mut bytes: &[u8], wanted: u16) -> bool {
    while let Some((length, kind)) = bytes.get(..6).map(|h| {
        (
            u32::from_ne_bytes([h[0], h[1], h[2], h[3]]),
            u16::from_ne_bytes([h[4], h[5]]),
        )
    }) {
        if kind == wanted {
            return true;
        }
        let length = (length as usize).max(16).next_multiple_of(4);
        bytes = bytes.get(length..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use xml_schemas::Validation;

    use super::*;

    fn of(inside: &str) -> String {
        let text = format!("<network><name>n\"x</name><bridge name='br9'/>{inside}</network>");
        let network = Network::parse(&text, Validation::Lenient).unwrap();
        assert_eq!(comment(&network), "comment \"network n?x\"\n");
        chains(&network)
    }

    #[test]
    fn each_mode_has_its_rules() {
        let ip = "<ip address='10.5.0.1' prefix='24'/>";
        let nat = of(&format!("<forward mode='nat'/>{ip}"));
        assert!(nat.contains(
            "oifname \"br9\" ip daddr 10.5.0.0/24 ct state established,related counter accept"
        ));
        assert!(nat.contains("meta l4proto tcp ip saddr 10.5.0.0/24 ip daddr != 10.5.0.0/24 counter masquerade to :1024-65535"));
        let route = of(&format!("<forward mode='route' dev='e0'/>{ip}"));
        assert!(
            route.contains("oifname \"br9\" iifname \"e0\" ip daddr 10.5.0.0/24 counter accept")
        );
        assert!(!route.contains("masquerade"));
        let isolated = of(ip);
        assert!(!isolated.contains("10.5.0.0"));
        assert_eq!(isolated.matches("reject").count(), 2);
        assert_eq!(of(&format!("<forward mode='open'/>{ip}")), "");
        let limited = of(&format!(
            "<forward mode='open'/><bandwidth><outbound average='100'/></bandwidth>{ip}"
        ));
        assert!(limited.contains("iifname \"br9\" limit rate over 100000 bytes/second"));
        assert!(!limited.contains("reject") && !limited.contains("250000"));
        let peak = of(&format!(
            "<bandwidth><inbound average='100' peak='250' burst='500'/></bandwidth>{ip}"
        ));
        assert!(
            peak.contains("oifname \"br9\" limit rate over 100000 bytes/second burst 512000 bytes")
        );
        assert!(peak.contains("oifname \"br9\" limit rate over 250000 bytes/second burst 131072"));
    }

    #[test]
    fn messages_are_found_behind_others() {
        let message = |kind: u16| {
            let mut bytes = 20u32.to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.resize(20, 0);
            bytes
        };
        let bytes = [message(1), message(2)].concat();
        assert!(has_message(&bytes, 2));
        assert!(!has_message(&bytes, 3));
        assert!(!has_message(&[0; 7], 3));
    }
}
