use super::*;

const UUID: &str = "2d8739d4-beda-4520-8522-6dddc3256497";

fn parse(text: &str) -> Result<Pool, XmlError> {
    Pool::parse(text, Validation::Lenient)
}

fn refused(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

#[test]
fn definitions_are_printed_as_libvirt_prints_them() {
    let dir = format!(
        "<pool type='dir'>
  <name>p</name>
  <uuid>{UUID}</uuid>
  <capacity unit='bytes'>3</capacity>
  <allocation unit='bytes'>1</allocation>
  <available unit='bytes'>2</available>
  <source>
  </source>
  <target>
    <path>/x/p</path>
    <permissions>
      <mode>0711</mode>
      <owner>0</owner>
      <group>33</group>
      <label>l</label>
    </permissions>
  </target>
</pool>
"
    );
    let sizes = Sizes {
        capacity: 3,
        allocation: 1,
        available: 2,
    };
    assert_eq!(parse(&dir).unwrap().format(sizes), dir);
    let netfs = format!(
        "<pool type='netfs' xmlns:fs='{FS_NAMESPACE}'>
  <name>n</name>
  <uuid>{UUID}</uuid>
  <capacity unit='bytes'>0</capacity>
  <allocation unit='bytes'>0</allocation>
  <available unit='bytes'>0</available>
  <source>
    <host name='h'/>
    <dir path='/exp'/>
    <format type='auto'/>
    <protocol ver='4.1'/>
  </source>
  <target>
    <path>/x/nn</path>
  </target>
  <fs:mount_opts>
    <fs:option name='ro'/>
  </fs:mount_opts>
</pool>
"
    );
    assert_eq!(parse(&netfs).unwrap().format(Sizes::default()), netfs);
    Pool::parse(&netfs, Validation::Strict).unwrap();
    Pool::parse(&dir, Validation::Strict).unwrap();
}

#[test]
fn what_libvirt_refuses_is_refused_in_its_words() {
    assert_eq!(
        refused("<poo/>"),
        "XML error: expecting root element of 'pool', not 'poo'"
    );
    assert_eq!(
        refused("<pool><name>k</name></pool>"),
        "XML error: Missing required attribute 'type' in element 'pool'"
    );
    assert_eq!(
        refused("<pool type='bogus'/>"),
        "XML error: Invalid value for attribute 'type' in element 'pool': 'bogus'."
    );
    assert_eq!(
        refused("<pool type='zfs'/>"),
        "internal error: missing backend for pool type 12 (zfs)"
    );
    let with = |inner: &str| refused(&format!("<pool type='netfs'>{inner}</pool>"));
    assert_eq!(with(""), "XML error: missing pool source name element");
    assert_eq!(
        with("<name>y/z</name>"),
        "XML error: name y/z cannot contain '/'"
    );
    assert_eq!(
        with("<name>y</name><uuid>xx</uuid>"),
        "XML error: malformed uuid element"
    );
    assert_eq!(
        with("<name>y</name><source><dir path='/x'/></source>"),
        "XML error: missing storage pool source host name"
    );
    assert_eq!(
        with("<name>y</name><source><host name='h'/></source>"),
        "XML error: missing storage pool source path"
    );
    assert_eq!(
        with("<name>y</name><source><format type='bogus'/></source>"),
        "unsupported configuration: unknown pool format type bogus"
    );
    let dir = |inner: &str| refused(&format!("<pool type='dir'><name>d</name>{inner}</pool>"));
    assert_eq!(dir(""), "XML error: missing storage pool target path");
    assert!(dir("<target><path>foo</path></target>").contains("not absolute"));
    assert_eq!(
        dir("<target><path>/x</path><permissions><mode>9</mode></permissions></target>"),
        "XML error: malformed octal mode"
    );
    let strict = "<pool type='dir'><name>d</name><bogus/><target><path>/x</path></target></pool>";
    assert!(parse(strict).is_ok());
    assert_eq!(
        Pool::parse(strict, Validation::Strict).unwrap_err().code(),
        ErrorCode::InvalidSchema
    );
}

#[test]
fn paths_are_cleaned() {
    assert_eq!(clean_path("//a//b/"), "/a/b");
    assert_eq!(clean_path("/"), "/");
    assert_eq!(clean_path(""), "");
}

#[test]
fn capabilities_name_every_type() {
    let text = capabilities();
    assert!(text.contains("<pool type='dir' supported='yes'>"));
    assert!(text.contains("<pool type='zfs' supported='no'>\n  </pool>\n"));
    for name in TYPES {
        assert!(text.contains(&format!("type='{name}'")));
    }
}
