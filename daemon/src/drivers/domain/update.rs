//! Devices that change: in stored definitions, and in machines that run as far as libvirt changes them there.

use std::sync::Arc;

use uuid::Uuid;
use vmm_api::control::Call;
use xml_schemas::dom::Element;
use xml_schemas::domain::View;
use xml_schemas::domain::device::{self, Interface, IoTune, PciAddress};
use xml_schemas::network::port::Plug;
use xml_schemas::network::vlan::Vlan;
use xml_schemas::{Domain as Definition, XmlError};

use super::devices::{bandwidth, check_vlan, set_port};
use super::lifecycle::ask;
use super::machine::Made;
use super::metadata::impact;
use super::networks::{attach, note_plug};
use super::object::{Domain, Pinned};
use super::plug::{meant, move_to, new_device, with_device, write};
use super::record::Folder;
use super::which_device::{find, in_definition, parse, says, target};
use super::{Driver, blocking, media};
use crate::drivers::network::plug::Owner;
use crate::error::{Error, ErrorCode, Result};
use crate::link;

/// VIR_DOMAIN_DEVICE_MODIFY_FORCE: a medium changes whatever the guest has locked.
pub const FORCE: u32 = 4;

fn unsupported(text: impl Into<String>) -> Error {
    Error::new(ErrorCode::OPERATION_UNSUPPORTED, text)
}

impl Driver {
    /// Changes a device as a document says.
    ///
    /// # Errors
    /// VIR_ERR_DEVICE_MISSING for what is not there; what cannot be changed while the machine runs.
    pub async fn update_device(
        self: &Arc<Self>,
        domain: Pinned,
        xml: &str,
        flags: u32,
    ) -> Result<()> {
        let force = flags & FORCE != 0;
        let flags = flags & !FORCE;
        impact(&domain.lock(), flags)?;
        let wanted = parse(xml)?;
        let job = domain.job().await?;
        let (stored, running) = meant(&domain.lock(), flags)?;
        let stored = match &stored {
            Some(_) if wanted.name == "controller" => {
                return Err(unsupported(
                    "persistent update of device 'controller' is not supported",
                ));
            }
            Some(definition) => {
                let at = find(definition, &wanted).map_err(|error| match target(&wanted) {
                    Some(dev) if wanted.name == "disk" => {
                        let text = format!("target {dev} doesn't exist.");
                        Error::new(ErrorCode::INVALID_ARG, text)
                    }
                    _ => in_definition(error),
                })?;
                let mut without = Definition::clone(definition);
                let old = without.devices.rest.remove(at);
                let mut new = wanted.clone();
                for part in ["address", "mac"] {
                    if let Some(kept) = old.child(part).filter(|_| new.child(part).is_none()) {
                        new.push(kept.clone());
                    }
                }
                let mut changed = with_device(self, &without, View::Inactive, &new)?;
                if let Some(now) = new_device(&without, &changed, &wanted.name) {
                    move_to(&mut changed.devices.rest, now, definition, at);
                }
                Some(changed)
            }
            None => None,
        };
        if let Some(definition) = running {
            let at = find(&definition, &wanted).map_err(|error| match target(&wanted) {
                Some(dev) if wanted.name == "disk" => {
                    Error::internal(format!("disk '{dev}' not found"))
                }
                _ => error,
            })?;
            let have = &definition.devices.rest[at];
            match wanted.name.as_str() {
                "interface" => self.update_card(&domain, have, &wanted).await?,
                "disk" => self.update_disk(&domain, have, &wanted, force).await?,
                kind => {
                    return Err(unsupported(format!(
                        "live update of device '{kind}' is not supported"
                    )));
                }
            }
        }
        self.keep(&domain, stored).await?;
        drop(job);
        Ok(())
    }

    /// Changes what is kept of a running device.
    fn note_change(
        &self,
        domain: &Domain,
        alias: Option<&str>,
        change: impl FnOnce(&mut Element),
    ) -> Result<()> {
        let mut inner = domain.lock();
        let live = inner.live_mut()?;
        let mut now = Definition::clone(&live.definition);
        let mut devices = now.devices.rest.iter_mut();
        if let Some(e) = devices.find(|e| device::alias(e) == alias) {
            change(e);
        }
        write(&now, &Folder(live.folder.clone()));
        live.definition = Arc::new(now);
        self.write_record(&inner);
        Ok(())
    }

