//! A running disk's images, as its definition lists them.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use xml_schemas::Domain as Definition;
use xml_schemas::dom::Element;
use xml_schemas::domain::device;

use crate::drivers::domain::devices::behind_image;
use crate::error::{Error, ErrorCode, Result};

/// One image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its file.
    pub path: String,
    /// Its format.
    pub format: String,
    /// What `vda[2]` means by 2.
    pub index: Option<u32>,
}

/// Whether it is the disk with that target.
pub fn is_disk(element: &Element, target: &str) -> bool {
    element.name == "disk" && element.child("target").and_then(|t| t.attr("dev")) == Some(target)
}

/// The disk's element.
pub fn disk_mut<'a>(definition: &'a mut Definition, target: &str) -> Option<&'a mut Element> {
    definition
        .devices
        .rest
        .iter_mut()
        .find(|element| is_disk(element, target))
}

/// The target of the disk with that id.
pub fn target_of(definition: &Definition, id: &str) -> Option<String> {
    let mut disks = definition.devices.rest.iter();
    let disk = disks.find(|e| e.name == "disk" && device::alias(e) == Some(id))?;
    disk.child("target")?.attr("dev").map(str::to_owned)
}

fn index(element: &Element) -> Option<u32> {
    element.attr("index")?.parse().ok()
}

fn source(element: &Element) -> Option<String> {
    let source = element.child("source")?;
    let path = source.attr("file").or_else(|| source.attr("dev"))?;
    Some(path.to_owned())
}

/// The type of an image's place, and its source: a file's, or a device's.
pub fn source_element(path: &str) -> (&'static str, Element) {
    let device = std::fs::metadata(path).is_ok_and(|known| known.file_type().is_block_device());
    let (kind, attribute) = if device {
        ("block", "dev")
    } else {
        ("file", "file")
    };
    (kind, Element::new("source").with_attr(attribute, path))
}

/// The images of a disk, the one on top first.
pub fn links(definition: &Definition, target: &str) -> Vec<Link> {
    let mut disks = definition.devices.rest.iter();
    let Some(disk) = disks.find(|element| is_disk(element, target)) else {
        return Vec::new();
    };
    let Some(path) = source(disk) else {
        return Vec::new();
    };
    let format = disk.child("driver").and_then(|driver| driver.attr("type"));
    let mut list = vec![Link {
        path,
        format: format.unwrap_or("raw").to_owned(),
        index: disk.child("source").and_then(index),
    }];
    let mut next = disk.child("backingStore");
    while let Some(store) = next {
        let Some(path) = source(store) else { break };
        let format = store.child("format").and_then(|format| format.attr("type"));
        list.push(Link {
            path,
            format: format.unwrap_or("raw").to_owned(),
            index: index(store),
        });
        next = store.child("backingStore");
    }
    list
}

/// Which image `name` is: a path, `vda[2]`, or `vda`, which is the one on top.
///
/// # Errors
/// VIR_ERR_INVALID_ARG if none is, or (`below`) none behind that image.
pub fn find(links: &[Link], target: &str, name: &str, below: Option<usize>) -> Result<usize> {
    let number = name
        .strip_prefix(target)
        .and_then(|rest| rest.strip_prefix('[')?.strip_suffix(']')?.parse().ok());
    let first = below.map_or(0, |below| below + 1);
    let found = links.iter().enumerate().skip(first).find(|(at, link)| {
        number.is_some() && link.index == number
            || link.path == name
            || *at == 0 && name == target
            || images::tree::same_file(Path::new(&link.path), Path::new(name))
    });
    let top = links.first().map_or("", |link| &link.path);
    found.map(|(at, _)| at).ok_or_else(|| {
        let words = match below.and_then(|below| links.get(below)) {
            Some(above) => format!(
                "could not find image '{name}' beneath '{}' in chain for '{top}'",
                above.path
            ),
            None => format!("could not find image '{name}' in chain for '{top}'"),
        };
        Error::new(ErrorCode::INVALID_ARG, words)
    })
}

/// Has a running definition list what the headers say is behind a disk's image. Images keep their
/// numbers, others have those from `next` on.
///
/// # Errors
/// A header can't be read.
pub fn refresh(
    definition: &mut Definition,
    target: &str,
    before: &[Link],
    next: &mut u32,
) -> Result<()> {
    let now = links(definition, target);
    let Some(top) = now.first() else {
        return Ok(());
    };
    let mut list = vec![top.clone()];
    while let Some(last) = list.last()
        && list.len() <= images::chain::DEPTH_MOST
        && let Some((path, format)) = behind_image(Path::new(&last.path), &last.format)?
    {
        list.push(Link {
            path: path.display().to_string(),
            format,
            index: None,
        });
    }
    for link in &mut list {
        let known = before.iter().find(|known| known.path == link.path);
        link.index = known.and_then(|known| known.index).or_else(|| {
            let own = *next;
            *next = own.saturating_add(1);
            Some(own)
        });
    }
    let mut store = Element::new("backingStore");
    for link in list.iter().skip(1).rev() {
        let (kind, source) = source_element(&link.path);
        store = Element::new("backingStore")
            .with_attr("type", kind)
            .with_attr("index", link.index.unwrap_or_default().to_string())
            .with_child(Element::new("format").with_attr("type", link.format.as_str()))
            .with_child(source)
            .with_child(store);
    }
    let first = list.first().and_then(|link| link.index);
    if let Some(disk) = disk_mut(definition, target) {
        for source in disk.elements_mut().filter(|e| e.name == "source") {
            source.set_opt_attr("index", first.map(|index| index.to_string()));
        }
        disk.take_children("backingStore");
        disk.push(store);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_found_by_path_and_number() {
        let link = |path: &str, index| Link {
            path: path.to_owned(),
            format: "qcow2".to_owned(),
            index,
        };
        let links = [
            link("/a", Some(3)),
            link("/b", Some(1)),
            link("/c", Some(2)),
        ];
        let find = |name, below| find(&links, "vda", name, below).map_err(|e| e.message);
        assert_eq!(find("vda", None), Ok(0));
        assert_eq!(find("vda[1]", None), Ok(1));
        assert_eq!(find("/c", Some(0)), Ok(2));
        assert_eq!(
            find("/b", Some(1)),
            Err(
                "invalid argument: could not find image '/b' beneath '/b' in chain for '/a'"
                    .to_owned()
            )
        );
        assert_eq!(
            find("vdb[1]", None),
            Err("invalid argument: could not find image 'vdb[1]' in chain for '/a'".to_owned())
        );
    }
}
