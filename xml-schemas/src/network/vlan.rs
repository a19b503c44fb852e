//! `<vlan>`: the VLANs (IEEE 802.1Q) that a card is in.

use super::xml;
use crate::dom::Element;
use crate::error::XmlError;

/// The highest tag that the element may have.
const TAG_MOST: u32 = 4095;

/// What a card's port of a bridge is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vlan {
    /// The card sees tags.
    pub trunk: bool,
    /// The VLANs.
    pub tags: Vec<Tag>,
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag {
    /// Its number.
    pub id: u16,
    /// What comes without a tag from the card is in this one.
    pub native: bool,
    /// The card gets it without tags.
    pub untagged: bool,
}

impl Vlan {
    /// Reads `<vlan>`.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR for what contradicts itself.
    pub fn read(element: &Element) -> Result<Self, XmlError> {
        let mut trunk = match element.attr("trunk") {
            None => None,
            Some("yes") => Some(true),
            Some("no") => Some(false),
            Some(other) => {
                return Err(xml(format!(
                    "Invalid value for attribute 'trunk' in element 'vlan': '{other}'."
                )));
            }
        };
        let mut tags: Vec<Tag> = Vec::new();
        let mut native = false;
        for tag in element.elements().filter(|e| e.name == "tag") {
            let text = tag.attr("id").unwrap_or_default();
            let id: u32 = text
                .parse()
                .map_err(|_| xml("missing or invalid vlan tag id attribute"))?;
            let id = u16::try_from(id)
                .ok()
                .filter(|&id| u32::from(id) <= TAG_MOST)
                .ok_or_else(|| xml(format!("vlan tag id {id} too large (maximum {TAG_MOST})")))?;
            let mode = tag.attr("nativeMode");
            if let Some(mode) = mode {
                if native {
                    return Err(xml("duplicate native vlan setting"));
                }
                if !matches!(mode, "tagged" | "untagged") {
                    return Err(xml(format!(
                        "Invalid \"nativeMode='{mode}'\" in vlan <tag> element"
                    )));
                }
                if trunk == Some(false) {
                    return Err(xml(
                        "invalid configuration in <vlan> - \"trunk='no'\" is not allowed with a \
                         native vlan id",
                    ));
                }
                native = true;
                trunk = Some(true);
            }
            tags.push(Tag {
                id,
                native: mode.is_some(),
                untagged: mode == Some("untagged"),
            });
        }
        if tags.is_empty() {
            return Err(xml(
                "missing tag id - each <vlan> must have at least one <tag id='n'/> subelement",
            ));
        }
        if tags.len() > 1 && trunk == Some(false) {
            return Err(xml(
                "invalid \"trunk='no'\" in <vlan> - trunk='yes' is required for more than one \
                 vlan tag",
            ));
        }
        let trunk = trunk.unwrap_or(tags.len() > 1);
        if !trunk {
            for tag in &mut tags {
                (tag.native, tag.untagged) = (true, true);
            }
        }
        Ok(Self { trunk, tags })
    }

    /// Whether a Linux bridge can do it: it has the VLANs 1 to 4094.
    ///
    /// # Errors
    /// The first number that is none.
    pub fn for_bridge(&self) -> Result<(), u16> {
        let odd = |tag: &&Tag| !(1..=4094).contains(&tag.id);
        self.tags.iter().find(odd).map_or(Ok(()), |tag| Err(tag.id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(inside: &str) -> Result<Vlan, String> {
        let text = format!("<vlan {inside}</vlan>");
        Vlan::read(&crate::dom::parse(&text, "vlan").unwrap()).map_err(|e| e.to_string())
    }

    #[test]
    fn one_tag_is_a_port_and_several_are_a_trunk() {
        let one = read("><tag id='42'/>").unwrap();
        assert!(!one.trunk && one.tags[0].native && one.tags[0].untagged);
        let two = read("><tag id='42'/><tag id='47' nativeMode='untagged'/>").unwrap();
        assert!(two.trunk && !two.tags[0].untagged && two.tags[1].native);
        assert!(read("trunk='yes'><tag id='42'/>").unwrap().trunk);
        assert_eq!(read("><tag id='4095'/>").unwrap().for_bridge(), Err(4095));
    }

    #[test]
    fn contradictions_are_refused() {
        for (inside, why) in [
            (">", "missing tag id"),
            (
                "trunk='no'><tag id='1'/><tag id='2'/>",
                "trunk='yes' is required",
            ),
            ("><tag id='4096'/>", "vlan tag id 4096 too large"),
            ("><tag id='x'/>", "invalid vlan tag id"),
            ("><tag id='1' nativeMode='odd'/>", "nativeMode='odd'"),
            (
                "><tag id='1' nativeMode='tagged'/><tag id='2' nativeMode='tagged'/>",
                "duplicate native vlan",
            ),
        ] {
            let said = read(inside).unwrap_err();
            assert!(said.contains(why), "{inside}: {said}");
        }
    }
}
