//! LUKS, version 1: encrypted images, and the header of encrypted qcow2 images.
//!
//! A volume key encrypts the content; each of eight key slots holds that key, encrypted with a key
//! that PBKDF2 makes of a passphrase. Passphrases belong to the caller; keys are zeroed when
//! dropped.

mod cipher;
mod header;
mod kdf;

use std::cell::RefCell;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use zeroize::Zeroizing;

use crate::image::check_range;
use crate::iovec::{self, AlignedBuf};
use crate::{Cipher, Error, Extent, File, Image, ImageInfo, IoBuf};
use cipher::{SECTOR, SectorCipher};
pub use header::{HEADER, Hash, Header, Mode, SLOTS, STRIPES, Slot, Spec, Vector};

/// The fewest PBKDF2 rounds of what is made here.
const FEWEST_ROUNDS: u32 = 1000;
/// How much is read and decrypted, or encrypted and written, at a time.
const PIECE: usize = 256 << 10;

/// A passphrase. Zeroed when dropped, and never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrase")
    }
}

impl Passphrase {
    /// The most bytes it may have.
    pub const MOST: usize = 64 << 10;

    /// All of `from` is the passphrase, a newline at its end as well.
    ///
    /// # Errors
    /// The reader's; `InvalidData` if it is longer than [`Passphrase::MOST`].
    pub fn read(from: impl io::Read) -> io::Result<Self> {
        // All the room at once: a buffer that grows would leave copies behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(Self::MOST + 64));
        io::Read::read_to_end(&mut from.take(Self::MOST as u64 + 1), &mut bytes)?;
        if bytes.len() > Self::MOST {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the passphrase is too long",
            ));
        }
        Ok(Self(bytes))
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for Passphrase {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }
}

/// Where a LUKS header and its key slots are stored: offsets from the header's start.
pub trait Store {
    /// The image's name, for messages.
    fn name(&self) -> &str;
    /// Bytes there are.
    ///
    /// # Errors
    /// The host's I/O.
    fn room(&self) -> Result<u64, Error>;
    /// Fills `data`.
    ///
    /// # Errors
    /// The host's I/O.
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error>;
    /// Writes `data`.
    ///
    /// # Errors
    /// The host's I/O.
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error>;
    /// What was written reaches stable storage.
    ///
    /// # Errors
    /// The host's I/O.
    fn flush(&self) -> Result<(), Error>;
}

/// A part of a file, for the header of a qcow2 image.
#[derive(Debug, Clone, Copy)]
pub struct FilePart<'a> {
    /// The file.
    pub file: &'a File,
    /// Where it begins, bytes.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

impl FilePart<'_> {
    fn at(&self, offset: u64, len: usize) -> Result<u64, Error> {
        offset
            .checked_add(len as u64)
            .filter(|&end| end <= self.len)
            .and_then(|_| self.start.checked_add(offset))
            .ok_or_else(|| Error::Corrupt {
                image: self.file.name().to_owned(),
                reason: "the LUKS header is longer than its place".to_owned(),
            })
    }
}

impl Store for FilePart<'_> {
    fn name(&self) -> &str {
        self.file.name()
    }
    fn room(&self) -> Result<u64, Error> {
        Ok(self.len)
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.file.read_bytes(self.at(offset, data.len())?, data)
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.file.write_bytes(self.at(offset, data.len())?, data)
    }
    fn flush(&self) -> Result<(), Error> {
        self.file.sync()
    }
}

/// All of an image, for a LUKS image.
#[derive(Debug, Clone, Copy)]
pub struct ImageStore<'a> {
    /// The image.
    pub image: &'a dyn Image,
    /// Its name.
    pub name: &'a str,
}

impl Store for ImageStore<'_> {
    fn name(&self) -> &str {
        self.name
    }
    fn room(&self) -> Result<u64, Error> {
        Ok(self.image.size())
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.image.read(offset, &[IoBuf::from_slice(data)])
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        // SAFETY: only read from, and borrowed until the call returns.
        let buf = unsafe { IoBuf::new(data.as_ptr().cast_mut(), data.len()) };
        self.image.write(offset, &[buf])
    }
    fn flush(&self) -> Result<(), Error> {
        self.image.flush()
    }
}

