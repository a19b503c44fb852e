//! Media of CD-ROM drives that run, and the drives' trays.

use std::sync::Arc;
use std::time::Duration;

use vmm_api::control::{Answer, Call, Failure};
use xml_schemas::Domain as Definition;
use xml_schemas::dom::Element;
use xml_schemas::domain::device::{self, Disk, DiskSource};

use super::block_jobs::disk_without_block_job;
use super::lifecycle::ask;
use super::machine::{self, Medium};
use super::object::{Domain, Inner, Pinned};
use super::plug::write;
use super::record::Folder;
use super::{Driver, blocking, image_numbers};
use crate::control::{Control, ControlError};
use crate::error::{Error, ErrorCode, Result};
use crate::events::DomainEvent;
use crate::killpoint::killpoint;

/// How long a VMM may take to change a medium.
const CHANGE_LIMIT: Duration = Duration::from_secs(10);
/// How long a guest that has locked a drive may take to open its tray: as long as libvirt waits.
const TRAY_LIMIT: Duration = Duration::from_secs(5);
/// How often the tray is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// The parts of a disk that belong to what is in it.
const MEDIUM: [&str; 3] = ["source", "backingStore", "encryption"];

/// A drive of a running machine: what media can be put into.
pub(super) fn is_drive(disk: &Element) -> bool {
    disk.name == "disk" && Disk::read(disk).is_ok_and(|disk| disk.is_cdrom())
}

/// Whether two documents of disks name the same image.
pub(super) fn same_medium(have: &Element, wanted: &Element) -> Result<bool> {
    let other = |e: &Element| {
        let mut source = e.child("source")?.clone();
        source
            .attributes
            .retain(|(name, _)| name != "startupPolicy" && name != "index");
        Some(source)
    };
    let (own, new) = (Disk::read(have)?.source, Disk::read(wanted)?.source);
    Ok(match (&own, &new) {
        (DiskSource::Other(_), DiskSource::Other(_)) => other(have) == other(wanted),
        _ => own == new,
    })
}

/// The drive with what `wanted` puts into it.
fn with_medium(have: &Element, wanted: &Element) -> Element {
    let mut new = have.clone();
    put(&mut new, wanted);
    for source in new.elements_mut().filter(|e| e.name == "source") {
        source.take_attr("index");
    }
    new
}

/// Takes over from `from` what belongs to a drive's medium.
fn put(drive: &mut Element, from: &Element) {
    for part in MEDIUM {
        drive.take_children(part);
        let parts = from.elements().filter(|e| e.name == part);
        parts.for_each(|part| drive.push(part.clone()));
    }
    drive.set_attr("type", from.attr("type").unwrap_or("file"));
    if drive.child("source").is_none() {
        // Where the number of the medium stands that is not there, as libvirt has it.
        drive.push(Element::new("source"));
    }
    let format = from.child("driver").and_then(|e| e.attr("type"));
    let format = format.unwrap_or("raw").to_owned();
    for driver in drive.elements_mut().filter(|e| e.name == "driver") {
        driver.set_attr("type", &format);
    }
}

/// Notes where a tray is.
fn set_tray(drive: &mut Element, open: bool) {
    for target in drive.elements_mut().filter(|e| e.name == "target") {
        match open {
            true => target.set_attr("tray", "open"),
            false => drop(target.take_attr("tray")),
        }
    }
}

/// A machine that starts has its trays in, and of a drive that starts empty nobody says what format its medium has.
pub(super) fn at_start(definition: &mut Definition) {
    for drive in definition
        .devices
        .rest
        .iter_mut()
        .filter(|e| e.name == "disk")
    {
        set_tray(drive, false);
        if is_drive(drive) && Disk::read(drive).is_ok_and(|disk| disk.is_empty_drive()) {
            for driver in drive.elements_mut().filter(|e| e.name == "driver") {
                driver.take_attr("type");
            }
        }
    }
}

/// Whether there is a drive whose tray could be out.
pub(super) fn has_drives(definition: &Definition) -> bool {
    definition.devices.rest.iter().any(is_drive)
}

