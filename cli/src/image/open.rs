//! What the sub-commands share: opening images as the options say, secrets, messages.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::path::PathBuf;

use images::chain::Format;
use images::luks::Passphrase;
use images::tree::{Layer, Opener, Stable};
use images::{Error, File};

use super::Failure;
use super::args::{Args, Spec, flag, pairs, value};

pub const HELP: Spec = flag('h', &["help"]);
pub const QUIET: Spec = flag('q', &["quiet"]);
pub const PROGRESS: Spec = flag('p', &["progress"]);
pub const FORMAT: Spec = value('f', &["format"]);
pub const IMAGE_OPTS: Spec = flag('\0', &["image-opts"]);
pub const OBJECT: Spec = value('\0', &["object"]);
pub const SHARE: Spec = flag('U', &["force-share"]);
pub const OUTPUT: Spec = value('\0', &["output"]);

/// An error in qemu-img's manner.
pub fn message(error: &Error) -> String {
    match error {
        Error::Io { what, source } => format!("{what}: {}", system(source)),
        other => other.to_string(),
    }
}

/// What the system says, without its number.
pub fn system(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// Why an image can't be opened.
pub fn cannot_open(name: &OsStr, error: &Error) -> Failure {
    let name = name.to_string_lossy();
    let why = match error {
        Error::Io { what, source } if what.starts_with("opening ") => {
            format!("Could not open '{}': {}", &what[8..], system(source))
        }
        other => message(other),
    };
    Failure::new(format!("Could not open '{name}': {why}"))
}

/// `--object secret,...`: ids and what they stand for.
#[derive(Debug, Default)]
pub struct Secrets(Vec<(String, Passphrase)>);

impl Secrets {
    /// Those that were given.
    pub fn of(args: &Args) -> Result<Self, Failure> {
        let mut all = Vec::new();
        for object in args.all("object") {
            let object = object.to_string_lossy();
            let fields = pairs(&object, Some("qom-type"));
            let get = |name: &str| {
                fields
                    .iter()
                    .rev()
                    .find(|(field, _)| field == name)
                    .map(|(_, value)| value.as_str())
            };
            match get("qom-type") {
                Some("secret") => {}
                other => {
                    return Err(Failure::new(format!(
                        "Parameter 'qom-type' does not accept value '{}'",
                        other.unwrap_or_default()
                    )));
                }
            }
            let Some(id) = get("id") else {
                return Err(Failure::new("Parameter 'id' is missing"));
            };
            if let Some((name, _)) = fields.iter().find(|(name, _)| {
                !matches!(
                    name.as_str(),
                    "qom-type" | "id" | "data" | "file" | "format"
                )
            }) {
                return Err(Failure::new(format!("Parameter '{name}' is unexpected")));
            }
            let bytes = match (get("data"), get("file")) {
                (Some(data), None) => data.as_bytes().to_vec(),
                (None, Some(file)) => {
                    let mut bytes = Vec::new();
                    std::fs::File::open(file)
                        .and_then(|open| {
                            open.take(Passphrase::MOST as u64 * 2)
                                .read_to_end(&mut bytes)
                        })
                        .map_err(|error| {
                            Failure::new(format!("Unable to read {file}: {}", system(&error)))
                        })?;
                    bytes
                }
                _ => {
                    return Err(Failure::new(
                        "Either 'file' or 'data' must be provided, but not both",
                    ));
                }
            };
            let bytes = match get("format") {
                None | Some("raw") => bytes,
                Some("base64") => base64(&bytes)
                    .ok_or_else(|| Failure::new(format!("secret '{id}' is not valid base64")))?,
                Some(other) => {
                    return Err(Failure::new(format!(
                        "Parameter 'format' does not accept value '{other}'"
                    )));
                }
            };
            all.push((id.to_owned(), Passphrase::from(bytes)));
        }
        Ok(Self(all))
    }

    /// The secret of that id.
    pub fn get(&self, id: &str) -> Result<&Passphrase, Failure> {
        self.0
            .iter()
            .find(|(own, _)| own == id)
            .map(|(_, secret)| secret)
            .ok_or_else(|| Failure::new(format!("No secret with id '{id}'")))
    }
}

fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for &byte in text.iter().filter(|byte| !byte.is_ascii_whitespace()) {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => continue,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(out)
}

/// An image as it is named on the command line.
#[derive(Debug, Clone)]
pub struct Named {
    /// The file's name.
    pub name: OsString,
    /// Its format, if stated.
    pub format: Option<Format>,
    /// The id of what opens it.
    pub secret: Option<String>,
}

/// A format that was asked for by name.
pub fn format(name: &str, image: &OsStr) -> Result<Format, Failure> {
    Format::from_name(name).ok_or_else(|| {
        Failure::new(format!(
            "Could not open '{}': {}",
            image.to_string_lossy(),
            if KNOWN.contains(&name) {
                format!("the format '{name}' is not supported")
            } else {
                format!("Unknown driver '{name}'")
            }
        ))
    })
}

/// QEMU's formats that are not ours.
pub const KNOWN: [&str; 11] = [
    "vmdk",
    "vdi",
    "vhdx",
    "vpc",
    "qed",
    "qcow",
    "parallels",
    "bochs",
    "cloop",
    "dmg",
    "vvfat",
];

impl Named {
    /// The file `name`, of the format that was stated, or as a list of options says.
    pub fn new(name: &OsStr, stated: Option<&str>, image_opts: bool) -> Result<Self, Failure> {
        if !image_opts {
            return Ok(Self {
                name: name.to_owned(),
                format: stated.map(|stated| format(stated, name)).transpose()?,
                secret: None,
            });
        }
        if stated.is_some() {
            return Err(Failure::new(
                "--image-opts and --format are mutually exclusive",
            ));
        }
        let mut one = Self {
            name: OsString::new(),
            format: None,
            secret: None,
        };
        for (field, given) in pairs(&name.to_string_lossy(), Some("driver")) {
            match field.as_str() {
                "driver" => one.format = Some(format(&given, name)?),
                "filename" | "file.filename" => one.name = given.into(),
                "key-secret" | "encrypt.key-secret" => one.secret = Some(given),
                "encrypt.format" if given == "luks" => {}
                "file.driver" if given == "file" || given == "host_device" => {}
                _ => {
                    return Err(Failure::new(format!(
                        "Could not open '{}': the option '{field}={given}' is not supported",
                        name.to_string_lossy()
                    )));
                }
            }
        }
        if one.name.is_empty() {
            return Err(Failure::new(format!(
                "Could not open '{}': A block device must be specified for \"file\"",
                name.to_string_lossy()
            )));
        }
        Ok(one)
    }

    /// Opens it, and what is behind it.
    pub fn open(&self, how: &Opener<'_>, secrets: &Secrets) -> Result<Vec<Layer>, Failure> {
        let passphrase = match &self.secret {
            Some(id) => Some(secrets.get(id)?),
            None => None,
        };
        let opener = Opener {
            format: self.format,
            passphrase,
            ..*how
        };
        let layers = opener
            .open(&self.name)
            .map_err(|error| cannot_open(&self.name, &error))?;
        Ok(layers)
    }
}

/// Opens an image to write to it. Where its format was guessed to be raw the user is warned.
pub fn open_writable(
    named: &Named,
    how: &Opener<'_>,
    secrets: &Secrets,
    quiet: bool,
) -> Result<Vec<Layer>, Failure> {
    let layers = named.open(
        &Opener {
            writable: true,
            ..*how
        },
        secrets,
    )?;
    let guessed = layers
        .first()
        .is_some_and(|layer| layer.probed && layer.format == Format::Raw);
    if guessed && !quiet {
        eprintln!(
            "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         \
             Automatically detecting the format is dangerous for raw images, write operations on \
             block 0 will be restricted.\n         Specify the 'raw' format explicitly to remove \
             the restrictions.",
            named.name.to_string_lossy()
        );
    }
    Ok(layers)
}

/// The first of an image's layers.
pub fn first(layers: Vec<Layer>) -> Result<Layer, Failure> {
    layers
        .into_iter()
        .next()
        .ok_or_else(|| Failure::new("no image"))
}

/// `-t`, `-T`: O_DIRECT, and when what is written is on stable storage.
pub fn cache(mode: Option<&str>, what: &str) -> Result<(bool, Stable), Failure> {
    Ok(match mode {
        None | Some("writeback") => (false, Stable::Flushed),
        Some("unsafe") => (false, Stable::Never),
        Some("none" | "off") => (true, Stable::Flushed),
        Some("writethrough") => (false, Stable::Always),
        Some("directsync") => (true, Stable::Always),
        Some(other) => {
            return Err(Failure::new(format!("Invalid {what} option: {other}")));
        }
    })
}

/// `--output`: whether JSON is wanted.
pub fn json(args: &Args) -> Result<bool, Failure> {
    match args.text("output").as_deref() {
        None | Some("human") => Ok(false),
        Some("json") => Ok(true),
        Some(other) => Err(Failure::new(format!(
            "--output expects 'human' or 'json' not '{other}'"
        ))),
    }
}

/// The one file that is named.
pub fn one_file(args: &Args, command: &str, what: &str) -> Result<Named, Failure> {
    let [name] = &args.free[..] else {
        return Err(Failure::usage(command, what));
    };
    Named::new(name, args.text("format").as_deref(), args.has("image-opts"))
}

/// A new file, empty: what was there before is overwritten.
pub fn new_file(path: &PathBuf) -> Result<File, Failure> {
    let could_not =
        |why: String| Failure::new(format!("Could not create '{}': {why}", path.display()));
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|error| could_not(system(&error)))?;
    let file = File::new(file.into(), path.display().to_string())
        .map_err(|error| could_not(message(&error)))?;
    // Nobody's image is overwritten while he uses it.
    images::lock::change(
        file.fd(),
        file.name(),
        images::lock::Usage::NONE,
        images::lock::Usage::WRITE,
    )
    .map_err(|error| could_not(message(&error)))?;
    if !file.is_block_device() {
        file.set_len(0)
            .map_err(|error| could_not(message(&error)))?;
    }
    Ok(file)
}
