//! What the device's thread, its transport and the ports' host sides share.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use nix::sys::eventfd::EventFd;

use super::PortOptions;
use super::state::{PortState, tell};
use crate::device::{DeviceError, Interrupt};
use crate::life::lock;
use crate::worker::signal;

/// Bytes on their way to the guest that one port keeps.
pub(super) const INPUT: usize = 16 << 10;
/// Bytes of a port's name.
const MAX_NAME: usize = 63;

/// A port's other end. None of its functions may block; they are called from the device's thread
/// or the transport's, without a lock held.
pub trait HostPort: Send + Sync + std::fmt::Debug {
    /// The guest wrote `bytes`. Returns how many were taken; where it is fewer, the rest is
    /// offered again after [`PortHandle::output_room`]. Where nobody is there, it is this side's
    /// choice to take and drop them, or to let the guest wait.
    fn send(&self, bytes: &[u8]) -> usize;

    /// Input that [`PortHandle::receive`] didn't take whole may be offered again.
    fn input_room(&self);

    /// Somebody in the guest has opened the port, or closed it.
    fn guest_open(&self, open: bool);
}

/// The other end of a port that was unplugged elsewhere.
#[derive(Debug)]
struct Nobody;

impl HostPort for Nobody {
    fn send(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }

    fn input_room(&self) {}

    fn guest_open(&self, _open: bool) {}
}

/// One port.
#[derive(Debug)]
pub(super) struct Port {
    pub name: String,
    pub console: bool,
    pub host: Arc<dyn HostPort>,
    /// To the guest.
    pub input: VecDeque<u8>,
    /// Input was refused.
    pub wants_room: bool,
    /// The other end has room again.
    pub output_room: bool,
    /// Somebody is at the other end.
    pub connected: bool,
    /// See [`PortState`], as all that follow.
    pub ready: bool,
    pub guest_open: bool,
    pub host_open: bool,
    pub tell: u8,
    pub gone: bool,
    pub taken: u32,
}

impl Port {
    fn new(options: PortOptions) -> Self {
        Self {
            name: options.name,
            console: options.console,
            host: options.host,
            input: VecDeque::new(),
            wants_room: false,
            output_room: false,
            connected: options.connected,
            ready: false,
            guest_open: false,
            host_open: false,
            tell: 0,
            gone: false,
            taken: 0,
        }
    }

    /// As before any driver came. Whether the guest had it open.
    pub fn reset(&mut self) -> bool {
        self.input.clear();
        self.output_room = false;
        self.ready = false;
        self.host_open = false;
        self.tell = 0;
        self.taken = 0;
        std::mem::take(&mut self.guest_open)
    }

    pub fn save(&self) -> PortState {
        PortState {
            ready: self.ready,
            guest_open: self.guest_open,
            host_open: self.host_open,
            tell: self.tell,
            gone: self.gone,
            input: self.input.iter().copied().collect(),
            taken: self.taken,
        }
    }

    pub fn load(&mut self, state: PortState) {
        self.ready = state.ready;
        self.guest_open = state.guest_open;
        self.host_open = state.host_open;
        self.tell = state.tell;
        self.gone = state.gone;
        self.input = state.input.into();
        self.taken = state.taken;
    }

    /// The guest opens or closes it. If that is news: whom to tell, and whether it has waited to
    /// send something.
    pub fn open(&mut self, open: bool) -> Option<(Arc<dyn HostPort>, bool)> {
        if std::mem::replace(&mut self.guest_open, open) == open {
            return None;
        }
        let room = if open {
            std::mem::take(&mut self.wants_room)
        } else {
            // Meant for the program that has gone.
            self.input.clear();
            false
        };
        Some((Arc::clone(&self.host), room))
    }
}

/// What is behind the lock.
#[derive(Debug, Default)]
pub(super) struct Inner {
    pub ports: BTreeMap<u32, Port>,
    /// To be plugged as soon as the driver has heard that the port before is gone.
    pub coming: BTreeMap<u32, PortOptions>,
    pub ready: bool,
    pub columns: u16,
    pub rows: u16,
    /// The way to the driver, while it has activated the device.
    pub interrupt: Option<Arc<dyn Interrupt>>,
    /// The control queues are in use.
    pub multiport: bool,
    pub paused: bool,
    /// A change of the configuration to be told when the machine goes on.
    pub owed: bool,
}

impl Inner {
    /// A port that is there.
    pub fn port(&mut self, number: u32) -> Option<&mut Port> {
        self.ports.get_mut(&number).filter(|p| !p.gone)
    }

    /// Puts a port in; the driver hears of it when it is ready for that.
    pub fn add(&mut self, number: u32, options: PortOptions) {
        let mut port = Port::new(options);
        if self.ready {
            port.tell = tell::ADD;
        }
        self.ports.insert(number, port);
    }

    /// The driver knows that this port is gone (or never knew it).
    pub fn removed(&mut self, number: u32) {
        self.ports.remove(&number);
        if let Some(options) = self.coming.remove(&number) {
            self.add(number, options);
        }
    }

    /// The driver is still to hear that the port it knew by `number` is gone; the one that has the
    /// number now comes after that.
    pub fn bury(&mut self, number: u32) {
        let nobody = Port {
            tell: tell::REMOVE,
            gone: true,
            ..Port::new(PortOptions {
                number,
                console: false,
                name: String::new(),
                connected: false,
                host: Arc::new(Nobody),
            })
        };
        if let Some(port) = self.ports.insert(number, nobody) {
            let options = PortOptions {
                number,
                console: port.console,
                name: port.name,
                connected: port.connected,
                host: port.host,
            };
            self.coming.insert(number, options);
        }
    }

