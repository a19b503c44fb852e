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

use std::cell::RefCell;
use std::ops::Deref;
use std::sync::OnceLock;

use crate::dom::{CompactString, Element, Node};
use table::{Body, BodyRef, Item, Table};

/// The table of one kind of document.
#[derive(Debug)]
pub struct Grammar {
    table: &'static Table,
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
            Ok(table) => Grammar::new(table),
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
            Ok(table) => Grammar::new(table),
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
            Ok(table) => Grammar::new(table),
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
            Ok(table) => Grammar::new(table),
            // As above.
            Err(e) => unreachable!("the volume table: {e}"),
        }
    })
}

/// What one element with its attributes may hold.
#[derive(Debug, Default)]
struct Allowed {
    attributes: Vec<(&'static str, bool, &'static kind::Values)>,
    children: Vec<Child>,
    text: Option<(bool, &'static kind::Values)>,
    any: bool,
    order: Vec<&'static str>,
    some: Vec<&'static [&'static str]>,
}

impl Allowed {
    /// Nothing, with its lists' room kept.
    fn clear(&mut self) {
        self.attributes.clear();
        self.children.clear();
        self.text = None;
        self.any = false;
        self.order.clear();
        self.some.clear();
    }

    /// Where the table prints an attribute.
    fn attribute_rank(&self, name: &str) -> usize {
        let is_it = |o: &&str| o.strip_prefix('@') == Some(name);
        match self.order.iter().position(is_it) {
            Some(first) => first,
            None => {
                let listed = self.attributes.iter().position(|(n, ..)| *n == name);
                self.behind_order(listed)
            }
        }
    }

    /// Where the table prints a child, if that is the rule for it.
    fn child_rank(&self, name: &str, rule: Option<usize>) -> usize {
        match self.order.iter().position(|o| *o == name) {
            Some(first) => first,
            None => self.behind_order(rule),
        }
    }

    fn behind_order(&self, listed: Option<usize>) -> usize {
        listed.map_or(usize::MAX, |listed| self.order.len() + listed)
    }

    /// The rule for a child.
    fn rule(&self, name: &str) -> Option<usize> {
        self.children.iter().position(|c| c.name == name)
    }
}

#[derive(Debug)]
struct Child {
    name: &'static str,
    needed: bool,
    many: bool,
    body: &'static Body,
}

/// What an element may hold: the same for all elements of a body without `when`, or collected for this one.
enum Found {
    Fixed(&'static Allowed),
    Collected(Allowed),
}

impl Deref for Found {
    type Target = Allowed;

    fn deref(&self) -> &Allowed {
        match self {
            Self::Fixed(allowed) => allowed,
            Self::Collected(allowed) => allowed,
        }
    }
}

thread_local! {
    /// Lists for the next elements: many elements of every document need some, a few at a time.
    static SPARE: RefCell<Vec<Allowed>> = const { RefCell::new(Vec::new()) };
}

impl Drop for Found {
    fn drop(&mut self) {
        /// As deep as elements whose attributes decide are in one another.
        const KEPT: usize = 4;
        if let Self::Collected(allowed) = self {
            let mut allowed = std::mem::take(allowed);
            allowed.clear();
            // A thread that ends keeps nothing.
            let _ = SPARE.try_with(|spare| {
                let mut spare = spare.borrow_mut();
                if spare.len() < KEPT {
                    spare.push(allowed);
                }
            });
        }
    }
}

impl Grammar {
    /// Tables are there for good: there are as many as there are kinds of documents.
    fn new(table: Table) -> Self {
        Self {
            table: Box::leak(Box::new(table)),
        }
    }

    fn root_body(&self) -> &'static Body {
        &self.table.bodies[0]
    }

    fn allowed(&self, body: &'static Body, element: &Element) -> Found {
        if !body.conditional {
            return Found::Fixed(body.fixed.get_or_init(|| {
                let mut allowed = Allowed::default();
                self.collect(&body.items, element, &mut allowed);
                allowed
            }));
        }
        let spare = SPARE.try_with(|spare| spare.borrow_mut().pop());
        let mut allowed = spare.ok().flatten().unwrap_or_default();
        self.collect(&body.items, element, &mut allowed);
        Found::Collected(allowed)
    }

    fn collect(&self, items: &'static [Item], element: &Element, into: &mut Allowed) {
        for item in items {
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
                    needed,
                    many,
                    body,
                } => {
                    let body = match body {
                        BodyRef::Inline(body) => body,
                        BodyRef::Def(index) => &self.table.bodies[*index],
                    };
                    into.children.push(Child {
                        name,
                        needed: *needed,
                        many: *many,
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
            root.name = format!("{prefix}:{}", root.local_name()).into();
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

    fn arrange_in(&self, body: &'static Body, element: &mut Element) {
        let has_children = element.elements().next().is_some();
        // There is one order only, as with most elements of most documents.
        if element.attributes.len() < 2 && !has_children {
            return;
        }
        let allowed = self.allowed(body, element);
        if allowed.any {
            return;
        }
        let rank = |(name, _): &(CompactString, CompactString)| allowed.attribute_rank(name);
        if !element.attributes.is_sorted_by_key(rank) {
            element.attributes.sort_by_cached_key(rank);
        }
        if !has_children {
            return;
        }
        let children = &mut element.children;
        children.retain(|node| matches!(node, Node::Element(_)));
        let (mut sorted, mut last) = (true, 0);
        for node in children.iter_mut() {
            let Node::Element(child) = node else {
                continue;
            };
            let rule = allowed.rule(&child.name);
            let rank = allowed.child_rank(&child.name, rule);
            sorted &= last <= rank;
            last = rank;
            if let Some(rule) = rule {
                self.arrange_in(allowed.children[rule].body, child);
            }
        }
        if !sorted {
            children.sort_by_cached_key(|node| match node {
                Node::Element(child) => allowed.child_rank(&child.name, allowed.rule(&child.name)),
                Node::Text(_) | Node::Comment(_) => usize::MAX,
            });
        }
    }

    /// Whether `value` is allowed for that attribute of the root element.
    pub fn allows_value(&self, attribute: &str, value: &str) -> bool {
        self.root_body().items.iter().any(|item| match item {
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
