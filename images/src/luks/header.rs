//! The header of a LUKS volume, version 1 (LUKS on-disk format specification 1.2.3, section 3).

use crate::Error;

/// Bytes of the header.
pub const HEADER: usize = 592;
/// The key slots.
pub const SLOTS: usize = 8;
/// Stripes a key is split into: the specification's constant.
pub const STRIPES: u32 = 4000;

const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
const SLOT_ENABLED: u32 = 0x00ac_71f3;
const SLOT_DISABLED: u32 = 0x0000_dead;
/// More rounds than any tool chooses, and minutes of work: not a header to believe.
const MOST_ROUNDS: u32 = 200_000_000;
const SECTOR: u64 = 512;

/// A hash function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

/// A mode of AES.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// XTS, with two keys.
    Xts,
    /// Cipher block chaining.
    Cbc,
}

/// Where initial vectors come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vector {
    /// The sector number's low 32 bits.
    Plain,
    /// The sector number.
    Plain64,
    /// The sector number, encrypted with the key's SHA-256.
    EssivSha256,
}

/// How a volume is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spec {
    /// Mode of AES.
    pub mode: Mode,
    /// Initial vectors.
    pub vector: Vector,
    /// For PBKDF2 and the splitter.
    pub hash: Hash,
    /// Bytes of the volume key (XTS: of both together): 16, 24, 32, 48 or 64.
    pub key_bytes: usize,
}

impl Default for Spec {
    /// qemu-img's default, `aes-256`, `xts`, `plain64`, `sha256`.
    fn default() -> Self {
        Self {
            mode: Mode::Xts,
            vector: Vector::Plain64,
            hash: Hash::Sha256,
            key_bytes: 64,
        }
    }
}

impl Spec {
    /// Whether there is such a cipher.
    pub(super) fn check(&self) -> Result<(), String> {
        let lengths: &[usize] = match self.mode {
            Mode::Xts => &[32, 48, 64],
            Mode::Cbc => &[16, 24, 32],
        };
        if !lengths.contains(&self.key_bytes) {
            return Err(format!(
                "a key of {} bits for {}",
                self.key_bytes * 8,
                self.cipher_mode()
            ));
        }
        if (self.mode, self.vector) == (Mode::Xts, Vector::EssivSha256) {
            return Err("xts with essiv".to_owned());
        }
        Ok(())
    }

    pub(super) fn cipher_mode(&self) -> String {
        let mode = match self.mode {
            Mode::Xts => "xts",
            Mode::Cbc => "cbc",
        };
        let vector = match self.vector {
            Vector::Plain => "plain",
            Vector::Plain64 => "plain64",
            Vector::EssivSha256 => "essiv:sha256",
        };
        format!("{mode}-{vector}")
    }

    /// Bytes of a key's split material.
    pub(super) fn material(&self) -> usize {
        self.key_bytes * STRIPES as usize
    }
}

/// A key slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Slot {
    /// It holds the volume key, for whoever has its passphrase.
    pub enabled: bool,
    /// PBKDF2 rounds.
    pub rounds: u32,
    /// PBKDF2 salt.
    pub salt: [u8; 32],
    /// Where the key's material is: bytes from the header's start.
    pub offset: u64,
}

/// The header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// How the volume is encrypted.
    pub spec: Spec,
    /// Where the payload begins: bytes from the header's start.
    pub payload: u64,
    /// PBKDF2 of the volume key, to know it by.
    pub digest: [u8; 20],
    /// Its salt.
    pub digest_salt: [u8; 32],
    /// Its rounds.
    pub digest_rounds: u32,
    /// The volume's name, 36 characters.
    pub uuid: [u8; 40],
    /// The key slots.
    pub slots: [Slot; SLOTS],
}

/// Reads big-endian fields one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        let take = N.min(self.0.len());
        field[..take].copy_from_slice(&self.0[..take]);
        self.0 = &self.0[take..];
        field
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.bytes())
    }

    /// A name of 32 bytes, ended by a zero.
    fn name(&mut self) -> String {
        let field: [u8; 32] = self.bytes();
        let end = field.iter().position(|&byte| byte == 0).unwrap_or(32);
        String::from_utf8_lossy(&field[..end]).into_owned()
    }
}

impl Header {
    /// Whether these are the first bytes of a LUKS volume, of any version.
    #[must_use]
    pub fn recognise(start: &[u8]) -> bool {
        start.starts_with(MAGIC)
    }

