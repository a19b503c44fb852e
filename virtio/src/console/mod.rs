//! Console and serial ports (5.3): several ports of one device, each with a name or a console.
//!
//! A port's host side is a [`HostPort`]; the way back is its [`PortHandle`]. Nothing waits for
//! anything: output that the host side doesn't take stays in the guest's queue.

mod message;
mod ports;
mod shared;
mod state;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::Arc;

pub use shared::{ConsoleHandle, HostPort, PortHandle};
pub use state::{PortState, State};

use ports::{Ports, receive_queue};
use shared::{Inner, Shared, check};
use state::tell;

use crate::device::{Activation, Device, DeviceError, Payload, QueueSetup};
use crate::life::{Life, lock, os, read_structure, restored};
use crate::queue::Queue;
use crate::worker::eventfd;

const KIND: &str = "virtio-console";
const VERSION: u32 = 1;
/// `VIRTIO_CONSOLE_F_SIZE`.
const F_SIZE: u64 = 1 << 0;
/// `VIRTIO_CONSOLE_F_MULTIPORT`.
const F_MULTIPORT: u64 = 1 << 1;
const QUEUE_SIZE: u16 = 128;
/// Most ports a device can have.
pub const MAX_PORTS: u32 = 511;

/// A port as it is plugged.
#[derive(Debug)]
pub struct PortOptions {
    /// Below the device's number of ports.
    pub number: u32,
    /// A console; otherwise a channel.
    pub console: bool,
    /// What the guest finds it by, at most 63 bytes; empty: none.
    pub name: String,
    /// Somebody is at the other end already.
    pub connected: bool,
    /// The other end.
    pub host: Arc<dyn HostPort>,
}

/// How the device is made.
#[derive(Debug)]
pub struct ConsoleOptions {
    /// Its ports at first.
    pub ports: Vec<PortOptions>,
    /// Most ports it may have, 1 to [`MAX_PORTS`].
    pub max_ports: u32,
}

/// A virtio-serial device.
#[derive(Debug)]
pub struct Console {
    shared: Arc<Shared>,
    features: u64,
    life: Life<Ports>,
    activation: Option<Active>,
}

/// What stays after activation.
#[derive(Debug)]
struct Active {
    memory: Arc<dyn crate::GuestMemory>,
    features: u64,
    interrupt: Arc<dyn crate::Interrupt>,
    /// The host sides are to hear what the guest has open.
    restored: bool,
}

impl Console {
    /// The device with its ports.
    ///
    /// # Errors
    /// A number that is too high or there twice, a name too long, no eventfd.
    pub fn new(options: ConsoleOptions) -> Result<Self, DeviceError> {
        let max_ports = options.max_ports;
        if !(1..=MAX_PORTS).contains(&max_ports) {
            return Err(DeviceError::Invalid(format!(
                "a virtio-serial device has 1 to {MAX_PORTS} ports"
            )));
        }
        let mut inner = Inner::default();
        let mut features = F_MULTIPORT;
        for port in options.ports {
            check(&port, max_ports)?;
            let number = port.number;
            if number == 0 && port.console {
                features |= F_SIZE;
            }
            if inner.ports.contains_key(&number) {
                return Err(DeviceError::Invalid(format!(
                    "port {number} is there twice"
                )));
            }
            inner.add(number, port);
        }
        Ok(Self {
            shared: Arc::new(Shared {
                inner: inner.into(),
                wake: eventfd().map_err(os("eventfd"))?,
                max_ports,
            }),
            features,
            life: Life::default(),
            activation: None,
        })
    }

    /// For the VMM: ports, size.
    #[must_use]
    pub fn handle(&self) -> ConsoleHandle {
        ConsoleHandle(Arc::clone(&self.shared))
    }

    fn queue_count(&self) -> usize {
        receive_queue(self.shared.max_ports - 1).max(2) + 2
    }

    fn prepare(&mut self, activation: Activation) -> Ports {
        let multiport = activation.features & F_MULTIPORT != 0;
        let (memory, features) = (activation.memory, activation.features);
        let interrupt = activation.interrupt;
        let mut queues = Vec::new();
        let mut broken = false;
        for setup in &activation.queues {
            let queue = setup.and_then(|setup| {
                Queue::new(&memory, &setup, features)
                    .map_err(|error| {
                        interrupt.needs_reset(&error.to_string());
                        broken = true;
                    })
                    .ok()
            });
            queues.push(queue);
        }
        let mut inner = lock(&self.shared.inner);
        inner.interrupt = Some(Arc::clone(&interrupt));
        inner.multiport = multiport;
        drop(inner);
        self.activation = Some(Active {
            memory,
            features,
            interrupt: Arc::clone(&interrupt),
            restored: false,
        });
        Ports {
            shared: Arc::clone(&self.shared),
            interrupt,
            multiport,
            queues,
            kicks: activation.kicks,
            again: BTreeSet::new(),
            chunk: Vec::new(),
            broken,
        }
    }

    fn snapshot(&self) -> State {
        let inner = lock(&self.shared.inner);
        State {
            ready: inner.ready,
            columns: inner.columns,
            rows: inner.rows,
            ports: inner.ports.iter().map(|(n, p)| (*n, p.save())).collect(),
            queues: self.life.paused().map_or_else(
                || vec![None; self.queue_count()],
                |ports| {
                    let queues = ports.queues.iter();
                    queues.map(|q| q.as_ref().map(Queue::setup)).collect()
                },
            ),
        }
    }

