//! Making volumes.

use std::ffi::{CString, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use images::chain::{self, Format};
use images::luks::{self, FilePart, Hash, Mode, Passphrase, Spec, Vector};
use images::qcow2::{self, Create, Encrypt, Preallocation};
use xml_schemas::volume::{EncryptionInfo, Volume, VolumeType};

use super::copy::Source;
use super::object::{Entry, Pool};
use super::volume::{self, InUse, Reference};
use super::{Driver, copy, error, folder, image_error, system, validation};
use crate::error::{ErrorCode, Result, check_flags};
use crate::files;

/// virStorageVolCreateFlags.
mod create_flags {
    pub const PREALLOC_METADATA: u32 = 1;
    pub const REFLINK: u32 = 2;
    pub const VALIDATE: u32 = 4;
}

/// What a volume gets whose document does not state it.
const FILE_MODE: u32 = 0o600;
/// How long trying a passphrase takes, as qemu-img has it.
const PASSPHRASE_TIME: Duration = Duration::from_secs(2);
/// Zeroes are written so many at a time where space cannot be set aside.
const PIECE: usize = 1 << 20;

/// What is to be made, with everything from outside that it needs.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) volume: Volume,
    preallocate: bool,
    pub(super) reflink: bool,
    pub(super) passphrase: Option<Passphrase>,
}

impl Driver {
    /// Makes a volume.
    ///
    /// # Errors
    /// A bad document; VIR_ERR_STORAGE_VOL_EXIST; the system's. Nothing is left of it then.
    pub async fn create_volume(
        &self,
        pool: &Arc<Pool>,
        xml: &str,
        flags: u32,
    ) -> Result<Reference> {
        use create_flags::{PREALLOC_METADATA, VALIDATE};
        check_flags(flags, PREALLOC_METADATA | VALIDATE, "storageVolCreateXML")?;
        pool.lock().check_active()?;
        pool.loaded().await?;
        let volume = Volume::parse(xml, validation(flags & VALIDATE != 0))?;
        if volume.capacity.is_none() && volume.backing.is_none() && volume.kind != VolumeType::Dir {
            return Err(error(ErrorCode::XML_ERROR, "missing capacity element"));
        }
        self.make(pool, volume, flags, None).await
    }

    /// Makes a volume from another one.
    ///
    /// # Errors
    /// As [`Driver::create_volume`].
    pub async fn clone_volume(
        &self,
        pool: &Arc<Pool>,
        xml: &str,
        from: &Arc<Pool>,
        name: &str,
        flags: u32,
    ) -> Result<Reference> {
        use create_flags::{PREALLOC_METADATA, REFLINK, VALIDATE};
        check_flags(
            flags,
            PREALLOC_METADATA | REFLINK | VALIDATE,
            "storageVolCreateXMLFrom",
        )?;
        pool.lock().check_active()?;
        pool.loaded().await?;
        let mut volume = Volume::parse(xml, validation(flags & VALIDATE != 0))?;
        let (original, in_use) = {
            let mut inner = from.lock();
            inner.check_active()?;
            let entry = inner.volume_mut(name)?;
            entry.check_built()?;
            let original = entry.volume.clone();
            (original, InUse::mark(from, entry))
        };
        // As in libvirt, never smaller than what it is made from.
        volume.capacity = Some(
            volume
                .capacity
                .unwrap_or(0)
                .max(original.capacity.unwrap_or(0)),
        );
        if original.kind != VolumeType::File && original.kind != VolumeType::Block {
            return Err(error(
                ErrorCode::OPERATION_UNSUPPORTED,
                format!("volume '{name}' is a directory: it cannot be copied"),
            ));
        }
        let passphrase = match &original.encryption {
            Some(encryption) => Some(self.passphrase(encryption)?),
            None => None,
        };
        let source = Source {
            volume: original,
            passphrase,
        };
        let made = self.make(pool, volume, flags, Some(source)).await;
        drop(in_use);
        made
    }

