//! Where a device and its host side meet.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{BACKLOG, CharError, os, push_bounded};
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
    /// Output waits for its reader instead of pushing out the oldest.
    lossless: bool,
    /// Output was refused for want of room.
    refused: AtomicBool,
}

impl Port {
    /// An empty port that keeps the last output only, as a terminal does.
    ///
    /// # Errors
    /// No eventfd.
    pub fn new() -> Result<Self, CharError> {
        Self::make(false)
    }

    /// An empty port whose output waits for its reader, as a pipe's does.
    ///
    /// # Errors
    /// No eventfd.
    pub fn lossless() -> Result<Self, CharError> {
        Self::make(true)
    }

    fn make(lossless: bool) -> Result<Self, CharError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(os("eventfd"))?;
        Ok(Self {
            output: Mutex::default(),
            wake,
            watched: AtomicBool::new(false),
            waiting: AtomicBool::new(false),
            room: AtomicBool::new(false),
            lossless,
            refused: AtomicBool::new(false),
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

    /// Device side: output. Never waits: returns how many bytes were taken. Where it is fewer,
    /// the receiver's `output_room` is called when there is room again.
    pub fn send_bytes(&self, bytes: &[u8]) -> usize {
        let mut output = lock(&self.output);
        let taken = if self.lossless {
            let room = BACKLOG.saturating_sub(output.len());
            if bytes.len() > room {
                self.refused.store(true, Ordering::SeqCst);
            }
            &bytes[..room.min(bytes.len())]
        } else {
            bytes
        };
        push_bounded(&mut output, taken);
        drop(output);
        if !self.watched.swap(true, Ordering::SeqCst) {
            self.wake();
        }
        taken.len()
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

    /// Host side: output waits for its reader.
    pub fn is_lossless(&self) -> bool {
        self.lossless
    }

    /// Host side: true once after output was refused. After [`Port::take_output`], so that there
    /// is room now.
    pub fn was_refused(&self) -> bool {
        self.refused.swap(false, Ordering::SeqCst)
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

    #[test]
    fn a_lossless_port_refuses_what_it_cannot_keep() {
        let port = Port::lossless().unwrap();
        assert_eq!(port.send_bytes(&vec![1; BACKLOG - 1]), BACKLOG - 1);
        assert!(!port.was_refused());
        assert_eq!(port.send_bytes(&[2, 3]), 1);
        assert_eq!(port.take_output().last(), Some(&2));
        assert!(port.was_refused());
        assert!(!port.was_refused());
        assert_eq!(port.send_bytes(&[3]), 1);
    }

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
