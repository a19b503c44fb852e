//! What libvirt allows in its documents, as a table, and what follows from it: refusing what is
//! not allowed, keeping it out, and libvirt's order of attributes and children.
//!
//! The table states facts in a notation of its own (see `table.rs`); where a choice depends on
//! an attribute it says so. It is deliberately a little wider than libvirt's schema where that
//! makes the meaning of one child depend on another.

mod check;
mod kind;
mod pattern;
mod table;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use crate::dom::{Element, Node};
use table::{Body, BodyRef, Item, Table};

/// The table of one kind of document.
#[derive(Debug)]
pub struct Grammar {
    table: Table,
}

/// The table of domain definitions.
pub fn domain() -> &'static Grammar {
    static DOMAIN: OnceLock<Grammar> = OnceLock::new();
    DOMAIN.get_or_init(|| {
        let table = Table::parse(&[
            include_str!("domain.txt"),
            include_str!("tuning.txt"),
            include_str!("devices.txt"),
            include_str!("storage.txt"),
            include_str!("encryption.txt"),
            include_str!("network.txt"),
            include_str!("media.txt"),
            include_str!("kinds.txt"),
        ]);
        match table {
            Ok(table) => Grammar { table },
            // Part of the program, and read by every test: no input gets here.
            Err(e) => unreachable!("the domain table: {e}"),
        }
    })
}

/// The table of network definitions.
pub fn network() -> &'static Grammar {
    static NETWORK: OnceLock<Grammar> = OnceLock::new();
    NETWORK.get_or_init(|| {
        let table = Table::parse(&[
            include_str!("virtual-network.txt"),
            include_str!("domain.txt"),
            include_str!("tuning.txt"),
            include_str!("devices.txt"),
            include_str!("storage.txt"),
            include_str!("encryption.txt"),
            include_str!("network.txt"),
            include_str!("media.txt"),
            include_str!("kinds.txt"),
        ]);
        match table {
            Ok(table) => Grammar { table },
            // Part of the program, and read by every test: no input gets here.
            Err(e) => unreachable!("the network table: {e}"),
        }
    })
}

/// The table of storage pools.
pub fn pool() -> &'static Grammar {
    static POOL: OnceLock<Grammar> = OnceLock::new();
    POOL.get_or_init(|| {
        let table = Table::parse(&[include_str!("pool.txt"), include_str!("kinds.txt")]);
        match table {
            Ok(table) => Grammar { table },
            // As above.
            Err(e) => unreachable!("the pool table: {e}"),
        }
    })
}

/// The table of storage volumes.
pub fn volume() -> &'static Grammar {
    static VOLUME: OnceLock<Grammar> = OnceLock::new();
    VOLUME.get_or_init(|| {
        let table = Table::parse(&[
            include_str!("volume.txt"),
            // What a pool has as well: sizes, permissions.
            include_str!("pool.txt"),
            include_str!("encryption.txt"),
            include_str!("kinds.txt"),
        ]);
        match table {
            Ok(table) => Grammar { table },
            // As above.
            Err(e) => unreachable!("the volume table: {e}"),
        }
    })
}

/// What one element with its attributes may hold.
#[derive(Debug, Default)]
struct Allowed<'g> {
    attributes: Vec<(&'g str, bool, &'g kind::Values)>,
    children: Vec<Child<'g>>,
    text: Option<(bool, &'g kind::Values)>,
    any: bool,
    order: Vec<&'g str>,
    some: Vec<&'g [&'static str]>,
}

impl Allowed<'_> {
    /// Where the table prints an attribute.
    fn attribute_rank(&self, name: &str) -> usize {
        let is_it = |o: &&str| o.strip_prefix('@') == Some(name);
        let then = || self.attributes.iter().position(|(n, ..)| *n == name);
        self.rank(is_it, then)
    }

    /// Where the table prints a child.
    fn child_rank(&self, name: &str) -> usize {
        let then = || self.children.iter().position(|c| c.name == name);
        self.rank(|o| *o == name, then)
    }

    fn rank(
        &self,
        is_it: impl FnMut(&&str) -> bool,
        then: impl FnOnce() -> Option<usize>,
    ) -> usize {
        match self.order.iter().position(is_it) {
            Some(first) => first,
            None => then().map_or(usize::MAX, |then| self.order.len() + then),
        }
    }
}

#[derive(Debug)]
struct Child<'g> {
    name: &'g str,
    min: usize,
    max: usize,
    body: &'g Body,
}

