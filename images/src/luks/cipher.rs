//! AES over sectors of 512 bytes: XTS (IEEE 1619) and CBC, with the initial vectors of dm-crypt.

use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes192, Aes256};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::header::{Mode, Vector};
use crate::Cipher;

/// Bytes of a sector.
pub const SECTOR: usize = 512;

type Block = Array<u8, aes::cipher::consts::U16>;
const BLOCK: usize = 16;
const PER_SECTOR: usize = SECTOR / BLOCK;

/// AES with any of its key lengths.
enum Aes {
    K128(Box<Aes128>),
    K192(Box<Aes192>),
    K256(Box<Aes256>),
}

impl Aes {
    fn new(key: &[u8]) -> Option<Self> {
        match key.len() {
            16 => Aes128::new_from_slice(key)
                .ok()
                .map(|k| Self::K128(k.into())),
            24 => Aes192::new_from_slice(key)
                .ok()
                .map(|k| Self::K192(k.into())),
            32 => Aes256::new_from_slice(key)
                .ok()
                .map(|k| Self::K256(k.into())),
            _ => None,
        }
    }

    fn encrypt(&self, blocks: &mut [Block]) {
        match self {
            Self::K128(aes) => aes.encrypt_blocks(blocks),
            Self::K192(aes) => aes.encrypt_blocks(blocks),
            Self::K256(aes) => aes.encrypt_blocks(blocks),
        }
    }

    fn decrypt(&self, blocks: &mut [Block]) {
        match self {
            Self::K128(aes) => aes.decrypt_blocks(blocks),
            Self::K192(aes) => aes.decrypt_blocks(blocks),
            Self::K256(aes) => aes.decrypt_blocks(blocks),
        }
    }
}

/// AES in a mode, keyed. The keys are zeroed when it is dropped.
pub struct SectorCipher {
    mode: Mode,
    vector: Vector,
    data: Aes,
    /// XTS: what encrypts the tweak. ESSIV: what encrypts the sector number.
    second: Option<Aes>,
}

impl std::fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SectorCipher")
            .field("mode", &self.mode)
            .field("vector", &self.vector)
            .finish_non_exhaustive()
    }
}

impl SectorCipher {
    /// None if the mode has no keys of this length.
    pub fn new(mode: Mode, vector: Vector, key: &[u8]) -> Option<Self> {
        let (data, second) = match mode {
            Mode::Xts => {
                let (data, tweak) = key.split_at(key.len() / 2);
                (Aes::new(data)?, Some(Aes::new(tweak)?))
            }
            Mode::Cbc => (Aes::new(key)?, None),
        };
        let second = match vector {
            Vector::EssivSha256 => {
                if second.is_some() {
                    return None;
                }
                let salt = Zeroizing::new(<[u8; 32]>::from(Sha256::digest(key)));
                Some(Aes::new(&*salt)?)
            }
            Vector::Plain | Vector::Plain64 => second,
        };
        Some(Self {
            mode,
            vector,
            data,
            second,
        })
    }

    /// Initial vectors of up to `PER_SECTOR` sectors from `sector` on.
    fn vectors(&self, sector: u64, vectors: &mut [Block]) {
        for (i, vector) in vectors.iter_mut().enumerate() {
            let number = sector.wrapping_add(i as u64);
            let number = match self.vector {
                Vector::Plain => number & u64::from(u32::MAX),
                Vector::Plain64 | Vector::EssivSha256 => number,
            };
            *vector = u128::from(number).to_le_bytes().into();
        }
        if let Some(second) = &self.second {
            second.encrypt(vectors);
        }
    }

    fn run(&self, offset: u64, data: &mut [u8], encrypt: bool) {
        let mut sector = offset / SECTOR as u64;
        // Vectors of many sectors at once: the CPU does several blocks in the time of one.
        for sectors in data.chunks_mut(SECTOR * PER_SECTOR) {
            let mut vectors = [Block::default(); PER_SECTOR];
            let count = sectors.len() / SECTOR;
            self.vectors(sector, &mut vectors[..count]);
            for (data, vector) in sectors.chunks_exact_mut(SECTOR).zip(&vectors) {
                let (blocks, _) = Block::slice_as_chunks_mut(data);
                match (self.mode, encrypt) {
                    (Mode::Xts, _) => self.xts(vector, blocks, encrypt),
                    (Mode::Cbc, true) => {
                        let mut last = *vector;
                        for block in blocks {
                            xor(block, &last);
                            self.data.encrypt(std::slice::from_mut(block));
                            last = *block;
                        }
                    }
                    (Mode::Cbc, false) => {
                        let mut before = [Block::default(); PER_SECTOR];
                        before[0] = *vector;
                        before[1..].copy_from_slice(&blocks[..PER_SECTOR - 1]);
                        self.data.decrypt(blocks);
                        for (block, before) in blocks.iter_mut().zip(&before) {
                            xor(block, before);
                        }
                    }
                }
            }
            sector = sector.wrapping_add(count as u64);
        }
    }

    fn xts(&self, first: &Block, blocks: &mut [Block], encrypt: bool) {
        let mut tweaks = [Block::default(); PER_SECTOR];
        let mut tweak = u128::from_le_bytes((*first).into());
        for slot in &mut tweaks {
            *slot = tweak.to_le_bytes().into();
            // Times x in GF(2^128), IEEE 1619 5.2.
            let carry = (tweak as i128 >> 127) as u128 & 0x87;
            tweak = (tweak << 1) ^ carry;
        }
        for (block, tweak) in blocks.iter_mut().zip(&tweaks) {
            xor(block, tweak);
        }
        if encrypt {
            self.data.encrypt(blocks);
        } else {
            self.data.decrypt(blocks);
        }
        for (block, tweak) in blocks.iter_mut().zip(&tweaks) {
            xor(block, tweak);
        }
    }
}

fn xor(block: &mut Block, with: &Block) {
    let mixed = u128::from_ne_bytes((*block).into()) ^ u128::from_ne_bytes((*with).into());
    *block = mixed.to_ne_bytes().into();
}

impl Cipher for SectorCipher {
    fn decrypt(&self, offset: u64, data: &mut [u8]) {
        self.run(offset, data, false);
    }

    fn encrypt(&self, offset: u64, data: &mut [u8]) {
        self.run(offset, data, true);
    }
}
