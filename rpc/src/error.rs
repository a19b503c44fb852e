//! The error that crosses the wire, its codes and domains.
//!
//! Clients branch on the code and print the message, so both are libvirt's: [`RemoteError::new`] puts the code's own
//! words before the detail, as libvirt does.
//!
//! ```
//! use rpc::error::{ErrorCode, ErrorDomain, RemoteError};
//!
//! let error = RemoteError::new(ErrorCode::NO_DOMAIN, ErrorDomain::QEMU, "no domain with matching name 'x'");
//! assert_eq!(error.message(), "Domain not found: no domain with matching name 'x'");
//! ```

use std::fmt;
use std::ops::{Deref, DerefMut};

use crate::limits::STRING_MAX;
use crate::procs::QEMU_BASE;
use crate::types::{Domain, Network};
use crate::xdr::{Decode, Decoder, Encode, Encoder, XdrError};

/// The kind of an error (`VIR_ERR_...`). A number that has no name here is carried as it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ErrorCode(pub i32);

/// The part that met the error (`VIR_FROM_...`). A number that has no name here is carried as it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ErrorDomain(pub i32);

macro_rules! codes {
    ($($name:ident = $number:literal, $message:literal;)*) => {
        impl ErrorCode {
            $(#[doc = concat!("`VIR_ERR_", stringify!($name), "`, ", stringify!($number), ".")]
            pub const $name: ErrorCode = ErrorCode($number);)*

            /// The name without `VIR_ERR_`, if the number has one.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some(stringify!($name)),)*
                    _ => None,
                }
            }

            /// The message of an error of this kind, with `{}` where the detail goes.
            fn message(self) -> &'static str {
                match self.0 {
                    $($number => $message,)*
                    _ => "{}",
                }
            }
        }
    };
}

macro_rules! domains {
    ($($name:ident = $number:literal;)*) => {
        impl ErrorDomain {
            $(#[doc = concat!("`VIR_FROM_", stringify!($name), "`, ", stringify!($number), ".")]
            pub const $name: ErrorDomain = ErrorDomain($number);)*

            /// The name without `VIR_FROM_`, if the number has one.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

impl fmt::Debug for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.name().unwrap_or("?"), self.0)
    }
}

impl fmt::Debug for ErrorDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.name().unwrap_or("?"), self.0)
    }
}

/// How grave an error is; [`RemoteError`] knows no other.
const LEVEL_ERROR: i32 = 2;

/// An error as a server tells it to a client. Its fields are those of [`ErrorBody`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RemoteError(Box<ErrorBody>);

/// What an error consists of. It is behind a pointer, so that results stay small.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ErrorBody {
    /// The kind.
    pub code: ErrorCode,
    /// The part that met it.
    pub domain: ErrorDomain,
    /// The whole message as a user sees it.
    pub message: Option<String>,
    /// 1 is a warning, 2 an error.
    pub level: i32,
    /// The domain it concerns.
    pub dom: Option<Domain>,
    /// The message's pattern; libvirt sets it to `%s`-style text, clients hardly look.
    pub str1: Option<String>,
    /// The detail, without the code's own words.
    pub str2: Option<String>,
    /// More detail.
    pub str3: Option<String>,
    /// A number that goes with the code: for `SYSTEM_ERROR` the errno.
    pub int1: i32,
    /// Another number that goes with the code.
    pub int2: i32,
    /// The network it concerns.
    pub net: Option<Network>,
}

impl Deref for RemoteError {
    type Target = ErrorBody;
    fn deref(&self) -> &ErrorBody {
        &self.0
    }
}

impl DerefMut for RemoteError {
    fn deref_mut(&mut self) -> &mut ErrorBody {
        &mut self.0
    }
}

impl From<ErrorBody> for RemoteError {
    fn from(body: ErrorBody) -> Self {
        RemoteError(Box::new(body))
    }
}

impl RemoteError {
    /// An error with the code's own words before the detail.
    pub fn new(code: ErrorCode, domain: ErrorDomain, detail: impl Into<String>) -> Self {
        let detail = detail.into().replace('\0', "\u{fffd}");
        ErrorBody {
            code,
            domain,
            message: Some(code.message().replacen("{}", &detail, 1)),
            level: LEVEL_ERROR,
            str1: Some(code.message().replacen("{}", "%s", 1)),
            str2: Some(detail),
            int1: -1,
            int2: -1,
            ..Default::default()
        }
        .into()
    }

