//! `virsh pool-capabilities`.

use super::{PoolType, TYPES};
use crate::dom::{Element, format_element};
use crate::volume::FORMATS;

fn choices(name: &str, values: &[&str]) -> Element {
    let mut element = Element::new("enum").with_attr("name", name);
    for value in values {
        element.push(Element::with_text("value", *value));
    }
    element
}

fn options(name: &str, default: &str, values: Element) -> Element {
    Element::new(name)
        .with_child(Element::new("defaultFormat").with_attr("type", default))
        .with_child(values)
}

/// Every type of pool with whether it is there, and the formats of those that are.
pub fn capabilities() -> String {
    let mut root = Element::new("storagepoolCapabilities");
    for name in TYPES {
        let kind = PoolType::from_name(name).ok();
        let supported = if kind.is_some() { "yes" } else { "no" };
        let mut pool = Element::new("pool")
            .with_attr("type", *name)
            .with_attr("supported", supported);
        if let Some(kind) = kind {
            if let Some(default) = kind.formats().first() {
                let values = choices("sourceFormatType", kind.formats());
                pool.push(options("poolOptions", default, values));
            }
            let values = choices("targetFormatType", FORMATS);
            pool.push(options("volOptions", "raw", values));
        }
        root.push(pool);
    }
    let mut out = String::new();
    format_element(&mut out, &root, 0);
    // libvirt prints both tags of a type it says nothing about.
    out.replace("supported='no'/>\n", "supported='no'>\n  </pool>\n")
}
