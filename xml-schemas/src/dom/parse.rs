//! Text to tree. The XML library's interface stays in this file.

use std::sync::Arc;

use quick_xml::Reader;
use quick_xml::XmlVersion;
use quick_xml::errors::{Error, IllFormedError, SyntaxError};
use quick_xml::events::{BytesRef, BytesStart, Event};

use super::fault::{self, Fault};
use super::{
    CompactString, Element, MAX_ATTRIBUTES, MAX_DEPTH, MAX_DOCUMENT_BYTES, MAX_NODES, Node,
};
use crate::error::{ErrorCode, ErrorDomain, XmlError};

/// Parses a document and returns its root element.
///
/// `what` names the document in errors, as libvirt does: `(domain_definition)`.
///
/// # Errors
/// VIR_ERR_XML_ERROR with the line, the reason and the line's text for anything that is not
/// well-formed XML 1.0 without a document type, or exceeds a limit of this module.
pub fn parse(text: &str, what: &str) -> Result<Element, XmlError> {
    parse_until(text, what, |_| false)
}

/// As [`parse`], and no further than to the child of the root with which the root, as it is then, is
/// `enough`: what comes behind it is not even looked at.
///
/// # Errors
/// As [`parse`].
pub fn parse_until(
    text: &str,
    what: &str,
    enough: impl Fn(&Element) -> bool,
) -> Result<Element, XmlError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut parser = Parser {
        text,
        what,
        counted: 0,
        line: 1,
        open: Vec::new(),
        scopes: Vec::new(),
        nodes: 0,
        root: None,
    };
    parser.check_characters()?;
    parser.run(&enough)
}

struct Parser<'t> {
    text: &'t str,
    what: &'t str,
    /// `line` is the line of this byte.
    counted: usize,
    line: u32,
    open: Vec<Element>,
    /// Namespace declarations in force: depth, prefix (empty for the default), name.
    scopes: Vec<(usize, String, Arc<str>)>,
    nodes: usize,
    root: Option<Element>,
}

impl<'t> Parser<'t> {
    fn run(mut self, enough: &dyn Fn(&Element) -> bool) -> Result<Element, XmlError> {
        let mut reader = Reader::from_str(self.text);
        reader.config_mut().check_comments = true;
        loop {
            let start = offset(reader.buffer_position());
            let event = match reader.read_event() {
                Ok(event) => event,
                Err(e) => {
                    let at = offset(reader.error_position());
                    let end = offset(reader.buffer_position());
                    return Err(self.reader_error(&e, start, at, end));
                }
            };
            match event {
                Event::Start(tag) => {
                    self.start(&tag, start)?;
                }
                Event::Empty(tag) => {
                    self.start(&tag, start)?;
                    if let Some(root) = self.close(enough) {
                        return Ok(root);
                    }
                }
                // The reader has checked that the name is that of the open element.
                Event::End(_) => {
                    if let Some(root) = self.close(enough) {
                        return Ok(root);
                    }
                }
                Event::Text(t) => {
                    let text = t.xml10_content();
                    if !self.open.is_empty() && text.contains("]]>") {
                        return Err(self.fail(start, "Sequence ']]>' not allowed in content"));
                    }
                    self.push_text(&text, start)?;
                }
                Event::CData(t) => {
                    if self.open.is_empty() {
                        let reason = match self.root {
                            Some(_) => "Extra content at the end of the document",
                            None => "StartTag: invalid element name",
                        };
                        let at = start + usize::from(self.root.is_none());
                        return Err(self.fail(at, reason));
                    }
                    self.push_text(&t.xml10_content(), start)?;
                }
                Event::GeneralRef(r) => {
                    let resolved = self.resolve(&r, start)?;
                    self.push_text(resolved.encode_utf8(&mut [0; 4]), start)?;
                }
                Event::Comment(t) => {
                    self.count_node(start)?;
                    let comment = CompactString::from(t.xml10_content());
                    if let Some(parent) = self.open.last_mut() {
                        parent.children.push(Node::Comment(comment));
                    }
                }
                Event::Decl(decl) => {
                    if start != 0 {
                        return Err(self.fail(
                            start + "<?xml".len(),
                            "XML declaration allowed only at the start of the document",
                        ));
                    }
                    if let Some(Ok(encoding)) = decl.encoding()
                        && !encoding.eq_ignore_ascii_case("utf-8")
                        && !encoding.eq_ignore_ascii_case("us-ascii")
                    {
                        let reason = format!("Unsupported encoding {encoding}");
                        let name = self.text.get(start..).and_then(|text| {
                            let attribute = text.find("encoding")?;
                            let value = text.get(attribute..)?.find(&*encoding)?;
                            Some(attribute + value + encoding.len() + "'".len())
                        });
                        return Err(self.fail(start + name.unwrap_or(0), &reason));
                    }
                }
                Event::PI(_) => {}
                Event::DocType(_) if !self.open.is_empty() => {
                    return Err(self.fail(start + 1, "StartTag: invalid element name"));
                }
                Event::DocType(_) => {
                    return Err(self.fail(start, "A document type declaration is not accepted"));
                }
                Event::Eof => return self.end(),
            }
        }
    }

