//! Sections: one part of a machine's state each, one behind the other in a file or a stream.
//!
//! A section is `u32` length, `u32` CRC-32C, and so many bytes of JSON: an object with the part's
//! id, its kind, the version of its layout, and its state. Length 0 ends the row. Readers need not
//! know how many there are, nor seek.

use std::io::{Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{SavedError, damaged};

/// Longest section.
const LONGEST: u32 = 128 << 20;

/// The state of one part of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Which part: `vcpu0`, `ioapic`, or a device's id.
    pub id: String,
    /// What kind of part.
    pub kind: String,
    /// Version of the state's layout. Readers know older ones, and refuse newer ones.
    pub version: u32,
    /// All of it as it is written. A guest waits for its states: they go from structs to text and back without a stop.
    body: Vec<u8>,
}

#[derive(Serialize)]
struct Whole<'a, T> {
    id: &'a str,
    kind: &'a str,
    version: u32,
    state: &'a T,
}

#[derive(Deserialize)]
struct Head {
    id: String,
    kind: String,
    version: u32,
    #[serde(rename = "state")]
    _state: serde::de::IgnoredAny,
}

#[derive(Deserialize)]
struct OnlyState<T> {
    state: T,
}

impl Section {
    /// Writes a state down.
    ///
    /// # Errors
    /// It can't be.
    pub fn new(
        id: impl Into<String>,
        kind: impl Into<String>,
        version: u32,
        state: &impl Serialize,
    ) -> Result<Self, serde_json::Error> {
        let (id, kind) = (id.into(), kind.into());
        let body = serde_json::to_vec(&Whole {
            id: &id,
            kind: &kind,
            version,
            state,
        })?;
        Ok(Self {
            id,
            kind,
            version,
            body,
        })
    }

    /// The state.
    ///
    /// # Errors
    /// It is another.
    pub fn state<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.body).map(|OnlyState { state }| state)
    }
}

/// Writes one.
///
/// # Errors
/// It is too long; the writer's refusal.
pub fn write_section(to: &mut impl Write, section: &Section) -> Result<(), SavedError> {
    let body = &section.body;
    let len = u32::try_from(body.len())
        .ok()
        .filter(|len| *len <= LONGEST)
        .ok_or(SavedError::TooMuch {
            what: "a device's state",
            bytes: body.len() as u64,
        })?;
    to.write_all(&len.to_le_bytes())?;
    to.write_all(&crc32c::crc32c(body).to_le_bytes())?;
    to.write_all(body)?;
    Ok(())
}

/// Ends the row.
///
/// # Errors
/// The writer's refusal.
pub fn write_end(to: &mut impl Write) -> Result<(), SavedError> {
    Ok(to.write_all(&[0; 8])?)
}

/// Reads the next; `None` at the row's end.
///
/// # Errors
/// It is damaged; the reader's refusal.
pub fn read_section(from: &mut impl Read) -> Result<Option<Section>, SavedError> {
    let mut word = [0; 4];
    let mut next = |from: &mut dyn Read| -> Result<u32, SavedError> {
        from.read_exact(&mut word).map_err(early)?;
        Ok(u32::from_le_bytes(word))
    };
    let len = next(from)?;
    let sum = next(from)?;
    if len == 0 {
        return Ok(None);
    }
    if len > LONGEST {
        return Err(damaged(format!("a state of {len} bytes")));
    }
    let mut body = Vec::new();
    // Grows with what is really there.
    from.take(len.into()).read_to_end(&mut body)?;
    if body.len() != len as usize {
        return Err(damaged("a state ends too early"));
    }
    if crc32c::crc32c(&body) != sum {
        return Err(damaged("a state has another checksum"));
    }
    let head: Head =
        serde_json::from_slice(&body).map_err(|error| damaged(format!("a state: {error}")))?;
    Ok(Some(Section {
        id: head.id,
        kind: head.kind,
        version: head.version,
        body,
    }))
}

fn early(error: std::io::Error) -> SavedError {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => damaged("the states end too early"),
        _ => error.into(),
    }
}
