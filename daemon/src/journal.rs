//! What is about to change in a folder of small files, written ahead of the files themselves.
//!
//! One append and one `fdatasync` make a change durable; the files follow without a sync of their own, and are synced
//! some time later, all at once, from a thread that holds nobody up. After a power cut the next daemon brings the files
//! to what the journal says. Changes that come while another is being written are written together.
//!
//! A change whose maker waits for its files is made by him, between [`Journal::commit`] and his answer. A file's new
//! text alone can be promised ([`Journal::promise`]): another thread ([`Followers`]) writes it within moments, as to
//! make a file takes longer than to write it down here.
//!
//! Two segments take turns: while the files of one are being synced the other takes new changes. A segment that is done
//! with is made void by its first bytes. Within one boot of the host the files have what the page cache has: what
//! somebody changed by hand after a `kill -9` stays. Only promises that the daemon died before it kept are kept then.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::files::{self, Durability};
use crate::followers::{Followers, Promise};
use crate::killpoint::killpoint;

/// A segment grows by so much, zeros ahead, so that most appends change nothing but data.
const STEP: u64 = 256 << 10;
/// A segment that has so much is full.
const FULL: u64 = 2 << 20;
/// Files are synced when nothing has changed for so long.
const IDLE: Duration = Duration::from_secs(1);
/// After a failed sync the next try comes so much later.
const RETRY: Duration = Duration::from_secs(30);
/// A change waits so long for a segment with room.
const ROOM_LIMIT: Duration = Duration::from_secs(60);
const MAGIC: &[u8; 8] = b"vireoj1\n";
/// Of a promise.
const MAGIC_PROMISE: &[u8; 8] = b"vireoj2\n";
/// Magic, epoch, boot, number, length, checksum of all that and the payload.
const HEADER: usize = 8 + 16 + 16 + 8 + 4 + 4;

/// What a file will be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// A file with this text.
    Text(String),
    /// A symbolic link to the file of the same name in the folder above.
    Link,
    /// Not there.
    Gone,
}

/// A file of the folder, and what it will be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Below the folder.
    pub path: String,
    /// What it will be.
    pub to: Content,
}

impl Change {
    /// Brings it into its file below `folder`.
    ///
    /// # Errors
    /// The system's.
    pub fn make(&self, folder: &Path) -> io::Result<()> {
        let path = folder.join(&self.path);
        match &self.to {
            Content::Text(text) => {
                files::write_atomically(&path, text.as_bytes(), Durability::Process)
            }
            Content::Link => {
                files::remove_if_there(&path)?;
                symlink(above(&path), &path)
            }
            Content::Gone => files::remove_if_there(&path),
        }
    }
}

/// The journal of one folder.
#[derive(Debug)]
pub struct Journal {
    shared: Arc<Shared>,
    followers: Followers,
    worker: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    boot: Uuid,
    queue: Mutex<Queue>,
    segments: Mutex<Segments>,
    /// What those who make changes wait for: others' changes are written, or there is room.
    changed: Condvar,
    /// What the thread that syncs waits for: a segment is full, or the end.
    work: Condvar,
    /// Nothing of a segment is left to be brought into files.
    applied: Condvar,
}

/// Changes that wait to be written.
#[derive(Debug, Default)]
struct Queue {
    waiting: Vec<Entry>,
    /// How many changes there have been.
    last: u64,
    /// Where those that were written, or not, are recorded.
    done: HashMap<u64, Result<Place, String>>,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    promise: bool,
    paths: Vec<String>,
    payload: Vec<u8>,
}

/// The use of a segment that a change was written in: how many changes of it are not in their files yet.
#[derive(Debug, Clone, Default)]
struct Place(Arc<AtomicUsize>);

#[derive(Debug)]
struct Segments {
    all: [Segment; 2],
    active: usize,
    /// When the last change was written.
    last: Instant,
    /// It was not alone.
    crowd: bool,
    closing: bool,
    /// There is a thread that will look at the segments again.
    attended: bool,
    /// Why what was written before is not on the disk. No promise is made after that.
    broken: Option<String>,
}

