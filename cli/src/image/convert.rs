//! `convert`: copies images into another one, of another format perhaps.

use std::ffi::OsStr;
use std::sync::Arc;

use images::Image;
use images::chain::Format;
use images::convert::{Concat, Options, Target, convert, threads};
use images::tree::{Layer, Opener};

use super::args::{Args, Spec, flag, pairs, size, value};
use super::open::{
    self, HELP, Named, OBJECT, PROGRESS, QUIET, SHARE, Secrets, cannot_open, message,
};
use super::options::{Given, format, help, words};
use super::progress::Progress;
use super::{Done, Failure, error, say};

pub const SPECS: &[Spec] = &[
    HELP,
    QUIET,
    PROGRESS,
    OBJECT,
    SHARE,
    value('f', &["source-format"]),
    flag('\0', &["image-opts", "source-image-opts"]),
    value('l', &["source-snapshot"]),
    value('T', &["source-cache"]),
    value('O', &["target-format"]),
    flag('\0', &["target-image-opts"]),
    value('o', &["target-options"]),
    flag('c', &["compress"]),
    value('t', &["target-cache"]),
    value('B', &["backing"]),
    value('F', &["backing-format"]),
    flag('n', &["no-create"]),
    flag('\0', &["target-is-zero"]),
    value('S', &["sparse-size"]),
    flag('\0', &["bitmaps"]),
    flag('\0', &["skip-broken-bitmaps"]),
    value('r', &["rate"]),
    value('m', &["parallel"]),
    flag('C', &["copy-range-offloading"]),
    flag('\0', &["salvage"]),
    flag('W', &["oob-writes"]),
];

/// The most zero bytes of `-S`.
const SPARSE_MOST: u64 = 16 << 20;

/// `-l`: the snapshot's id or name.
pub fn snapshot_name(text: &str) -> Result<String, Failure> {
    if !text.starts_with("snapshot.") {
        return Ok(text.to_owned());
    }
    let fields = pairs(text, None);
    fields
        .iter()
        .find(|(name, _)| name == "snapshot.name" || name == "snapshot.id")
        .map(|(_, value)| value.clone())
        .ok_or_else(|| Failure::new(format!("Failed in parsing snapshot param '{text}'")))
}

