//! Children of `<domain>` that have no type of their own: found, made, and dropped when empty.

use xml_schemas::Domain as Definition;
use xml_schemas::dom::Element;

/// The section, where there is one.
pub fn section<'a>(definition: &'a Definition, name: &str) -> Option<&'a Element> {
    definition.rest.iter().find(|e| e.name == name)
}

/// Changes a section, which is made for it, and goes if nothing is left in it.
pub fn change(definition: &mut Definition, name: &str, change: impl FnOnce(&mut Element)) {
    let at = match definition.rest.iter().position(|e| e.name == name) {
        Some(at) => at,
        None => {
            definition.rest.push(Element::new(name));
            definition.rest.len() - 1
        }
    };
    change(&mut definition.rest[at]);
    if definition.rest[at].is_empty() {
        definition.rest.remove(at);
    }
}

/// Replaces the children `name` of a section; `None` only removes them.
pub fn set_child(definition: &mut Definition, of: &str, name: &str, child: Option<Element>) {
    change(definition, of, |section| {
        section.take_children(name);
        if let Some(child) = child {
            section.push(child);
        }
    });
}
