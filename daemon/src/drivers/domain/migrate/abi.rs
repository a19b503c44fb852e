//! Whether a definition that a client gives is of the machine that runs: what the guest was shown of its processors stays as
//! it is.

use xml_schemas::Domain as Definition;
use xml_schemas::domain::{Cpu, CpuFeature, FeaturePolicy};

use crate::error::{Error, Result};

/// # Errors
/// VIR_ERR_CONFIG_UNSUPPORTED: it is of another one.
pub(super) fn check(running: &Definition, given: &Definition) -> Result<()> {
    let (its, own) = (given.domain_type, running.domain_type);
    if its != own {
        return Err(Error::unsupported(format!(
            "Target domain virt type {} does not match source {}",
            its.as_str(),
            own.as_str()
        )));
    }
    match (&running.cpu, &given.cpu) {
        (None, None) => {}
        (Some(running), Some(given)) => check_cpu(running, given)?,
        _ => return Err(Error::unsupported("Target CPU does not match source")),
    }
    crate::drivers::domain::save::check_same(running, given)
}

fn check_cpu(running: &Cpu, given: &Cpu) -> Result<()> {
    let same = |what: &str, given: Option<&str>, running: Option<&str>| match given == running {
        true => Ok(()),
        false => Err(Error::unsupported(format!(
            "Target CPU {what} {} does not match source {}",
            given.unwrap_or("(null)"),
            running.unwrap_or("(null)")
        ))),
    };
    let mode = |cpu: &Cpu| cpu.mode.clone().unwrap_or_else(|| "custom".to_owned());
    let modes = (mode(given), mode(running));
    match (modes.0.as_str(), modes.1.as_str()) {
        // What one stands for, the other may say: the two machines compare what they show.
        ("host-model", "custom") | ("custom", "host-model") => return Ok(()),
        (given, running) => same("mode", Some(given), Some(running))?,
    }
    let model = |cpu: &Cpu| cpu.model.as_ref().map(|model| model.name.clone());
    same("model", model(given).as_deref(), model(running).as_deref())?;
    same("vendor", given.vendor.as_deref(), running.vendor.as_deref())?;
    let vendor_id = |cpu: &Cpu| cpu.model.as_ref().and_then(|model| model.vendor_id.clone());
    let ids = (vendor_id(given), vendor_id(running));
    same("vendor id", ids.0.as_deref(), ids.1.as_deref())?;
    let levels = |cpu: &Cpu| {
        let all = cpu
            .topology
            .map(|t| [t.sockets, t.dies, t.cores, t.threads]);
        all.unwrap_or_default().map(|number| number.to_string())
    };
    let (its, own) = (levels(given), levels(running));
    for ((what, given), running) in ["sockets", "dies", "cores", "threads"]
        .into_iter()
        .zip(&its)
        .zip(&own)
    {
        same(what, Some(given), Some(running))?;
    }
    check_features(&given.features, &running.features)?;
    for name in ["maxphysaddr", "cache"] {
        let of = |cpu: &Cpu| cpu.rest.iter().find(|e| e.name == name).cloned();
        if of(given) != of(running) {
            let text = format!("Target CPU {name} does not match source");
            return Err(Error::unsupported(text));
        }
    }
    Ok(())
}

/// Their order does not matter.
fn check_features(given: &[CpuFeature], running: &[CpuFeature]) -> Result<()> {
    let differ = |what: &str, given: &dyn std::fmt::Display, running: &dyn std::fmt::Display| {
        Err(Error::unsupported(format!(
            "Target CPU feature{what} {given} does not match source {running}"
        )))
    };
    if given.len() != running.len() {
        return differ(" count", &given.len(), &running.len());
    }
    let sorted = |features: &[CpuFeature]| {
        let mut all: Vec<(String, FeaturePolicy)> = features
            .iter()
            .map(|f| (f.name.clone(), f.policy.unwrap_or(FeaturePolicy::Require)))
            .collect();
        all.sort_by(|(one, _), (other, _)| one.cmp(other));
        all
    };
    for ((its, policy), (own, own_policy)) in sorted(given).iter().zip(&sorted(running)) {
        if its != own {
            return differ("", its, own);
        }
        if policy != own_policy {
            return differ(" policy", &policy.as_str(), &own_policy.as_str());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(kind: &str, cpu: &str) -> Definition {
        let xml = format!(
            "<domain type='{kind}'><name>a</name><uuid>7c3c5f54-8f7b-4f4c-9df0-6f1d3f6f0a51</uuid>\
             <memory>1024</memory><os><type>hvm</type></os>{cpu}</domain>"
        );
        Definition::parse(&xml, xml_schemas::Validation::Lenient)
            .unwrap()
            .domain
    }

    fn said(running: &str, given: &str) -> String {
        let checked = check(&definition("qemu", running), &definition("qemu", given));
        checked.map_or_else(|error| error.message, |()| String::new())
    }

    #[test]
    fn what_a_guest_was_shown_stays() {
        let error = check(&definition("qemu", ""), &definition("kvm", "")).unwrap_err();
        let words = "Target domain virt type kvm does not match source qemu";
        assert!(error.message.ends_with(words), "{error}");
        assert_eq!(error.code, crate::error::ErrorCode::CONFIG_UNSUPPORTED);
        let cpu = |inside: &str| format!("<cpu mode='custom' match='exact'>{inside}</cpu>");
        let nehalem = "<model>Nehalem</model>";
        let full = cpu(&format!(
            "{nehalem}<feature policy='require' name='aes'/><feature policy='disable' name='vmx'/>"
        ));
        assert_eq!(said(&full, &full), "");
        let other_order = cpu(&format!(
            "{nehalem}<feature policy='disable' name='vmx'/><feature policy='require' name='aes'/>"
        ));
        assert_eq!(said(&full, &other_order), "");
        for (given, words) in [
            (String::new(), "Target CPU does not match source"),
            (
                "<cpu mode='host-passthrough'/>".to_owned(),
                "Target CPU mode host-passthrough does not match source custom",
            ),
            (
                full.replace("Nehalem", "Westmere"),
                "Target CPU model Westmere does not match source Nehalem",
            ),
            (
                cpu(nehalem),
                "Target CPU feature count 0 does not match source 2",
            ),
            (
                full.replace("'aes'", "'avx'"),
                "Target CPU feature avx does not match source aes",
            ),
            (
                full.replace("'require'", "'disable'"),
                "Target CPU feature policy disable does not match source require",
            ),
            (
                cpu("<model>Nehalem</model><vendor>Intel</vendor>"),
                "Target CPU vendor Intel does not match source (null)",
            ),
        ] {
            let said = said(&full, &given);
            assert!(said.ends_with(words), "{said}");
        }
        // Only the target knows what it comes to there.
        assert_eq!(said("<cpu mode='host-model'/>", &full), "");
    }
}