pub fn run(args: Args) -> Done {
    let quiet = args.has("quiet");
    let out_name = args.text("target-format");
    let out_format = if args.has("target-image-opts") {
        Format::Raw
    } else {
        format(out_name.as_deref(), "")?
    };
    if args
        .all("target-options")
        .any(|list| matches!(list.to_str(), Some("help" | "?")))
    {
        say(&help(out_format));
        return Ok(0);
    }
    let sparse = match args.text("sparse-size") {
        None => 4096,
        Some(text) => size(&text)
            .filter(|bytes| bytes.is_multiple_of(512) && *bytes <= SPARSE_MOST)
            .ok_or_else(|| {
                Failure::new(format!(
                    "Invalid buffer size for sparse output specified. Valid sizes are multiples of \
                     512 up to {SPARSE_MOST}. Select 0 to disable sparse detection (fully allocates \
                     output)."
                ))
            })?,
    };
    let parallel = match args.text("parallel") {
        None => 8,
        Some(text) => text
            .parse()
            .ok()
            .filter(|count| (1..=16).contains(count))
            .ok_or_else(|| {
                Failure::new("Invalid number of coroutines specified. Must be between 1 and 16.")
            })?,
    };
    let rate = match args.text("rate") {
        None => 0,
        Some(text) => size(&text)
            .ok_or_else(|| Failure::new(format!("Invalid rate limit specified: '{text}'.")))?,
    };
    let (compress, copy_range) = (args.has("compress"), args.has("copy-range-offloading"));
    let no_create = args.has("no-create");
    if compress && copy_range {
        return Err(Failure::new(
            "Cannot enable copy offloading when -c is used",
        ));
    }
    if copy_range && args.has("sparse-size") {
        return Err(Failure::new(
            "Cannot enable copy offloading when -S is used",
        ));
    }
    if args.has("target-is-zero") && !no_create {
        return Err(Failure::new("--target-is-zero requires use of -n flag"));
    }
    if args.has("skip-broken-bitmaps") && !args.has("bitmaps") {
        return Err(Failure::new(
            "Use of --skip-broken-bitmaps requires --bitmaps",
        ));
    }
    let Some((out, sources)) = args.free.split_last().filter(|(_, from)| !from.is_empty()) else {
        return Err(Failure::new("Must specify image file name"));
    };
    if no_create && args.has("target-options") {
        error("warning: -o has no effect when skipping image creation");
    }
    let secrets = Secrets::of(&args)?;
    let (direct, stable) = open::cache(args.text("source-cache").as_deref(), "source cache")?;
    let snapshot = args
        .text("source-snapshot")
        .map(|text| snapshot_name(&text))
        .transpose()?;
    if snapshot.is_some() && sources.len() > 1 {
        return Err(Failure::new(
            "No support for concatenating multiple snapshot",
        ));
    }
    let opener = Opener {
        share: args.has("force-share"),
        direct,
        stable,
        snapshot: snapshot.as_deref(),
        ..Opener::default()
    };
    let stated = args.text("source-format");
    let mut layers: Vec<Layer> = Vec::new();
    for name in sources {
        let named = Named::new(name, stated.as_deref(), args.has("image-opts"))?;
        let one = named
            .open(&opener, &secrets)
            .map_err(|failure| match &snapshot {
                Some(_) => missing_snapshot(failure),
                None => failure,
            })?;
        layers.push(open::first(one)?);
    }
    let images: Vec<Arc<dyn Image>> = layers.iter().map(|layer| layer.image.clone()).collect();
    let source: Arc<dyn Image> = match &images[..] {
        [one] => one.clone(),
        _ => Arc::new(Concat::new(images)),
    };

    let mut given = Given::new(out_format);
    for list in args.all("target-options").filter(|_| !no_create) {
        given.add(&list.to_string_lossy(), "")?;
    }
    if let Some(backing) = args.text("backing") {
        if !given.knows("backing_file") {
            return Err(Failure::new(format!(
                "Backing file not supported for file format '{}'",
                out_format.name()
            )));
        }
        given.set("backing_file", backing);
    }
    if let Some(format) = args.text("backing-format") {
        given.set("backing_fmt", format);
    }
    let backed = given.get("backing_file").is_some();
    if backed && given.get("backing_fmt").is_none() {
        return Err(Failure::new(
            "Use of backing file requires explicit backing format",
        ));
    }
    if backed && layers.len() > 1 {
        return Err(Failure::new(
            "Having a backing file for the target makes no sense when concatenating multiple \
             input images",
        ));
    }
    if compress && !no_create && out_format != Format::Qcow2 {
        return Err(Failure::new(
            "Compression not supported for this file format",
        ));
    }
    if args.has("bitmaps") && layers.iter().any(|layer| layer.qcow2.is_none()) {
        return Err(Failure::new("Source lacks bitmap support"));
    }
    if args.has("bitmaps") && (out_format != Format::Qcow2 || layers.len() > 1) {
        return Err(Failure::new(
            "This will continue to be unsupported: bitmaps need one source and qcow2 as the target's format",
        ));
    }
    // As qemu-img: what nobody asked to be on stable storage is not waited for.
    let mode = args.text("target-cache").unwrap_or_else(|| "unsafe".into());
    let (direct, stable) = open::cache(Some(&mode), "cache")?;
    let encrypted = given.get("encrypt.key-secret").or(given.get("key-secret"));
    let secret = encrypted.map(str::to_owned);
    if !no_create {
        if given.size().is_none() {
            given.set("size", source.size().next_multiple_of(512).to_string());
        }
        if out_format == Format::Raw {
            given.set(
                "size",
                given.size().unwrap_or(0).max(source.size()).to_string(),
            );
        }
        given.create(out, &secrets, stable).map_err(|what| {
            Failure::new(format!(
                "{}: error while converting {}: {what}",
                out.to_string_lossy(),
                out_format.name()
            ))
        })?;
    }
    let target = open_target(
        &args,
        out,
        out_format,
        secret,
        &Opener {
            direct,
            stable,
            no_backing: backed && !no_create,
            ..Opener::default()
        },
        &secrets,
    )?;
    if target.image.size() < source.size() {
        let (has, needs) = (target.image.size(), source.size());
        return Err(Failure::new(format!(
            "output file is smaller than input file ({has} bytes, {needs} needed)"
        )));
    }
    if compress && target.qcow2.is_none() {
        return Err(Failure::new(
            "Compression not supported for this file format",
        ));
    }
    let fresh = !no_create && !backed && out_format != Format::Luks && !on_device(&target);
    let progress = Progress::new(args.has("progress") && !quiet, 1.0);
    let job = progress.job();
    job.set_speed(rate);
    let salvaged = |offset: u64, why: &images::Error| {
        if !quiet {
            error(&format!(
                "warning: error while reading offset {offset}: {}",
                message(why)
            ));
        }
    };
    let options = Options {
        sparse,
        parallel: threads(parallel),
        any_order: args.has("oob-writes"),
        compress,
        depth: backed.then_some(1),
        copy_range,
        salvage: if args.has("salvage") {
            Some(&salvaged)
        } else {
            None
        },
        ..Options::default()
    };
    let aim = Target {
        image: target.image.clone(),
        qcow2: target.qcow2.clone(),
        zeroed: fresh || args.has("target-is-zero"),
    };
    convert(&source, &aim, &options, &job)
        .map_err(|error| Failure::new(format!("error while converting: {}", message(&error))))?;
    if args.has("bitmaps") {
        bitmaps(&layers[0], &target, args.has("skip-broken-bitmaps"))?;
    }
    target.image.flush()?;
    progress.end();
    Ok(0)
}

