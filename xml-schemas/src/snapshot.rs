//! The description of a domain's snapshot (libvirt's `<domainsnapshot>`).

use crate::dom::{self, Element, format_element};
use crate::domain::View;
use crate::error::{ErrorCode, ErrorDomain, XmlError};
use crate::{Domain, Validation};

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its name; the creator may leave it out.
    pub name: Option<String>,
    /// For people.
    pub description: Option<String>,
    /// What the domain did; none where the document doesn't say.
    pub state: Option<SnapshotState>,
    /// The one before it.
    pub parent: Option<String>,
    /// Seconds since 1970.
    pub created: Option<i64>,
    /// Where the guest's memory is.
    pub memory: Option<Place>,
    /// What is done with each disk.
    pub disks: Vec<SnapshotDisk>,
    /// Its deletion was begun: it is not what it was.
    pub deleting: bool,
    /// The domain at that time.
    pub domain: Option<Box<Domain>>,
}

/// What a domain did when its snapshot was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotState {
    /// It ran.
    Running,
    /// It was paused.
    Paused,
    /// It was off.
    Shutoff,
    /// Disks only: what the guest did meanwhile is not kept.
    DiskSnapshot,
}

/// Where a part of a snapshot is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: it is no part of it.
    No,
    /// In the disk's own image.
    Internal,
    /// In a file of its own: for memory its name, for a disk see [`SnapshotDisk::source`].
    External(Option<String>),
}

/// A disk of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotDisk {
    /// Its target (`vda`); in documents of users its image's path, too.
    pub name: String,
    /// Where its content is; none where the document leaves it to the rest.
    pub place: Option<Place>,
    /// Format of the new image.
    pub format: Option<String>,
    /// The new image, which the guest writes to from now on.
    pub source: Option<String>,
}

impl SnapshotState {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Running, "running"),
        (Self::Paused, "paused"),
        (Self::Shutoff, "shutoff"),
        (Self::DiskSnapshot, "disk-snapshot"),
    ];

    /// As documents say it.
    pub fn as_str(self) -> &'static str {
        let found = Self::ALL.iter().find(|(state, _)| *state == self);
        found.map_or("", |(_, name)| name)
    }

    fn parse(text: &str) -> Result<Self, XmlError> {
        let found = Self::ALL.iter().find(|(_, name)| *name == text);
        found.map(|(state, _)| *state).ok_or_else(|| {
            let message = format!("Invalid state '{text}' in domain snapshot XML");
            XmlError::new(ErrorCode::Internal, ErrorDomain::DomainSnapshot, message)
        })
    }
}

impl Place {
    /// As documents say it.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Internal => "internal",
            Self::External(_) => "external",
        }
    }

    fn parse(element: &str, text: &str, file: Option<String>) -> Result<Self, XmlError> {
        match text {
            "no" => Ok(Self::No),
            "internal" => Ok(Self::Internal),
            "external" => Ok(Self::External(file)),
            _ => Err(xml(format!(
                "Invalid value for attribute 'snapshot' in element '{element}': '{text}'."
            ))),
        }
    }
}

fn xml(message: impl std::fmt::Display) -> XmlError {
    XmlError::new(ErrorCode::Xml, ErrorDomain::DomainSnapshot, message)
}

