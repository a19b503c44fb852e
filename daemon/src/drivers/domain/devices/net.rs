//! Network cards: taps on bridges, macvtaps, passt.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use vmm_api::devices::{Bandwidth, NetBackend, NetConfig};
use xml_schemas::dom::Element;
use xml_schemas::domain::device::{Interface, Rate};
use xml_schemas::network::port::Plug;
use xml_schemas::network::vlan::Vlan;

use super::{passt, tap};
use crate::drivers::domain::machine::Builder;
use crate::drivers::domain::networks::note_plug;
use crate::error::{Error, ErrorCode, Result};
use crate::link;

impl Builder {
    /// Makes a network card's other end, and notes its name in the element.
    pub(super) fn net(&mut self, element: &mut Element, log: &str) -> Result<NetConfig> {
        let mut card = Interface::read(element)?;
        let (isolated, vlan) = match card.kind.as_str() {
            "network" => self.plug(element, &mut card)?,
            _ => {
                let port = element.child("port").and_then(|p| p.attr("isolated"));
                let vlan = element.child("vlan").map(Vlan::read).transpose()?;
                if let (Some(vlan), Some(bridge)) = (&vlan, &card.source) {
                    check_vlan(bridge, vlan)?;
                }
                (port == Some("yes"), vlan)
            }
        };
        let pairs = card.queues.unwrap_or(1).clamp(1, 8);
        let backend = match card.kind.as_str() {
            "bridge" | "ethernet" => {
                let (files, name) =
                    self.tap(&card, pairs, |name| set_port(name, isolated, vlan.as_ref()))?;
                note_target(element, &name);
                self.taps(files, &name)
            }
            "direct" => {
                let (files, name) = self.macvtap(&card, pairs)?;
                note_target(element, &name);
                self.taps(files, &name)
            }
            "user" => {
                let log = self.around.logs.join(log);
                let (identity, socket) = passt::start(element, card.mtu, &log).map_err(|e| {
                    if e.kind() == io::ErrorKind::NotFound {
                        Error::unsupported(
                            "interface type='user' needs the program passt, which is not installed",
                        )
                    } else {
                        Error::system("cannot start passt", &e)
                    }
                })?;
                self.made.processes.push(identity);
                NetBackend::Stream(self.pass(socket))
            }
            other => return Err(Error::unsupported(format!("interface type '{other}'"))),
        };
        Ok(NetConfig {
            mac: card.mac,
            backend,
            mtu: card.mtu,
            link_up: card.link_up,
            queue_pairs: pairs,
            filter_source_mac: card.filter.as_deref() == Some("no-mac-spoofing"),
            inbound: card.inbound.map(bandwidth).unwrap_or_default(),
            outbound: card.outbound.map(bandwidth).unwrap_or_default(),
        })
    }

    /// Gives a card its place in a network: from here on it is a card on what it got there.
    /// Whether it is kept from other isolated ones, and its VLANs.
    fn plug(
        &mut self,
        element: &mut Element,
        card: &mut Interface,
    ) -> Result<(bool, Option<Vlan>)> {
        let network = card.source.take().unwrap_or_default();
        let group = element.child("source").and_then(|s| s.attr("portgroup"));
        let around = &self.around;
        let plugged = around.networks.plug(
            &network,
            group,
            element.child("vlan"),
            &around.owner,
            card.mac,
        )?;
        // The port goes with this file, and the file with the domain.
        self.made.sockets.push(plugged.file.clone());
        note_plug(element, &network, &plugged);
        match &plugged.plug {
            Plug::Network { bridge } | Plug::Bridge { bridge } => {
                card.kind = "bridge".to_owned();
                card.source = Some(bridge.clone());
            }
            Plug::Direct { dev, mode } => {
                card.kind = "direct".to_owned();
                card.source = Some(dev.clone());
                card.mode = Some(mode.clone());
            }
        }
        card.mtu = card.mtu.or(plugged.mtu);
        if card.inbound.is_none() && card.outbound.is_none() {
            card.inbound = plugged.bandwidth.inbound;
            card.outbound = plugged.bandwidth.outbound;
        }
        let isolated = match element.child("port").and_then(|p| p.attr("isolated")) {
            Some(word) => word == "yes",
            None => plugged.isolated,
        };
        Ok((isolated, plugged.vlan))
    }

    fn taps(&mut self, files: Vec<File>, name: &str) -> NetBackend {
        NetBackend::Tap(
            files
                .into_iter()
                .map(|file| self.pass_as(file, name))
                .collect(),
        )
    }