impl Segments {
    /// Whether the active one has no room for so many bytes.
    fn needs_another(&self, length: u64) -> bool {
        let used = self.all[self.active].used;
        used > 0 && used + length > FULL
    }
}

#[derive(Debug, Default)]
struct Segment {
    file: Option<File>,
    used: u64,
    allocated: u64,
    /// Differs for each use.
    epoch: Uuid,
    /// Files that may not be on the disk as the segment says.
    touched: BTreeSet<String>,
    /// Changes whose files are still being written. Another one for each use.
    unapplied: Place,
}

/// Files follow a change as long as this lives.
#[derive(Debug)]
#[must_use]
pub struct Applying {
    shared: Arc<Shared>,
    place: Place,
}

impl Drop for Applying {
    fn drop(&mut self) {
        // Without the segments' lock, which is held while the disk writes: a change whose file is there is done, and
        // does not wait for those behind it. The thread that syncs looks again by itself if it misses this.
        if self.place.0.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.shared.applied.notify_all();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn waited<'a>(
    condition: &Condvar,
    guard: MutexGuard<'a, Segments>,
    limit: Duration,
) -> MutexGuard<'a, Segments> {
    condition
        .wait_timeout(guard, limit)
        .unwrap_or_else(PoisonError::into_inner)
        .0
}

impl Journal {
    /// The journal of `folder`. What an earlier one holds is brought into the files, if the host has been booted since,
    /// and synced. Only one daemon may have it open.
    ///
    /// # Errors
    /// The system's.
    pub fn open(folder: PathBuf, boot: &str) -> io::Result<Self> {
        let shared = Shared {
            folder,
            // An unknown boot is never the same one.
            boot: Uuid::parse_str(boot).unwrap_or_else(|_| Uuid::new_v4()),
            queue: Mutex::default(),
            segments: Mutex::new(Segments {
                all: Default::default(),
                active: 0,
                last: Instant::now(),
                crowd: false,
                closing: false,
                attended: false,
                broken: None,
            }),
            changed: Condvar::new(),
            work: Condvar::new(),
            applied: Condvar::new(),
        };
        let kept = shared.folder.join(".journal").join("kept");
        shared.recover(Followers::kept(&kept)?)?;
        // Numbers begin anew, and all that there were are in their files.
        files::remove_if_there(&kept)?;
        Ok(Self {
            followers: Followers::new(shared.folder.clone(), kept),
            shared: Arc::new(shared),
            worker: Mutex::default(),
        })
    }

    /// Makes changes durable. The caller brings them into the files then, and keeps what it gets until it has.
    ///
    /// # Errors
    /// The system's; the changes must not be made then.
    pub fn commit(&self, changes: &[Change]) -> io::Result<Applying> {
        // What is still to be written there would undo them.
        self.settle(changes)?;
        self.write(changes, false).map(|(_, applying)| applying)
    }

    /// Waits until all that was promised by now is in its file; if that cannot be, at least what these changes change.
    ///
    /// # Errors
    /// One of their files cannot be written.
    pub fn settle(&self, changes: &[Change]) -> io::Result<()> {
        self.followers.settle(changes, ROOM_LIMIT)
    }

    /// Makes the text of a file durable, and has it written there. Whoever promises something else of the same file
    /// does so afterwards.
    ///
    /// # Errors
    /// The system's; the file stays as it is then.
    pub fn promise(&self, change: Change) -> io::Result<()> {
        self.followers.check()?;
        let (number, applying) = self.write(std::slice::from_ref(&change), true)?;
        killpoint("store.promised");
        self.followers.follow(Promise {
            number,
            change,
            made: Instant::now(),
            _applying: applying,
        });
        Ok(())
    }

