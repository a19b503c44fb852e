//! The side that a machine leaves.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hypervisor::Vm;
use images::iovec::AlignedBuf;
use vmm_api::control::{Event, MigrateOptions, MigrationStatus};
use vmm_api::migrate::{self, HEADER, Header, Hello, Kind, LAST_ROUND, StreamError, Verdict};
use vmm_api::saved::{CHUNK, PAGE};

use super::disks::{self, WORD};
use super::link::{Link, PARTS_MOST, STALL, part, says_gone};
use super::stuck::Stuck;
use crate::devices::lock;
use crate::killpoint::killpoint;
use crate::memory::{GuestMemory, Scratch};
use crate::notices::{Notice, Notices};
use crate::num::to_usize;
use crate::state::dirty::{self, count, runs};
use crate::state::job::Progress;
use crate::vcpu::Brake;

/// How long the machine may take to come to rest.
const REST: Duration = Duration::from_secs(30);
/// Below this the rate of a round says little.
const MEASURABLE: u64 = 1 << 20;
/// A round that leaves fewer bytes is not worth another one.
const FEW: u64 = 64 * PAGE;
/// More rounds than needed, only to shorten the downtime.
const EXTRA_ROUNDS: u32 = 6;
/// Bytes of state frames.
const STATE_PART: usize = 1 << 20;
/// Disks are copied alone until so little is left, or it does not get less.
const DISKS_FEW: u64 = 16 << 20;
/// A guest that stands still altogether would be paused, not migrated live.
const THROTTLE_MOST: u32 = 99;
/// A connection that has nothing to say says so this often.
const ALIVE: Duration = Duration::from_secs(5);
/// How long a side that ended may take to have its last word heard.
const LAST_WORD: Duration = Duration::from_secs(5);
/// How long the other side may take to be gone, and its hold on the disks with it.
const GONE: Duration = Duration::from_secs(2);
/// How long it may take or say nothing while the guest stands still.
const STILL: Duration = Duration::from_secs(15);
/// How long a refusal may take to be sent.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long to wait for a sign of a guest that has been given away: it runs nowhere else.
const GIVEN: Duration = Duration::from_secs(600);

/// Who may run the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Right {
    /// This process.
    Own = 0,
    /// The other one.
    Given = 1,
    /// It was given away, and whether it arrived is not known: this process must not run it.
    Unknown = 2,
}

/// What can be changed, and seen, while it goes on.
#[derive(Debug)]
pub struct Tuning {
    bandwidth: AtomicU64,
    downtime_ms: AtomicU64,
    right: AtomicU8,
    sent: AtomicU64,
    pages: AtomicU64,
    left: AtomicU64,
    disk_total: AtomicU64,
    disk_sent: AtomicU64,
    disk_left: AtomicU64,
    status: Mutex<MigrationStatus>,
    throttle: AtomicU32,
}

impl Tuning {
    /// At the beginning.
    #[must_use]
    pub fn new(options: &MigrateOptions) -> Self {
        Self {
            bandwidth: AtomicU64::new(options.bandwidth),
            downtime_ms: AtomicU64::new(options.downtime_ms),
            right: AtomicU8::new(Right::Own as u8),
            sent: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            left: AtomicU64::new(0),
            disk_total: AtomicU64::new(0),
            disk_sent: AtomicU64::new(0),
            disk_left: AtomicU64::new(0),
            status: Mutex::default(),
            throttle: AtomicU32::new(0),
        }
    }

    /// Sets what is given.
    pub fn set(&self, bandwidth: Option<u64>, downtime_ms: Option<u64>) {
        if let Some(bandwidth) = bandwidth {
            self.bandwidth.store(bandwidth, Ordering::Relaxed);
        }
        if let Some(downtime) = downtime_ms {
            self.downtime_ms.store(downtime, Ordering::Relaxed);
        }
    }

    /// Who may run the machine now.
    #[must_use]
    pub fn right(&self) -> Right {
        match self.right.load(Ordering::Acquire) {
            0 => Right::Own,
            1 => Right::Given,
            _ => Right::Unknown,
        }
    }

    /// How far it is.
    #[must_use]
    pub fn status(&self) -> MigrationStatus {
        MigrationStatus {
            transferred: self.sent.load(Ordering::Relaxed),
            pages: self.pages.load(Ordering::Relaxed),
            remaining: self.left.load(Ordering::Relaxed),
            disk_total: self.disk_total.load(Ordering::Relaxed),
            disk_sent: self.disk_sent.load(Ordering::Relaxed),
            disk_left: self.disk_left.load(Ordering::Relaxed),
            throttle: u8::try_from(self.throttle.load(Ordering::Relaxed)).unwrap_or(u8::MAX),
            ..*lock(&self.status)
        }
    }

