//! Network cards of domains: `domiflist`, `domifstat`, `domif-getlink`, `domif-setlink`, `domiftune`, `domifaddr`.

use rpc::args::{
    DomainGetInterfaceParametersArgs, DomainInterfaceAddressesArgs, DomainInterfaceStatsArgs,
    DomainSetInterfaceParametersArgs, DomainUpdateDeviceFlagsArgs,
};
use rpc::procs;
use rpc::types::TypedParam;
use xml_schemas::dom::{Element, format_element};

use super::block::{devices, part};
use super::{AFFECT_CONFIG, AFFECT_LIVE, ANY, affected, find_domain, params};
use crate::command::{Args, Command, DOMAIN, Values, data, flag, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::table::Table;

/// `domiflist`
pub const DOMIFLIST: Command = Command {
    name: "domiflist",
    summary: "list all domain virtual interfaces",
    description: "Shows the network cards of a domain.",
    options: &[DOMAIN, flag("inactive", "those of the stored definition")],
    handler: domiflist,
    connects: true,
};

/// `domifstat`
pub const DOMIFSTAT: Command = Command {
    name: "domifstat",
    summary: "get network interface stats for a domain",
    description: "Shows what a network card of a running domain has received and sent.",
    options: &[
        DOMAIN,
        data("interface", "the host's device, or the hardware address"),
    ],
    handler: domifstat,
    connects: true,
};

/// `domif-getlink`
pub const DOMIF_GETLINK: Command = Command {
    name: "domif-getlink",
    summary: "get link state of a virtual interface",
    description: "Shows whether a network card's cable is in.",
    options: &[
        DOMAIN,
        data("interface", "the host's device, or the hardware address"),
        flag("config", "of the stored definition"),
    ],
    handler: domif_getlink,
    connects: true,
};

/// `domif-setlink`
pub const DOMIF_SETLINK: Command = Command {
    name: "domif-setlink",
    summary: "set link state of a virtual interface",
    description: "Plugs or pulls a network card's cable.",
    options: &[
        DOMAIN,
        data("interface", "the host's device, or the hardware address"),
        data("state", "up or down").values(Values::Words(&["up", "down"])),
        flag("config", "from the next boot on"),
        flag("print-xml", "print what would be sent, and don't"),
    ],
    handler: domif_setlink,
    connects: true,
};

/// `domiftune`
pub const DOMIFTUNE: Command = Command {
    name: "domiftune",
    summary: "get/set parameters of a virtual interface",
    description: "Shows or changes how much a network card may carry.",
    options: &[
        DOMAIN,
        data("interface", "the host's device, or the hardware address"),
        text("inbound", "to the guest: average,peak,burst,floor"),
        text("outbound", "from the guest: average,peak,burst"),
        flag("config", "from the next boot on"),
        flag("live", "for the running domain"),
        flag("current", "for the domain as it is now"),
    ],
    handler: domiftune,
    connects: true,
};

/// `domifaddr`
pub const DOMIFADDR: Command = Command {
    name: "domifaddr",
    summary: "Get network interfaces' addresses for a running domain",
    description: "Shows the addresses of a running domain's network cards.",
    options: &[
        DOMAIN,
        text("interface", "this card only"),
        flag("full", "name and hardware address on every line"),
        text("source", "who is asked: lease, agent or arp")
            .values(Values::Words(&["lease", "agent", "arp"])),
    ],
    handler: domifaddr,
    connects: true,
};

/// `VIR_DOMAIN_XML_INACTIVE`
const XML_INACTIVE: u32 = 2;
/// `VIR_TYPED_PARAM_STRING_OKAY`
const STRINGS: u32 = 4;

fn domiflist(shell: &mut Shell, args: &Args) -> Result {
    let flags = if args.has("inactive") {
        XML_INACTIVE
    } else {
        0
    };
    let dom = find_domain(shell, args, ANY)?;
    let mut table = Table::new(&["Interface", "Type", "Source", "Model", "MAC"]);
    for card in devices(shell, &dom, flags, "interface")? {
        let kind = card.attr("type").unwrap_or_default();
        let source = match kind {
            "bridge" => part(&card, "source", "bridge"),
            "network" => part(&card, "source", "network"),
            "direct" | "vdpa" => part(&card, "source", "dev"),
            _ => part(&card, "source", "name"),
        };
        table.row([
            part(&card, "target", "dev").unwrap_or("-"),
            kind,
            source.unwrap_or("-"),
            part(&card, "model", "type").unwrap_or("-"),
            part(&card, "mac", "address").unwrap_or("-"),
        ]);
    }
    let text = table.format(!shell.out.quiet);
    shell.out.print(text);
    Ok(())
}

fn domifstat(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let device = args.required("interface")?.to_owned();
    let name = dom.name.clone();
    let asked = DomainInterfaceStatsArgs {
        dom,
        device: device.clone(),
    };
    let stats = shell
        .call(procs::DOMAIN_INTERFACE_STATS, &asked)
        .context(format!("Failed to get interface stats {name} {device}"))?;
    for (field, value) in [
        ("rx_bytes", stats.rx_bytes),
        ("rx_packets", stats.rx_packets),
        ("rx_errs", stats.rx_errs),
        ("rx_drop", stats.rx_drop),
        ("tx_bytes", stats.tx_bytes),
        ("tx_packets", stats.tx_packets),
        ("tx_errs", stats.tx_errs),
        ("tx_drop", stats.tx_drop),
    ] {
        // Below 0: not known.
        if value >= 0 {
            shell.out.print(format!("{device} {field} {value}\n"));
        }
    }
    Ok(())
}

fn is_mac(text: &str) -> bool {
    text.split(':').count() == 6
        && text
            .split(':')
            .all(|part| matches!(part.len(), 1 | 2) && u8::from_str_radix(part, 16).is_ok())
}

/// The card that is named, of those of the definition.
fn find_card(cards: Vec<Element>, name: &str) -> Option<Element> {
    cards.into_iter().find(|card| {
        let (child, attribute) = if is_mac(name) {
            ("mac", "address")
        } else {
            ("target", "dev")
        };
        part(card, child, attribute).is_some_and(|value| value.eq_ignore_ascii_case(name))
    })
}

fn domif_getlink(shell: &mut Shell, args: &Args) -> Result {
    let flags = if args.has("config") { XML_INACTIVE } else { 0 };
    let dom = find_domain(shell, args, ANY)?;
    let name = args.required("interface")?.to_owned();
    let cards = devices(shell, &dom, flags, "interface")?;
    let Some(card) = find_card(cards, &name) else {
        let by = if is_mac(&name) { "mac" } else { "dev" };
        return Err(Failure::new(format!("Interface ({by}: {name}) not found.")));
    };
    let state = part(&card, "link", "state").unwrap_or("up");
    shell.out.print(format!("{name} {state}"));
    Ok(())
}

fn domif_setlink(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let name = args.required("interface")?.to_owned();
    let state = args.required("state")?.to_owned();
    if state != "up" && state != "down" {
        return Err(Failure::new(format!("invalid link state '{state}'")));
    }
    let config = args.has("config") || dom.active_id().is_none();
    let flags = if config { XML_INACTIVE } else { 0 };
    let cards = devices(shell, &dom, flags, "interface")?;
    let Some(mut card) = find_card(cards, &name) else {
        return Err(Failure::new(format!("interface '{name}' not found")));
    };
    card.take_children("link");
    card.push(Element::new("link").with_attr("state", &state));
    let mut xml = String::new();
    format_element(&mut xml, &card, 0);
    if args.has("print-xml") {
        shell.out.print(xml);
        return Ok(());
    }
    let asked = DomainUpdateDeviceFlagsArgs {
        dom,
        xml,
        flags: if config { AFFECT_CONFIG } else { AFFECT_LIVE },
    };
    shell
        .call(procs::DOMAIN_UPDATE_DEVICE_FLAGS, &asked)
        .context("Failed to update interface link state")?;
    shell.out.print_extra("Device updated successfully\n");
    Ok(())
}

/// `average,peak,burst,floor` as parameters.
fn rate(direction: &str, text: &str) -> Result<Vec<TypedParam>> {
    let parts: Vec<&str> = text.split(',').collect();
    if parts.len() > 4 {
        return Err(Failure::new(format!(
            "Rate string '{text}' has too many fields"
        )));
    }
    let names = ["average", "peak", "burst", "floor"];
    let mut values = [0_u32; 4];
    for ((value, name), part) in values.iter_mut().zip(names).zip(parts) {
        if !part.is_empty() {
            *value = part
                .parse()
                .map_err(|_| Failure::new(format!("field '{name}' is malformed")))?;
        }
    }
    let [average, peak, burst, floor] = values;
    if direction == "outbound" && floor != 0 {
        return Err(Failure::new("outbound floor is unsupported yet"));
    }
    if average == 0 && floor == 0 && (peak != 0 || burst != 0) {
        return Err(Failure::new(if direction == "inbound" {
            "either inbound average or floor is mandatory"
        } else {
            "outbound average is mandatory"
        }));
    }
    // What is 0 is not stated; but an average of 0 takes the limit away.
    let stated = |(name, value): (&str, u32)| {
        (value != 0 || (name == "average" && floor == 0))
            .then(|| TypedParam::new(format!("{direction}.{name}"), value))
    };
    Ok(names.into_iter().zip(values).filter_map(stated).collect())
}

fn domiftune(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    let dom = find_domain(shell, args, ANY)?;
    let device = args.required("interface")?.to_owned();
    let mut values = Vec::new();
    for direction in ["inbound", "outbound"] {
        if let Some(text) = args.text(direction)? {
            values.extend(rate(direction, text)?);
        }
    }
    if !values.is_empty() {
        let asked = DomainSetInterfaceParametersArgs {
            dom,
            device,
            params: values.into(),
            flags,
        };
        return shell
            .call(procs::DOMAIN_SET_INTERFACE_PARAMETERS, &asked)
            .context("Unable to set interface parameters");
    }
    let asked = |nparams| DomainGetInterfaceParametersArgs {
        dom: dom.clone(),
        device: device.clone(),
        nparams,
        flags: flags | STRINGS,
    };
    let count = shell
        .call(procs::DOMAIN_GET_INTERFACE_PARAMETERS, &asked(0))
        .context("Unable to get number of interface parameters")?
        .nparams;
    let found = shell
        .call(procs::DOMAIN_GET_INTERFACE_PARAMETERS, &asked(count))
        .context("Unable to get interface parameters")?;
    shell.out.print(params::lines(&found.params.0));
    Ok(())
}

fn domifaddr(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let wanted = args.text("interface")?.map(str::to_owned);
    let source = match args.text("source")? {
        None | Some("lease") => 0,
        Some("agent") => 1,
        Some("arp") => 2,
        Some(other) => {
            return Err(Failure::new(format!("Unknown data source '{other}'")));
        }
    };
    let full = args.has("full");
    let asked = DomainInterfaceAddressesArgs {
        dom,
        source,
        flags: 0,
    };
    let found = shell
        .call(procs::DOMAIN_INTERFACE_ADDRESSES, &asked)
        .context("Failed to query for interfaces addresses")?;
    if !shell.out.quiet {
        shell.out.print(format!(
            " {:<10} {:<20} {:<8}     {}\n{}\n",
            "Name",
            "MAC address",
            "Protocol",
            "Address",
            "-".repeat(79)
        ));
    }
    for card in found.ifaces.0 {
        if wanted.as_ref().is_some_and(|wanted| *wanted != card.name) {
            continue;
        }
        let hwaddr = card.hwaddr.unwrap_or_default();
        if card.addrs.0.is_empty() {
            let none = format!("{:<12} {}/{}", "N/A", "N/A", "N/A");
            let none = none.replace("N/A/N/A", "N/A");
            shell
                .out
                .print(format!(" {:<10} {hwaddr:<17}    {none}\n", card.name));
        }
        for (at, address) in card.addrs.0.iter().enumerate() {
            let kind = if address.kind == 1 { "ipv6" } else { "ipv4" };
            let address = format!("{kind:<12} {}/{}", address.addr, address.prefix);
            let (name, hwaddr) = if full || at == 0 {
                (card.name.as_str(), hwaddr.as_str())
            } else {
                ("-", "-")
            };
            shell
                .out
                .print(format!(" {name:<10} {hwaddr:<17}    {address}\n"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read() {
        let names = |direction: &str, text: &str| -> Vec<String> {
            let params = rate(direction, text).unwrap();
            params
                .iter()
                .map(|p| format!("{}={}", p.field, params::text(&p.value)))
                .collect()
        };
        assert_eq!(
            names("inbound", "5,,7"),
            ["inbound.average=5", "inbound.burst=7"]
        );
        assert_eq!(names("outbound", "0"), ["outbound.average=0"]);
        assert_eq!(names("inbound", ",,,3"), ["inbound.floor=3"]);
        let refused =
            |direction: &str, text: &str| rate(direction, text).unwrap_err().lines.join("|");
        assert_eq!(
            refused("outbound", "1,2,3,4"),
            "outbound floor is unsupported yet"
        );
        assert_eq!(refused("outbound", ",5"), "outbound average is mandatory");
        assert_eq!(
            refused("inbound", ",5"),
            "either inbound average or floor is mandatory"
        );
        assert_eq!(refused("inbound", "x"), "field 'average' is malformed");
        assert_eq!(
            refused("inbound", "1,2,3,4,5"),
            "Rate string '1,2,3,4,5' has too many fields"
        );
        assert!(is_mac("52:54:00:00:00:01") && !is_mac("vnet0"));
    }
}
