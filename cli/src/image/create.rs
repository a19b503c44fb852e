//! `create`: a new image.

use std::ffi::OsStr;

use images::tree::{self, Opener, Stable};

use super::args::{Args, Spec, flag, size, value};
use super::open::{FORMAT, HELP, Named, OBJECT, QUIET, Secrets, message, system};
use super::options::{Given, format, help};
use super::{Done, Failure, say};

pub const SPECS: &[Spec] = &[
    HELP,
    QUIET,
    FORMAT,
    OBJECT,
    value('o', &["options"]),
    value('b', &["backing"]),
    value('F', &["backing-format"]),
    flag('u', &["backing-unsafe"]),
];

/// The size that was asked for on the command line.
pub fn asked_size(text: &str) -> Result<u64, Failure> {
    let range = || {
        Failure::new(format!(
            "Invalid image size specified. Must be between 0 and {}.",
            i64::MAX
        ))
    };
    if text.starts_with('-') {
        return Err(range());
    }
    match size(text) {
        Some(bytes) if bytes <= i64::MAX as u64 => Ok(bytes),
        Some(_) => Err(range()),
        None => Err(Failure::new(format!(
            "Invalid image size specified: '{text}'."
        ))),
    }
}

pub fn run(args: Args) -> Done {
    let wanted = format(
        args.text("format").as_deref(),
        &args
            .free
            .first()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
    )?;
    if args
        .all("options")
        .any(|list| matches!(list.to_str(), Some("help" | "?")))
    {
        say(&help(wanted));
        return Ok(0);
    }
    let secrets = Secrets::of(&args)?;
    let Some(name) = args.free.first() else {
        return Err(Failure::usage("create", "Expecting image file name"));
    };
    if let Some(extra) = args.free.get(2) {
        let what = format!("Unexpected argument: {}", extra.to_string_lossy());
        return Err(Failure::usage("create", what));
    }
    let shown = name.to_string_lossy().into_owned();
    let mut given = Given::new(wanted);
    for list in args.all("options") {
        given.add(&list.to_string_lossy(), &format!("{shown}: "))?;
    }
    if let Some(text) = args.free.get(1) {
        given.set("size", asked_size(&text.to_string_lossy())?.to_string());
    }
    let bad = |what: String| Failure::new(format!("{shown}: {what}"));
    if let Some(backing) = args.text("backing") {
        if !given.knows("backing_file") {
            return Err(bad(format!(
                "Backing file not supported for file format '{}'",
                wanted.name()
            )));
        }
        given.set("backing_file", backing);
    }
    if let Some(format) = args.text("backing-format") {
        if !given.knows("backing_fmt") {
            return Err(bad(format!(
                "Backing format not supported for file format '{}'",
                wanted.name()
            )));
        }
        given.set("backing_fmt", format);
    }
    if let Some(backing) = given.get("backing_file").map(str::to_owned) {
        look_at_backing(name, &backing, &mut given, args.has("backing-unsafe")).map_err(bad)?;
    }
    if given.size().is_none() {
        return Err(bad("Image creation needs a size parameter".into()));
    }
    if !args.has("quiet") {
        say(&given.line(&shown));
    }
    given
        .create(name, &secrets, Stable::default())
        .map_err(bad)?;
    Ok(0)
}

/// The backing file must be there and of the format that is stated, and it says how large the new
/// image is unless the user does.
fn look_at_backing(
    name: &OsStr,
    backing: &str,
    given: &mut Given,
    unchecked: bool,
) -> Result<(), String> {
    let stated = given.get("backing_fmt").map(str::to_owned);
    if backing.is_empty() {
        return Err("Expected backing file name, got empty string".into());
    }
    let no_format = "Backing file specified without backing format";
    if unchecked {
        return if stated.is_none() {
            Err(no_format.into())
        } else {
            Ok(())
        };
    }
    let path = tree::local_path(name)
        .and_then(|path| tree::resolve(&path, backing.as_ref()))
        .map_err(|error| message(&error))?;
    if tree::local_path(name).is_ok_and(|own| tree::same_file(&own, &path)) {
        return Err(
            "Error: Trying to create an image with the same filename as the backing file".into(),
        );
    }
    let named =
        Named::new(path.as_os_str(), stated.as_deref(), false).map_err(super::options::words)?;
    let opener = Opener {
        format: named.format,
        metadata_only: true,
        ..Opener::default()
    };
    let layers = opener.open(path.as_os_str()).map_err(|error| {
        let why = match &error {
            images::Error::Io { what, source } if what.starts_with("opening ") => {
                format!("Could not open '{}': {}", &what[8..], system(source))
            }
            other => message(other),
        };
        format!("{why}\nCould not open backing image.")
    })?;
    let Some(first) = layers.first() else {
        return Err("Could not open backing image.".into());
    };
    if stated.is_none() {
        return Err(format!(
            "{no_format}\nDetected format of {}.",
            first.format.name()
        ));
    }
    if given.size().is_none() {
        given.set("size", first.image.size().to_string());
    }
    Ok(())
}
