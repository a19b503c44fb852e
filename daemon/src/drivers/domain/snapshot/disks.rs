//! What a snapshot does with each disk: which ones take part, the new images.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use images::qcow2::{self, Create};
use xml_schemas::Domain as Definition;
use xml_schemas::dom::Element;
use xml_schemas::domain::device::Disk;
use xml_schemas::snapshot::{Place, SnapshotDisk};

use crate::drivers::domain::block_jobs::chain::source_element;
use crate::error::{Error, ErrorCode, ErrorDomain, Result};
use crate::files;

/// A disk that can have a snapshot.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// `vda`.
    pub target: String,
    /// Its image.
    pub path: PathBuf,
    /// The image's format.
    pub format: String,
    /// The device's id while it runs.
    pub alias: Option<String>,
}

/// A new image on top of a disk's.
#[derive(Debug)]
pub struct Overlay {
    /// The disk.
    pub disk: Candidate,
    /// The new image.
    pub path: PathBuf,
    /// It was there before: the user made it.
    pub reused: bool,
}

fn unsupported(what: impl Into<String>) -> Error {
    Error::of(
        ErrorDomain::DOMAIN_SNAPSHOT,
        ErrorCode::CONFIG_UNSUPPORTED,
        what,
    )
}

/// The disks of a definition that a snapshot can be of: those that are written to.
pub fn candidates(definition: &Definition) -> Vec<Candidate> {
    let disks = definition.devices.rest.iter().filter(|e| e.name == "disk");
    disks
        .filter_map(|element| {
            let disk = Disk::read(element).ok()?;
            let path = disk.source.path()?;
            let own = element.attr("snapshot") != Some("no");
            (disk.device == "disk" && !disk.readonly && own).then(|| Candidate {
                target: disk.target.clone(),
                path: PathBuf::from(path),
                format: disk.format.clone(),
                alias: disk.alias.clone(),
            })
        })
        .collect()
}

/// The images of all disks of a definition, and their formats.
pub fn images(definition: &Definition) -> Vec<(PathBuf, String)> {
    let disks = definition.devices.rest.iter().filter(|e| e.name == "disk");
    disks
        .filter_map(|element| {
            let disk = Disk::read(element).ok()?;
            Some((PathBuf::from(disk.source.path()?), disk.format.clone()))
        })
        .collect()
}

/// What is done with each disk, in the order of the definition: what the document says, else
/// `default`.
///
/// # Errors
/// A disk that is not there or is named twice.
pub fn settle(
    definition: &Definition,
    asked: &[SnapshotDisk],
    default: &Place,
) -> Result<Vec<(Candidate, SnapshotDisk)>> {
    let candidates = candidates(definition);
    let is = |disk: &Candidate, name: &str| disk.target == name || disk.path == Path::new(name);
    for (at, disk) in asked.iter().enumerate() {
        if !candidates.iter().any(|c| is(c, &disk.name)) && disk.place != Some(Place::No) {
            return Err(unsupported(format!("no disk named '{}'", disk.name)));
        }
        if asked[..at].iter().any(|other| other.name == disk.name) {
            return Err(unsupported(format!("disk '{}' specified twice", disk.name)));
        }
    }
    let settled = candidates.into_iter().map(|candidate| {
        let said = asked.iter().find(|disk| is(&candidate, &disk.name));
        let disk = SnapshotDisk {
            name: candidate.target.clone(),
            place: Some(
                said.and_then(|disk| disk.place.clone())
                    .unwrap_or_else(|| default.clone()),
            ),
            format: said.and_then(|disk| disk.format.clone()),
            source: said.and_then(|disk| disk.source.clone()),
        };
        (candidate, disk)
    });
    Ok(settled.collect())
}

/// All disks of a definition, in its order: those that no snapshot can be of are no part of this one.
pub fn with_others(definition: &Definition, settled: Vec<SnapshotDisk>) -> Vec<SnapshotDisk> {
    let mut own: HashMap<String, SnapshotDisk> = settled
        .into_iter()
        .map(|disk| (disk.name.clone(), disk))
        .collect();
    let disks = definition.devices.rest.iter().filter(|e| e.name == "disk");
    let names = disks.filter_map(|element| Some(Disk::read(element).ok()?.target));
    names
        .map(|name| {
            own.remove(&name).unwrap_or(SnapshotDisk {
                name,
                place: Some(Place::No),
                format: None,
                source: None,
            })
        })
        .collect()
}

/// The name of a new image that the user left to us: the old one's, its suffix replaced.
fn overlay_name(old: &Path, snapshot: &str) -> PathBuf {
    old.with_extension(snapshot)
}

