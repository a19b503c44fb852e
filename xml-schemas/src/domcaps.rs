//! The domain capabilities document: what a domain of one kind may use.

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
    /// Loader files that exist; empty: none.
    pub loaders: Vec<String>,
    /// CPU modes.
    pub cpu: CpuModes,
    /// Devices that can be used.
    pub devices: Vec<DeviceCapability>,
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
