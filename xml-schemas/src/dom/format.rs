//! Tree to text, in libvirt's layout: two spaces a level, attributes in single quotes.

use super::{Element, Node};

/// The quotes around attribute values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quote {
    /// As libvirt prints its own elements.
    Single,
    /// As libxml2 prints what libvirt keeps verbatim (metadata).
    Double,
}

/// Appends `element`, indented by `level` steps, each line ended.
///
/// Metadata is printed with double quotes and its comments, like libvirt prints it; comments
/// anywhere else are left out.
pub fn format_element(out: &mut String, element: &Element, level: usize) {
    indent(out, level);
    write(out, element, level, Quote::Single);
    out.push('\n');
}

/// A piece of metadata by itself, as libxml2 prints it.
pub fn format_metadata(element: &Element) -> String {
    let mut text = String::new();
    write(&mut text, element, 0, Quote::Double);
    text
}

fn write(out: &mut String, element: &Element, level: usize, quote: Quote) {
    let quote = match element.name.as_str() {
        "metadata" if level == 1 => Quote::Double,
        _ => quote,
    };
    out.push('<');
    out.push_str(&element.name);
    let mark = match quote {
        Quote::Single => '\'',
        Quote::Double => '"',
    };
    for (name, value) in &element.attributes {
        out.push(' ');
        out.push_str(name);
        out.push('=');
        out.push(mark);
        escape(out, value, Place::Attribute, quote);
        out.push(mark);
    }
    let visible = |n: &&Node| quote == Quote::Double || !matches!(n, Node::Comment(_));
    let mut children = element.children.iter().filter(visible).peekable();
    if children.peek().is_none() {
        out.push_str("/>");
        return;
    }
    out.push('>');
    let inline = element.children.iter().any(|n| matches!(n, Node::Text(_)));
    for child in children {
        if !inline {
            out.push('\n');
            indent(out, level + 1);
        }
        match child {
            Node::Element(e) => write(out, e, level + 1, quote),
            Node::Text(t) => escape(out, t, Place::Text, quote),
            Node::Comment(c) => {
                out.push_str("<!--");
                out.push_str(c);
                out.push_str("-->");
            }
        }
    }
    if !inline {
        out.push('\n');
        indent(out, level);
    }
    out.push_str("</");
    out.push_str(&element.name);
    out.push('>');
}

fn indent(out: &mut String, level: usize) {
    for _ in 0..level {
        out.push_str("  ");
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Attribute,
    Text,
}

/// Escapes `text` as libvirt does for an element's content.
pub fn escape_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    escape(&mut out, text, Place::Text, Quote::Single);
    out
}

fn escape(out: &mut String, text: &str, place: Place, quote: Quote) {
    let mut plain = 0;
    for (at, byte) in text.bytes().enumerate() {
        let escaped = match byte {
            b'<' => "&lt;",
            b'>' => "&gt;",
            b'&' => "&amp;",
            // libvirt escapes both quotes everywhere, libxml2 only the one it has to.
            b'"' if quote == Quote::Single || place == Place::Attribute => "&quot;",
            b'\'' if quote == Quote::Single => "&apos;",
            // Unescaped, the next parse would read these as something else.
            b'\n' if place == Place::Attribute => "&#10;",
            b'\t' if place == Place::Attribute => "&#9;",
            b'\r' => "&#13;",
            _ => continue,
        };
        // Each is one byte, and no part of a longer character.
        out.push_str(&text[plain..at]);
        out.push_str(escaped);
        plain = at + 1;
    }
    out.push_str(&text[plain..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dom::parse;

    #[test]
    fn the_layout_is_libvirts_and_survives_a_second_parse() {
        let text = "<a b='&lt;&apos;&#10;'>\n  <c/>\n  <d> x &quot;y&quot; </d>\n  \
                    <e>\n    <f g='1'/>\n  </e>\n</a>\n";
        let root = parse(text, "t").unwrap();
        let mut out = String::new();
        format_element(&mut out, &root, 0);
        assert_eq!(out, text);
        assert_eq!(parse(&out, "t").unwrap(), root);
    }
}