    async fn make(
        &self,
        pool: &Arc<Pool>,
        mut volume: Volume,
        flags: u32,
        source: Option<Source>,
    ) -> Result<Reference> {
        let name = volume.name.clone();
        check_name(&name)?;
        let folder = pool.lock().definition.path.clone();
        volume.path = folder::volume_path(&folder, &name);
        volume.key.clone_from(&volume.path);
        check(&volume, flags)?;
        let passphrase = match &volume.encryption {
            Some(encryption) => Some(self.passphrase_for_new(encryption)?),
            None => None,
        };
        let shown = Volume {
            allocation: volume.allocation.or(volume.capacity),
            ..volume.clone()
        };
        let building = {
            let mut inner = pool.lock();
            inner.check_active()?;
            if inner.volumes.contains_key(&name) {
                return Err(match source {
                    Some(_) => crate::error::Error::internal(format!(
                        "storage volume name '{name}' already in use."
                    )),
                    None => error(ErrorCode::STORAGE_VOL_EXIST, format!("'{name}'")),
                });
            }
            let mut entry = Entry::new(shown);
            entry.building = true;
            inner.volumes.insert(name.clone(), entry);
            inner.jobs += 1;
            Building {
                pool: Arc::clone(pool),
                name: name.clone(),
            }
        };
        let plan = Plan {
            volume,
            preallocate: flags & create_flags::PREALLOC_METADATA != 0,
            reflink: flags & create_flags::REFLINK != 0,
            passphrase,
        };
        // Not made: `building` takes the entry out again.
        let made = pool.run(move || build(plan, source)).await?;
        Ok(building.done(made))
    }

    fn passphrase_for_new(&self, encryption: &EncryptionInfo) -> Result<Passphrase> {
        if !matches!(encryption.format.as_str(), "luks" | "default") {
            return Err(error(
                ErrorCode::CONFIG_UNSUPPORTED,
                format!(
                    "unsupported volume encryption format {}: only luks",
                    encryption.format
                ),
            ));
        }
        if encryption.secrets.len() != 1 {
            return Err(error(
                ErrorCode::INVALID_ARG,
                "A single <secret type='passphrase'...> element is expected in encryption \
                 description",
            ));
        }
        self.passphrase(encryption)
    }
}

/// A volume that is being made; taken out of its pool if that comes to nothing.
struct Building {
    pool: Arc<Pool>,
    name: String,
}

impl Building {
    fn done(self, made: Volume) -> Reference {
        let mut inner = self.pool.lock();
        inner.account(None, made.allocation);
        let reference = volume::reference(&inner.definition.name, &made);
        inner.volumes.insert(self.name.clone(), Entry::new(made));
        reference
    }
}

impl Drop for Building {
    fn drop(&mut self) {
        let mut inner = self.pool.lock();
        inner.jobs = inner.jobs.saturating_sub(1);
        if inner.volumes.get(&self.name).is_some_and(|e| e.building) {
            inner.volumes.remove(&self.name);
        }
    }
}

fn check_name(name: &str) -> Result<()> {
    if name.contains('/') {
        return Err(error(
            ErrorCode::OPERATION_INVALID,
            format!("volume name '{name}' cannot contain '/'"),
        ));
    }
    if matches!(name, "." | "..") || name.contains(|c: char| c.is_control()) || name.len() > 255 {
        return Err(error(
            ErrorCode::OPERATION_INVALID,
            format!("volume name '{}' is not allowed", name.escape_debug()),
        ));
    }
    Ok(())
}