fn fill_random(data: &mut [u8]) -> Result<(), Error> {
    let mut done = 0;
    while done < data.len() {
        let left = &mut data[done..];
        // SAFETY: writes at most as many bytes as the slice has.
        let got = unsafe { libc::getrandom(left.as_mut_ptr().cast(), left.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => done += got,
            Err(_) => {
                let source = io::Error::last_os_error();
                if source.kind() != io::ErrorKind::Interrupted {
                    return Err(Error::Io {
                        what: "getting random numbers".to_owned(),
                        source,
                    });
                }
            }
        }
    }
    Ok(())
}

/// Equal, in a time that does not tell where they differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

/// An unlocked LUKS header: the volume key is known.
pub struct Volume {
    header: Header,
    key: Zeroizing<Vec<u8>>,
    /// The slot whose passphrase was given.
    slot: usize,
}

impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Volume")
            .field("header", &self.header)
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}

/// Reads the header of `store`.
///
/// # Errors
/// [`Header::parse`]'s, the host's I/O.
pub fn read_header(store: &dyn Store) -> Result<Header, Error> {
    let room = store.room()?;
    let mut bytes = [0; HEADER];
    if room < HEADER as u64 {
        return Err(Error::Corrupt {
            image: store.name().to_owned(),
            reason: "shorter than a LUKS header".to_owned(),
        });
    }
    store.read(0, &mut bytes)?;
    Header::parse(store.name(), &bytes, room)
}

/// Bytes that a header with its key slots takes.
///
/// # Errors
/// [`Error::Invalid`]: there is no such cipher.
pub fn header_len(spec: &Spec) -> Result<u64, Error> {
    spec.check()
        .map_err(|reason| Error::Invalid(format!("LUKS: {reason}")))?;
    Ok(Header::plan(*spec).payload)
}

impl Volume {
    /// Opens a volume with a passphrase, which any of the key slots may hold.
    ///
    /// # Errors
    /// [`Error::Passphrase`], [`Header::parse`]'s, the host's I/O.
    pub fn open(store: &dyn Store, passphrase: &[u8]) -> Result<Self, Error> {
        let header = read_header(store)?;
        for slot in 0..SLOTS {
            if !header.slots[slot].enabled {
                continue;
            }
            if let Some(key) = unlock(store, &header, slot, passphrase)? {
                return Ok(Self { header, key, slot });
            }
        }
        Err(Error::Passphrase {
            image: store.name().to_owned(),
        })
    }

