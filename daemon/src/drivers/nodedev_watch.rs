//! Devices of the host that come, go and change: the kernel's uevents, as long as a client wants to know.
//!
//! An event says where in sysfs something happened; what that means for the list of devices is found by looking at
//! all of them again, so that several at once, or some that were missed, make no difference.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::nodedev::Sysfs;
use crate::error::{Error, Result};
use crate::events::{Hub, NodeDeviceEvent, Sort};

/// How often it is looked whether anybody still wants to know.
const LOOK: Duration = Duration::from_secs(1);
/// The kernel's own messages, as opposed to those of udev (linux/netlink.h, lib/kobject_uevent.c).
const KERNEL_GROUP: u32 = 1;
/// The longest message: UEVENT_BUFFER_SIZE and the header before it.
const LONGEST: usize = 8192;

/// Tells of devices while somebody wants to know.
#[derive(Debug)]
pub struct Watch {
    hub: Arc<Hub>,
    running: Mutex<bool>,
}

impl Watch {
    /// Nobody wants to know yet.
    pub fn new(hub: Arc<Hub>) -> Arc<Self> {
        Arc::new(Self {
            hub,
            running: Mutex::default(),
        })
    }

    /// Events come from now on. For who has just registered for them.
    ///
    /// # Errors
    /// The system does not tell of devices here.
    pub fn ensure(self: &Arc<Self>) -> Result<()> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if *running {
            return Ok(());
        }
        let cannot = |error: io::Error| Error::system("cannot watch the host's devices", &error);
        let socket = socket().map_err(cannot)?;
        // After the socket: what comes between is seen twice, not missed.
        let known = look();
        let watch = Arc::clone(self);
        let thread = std::thread::Builder::new().name("uevents".to_owned());
        thread
            .spawn(move || watch.watch(socket, known))
            .map_err(cannot)?;
        *running = true;
        Ok(())
    }

    fn watch(&self, mut socket: File, mut known: BTreeMap<String, Option<PathBuf>>) {
        let mut buffer = vec![0; LONGEST];
        loop {
            let mut changed = BTreeSet::new();
            match socket.read(&mut buffer) {
                Ok(count) => changed.extend(changed_path(&buffer[..count])),
                // More was going on than the socket holds.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) =>
                {
                    let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
                    if !self.hub.is_wanted(Sort::NodeDevice) {
                        *running = false;
                        return;
                    }
                    continue;
                }
                Err(error) => {
                    log::error!("the host's devices are not watched any more: {error}");
                    *self.running.lock().unwrap_or_else(PoisonError::into_inner) = false;
                    return;
                }
            }
            let now = look();
            for name in known.keys().filter(|name| !now.contains_key(*name)) {
                self.hub.node_device(name, NodeDeviceEvent::Deleted);
            }
            for (name, path) in &now {
                if !known.contains_key(name) {
                    self.hub.node_device(name, NodeDeviceEvent::Created);
                } else if path.as_ref().is_some_and(|path| changed.contains(path)) {
                    self.hub.node_device(name, NodeDeviceEvent::Updated);
                }
            }
            known = now;
        }
    }
}

/// The names of all devices, and their folders.
fn look() -> BTreeMap<String, Option<PathBuf>> {
    let all = Sysfs::default().all().into_iter();
    all.map(|device| (device.name, device.path)).collect()
}

/// The folder of the device that a message says has changed: `ACTION@PATH`, and then variables, each ending with a zero
/// byte.
fn changed_path(message: &[u8]) -> Option<PathBuf> {
    let head = message.split(|byte| *byte == 0).next()?;
    let path = std::str::from_utf8(head).ok()?.strip_prefix("change@/")?;
    Some(Path::new("/sys").join(path))
}

fn socket() -> io::Result<File> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: socket(2) takes numbers and returns a descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_KOBJECT_UEVENT) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    let socket = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    // SAFETY: a sockaddr_nl of zeroes is valid: numbers only.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    address.nl_groups = KERNEL_GROUP;
    // SAFETY: the address lives here and has the size that is named.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_nl>() as libc::socklen_t,
        )
    };
    let limit = libc::timeval {
        tv_sec: LOOK.as_secs() as libc::time_t,
        tv_usec: 0,
    };
    // SAFETY: the limit lives here and has the size that is named.
    let limited = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const limit).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        )
    };
    if bound < 0 || limited < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_read_from_messages() {
        let message = b"change@/devices/virtual/net/lo\0ACTION=change\0SUBSYSTEM=net\0";
        let path = changed_path(message).unwrap();
        assert_eq!(path, Path::new("/sys/devices/virtual/net/lo"));
        assert_eq!(changed_path(b"add@/devices/x\0"), None);
        assert_eq!(changed_path(b""), None);
        assert_eq!(changed_path(b"change@/\xff\0"), None);
    }
}
