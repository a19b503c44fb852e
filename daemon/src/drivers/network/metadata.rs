//! Titles, descriptions and metadata of networks.

use std::sync::Arc;

use xml_schemas::dom::{self, Element, Node};
use xml_schemas::network::Network as Definition;

use super::define::{affect, impact};
use super::object::Network;
use super::{Driver, error};
use crate::drivers::domain::blocking;
use crate::drivers::domain::metadata::{Kind, parse_element, strip_namespace};
use crate::error::{ErrorCode, Result, check_flags};
use crate::events::NetworkEvent;

impl Driver {
    /// Reads.
    ///
    /// # Errors
    /// VIR_ERR_NO_NETWORK_METADATA if there is none.
    pub fn metadata(&self, network: &Network, kind: &Kind, flags: u32) -> Result<String> {
        check_flags(flags, affect::LIVE | affect::CONFIG, "networkGetMetadata")?;
        let (live, _) = impact(network, flags)?;
        let inner = network.lock();
        let definition = match &inner.live {
            Some(running) if live => Some(&running.definition),
            _ => inner.persistent.as_ref(),
        };
        let found = definition.and_then(|definition| match kind {
            Kind::Description => definition.description.clone(),
            Kind::Title => definition.title.clone(),
            Kind::Element(uri) => {
                let metadata = definition.metadata.as_ref()?;
                let found = metadata
                    .elements()
                    .find(|e| e.namespace.as_deref() == Some(uri))?;
                let mut element = found.clone();
                strip_namespace(&mut element, uri);
                Some(dom::format_metadata(&element))
            }
        });
        found.ok_or_else(|| {
            error(
                ErrorCode::NO_NETWORK_METADATA,
                match kind {
                    Kind::Description => "Requested description is not present",
                    Kind::Title => "Requested title is not present",
                    Kind::Element(_) => "Requested metadata element is not present",
                },
            )
        })
    }

    /// Changes; `None` removes.
    ///
    /// # Errors
    /// The definition meant is not there, a bad text's, the disk's.
    pub async fn set_metadata(
        self: &Arc<Self>,
        network: &Arc<Network>,
        kind: Kind,
        text: Option<String>,
        key: Option<String>,
        flags: u32,
    ) -> Result<()> {
        check_flags(flags, affect::LIVE | affect::CONFIG, "networkSetMetadata")?;
        let element = match (&kind, &text) {
            (Kind::Element(uri), Some(text)) => Some(parse_element(text, uri, key.as_deref())?),
            (Kind::Title, Some(title)) if title.contains('\n') => {
                return Err(error(
                    ErrorCode::INVALID_ARG,
                    "Network title can't contain newlines",
                ));
            }
            _ => None,
        };
        let _job = network.job().await?;
        let (to_live, to_config) = impact(network, flags)?;
        let (number, uri) = match &kind {
            Kind::Description => (0, None),
            Kind::Title => (1, None),
            Kind::Element(uri) => (2, Some(uri.clone())),
        };
        let (driver, target) = (Arc::clone(self), Arc::clone(network));
        blocking(move || {
            let change = |definition: &Arc<Definition>| {
                let mut changed = Definition::clone(definition);
                apply(&mut changed, &kind, text.clone(), element.clone());
                changed
            };
            let (stored, running) = {
                let inner = target.lock();
                let live = inner.live.as_ref().filter(|_| to_live);
                (
                    inner.persistent.as_ref().filter(|_| to_config).map(change),
                    live.map(|live| change(&live.definition)),
                )
            };
            driver.keep(&target, stored, running)
        })
        .await??;
        self.emit(network, NetworkEvent::MetadataChange(number, uri));
        Ok(())
    }
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
