//! Volumes of a pool: finding, looking at, removing and resizing them.

use std::fs;
use std::io;
use std::sync::Arc;

use images::chain::{Format, ImageConfig};
use images::lock::{self, Usage};
use images::luks::Passphrase;
use xml_schemas::pool::clean_path;
use xml_schemas::volume::{EncryptionInfo, Volume, VolumeType};

use super::object::{Entry, Inner, Pool};
use super::{Driver, error, folder, image_error, system};
use crate::error::{Error, ErrorCode, Result, check_flags};

/// virStorageVolResizeFlags.
mod resize_flags {
    pub const ALLOCATE: u32 = 1;
    pub const DELTA: u32 = 2;
    pub const SHRINK: u32 = 4;
}

/// VIR_STORAGE_VOL_GET_PHYSICAL
const GET_PHYSICAL: u32 = 1;

/// A volume as clients name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Its pool's name.
    pub pool: String,
    /// Its own.
    pub name: String,
    /// Its key.
    pub key: String,
}

/// What `vol-info` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// virStorageVolType.
    pub kind: i32,
    /// Bytes that a guest sees.
    pub capacity: u64,
    /// Bytes of the host's, or of the file.
    pub allocation: u64,
}

fn no_volume(detail: String) -> Error {
    error(ErrorCode::NO_STORAGE_VOL, detail)
}

/// Marks a volume as used as long as it lives.
#[derive(Debug)]
pub(super) struct InUse {
    pool: Arc<Pool>,
    name: String,
}

impl InUse {
    /// Marks a volume, which is there; the caller has the pool's lock.
    pub(super) fn mark(pool: &Arc<Pool>, entry: &mut Entry) -> Self {
        entry.in_use += 1;
        Self {
            pool: Arc::clone(pool),
            name: entry.volume.name.clone(),
        }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        if let Some(entry) = self.pool.lock().volumes.get_mut(&self.name) {
            entry.in_use = entry.in_use.saturating_sub(1);
        }
    }
}

/// A volume that can be changed, marked as used meanwhile.
pub(super) fn take(pool: &Arc<Pool>, name: &str) -> Result<(Volume, InUse)> {
    let mut inner = pool.lock();
    inner.check_active()?;
    let entry = inner.volume_mut(name)?;
    entry.check_free()?;
    let volume = entry.volume.clone();
    Ok((volume, InUse::mark(pool, entry)))
}

/// Opens a volume's file to be changed while nobody else uses it.
pub(super) fn open_to_change(volume: &Volume) -> Result<images::File> {
    let file = images::File::new(
        folder::open(&volume.path, true)
            .map_err(|e| system(format!("cannot open volume '{}'", volume.path), &e))?
            .into(),
        &volume.path,
    )
    .map_err(image_error)?;
    match lock::change(file.fd(), &volume.path, Usage::NONE, Usage::WRITE) {
        Ok(()) => Ok(file),
        // A file system without locks.
        Err(images::Error::Io { source, .. })
            if matches!(source.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOLCK)) =>
        {
            Ok(file)
        }
        Err(other) => Err(image_error(other)),
    }
}

impl Inner {
    /// Names of the volumes, all of them whole.
    fn references(&self) -> Vec<Reference> {
        let pool = &self.definition.name;
        self.volumes
            .values()
            .map(|entry| reference(pool, &entry.volume))
            .collect()
    }
}

/// How clients name a volume.
pub(super) fn reference(pool: &str, volume: &Volume) -> Reference {
    Reference {
        pool: pool.to_owned(),
        name: volume.name.clone(),
        key: volume.key.clone(),
    }
}

impl Driver {
    /// The volumes of an active pool.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID.
    pub async fn volumes(&self, pool: &Pool) -> Result<Vec<Reference>> {
        pool.lock().check_active()?;
        pool.loaded().await?;
        let inner = pool.lock();
        inner.check_active()?;
        Ok(inner.references())
    }

    /// The pool of a volume, by its name.
    ///
    /// # Errors
    /// VIR_ERR_NO_STORAGE_POOL, VIR_ERR_OPERATION_INVALID.
    pub async fn pool_of(&self, pool: &str) -> Result<Arc<Pool>> {
        let pool = self.by_name(pool)?;
        pool.lock().check_active()?;
        pool.loaded().await?;
        Ok(pool)
    }

    /// The volume of that name.
    ///
    /// # Errors
    /// VIR_ERR_NO_STORAGE_VOL, VIR_ERR_OPERATION_INVALID.
    pub async fn volume_by_name(&self, pool: &Pool, name: &str) -> Result<Reference> {
        pool.lock().check_active()?;
        pool.loaded().await?;
        let inner = pool.lock();
        inner.check_active()?;
        let entry = inner.volume(name)?;
        Ok(reference(&inner.definition.name, &entry.volume))
    }

    /// The volume with that key, in any active pool.
    ///
    /// # Errors
    /// VIR_ERR_NO_STORAGE_VOL.
    pub async fn volume_by_key(&self, key: &str) -> Result<Reference> {
        self.volume_at(key, |volume| volume.key == key)
            .await?
            .ok_or_else(|| no_volume(format!("no storage vol with matching key {key}")))
    }

