//! Reading the table.
//!
//! ```text
//! kind NAME ALTERNATIVE...        values: a word, N..M, $kind, or a pattern after ~
//! namespace PREFIX URI            elements of that namespace are PREFIX:NAME in the table
//! def NAME                        what an element may hold; the first one is the root's
//!   @NAME VALUES                  an attribute that must be there
//!   @NAME? VALUES                 one that may
//!   text VALUES                   character data (text?: may be empty)
//!   CHILD : VALUES | CHILD = DEF | CHILD with lines below it
//!                                 exactly one; CHILD? at most one; CHILD* any; CHILD+ at least one
//!   when @NAME A|B|-              lines below hold only for these values (-: attribute absent)
//!   any                           anything at all
//!   some @NAME... CHILD...        at least one of these must be there
//!   order @NAME... CHILD...       printed first and in this order, where `when` lines hide it
//! ```
//!
//! Order matters: attributes and children are printed in the order in which they stand here.

use std::collections::HashMap;
use std::sync::OnceLock;

use super::Allowed;
use super::kind::{Kinds, Values};

/// Children that a body may tell of: each has a bit where they are counted.
const MAX_CHILDREN: usize = 128;

/// What an element may hold.
#[derive(Debug)]
pub(super) struct Body {
    pub(super) items: Vec<Item>,
    /// Attributes decide what is allowed.
    pub(super) conditional: bool,
    /// What is allowed if they do not.
    pub(super) fixed: OnceLock<Allowed>,
}

impl Body {
    fn new(items: Vec<Item>) -> Self {
        Self {
            conditional: items.iter().any(|item| matches!(item, Item::When { .. })),
            fixed: OnceLock::new(),
            items,
        }
    }
}

fn count_children(items: &[Item]) -> usize {
    let count = |item: &Item| match item {
        Item::Child { .. } => 1,
        Item::When { items, .. } => count_children(items),
        _ => 0,
    };
    items.iter().map(count).sum()
}

