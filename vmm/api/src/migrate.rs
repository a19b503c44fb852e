//! The stream over which a machine moves from one process to another.
//!
//! Frames, little-endian: `u16` kind, `u16` version of the kind's layout, `u32` bytes that follow,
//! then those. Readers know the versions of a kind one by one and refuse others by name; what a
//! kind is missing is another kind, never another meaning of the same.
//!
//! ```text
//! each connection   preamble          source's daemon → target's daemon: which migration this is
//! the first one     hello             → what the machine is, and what its guest was shown of the CPU
//!                   verdict           ← it fits, or why not, and what it takes besides; nothing has moved so far
//! all               disk, disk zero   → the content of disks that go along, round by round, and
//!                                       again what the guest writes meanwhile
//!                   pages, zero,      → guest memory, round by round; a chunk of memory (or of a
//!                   packed, round       disk) has one connection, so that later content comes later
//! the first one     code              → where the guest's code is (hints, once, to whoever takes them)
//!                   code taken        ← the target has got ready for it as far as it will
//! the first one     state             → sections (`crate::saved`); the source stands still and has
//!                                       let go of its disks
//!                   verdict           ← the target has all of it, stands still too
//!                   ask               ← may I run?
//!                   grant, verdict    → yes, and the source never will again; or no, and why
//!                   running           ← it does
//! ```
//!
//! Who has the right to run is decided on the stream, by the two machines, and by nobody else: the
//! source gives it away with `grant`, once, and the target runs only when it has it. If the stream
//! breaks before, the source goes on.
//!
//! If it breaks between `grant` and `running`, only the target knows: it has got the grant and runs, or has seen the end
//! of the stream instead and never will. The source stands still meanwhile. Its daemon asks the target's, at the place
//! where the guest went: a connection whose preamble has the index [`ASKS`] is answered with a verdict, as soon as it is
//! known (well: it has come; refused: it never will).
//!
//! Left for later: post-copy (a kind that asks for a page), memory as a descriptor (a preamble
//! with one).

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::saved::CHUNK;

/// Longest JSON body, and longest row of sections in one frame.
const TEXT_MOST: u32 = 4 << 20;
/// Longest list of where code is.
const CODE_MOST: u32 = 1 << 20;
/// Most connections.
pub const CONNECTIONS_MOST: u32 = 64;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// JSON, [`Preamble`].
    Preamble = 1,
    /// JSON, [`Hello`].
    Hello = 2,
    /// JSON, [`Verdict`].
    Verdict = 3,
    /// `u64` offset in guest memory, then whole pages.
    Pages = 4,
    /// `u64` offset, `u64` length: whole pages that are zero.
    Zero = 5,
    /// `u64` offset, `u32` length, then so many bytes of whole pages as one zstd frame.
    Packed = 6,
    /// `u32`: the round that ends here, or `u32::MAX`: no more memory will come.
    Round = 7,
    /// Bytes of a row of sections; the frame with none ends it.
    State = 8,
    /// Nothing.
    Ask = 9,
    /// Nothing.
    Grant = 10,
    /// Nothing.
    Running = 11,
    /// Nothing: the peer is alive.
    Alive = 12,
    /// `u32` which of the hello's disks, `u64` offset in it, then its content there.
    Disk = 13,
    /// `u32` which of the hello's disks, `u64` offset, `u64` length: bytes that are zero.
    DiskZero = 14,
    /// [`Code`].
    Code = 15,
    /// Nothing.
    CodeTaken = 16,
}

impl Kind {
    const ALL: [Self; 16] = [
        Self::Preamble,
        Self::Hello,
        Self::Verdict,
        Self::Pages,
        Self::Zero,
        Self::Packed,
        Self::Round,
        Self::State,
        Self::Ask,
        Self::Grant,
        Self::Running,
        Self::Alive,
        Self::Disk,
        Self::DiskZero,
        Self::Code,
        Self::CodeTaken,
    ];

    /// The version this build writes, and the newest it reads.
    const fn version(self) -> u16 {
        1
    }

    /// The longest body it can have.
    const fn longest(self) -> u32 {
        match self {
            Self::Preamble | Self::Hello | Self::Verdict | Self::State => TEXT_MOST,
            // A chunk that does not get smaller is not packed.
            Self::Pages | Self::Packed | Self::Disk => CHUNK as u32 + 12,
            Self::Zero => 16,
            Self::DiskZero => 20,
            Self::Round => 4,
            Self::Code => CODE_MOST,
            Self::Ask | Self::Grant | Self::Running | Self::Alive | Self::CodeTaken => 0,
        }
    }
}