    /// The volume at that path, in any active pool.
    ///
    /// # Errors
    /// VIR_ERR_NO_STORAGE_VOL.
    pub async fn volume_by_path(&self, path: &str) -> Result<Reference> {
        let clean = clean_path(path);
        self.volume_at(&clean, |volume| volume.path == clean)
            .await?
            .ok_or_else(|| no_volume(format!("no storage vol with matching path '{path}'")))
    }

    async fn volume_at(
        &self,
        path: &str,
        is_it: impl Fn(&Volume) -> bool,
    ) -> Result<Option<Reference>> {
        for pool in self.all() {
            {
                let inner = pool.lock();
                // Only a pool that may have it is waited for.
                if !inner.active || !path.starts_with(&inner.definition.path) {
                    continue;
                }
            }
            pool.loaded().await?;
            let inner = pool.lock();
            let found = inner.volumes.values().find(|e| is_it(&e.volume));
            if let Some(entry) = found.filter(|_| inner.active) {
                return Ok(Some(reference(&inner.definition.name, &entry.volume)));
            }
        }
        Ok(None)
    }

    /// A volume's path.
    ///
    /// # Errors
    /// VIR_ERR_NO_STORAGE_VOL, VIR_ERR_OPERATION_INVALID.
    pub async fn volume_path(&self, pool: &str, name: &str) -> Result<String> {
        let pool = self.pool_of(pool).await?;
        let inner = pool.lock();
        inner.check_active()?;
        Ok(inner.volume(name)?.volume.path.clone())
    }

    /// Where a domain's disk is that is a volume. How it is stored is for the domain to say, not
    /// for the file.
    ///
    /// # Errors
    /// VIR_ERR_NO_STORAGE_POOL, VIR_ERR_NO_STORAGE_VOL; VIR_ERR_CONFIG_UNSUPPORTED for an
    /// inactive pool or a folder.
    pub fn disk_path(&self, pool: &str, volume: &str) -> Result<String> {
        let found = self.by_name(pool)?;
        let inner = found.lock();
        let unsupported = |detail: String| Err(error(ErrorCode::CONFIG_UNSUPPORTED, detail));
        if !inner.active {
            return unsupported(format!(
                "storage pool '{pool}' containing volume '{volume}' is not active"
            ));
        }
        let entry = inner.volume(volume)?;
        entry.check_built()?;
        if entry.volume.kind == VolumeType::Dir {
            return unsupported(format!("volume '{volume}' of pool '{pool}' is a directory"));
        }
        Ok(entry.volume.path.clone())
    }

    /// Looks at a volume again, and gives it.
    async fn fresh(&self, pool: &Arc<Pool>, name: &str) -> Result<Volume> {
        let mut volume = {
            let inner = pool.lock();
            inner.check_active()?;
            let entry = inner.volume(name)?;
            if entry.building {
                return Ok(entry.volume.clone());
            }
            entry.volume.clone()
        };
        let volume = pool
            .run(move || folder::look_again(&mut volume).map(|()| volume))
            .await?;
        if let Some(entry) = pool.lock().volumes.get_mut(name)
            && !entry.building
        {
            entry.volume = volume.clone();
        }
        Ok(volume)
    }

    /// A volume's sizes.
    ///
    /// # Errors
    /// VIR_ERR_NO_STORAGE_VOL, VIR_ERR_OPERATION_INVALID; the system's.
    pub async fn volume_info(&self, pool: &str, name: &str, flags: u32) -> Result<Info> {
        check_flags(flags, GET_PHYSICAL, "storageVolGetInfoFlags")?;
        let pool = self.pool_of(pool).await?;
        let volume = self.fresh(&pool, name).await?;
        let allocation = if flags & GET_PHYSICAL != 0 {
            volume.physical
        } else {
            volume.allocation
        };
        Ok(Info {
            kind: volume.kind.number(),
            capacity: volume.capacity.unwrap_or(0),
            allocation: allocation.unwrap_or(0),
        })
    }

    /// A volume's document.
    ///
    /// # Errors
    /// As [`Driver::volume_info`].
    pub async fn volume_xml(&self, pool: &str, name: &str, flags: u32) -> Result<String> {
        check_flags(flags, 0, "storageVolGetXMLDesc")?;
        let pool = self.pool_of(pool).await?;
        Ok(self.fresh(&pool, name).await?.format())
    }

    /// Removes a volume.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID while somebody uses it; the system's.
    pub async fn delete_volume(&self, pool: &str, name: &str, flags: u32) -> Result<()> {
        check_flags(flags, 0, "virStorageBackendVolDeleteLocal")?;
        let pool = self.pool_of(pool).await?;
        let (volume, in_use) = take(&pool, name)?;
        let allocation = volume.allocation;
        pool.run(move || remove(&volume)).await?;
        drop(in_use);
        let mut inner = pool.lock();
        inner.volumes.remove(name);
        inner.account(allocation, None);
        Ok(())
    }