    fn end(mut self) -> Result<Element, XmlError> {
        let end = self.text.len();
        if let Some(open) = self.open.last() {
            let reason = format!(
                "Premature end of data in tag {} line {}",
                open.name, open.line
            );
            return Err(self.fail(end, &reason));
        }
        match self.root.take() {
            Some(root) => Ok(root),
            None if self.text.is_empty() => Err(self.fail(end, "Document is empty")),
            None => Err(self.fail(end, "Start tag expected, '<' not found")),
        }
    }

    fn start(&mut self, tag: &BytesStart<'_>, at: usize) -> Result<(), XmlError> {
        if self.root.is_some() {
            return Err(self.fail(at, "Extra content at the end of the document"));
        }
        if self.open.len() >= MAX_DEPTH {
            let reason =
                format!("Excessive depth in document: {MAX_DEPTH} use XML_PARSE_HUGE option");
            // Behind it.
            return Err(self.fail(at + "<>".len() + tag.len(), &reason));
        }
        self.count_node(at)?;
        let name = tag.name().into_inner();
        let line = self.line_of(at);
        if !is_name(name) {
            return Err(self.tag_fault(
                at,
                line,
                (at + 1, "StartTag: invalid element name".into()),
            ));
        }
        let mut element = Element::new(name);
        element.line = line;
        if !apart(tag) {
            let reason = "attributes construct error".into();
            return Err(self.tag_fault(at, line, (at, reason)));
        }
        let depth = self.open.len();
        for attribute in tag.attributes() {
            let attribute = match attribute {
                Ok(a) => a,
                Err(e) => {
                    return Err(self.tag_fault(at, line, (at, format!("element {name}: {e}"))));
                }
            };
            let key = attribute.key.into_inner();
            if element.attributes.len() >= MAX_ATTRIBUTES {
                let reason = format!("Element {name} has more than {MAX_ATTRIBUTES} attributes");
                return Err(self.fail(at, &reason));
            }
            if !is_name(key) {
                return Err(self.tag_fault(at, line, (at, "error parsing attribute name".into())));
            }
            if attribute.value.contains('<') {
                let reason = "Unescaped '<' not allowed in attributes values".into();
                return Err(self.tag_fault(at, line, (at, reason)));
            }
            let value = match attribute.normalized_value(XmlVersion::Implicit1_0) {
                Ok(v) => CompactString::from(v),
                Err(e) => {
                    let reason = format!("Attribute {key} of element {name}: {e}");
                    return Err(self.tag_fault(at, line, (at, reason)));
                }
            };
            if let Some(bad) = value.chars().find(|&c| !is_char(c)) {
                let reason = format!("xmlParseCharRef: invalid xmlChar value {}", u32::from(bad));
                return Err(self.tag_fault(at, line, (at, reason)));
            }
            if key == "xmlns" {
                self.scopes
                    .push((depth, String::new(), value.as_str().into()));
            } else if let Some(prefix) = key.strip_prefix("xmlns:") {
                self.scopes
                    .push((depth, prefix.to_owned(), value.as_str().into()));
            }
            element.attributes.push((key.into(), value));
        }
        if self.scopes.len() > MAX_ATTRIBUTES {
            let reason = format!("More than {MAX_ATTRIBUTES} namespace declarations at once");
            return Err(self.fail(at, &reason));
        }
        let prefix = name.split_once(':').map_or("", |(p, _)| p);
        element.namespace = self
            .scopes
            .iter()
            .rev()
            .find(|(_, p, _)| p == prefix)
            .map(|(_, _, uri)| uri.clone())
            .filter(|uri| !uri.is_empty());
        self.open.push(element);
        Ok(())
    }

