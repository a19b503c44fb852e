//! `map`: where an image's content is.

use images::tree::Opener;

use super::args::{Args, Spec, size, value};
use super::open::{self, FORMAT, HELP, IMAGE_OPTS, OBJECT, OUTPUT, SHARE, Secrets};
use super::{Done, Failure, say};

pub const SPECS: &[Spec] = &[
    HELP,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    SHARE,
    OUTPUT,
    value('s', &["start-offset"]),
    value('l', &["max-length"]),
];

#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry {
    start: u64,
    len: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
}

impl Entry {
    fn follows(&self, last: &Self) -> bool {
        let at = last.offset.map(|offset| offset + last.len);
        (
            self.depth,
            self.present,
            self.zero,
            self.data,
            self.compressed,
        ) == (
            last.depth,
            last.present,
            last.zero,
            last.data,
            last.compressed,
        ) && self.offset == at
    }
}

pub fn run(args: Args) -> Done {
    let json = open::json(&args)?;
    let named = open::one_file(&args, "map", "Expecting one image file name")?;
    let number = |name: &str| match args.text(name) {
        Some(text) => size(&text)
            .map(Some)
            .ok_or_else(|| Failure::new(format!("Invalid {name} specified: '{text}'."))),
        None => Ok(None),
    };
    let (start, most) = (number("start-offset")?, number("max-length")?);
    let secrets = Secrets::of(&args)?;
    let layers = named.open(
        &Opener {
            share: args.has("force-share"),
            metadata_only: true,
            ..Opener::default()
        },
        &secrets,
    )?;
    let names: Vec<String> = layers
        .iter()
        .enumerate()
        .map(|(n, layer)| match (&layer.data_file, n) {
            (Some(data), _) => data.display().to_string(),
            (None, 0) => named.name.to_string_lossy().into_owned(),
            (None, _) => layer.path.display().to_string(),
        })
        .collect();
    let layer = open::first(layers)?;
    let image = layer.image;
    let end = image
        .size()
        .min(start.unwrap_or(0).saturating_add(most.unwrap_or(u64::MAX)));
    let mut at = start.unwrap_or(0);
    if !json {
        say(&format!(
            "{:<16}{:<16}{:<16}{}\n",
            "Offset", "Length", "Mapped to", "File"
        ));
    } else if at >= end {
        say("[");
    }
    let mut last: Option<Entry> = None;
    let mut first = true;
    while at < end {
        let extent = image.extent(at, end - at)?;
        let next = Entry {
            start: at,
            len: extent.len,
            depth: extent.depth,
            present: extent.present,
            zero: extent.zero,
            data: extent.data,
            compressed: extent.compressed,
            offset: extent.offset,
        };
        at += extent.len;
        match &mut last {
            Some(entry) if next.follows(entry) => entry.len += next.len,
            Some(entry) => {
                print(entry, json, first, &names)?;
                first = false;
                last = Some(next);
            }
            None => last = Some(next),
        }
    }
    if let Some(entry) = &last {
        print(entry, json, first, &names)?;
    }
    if json {
        say("]\n");
    }
    Ok(0)
}

fn hex(value: u64) -> String {
    if value == 0 {
        "0".into()
    } else {
        format!("{value:#x}")
    }
}

fn print(entry: &Entry, json: bool, first: bool, names: &[String]) -> Result<(), Failure> {
    if json {
        let offset = match entry.offset {
            Some(offset) => format!(", \"offset\": {offset}"),
            None => String::new(),
        };
        say(&format!(
            "{}{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
             \"data\": {}, \"compressed\": {}{offset}}}",
            if first { "[" } else { ",\n" },
            entry.start,
            entry.len,
            entry.depth,
            entry.present,
            entry.zero,
            entry.data,
            entry.compressed
        ));
        return Ok(());
    }
    if !entry.data || entry.zero {
        return Ok(());
    }
    let Some(offset) = entry.offset else {
        return Err(Failure::new(
            "File contains external, encrypted or compressed clusters.",
        ));
    };
    say(&format!(
        "{:<16}{:<16}{:<16}{}\n",
        hex(entry.start),
        hex(entry.len),
        hex(offset),
        names.get(entry.depth as usize).map_or("", String::as_str)
    ));
    Ok(())
}