    /// Writes a new header with a new volume key, whose slot 0 `passphrase` opens. PBKDF2 is
    /// given `time` (qemu-img's default is 2 s) on this machine. `store` must have room for
    /// [`header_len`] bytes.
    ///
    /// # Errors
    /// [`Error::Invalid`]: there is no such cipher; the host's I/O.
    pub fn create(
        store: &dyn Store,
        spec: Spec,
        passphrase: &[u8],
        time: Duration,
    ) -> Result<Self, Error> {
        header_len(&spec)?;
        let mut header = Header::plan(spec);
        let mut key = Zeroizing::new(vec![0; spec.key_bytes]);
        fill_random(&mut key)?;
        fill_random(&mut header.digest_salt)?;
        for slot in &mut header.slots {
            fill_random(&mut slot.salt)?;
        }
        let mut uuid = [0; 16];
        fill_random(&mut uuid)?;
        header.uuid = uuid_text(uuid);
        // An eighth for knowing the key, as qemu-img and cryptsetup do.
        let digest_len = header.digest.len();
        header.digest_rounds = kdf::rounds_in(spec.hash, digest_len, time / 8).max(FEWEST_ROUNDS);
        let digest = kdf::pbkdf2(
            spec.hash,
            &key,
            &header.digest_salt,
            header.digest_rounds,
            digest_len,
        );
        header.digest.copy_from_slice(&digest);
        let mut volume = Self {
            header,
            key,
            slot: 0,
        };
        // What was there before must not look like a header until this one is whole.
        volume.write_slot(store, 0, passphrase, time)?;
        Ok(volume)
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The key slot that the passphrase opened.
    #[must_use]
    pub fn slot(&self) -> usize {
        self.slot
    }

    /// What encrypts the content.
    ///
    /// # Errors
    /// None that [`Header::parse`] and [`Volume::create`] have not found before.
    pub fn cipher(&self) -> Result<Arc<dyn Cipher>, Error> {
        Ok(Arc::new(keyed(&self.header.spec, &self.key)?))
    }

    /// Lets another passphrase open the volume too: in `slot`, which must be free unless `replace`
    /// says that what it holds is lost, or the first free one. Returns which.
    ///
    /// # Errors
    /// [`Error::Invalid`]: no such free slot; the host's I/O.
    pub fn add_key(
        &mut self,
        store: &dyn Store,
        slot: Option<usize>,
        passphrase: &[u8],
        time: Duration,
        replace: bool,
    ) -> Result<usize, Error> {
        let slots = &self.header.slots;
        let free = |slot: &usize| slots.get(*slot).is_some_and(|s| !s.enabled);
        let usable = |slot: &usize| free(slot) || replace && *slot < slots.len();
        let slot = match slot {
            Some(slot) => Some(slot).filter(usable).ok_or_else(|| {
                Error::Invalid(format!("{}: key slot {slot} is not free", store.name()))
            })?,
            None => (0..SLOTS)
                .find(free)
                .ok_or_else(|| Error::Invalid(format!("{}: no key slot is free", store.name())))?,
        };
        self.write_slot(store, slot, passphrase, time)?;
        Ok(slot)
    }

    /// Whether a passphrase opens the volume by that slot.
    ///
    /// # Errors
    /// The host's I/O.
    pub fn opens(&self, store: &dyn Store, slot: usize, passphrase: &[u8]) -> Result<bool, Error> {
        if !self.header.slots.get(slot).is_some_and(|s| s.enabled) {
            return Ok(false);
        }
        Ok(unlock(store, &self.header, slot, passphrase)?.is_some())
    }

    /// Wipes a key slot: its passphrase opens the volume no more. The last one only with `force`:
    /// nobody can open the volume then, ever.
    ///
    /// # Errors
    /// [`Error::Invalid`]: no such slot in use, or the last one; the host's I/O.
    pub fn remove_key(&mut self, store: &dyn Store, slot: usize, force: bool) -> Result<(), Error> {
        let name = store.name();
        let invalid = |what: &str| Err(Error::Invalid(format!("{name}: key slot {slot} {what}")));
        if !self.header.slots.get(slot).is_some_and(|s| s.enabled) {
            return invalid("is not in use");
        }
        let in_use = self.header.slots.iter().filter(|s| s.enabled).count();
        if in_use == 1 && !force {
            return invalid("is the last one: without it the content is lost");
        }
        // First the slot goes, then its material: at no time is a half-wiped slot in use.
        self.header.slots[slot].enabled = false;
        self.header.slots[slot].rounds = 0;
        self.header.slots[slot].salt = [0; 32];
        store.write(0, &self.header.to_bytes())?;
        store.flush()?;
        let mut noise = vec![0; self.header.spec.material()];
        fill_random(&mut noise)?;
        store.write(self.header.slots[slot].offset, &noise)?;
        store.flush()
    }

    fn write_slot(
        &mut self,
        store: &dyn Store,
        slot: usize,
        passphrase: &[u8],
        time: Duration,
    ) -> Result<(), Error> {
        let spec = self.header.spec;
        let mut entry = self.header.slots[slot];
        entry.enabled = true;
        fill_random(&mut entry.salt)?;
        entry.rounds = kdf::rounds_in(spec.hash, spec.key_bytes, time).max(FEWEST_ROUNDS);
        let key = kdf::pbkdf2(
            spec.hash,
            passphrase,
            &entry.salt,
            entry.rounds,
            spec.key_bytes,
        );
        let mut material = Zeroizing::new(vec![0; spec.material()]);
        fill_random(&mut material)?;
        kdf::split(spec.hash, &self.key, &mut material);
        keyed(&spec, &key)?.encrypt(0, &mut material);
        store.write(entry.offset, &material)?;
        store.flush()?;
        self.header.slots[slot] = entry;
        store.write(0, &self.header.to_bytes())?;
        store.flush()
    }
}

fn keyed(spec: &Spec, key: &[u8]) -> Result<SectorCipher, Error> {
    SectorCipher::new(spec.mode, spec.vector, key)
        .ok_or_else(|| Error::Invalid(format!("LUKS: no {} with such a key", spec.cipher_mode())))
}

/// The volume key from a slot, if the passphrase is the slot's.
fn unlock(
    store: &dyn Store,
    header: &Header,
    slot: usize,
    passphrase: &[u8],
) -> Result<Option<Zeroizing<Vec<u8>>>, Error> {
    let (spec, slot) = (&header.spec, &header.slots[slot]);
    let key = kdf::pbkdf2(
        spec.hash,
        passphrase,
        &slot.salt,
        slot.rounds,
        spec.key_bytes,
    );
    let mut material = Zeroizing::new(vec![0; spec.material()]);
    store.read(slot.offset, &mut material)?;
    keyed(spec, &key)?.decrypt(0, &mut material);
    let volume_key = kdf::merge(spec.hash, &material, spec.key_bytes);
    let digest = kdf::pbkdf2(
        spec.hash,
        &volume_key,
        &header.digest_salt,
        header.digest_rounds,
        header.digest.len(),
    );
    Ok(same(&digest, &header.digest).then_some(volume_key))
}

/// A random (version 4) UUID's text, ended by zeroes.
fn uuid_text(mut random: [u8; 16]) -> [u8; 40] {
    random[6] = random[6] & 0x0f | 0x40;
    random[8] = random[8] & 0x3f | 0x80;
    let mut text = [0; 40];
    let mut at = 0;
    for (i, byte) in random.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text[at] = b'-';
            at += 1;
        }
        for digit in [byte >> 4, byte & 15] {
            text[at] = b"0123456789abcdef"[usize::from(digit)];
            at += 1;
        }
    }
    text
}

