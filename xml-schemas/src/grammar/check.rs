//! Holding a document against the table.

use super::{Allowed, Body, Grammar, is_declaration};
use crate::dom::{Element, Node};
use crate::error::{ErrorCode, ErrorDomain, Warning, XmlError};

/// What is wrong with a document, in one place.
enum Fault {
    UnknownElement {
        name: String,
        parent: String,
    },
    UnknownAttribute {
        name: String,
        element: String,
    },
    TooMany {
        name: String,
        parent: String,
    },
    Text {
        element: String,
    },
    /// libvirt takes an empty value for none at all.
    Empty {
        what: String,
        element: String,
    },
    BadValue {
        attribute: String,
        element: String,
        value: String,
        words: String,
    },
    BadText {
        element: String,
        value: String,
        words: String,
    },
    MissingAttribute {
        name: String,
        element: String,
    },
    MissingOneOf {
        names: String,
        element: String,
    },
    MissingElement {
        name: String,
        parent: String,
    },
}

impl Fault {
    fn strict(&self, line: u32) -> XmlError {
        let message = match self {
            Self::UnknownElement { name, parent } => {
                format!("element '{name}' is not allowed in element '{parent}'")
            }
            Self::UnknownAttribute { name, element } => {
                format!("attribute '{name}' is not allowed in element '{element}'")
            }
            Self::TooMany { name, parent } => {
                format!("element '{name}' is allowed only once in element '{parent}'")
            }
            Self::Text { element } => format!("text is not allowed in element '{element}'"),
            Self::Empty { what, element } => format!("{what} in element '{element}' is empty"),
            Self::BadValue {
                attribute,
                element,
                value,
                words,
            } => format!(
                "invalid value for attribute '{attribute}' in element '{element}': '{value}'{words}"
            ),
            Self::BadText {
                element,
                value,
                words,
            } => {
                format!("invalid value of element '{element}': '{value}'{words}")
            }
            Self::MissingAttribute { name, element } => {
                format!("attribute '{name}' is missing in element '{element}'")
            }
            Self::MissingOneOf { names, element } => {
                format!("one of {names} must be in element '{element}'")
            }
            Self::MissingElement { name, parent } => {
                format!("element '{name}' is missing in element '{parent}'")
            }
        };
        XmlError::new(ErrorCode::InvalidSchema, ErrorDomain::Xml, message).at(line)
    }

    /// What the same fault earns where libvirt does not validate.
    fn lenient(&self, line: u32) -> Result<Warning, XmlError> {
        let message = match self {
            Self::UnknownElement { name, parent } => {
                format!("element '{name}' is not allowed in element '{parent}' and is left out")
            }
            Self::UnknownAttribute { name, element } => {
                format!("attribute '{name}' is not allowed in element '{element}' and is left out")
            }
            Self::TooMany { name, parent } => {
                format!("only the first element '{name}' in element '{parent}' counts")
            }
            Self::Text { element } => format!("text in element '{element}' is left out"),
            Self::Empty { what, element } => {
                format!("{what} in element '{element}' is empty and is left out")
            }
            Self::BadValue {
                attribute,
                element,
                value,
                ..
            } => {
                return Err(bad_value(attribute, element, value).at(line));
            }
            Self::BadText { element, value, .. } => {
                return Err(bad_text(element, value).at(line));
            }
            Self::MissingAttribute { name, element } => {
                return Err(XmlError::xml(format!(
                    "Missing required attribute '{name}' in element '{element}'"
                ))
                .at(line));
            }
            Self::MissingOneOf { names, element } => {
                return Err(XmlError::xml(format!(
                    "One of {names} must be in element '{element}'"
                ))
                .at(line));
            }
            Self::MissingElement { name, parent } => {
                return Err(XmlError::xml(format!(
                    "Missing required element '{name}' in element '{parent}'"
                ))
                .at(line));
            }
        };
        Ok(Warning { message, line })
    }
}

/// What libvirt's parsers say of a bad value, where they have words of their own.
fn bad_value(attribute: &str, element: &str, value: &str) -> XmlError {
    XmlError::xml(match (element, attribute) {
        ("mac", "address") if crate::domain::device::is_mac(value) => {
            format!("expected unicast mac address, found multicast '{value}'")
        }
        ("mac", "address") => format!("unable to parse mac address '{value}'"),
        ("target", "dev") => format!("Unknown disk name '{value}' and no address specified"),
        ("driver", "type") => {
            return XmlError::unsupported(format!("unknown driver format value '{value}'"));
        }
        ("cpu", "mode") => {
            return XmlError::unsupported(format!("Invalid mode attribute '{value}'"));
        }
        _ => {
            format!("Invalid value for attribute '{attribute}' in element '{element}': '{value}'.")
        }
    })
}

