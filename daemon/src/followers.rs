//! Files that follow what the journal has promised of them.
//!
//! One thread writes them, in the order of the promises. One that comes alone is written at once; where one follows upon
//! another it waits for a moment without any, as long as nobody waits for the files: to make one takes the kernel, and
//! hence a processor, longer than to promise it. How far it is stands in a file of its own, which is not synced: a daemon
//! that finds itself in the same boot of the host sees what the one before had not done.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::plain;
use crate::journal::{Applying, Change};

/// The thread ends when there was nothing to do for so long.
const IDLE: Duration = Duration::from_secs(1);
/// Promises that come within so much of each other are of one burst.
const BURST: Duration = Duration::from_millis(2);
/// A promise of a burst is kept after so much, whatever comes.
const LATE: Duration = Duration::from_millis(500);
/// A file that cannot be written is tried again so much later.
const RETRY: Duration = Duration::from_secs(2);

/// A file's new text, which is in the journal.
#[derive(Debug)]
pub struct Promise {
    /// Its number in the journal.
    pub number: u64,
    /// The file.
    pub change: Change,
    /// When it was made.
    pub made: Instant,
    /// Its segment is kept for as long as this lives.
    pub _applying: Applying,
}

/// Who writes them.
#[derive(Debug)]
pub struct Followers {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    kept: PathBuf,
    state: Mutex<State>,
    /// There is something to do.
    work: Condvar,
    /// Something is done, or cannot be.
    done: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Promise>,
    /// Which files are not written yet, by the numbers of their promises, also of those that are only being promised.
    open: BTreeMap<u64, String>,
    /// The last number there was.
    last: u64,
    /// Up to this number somebody waits for the files.
    awaited: u64,
    /// The last promise came closely upon another one, and when it came.
    burst: bool,
    newest: Option<Instant>,
    /// The thread sleeps until a burst is over.
    resting: bool,
    /// Why the first of the queue cannot be written.
    broken: Option<String>,
    kept: Option<File>,
    attended: bool,
    closing: bool,
}

impl Followers {
    /// `kept` is the file that says how far they are.
    pub fn new(folder: PathBuf, kept: PathBuf) -> Self {
        Self {
            shared: Arc::new(Shared {
                folder,
                kept,
                state: Mutex::default(),
                work: Condvar::new(),
                done: Condvar::new(),
            }),
            thread: Mutex::default(),
        }
    }