/// What contradicts itself is refused before anything is made.
fn check(volume: &Volume, flags: u32) -> Result<()> {
    let unsupported = |detail: String| Err(error(ErrorCode::CONFIG_UNSUPPORTED, detail));
    let qcow2 = volume.format == "qcow2";
    if !matches!(volume.format.as_str(), "raw" | "qcow2" | "dir") {
        return unsupported(format!(
            "volumes of format '{}' cannot be made: only raw, qcow2 and dir",
            volume.format
        ));
    }
    if volume.kind == VolumeType::Block {
        return unsupported("a folder's volumes are files, not block devices".to_owned());
    }
    if flags & create_flags::PREALLOC_METADATA != 0 && !qcow2 {
        return unsupported(format!(
            "metadata preallocation is not supported for {} volumes",
            volume.format
        ));
    }
    if volume.backing.is_some() && !qcow2 {
        return Err(error(
            ErrorCode::NO_SUPPORT,
            format!(
                "backing storage not supported for {} volumes",
                volume.format
            ),
        ));
    }
    if volume.compat.is_some() && !qcow2 {
        return unsupported("compatibility option only available with qcow2".to_owned());
    }
    if let Some(compat) = &volume.compat
        && !matches!(compat.as_str(), "0.10" | "1.1")
    {
        return unsupported(format!("qcow2 has no compat level {compat}: 0.10 or 1.1"));
    }
    if let Some(features) = &volume.features
        && volume.compat.as_deref() == Some("0.10")
    {
        for (on, name) in [
            (features.lazy_refcounts, "lazy_refcounts"),
            (features.extended_l2, "extended_l2"),
        ] {
            if on {
                return unsupported(format!("{name} not supported with compat level 0.10"));
            }
        }
    }
    Ok(())
}

/// A new file: without a name where the file system can do that, so that nobody sees it before
/// it is whole and a killed daemon leaves nothing; else one that is removed if it is dropped.
struct NewFile {
    file: Option<File>,
    path: String,
    named: bool,
}

impl NewFile {
    fn make(path: &str) -> Result<Self> {
        let cannot = |cause: &io::Error| system(format!("Failed to create file '{path}'"), cause);
        let parent = Path::new(path).parent().unwrap_or(Path::new("/"));
        let unnamed = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .mode(FILE_MODE)
            .open(parent);
        match unnamed {
            Ok(file) => Ok(Self {
                file: Some(file),
                path: path.to_owned(),
                named: false,
            }),
            Err(cause)
                if matches!(
                    cause.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL | libc::ENOENT)
                ) =>
            {
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .mode(FILE_MODE)
                    .open(path)
                    .map_err(|e| cannot(&e))?;
                Ok(Self {
                    file: Some(file),
                    path: path.to_owned(),
                    named: true,
                })
            }
            Err(cause) => Err(cannot(&cause)),
        }
    }

    fn file(&self) -> Result<File> {
        let copy = self.file.as_ref().map(File::try_clone);
        copy.unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()))
            .map_err(|e| system(format!("cannot use '{}'", self.path), &e))
    }

    /// The file has its name from now on.
    fn keep(mut self) -> Result<()> {
        let Some(file) = self.file.take() else {
            return Ok(());
        };
        let cannot = |cause: &io::Error| system(format!("cannot create '{}'", self.path), cause);
        if !self.named {
            let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let to = CString::new(self.path.as_str());
            let (Ok(from), Ok(to)) = (from, to) else {
                return Err(cannot(&io::ErrorKind::InvalidInput.into()));
            };
            // SAFETY: both names are terminated and live here; nothing else is passed.
            let linked = unsafe {
                libc::linkat(
                    libc::AT_FDCWD,
                    from.as_ptr(),
                    libc::AT_FDCWD,
                    to.as_ptr(),
                    libc::AT_SYMLINK_FOLLOW,
                )
            };
            if linked != 0 {
                return Err(cannot(&io::Error::last_os_error()));
            }
        }
        let parent = Path::new(&self.path).parent().unwrap_or(Path::new("/"));
        files::sync_folder(parent).map_err(|e| cannot(&e))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if self.file.is_some()
            && self.named
            && let Err(error) = fs::remove_file(&self.path)
        {
            log::error!("{}: cannot remove what came to nothing: {error}", self.path);
        }
    }
}

