//! How fast a running guest's memory changes, by looking at some of its pages twice.
//!
//! The guest and its VMM notice nothing: pages are read through `/proc/PID/mem`. Which of them were ever touched is
//! known from `/proc/PID/pagemap`, so that looking at memory does not make it (proc(5)).

use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::object::Pinned;
use super::{Driver, blocking};
use crate::error::{Error, ErrorCode, Result};

/// Most pages that are looked at, per GiB, as in QEMU.
const SAMPLES_PER_GIB: u64 = 512;
const PAGE: u64 = 4096;
/// How long may be measured, in seconds.
const SECONDS: (i32, i32) = (1, 60);

/// How far it is (virDomainDirtyRateStatus).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Status {
    /// Nobody has asked.
    #[default]
    Unstarted,
    /// It is being measured.
    Measuring,
    /// It was measured.
    Measured,
}

/// What is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DirtyRate {
    /// How far it is.
    pub status: Status,
    /// When it began: seconds of the host's clock since its start.
    pub began: i64,
    /// For how many seconds.
    pub seconds: i32,
    /// MiB a second, once it is measured.
    pub mib: i64,
}

/// Pages of one process at one moment.
struct Sample {
    /// The sampled pages' addresses with what is in them; `None`: never touched.
    pages: Vec<(u64, Option<u64>)>,
    /// All pages there are.
    all: u64,
    taken: Instant,
}

/// Reads what changes of a process.
struct Reader {
    memory: File,
    map: File,
    /// With a key of its own, which no guest can know.
    hash: RandomState,
}

impl Reader {
    fn open(pid: u32) -> io::Result<Self> {
        Ok(Self {
            memory: File::open(format!("/proc/{pid}/mem"))?,
            map: File::open(format!("/proc/{pid}/pagemap"))?,
            hash: RandomState::new(),
        })
    }

    /// Whether a page is there, in memory or in swap.
    fn is_there(&self, address: u64) -> io::Result<bool> {
        let mut entry = [0; 8];
        self.map.read_exact_at(&mut entry, address / PAGE * 8)?;
        Ok(u64::from_le_bytes(entry) >> 62 != 0)
    }

    fn content(&self, address: u64) -> io::Result<u64> {
        let mut page = [0u8; PAGE as usize];
        self.memory.read_exact_at(&mut page, address)?;
        Ok(self.hash.hash_one(page))
    }

    /// A first look at pages of these ranges of addresses, one of each stretch by chance.
    fn first(&self, ranges: &[(u64, u64)]) -> io::Result<Sample> {
        let all: u64 = ranges.iter().map(|(start, end)| (end - start) / PAGE).sum();
        let wanted = (all * PAGE * SAMPLES_PER_GIB).div_ceil(1 << 30).max(64);
        let stretch = (all / wanted).max(1);
        let taken = Instant::now();
        let mut pages = Vec::new();
        for (start, end) in ranges {
            let count = (end - start) / PAGE;
            for first in (0..count).step_by(usize::try_from(stretch).unwrap_or(usize::MAX)) {
                let chance = self.hash.hash_one(start + first) % stretch.min(count - first);
                let address = start + (first + chance) * PAGE;
                let content = match self.is_there(address)? {
                    true => Some(self.content(address)?),
                    false => None,
                };
                pages.push((address, content));
            }
        }
        Ok(Sample { pages, all, taken })
    }

    /// A second look: MiB a second.
    fn rate(&self, first: &Sample) -> io::Result<f64> {
        let seconds = first.taken.elapsed().as_secs_f64().max(0.001);
        let mut changed = 0u64;
        for (address, before) in &first.pages {
            let now = match before {
                None if !self.is_there(*address)? => None,
                _ => Some(self.content(*address)?),
            };
            changed += u64::from(now != *before);
        }
        let looked_at = first.pages.len().max(1) as f64;
        let mib = first.all as f64 * PAGE as f64 / f64::from(1 << 20);
        Ok(changed as f64 / looked_at * mib / seconds)
    }
}

/// Where a VMM has its guest's memory: a memfd, or in a restored machine the largest private map of a file.
fn memory(maps: &str) -> Vec<(u64, u64)> {
    let parse = |line: &str| -> Option<(u64, u64, bool)> {
        let mut parts = line.split_ascii_whitespace();
        let (start, end) = parts.next()?.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        let kind = parts.next()?;
        let (inode, name) = (parts.nth(2)?, parts.next().unwrap_or_default());
        let own = kind == "rw-s" && name == "/memfd:vireo-ram";
        let restored = kind == "rw-p" && inode != "0";
        (own || restored).then_some((start, end, own))
    };
    let all: Vec<_> = maps.lines().filter_map(parse).collect();
    let own: Vec<_> = all.iter().filter(|(.., own)| *own).collect();
    if !own.is_empty() {
        return own.iter().map(|(start, end, _)| (*start, *end)).collect();
    }
    let largest = all.iter().max_by_key(|(start, end, _)| end - start);
    largest
        .map(|(start, end, _)| (*start, *end))
        .into_iter()
        .collect()
}