    /// Of a running disk what the machine does not see can be changed, and of a drive its medium.
    async fn update_disk(
        &self,
        domain: &Pinned,
        have: &Element,
        wanted: &Element,
        force: bool,
    ) -> Result<()> {
        let mut filled = wanted.clone();
        device::Disk::complete(&mut filled).map_err(XmlError::nowhere)?;
        if media::is_drive(have) && device::DriveAddress::of(have)?.is_none() {
            return Err(media::left_out());
        }
        let same = media::same_medium(have, &filled)?;
        check_disk(have, wanted, &filled, same)?;
        if !same {
            self.change_medium(domain, have, &filled, force).await?;
        }
        let policy = |e: &Element| Some(e.child("source")?.attr("startupPolicy")?.to_owned());
        let (policy, snapshot) = (policy(wanted), wanted.attr("snapshot").map(str::to_owned));
        self.note_change(domain, device::alias(have), |disk| {
            disk.take_attr("snapshot");
            disk.set_opt_attr("snapshot", snapshot);
            for source in disk.elements_mut().filter(|e| e.name == "source") {
                source.take_attr("startupPolicy");
                source.set_opt_attr("startupPolicy", policy.clone());
            }
        })
    }

    /// A running card gets another bridge, other limits, its cable in or out.
    async fn update_card(&self, domain: &Pinned, have: &Element, wanted: &Element) -> Result<()> {
        let (old, new) = (Interface::read(have)?, Interface::read(wanted)?);
        check_card(have, wanted, (&old, &new))?;
        let id = old.alias.clone();
        let id = id.ok_or_else(|| Error::internal("a running device has no id"))?;
        let reconnect = || {
            Err(unsupported(format!(
                "unable to change config on '{}' network type",
                new.kind
            )))
        };
        let (from, to) = (Place::of(have), Place::of(wanted));
        let stays = new.source.is_none() && (new.kind == old.kind || from.network.is_some())
            || from.is(&to) && from.kind(&old) == to.kind(&new);
        let isolated =
            |e: &Element| e.child("port").and_then(|p| p.attr("isolated")) == Some("yes");
        let vlan = |e: &Element| e.child("vlan").map(Vlan::read).transpose();
        // Whatever else the document says, the machine's end of it is as it was.
        let same_filter = new.filter == old.filter;
        if !same_filter || stays && vlan(have)? != vlan(wanted)? {
            return reconnect();
        }
        let mut limits = (new.inbound, new.outbound);
        let mut now = wanted.clone();
        if stays {
            if isolated(have) != isolated(wanted) {
                let on = isolated(wanted);
                let (Some(bridge), Some(tap)) = (from.bridge.clone(), old.target.clone()) else {
                    return reconnect();
                };
                blocking(move || {
                    let set = link::index(&tap).and_then(|tap| link::isolate_port(tap, on));
                    set.map_err(|error| {
                        let on = u8::from(on);
                        let text =
                            format!("Unable to set bridge {bridge} port {tap} isolated to {on}");
                        Error::system(text, &error)
                    })
                })
                .await??;
            }
        } else {
            let tapped = matches!(old.kind.as_str(), "bridge" | "network");
            let bridged = matches!(new.kind.as_str(), "bridge" | "network");
            let (Some(bridge), Some(tap)) = (from.bridge.clone(), old.target.clone()) else {
                return reconnect();
            };
            if !tapped || !bridged || !old.managed {
                return reconnect();
            }
            let moved = Move {
                id: id.clone(),
                tap,
                from: bridge,
                isolated: isolated(wanted),
                vlan: vlan(wanted)?,
            };
            let rates = self.move_card(domain, &mut now, &new, moved).await?;
            if limits == (None, None) {
                limits = rates;
            }
            if let Some((network, port)) = from.network.zip(from.port)
                && let Some(file) = self.networks.leave(&network, port)
            {
                let mut inner = domain.lock();
                if let Some(made) = inner.live.as_mut().map(|live| &mut live.made) {
                    made.forget_file(&file);
                }
            }
        }
        // From here on it is where it is to be: that is kept, whatever becomes of the rest.
        let (link_up, same_limits) = (new.link_up, limits == (old.inbound, old.outbound));
        self.note_change(domain, Some(&id), |card| {
            if !stays {
                card.set_attr("type", now.attr("type").unwrap_or_default());
                for part in ["source", "vlan"] {
                    card.take_children(part);
                    now.take_children(part)
                        .into_iter()
                        .for_each(|part| card.push(part));
                }
            }
            card.take_children("port");
            now.take_children("port")
                .into_iter()
                .for_each(|port| card.push(port));
        })?;
        if !same_limits {
            let call = Call::SetBandwidth {
                id: id.clone(),
                inbound: Some(limits.0.map(bandwidth).unwrap_or_default()),
                outbound: Some(limits.1.map(bandwidth).unwrap_or_default()),
            };
            ask(domain, call).await?;
            self.note_change(domain, Some(&id), |card| {
                card.take_children("bandwidth");
                now.take_children("bandwidth")
                    .into_iter()
                    .for_each(|part| card.push(part));
            })?;
        }
        if link_up != old.link_up || wanted.child("link").is_some() {
            let call = Call::SetLink {
                id: id.clone(),
                up: link_up,
            };
            ask(domain, call).await?;
            self.note_change(domain, Some(&id), |card| {
                card.take_children("link");
                let state = if link_up { "up" } else { "down" };
                card.push(Element::new("link").with_attr("state", state));
            })?;
        }
        Ok(())
    }