    /// Reads a header; `room` is how many bytes there are for it, the key slots and the payload.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other versions, ciphers and hashes, [`Error::Corrupt`] where it
    /// contradicts itself.
    pub fn parse(image: &str, bytes: &[u8; HEADER], room: u64) -> Result<Self, Error> {
        let unsupported = |reason: String| Error::Unsupported {
            image: image.to_owned(),
            reason,
        };
        let corrupt = |reason: String| Error::Corrupt {
            image: image.to_owned(),
            reason,
        };
        let mut fields = Fields(bytes);
        if fields.bytes::<6>() != *MAGIC {
            return Err(corrupt("not a LUKS volume".to_owned()));
        }
        let version = u16::from_be_bytes(fields.bytes());
        if version != 1 {
            return Err(unsupported(format!("LUKS version {version}")));
        }
        let (cipher, mode, hash) = (fields.name(), fields.name(), fields.name());
        if cipher != "aes" {
            return Err(unsupported(format!("cipher {cipher:?}")));
        }
        let (mode, vector) = match mode.as_str() {
            "xts-plain64" => (Mode::Xts, Vector::Plain64),
            "xts-plain" => (Mode::Xts, Vector::Plain),
            "cbc-plain64" => (Mode::Cbc, Vector::Plain64),
            "cbc-plain" => (Mode::Cbc, Vector::Plain),
            "cbc-essiv:sha256" => (Mode::Cbc, Vector::EssivSha256),
            other => return Err(unsupported(format!("cipher mode {other:?}"))),
        };
        let hash = match hash.as_str() {
            "sha1" => Hash::Sha1,
            "sha256" => Hash::Sha256,
            "sha512" => Hash::Sha512,
            other => return Err(unsupported(format!("hash {other:?}"))),
        };
        let payload = u64::from(fields.u32()) * SECTOR;
        let spec = Spec {
            mode,
            vector,
            hash,
            key_bytes: fields.u32() as usize,
        };
        spec.check().map_err(unsupported)?;
        let digest = fields.bytes();
        let digest_salt = fields.bytes();
        let digest_rounds = fields.u32();
        let uuid = fields.bytes();
        let mut slots = [Slot::default(); SLOTS];
        for (i, slot) in slots.iter_mut().enumerate() {
            let active = fields.u32();
            if active != SLOT_ENABLED && active != SLOT_DISABLED {
                return Err(corrupt(format!("key slot {i} is neither on nor off")));
            }
            *slot = Slot {
                enabled: active == SLOT_ENABLED,
                rounds: fields.u32(),
                salt: fields.bytes(),
                offset: u64::from(fields.u32()) * SECTOR,
            };
            let stripes = fields.u32();
            if stripes != STRIPES {
                return Err(unsupported(format!(
                    "{stripes} stripes in key slot {i}, not {STRIPES}"
                )));
            }
            if slot.enabled && !(1..=MOST_ROUNDS).contains(&slot.rounds) {
                return Err(unsupported(format!(
                    "{} PBKDF2 rounds in key slot {i}",
                    slot.rounds
                )));
            }
        }
        if !(1..=MOST_ROUNDS).contains(&digest_rounds) {
            return Err(unsupported(format!("{digest_rounds} PBKDF2 rounds")));
        }
        let header = Self {
            spec,
            payload,
            digest,
            digest_salt,
            digest_rounds,
            uuid,
            slots,
        };
        header.check_layout(room).map_err(corrupt)?;
        Ok(header)
    }

    /// Header, key slots and payload must not lie on each other.
    fn check_layout(&self, room: u64) -> Result<(), String> {
        let len = self.spec.material() as u64;
        if self.payload > room {
            return Err("the payload begins beyond its end".to_owned());
        }
        let mut places: Vec<(u64, usize)> = (0..SLOTS)
            .map(|slot| (self.slots[slot].offset, slot))
            .collect();
        places.sort_unstable();
        let mut end = HEADER as u64;
        for (offset, slot) in places {
            if offset < end {
                return Err(format!("key slot {slot} lies on something else"));
            }
            end = offset + len;
        }
        if end > self.payload {
            return Err("the payload lies on a key slot".to_owned());
        }
        Ok(())
    }

    /// As it is on disk.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        fn name(out: &mut Vec<u8>, text: &str) {
            let end = out.len() + 32;
            out.extend(text.bytes().take(31));
            out.resize(end, 0);
        }
        let hash = match self.spec.hash {
            Hash::Sha1 => "sha1",
            Hash::Sha256 => "sha256",
            Hash::Sha512 => "sha512",
        };
        // Both fit: `parse` has read them from as many bits, `plan` has made them small.
        let sectors = |bytes: u64| ((bytes / SECTOR) as u32).to_be_bytes();
        let mut out = Vec::with_capacity(HEADER);
        out.extend(MAGIC);
        out.extend(1_u16.to_be_bytes());
        name(&mut out, "aes");
        name(&mut out, &self.spec.cipher_mode());
        name(&mut out, hash);
        out.extend(sectors(self.payload));
        out.extend((self.spec.key_bytes as u32).to_be_bytes());
        out.extend(self.digest);
        out.extend(self.digest_salt);
        out.extend(self.digest_rounds.to_be_bytes());
        out.extend(self.uuid);
        for slot in &self.slots {
            let active = if slot.enabled {
                SLOT_ENABLED
            } else {
                SLOT_DISABLED
            };
            out.extend(active.to_be_bytes());
            out.extend(slot.rounds.to_be_bytes());
            out.extend(slot.salt);
            out.extend(sectors(slot.offset));
            out.extend(STRIPES.to_be_bytes());
        }
        out
    }

    /// A header without keys, laid out as qemu-img does: everything on multiples of 4 KiB.
    pub(super) fn plan(spec: Spec) -> Self {
        const ALIGN: u64 = 4096;
        let step = (spec.material() as u64).next_multiple_of(ALIGN);
        let slots = std::array::from_fn(|i| Slot {
            offset: ALIGN + i as u64 * step,
            ..Slot::default()
        });
        Self {
            spec,
            payload: ALIGN + SLOTS as u64 * step,
            digest: [0; 20],
            digest_salt: [0; 32],
            digest_rounds: 1,
            uuid: [0; 40],
            slots,
        }
    }
}