    /// A failed system call: the detail, a colon, and what the system says of the error; `int1` is its number.
    pub fn system(domain: ErrorDomain, error: &std::io::Error, detail: impl fmt::Display) -> Self {
        let mut remote = RemoteError::new(
            ErrorCode::SYSTEM_ERROR,
            domain,
            format!("{detail}: {}", plain(error)),
        );
        remote.int1 = error.raw_os_error().unwrap_or(-1);
        remote
    }

    /// An error of the protocol itself.
    pub fn rpc(detail: impl Into<String>) -> Self {
        RemoteError::new(ErrorCode::RPC, ErrorDomain::RPC, detail)
    }

    /// The answer to a procedure nobody implements. Clients take it for "not supported" and try older ways.
    pub fn unknown_procedure(procedure: i32) -> Self {
        // As it is on the wire.
        let number = if procedure > QEMU_BASE {
            procedure - QEMU_BASE
        } else {
            procedure
        };
        RemoteError::rpc(format!("unknown procedure: {number}"))
    }

    /// The same, about this domain.
    #[must_use]
    pub fn about(mut self, dom: Domain) -> Self {
        self.dom = Some(dom);
        self
    }

    /// The message, or a substitute where a server sent none.
    pub fn message(&self) -> &str {
        self.message.as_deref().unwrap_or("unknown error")
    }

    /// Whether this says that the server has no such procedure.
    pub fn is_unknown_procedure(&self) -> bool {
        self.code == ErrorCode::RPC
            && matches!(self.domain, ErrorDomain::RPC | ErrorDomain::REMOTE)
            && self.message().starts_with("unknown procedure")
    }

    /// What a client makes of an answer: an unknown procedure becomes "not supported".
    #[must_use]
    pub fn for_client(mut self) -> Self {
        if self.is_unknown_procedure() {
            self.code = ErrorCode::NO_SUPPORT;
        }
        self
    }
}

/// What the system says of an error, without the number that Rust adds.
fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

impl fmt::Display for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message())
    }
}

impl std::error::Error for RemoteError {}

impl Encode for RemoteError {
    fn encode(&self, to: &mut Encoder) -> Result<(), XdrError> {
        // An error must always get through: text that cannot be sent is cut.
        let fit = |text: &Option<String>| {
            text.as_ref().map(|text| {
                let mut end = text.len().min(STRING_MAX / 4);
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                text[..end].replace('\0', "\u{fffd}")
            })
        };
        self.code.0.encode(to)?;
        self.domain.0.encode(to)?;
        fit(&self.message).encode(to)?;
        self.level.encode(to)?;
        self.dom.encode(to)?;
        for text in [&self.str1, &self.str2, &self.str3] {
            fit(text).encode(to)?;
        }
        self.int1.encode(to)?;
        self.int2.encode(to)?;
        self.net.encode(to)
    }
}

impl Decode for RemoteError {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        Ok(RemoteError::from(ErrorBody {
            code: ErrorCode(i32::decode(from)?),
            domain: ErrorDomain(i32::decode(from)?),
            message: Decode::decode(from)?,
            level: Decode::decode(from)?,
            dom: Decode::decode(from)?,
            str1: Decode::decode(from)?,
            str2: Decode::decode(from)?,
            str3: Decode::decode(from)?,
            int1: Decode::decode(from)?,
            int2: Decode::decode(from)?,
            net: Decode::decode(from)?,
        }))
    }
}