    /// Up to which number an earlier daemon's promises are kept, as `kept` says.
    ///
    /// # Errors
    /// The system's.
    pub fn kept(kept: &Path) -> io::Result<u64> {
        match std::fs::read(kept) {
            Ok(bytes) => Ok(bytes.try_into().map_or(0, u64::from_le_bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// A promise with this number is about to be made.
    pub fn expect(&self, number: u64, changes: &[Change]) {
        let mut state = self.shared.state();
        state.last = state.last.max(number);
        if let Some(change) = changes.first() {
            state.open.insert(number, change.path.clone());
        }
    }

    /// It was not made.
    pub fn forget(&self, number: u64) {
        self.shared.state().open.remove(&number);
        self.shared.done.notify_all();
    }

    /// Whether promises can be kept.
    ///
    /// # Errors
    /// An earlier one is not, and why.
    pub fn check(&self) -> io::Result<()> {
        let mut state = self.shared.state();
        if state.broken.is_some() && !state.attended {
            // There was no thread that would try again.
            state.burst = false;
            state = self.shared.keep(state);
        }
        state.check()
    }

    /// Has a file written.
    pub fn follow(&self, promise: Promise) {
        let mut state = self.shared.state();
        let before = state.newest.replace(promise.made);
        state.burst = before.is_some_and(|before| promise.made.duration_since(before) < BURST);
        state.queue.push_back(promise);
        if state.attended {
            let resting = state.resting;
            drop(state);
            if !resting {
                self.shared.work.notify_one();
            }
            return;
        }
        let shared = Arc::clone(&self.shared);
        let started = std::thread::Builder::new()
            .name("definitions".to_owned())
            .spawn(move || shared.work());
        match started {
            Ok(thread) => {
                state.attended = true;
                // The one before has ended, or is about to.
                *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
            }
            Err(error) => {
                log::error!("cannot start the thread that writes definitions: {error}");
                // Whoever promises writes, too.
                state.burst = false;
                drop(self.shared.keep(state));
            }
        }
    }

    /// Has all that was promised up to this number kept without delay: the journal needs the room.
    pub fn hurry(&self, number: u64) {
        let mut state = self.shared.state();
        state.awaited = state.awaited.max(number);
        drop(state);
        self.shared.work.notify_one();
    }

    /// Waits until all that was promised by now is kept; if that cannot be, what was promised of these files must be.
    ///
    /// # Errors
    /// One of the files cannot be written, or was not within `limit`.
    pub fn settle(&self, changes: &[Change], limit: Duration) -> io::Result<()> {
        let mut state = self.shared.state();
        let (deadline, last) = (Instant::now() + limit, state.last);
        state.awaited = last;
        if state.resting {
            self.shared.work.notify_one();
        }
        while state
            .open
            .first_key_value()
            .is_some_and(|(n, _)| *n <= last)
        {
            if let Err(error) = state.check() {
                let is_open = |change: &Change| state.open.values().any(|p| *p == change.path);
                return match changes.iter().any(is_open) {
                    true => Err(error),
                    false => Ok(()),
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "an earlier change takes too long to be written",
                ));
            }
            let waited = self.shared.done.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Writes what is left, and ends. What cannot be written is given back: it must outlive the journal's own thread.
    pub fn close(&self) -> VecDeque<Promise> {
        self.shared.state().closing = true;
        self.shared.work.notify_all();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            log::error!("the thread that writes definitions failed inside");
        }
        std::mem::take(&mut self.shared.state().queue)
    }
}

impl State {
    fn check(&self) -> io::Result<()> {
        match &self.broken {
            Some(why) => Err(io::Error::other(format!(
                "an earlier change is not written yet: {why}"
            ))),
            None => Ok(()),
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            state = self.keep(state);
            if state.closing {
                return;
            }
            let rest = state.rest();
            let limit = match &state.broken {
                Some(_) => RETRY,
                None => rest.unwrap_or(IDLE),
            };
            state.resting = rest.is_some();
            let waited = self.work.wait_timeout(state, limit);
            let timeout;
            (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state.resting = false;
            if state.queue.is_empty() && timeout.timed_out() {
                state.attended = false;
                return;
            }
        }
    }

    /// Writes all files that are due, up to the first that cannot be.
    fn keep<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while state.rest().is_none()
            && let Some(promise) = state.queue.pop_front()
        {
            drop(state);
            let made = promise.change.make(&self.folder);
            state = self.state();
            if let Err(error) = made {
                let why = format!("cannot write '{}': {}", promise.change.path, plain(&error));
                if state.broken.as_ref() != Some(&why) {
                    log::error!("{}: {why}; trying again", self.folder.display());
                }
                state.broken = Some(why);
                state.queue.push_front(promise);
                self.done.notify_all();
                return state;
            }
            if state.broken.take().is_some() {
                log::info!("{}: definitions are written again", self.folder.display());
            }
            state.open.remove(&promise.number);
            if let Err(error) = state.note(&self.kept) {
                log::warn!("cannot write {}: {error}", self.kept.display());
            }
            drop(promise);
            self.done.notify_all();
        }
        state
    }
}

impl State {
    /// How long the first of the queue waits for the end of a burst.
    fn rest(&self) -> Option<Duration> {
        let first = self.queue.front()?;
        if !self.burst || self.closing || first.number <= self.awaited {
            return None;
        }
        let age = self.newest?.elapsed();
        let left = LATE.checked_sub(first.made.elapsed())?;
        Some(BURST.checked_sub(age)?.min(left))
    }

    /// Notes how far it is: up to this number no promise is open.
    fn note(&mut self, path: &Path) -> io::Result<()> {
        let kept = match self.open.first_key_value() {
            Some((first, _)) => first - 1,
            None => self.last,
        };
        let file = match self.kept.take() {
            Some(file) => file,
            None => OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)?,
        };
        file.write_all_at(&kept.to_le_bytes(), 0)?;
        self.kept = Some(file);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::files::testing::TempFolder;
    use crate::journal::{Content, Journal};

    const BOOT: &str = "11111111-1111-1111-1111-111111111111";
    const LIMIT: Duration = Duration::from_secs(30);

    fn text(path: &str, text: &str) -> Change {
        Change {
            path: path.to_owned(),
            to: Content::Text(text.to_owned()),
        }
    }

    fn until(what: impl Fn() -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !what() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn what_is_promised_is_in_its_file_before_the_next_change_and_at_the_end() {
        let folder = TempFolder::new();
        let journal = Journal::open(folder.0.clone(), BOOT).unwrap();
        let read = |name: &str| fs::read_to_string(folder.0.join(name)).unwrap();
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let (journal, read) = (&journal, &read);
                scope.spawn(move || {
                    let name = writer.to_string();
                    for number in 0..50 {
                        let what = format!("{number}");
                        journal.promise(text(&name, &what)).unwrap();
                        if number % 10 == 0 {
                            let next = [text(&name, "next")];
                            let applying = journal.commit(&next).unwrap();
                            assert_eq!(read(&name), what);
                            drop(applying);
                        }
                    }
                });
            }
        });
        drop(journal);
        for writer in 0..4 {
            assert_eq!(read(&writer.to_string()), "49");
        }
        // Nothing is left to do.
        let kept = Followers::kept(&folder.0.join(".journal/kept")).unwrap();
        assert!(kept >= 200, "{kept}");
    }

    #[test]
    fn a_burst_is_kept_when_it_is_over_and_when_its_room_is_needed() {
        let folder = TempFolder::new();
        let journal = Journal::open(folder.0.clone(), BOOT).unwrap();
        // Several times what both segments hold.
        let long = "x".repeat(100_000);
        for number in 0..100 {
            let name = number.to_string();
            journal.promise(text(&name, &long)).unwrap();
        }
        until(|| folder.0.join("99").is_file());
        for number in 0..100 {
            let path = folder.0.join(number.to_string());
            assert_eq!(fs::read_to_string(path).unwrap(), long);
        }
        // Others wait for what is promised, not for the end of a burst that does not end.
        let busy = std::sync::atomic::AtomicBool::new(true);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while busy.load(std::sync::atomic::Ordering::Relaxed) {
                    journal.promise(text("busy", "1")).unwrap();
                }
            });
            for number in 0..20 {
                journal.promise(text("mine", &number.to_string())).unwrap();
                drop(journal.commit(&[text("other", "1")]).unwrap());
                let mine = fs::read_to_string(folder.0.join("mine")).unwrap();
                assert_eq!(mine, number.to_string());
            }
            busy.store(false, std::sync::atomic::Ordering::Relaxed);
        });
    }

    #[test]
    fn a_file_that_cannot_be_written_is_tried_again_and_told_to_the_next() {
        let folder = TempFolder::new();
        let journal = Journal::open(folder.0.clone(), BOOT).unwrap();
        let taken = folder.0.join("taken");
        fs::create_dir(&taken).unwrap();
        journal.promise(text("taken", "1")).unwrap();
        until(|| journal.promise(text("other", "1")).is_err());
        let error = journal.promise(text("other", "2")).unwrap_err().to_string();
        assert!(error.contains("cannot write 'taken'"), "{error}");
        // What others wait for goes on.
        drop(journal.commit(&[text("third", "1")]).unwrap());
        assert!(journal.commit(&[text("taken", "2")]).is_err());
        fs::remove_dir(&taken).unwrap();
        until(|| taken.is_file());
        until(|| journal.promise(text("taken", "3")).is_ok());
        drop(journal);
        assert_eq!(fs::read_to_string(&taken).unwrap(), "3");
    }

    #[test]
    fn what_could_not_be_written_is_there_after_the_next_start() {
        let folder = TempFolder::new();
        let taken = folder.0.join("taken");
        fs::create_dir(&taken).unwrap();
        let journal = Journal::open(folder.0.clone(), BOOT).unwrap();
        journal.promise(text("before", "1")).unwrap();
        journal.promise(text("taken", "1")).unwrap();
        drop(journal);
        fs::remove_dir(&taken).unwrap();
        // Of the same boot: what had been done stays as it is now.
        fs::write(folder.0.join("before"), "by hand").unwrap();
        let journal = Journal::open(folder.0.clone(), BOOT).unwrap();
        assert_eq!(fs::read_to_string(&taken).unwrap(), "1");
        assert_eq!(
            fs::read_to_string(folder.0.join("before")).unwrap(),
            "by hand"
        );
        drop(journal);
        // And once only.
        fs::remove_file(&taken).unwrap();
        let journal = Journal::open(folder.0.clone(), BOOT).unwrap();
        assert!(!taken.exists());
        drop(journal);
    }
}
