//! `amend`: changes what an image's header says.

use images::chain::Format;
use images::qcow2::{self, Amend};
use images::tree::{self, Opener};

use super::args::{Args, Spec, flag, pairs, size, value};
use super::open::{self, FORMAT, HELP, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, Secrets, message};
use super::options::{Given, format};
use super::progress::Progress;
use super::{Done, Failure, say};

pub const SPECS: &[Spec] = &[
    HELP,
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    value('o', &["options"]),
    value('t', &["cache"]),
    flag('\0', &["force"]),
];

const HELP_TEXT: &str = "Amend options for 'qcow2':
  backing_file=<str>     - File name of a base image
  backing_fmt=<str>      - Image format of the base image
  compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])
  data_file=<str>        - File name of an external data file
  data_file_raw=<bool (on/off)> - The external data file must stay valid as a raw image
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates
  refcount_bits=<num>    - Width of a reference count entry in bits
  size=<size>            - Virtual disk size
";

#[derive(Default)]
struct Wanted {
    amend: Amend,
    size: Option<u64>,
    backing_file: Option<String>,
    backing_fmt: Option<String>,
}

pub fn run(args: Args) -> Done {
    if args.get("options").is_none() {
        return Err(Failure::usage("amend", "Must specify options (-o)"));
    }
    if args
        .all("options")
        .any(|list| matches!(list.to_str(), Some("help" | "?")))
    {
        let wanted = format(args.text("format").as_deref(), "")?;
        if wanted != Format::Qcow2 {
            return Err(unsupported(wanted));
        }
        say(HELP_TEXT);
        return Ok(0);
    }
    let named = open::one_file(&args, "amend", "Expecting one image file name")?;
    let quiet = args.has("quiet");
    let secrets = Secrets::of(&args)?;
    let (direct, stable) = open::cache(args.text("cache").as_deref(), "cache")?;
    let opener = Opener {
        direct,
        stable,
        ..Opener::default()
    };
    let layer = open::first(open::open_writable(&named, &opener, &secrets, quiet)?)?;
    let Some(image) = layer.qcow2.clone() else {
        return Err(unsupported(layer.format));
    };
    let mut wanted = Wanted::default();
    for list in args.all("options") {
        wanted.read(&list.to_string_lossy())?;
    }
    if wanted.backing_file.is_some() || wanted.backing_fmt.is_some() {
        let header = image.header();
        let name = match wanted.backing_file {
            Some(name) => Some(name.into()),
            None => header.backing,
        };
        let format = wanted.backing_fmt.or(header.backing_format);
        wanted.amend.backing = Some(
            name.filter(|name: &std::ffi::OsString| !name.is_empty())
                .map(|name| (name, format)),
        );
    }
    let progress = Progress::new(args.has("progress") && !quiet, 1.0);
    if wanted.amend.version == Some(2) && image.header().version > 2 {
        image.expand_zeroes(&progress.job())?;
    }
    if let Some(size) = wanted.size {
        images::Image::resize(&*image, size)?;
    }
    // The header is changed while nobody has the image open, but nobody else may come between.
    drop(layer);
    drop(image);
    let path = tree::local_path(&named.name)?;
    let file = tree::open_file(&path, true, direct, stable)?;
    let usage = images::lock::Usage::WRITE;
    images::lock::change(file.fd(), file.name(), images::lock::Usage::NONE, usage)?;
    qcow2::amend(&file, &wanted.amend).map_err(|error| Failure::new(message(&error)))?;
    progress.end();
    Ok(0)
}

fn unsupported(format: Format) -> Failure {
    Failure::new(format!(
        "Format driver '{}' does not support option amendment",
        format.name()
    ))
}

impl Wanted {
    fn read(&mut self, list: &str) -> Result<(), Failure> {
        let bad = |name: &str, value: &str| {
            Failure::new(format!(
                "Parameter '{name}' does not accept value '{value}'"
            ))
        };
        for (name, value) in pairs(list, None) {
            let on = || match value.as_str() {
                "on" => Ok(true),
                "off" => Ok(false),
                _ => Err(Failure::new(format!(
                    "Parameter '{name}' expects 'on' or 'off'"
                ))),
            };
            match name.as_str() {
                "backing_file" => self.backing_file = Some(value),
                "backing_fmt" => self.backing_fmt = Some(value),
                "compat" => {
                    self.amend.version = Some(match value.as_str() {
                        "0.10" | "v2" => 2,
                        "1.1" | "v3" => 3,
                        _ => {
                            return Err(Failure::new(format!(
                                "Unknown compatibility level {value}"
                            )));
                        }
                    });
                }
                "data_file" => self.amend.data_file = Some(value.into()),
                "data_file_raw" => self.amend.data_file_raw = Some(on()?),
                "lazy_refcounts" => self.amend.lazy_refcounts = Some(on()?),
                "refcount_bits" => {
                    let bits = value.parse().map_err(|_| bad(&name, &value))?;
                    self.amend.refcount_bits = Some(bits);
                }
                "size" => self.size = Some(size(&value).ok_or_else(|| bad(&name, &value))?),
                _ if Given::new(Format::Qcow2).knows(&name) => {
                    return Err(Failure::new(format!(
                        "Invalid parameter '{name}'\nThis option is only supported for image \
                         creation"
                    )));
                }
                _ => return Err(Failure::new(format!("Invalid parameter '{name}'"))),
            }
        }
        Ok(())
    }
}
