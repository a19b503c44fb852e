//! `rebase`: another backing file for an image.

use std::sync::Arc;

use images::Image;
use images::chain::Format;
use images::rebase::rebase;
use images::tree::{self, Opener};

use super::args::{Args, Spec, flag, value};
use super::open::{
    self, FORMAT, HELP, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, SHARE, Secrets, message, system,
};
use super::progress::Progress;
use super::{Done, Failure};

pub const SPECS: &[Spec] = &[
    HELP,
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    SHARE,
    value('t', &["cache"]),
    value('b', &["backing"]),
    value('F', &["backing-format"]),
    value('T', &["backing-cache"]),
    flag('u', &["backing-unsafe"]),
    flag('c', &["compress"]),
];

pub fn run(args: Args) -> Done {
    let named = open::one_file(&args, "rebase", "Expecting one image file name")?;
    let unchecked = args.has("backing-unsafe");
    if !unchecked && args.get("backing").is_none() {
        let what = "Must specify backing file (-b) or use unsafe mode (-u)";
        return Err(Failure::usage("rebase", what));
    }
    let quiet = args.has("quiet");
    let secrets = Secrets::of(&args)?;
    let (direct, stable) = open::cache(args.text("cache").as_deref(), "cache")?;
    let (base_direct, base_stable) =
        open::cache(args.text("backing-cache").as_deref(), "source cache")?;
    let opener = Opener {
        share: args.has("force-share"),
        no_backing: unchecked,
        direct,
        stable,
        ..Opener::default()
    };
    let layers = open::open_writable(&named, &opener, &secrets, quiet)?;
    let name = args.get("backing").filter(|name| !name.is_empty());
    let format = args.text("backing-format");
    let shown = name.map(|name| name.to_string_lossy().into_owned());
    let cannot = |why: &str| {
        Failure::new(match &shown {
            Some(name) => format!("Could not change the backing file to '{name}': {why}"),
            None => format!("Could not remove the backing file: {why}"),
        })
    };
    if name.is_some() && format.is_none() {
        return Err(cannot("backing format must be specified"));
    }
    let Some(layer) = layers.first() else {
        return Err(Failure::new("no image"));
    };
    let Some(image) = layer.qcow2.clone() else {
        return Err(cannot("Operation not supported"));
    };
    if !unchecked {
        let progress = Progress::new(args.has("progress") && !quiet, 1.0);
        let mut new: Option<Arc<dyn Image>> = None;
        let mut shared = None;
        if let Some(name) = name {
            let path = tree::resolve(&layer.path, name)?;
            let wanted = match &format {
                Some(format) => Some(open::format(format, name)?),
                None => None::<Format>,
            };
            // A file that is behind the image already is opened once, with what is behind it.
            let known = layers
                .iter()
                .position(|one| tree::same_file(&one.path, &path))
                .filter(|&depth| depth > 0 && wanted == Some(layers[depth].format));
            match known {
                Some(depth) => {
                    new = Some(layers[depth].image.clone());
                    shared = Some(depth as u32);
                }
                None => {
                    let opener = Opener {
                        format: wanted,
                        share: args.has("force-share"),
                        direct: base_direct,
                        stable: base_stable,
                        ..Opener::default()
                    };
                    let opened = opener.open(path.as_os_str()).map_err(|error| {
                        let why = match &error {
                            images::Error::Io { what, source } if what.starts_with("opening ") => {
                                format!("Could not open '{}': {}", &what[8..], system(source))
                            }
                            other => message(other),
                        };
                        Failure::new(format!(
                            "Could not open new backing file '{}': {why}",
                            name.to_string_lossy()
                        ))
                    })?;
                    new = opened.into_iter().next().map(|layer| layer.image);
                }
            }
        }
        let job = progress.job();
        rebase(&image, new.as_ref(), shared, args.has("compress"), &job)?;
        progress.end();
    }
    image
        .set_backing(name.map(|name| (name.to_owned(), format)))
        .map_err(|error| cannot(&message(&error)))?;
    Ok(0)
}