/// The same of a bad text.
fn bad_text(element: &str, value: &str) -> XmlError {
    let most = if element == "vendor" { 8 } else { 16 };
    match element {
        "wwn" => XmlError::internal(format!("Malformed wwn: {value}")),
        "vendor" | "product" if value.chars().count() <= most => {
            XmlError::xml(format!("disk {element} is not printable string"))
        }
        "vendor" | "product" => {
            XmlError::unsupported(format!("disk {element} is more than {most} characters"))
        }
        _ => XmlError::xml(format!("Invalid value '{value}' for element '{element}'")),
    }
}

/// Warnings kept of one document: enough to see what is wrong with it.
const MAX_WARNINGS: usize = 100;

/// Lenient: everything removed. Strict: the first fault ends it.
#[derive(Default)]
struct Findings {
    strict: bool,
    warnings: Vec<Warning>,
    refused: Option<XmlError>,
}

impl Findings {
    fn add(&mut self, fault: &Fault, line: u32) {
        if self.strict {
            self.refused.get_or_insert_with(|| fault.strict(line));
            return;
        }
        match fault.lenient(line) {
            Ok(warning) if self.warnings.len() < MAX_WARNINGS => self.warnings.push(warning),
            Ok(_) => {}
            Err(error) => {
                self.refused.get_or_insert(error);
            }
        }
    }
}

impl Grammar {
    /// Refuses the first thing that is not allowed, naming it and its line.
    ///
    /// # Errors
    /// VIR_ERR_XML_INVALID_SCHEMA.
    pub fn check(&self, root: &Element) -> Result<(), XmlError> {
        let mut findings = Findings {
            strict: true,
            ..Findings::default()
        };
        self.visit(self.root_body(), &mut root.clone(), &mut findings);
        findings.refused.map_or(Ok(()), Err)
    }

    /// Removes elements and attributes that are not allowed, with a warning each; returns the
    /// first thing that cannot be mended so (a bad value, something missing) as an error.
    pub fn prune(&self, root: &mut Element) -> (Vec<Warning>, Option<XmlError>) {
        let mut findings = Findings::default();
        self.visit(self.root_body(), root, &mut findings);
        (findings.warnings, findings.refused)
    }

    fn visit(&self, body: &'static Body, element: &mut Element, findings: &mut Findings) {
        if findings.strict && findings.refused.is_some() {
            return;
        }
        let allowed = self.allowed(body, element);
        if allowed.any {
            return;
        }
        self.attributes(&allowed, element, findings);
        self.text(&allowed, element, findings);
        self.children(&allowed, element, findings);
        for names in &allowed.some {
            let there = |name: &&str| match name.strip_prefix('@') {
                Some(attribute) => element.attr(attribute).is_some(),
                None => element.child(name).is_some(),
            };
            if !names.iter().any(there) {
                let fault = Fault::MissingOneOf {
                    names: names.join(", "),
                    element: element.name.to_string(),
                };
                findings.add(&fault, element.line);
            }
        }
    }

    fn attributes(&self, allowed: &Allowed, element: &mut Element, findings: &mut Findings) {
        let (name, line) = (&element.name, element.line);
        element.attributes.retain(|(attribute, value)| {
            if is_declaration(attribute) {
                return true;
            }
            let rules = || allowed.attributes.iter().filter(|(n, ..)| n == attribute);
            let fault = if rules().next().is_none() {
                Fault::UnknownAttribute {
                    name: shown(attribute),
                    element: name.to_string(),
                }
            } else if rules().any(|(_, _, values)| self.table.kinds.allow(values, value)) {
                return true;
            } else if !findings.strict
                && value.trim().is_empty()
                && rules().all(|(_, required, _)| !required)
            {
                Fault::Empty {
                    what: format!("attribute '{attribute}'"),
                    element: name.to_string(),
                }
            } else {
                let words = rules().flat_map(|(_, _, v)| v.words()).copied();
                Fault::BadValue {
                    attribute: attribute.to_string(),
                    element: name.to_string(),
                    value: shown(value),
                    words: choices(words.collect()),
                }
            };
            findings.add(&fault, line);
            matches!(fault, Fault::BadValue { .. })
        });
        for (attribute, required, _) in &allowed.attributes {
            if *required && element.attr(attribute).is_none() {
                let fault = Fault::MissingAttribute {
                    name: (*attribute).to_owned(),
                    element: name.to_string(),
                };
                findings.add(&fault, line);
            }
        }
    }

