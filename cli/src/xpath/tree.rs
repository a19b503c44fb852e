//! A document as XPath sees it: nodes with parents, in the order of the document.

use xml_schemas::dom::{Element, Node};

/// A node's number. Numbers grow in the order of the document.
pub type NodeId = usize;

/// What a node is.
#[derive(Debug)]
pub enum Kind {
    /// The document.
    Root,
    /// An element.
    Element {
        /// Its name, with its prefix.
        name: String,
    },
    /// An attribute.
    Attribute {
        /// Its name, with its prefix.
        name: String,
        /// Its value, unescaped.
        value: String,
    },
    /// Text, unescaped.
    Text(String),
    /// A comment.
    Comment(String),
}

#[derive(Debug)]
struct Entry {
    kind: Kind,
    parent: Option<NodeId>,
    attributes: Vec<NodeId>,
    children: Vec<NodeId>,
}

/// A document.
#[derive(Debug)]
pub struct Tree {
    entries: Vec<Entry>,
}

/// The document's own number.
pub const ROOT: NodeId = 0;

impl Tree {
    /// The document with this root element.
    pub fn new(root: &Element) -> Self {
        let mut tree = Self {
            entries: Vec::new(),
        };
        let document = tree.add(Kind::Root, None);
        let element = tree.add_element(root, document);
        tree.entries[document].children.push(element);
        tree
    }

    fn add(&mut self, kind: Kind, parent: Option<NodeId>) -> NodeId {
        self.entries.push(Entry {
            kind,
            parent,
            attributes: Vec::new(),
            children: Vec::new(),
        });
        self.entries.len() - 1
    }

    /// The parser limits how deep elements are nested, and so how deep this goes.
    fn add_element(&mut self, element: &Element, parent: NodeId) -> NodeId {
        let id = self.add(
            Kind::Element {
                name: element.name.to_string(),
            },
            Some(parent),
        );
        for (name, value) in &element.attributes {
            let kind = Kind::Attribute {
                name: name.to_string(),
                value: value.to_string(),
            };
            let attribute = self.add(kind, Some(id));
            self.entries[id].attributes.push(attribute);
        }
        for child in &element.children {
            let child = match child {
                Node::Element(element) => self.add_element(element, id),
                // Layout between elements, which virsh leaves out as well.
                Node::Text(text) if text.trim().is_empty() && element.children.len() > 1 => {
                    continue;
                }
                Node::Text(text) => self.add(Kind::Text(text.to_string()), Some(id)),
                Node::Comment(text) => self.add(Kind::Comment(text.to_string()), Some(id)),
            };
            self.entries[id].children.push(child);
        }
        id
    }

    /// What a node is.
    pub fn kind(&self, node: NodeId) -> &Kind {
        &self.entries[node].kind
    }

    /// The node that a node is in.
    pub fn parent(&self, node: NodeId) -> Option<NodeId> {
        self.entries[node].parent
    }

    /// An element's attributes.
    pub fn attributes(&self, node: NodeId) -> &[NodeId] {
        &self.entries[node].attributes
    }

    /// What is in a node, without attributes.
    pub fn children(&self, node: NodeId) -> &[NodeId] {
        &self.entries[node].children
    }

    /// The name of an element or attribute; empty for any other node.
    pub fn name(&self, node: NodeId) -> &str {
        match self.kind(node) {
            Kind::Element { name } | Kind::Attribute { name, .. } => name,
            _ => "",
        }
    }

    /// A node's value as text: for an element, all text in it.
    pub fn text(&self, node: NodeId) -> String {
        match self.kind(node) {
            Kind::Attribute { value, .. } => value.clone(),
            Kind::Text(text) | Kind::Comment(text) => text.clone(),
            Kind::Root | Kind::Element { .. } => {
                let mut nodes = Vec::new();
                self.descendants(node, &mut nodes);
                nodes
                    .into_iter()
                    .filter_map(|node| match self.kind(node) {
                        Kind::Text(text) => Some(text.as_str()),
                        _ => None,
                    })
                    .collect()
            }
        }
    }

    /// Everything in a node, in the order of the document.
    pub fn descendants(&self, node: NodeId, into: &mut Vec<NodeId>) {
        for &child in self.children(node) {
            into.push(child);
            self.descendants(child, into);
        }
    }
}
