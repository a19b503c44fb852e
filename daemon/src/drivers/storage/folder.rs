//! A pool's folder and the files in it.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;

use xml_schemas::pool::{Permissions, Sizes};
use xml_schemas::volume::{BackingStore, Time, Times, Volume, VolumeType};

use super::{probe, system};
use crate::error::Result;
use crate::files;

/// Bytes of `stat`'s blocks.
const BLOCK: u64 = 512;
/// What a folder gets that is made for a pool which doesn't state it.
const FOLDER_MODE: u32 = 0o711;

/// What a look at a pool's folder finds.
#[derive(Debug)]
pub struct Scan {
    /// Of the folder.
    pub permissions: Permissions,
    /// Of its file system.
    pub sizes: Sizes,
    /// By name.
    pub volumes: BTreeMap<String, Volume>,
}

/// Of the file system that `path` is on.
///
/// # Errors
/// The system's.
pub fn sizes(path: &str) -> Result<Sizes> {
    let cannot = |cause: &io::Error| system(format!("cannot statvfs path '{path}'"), cause);
    let stat = files::file_system(path.as_ref()).map_err(|error| cannot(&error))?;
    let capacity = stat.f_blocks.saturating_mul(stat.f_frsize);
    let available = stat.f_bfree.saturating_mul(stat.f_frsize);
    Ok(Sizes {
        capacity,
        allocation: capacity.saturating_sub(available),
        available,
    })
}

fn permissions(metadata: &Metadata) -> Permissions {
    Permissions {
        mode: Some(metadata.mode() & 0o7777),
        owner: Some(metadata.uid()),
        group: Some(metadata.gid()),
        label: None,
    }
}

fn times(metadata: &Metadata) -> Times {
    let time = |seconds, nanoseconds| Time {
        seconds,
        nanoseconds,
    };
    Times {
        accessed: time(metadata.atime(), metadata.atime_nsec()),
        modified: time(metadata.mtime(), metadata.mtime_nsec()),
        changed: time(metadata.ctime(), metadata.ctime_nsec()),
    }
}

/// Looks at a folder and everything in it.
///
/// # Errors
/// The system's. A file that cannot be read is left out, with a message in the log.
pub fn scan(path: &str) -> Result<Scan> {
    let cannot = |cause: io::Error| system(format!("cannot open directory '{path}'"), &cause);
    let mut volumes = BTreeMap::new();
    for entry in fs::read_dir(path).map_err(cannot)? {
        let entry = entry.map_err(|e| system(format!("cannot read directory '{path}'"), &e))?;
        let Ok(name) = entry.file_name().into_string() else {
            log::warn!(
                "{}: left out: its name is not UTF-8",
                entry.path().display()
            );
            continue;
        };
        if name.contains(|c: char| c.is_control()) {
            log::warn!(
                "{}: left out: control characters in its name",
                entry.path().display()
            );
            continue;
        }
        // A name that the protocol's documents can't carry would spoil the others.
        match look(&volume_path(path, &name), &name) {
            Ok(Some(volume)) => {
                volumes.insert(name, volume);
            }
            Ok(None) => {}
            Err(error) => log::warn!("{}: left out: {error}", entry.path().display()),
        }
    }
    let metadata =
        fs::metadata(path).map_err(|e| system(format!("cannot stat path '{path}'"), &e))?;
    Ok(Scan {
        permissions: permissions(&metadata),
        sizes: sizes(path)?,
        volumes,
    })
}

/// Where the volume of that name is.
pub fn volume_path(folder: &str, name: &str) -> String {
    if folder == "/" {
        format!("/{name}")
    } else {
        format!("{folder}/{name}")
    }
}

/// Opens a file to be looked at; nothing waits for a device or a pipe.
pub fn open(path: &str, write: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
}

/// The volume that a file is; none for what is no volume.
///
/// # Errors
/// The system's.
pub fn look(path: &str, name: &str) -> io::Result<Option<Volume>> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        // A link that leads nowhere, or a file that just went.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut volume = Volume {
        name: name.to_owned(),
        key: path.to_owned(),
        path: path.to_owned(),
        permissions: permissions(&metadata),
        times: Some(times(&metadata)),
        ..Volume::default()
    };
    if metadata.is_dir() {
        volume.kind = VolumeType::Dir;
        volume.format = "dir".to_owned();
        volume.capacity = Some(0);
        volume.allocation = Some(0);
        return Ok(Some(volume));
    }
    let block = metadata.file_type().is_block_device();
    if !block && !metadata.is_file() {
        return Ok(None);
    }
    let file = open(path, false)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return Ok(None);
    }
    volume.kind = if block {
        VolumeType::Block
    } else {
        VolumeType::File
    };
    let found = probe::probe(&file, Path::new(path))?;
    measure(&mut volume, &file, &metadata)?;
    volume.capacity = found.capacity.or(volume.physical);
    volume.format = found.format.to_owned();
    volume.encryption = found.encryption;
    volume.compat = found.compat.map(str::to_owned);
    volume.cluster_size = found.cluster_size;
    volume.features = found.features;
    volume.backing = found.backing.map(|(path, format)| {
        let mut backing = BackingStore {
            path,
            format,
            ..BackingStore::default()
        };
        if backing.path.starts_with('/')
            && let Ok(metadata) = fs::metadata(&backing.path)
        {
            backing.permissions = permissions(&metadata);
            backing.times = Some(times(&metadata));
        }
        backing
    });
    Ok(Some(volume))
}

