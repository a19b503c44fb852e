//! Saved images: a whole machine in a file.
//!
//! ```text
//!      0  header (one page): what is where, checksums
//!   4096  two places for the domain's XML, one of them in use
//!         device states: sections, as they would go over a stream (see `section`)
//!         a checksum for each chunk of RAM
//!         RAM, page-aligned and sparse, to the file's end
//! ```
//!
//! Little-endian. RAM lies in the file as it lies in the guest (without the hole below 4 GiB), so
//! that whoever restores can map it, and pages come in when they are touched. What comes before it
//! is read and checked at once; RAM has checksums of its own, so that checking it is a choice: it
//! takes as long as reading it.
//!
//! The header is written last: a file that was not finished has none.

mod header;
mod ram;
mod section;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

pub use header::{Header, Id, PAGE};
pub use ram::{CHUNK, ChunkSum, runs, verify_chunk};
pub use section::{Section, read_section, write_end, write_section};

/// Longest domain XML.
pub const XML_MOST: usize = 16 << 20;
/// Longest device states.
pub const STATE_MOST: u64 = 256 << 20;

/// Room for states that are not known yet.
const STATE_ROOM: u64 = 64 << 20;

/// Why a file can't be used as a saved image, or can't be made one.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// Another kind of file.
    #[error("it is not a saved image of Vireo")]
    Foreign,
    /// A later Vireo's.
    #[error("its format is version {0}, which is not known here ({v})", v = header::VERSION)]
    Version(u32),
    /// Its writer did not come to its end.
    #[error("it was not finished")]
    Unfinished,
    /// Shorter or longer than it was made.
    #[error("it is truncated: it has {have} bytes of {want}")]
    Length {
        /// Bytes that are there.
        have: u64,
        /// Bytes that should be.
        want: u64,
    },
    /// What is there is not what was written.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// More than such a file can hold.
    #[error("{what}: {bytes} bytes are too many")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// How much.
        bytes: u64,
    },
    /// The system's refusal.
    #[error("{0}")]
    Io(#[from] io::Error),
}

fn damaged(what: impl Into<String>) -> SavedError {
    SavedError::Damaged(what.into())
}

/// Reads exactly these bytes of the file.
fn read_at(file: &File, offset: u64, len: usize) -> Result<Vec<u8>, SavedError> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged("it ends too early"),
            _ => error.into(),
        })?;
    Ok(bytes)
}

/// A new image: everything but RAM. Nothing of it counts before [`Plan::finish`].
#[derive(Debug)]
pub struct Plan {
    header: Header,
    sums: Vec<u32>,
}

impl Plan {
    /// Lays the image out and writes XML and states into the empty `file`. `running`: its guest
    /// ran, and is to run when it is restored.
    ///
    /// # Errors
    /// Too much of something; the system's refusal.
    pub fn begin(
        file: &File,
        id: Id,
        xml: &str,
        running: bool,
        sections: &[Section],
        ram_bytes: u64,
    ) -> Result<Self, SavedError> {
        let states = row(sections)?;
        let mut plan = Self::lay_out(file, id, xml, states.len() as u64, ram_bytes)?;
        plan.write_states(file, running, &states)?;
        Ok(plan)
    }

    /// The same before the states are known, with room for any usual ones (which costs nothing: the file is
    /// sparse). [`Plan::set_states`] has to follow.
    ///
    /// # Errors
    /// As [`Plan::begin`].
    pub fn reserve(file: &File, id: Id, xml: &str, ram_bytes: u64) -> Result<Self, SavedError> {
        Self::lay_out(file, id, xml, STATE_ROOM, ram_bytes)
    }

    fn lay_out(
        file: &File,
        id: Id,
        xml: &str,
        state_room: u64,
        ram_bytes: u64,
    ) -> Result<Self, SavedError> {
        let mut header = Header::lay_out(id, xml.len(), state_room, ram_bytes)?;
        let chunks = usize::try_from(header.chunks()).map_err(|_| SavedError::TooMuch {
            what: "RAM",
            bytes: ram_bytes,
        })?;
        file.set_len(header.file_bytes)?;
        file.write_all_at(xml.as_bytes(), header.xml_at(0))?;
        header.xml_sum = crc32c::crc32c(xml.as_bytes());
        Ok(Self {
            header,
            sums: vec![0; chunks],
        })
    }

    /// Writes the states.
    ///
    /// # Errors
    /// They are more than there is room for; the system's refusal.
    pub fn set_states(
        &mut self,
        file: &File,
        running: bool,
        sections: &[Section],
    ) -> Result<(), SavedError> {
        self.write_states(file, running, &row(sections)?)
    }

    fn write_states(
        &mut self,
        file: &File,
        running: bool,
        states: &[u8],
    ) -> Result<(), SavedError> {
        let (len, header) = (states.len() as u64, &mut self.header);
        if header.state_offset + len > header.table_offset {
            return Err(SavedError::TooMuch {
                what: "device states",
                bytes: len,
            });
        }
        file.write_all_at(states, header.state_offset)?;
        header.state_len = len;
        header.state_sum = crc32c::crc32c(states);
        header.running = running;
        Ok(())
    }

    /// Where in the file guest RAM begins.
    #[must_use]
    pub fn ram_offset(&self) -> u64 {
        self.header.ram_offset
    }

