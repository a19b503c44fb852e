//! `resize`.

use images::chain::Format;
use images::qcow2::Preallocation;
use images::tree::Opener;

use super::args::{Args, Spec, flag, size, value};
use super::open::{self, FORMAT, HELP, IMAGE_OPTS, Named, OBJECT, QUIET, Secrets, message};
use super::{Done, Failure, error, say};

pub const SPECS: &[Spec] = &[
    HELP,
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    flag('\0', &["shrink"]),
    value('\0', &["preallocation"]),
];

pub fn run(mut args: Args) -> Done {
    let missing = || Failure::usage("resize", "Expecting image file name and size");
    if args.free.len() > 2 {
        return Err(missing());
    }
    let asked = args.free.pop().ok_or_else(missing)?;
    let [name] = &args.free[..] else {
        return Err(missing());
    };
    let asked = asked.to_string_lossy().into_owned();
    let (sign, number) = match asked.split_at_checked(1) {
        Some(("+", rest)) => (1, rest),
        Some(("-", rest)) => (-1, rest),
        _ => (0, asked.as_str()),
    };
    let bytes = size(number).ok_or_else(|| {
        Failure::new(
            "Parameter 'size' expects a non-negative number below 2^64\nOptional suffix k, M, G, \
             T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.",
        )
    })?;
    let how = match args.text("preallocation").as_deref() {
        None | Some("off") => Preallocation::Off,
        Some("metadata") => Preallocation::Metadata,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        Some(other) => {
            return Err(Failure::new(format!(
                "Invalid preallocation mode '{other}'"
            )));
        }
    };
    let named = Named::new(name, args.text("format").as_deref(), args.has("image-opts"))?;
    let secrets = Secrets::of(&args)?;
    let quiet = args.has("quiet");
    let layer = open::first(open::open_writable(
        &named,
        &Opener::default(),
        &secrets,
        quiet,
    )?)?;
    let old = layer.image.size();
    let new = match sign {
        1 => old.checked_add(bytes),
        -1 => old.checked_sub(bytes),
        _ => Some(bytes),
    };
    let Some(new) = new.filter(|&new| new > 0 && new <= i64::MAX as u64) else {
        return Err(Failure::new("New image size must be positive"));
    };
    if how != Preallocation::Off && new <= old {
        return Err(Failure::new(
            "Preallocation can only be used for growing images",
        ));
    }
    if new < old && !args.has("shrink") {
        error("Use the --shrink option to perform a shrink operation.");
        error(
            "warning: Shrinking an image will delete all data beyond the shrunken image's end. \
             Before performing such an operation, make sure there is no important data there.",
        );
        return Ok(1);
    }
    let new = if layer.format == Format::Raw {
        new
    } else {
        new.next_multiple_of(512)
    };
    let done = match (&layer.qcow2, &layer.raw, how) {
        (Some(qcow2), _, how) => qcow2.grow(new, how),
        (_, Some(raw), Preallocation::Falloc | Preallocation::Full) => {
            raw.grow(new, how == Preallocation::Full)
        }
        (_, _, Preallocation::Off) => layer.image.resize(new),
        _ => {
            return Err(Failure::new(format!(
                "Unsupported preallocation mode '{}'",
                args.text("preallocation").unwrap_or_default()
            )));
        }
    };
    done.and_then(|()| layer.image.flush())
        .map_err(|error| Failure::new(message(&error)))?;
    if !quiet {
        say("Image resized.\n");
    }
    Ok(0)
}
