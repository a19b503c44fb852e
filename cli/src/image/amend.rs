//! `amend`: changes what an image's header says.

use images::chain::Format;
use images::luks::FilePart;
use images::qcow2::{self, Amend, Encryption};
use images::tree::{self, Opener};

use super::args::{Args, Spec, flag, pairs, size, value};
use super::keys::Keys;
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

const QCOW2_HELP: &str = "Amend options for 'qcow2':
  backing_file=<str>     - File name of a base image
  backing_fmt=<str>      - Image format of the base image
  compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])
  data_file=<str>        - File name of an external data file
  data_file_raw=<bool (on/off)> - The external data file must stay valid as a raw image
  encrypt.iter-time=<num> - Time to spend in PBKDF in milliseconds
  encrypt.keyslot=<num>  - Select a single keyslot to modify explicitly
  encrypt.new-secret=<str> - New secret to set in the matching keyslots. Empty string to erase
  encrypt.old-secret=<str> - Select all keyslots that match this password
  encrypt.state=<str>    - Select new state of affected keyslots (active/inactive)
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates
  refcount_bits=<num>    - Width of a reference count entry in bits
  size=<size>            - Virtual disk size
";

const LUKS_HELP: &str = "Amend options for 'luks':
  iter-time=<num>        - Time to spend in PBKDF in milliseconds
  keyslot=<num>          - Select a single keyslot to modify explicitly
  new-secret=<str>       - New secret to set in the matching keyslots. Empty string to erase
  old-secret=<str>       - Select all keyslots that match this password
  state=<str>            - Select new state of affected keyslots (active/inactive)
";

#[derive(Default)]
struct Wanted {
    amend: Amend,
    size: Option<u64>,
    backing_file: Option<String>,
    backing_fmt: Option<String>,
    keys: Keys,
}

pub fn run(args: Args) -> Done {
    if args.get("options").is_none() {
        return Err(Failure::usage("amend", "Must specify options (-o)"));
    }
    let help = args
        .all("options")
        .any(|list| matches!(list.to_str(), Some("help" | "?")));
    if let Some(stated) = args.text("format").filter(|_| help) {
        return help_for(format(Some(&stated), "")?);
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
    if help {
        return help_for(layer.format);
    }
    let mut wanted = Wanted::default();
    match layer.format {
        Format::Raw => return Err(unsupported(Format::Raw)),
        Format::Luks => {
            for list in args.all("options") {
                wanted.read_luks(&list.to_string_lossy())?;
            }
        }
        Format::Qcow2 => {
            for list in args.all("options") {
                wanted.read(&list.to_string_lossy())?;
            }
        }
    }
    let header = layer.qcow2.as_ref().map(|image| image.header());
    if let Some(header) = &header {
        wanted.check_backing(header)?;
    }
    let encryption = match &header {
        None => Encryption::Luks {
            offset: 0,
            length: u64::MAX,
        },
        Some(header) => header.encryption,
    };
    if wanted.keys.any() && encryption == Encryption::None {
        return Err(Failure::new(
            "Can't amend encryption options - encryption not present",
        ));
    }
    let progress = Progress::new(args.has("progress") && !quiet, 1.0);
    if let (Some(image), Some(header)) = (&layer.qcow2, &header) {
        if wanted.amend.version == Some(2) && header.version > 2 {
            image.expand_zeroes(&progress.job())?;
        }
        if let Some(size) = wanted.size {
            images::Image::resize(&**image, size)?;
        }
    }
    // The header is changed while nobody has the image open, but nobody else may come between.
    drop(layer);
    let path = tree::local_path(&named.name)?;
    let file = tree::open_file(&path, true, direct, stable)?;
    let usage = images::lock::Usage::WRITE;
    images::lock::change(file.fd(), file.name(), images::lock::Usage::NONE, usage)?;
    if let (true, Encryption::Luks { offset, length }) = (wanted.keys.any(), encryption) {
        let place = FilePart {
            file: &file,
            start: offset,
            len: length.min(file.size()?.saturating_sub(offset)),
        };
        let secret = named.secret.as_deref();
        wanted
            .keys
            .apply(&place, secret, &secrets, args.has("force"))?;
    }
    if header.is_some() {
        qcow2::amend(&file, &wanted.amend).map_err(|error| Failure::new(message(&error)))?;
    }
    progress.end();
    Ok(0)
}

fn help_for(format: Format) -> Done {
    say(match format {
        Format::Qcow2 => QCOW2_HELP,
        Format::Luks => LUKS_HELP,
        Format::Raw => return Err(unsupported(format)),
    });
    Ok(0)
}

fn unsupported(format: Format) -> Failure {
    Failure::new(format!(
        "Format driver '{}' does not support option amendment",
        format.name()
    ))
}

impl Wanted {
    /// Another backing file is for `rebase`: here it would be another content.
    fn check_backing(&self, header: &qcow2::Header) -> Result<(), Failure> {
        let same_file = self
            .backing_file
            .as_ref()
            .is_none_or(|name| Some(std::ffi::OsStr::new(name)) == header.backing.as_deref());
        let same_format = self
            .backing_fmt
            .as_ref()
            .is_none_or(|name| Some(name) == header.backing_format.as_ref());
        if same_file && same_format {
            return Ok(());
        }
        Err(Failure::new(
            "Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.",
        ))
    }

    fn read_luks(&mut self, list: &str) -> Result<(), Failure> {
        for (name, value) in pairs(list, None) {
            if !self.keys.take(&name, &value)? {
                return Err(Failure::new(format!("Invalid parameter '{name}'")));
            }
        }
        Ok(())
    }

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
                other
                    if matches!(other.strip_prefix("encrypt."), Some(key)
                        if self.keys.take(key, &value)?) => {}
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
