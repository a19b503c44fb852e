//! 16550A serial port (National Semiconductor PC16550D): FIFOs, interrupts, loopback.
//!
//! The line is infinitely fast: a byte written is gone at once, so the transmitter is always
//! empty.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use hypervisor::Flow;
use serde::{Deserialize, Serialize};

use super::{Line, lock};
use crate::bus::Device;
use crate::chardev::Port;
use crate::num::low8;

/// Ports a UART takes.
pub const LEN: u32 = 8;
/// Where COM1 to COM4 answer, and their interrupt pins.
pub const COM: [(u16, u8); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

const FIFO: usize = 16;

const IER_RECEIVE: u8 = 1;
const IER_TRANSMIT: u8 = 2;
const IER_LINE: u8 = 4;
const IER_MODEM: u8 = 8;

const IIR_NONE: u8 = 1;
const IIR_MODEM: u8 = 0;
const IIR_TRANSMIT: u8 = 2;
const IIR_RECEIVE: u8 = 4;
const IIR_LINE: u8 = 6;
const IIR_TIMEOUT: u8 = 12;

const LCR_DLAB: u8 = 0x80;
const MCR_LOOP: u8 = 0x10;
const LSR_DATA: u8 = 1;
const LSR_OVERRUN: u8 = 2;
const LSR_EMPTY: u8 = 0x60;
/// CTS, DSR and DCD are on: somebody is there, as far as a guest can tell.
const MSR_CONNECTED: u8 = 0xb0;

/// What the guest can observe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UartState {
    /// Interrupt enable register.
    pub ier: u8,
    /// Line control register.
    pub lcr: u8,
    /// Modem control register.
    pub mcr: u8,
    /// Modem status register.
    pub msr: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Divisor latch.
    pub divisor: [u8; 2],
    /// FIFO control register as written.
    pub fcr: u8,
    /// Received and not yet read, at most 16.
    pub received: VecDeque<u8>,
    /// A byte came while the FIFO was full.
    pub overrun: bool,
    /// The transmitter-empty interrupt waits to be seen.
    pub transmit_pending: bool,
}

impl Default for UartState {
    fn default() -> Self {
        Self {
            ier: 0,
            lcr: 0,
            mcr: 0,
            msr: MSR_CONNECTED,
            scratch: 0,
            divisor: [12, 0],
            fcr: 0,
            received: VecDeque::new(),
            overrun: false,
            transmit_pending: false,
        }
    }
}

impl UartState {
    fn depth(&self) -> usize {
        if self.fcr & 1 != 0 { FIFO } else { 1 }
    }

    fn trigger(&self) -> usize {
        match self.fcr >> 6 {
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        }
    }

    /// The pending interrupt of highest priority, as IIR shows it.
    fn interrupt(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.overrun {
            IIR_LINE
        } else if self.ier & IER_RECEIVE != 0 && !self.received.is_empty() {
            if self.fcr & 1 == 0 || self.received.len() >= self.trigger() {
                IIR_RECEIVE
            } else {
                IIR_TIMEOUT
            }
        } else if self.ier & IER_TRANSMIT != 0 && self.transmit_pending {
            IIR_TRANSMIT
        } else if self.ier & IER_MODEM != 0 && self.msr & 0x0f != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    fn receive(&mut self, byte: u8) {
        if self.received.len() < self.depth() {
            self.received.push_back(byte);
        } else {
            self.overrun = true;
        }
    }

    /// Modem status from the control lines, in loopback (PC16550D 8.6.7): DTR to DSR, RTS to
    /// CTS, OUT1 to RI, OUT2 to DCD. The low half records what changed.
    fn modem_lines(&mut self) {
        let lines = if self.mcr & MCR_LOOP != 0 {
            (self.mcr & 1) << 5 | (self.mcr & 2) << 3 | (self.mcr & 4) << 4 | (self.mcr & 8) << 4
        } else {
            MSR_CONNECTED
        };
        let changed = (self.msr ^ lines) >> 4;
        // RI counts only when it falls.
        let ring_fell = self.msr & 0x40 != 0 && lines & 0x40 == 0;
        let delta = changed & !4 | u8::from(ring_fell) << 2;
        self.msr = lines | self.msr & 0x0f | delta;
    }
}

/// A serial port.
#[derive(Debug)]
pub struct Uart {
    state: Mutex<UartState>,
    line: Line,
    port: Arc<Port>,
}

impl Uart {
    /// A port whose other end is `port`.
    pub fn new(line: Line, port: Arc<Port>) -> Self {
        Self {
            state: Mutex::default(),
            line,
            port,
        }
    }

