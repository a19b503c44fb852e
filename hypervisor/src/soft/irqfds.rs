//! irqfd without a kernel: one thread that waits for all eventfds and sends their MSIs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

use softcpu::Machine;

use super::lock;
use crate::{Error, IOAPIC_PINS, Msi, Result};

/// Mark of the eventfd that ends the thread (GSIs are 32 bits).
const STOP: u64 = u64::MAX;

type Table = Mutex<BTreeMap<u32, (File, Msi)>>;

/// The registrations and their thread, which ends with this.
#[derive(Debug)]
pub(super) struct IrqFds {
    table: Arc<Table>,
    epoll: Arc<OwnedFd>,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

pub(super) fn unknown(gsi: u32) -> Error {
    Error::Invalid(format!("no irqfd is registered for GSI {gsi}"))
}

fn os(call: &'static str) -> Error {
    Error::Os {
        call,
        source: std::io::Error::last_os_error(),
    }
}

fn control(epoll: &OwnedFd, op: i32, fd: i32, mark: u64) -> Result<()> {
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: mark,
    };
    // SAFETY: both descriptors are open, the event is a live local.
    match unsafe { libc::epoll_ctl(epoll.as_raw_fd(), op, fd, &raw mut event) } {
        0 => Ok(()),
        _ => Err(os("epoll_ctl")),
    }
}

impl IrqFds {
    pub(super) fn start(machine: &Arc<Machine>) -> Result<Self> {
        // SAFETY: no pointers; the result is checked and owned by nobody else.
        let epoll = unsafe {
            match libc::epoll_create1(libc::EPOLL_CLOEXEC) {
                -1 => return Err(os("epoll_create1")),
                fd => Arc::new(OwnedFd::from_raw_fd(fd)),
            }
        };
        // SAFETY: as above.
        let stop = unsafe {
            match libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) {
                -1 => return Err(os("eventfd")),
                fd => OwnedFd::from_raw_fd(fd),
            }
        };
        control(&epoll, libc::EPOLL_CTL_ADD, stop.as_raw_fd(), STOP)?;
        let table = Arc::<Table>::default();
        let thread = {
            let (epoll, table, machine) = (
                Arc::clone(&epoll),
                Arc::clone(&table),
                Arc::downgrade(machine),
            );
            std::thread::Builder::new()
                .name("irqfd".to_owned())
                .spawn(move || serve(&epoll, &table, &machine))
                .map_err(|source| Error::Os {
                    call: "clone",
                    source,
                })?
        };
        Ok(Self {
            table,
            epoll,
            stop,
            thread: Some(thread),
        })
    }

    /// Registers `fd`, or changes the MSI of a registration.
    pub(super) fn add(&self, fd: BorrowedFd<'_>, gsi: u32, msi: Msi) -> Result<()> {
        if (gsi as usize) < IOAPIC_PINS {
            return Err(Error::Invalid(format!("GSI {gsi} is an I/O APIC's pin")));
        }
        let mut table = lock(&self.table);
        if let Some((_, old)) = table.get_mut(&gsi) {
            *old = msi;
            return Ok(());
        }
        let fd = fd.try_clone_to_owned().map_err(|source| Error::Os {
            call: "dup",
            source,
        })?;
        control(&self.epoll, libc::EPOLL_CTL_ADD, fd.as_raw_fd(), gsi.into())?;
        table.insert(gsi, (fd.into(), msi));
        Ok(())
    }

    pub(super) fn remove(&self, gsi: u32) -> Result<()> {
        let mut table = lock(&self.table);
        let Some((file, _)) = table.remove(&gsi) else {
            return Err(unknown(gsi));
        };
        control(&self.epoll, libc::EPOLL_CTL_DEL, file.as_raw_fd(), 0)
    }
}

impl Drop for IrqFds {
    fn drop(&mut self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes of a live local to our own eventfd, whose counter is not full.
        unsafe { libc::write(self.stop.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the irqfd thread panicked");
        }
    }
}

fn serve(epoll: &OwnedFd, table: &Table, machine: &Weak<Machine>) {
    const BATCH: usize = 32;
    loop {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        // SAFETY: the array holds BATCH events; the descriptor is open. Without a limit:
        // `Drop` signals `stop`.
        let count =
            unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), BATCH as i32, -1) };
        let Ok(count) = usize::try_from(count) else {
            let error = std::io::Error::last_os_error();
            if error.kind() == std::io::ErrorKind::Interrupted {
                continue;
            }
            log::error!("epoll_wait: {error}: no more interrupts from eventfds");
            return;
        };
        for event in &events[..count] {
            let mark = event.u64;
            if mark == STOP {
                return;
            }
            let Some(machine) = machine.upgrade() else {
                return;
            };
            let table = lock(table);
            // Gone meanwhile: unregistered.
            let Some((file, msi)) = u32::try_from(mark).ok().and_then(|gsi| table.get(&gsi)) else {
                continue;
            };
            let mut file: &File = file;
            let mut counter = [0; 8];
            match file.read(&mut counter) {
                Ok(8) => super::send(&machine, *msi),
                // Someone else read it first.
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Ok(_) | Err(_) => {
                    log::error!("irqfd of GSI {mark} is not an eventfd");
                    // Else it would be ready for ever.
                    let _ = control(epoll, libc::EPOLL_CTL_DEL, file.as_raw_fd(), 0);
                }
            }
        }
    }
}
