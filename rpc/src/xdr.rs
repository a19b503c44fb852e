//! XDR (RFC 4506) as libvirt uses it: big endian, everything in units of four bytes.
//!
//! What is decoded comes from a stranger: every length is checked against its limit *and* against the bytes that are
//! there before anything is allocated, strings must be UTF-8 without NUL (or a document that says it is in ISO 8859-1), and bytes left over are an error.
//!
//! ```
//! use rpc::xdr::{from_bytes, to_bytes};
//!
//! let bytes = to_bytes(&"hi".to_owned())?;
//! assert_eq!(bytes, [0, 0, 0, 2, b'h', b'i', 0, 0]);
//! assert_eq!(from_bytes::<String>(&bytes)?, "hi");
//! # Ok::<(), rpc::xdr::XdrError>(())
//! ```

use std::fmt;
use std::ops::{Deref, DerefMut};

use crate::limits::STRING_MAX;

/// The identity of an object: 16 bytes in the order in which they are printed.
pub type Uuid = [u8; 16];

/// Why a value cannot be decoded or encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum XdrError {
    /// The data ends within a value.
    #[error("data ends early: {need} bytes wanted, {left} left")]
    Truncated {
        /// Bytes the value needs.
        need: usize,
        /// Bytes that are left.
        left: usize,
    },
    /// A string, list or block of bytes is longer than the protocol allows.
    #[error("length {len} is beyond the limit of {max}")]
    TooLong {
        /// The length stated.
        len: usize,
        /// The length allowed.
        max: usize,
    },
    /// An optional value's mark is neither 0 nor 1.
    #[error("{0} is not a valid mark of an optional value")]
    BadOptional(u32),
    /// A string is not UTF-8.
    #[error("a string is not valid UTF-8")]
    NotUtf8,
    /// A string has a NUL byte inside.
    #[error("a string contains a NUL byte")]
    NulInString,
    /// A typed parameter's type is not one of the seven.
    #[error("{0} is not a type of a typed parameter")]
    BadType(i32),
    /// There are bytes behind the value.
    #[error("{0} bytes too many")]
    Trailing(usize),
}

/// Where values are encoded to.
#[derive(Debug, Default)]
pub struct Encoder {
    buf: Vec<u8>,
}

impl Encoder {
    /// An encoder that appends to `buf`.
    pub fn new(buf: Vec<u8>) -> Self {
        Encoder { buf }
    }

    /// What was encoded.
    pub fn into_inner(self) -> Vec<u8> {
        self.buf
    }

    /// Appends one word.
    pub fn word(&mut self, value: u32) {
        self.buf.extend_from_slice(&value.to_be_bytes());
    }

    /// Appends a length that must not be beyond `max`.
    pub fn length(&mut self, len: usize, max: usize) -> Result<(), XdrError> {
        match u32::try_from(len) {
            Ok(word) if len <= max => {
                self.word(word);
                Ok(())
            }
            _ => Err(XdrError::TooLong { len, max }),
        }
    }

    /// Appends bytes and pads them to whole words.
    pub fn padded(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
        self.buf.resize(self.buf.len() + pad(bytes.len()), 0);
    }
}

/// Where values are decoded from.
#[derive(Debug, Clone)]
pub struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// A decoder of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Decoder { rest: bytes }
    }

    /// The bytes not yet decoded.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Takes one word.
    pub fn word(&mut self) -> Result<u32, XdrError> {
        let Some((word, rest)) = self.rest.split_first_chunk::<4>() else {
            return Err(XdrError::Truncated {
                need: 4,
                left: self.rest.len(),
            });
        };
        self.rest = rest;
        Ok(u32::from_be_bytes(*word))
    }

    /// Takes a length that must not be beyond `max`.
    pub fn length(&mut self, max: usize) -> Result<usize, XdrError> {
        let len = usize::try_from(self.word()?).unwrap_or(usize::MAX);
        if len > max {
            Err(XdrError::TooLong { len, max })
        } else {
            Ok(len)
        }
    }

    /// Takes `len` bytes and their padding.
    pub fn padded(&mut self, len: usize) -> Result<&'a [u8], XdrError> {
        let need = len.saturating_add(pad(len));
        if need > self.rest.len() {
            return Err(XdrError::Truncated {
                need,
                left: self.rest.len(),
            });
        }
        let (taken, rest) = self.rest.split_at(need);
        self.rest = rest;
        Ok(&taken[..len])
    }

    /// Checks that nothing is left.
    pub fn finish(self) -> Result<(), XdrError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(XdrError::Trailing(self.rest.len()))
        }
    }
}