/// Makes the volume that is planned, whole or not at all.
fn build(plan: Plan, source: Option<Source>) -> Result<Volume> {
    let mut volume = plan.volume.clone();
    let path = volume.path.clone();
    if fs::symlink_metadata(&path).is_ok() {
        return Err(error(
            ErrorCode::OPERATION_FAILED,
            format!("volume target path '{path}' already exists"),
        ));
    }
    if volume.kind == VolumeType::Dir {
        fs::create_dir(&path)
            .map_err(|e| system(format!("cannot create directory '{path}'"), &e))?;
        let set = set_permissions_of_folder(&volume);
        if let Err(error) = set {
            // It was empty a moment ago.
            let _ = fs::remove_dir(&path);
            return Err(error);
        }
    } else {
        let new = NewFile::make(&path)?;
        let file = images::File::new(new.file()?.into(), &path).map_err(image_error)?;
        if volume.nocow {
            match no_copy_on_write(&new.file()?, &path) {
                // As in libvirt, where only a raw image insists.
                Err(error) if volume.format == "qcow2" => log::warn!("{error}"),
                other => other?,
            }
        }
        match volume.format.as_str() {
            "qcow2" => qcow2_image(&plan, &mut volume, file, source)?,
            _ => raw_image(&plan, &mut volume, file, source)?,
        }
        permissions(&volume, &new.file()?)?;
        new.keep()?;
    }
    let mut seen = volume;
    folder::look_again(&mut seen)?;
    Ok(seen)
}

fn set_permissions_of_folder(volume: &Volume) -> Result<()> {
    let file = File::open(&volume.path)
        .map_err(|e| system(format!("cannot open directory '{}'", volume.path), &e))?;
    permissions(volume, &file)
}

fn permissions(volume: &Volume, file: &File) -> Result<()> {
    let wanted = &volume.permissions;
    if wanted.owner.is_some() || wanted.group.is_some() {
        fchown(file, wanted.owner, wanted.group)
            .map_err(|e| system(format!("cannot chown '{}'", volume.path), &e))?;
    }
    let mode = wanted.mode.unwrap_or(FILE_MODE);
    file.set_permissions(fs::Permissions::from_mode(mode))
        .map_err(|e| system(format!("cannot set mode of '{}'", volume.path), &e))
}

/// FS_NOCOW_FL, which btrfs knows.
fn no_copy_on_write(file: &File, path: &str) -> Result<()> {
    const GET: libc::c_ulong = 0x8008_6601;
    const SET: libc::c_ulong = 0x4008_6602;
    const NOCOW: libc::c_long = 0x0080_0000;
    let parent = Path::new(path).parent().unwrap_or(Path::new("/"));
    let btrfs = folder::on_btrfs(&parent.to_string_lossy())
        .map_err(|e| system(format!("cannot statfs '{}'", parent.display()), &e))?;
    let cannot = |what: &str, cause: &io::Error| {
        system(
            format!("unable to control COW flag on '{path}'{what}"),
            cause,
        )
    };
    if !btrfs {
        return Err(cannot(
            ", not btrfs",
            &io::Error::from_raw_os_error(libc::ENOSYS),
        ));
    }
    let mut flags: libc::c_long = 0;
    // SAFETY: FS_IOC_GETFLAGS writes one long, which lives here.
    if unsafe { libc::ioctl(file.as_raw_fd(), GET, &mut flags) } != 0 {
        return Err(cannot("", &io::Error::last_os_error()));
    }
    flags |= NOCOW;
    // SAFETY: FS_IOC_SETFLAGS reads one long, which lives here.
    if unsafe { libc::ioctl(file.as_raw_fd(), SET, &flags) } != 0 {
        return Err(cannot("", &io::Error::last_os_error()));
    }
    Ok(())
}

