//! Rounds: what the guest has written is sent again, until what is left is little enough.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vmm_api::control::Event;
use vmm_api::migrate::StreamError;
use vmm_api::saved::PAGE;

use super::{Source, milliseconds};
use crate::killpoint::killpoint;
use crate::migrate::stuck::Stuck;
use crate::migrate::{disks, moment};
use crate::notices::Notice;
use crate::state::dirty::{self, count};
use crate::state::job::Progress;

/// Below this the rate of a round says little.
const MEASURABLE: u64 = 1 << 20;
/// A round that leaves fewer bytes is not worth another one.
const FEW: u64 = 64 * PAGE;
/// More rounds than needed, only to shorten the downtime.
const EXTRA_ROUNDS: u32 = 6;
/// Disks are copied alone until so little is left, or it does not get less.
const DISKS_FEW: u64 = 16 << 20;
/// A guest that stands still altogether would be paused, not migrated live.
const THROTTLE_MOST: u32 = 99;

/// What is to be sent, a bit each.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    /// Pages, in the order of [`GuestMemory::bytes`].
    pub(super) pages: Vec<u64>,
    /// Blocks of each disk.
    pub(super) disks: Vec<Vec<u64>>,
}

impl Dirty {
    fn memory_bytes(&self) -> u64 {
        count(&self.pages) * PAGE
    }

    fn disk_bytes(&self) -> u64 {
        self.disks.iter().map(|disk| count(disk)).sum::<u64>() * disks::BLOCK
    }

    fn bytes(&self) -> u64 {
        self.memory_bytes() + self.disk_bytes()
    }
}