    /// Takes over the ports' states.
    fn restore(&self, state: State) -> Result<(), DeviceError> {
        let wrong = |reason| Err(DeviceError::State { kind: KIND, reason });
        let mut inner = lock(&self.shared.inner);
        for (number, port) in &state.ports {
            if port.input.len() > shared::INPUT || *number >= self.shared.max_ports {
                return wrong(format!("port {number} makes no sense"));
            }
            if !port.gone && !inner.ports.contains_key(number) {
                return wrong(format!("there is no port {number} here"));
            }
        }
        (inner.ready, inner.columns, inner.rows) = (state.ready, state.columns, state.rows);
        for (number, port) in &mut inner.ports {
            match state.ports.get(number) {
                Some(saved) if !saved.gone => port.load(saved.clone()),
                _ if state.ready => port.tell = tell::ADD,
                _ => {}
            }
            if port.ready && port.host_open != port.connected {
                port.tell |= tell::OPEN;
            }
        }
        for (number, _) in state.ports.iter().filter(|(_, port)| port.gone) {
            inner.bury(*number);
        }
        Ok(())
    }

    /// The host sides that hear of an open port.
    fn open_hosts(&self) -> Vec<Arc<dyn HostPort>> {
        let inner = lock(&self.shared.inner);
        let open = inner.ports.values().filter(|p| p.guest_open);
        open.map(|p| Arc::clone(&p.host)).collect()
    }
}

impl Device for Console {
    fn id(&self) -> u16 {
        3
    }

    fn kind(&self) -> &'static str {
        KIND
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queue_count()]
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let inner = lock(&self.shared.inner);
        let mut config = [0; 8];
        config[..2].copy_from_slice(&inner.columns.to_le_bytes());
        config[2..4].copy_from_slice(&inner.rows.to_le_bytes());
        config[4..].copy_from_slice(&self.shared.max_ports.to_le_bytes());
        read_structure(&config, offset, data);
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {
        // Nothing in it can be written without `VIRTIO_CONSOLE_F_EMERG_WRITE`.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let ports = self.prepare(activation);
        let multiport = ports.multiport;
        self.life.start("console", ports)?;
        if !multiport {
            // A driver that doesn't know of ports has its one open.
            let mut inner = lock(&self.shared.inner);
            let news = inner.port(0).and_then(|port| port.open(true));
            drop(inner);
            if let Some((host, room)) = news {
                host.guest_open(true);
                if room {
                    host.input_room();
                }
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.life.take();
        self.activation = None;
        let mut inner = lock(&self.shared.inner);
        inner.ready = false;
        inner.interrupt = None;
        inner.multiport = false;
        inner.paused = false;
        inner.owed = false;
        let gone: Vec<u32> = inner
            .ports
            .iter()
            .filter(|(_, port)| port.gone)
            .map(|(number, _)| *number)
            .collect();
        for number in gone {
            inner.removed(number);
        }
        let closed: Vec<_> = inner
            .ports
            .values_mut()
            .filter_map(|port| port.reset().then(|| Arc::clone(&port.host)))
            .collect();
        drop(inner);
        for host in closed {
            host.guest_open(false);
        }
    }

    fn reset_queue(&mut self, index: u16) {
        self.life.with(move |ports, poll| {
            ports.replace_queue(index.into(), None, poll.is_some());
        });
    }

    fn enable_queue(&mut self, index: u16, setup: QueueSetup) -> Result<(), DeviceError> {
        let Some(active) = &self.activation else {
            return Ok(());
        };
        match Queue::new(&active.memory, &setup, active.features) {
            Ok(queue) => {
                self.life.with(move |ports, poll| {
                    ports.replace_queue(index.into(), Some(queue), poll.is_some());
                });
            }
            Err(error) => active.interrupt.needs_reset(&error.to_string()),
        }
        Ok(())
    }

    fn pause(&mut self) {
        if let Err(error) = self.life.pause()
            && let Some(active) = &self.activation
        {
            active.interrupt.needs_reset(&error.to_string());
        }
        lock(&self.shared.inner).paused = true;
    }

    fn resume(&mut self) {
        let mut inner = lock(&self.shared.inner);
        inner.paused = false;
        if std::mem::take(&mut inner.owed)
            && let Some(interrupt) = &inner.interrupt
        {
            interrupt.config();
        }
        drop(inner);
        let Some(active) = &mut self.activation else {
            return;
        };
        let restored = std::mem::take(&mut active.restored);
        if let Err(error) = self.life.resume("console") {
            active.interrupt.needs_reset(&error.to_string());
        }
        if restored {
            for host in self.open_hosts() {
                host.guest_open(true);
            }
        }
    }

    fn save(&self) -> Result<Payload, DeviceError> {
        self.life.at_rest(KIND)?;
        Payload::new(KIND, VERSION, &self.snapshot())
    }

    fn load(
        &mut self,
        payload: &Payload,
        activation: Option<Activation>,
    ) -> Result<(), DeviceError> {
        let mut state: State = payload.open(KIND, VERSION)?;
        let queues = std::mem::take(&mut state.queues);
        self.restore(state)?;
        let Some(mut activation) = activation else {
            return Ok(());
        };
        restored(KIND, &mut activation.queues, &queues)?;
        let ports = self.prepare(activation);
        self.life = Life::Paused(ports);
        lock(&self.shared.inner).paused = true;
        if let Some(active) = &mut self.activation {
            active.restored = true;
        }
        Ok(())
    }
}
