//! `compare`: whether two images have the same content.

use images::compare::{Outcome, compare};
use images::convert::threads;
use images::tree::Opener;

use super::args::{Args, Spec, flag, value};
use super::open::{self, HELP, IMAGE_OPTS, Named, OBJECT, PROGRESS, QUIET, SHARE, Secrets};
use super::progress::Progress;
use super::{Done, Failure, say};

pub const SPECS: &[Spec] = &[
    HELP,
    QUIET,
    PROGRESS,
    IMAGE_OPTS,
    OBJECT,
    SHARE,
    value('f', &["a-format", "format"]),
    value('F', &["b-format"]),
    value('T', &["cache"]),
    flag('s', &["strict"]),
];

pub fn run(args: Args) -> Done {
    let [a, b] = &args.free[..] else {
        return Err(Failure::usage("compare", "Expecting two image file names"));
    };
    let secrets = Secrets::of(&args)?;
    let (direct, stable) = open::cache(args.text("cache").as_deref(), "source cache")?;
    let opener = Opener {
        share: args.has("force-share"),
        direct,
        stable,
        ..Opener::default()
    };
    let open = |name, format| {
        Named::new(name, args.text(format).as_deref(), args.has("image-opts"))
            .and_then(|named| named.open(&opener, &secrets))
            .and_then(open::first)
            .map_err(|failure| failure.code(2))
    };
    let (a, b) = (open(a, "a-format")?, open(b, "b-format")?);
    let quiet = args.has("quiet");
    let print = |what: &str| {
        if !quiet {
            say(what);
        }
    };
    let differ = a.image.size() != b.image.size();
    let strict = args.has("strict");
    if strict && differ {
        print("Strict mode: Image size mismatch!\n");
        return Ok(1);
    }
    let progress = Progress::new(args.has("progress") && !quiet, 2.0);
    let job = progress.job();
    let found = compare(&*a.image, &*b.image, strict, threads(4), &job)
        .map_err(|error| Failure::from(error).code(3))?;
    let code = match found {
        Outcome::Differ { at, tail } => {
            if tail {
                print("Warning: Image size mismatch!\n");
            }
            print(&format!("Content mismatch at offset {at}!\n"));
            1
        }
        Outcome::Status { at } => {
            print(&format!(
                "Strict mode: Offset {at} block status mismatch!\n"
            ));
            1
        }
        Outcome::Same => {
            if differ {
                print("Warning: Image size mismatch!\n");
            }
            print("Images are identical.\n");
            0
        }
    };
    progress.end();
    Ok(code)
}