    fn text(&self, allowed: &Allowed, element: &mut Element, findings: &mut Findings) {
        let line = element.line;
        match allowed.text {
            None => {
                let says = |n: &Node| matches!(n, Node::Text(text) if !text.trim().is_empty());
                if element.children.iter().any(says) {
                    let fault = Fault::Text {
                        element: element.name.to_string(),
                    };
                    findings.add(&fault, line);
                }
                element.children.retain(|n| !matches!(n, Node::Text(_)));
            }
            Some((required, values)) => {
                let text = element.content();
                let free = !required && text.trim().is_empty();
                if !free && !self.table.kinds.allow(values, &text) {
                    let fault = Fault::BadText {
                        element: element.name.to_string(),
                        value: shown(&text),
                        words: choices(values.words().to_vec()),
                    };
                    findings.add(&fault, line);
                }
            }
        }
    }

    fn children(&self, allowed: &Allowed, element: &mut Element, findings: &mut Findings) {
        let (parent, line) = (&element.name, element.line);
        // A bit for each rule: a child is allowed once, or any number of times.
        let mut seen: u128 = 0;
        element.children.retain_mut(|node| {
            let Node::Element(child) = node else {
                return matches!(node, Node::Text(_));
            };
            // In a namespace of nobody's, it is not the element that its name says.
            let ours = match &child.namespace {
                None => !child.name.contains(':'),
                Some(_) => self.is_ours(child),
            };
            let at = ours.then(|| allowed.rule(&child.name)).flatten();
            let Some((rule, bit)) = at.map(|at| (&allowed.children[at], 1_u128 << at)) else {
                let fault = Fault::UnknownElement {
                    name: shown(&child.name),
                    parent: parent.to_string(),
                };
                findings.add(&fault, child.line);
                return false;
            };
            if !findings.strict && !rule.needed && self.is_void(rule.body, child) {
                let fault = Fault::Empty {
                    what: format!("element '{}'", child.name),
                    element: parent.to_string(),
                };
                findings.add(&fault, child.line);
                return false;
            }
            let again = seen & bit != 0;
            seen |= bit;
            if again && !rule.many {
                let fault = Fault::TooMany {
                    name: child.name.to_string(),
                    parent: parent.to_string(),
                };
                findings.add(&fault, child.line);
                return false;
            }
            self.visit(rule.body, child, findings);
            true
        });
        for (at, rule) in allowed.children.iter().enumerate() {
            if rule.needed && seen & 1 << at == 0 {
                let fault = Fault::MissingElement {
                    name: rule.name.to_owned(),
                    parent: parent.to_string(),
                };
                findings.add(&fault, line);
            }
        }
    }

    /// An element whose whole content would be a text, and that has none.
    fn is_void(&self, body: &'static Body, element: &Element) -> bool {
        element.attributes.is_empty()
            && element.elements().next().is_none()
            && element.content().trim().is_empty()
            && matches!(
                self.allowed(body, element).text,
                Some((true, values)) if !self.table.kinds.allow(values, "")
            )
    }

    fn is_ours(&self, element: &Element) -> bool {
        let uri = element.namespace.as_deref();
        self.table.namespaces.iter().any(|(u, _)| Some(*u) == uri)
    }
}

/// A value as a message shows it: not the whole of a long one.
fn shown(value: &str) -> String {
    /// Characters.
    const LONGEST: usize = 100;
    if value.chars().count() <= LONGEST {
        return value.to_owned();
    }
    let start: String = value.chars().take(LONGEST).collect();
    format!("{start}…")
}

fn choices(mut words: Vec<&'static str>) -> String {
    /// Words.
    const MOST: usize = 12;
    words.dedup();
    if words.is_empty() || words.len() > MOST {
        return String::new();
    }
    format!(" (one of: {})", words.join(", "))
}
