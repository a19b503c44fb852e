//! Tree to typed definition.

use std::collections::HashSet;

use uuid::Uuid;

use super::{
    BootDevice, Clock, ClockOffset, Cpu, CpuFeature, CpuModel, CpuTopology, Devices, Domain,
    DomainType, FeaturePolicy, LifecycleAction, MaxMemory, Memory, Os, Parsed, Vcpu, View,
};
use super::{canonical, live};
use crate::Validation;
use crate::dom::{self, Element, Node};
use crate::error::{ErrorCode, ErrorDomain, XmlError};
use crate::grammar;
use crate::units::{kib, number};

/// virArch: what processors there are.
pub const ARCHITECTURES: &[&str] = &[
    "aarch64",
    "alpha",
    "armv6l",
    "armv7b",
    "armv7l",
    "cris",
    "i686",
    "ia64",
    "itanium",
    "lm32",
    "loongarch64",
    "m68k",
    "microblaze",
    "microblazeel",
    "mips",
    "mips64",
    "mips64el",
    "mipsel",
    "openrisc",
    "parisc",
    "parisc64",
    "ppc",
    "ppc64",
    "ppc64le",
    "ppcemb",
    "riscv32",
    "riscv64",
    "s390",
    "s390x",
    "sh4",
    "sh4eb",
    "sparc",
    "sparc64",
    "unicore32",
    "x86_64",
    "xtensa",
    "xtensaeb",
];

/// Longest name: with `.xml` and a temporary file's suffix it must fit a file name.
const MAX_NAME_BYTES: usize = 200;

pub(super) fn parse(xml: &str, validation: Validation, view: View) -> Result<Parsed, XmlError> {
    let mut root = dom::parse(xml, "(domain_definition)")?;
    expect_domain(&root)?;
    if let Some(uri) = &root.namespace {
        return Err(XmlError::xml(format!(
            "the root element 'domain' must not be in a namespace, and it is in '{uri}'"
        ))
        .at(root.line));
    }
    if let Some(features) = root.child("features") {
        known_features(features)?;
    }
    let kind = root.child("os").and_then(|os| os.child("type"));
    if let Some(kind) = kind
        && let Some(arch) = kind.attr("arch")
        && !ARCHITECTURES.contains(&arch)
    {
        let text = format!("Unknown architecture {arch}");
        return Err(XmlError::unsupported(text).at(kind.line));
    }
    let metadata = root.child("metadata").map(|m| metadata(m, &root));
    grammar::domain().normalize(&mut root);
    let (warnings, refused) = match validation {
        Validation::Strict => {
            grammar::domain().check(&root)?;
            (Vec::new(), None)
        }
        // The typed parse comes first: where libvirt has words of its own, they are said.
        Validation::Lenient => {
            if let Some(e) = root.elements_mut().find(|e| e.name == "uuid")
                && let Ok(read) = uuid(e)
            {
                *e = Element::with_text("uuid", read.to_string());
            }
            grammar::domain().prune(&mut root)
        }
    };
    if view == View::Inactive {
        live::drop_from(&mut root);
    }
    canonical::apply(&mut root)?;
    grammar::domain().arrange(&mut root);
    let domain = typed(root, metadata, view)?;
    match refused {
        Some(error) => Err(error),
        None => Ok(Parsed { domain, warnings }),
    }
}

fn expect_domain(root: &Element) -> Result<(), XmlError> {
    if root.name == "domain" {
        return Ok(());
    }
    let what = format!("expecting root element of 'domain', not '{}'", root.name);
    Err(XmlError::xml(what).at(root.line))
}

/// What a definition says that it is, without reading on.
pub(super) fn identify(xml: &str) -> Result<(String, Option<Uuid>), XmlError> {
    let both = |root: &Element| root.child("name").is_some() && root.child("uuid").is_some();
    let mut root = dom::parse_until(xml, "(domain_definition)", both)?;
    expect_domain(&root)?;
    identity(&mut root)
}

fn identity(root: &mut Element) -> Result<(String, Option<Uuid>), XmlError> {
    let name = name(root.take_child("name"))?;
    let uuid = root.take_child("uuid").map(|e| uuid(&e)).transpose()?;
    Ok((name, uuid))
}

