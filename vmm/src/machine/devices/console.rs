//! virtio-serial: consoles and channels, each port on a character device's host side.

use std::fs::File;
use std::sync::{Arc, OnceLock};

use virtio::console::{Console, ConsoleHandle, ConsoleOptions, HostPort, PortHandle, PortOptions};
use vmm_api::control::Event;
use vmm_api::devices::{ConsoleConfig, ConsolePort, DeviceConfig};

use super::{Builder, failed};
use crate::chardev::{Link, Port, Receiver};
use crate::machine::MachineError;
use crate::notices::{Notice, Notices};
use crate::resource;

/// A port between its device and its host side.
#[derive(Debug)]
pub struct End {
    id: String,
    port: Arc<Port>,
    /// Set as soon as the device is made.
    device: OnceLock<PortHandle>,
    notices: Arc<Notices>,
}

impl HostPort for End {
    fn send(&self, bytes: &[u8]) -> usize {
        self.port.send_bytes(bytes)
    }

    fn input_room(&self) {
        self.port.has_room();
    }

    fn guest_open(&self, open: bool) {
        self.notices.send(Notice::Tell(Event::PortState {
            id: self.id.clone(),
            open,
        }));
    }
}

impl Receiver for End {
    fn receive(&self, bytes: &[u8]) -> usize {
        let Some(device) = self.device.get() else {
            return 0;
        };
        let taken = device.receive(bytes);
        if taken == bytes.len() {
            return taken;
        }
        self.port.want_room();
        // Room that came before the port knew that it is wanted would go unnoticed.
        taken + device.receive(&bytes[taken..])
    }

    fn output_room(&self) {
        if let Some(device) = self.device.get() {
            device.output_room();
        }
    }

    fn peer(&self, connected: bool) {
        if let Some(device) = self.device.get() {
            device.peer(connected);
        }
    }
}

/// A port whose host side is still to be put onto the event loop.
#[derive(Debug)]
pub struct PendingPort {
    /// The port's id.
    pub id: String,
    /// Where device and host side meet.
    pub port: Arc<Port>,
    /// Takes input.
    pub end: Arc<End>,
    /// The other end.
    pub link: Link,
    /// Gets a copy of the output.
    pub log: Option<File>,
    /// The guest starts only when somebody is there.
    pub wait: bool,
}

/// Where a port's device and host side meet.
fn open(
    config: &ConsolePort,
    notices: &Arc<Notices>,
) -> Result<PendingPort, Box<dyn std::error::Error>> {
    // A terminal's user wants the last lines; a program's wants every byte.
    let port = if config.console {
        Port::new()?
    } else {
        Port::lossless()?
    };
    let port = Arc::new(port);
    let end = Arc::new(End {
        id: config.id.clone(),
        port: port.clone(),
        device: OnceLock::new(),
        notices: notices.clone(),
    });
    Ok(PendingPort {
        id: config.id.clone(),
        port,
        end,
        link: Link::open(&config.backend)?,
        log: config.log.as_ref().map(resource::open_append).transpose()?,
        wait: crate::machine::waits(&config.backend),
    })
}

fn options(config: &ConsolePort, pending: &PendingPort) -> PortOptions {
    PortOptions {
        number: config.number,
        console: config.console,
        name: config.name.clone(),
        connected: false,
        host: pending.end.clone(),
    }
}

/// A port for a device that is there.
pub(super) fn plug(
    console: &ConsoleHandle,
    config: &ConsolePort,
    notices: &Arc<Notices>,
) -> Result<PendingPort, String> {
    let pending = open(config, notices).map_err(|error| error.to_string())?;
    let options = options(config, &pending);
    let handle = console
        .add_port(options)
        .map_err(|error| error.to_string())?;
    // Nobody else has it yet.
    let _ = pending.end.device.set(handle);
    Ok(pending)
}

impl Builder {
    pub(super) fn console(
        &mut self,
        device: &DeviceConfig,
        config: &ConsoleConfig,
    ) -> Result<(), MachineError> {
        let mut ports = Vec::new();
        for port in &config.ports {
            let pending = open(port, &self.notices)
                .map_err(|error| failed(device, format!("{}: {error}", port.id)))?;
            ports.push((port, pending));
        }
        let options = ConsoleOptions {
            ports: ports
                .iter()
                .map(|(port, pending)| options(port, pending))
                .collect(),
            max_ports: config.max_ports,
        };
        let console = Console::new(options).map_err(|error| failed(device, error))?;
        let handle = console.handle();
        for (port, pending) in ports {
            // Nobody else has it yet.
            let _ = pending.end.device.set(handle.port(port.number));
            self.ports.push(pending);
        }
        self.consoles.push((device.id.clone(), handle));
        self.virtio(device, Box::new(console))
    }
}
