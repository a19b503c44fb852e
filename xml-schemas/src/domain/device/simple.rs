//! Devices with little to say: `<rng>`, `<memballoon>`, `<vsock>`, `<watchdog>`.

use super::{numeric_of, of};
use crate::dom::Element;
use crate::error::XmlError;

/// A source of entropy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rng {
    /// `<backend model=…>`: `random`, `egd`, `builtin`.
    pub backend: String,
    /// Its device, `/dev/random` by default.
    pub source: String,
    /// `<rate bytes=…>`; 0: no limit.
    pub rate_bytes: u32,
    /// `<rate period=…>` in milliseconds.
    pub rate_period_ms: u32,
}

impl Rng {
    /// Reads `<rng>`.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR for values that cannot be.
    pub fn read(element: &Element) -> Result<Self, XmlError> {
        let source = element.child_text("backend").unwrap_or_default();
        Ok(Self {
            backend: of(element, "backend", "model")
                .unwrap_or_default()
                .to_owned(),
            source: match source.trim() {
                "" => "/dev/random".to_owned(),
                path => path.to_owned(),
            },
            rate_bytes: numeric_of(element, "rate", "bytes")?.unwrap_or(0),
            rate_period_ms: numeric_of(element, "rate", "period")?
                .filter(|&period| period != 0)
                .unwrap_or(1000),
        })
    }

    /// Fills the default source.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR without exactly one backend.
    pub(in super::super) fn fill(element: &mut Element) -> Result<(), XmlError> {
        let line = element.line;
        if element.elements().filter(|e| e.name == "backend").count() != 1 {
            return Err(XmlError::xml("only one RNG backend is supported").at(line));
        }
        for backend in element.elements_mut().filter(|e| e.name == "backend") {
            if backend.attr("model") == Some("random") && backend.text().trim().is_empty() {
                backend.children.clear();
                backend.push_text("/dev/random");
            }
        }
        Self::read(element).map(drop).map_err(|e| e.at(line))
    }
}

/// A memory balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Balloon {
    /// `<stats period=…>` in seconds; 0: never.
    pub stats_period: u32,
    /// `freePageReporting='on'`.
    pub free_page_reporting: bool,
    /// `autodeflate='on'`.
    pub autodeflate: bool,
}

impl Balloon {
    /// Reads `<memballoon>`; `None` for model `none`.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR for values that cannot be.
    pub fn read(element: &Element) -> Result<Option<Self>, XmlError> {
        if element.attr("model") == Some("none") {
            return Ok(None);
        }
        Ok(Some(Self {
            stats_period: numeric_of(element, "stats", "period")?.unwrap_or(0),
            free_page_reporting: element.attr("freePageReporting") == Some("on"),
            autodeflate: element.attr("autodeflate") == Some("on"),
        }))
    }
}

/// A socket between guest and host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vsock {
    /// `<cid auto='yes'>`: chosen at start.
    pub auto: bool,
    /// `<cid address=…>`: the guest's id.
    pub cid: Option<u32>,
}

impl Vsock {
    /// Reads `<vsock>`.
    ///
    /// # Errors
    /// VIR_ERR_CONFIG_UNSUPPORTED for an id below 3, which are taken.
    pub fn read(element: &Element) -> Result<Self, XmlError> {
        let cid = numeric_of(element, "cid", "address")?;
        if cid.is_some_and(|cid| cid < 3) {
            return Err(XmlError::unsupported("guest CIDs must be >= 3").at(element.line));
        }
        Ok(Self {
            auto: of(element, "cid", "auto") == Some("yes"),
            cid,
        })
    }

    /// Writes the id chosen at start.
    pub fn give_cid(element: &mut Element, cid: u32) {
        for e in element.elements_mut().filter(|e| e.name == "cid") {
            e.set_attr("address", cid.to_string());
        }
        if element.child("cid").is_none() {
            element.push(
                Element::new("cid")
                    .with_attr("auto", "yes")
                    .with_attr("address", cid.to_string()),
            );
        }
    }
}

/// A watchdog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watchdog {
    /// `model`.
    pub model: String,
    /// `action`: `reset` by default.
    pub action: String,
}

impl Watchdog {
    /// Reads `<watchdog>`.
    ///
    /// # Errors
    /// VIR_ERR_CONFIG_UNSUPPORTED for an unknown action.
    pub fn read(element: &Element) -> Result<Self, XmlError> {
        let action = element.attr("action").unwrap_or("reset");
        if !matches!(
            action,
            "reset" | "shutdown" | "poweroff" | "pause" | "none" | "dump" | "inject-nmi"
        ) {
            return Err(
                XmlError::unsupported(format!("unknown watchdog action '{action}'"))
                    .at(element.line),
            );
        }
        Ok(Self {
            model: element.attr("model").unwrap_or_default().to_owned(),
            action: action.to_owned(),
        })
    }
}
