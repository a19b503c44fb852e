//! `--memspec` and `--diskspec`: words with commas as XML.

use xml_schemas::dom::Element;

use crate::failure::{Failure, Result};

/// Splits at commas; two of them stand for one.
pub fn split(words: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = words.chars().peekable();
    while let Some(character) = rest.next() {
        match character {
            ',' if rest.peek() == Some(&',') => {
                rest.next();
                if let Some(last) = parts.last_mut() {
                    last.push(',');
                }
            }
            ',' => parts.push(String::new()),
            other => {
                if let Some(last) = parts.last_mut() {
                    last.push(other);
                }
            }
        }
    }
    parts
}

/// `[file=]name[,snapshot=type]`
///
/// # Errors
///
/// Something else.
pub fn memory(words: &str) -> Result<Element> {
    let bad = || Failure::new(format!("unable to parse memspec: {words}"));
    let (mut file, mut place) = (None, None);
    for part in split(words) {
        match part.split_once('=') {
            Some(("snapshot", value)) if place.is_none() => place = Some(value.to_owned()),
            Some(("file", value)) if file.is_none() => file = Some(value.to_owned()),
            _ if file.is_none() && part.starts_with('/') => file = Some(part),
            _ => return Err(bad()),
        }
    }
    let mut element = Element::new("memory");
    element.set_opt_attr("snapshot", place);
    element.set_opt_attr("file", file);
    Ok(element)
}

/// `disk[,snapshot=type][,driver=type][,stype=type][,file=name]`
///
/// # Errors
///
/// Something else.
pub fn disk(words: &str) -> Result<Element> {
    let bad = || Failure::new(format!("unable to parse diskspec: {words}"));
    let mut parts = split(words).into_iter();
    let name = parts
        .next()
        .filter(|name| !name.is_empty())
        .ok_or_else(bad)?;
    let mut values: [Option<String>; 4] = Default::default();
    const KEYS: [&str; 4] = ["snapshot", "driver", "stype", "file"];
    for part in parts {
        let (key, value) = part.split_once('=').ok_or_else(bad)?;
        let at = KEYS
            .iter()
            .position(|known| *known == key)
            .ok_or_else(bad)?;
        if values[at].replace(value.to_owned()).is_some() {
            return Err(bad());
        }
    }
    let [place, driver, kind, file] = values;
    let mut element = Element::new("disk").with_attr("name", name);
    element.set_opt_attr("snapshot", place);
    let block = kind.as_deref() == Some("block");
    element.set_opt_attr("type", kind);
    if let Some(driver) = driver {
        element.push(Element::new("driver").with_attr("type", driver));
    }
    if let Some(file) = file {
        let attribute = if block { "dev" } else { "file" };
        element.push(Element::new("source").with_attr(attribute, file));
    }
    Ok(element)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_that_are_meant_are_kept() {
        assert_eq!(split("a,b,,c,d"), ["a", "b,c", "d"]);
        let element = memory("file=/x,snapshot=external").unwrap();
        assert_eq!(element.attr("file"), Some("/x"));
        assert_eq!(memory("/x").unwrap().attr("file"), Some("/x"));
        assert!(memory("x").is_err());
        let element = disk("vda,snapshot=external,driver=qcow2,file=/a").unwrap();
        assert_eq!(element.child("source").unwrap().attr("file"), Some("/a"));
        assert!(disk("vda,colour=red").is_err());
    }
}
