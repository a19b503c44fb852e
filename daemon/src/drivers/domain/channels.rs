//! The channels of running domains: what of them the guest has open.

use std::path::Path;
use std::sync::Arc;

use vmm_api::control::{Answer, Call};
use xml_schemas::Domain as Definition;
use xml_schemas::dom::{Element, Node};
use xml_schemas::domain::device;

use super::lifecycle::ask;
use super::object::{Domain, Inner};
use super::{Driver, agent, plug};
use crate::error::{Error, Result};
use crate::events::DomainEvent;

/// Whether a channel's path was chosen by the daemon that has the folder `channels`, for a run that is over: the
/// definition comes from a saved image, say, or was taken from a running domain.
pub fn made_up(channels: &Path, path: &str) -> bool {
    let folder = Path::new(path).parent();
    folder.is_some_and(|folder| {
        folder.parent() == Some(channels)
            && folder
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"domain-"))
    })
}

/// A definition without such paths: whoever runs it next chooses others.
pub fn without_paths(mut definition: Definition, channels: &Path) -> Definition {
    let all = definition.devices.rest.iter_mut();
    for channel in all.filter(|e| e.name == "channel") {
        for source in channel.elements_mut().filter(|e| e.name == "source") {
            if source
                .attr("path")
                .is_some_and(|path| made_up(channels, path))
            {
                source.take_attr("path");
            }
        }
        // What is left of it says nothing.
        let empty = |e: &Element| {
            let mut said = e.attributes.iter().map(|(name, _)| name);
            e.name == "source" && e.children.is_empty() && said.all(|name| name == "mode")
        };
        let keep = |node: &Node| !matches!(node, Node::Element(e) if empty(e));
        channel.children.retain(keep);
    }
    definition
}

/// Nothing in the guest has opened these channels yet; whether the agent's is among them.
pub fn shut(devices: &mut [Element]) -> bool {
    let mut agent = false;
    for channel in devices.iter_mut().filter(|e| e.name == "channel") {
        for target in channel.elements_mut().filter(|e| e.name == "target") {
            if target.attr("type") == Some("virtio") {
                target.set_attr("state", "disconnected");
                agent |= target.attr("name") == Some(agent::CHANNEL);
            }
        }
    }
    agent
}

/// A definition in which a channel is new, as it is in a running machine: with an id, and at a virtio-serial device
/// that is there. Where it is.
///
/// # Errors
/// There is no such device.
pub fn placed(before: &Definition, mut after: Definition) -> Result<(Definition, usize)> {
    let controllers = |of: &Definition| {
        let all = of.devices.rest.iter();
        all.filter(|e| e.name == "controller" && e.attr("type") == Some("virtio-serial"))
            .count()
    };
    if controllers(before) != controllers(&after) {
        return Err(Error::failed(
            "the machine has no such virtio-serial controller, and cannot get one while it runs",
        ));
    }
    after.devices.arrange();
    let at = plug::named(before, &mut after, "channel")?;
    Ok((after, at))
}

impl Driver {
    /// Asks which channels the guest has open.
    pub(super) async fn look_at_ports(&self, domain: &Domain) {
        let Ok(Answer::Status(status)) = ask(domain, Call::Query).await else {
            return;
        };
        let mut inner = domain.lock();
        if let Some(open) = &status.open_ports {
            self.ports_are(domain, &mut inner, open);
        }
    }

    /// Ports may have been opened and closed while no daemon watched.
    pub(super) fn ports_are(&self, domain: &Domain, inner: &mut Inner, open: &[String]) {
        let Some(live) = inner.live.as_ref() else {
            return;
        };
        let channels = live.definition.devices.rest.iter();
        let wrong = channels.filter(|e| e.name == "channel").filter_map(|e| {
            let id = device::alias(e)?;
            let known = e.child("target")?.attr("state") == Some("connected");
            let is_open = open.iter().any(|port| port == id);
            (known != is_open).then(|| (id.to_owned(), is_open))
        });
        let wrong: Vec<(String, bool)> = wrong.collect();
        for (id, is_open) in wrong {
            self.port_changed(domain, inner, &id, is_open);
        }
    }

    /// `state` in a running channel's target, and the guest agent's coming and going.
    ///
    /// Not written to its file: the next daemon asks the VMM, and a guest could have that done as often as it likes.
    pub(super) fn port_changed(&self, domain: &Domain, inner: &mut Inner, id: &str, open: bool) {
        let Some(live) = inner.live.as_mut() else {
            return;
        };
        let definition = Arc::make_mut(&mut live.definition);
        let mut agent = false;
        for channel in &mut definition.devices.rest {
            if channel.name != "channel" || device::alias(channel) != Some(id) {
                continue;
            }
            for target in channel.elements_mut().filter(|e| e.name == "target") {
                let state = if open { "connected" } else { "disconnected" };
                target.set_attr("state", state);
                agent |= target.attr("name") == Some(agent::CHANNEL);
            }
        }
        if agent {
            // VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_REASON_CHANNEL
            let state = if open { 1 } else { 2 };
            let event = DomainEvent::AgentLifecycle(state, 2);
            self.hub.emit(&domain.name_in(inner), &event);
        }
    }
}