impl Source {
    /// Sends memory while the guest runs, until the rest is small enough; slows it down where that
    /// is wished for.
    /// `content`: the pages that held something since the log is on. `takes_code`: the other side wants to know where the guest's code is.
    pub(super) fn precopy(
        &self,
        progress: &Progress,
        content: Vec<u64>,
        takes_code: bool,
    ) -> Result<(), StreamError> {
        if self.options.auto_converge.is_none() {
            return self.rounds(progress, content, takes_code);
        }
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let brake = std::thread::Builder::new().name("brake".into());
            brake.spawn_scoped(scope, || self.brake(&done))?;
            let result = self.rounds(progress, content, takes_code);
            done.store(true, Ordering::Relaxed);
            result
        })
    }

    /// Has the vCPUs stand still for the wished part of the time.
    fn brake(&self, done: &AtomicBool) {
        /// Short enough for the guest not to notice but by its speed.
        const PERIOD: Duration = Duration::from_millis(20);
        while !done.load(Ordering::Relaxed) {
            let percent = self.tuning.throttle.load(Ordering::Relaxed).min(99);
            if percent > 0 {
                if let Err(error) = self.brake.pull() {
                    log::warn!("slowing the guest down: {error}");
                }
                std::thread::sleep(PERIOD * percent / 100);
                self.brake.release();
            }
            std::thread::sleep(PERIOD * (100 - percent) / 100);
        }
    }

    /// Round after round.
    fn rounds(
        &self,
        progress: &Progress,
        content: Vec<u64>,
        takes_code: bool,
    ) -> Result<(), StreamError> {
        // Bytes a second; nothing is known yet.
        let mut rate = 0u64;
        let mut dirty = self.disks_first(progress)?;
        // And what has been written meanwhile.
        dirty.pages = self.written_pages()?;
        for (word, content) in dirty.pages.iter_mut().zip(content) {
            *word |= content;
        }
        let mut extra = 0;
        let mut stuck = Stuck::new();
        for round in 0u32.. {
            let bytes = dirty.bytes();
            self.tuning.change(|status| {
                status.iteration = round + 1;
                status.rate = rate;
            });
            self.notices
                .send(Notice::Tell(Event::MigrationRound(round + 1)));
            let before = self.tuning.sent.load(Ordering::Relaxed);
            let began = Instant::now();
            self.round(&dirty, round, progress, true)?;
            let took = began.elapsed();
            let sent = self.tuning.sent.load(Ordering::Relaxed) - before;
            if sent >= MEASURABLE || rate == 0 {
                rate = per_second(sent, took).max(1);
            }
            dirty = self.written()?;
            let left = dirty.bytes();
            let downtime = milliseconds(Duration::from_secs_f64(left as f64 / rate as f64));
            self.tuning.change(|status| {
                status.dirty_rate = per_second(dirty.memory_bytes() / PAGE, took);
                status.rate = rate;
                status.downtime_ms = downtime;
            });
            if downtime <= self.tuning.downtime_ms.load(Ordering::Relaxed) {
                // It could stop now; while it gets much less each time, less is better.
                if left <= FEW || left > bytes / 4 * 3 || extra == EXTRA_ROUNDS {
                    break;
                }
                extra += 1;
            } else {
                let throttle = self.tuning.throttle.load(Ordering::Relaxed);
                if stuck.goes_on(left, throttle) {
                    self.cannot_converge(left, rate)?;
                    stuck = Stuck::new();
                }
                if left > bytes / 2 {
                    self.slow_down();
                }
            }
        }
        if takes_code {
            self.tell_code()?;
            self.round(&dirty, u32::MAX - 1, progress, true)?;
            killpoint("vmm.migrate-code");
            self.await_code_taken(progress)?;
            moment("the other side knows the guest's code");
            dirty = self.written()?;
        }
        // What was taken out of the log has to go, whatever comes after.
        self.round(&dirty, u32::MAX - 1, progress, true)
    }

    /// Sends disks while the guest runs, until little is left; what is.
    fn disks_first(&self, progress: &Progress) -> Result<Dirty, StreamError> {
        let mut dirty = Dirty::default();
        if self.disks.is_empty() {
            return Ok(dirty);
        }
        for disk in &self.disks {
            dirty.disks.push(disk.content(self.options.incremental)?);
        }
        let total = dirty.disk_bytes();
        self.tuning.disk_total.store(total, Ordering::Relaxed);
        loop {
            let bytes = dirty.disk_bytes();
            self.round(&dirty, 0, progress, true)?;
            dirty.disks = self.written_blocks();
            killpoint("vmm.migrate-disks");
            let left = dirty.disk_bytes();
            if left <= DISKS_FEW || left > bytes / 4 * 3 {
                return Ok(dirty);
            }
        }
    }

    /// What was written since the last call.
    pub(super) fn written(&self) -> Result<Dirty, StreamError> {
        let dirty = Dirty {
            pages: self.written_pages()?,
            disks: self.written_blocks(),
        };
        self.tell_left(&dirty);
        Ok(dirty)
    }

    fn written_blocks(&self) -> Vec<Vec<u64>> {
        let all = self.disks.iter();
        all.map(|disk| disk.image.written()).collect()
    }

    pub(super) fn tell_left(&self, dirty: &Dirty) {
        let (left, disk_left) = (&self.tuning.left, &self.tuning.disk_left);
        left.store(dirty.memory_bytes(), Ordering::Relaxed);
        disk_left.store(dirty.disk_bytes(), Ordering::Relaxed);
    }

    fn written_pages(&self) -> Result<Vec<u64>, StreamError> {
        let written = dirty::written(&*self.vm, &self.memory);
        written.map_err(|error| StreamError::Refused(error.to_string()))
    }

    /// It does not get less any more, and is too much. Goes on as long as the guest is not hurt by that: a longer limit
    /// or a faster connection may still be given.
    fn cannot_converge(&self, left: u64, rate: u64) -> Result<(), StreamError> {
        let limit = self.tuning.downtime_ms.load(Ordering::Relaxed);
        let status = self.tuning.status();
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let why = format!(
            "the downtime limit of {limit} ms can't be met: the guest writes {:.1} MiB/s{}, {:.1} MiB/s are sent, and the \
             {:.1} MiB that are left each time would take {} ms",
            mib(status.dirty_rate * PAGE),
            match status.throttle {
                0 => String::new(),
                percent => format!(" although it is slowed down by {percent} %"),
            },
            mib(rate),
            mib(left),
            status.downtime_ms,
        );
        if u32::from(status.throttle) >= THROTTLE_MOST {
            return Err(StreamError::Refused(why));
        }
        log::warn!("migration: {why}");
        Ok(())
    }

    /// The guest gets less time to write.
    fn slow_down(&self) {
        let Some((initial, increment)) = self.options.auto_converge else {
            return;
        };
        let now = self.tuning.throttle.load(Ordering::Relaxed);
        let next = if now == 0 {
            u32::from(initial)
        } else {
            now + u32::from(increment)
        };
        self.tuning
            .throttle
            .store(next.clamp(1, THROTTLE_MOST), Ordering::Relaxed);
    }
}

fn per_second(number: u64, time: Duration) -> u64 {
    let micros = time.as_micros().max(1);
    u64::try_from(u128::from(number) * 1_000_000 / micros).unwrap_or(u64::MAX)
}