/// In the error of a source that has given the right to run away and does not know whether it arrived. For people:
/// programs have `Failure::undecided`, as the other side's own words are in such errors, too.
pub const UNKNOWN: &str = "whether the guest runs on the other side is not known";

/// The number of the last `Round` frame.
pub const LAST_ROUND: u32 = u32::MAX;
/// Bytes of a frame before its body.
pub const HEADER: usize = 8;

/// Why a stream can't go on.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The connection.
    #[error("the migration's connection: {0}")]
    Io(#[from] io::Error),
    /// The other side is of a Vireo that this one does not know.
    #[error("the other side sends {kind:?} of version {version}, which is not known here")]
    Version {
        /// Of what.
        kind: Kind,
        /// Its version.
        version: u16,
    },
    /// Not what belongs there.
    #[error("the other side does not keep to the migration's protocol: {0}")]
    Protocol(String),
    /// The other side says no.
    #[error("{0}")]
    Refused(String),
}

fn protocol<T>(what: impl Into<String>) -> Result<T, StreamError> {
    Err(StreamError::Protocol(what.into()))
}

/// A frame's first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// Bytes of its body.
    pub len: u32,
}

impl Header {
    /// Of a frame of `kind` with so many bytes.
    ///
    /// # Errors
    /// More than such a frame can have.
    pub fn new(kind: Kind, len: usize) -> Result<Self, StreamError> {
        match u32::try_from(len) {
            Ok(len) if len <= kind.longest() => Ok(Self { kind, len }),
            _ => protocol(format!("{kind:?} of {len} bytes")),
        }
    }

    /// As it is sent.
    #[must_use]
    pub fn encode(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..2].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[2..4].copy_from_slice(&self.kind.version().to_le_bytes());
        bytes[4..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// As it was received.
    ///
    /// # Errors
    /// An unknown kind or version, a body that is too long.
    pub fn decode(bytes: [u8; HEADER]) -> Result<Self, StreamError> {
        let [k0, k1, v0, v1, l0, l1, l2, l3] = bytes;
        let (number, version) = (u16::from_le_bytes([k0, k1]), u16::from_le_bytes([v0, v1]));
        let Some(kind) = Kind::ALL.into_iter().find(|kind| *kind as u16 == number) else {
            return protocol(format!("frame of kind {number}"));
        };
        if version != kind.version() {
            return Err(StreamError::Version { kind, version });
        }
        Self::new(kind, u32::from_le_bytes([l0, l1, l2, l3]) as usize)
    }

    /// Reads one.
    ///
    /// # Errors
    /// As [`Header::decode`]; the connection's.
    pub fn read(from: &mut impl Read) -> Result<Self, StreamError> {
        let mut bytes = [0; HEADER];
        from.read_exact(&mut bytes)?;
        Self::decode(bytes)
    }

    /// Reads the body, of at most a few MiB.
    ///
    /// # Errors
    /// The connection's.
    pub fn body(self, from: &mut impl Read) -> Result<Vec<u8>, StreamError> {
        let mut body = vec![0; self.len as usize];
        from.read_exact(&mut body)?;
        Ok(body)
    }
}

/// A whole frame.
///
/// # Errors
/// It would be too long.
pub fn frame(kind: Kind, body: &[u8]) -> Result<Vec<u8>, StreamError> {
    Ok([&Header::new(kind, body.len())?.encode(), body].concat())
}

/// A whole frame with a value.
///
/// # Errors
/// It would be too long, or can't be written down.
pub fn json_frame(kind: Kind, value: &impl Serialize) -> Result<Vec<u8>, StreamError> {
    frame(kind, &serde_json::to_vec(value).map_err(io::Error::from)?)
}

/// Sends one frame.
///
/// # Errors
/// The connection's.
pub fn send(to: &mut impl Write, kind: Kind, body: &[u8]) -> Result<(), StreamError> {
    Ok(to.write_all(&frame(kind, body)?)?)
}

/// Reads a frame of this kind, and what it says. A verdict that comes in its place is a refusal.
///
/// # Errors
/// Another frame; the connection's; the other side's refusal.
pub fn expect(from: &mut impl Read, kind: Kind) -> Result<Vec<u8>, StreamError> {
    loop {
        let header = Header::read(from)?;
        let body = header.body(from)?;
        return match header.kind {
            got if got == kind => Ok(body),
            Kind::Alive | Kind::CodeTaken => continue,
            Kind::Verdict => {
                let verdict: Verdict = parse(&body)?;
                verdict.into_result()?;
                protocol(format!("a verdict in place of {kind:?}"))
            }
            got => protocol(format!("{got:?} in place of {kind:?}")),
        };
    }
}

/// Reads a frame of this kind and its value.
///
/// # Errors
/// As [`expect`]; the value is another.
pub fn expect_json<T: DeserializeOwned>(
    from: &mut impl Read,
    kind: Kind,
) -> Result<T, StreamError> {
    parse(&expect(from, kind)?)
}

/// A frame's value.
///
/// # Errors
/// It is another.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, StreamError> {
    serde_json::from_slice(body).map_err(|error| StreamError::Protocol(error.to_string()))
}

