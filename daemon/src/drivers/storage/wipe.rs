//! Wiping volumes.

use std::fs::File;
use std::io::Read;

use xml_schemas::volume::{Volume, VolumeType};

use super::volume::{open_to_change, take};
use super::{Driver, error, folder, image_error, system};
use crate::error::{ErrorCode, Result, check_flags};

/// Bytes written at a time.
const PIECE: usize = 1 << 20;

/// What one pass over a volume writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    Byte(u8),
    Three([u8; 3]),
    Random,
}

/// The passes of virStorageVolWipeAlgorithm's members, in its order, as scrub(1) documents them;
/// none for `trim`.
fn passes(algorithm: u32) -> Option<Vec<Pass>> {
    use Pass::{Byte, Random, Three};
    Some(match algorithm {
        // zero
        0 => vec![Byte(0)],
        // nnsa: NNSA Policy Letter NAP-14.1-C
        1 => vec![Random, Random, Byte(0)],
        // dod: DoD 5220.22-M, 8-306
        2 => vec![Random, Byte(0), Byte(0xff)],
        // bsi: German Center of Security in Information Technologies
        3 => [0xff, 0xfe, 0xfd, 0xfb, 0xf7, 0xef, 0xdf, 0xbf, 0x7f]
            .map(Byte)
            .to_vec(),
        // gutmann: "Secure Deletion of Data from Magnetic and Solid-State Memory", 1996
        4 => {
            let mut all = vec![Random; 4];
            all.extend([Byte(0x55), Byte(0xaa)]);
            let thirds = [[0x92, 0x49, 0x24], [0x49, 0x24, 0x92], [0x24, 0x92, 0x49]];
            all.extend(thirds.map(Three));
            all.extend((0u8..16).map(|n| Byte(n * 0x11)));
            all.extend(thirds.map(Three));
            all.extend([[0x6d, 0xb6, 0xdb], [0xb6, 0xdb, 0x6d], [0xdb, 0x6d, 0xb6]].map(Three));
            all.extend([Random; 4]);
            all
        }
        // schneier: Applied Cryptography, 1996
        5 => {
            let mut all = vec![Byte(0), Byte(0xff)];
            all.extend([Random; 5]);
            all
        }
        // pfitzner7, pfitzner33, random
        6 => vec![Random; 7],
        7 => vec![Random; 33],
        8 => vec![Random],
        _ => return None,
    })
}

/// VIR_STORAGE_VOL_WIPE_ALG_TRIM
const TRIM: u32 = 9;

impl Driver {
    /// Overwrites a volume.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG for an unknown algorithm, VIR_ERR_OPERATION_INVALID while somebody
    /// uses the volume; the system's.
    pub async fn wipe_volume(
        &self,
        pool: &str,
        name: &str,
        algorithm: u32,
        flags: u32,
    ) -> Result<()> {
        check_flags(flags, 0, "storageVolWipePattern")?;
        let Some(passes) = passes(algorithm) else {
            return Err(if algorithm == TRIM {
                error(
                    ErrorCode::ARGUMENT_UNSUPPORTED,
                    "'trim' algorithm not supported",
                )
            } else {
                error(
                    ErrorCode::INVALID_ARG,
                    format!("wiping algorithm {algorithm} not supported"),
                )
            });
        };
        let pool = self.pool_of(pool).await?;
        let (mut volume, in_use) = take(&pool, name)?;
        let before = volume.allocation;
        let after = pool
            .run(move || {
                wipe(&volume, &passes)?;
                folder::look_again(&mut volume)?;
                Ok(volume)
            })
            .await?;
        drop(in_use);
        let mut inner = pool.lock();
        inner.account(before, after.allocation);
        if let Some(entry) = inner.volumes.get_mut(name) {
            entry.volume = after;
        }
        Ok(())
    }
}

fn wipe(volume: &Volume, passes: &[Pass]) -> Result<()> {
    if volume.kind == VolumeType::Dir {
        return Err(error(
            ErrorCode::NO_SUPPORT,
            format!(
                "storage pool does not support volume wiping of directory '{}'",
                volume.name
            ),
        ));
    }
    let file = open_to_change(volume)?;
    let size = file.size().map_err(image_error)?;
    let allocated = file.allocated().map_err(image_error)?;
    // As libvirt: a sparse file gives its blocks back rather than take all of them.
    if passes == [Pass::Byte(0)] && !file.is_block_device() && allocated < size {
        file.set_len(0).map_err(image_error)?;
        file.set_len(size).map_err(image_error)?;
        return file.sync().map_err(image_error);
    }
    let mut random =
        File::open("/dev/urandom").map_err(|e| system("cannot open /dev/urandom", &e))?;
    // A whole number of patterns of three.
    let mut piece = vec![0; PIECE / 3 * 3];
    for pass in passes {
        match pass {
            Pass::Byte(byte) => piece.fill(*byte),
            Pass::Three(three) => {
                for (at, byte) in piece.iter_mut().enumerate() {
                    *byte = three[at % 3];
                }
            }
            Pass::Random => {}
        }
        let mut at = 0;
        while at < size {
            let count = usize::try_from(size - at)
                .unwrap_or(piece.len())
                .min(piece.len());
            let now = &mut piece[..count];
            if *pass == Pass::Random {
                random
                    .read_exact(now)
                    .map_err(|e| system("cannot read /dev/urandom", &e))?;
            }
            file.write_bytes(at, now).map_err(image_error)?;
            at += count as u64;
        }
        file.sync().map_err(image_error)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_algorithm_has_its_passes() {
        let counts: Vec<usize> = (0..9).map(|n| passes(n).unwrap().len()).collect();
        assert_eq!(counts, [1, 3, 3, 9, 35, 7, 7, 33, 1]);
        assert_eq!(passes(TRIM), None);
    }
}
