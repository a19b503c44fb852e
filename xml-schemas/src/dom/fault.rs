//! What is wrong with a tag or a reference, and where: in libxml2's words, which libvirt passes on.

use super::parse::{is_char, letter, name_char};

/// Where, and what.
pub(super) type Fault = (usize, String);

struct Scanner<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Scanner<'t> {
    fn rest(&self) -> &'t str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn take(&mut self, is: impl Fn(char) -> bool) -> &'t str {
        let rest = self.rest();
        let end = rest.find(|c| !is(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn blanks(&mut self) -> bool {
        !self
            .take(|c| matches!(c, ' ' | '\t' | '\r' | '\n'))
            .is_empty()
    }

    fn name(&mut self) -> &'t str {
        if self.peek().is_some_and(letter) {
            self.take(name_char)
        } else {
            ""
        }
    }

    fn fault<T>(&self, what: impl Into<String>) -> Result<T, Fault> {
        Err((self.at, what.into()))
    }

    fn reference(&mut self) -> Result<(), Fault> {
        self.at += 1;
        if self.peek() == Some('#') {
            return self.character();
        }
        let name = self.name();
        if name.is_empty() {
            return self.fault("xmlParseEntityRef: no name");
        }
        if self.peek() != Some(';') {
            return self.fault("EntityRef: expecting ';'");
        }
        self.at += 1;
        match name {
            "lt" | "gt" | "amp" | "apos" | "quot" => Ok(()),
            _ => self.fault(format!("Entity '{name}' not defined")),
        }
    }

    fn character(&mut self) -> Result<(), Fault> {
        self.at += 1;
        let (base, kind) = match self.peek() {
            Some('x') => (16, "hexadecimal"),
            _ => (10, "decimal"),
        };
        if base == 16 {
            self.at += 1;
        }
        let digits = self.take(|c| c.is_digit(base));
        if self.peek() != Some(';') {
            return self.fault(format!("CharRef: invalid {kind} value"));
        }
        self.at += 1;
        let value = u32::from_str_radix(digits, base).unwrap_or(match digits {
            "" => 0,
            _ => u32::MAX,
        });
        match char::from_u32(value).filter(|&c| is_char(c)) {
            Some(_) => Ok(()),
            None if value > u32::from(char::MAX) => {
                self.fault("xmlParseCharRef: character reference out of bounds")
            }
            None => self.fault(format!("xmlParseCharRef: invalid xmlChar value {value}")),
        }
    }

    fn value(&mut self) -> Result<(), Fault> {
        let Some(quote @ ('"' | '\'')) = self.peek() else {
            return self.fault("AttValue: \" or ' expected");
        };
        self.at += 1;
        loop {
            match self.peek() {
                None => return self.fault("AttValue: ' expected"),
                Some('<') => return self.fault("Unescaped '<' not allowed in attributes values"),
                Some('&') => self.reference()?,
                Some(c) if c == quote => break,
                Some(c) if !is_char(c) => {
                    return self.fault("invalid character in attribute value");
                }
                Some(c) => self.at += c.len_utf8(),
            }
        }
        self.at += 1;
        Ok(())
    }

    fn start_tag(&mut self, line: u32) -> Result<(), Fault> {
        let name = self.name();
        if name.is_empty() {
            return self.fault("StartTag: invalid element name");
        }
        let mut seen: Vec<&str> = Vec::new();
        let mut twice = None;
        // Nobody has a use for what is wrong with more: they are too many.
        for _ in 0..=super::MAX_ATTRIBUTES {
            let apart = self.blanks();
            match self.peek() {
                None | Some('>') => return self.end_of_start(name, line, twice),
                Some('/') if self.rest().starts_with("/>") => {
                    return self.end_of_start(name, line, twice);
                }
                Some(c) if !is_char(c) => return self.end_of_start(name, line, twice),
                _ if !apart && !seen.is_empty() => return self.fault("attributes construct error"),
                _ => {}
            }
            let attribute = self.name();
            if attribute.is_empty() {
                return self.fault("error parsing attribute name");
            }
            self.blanks();
            if self.peek() != Some('=') {
                return self.fault(format!(
                    "Specification mandates value for attribute {attribute}"
                ));
            }
            self.at += 1;
            self.blanks();
            self.value()?;
            if seen.contains(&attribute) {
                twice = twice.or(Some(attribute));
            } else {
                seen.push(attribute);
            }
        }
        Ok(())
    }

    fn end_of_start(&self, name: &str, line: u32, twice: Option<&str>) -> Result<(), Fault> {
        if let Some(attribute) = twice {
            return self.fault(format!("Attribute {attribute} redefined"));
        }
        match self.peek() {
            Some('>' | '/') => Ok(()),
            _ => self.fault(format!("Couldn't find end of Start Tag {name} line {line}")),
        }
    }

    fn end_tag(&mut self) -> Result<(), Fault> {
        self.name();
        self.blanks();
        match self.peek() {
            Some('>') => Ok(()),
            _ => self.fault("expected '>'"),
        }
    }
}

/// The fault of the tag that begins at `at`, which is in line `line`.
pub(super) fn of_tag(text: &str, at: usize, line: u32) -> Option<Fault> {
    let rest = text.get(at..)?;
    let begin = |skipped| Scanner {
        text,
        at: at + skipped,
    };
    let found = if rest.starts_with("</") {
        begin(2).end_tag()
    } else if rest.starts_with('<') {
        begin(1).start_tag(line)
    } else {
        Ok(())
    };
    found.err()
}

/// The fault of the reference that begins at `at`.
pub(super) fn of_reference(text: &str, at: usize) -> Option<Fault> {
    let mut scanner = Scanner { text, at };
    match scanner.peek() {
        Some('&') => scanner.reference().err(),
        _ => None,
    }
}