impl Driver {
    /// Puts what `wanted` names into the running drive `have`, or takes out what is in it.
    ///
    /// # Errors
    /// What can't be opened; VIR_ERR_OPERATION_FAILED where the guest keeps the tray in, and `force` is not given.
    pub(super) async fn change_medium(
        &self,
        domain: &Pinned,
        have: &Element,
        wanted: &Element,
        force: bool,
    ) -> Result<()> {
        let target = Disk::read(have)?.target;
        let id = device::alias(have)
            .ok_or_else(|| Error::internal("a running device has no id"))?
            .to_owned();
        if !self.is_there(domain, &id).await? {
            // Of a machine that an earlier version started, which left empty drives out.
            return Err(left_out());
        }
        disk_without_block_job(domain, &id).await?;
        let new = with_medium(have, wanted);
        let around = self.surroundings(domain)?;
        let next = {
            let inner = domain.lock();
            let live = inner.live()?;
            image_numbers::next(&live.definition, live.next_image)
        };
        let opened = blocking(move || {
            let stated = image_numbers::length(&new);
            let mut new = new;
            let medium = machine::build_medium(&mut new, around)?;
            let next = image_numbers::plugged(&mut new, stated, next);
            Ok::<_, Error>((new, medium, next))
        });
        let (new, medium, next) = opened.await??;
        let (control, folder) = self.about_to_change(domain, &new, next)?;
        killpoint("media.noted");
        match change(domain, &control, &target, &id, &medium, force).await {
            Ok(()) => {}
            Err(Trouble::Refused(error)) => {
                folder.forget_changing();
                return Err(error);
            }
            Err(Trouble::Unknown(error)) => {
                // Noted for as long as nobody knows.
                self.catch_up_media(domain, Some(new)).await?;
                return Err(error);
            }
        }
        killpoint("media.changed");
        let mut inner = domain.lock();
        self.medium_changed(&mut inner, &id, &new)?;
        folder.forget_changing();
        Ok(())
    }

    /// Whether a running machine has that drive.
    async fn is_there(&self, domain: &Domain, id: &str) -> Result<bool> {
        match ask(domain, Call::Disks).await? {
            Answer::Disks(disks) => Ok(disks.iter().any(|disk| disk.id == id)),
            _ => Err(Error::internal("the VMM's answer makes no sense")),
        }
    }

    /// Notes what is about to be in a drive where the next daemon finds it. The way to the VMM.
    fn about_to_change(
        &self,
        domain: &Domain,
        new: &Element,
        next_image: u32,
    ) -> Result<(Control, Folder)> {
        let mut inner = domain.lock();
        let live = inner.live_mut()?;
        live.next_image = next_image;
        let folder = Folder(live.folder.clone());
        let control = live.control.clone();
        self.write_record(&inner);
        folder
            .write_changing(new)
            .map_err(|error| Error::system("cannot note the medium", &error))?;
        Ok((control, folder))
    }

    /// A running drive has another medium.
    fn medium_changed(&self, inner: &mut Inner, id: &str, new: &Element) -> Result<()> {
        let live = inner.live_mut()?;
        let mut now = Definition::clone(&live.definition);
        let mut devices = now.devices.rest.iter_mut();
        if let Some(drive) = devices.find(|e| device::alias(e) == Some(id)) {
            put(drive, new);
        }
        now.devices.arrange();
        write(&now, &Folder(live.folder.clone()));
        live.definition = Arc::new(now);
        Ok(())
    }

    /// A tray has moved. It is in no file: a guest could have that written without end, and the next daemon asks.
    pub(super) fn tray_moved(&self, domain: &Domain, inner: &mut Inner, id: &str, open: bool) {
        let name = domain.name_in(inner);
        let Some(live) = inner.live.as_mut() else {
            return;
        };
        note_trays(live, |drive| (drive == id).then_some(open));
        let alias = id.to_owned();
        self.emit(&name, &DomainEvent::TrayChange { alias, open });
    }

    /// A medium may have been on its way when the last daemon ended: which one is in the drive, the VMM knows.
    ///
    /// # Errors
    /// The VMM's silence.
    pub(super) async fn settle_media(
        &self,
        domain: &Pinned,
        changing: Option<Element>,
    ) -> Result<()> {
        let Some(changing) = changing else {
            return Ok(());
        };
        let _job = domain.job().await?;
        self.catch_up_media(domain, Some(changing)).await
    }

    /// Has the VMM asked where trays are now.
    pub(super) fn look_at_trays(self: &Arc<Self>, domain: &Arc<Domain>, inner: &Inner) {
        let live = inner.live.as_ref();
        if !live.is_some_and(|live| has_drives(&live.definition)) {
            return;
        }
        let (driver, domain) = (Arc::clone(self), Arc::clone(domain));
        tokio::spawn(async move {
            if let Err(error) = driver.catch_up_media(&domain, None).await {
                log::warn!("domain '{}': its drives: {error}", domain.name().name);
            }
        });
    }

