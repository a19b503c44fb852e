//! What a client is told when a call fails: libvirt's error numbers, domains and wording.

use std::fmt;
use std::io;

pub use rpc::error::{ErrorCode, ErrorDomain, RemoteError};

/// An error on its way to a client: small, unlike [`RemoteError`], which it becomes there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// virErrorNumber.
    pub code: ErrorCode,
    /// virErrorDomain.
    pub domain: ErrorDomain,
    /// The whole message, as a person reads it.
    pub message: String,
}

/// A call's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of the domain driver, in libvirt's words.
    pub fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self::of(ErrorDomain::QEMU, code, detail)
    }

    /// An error of any part, in libvirt's words.
    pub fn of(domain: ErrorDomain, code: ErrorCode, detail: impl Into<String>) -> Self {
        Self {
            code,
            domain,
            message: RemoteError::new(code, domain, detail).message().to_owned(),
        }
    }

    /// The host's system refused something.
    pub fn system(what: impl fmt::Display, error: &io::Error) -> Self {
        let reason = plain(error);
        Self::new(ErrorCode::SYSTEM_ERROR, format!("{what}: {reason}"))
    }

    /// VIR_ERR_INVALID_ARG in the words of the functions of libvirt's library, which check their arguments first.
    pub fn argument(message: impl Into<String>) -> Self {
        Self {
            code: ErrorCode::INVALID_ARG,
            domain: ErrorDomain::DOMAIN,
            message: message.into(),
        }
    }

    /// VIR_ERR_OPERATION_INVALID.
    pub fn invalid(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::OPERATION_INVALID, detail)
    }

    /// VIR_ERR_OPERATION_FAILED.
    pub fn failed(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::OPERATION_FAILED, detail)
    }

    /// VIR_ERR_INTERNAL_ERROR.
    pub fn internal(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::INTERNAL_ERROR, detail)
    }

    /// VIR_ERR_CONFIG_UNSUPPORTED.
    pub fn unsupported(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::CONFIG_UNSUPPORTED, detail)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<xml_schemas::XmlError> for Error {
    fn from(error: xml_schemas::XmlError) -> Self {
        Self {
            code: ErrorCode(error.code().number()),
            domain: ErrorDomain(error.domain().number()),
            message: error.to_string(),
        }
    }
}

impl From<Error> for RemoteError {
    fn from(error: Error) -> Self {
        const LEVEL_ERROR: i32 = 2;
        rpc::error::ErrorBody {
            code: error.code,
            domain: error.domain,
            message: Some(error.message.replace('\0', "\u{fffd}")),
            level: LEVEL_ERROR,
            int1: -1,
            int2: -1,
            ..Default::default()
        }
        .into()
    }
}

/// The system's own words for an error, without Rust's "(os error N)".
pub fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(end) if error.raw_os_error().is_some() => text[..end].to_owned(),
        _ => text,
    }
}

/// The part of libvirt that a function belongs to.
fn whose(function: &str) -> ErrorDomain {
    let parts = [
        ("network", ErrorDomain::NETWORK),
        ("storage", ErrorDomain::STORAGE),
        ("secret", ErrorDomain::SECRET),
        ("nodeDevice", ErrorDomain::NODEDEV),
        ("virDomain", ErrorDomain::DOMAIN),
        ("vir", ErrorDomain::NONE),
    ];
    let found = parts.iter().find(|(name, _)| function.starts_with(name));
    found.map_or(ErrorDomain::QEMU, |(_, domain)| *domain)
}

/// Refuses flag bits outside `known`, as libvirt's `virCheckFlags` does.
///
/// # Errors
/// VIR_ERR_INVALID_ARG naming the bits and the function.
pub fn check_flags(flags: u32, known: u32, function: &str) -> Result<()> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Error {
            code: ErrorCode::INVALID_ARG,
            domain: whose(function),
            message: format!("unsupported flags (0x{unknown:x}) in function {function}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_libvirts() {
        let error = Error::invalid("domain is not running");
        assert_eq!((error.code.0, error.domain.0), (55, 10));
        assert_eq!(
            error.message,
            "Requested operation is not valid: domain is not running"
        );
        let error = Error::system("cannot write 'x'", &io::Error::from_raw_os_error(28));
        assert_eq!(error.message, "cannot write 'x': No space left on device");
        assert_eq!(error.code.0, 38);
    }

    #[test]
    fn unknown_flags_are_named() {
        assert!(check_flags(3, 3, "f").is_ok());
        let error = check_flags(0x0c, 0x04, "virDomainThing").unwrap_err();
        assert_eq!(
            error.message,
            "unsupported flags (0x8) in function virDomainThing"
        );
    }
}