    fn give(&self, right: Right) {
        self.right.store(right as u8, Ordering::Release);
    }

    fn change(&self, with: impl FnOnce(&mut MigrationStatus)) {
        with(&mut lock(&self.status));
    }
}

/// A machine that is to leave.
#[derive(Debug)]
pub struct Source {
    /// The connections; the first one leads.
    pub links: Vec<Link>,
    /// Its memory, whose dirty log is on.
    pub memory: Arc<GuestMemory>,
    /// Its VM.
    pub vm: Arc<dyn Vm>,
    /// What it is.
    pub hello: Hello,
    /// How.
    pub options: MigrateOptions,
    /// What changes.
    pub tuning: Arc<Tuning>,
    /// To the event loop: [`Notice::StandStill`] when it is time.
    pub notices: Arc<Notices>,
    /// The machine was told to stand still.
    pub stood_still: AtomicBool,
    /// Its answer: the sections, when nothing moves any more and the disks are let go of.
    pub states: Mutex<Receiver<Result<Vec<u8>, String>>>,
    /// A hold on the vCPUs, for slowing them down.
    pub brake: Brake,
    /// Disks that go along, as the hello has them.
    pub disks: Vec<disks::Leaving>,
}

/// What is to be sent, a bit each.
#[derive(Debug, Default)]
struct Dirty {
    /// Pages, in the order of [`GuestMemory::bytes`].
    pages: Vec<u64>,
    /// Blocks of each disk.
    disks: Vec<Vec<u64>>,
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

/// The connections of a round that are still at it.
struct Busy {
    number: Mutex<usize>,
    changed: Condvar,
}

impl Busy {
    /// Done with the own part: says now and then that the connection is alive, until all are.
    fn wait(&self, link: &Link, progress: &Progress) -> Result<(), StreamError> {
        let mut number = lock(&self.number);
        *number -= 1;
        self.changed.notify_all();
        while *number > 0 {
            let (after, timeout) = self
                .changed
                .wait_timeout(number, ALIVE)
                .unwrap_or_else(PoisonError::into_inner);
            number = after;
            if timeout.timed_out() {
                progress.check()?;
                migrate::send(&mut &*link, Kind::Alive, &[])?;
            }
        }
        Ok(())
    }

    /// The own part has failed.
    fn leave(&self) {
        let mut number = lock(&self.number);
        *number = number.saturating_sub(1);
        self.changed.notify_all();
    }
}

/// Whether a page is all zero. The guest may write it meanwhile: then the dirty log has it.
fn is_zero(page: *const u8) -> bool {
    let words = page.cast::<u64>();
    (0..to_usize(PAGE / 8)).all(|n| {
        // SAFETY: a whole page of guest memory, aligned, that lives as long as the caller's
        // `GuestMemory`; volatile, as others may write it at any time.
        unsafe { words.add(n).read_volatile() == 0 }
    })
}

impl Source {
    /// Moves the machine.
    ///
    /// # Errors
    /// Why not, in words. [`Tuning::right`] says whether it may go on here.
    pub fn run(mut self, progress: &Arc<Progress>) -> Result<(), String> {
        for link in &mut self.links {
            link.heed(progress.clone());
        }
        let result = self.all(progress).map_err(|error| self.explain(error));
        self.brake.release();
        if let Err(error) = &result
            && let Some(link) = self.links.first()
        {
            // So that the other side knows why; it sees the end of the connection otherwise.
            let verdict = Verdict::refused(error.to_string());
            link.forget_job();
            // One that takes nothing is not waited for twice.
            link.be_patient(FAREWELL);
            if let Ok(frame) = migrate::json_frame(Kind::Verdict, &verdict)
                && let Err(error) = io::Write::write_all(&mut &*link, &frame)
            {
                log::debug!("{error}");
            }
            if self.stood_still.load(Ordering::Relaxed) && self.tuning.right() == Right::Own {
                link.await_end(GONE);
            }
        }
        result.map_err(|error| error.to_string())
    }

    /// A connection that breaks says less than the other side's last words.
    fn explain(&self, error: StreamError) -> StreamError {
        match (&error, self.links.first()) {
            (StreamError::Io(reason), Some(link)) if says_gone(reason) => {
                link.last_word(LAST_WORD).unwrap_or(error)
            }
            _ => error,
        }
    }