/// Sets space aside, by writing zeroes where the file system can't otherwise.
///
/// # Errors
/// The system's; no space left.
pub(super) fn set_aside(file: &images::File, from: u64, len: u64) -> Result<()> {
    let cannot = |cause: images::Error| match cause {
        images::Error::Io { source, .. } => system(
            format!("cannot allocate {len} bytes in file '{}'", file.name()),
            &source,
        ),
        other => image_error(other),
    };
    if len == 0 || file.allocate(from, len).map_err(cannot)? {
        return Ok(());
    }
    let zeroes = vec![0; PIECE];
    let mut at = from;
    while at < from + len {
        let count = usize::try_from(from + len - at).unwrap_or(PIECE).min(PIECE);
        file.write_bytes(at, &zeroes[..count]).map_err(cannot)?;
        at += count as u64;
    }
    Ok(())
}

fn raw_image(
    plan: &Plan,
    volume: &mut Volume,
    file: images::File,
    source: Option<Source>,
) -> Result<()> {
    let capacity = volume.capacity.unwrap_or(0);
    let too_large = |cause: images::Error| match cause {
        images::Error::Io { source, .. } => {
            system(format!("cannot extend file '{}'", volume.path), &source)
        }
        other => image_error(other),
    };
    let Some(encryption) = &volume.encryption else {
        if let Some(source) = source {
            if plan.reflink && source.is_raw() {
                copy::reflink(&source, &file)?;
                return file.sync().map_err(image_error);
            }
            file.set_len(capacity).map_err(too_large)?;
            copy::into_raw(&source, &file, plan)?;
        } else {
            file.set_len(capacity).map_err(too_large)?;
        }
        let allocation = volume.allocation.unwrap_or(capacity).min(capacity);
        // What is copied has the holes of what it is copied from, unless more is asked for.
        if plan.volume.allocation.is_some() || !plan.reflink {
            set_aside(&file, 0, allocation)?;
        }
        return file.sync().map_err(image_error);
    };
    let spec = spec(encryption)?;
    let passphrase = plan.passphrase.as_ref().ok_or_else(no_passphrase)?;
    let header = luks::header_len(&spec).map_err(image_error)?;
    let Some(len) = header.checked_add(capacity.div_ceil(512) * 512) else {
        return Err(error(ErrorCode::INVALID_ARG, "the capacity is too large"));
    };
    file.set_len(len).map_err(too_large)?;
    let part = FilePart {
        file: &file,
        start: 0,
        len,
    };
    let opened = luks::Volume::create(&part, spec, passphrase.as_bytes(), PASSPHRASE_TIME)
        .map_err(image_error)?;
    if let Some(source) = source {
        let raw = images::Raw::new(file).map_err(image_error)?;
        let image = luks::Luks::new(Arc::new(raw), &opened).map_err(image_error)?;
        copy::into_image(&source, &image, false)?;
        return images::Image::flush(&image).map_err(image_error);
    }
    file.sync().map_err(image_error)
}

fn no_passphrase() -> crate::error::Error {
    error(ErrorCode::INTERNAL_ERROR, "no passphrase for a new volume")
}

/// How a document wants a volume to be encrypted.
fn spec(encryption: &EncryptionInfo) -> Result<Spec> {
    let mut spec = Spec::default();
    let unknown = |what: &str, value: &str| {
        Err(error(
            ErrorCode::CONFIG_UNSUPPORTED,
            format!("{what} '{value}' is not supported for encrypted volumes"),
        ))
    };
    if let Some(cipher) = &encryption.cipher {
        if cipher.name != "aes" {
            return unknown("cipher", &cipher.name);
        }
        spec.mode = match cipher.mode.as_deref() {
            None | Some("xts") => Mode::Xts,
            Some("cbc") => Mode::Cbc,
            Some(other) => return unknown("cipher mode", other),
        };
        // XTS has two keys, and names the length of one.
        let keys = if spec.mode == Mode::Xts { 2 } else { 1 };
        spec.key_bytes = match cipher.size {
            128 | 192 | 256 => cipher.size as usize / 8 * keys,
            other => return unknown("cipher size", &other.to_string()),
        };
        spec.hash = match cipher.hash.as_deref() {
            None | Some("sha256") => Hash::Sha256,
            Some("sha1") => Hash::Sha1,
            Some("sha512") => Hash::Sha512,
            Some(other) => return unknown("hash", other),
        };
    }
    if let Some(vector) = &encryption.vector {
        spec.vector = match (vector.name.as_str(), vector.hash.as_deref()) {
            ("plain", _) => Vector::Plain,
            ("plain64", _) => Vector::Plain64,
            ("essiv", None | Some("sha256")) => Vector::EssivSha256,
            (other, _) => return unknown("ivgen", other),
        };
    }
    Ok(spec)
}