/// libvirt's parser takes no other elements, whatever its schema says of them.
fn known_features(features: &Element) -> Result<(), XmlError> {
    const KNOWN: [&str; 30] = [
        "acpi",
        "apic",
        "pae",
        "hap",
        "viridian",
        "privnet",
        "hyperv",
        "kvm",
        "pvspinlock",
        "capabilities",
        "pmu",
        "vmport",
        "gic",
        "smm",
        "ioapic",
        "hpt",
        "vmcoreinfo",
        "htm",
        "nested-hv",
        "msrs",
        "ccf-assist",
        "xen",
        "cfpc",
        "sbbc",
        "ibs",
        "tcg",
        "async-teardown",
        // Of later versions.
        "ras",
        "ps2",
        "aia",
    ];
    let mut features = features.elements();
    match features.find(|e| !KNOWN.contains(&e.name.as_str())) {
        None => Ok(()),
        Some(other) => {
            let what = format!("unexpected feature '{}'", other.name);
            let (code, domain) = (ErrorCode::ConfigUnsupported, ErrorDomain::Domain);
            Err(XmlError::new(code, domain, what).at(other.line))
        }
    }
}

fn typed(mut root: Element, metadata: Option<Element>, view: View) -> Result<Domain, XmlError> {
    let domain_type = domain_type(&root)?;
    let id = match (view, root.attr("id")) {
        (View::Live, Some(id)) => Some(number(id).ok_or_else(|| bad_attribute(&root, "id"))?),
        _ => None,
    };
    let (name, uuid) = identity(&mut root)?;
    let title = root.take_child("title");
    if let Some(title) = &title
        && title.text().contains('\n')
    {
        return Err(XmlError::xml("Domain title can't contain newlines").at(title.line));
    }
    root.take_child("metadata");
    let numa_kib = root.child("cpu").and_then(canonical::numa_memory_kib);
    let memory = memory(&mut root, numa_kib)?;
    let vcpu = root.take_child("vcpu").map_or_else(
        || {
            Ok(Vcpu {
                max: 1,
                current: None,
                auto_placement: false,
                cpuset: None,
            })
        },
        vcpu,
    )?;
    let os = os(root.take_child("os"))?;
    let cpu = root.take_child("cpu").map(cpu).transpose()?;
    let clock = root.take_child("clock").map_or_else(
        || {
            Ok(Clock {
                offset: ClockOffset::Utc { adjustment: None },
                timers: Vec::new(),
            })
        },
        clock,
    )?;
    let on_poweroff = lifecycle(&mut root, "on_poweroff", LifecycleAction::Destroy)?;
    let on_reboot = lifecycle(&mut root, "on_reboot", LifecycleAction::Restart)?;
    let on_crash = lifecycle(&mut root, "on_crash", LifecycleAction::Destroy)?;
    let devices = root
        .take_child("devices")
        .map_or_else(|| Ok(Devices::default()), devices)?;
    Ok(Domain {
        domain_type,
        id,
        name,
        uuid,
        title: title.map(|e| e.text()).filter(|t| !t.is_empty()),
        description: root
            .take_child("description")
            .map(|e| e.text())
            .filter(|t| !t.is_empty()),
        metadata: metadata.filter(|m| m.elements().next().is_some()),
        memory,
        vcpu,
        os,
        features: root.take_child("features"),
        cpu,
        clock,
        on_poweroff,
        on_reboot,
        on_crash,
        devices,
        rest: root.take_elements(),
    })
}

fn domain_type(root: &Element) -> Result<DomainType, XmlError> {
    match root.attr("type") {
        None => Err(XmlError::internal("missing domain type attribute").at(root.line)),
        Some("kvm") => Ok(DomainType::Kvm),
        Some("qemu") => Ok(DomainType::Qemu),
        Some(other) if grammar::domain().allows_value("type", other) => Err(XmlError::unsupported(
            format!("domain type '{other}' does not run here, only 'kvm' and 'qemu' do"),
        )
        .at(root.line)),
        Some(other) => {
            Err(XmlError::unsupported(format!("invalid domain type {other}")).at(root.line))
        }
    }
}

fn name(element: Option<Element>) -> Result<String, XmlError> {
    let missing = || {
        XmlError::new(
            ErrorCode::NoName,
            ErrorDomain::Domain,
            "missing name information",
        )
    };
    let element = element.ok_or_else(missing)?;
    let name = element.text();
    check_name(&name).map_err(|e| e.at(element.line))?;
    Ok(name)
}

