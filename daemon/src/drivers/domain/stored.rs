//! A definition that is in the store, as the daemon keeps it.
//!
//! A host has thousands of definitions and uses few of them at a time. So what is kept is the text, and its parsed form
//! lives for as long as somebody works with it. A daemon that starts does not even parse what an earlier one has
//! written: by its sum it is known to be what was parsed and checked when it was defined.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use uuid::Uuid;
use xml_schemas::domain::HostFacts;
use xml_schemas::{Domain as Definition, Validation, XmlError};

use crate::store::{Identity, Text};

/// A definition in the store.
#[derive(Debug)]
pub struct Stored {
    /// As [`Definition::stored_text`] gave it, with nothing left to fill.
    text: Box<str>,
    parsed: Mutex<Weak<Definition>>,
}

impl Stored {
    /// What is in the store now, or about to be.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR if it is so long that it could not be read again.
    pub fn new(definition: &Arc<Definition>) -> Result<Self, XmlError> {
        Ok(Self {
            text: definition.stored_text()?.into(),
            parsed: Mutex::new(Arc::downgrade(definition)),
        })
    }

    /// What the store has at the daemon's start. Text that nobody has changed since it was written is not parsed for
    /// that.
    ///
    /// # Errors
    /// Why it is no definition, for the log.
    pub fn load(text: Text<'_>, host: &HostFacts) -> Result<(Identity, Self), String> {
        let known = |name, uuid: Option<Uuid>| {
            // Written by hand; a made-up one would be another at each start.
            let uuid = uuid.ok_or("it has no <uuid>")?;
            Ok::<_, String>(Identity { name, uuid })
        };
        if text.unchanged {
            let (name, uuid) = Definition::identify(text.xml).map_err(|e| e.to_string())?;
            let stored = Self {
                text: text.xml.into(),
                parsed: Mutex::default(),
            };
            return Ok((known(name, uuid)?, stored));
        }
        let parsed = Definition::parse(text.xml, Validation::Lenient).map_err(|e| e.to_string())?;
        let mut definition = parsed.domain;
        let identity = known(definition.name.clone(), definition.uuid)?;
        let filled = definition.fill_stored(host);
        // What had to be made up (a card's address) is the same from now on.
        let stored = filled.and_then(|()| Self::new(&Arc::new(definition)));
        Ok((identity, stored.map_err(|e| e.to_string())?))
    }

    /// The text that is in the store.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The parsed definition: the one that others have in use, if there is one.
    ///
    /// # Errors
    /// An earlier version of this program has stored what this one does not understand.
    pub fn read(&self) -> Result<Arc<Definition>, XmlError> {
        let mut parsed = self.parsed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(definition) = parsed.upgrade() {
            return Ok(definition);
        }
        let read = Arc::new(Definition::parse_stored(&self.text)?);
        *parsed = Arc::downgrade(&read);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node;
    use xml_schemas::domain::View;

    const XML: &str = "<domain type='qemu'><name>a</name>\
        <uuid>00000000-0000-0000-0000-000000000001</uuid><memory>1024</memory><os><type>hvm</type></os>\
        <devices><interface type='user'/></devices></domain>";

    fn load(xml: &str, unchanged: bool) -> Result<(Identity, Stored), String> {
        let host = node::facts("/vmm".as_ref());
        Stored::load(Text { xml, unchanged }, &host)
    }

    #[test]
    fn one_parsed_form_is_shared_and_goes_with_its_last_user() {
        let (identity, stored) = load(XML, false).unwrap();
        assert_eq!((identity.name.as_str(), identity.uuid.as_u128()), ("a", 1));
        let first = stored.read().unwrap();
        assert!(Arc::ptr_eq(&first, &stored.read().unwrap()));
        let seen = Arc::downgrade(&first);
        drop(first);
        assert!(seen.upgrade().is_none());
    }

    #[test]
    fn what_was_made_up_stays() {
        let (_, stored) = load(XML, false).unwrap();
        let text = stored.text().to_owned();
        assert!(text.contains("<mac address='52:54:00:"), "{text}");
        let read = stored.read().unwrap();
        assert_eq!(read.format(View::Inactive), text);
        // As the next daemon finds it.
        let (again, unread) = load(&text, true).unwrap();
        assert_eq!(again.name, "a");
        assert_eq!(unread.read().unwrap(), read);
    }

    #[test]
    fn what_is_no_definition_is_told() {
        assert!(load("<domain", false).is_err());
        assert!(load("<domain", true).is_err());
        let nameless = XML.replace("00000000-0000-0000-0000-000000000001", "");
        assert!(load(&nameless, false).is_err());
        // Taken for what an earlier daemon understood.
        let other = XML.replace("<memory>1024</memory>", "<memory>much</memory>");
        assert!(load(&other, false).is_err());
        let (_, stored) = load(&other, true).unwrap();
        assert!(stored.read().is_err());
    }
}
