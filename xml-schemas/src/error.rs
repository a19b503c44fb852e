//! What a refused document says, and libvirt's numbers for it.

use std::fmt;

/// libvirt's error numbers (virErrorNumber) that documents can earn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// VIR_ERR_INTERNAL_ERROR: libvirt's own choice for some malformed elements.
    Internal = 1,
    /// VIR_ERR_INVALID_ARG.
    InvalidArg = 8,
    /// VIR_ERR_OS_TYPE.
    OsType = 16,
    /// VIR_ERR_NO_SOURCE: a disk without a source.
    NoSource = 19,
    /// VIR_ERR_NO_TARGET: a disk without a target.
    NoTarget = 20,
    /// VIR_ERR_NO_NAME: no name element.
    NoName = 21,
    /// VIR_ERR_XML_ERROR: not well-formed, or a value libvirt's parser refuses.
    Xml = 27,
    /// VIR_ERR_XML_DETAIL: an object described wrongly.
    XmlDetail = 35,
    /// VIR_ERR_SYSTEM_ERROR: libvirt's own choice for an address that is none.
    System = 38,
    /// VIR_ERR_OPERATION_INVALID: it does not fit what is there.
    OperationInvalid = 55,
    /// VIR_ERR_CONFIG_UNSUPPORTED: understood, but not offered here.
    ConfigUnsupported = 67,
    /// VIR_ERR_OVERFLOW: a number beyond what can be represented.
    Overflow = 82,
    /// VIR_ERR_OPERATION_UNSUPPORTED.
    OperationUnsupported = 84,
    /// VIR_ERR_XML_INVALID_SCHEMA: the schema does not allow it.
    InvalidSchema = 92,
}

impl ErrorCode {
    /// The number that goes over the wire.
    pub fn number(self) -> i32 {
        self as i32
    }

    /// What libvirt puts before a message with this number.
    fn prefix(self) -> &'static str {
        match self {
            Self::Internal => "internal error: ",
            Self::InvalidArg => "invalid argument: ",
            Self::OsType => "unknown OS type ",
            Self::NoName | Self::NoSource | Self::NoTarget => "",
            Self::Xml => "XML error: ",
            Self::XmlDetail | Self::System => "",
            Self::OperationInvalid => "Requested operation is not valid: ",
            Self::OperationUnsupported => "Operation not supported: ",
            Self::ConfigUnsupported => "unsupported configuration: ",
            Self::Overflow => "numerical overflow: ",
            Self::InvalidSchema => "XML document failed to validate against schema: ",
        }
    }
}

/// libvirt's error domains (virErrorDomain) that documents can earn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorDomain {
    /// VIR_FROM_NONE.
    None = 0,
    /// VIR_FROM_XML: the text itself.
    Xml = 5,
    /// VIR_FROM_STORAGE: a pool or volume.
    Storage = 18,
    /// VIR_FROM_NETWORK: a network definition.
    Network = 19,
    /// VIR_FROM_DOMAIN: a domain definition.
    Domain = 20,
    /// VIR_FROM_SECRET.
    Secret = 30,
    /// VIR_FROM_CPU: a CPU description.
    Cpu = 31,
    /// VIR_FROM_DOMAIN_SNAPSHOT.
    DomainSnapshot = 35,
    /// VIR_FROM_CAPABILITIES.
    Capabilities = 44,
}

impl ErrorDomain {
    /// The number that goes over the wire.
    pub fn number(self) -> i32 {
        self as i32
    }
}

/// Why a document was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XmlError {
    code: ErrorCode,
    domain: ErrorDomain,
    message: String,
    line: Option<u32>,
}

impl XmlError {
    /// An error whose message gets the words libvirt begins such a message with.
    pub fn new(code: ErrorCode, domain: ErrorDomain, message: impl fmt::Display) -> Self {
        Self {
            code,
            domain,
            message: format!("{}{message}", code.prefix()),
            line: None,
        }
    }

    /// An error whose message is already whole.
    pub(crate) fn verbatim(code: ErrorCode, domain: ErrorDomain, message: String) -> Self {
        Self {
            code,
            domain,
            message,
            line: None,
        }
    }

    /// VIR_ERR_XML_ERROR in a domain definition.
    pub(crate) fn xml(message: impl fmt::Display) -> Self {
        Self::new(ErrorCode::Xml, ErrorDomain::Domain, message)
    }

    /// VIR_ERR_CONFIG_UNSUPPORTED in a domain definition.
    pub(crate) fn unsupported(message: impl fmt::Display) -> Self {
        Self::new(ErrorCode::ConfigUnsupported, ErrorDomain::Domain, message)
    }

    /// VIR_ERR_INTERNAL_ERROR in a domain definition, where libvirt says so.
    pub(crate) fn internal(message: impl fmt::Display) -> Self {
        Self::new(ErrorCode::Internal, ErrorDomain::Domain, message)
    }

    /// Without the line: the text is not the one that somebody has written.
    #[must_use]
    pub fn nowhere(mut self) -> Self {
        self.line = None;
        self
    }

    /// Names the line at fault (1-based; 0 means unknown and is left out).
    #[must_use]
    pub fn at(mut self, line: u32) -> Self {
        if line > 0 && self.line.is_none() {
            self.line = Some(line);
        }
        self
    }

    /// libvirt's error number.
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// libvirt's error domain.
    pub fn domain(&self) -> ErrorDomain {
        self.domain
    }

    /// The line at fault, 1-based, if there is one.
    pub fn line(&self) -> Option<u32> {
        self.line
    }
}

impl fmt::Display for XmlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match self.line {
            // The parser's own messages begin with the line, as libxml2's do.
            Some(line) if !self.message.starts_with('(') => write!(f, " (line {line})"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for XmlError {}

/// Something a lenient parse kept out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// What, and where in the document.
    pub message: String,
    /// The line, 1-based.
    pub line: u32,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (line {})", self.message, self.line)
    }
}
