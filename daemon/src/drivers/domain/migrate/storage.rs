//! Disks that go along with their guest: which they are, and images for them where it comes to.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmm_api::control::Call;
use xml_schemas::Domain as Definition;
use xml_schemas::dom::{Element, format_element};
use xml_schemas::domain::device::Disk;
use xml_schemas::domain::device::DiskSource;

use super::{Params, flags};
use crate::drivers::domain::lifecycle::ask;
use crate::drivers::domain::object::Domain;
use crate::drivers::domain::{Driver, blocking};
use crate::error::{Error, ErrorCode, Result};
use crate::files::{self, Durability};
use crate::killpoint::killpoint;
use vmm_api::control::Answer;

/// After a domain's uuid: where the next daemon reads what was made for it.
const NOTE: &str = ".volumes";

/// What Begin tells Prepare.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cookie {
    /// The source's daemon.
    pub daemon: Option<String>,
    /// Disks that go along.
    pub disks: Vec<CookieDisk>,
}

impl Cookie {
    /// As it came.
    ///
    /// # Errors
    /// VIR_ERR_INTERNAL_ERROR: it is none.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        match bytes {
            [] => Ok(Self::default()),
            bytes => serde_json::from_slice(bytes)
                .map_err(|error| Error::internal(format!("the source's cookie: {error}"))),
        }
    }
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CookieDisk {
    /// Its name in the guest: `vda`.
    pub target: String,
    /// The size the guest sees, bytes.
    pub capacity: u64,
}

/// A volume that was made for a guest that is to come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pool: String,
    name: String,
}

/// Whether content of disks goes along.
pub fn wanted(flags: u64) -> bool {
    flags & (flags::NON_SHARED_DISK | flags::NON_SHARED_INC) != 0
}

/// What contradicts itself.
///
/// # Errors
/// VIR_ERR_INVALID_ARG.
pub fn check(flags: u64) -> Result<()> {
    if flags & flags::NON_SHARED_DISK != 0 && flags & flags::NON_SHARED_INC != 0 {
        let text = "flags 'VIR_MIGRATE_NON_SHARED_DISK' and 'VIR_MIGRATE_NON_SHARED_INC' in \
                    migration are mutually exclusive";
        return Err(Error::new(ErrorCode::INVALID_ARG, text));
    }
    if flags & flags::OFFLINE != 0 && wanted(flags) {
        return Err(Error::invalid(
            "offline migration cannot handle non-shared storage",
        ));
    }
    Ok(())
}

/// The disks that go along: those that were named, else all that are this guest's alone and that it
/// can write.
///
/// # Errors
/// VIR_ERR_INVALID_ARG: a name that no disk has, or of one that can't go along.
pub fn chosen(definition: &Definition, params: &Params, flags: u64) -> Result<Vec<Disk>> {
    if !wanted(flags) {
        return Ok(Vec::new());
    }
    let elements = definition.devices.rest.iter();
    let disks = elements
        .filter(|element| element.name == "disk")
        .map(Disk::read)
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let invalid = |text: String| Err(Error::new(ErrorCode::INVALID_ARG, text));
    for name in &params.disks {
        match disks.iter().find(|disk| disk.target == *name) {
            None => return invalid(format!("disk target {name} not found")),
            Some(disk) if disk.readonly || disk.source == DiskSource::None => {
                return invalid(format!(
                    "disk {name} is empty or read-only: it can't be copied"
                ));
            }
            Some(_) => {}
        }
    }
    let goes = |disk: &Disk| match params.disks.is_empty() {
        true => !disk.readonly && !disk.shareable && disk.source != DiskSource::None,
        false => params.disks.contains(&disk.target),
    };
    Ok(disks.into_iter().filter(goes).collect())
}

/// The definition for the target. Disks whose whole content goes along are one image there, or what
/// the target finds: what was found behind them here is not theirs.
pub fn for_target(definition: &Definition, along: &[Disk], flags: u64) -> Definition {
    let mut definition = definition.clone();
    if flags & flags::NON_SHARED_DISK == 0 {
        return definition;
    }
    for element in &mut definition.devices.rest {
        let goes = element.name == "disk"
            && Disk::read(element)
                .is_ok_and(|disk| along.iter().any(|other| other.target == disk.target));
        if goes {
            element.take_child("backingStore");
        }
    }
    definition
}

impl Driver {
    /// What the target has to know of the disks that go along.
    ///
    /// # Errors
    /// The VMM's silence.
    pub(super) async fn storage_cookie(&self, domain: &Domain, disks: &[Disk]) -> Result<Cookie> {
        let mut cookie = Cookie {
            daemon: Some(self.migrations.own().to_string()),
            ..Cookie::default()
        };
        if disks.is_empty() {
            return Ok(cookie);
        }
        let Answer::Stats(stats) = ask(domain, Call::Stats).await? else {
            return Err(Error::internal(
                "the VMM does not say how large its disks are",
            ));
        };
        for disk in disks {
            let id = disk.alias.as_ref();
            let counted = stats.disks.iter().find(|(of, _)| Some(of) == id);
            let (_, counted) = counted
                .ok_or_else(|| Error::internal(format!("the VMM has no disk '{}'", disk.target)))?;
            cookie.disks.push(CookieDisk {
                target: disk.target.clone(),
                capacity: counted.capacity,
            });
        }
        Ok(cookie)
    }