/// Whether `name` can name a domain: it becomes a file name and a line of output.
///
/// # Errors
/// VIR_ERR_NO_NAME if empty, VIR_ERR_XML_DETAIL for a control character, VIR_ERR_XML_ERROR for a
/// `/`, for `.` and `..`, and for more than 200 bytes.
pub fn check_name(name: &str) -> Result<(), XmlError> {
    if name.is_empty() {
        return Err(XmlError::new(
            ErrorCode::NoName,
            ErrorDomain::Domain,
            "missing name information",
        ));
    }
    if let Some(c) = name.chars().find(|c| c.is_control()) {
        return Err(XmlError::new(
            ErrorCode::XmlDetail,
            ErrorDomain::Xml,
            format!("invalid char in name: {}", c.escape_default()),
        ));
    }
    if name.contains('/') {
        return Err(XmlError::xml(format!("name {name} cannot contain '/'")));
    }
    if name == "." || name == ".." || name.trim().is_empty() {
        return Err(XmlError::xml(format!("name '{name}' cannot name a domain")));
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(XmlError::xml(format!(
            "name is longer than {MAX_NAME_BYTES} bytes"
        )));
    }
    Ok(())
}

/// 16 bytes in hexadecimal, with `-` or a space between any two bytes, as libvirt reads them.
fn uuid(element: &Element) -> Result<Uuid, XmlError> {
    let malformed = || XmlError::internal("malformed uuid element").at(element.line);
    let text = element.text();
    let mut rest = text.trim().as_bytes();
    let mut bytes = [0; 16];
    for byte in &mut bytes {
        while let [b'-' | b' ', tail @ ..] = rest {
            rest = tail;
        }
        let [high, low, tail @ ..] = rest else {
            return Err(malformed());
        };
        let digit = |c: u8| {
            char::from(c)
                .to_digit(16)
                .and_then(|d| u8::try_from(d).ok())
        };
        match (digit(*high), digit(*low)) {
            (Some(high), Some(low)) => *byte = high << 4 | low,
            _ => return Err(malformed()),
        }
        rest = tail;
    }
    if rest.is_empty() {
        Ok(Uuid::from_bytes(bytes))
    } else {
        Err(malformed())
    }
}

/// The element with every namespace it uses declared in it, and only what has a namespace.
pub(crate) fn metadata(element: &Element, root: &Element) -> Element {
    let mut kept = element.clone();
    kept.children
        .retain(|n| matches!(n, Node::Element(e) if e.namespace.is_some()));
    for (name, value) in &root.attributes {
        let Some(prefix) = name.strip_prefix("xmlns:") else {
            continue;
        };
        if kept.attr(name).is_none() && kept.elements().any(|e| uses_prefix(e, prefix)) {
            kept.set_attr(name, value.clone());
        }
    }
    kept
}

fn uses_prefix(element: &Element, prefix: &str) -> bool {
    let has = |name: &str| name.split_once(':').is_some_and(|(p, _)| p == prefix);
    has(&element.name)
        || element.attributes.iter().any(|(n, _)| has(n))
        || element.elements().any(|e| uses_prefix(e, prefix))
}

fn size(element: &Element, place: &str) -> Result<u64, XmlError> {
    let text = element.text();
    let value = number::<u64>(&text).ok_or_else(|| {
        XmlError::xml(format!(
            "Invalid value '{text}' for element or attribute './{place}[1]'"
        ))
        .at(element.line)
    })?;
    kib(value, element.attr("unit")).map_err(|e| e.at(element.line))
}

/// NUMA cells have the last word on how much there is.
fn memory(root: &mut Element, numa_kib: Option<u64>) -> Result<Memory, XmlError> {
    let mut memory = Memory::default();
    if let Some(e) = root.take_child("memory") {
        memory.total_kib = size(&e, "memory")?;
        memory.dump_core = e.attr("dumpCore").map(|v| v == "on");
        if memory.total_kib == 0 && numa_kib.is_none() {
            return Err(XmlError::xml(
                "Memory size must be specified via <memory> or in the <numa> configuration",
            )
            .at(e.line));
        }
    }
    if let Some(kib) = numa_kib.filter(|&k| k > 0) {
        memory.total_kib = kib;
    }
    if let Some(e) = root.take_child("currentMemory") {
        memory.current_kib = size(&e, "currentMemory")?;
    }
    if let Some(e) = root.take_child("maxMemory") {
        let slots = match e.attr("slots") {
            Some(slots) => number(slots).ok_or_else(|| bad_attribute(&e, "slots"))?,
            None => 0,
        };
        memory.max = Some(MaxMemory {
            kib: size(&e, "maxMemory")?,
            slots,
        });
    }
    Ok(memory)
}