/// The index of a connection that brings nothing: it asks what became of the guest.
pub const ASKS: u32 = u32::MAX;

/// Which migration a connection belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preamble {
    /// The domain.
    pub uuid: String,
    /// The secret that the target gave to whoever may come.
    pub token: String,
    /// Which of the connections this is, from 0; or [`ASKS`].
    pub index: u32,
    /// How many there are.
    pub total: u32,
}

/// What the source is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The source's program, for people.
    pub program: String,
    /// Bytes of guest memory.
    pub ram_bytes: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// What CPUID answers on the first vCPU: function, index where it matters, EAX to EDX.
    pub cpuid: Vec<(u32, Option<u32>, [u32; 4])>,
    /// Disks whose content goes along.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<HelloDisk>,
    /// Where guest memory holds much, as offset and length: a target may get ready for it before it comes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub content: Vec<(u64, u64)>,
}

/// A disk whose content goes along.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloDisk {
    /// Its id.
    pub id: String,
    /// The size the guest sees, bytes.
    pub bytes: u64,
}

/// What one side thinks of what the other has sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Why not; `None`: well.
    pub refused: Option<String>,
    /// What the target takes besides what it has to, in the verdict on the hello. (Builds that know nothing of it read
    /// over it, and send nothing of the kind.)
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub takes: Vec<Extra>,
}

/// What a target may take besides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extra {
    /// [`Kind::Code`].
    Code,
    /// Something that this build does not know.
    #[serde(untagged)]
    Other(serde_json::Value),
}

/// Where the guest's code is: guest-physical addresses of what its vCPUs have run lately. Hints: a target may make use of
/// them or not, and what is there may change until the guest stands still.
///
/// For each vCPU: `u32` its number, `u32` how many, and so many `u64`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Code {
    /// Of each vCPU, by its number.
    pub vcpus: BTreeMap<u32, Vec<u64>>,
}

impl Code {
    /// Of these vCPUs, of each as much as fits.
    #[must_use]
    pub fn new(vcpus: impl IntoIterator<Item = (u32, Vec<u64>)>) -> Self {
        let mut vcpus: BTreeMap<u32, Vec<u64>> = vcpus.into_iter().collect();
        vcpus.retain(|_, places| !places.is_empty());
        // Each vCPU's number and length take no more than an address.
        let all = CODE_MOST as usize / 8;
        let each = (all / vcpus.len().max(1)).saturating_sub(1);
        for places in vcpus.values_mut() {
            places.truncate(each);
        }
        Self { vcpus }
    }

    /// As a frame's body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        for (id, places) in &self.vcpus {
            body.extend(id.to_le_bytes());
            body.extend(u32::try_from(places.len()).unwrap_or(0).to_le_bytes());
            body.extend(places.iter().flat_map(|place| place.to_le_bytes()));
        }
        body
    }

    /// As it came.
    ///
    /// # Errors
    /// It is not one.
    pub fn decode(body: &[u8]) -> Result<Self, StreamError> {
        let mut vcpus = BTreeMap::new();
        let mut rest = body;
        while let Some((head, after)) = rest.split_first_chunk::<8>() {
            let [id, count] = [&head[..4], &head[4..]].map(|word| {
                let word = word.try_into().map_or(0, u32::from_le_bytes);
                word as usize
            });
            let Some((places, after)) = after.split_at_checked(count * 8) else {
                return protocol("a list of code that ends too early");
            };
            let (places, _) = places.as_chunks::<8>();
            let places = places.iter().map(|place| u64::from_le_bytes(*place));
            if vcpus.insert(id as u32, places.collect()).is_some() {
                return protocol(format!("two lists of code of vCPU {id}"));
            }
            rest = after;
        }
        match rest {
            [] => Ok(Self { vcpus }),
            _ => protocol("a list of code that ends too early"),
        }
    }
}