    /// Gives the root if that is enough of it.
    fn close(&mut self, enough: &dyn Fn(&Element) -> bool) -> Option<Element> {
        let mut element = self.open.pop()?;
        let depth = self.open.len();
        while self.scopes.last().is_some_and(|(d, _, _)| *d >= depth) {
            self.scopes.pop();
        }
        tidy(&mut element);
        match self.open.last_mut() {
            Some(parent) => parent.children.push(Node::Element(element)),
            None => self.root = Some(element),
        }
        match self.open.as_slice() {
            [root] if enough(root) => self.open.pop(),
            _ => None,
        }
    }

    fn push_text(&mut self, text: &str, at: usize) -> Result<(), XmlError> {
        if text.is_empty() {
            return Ok(());
        }
        match self.open.last_mut() {
            Some(parent) => {
                if let Some(Node::Text(last)) = parent.children.last_mut() {
                    last.push_str(text);
                    return Ok(());
                }
                // Not counted: between any two texts is something that is.
                parent.children.push(Node::Text(text.into()));
                Ok(())
            }
            None if text.trim().is_empty() => Ok(()),
            None => {
                let at = at + (text.len() - text.trim_start().len());
                let reason = match self.root {
                    Some(_) => "Extra content at the end of the document",
                    None => "Start tag expected, '<' not found",
                };
                Err(self.fail(at, reason))
            }
        }
    }

    fn resolve(&mut self, reference: &BytesRef<'_>, at: usize) -> Result<char, XmlError> {
        if let Some((at, reason)) = fault::of_reference(self.text, at) {
            return Err(self.fail(at, &reason));
        }
        if reference.is_char_ref() {
            return match reference.resolve_char_ref() {
                Ok(Some(c)) if is_char(c) => Ok(c),
                _ => Err(self.fail(at, "xmlParseCharRef: invalid xmlChar value")),
            };
        }
        let name = reference.xml10_content();
        Ok(match name.as_ref() {
            "lt" => '<',
            "gt" => '>',
            "amp" => '&',
            "apos" => '\'',
            "quot" => '"',
            other => return Err(self.fail(at, &format!("Entity '{other}' not defined"))),
        })
    }

