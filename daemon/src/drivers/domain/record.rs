//! What the next daemon must know of a running domain: its folder below `run`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmm_api::control::ExitRecord;
use xml_schemas::Domain;
use xml_schemas::dom::{self, Element};
use xml_schemas::domain::View;

use super::agent;
use super::job::Saving;
use super::machine::Made;
use super::migrate::Limits;
use super::state::State;
use crate::files::{self, Durability};
use crate::vmm_process::Identity;

const VERSION: u32 = 1;

/// `state.json`: what changes while a domain runs, or is not in its definition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The domain's id.
    pub id: i32,
    /// The boot of the host that its process belongs to.
    pub boot_id: String,
    /// Its process; `None` while it is being started.
    pub process: Option<Identity>,
    /// Its state.
    pub state: State,
    /// It ends with its creator's connection, and hence with the daemon.
    pub autodestroy: bool,
    /// A save that is being written.
    #[serde(default)]
    pub saving: Option<Saving>,
    /// How long its guest's agent may take.
    #[serde(default = "agent::usual_limit")]
    pub agent_timeout: i32,
    /// What its migrations keep to.
    #[serde(default)]
    pub migration: Limits,
    /// It comes from elsewhere.
    #[serde(default)]
    pub arrival: Option<ArrivalNote>,
    /// The number of the next image of its disks.
    #[serde(default)]
    pub next_image: u32,
    /// To remove at its end.
    #[serde(flatten)]
    pub made: Made,
}

/// What is to be done with a guest that comes, as soon as it is this side's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivalNote {
    /// What is stored then.
    pub persistent: Option<String>,
    /// It stays paused.
    pub paused: bool,
}

impl Record {
    /// A domain that is being started.
    pub fn new(id: i32, boot_id: String, state: State, autodestroy: bool, made: Made) -> Self {
        Self {
            version: VERSION,
            id,
            boot_id,
            process: None,
            state,
            autodestroy,
            saving: None,
            agent_timeout: agent::usual_limit(),
            migration: Limits::default(),
            arrival: None,
            next_image: 0,
            made,
        }
    }

    /// Writes it.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, folder: &Folder) -> io::Result<()> {
        let json = serde_json::to_vec_pretty(self)?;
        files::write_atomically(&folder.state(), &json, Durability::Process)
    }

    /// Reads it.
    ///
    /// # Errors
    /// The system's, or it is not one of this version.
    pub fn read(folder: &Folder) -> io::Result<Self> {
        let record: Self = serde_json::from_slice(&fs::read(folder.state())?)?;
        if record.version != VERSION {
            return Err(io::Error::other(format!(
                "version {} is unknown",
                record.version
            )));
        }
        Ok(record)
    }
}

/// A running domain's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder(pub PathBuf);

impl Folder {
    /// Makes it, after removing what may be left of an earlier one.
    ///
    /// # Errors
    /// The system's.
    pub fn make(path: PathBuf) -> io::Result<Self> {
        files::remove_tree(&path)?;
        files::make_folder(&path, 0o700)?;
        Ok(Self(path))
    }

    /// Removes it with everything in it.
    pub fn remove(&self) {
        if let Err(error) = files::remove_tree(&self.0) {
            log::warn!("cannot remove {}: {error}", self.0.display());
        }
    }

    /// The VMM's configuration.
    pub fn config(&self) -> PathBuf {
        self.0.join("config.json")
    }

