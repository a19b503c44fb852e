//! A small, bounded XML tree.
//!
//! Documents come from clients, so everything about them is limited: size, depth, the number of
//! elements and of attributes. There is no DTD and hence no entity but XML's own five.
//! [`parse`] is the only user of the XML library.

mod fault;
mod format;
mod parse;

use std::borrow::Cow;
use std::sync::Arc;

pub use compact_str::{CompactString, format_compact};

pub use format::{Quote, escape_text, format_element, format_metadata};
pub use parse::{parse, parse_until};

/// Bytes of one document: the longest string libvirt's protocol carries.
pub const MAX_DOCUMENT_BYTES: usize = 4 << 20;
/// Nested elements, as in libxml2.
pub const MAX_DEPTH: usize = 256;
/// Elements and comments in one document.
pub const MAX_NODES: usize = 100_000;
/// Attributes of one element.
pub const MAX_ATTRIBUTES: usize = 256;

/// What an element contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A child element.
    Element(Element),
    /// Character data, unescaped.
    Text(CompactString),
    /// A comment's text; only metadata keeps them.
    Comment(CompactString),
}

/// An element with its attributes and contents, in document order.
///
/// Nearly all names and values are so short that they need no memory of their own: a definition has some hundred.
#[derive(Debug, Clone, Default)]
pub struct Element {
    /// The name as written, with its prefix if it has one.
    pub name: CompactString,
    /// The namespace the name is in, if any.
    pub namespace: Option<Arc<str>>,
    /// Names as written (`xmlns` declarations among them) and unescaped values.
    pub attributes: Vec<(CompactString, CompactString)>,
    /// The contents.
    pub children: Vec<Node>,
    /// The line of the start tag, 1-based; 0 for an element that no document contained.
    pub line: u32,
}

/// Two elements are equal wherever they stand.
impl PartialEq for Element {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
            && self.namespace == other.namespace
            && self.attributes == other.attributes
            && self.children == other.children
    }
}

impl Eq for Element {}

impl Element {
    /// An empty element in no namespace.
    pub fn new(name: impl Into<CompactString>) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }

    /// An element with nothing but text.
    pub fn with_text(name: impl Into<CompactString>, text: impl Into<CompactString>) -> Self {
        let mut element = Self::new(name);
        element.push_text(text);
        element
    }

    /// The same element with one more attribute.
    #[must_use]
    pub fn with_attr(mut self, name: &str, value: impl Into<CompactString>) -> Self {
        self.set_attr(name, value);
        self
    }

    /// The same element with one more child.
    #[must_use]
    pub fn with_child(mut self, child: Element) -> Self {
        self.push(child);
        self
    }

    /// An attribute's value.
    pub fn attr(&self, name: &str) -> Option<&str> {
        self.attributes
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    }

    /// Adds or replaces an attribute.
    pub fn set_attr(&mut self, name: &str, value: impl Into<CompactString>) {
        match self.attributes.iter_mut().find(|(n, _)| n == name) {
            Some((_, v)) => *v = value.into(),
            None => self.attributes.push((name.into(), value.into())),
        }
    }

    /// Adds or replaces an attribute if there is a value for it.
    pub fn set_opt_attr(&mut self, name: &str, value: Option<impl Into<CompactString>>) {
        if let Some(value) = value {
            self.set_attr(name, value);
        }
    }

    /// Removes an attribute and returns its value.
    pub fn take_attr(&mut self, name: &str) -> Option<CompactString> {
        let i = self.attributes.iter().position(|(n, _)| n == name)?;
        Some(self.attributes.remove(i).1)
    }

    /// Appends a child element.
    pub fn push(&mut self, child: Element) {
        self.children.push(Node::Element(child));
    }

    /// Appends text, unless it is empty.
    pub fn push_text(&mut self, text: impl Into<CompactString>) {
        let text = text.into();
        if !text.is_empty() {
            self.children.push(Node::Text(text));
        }
    }

    /// The child elements.
    pub fn elements(&self) -> impl Iterator<Item = &Element> {
        self.children.iter().filter_map(|n| match n {
            Node::Element(e) => Some(e),
            _ => None,
        })
    }

    /// The child elements, to be changed.
    pub fn elements_mut(&mut self) -> impl Iterator<Item = &mut Element> {
        self.children.iter_mut().filter_map(|n| match n {
            Node::Element(e) => Some(e),
            _ => None,
        })
    }

    /// The first child element of that name.
    pub fn child(&self, name: &str) -> Option<&Element> {
        self.elements().find(|e| e.name == name)
    }

    /// Removes and returns the first child element of that name.
    pub fn take_child(&mut self, name: &str) -> Option<Element> {
        let i = self
            .children
            .iter()
            .position(|n| matches!(n, Node::Element(e) if e.name == name))?;
        match self.children.remove(i) {
            Node::Element(e) => Some(e),
            _ => None,
        }
    }

    /// Removes and returns all child elements of that name.
    pub fn take_children(&mut self, name: &str) -> Vec<Element> {
        let mut taken = Vec::new();
        let children = std::mem::take(&mut self.children);
        for node in children {
            match node {
                Node::Element(e) if e.name == name => taken.push(e),
                other => self.children.push(other),
            }
        }
        taken
    }

    /// Removes and returns all child elements.
    pub fn take_elements(&mut self) -> Vec<Element> {
        std::mem::take(&mut self.children)
            .into_iter()
            .filter_map(|n| match n {
                Node::Element(e) => Some(e),
                _ => None,
            })
            .collect()
    }

    /// The element's own text (not its children's), as written.
    pub fn text(&self) -> String {
        self.content().into_owned()
    }

    /// The same to look at.
    pub fn content(&self) -> Cow<'_, str> {
        let mut texts = self.children.iter().filter_map(|n| match n {
            Node::Text(t) => Some(t.as_str()),
            _ => None,
        });
        let first = texts.next().unwrap_or_default();
        match texts.next() {
            None => Cow::Borrowed(first),
            Some(second) => Cow::Owned([first, second].into_iter().chain(texts).collect()),
        }
    }

    /// The first child's text, if there is such a child.
    pub fn child_text(&self, name: &str) -> Option<String> {
        self.child(name).map(Element::text)
    }

    /// The name without its prefix.
    pub fn local_name(&self) -> &str {
        self.name.rsplit(':').next().unwrap_or(&self.name)
    }

    /// Whether there is anything in it beyond its name.
    pub fn is_empty(&self) -> bool {
        self.attributes.is_empty() && self.children.is_empty()
    }
}