codes! {
    OK = 0, "{}";
    INTERNAL_ERROR = 1, "internal error: {}";
    NO_MEMORY = 2, "out of memory: {}";
    NO_SUPPORT = 3, "this function is not supported by the connection driver: {}";
    UNKNOWN_HOST = 4, "unknown host {}";
    NO_CONNECT = 5, "no connection driver available for {}";
    INVALID_CONN = 6, "invalid connection pointer in {}";
    INVALID_DOMAIN = 7, "invalid domain pointer in {}";
    INVALID_ARG = 8, "invalid argument: {}";
    OPERATION_FAILED = 9, "operation failed: {}";
    GET_FAILED = 10, "GET operation failed: {}";
    POST_FAILED = 11, "POST operation failed: {}";
    HTTP_ERROR = 12, "got unknown HTTP error code {}";
    SEXPR_SERIAL = 13, "failed to serialize S-Expr: {}";
    NO_XEN = 14, "could not use Xen hypervisor entry {}";
    XEN_CALL = 15, "failed Xen syscall {}";
    OS_TYPE = 16, "unknown OS type {}";
    NO_KERNEL = 17, "missing kernel information: {}";
    NO_ROOT = 18, "missing root device information in {}";
    NO_SOURCE = 19, "missing source information for device {}";
    NO_TARGET = 20, "missing target information for device {}";
    NO_NAME = 21, "missing name information in {}";
    NO_OS = 22, "missing operating system information for {}";
    NO_DEVICE = 23, "missing devices information for {}";
    NO_XENSTORE = 24, "could not connect to Xen Store {}";
    DRIVER_FULL = 25, "too many drivers registered in {}";
    CALL_FAILED = 26, "library call failed: {}";
    XML_ERROR = 27, "XML error: {}";
    DOM_EXIST = 28, "domain {} exists already";
    OPERATION_DENIED = 29, "operation forbidden: {}";
    OPEN_FAILED = 30, "failed to open configuration file {}";
    READ_FAILED = 31, "failed to read configuration file {}";
    PARSE_FAILED = 32, "failed to parse configuration file {}";
    CONF_SYNTAX = 33, "configuration file syntax error: {}";
    WRITE_FAILED = 34, "failed to write configuration file: {}";
    XML_DETAIL = 35, "{}";
    INVALID_NETWORK = 36, "invalid network pointer in {}";
    NETWORK_EXIST = 37, "network {} exists already";
    SYSTEM_ERROR = 38, "{}";
    RPC = 39, "{}";
    GNUTLS_ERROR = 40, "{}";
    NO_DOMAIN = 42, "Domain not found: {}";
    NO_NETWORK = 43, "Network not found: {}";
    INVALID_MAC = 44, "invalid MAC address: {}";
    AUTH_FAILED = 45, "authentication failed: {}";
    INVALID_STORAGE_POOL = 46, "invalid storage pool pointer in {}";
    INVALID_STORAGE_VOL = 47, "invalid storage volume pointer in {}";
    NO_STORAGE_POOL = 49, "Storage pool not found: {}";
    NO_STORAGE_VOL = 50, "Storage volume not found: {}";
    INVALID_NODE_DEVICE = 52, "invalid node device pointer in {}";
    NO_NODE_DEVICE = 53, "Node device not found: {}";
    NO_SECURITY_MODEL = 54, "Security model not found: {}";
    OPERATION_INVALID = 55, "Requested operation is not valid: {}";
    NO_INTERFACE = 57, "Interface not found: {}";
    INVALID_INTERFACE = 58, "invalid interface pointer in {}";
    MULTIPLE_INTERFACES = 59, "multiple matching interfaces found: {}";
    INVALID_NWFILTER = 61, "Invalid network filter: {}";
    NO_NWFILTER = 62, "Network filter not found: {}";
    BUILD_FIREWALL = 63, "Error while building firewall: {}";
    INVALID_SECRET = 65, "Invalid secret: {}";
    NO_SECRET = 66, "Secret not found: {}";
    CONFIG_UNSUPPORTED = 67, "unsupported configuration: {}";
    OPERATION_TIMEOUT = 68, "Timed out during operation: {}";
    MIGRATE_PERSIST_FAILED = 69, "Failed to make domain persistent after migration: {}";
    HOOK_SCRIPT_FAILED = 70, "Hook script execution failed: {}";
    INVALID_DOMAIN_SNAPSHOT = 71, "Invalid domain snapshot: {}";
    NO_DOMAIN_SNAPSHOT = 72, "Domain snapshot not found: {}";
    INVALID_STREAM = 73, "invalid stream pointer in {}";
    ARGUMENT_UNSUPPORTED = 74, "argument unsupported: {}";
    STORAGE_PROBE_FAILED = 75, "Storage pool probe failed: {}";
    STORAGE_POOL_BUILT = 76, "Storage pool already built: {}";
    SNAPSHOT_REVERT_RISKY = 77, "revert requires force: {}";
    OPERATION_ABORTED = 78, "operation aborted: {}";
    AUTH_CANCELLED = 79, "authentication cancelled: {}";
    NO_DOMAIN_METADATA = 80, "metadata not found: {}";
    MIGRATE_UNSAFE = 81, "Unsafe migration: {}";
    OVERFLOW = 82, "numerical overflow: {}";
    BLOCK_COPY_ACTIVE = 83, "block copy still active: {}";
    OPERATION_UNSUPPORTED = 84, "Operation not supported: {}";
    SSH = 85, "SSH transport error: {}";
    AGENT_UNRESPONSIVE = 86, "Guest agent is not responding: {}";
    RESOURCE_BUSY = 87, "resource busy: {}";
    ACCESS_DENIED = 88, "access denied: {}";
    DBUS_SERVICE = 89, "error from service: {}";
    STORAGE_VOL_EXIST = 90, "storage volume {} exists already";
    CPU_INCOMPATIBLE = 91, "the CPU is incompatible with host CPU: {}";
    XML_INVALID_SCHEMA = 92, "XML document failed to validate against schema: {}";
    MIGRATE_FINISH_OK = 93, "migration successfully aborted: {}";
    AUTH_UNAVAILABLE = 94, "authentication unavailable: {}";
    NO_SERVER = 95, "Server not found: {}";
    NO_CLIENT = 96, "Client not found: {}";
    AGENT_UNSYNCED = 97, "guest agent replied with wrong id to guest-sync command: {}";
    LIBSSH = 98, "libssh transport error: {}";
    DEVICE_MISSING = 99, "device not found: {}";
    INVALID_NWFILTER_BINDING = 100, "Invalid network filter binding: {}";
    NO_NWFILTER_BINDING = 101, "Network filter binding not found: {}";
    INVALID_DOMAIN_CHECKPOINT = 102, "Invalid domain checkpoint: {}";
    NO_DOMAIN_CHECKPOINT = 103, "Domain checkpoint not found: {}";
    NO_DOMAIN_BACKUP = 104, "Domain backup job id not found: {}";
    INVALID_NETWORK_PORT = 105, "Invalid network port pointer: {}";
    NETWORK_PORT_EXIST = 106, "network port {} exists already";
    NO_NETWORK_PORT = 107, "network port not found: {}";
    NO_HOSTNAME = 108, "no hostname found: {}";
    CHECKPOINT_INCONSISTENT = 109, "checkpoint inconsistent: {}";
    MULTIPLE_DOMAINS = 110, "multiple matching domains found: {}";
    NO_NETWORK_METADATA = 111, "metadata not found: {}";
}