    /// Opens a tap. One of ours is up only when `restrict` has said what it may reach: what a bridge sends to it
    /// before waits for the guest.
    fn tap(
        &mut self,
        card: &Interface,
        pairs: u16,
        restrict: impl FnOnce(&str) -> Result<()>,
    ) -> Result<(Vec<File>, String)> {
        let bridge = match card.source.as_deref() {
            Some(name) if card.kind == "bridge" => {
                let index = link::index(name).map_err(|e| {
                    Error::system(format!("Cannot get interface index on {name}"), &e)
                })?;
                if !link::is_bridge(name) {
                    return Err(Error::unsupported(format!("'{name}' is not a bridge")));
                }
                Some(index)
            }
            _ => None,
        };
        let wanted = card.target.as_deref().unwrap_or("vnet%d");
        if card.target.is_some() && !card.managed && link::index(wanted).is_err() {
            return Err(Error::unsupported(format!(
                "target managed='no' but specified dev doesn't exist: '{wanted}'"
            )));
        }
        let (files, name) = tap::open(wanted, pairs)
            .map_err(|e| Error::system(format!("Unable to create tap device {wanted}"), &e))?;
        if !card.managed {
            restrict(&name)?;
            return Ok((files, name));
        }
        // As libvirt: the bridge must not take the guest's own address for its own.
        let mut mac = card.mac;
        mac[0] = 0xfe;
        let settings = link::Settings {
            mac: Some(mac),
            mtu: card.mtu.map(u32::from),
            bridge,
            up: None,
        };
        let cannot = |e: &io::Error| Error::system(format!("cannot set up tap device {name}"), e);
        let index = link::index(&name).map_err(|e| cannot(&e))?;
        link::set(index, settings).map_err(|e| cannot(&e))?;
        restrict(&name)?;
        let up = link::Settings {
            up: Some(true),
            ..link::Settings::default()
        };
        link::set(index, up).map_err(|e| cannot(&e))?;
        Ok((files, name))
    }

    fn macvtap(&mut self, card: &Interface, pairs: u16) -> Result<(Vec<File>, String)> {
        let lower = card.source.as_deref().unwrap_or_default();
        let lower_index = link::index(lower)
            .map_err(|e| Error::system(format!("Cannot get interface index on {lower}"), &e))?;
        // MACVLAN_MODE_*, linux/if_link.h
        let mode = match card.mode.as_deref() {
            Some("private") => 1,
            Some("bridge") => 4,
            Some("passthrough") => 8,
            _ => 2,
        };
        let name = match &card.target {
            Some(name) => {
                link::make_macvtap(name, lower_index, mode, card.mac)
                    .map_err(|e| cannot_make(name, lower, &e))?;
                name.clone()
            }
            None => first_free(lower, |name| {
                link::make_macvtap(name, lower_index, mode, card.mac)
            })?,
        };
        self.made.links.push(name.clone());
        let cannot = |what: &str, e: &io::Error| Error::system(format!("{what} {name}"), e);
        let index = link::index(&name).map_err(|e| cannot("cannot find", &e))?;
        let settings = link::Settings {
            mtu: card.mtu.map(u32::from),
            up: Some(true),
            ..link::Settings::default()
        };
        link::set(index, settings).map_err(|e| cannot("cannot set up", &e))?;
        let path = format!("/dev/tap{index}");
        let mut files = Vec::new();
        for _ in 0..pairs {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&path)
                .map_err(|e| cannot(&format!("cannot open {path} of"), &e))?;
            tap::adopt(&file, pairs).map_err(|e| cannot("cannot set up", &e))?;
            files.push(file);
        }
        Ok((files, name))
    }
}

/// Whether a bridge of the host's can put a card into VLANs.
///
/// # Errors
/// VIR_ERR_CONFIG_UNSUPPORTED.
pub fn check_vlan(bridge: &str, vlan: &Vlan) -> Result<()> {
    if !link::filters_vlans(bridge) {
        return Err(Error::unsupported(format!(
            "bridge '{bridge}' does not filter VLANs: its vlan_filtering is off"
        )));
    }
    vlan.for_bridge()
        .map_err(|id| Error::unsupported(format!("a bridge has no VLAN {id}, only 1 to 4094")))
}

/// What a bridge's port may reach.
pub fn set_port(name: &str, isolated: bool, vlan: Option<&Vlan>) -> Result<()> {
    if !isolated && vlan.is_none() {
        return Ok(());
    }
    let index = link::index(name).map_err(|e| Error::system(format!("cannot find {name}"), &e))?;
    if isolated {
        link::isolate_port(index, true)
            .map_err(|e| Error::system(format!("cannot isolate port {name}"), &e))?;
    }
    if let Some(vlan) = vlan {
        link::set_vlans(index, &vlan.tags)
            .map_err(|e| Error::system(format!("cannot set the VLANs of port {name}"), &e))?;
    }
    Ok(())
}

fn cannot_make(name: &str, lower: &str, error: &io::Error) -> Error {
    Error::system(
        format!("error creating macvtap interface {name}@{lower}"),
        error,
    )
}

/// Tries `macvtap0`, `macvtap1`... until one is free.
fn first_free(lower: &str, make: impl Fn(&str) -> io::Result<()>) -> Result<String> {
    const MOST: u32 = 8192;
    for number in 0..MOST {
        let name = format!("macvtap{number}");
        match make(&name) {
            Ok(()) => return Ok(name),
            // The name's, or passthrough's where the device has one already.
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) && link::index(&name).is_ok() => {}
            Err(e) => return Err(cannot_make(&name, lower, &e)),
        }
    }
    Err(Error::new(
        ErrorCode::OPERATION_FAILED,
        "no name for a macvtap is free",
    ))
}

/// The host's device of a running interface.
fn note_target(element: &mut Element, name: &str) {
    let mut target = element
        .take_child("target")
        .unwrap_or_else(|| Element::new("target"));
    target.set_attr("dev", name);
    element.push(target);
}

/// libvirt's limits as the VMM has them: kilobytes (1000) a second, kibibytes of a burst.
pub fn bandwidth(rate: Rate) -> Bandwidth {
    Bandwidth {
        average: rate.average.saturating_mul(1000),
        peak: rate.peak.saturating_mul(1000),
        burst: rate.burst.saturating_mul(1024),
    }
}
