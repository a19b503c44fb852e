//! Typed definition to text.

use super::{Clock, ClockOffset, Cpu, Devices, Domain, Memory, Os, Vcpu, View};
use crate::dom::{Element, format_element};
use crate::grammar;

/// Bytes that most documents have less of.
const USUAL: usize = 4 << 10;

pub(super) fn format(domain: &Domain, view: View, secrets: bool) -> String {
    let mut root = element(domain, view);
    if !secrets && let Some(devices) = root.elements_mut().find(|e| e.name == "devices") {
        drop_secrets(devices);
    }
    grammar::domain().arrange(&mut root);
    let mut out = String::with_capacity(USUAL);
    format_element(&mut out, &root, 0);
    out
}

fn element(domain: &Domain, view: View) -> Element {
    let mut root = Element::new("domain").with_attr("type", domain.domain_type.as_str());
    if view == View::Live {
        root.set_opt_attr("id", domain.id.map(|id| id.to_string()));
    }
    declare_namespaces(&mut root, &domain.rest);
    root.push(Element::with_text("name", &domain.name));
    push_text(&mut root, "uuid", domain.uuid.map(|u| u.to_string()));
    push_text(&mut root, "title", domain.title.clone());
    push_text(&mut root, "description", domain.description.clone());
    push(&mut root, domain.metadata.clone());
    memory(&mut root, &domain.memory);
    root.push(vcpu(&domain.vcpu));
    root.push(os(&domain.os));
    push(&mut root, domain.features.clone());
    push(&mut root, domain.cpu.as_ref().map(cpu));
    root.push(clock(&domain.clock));
    root.push(Element::with_text(
        "on_poweroff",
        domain.on_poweroff.as_str(),
    ));
    root.push(Element::with_text("on_reboot", domain.on_reboot.as_str()));
    root.push(Element::with_text("on_crash", domain.on_crash.as_str()));
    root.push(devices(&domain.devices, view));
    for e in &domain.rest {
        root.push(e.clone());
    }
    root
}

/// What only a client that may write sees: passwords of displays, cookies of web servers.
fn drop_secrets(element: &mut Element) {
    for child in element.elements_mut() {
        match child.name.as_str() {
            "graphics" => {
                child.take_attr("passwd");
                child.take_attr("passwdValidTo");
            }
            "source" => {
                child.take_children("cookies");
            }
            _ => {}
        }
        drop_secrets(child);
    }
}

/// The prefixes that elements beside the ordinary ones are written with.
fn declare_namespaces(root: &mut Element, rest: &[Element]) {
    for e in rest {
        let Some((prefix, _)) = e.name.split_once(':') else {
            continue;
        };
        if let Some(uri) = grammar::domain().namespace(prefix) {
            root.set_attr(&format!("xmlns:{prefix}"), uri);
        }
    }
}

fn push(parent: &mut Element, child: Option<Element>) {
    if let Some(child) = child {
        parent.push(child);
    }
}

fn push_text(parent: &mut Element, name: &str, text: Option<String>) {
    if let Some(text) = text.filter(|t| !t.is_empty()) {
        parent.push(Element::with_text(name, text));
    }
}

fn kib(name: &str, value: u64) -> Element {
    Element::with_text(name, value.to_string()).with_attr("unit", "KiB")
}

fn memory(root: &mut Element, memory: &Memory) {
    if let Some(max) = memory.max {
        root.push(kib("maxMemory", max.kib).with_attr("slots", max.slots.to_string()));
    }
    let mut total = kib("memory", memory.total_kib);
    total.set_opt_attr(
        "dumpCore",
        memory.dump_core.map(|on| if on { "on" } else { "off" }),
    );
    root.push(total);
    if memory.current_kib != 0 {
        root.push(kib("currentMemory", memory.current_kib));
    }
}

fn vcpu(vcpu: &Vcpu) -> Element {
    let mut e = Element::with_text("vcpu", vcpu.max.to_string());
    let placement = if vcpu.auto_placement {
        "auto"
    } else {
        "static"
    };
    e.set_attr("placement", placement);
    e.set_opt_attr("cpuset", vcpu.cpuset.as_deref());
    e.set_opt_attr("current", vcpu.current.map(|n| n.to_string()));
    e
}

