//! Messages on the wire: a length word, a header, and the payload; file descriptors follow behind.
//!
//! [`FrameDecoder`] takes bytes as they come and says how many it wants next, so that a reader never takes a byte of
//! what follows: descriptors travel with the byte behind their message, and would be lost with a plain read of it.

use std::os::fd::OwnedFd;

use crate::limits::{FDS_MAX, HEADER_SIZE, LENGTH_SIZE, MESSAGE_MAX};
use crate::procs::{
    KEEPALIVE_PROGRAM, KEEPALIVE_VERSION, Procedure, QEMU_BASE, QEMU_PROGRAM, QEMU_VERSION,
    REMOTE_PROGRAM, REMOTE_VERSION,
};
use crate::xdr::{Decode, Decoder, Encode, Encoder, XdrError};

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageType {
    /// A client calls a procedure.
    Call,
    /// The server answers.
    Reply,
    /// Sent unasked: an event, or a keepalive.
    Message,
    /// Raw data that belong to a call.
    Stream,
    /// A call with file descriptors.
    CallWithFds,
    /// An answer with file descriptors.
    ReplyWithFds,
    /// A hole in raw data.
    StreamHole,
    /// A number with no meaning; such a message is refused, not the connection.
    Unknown(i32),
}

/// Whether a message is good news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// A call; a successful answer; the end of raw data.
    Ok,
    /// The payload is an error.
    Error,
    /// More raw data follow.
    Continue,
    /// A number with no meaning.
    Unknown(i32),
}

macro_rules! wire_numbers {
    ($type:ident: $($variant:ident = $number:literal),*) => {
        impl From<i32> for $type {
            fn from(number: i32) -> Self {
                match number {
                    $($number => $type::$variant,)*
                    other => $type::Unknown(other),
                }
            }
        }

        impl From<$type> for i32 {
            fn from(value: $type) -> i32 {
                match value {
                    $($type::$variant => $number,)*
                    $type::Unknown(other) => other,
                }
            }
        }
    };
}
wire_numbers!(MessageType: Call = 0, Reply = 1, Message = 2, Stream = 3, CallWithFds = 4, ReplyWithFds = 5, StreamHole = 6);
wire_numbers!(Status: Ok = 0, Error = 1, Continue = 2);

/// What stands before every payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The program: [`REMOTE_PROGRAM`], [`KEEPALIVE_PROGRAM`], or one nobody knows.
    pub program: u32,
    /// The program's version.
    pub version: u32,
    /// The procedure's number.
    pub procedure: i32,
    /// What the message is.
    pub kind: MessageType,
    /// The number that the call, its answer and its raw data share; 0 for events.
    pub serial: u32,
    /// Whether it is good news.
    pub status: Status,
}

impl Header {
    /// The header of a call.
    pub fn call<A, R>(procedure: Procedure<A, R>, serial: u32) -> Self {
        let number = procedure.number();
        let (program, version, procedure) = if number > QEMU_BASE {
            (QEMU_PROGRAM, QEMU_VERSION, number - QEMU_BASE)
        } else {
            (REMOTE_PROGRAM, REMOTE_VERSION, number)
        };
        Header {
            program,
            version,
            procedure,
            kind: MessageType::Call,
            serial,
            status: Status::Ok,
        }
    }

    /// The procedure's number as [`Procedure::number`] has it, whatever the program; -1 for none there could be.
    pub fn number(&self) -> i32 {
        match self.program {
            QEMU_PROGRAM if (1..QEMU_BASE).contains(&self.procedure) => QEMU_BASE + self.procedure,
            REMOTE_PROGRAM if self.procedure < QEMU_BASE => self.procedure,
            _ => -1,
        }
    }

    /// The header of an event.
    pub fn event<A>(procedure: Procedure<A, ()>) -> Self {
        Header {
            kind: MessageType::Message,
            ..Header::call(procedure, 0)
        }
    }

    /// The header of a keepalive.
    pub fn keepalive(procedure: i32) -> Self {
        Header {
            program: KEEPALIVE_PROGRAM,
            version: KEEPALIVE_VERSION,
            procedure,
            kind: MessageType::Message,
            serial: 0,
            status: Status::Ok,
        }
    }

    /// The header of what goes back in the same matter.
    #[must_use]
    pub fn answer(self, kind: MessageType, status: Status) -> Self {
        Header {
            kind,
            status,
            ..self
        }
    }
}

impl Encode for Header {
    fn encode(&self, to: &mut Encoder) -> Result<(), XdrError> {
        to.word(self.program);
        to.word(self.version);
        to.word(self.procedure.cast_unsigned());
        to.word(i32::from(self.kind).cast_unsigned());
        to.word(self.serial);
        to.word(i32::from(self.status).cast_unsigned());
        Ok(())
    }
}

impl Decode for Header {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        Ok(Header {
            program: from.word()?,
            version: from.word()?,
            procedure: from.word()?.cast_signed(),
            kind: from.word()?.cast_signed().into(),
            serial: from.word()?,
            status: from.word()?.cast_signed().into(),
        })
    }
}

/// A whole message.
#[derive(Debug)]
pub struct Frame {
    /// The header.
    pub header: Header,
    /// What follows the header: XDR, or raw data of a stream.
    pub payload: Vec<u8>,
    /// The descriptors that came, or go, with it.
    pub fds: Vec<OwnedFd>,
}

