//! The domain capabilities document: what a domain of one kind may use.

use crate::dom::{Element, format_element};

/// `<domainCapabilities>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DomainCapabilities {
    /// Path of `vireo-vmm`.
    pub path: String,
    /// `kvm` or `qemu`.
    pub domain_type: String,
    /// Canonical machine name.
    pub machine: String,
    /// `x86_64` or `i686`.
    pub arch: String,
    /// The most vCPUs.
    pub max_vcpus: u32,
    /// Firmware kinds that can be chosen automatically (`bios`, `efi`); empty: none yet.
    pub firmware: Vec<String>,
    /// Firmware files that can be given as `<loader>`; empty: none.
    pub loaders: Vec<String>,
    /// CPU modes.
    pub cpu: CpuModes,
    /// Devices, in libvirt's order: disk, graphics, video, hostdev, rng, filesystem, tpm,
    /// redirdev, channel.
    pub devices: Vec<DeviceCapability>,
    /// `<features>`: `vmcoreinfo`, `genid`, `backingStoreInput`, `backup` and whether they work.
    pub features: Vec<(String, bool)>,
}

/// `<cpu>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CpuModes {
    /// `host-passthrough` works.
    pub host_passthrough: bool,
    /// `maximum` works.
    pub maximum: bool,
    /// `host-model` works: model, vendor, features beyond it (name, required).
    pub host_model: Option<HostModel>,
    /// `custom` models: name, usable, vendor.
    pub custom: Vec<CustomModel>,
}

/// `<mode name='host-model'>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostModel {
    /// The model's name.
    pub model: String,
    /// The vendor's name.
    pub vendor: Option<String>,
    /// Features beyond (`true`) or missing from (`false`) the model.
    pub features: Vec<(String, bool)>,
}

/// `<mode name='custom'><model>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CustomModel {
    /// The model's name.
    pub name: String,
    /// Whether this host can run it; `None`: unknown.
    pub usable: Option<bool>,
    /// The vendor's name, `unknown` if none.
    pub vendor: String,
}

/// A device element, with the values its attributes may have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeviceCapability {
    /// Element name (`disk`, `rng`…).
    pub name: String,
    /// Whether domains may have it.
    pub supported: bool,
    /// Attribute (libvirt's enum name) and values.
    pub enums: Vec<(String, Vec<String>)>,
}

impl DeviceCapability {
    /// A device that domains cannot have.
    pub fn unsupported(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..Self::default()
        }
    }
}

impl DomainCapabilities {
    /// The document.
    pub fn format(&self) -> String {
        let mut out = String::new();
        format_element(&mut out, &self.element(), 0);
        out
    }

    fn element(&self) -> Element {
        let mut root = Element::new("domainCapabilities");
        root.push(Element::with_text("path", &self.path));
        root.push(Element::with_text("domain", &self.domain_type));
        if !self.machine.is_empty() {
            root.push(Element::with_text("machine", &self.machine));
        }
        root.push(Element::with_text("arch", &self.arch));
        root.push(Element::new("vcpu").with_attr("max", self.max_vcpus.to_string()));
        root.push(supported("iothreads", true));
        root.push(self.os());
        root.push(self.cpu.element());
        let mut devices = Element::new("devices");
        for device in &self.devices {
            let mut e = supported(&device.name, device.supported);
            if device.supported {
                for (name, values) in &device.enums {
                    e.push(enumeration(name, values));
                }
            }
            devices.push(e);
        }
        root.push(devices);
        let mut features = Element::new("features").with_child(supported("gic", false));
        for (name, works) in &self.features {
            features.push(supported(name, *works));
        }
        root.push(features);
        root
    }

    fn os(&self) -> Element {
        let mut os = supported("os", true).with_child(enumeration("firmware", &self.firmware));
        let mut loader = supported("loader", !self.loaders.is_empty());
        if !self.loaders.is_empty() {
            for path in &self.loaders {
                loader.push(Element::with_text("value", path));
            }
            loader.push(enumeration("type", &["rom".to_owned()]));
            loader.push(enumeration("readonly", &["yes".to_owned()]));
            loader.push(enumeration("secure", &["no".to_owned()]));
        }
        os.push(loader);
        os
    }
}

impl CpuModes {
    fn element(&self) -> Element {
        let mode = |name: &str, works: bool| {
            Element::new("mode")
                .with_attr("name", name)
                .with_attr("supported", yes_no(works))
        };
        let migratable = |name: &str| enumeration(name, &["on".to_owned(), "off".to_owned()]);
        let mut cpu = Element::new("cpu");
        let mut e = mode("host-passthrough", self.host_passthrough);
        if self.host_passthrough {
            e.push(migratable("hostPassthroughMigratable"));
        }
        cpu.push(e);
        let mut e = mode("maximum", self.maximum);
        if self.maximum {
            e.push(migratable("maximumMigratable"));
        }
        cpu.push(e);
        let mut e = mode("host-model", self.host_model.is_some());
        if let Some(model) = &self.host_model {
            e.push(Element::with_text("model", &model.model).with_attr("fallback", "forbid"));
            if let Some(vendor) = &model.vendor {
                e.push(Element::with_text("vendor", vendor));
            }
            for (name, required) in &model.features {
                let policy = if *required { "require" } else { "disable" };
                let feature = Element::new("feature").with_attr("policy", policy);
                e.push(feature.with_attr("name", name));
            }
        }
        cpu.push(e);
        let mut e = mode("custom", !self.custom.is_empty());
        for model in &self.custom {
            let usable = model.usable.map_or("unknown", yes_no);
            let vendor = if model.vendor.is_empty() {
                "unknown"
            } else {
                &model.vendor
            };
            e.push(
                Element::with_text("model", &model.name)
                    .with_attr("usable", usable)
                    .with_attr("vendor", vendor),
            );
        }
        cpu.push(e);
        cpu
    }
}

fn yes_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

fn supported(name: &str, works: bool) -> Element {
    Element::new(name).with_attr("supported", yes_no(works))
}

fn enumeration(name: &str, values: &[String]) -> Element {
    let mut e = Element::new("enum").with_attr("name", name);
    for value in values {
        e.push(Element::with_text("value", value));
    }
    e
}