    /// Makes volumes for disks that are to come and are not there, as libvirt does: in pools, and
    /// only where all of a disk's content comes.
    ///
    /// # Errors
    /// It can't be made; `made` has those that were.
    pub(super) async fn make_volumes(
        &self,
        uuid: Uuid,
        disks: &[Disk],
        told: &Cookie,
        flags: u64,
        made: &mut Vec<Volume>,
    ) -> Result<()> {
        for disk in disks {
            let (pool, path) = match &disk.source {
                DiskSource::File(path) | DiskSource::Block(path) => {
                    let at = path.clone();
                    if blocking(move || Path::new(&at).exists()).await? {
                        continue;
                    }
                    (None, path.clone())
                }
                DiskSource::Volume { pool, volume } => {
                    let there = self.storage.by_name(pool)?;
                    there.loaded().await?;
                    if there.lock().volume(volume).is_ok() {
                        continue;
                    }
                    (Some(there), volume.clone())
                }
                _ => continue,
            };
            let target = &disk.target;
            let refuse = |text: String| Err(Error::new(ErrorCode::OPERATION_UNSUPPORTED, text));
            if flags & flags::NON_SHARED_INC != 0 {
                return refuse(
                    "pre-creation of storage targets for incremental storage migration is not \
                     supported"
                        .to_owned(),
                );
            }
            let format = match (disk.format.as_str(), &disk.secret) {
                ("luks", Some(_)) => "raw",
                (format @ ("raw" | "qcow2"), _) => format,
                _ => {
                    return refuse(format!(
                        "cannot pre-create the image of disk '{target}': only raw, qcow2 and luks"
                    ));
                }
            };
            if matches!(disk.source, DiskSource::Block(_)) {
                return refuse(format!(
                    "cannot precreate storage for disk '{target}': it is a block device"
                ));
            }
            let capacity = told.disks.iter().find(|of| of.target == *target);
            let capacity = capacity.ok_or_else(|| {
                Error::internal(format!("the source does not say how large '{target}' is"))
            })?;
            let path = Path::new(&path);
            let name = path.file_name().map(|name| name.to_string_lossy());
            let name = name.ok_or_else(|| {
                let text = format!("malformed disk path: {}", path.display());
                Error::new(ErrorCode::INVALID_ARG, text)
            })?;
            let pool = match pool {
                Some(pool) => pool,
                None => {
                    let folder = path.parent().unwrap_or(Path::new("/"));
                    self.storage.by_target_path(&folder.to_string_lossy())?
                }
            };
            let mut element =
                Element::new("target").with_child(Element::new("format").with_attr("type", format));
            if format == "qcow2" {
                element.push(Element::with_text("compat", "1.1"));
            }
            if let Some(used) = &disk.secret {
                // As encrypted as it was, by the secret that this host has under that name.
                let mut secret = Element::new("secret").with_attr("type", "passphrase");
                for (name, value) in [("uuid", &used.uuid), ("usage", &used.usage)] {
                    if let Some(value) = value {
                        secret.set_attr(name, value);
                    }
                }
                let encryption = Element::new("encryption").with_attr("format", &*used.format);
                element.push(encryption.with_child(secret));
            }
            let volume = Element::new("volume")
                .with_child(Element::with_text("name", name.clone()))
                .with_child(Element::with_text(
                    "capacity",
                    capacity.capacity.to_string(),
                ))
                .with_child(Element::with_text("allocation", "0"))
                .with_child(element);
            let mut xml = String::new();
            format_element(&mut xml, &volume, 0);
            let volume = Volume {
                pool: pool.name(),
                name: name.into_owned(),
            };
            // Before it is there: if this daemon dies the next one takes it away.
            made.push(volume);
            self.note_volumes(uuid, made)?;
            if let Err(error) = self.storage.create_volume(&pool, &xml, 0).await {
                made.pop();
                return Err(error);
            }
            killpoint("migrate.volume-made");
        }
        Ok(())
    }

    fn volumes_note(&self, uuid: Uuid) -> PathBuf {
        self.roots.live_domains().join(format!("{uuid}{NOTE}"))
    }

    fn note_volumes(&self, uuid: Uuid, made: &[Volume]) -> Result<()> {
        let path = self.volumes_note(uuid);
        let text = serde_json::to_vec(made).map_err(|error| Error::internal(error.to_string()))?;
        files::write_atomically(&path, &text, Durability::Process)
            .map_err(|error| Error::system(format!("cannot write '{}'", path.display()), &error))
    }

    /// The guest that volumes were made for is here.
    pub(super) fn keep_volumes(&self, uuid: Uuid) {
        let path = self.volumes_note(uuid);
        if let Err(error) = files::remove_if_there(&path) {
            log::warn!("cannot remove '{}': {error}", path.display());
        }
    }

    /// What an earlier daemon made for guests that did not come goes.
    ///
    /// # Errors
    /// The folder can't be read.
    pub async fn settle_volumes(&self) -> std::io::Result<()> {
        for entry in std::fs::read_dir(self.roots.live_domains())? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let uuid = name.and_then(|name| name.strip_suffix(NOTE)?.parse::<Uuid>().ok());
            let Some(uuid) = uuid else { continue };
            let came = self.registry.by_uuid(uuid);
            if came.is_some_and(|domain| domain.lock().live.is_some()) {
                self.keep_volumes(uuid);
                continue;
            }
            match serde_json::from_slice::<Vec<Volume>>(&std::fs::read(&path)?) {
                Ok(made) => self.unmake_volumes(uuid, &made).await,
                Err(error) => log::error!("{}: {error}", path.display()),
            }
        }
        Ok(())
    }

    /// Takes volumes away whose guest did not come.
    pub(super) async fn unmake_volumes(&self, uuid: Uuid, made: &[Volume]) {
        for Volume { pool, name } in made {
            if let Err(error) = self.storage.delete_volume(pool, name, 0).await {
                log::warn!("volume '{name}' of pool '{pool}' can't be removed: {error}");
            }
        }
        if !made.is_empty() {
            self.keep_volumes(uuid);
        }
    }
}