fn vcpu(element: Element) -> Result<Vcpu, XmlError> {
    let line = element.line;
    let text = element.text();
    let max = if text.trim().is_empty() {
        1
    } else {
        number::<u32>(&text)
            .ok_or_else(|| XmlError::xml("maximum vcpus count must be an integer").at(line))?
    };
    if max == 0 {
        return Err(XmlError::xml("invalid maximum number of vCPUs '0'").at(line));
    }
    let current = match element.attr("current") {
        None => None,
        Some(text) => match number::<u32>(text) {
            Some(0) => {
                return Err(XmlError::xml("invalid current number of vCPUs '0'").at(line));
            }
            Some(n) => Some(n),
            None => {
                return Err(XmlError::xml("current vcpus count must be an integer").at(line));
            }
        },
    };
    if current.is_some_and(|n| n > max) {
        return Err(XmlError::unsupported(
            "maximum vCPU count must not be less than current vCPU count",
        )
        .at(line));
    }
    Ok(Vcpu {
        max,
        current: current.filter(|&n| n != max),
        auto_placement: element.attr("placement") == Some("auto"),
        cpuset: element.attr("cpuset").map(str::to_owned),
    })
}

fn os(element: Option<Element>) -> Result<Os, XmlError> {
    let missing = || XmlError::xml("an os <type> must be specified");
    let mut element = element.ok_or_else(missing)?;
    let kind = element
        .take_child("type")
        .ok_or_else(|| missing().at(element.line))?;
    let os_type = kind.text().trim().to_owned();
    if os_type.is_empty() {
        return Err(missing().at(kind.line));
    }
    if !matches!(
        os_type.as_str(),
        "hvm" | "xen" | "linux" | "exe" | "uml" | "xenpvh"
    ) {
        return Err(XmlError::unsupported(format!("unknown OS type '{os_type}'")).at(kind.line));
    }
    let mut boot = Vec::new();
    for e in element.take_children("boot") {
        let device = e
            .attr("dev")
            .and_then(BootDevice::from_name)
            .ok_or_else(|| bad_attribute(&e, "dev"))?;
        boot.push(device);
    }
    let mut text = |name: &str| {
        element
            .take_child(name)
            .map(|e| e.text())
            .filter(|t| !t.is_empty())
    };
    Ok(Os {
        os_type,
        arch: kind.attr("arch").map(str::to_owned),
        machine: kind.attr("machine").map(str::to_owned),
        kernel: text("kernel"),
        initrd: text("initrd"),
        cmdline: text("cmdline"),
        boot,
        firmware: element.attr("firmware").map(str::to_owned),
        rest: element.take_elements(),
    })
}

fn cpu(mut element: Element) -> Result<Cpu, XmlError> {
    let mut features = Vec::new();
    let mut names = HashSet::new();
    for e in element.take_children("feature") {
        let policy = match e.attr("policy") {
            None => None,
            Some(p) => {
                Some(FeaturePolicy::from_name(p).ok_or_else(|| bad_attribute(&e, "policy"))?)
            }
        };
        let Some(name) = e.attr("name").filter(|n| !n.is_empty()) else {
            return Err(XmlError::new(
                ErrorCode::Xml,
                ErrorDomain::Cpu,
                "Invalid CPU feature name",
            )
            .at(e.line));
        };
        if !names.insert(name.to_owned()) {
            return Err(XmlError::new(
                ErrorCode::Xml,
                ErrorDomain::Cpu,
                format!("CPU feature '{name}' specified more than once"),
            )
            .at(e.line));
        }
        features.push(CpuFeature {
            name: name.to_owned(),
            policy,
        });
    }
    let topology = match element.take_child("topology") {
        None => None,
        Some(e) => {
            let part = |name: &str| match e.attr(name).map(number::<u32>) {
                Some(Some(n)) if n > 0 => Ok(n),
                None if name == "dies" => Ok(1),
                None => Err(XmlError::new(
                    ErrorCode::Xml,
                    ErrorDomain::Cpu,
                    format!("Missing '{name}' attribute in CPU topology"),
                )
                .at(e.line)),
                _ => Err(bad_attribute(&e, name)),
            };
            Some(CpuTopology {
                sockets: part("sockets")?,
                dies: part("dies")?,
                cores: part("cores")?,
                threads: part("threads")?,
            })
        }
    };
    let attr = |name: &str| element.attr(name).map(str::to_owned);
    let mut cpu = Cpu {
        mode: attr("mode"),
        match_: attr("match"),
        check: attr("check"),
        migratable: attr("migratable"),
        topology,
        features,
        ..Cpu::default()
    };
    cpu.model = element.take_child("model").map(|e| CpuModel {
        name: e.text().trim().to_owned(),
        fallback: e.attr("fallback").map(str::to_owned),
        vendor_id: e.attr("vendor_id").map(str::to_owned),
    });
    if let Some(model) = &mut cpu.model
        && matches!(cpu.mode.as_deref(), None | Some("custom"))
    {
        cpu.mode.get_or_insert_with(|| "custom".to_owned());
        cpu.match_.get_or_insert_with(|| "exact".to_owned());
        model.fallback.get_or_insert_with(|| "allow".to_owned());
    }
    cpu.vendor = element.take_child("vendor").map(|e| e.text());
    cpu.rest = element.take_elements();
    Ok(cpu)
}