    /// What the guest can observe.
    pub fn state(&self) -> UartState {
        lock(&self.state).clone()
    }

    /// Takes over a saved state.
    pub fn load(&self, saved: UartState) {
        let mut state = lock(&self.state);
        *state = saved;
        let depth = state.depth();
        state.received.truncate(depth);
        self.update(&state);
    }

    /// Power-on state.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        *state = UartState::default();
        self.line.set(false);
    }

    /// Takes bytes from the other end: as many as fit now; returns how many. Where not all do,
    /// the port is woken (`Port::input_wanted`) when there is room.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        let mut state = lock(&self.state);
        let room = if state.mcr & MCR_LOOP != 0 {
            0
        } else {
            state.depth() - state.received.len().min(state.depth())
        };
        let taken = room.min(bytes.len());
        state.received.extend(&bytes[..taken]);
        if taken < bytes.len() {
            self.port.want_room();
        }
        self.update(&state);
        taken
    }

    fn update(&self, state: &UartState) {
        self.line.set(state.interrupt() != IIR_NONE);
    }
}

impl Device for Uart {
    fn read(&self, offset: u32, _width: u8) -> u32 {
        let mut state = lock(&self.state);
        let dlab = state.lcr & LCR_DLAB != 0;
        let value = match offset {
            0 if dlab => state.divisor[0],
            1 if dlab => state.divisor[1],
            0 => {
                let byte = state.received.pop_front().unwrap_or(0);
                if state.received.is_empty() {
                    self.port.has_room();
                }
                byte
            }
            1 => state.ier,
            2 => {
                let interrupt = state.interrupt();
                if interrupt == IIR_TRANSMIT {
                    state.transmit_pending = false;
                }
                interrupt | if state.fcr & 1 != 0 { 0xc0 } else { 0 }
            }
            3 => state.lcr,
            4 => state.mcr,
            5 => {
                let overrun = if std::mem::take(&mut state.overrun) {
                    LSR_OVERRUN
                } else {
                    0
                };
                let data = if state.received.is_empty() {
                    0
                } else {
                    LSR_DATA
                };
                LSR_EMPTY | overrun | data
            }
            6 => {
                let value = state.msr;
                state.msr &= 0xf0;
                value
            }
            _ => state.scratch,
        };
        self.update(&state);
        u32::from(value)
    }

