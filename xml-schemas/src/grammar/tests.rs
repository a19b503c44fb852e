use super::*;
use crate::dom::parse;

fn strict(xml: &str) -> Result<(), String> {
    let mut root = parse(xml, "t").map_err(|e| e.to_string())?;
    domain().normalize(&mut root);
    domain().check(&root).map_err(|e| e.to_string())
}

fn with_device(device: &str) -> String {
    format!(
        "<domain type='kvm'><name>a</name><memory>1</memory><os><type>hvm</type></os>\n\
         <devices>\n{device}</devices></domain>"
    )
}

#[test]
fn a_strict_check_names_the_first_fault_and_its_line() {
    let fault = |device: &str| {
        let error = strict(&with_device(device)).unwrap_err();
        error
            .strip_prefix("XML document failed to validate against schema: ")
            .map(str::to_owned)
            .unwrap_or(error)
    };
    assert_eq!(
        strict(&with_device("<input type='mouse' bus='usb'/>")),
        Ok(())
    );
    assert_eq!(
        fault("<foo/>"),
        "element 'foo' is not allowed in element 'devices' (line 3)"
    );
    assert_eq!(
        fault("<input type='mouse'\n x='1'/>"),
        "attribute 'x' is not allowed in element 'input' (line 3)"
    );
    assert_eq!(
        fault("<hub type='ps2'/>"),
        "invalid value for attribute 'type' in element 'hub': 'ps2' (one of: usb) (line 3)"
    );
    assert_eq!(
        fault("\n\n<lease><lockspace>a</lockspace><key>b</key></lease>"),
        "element 'target' is missing in element 'lease' (line 5)"
    );
    assert_eq!(
        fault("<memballoon model='none'/><memballoon model='none'/>"),
        "element 'memballoon' is allowed only once in element 'devices' (line 3)"
    );
    assert_eq!(
        fault("<emulator>qemu</emulator>"),
        "invalid value of element 'emulator': 'qemu' (line 3)"
    );
    // What is allowed depends on an attribute.
    assert_eq!(
        fault("<disk type='file'><source dev='/dev/x'/><target dev='vda'/></disk>"),
        "attribute 'dev' is not allowed in element 'source' (line 3)"
    );
}

#[test]
fn a_lenient_check_keeps_out_what_is_unknown_and_refuses_what_is_wrong() {
    let xml = with_device("<hub type='usb' a='b'><c/></hub><d/>");
    let mut root = parse(&xml, "t").unwrap();
    let (warnings, refused) = domain().prune(&mut root);
    assert_eq!(refused, None);
    let messages: Vec<_> = warnings.iter().map(|w| w.message.as_str()).collect();
    assert_eq!(
        messages,
        [
            "attribute 'a' is not allowed in element 'hub' and is left out",
            "element 'c' is not allowed in element 'hub' and is left out",
            "element 'd' is not allowed in element 'devices' and is left out",
        ]
    );
    assert_eq!(domain().check(&root), Ok(()));
    let mut root = parse(&with_device("<hub type='x'/>"), "t").unwrap();
    let (_, refused) = domain().prune(&mut root);
    assert_eq!(
        refused.unwrap().to_string(),
        "XML error: Invalid value for attribute 'type' in element 'hub': 'x'. (line 3)"
    );
}

#[test]
fn foreign_prefixes_become_the_tables() {
    let xml = "<domain type='kvm' xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>\
               <name>a</name><os><type>hvm</type></os>\
               <q:commandline><q:arg value='x'/></q:commandline></domain>";
    assert_eq!(strict(xml), Ok(()));
    let other = xml.replace("qemu/1.0", "other");
    assert!(
        strict(&other)
            .unwrap_err()
            .contains("'q:commandline' is not allowed")
    );
}

#[test]
fn a_lenient_check_takes_an_empty_value_for_none() {
    let xml = "<domain type='kvm'><name>a</name><uuid/><title> </title><memory>1</memory>\
               <os><type machine=''>hvm</type><kernel></kernel></os></domain>";
    let mut root = parse(xml, "t").unwrap();
    let (warnings, refused) = domain().prune(&mut root);
    assert_eq!((warnings.len(), refused), (4, None), "{warnings:?}");
    assert!(root.child("uuid").is_none());
    assert!(strict(xml).is_err());
}

/// Every name that `items` or anything below them states.
fn stated(items: &[Item], names: &mut std::collections::HashSet<String>) {
    for item in items {
        match item {
            Item::Attribute { name, .. } => {
                names.insert(format!("@{name}"));
            }
            Item::Child { name, body, .. } => {
                names.insert(name.rsplit(':').next().unwrap().to_owned());
                if let BodyRef::Inline(body) = body {
                    stated(&body.items, names);
                }
            }
            Item::When { items, .. } => stated(items, names),
            _ => {}
        }
    }
}

#[test]
fn every_name_of_libvirts_schema_is_in_the_table() {
    let Ok(schema) = std::fs::read_to_string("/usr/share/libvirt/schemas/domaincommon.rng") else {
        println!("left out: needs libvirt's schemas (libvirt0)");
        return;
    };
    let mut names = std::collections::HashSet::from(["domain".to_owned()]);
    for body in &domain().table.bodies {
        stated(&body.items, &mut names);
    }
    let mut missing = Vec::new();
    let mut unread = vec![parse(&schema, "t").unwrap()];
    while let Some(mut pattern) = unread.pop() {
        unread.extend(pattern.take_elements());
        let name = pattern.attr("name").unwrap_or_default();
        let wanted = match pattern.name.as_str() {
            "element" => name.to_owned(),
            "attribute" => format!("@{name}"),
            _ => continue,
        };
        // The root inside snapshots.
        if !name.is_empty() && name != "inactiveDomain" && !names.contains(&wanted) {
            missing.push(wanted);
        }
    }
    assert_eq!(missing, [""; 0]);
}