    /// Where trays are, and which medium is in a drive whose medium the last daemon was about to change, the VMM knows.
    ///
    /// # Errors
    /// The VMM's silence.
    pub(super) async fn catch_up_media(
        &self,
        domain: &Domain,
        changing: Option<Element>,
    ) -> Result<()> {
        if changing.is_none() && !has_drives(&domain.lock().live()?.definition) {
            return Ok(());
        }
        let Answer::Disks(disks) = ask(domain, Call::Disks).await? else {
            return Err(Error::internal("the VMM's answer makes no sense"));
        };
        let mut inner = domain.lock();
        let folder = Folder(inner.live()?.folder.clone());
        let noted = changing.is_some();
        if let Some(new) = changing {
            let id = device::alias(&new).unwrap_or_default().to_owned();
            let path = match Disk::read(&new)?.source {
                DiskSource::Volume { pool, volume } => self.storage.disk_path(&pool, &volume).ok(),
                source => source.path().map(str::to_owned),
            };
            let there = disks.iter().find(|disk| disk.id == id);
            if there.is_some_and(|there| there.images.first() == path.as_ref()) {
                log::warn!("domain '{}': the medium of '{id}' was changed", inner.name);
                self.medium_changed(&mut inner, &id, &new)?;
            }
        }
        let live = inner.live_mut()?;
        let open = |id: &str| {
            let disk = disks.iter().find(|disk| disk.id == id)?;
            disk.tray.map(|tray| tray.open)
        };
        note_trays(live, open);
        if noted {
            folder.forget_changing();
        }
        Ok(())
    }
}

/// Notes where trays are, as far as that is known.
fn note_trays(live: &mut super::object::Live, open: impl Fn(&str) -> Option<bool>) {
    let moved = |e: &Element| {
        let id = device::alias(e).filter(|_| is_drive(e))?;
        let was = Disk::read(e).is_ok_and(|disk| disk.tray_open);
        open(id).filter(|now| *now != was)
    };
    let mut devices = live.definition.devices.rest.iter();
    if !devices.any(|e| moved(e).is_some()) {
        return;
    }
    for drive in &mut Arc::make_mut(&mut live.definition).devices.rest {
        if let Some(open) = moved(drive) {
            set_tray(drive, open);
        }
    }
}

/// Why a medium was not changed.
enum Trouble {
    /// It was not.
    Refused(Error),
    /// It may have been.
    Unknown(Error),
}

/// A drive that the machine does not have.
pub(super) fn left_out() -> Error {
    Error::new(
        ErrorCode::OPERATION_UNSUPPORTED,
        "the drive is left out of the machine: change its media while the guest is off",
    )
}

/// Has the VMM change the medium. A guest that keeps the tray in is waited for.
async fn change(
    domain: &Domain,
    control: &Control,
    target: &str,
    id: &str,
    medium: &Medium,
    force: bool,
) -> std::result::Result<(), Trouble> {
    for again in [false, true] {
        let descriptors = medium
            .descriptors
            .iter()
            .map(std::os::fd::OwnedFd::try_clone);
        let descriptors = descriptors
            .collect::<std::io::Result<_>>()
            .map_err(|error| Error::system("cannot hand over the medium", &error));
        let call = Call::ChangeMedium {
            id: id.to_owned(),
            image: medium.image.clone().map(Box::new),
            force,
        };
        let answer = control
            .send_with(call, descriptors.map_err(Trouble::Refused)?)
            .map_err(|error| Trouble::Refused(Error::failed(error.to_string())))?;
        match tokio::time::timeout(CHANGE_LIMIT, answer).await {
            Ok(Ok(Ok(_))) => return Ok(()),
            Ok(Ok(Err(Failure { locked: true, .. }))) if !force => {}
            Ok(Ok(Err(failure))) => {
                let words = medium.names.explain(&failure.message);
                return Err(Trouble::Refused(Error::failed(words)));
            }
            Ok(Err(_)) => {
                let error = Error::failed(ControlError::Closed.to_string());
                return Err(Trouble::Unknown(error));
            }
            Err(_) => {
                return Err(Trouble::Unknown(Error::new(
                    ErrorCode::OPERATION_TIMEOUT,
                    "the domain's VMM does not answer",
                )));
            }
        }
        let opened = tokio::time::timeout(TRAY_LIMIT, is_open(domain, id));
        if again || opened.await.is_err() {
            break;
        }
    }
    Err(Trouble::Refused(Error::failed(format!(
        "timed out waiting to open tray of '{target}'"
    ))))
}

/// Waits until a drive's tray is out.
async fn is_open(domain: &Domain, id: &str) {
    loop {
        let open = domain.lock().live.as_ref().is_none_or(|live| {
            let mut all = live.definition.devices.rest.iter();
            let drive = all.find(|e| device::alias(e) == Some(id));
            drive.is_none_or(|e| Disk::read(e).is_ok_and(|disk| disk.tray_open))
        });
        if open {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}
