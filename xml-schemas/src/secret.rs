//! The definition of a secret.

use uuid::Uuid;

use crate::dom::{self, Element, format_element};
use crate::error::{ErrorCode, ErrorDomain, XmlError};

/// A secret's definition; its value is not in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    /// Its UUID; made where the document has none.
    pub uuid: Uuid,
    /// It is kept in memory only.
    pub ephemeral: bool,
    /// Its value is given to no client.
    pub private: bool,
    /// For people.
    pub description: Option<String>,
    /// What it is for.
    pub usage: SecretUsage,
}

/// What a secret is for, with the name of the thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretUsage {
    /// Nothing stated.
    None,
    /// A volume: its path.
    Volume(String),
    /// A Ceph cluster.
    Ceph(String),
    /// An iSCSI target.
    Iscsi(String),
    /// A TLS key.
    Tls(String),
    /// A virtual TPM's state.
    Vtpm(String),
}

impl SecretUsage {
    /// Type in documents, element of the name, and virSecretUsageType.
    fn facts(&self) -> (&'static str, &'static str, i32) {
        match self {
            Self::None => ("none", "", 0),
            Self::Volume(_) => ("volume", "volume", 1),
            Self::Ceph(_) => ("ceph", "name", 2),
            Self::Iscsi(_) => ("iscsi", "target", 3),
            Self::Tls(_) => ("tls", "name", 4),
            Self::Vtpm(_) => ("vtpm", "name", 5),
        }
    }

    /// virSecretUsageType.
    pub fn number(&self) -> i32 {
        self.facts().2
    }

    /// The name of the thing; empty for [`SecretUsage::None`].
    pub fn id(&self) -> &str {
        match self {
            Self::None => "",
            Self::Volume(id)
            | Self::Ceph(id)
            | Self::Iscsi(id)
            | Self::Tls(id)
            | Self::Vtpm(id) => id,
        }
    }
}

fn xml(message: impl std::fmt::Display) -> XmlError {
    XmlError::new(ErrorCode::Xml, ErrorDomain::Secret, message)
}

impl Secret {
    /// Reads a definition.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR for text that is not well-formed or lacks a part,
    /// VIR_ERR_CONFIG_UNSUPPORTED for an unknown usage.
    pub fn parse(text: &str) -> Result<Self, XmlError> {
        let root = dom::parse(text, "(definition_of_secret)")?;
        if root.name != "secret" {
            return Err(xml(format!(
                "expecting root element of 'secret', not '{}'",
                root.name
            )));
        }
        let yes_no = |name: &str| match root.attr(name) {
            None | Some("no") => Ok(false),
            Some("yes") => Ok(true),
            Some(_) => Err(xml(format!("invalid value of '{name}'"))),
        };
        let uuid = match root.child_text("uuid") {
            None => Uuid::new_v4(),
            Some(text) => text.trim().parse().map_err(|_| {
                XmlError::new(
                    ErrorCode::Internal,
                    ErrorDomain::Secret,
                    "malformed uuid element",
                )
            })?,
        };
        Ok(Self {
            uuid,
            ephemeral: yes_no("ephemeral")?,
            private: yes_no("private")?,
            description: root.child_text("description").filter(|d| !d.is_empty()),
            usage: root.child("usage").map_or(Ok(SecretUsage::None), usage)?,
        })
    }

    /// The document in libvirt's layout.
    pub fn format(&self) -> String {
        let yes_no = |yes: bool| if yes { "yes" } else { "no" };
        let mut root = Element::new("secret")
            .with_attr("ephemeral", yes_no(self.ephemeral))
            .with_attr("private", yes_no(self.private))
            .with_child(Element::with_text("uuid", self.uuid.to_string()));
        if let Some(description) = &self.description {
            root.push(Element::with_text("description", description));
        }
        if self.usage != SecretUsage::None {
            let (kind, element, _) = self.usage.facts();
            root.push(
                Element::new("usage")
                    .with_attr("type", kind)
                    .with_child(Element::with_text(element, self.usage.id())),
            );
        }
        let mut out = String::new();
        format_element(&mut out, &root, 0);
        out
    }
}

fn usage(element: &Element) -> Result<SecretUsage, XmlError> {
    let Some(kind) = element.attr("type") else {
        return Err(xml("unknown secret usage type"));
    };
    let id = |name: &str| {
        element
            .child_text(name)
            .filter(|id| !id.is_empty())
            .ok_or_else(|| {
                xml(format!(
                    "{kind} usage specified, but {name} path is missing"
                ))
            })
    };
    Ok(match kind {
        "none" => SecretUsage::None,
        "volume" => SecretUsage::Volume(id("volume")?),
        "ceph" => SecretUsage::Ceph(id("name")?),
        "iscsi" => SecretUsage::Iscsi(id("target")?),
        "tls" => SecretUsage::Tls(id("name")?),
        "vtpm" => SecretUsage::Vtpm(id("name")?),
        other => {
            return Err(XmlError::new(
                ErrorCode::ConfigUnsupported,
                ErrorDomain::Secret,
                format!("unknown secret usage type {other}"),
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_definition_is_printed_as_libvirt_prints_it() {
        let text = "<secret ephemeral='no' private='yes'>
  <uuid>22222222-2222-2222-2222-222222222221</uuid>
  <description>d</description>
  <usage type='volume'>
    <volume>/x</volume>
  </usage>
</secret>
";
        let secret = Secret::parse(text).unwrap();
        assert_eq!(secret.format(), text);
        assert_eq!((secret.usage.number(), secret.usage.id()), (1, "/x"));
        let error = |text: &str| Secret::parse(text).unwrap_err().to_string();
        assert!(
            error("<secret><usage type='foo'/></secret>")
                .starts_with("unsupported configuration: unknown secret usage type foo")
        );
        assert!(error("<secret><usage type='tls'/></secret>").contains("missing"));
        assert!(error("<secret><uuid>x</uuid></secret>").contains("malformed uuid"));
        assert!(error("<domain/>").contains("expecting root element of 'secret', not 'domain'"));
    }
}