/// Seconds since the host's start.
fn now() -> i64 {
    // SAFETY: the kernel fills the structure, which lives here; all zeros are a valid one.
    unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time);
        time.tv_sec
    }
}

impl Driver {
    /// Begins to measure; what comes of it is in the domain's statistics.
    ///
    /// # Errors
    /// VIR_ERR_CONFIG_UNSUPPORTED for a time out of range; it is off; it is being measured already.
    pub async fn measure_dirty_rate(self: &Arc<Self>, domain: Pinned, seconds: i32) -> Result<()> {
        let (least, most) = SECONDS;
        if !(least..=most).contains(&seconds) {
            return Err(Error::unsupported(format!(
                "seconds={seconds} is invalid, please choose value within [{least}, {most}]."
            )));
        }
        let (pid, id) = {
            let mut inner = domain.lock();
            let live = inner.live_mut()?;
            if live.dirty_rate.status == Status::Measuring {
                return Err(Error::internal("the dirty rate is already being measured"));
            }
            live.dirty_rate = DirtyRate {
                status: Status::Measuring,
                began: now(),
                seconds,
                mib: 0,
            };
            (live.process.identity().pid, live.id)
        };
        let note = move |domain: &Pinned, rate: Option<f64>| {
            let mut inner = domain.lock();
            let Some(live) = inner.live.as_mut().filter(|live| live.id == id) else {
                return;
            };
            match rate {
                Some(rate) => {
                    live.dirty_rate.status = Status::Measured;
                    live.dirty_rate.mib = rate.round() as i64;
                }
                None => live.dirty_rate = DirtyRate::default(),
            }
        };
        let first = blocking(move || {
            let reader = Reader::open(pid)?;
            let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
            let sample = reader.first(&memory(&maps))?;
            Ok::<_, io::Error>((reader, sample))
        });
        let (reader, sample) = match first
            .await
            .map(|first| first.map_err(|e| Error::system("cannot look at the guest's memory", &e)))
        {
            Ok(Ok(first)) => first,
            Ok(Err(error)) | Err(error) => {
                note(&domain, None);
                return Err(error);
            }
        };
        tokio::spawn(async move {
            let seconds = u64::try_from(seconds).unwrap_or(1);
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            let rate = blocking(move || reader.rate(&sample)).await;
            match rate {
                Ok(Ok(rate)) => note(&domain, Some(rate)),
                // It may have ended meanwhile.
                Ok(Err(error)) => {
                    log::info!("a guest's memory cannot be looked at any more: {error}");
                    note(&domain, None);
                }
                Err(error) => {
                    log::error!("{error}");
                    note(&domain, None);
                }
            }
        });
        Ok(())
    }
}

/// What is said to who wants it measured in another way.
pub fn only_sampling() -> Error {
    Error::new(
        ErrorCode::ARGUMENT_UNSUPPORTED,
        "the dirty rate is measured by page-sampling only",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_found_among_maps() {
        let own = "7f0000000000-7f0040000000 rw-s 00000000 00:01 2056 /memfd:vireo-ram (deleted)\n\
                   7f0050000000-7f0060000000 rw-p 00000000 08:01 77 /saved\n\
                   7f0060000000-7f0070000000 rw-p 00000000 00:00 0 \n";
        assert_eq!(memory(own), [(0x7f00_0000_0000, 0x7f00_4000_0000)]);
        let restored = own.split_once('\n').unwrap().1;
        assert_eq!(memory(restored), [(0x7f00_5000_0000, 0x7f00_6000_0000)]);
        assert_eq!(memory("nonsense\n"), []);
    }

    #[test]
    fn what_changes_is_counted_and_what_does_not_is_not() {
        let pages = 1024u64;
        let mut own = vec![0u8; ((pages + 1) * PAGE) as usize];
        let start = (own.as_ptr() as u64).next_multiple_of(PAGE);
        let offset = (start - own.as_ptr() as u64) as usize;
        // Half of it is there from the start; the other half stays untouched.
        own[offset..offset + (pages / 2 * PAGE) as usize].fill(1);
        let reader = Reader::open(std::process::id()).unwrap();
        let ranges = [(start, start + pages * PAGE)];
        let sample = reader.first(&ranges).unwrap();
        assert_eq!(sample.all, pages);
        assert_eq!(sample.pages.len(), 64);
        assert_eq!(reader.rate(&sample).unwrap(), 0.0);
        // A quarter changes.
        own[offset..offset + (pages / 4 * PAGE) as usize].fill(2);
        std::hint::black_box(&own);
        let again = Sample {
            taken: Instant::now() - Duration::from_secs(1),
            ..sample
        };
        let rate = reader.rate(&again).unwrap();
        // A MiB in a second or a little more.
        assert!(rate > 0.0 && rate <= 1.0, "{rate}");
    }
}
