//! `bitmap`: an image's persistent bitmaps.

use images::tree::Opener;

use super::args::{Args, Spec, flag, size, value};
use super::open::{self, FORMAT, HELP, IMAGE_OPTS, Named, OBJECT, Secrets, message};
use super::{Done, Failure};

pub const SPECS: &[Spec] = &[
    HELP,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    flag('\0', &["add"]),
    value('g', &["granularity"]),
    flag('\0', &["remove"]),
    flag('\0', &["clear"]),
    flag('\0', &["enable"]),
    flag('\0', &["disable"]),
    value('\0', &["merge"]),
    value('b', &["source-file"]),
    value('F', &["source-format"]),
];

pub fn run(args: Args) -> Done {
    let actions: Vec<(&str, String)> = args
        .each()
        .filter(|(name, _)| {
            matches!(
                *name,
                "add" | "remove" | "clear" | "enable" | "disable" | "merge"
            )
        })
        .map(|(name, value)| (name, value.to_string_lossy().into_owned()))
        .collect();
    let has = |wanted: &str| actions.iter().any(|(name, _)| *name == wanted);
    if actions.is_empty() {
        return Err(Failure::new(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ));
    }
    let granularity = match args.text("granularity") {
        None => None,
        Some(text) => Some(
            size(&text)
                .ok_or_else(|| Failure::new(format!("Invalid granularity specified: '{text}'.")))?,
        ),
    };
    if granularity.is_some() && !has("add") {
        return Err(Failure::new("granularity only supported with --add"));
    }
    if args.get("source-file").is_some() && !has("merge") {
        return Err(Failure::new(
            "Merge bitmap source file only supported with --merge",
        ));
    }
    if args.get("source-format").is_some() && args.get("source-file").is_none() {
        return Err(Failure::new("-F only supported with -b"));
    }
    let [file, name] = &args.free[..] else {
        return Err(Failure::usage(
            "bitmap",
            "Expecting filename and bitmap name",
        ));
    };
    let name = name.to_string_lossy().into_owned();
    let secrets = Secrets::of(&args)?;
    let named = Named::new(file, args.text("format").as_deref(), args.has("image-opts"))?;
    // Quiet: whatever else it is, a raw image has no bitmaps.
    let opener = Opener {
        no_backing: true,
        metadata_only: true,
        ..Opener::default()
    };
    let layer = open::first(open::open_writable(&named, &opener, &secrets, true)?)?;
    for (action, from) in &actions {
        let failed =
            |why: &str| Failure::new(format!("Operation {action} on bitmap {name} failed: {why}"));
        let Some(image) = &layer.qcow2 else {
            return Err(failed(&if *action == "add" {
                "Driver 'raw' does not support persistent bitmaps".to_owned()
            } else {
                format!("Dirty bitmap '{name}' not found")
            }));
        };
        let done = match *action {
            "add" => match granularity {
                Some(size) if !size.is_power_of_two() || size < 512 => {
                    return Err(failed("Granularity must be power of 2 and at least 512"));
                }
                size => image.bitmap_add(&name, size, !has("disable")),
            },
            "remove" => image.bitmap_remove(&name),
            "clear" => image.bitmap_clear(&name),
            "enable" => image.bitmap_enable(&name, true),
            "disable" => image.bitmap_enable(&name, false),
            _ => {
                let other = match args.get("source-file") {
                    None => image.clone(),
                    Some(source) => {
                        let named =
                            Named::new(source, args.text("source-format").as_deref(), false)?;
                        open::first(named.open(&opener, &secrets)?)?
                            .qcow2
                            .ok_or_else(|| failed(&format!("Dirty bitmap '{from}' not found")))?
                    }
                };
                other
                    .bitmap_bits(from)
                    .and_then(|(bits, theirs)| image.bitmap_merge(&name, &bits, theirs))
            }
        };
        done.map_err(|error| failed(&message(&error)))?;
    }
    Ok(0)
}