fn measure(volume: &mut Volume, file: &File, metadata: &Metadata) -> io::Result<()> {
    if metadata.is_file() {
        volume.allocation = Some(metadata.blocks().saturating_mul(BLOCK));
        volume.physical = Some(metadata.len());
    } else {
        use std::io::{Seek, SeekFrom};
        // A block device's length is where it ends.
        let len = (&*file).seek(SeekFrom::End(0))?;
        volume.allocation = Some(len);
        volume.physical = Some(len);
    }
    Ok(())
}

/// Looks again at a volume that is known: at its sizes, its times, its permissions, and whether
/// it is what it was.
///
/// # Errors
/// The system's.
pub fn look_again(volume: &mut Volume) -> Result<()> {
    let path = volume.path.clone();
    let cannot = |cause: io::Error| system(format!("cannot open volume '{path}'"), &cause);
    let metadata = fs::metadata(&path).map_err(cannot)?;
    volume.permissions = permissions(&metadata);
    volume.times = Some(times(&metadata));
    if metadata.is_dir() {
        volume.capacity = Some(0);
        volume.allocation = Some(0);
        return Ok(());
    }
    let file = open(&path, false).map_err(cannot)?;
    let metadata = file.metadata().map_err(cannot)?;
    measure(volume, &file, &metadata).map_err(cannot)?;
    let found = probe::probe(&file, Path::new(&path)).map_err(cannot)?;
    volume.capacity = found.capacity.or(volume.physical);
    if found.encryption.is_none() {
        volume.encryption = None;
    }
    if found.format != volume.format {
        // It was overwritten: nothing of what it was holds any more.
        volume.format = found.format.to_owned();
        volume.encryption = found.encryption;
        volume.compat = found.compat.map(str::to_owned);
        volume.cluster_size = found.cluster_size;
        volume.features = found.features;
        volume.backing = found.backing.map(|(path, format)| BackingStore {
            path,
            format,
            ..BackingStore::default()
        });
    }
    if let Some(backing) = &mut volume.backing
        && backing.path.starts_with('/')
        && let Ok(metadata) = fs::metadata(&backing.path)
    {
        backing.permissions = permissions(&metadata);
        backing.times = Some(times(&metadata));
    }
    Ok(())
}

/// Makes a pool's folder, with its parents, and gives it its permissions.
///
/// # Errors
/// The system's.
pub fn build(path: &str, wanted: &Permissions) -> Result<()> {
    let cannot = |cause: io::Error| system(format!("failed to create directory '{path}'"), &cause);
    if let Some(parent) = Path::new(path).parent() {
        fs::create_dir_all(parent).map_err(cannot)?;
    }
    let made = match fs::create_dir(path) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && Path::new(path).is_dir() => {
            false
        }
        Err(error) => return Err(cannot(error)),
    };
    if wanted.owner.is_some() || wanted.group.is_some() {
        chown(path, wanted.owner, wanted.group)
            .map_err(|e| system(format!("cannot chown '{path}'"), &e))?;
    }
    if let Some(mode) = wanted.mode.or(made.then_some(FOLDER_MODE)) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(|e| system(format!("cannot set mode of '{path}'"), &e))?;
    }
    Ok(())
}

/// Removes a pool's folder, which must be empty.
///
/// # Errors
/// The system's.
pub fn remove(path: &str) -> Result<()> {
    fs::remove_dir(path).map_err(|e| system(format!("failed to remove pool '{path}'"), &e))
}

/// Whether the file system copies on write by itself (btrfs), where that can be turned off.
pub fn on_btrfs(path: &str) -> io::Result<bool> {
    const BTRFS: i64 = 0x9123_683e;
    let name = CString::new(Path::new(path).as_os_str().as_bytes())?;
    // SAFETY: an all-zero statfs is a valid value.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the name is terminated, and the structure lives here.
    if unsafe { libc::statfs(name.as_ptr(), &mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.f_type == BTRFS)
}