impl Frame {
    /// A message whose payload is an encoded value.
    pub fn new<T: Encode + ?Sized>(header: Header, value: &T) -> Result<Self, XdrError> {
        Ok(Frame::raw(header, crate::xdr::to_bytes(value)?))
    }

    /// A message with this payload.
    pub fn raw(header: Header, payload: Vec<u8>) -> Self {
        Frame {
            header,
            payload,
            fds: Vec::new(),
        }
    }

    /// Bytes on the wire, without descriptors.
    pub fn wire_len(&self) -> usize {
        let count = if has_fds(self.header.kind) { 4 } else { 0 };
        LENGTH_SIZE + HEADER_SIZE + count + self.payload.len()
    }

    /// The bytes to send; one byte for each descriptor, with it, follows behind them.
    pub fn to_wire(&self) -> Result<Vec<u8>, FrameError> {
        let len = self.wire_len();
        let Some(word) = u32::try_from(len).ok().filter(|_| len <= MESSAGE_MAX) else {
            return Err(FrameError::TooLarge { len, header: None });
        };
        let mut to = Encoder::new(Vec::with_capacity(len));
        to.word(word);
        self.header.encode(&mut to)?;
        if has_fds(self.header.kind) {
            to.length(self.fds.len(), FDS_MAX)?;
        }
        let mut bytes = to.into_inner();
        bytes.extend_from_slice(&self.payload);
        Ok(bytes)
    }
}

/// Whether descriptors go with a message of this kind; their count then stands behind the header.
fn has_fds(kind: MessageType) -> bool {
    matches!(kind, MessageType::CallWithFds | MessageType::ReplyWithFds)
}

/// Why bytes are not a message. The connection cannot go on after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length word is less than a header.
    #[error("packet of {len} bytes is too small, a header alone needs {}", LENGTH_SIZE + HEADER_SIZE)]
    TooSmall {
        /// The length stated, in bytes.
        len: usize,
    },
    /// The length word is beyond the limit.
    #[error("packet of {len} bytes is too large, the limit is {MESSAGE_MAX}")]
    TooLarge {
        /// The length stated, in bytes.
        len: usize,
        /// The header behind it, so that the call can be answered.
        header: Option<Header>,
    },
    /// The message has more descriptors than allowed.
    #[error("{count} file descriptors are too many, the limit is {FDS_MAX}")]
    TooManyFds {
        /// The number stated.
        count: usize,
    },
    /// The header or the count of descriptors cannot be decoded.
    #[error(transparent)]
    Xdr(#[from] XdrError),
}

/// What came out of the bytes.
#[derive(Debug)]
pub struct Decoded {
    /// The message, without descriptors yet.
    pub frame: Frame,
    /// How many descriptors follow, each with one byte of its own.
    pub fds: usize,
}

/// How far ahead memory is taken for a message whose bytes have not come yet.
const STEP: usize = 64 * 1024;

/// Puts messages together from bytes that come in any portions.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    buf: Vec<u8>,
    len: Option<usize>,
}

impl FrameDecoder {
    /// A decoder that awaits a length word.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many bytes may be fed next at most: never more than belongs to this message, and never 0.
    pub fn wanted(&self) -> usize {
        let goal = match self.len {
            None => LENGTH_SIZE,
            // Of a message that is refused, only the header is of interest.
            Some(len) if len > MESSAGE_MAX => LENGTH_SIZE + HEADER_SIZE,
            Some(len) => len,
        };
        (goal - self.buf.len()).min(STEP)
    }

    /// Whether it is between two messages, where the end of the connection is no loss.
    pub fn is_idle(&self) -> bool {
        self.buf.is_empty()
    }

    /// Takes at most [`FrameDecoder::wanted`] bytes; more is a mistake of the caller, and what is more is ignored.
    /// A message comes out with its last byte.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Option<Decoded>, FrameError> {
        self.buf
            .extend_from_slice(&bytes[..bytes.len().min(self.wanted())]);
        let len = match self.len {
            Some(len) => len,
            None => {
                if self.buf.len() < LENGTH_SIZE {
                    return Ok(None);
                }
                let len = usize::try_from(Decoder::new(&self.buf).word()?).unwrap_or(usize::MAX);
                if len < LENGTH_SIZE + HEADER_SIZE {
                    return Err(FrameError::TooSmall { len });
                }
                self.len = Some(len);
                len
            }
        };
        if len > MESSAGE_MAX && self.buf.len() >= LENGTH_SIZE + HEADER_SIZE {
            let header = Header::decode(&mut Decoder::new(&self.buf[LENGTH_SIZE..])).ok();
            return Err(FrameError::TooLarge { len, header });
        }
        if self.buf.len() < len {
            return Ok(None);
        }
        self.len = None;
        decode(std::mem::take(&mut self.buf)).map(Some)
    }
}

/// Decodes a message that is all there.
fn decode(mut bytes: Vec<u8>) -> Result<Decoded, FrameError> {
    let mut from = Decoder::new(&bytes[LENGTH_SIZE..]);
    let header = Header::decode(&mut from)?;
    let mut fds = 0;
    if has_fds(header.kind) {
        fds = usize::try_from(from.word()?).unwrap_or(usize::MAX);
        if fds > FDS_MAX {
            return Err(FrameError::TooManyFds { count: fds });
        }
    }
    let start = bytes.len() - from.rest().len();
    bytes.drain(..start);
    Ok(Decoded {
        frame: Frame {
            header,
            payload: bytes,
            fds: Vec::new(),
        },
        fds,
    })
}