    fn count_node(&mut self, at: usize) -> Result<(), XmlError> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            let reason = format!("The document has more than {MAX_NODES} parts");
            return Err(self.fail(at, &reason));
        }
        Ok(())
    }

    fn check_characters(&mut self) -> Result<(), XmlError> {
        if self.text.len() > MAX_DOCUMENT_BYTES {
            let reason = format!(
                "The document has {} bytes, more than {MAX_DOCUMENT_BYTES}",
                self.text.len()
            );
            return Err(XmlError::verbatim(
                ErrorCode::Xml,
                ErrorDomain::Xml,
                format!("{}:1: {reason}", self.what),
            ));
        }
        // Most documents have nothing but these, which is quickly seen.
        let plain = |byte: u8| byte == b'\n' || (b' '..=b'~').contains(&byte);
        if self.text.bytes().all(plain) {
            return Ok(());
        }
        match self.text.char_indices().find(|&(_, c)| !is_char(c)) {
            Some((at, c)) => {
                let tag = self.text[..at].rfind('<');
                let inside = tag.filter(|&tag| !self.text[tag..at].contains('>'));
                let line = inside.map_or(1, |tag| self.line_of(tag));
                let found = inside.and_then(|tag| fault::of_tag(self.text, tag, line));
                let reason = || format!("PCDATA invalid Char value {}", u32::from(c));
                let (at, reason) = found.unwrap_or_else(|| (at, reason()));
                Err(self.fail(at, &reason))
            }
            None => Ok(()),
        }
    }

    /// Only ever asked with growing offsets, so that counting stays linear.
    fn line_of(&mut self, at: usize) -> u32 {
        let at = at.min(self.text.len());
        if at > self.counted {
            let new = self.text.as_bytes()[self.counted..at]
                .iter()
                .filter(|&&b| b == b'\n')
                .count();
            self.line = self
                .line
                .saturating_add(u32::try_from(new).unwrap_or(u32::MAX));
            self.counted = at;
        }
        self.line
    }

    /// What libxml2 has against the tag at `at`; without that, `other`.
    fn tag_fault(&self, at: usize, line: u32, other: Fault) -> XmlError {
        let (at, reason) = fault::of_tag(self.text, at, line).unwrap_or(other);
        self.fail(at, &reason)
    }

    /// `start`: of what was being read; `at`: where the reader has found the error; `end`: where it stopped.
    fn reader_error(&mut self, error: &Error, start: usize, at: usize, end: usize) -> XmlError {
        /// Characters of its content that are shown of what does not end.
        const SHOWN: usize = 50;
        let all = self.text.len();
        let content = |from: usize| {
            let text = self.text.get(from..).unwrap_or_default();
            text.chars().take(SHOWN).collect::<String>()
        };
        let (at, reason) = match error {
            Error::IllFormed(IllFormedError::MismatchedEndTag { expected, found }) => {
                let line = self.open.last().map_or(1, |e| e.line);
                let reason =
                    format!("Opening and ending tag mismatch: {expected} line {line} and {found}");
                return self.tag_fault(start, line, (end, reason));
            }
            Error::IllFormed(IllFormedError::UnmatchedEndTag(_)) if self.root.is_some() => {
                (start, "Extra content at the end of the document".to_owned())
            }
            Error::IllFormed(IllFormedError::UnmatchedEndTag(_))
            | Error::Syntax(SyntaxError::InvalidBangMarkup) => {
                (start + 1, "StartTag: invalid element name".to_owned())
            }
            Error::IllFormed(IllFormedError::UnclosedReference) => {
                let other = || (at, "EntityRef: expecting ';'".to_owned());
                fault::of_reference(self.text, start).unwrap_or_else(other)
            }
            Error::IllFormed(IllFormedError::DoubleHyphenInComment) => {
                let inside = start + "<!--".len();
                let text = self.text.get(inside..).unwrap_or_default();
                let before = text.find("--").unwrap_or(0);
                let shown: String = text[..before].chars().take(SHOWN).collect();
                let reason = format!("Double hyphen within comment: <!--{shown}");
                (inside + before, reason)
            }
            Error::Syntax(SyntaxError::UnclosedComment) => {
                (all, "Comment not terminated".to_owned())
            }
            Error::Syntax(SyntaxError::UnclosedCData) => {
                let shown = content(start + "<![CDATA[".len());
                (all, format!("CData section not finished\n{shown}"))
            }
            Error::Syntax(
                SyntaxError::UnclosedTag
                | SyntaxError::UnclosedSingleQuotedAttributeValue
                | SyntaxError::UnclosedDoubleQuotedAttributeValue,
            ) => {
                let line = self.line_of(start);
                let other = (start, "Couldn't find end of Start Tag".to_owned());
                return self.tag_fault(start, line, other);
            }
            other => (at, other.to_string()),
        };
        self.fail(at, &reason)
    }

    /// libvirt shows the place, the reason, the line's text and a pointer into it.
    fn fail(&self, at: usize, reason: &str) -> XmlError {
        /// Bytes of a line that are shown, at most.
        const CONTEXT: usize = 4096;
        let boundary = |mut at: usize| {
            while !self.text.is_char_boundary(at) {
                at -= 1;
            }
            at
        };
        let at = boundary(at.min(self.text.len()));
        let before = &self.text[..at];
        let line = 1 + before.bytes().filter(|&b| b == b'\n').count();
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        let line_end = self.text[at..].find(['\n', '\r']);
        let line_end = line_end.map_or(self.text.len(), |end| at + end);
        // Of a line that is too long, what is around the place.
        let from = boundary(line_start.max(at.saturating_sub(CONTEXT / 2)));
        let to = boundary(line_end.min(from + CONTEXT));
        let shown = match &self.text[from..to] {
            // So it is there.
            "" => "(null)",
            shown => shown,
        };
        let pointer = self.text[from..at].bytes();
        let pointer: String = pointer
            .map(|b| if b == b'\t' { '\t' } else { '-' })
            .collect();
        let message = format!("{}:{line}: {reason}\n{shown}\n{pointer}^", self.what);
        XmlError::verbatim(ErrorCode::XmlDetail, ErrorDomain::Xml, message)
            .at(u32::try_from(line).unwrap_or(u32::MAX))
    }
}

/// Drops the white space between elements; an element's own text stays as it is.
fn tidy(element: &mut Element) {
    if element.elements().next().is_some()
        || element
            .children
            .iter()
            .any(|n| matches!(n, Node::Comment(_)))
    {
        let mixed = element
            .children
            .iter()
            .any(|n| matches!(n, Node::Text(t) if !t.trim().is_empty()));
        if !mixed {
            element.children.retain(|n| !matches!(n, Node::Text(_)));
        }
    }
}

