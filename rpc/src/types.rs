//! What most procedures share: references to objects and typed parameters.

use std::fmt;

use crate::xdr::{Decode, Decoder, Encode, Encoder, Uuid, XdrError, xdr_structs};

xdr_structs! {
    /// A reference to a domain. `id` is -1 while it is not running.
    Domain {
        name: String,
        uuid: Uuid,
        id: i32,
    }
    /// A reference to a network.
    Network {
        name: String,
        uuid: Uuid,
    }
    /// A reference to a port of a network.
    NetworkPort {
        net: Network,
        uuid: Uuid,
    }
    /// A reference to a network filter.
    NwFilter {
        name: String,
        uuid: Uuid,
    }
    /// A reference to the binding of a network filter to a port's device.
    NwFilterBinding {
        port_dev: String,
        filter_name: String,
    }
    /// A reference to an interface of the host.
    Interface {
        name: String,
        mac: String,
    }
    /// A reference to a storage pool.
    StoragePool {
        name: String,
        uuid: Uuid,
    }
    /// A reference to a storage volume; `key` is unique on the host (often the path).
    StorageVol {
        pool: String,
        name: String,
        key: String,
    }
    /// A reference to a device of the host.
    NodeDevice {
        name: String,
    }
    /// A reference to a secret.
    Secret {
        uuid: Uuid,
        usage_type: i32,
        usage_id: String,
    }
    /// A reference to a checkpoint of a domain.
    Checkpoint {
        name: String,
        dom: Domain,
    }
    /// A reference to a snapshot of a domain.
    Snapshot {
        name: String,
        dom: Domain,
    }
    /// A named value of one of seven types.
    TypedParam {
        field: String,
        value: TypedValue,
    }
}

impl Domain {
    /// A reference to a domain; `id` is `None` while it is not running.
    pub fn new(name: impl Into<String>, uuid: Uuid, id: Option<i32>) -> Self {
        Domain {
            name: name.into(),
            uuid,
            id: id.unwrap_or(-1),
        }
    }

    /// The id, if the domain is running.
    pub fn active_id(&self) -> Option<i32> {
        (self.id >= 0).then_some(self.id)
    }
}

impl TypedParam {
    /// A named value.
    pub fn new(field: impl Into<String>, value: impl Into<TypedValue>) -> Self {
        TypedParam {
            field: field.into(),
            value: value.into(),
        }
    }
}

/// The value of a typed parameter.
#[derive(Debug, Clone, PartialEq)]
pub enum TypedValue {
    /// A signed 32-bit number.
    Int(i32),
    /// An unsigned 32-bit number.
    UInt(u32),
    /// A signed 64-bit number.
    LLong(i64),
    /// An unsigned 64-bit number.
    ULLong(u64),
    /// A floating-point number.
    Double(f64),
    /// True or false.
    Boolean(bool),
    /// A text; only for callers that set the flag which allows it (4).
    String(String),
}

impl Default for TypedValue {
    fn default() -> Self {
        TypedValue::Int(0)
    }
}

macro_rules! typed_values {
    ($($number:literal $variant:ident $type:ty),*) => {
        impl Encode for TypedValue {
            fn encode(&self, to: &mut Encoder) -> Result<(), XdrError> {
                match self {
                    $(TypedValue::$variant(value) => {
                        to.word($number);
                        value.encode(to)
                    })*
                    TypedValue::Boolean(value) => {
                        to.word(6);
                        i32::from(*value).encode(to)
                    }
                }
            }
        }

        impl Decode for TypedValue {
            fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
                match from.word()? {
                    $($number => Ok(TypedValue::$variant(<$type>::decode(from)?)),)*
                    6 => Ok(TypedValue::Boolean(from.word()? != 0)),
                    other => Err(XdrError::BadType(other.cast_signed())),
                }
            }
        }

        $(impl From<$type> for TypedValue {
            fn from(value: $type) -> Self {
                TypedValue::$variant(value)
            }
        })*
    };
}
typed_values!(1 Int i32, 2 UInt u32, 3 LLong i64, 4 ULLong u64, 5 Double f64, 7 String String);

impl From<bool> for TypedValue {
    fn from(value: bool) -> Self {
        TypedValue::Boolean(value)
    }
}

impl From<&str> for TypedValue {
    fn from(value: &str) -> Self {
        TypedValue::String(value.to_owned())
    }
}

/// As `virsh domstats` prints values.
impl fmt::Display for TypedValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TypedValue::Int(value) => value.fmt(f),
            TypedValue::UInt(value) => value.fmt(f),
            TypedValue::LLong(value) => value.fmt(f),
            TypedValue::ULLong(value) => value.fmt(f),
            TypedValue::Double(value) => write!(f, "{value:.6}"),
            TypedValue::Boolean(value) => f.write_str(if *value { "yes" } else { "no" }),
            TypedValue::String(value) => value.fmt(f),
        }
    }
}
