//! What the next daemon must know of a running network: its folder below `run`.

use std::fs;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xml_schemas::Validation;
use xml_schemas::network::port::Port;
use xml_schemas::network::{Network, NetworkView};

use crate::files::{self, Durability};
use crate::vmm_process::Identity;

const VERSION: u32 = 1;

/// `state.json`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The boot of the host.
    pub boot_id: String,
    /// It is up; before that, some of it may be there.
    pub started: bool,
    /// Its dnsmasq.
    pub dnsmasq: Option<Identity>,
}

impl Record {
    /// A network that is being started.
    pub fn new(boot_id: String) -> Self {
        Self {
            version: VERSION,
            boot_id,
            started: false,
            dnsmasq: None,
        }
    }
}

/// A running network's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder(pub PathBuf);

impl Folder {
    /// Makes it, after removing what may be left of an earlier one. dnsmasq, which is nobody when
    /// it reads its hosts again, must get in.
    ///
    /// # Errors
    /// The system's.
    pub fn make(path: PathBuf) -> io::Result<Self> {
        files::remove_tree(&path)?;
        files::make_folder(&path, 0o755)?;
        files::make_folder(&path.join("ports"), 0o700)?;
        Ok(Self(path))
    }

    /// Removes it with everything in it.
    pub fn remove(&self) {
        if let Err(error) = files::remove_tree(&self.0) {
            log::warn!("cannot remove {}: {error}", self.0.display());
        }
    }

    /// Writes the running definition.
    ///
    /// # Errors
    /// The system's.
    pub fn write_definition(&self, network: &Network) -> io::Result<()> {
        let xml = network.format(NetworkView::Inactive);
        files::write_atomically(
            &self.0.join("live.xml"),
            xml.as_bytes(),
            Durability::Process,
        )
    }

    /// Reads it.
    ///
    /// # Errors
    /// The system's, or it is damaged.
    pub fn read_definition(&self) -> io::Result<Network> {
        let text = fs::read_to_string(self.0.join("live.xml"))?;
        Network::parse(&text, Validation::Lenient).map_err(|e| io::Error::other(e.to_string()))
    }

    /// Writes the state.
    ///
    /// # Errors
    /// The system's.
    pub fn write_record(&self, record: &Record) -> io::Result<()> {
        let json = serde_json::to_vec_pretty(record)?;
        files::write_atomically(&self.0.join("state.json"), &json, Durability::Process)
    }

    /// Reads it.
    ///
    /// # Errors
    /// The system's, or it is not one of this version.
    pub fn read_record(&self) -> io::Result<Record> {
        let record: Record = serde_json::from_slice(&fs::read(self.0.join("state.json"))?)?;
        if record.version != VERSION {
            return Err(io::Error::other(format!(
                "version {} is unknown",
                record.version
            )));
        }
        Ok(record)
    }

    /// A port's file. It goes with the port: whoever has the port removes it.
    pub fn port(&self, uuid: Uuid) -> PathBuf {
        self.0.join("ports").join(format!("{uuid}.xml"))
    }

    /// Writes a port.
    ///
    /// # Errors
    /// The system's: the network may be gone.
    pub fn write_port(&self, port: &Port) -> io::Result<()> {
        let text = port.format();
        files::write_atomically(&self.port(port.uuid), text.as_bytes(), Durability::Process)
    }

    /// All ports, by uuid.
    pub fn ports(&self) -> Vec<Port> {
        let mut ports = Vec::new();
        let Ok(entries) = fs::read_dir(self.0.join("ports")) else {
            return ports;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.extension().is_none_or(|e| e != "xml") {
                continue;
            }
            match fs::read_to_string(&path) {
                Ok(text) => match Port::parse(&text) {
                    Ok(port) => ports.push(port),
                    Err(error) => log::error!("{}: left out: {error}", path.display()),
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => log::error!("{}: left out: {error}", path.display()),
            }
        }
        ports.sort_by_key(|port| port.uuid);
        ports
    }
}