/// Says where the new images go.
///
/// # Errors
/// A file is there, or is not there where it is to be reused; a format that can't have anything
/// behind it.
pub fn overlays(
    settled: &mut [(Candidate, SnapshotDisk)],
    snapshot: &str,
    reuse: bool,
) -> Result<Vec<Overlay>> {
    let mut list: Vec<Overlay> = Vec::new();
    for (candidate, disk) in settled {
        if !matches!(disk.place, Some(Place::External(_))) {
            continue;
        }
        let format = disk.format.get_or_insert_with(|| "qcow2".to_owned());
        if format != "qcow2" {
            return Err(unsupported(format!(
                "external snapshot format for disk {} is unsupported: {format}",
                disk.name
            )));
        }
        let path = match &disk.source {
            Some(source) => PathBuf::from(source),
            None => overlay_name(&candidate.path, snapshot),
        };
        let there = path.symlink_metadata().is_ok();
        if there != reuse {
            return Err(unsupported(if there {
                format!(
                    "external snapshot file for disk {} already exists and is not a block device: {}",
                    disk.name,
                    path.display()
                )
            } else {
                format!(
                    "missing existing file for disk {}: {}",
                    disk.name,
                    path.display()
                )
            }));
        }
        if list.iter().any(|other| other.path == path) {
            return Err(unsupported(format!(
                "two disks would have the same image '{}'",
                path.display()
            )));
        }
        disk.source = Some(path.display().to_string());
        list.push(Overlay {
            disk: candidate.clone(),
            path,
            reused: reuse,
        });
    }
    Ok(list)
}

fn failed(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::failed(format!("'{}': {error}", path.display()))
}

/// Size of an image as its guest sees it.
fn size(disk: &Candidate) -> Result<u64> {
    let file = File::open(&disk.path).map_err(|e| Error::system(disk.path.display(), &e))?;
    if disk.format != "qcow2" {
        use std::io::{Seek, SeekFrom};
        let mut file = file;
        // The end of a block device, too.
        return file
            .seek(SeekFrom::End(0))
            .map_err(|e| Error::system(disk.path.display(), &e));
    }
    let file = images::File::new(file.into(), disk.path.display().to_string())
        .map_err(|e| failed(&disk.path, e))?;
    let header = qcow2::Header::read(&file).map_err(|e| failed(&disk.path, e))?;
    Ok(header.size)
}

impl Overlay {
    /// Makes the new image (on the disk), and opens it for reading and writing.
    ///
    /// # Errors
    /// The host's.
    pub fn make(&self) -> Result<OwnedFd> {
        let system = |e: &std::io::Error| Error::system(format!("'{}'", self.path.display()), e);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(!self.reused)
            .mode(0o600)
            .open(&self.path)
            .map_err(|e| system(&e))?;
        if !self.reused {
            let mut options = Create::new(size(&self.disk)?);
            options.backing = Some((OsString::from(&self.disk.path), self.disk.format.clone()));
            let own = file.try_clone().map_err(|e| system(&e))?;
            let image = images::File::new(own.into(), self.path.display().to_string())
                .map_err(|e| failed(&self.path, e))?;
            qcow2::create(image, None, &options).map_err(|e| failed(&self.path, e))?;
            file.sync_all().map_err(|e| system(&e))?;
            let folder = self.path.parent().unwrap_or(Path::new("/"));
            files::sync_folder(folder).map_err(|e| system(&e))?;
        }
        Ok(file.into())
    }

    /// A snapshot that came to nothing leaves no image.
    pub fn undo(&self) {
        if !self.reused
            && let Err(error) = fs::remove_file(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            log::warn!("cannot remove '{}': {error}", self.path.display());
        }
    }
}

/// Has the disks of a definition use these images instead.
pub fn redirect(definition: &mut Definition, to: &[(String, PathBuf, String)]) {
    let disks = definition
        .devices
        .rest
        .iter_mut()
        .filter(|e| e.name == "disk");
    for element in disks {
        let target = element.child("target").and_then(|t| t.attr("dev"));
        let Some((_, path, format)) = to.iter().find(|(name, ..)| Some(name.as_str()) == target)
        else {
            continue;
        };
        // The image's header says what is behind it.
        drop(element.take_child("backingStore"));
        let (kind, source) = source_element(&path.display().to_string());
        element.set_attr("type", kind);
        if element.child("driver").is_none() {
            let rest = element.take_elements();
            element.push(Element::new("driver").with_attr("name", "qemu"));
            rest.into_iter().for_each(|child| element.push(child));
        }
        for child in element.elements_mut() {
            match child.name.as_str() {
                "driver" => child.set_attr("type", format.as_str()),
                "source" => *child = source.clone(),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_images_are_named_after_old_ones() {
        let name = |old: &str| overlay_name(Path::new(old), "s1").display().to_string();
        assert_eq!(name("/d/vm.qcow2"), "/d/vm.s1");
        assert_eq!(name("/d/vm"), "/d/vm.s1");
        assert_eq!(name("/d.x/vm"), "/d.x/vm.s1");
    }
}