    fn write(&self, offset: u32, _width: u8, value: u32) -> Flow {
        let value = low8(value);
        let mut state = lock(&self.state);
        let dlab = state.lcr & LCR_DLAB != 0;
        match offset {
            0 if dlab => state.divisor[0] = value,
            1 if dlab => state.divisor[1] = value,
            0 => {
                if state.mcr & MCR_LOOP != 0 {
                    state.receive(value);
                } else {
                    self.port.send(value);
                }
                state.transmit_pending = true;
            }
            1 => {
                // Switching the interrupt on while the transmitter is empty raises it.
                if value & !state.ier & IER_TRANSMIT != 0 {
                    state.transmit_pending = true;
                }
                state.ier = value & 0x0f;
            }
            2 => {
                if value & 2 != 0 || (value ^ state.fcr) & 1 != 0 {
                    state.received.clear();
                    self.port.has_room();
                }
                // Without bit 0 the others are not programmed.
                state.fcr = if value & 1 != 0 { value & 0xc9 } else { 0 };
            }
            3 => state.lcr = value,
            4 => {
                state.mcr = value & 0x1f;
                state.modem_lines();
                if value & MCR_LOOP == 0 {
                    self.port.has_room();
                }
            }
            7 => state.scratch = value,
            _ => {}
        }
        self.update(&state);
        Flow::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Recorder;

    fn uart() -> (Arc<Recorder>, Arc<Port>, Uart) {
        let recorder = Arc::new(Recorder::default());
        let port = Arc::new(Port::new().unwrap());
        let uart = Uart::new(Line::new(recorder.clone(), 4), port.clone());
        (recorder, port, uart)
    }

    fn line(recorder: &Recorder) -> Option<bool> {
        recorder.take_lines().last().map(|(_, level)| *level)
    }

    #[test]
    fn sends_and_says_it_is_empty() {
        let (recorder, port, uart) = uart();
        assert_eq!(uart.read(5, 1), 0x60);
        uart.write(0, 1, b'A'.into());
        assert_eq!(port.take_output(), b"A");
        assert_eq!(line(&recorder), Some(false), "no interrupt enabled");
        uart.write(1, 1, 2);
        assert_eq!(line(&recorder), Some(true), "enabling raises it");
        assert_eq!(uart.read(2, 1), 2);
        assert_eq!(uart.read(2, 1), 1, "seen");
        assert_eq!(line(&recorder), Some(false));
        uart.write(0, 1, b'B'.into());
        assert_eq!(line(&recorder), Some(true));
    }

    #[test]
    fn receives_with_back_pressure() {
        let (recorder, port, uart) = uart();
        uart.write(2, 1, 0x81);
        uart.write(1, 1, 1);
        assert_eq!(uart.receive(&[b'x'; 20]), 16);
        assert_eq!(uart.read(2, 1), 0xc4, "above the trigger level");
        assert!(!port.input_wanted(), "still full");
        for _ in 0..16 {
            assert_eq!(uart.read(5, 1) & 1, 1);
            assert_eq!(uart.read(0, 1), u32::from(b'x'));
        }
        assert!(port.input_wanted());
        assert_eq!(uart.read(5, 1) & 1, 0);
        assert_eq!(line(&recorder), Some(false));
        assert_eq!(uart.receive(b"y"), 1);
        assert_eq!(uart.read(2, 1), 0xcc, "below it: time-out");
    }

    #[test]
    fn one_byte_without_fifo() {
        let (_, _, uart) = uart();
        assert_eq!(uart.receive(b"ab"), 1);
        assert_eq!(uart.read(0, 1), u32::from(b'a'));
    }

    #[test]
    fn loops_back() {
        let (_, port, uart) = uart();
        uart.read(6, 1);
        uart.write(4, 1, 0x1a);
        assert_eq!(uart.read(6, 1) & 0xf0, 0x90, "RTS to CTS, OUT2 to DCD");
        uart.write(0, 1, 0xae);
        assert_eq!(uart.read(0, 1), 0xae);
        assert_eq!(port.take_output(), b"");
        uart.write(0, 1, 1);
        uart.write(0, 1, 2);
        assert_eq!(uart.read(5, 1) & 2, 2, "overrun");
        assert_eq!(uart.read(5, 1) & 2, 0, "once");
        assert_eq!(uart.receive(b"z"), 0, "the other end is cut off");
    }

    #[test]
    fn divisor_and_scratch_hold() {
        let (_, port, uart) = uart();
        uart.write(3, 1, 0x83);
        uart.write(0, 1, 1);
        uart.write(1, 1, 2);
        assert_eq!((uart.read(0, 1), uart.read(1, 1)), (1, 2));
        uart.write(3, 1, 3);
        uart.write(7, 1, 0x5a);
        assert_eq!(uart.read(7, 1), 0x5a);
        assert_eq!(port.take_output(), b"");
        uart.reset();
        assert_eq!(uart.state(), UartState::default());
    }
}
