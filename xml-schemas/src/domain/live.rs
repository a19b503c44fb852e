//! What only a running instance has. A client that defines what `dumpxml` showed of a running
//! domain must not bring it along.

use crate::dom::{Element, Node};

pub(super) fn drop_from(root: &mut Element) {
    root.take_attr("id");
    for section in root.elements_mut() {
        match section.name.as_str() {
            "devices" => section.elements_mut().for_each(drop_from_device),
            // A dynamic label is chosen at start.
            "seclabel" if section.attr("type") != Some("static") => {
                section.take_children("label");
                section.take_children("imagelabel");
            }
            _ => {}
        }
    }
}

fn drop_from_device(device: &mut Element) {
    device.children.retain(|n| match n {
        Node::Element(e) if e.name == "alias" => {
            e.attr("name").is_some_and(|name| name.starts_with("ua-"))
        }
        _ => true,
    });
    match device.name.as_str() {
        "console" | "serial" | "parallel" | "channel" => {
            device.take_attr("tty");
            if device.attr("type") == Some("pty") {
                drop_attribute(device, "source", "path");
            }
            // Whether something in the guest has the port open.
            for target in device.elements_mut().filter(|e| e.name == "target") {
                target.take_attr("state");
            }
        }
        "disk" => {
            device.take_children("mirror");
            for source in device.elements_mut().filter(|e| e.name == "source") {
                source.take_attr("index");
            }
        }
        "interface" => {
            let made_at_start = device
                .child("target")
                .and_then(|target| target.attr("dev"))
                .is_some_and(|dev| {
                    ["vnet", "macvtap", "macvlan"]
                        .iter()
                        .any(|prefix| dev.starts_with(prefix))
                });
            if made_at_start {
                device.take_children("target");
            }
            // A network's port, and the bridge that the network has now.
            if device.attr("type") == Some("network") {
                for source in device.elements_mut().filter(|e| e.name == "source") {
                    for part in ["portid", "bridge"] {
                        source.take_attr(part);
                    }
                }
            }
        }
        _ => {}
    }
}

/// Removes an attribute of a child, and the child if nothing else is in it.
fn drop_attribute(device: &mut Element, child: &str, attribute: &str) {
    for part in device.elements_mut().filter(|e| e.name == child) {
        part.take_attr(attribute);
    }
    device
        .children
        .retain(|n| !matches!(n, Node::Element(e) if e.name == child && e.is_empty()));
}
