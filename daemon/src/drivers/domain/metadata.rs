//! Titles, descriptions and metadata of domains.

use std::sync::Arc;

use xml_schemas::Domain as Definition;
use xml_schemas::dom::{self, Element, Node};

use super::Driver;
use super::object::{Domain, Inner, Pinned, not_running};
use super::record::Folder;
use crate::error::{Error, ErrorCode, ErrorDomain, Result, check_flags};
use crate::events::DomainEvent;

/// Which definition is meant (virDomainModificationImpact).
pub mod affect {
    /// The running one.
    pub const LIVE: u32 = 1;
    /// The stored one.
    pub const CONFIG: u32 = 2;
}

/// What is read or changed (virDomainMetadataType).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// `<description>`
    Description,
    /// `<title>`
    Title,
    /// The element of that namespace in `<metadata>`.
    Element(String),
}

impl Kind {
    /// From the wire.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG for an unknown kind, or an element without a namespace.
    pub fn from_wire(kind: i32, uri: Option<String>) -> Result<Self> {
        match (kind, uri) {
            (0, _) => Ok(Self::Description),
            (1, _) => Ok(Self::Title),
            (2, Some(uri)) if !uri.is_empty() => Ok(Self::Element(uri)),
            (2, _) => Err(Error::new(
                ErrorCode::INVALID_ARG,
                "uri in virDomainSetMetadata must not be NULL",
            )),
            _ => Err(Error::of(
                ErrorDomain::DOMAIN,
                ErrorCode::INVALID_ARG,
                format!("unknown metadata type '{kind}'"),
            )),
        }
    }

    fn number(&self) -> i32 {
        match self {
            Self::Description => 0,
            Self::Title => 1,
            Self::Element(_) => 2,
        }
    }
}

impl Driver {
    /// Reads.
    ///
    /// # Errors
    /// VIR_ERR_NO_DOMAIN_METADATA if there is none.
    pub fn metadata(&self, domain: &Domain, kind: &Kind, flags: u32) -> Result<String> {
        check_flags(
            flags,
            affect::LIVE | affect::CONFIG,
            "virDomainObjGetMetadata",
        )?;
        let inner = domain.lock();
        let definition = chosen(&inner, flags)?;
        let found = match kind {
            Kind::Description => definition.description.clone(),
            Kind::Title => definition.title.clone(),
            Kind::Element(uri) => definition.metadata.as_ref().and_then(|metadata| {
                let element = metadata
                    .elements()
                    .find(|e| e.namespace.as_deref() == Some(uri))?;
                let mut element = element.clone();
                strip_namespace(&mut element, uri);
                Some(dom::format_metadata(&element))
            }),
        };
        found.ok_or_else(|| {
            Error::new(
                ErrorCode::NO_DOMAIN_METADATA,
                "Requested metadata element is not present",
            )
        })
    }

    /// Changes; `None` removes.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if the definition meant is not there, a bad text's, the disk's.
    pub async fn set_metadata(
        self: &Arc<Self>,
        domain: Pinned,
        kind: Kind,
        text: Option<String>,
        key: Option<String>,
        flags: u32,
    ) -> Result<()> {
        check_flags(
            flags,
            affect::LIVE | affect::CONFIG,
            "qemuDomainSetMetadata",
        )?;
        let element = match (&kind, &text) {
            (Kind::Element(uri), Some(text)) => Some(parse_element(text, uri, key.as_deref())?),
            (Kind::Title, Some(title)) if title.contains('\n') => {
                return Err(Error::new(
                    ErrorCode::INVALID_ARG,
                    "Domain title can't contain newlines",
                ));
            }
            _ => None,
        };
        let _job = domain.job().await?;
        let (persistent, live) = {
            let inner = domain.lock();
            let (to_live, to_config) = impact(&inner, flags)?;
            let change = |definition: &Arc<Definition>| {
                let mut changed = Definition::clone(definition);
                apply(&mut changed, &kind, text.clone(), element.clone());
                Arc::new(changed)
            };
            let live = inner.live.as_ref().filter(|_| to_live);
            let stored = if to_config { inner.stored()? } else { None };
            (
                stored.as_ref().map(change),
                live.map(|live| (change(&live.definition), Folder(live.folder.clone()))),
            )
        };
        let stored = match &persistent {
            Some(definition) => Some(self.save(definition).await?),
            None => None,
        };
        if let Some((definition, folder)) = &live {
            folder
                .write_definition(definition)
                .map_err(|e| Error::system("cannot write the domain's state", &e))?;
        }
        let mut inner = domain.lock();
        if stored.is_some() {
            inner.persistent = stored;
        }
        if let (Some((definition, _)), Some(live)) = (live, inner.live.as_mut()) {
            live.definition = definition;
        }
        let uri = match &kind {
            Kind::Element(uri) => Some(uri.clone()),
            _ => None,
        };
        let event = DomainEvent::MetadataChange {
            kind: kind.number(),
            uri,
        };
        self.emit(&domain.name_in(&inner), &event);
        Ok(())
    }
}