domains! {
    NONE = 0;
    XEN = 1;
    XEND = 2;
    XENSTORE = 3;
    SEXPR = 4;
    XML = 5;
    DOM = 6;
    RPC = 7;
    PROXY = 8;
    CONF = 9;
    QEMU = 10;
    NET = 11;
    TEST = 12;
    REMOTE = 13;
    OPENVZ = 14;
    XENXM = 15;
    STATS_LINUX = 16;
    LXC = 17;
    STORAGE = 18;
    NETWORK = 19;
    DOMAIN = 20;
    UML = 21;
    NODEDEV = 22;
    XEN_INOTIFY = 23;
    SECURITY = 24;
    VBOX = 25;
    INTERFACE = 26;
    ONE = 27;
    ESX = 28;
    PHYP = 29;
    SECRET = 30;
    CPU = 31;
    XENAPI = 32;
    NWFILTER = 33;
    HOOK = 34;
    DOMAIN_SNAPSHOT = 35;
    AUDIT = 36;
    SYSINFO = 37;
    STREAMS = 38;
    VMWARE = 39;
    EVENT = 40;
    LIBXL = 41;
    LOCKING = 42;
    HYPERV = 43;
    CAPABILITIES = 44;
    URI = 45;
    AUTH = 46;
    DBUS = 47;
    PARALLELS = 48;
    DEVICE = 49;
    SSH = 50;
    LOCKSPACE = 51;
    INITCTL = 52;
    IDENTITY = 53;
    CGROUP = 54;
    ACCESS = 55;
    SYSTEMD = 56;
    BHYVE = 57;
    CRYPTO = 58;
    FIREWALL = 59;
    POLKIT = 60;
    THREAD = 61;
    ADMIN = 62;
    LOGGING = 63;
    XENXL = 64;
    PERF = 65;
    LIBSSH = 66;
    RESCTRL = 67;
    FIREWALLD = 68;
    DOMAIN_CHECKPOINT = 69;
    TPM = 70;
    BPF = 71;
    CH = 72;
}