fn qcow2_image(
    plan: &Plan,
    volume: &mut Volume,
    file: images::File,
    source: Option<Source>,
) -> Result<()> {
    if let Some(backing) = &mut volume.backing {
        let format = backing
            .format
            .get_or_insert_with(|| "raw".to_owned())
            .clone();
        let path = Path::new(&backing.path);
        let path = match Path::new(&volume.path).parent() {
            Some(folder) if path.is_relative() => folder.join(path),
            _ => path.to_owned(),
        };
        let inaccessible = |cause: &io::Error| {
            system(
                format!("inaccessible backing store volume {}", backing.path),
                cause,
            )
        };
        let name = path.to_string_lossy().into_owned();
        let opened = folder::open(&name, false).map_err(|e| inaccessible(&e))?;
        if volume.capacity.is_none() {
            let format = Format::from_name(&format).ok_or_else(|| {
                error(
                    ErrorCode::CONFIG_UNSUPPORTED,
                    format!("a backing volume of format '{format}' cannot be read: the capacity must be given"),
                )
            })?;
            let opened = images::File::new(opened.into(), &name).map_err(image_error)?;
            let size = chain::peek(&opened, format).map_err(image_error)?.size;
            volume.capacity = Some(size);
        }
    }
    // As an image tool rounds up: to whole KiB.
    let capacity = volume
        .capacity
        .unwrap_or(0)
        .div_ceil(1024)
        .checked_mul(1024)
        .ok_or_else(|| error(ErrorCode::INVALID_ARG, "the capacity is too large"))?;
    let features = volume.features.unwrap_or_default();
    let mut options = Create::new(capacity);
    options.version = if volume.compat.as_deref() == Some("0.10") {
        2
    } else {
        3
    };
    if let Some(bytes) = volume.cluster_size.filter(|bytes| *bytes > 0) {
        options.cluster_size = bytes;
    }
    options.lazy_refcounts = features.lazy_refcounts;
    options.extended_l2 = features.extended_l2;
    options.backing = volume.backing.as_ref().map(|backing| {
        let format = backing.format.clone().unwrap_or_else(|| "raw".to_owned());
        (OsString::from(&backing.path), format)
    });
    let allocation = plan.volume.allocation.or(volume.capacity).unwrap_or(0);
    if plan.preallocate {
        options.preallocation = if volume.capacity.unwrap_or(0) > allocation {
            Preallocation::Metadata
        } else {
            Preallocation::Falloc
        };
    }
    if let Some(encryption) = &volume.encryption {
        options.encryption = Some(Encrypt {
            spec: spec(encryption)?,
            passphrase: plan.passphrase.clone().ok_or_else(no_passphrase)?,
            time: PASSPHRASE_TIME,
        });
    }
    if let Some(source) = &source
        && plan.reflink
        && source.is_same_format(volume)
    {
        copy::reflink(source, &file)?;
        return file.sync().map_err(image_error);
    }
    let again = copy::duplicate(&file)?;
    qcow2::create(file, None, &options).map_err(image_error)?;
    if let Some(source) = source {
        let mut config = chain::ImageConfig::new(Format::Qcow2, again);
        config.passphrase = plan.passphrase.clone();
        copy::add_backing(&mut config)?;
        let image = chain::open(config).map_err(image_error)?;
        let behind = source.has_same_backing(volume);
        if options.backing.is_some() && !behind {
            copy::into_image_with_backing(&source, &*image)?;
        } else {
            copy::into_image(&source, &*image, behind)?;
        }
        image.flush().map_err(image_error)?;
    }
    Ok(())
}