/// Which definitions a change is for: the running one, the stored one.
pub(super) fn impact(inner: &Inner, flags: u32) -> Result<(bool, bool)> {
    inner.check_settled()?;
    let active = inner.live.is_some();
    let (mut live, config) = (flags & affect::LIVE != 0, flags & affect::CONFIG != 0);
    let mut stored = config;
    if !live && !config {
        live = active;
        stored = !active;
    }
    if live && !active {
        return Err(not_running());
    }
    if stored && inner.persistent.is_none() {
        return Err(Error::invalid(
            "transient domains do not have any persistent config",
        ));
    }
    Ok((live, stored))
}

/// The definition that is read.
pub(super) fn chosen(inner: &Inner, flags: u32) -> Result<Arc<Definition>> {
    let (live, _) = impact(inner, flags)?;
    let definition = match (&inner.live, live) {
        (Some(running), true) => Some(Arc::clone(&running.definition)),
        _ => inner.stored()?,
    };
    definition.ok_or_else(not_running)
}

fn apply(definition: &mut Definition, kind: &Kind, text: Option<String>, element: Option<Element>) {
    let text = text.filter(|text| !text.is_empty());
    match kind {
        Kind::Description => definition.description = text,
        Kind::Title => definition.title = text,
        Kind::Element(uri) => {
            let mut metadata = definition
                .metadata
                .take()
                .unwrap_or_else(|| Element::new("metadata"));
            metadata.children.retain(
                |child| !matches!(child, Node::Element(e) if e.namespace.as_deref() == Some(uri)),
            );
            if let Some(element) = element {
                metadata.push(element);
            }
            let empty = metadata.elements().next().is_none();
            definition.metadata = (!empty).then_some(metadata);
        }
    }
}

/// An element that a client gives, put into the namespace it gives with it.
pub(in crate::drivers) fn parse_element(
    text: &str,
    uri: &str,
    key: Option<&str>,
) -> Result<Element> {
    let key = key.filter(|key| !key.is_empty()).ok_or_else(|| {
        Error::new(
            ErrorCode::INVALID_ARG,
            "key in virDomainSetMetadata must not be NULL",
        )
    })?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if !key.chars().all(plain) || !key.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
        return Err(Error::new(
            ErrorCode::INVALID_ARG,
            format!("'{key}' is no XML namespace prefix"),
        ));
    }
    let mut element = dom::parse(text, "(metadata_xml)")?;
    element
        .attributes
        .insert(0, (format!("xmlns:{key}").into(), uri.into()));
    put_in_namespace(&mut element, uri, key);
    Ok(element)
}

fn put_in_namespace(element: &mut Element, uri: &str, key: &str) {
    if element.namespace.is_none() {
        element.name = format!("{key}:{}", element.name).into();
        element.namespace = Some(uri.into());
    }
    for child in element.elements_mut() {
        put_in_namespace(child, uri, key);
    }
}

/// As the client gave it: without the prefix that was put in.
pub(in crate::drivers) fn strip_namespace(element: &mut Element, uri: &str) {
    element
        .attributes
        .retain(|(name, value)| !(name.starts_with("xmlns:") && value == uri));
    if element.namespace.as_deref() == Some(uri) {
        if let Some((_, name)) = element.name.split_once(':') {
            element.name = name.into();
        }
        element.namespace = None;
    }
    for child in element.elements_mut() {
        strip_namespace(child, uri);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_come_back_as_they_were_given() {
        let element = parse_element("<a x='1'><b>t</b></a>", "urn:x", Some("k")).unwrap();
        let mut text = String::new();
        dom::format_element(&mut text, &element, 0);
        assert!(text.contains("<k:a xmlns:k="), "{text}");
        assert!(text.contains("<k:b>t</k:b>"), "{text}");
        let mut plain = element;
        strip_namespace(&mut plain, "urn:x");
        let mut text = String::new();
        dom::format_element(&mut text, &plain, 0);
        assert!(text.contains("<b>t</b>"), "{text}");
        assert!(!text.contains("urn:x"), "{text}");
    }

    #[test]
    fn prefixes_cannot_smuggle_markup() {
        assert!(parse_element("<a/>", "urn:x", Some("k='><b")).is_err());
        assert!(parse_element("<a/>", "urn:x", None).is_err());
        assert!(parse_element("<a", "urn:x", Some("k")).is_err());
    }
}