fn clock(mut element: Element) -> Result<Clock, XmlError> {
    let line = element.line;
    let adjustment = element.attr("adjustment").map(str::to_owned);
    let seconds =
        |text: &str| number::<i64>(text).ok_or_else(|| bad_attribute(&element, "adjustment"));
    let offset = match element.attr("offset").unwrap_or("utc") {
        offset @ ("utc" | "localtime") => {
            if let Some(text) = adjustment.as_deref()
                && text != "reset"
            {
                seconds(text)?;
            }
            if offset == "utc" {
                ClockOffset::Utc { adjustment }
            } else {
                ClockOffset::Localtime { adjustment }
            }
        }
        "timezone" => {
            ClockOffset::Timezone(element.attr("timezone").map(str::to_owned).ok_or_else(|| {
                XmlError::xml("missing 'timezone' attribute for clock with offset='timezone'")
                    .at(line)
            })?)
        }
        "variable" => ClockOffset::Variable {
            adjustment: adjustment.as_deref().map_or(Ok(0), seconds)?,
            localtime: match element.attr("basis") {
                None | Some("utc") => false,
                Some("localtime") => true,
                Some(_) => return Err(bad_attribute(&element, "basis")),
            },
        },
        "absolute" => ClockOffset::Absolute {
            start: match element.attr("start") {
                None => None,
                Some(text) => Some(number(text).ok_or_else(|| bad_attribute(&element, "start"))?),
            },
        },
        other => {
            return Err(XmlError::unsupported(format!("unknown clock offset '{other}'")).at(line));
        }
    };
    Ok(Clock {
        offset,
        timers: element.take_children("timer"),
    })
}

fn lifecycle(
    root: &mut Element,
    name: &str,
    default: LifecycleAction,
) -> Result<LifecycleAction, XmlError> {
    let Some(element) = root.take_child(name) else {
        return Ok(default);
    };
    let text = element.text();
    let crash_only = |a: &LifecycleAction| {
        matches!(
            a,
            LifecycleAction::CoredumpDestroy | LifecycleAction::CoredumpRestart
        )
    };
    text.trim()
        .parse()
        .ok()
        .filter(|a| name == "on_crash" || !crash_only(a))
        .ok_or_else(|| {
            XmlError::unsupported(format!("unknown {name} action: {text}")).at(element.line)
        })
}

fn devices(mut element: Element) -> Result<Devices, XmlError> {
    let mut devices = Devices {
        emulator: element
            .take_child("emulator")
            .map(|e| e.text())
            .filter(|t| !t.is_empty()),
        ..Devices::default()
    };
    for e in element.take_elements() {
        match e.name.as_str() {
            "serial" => devices.serials.push(super::char_device::parse(e)?),
            "console" => {
                let line = e.line;
                let console = super::char_device::parse(e)?;
                let serial = matches!(console.target.target_type.as_deref(), None | Some("serial"));
                if serial && !devices.consoles.is_empty() {
                    return Err(XmlError::unsupported(
                        "Only the first console can be a serial port",
                    )
                    .at(line));
                }
                devices.consoles.push(console);
            }
            _ => devices.rest.push(e),
        }
    }
    Ok(devices)
}

/// libvirt's words for a value that cannot be.
pub(super) fn bad_attribute(element: &Element, attribute: &str) -> XmlError {
    match element.attr(attribute) {
        Some(value) => XmlError::xml(format!(
            "Invalid value for attribute '{attribute}' in element '{}': '{value}'.",
            element.name
        )),
        None => XmlError::xml(format!(
            "Missing required attribute '{attribute}' in element '{}'",
            element.name
        )),
    }
    .at(element.line)
}