/// A LUKS image: the content of another one, decrypted.
#[derive(Debug)]
pub struct Luks {
    below: Arc<dyn Image>,
    payload: u64,
    cipher: Arc<dyn Cipher>,
    /// Held for writing by what changes a part of a sector, for reading by every other write.
    partial: RwLock<()>,
}

thread_local! {
    /// Each thread's buffer for what is stored. Not made anew each time: fresh pages cost more
    /// than what is done with them.
    static BUFFER: RefCell<Option<AlignedBuf>> = const { RefCell::new(None) };
}

fn with_buffer<T>(run: impl FnOnce(&mut AlignedBuf) -> Result<T, Error>) -> Result<T, Error> {
    BUFFER.with(|cell| {
        // Taken out: what runs meanwhile on this thread may be another image's.
        let mut buffer = match cell.take() {
            Some(buffer) => buffer,
            None => AlignedBuf::new(PIECE)?,
        };
        let result = run(&mut buffer);
        cell.replace(Some(buffer));
        result
    })
}

impl Luks {
    /// The volume in `below`, a raw image called `name`.
    ///
    /// # Errors
    /// [`Volume::open`]'s.
    pub fn open(below: Arc<dyn Image>, name: &str, passphrase: &[u8]) -> Result<Self, Error> {
        let store = ImageStore {
            image: &*below,
            name,
        };
        let volume = Volume::open(&store, passphrase)?;
        Self::new(below, &volume)
    }

    /// The content of a volume that has been opened, or created, in `below`.
    ///
    /// # Errors
    /// [`Volume::cipher`]'s.
    pub fn new(below: Arc<dyn Image>, volume: &Volume) -> Result<Self, Error> {
        Ok(Self {
            cipher: volume.cipher()?,
            payload: volume.header.payload,
            below,
            partial: RwLock::new(()),
        })
    }

    /// Reads whole sectors into `data`.
    fn load(&self, offset: u64, buffer: &mut AlignedBuf, len: usize) -> Result<(), Error> {
        let io = buffer.io(len);
        self.below.read(self.payload + offset, &[io])?;
        self.cipher.decrypt(offset, &mut buffer[..len]);
        Ok(())
    }