impl Verdict {
    /// Go on.
    #[must_use]
    pub fn well() -> Self {
        Self {
            refused: None,
            takes: Vec::new(),
        }
    }

    /// No.
    #[must_use]
    pub fn refused(why: impl Into<String>) -> Self {
        Self {
            refused: Some(why.into()),
            takes: Vec::new(),
        }
    }

    /// As a result.
    ///
    /// # Errors
    /// The refusal.
    pub fn into_result(self) -> Result<(), StreamError> {
        self.refused
            .map_or(Ok(()), |why| Err(StreamError::Refused(why)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_keep_their_layout() {
        // What an older Vireo has sent, to the byte.
        assert_eq!(
            frame(Kind::Round, &7u32.to_le_bytes()).unwrap(),
            [7, 0, 1, 0, 4, 0, 0, 0, 7, 0, 0, 0]
        );
        let verdict = json_frame(Kind::Verdict, &Verdict::well()).unwrap();
        assert_eq!(verdict[8..], *br#"{"refused":null}"#);
        let got: Verdict = expect_json(&mut &verdict[..], Kind::Verdict).unwrap();
        assert_eq!(got, Verdict::well());
    }

    #[test]
    fn what_a_target_takes_besides_is_told_to_whoever_knows_it() {
        let takes = Verdict {
            takes: vec![Extra::Code],
            ..Verdict::well()
        };
        let text = serde_json::to_string(&takes).unwrap();
        assert_eq!(text, r#"{"refused":null,"takes":["code"]}"#);
        assert_eq!(parse::<Verdict>(text.as_bytes()).unwrap(), takes);
        let newer = br#"{"refused":null,"takes":["tea",{"milk":1},"code"],"more":1}"#;
        let newer: Verdict = parse(newer).unwrap();
        assert!(newer.takes.contains(&Extra::Code));
        newer.into_result().unwrap();
    }

    #[test]
    fn lists_of_code_keep_their_layout_and_fit() {
        let code = Code::new([(2, vec![0x1000, 0x2040]), (1, Vec::new()), (0, vec![7])]);
        let body = code.encode();
        assert_eq!(body[..16], [0, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(body.len(), 8 + 8 + 8 + 16);
        assert_eq!(Code::decode(&body).unwrap(), code);
        for cut in 1..body.len() {
            let whole = cut == 16;
            assert_eq!(Code::decode(&body[..cut]).is_ok(), whole, "{cut}");
        }
        let twice = [&body[..16], &body[..16]].concat();
        assert!(Code::decode(&twice).is_err());
        let endless = [[0xff; 8], [0; 8]].concat();
        assert!(Code::decode(&endless).is_err());
        let much = Code::new((0..255).map(|id| (id, vec![1; 10_000])));
        assert!(frame(Kind::Code, &much.encode()).is_ok());
        assert_eq!(much.vcpus.len(), 255);
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let mut newer = frame(Kind::Grant, &[]).unwrap();
        newer[2] = 2;
        let error = expect(&mut &newer[..], Kind::Grant).unwrap_err();
        assert!(error.to_string().contains("Grant of version 2"), "{error}");
        let unknown = [99, 0, 1, 0, 0, 0, 0, 0];
        let error = expect(&mut &unknown[..], Kind::Grant).unwrap_err();
        assert!(error.to_string().contains("kind 99"), "{error}");
        let long = [4, 0, 1, 0, 255, 255, 255, 255];
        let error = expect(&mut &long[..], Kind::Pages).unwrap_err();
        assert!(error.to_string().contains("bytes"), "{error}");
    }

    #[test]
    fn a_refusal_comes_in_any_place() {
        let no = json_frame(Kind::Verdict, &Verdict::refused("the CPU lacks avx2")).unwrap();
        let error = expect(&mut &no[..], Kind::Grant).unwrap_err();
        assert_eq!(error.to_string(), "the CPU lacks avx2");
        let alive = frame(Kind::Alive, &[]).unwrap();
        let both = [alive, frame(Kind::Ask, &[]).unwrap()].concat();
        expect(&mut &both[..], Kind::Ask).unwrap();
    }
}
