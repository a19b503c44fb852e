//! Files that are there completely or not at all, and UNIX sockets whose paths may be long.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::killpoint::killpoint;

const TEMP_PREFIX: &str = ".vireo-";
const TEMP_SUFFIX: &str = ".new";

/// Whether a written file must survive a power cut, or only the daemon's death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Synced to the disk before the call returns.
    Disk,
    /// For files below `/run`, which no power cut survives anyway.
    Process,
}

/// Puts `contents` into `path`: at every moment the file holds either what it held before or all
/// of the new contents. Only its owner can read it.
///
/// # Errors
/// The system's; nothing has changed then.
pub fn write_atomically(path: &Path, contents: &[u8], durability: Durability) -> io::Result<()> {
    let folder = parent(path)?;
    let temp = temp_name(folder);
    let written = write_new(&temp, contents, durability);
    killpoint("files.temp-written");
    if let Err(error) = written.and_then(|()| fs::rename(&temp, path)) {
        // The error that matters is the first one; a leftover is cleaned at the next start.
        let _ = fs::remove_file(&temp);
        return Err(error);
    }
    killpoint("files.renamed");
    match durability {
        Durability::Disk => sync_folder(folder),
        Durability::Process => Ok(()),
    }
}

fn write_new(path: &Path, contents: &[u8], durability: Durability) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    killpoint("files.temp-made");
    let half = contents.len() / 2;
    file.write_all(&contents[..half])?;
    killpoint("files.half-written");
    file.write_all(&contents[half..])?;
    if durability == Durability::Disk {
        file.sync_all()?;
    }
    Ok(())
}

/// A file in the making, beside the place it is for. What is at that place stays until it is put there.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    temp: PathBuf,
    path: PathBuf,
    done: bool,
}

impl NewFile {
    /// An empty file, open for reading and writing with these flags too. Only its owner can read it.
    ///
    /// # Errors
    /// The system's.
    pub fn beside(path: &Path, flags: i32) -> io::Result<Self> {
        let temp = temp_name(parent(path)?);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(flags)
            .open(&temp)?;
        Ok(Self {
            file,
            temp,
            path: path.to_owned(),
            done: false,
        })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its name as yet.
    pub fn temp(&self) -> &Path {
        &self.temp
    }

    /// Puts it at its place. Its content is on the disk already.
    ///
    /// # Errors
    /// The system's; the place holds what it held before.
    pub fn put(mut self) -> io::Result<()> {
        fs::rename(&self.temp, &self.path)?;
        self.done = true;
        sync_folder(parent(&self.path)?)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = remove_if_there(&self.temp)
        {
            log::warn!("cannot remove {}: {error}", self.temp.display());
        }
    }
}

fn temp_name(folder: &Path) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    let pid = std::process::id();
    folder.join(format!("{TEMP_PREFIX}{pid}-{number}{TEMP_SUFFIX}"))
}

fn parent(path: &Path) -> io::Result<&Path> {
    path.parent()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a path without a folder"))
}

/// What the file system that `path` is on says of itself.
///
/// # Errors
/// The system's.
pub fn file_system(path: &Path) -> io::Result<libc::statvfs> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: an all-zero statvfs is a valid value.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the name is terminated, and the structure lives here.
    if unsafe { libc::statvfs(name.as_ptr(), &mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat)
}

/// Makes additions to and removals from `folder` survive a power cut.
///
/// # Errors
/// The system's.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Removes what writes and removals that were cut short left in `folder`. Only the one daemon of a root may
/// call it.
///
/// # Errors
/// The system's.
pub fn remove_leftovers(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.starts_with(TEMP_PREFIX) && name.ends_with(TEMP_SUFFIX) {
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                log::info!("removing the rest of a folder: {}", path.display());
                fs::remove_dir_all(path)?;
            } else {
                log::info!("removing an unfinished write: {}", path.display());
                fs::remove_file(path)?;
            }
        }
    }
    Ok(())
}

/// Removes a folder with everything in it; that it is not there is fine. It loses its name first: who still writes into
/// it by that name fails, rather than leaving something behind or keeping it from going.
///
/// # Errors
/// The system's.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let nameless = temp_name(parent(path)?);
    match fs::rename(path, &nameless) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        renamed => renamed?,
    }
    killpoint("files.tree-nameless");
    // Who had looked the name up before may still make one more file each.
    let mut tries = 0;
    loop {
        match fs::remove_dir_all(&nameless) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && tries < 100 => {
                tries += 1;
            }
            removed => return removed,
        }
    }
}