    /// The VMM's control socket.
    pub fn control(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    /// The copy of `/proc/PID/stat` that the VMM leaves before it runs.
    pub fn stat(&self) -> PathBuf {
        self.0.join("process")
    }

    /// Where the VMM says why it ended.
    pub fn exit(&self) -> PathBuf {
        self.0.join("exit.json")
    }

    /// A device that is on its way into the machine.
    fn plugging(&self) -> PathBuf {
        self.0.join("plugging.xml")
    }

    /// Notes a device before it is plugged.
    ///
    /// # Errors
    /// The system's.
    pub fn write_plugging(&self, device: &Element) -> io::Result<()> {
        write_device(&self.plugging(), device)
    }

    /// The device that the last daemon was about to plug, or had plugged, when it ended.
    ///
    /// # Errors
    /// The system's, and for what is no device.
    pub fn read_plugging(&self) -> io::Result<Option<Element>> {
        read_device(&self.plugging())
    }

    /// It is in the live definition, or nowhere.
    pub fn forget_plugging(&self) {
        forget_device(&self.plugging());
    }

    /// A drive with what is about to be in it.
    fn changing(&self) -> PathBuf {
        self.0.join("changing.xml")
    }

    /// Notes what is about to be in a drive.
    ///
    /// # Errors
    /// The system's.
    pub fn write_changing(&self, drive: &Element) -> io::Result<()> {
        write_device(&self.changing(), drive)
    }

    /// The drive whose medium the last daemon was about to change, or had changed, when it ended.
    ///
    /// # Errors
    /// The system's, and for what is no device.
    pub fn read_changing(&self) -> io::Result<Option<Element>> {
        read_device(&self.changing())
    }

    /// What is in it is in the live definition.
    pub fn forget_changing(&self) {
        forget_device(&self.changing());
    }

    fn state(&self) -> PathBuf {
        self.0.join("state.json")
    }

    fn live_xml(&self) -> PathBuf {
        self.0.join("live.xml")
    }

    /// Writes the running definition.
    ///
    /// # Errors
    /// The system's.
    pub fn write_definition(&self, definition: &Domain) -> io::Result<()> {
        let xml = definition.format(View::Live);
        files::write_atomically(&self.live_xml(), xml.as_bytes(), Durability::Process)
    }

    /// Reads the running definition.
    ///
    /// # Errors
    /// The system's, or it is damaged.
    pub fn read_definition(&self) -> io::Result<Domain> {
        let xml = fs::read_to_string(self.live_xml())?;
        match Domain::parse_live(&xml) {
            Ok(parsed) => Ok(parsed.domain),
            Err(error) => Err(io::Error::other(error.to_string())),
        }
    }

    /// Why the VMM ended, if it could say.
    pub fn exit_record(&self) -> Option<ExitRecord> {
        read_exit_record(&self.exit())
    }
}

fn write_device(path: &Path, device: &Element) -> io::Result<()> {
    let mut text = String::new();
    dom::format_element(&mut text, device, 0);
    files::write_atomically(path, text.as_bytes(), Durability::Process)
}

fn read_device(path: &Path) -> io::Result<Option<Element>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let device = dom::parse(&text, "(device)").map_err(io::Error::other)?;
    Ok(Some(device))
}

fn forget_device(path: &Path) {
    if let Err(error) = files::remove_if_there(path) {
        log::warn!("cannot remove {}: {error}", path.display());
    }
}

fn read_exit_record(path: &Path) -> Option<ExitRecord> {
    let json = fs::read(path).ok().filter(|json| !json.is_empty())?;
    match serde_json::from_slice(&json) {
        Ok(record) => Some(record),
        Err(error) => {
            log::warn!("{}: {error}", path.display());
            None
        }
    }
}

/// This boot of the host.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::state::{PausedReason, RunningReason};
    use super::*;
    use crate::files::testing::TempFolder;

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let temp = TempFolder::new();
        let folder = Folder::make(temp.0.join("d")).unwrap();
        let state = State::Paused(PausedReason::User);
        let made = Made {
            sockets: vec!["/s".into()],
            links: vec!["macvtap0".into()],
            ..Made::default()
        };
        let mut record = Record::new(3, boot_id(), state, true, made);
        record.process = Some(Identity {
            pid: 5,
            start_time: 6,
        });
        record.write(&folder).unwrap();
        assert_eq!(Record::read(&folder).unwrap(), record);
        record.state = State::Running(RunningReason::Booted);
        record.write(&folder).unwrap();
        assert_eq!(Record::read(&folder).unwrap(), record);
        assert_eq!(folder.exit_record(), None);
        folder.remove();
        assert!(!temp.0.join("d").exists());
    }
}