#[derive(Debug)]
pub(super) enum Item {
    Attribute {
        name: &'static str,
        required: bool,
        values: Values,
    },
    Child {
        name: &'static str,
        needed: bool,
        many: bool,
        body: BodyRef,
    },
    Text {
        required: bool,
        values: Values,
    },
    When {
        attribute: &'static str,
        values: Vec<&'static str>,
        absent: bool,
        items: Vec<Item>,
    },
    /// Names (attributes with `@`) of which at least one must be there.
    Some(Vec<&'static str>),
    /// Names (attributes with `@`) that come first in this order.
    Order(Vec<&'static str>),
    Any,
}

#[derive(Debug)]
pub(super) enum BodyRef {
    Inline(Body),
    Def(usize),
}

#[derive(Debug)]
pub(super) struct Table {
    pub(super) bodies: Vec<Body>,
    pub(super) kinds: Kinds,
    /// Namespace names and the prefixes they have in the table.
    pub(super) namespaces: Vec<(&'static str, &'static str)>,
}

struct Line {
    number: usize,
    indent: usize,
    text: &'static str,
}

struct Reader {
    lines: Vec<Line>,
    at: usize,
    defs: HashMap<&'static str, usize>,
    kinds: Kinds,
}

impl Table {
    pub(super) fn parse(texts: &[&'static str]) -> Result<Self, String> {
        let mut reader = Reader {
            lines: Vec::new(),
            at: 0,
            defs: HashMap::new(),
            kinds: Kinds::default(),
        };
        let mut namespaces = Vec::new();
        for text in texts {
            for (number, line) in text.lines().enumerate() {
                let content = line.trim();
                if content.is_empty() || content.starts_with('#') {
                    continue;
                }
                let indent = line.len() - line.trim_start().len();
                let words = || content.split_whitespace();
                match words().next() {
                    Some("kind") if indent == 0 => reader.kinds.define(content)?,
                    Some("namespace") if indent == 0 => {
                        let (Some(prefix), Some(uri)) = (words().nth(1), words().nth(2)) else {
                            return Err(format!("line {number}: {content}"));
                        };
                        namespaces.push((uri, prefix));
                    }
                    _ => reader.lines.push(Line {
                        number: number + 1,
                        indent,
                        text: content,
                    }),
                }
            }
        }
        let names = reader
            .lines
            .iter()
            .filter(|l| l.indent == 0)
            .filter_map(|l| l.text.strip_prefix("def "));
        for (index, name) in names.enumerate() {
            if reader.defs.insert(name, index).is_some() {
                return Err(format!("def {name} twice"));
            }
        }
        let mut bodies = Vec::new();
        while reader.at < reader.lines.len() {
            let line = &reader.lines[reader.at];
            if line.indent != 0 || !line.text.starts_with("def ") {
                return Err(format!("line {}: a def was expected", line.number));
            }
            reader.at += 1;
            bodies.push(Body::new(reader.body(0)?));
        }
        reader.kinds.check()?;
        Ok(Self {
            bodies,
            kinds: reader.kinds,
            namespaces,
        })
    }
}

impl Reader {
    /// The lines below the one just read, which had indentation `outer`.
    fn body(&mut self, outer: usize) -> Result<Vec<Item>, String> {
        let mut items = Vec::new();
        let Some(indent) = self
            .lines
            .get(self.at)
            .map(|l| l.indent)
            .filter(|&i| i > outer)
        else {
            return Ok(items);
        };
        while let Some(line) = self.lines.get(self.at) {
            if line.indent < indent {
                break;
            }
            if line.indent > indent {
                return Err(format!("line {}: indented too far", line.number));
            }
            let (number, text) = (line.number, line.text);
            self.at += 1;
            let item = self
                .item(text, indent)
                .map_err(|e| format!("line {number}: {text}: {e}"))?;
            items.push(item);
        }
        if count_children(&items) > MAX_CHILDREN {
            return Err(format!("more than {MAX_CHILDREN} children"));
        }
        Ok(items)
    }

    fn item(&mut self, text: &'static str, indent: usize) -> Result<Item, String> {
        let (head, tail) = text.split_once(' ').unwrap_or((text, ""));
        let tail = tail.trim();
        if let Some(name) = head.strip_prefix('@') {
            let (name, required) = optional(name);
            let values = self.kinds.values(tail)?;
            return Ok(Item::Attribute {
                name,
                required,
                values,
            });
        }
        if head == "any" {
            return Ok(Item::Any);
        }
        if head == "order" {
            return Ok(Item::Order(tail.split_whitespace().collect()));
        }
        if head == "some" {
            return Ok(Item::Some(tail.split_whitespace().collect()));
        }
        if head == "text" || head == "text?" {
            let (_, required) = optional(head);
            let values = self.kinds.values(tail)?;
            return Ok(Item::Text { required, values });
        }
        if head == "when" {
            let (attribute, values) = tail
                .strip_prefix('@')
                .and_then(|t| t.split_once(' '))
                .ok_or("when @NAME VALUES")?;
            let mut values: Vec<_> = values.trim().split('|').collect();
            let absent = values.contains(&"-");
            values.retain(|v| *v != "-");
            let items = self.body(indent)?;
            return Ok(Item::When {
                attribute,
                values,
                absent,
                items,
            });
        }
        let (name, needed, many) = match head.as_bytes().last() {
            Some(b'?') => (&head[..head.len() - 1], false, false),
            Some(b'*') => (&head[..head.len() - 1], false, true),
            Some(b'+') => (&head[..head.len() - 1], true, true),
            _ => (head, true, false),
        };
        let body = if let Some(def) = tail.strip_prefix("= ") {
            BodyRef::Def(*self.defs.get(def.trim()).ok_or("no such def")?)
        } else if let Some(values) = tail.strip_prefix(": ") {
            let values = self.kinds.values(values.trim())?;
            BodyRef::Inline(Body::new(vec![Item::Text {
                required: true,
                values,
            }]))
        } else if tail.is_empty() {
            BodyRef::Inline(Body::new(self.body(indent)?))
        } else {
            return Err("what is this".to_owned());
        };
        Ok(Item::Child {
            name,
            needed,
            many,
            body,
        })
    }
}

fn optional(name: &'static str) -> (&'static str, bool) {
    match name.strip_suffix('?') {
        Some(name) => (name, false),
        None => (name, true),
    }
}