fn on_device(layer: &Layer) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let path = layer.data_file.as_ref().unwrap_or(&layer.path);
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

fn missing_snapshot(failure: Failure) -> Failure {
    let what = words(failure);
    Failure::new(if what.contains("has no snapshot") {
        "Failed to load snapshot: Can't find snapshot".into()
    } else {
        what
    })
}

fn open_target(
    args: &Args,
    name: &OsStr,
    format: Format,
    secret: Option<String>,
    how: &Opener<'_>,
    secrets: &Secrets,
) -> Result<Layer, Failure> {
    let named = if args.has("target-image-opts") {
        if !args.has("no-create") {
            return Err(Failure::new("--target-image-opts requires use of -n flag"));
        }
        Named::new(name, None, true)?
    } else {
        Named {
            name: name.to_owned(),
            format: Some(format),
            secret,
        }
    };
    let passphrase = match &named.secret {
        Some(id) => Some(secrets.get(id)?),
        None => None,
    };
    let opener = Opener {
        format: named.format,
        writable: true,
        passphrase,
        ..*how
    };
    let layers = opener
        .open(&named.name)
        .map_err(|error| cannot_open(&named.name, &error))?;
    open::first(layers)
}

/// Copies the persistent bitmaps.
fn bitmaps(from: &Layer, to: &Layer, skip_broken: bool) -> Result<(), Failure> {
    let (Some(from), Some(to)) = (&from.qcow2, &to.qcow2) else {
        return Err(Failure::new("Format driver does not support bitmaps"));
    };
    for one in from.bitmaps()? {
        if one.in_use {
            let what = format!("Cannot copy inconsistent bitmap '{}'", one.name);
            if !skip_broken {
                return Err(Failure::new(what));
            }
            error(&format!(
                "warning: Skipping inconsistent bitmap '{}'",
                one.name
            ));
            continue;
        }
        let (bits, granularity) = from.bitmap_bits(&one.name)?;
        to.bitmap_add(&one.name, Some(one.granularity), one.auto)
            .and_then(|()| to.bitmap_merge(&one.name, &bits, granularity))
            .map_err(|error| {
                Failure::new(format!(
                    "Failed to create bitmap {}: {}",
                    one.name,
                    message(&error)
                ))
            })?;
    }
    Ok(())
}