    /// Makes a card's tap a port of another bridge, and notes in the element which. What limits the card's new group
    /// in a network has.
    async fn move_card(
        &self,
        domain: &Pinned,
        element: &mut Element,
        new: &Interface,
        moved: Move,
    ) -> Result<(Option<device::Rate>, Option<device::Rate>)> {
        let name = new.source.clone().unwrap_or_default();
        let mut rates = (None, None);
        let mut port = None;
        let (bridge, isolated, vlan) = if new.kind == "network" {
            let owner = Owner {
                name: domain.name().name.clone(),
                uuid: domain.uuid,
            };
            let group = element.child("source").and_then(|s| s.attr("portgroup"));
            let vlan = element.child("vlan");
            let plugged = self.networks.plug(&name, group, vlan, &owner, new.mac)?;
            let (Plug::Network { bridge } | Plug::Bridge { bridge }) = plugged.plug.clone() else {
                drop(self.networks.leave(&name, plugged.port));
                return Err(unsupported(
                    "unable to change config on 'network' network type",
                ));
            };
            note_plug(element, &name, &plugged);
            rates = (plugged.bandwidth.inbound, plugged.bandwidth.outbound);
            let made = Made {
                sockets: vec![plugged.file.clone()],
                ..Made::default()
            };
            // Noted first: whatever happens, it goes with the domain.
            let mut inner = domain.lock();
            inner.live_mut()?.made.add_device(&moved.id, made);
            self.write_record(&inner);
            port = Some(plugged.port);
            (bridge, moved.isolated || plugged.isolated, plugged.vlan)
        } else {
            if link::index(&name).is_err() {
                return Err(Error::failed(format!("bridge {name} doesn't exist")));
            }
            if let Some(vlan) = &moved.vlan {
                check_vlan(&name, vlan)?;
            }
            (name.clone(), moved.isolated, moved.vlan)
        };
        let (tap, from) = (moved.tap, moved.from);
        let attached = blocking(move || {
            let done = match link::is_bridge(&bridge) {
                true => attach(&tap, &bridge, || set_port(&tap, isolated, vlan.as_ref())),
                // Without taking it down for what can't be.
                false => Err(Error::system(
                    format!("Unable to add bridge {bridge} port {tap}"),
                    &std::io::Error::from_raw_os_error(libc::EOPNOTSUPP),
                )),
            };
            done.inspect_err(|_| {
                if link::is_bridge(&bridge)
                    && let Err(error) = attach(&tap, &from, || Ok(()))
                {
                    log::error!("{tap} is not back on bridge {from}: {error}");
                }
            })
        });
        if let Err(error) = attached.await.and_then(|done| done) {
            if let Some(port) = port {
                drop(self.networks.leave(&name, port));
            }
            return Err(error);
        }
        Ok(rates)
    }
}

