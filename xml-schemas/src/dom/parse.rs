//! Text to tree. The XML library's interface stays in this file.

use std::sync::Arc;

use quick_xml::Reader;
use quick_xml::XmlVersion;
use quick_xml::errors::{Error, IllFormedError, SyntaxError};
use quick_xml::events::attributes::AttrError;
use quick_xml::events::{BytesRef, BytesStart, Event};

use super::{Element, MAX_ATTRIBUTES, MAX_DEPTH, MAX_DOCUMENT_BYTES, MAX_NODES, Node};
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
                    // Of an end tag libxml2 shows the end, of what never ends the start.
                    let at = match e {
                        Error::IllFormed(IllFormedError::MismatchedEndTag { .. }) => {
                            reader.buffer_position()
                        }
                        _ => reader.error_position(),
                    };
                    return Err(self.reader_error(&e, offset(at)));
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
                Event::Text(t) => self.push_text(&t.xml10_content(), start)?,
                Event::CData(t) => {
                    if self.open.is_empty() {
                        return Err(self.fail(start, "CDATA section outside the root element"));
                    }
                    self.push_text(&t.xml10_content(), start)?;
                }
                Event::GeneralRef(r) => {
                    let resolved = self.resolve(&r, start)?;
                    self.push_text(resolved.encode_utf8(&mut [0; 4]), start)?;
                }
                Event::Comment(t) => {
                    self.count_node(start)?;
                    let comment = t.xml10_content().into_owned();
                    if let Some(parent) = self.open.last_mut() {
                        parent.children.push(Node::Comment(comment));
                    }
                }
                Event::Decl(decl) => {
                    if start != 0 {
                        return Err(self.fail(
                            start,
                            "XML declaration allowed only at the start of the document",
                        ));
                    }
                    if let Some(Ok(encoding)) = decl.encoding()
                        && !encoding.eq_ignore_ascii_case("utf-8")
                        && !encoding.eq_ignore_ascii_case("us-ascii")
                    {
                        let reason = format!("Unsupported encoding {encoding}");
                        return Err(self.fail(start, &reason));
                    }
                }
                Event::PI(_) => {}
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
            None => Err(self.fail(end, "Document is empty")),
        }
    }

    fn start(&mut self, tag: &BytesStart<'_>, at: usize) -> Result<(), XmlError> {
        if self.root.is_some() {
            return Err(self.fail(at, "Extra content at the end of the document"));
        }
        if self.open.len() >= MAX_DEPTH {
            let reason = format!("Excessive depth in document: {MAX_DEPTH}");
            return Err(self.fail(at, &reason));
        }
        self.count_node(at)?;
        let name = tag.name().into_inner();
        if !is_name(name) {
            return Err(self.fail(at, "StartTag: invalid element name"));
        }
        let mut element = Element::new(name);
        element.line = self.line_of(at);
        let depth = self.open.len();
        for attribute in tag.attributes() {
            let attribute = match attribute {
                Ok(a) => a,
                Err(e) => {
                    let reason = attribute_reason(&e, name);
                    return Err(self.fail(at, &reason));
                }
            };
            let key = attribute.key.into_inner();
            if element.attributes.len() >= MAX_ATTRIBUTES {
                let reason = format!("Element {name} has more than {MAX_ATTRIBUTES} attributes");
                return Err(self.fail(at, &reason));
            }
            if !is_name(key) {
                return Err(self.fail(at, "error parsing attribute name"));
            }
            if attribute.value.contains('<') {
                return Err(self.fail(at, "Unescaped '<' not allowed in attributes values"));
            }
            let value = match attribute.normalized_value(XmlVersion::Implicit1_0) {
                Ok(v) => v.into_owned(),
                Err(e) => {
                    let reason = format!("Attribute {key} of element {name}: {e}");
                    return Err(self.fail(at, &reason));
                }
            };
            if let Some(bad) = value.chars().find(|&c| !is_char(c)) {
                let reason = format!("xmlParseCharRef: invalid xmlChar value {}", u32::from(bad));
                return Err(self.fail(at, &reason));
            }
            if key == "xmlns" {
                self.scopes
                    .push((depth, String::new(), value.as_str().into()));
            } else if let Some(prefix) = key.strip_prefix("xmlns:") {
                self.scopes
                    .push((depth, prefix.to_owned(), value.as_str().into()));
            }
            element.attributes.push((key.to_owned(), value));
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
                parent.children.push(Node::Text(text.to_owned()));
                Ok(())
            }
            None if text.trim().is_empty() => Ok(()),
            None if self.root.is_some() => {
                Err(self.fail(at, "Extra content at the end of the document"))
            }
            None => Err(self.fail(at, "Start tag expected, '<' not found")),
        }
    }

    fn resolve(&mut self, reference: &BytesRef<'_>, at: usize) -> Result<char, XmlError> {
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
            other => {
                let reason = format!("Entity '{other}' not defined");
                let end = at.saturating_add(other.len() + "&;".len());
                return Err(self.fail(end, &reason));
            }
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
        match self.text.char_indices().find(|&(_, c)| !is_char(c)) {
            Some((at, c)) => {
                let reason = format!("Invalid character value {}", u32::from(c));
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

    fn reader_error(&mut self, error: &Error, at: usize) -> XmlError {
        let reason = match error {
            Error::IllFormed(IllFormedError::MismatchedEndTag { expected, found }) => {
                let line = self.open.last().map_or(1, |e| e.line);
                format!("Opening and ending tag mismatch: {expected} line {line} and {found}")
            }
            Error::IllFormed(IllFormedError::UnmatchedEndTag(found)) => {
                format!("Closing tag {found} was never opened")
            }
            Error::IllFormed(IllFormedError::UnclosedReference) => {
                "EntityRef: expecting ';'".to_owned()
            }
            Error::IllFormed(IllFormedError::DoubleHyphenInComment) => {
                "Double hyphen within comment".to_owned()
            }
            Error::Syntax(SyntaxError::UnclosedComment) => "Comment not terminated".to_owned(),
            Error::Syntax(SyntaxError::UnclosedCData) => "CData section not finished".to_owned(),
            Error::Syntax(SyntaxError::InvalidBangMarkup) => {
                "StartTag: invalid element name".to_owned()
            }
            Error::Syntax(
                SyntaxError::UnclosedTag
                | SyntaxError::UnclosedSingleQuotedAttributeValue
                | SyntaxError::UnclosedDoubleQuotedAttributeValue,
            ) => "Couldn't find end of Start Tag".to_owned(),
            other => other.to_string(),
        };
        self.fail(at, &reason)
    }

    /// libvirt shows the place, the reason, the line's text and a pointer into it.
    fn fail(&self, at: usize, reason: &str) -> XmlError {
        /// Characters of context shown, at most.
        const CONTEXT: usize = 80;
        let mut at = at.min(self.text.len());
        while !self.text.is_char_boundary(at) {
            at -= 1;
        }
        let before = &self.text[..at];
        let line = 1 + before.bytes().filter(|&b| b == b'\n').count();
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        let column = self.text[line_start..at].chars().count();
        let line_text = self.text[line_start..].lines().next().unwrap_or_default();
        let from = column.saturating_sub(CONTEXT - 1);
        let shown: String = line_text.chars().skip(from).take(CONTEXT).collect();
        let pointer = "-".repeat(column - from);
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

fn offset(position: u64) -> usize {
    usize::try_from(position).unwrap_or(usize::MAX)
}

/// XML 1.0, section 2.2: Char.
fn is_char(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
}

/// XML 1.0, section 2.3: Name, with every character beyond ASCII taken for a letter.
fn is_name(name: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':' || !c.is_ascii();
    let mut chars = name.chars();
    chars.next().is_some_and(letter)
        && chars.all(|c| letter(c) || c.is_ascii_digit() || c == '-' || c == '.')
        && !name.ends_with(':')
        && !name.starts_with(':')
}

fn attribute_reason(error: &AttrError, element: &str) -> String {
    match error {
        AttrError::ExpectedEq(_) => {
            format!("Specification mandates value for an attribute of element {element}")
        }
        AttrError::ExpectedValue(_) | AttrError::UnquotedValue(_) => {
            "AttValue: \" or ' expected".to_owned()
        }
        AttrError::ExpectedQuote(..) => "AttValue: ' expected".to_owned(),
        AttrError::Duplicated(..) => format!("Attribute of element {element} redefined"),
    }
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
        assert!(reason("<a>\u{1}</a>").contains("Invalid character value 1"));
    }
}