    fn main(&self) -> Result<&Link, StreamError> {
        let none = || StreamError::Protocol("no connection".to_owned());
        self.links.first().ok_or_else(none)
    }

    fn all(&self, progress: &Progress) -> Result<(), StreamError> {
        let mut link = self.main()?;
        let began = Instant::now();
        let hello = migrate::json_frame(Kind::Hello, &self.hello)?;
        io::Write::write_all(&mut link, &hello)?;
        let verdict: Verdict = migrate::expect_json(&mut link, Kind::Verdict)?;
        verdict.into_result()?;
        killpoint("vmm.migrate-greeted");
        let setup_ms = milliseconds(began.elapsed());
        self.tuning.change(|status| status.setup_ms = setup_ms);
        self.precopy(progress)?;
        self.hand_over(progress)
    }

    /// Sends memory while the guest runs, until the rest is small enough; slows it down where that
    /// is wished for.
    fn precopy(&self, progress: &Progress) -> Result<(), StreamError> {
        if self.options.auto_converge.is_none() {
            return self.rounds(progress);
        }
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let brake = std::thread::Builder::new().name("brake".into());
            brake.spawn_scoped(scope, || self.brake(&done))?;
            let result = self.rounds(progress);
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
    fn rounds(&self, progress: &Progress) -> Result<(), StreamError> {
        // Bytes a second; nothing is known yet.
        let mut rate = 0u64;
        let mut dirty = self.disks_first(progress)?;
        // What was written so far is part of the content.
        self.written_pages()?;
        dirty.pages = dirty::content(&self.memory);
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

    /// The machine stands still; the rest goes, then the right to run.
    fn hand_over(&self, progress: &Progress) -> Result<(), StreamError> {
        let failed = |why: String| StreamError::Refused(why);
        let mut link = self.main()?;
        let began = Instant::now();
        // From here on the machine's own hold on them is enough.
        self.brake.release();
        self.stood_still.store(true, Ordering::Relaxed);
        for link in &self.links {
            link.be_patient(STILL);
        }
        self.tuning.throttle.store(0, Ordering::Relaxed);
        self.notices.send(Notice::StandStill);
        let states = loop {
            progress.check()?;
            match lock(&self.states).recv_timeout(Duration::from_millis(100)) {
                Ok(states) => break states.map_err(failed)?,
                Err(RecvTimeoutError::Timeout) if began.elapsed() < REST => {}
                Err(error) => return Err(failed(format!("the machine does not rest: {error}"))),
            }
        };
        killpoint("vmm.migrate-still");
        let dirty = self.written()?;
        let rest = self.round(&dirty, LAST_ROUND, progress, false);
        rest.map_err(|error| {
            silent(
                error,
                "for the other side to take the rest of the guest",
                STILL,
            )
        })?;
        for states in states.chunks(STATE_PART) {
            self.count_sent(states.len() as u64);
            migrate::send(&mut link, Kind::State, states)?;
        }
        migrate::send(&mut link, Kind::State, &[])?;
        killpoint("vmm.migrate-sent");
        let verdict = migrate::expect_json::<Verdict>(&mut link, Kind::Verdict);
        let verdict = verdict
            .map_err(|error| silent(error, "for the other side to build the machine", STILL))?;
        verdict.into_result()?;
        self.tuning.change(|status| status.ready = true);
        self.notices.send(Notice::Tell(Event::MigrationReady));
        // The other side's owner decides when it is to run: mostly at once, sometimes never.
        link.be_patient(STALL);
        migrate::expect(&mut link, Kind::Ask)
            .map_err(|error| silent(error, "for the other side to want to run the guest", STALL))?;
        killpoint("vmm.migrate-asked");
        // From now on not even a failed write means that it did not arrive.
        self.tuning.give(Right::Given);
        // Nor does it help to give up, or to be told to: what is waited for is only how it was decided.
        link.forget_job();
        link.be_patient(GIVEN);
        let arrived = migrate::send(&mut link, Kind::Grant, &[]).and_then(|()| {
            killpoint("vmm.migrate-given");
            migrate::expect(&mut link, Kind::Running)
        });
        let downtime = milliseconds(began.elapsed());
        self.tuning.change(|status| status.downtime_ms = downtime);
        match arrived {
            Ok(_) => Ok(()),
            // A process that is gone does not run; but only if that is who closed the connection.
            Err(StreamError::Io(error)) if self.options.direct && says_gone(&error) => {
                self.tuning.give(Right::Own);
                Err(failed(
                    "the other side ended before the guest ran there".into(),
                ))
            }
            Err(error) => {
                self.tuning.give(Right::Unknown);
                Err(failed(format!("{error}; {}", migrate::UNKNOWN)))
            }
        }
    }

    /// What was written since the last call.
    fn written(&self) -> Result<Dirty, StreamError> {
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

    fn tell_left(&self, dirty: &Dirty) {
        let (left, disk_left) = (&self.tuning.left, &self.tuning.disk_left);
        left.store(dirty.memory_bytes(), Ordering::Relaxed);
        disk_left.store(dirty.disk_bytes(), Ordering::Relaxed);
    }

    fn written_pages(&self) -> Result<Vec<u64>, StreamError> {
        let written = dirty::written(&*self.vm, &self.memory);
        written.map_err(|error| StreamError::Refused(error.to_string()))
    }

    fn count_sent(&self, bytes: u64) {
        self.tuning.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Sends this over all connections. `paced`: no faster than is wished.
    fn round(
        &self,
        dirty: &Dirty,
        number: u32,
        progress: &Progress,
        paced: bool,
    ) -> Result<(), StreamError> {
        self.tell_left(dirty);
        let pace = Pace {
            began: Instant::now(),
            before: self.tuning.sent.load(Ordering::Relaxed),
            on: paced,
        };
        let all = self.links.len();
        let busy = Busy {
            number: Mutex::new(all),
            changed: Condvar::new(),
        };
        std::thread::scope(|scope| -> Result<(), StreamError> {
            let mut others = Vec::new();
            for (index, link) in self.links.iter().enumerate().skip(1) {
                let (pace, busy) = (&pace, &busy);
                let thread = std::thread::Builder::new()
                    .name("outgoing".into())
                    .spawn_scoped(scope, move || {
                        let part = (index, all);
                        self.part(link, dirty, part, number, progress, pace, busy)
                    })?;
                others.push(thread);
            }
            let own = self.part(
                self.main()?,
                dirty,
                (0, all),
                number,
                progress,
                &pace,
                &busy,
            );
            for thread in others {
                let ended = |_| StreamError::Protocol("a sending thread panicked".to_owned());
                thread.join().map_err(ended)??;
            }
            own
        })
    }

    /// One connection's part of a round; done when all have done theirs.
    #[expect(clippy::too_many_arguments, reason = "what the parts of a round share")]
    fn part(
        &self,
        link: &Link,
        dirty: &Dirty,
        which: (usize, usize),
        number: u32,
        progress: &Progress,
        pace: &Pace,
        busy: &Busy,
    ) -> Result<(), StreamError> {
        let sent = self
            .share_disks(link, dirty, which, progress, pace)
            .and_then(|()| self.share(link, &dirty.pages, which, number, progress, pace));
        match sent {
            // Nobody waits for others while the guest stands still.
            Ok(()) if number != LAST_ROUND => busy.wait(link, progress),
            sent => {
                busy.leave();
                sent
            }
        }
    }

    /// One connection's part of the disks.
    fn share_disks(
        &self,
        link: &Link,
        dirty: &Dirty,
        (index, all): (usize, usize),
        progress: &Progress,
        pace: &Pace,
    ) -> Result<(), StreamError> {
        let mut buffer = None;
        for (number, (disk, blocks)) in (0u32..).zip(self.disks.iter().zip(&dirty.disks)) {
            for (word, blocks) in blocks.iter().enumerate() {
                if *blocks == 0 || word % all != index {
                    continue;
                }
                let buffer = match &mut buffer {
                    Some(buffer) => buffer,
                    none => {
                        none.insert(AlignedBuf::new(to_usize(CHUNK)).map_err(io::Error::other)?)
                    }
                };
                for (first, count) in runs(&[*blocks]) {
                    self.listen(link, index)?;
                    progress.check()?;
                    let start = word as u64 * WORD + first * disks::BLOCK;
                    let len = count * disks::BLOCK;
                    let sent = disk.send(link, number, start, len, buffer)?;
                    self.count_sent(sent);
                    self.tuning.disk_sent.fetch_add(len, Ordering::Relaxed);
                    self.tuning.disk_left.fetch_sub(len, Ordering::Relaxed);
                    pace.wait(&self.tuning, progress, link)?;
                }
            }
        }
        Ok(())
    }

    /// Whether the other side has said no meanwhile.
    fn listen(&self, link: &Link, index: usize) -> Result<(), StreamError> {
        if index == 0 && link.has_said() {
            let verdict: Verdict = migrate::expect_json(&mut &*link, Kind::Verdict)?;
            verdict.into_result()?;
        }
        Ok(())
    }

    /// One connection's part of the pages: every so-many-th chunk.
    fn share(
        &self,
        link: &Link,
        dirty: &[u64],
        (index, all): (usize, usize),
        number: u32,
        progress: &Progress,
        pace: &Pace,
    ) -> Result<(), StreamError> {
        const WORDS: usize = (CHUNK / PAGE / 64) as usize;
        let mut packer = match self.options.zstd_level {
            Some(level) => Some(Packer::new(level)?),
            None => None,
        };
        for (chunk, words) in dirty.chunks(WORDS).enumerate() {
            if chunk % all != index || words.iter().all(|word| *word == 0) {
                continue;
            }
            progress.check()?;
            self.listen(link, index)?;
            let at = chunk as u64 * CHUNK;
            match &mut packer {
                Some(packer) => self.send_packed(link, at, words, packer)?,
                None => self.send_plain(link, at, words)?,
            }
            let pages: u64 = words.iter().map(|w| u64::from(w.count_ones())).sum();
            self.tuning.left.fetch_sub(pages * PAGE, Ordering::Relaxed);
            if number == 0 {
                progress.add(CHUNK.min(self.memory.size() - at), 0);
            }
            pace.wait(&self.tuning, progress, link)?;
        }
        migrate::send(&mut &*link, Kind::Round, &number.to_le_bytes())
    }

    /// Splits dirty pages of a chunk at `at` into those with content and those without.
    fn sorted(&self, at: u64, words: &[u64]) -> Vec<(u64, u64, bool)> {
        let base = self.memory.bytes().0.wrapping_add(to_usize(at));
        let mut sorted: Vec<(u64, u64, bool)> = Vec::new();
        for (first, len) in runs(words) {
            for page in first..first + len {
                let zero = is_zero(base.wrapping_add(to_usize(page * PAGE)));
                match sorted.last_mut() {
                    Some((start, pages, kind)) if *kind == zero && *start + *pages == page => {
                        *pages += 1;
                    }
                    _ => sorted.push((page, 1, zero)),
                }
            }
        }
        sorted
    }

    /// Straight from guest memory, a chunk in one call.
    fn send_plain(&self, link: &Link, at: u64, words: &[u64]) -> Result<(), StreamError> {
        const FRAME: usize = HEADER + 16;
        let base = self.memory.bytes().0;
        let sorted = self.sorted(at, words);
        for group in sorted.chunks(PARTS_MOST / 2) {
            let mut heads = Vec::with_capacity(group.len());
            for (first, pages, zero) in group {
                let (start, len) = (at + first * PAGE, pages * PAGE);
                let mut head = [0u8; FRAME];
                let (kind, body) = if *zero {
                    (Kind::Zero, 16)
                } else {
                    (Kind::Pages, to_usize(8 + len))
                };
                head[..HEADER].copy_from_slice(&Header::new(kind, body)?.encode());
                head[HEADER..HEADER + 8].copy_from_slice(&start.to_le_bytes());
                head[HEADER + 8..].copy_from_slice(&len.to_le_bytes());
                heads.push(head);
            }
            let mut parts = Vec::with_capacity(2 * group.len());
            let mut bytes = 0;
            for ((first, pages, zero), head) in group.iter().zip(&heads) {
                if *zero {
                    parts.push(part(head.as_ptr(), FRAME as u64));
                    bytes += FRAME as u64;
                    continue;
                }
                let (start, len) = (at + first * PAGE, pages * PAGE);
                parts.push(part(head.as_ptr(), HEADER as u64 + 8));
                parts.push(part(base.wrapping_add(to_usize(start)), len));
                bytes += HEADER as u64 + 8 + len;
                self.tuning.pages.fetch_add(*pages, Ordering::Relaxed);
            }
            // SAFETY: heads, which outlive the call, and ranges of guest memory, which is mapped as
            // long as `self.memory` lives.
            unsafe { link.send_parts(&mut parts)? };
            self.count_sent(bytes);
        }
        Ok(())
    }

    fn send_packed(
        &self,
        link: &Link,
        at: u64,
        words: &[u64],
        packer: &mut Packer,
    ) -> Result<(), StreamError> {
        let base = self.memory.bytes().0;
        for (first, pages, zero) in self.sorted(at, words) {
            let (start, len) = (at + first * PAGE, pages * PAGE);
            let mut body = start.to_le_bytes().to_vec();
            if zero {
                body.extend(len.to_le_bytes());
                migrate::send(&mut &*link, Kind::Zero, &body)?;
                self.count_sent((HEADER + body.len()) as u64);
                continue;
            }
            self.tuning.pages.fetch_add(pages, Ordering::Relaxed);
            let from = base.wrapping_add(to_usize(start));
            // SAFETY: a range of guest memory, which outlives the call.
            let packed = unsafe { packer.pack(from, to_usize(len)) };
            let kind = match packed {
                Some(packed) => {
                    let len = u32::try_from(len).unwrap_or(u32::MAX);
                    body.extend(len.to_le_bytes());
                    body.extend(packed);
                    Kind::Packed
                }
                None => {
                    body.extend(packer.plain(to_usize(len)));
                    Kind::Pages
                }
            };
            migrate::send(&mut &*link, kind, &body)?;
            self.count_sent((HEADER + body.len()) as u64);
        }
        Ok(())
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

/// Keeps to a rate.
struct Pace {
    began: Instant,
    before: u64,
    on: bool,
}

impl Pace {
    fn wait(&self, tuning: &Tuning, progress: &Progress, link: &Link) -> io::Result<()> {
        const STEP: Duration = Duration::from_millis(50);
        let mut told = Instant::now();
        loop {
            let rate = tuning.bandwidth.load(Ordering::Relaxed);
            if !self.on || rate == 0 {
                return Ok(());
            }
            let sent = tuning.sent.load(Ordering::Relaxed) - self.before;
            let due = Duration::from_secs_f64(sent as f64 / rate as f64);
            let Some(ahead) = due.checked_sub(self.began.elapsed()) else {
                return Ok(());
            };
            progress.check()?;
            if link.is_closed() {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if told.elapsed() >= ALIVE {
                told = Instant::now();
                migrate::send(&mut &*link, Kind::Alive, &[]).map_err(io::Error::other)?;
            }
            std::thread::sleep(ahead.min(STEP));
        }
    }
}

/// Packs guest memory.
struct Packer {
    copy: Scratch,
    out: Scratch,
    context: zstd_safe::CCtx<'static>,
    level: i32,
}

impl Packer {
    fn new(level: i32) -> Result<Self, StreamError> {
        let len = to_usize(CHUNK);
        Ok(Self {
            copy: Scratch::new(len).map_err(io::Error::other)?,
            // What does not get smaller is not packed.
            out: Scratch::new(len).map_err(io::Error::other)?,
            context: zstd_safe::CCtx::create(),
            level,
        })
    }

    /// The packed form, if it is shorter. A copy is packed: the guest may write meanwhile.
    ///
    /// # Safety
    /// `len` bytes from `from` on can be read.
    unsafe fn pack(&mut self, from: *const u8, len: usize) -> Option<&[u8]> {
        let copy = self.copy.get_mut(..len)?;
        // SAFETY: the caller's promise; `copy` is ours and as long.
        unsafe { std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), len) };
        let out = self.out.get_mut(..len)?;
        // Too large for the buffer: it does not get smaller.
        let packed = self.context.compress(out, copy, self.level).ok()?;
        self.out
            .get(..packed)
            .filter(|packed| packed.len() + 4 < len)
    }

    /// What was to be packed last.
    fn plain(&self, len: usize) -> &[u8] {
        self.copy.get(..len).unwrap_or(&[])
    }
}

/// A wait that has come to its limit says what it was for.
fn silent(error: StreamError, what: &str, limit: Duration) -> StreamError {
    match error {
        StreamError::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
            let text = format!(
                "waited {} s in vain {what}, while the guest stood still",
                limit.as_secs()
            );
            StreamError::Refused(text)
        }
        other => other,
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}

fn per_second(number: u64, time: Duration) -> u64 {
    let micros = time.as_micros().max(1);
    u64::try_from(u128::from(number) * 1_000_000 / micros).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_pages_are_seen() {
        let memory = GuestMemory::new(8 * PAGE).unwrap();
        let (base, _) = memory.bytes();
        assert!(is_zero(base));
        memory.write(PAGE - 1, &[1]).unwrap();
        assert!(!is_zero(base));
        assert!(is_zero(base.wrapping_add(to_usize(PAGE))));
    }
}