/// A card on its way from a bridge to another one.
struct Move {
    id: String,
    tap: String,
    from: String,
    isolated: bool,
    vlan: Option<Vlan>,
}

/// What a card is connected to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Place {
    network: Option<String>,
    group: Option<String>,
    port: Option<Uuid>,
    bridge: Option<String>,
    device: Option<String>,
    mode: Option<String>,
}

impl Place {
    fn of(interface: &Element) -> Self {
        let source = interface.child("source");
        let attr = |name: &str| source.and_then(|s| s.attr(name)).map(str::to_owned);
        Self {
            network: attr("network"),
            group: attr("portgroup"),
            port: attr("portid").and_then(|id| id.parse().ok()),
            bridge: attr("bridge"),
            device: attr("dev"),
            mode: attr("mode"),
        }
    }

    /// What the definition has, whatever the network has made of it.
    fn kind(&self, card: &Interface) -> String {
        match self.network {
            Some(_) => "network".to_owned(),
            None => card.kind.clone(),
        }
    }

    /// Whether a document's place is this one.
    fn is(&self, wanted: &Self) -> bool {
        let same = |own: &Option<String>, other: &Option<String>| other.is_none() || own == other;
        match (&self.network, &wanted.network) {
            (Some(own), Some(other)) => own == other && self.group == wanted.group,
            (None, None) => {
                self.bridge == wanted.bridge
                    && self.device == wanted.device
                    && same(&self.mode, &wanted.mode)
            }
            _ => false,
        }
    }
}

/// What of a running card cannot be changed, in libvirt's order and words.
fn check_card(have: &Element, wanted: &Element, of: (&Interface, &Interface)) -> Result<()> {
    let (old, new) = of;
    let refuse = |what: &str| Err(unsupported(format!("cannot modify {what}")));
    if old.mac != new.mac {
        return Err(unsupported(format!(
            "cannot change network interface mac address from {} to {}",
            old.mac_text(),
            new.mac_text()
        )));
    }
    for rate in [new.inbound, new.outbound].into_iter().flatten() {
        if rate.floor != 0 && new.kind != "network" {
            return Err(Error::unsupported(
                "floor attribute is not supported for this config",
            ));
        }
        if rate.floor != 0 {
            return Err(Error::unsupported("a guaranteed rate (floor)"));
        }
    }
    if !new.model.is_empty() && new.model != old.model {
        return Err(unsupported(format!(
            "cannot modify network device model from {} to {}",
            old.model, new.model
        )));
    }
    // What a document says nothing of stays as it is.
    let differs = |part: &str| match (have.child(part), wanted.child(part)) {
        (_, None) => false,
        (None, Some(_)) => true,
        (Some(own), Some(other)) => !says(own, other),
    };
    if differs("driver") {
        return refuse("virtio network device driver attributes");
    }
    if new.script.is_some() && new.script != old.script {
        return refuse("network device script attribute");
    }
    if new.target.is_some() && new.target != old.target {
        return refuse("network device tap name");
    }
    if new.address.is_some() && new.address != old.address {
        return refuse("network device guest PCI address");
    }
    if new.alias.is_some() && new.alias != old.alias {
        return refuse("network device alias");
    }
    if differs("rom") {
        return refuse("network device rom bar setting");
    }
    if new.boot_order.is_some() && new.boot_order != old.boot_order {
        return refuse("network device boot index setting");
    }
    if new.mtu.is_some() && new.mtu != old.mtu {
        return refuse("MTU");
    }
    Ok(())
}