impl Grammar {
    fn root_body(&self) -> &Body {
        &self.table.bodies[0]
    }

    fn allowed<'g>(&'g self, body: &'g Body, element: &Element) -> Allowed<'g> {
        let mut allowed = Allowed::default();
        // Every element of every document comes through here: its lists grow once.
        let is_attribute = |item: &&Item| matches!(item, Item::Attribute { .. });
        let attributes = body.iter().filter(is_attribute).count();
        allowed.attributes.reserve_exact(attributes);
        allowed.children.reserve_exact(body.len() - attributes);
        self.collect(body, element, &mut allowed);
        allowed
    }

    fn collect<'g>(&'g self, body: &'g Body, element: &Element, into: &mut Allowed<'g>) {
        for item in body {
            match item {
                Item::Attribute {
                    name,
                    required,
                    values,
                } => {
                    into.attributes.push((name, *required, values));
                }
                Item::Child {
                    name,
                    min,
                    max,
                    body,
                } => {
                    let body = match body {
                        BodyRef::Inline(body) => body,
                        BodyRef::Def(index) => &self.table.bodies[*index],
                    };
                    into.children.push(Child {
                        name,
                        min: *min,
                        max: *max,
                        body,
                    });
                }
                Item::Text { required, values } => into.text = Some((*required, values)),
                Item::When {
                    attribute,
                    values,
                    absent,
                    items,
                } => {
                    let holds = match element.attr(attribute) {
                        Some(value) => values.contains(&value.trim()),
                        None => *absent,
                    };
                    if holds {
                        self.collect(items, element, into);
                    }
                }
                Item::Order(names) => into.order.extend(names),
                Item::Some(names) => into.some.push(names),
                Item::Any => into.any = true,
            }
        }
    }

    /// Gives elements of the table's namespaces their prefix in the table, whatever prefix the
    /// document has for it, and drops the declarations (the formatter writes its own).
    pub fn normalize(&self, root: &mut Element) {
        root.attributes.retain(|(name, _)| !is_declaration(name));
        if let Some(uri) = root.namespace.as_deref()
            && let Some((_, prefix)) = self.table.namespaces.iter().find(|(u, _)| *u == uri)
        {
            root.name = format!("{prefix}:{}", root.local_name());
        }
        for child in root.elements_mut() {
            if child.name != "metadata" {
                self.normalize(child);
            }
        }
    }

    /// The namespace name that the table has for `prefix`.
    pub fn namespace(&self, prefix: &str) -> Option<&'static str> {
        self.table
            .namespaces
            .iter()
            .find(|(_, p)| *p == prefix)
            .map(|(uri, _)| *uri)
    }

    /// Puts attributes and children in libvirt's order. Those of one name keep theirs.
    pub fn arrange(&self, root: &mut Element) {
        self.arrange_in(self.root_body(), root);
    }

    fn arrange_in(&self, body: &Body, element: &mut Element) {
        let has_children = element.elements().next().is_some();
        // There is one order only, as with most elements of most documents.
        if element.attributes.len() < 2 && !has_children {
            return;
        }
        let allowed = self.allowed(body, element);
        if allowed.any {
            return;
        }
        let rank = |(name, _): &(String, String)| allowed.attribute_rank(name);
        if !element.attributes.is_sorted_by_key(rank) {
            element.attributes.sort_by_cached_key(rank);
        }
        if !has_children {
            return;
        }
        let is_element = |node: &Node| matches!(node, Node::Element(_));
        element.children.retain(is_element);
        let rank = |node: &Node| match node {
            Node::Element(child) => allowed.child_rank(&child.name),
            Node::Text(_) | Node::Comment(_) => usize::MAX,
        };
        if !element.children.is_sorted_by_key(rank) {
            element.children.sort_by_cached_key(rank);
        }
        for child in element.elements_mut() {
            if let Some(rule) = allowed.children.iter().find(|c| c.name == child.name) {
                self.arrange_in(rule.body, child);
            }
        }
    }

    /// Whether `value` is allowed for that attribute of the root element.
    pub fn allows_value(&self, attribute: &str, value: &str) -> bool {
        self.root_body().iter().any(|item| match item {
            Item::Attribute { name, values, .. } => {
                *name == attribute && self.table.kinds.allow(values, value)
            }
            _ => false,
        })
    }
}

fn is_declaration(name: &str) -> bool {
    name == "xmlns" || name.starts_with("xmlns:")
}