fn os(os: &Os) -> Element {
    let mut e = Element::new("os");
    e.set_opt_attr("firmware", os.firmware.as_deref());
    let mut kind = Element::with_text("type", &os.os_type);
    kind.set_opt_attr("arch", os.arch.as_deref());
    kind.set_opt_attr("machine", os.machine.as_deref());
    e.push(kind);
    push_text(&mut e, "kernel", os.kernel.clone());
    push_text(&mut e, "initrd", os.initrd.clone());
    push_text(&mut e, "cmdline", os.cmdline.clone());
    for device in &os.boot {
        e.push(Element::new("boot").with_attr("dev", device.as_str()));
    }
    for other in &os.rest {
        e.push(other.clone());
    }
    e
}

fn cpu(cpu: &Cpu) -> Element {
    let mut e = Element::new("cpu");
    e.set_opt_attr("mode", cpu.mode.as_deref());
    e.set_opt_attr("match", cpu.match_.as_deref());
    e.set_opt_attr("check", cpu.check.as_deref());
    e.set_opt_attr("migratable", cpu.migratable.as_deref());
    if let Some(model) = &cpu.model {
        let mut m = Element::with_text("model", &model.name);
        m.set_opt_attr("fallback", model.fallback.as_deref());
        m.set_opt_attr("vendor_id", model.vendor_id.as_deref());
        e.push(m);
    }
    push_text(&mut e, "vendor", cpu.vendor.clone());
    if let Some(t) = &cpu.topology {
        let mut topology = Element::new("topology");
        for (name, value) in [
            ("sockets", t.sockets),
            ("dies", t.dies),
            ("cores", t.cores),
            ("threads", t.threads),
        ] {
            topology.set_attr(name, value.to_string());
        }
        e.push(topology);
    }
    for feature in &cpu.features {
        let mut f = Element::new("feature");
        f.set_opt_attr("policy", feature.policy.map(|p| p.as_str()));
        f.set_attr("name", &feature.name);
        e.push(f);
    }
    for other in &cpu.rest {
        e.push(other.clone());
    }
    e
}

fn clock(clock: &Clock) -> Element {
    let mut e = Element::new("clock");
    match &clock.offset {
        ClockOffset::Utc { adjustment } => {
            e.set_attr("offset", "utc");
            e.set_opt_attr("adjustment", adjustment.as_deref());
        }
        ClockOffset::Localtime { adjustment } => {
            e.set_attr("offset", "localtime");
            e.set_opt_attr("adjustment", adjustment.as_deref());
        }
        ClockOffset::Timezone(zone) => {
            e.set_attr("offset", "timezone");
            e.set_attr("timezone", zone);
        }
        ClockOffset::Variable {
            adjustment,
            localtime,
        } => {
            e.set_attr("offset", "variable");
            e.set_attr("adjustment", adjustment.to_string());
            e.set_attr("basis", if *localtime { "localtime" } else { "utc" });
        }
        ClockOffset::Absolute { start } => {
            e.set_attr("offset", "absolute");
            e.set_opt_attr("start", start.map(|s| s.to_string()));
        }
    }
    for timer in &clock.timers {
        e.push(timer.clone());
    }
    e
}

fn devices(devices: &Devices, view: View) -> Element {
    let mut e = Element::new("devices");
    push_text(&mut e, "emulator", devices.emulator.clone());
    for serial in &devices.serials {
        e.push(super::char_device::format("serial", serial, view));
    }
    for console in &devices.consoles {
        e.push(super::char_device::format("console", console, view));
    }
    for other in &devices.rest {
        let mut other = other.clone();
        if view == View::Inactive {
            drop_aliases(&mut other);
            if other.name == "channel" {
                for target in other.elements_mut().filter(|e| e.name == "target") {
                    target.take_attr("state");
                }
            }
        }
        e.push(other);
    }
    e
}

/// Device ids that were given at start, and not by the user.
fn drop_aliases(device: &mut Element) {
    if let Some(alias) = device.take_child("alias")
        && alias.attr("name").is_some_and(|n| n.starts_with("ua-"))
    {
        device.push(alias);
    }
}
