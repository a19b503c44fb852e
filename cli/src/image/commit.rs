//! `commit`: an image's content into one behind it.

use images::commit::commit;
use images::tree::{self, Opener};

use super::args::{Args, Spec, flag, size, value};
use super::open::{self, FORMAT, HELP, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, Secrets};
use super::progress::Progress;
use super::{Done, Failure, say};

pub const SPECS: &[Spec] = &[
    HELP,
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    value('t', &["cache"]),
    value('b', &["base"]),
    flag('d', &["drop"]),
    value('r', &["rate"]),
];

pub fn run(args: Args) -> Done {
    let named = open::one_file(&args, "commit", "Expecting one image file name")?;
    let secrets = Secrets::of(&args)?;
    let quiet = args.has("quiet");
    let (direct, stable) = open::cache(args.text("cache").as_deref(), "cache")?;
    let rate = match args.text("rate") {
        None => 0,
        Some(text) => size(&text)
            .ok_or_else(|| Failure::new(format!("Invalid rate limit specified: '{text}'.")))?,
    };
    // Which one is to be written has to be known before anything is opened for writing.
    let look = Opener {
        metadata_only: true,
        ..Opener::default()
    };
    let mut paths: Vec<_> = named
        .open(&look, &secrets)?
        .into_iter()
        .map(|layer| (layer.path, layer.probed, layer.format))
        .collect();
    let depth = match args.get("base") {
        None if paths.len() < 2 => {
            return Err(Failure::new("Image does not have a backing file"));
        }
        None => 1,
        Some(base) => {
            let found = tree::local_path(base)
                .ok()
                .into_iter()
                .chain(tree::resolve(&paths[0].0, base))
                .find_map(|path| {
                    paths
                        .iter()
                        .skip(1)
                        .position(|one| tree::same_file(&one.0, &path))
                });
            match found {
                Some(at) => at + 1,
                None => {
                    return Err(Failure::new(format!(
                        "Did not find '{}' in the backing chain of '{}'",
                        base.to_string_lossy(),
                        named.name.to_string_lossy()
                    )));
                }
            }
        }
    };
    let drop = args.has("drop") || args.get("base").is_some();
    let (base_path, probed, base_format) = paths.swap_remove(depth);
    let layers = open::open_writable(
        &named,
        &Opener {
            also_writable: Some(&base_path),
            direct,
            stable,
            ..Opener::default()
        },
        &secrets,
        quiet,
    )?;
    let (Some(top), Some(base)) = (layers.first(), layers.get(depth)) else {
        return Err(Failure::new("Image does not have a backing file"));
    };
    if probed && base_format == images::chain::Format::Raw {
        guard(&*top.image, depth as u32)?;
    }
    let progress = Progress::new(args.has("progress") && !quiet, 1.0);
    let job = progress.job();
    job.set_speed(rate);
    commit(
        &top.image,
        depth as u32,
        &base.image,
        base.qcow2.as_ref(),
        &job,
    )?;
    if !drop && let Some(qcow2) = &top.qcow2 {
        qcow2.empty()?;
    }
    progress.end();
    if !quiet {
        say("Image committed.\n");
    }
    Ok(0)
}

/// A file that was only guessed to be raw must not be made to look like anything else: who opens
/// it next would guess that.
fn guard(top: &dyn images::Image, depth: u32) -> Result<(), Failure> {
    if top.size() == 0 {
        return Ok(());
    }
    let first = top.extent(0, top.size().min(512))?;
    if !first.present || first.depth >= depth {
        return Ok(());
    }
    let mut start = vec![0; top.size().min(512) as usize];
    images::read_bytes(top, 0, &mut start)?;
    match tree::looks_like(&start) {
        "raw" => Ok(()),
        other => Err(Failure::new(format!(
            "the backing file's format is not stated and was guessed to be raw, and what is to be \
             written to its beginning looks like {other}: state the format (rebase -u -F) first"
        ))),
    }
}