/// Bytes that pad `len` to whole words.
fn pad(len: usize) -> usize {
    len.wrapping_neg() & 3
}

/// A value that can be written as XDR.
pub trait Encode {
    /// Appends the value. Fails only where the value is beyond the protocol's limits.
    fn encode(&self, to: &mut Encoder) -> Result<(), XdrError>;
}

/// A value that can be read from XDR.
pub trait Decode: Sized {
    /// Takes the value from the front.
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError>;
}

/// Encodes one value.
pub fn to_bytes<T: Encode + ?Sized>(value: &T) -> Result<Vec<u8>, XdrError> {
    let mut to = Encoder::default();
    value.encode(&mut to)?;
    Ok(to.into_inner())
}

/// Decodes one value, which must be all there is.
pub fn from_bytes<T: Decode>(bytes: &[u8]) -> Result<T, XdrError> {
    let mut from = Decoder::new(bytes);
    let value = T::decode(&mut from)?;
    from.finish()?;
    Ok(value)
}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl Encode for $number {
            fn encode(&self, to: &mut Encoder) -> Result<(), XdrError> {
                to.buf.extend_from_slice(&self.to_be_bytes());
                Ok(())
            }
        }

        impl Decode for $number {
            fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
                let Some((bytes, rest)) = from.rest.split_first_chunk() else {
                    return Err(XdrError::Truncated { need: size_of::<$number>(), left: from.rest.len() });
                };
                from.rest = rest;
                Ok(<$number>::from_be_bytes(*bytes))
            }
        }
    )*};
}
numbers!(i32, u32, i64, u64, f64);

impl Encode for () {
    fn encode(&self, _to: &mut Encoder) -> Result<(), XdrError> {
        Ok(())
    }
}

impl Decode for () {
    fn decode(_from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        Ok(())
    }
}

impl Encode for str {
    fn encode(&self, to: &mut Encoder) -> Result<(), XdrError> {
        if self.as_bytes().contains(&0) {
            return Err(XdrError::NulInString);
        }
        to.length(self.len(), STRING_MAX)?;
        to.padded(self.as_bytes());
        Ok(())
    }
}

impl Encode for String {
    fn encode(&self, to: &mut Encoder) -> Result<(), XdrError> {
        self.as_str().encode(to)
    }
}

impl Decode for String {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let len = from.length(STRING_MAX)?;
        let bytes = from.padded(len)?;
        if bytes.contains(&0) {
            return Err(XdrError::NulInString);
        }
        if let Some(document) = latin1_document(bytes) {
            return Ok(document);
        }
        Ok(std::str::from_utf8(bytes)
            .map_err(|_| XdrError::NotUtf8)?
            .to_owned())
    }
}

/// A document whose XML declaration says that it is in ISO 8859-1, as text whose declaration says UTF-8: strings are
/// bytes for C's clients, and such documents are sent as they are in their files.
pub fn latin1_document(bytes: &[u8]) -> Option<String> {
    let declaration = bytes.strip_prefix(b"<?xml")?;
    let length = declaration.windows(2).position(|two| two == b"?>")?;
    let declaration = std::str::from_utf8(&declaration[..length]).ok()?;
    let (name, declaration) = in_utf8(declaration)?;
    let known = ["iso-8859-1", "iso_8859-1", "latin1", "latin-1", "l1"];
    if !known.iter().any(|known| name.eq_ignore_ascii_case(known)) {
        return None;
    }
    let body = bytes[b"<?xml".len() + length..].iter().copied();
    let body: String = body.map(char::from).collect();
    Some(format!("<?xml{declaration}{body}"))
}

/// The encoding that an XML declaration states (what stands between `<?xml` and `?>`), and the declaration with UTF-8
/// in its place.
fn in_utf8(declaration: &str) -> Option<(&str, String)> {
    // XML 1.0, section 2.8: EncodingDecl.
    let (before, rest) = declaration.split_once("encoding")?;
    let rest = rest.trim_start().strip_prefix('=')?.trim_start();
    let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    let (name, after) = rest[1..].split_once(quote)?;
    Some((name, format!("{before}encoding={quote}UTF-8{quote}{after}")))
}