    /// Notes the checksum of chunk `index`, which has been written.
    pub fn set_sum(&mut self, index: usize, sum: ChunkSum) {
        if let Some(place) = self.sums.get_mut(index) {
            *place = sum.value();
        }
    }

    /// Makes it an image, on the disk.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn finish(mut self, file: &File) -> Result<(), SavedError> {
        let table: Vec<u8> = self.sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
        self.header.table_sum = crc32c::crc32c(&table);
        file.write_all_at(&table, self.header.table_offset)?;
        // Before the header says that all of it is there.
        file.sync_data()?;
        file.write_all_at(&self.header.encode(), 0)?;
        file.sync_all()?;
        Ok(())
    }
}

/// Sections one behind the other.
fn row(sections: &[Section]) -> Result<Vec<u8>, SavedError> {
    let mut states = Vec::new();
    for section in sections {
        write_section(&mut states, section)?;
    }
    write_end(&mut states)?;
    Ok(states)
}

/// An image that has been opened, and whose header holds.
#[derive(Debug)]
pub struct Image<'a> {
    file: &'a File,
    /// Its header.
    pub header: Header,
}

impl<'a> Image<'a> {
    /// Reads and checks a file's header, and its length.
    ///
    /// # Errors
    /// Why it is no image that can be restored.
    pub fn open(file: &'a File) -> Result<Self, SavedError> {
        let have = file.metadata()?.len();
        if have < PAGE {
            let mut magic = [0; 8];
            let whole = file.read_exact_at(&mut magic, 0).is_ok();
            return Err(if whole && magic == header::MAGIC {
                SavedError::Length { have, want: PAGE }
            } else {
                SavedError::Foreign
            });
        }
        let mut bytes = [0; header::LEN];
        file.read_exact_at(&mut bytes, 0)?;
        let header = Header::decode(&bytes)?;
        if have != header.file_bytes {
            return Err(SavedError::Length {
                have,
                want: header.file_bytes,
            });
        }
        Ok(Self { file, header })
    }

    /// The domain's XML.
    ///
    /// # Errors
    /// It is damaged.
    pub fn xml(&self) -> Result<String, SavedError> {
        let at = self.header.xml_at(self.header.xml_slot);
        let bytes = read_at(self.file, at, self.header.xml_len as usize)?;
        if crc32c::crc32c(&bytes) != self.header.xml_sum {
            return Err(damaged("the domain's XML has another checksum"));
        }
        String::from_utf8(bytes).map_err(|_| damaged("the domain's XML is not text"))
    }

    /// The states of the machine and its devices.
    ///
    /// # Errors
    /// They are damaged.
    pub fn sections(&self) -> Result<Vec<Section>, SavedError> {
        let len = usize::try_from(self.header.state_len)
            .ok()
            .filter(|_| self.header.state_len <= STATE_MOST)
            .ok_or(SavedError::TooMuch {
                what: "device states",
                bytes: self.header.state_len,
            })?;
        let bytes = read_at(self.file, self.header.state_offset, len)?;
        if crc32c::crc32c(&bytes) != self.header.state_sum {
            return Err(damaged("the devices' states have another checksum"));
        }
        let mut rest = &bytes[..];
        let mut sections = Vec::new();
        while let Some(section) = read_section(&mut rest)? {
            sections.push(section);
        }
        Ok(sections)
    }

    /// The checksums of all chunks of RAM, in order.
    ///
    /// # Errors
    /// They are damaged themselves.
    pub fn sums(&self) -> Result<Vec<u32>, SavedError> {
        let len = usize::try_from(self.header.chunks())
            .ok()
            .and_then(|chunks| chunks.checked_mul(4))
            .ok_or_else(|| damaged("it has too many chunks"))?;
        let table = read_at(self.file, self.header.table_offset, len)?;
        if crc32c::crc32c(&table) != self.header.table_sum {
            return Err(damaged("the checksums of RAM have another checksum"));
        }
        let (words, _) = table.as_chunks::<4>();
        Ok(words.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }

    /// Checks everything before RAM: XML, states, table of checksums.
    ///
    /// # Errors
    /// What is damaged.
    pub fn check(&self) -> Result<(), SavedError> {
        self.xml()?;
        self.sections()?;
        self.sums().map(drop)
    }

    /// Replaces the domain's XML, and whether the guest is to run; RAM and states stay where
    /// they are. At every moment the file is a whole image, with the old XML or the new one.
    /// `file` is open for writing.
    ///
    /// # Errors
    /// The XML needs more room than there is; the system's refusal.
    pub fn set_xml(&mut self, xml: &str, running: bool) -> Result<(), SavedError> {
        let len = u32::try_from(xml.len())
            .ok()
            .filter(|len| *len <= self.header.xml_capacity)
            .ok_or(SavedError::TooMuch {
                what: "domain XML",
                bytes: xml.len() as u64,
            })?;
        let mut header = self.header.clone();
        header.xml_slot = 1 - header.xml_slot.min(1);
        header.xml_len = len;
        header.xml_sum = crc32c::crc32c(xml.as_bytes());
        header.running = running;
        self.file
            .write_all_at(xml.as_bytes(), header.xml_at(header.xml_slot))?;
        self.file.sync_data()?;
        // Less than a sector: a power cut leaves the old one or the new one.
        self.file.write_all_at(&header.encode_short(), 0)?;
        self.file.sync_data()?;
        self.header = header;
        Ok(())
    }
}