    /// Sends the configuration's interrupt, now or when the machine goes on.
    fn config(&mut self) {
        if self.paused {
            self.owed = true;
        } else if let Some(interrupt) = &self.interrupt {
            interrupt.config();
        }
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub inner: Mutex<Inner>,
    pub wake: EventFd,
    pub max_ports: u32,
}

/// The host side's way to one port: usable from any thread, whatever state the device is in.
#[derive(Debug, Clone)]
pub struct PortHandle {
    pub(super) shared: Arc<Shared>,
    pub(super) number: u32,
}

impl PortHandle {
    /// Offers input for the guest; returns how many bytes were taken. Where it is fewer,
    /// [`HostPort::input_room`] is called when it makes sense to offer more. Nothing is taken
    /// while nobody in the guest has the port open.
    #[must_use]
    pub fn receive(&self, bytes: &[u8]) -> usize {
        let mut inner = lock(&self.shared.inner);
        let Some(port) = inner.port(self.number) else {
            return 0;
        };
        let room = if port.guest_open {
            INPUT.saturating_sub(port.input.len())
        } else {
            0
        };
        let taken = room.min(bytes.len());
        port.input.extend(&bytes[..taken]);
        port.wants_room |= taken < bytes.len();
        drop(inner);
        if taken > 0 {
            signal(&self.shared.wake);
        }
        taken
    }

    /// The other end, which took less than it was offered, has room again.
    pub fn output_room(&self) {
        if let Some(port) = lock(&self.shared.inner).port(self.number) {
            port.output_room = true;
        }
        signal(&self.shared.wake);
    }

    /// Somebody is at the other end now, or no longer.
    pub fn peer(&self, connected: bool) {
        let mut inner = lock(&self.shared.inner);
        let Some(port) = inner.port(self.number) else {
            return;
        };
        if std::mem::replace(&mut port.connected, connected) != connected && port.ready {
            port.tell |= tell::OPEN;
            drop(inner);
            signal(&self.shared.wake);
        }
    }
}

/// The device at run time, for the VMM.
#[derive(Debug, Clone)]
pub struct ConsoleHandle(pub(super) Arc<Shared>);

impl ConsoleHandle {
    /// The way to port `number`.
    #[must_use]
    pub fn port(&self, number: u32) -> PortHandle {
        PortHandle {
            shared: Arc::clone(&self.0),
            number,
        }
    }

    /// The console's size has changed.
    pub fn resize(&self, columns: u16, rows: u16) {
        let mut inner = lock(&self.0.inner);
        if (inner.columns, inner.rows) == (columns, rows) {
            return;
        }
        (inner.columns, inner.rows) = (columns, rows);
        if let Some(port) = inner.port(0)
            && port.ready
            && port.console
        {
            port.tell |= tell::RESIZE;
        }
        inner.config();
        drop(inner);
        signal(&self.0.wake);
    }

    /// Plugs a port.
    ///
    /// # Errors
    /// The number is in use or too high, the name too long, or the guest's driver doesn't know
    /// several ports.
    pub fn add_port(&self, options: PortOptions) -> Result<PortHandle, DeviceError> {
        let number = options.number;
        check(&options, self.0.max_ports)?;
        let mut inner = lock(&self.0.inner);
        let invalid = |text| Err(DeviceError::Invalid(text));
        if inner.coming.contains_key(&number) || inner.port(number).is_some() {
            return invalid(format!("port {number} is in use"));
        }
        if inner.interrupt.is_some() && !inner.multiport {
            return invalid("the guest's driver knows a single port only".into());
        }
        if inner.ports.contains_key(&number) {
            inner.coming.insert(number, options);
        } else {
            inner.add(number, options);
        }
        drop(inner);
        signal(&self.0.wake);
        Ok(self.port(number))
    }

    /// Unplugs a port.
    ///
    /// # Errors
    /// There is none of this number.
    pub fn remove_port(&self, number: u32) -> Result<(), DeviceError> {
        let mut inner = lock(&self.0.inner);
        if inner.coming.remove(&number).is_some() {
            return Ok(());
        }
        let ready = inner.ready;
        let Some(port) = inner.port(number) else {
            return Err(DeviceError::Invalid(format!("there is no port {number}")));
        };
        let known = ready && port.tell & tell::ADD == 0;
        let host = port.reset().then(|| Arc::clone(&port.host));
        if known {
            port.tell = tell::REMOVE;
            port.gone = true;
        } else {
            inner.ports.remove(&number);
        }
        drop(inner);
        if let Some(host) = host {
            host.guest_open(false);
        }
        signal(&self.0.wake);
        Ok(())
    }
}

/// A port that can be.
pub(super) fn check(options: &PortOptions, max_ports: u32) -> Result<(), DeviceError> {
    if options.number >= max_ports {
        return Err(DeviceError::Invalid(format!(
            "port {} of a device with {max_ports}",
            options.number
        )));
    }
    if options.name.len() > MAX_NAME {
        return Err(DeviceError::Invalid(format!(
            "a port's name has {MAX_NAME} bytes at most"
        )));
    }
    Ok(())
}