/// A document in UTF-16 that begins with a byte order mark, as text whose declaration says UTF-8. On the wire there is
/// none: strings end at their first NUL there.
pub fn utf16_document(bytes: &[u8]) -> Option<String> {
    let (rest, unit): (_, fn([u8; 2]) -> u16) = match bytes {
        [0xff, 0xfe, rest @ ..] => (rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => (rest, u16::from_be_bytes),
        _ => return None,
    };
    let (pairs, []) = rest.as_chunks::<2>() else {
        return None;
    };
    let units = pairs.iter().map(|pair| unit(*pair));
    let text: String = char::decode_utf16(units).collect::<Result<_, _>>().ok()?;
    let declaration = text.strip_prefix("<?xml");
    let declaration = declaration.and_then(|rest| rest.split_once("?>"));
    match declaration.and_then(|(said, body)| Some((in_utf8(said)?.1, body))) {
        Some((declaration, body)) => Some(format!("<?xml{declaration}?>{body}")),
        None => Some(text),
    }
}

impl<const N: usize> Encode for [u8; N] {
    fn encode(&self, to: &mut Encoder) -> Result<(), XdrError> {
        to.padded(self);
        Ok(())
    }
}

impl<const N: usize> Decode for [u8; N] {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let bytes = from.padded(N)?;
        bytes.try_into().map_err(|_| XdrError::Truncated {
            need: N,
            left: bytes.len(),
        })
    }
}

impl<T: Encode> Encode for Option<T> {
    fn encode(&self, to: &mut Encoder) -> Result<(), XdrError> {
        match self {
            None => to.word(0),
            Some(value) => {
                to.word(1);
                value.encode(to)?;
            }
        }
        Ok(())
    }
}

impl<T: Decode> Decode for Option<T> {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        match from.word()? {
            0 => Ok(None),
            1 => Ok(Some(T::decode(from)?)),
            mark => Err(XdrError::BadOptional(mark)),
        }
    }
}

macro_rules! vector {
    ($(#[$doc:meta])* $name:ident<$($item:ident)?> of $of:ty) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq)]
        pub struct $name<$($item,)? const MAX: usize>(pub Vec<$of>);

        impl<$($item,)? const MAX: usize> Default for $name<$($item,)? MAX> {
            fn default() -> Self {
                $name(Vec::new())
            }
        }

        impl<$($item: fmt::Debug,)? const MAX: usize> fmt::Debug for $name<$($item,)? MAX> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl<$($item,)? const MAX: usize> Deref for $name<$($item,)? MAX> {
            type Target = Vec<$of>;
            fn deref(&self) -> &Self::Target {
                &self.0
            }
        }

        impl<$($item,)? const MAX: usize> DerefMut for $name<$($item,)? MAX> {
            fn deref_mut(&mut self) -> &mut Self::Target {
                &mut self.0
            }
        }

        impl<$($item,)? const MAX: usize> From<Vec<$of>> for $name<$($item,)? MAX> {
            fn from(items: Vec<$of>) -> Self {
                $name(items)
            }
        }

        impl<$($item,)? const MAX: usize> FromIterator<$of> for $name<$($item,)? MAX> {
            fn from_iter<I: IntoIterator<Item = $of>>(items: I) -> Self {
                $name(items.into_iter().collect())
            }
        }

        impl<$($item,)? const MAX: usize> IntoIterator for $name<$($item,)? MAX> {
            type Item = $of;
            type IntoIter = std::vec::IntoIter<$of>;
            fn into_iter(self) -> Self::IntoIter {
                self.0.into_iter()
            }
        }
    };
}

vector! {
    /// A list of at most `MAX` values: a count, then the values. Make one with `vec.into()` or `collect()`.
    List<T> of T
}
vector! {
    /// At most `MAX` bytes: a count, then the bytes, padded (XDR's `opaque<MAX>`).
    Opaque<> of u8
}
vector! {
    /// At most `MAX` bytes, each sent as a word of its own: what XDR makes of a C `char` list. A final NUL is part of
    /// the data where the value is text; [`CharList::text`] leaves it out.
    CharList<> of u8
}

/// How many items are reserved before any was decoded; the rest grows with the data that is really there.
const RESERVE: usize = 64;

impl<T: Encode, const MAX: usize> Encode for List<T, MAX> {
    fn encode(&self, to: &mut Encoder) -> Result<(), XdrError> {
        to.length(self.len(), MAX)?;
        self.iter().try_for_each(|item| item.encode(to))
    }
}

impl<T: Decode, const MAX: usize> Decode for List<T, MAX> {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let len = from.length(MAX)?;
        let mut items = Vec::with_capacity(len.min(RESERVE));
        for _ in 0..len {
            items.push(T::decode(from)?);
        }
        Ok(List(items))
    }
}

