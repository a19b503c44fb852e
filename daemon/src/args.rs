//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// What `--help` prints.
pub const HELP: &str = "\
Usage: vireod [OPTIONS]

The daemon of Vireo: manages domains for clients that speak libvirt's protocol.

Options:
      --root DIR      keep everything below DIR instead of /etc, /var and /run
                      (default: the environment variable VIREO_ROOT)
      --config FILE   the settings (default: vireod.conf below /etc/vireo)
      --listen-tcp ADDRESS:PORT
                      serve everybody who reaches that port, too
      --listen-tls ADDRESS:PORT
                      serve clients with a certificate there, too
      --timeout SECS  end after SECS seconds without clients and running domains
  -v, --verbose       log more; twice: log everything
      --version       print the version and end
  -h, --help          print this and end
";

/// The command line, understood.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Args {
    /// `--root`
    pub root: Option<PathBuf>,
    /// `--config`
    pub config: Option<PathBuf>,
    /// `--listen-tcp`
    pub listen_tcp: Option<String>,
    /// `--listen-tls`
    pub listen_tls: Option<String>,
    /// `--timeout`
    pub timeout: Option<Duration>,
    /// How often `-v` was given.
    pub verbose: u8,
    /// What to print instead of running.
    pub print: Option<Print>,
}

/// Something to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Print {
    /// [`HELP`]
    Help,
    /// Name and version.
    Version,
    /// The names of all procedures that are answered.
    Procedures,
}

/// Reads the arguments after the program's name.
///
/// # Errors
/// What is wrong, for people.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Args, String> {
    let mut parsed = Args::default();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy().into_owned();
        let (name, mut inline) = match text.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(OsString::from(value))),
            _ => (text.as_str(), None),
        };
        let mut value = |name: &str| {
            inline
                .take()
                .or_else(|| args.next())
                .ok_or_else(|| format!("option '{name}' needs a value"))
        };
        match name {
            "--root" => parsed.root = Some(PathBuf::from(value(name)?)),
            "--config" => parsed.config = Some(PathBuf::from(value(name)?)),
            "--listen-tcp" => parsed.listen_tcp = Some(address(&value(name)?)?),
            "--listen-tls" => parsed.listen_tls = Some(address(&value(name)?)?),
            "--timeout" => {
                let text = value(name)?;
                let seconds = text.to_str().and_then(|s| s.parse::<u32>().ok());
                let seconds = seconds
                    .filter(|&s| s > 0)
                    .ok_or_else(|| format!("'{}' is no number of seconds", text.display()))?;
                parsed.timeout = Some(Duration::from_secs(seconds.into()));
            }
            // The daemon never leaves the foreground; scripts may say that they rely on it.
            "--foreground" => {}
            "-v" | "--verbose" => parsed.verbose = parsed.verbose.saturating_add(1),
            "-vv" => parsed.verbose = 2,
            "-V" | "--version" => parsed.print = Some(Print::Version),
            // For the documentation.
            "--procedures" => parsed.print = Some(Print::Procedures),
            "-h" | "--help" => parsed.print = Some(Print::Help),
            _ => return Err(format!("unknown argument '{text}'")),
        }
        if inline.is_some() {
            return Err(format!("option '{name}' takes no value"));
        }
    }
    Ok(parsed)
}

fn address(text: &OsString) -> Result<String, String> {
    text.to_str()
        .filter(|text| {
            let port = text.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
            matches!(port, Some(Ok(_)))
        })
        .map(str::to_owned)
        .ok_or_else(|| format!("'{}' is no ADDRESS:PORT", text.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(args: &[&str]) -> Result<Args, String> {
        parse(args.iter().map(OsString::from))
    }

    #[test]
    fn options_are_read() {
        let args = of(&["--root", "/x", "--timeout=30", "-v", "--foreground"]).unwrap();
        assert_eq!(args.root, Some(PathBuf::from("/x")));
        assert_eq!(args.timeout, Some(Duration::from_secs(30)));
        assert_eq!(args.verbose, 1);
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(of(&["--root"]).unwrap_err().contains("needs a value"));
        assert!(of(&["--timeout", "x"]).unwrap_err().contains("'x'"));
        assert!(of(&["--timeout", "0"]).is_err());
        assert!(of(&["--help=1"]).unwrap_err().contains("no value"));
        assert!(
            of(&["--listen-tcp", "x"])
                .unwrap_err()
                .contains("ADDRESS:PORT")
        );
        assert!(of(&["frob"]).unwrap_err().contains("'frob'"));
    }
}
