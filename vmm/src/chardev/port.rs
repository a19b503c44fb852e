//! Where a device and its host side meet.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{CharError, os, push_bounded};
use crate::devices::lock;

/// Output ring and wake-ups between a device and the event loop.
#[derive(Debug)]
pub struct Port {
    output: Mutex<VecDeque<u8>>,
    wake: EventFd,
    /// The event loop looks again by itself soon: no need to wake it for every byte.
    watched: AtomicBool,
    /// Input waits for room in the device.
    waiting: AtomicBool,
    /// There is room now.
    room: AtomicBool,
}

impl Port {
    /// An empty port.
    ///
    /// # Errors
    /// No eventfd.
    pub fn new() -> Result<Self, CharError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(os("eventfd"))?;
        Ok(Self {
            output: Mutex::default(),
            wake,
            watched: AtomicBool::new(false),
            waiting: AtomicBool::new(false),
            room: AtomicBool::new(false),
        })
    }

    fn wake(&self) {
        // Only a counter at its limit could refuse, and then the reader is awake already.
        if let Err(error) = self.wake.write(1) {
            log::debug!("eventfd: {error}");
        }
    }

    /// Device side: one byte of output. Never waits.
    pub fn send(&self, byte: u8) {
        push_bounded(&mut lock(&self.output), &[byte]);
        if !self.watched.swap(true, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Device side: an offer of input was not taken whole.
    pub fn want_room(&self) {
        self.waiting.store(true, Ordering::SeqCst);
    }

    /// Device side: there is room for input now.
    pub fn has_room(&self) {
        if self.waiting.swap(false, Ordering::SeqCst) {
            self.room.store(true, Ordering::SeqCst);
            self.wake();
        }
    }

    /// Host side: readable when there is something to do.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Host side: takes back the wake-up.
    pub fn acknowledge(&self) {
        if let Err(error) = self.wake.read()
            && error != nix::errno::Errno::EAGAIN
        {
            log::error!("eventfd: {error}");
        }
    }

    /// Host side: what the device wrote since the last call.
    pub fn take_output(&self) -> Vec<u8> {
        std::mem::take(&mut *lock(&self.output)).into()
    }

    /// Host side: no longer looks by itself. False: there is output after all, and it still does.
    pub fn stop_watching(&self) -> bool {
        let output = lock(&self.output);
        if output.is_empty() {
            // Under the lock: a byte sent from now on finds the flag down and wakes.
            self.watched.store(false, Ordering::SeqCst);
            return true;
        }
        false
    }

    /// Host side: true once after the device got room.
    pub fn input_wanted(&self) -> bool {
        self.room.swap(false, Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chardev::BACKLOG;

    #[test]
    fn keeps_the_last_bytes_only() {
        let port = Port::new().unwrap();
        for i in 0..BACKLOG + 10 {
            port.send(u8::try_from(i % 251).unwrap());
        }
        let output = port.take_output();
        assert_eq!(output.len(), BACKLOG);
        assert_eq!(output[0], 10);
        assert!(port.take_output().is_empty());
    }

    #[test]
    fn wakes_once_until_looked_at() {
        let port = Port::new().unwrap();
        port.send(1);
        port.send(2);
        assert_eq!(port.wake.read(), Ok(1));
        assert!(!port.stop_watching(), "not empty");
        port.take_output();
        port.send(3);
        assert!(port.wake.read().is_err(), "still watched");
        port.take_output();
        assert!(port.stop_watching());
        port.send(4);
        assert_eq!(port.wake.read(), Ok(1));
    }
}