impl Snapshot {
    /// Reads a document. `whole`: one that the system wrote, or that is to be taken over as it is
    /// (redefine), with state, time and domain.
    ///
    /// # Errors
    /// Not well-formed, or a value that libvirt refuses too.
    pub fn parse(text: &str, whole: bool) -> Result<Self, XmlError> {
        let root = dom::parse(text, "(domain_snapshot)")?;
        if root.name != "domainsnapshot" {
            return Err(xml(format!(
                "unexpected root element <{}>, expecting <domainsnapshot>",
                root.name
            )));
        }
        let name = root.child_text("name").filter(|name| !name.is_empty());
        if let Some(name) = &name
            && let Some(fault) = match name.as_bytes() {
                [b'.', ..] => Some("name can't start with '.'"),
                bytes => bytes.contains(&b'/').then_some("name can't contain '/'"),
            }
        {
            return Err(XmlError::new(
                ErrorCode::XmlDetail,
                ErrorDomain::DomainSnapshot,
                format!("invalid snapshot name '{name}': {fault}"),
            ));
        }
        let mut snapshot = Self {
            name,
            description: root.child_text("description").filter(|d| !d.is_empty()),
            state: None,
            parent: None,
            created: None,
            memory: root.child("memory").map(memory).transpose()?,
            disks: Vec::new(),
            deleting: false,
            domain: None,
        };
        if let Some(disks) = root.child("disks") {
            for element in disks.elements().filter(|e| e.name == "disk") {
                snapshot.disks.push(disk(element)?);
            }
        }
        if !whole {
            return Ok(snapshot);
        }
        let created = root.child_text("creationTime");
        let created = created.and_then(|text| text.trim().parse().ok());
        snapshot.created =
            Some(created.ok_or_else(|| xml("missing creationTime from existing snapshot"))?);
        let state = root.child_text("state");
        let state = state.ok_or_else(|| xml("missing state from existing snapshot"))?;
        snapshot.state = Some(SnapshotState::parse(&state)?);
        snapshot.deleting = root.child("snapshotDeleteInProgress").is_some();
        snapshot.parent = root
            .child("parent")
            .and_then(|parent| parent.child_text("name"));
        if let Some(domain) = root.child("domain") {
            let mut text = String::new();
            format_element(&mut text, domain, 0);
            let parsed = Domain::parse(&text, Validation::Lenient)?;
            snapshot.domain = Some(Box::new(parsed.domain));
        }
        Ok(snapshot)
    }

    /// The document in libvirt's layout. `full`: with the domain.
    pub fn format(&self, full: bool) -> String {
        let mut root = Element::new("domainsnapshot");
        let mut text = |name: &str, value: Option<&str>| {
            if let Some(value) = value {
                root.push(Element::with_text(name, value));
            }
        };
        text("name", self.name.as_deref());
        text("description", self.description.as_deref());
        text("state", self.state.map(SnapshotState::as_str));
        if let Some(parent) = &self.parent {
            let parent = Element::new("parent").with_child(Element::with_text("name", parent));
            root.push(parent);
        }
        if let Some(created) = self.created {
            root.push(Element::with_text("creationTime", created.to_string()));
        }
        if let Some(place) = &self.memory {
            let mut memory = Element::new("memory").with_attr("snapshot", place.as_str());
            if let Place::External(Some(file)) = place {
                memory.set_attr("file", file);
            }
            root.push(memory);
        }
        if !self.disks.is_empty() {
            let mut disks = Element::new("disks");
            self.disks
                .iter()
                .for_each(|disk| disks.push(disk.element()));
            root.push(disks);
        }
        if self.deleting && full {
            // libvirt's own note, too.
            root.push(Element::new("snapshotDeleteInProgress"));
        }
        let mut out = String::new();
        format_element(&mut out, &root, 0);
        if let (Some(domain), true) = (&self.domain, full) {
            // The domain's own formatter knows libvirt's order of elements.
            let inner: String = domain
                .format(View::Inactive)
                .lines()
                .map(|line| format!("  {line}\n"))
                .collect();
            if let Some(end) = out.rfind("</domainsnapshot>") {
                out.insert_str(end, &inner);
            }
        }
        out
    }
}

impl SnapshotDisk {
    fn element(&self) -> Element {
        let mut element = Element::new("disk").with_attr("name", self.name.as_str());
        if let Some(place) = &self.place {
            element.set_attr("snapshot", place.as_str());
            if matches!(place, Place::External(_)) {
                element.set_attr("type", "file");
            }
        }
        if let Some(format) = &self.format {
            element.push(Element::new("driver").with_attr("type", format.as_str()));
        }
        if let Some(source) = &self.source {
            element.push(Element::new("source").with_attr("file", source.as_str()));
        }
        element
    }
}

