//! CPU descriptions held against each other: the host's, what guests can be shown, and what clients bring.

use std::collections::BTreeSet;

use hypervisor::cpu::features::{self, Place, Reg};
use hypervisor::cpu::models::{self, Model};
use xml_schemas::dom::{self, Element};

use crate::capabilities;
use crate::error::{Error, ErrorCode, ErrorDomain, Result};

/// A CPU: what it is called and what it has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CpuSet {
    /// `Intel`, `AMD` ...; `None` where it does not matter.
    pub vendor: Option<String>,
    /// Its features.
    pub features: BTreeSet<&'static str>,
}

/// virCPUCompareResult
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// The description asks for what is not there.
    Incompatible = 0,
    /// Both are the same.
    Identical = 1,
    /// There is more.
    Superset = 2,
}

impl CpuSet {
    /// This host's.
    pub fn host() -> Self {
        Self {
            vendor: capabilities::host_vendor().map(|v| capabilities::vendor_name(v).to_owned()),
            features: capabilities::host_features().into_iter().collect(),
        }
    }

    /// What the software CPU shows, whatever model it is named after.
    pub fn soft() -> Self {
        let leaves = hypervisor::cpu::soft_leaves();
        let has = |place: &Place| {
            leaves
                .iter()
                .filter(|leaf| leaf.function == place.function)
                .filter(|leaf| leaf.index == place.index)
                .any(|leaf| {
                    let register = match place.reg {
                        Reg::Eax => leaf.eax,
                        Reg::Ebx => leaf.ebx,
                        Reg::Ecx => leaf.ecx,
                        Reg::Edx => leaf.edx,
                    };
                    register & (1 << place.bit) != 0
                })
        };
        let all = features::all().filter(|(_, place)| has(place));
        Self {
            vendor: None,
            features: all.map(|(name, _)| name).collect(),
        }
    }

    /// As [`CpuSet::parse`], of a client's document.
    ///
    /// # Errors
    /// VIR_ERR_XML_DETAIL for what is no document, and those of [`CpuSet::parse`]; all of them are the CPU's.
    pub fn read(text: &str) -> Result<Self> {
        let of_cpu = |mut error: Error| {
            error.domain = ErrorDomain::CPU;
            error
        };
        let document = dom::parse(text, "(CPU_definition)");
        let document = document.map_err(|error| of_cpu(error.into()))?;
        Self::parse(&document).map_err(of_cpu)
    }

    /// What a `<cpu>` asks for.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR for what is no CPU, VIR_ERR_INTERNAL_ERROR for names nobody knows.
    pub fn parse(cpu: &Element) -> Result<Self> {
        let bad = |text: String| Error::new(ErrorCode::XML_ERROR, text);
        if cpu.name != "cpu" {
            return Err(bad("XML does not contain expected 'cpu' element".into()));
        }
        if let Some(arch) = cpu.child_text("arch")
            && !matches!(arch.trim(), "x86_64" | "i686")
        {
            let text = match xml_schemas::domain::ARCHITECTURES.contains(&arch.trim()) {
                true => format!("CPU arch {} does not match host arch", arch.trim()),
                false => format!("Unknown architecture {}", arch.trim()),
            };
            return Err(Error::unsupported(text));
        }
        if let Some(other) = cpu
            .attr("match")
            .filter(|how| !matches!(*how, "minimum" | "exact" | "strict"))
        {
            let text = format!("Invalid value for attribute 'match' in element 'cpu': '{other}'.");
            return Err(bad(text));
        }
        let model = cpu.child_text("model").map(|name| name.trim().to_owned());
        let mut found = Self {
            vendor: cpu.child_text("vendor").map(|name| name.trim().to_owned()),
            features: BTreeSet::new(),
        };
        match model.as_deref() {
            None | Some("") if cpu.child("feature").is_none() => {
                return Err(bad("Missing CPU model name".into()));
            }
            None | Some("") => {}
            Some(name) => {
                let model = models::find(name)
                    .ok_or_else(|| Error::internal(format!("Unknown CPU model {name}")))?;
                found.features.extend(model.features());
            }
        }
        let mut named = BTreeSet::new();
        for feature in cpu.elements().filter(|e| e.name == "feature") {
            let name = feature.attr("name").unwrap_or_default();
            if !named.insert(name) {
                return Err(bad(format!(
                    "CPU feature '{name}' specified more than once"
                )));
            }
            let known = features::all().find(|(known, _)| *known == name);
            let known = known.or_else(|| {
                let place = features::find(name)?;
                features::all().find(|(_, other)| *other == place)
            });
            let wanted = match feature.attr("policy") {
                None | Some("require" | "force") => true,
                Some("optional" | "disable" | "forbid") => false,
                Some(_) => return Err(Error::unsupported("Invalid CPU feature policy")),
            };
            match known {
                Some((name, _)) if wanted => found.features.insert(name),
                Some((name, _)) => found.features.remove(name),
                None if wanted => {
                    return Err(Error::internal(format!("Unknown CPU feature {name}")));
                }
                None => false,
            };
        }
        Ok(found)
    }

    /// Whether this CPU can be what `wanted` asks for.
    pub fn compare(&self, wanted: &Self) -> Comparison {
        let other =
            wanted.vendor.is_some() && self.vendor.is_some() && wanted.vendor != self.vendor;
        if other || !wanted.features.is_subset(&self.features) {
            Comparison::Incompatible
        } else if wanted.features == self.features {
            Comparison::Identical
        } else {
            Comparison::Superset
        }
    }