impl<const MAX: usize> Encode for Opaque<MAX> {
    fn encode(&self, to: &mut Encoder) -> Result<(), XdrError> {
        to.length(self.len(), MAX)?;
        to.padded(self);
        Ok(())
    }
}

impl<const MAX: usize> Decode for Opaque<MAX> {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let len = from.length(MAX)?;
        Ok(Opaque(from.padded(len)?.to_vec()))
    }
}

impl<const MAX: usize> CharList<MAX> {
    /// The bytes of a text with the final NUL that C expects; longer text is cut at a character.
    pub fn from_text(text: &str) -> Self {
        let mut end = text.len().min(MAX.saturating_sub(1));
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let mut bytes = text.as_bytes()[..end].to_vec();
        bytes.push(0);
        CharList(bytes)
    }

    /// The text before the first NUL; what is not UTF-8 is replaced.
    pub fn text(&self) -> String {
        text_before_nul(&self.0)
    }
}

impl<const MAX: usize> Encode for CharList<MAX> {
    fn encode(&self, to: &mut Encoder) -> Result<(), XdrError> {
        to.length(self.len(), MAX)?;
        encode_chars(self, to);
        Ok(())
    }
}

impl<const MAX: usize> Decode for CharList<MAX> {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let len = from.length(MAX)?;
        Ok(CharList(decode_chars(from, len)?))
    }
}

/// Exactly `N` bytes, each sent as a word of its own: what XDR makes of a C `char name[N]`. Holds text, NUL padded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CharArray<const N: usize>(pub [u8; N]);

impl<const N: usize> CharArray<N> {
    /// A text, cut at a character so that a NUL remains at the end.
    pub fn from_text(text: &str) -> Self {
        let mut end = text.len().min(N.saturating_sub(1));
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let mut bytes = [0; N];
        bytes[..end].copy_from_slice(&text.as_bytes()[..end]);
        CharArray(bytes)
    }

    /// The text before the first NUL; what is not UTF-8 is replaced.
    pub fn text(&self) -> String {
        text_before_nul(&self.0)
    }
}

impl<const N: usize> Default for CharArray<N> {
    fn default() -> Self {
        CharArray([0; N])
    }
}

impl<const N: usize> fmt::Debug for CharArray<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text().fmt(f)
    }
}

impl<const N: usize> Encode for CharArray<N> {
    fn encode(&self, to: &mut Encoder) -> Result<(), XdrError> {
        encode_chars(&self.0, to);
        Ok(())
    }
}

impl<const N: usize> Decode for CharArray<N> {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let mut bytes = [0; N];
        for (byte, word) in bytes.iter_mut().zip(decode_chars(from, N)?) {
            *byte = word;
        }
        Ok(CharArray(bytes))
    }
}

fn text_before_nul(bytes: &[u8]) -> String {
    let end = bytes
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn encode_chars(bytes: &[u8], to: &mut Encoder) {
    for &byte in bytes {
        // C's `char` is signed on x86: libvirt sends bytes from 128 up sign-extended.
        to.word(i32::from(byte.cast_signed()).cast_unsigned());
    }
}

fn decode_chars(from: &mut Decoder<'_>, len: usize) -> Result<Vec<u8>, XdrError> {
    // One split checks that all the words are there before anything is allocated.
    let words = from.padded(len.saturating_mul(4))?;
    // Only the last byte of a word counts, as for the C `char` it is cast to.
    Ok(words.chunks_exact(4).map(|word| word[3]).collect())
}

/// Declares structs that are sent field by field. All are public, and can be printed, cloned, compared and made empty.
macro_rules! xdr_structs {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[doc = concat!("`", stringify!($name), "` as it is sent; the fields, in this order, are the protocol's.")]
        #[allow(missing_docs)] // the fields are the protocol's own names
        #[derive(Debug, Clone, PartialEq, Default)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl $crate::xdr::Encode for $name {
            fn encode(&self, to: &mut $crate::xdr::Encoder) -> Result<(), $crate::xdr::XdrError> {
                $($crate::xdr::Encode::encode(&self.$field, to)?;)*
                Ok(())
            }
        }

        impl $crate::xdr::Decode for $name {
            fn decode(from: &mut $crate::xdr::Decoder<'_>) -> Result<Self, $crate::xdr::XdrError> {
                Ok($name { $($field: $crate::xdr::Decode::decode(from)?,)* })
            }
        }
    )*};
}
pub(crate) use xdr_structs;