    /// Encrypts and writes whole sectors.
    fn store(&self, offset: u64, buffer: &mut AlignedBuf, len: usize) -> Result<(), Error> {
        self.cipher.encrypt(offset, &mut buffer[..len]);
        let io = buffer.io(len);
        self.below.write(self.payload + offset, &[io])
    }

    /// Writes what `fill` puts into the buffer (the first number is how far into the request).
    fn write_with(
        &self,
        offset: u64,
        len: u64,
        fill: impl Fn(u64, &mut [u8]),
    ) -> Result<(), Error> {
        check_range(self, offset, len)?;
        let mask = SECTOR as u64 - 1;
        let end = offset + len;
        let whole = offset & mask == 0 && end & mask == 0;
        let (_shared, _alone) = if whole {
            let shared = self.partial.read().unwrap_or_else(PoisonError::into_inner);
            (Some(shared), None)
        } else {
            let alone = self.partial.write().unwrap_or_else(PoisonError::into_inner);
            (None, Some(alone))
        };
        with_buffer(|buffer| {
            let mut at = offset;
            while at < end {
                let start = at & !mask;
                let stop = ((end + mask) & !mask).min(start + PIECE as u64);
                let (next, length) = (stop.min(end), (stop - start) as usize);
                if at != start || next != stop {
                    self.load(start, buffer, length)?;
                }
                fill(
                    at - offset,
                    &mut buffer[(at - start) as usize..(next - start) as usize],
                );
                self.store(start, buffer, length)?;
                at = next;
            }
            Ok(())
        })
    }
}

impl Image for Luks {
    fn own_file(&self) -> Option<&crate::File> {
        self.below.own_file()
    }

    fn size(&self) -> u64 {
        // `Header::parse` has seen that the payload begins in the image; it may shrink.
        self.below.size().saturating_sub(self.payload) & !(SECTOR as u64 - 1)
    }

    fn read(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        let len = iovec::total(bufs)?;
        check_range(self, offset, len)?;
        let mask = SECTOR as u64 - 1;
        let end = offset + len;
        // Into memory of our own first: the guest sees nothing but its content.
        with_buffer(|buffer| {
            let mut at = offset;
            while at < end {
                let start = at & !mask;
                let stop = ((end + mask) & !mask).min(start + PIECE as u64);
                self.load(start, buffer, (stop - start) as usize)?;
                let next = stop.min(end);
                iovec::scatter(
                    &iovec::part(bufs, at - offset, next - at),
                    &buffer[(at - start) as usize..(next - start) as usize],
                );
                at = next;
            }
            Ok(())
        })
    }

    fn write(&self, offset: u64, bufs: &[IoBuf]) -> Result<(), Error> {
        self.write_with(offset, iovec::total(bufs)?, |start, data| {
            iovec::gather(&iovec::part(bufs, start, data.len() as u64), data);
        })
    }

    /// Zeroes are encrypted and written like anything else: a hole would read as noise.
    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<(), Error> {
        self.write_with(offset, len, |_, data| data.fill(0))
    }

    /// Nothing happens: what is discarded below would read as noise.
    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        check_range(self, offset, len)
    }

    fn flush(&self) -> Result<(), Error> {
        self.below.flush()
    }

    fn rest(&self) -> Result<(), Error> {
        self.below.rest()
    }

    fn extent(&self, offset: u64, len: u64) -> Result<Extent, Error> {
        check_range(self, offset, len)?;
        Ok(Extent {
            start: offset,
            len,
            zero: false,
            data: true,
            present: true,
            compressed: false,
            depth: 0,
            offset: None,
        })
    }

    fn info(&self) -> Result<ImageInfo, Error> {
        Ok(ImageInfo {
            virtual_size: self.size(),
            ..self.below.info()?
        })
    }

    /// What is added reads as noise, as all of a new volume does: to fill it with encrypted zeroes
    /// would take all the space it has.
    fn resize(&self, size: u64) -> Result<(), Error> {
        let below = self
            .payload
            .checked_add(size)
            .ok_or_else(|| Error::Invalid(format!("no image has {size} bytes")))?;
        self.below.resize(below)
    }
}

#[cfg(test)]
mod tests;