fn memory(element: &Element) -> Result<Place, XmlError> {
    let file = element.attr("file").map(str::to_owned);
    let place = match element.attr("snapshot") {
        Some(text) => Place::parse("memory", text, file)?,
        None if file.is_some() => Place::External(file),
        None => return Err(xml("missing 'snapshot' attribute of <memory>")),
    };
    match &place {
        Place::External(None) => Err(xml("external memory snapshots require a filename")),
        Place::External(Some(file)) if !file.starts_with('/') => Err(xml(format!(
            "memory snapshot file path ({file}) must be absolute"
        ))),
        _ => Ok(place),
    }
}

fn disk(element: &Element) -> Result<SnapshotDisk, XmlError> {
    let name = element
        .attr("name")
        .ok_or_else(|| xml("missing name from disk snapshot element"))?;
    let source = element
        .child("source")
        .and_then(|source| source.attr("file"));
    let format = element
        .child("driver")
        .and_then(|driver| driver.attr("type"));
    let kind = element.attr("type").unwrap_or("file");
    if kind != "file" && (source.is_some() || element.child("source").is_some()) {
        return Err(XmlError::new(
            ErrorCode::ConfigUnsupported,
            ErrorDomain::DomainSnapshot,
            format!("disk '{name}': a snapshot of type '{kind}'; only files"),
        ));
    }
    if let Some(source) = source
        && !source.starts_with('/')
    {
        return Err(xml(format!(
            "disk snapshot image path '{source}' must be absolute"
        )));
    }
    let place = match element.attr("snapshot") {
        Some(text) => Some(Place::parse("disk", text, None)?),
        None if source.is_some() => Some(Place::External(None)),
        None => None,
    };
    Ok(SnapshotDisk {
        name: name.to_owned(),
        place,
        format: format.map(str::to_owned),
        source: source.map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = "<domainsnapshot>
  <name>first</name>
  <description>before the upgrade</description>
  <state>running</state>
  <parent>
    <name>zero</name>
  </parent>
  <creationTime>1700000000</creationTime>
  <memory snapshot='external' file='/tmp/mem'/>
  <disks>
    <disk name='vda' snapshot='external' type='file'>
      <driver type='qcow2'/>
      <source file='/tmp/a.first'/>
    </disk>
    <disk name='vdb' snapshot='no'/>
  </disks>
</domainsnapshot>
";

    #[test]
    fn a_document_is_printed_as_it_was_read() {
        let snapshot = Snapshot::parse(WHOLE, true).unwrap();
        assert_eq!(snapshot.format(true), WHOLE);
        assert_eq!(snapshot.disks[1].place, Some(Place::No));
    }

    #[test]
    fn a_users_document_may_say_little() {
        let snapshot = Snapshot::parse("<domainsnapshot/>", false).unwrap();
        assert_eq!(snapshot.name, None);
        for (bad, words) in [
            ("<snapshot/>", "root element"),
            ("<domainsnapshot><name>a/b</name></domainsnapshot>", "a/b"),
            ("<domainsnapshot><memory/></domainsnapshot>", "snapshot"),
            (
                "<domainsnapshot><memory snapshot='external'/></domainsnapshot>",
                "filename",
            ),
            (
                "<domainsnapshot><disks><disk/></disks></domainsnapshot>",
                "missing name",
            ),
            (
                "<domainsnapshot><disks><disk name='vda' snapshot='x'/></disks></domainsnapshot>",
                "'x'",
            ),
        ] {
            let error = Snapshot::parse(bad, false).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        assert!(Snapshot::parse("<domainsnapshot/>", true).is_err());
    }
}
