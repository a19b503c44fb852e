//! `vol-create`, `vol-create-as`, `vol-create-from`, `vol-clone`.

use rpc::args::*;
use rpc::procs;
use xml_schemas::dom::{self, Element, format_element};

use super::definition::{FILE, PRINT, VALIDATE};
use super::domain::flags;
use super::pool::{self, POOL};
use super::read_definition;
use super::volume::{self, By, IN_POOL, VOL, bytes, find, lookup, path_of};
use crate::command::{Args, Command, Opt, Values, data, flag, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;

const PREALLOC: Opt = flag(
    "prealloc-metadata",
    "make the tables of a qcow2 image at once",
);
const REFLINK: Opt = flag("reflink", "share the blocks, where the file system can");

/// `vol-create`
pub const VOL_CREATE: Command = Command {
    name: "vol-create",
    summary: "create a vol from an XML file",
    description: "Makes a volume.",
    options: &[POOL, FILE, PREALLOC, VALIDATE],
    handler: create,
    connects: true,
};

/// `vol-create-as`
pub const VOL_CREATE_AS: Command = Command {
    name: "vol-create-as",
    summary: "create a volume from a set of args",
    description: "Makes a volume from options.",
    options: &[
        POOL,
        data("name", "name of the volume"),
        data("capacity", "its size, with a unit (bytes without one)"),
        text("allocation", "how much is set aside at once"),
        text("format", "raw or qcow2"),
        text("backing-vol", "the volume behind it"),
        text("backing-vol-format", "the format of the volume behind it"),
        PREALLOC,
        PRINT,
    ],
    handler: create_as,
    connects: true,
};

/// `vol-create-from`
pub const VOL_CREATE_FROM: Command = Command {
    name: "vol-create-from",
    summary: "create a vol, using another volume as input",
    description: "Makes a volume with the content of another one.",
    options: &[
        POOL,
        FILE,
        VOL,
        text("inputpool", "the pool of the other volume").values(Values::Pools),
        PREALLOC,
        REFLINK,
        VALIDATE,
    ],
    handler: create_from,
    connects: true,
};

/// `vol-clone`
pub const VOL_CLONE: Command = Command {
    name: "vol-clone",
    summary: "clone a volume.",
    description: "Makes a volume as another one is, in the same pool.",
    options: &[
        VOL,
        data("newname", "name of the new volume"),
        IN_POOL,
        PREALLOC,
        REFLINK,
        PRINT,
    ],
    handler: clone,
    connects: true,
};

fn create(shell: &mut Shell, args: &Args) -> Result {
    let flags = flags(args, &[("prealloc-metadata", 1 << 0), ("validate", 1 << 2)]);
    let pool = pool::find(shell, args)?;
    let file = args.required("file")?;
    let xml = read_definition(file)?;
    let vol = shell
        .call(
            procs::STORAGE_VOL_CREATE_XML,
            &StorageVolCreateXmlArgs { pool, xml, flags },
        )
        .with_context(|| format!("Failed to create vol from {file}"))?
        .vol;
    shell
        .out
        .print_extra(format!("Vol {} created from {file}\n", vol.name));
    Ok(())
}

fn create_as(shell: &mut Shell, args: &Args) -> Result {
    let flags = flags(args, &[("prealloc-metadata", 1 << 0)]);
    let pool = pool::find(shell, args)?;
    let name = args.required("name")?;
    let capacity = bytes(args.required("capacity")?)?;
    let mut root = Element::new("volume")
        .with_child(Element::with_text("name", name))
        .with_child(Element::with_text("capacity", capacity.to_string()));
    if let Some(allocation) = args.text("allocation")? {
        let allocation = bytes(allocation)?;
        root.push(Element::with_text("allocation", allocation.to_string()));
    }
    if let Some(format) = args.text("format")? {
        root.push(
            Element::new("target").with_child(Element::new("format").with_attr("type", format)),
        );
    }
    if let Some(word) = args.text("backing-vol")? {
        let asked = StorageVolLookupByNameArgs {
            pool: pool.clone(),
            name: word.to_owned(),
        };
        let behind = match shell.call(procs::STORAGE_VOL_LOOKUP_BY_NAME, &asked) {
            Ok(ret) => ret.vol,
            Err(failure) if failure.disconnected => return Err(failure),
            Err(_) => volume::by_key_or_path(shell, word)
                .with_context(|| format!("failed to get vol '{word}'"))?,
        };
        let path = path_of(shell, &behind)?;
        let mut store = Element::new("backingStore").with_child(Element::with_text("path", path));
        if let Some(format) = args.text("backing-vol-format")? {
            store.push(Element::new("format").with_attr("type", format));
        }
        root.push(store);
    }
    let mut xml = String::new();
    format_element(&mut xml, &root, 0);
    if args.has("print-xml") {
        shell.out.print(xml);
        return Ok(());
    }
    shell
        .call(
            procs::STORAGE_VOL_CREATE_XML,
            &StorageVolCreateXmlArgs { pool, xml, flags },
        )
        .with_context(|| format!("Failed to create vol {name}"))?;
    shell.out.print_extra(format!("Vol {name} created\n"));
    Ok(())
}

fn create_from(shell: &mut Shell, args: &Args) -> Result {
    let flags = flags(
        args,
        &[
            ("prealloc-metadata", 1 << 0),
            ("reflink", 1 << 1),
            ("validate", 1 << 2),
        ],
    );
    let pool = pool::find(shell, args)?;
    let file = args.required("file")?;
    let from = args.text("inputpool")?.map(str::to_owned);
    let word = args.required("vol")?;
    let clonevol = lookup(shell, word, from.as_deref(), By::Any, "inputpool")?;
    let xml = read_definition(file)?;
    let other = clonevol.name.clone();
    let asked = StorageVolCreateXmlFromArgs {
        pool,
        xml,
        clonevol,
        flags,
    };
    let vol = shell
        .call(procs::STORAGE_VOL_CREATE_XML_FROM, &asked)
        .with_context(|| format!("Failed to create vol from {file}"))?
        .vol;
    shell
        .out
        .print_extra(format!("Vol {} created from input vol {other}\n", vol.name));
    Ok(())
}

/// A volume's document with another name.
fn renamed(xml: &str, name: &str) -> Result<String> {
    let mut root =
        dom::parse(xml, "(volume_definition)").map_err(|error| Failure::new(error.to_string()))?;
    for element in root.elements_mut().filter(|e| e.name == "name") {
        *element = Element::with_text("name", name);
    }
    let mut out = String::new();
    format_element(&mut out, &root, 0);
    Ok(out)
}

fn clone(shell: &mut Shell, args: &Args) -> Result {
    let flags = flags(args, &[("prealloc-metadata", 1 << 0), ("reflink", 1 << 1)]);
    let vol = find(shell, args, By::Any)?;
    let asked = StoragePoolLookupByVolumeArgs { vol: vol.clone() };
    let pool = shell
        .call(procs::STORAGE_POOL_LOOKUP_BY_VOLUME, &asked)
        .context("failed to get parent pool")?
        .pool;
    let name = args.required("newname")?;
    let xml = volume::xml(shell, &vol)?;
    let xml = renamed(&xml, name)?;
    if args.has("print-xml") {
        shell.out.print(xml);
        return Ok(());
    }
    let other = vol.name.clone();
    let asked = StorageVolCreateXmlFromArgs {
        pool,
        xml,
        clonevol: vol,
        flags,
    };
    let made = shell
        .call(procs::STORAGE_VOL_CREATE_XML_FROM, &asked)
        .with_context(|| format!("Failed to clone vol from {other}"))?
        .vol;
    shell
        .out
        .print_extra(format!("Vol {} cloned from {other}\n", made.name));
    Ok(())
}
