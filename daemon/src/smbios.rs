//! What the host's firmware says of it (SMBIOS), as far as the kernel shows it.

use std::fs;
use std::path::Path;

use xml_schemas::dom::{Element, format_element};

/// Where the kernel shows it.
const FOLDER: &str = "/sys/class/dmi/id";

/// Parts of the document: their entries' names and files.
const PARTS: [(&str, &[(&str, &str)]); 4] = [
    (
        "bios",
        &[
            ("vendor", "bios_vendor"),
            ("version", "bios_version"),
            ("date", "bios_date"),
            ("release", "bios_release"),
        ],
    ),
    (
        "system",
        &[
            ("manufacturer", "sys_vendor"),
            ("product", "product_name"),
            ("version", "product_version"),
            ("serial", "product_serial"),
            ("uuid", "product_uuid"),
            ("sku", "product_sku"),
            ("family", "product_family"),
        ],
    ),
    (
        "baseBoard",
        &[
            ("manufacturer", "board_vendor"),
            ("product", "board_name"),
            ("version", "board_version"),
            ("serial", "board_serial"),
            ("asset", "board_asset_tag"),
        ],
    ),
    (
        "chassis",
        &[
            ("manufacturer", "chassis_vendor"),
            ("version", "chassis_version"),
            ("serial", "chassis_serial"),
            ("asset", "chassis_asset_tag"),
        ],
    ),
];

/// One of the kernel's values.
pub fn value(file: &str) -> Option<String> {
    read(Path::new(FOLDER), file)
}

fn read(folder: &Path, file: &str) -> Option<String> {
    let text = fs::read_to_string(folder.join(file)).ok()?;
    let text = text.trim();
    let printable = !text.is_empty() && !text.chars().any(char::is_control);
    printable.then(|| text.to_owned())
}

/// `<sysinfo type='smbios'>`; none where the host has no such firmware.
pub fn sysinfo() -> Option<String> {
    document(Path::new(FOLDER))
}

fn document(folder: &Path) -> Option<String> {
    let mut root = Element::new("sysinfo").with_attr("type", "smbios");
    for (name, entries) in PARTS {
        let mut part = Element::new(name);
        for (entry, file) in entries {
            if let Some(text) = read(folder, file) {
                part.push(Element::with_text("entry", text).with_attr("name", *entry));
            }
        }
        if part.elements().next().is_some() {
            root.push(part);
        }
    }
    root.elements().next()?;
    let mut text = String::new();
    format_element(&mut text, &root, 0);
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_shows_becomes_a_document() {
        let temp = crate::files::testing::TempFolder::new();
        assert_eq!(document(&temp.0), None);
        fs::write(temp.0.join("sys_vendor"), "A & B\n").unwrap();
        fs::write(temp.0.join("product_serial"), "  \n").unwrap();
        assert_eq!(
            document(&temp.0).unwrap(),
            "<sysinfo type='smbios'>\n  <system>\n    <entry name='manufacturer'>A &amp; B</entry>\n  \
             </system>\n</sysinfo>\n"
        );
    }
}