/// Removes a file; that it is not there is fine.
///
/// # Errors
/// The system's.
pub fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes a folder and its parents. A new one gets `mode`.
///
/// # Errors
/// The system's, with the path.
pub fn make_folder(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .map_err(|e| {
            io::Error::new(
                e.kind(),
                format!("{}: {}", path.display(), crate::error::plain(&e)),
            )
        })
}

/// A path short enough for a socket address (108 bytes), by way of the open folder.
///
/// The returned file must live as long as the path is used.
fn short_path(path: &Path) -> io::Result<(Option<File>, PathBuf)> {
    const LONGEST: usize = 107;
    if path.as_os_str().len() <= LONGEST {
        return Ok((None, path.to_owned()));
    }
    let folder = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_PATH)
        .open(parent(path)?)?;
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a path without a name"))?;
    let short = Path::new("/proc/self/fd")
        .join(folder.as_raw_fd().to_string())
        .join(name);
    Ok((Some(folder), short))
}

/// A listening UNIX socket at `path`, which must not exist.
///
/// # Errors
/// The system's.
pub fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    let (_folder, short) = short_path(path)?;
    UnixListener::bind(short)
}

/// Connects to the UNIX socket at `path`.
///
/// # Errors
/// The system's.
pub fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    let (_folder, short) = short_path(path)?;
    UnixStream::connect(short)
}

/// A folder for one unit test, removed with it.
#[cfg(test)]
pub mod testing {
    use super::*;

    /// The folder.
    #[derive(Debug)]
    pub struct TempFolder(pub PathBuf);

    impl TempFolder {
        /// A new, empty one.
        pub fn new() -> Self {
            let path = std::env::temp_dir().join(format!("vireod-test-{}", uuid::Uuid::new_v4()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for TempFolder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::TempFolder;
    use super::*;

    #[test]
    fn a_write_replaces_the_whole_file_and_leaves_nothing_else() {
        let folder = TempFolder::new();
        let path = folder.0.join("a.xml");
        write_atomically(&path, b"one", Durability::Disk).unwrap();
        write_atomically(&path, b"two and more", Durability::Disk).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two and more");
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_write_that_fails_changes_nothing() {
        let folder = TempFolder::new();
        let taken = folder.0.join("taken");
        fs::create_dir(&taken).unwrap();
        assert!(write_atomically(&taken, b"x", Durability::Disk).is_err());
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1);
    }

    #[test]
    fn leftovers_go_and_other_files_stay() {
        let folder = TempFolder::new();
        fs::write(folder.0.join(".vireo-1-2.new"), "half").unwrap();
        fs::create_dir(folder.0.join(".vireo-1-3.new")).unwrap();
        fs::write(folder.0.join(".vireo-1-3.new/state.json"), "").unwrap();
        fs::write(folder.0.join("vm.xml"), "whole").unwrap();
        remove_leftovers(&folder.0).unwrap();
        assert!(folder.0.join("vm.xml").exists());
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_goes_while_others_write_into_it() {
        use std::sync::atomic::AtomicBool;
        let folder = TempFolder::new();
        let path = folder.0.join("domain");
        for _ in 0..200 {
            fs::create_dir(&path).unwrap();
            fs::write(path.join("one"), "").unwrap();
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        let file = path.join("state.json");
                        let _ = write_atomically(&file, b"x", Durability::Process);
                    }
                });
                while !path.join("state.json").exists() {
                    std::thread::yield_now();
                }
                let removed = remove_tree(&path);
                over.store(true, Ordering::Relaxed);
                removed.unwrap();
                assert!(!path.exists());
            });
        }
        remove_tree(&path).unwrap();
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 0);
    }

    #[test]
    fn sockets_may_have_long_paths() {
        let folder = TempFolder::new();
        let deep = folder.0.join("d".repeat(100)).join("e".repeat(100));
        fs::create_dir_all(&deep).unwrap();
        let path = deep.join("control.sock");
        let _listener = listen_unix(&path).unwrap();
        assert!(path.exists());
        connect_unix(&path).unwrap();
    }
}
