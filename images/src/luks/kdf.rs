//! From passphrases to keys: PBKDF2 (RFC 8018 5.2) and the anti-forensic splitter (LUKS 1.2.3,
//! section 2.4).

use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit, Mac};
use sha1::Sha1;
use sha2::{Digest, Sha256, Sha512};
use zeroize::{Zeroize, Zeroizing};

use super::header::Hash;

impl Hash {
    /// Bytes of a digest.
    fn len(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }
}

fn pbkdf2_with<M: Mac + KeyInit + Clone>(
    passphrase: &[u8],
    salt: &[u8],
    rounds: u32,
    out: &mut [u8],
) {
    // HMAC takes keys of any length.
    let Ok(keyed) = <M as KeyInit>::new_from_slice(passphrase) else {
        return;
    };
    for (i, chunk) in (1_u32..).zip(out.chunks_mut(M::output_size())) {
        let mut mac = keyed.clone();
        mac.update(salt);
        mac.update(&i.to_be_bytes());
        let mut last = mac.finalize().into_bytes();
        let mut sum = last.clone();
        for _ in 1..rounds {
            let mut mac = keyed.clone();
            mac.update(&last);
            last = mac.finalize().into_bytes();
            for (sum, byte) in sum.iter_mut().zip(&last) {
                *sum ^= byte;
            }
        }
        chunk.copy_from_slice(&sum[..chunk.len()]);
        sum.as_mut_slice().zeroize();
        last.as_mut_slice().zeroize();
    }
}

/// `len` bytes derived from a passphrase.
pub fn pbkdf2(
    hash: Hash,
    passphrase: &[u8],
    salt: &[u8],
    rounds: u32,
    len: usize,
) -> Zeroizing<Vec<u8>> {
    let mut out = Zeroizing::new(vec![0; len]);
    match hash {
        Hash::Sha1 => pbkdf2_with::<Hmac<Sha1>>(passphrase, salt, rounds, &mut out),
        Hash::Sha256 => pbkdf2_with::<Hmac<Sha256>>(passphrase, salt, rounds, &mut out),
        Hash::Sha512 => pbkdf2_with::<Hmac<Sha512>>(passphrase, salt, rounds, &mut out),
    }
    out
}

/// How many rounds of [`pbkdf2`] for `len` bytes take about `time` on this machine.
pub fn rounds_in(hash: Hash, len: usize, time: Duration) -> u32 {
    let mut rounds = 4096_u32;
    loop {
        let begun = Instant::now();
        let _ = pbkdf2(hash, b"password", b"salt", rounds, len);
        let took = begun.elapsed();
        if took > Duration::from_millis(20) || rounds >= 1 << 26 {
            let wanted = u128::from(rounds) * time.as_nanos() / took.as_nanos().max(1);
            return u32::try_from(wanted).unwrap_or(u32::MAX);
        }
        rounds *= 2;
    }
}

fn diffuse(hash: Hash, data: &mut [u8]) {
    for (i, chunk) in (0_u32..).zip(data.chunks_mut(hash.len())) {
        let mut digest = Zeroizing::new([0; 64]);
        let number = i.to_be_bytes();
        match hash {
            Hash::Sha1 => digest[..20].copy_from_slice(
                &Sha1::new()
                    .chain_update(number)
                    .chain_update(&*chunk)
                    .finalize(),
            ),
            Hash::Sha256 => digest[..32].copy_from_slice(
                &Sha256::new()
                    .chain_update(number)
                    .chain_update(&*chunk)
                    .finalize(),
            ),
            Hash::Sha512 => digest[..64].copy_from_slice(
                &Sha512::new()
                    .chain_update(number)
                    .chain_update(&*chunk)
                    .finalize(),
            ),
        }
        chunk.copy_from_slice(&digest[..chunk.len()]);
    }
}

fn xor(data: &mut [u8], with: &[u8]) {
    for (byte, with) in data.iter_mut().zip(with) {
        *byte ^= with;
    }
}

/// The key that `material`, stripes of `len` bytes, was split from.
pub fn merge(hash: Hash, material: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; len]);
    let stripes = material.len() / len.max(1);
    for (i, stripe) in material.chunks_exact(len.max(1)).enumerate() {
        xor(&mut key, stripe);
        if i + 1 < stripes {
            diffuse(hash, &mut key);
        }
    }
    key
}

/// Fills the last stripe of `material`, whose others are random, so that it merges to `key`.
pub fn split(hash: Hash, key: &[u8], material: &mut [u8]) {
    let last = material.len() - key.len();
    let mut sum = Zeroizing::new(vec![0; key.len()]);
    for stripe in material[..last].chunks_exact(key.len()) {
        xor(&mut sum, stripe);
        diffuse(hash, &mut sum);
    }
    xor(&mut sum, key);
    material[last..].copy_from_slice(&sum);
}