/// Whether there is something between the attributes of a tag, which the reader does not ask for.
fn apart(tag: &str) -> bool {
    let mut rest = tag;
    while let Some(open) = rest.find(['"', '\'']) {
        let (quote, value) = rest[open..].split_at(1);
        let Some(close) = value.find(quote) else {
            return true;
        };
        rest = &value[close + 1..];
        if !rest.is_empty() && !rest.starts_with([' ', '\t', '\r', '\n']) {
            return false;
        }
    }
    true
}

fn offset(position: u64) -> usize {
    usize::try_from(position).unwrap_or(usize::MAX)
}

/// XML 1.0, section 2.2: Char.
pub(super) fn is_char(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
}

/// What a name may begin with (XML 1.0, section 2.3): every character beyond ASCII is taken for a letter.
pub(super) fn letter(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_' || c == ':' || !c.is_ascii()
}

/// What else may be in it.
pub(super) fn name_char(c: char) -> bool {
    letter(c) || c.is_ascii_digit() || c == '-' || c == '.'
}

fn is_name(name: &str) -> bool {
    name.chars().next().is_some_and(letter)
        && name.chars().all(name_char)
        && !name.ends_with(':')
        && !name.starts_with(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(text: &str) -> String {
        parse(text, "(domain_definition)").unwrap_err().to_string()
    }

    #[test]
    fn the_line_and_the_reason_are_libvirts() {
        assert_eq!(
            reason("<domain type='qemu'>\n  <name>t1</nam>\n</domain>")
                .lines()
                .next(),
            Some("(domain_definition):2: Opening and ending tag mismatch: name line 2 and nam")
        );
        assert!(
            reason("<domain>\n  <name>t1</name>\n")
                .starts_with("(domain_definition):3: Premature end of data in tag domain line 1\n")
        );
        assert!(reason("").starts_with("(domain_definition):1: Document is empty\n"));
        assert!(
            reason("<d>\n<n>a&foo;</n></d>").starts_with(
                "(domain_definition):2: Entity 'foo' not defined\n<n>a&foo;</n></d>\n"
            )
        );
        assert!(reason("<a/><b/>").contains("Extra content at the end of the document"));
        assert!(reason("hello").contains("Start tag expected, '<' not found"));
        assert!(reason("<a b='1' b='2'/>").contains("redefined"));
        assert!(reason("<a b=1/>").contains("AttValue"));
        assert!(reason("<a b='1'c='2'/>").contains("attributes construct error"));
        assert!(parse("<a b='1' c = \"'\" />", "t").is_ok());
        // What is wrong with the last of very many is not looked for.
        let many = |count: usize| (0..count).map(|n| format!(" a{n}='1'")).collect::<String>();
        assert!(reason(&format!("<a{} a0='2'/>", many(3))).contains("a0 redefined"));
        assert!(!reason(&format!("<a{} a0='2'", many(100_000))).contains("redefined"));
    }

    #[test]
    fn text_attributes_and_namespaces_arrive_whole() {
        let root = parse(
            "<?xml version='1.0'?><!-- x --><a b='&lt;1&#x41;&apos;' xmlns:q='urn:q'>\n  \
             <q:c/> <d> &amp;<![CDATA[<&]]> </d>\n</a>",
            "t",
        )
        .unwrap();
        assert_eq!(root.attr("b"), Some("<1A'"));
        assert_eq!(root.children.len(), 2);
        let c = root.child("q:c").unwrap();
        assert_eq!(c.namespace.as_deref(), Some("urn:q"));
        assert_eq!(c.line, 2);
        assert_eq!(root.child_text("d").unwrap(), " &<& ");
    }

    #[test]
    fn limits_and_document_types_are_refused() {
        let deep = "<a>".repeat(300) + &"</a>".repeat(300);
        assert!(reason(&deep).contains("Excessive depth"));
        let wide: String = (0..300).map(|i| format!(" a{i}=''")).collect();
        assert!(reason(&format!("<a{wide}/>")).contains("more than 256 attributes"));
        assert!(reason(&format!("<a>{}</a>", "<b/>".repeat(MAX_NODES))).contains("parts"));
        assert!(reason(&" ".repeat(MAX_DOCUMENT_BYTES + 1)).contains("bytes"));
        let bomb = "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>";
        assert!(reason(bomb).contains("document type"));
        assert!(reason("<a>&#0;</a>").contains("invalid xmlChar"));
        assert!(reason("<a>\u{1}</a>").contains("PCDATA invalid Char value 1"));
    }
}