    fn write(&self, changes: &[Change], promise: bool) -> io::Result<(u64, Applying)> {
        let payload = serde_json::to_vec(changes)?;
        let number = {
            let mut queue = lock(&self.shared.queue);
            queue.last += 1;
            let number = queue.last;
            if promise {
                self.followers.expect(number, changes);
            }
            queue.waiting.push(Entry {
                number,
                promise,
                paths: changes.iter().map(|change| change.path.clone()).collect(),
                payload,
            });
            number
        };
        let written = self.written(number);
        if promise && written.is_err() {
            self.followers.forget(number);
        }
        written.map(|applying| (number, applying))
    }

    /// Waits until a change is written, or writes it.
    fn written(&self, number: u64) -> io::Result<Applying> {
        // Whoever gets here writes for all who wait behind.
        let mut segments = self.shared.segments();
        let batch = loop {
            let mut queue = lock(&self.shared.queue);
            if let Some(done) = queue.done.remove(&number) {
                return self.applying(done);
            }
            if queue.waiting.iter().any(|entry| entry.number == number) {
                if segments.crowd {
                    queue = self.shared.let_in(queue);
                }
                let batch = std::mem::take(&mut queue.waiting);
                segments.crowd = batch.len() > 1;
                break batch;
            }
            drop(queue);
            // Somebody has it who waits for room himself.
            segments = waited(&self.shared.changed, segments, ROOM_LIMIT);
        };
        if segments.needs_another(length(&batch)) {
            self.followers.hurry(number);
        }
        let (mut segments, room) = self.shared.room(segments, length(&batch));
        let result = room.and_then(|()| self.shared.append(&mut segments, &batch));
        if result.is_ok() && !segments.attended {
            segments.attended = self.attend();
        }
        let result = result.map_err(|error| error.to_string());
        let mut queue = lock(&self.shared.queue);
        for entry in &batch {
            queue.done.insert(entry.number, result.clone());
        }
        let own = queue.done.remove(&number);
        drop(queue);
        // Not before they can find it: who looks in vain waits for this.
        drop(segments);
        self.shared.changed.notify_all();
        self.applying(own.unwrap_or(result))
    }

    /// Makes durable that these files are as they are now: what was to change them failed.
    ///
    /// # Errors
    /// The system's.
    pub fn take_back(&self, changes: &[Change]) -> io::Result<()> {
        let mut back = Vec::new();
        for change in changes {
            if let Some(to) = self.shared.now(&change.path)? {
                let path = change.path.clone();
                back.push(Change { path, to });
            }
        }
        self.commit(&back).map(drop)
    }

    fn applying(&self, done: Result<Place, String>) -> io::Result<Applying> {
        let place = done.map_err(io::Error::other)?;
        Ok(Applying {
            shared: Arc::clone(&self.shared),
            place,
        })
    }

    /// Starts the thread that syncs files. Without one the segments fill up, and changes are refused then.
    fn attend(&self) -> bool {
        let shared = Arc::clone(&self.shared);
        let started = std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || shared.work());
        match started {
            Ok(thread) => {
                // The one before has ended, or is about to.
                *lock(&self.worker) = Some(thread);
                true
            }
            Err(error) => {
                log::error!("cannot start the journal's thread: {error}");
                false
            }
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // What they cannot write keeps its segment.
        let broken = self.followers.close();
        self.shared.segments().closing = true;
        self.shared.work.notify_all();
        self.shared.applied.notify_all();
        if let Some(thread) = lock(&self.worker).take()
            && thread.join().is_err()
        {
            log::error!("the journal's thread failed inside");
        }
        drop(broken);
    }
}