    /// The names of what `wanted` asks for and this has not.
    pub fn missing(&self, wanted: &Self) -> String {
        let names: Vec<&str> = wanted
            .features
            .difference(&self.features)
            .copied()
            .collect();
        names.join(",")
    }

    /// The model nearest to it: of its vendor, with most of its features and no other.
    fn nearest(&self) -> Option<&'static Model> {
        models::names()
            .filter_map(models::find)
            .filter(|model| {
                let vendor = capabilities::vendor_name(model.vendor);
                self.vendor.as_deref().is_none_or(|own| own == vendor)
            })
            .filter(|model| model.features().iter().all(|f| self.features.contains(f)))
            .max_by_key(|model| model.features().len())
    }

    /// Its document for domains.
    fn format(&self, expand: bool) -> Result<String> {
        let model = self
            .nearest()
            .ok_or_else(|| Error::new(ErrorCode::OPERATION_FAILED, "CPUs are incompatible"))?;
        let mut cpu = Element::new("cpu")
            .with_attr("mode", "custom")
            .with_attr("match", "exact")
            .with_child(Element::with_text("model", model.name).with_attr("fallback", "forbid"));
        if let Some(vendor) = &self.vendor {
            cpu.push(Element::with_text("vendor", vendor));
        }
        let of_model: BTreeSet<&str> = model.features().into_iter().collect();
        for feature in self
            .features
            .iter()
            .filter(|f| expand || !of_model.contains(**f))
        {
            cpu.push(
                Element::new("feature")
                    .with_attr("policy", "require")
                    .with_attr("name", *feature),
            );
        }
        let mut text = String::new();
        dom::format_element(&mut text, &cpu, 0);
        Ok(text)
    }
}

/// virConnectBaselineCPUFlags
pub mod baseline_flags {
    /// All features are written, the model's too.
    pub const EXPAND: u32 = 1;
    /// Without what keeps a guest from moving.
    pub const MIGRATABLE: u32 = 2;
}

/// What all of these CPUs have, and `within`, if it is given, too.
///
/// # Errors
/// No CPU, one that makes no sense, or none that all of them can be.
pub fn baseline(documents: &[String], flags: u32, within: Option<&CpuSet>) -> Result<String> {
    if documents.is_empty() {
        let call = match within {
            Some(_) => "virConnectBaselineHypervisorCPU",
            None => "virConnectBaselineCPU",
        };
        return Err(Error {
            code: ErrorCode::INVALID_ARG,
            domain: ErrorDomain::DOMAIN,
            message: format!("xmlCPUs in {call} must not be NULL"),
        });
    }
    let mut common: Option<CpuSet> = None;
    for text in documents {
        let cpu = CpuSet::read(text)?;
        common = Some(match common {
            None => cpu,
            Some(so_far) => {
                if let (Some(a), Some(b)) = (&so_far.vendor, &cpu.vendor)
                    && a != b
                {
                    return Err(Error::new(
                        ErrorCode::OPERATION_FAILED,
                        "CPU vendors do not match",
                    ));
                }
                CpuSet {
                    vendor: so_far.vendor.or(cpu.vendor),
                    features: &so_far.features & &cpu.features,
                }
            }
        });
    }
    let mut common = common.ok_or_else(|| Error::new(ErrorCode::INVALID_ARG, "No CPUs given"))?;
    if let Some(within) = within {
        common.features = &common.features & &within.features;
    }
    if flags & baseline_flags::MIGRATABLE != 0 {
        common.features.remove("invtsc");
    }
    common.format(flags & baseline_flags::EXPAND != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(inside: &str) -> String {
        format!("<cpu>{inside}</cpu>")
    }

    #[test]
    fn cpus_are_compared_feature_by_feature() {
        let parse = |inside: &str| CpuSet::parse(&dom::parse(&cpu(inside), "(cpu)").unwrap());
        let nehalem = parse("<model>Nehalem</model>").unwrap();
        let penryn = parse("<model>Penryn</model>").unwrap();
        assert_eq!(nehalem.compare(&nehalem), Comparison::Identical);
        assert_eq!(nehalem.compare(&penryn), Comparison::Superset);
        assert_eq!(penryn.compare(&nehalem), Comparison::Incompatible);
        assert!(penryn.missing(&nehalem).contains("popcnt"));
        let less = parse("<model>Nehalem</model><feature policy='disable' name='popcnt'/>");
        assert!(!less.unwrap().features.contains("popcnt"));
        assert!(parse("<model>Bogus</model>").is_err());
        assert!(parse("<model>Penryn</model><feature name='bogus'/>").is_err());
        assert!(CpuSet::soft().features.contains("sse2"));
    }

    #[test]
    fn what_all_have_is_the_baseline() {
        let both = [
            cpu("<model>SandyBridge</model><vendor>Intel</vendor>"),
            cpu("<model>Westmere</model><vendor>Intel</vendor><feature name='avx'/>"),
        ];
        let text = baseline(&both, 0, None).unwrap();
        assert!(
            text.contains("<model fallback='forbid'>Westmere</model>"),
            "{text}"
        );
        assert!(
            text.contains("<feature policy='require' name='avx'/>"),
            "{text}"
        );
        assert!(!text.contains("name='aes'"), "{text}");
        let text = baseline(&both, baseline_flags::EXPAND, None).unwrap();
        assert!(text.contains("name='aes'"), "{text}");
        assert!(baseline(&[], 0, None).is_err());
        let other = [cpu("<model>EPYC</model><vendor>AMD</vendor>")];
        assert!(baseline(&[&both[..], &other].concat(), 0, None).is_err());
    }
}