    /// Changes a volume's capacity.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG for what must not be, VIR_ERR_OPERATION_FAILED if there is no room;
    /// the system's.
    pub async fn resize_volume(
        &self,
        pool: &str,
        name: &str,
        capacity: u64,
        flags: u32,
    ) -> Result<()> {
        use resize_flags::{ALLOCATE, DELTA, SHRINK};
        check_flags(flags, ALLOCATE | DELTA | SHRINK, "storageVolResize")?;
        let pool = self.pool_of(pool).await?;
        self.fresh(&pool, name).await?;
        let (volume, in_use) = take(&pool, name)?;
        let now = volume.capacity.unwrap_or(0);
        let invalid = |detail: &str| Err(error(ErrorCode::INVALID_ARG, detail));
        let wanted = match (flags & DELTA != 0, flags & SHRINK != 0) {
            (false, _) => Some(capacity),
            (true, false) => now.checked_add(capacity),
            (true, true) => Some(now.saturating_sub(capacity)),
        };
        let Some(wanted) = wanted else {
            return invalid("the new capacity is more than any volume has");
        };
        if wanted < volume.allocation.unwrap_or(0) {
            return invalid("can't shrink capacity below existing allocation");
        }
        if wanted < now && flags & SHRINK == 0 {
            return invalid(
                "Can't shrink capacity below current capacity unless shrink flag explicitly specified",
            );
        }
        let available = pool.lock().sizes.available;
        if wanted > now.saturating_add(available) {
            return Err(error(
                ErrorCode::OPERATION_FAILED,
                "Not enough space left in storage pool",
            ));
        }
        let passphrase = match &volume.encryption {
            Some(encryption) => Some(self.passphrase(encryption)?),
            None => None,
        };
        let allocate = flags & ALLOCATE != 0;
        let before = volume.allocation;
        let mut after = volume;
        let after = pool
            .run(move || {
                resize(&after, wanted, allocate, passphrase)?;
                folder::look_again(&mut after)?;
                Ok(after)
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

    /// What opens an encrypted volume.
    ///
    /// # Errors
    /// VIR_ERR_XML_ERROR if its definition names no secret; VIR_ERR_NO_SECRET.
    pub(super) fn passphrase(&self, encryption: &EncryptionInfo) -> Result<Passphrase> {
        let Some(secret) = encryption.secrets.first() else {
            return Err(error(
                ErrorCode::XML_ERROR,
                format!("no secret provided for {} encryption", encryption.format),
            ));
        };
        Ok(self.secrets.value_of(secret)?.into())
    }
}

fn remove(volume: &Volume) -> Result<()> {
    let gone = |result: io::Result<()>, what: &str| match result {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            Err(system(format!("cannot {what} '{}'", volume.path), &cause))
        }
        _ => Ok(()),
    };
    match volume.kind {
        VolumeType::Dir => gone(fs::remove_dir(&volume.path), "remove directory"),
        VolumeType::File => gone(fs::remove_file(&volume.path), "unlink file"),
        VolumeType::Block => Err(error(
            ErrorCode::NO_SUPPORT,
            format!(
                "removing block or network volumes is not supported: {}",
                volume.path
            ),
        )),
    }
}

/// How a volume is stored, if that can be changed here.
pub(super) fn stored_as(volume: &Volume) -> Result<Format> {
    match (volume.format.as_str(), &volume.encryption) {
        ("raw", Some(_)) => Ok(Format::Luks),
        ("raw" | "iso" | "none", None) => Ok(Format::Raw),
        ("qcow2", _) => Ok(Format::Qcow2),
        (other, _) => Err(error(
            ErrorCode::CONFIG_UNSUPPORTED,
            format!(
                "volume '{}' is {other}: only raw, qcow2 and luks volumes can be read or changed \
                 by their content",
                volume.name
            ),
        )),
    }
}

fn resize(
    volume: &Volume,
    capacity: u64,
    allocate: bool,
    passphrase: Option<Passphrase>,
) -> Result<()> {
    if volume.kind != VolumeType::File {
        return Err(error(
            ErrorCode::NO_SUPPORT,
            format!(
                "only volumes that are files can be resized, not '{}'",
                volume.name
            ),
        ));
    }
    let format = stored_as(volume)?;
    if format != Format::Raw && allocate {
        return Err(error(
            ErrorCode::OPERATION_UNSUPPORTED,
            "preallocate is only supported for raw type volume",
        ));
    }
    let file = open_to_change(volume)?;
    if format == Format::Raw {
        if allocate {
            let now = file.size().map_err(image_error)?;
            // What is there already as well, as far as the file system can.
            file.allocate(0, now).map_err(image_error)?;
            if capacity > now {
                super::create::set_aside(&file, now, capacity - now)?;
            }
        }
        file.set_len(capacity).map_err(image_error)?;
        return file.sync().map_err(image_error);
    }
    let mut config = ImageConfig::new(format, file);
    config.passphrase = passphrase;
    super::copy::add_backing(&mut config)?;
    let image = images::chain::open(config).map_err(image_error)?;
    // As a disk has whole sectors, and an image tool rounds up.
    image
        .resize(capacity.div_ceil(512).saturating_mul(512))
        .map_err(image_error)?;
    image.flush().map_err(image_error)
}