impl Shared {
    fn segments(&self) -> MutexGuard<'_, Segments> {
        lock(&self.segments)
    }

    fn segment_path(&self, index: usize) -> PathBuf {
        self.folder.join(".journal").join(index.to_string())
    }

    /// Waits until the active segment, or the other, has room for so many bytes.
    fn room<'a>(
        &'a self,
        mut guard: MutexGuard<'a, Segments>,
        length: u64,
    ) -> (MutexGuard<'a, Segments>, io::Result<()>) {
        let deadline = Instant::now() + ROOM_LIMIT;
        loop {
            let active = guard.active;
            if let Some(why) = &guard.broken {
                let error = io::Error::other(format!("an earlier change is not synced: {why}"));
                return (guard, Err(error));
            }
            if !guard.needs_another(length) {
                return (guard, Ok(()));
            }
            if guard.all[1 - active].used == 0 {
                guard.active = 1 - active;
                self.work.notify_all();
                return (guard, Ok(()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let error = io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the disk takes too long to sync earlier changes",
                );
                return (guard, Err(error));
            }
            guard = waited(&self.changed, guard, left);
        }
    }

    /// Lets those come in who are about to: there were several at once a moment ago, and one write does for all.
    fn let_in<'a>(&'a self, mut queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        let mut before = 0;
        while queue.waiting.len() > before {
            before = queue.waiting.len();
            drop(queue);
            std::thread::yield_now();
            queue = lock(&self.queue);
        }
        queue
    }

    /// Writes changes to the active segment, which has room.
    fn append(&self, guard: &mut Segments, batch: &[Entry]) -> io::Result<Place> {
        let length = length(batch);
        let index = guard.active;
        let path = self.segment_path(index);
        let boot = self.boot;
        let segment = &mut guard.all[index];
        if segment.file.is_none() {
            segment.file = Some(self.create(&path)?);
            segment.allocated = 0;
        }
        if segment.used == 0 {
            segment.epoch = Uuid::new_v4();
            segment.unapplied = Place::default();
        }
        let mut bytes = Vec::with_capacity(length as usize);
        for entry in batch {
            write_record(&mut bytes, segment.epoch, boot, entry)?;
        }
        let end = segment.used + length;
        if end > segment.allocated {
            let allocated = end.next_multiple_of(STEP);
            bytes.resize((allocated - segment.used) as usize, 0);
        }
        if let Some(file) = &segment.file {
            file.write_all_at(&bytes, segment.used)?;
            file.sync_data()?;
        }
        segment.allocated = segment.allocated.max(segment.used + bytes.len() as u64);
        segment.used = end;
        segment.unapplied.0.fetch_add(batch.len(), Ordering::AcqRel);
        segment
            .touched
            .extend(batch.iter().flat_map(|entry| entry.paths.iter().cloned()));
        let place = segment.unapplied.clone();
        guard.last = Instant::now();
        Ok(place)
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        let folder = self.folder.join(".journal");
        files::make_folder(&folder, 0o700)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        file.sync_all()?;
        files::sync_folder(&folder)?;
        files::sync_folder(&self.folder)?;
        Ok(file)
    }

    /// Syncs what segments name, as long as there is one that is in use.
    fn work(&self) {
        let mut guard = self.segments();
        loop {
            let active = guard.active;
            let idle = guard.last.elapsed() >= IDLE || guard.closing;
            let index = if guard.all[1 - active].used > 0 {
                1 - active
            } else if guard.all[active].used == 0 {
                guard.attended = false;
                return;
            } else if idle {
                guard.active = 1 - active;
                active
            } else {
                let left = IDLE.saturating_sub(guard.last.elapsed());
                guard = waited(&self.work, guard, left);
                continue;
            };
            if guard.all[index].unapplied.0.load(Ordering::Acquire) > 0 {
                if guard.closing {
                    guard.attended = false;
                    return;
                }
                guard = waited(&self.applied, guard, IDLE);
                continue;
            }
            let touched = std::mem::take(&mut guard.all[index].touched);
            drop(guard);
            let synced = self.sync(&touched);
            guard = self.segments();
            // Nothing has been added to it meanwhile: it is not the active one.
            let segment = &mut guard.all[index];
            match synced.and_then(|()| segment.make_void().map_err(SyncError::Lost)) {
                Ok(()) => self.changed.notify_all(),
                Err(SyncError::Lost(error)) => {
                    log::error!("{}: cannot sync: {error}", self.folder.display());
                    guard.broken = Some(error.to_string());
                    guard.attended = false;
                    self.changed.notify_all();
                    return;
                }
                Err(SyncError::Later(error)) => {
                    log::error!("{}: cannot sync yet: {error}", self.folder.display());
                    segment.touched.extend(touched);
                    if guard.closing {
                        guard.attended = false;
                        return;
                    }
                    guard = waited(&self.work, guard, RETRY);
                }
            }
        }
    }

    /// Files and folders reach the disk as they are now.
    fn sync(&self, touched: &BTreeSet<String>) -> Result<(), SyncError> {
        let mut folders = BTreeSet::new();
        let mut opened = Vec::new();
        for path in touched {
            let path = self.folder.join(path);
            if let Some(folder) = path.parent() {
                folders.insert(folder.to_owned());
            }
            match open_plain(&path) {
                Ok(file) => {
                    start_writing(&file);
                    opened.push(file);
                }
                // Gone, or a link, which is in the folder.
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound
                        || error.raw_os_error() == Some(libc::ELOOP) => {}
                Err(error) => return Err(SyncError::Later(error)),
            }
            // All at once would use up descriptors.
            if opened.len() >= 64 {
                sync_all(&mut opened)?;
            }
        }
        sync_all(&mut opened)?;
        for folder in folders {
            let folder = File::open(folder).map_err(SyncError::Later)?;
            folder.sync_all().map_err(SyncError::Lost)?;
        }
        Ok(())
    }

    /// Reads what an earlier journal left, brings it into the files if they may lack it, and voids it.
    ///
    /// `kept` is up to which change the promises of this boot are in their files.
    fn recover(&self, kept: u64) -> io::Result<()> {
        let mut records = Vec::new();
        let mut guard = self.segments();
        for index in 0..guard.all.len() {
            let path = self.segment_path(index);
            let file = match OpenOptions::new().read(true).write(true).open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let bytes = fs::read(&path)?;
            records.extend(read_records(&bytes));
            let segment = &mut guard.all[index];
            segment.allocated = bytes.len() as u64;
            segment.file = Some(file);
        }
        records.sort_by_key(|record| record.number);
        let mut touched = BTreeSet::new();
        for record in &records {
            for change in &record.changes {
                if !is_below(&change.path) {
                    log::error!(
                        "{}: the journal names '{}'",
                        self.folder.display(),
                        change.path
                    );
                    continue;
                }
                let missing = record.boot != self.boot || (record.promise && record.number > kept);
                if missing && let Err(error) = self.bring_back(change) {
                    // One file that is in the way of another must not keep the daemon from starting.
                    let path = self.folder.join(&change.path);
                    log::error!("{}: cannot bring it back: {error}", path.display());
                }
                touched.insert(change.path.clone());
            }
        }
        self.sync(&touched)
            .map_err(|(SyncError::Later(error) | SyncError::Lost(error))| error)?;
        for segment in &mut guard.all {
            segment.make_void()?;
        }
        Ok(())
    }

    fn bring_back(&self, change: &Change) -> io::Result<()> {
        if self.now(&change.path)?.as_ref() == Some(&change.to) {
            return Ok(());
        }
        let path = self.folder.join(&change.path);
        log::info!(
            "{}: brought to what was promised before a crash",
            path.display()
        );
        if let Some(folder) = path.parent() {
            files::make_folder(folder, 0o700)?;
        }
        change.make(&self.folder)
    }

    /// What a file is now; `None` for what no change makes.
    fn now(&self, path: &str) -> io::Result<Option<Content>> {
        let path = self.folder.join(path);
        let kind = match path.symlink_metadata() {
            Ok(metadata) => metadata.file_type(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Some(Content::Gone));
            }
            Err(error) => return Err(error),
        };
        if kind.is_symlink() {
            return Ok((fs::read_link(&path)? == above(&path)).then_some(Content::Link));
        }
        if !kind.is_file() {
            return Ok(None);
        }
        match fs::read(&path).map(String::from_utf8) {
            Ok(Ok(text)) => Ok(Some(Content::Text(text))),
            Ok(Err(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Why files may not be on the disk.
#[derive(Debug)]
enum SyncError {
    /// They could not be asked for.
    Later(io::Error),
    /// The system may have dropped what it was to write, and says so only once.
    Lost(io::Error),
}

impl Segment {
    /// Nothing is read from it again.
    fn make_void(&mut self) -> io::Result<()> {
        if let Some(file) = &self.file {
            file.write_all_at(&[0; HEADER], 0)?;
            file.sync_data()?;
            if self.allocated > STEP {
                file.set_len(STEP)?;
                self.allocated = STEP;
            }
            self.allocated = self.allocated.max(HEADER as u64);
        }
        self.used = 0;
        self.touched.clear();
        Ok(())
    }
}

/// The target of a link of the same name in the folder above.
fn above(path: &Path) -> PathBuf {
    Path::new("..").join(path.file_name().unwrap_or_default())
}

/// Whether a path stays below the folder it is joined to.
fn is_below(path: &str) -> bool {
    let mut parts = Path::new(path).components().peekable();
    parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
}

/// A file itself, not what it links to.
fn open_plain(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

/// Has the kernel write a file's data soon, so that many can be waited for at once.
fn start_writing(file: &File) {
    use std::os::fd::AsRawFd;
    // SAFETY: it takes a descriptor that is open and numbers. That it fails is seen when the file is synced.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

fn sync_all(files: &mut Vec<File>) -> Result<(), SyncError> {
    for file in files.drain(..) {
        file.sync_all().map_err(SyncError::Lost)?;
    }
    Ok(())
}

fn length(batch: &[Entry]) -> u64 {
    batch
        .iter()
        .map(|entry| (HEADER + entry.payload.len()) as u64)
        .sum()
}

/// One write, as read back.
#[derive(Debug, PartialEq, Eq)]
struct Record {
    boot: Uuid,
    number: u64,
    promise: bool,
    changes: Vec<Change>,
}

fn write_record(out: &mut Vec<u8>, epoch: Uuid, boot: Uuid, entry: &Entry) -> io::Result<()> {
    let length = u32::try_from(entry.payload.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a change of over 4 GiB"))?;
    let from = out.len();
    out.extend(if entry.promise { MAGIC_PROMISE } else { MAGIC });
    out.extend(epoch.as_bytes());
    out.extend(boot.as_bytes());
    out.extend(entry.number.to_le_bytes());
    out.extend(length.to_le_bytes());
    let sum = crc32c::crc32c_append(crc32c::crc32c(&out[from..]), &entry.payload);
    out.extend(sum.to_le_bytes());
    out.extend(&entry.payload);
    Ok(())
}

/// The records of one use of a segment, up to the first that is not whole.
fn read_records(bytes: &[u8]) -> Vec<Record> {
    let mut records = Vec::new();
    let mut epoch = None;
    let mut rest = bytes;
    while let Some((record, of, length)) = read_record(rest) {
        if *epoch.get_or_insert(of) != of {
            break;
        }
        records.push(record);
        rest = &rest[length..];
    }
    records
}

/// The record at the start of `bytes`, with its epoch and its length.
fn read_record(bytes: &[u8]) -> Option<(Record, Uuid, usize)> {
    let (header, rest) = bytes.split_at_checked(HEADER)?;
    let uuid = |at: usize| Uuid::from_slice(&header[at..at + 16]).ok();
    let promise = header.starts_with(MAGIC_PROMISE);
    if !promise && !header.starts_with(MAGIC) {
        return None;
    }
    let (epoch, boot) = (uuid(8)?, uuid(24)?);
    let number = u64::from_le_bytes(header[40..48].try_into().ok()?);
    let length = u32::from_le_bytes(header[48..52].try_into().ok()?);
    let sum = u32::from_le_bytes(header[52..56].try_into().ok()?);
    let payload = rest.get(..length as usize)?;
    if crc32c::crc32c_append(crc32c::crc32c(&header[..52]), payload) != sum {
        return None;
    }
    let record = Record {
        boot,
        number,
        promise,
        changes: serde_json::from_slice(payload).ok()?,
    };
    Some((record, epoch, HEADER + payload.len()))
}

#[cfg(test)]
mod tests;