/// What of a running disk cannot be changed, in libvirt's words. `filled` is `wanted` with what it leaves out.
fn check_disk(have: &Element, wanted: &Element, filled: &Element, same: bool) -> Result<()> {
    let refuse = |field: &str| {
        Err(unsupported(format!(
            "cannot modify field '{field}' of the disk"
        )))
    };
    let attr = |e: &Element, of: &str, name: &str| Some(e.child(of)?.attr(name)?.to_owned());
    let differs = |of: &str, name: &str| {
        let other = attr(wanted, of, name);
        other.is_some() && other != attr(have, of, name)
    };
    let text = |e: &Element, name: &str| e.child_text(name).map(|text| text.trim().to_owned());
    for (name, field) in [("device", "device"), ("bus", "bus")] {
        let of = |e: &Element| match name {
            "device" => e.attr(name).map(str::to_owned),
            _ => attr(e, "target", name),
        };
        if of(filled) != of(have) {
            return refuse(field);
        }
    }
    let drive = device::DriveAddress::of(filled)?;
    if drive.is_some() && drive != device::DriveAddress::of(have)? {
        return refuse("address");
    }
    if attr(wanted, "target", "tray").as_deref() == Some("open")
        && attr(have, "target", "tray").as_deref() != Some("open")
    {
        return refuse("tray");
    }
    let tune = |e: &Element, name: &str| text(e.child("iotune")?, name);
    for name in IoTune::NAMES.into_iter().chain(["group_name"]) {
        let other = tune(wanted, name).filter(|value| value != "0");
        if other.is_some() && other != tune(have, name) {
            return refuse(&format!("blkdeviotune {name}"));
        }
    }
    for name in ["serial", "wwn", "vendor", "product"] {
        let other = text(wanted, name);
        if other.is_some() && other != text(have, name) {
            return refuse(name);
        }
    }
    for name in [
        "cache",
        "error_policy",
        "rerror_policy",
        "io",
        "ioeventfd",
        "event_idx",
        "copy_on_read",
        "discard",
        "iothread",
        "detect_zeroes",
        "queues",
    ] {
        if differs("driver", name) {
            return refuse(name);
        }
    }
    for (name, field) in [
        ("readonly", "readonly"),
        ("shareable", "shared"),
        ("transient", "transient"),
    ] {
        if wanted.child(name).is_some() && have.child(name).is_none() {
            return refuse(field);
        }
    }
    if !media::is_drive(have) && differs("driver", "type") {
        return refuse("type");
    }
    for name in ["logical_block_size", "physical_block_size"] {
        if differs("blockio", name) {
            return refuse(&format!("blockio {name}"));
        }
    }
    if differs("boot", "order") {
        return refuse("boot order");
    }
    let place = PciAddress::of(wanted)?;
    if place.is_some() && place != PciAddress::of(have)? {
        return refuse("address");
    }
    if device::alias(wanted).is_some_and(|alias| device::alias(have) != Some(alias)) {
        return Err(Error::new(
            ErrorCode::OPERATION_DENIED,
            "changing device alias is not allowed",
        ));
    }
    let removable = media::is_drive(have);
    if !same && !removable {
        if matches!(have.attr("device"), Some("cdrom" | "floppy")) {
            return Err(media::left_out());
        }
        return Err(Error::unsupported(
            "disk source can be changed only in removable drives",
        ));
    }
    // What there is no name for.
    let mut rest = wanted.clone();
    rest.attributes.retain(|(name, _)| name != "snapshot");
    rest.take_children("iotune");
    for e in rest.elements_mut() {
        match e.name.as_str() {
            "source" => e
                .attributes
                .retain(|(name, _)| name != "startupPolicy" && name != "index"),
            "target" => drop(e.take_attr("tray")),
            _ => {}
        }
    }
    if removable {
        for part in ["source", "backingStore", "encryption"] {
            rest.take_children(part);
        }
        rest.take_attr("type");
        for driver in rest.elements_mut().filter(|e| e.name == "driver") {
            driver.take_attr("type");
        }
    }
    if !says(have, &rest) {
        return Err(unsupported("live update of device 'disk' is not supported"));
    }
    Ok(())
}
