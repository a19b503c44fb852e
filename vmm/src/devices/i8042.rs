//! Keyboard controller (Intel 8042), ports 0x60 and 0x64: the keyboard, and the reset line. No mouse
//! is plugged in, which a driver's probe finds out at once.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use hypervisor::Flow;
use serde::{Deserialize, Serialize};

use super::keyboard::{self, KeyboardState};
use super::{Line, Request, Requests, lock};
use crate::bus::Device;
use crate::num::low8;

/// Data port.
pub const DATA: u16 = 0x60;
/// Interrupt input.
pub const PIN: u8 = 1;
/// Status and command port.
pub const COMMAND: u16 = 0x64;

const STATUS_OUTPUT: u8 = 1;
const STATUS_SYSTEM: u8 = 4;
/// The last byte written was a command.
const STATUS_COMMAND: u8 = 8;
/// Nobody has turned the key that locks the keyboard.
const STATUS_UNLOCKED: u8 = 0x10;
const CONTROL_INTERRUPT: u8 = 1;
/// The keyboard may not send.
const CONTROL_DISABLED: u8 = 0x10;
/// Its codes are made those of set 1.
const CONTROL_TRANSLATE: u8 = 0x40;
/// In set 2: the key that follows was let go.
const RELEASED: u8 = 0xf0;
/// Bytes the controller keeps for a guest that does not read.
const BUFFER: usize = 16;

/// What the guest can observe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// Command byte.
    pub control: u8,
    /// Output port (bit 0 low would hold the CPU in reset).
    pub output_port: u8,
    /// Command that waits for its parameter on the data port.
    pub command: Option<u8>,
    /// Bytes for the guest to read.
    pub output: VecDeque<u8>,
    /// The keyboard. States of the time when there was none have none.
    #[serde(default)]
    pub keyboard: KeyboardState,
    /// In translation: the next code is that of a key that was let go.
    #[serde(default)]
    pub released: bool,
    /// The last byte written was a command.
    #[serde(default)]
    pub commanded: bool,
}

impl Default for I8042State {
    fn default() -> Self {
        Self {
            control: CONTROL_TRANSLATE | 0x04,
            output_port: 0x03,
            command: None,
            output: VecDeque::new(),
            keyboard: KeyboardState::default(),
            released: false,
            commanded: false,
        }
    }
}

impl I8042State {
    fn reply(&mut self, byte: u8) {
        // A guest that never reads gets no more than the controller's buffer holds.
        if self.output.len() < BUFFER {
            self.output.push_back(byte);
        }
    }

    /// The guest has read everything: the keyboard's turn.
    fn fill(&mut self) {
        while self.output.is_empty() && self.control & CONTROL_DISABLED == 0 {
            let Some(mut byte) = self.keyboard.take() else {
                return;
            };
            if self.control & CONTROL_TRANSLATE != 0 {
                if byte == RELEASED {
                    self.released = true;
                    continue;
                }
                byte = keyboard::translated(byte);
                if byte < 0x80 && std::mem::take(&mut self.released) {
                    byte |= 0x80;
                }
            }
            self.output.push_back(byte);
        }
    }
}

/// The controller's two ports.
#[derive(Debug)]
pub struct I8042 {
    state: Mutex<I8042State>,
    line: Line,
    requests: Arc<dyn Requests>,
}

impl I8042 {
    /// `line` is IRQ 1.
    pub fn new(line: Line, requests: Arc<dyn Requests>) -> Self {
        Self {
            state: Mutex::default(),
            line,
            requests,
        }
    }

    /// What the guest can observe.
    pub fn state(&self) -> I8042State {
        lock(&self.state).clone()
    }

    /// Takes over a saved state.
    pub fn load(&self, saved: I8042State) {
        let mut state = lock(&self.state);
        *state = saved;
        state.output.truncate(BUFFER);
        state.keyboard.check();
        self.update(&mut state);
    }

    /// Keys, by their codes in set 1 (0xe0XX those with a prefix), are pressed or let go.
    pub fn keys(&self, keys: &[u16], down: bool) {
        let mut state = lock(&self.state);
        for key in keys {
            state.keyboard.key(*key, down);
        }
        self.update(&mut state);
    }

    /// Power-on state.
    pub fn reset(&self) {
        *lock(&self.state) = I8042State::default();
        self.line.set(false);
    }

    fn reset_machine(&self) -> Flow {
        self.requests.request(Request::Reset);
        Flow::Stop
    }

    fn command(&self, state: &mut I8042State, command: u8) -> Flow {
        state.command = None;
        match command {
            0x20 => state.reply(state.control),
            0x60 | 0xd1 | 0xd2 | 0xd3 | 0xd4 => state.command = Some(command),
            0xa7 => state.control |= 0x20,
            0xa8 => state.control &= !0x20,
            // Mouse port test: its clock line is stuck.
            0xa9 => state.reply(1),
            0xaa => state.reply(0x55),
            0xab => state.reply(0),
            0xad => state.control |= 0x10,
            0xae => state.control &= !0x10,
            0xd0 => state.reply(state.output_port),
            // Pulse output lines: bit 0 low is the reset line.
            0xf0..=0xff if command & 1 == 0 => return self.reset_machine(),
            _ => {}
        }
        Flow::Continue
    }

    fn data(&self, state: &mut I8042State, value: u8) -> Flow {
        match state.command.take() {
            Some(0x60) => state.control = value,
            Some(0xd1) => {
                state.output_port = value | 1;
                if value & 1 == 0 {
                    return self.reset_machine();
                }
            }
            // The mouse's loop test comes back marked as the keyboard's: no mouse.
            Some(0xd2 | 0xd3) => state.reply(value),
            Some(_) => {}
            None => {
                // To be spoken to wakes it.
                state.control &= !CONTROL_DISABLED;
                state.keyboard.write(value);
            }
        }
        Flow::Continue
    }

    fn update(&self, state: &mut I8042State) {
        state.fill();
        self.line
            .set(!state.output.is_empty() && state.control & CONTROL_INTERRUPT != 0);
    }
}

/// The command and status port.
#[derive(Debug)]
pub struct Command(pub Arc<I8042>);

impl Device for Command {
    fn read(&self, _offset: u32, width: u8) -> u32 {
        self.0.read(u32::from(COMMAND - DATA), width)
    }

    fn write(&self, _offset: u32, width: u8, value: u32) -> Flow {
        self.0.write(u32::from(COMMAND - DATA), width, value)
    }
}

/// System control port A of the PS/2: reset, and the address line 20 that is never masked here.
#[derive(Debug)]
pub struct ControlA(pub Arc<dyn Requests>);

/// Its port.
pub const CONTROL_A: u16 = 0x92;

impl Device for ControlA {
    fn read(&self, _offset: u32, _width: u8) -> u32 {
        2
    }

    fn write(&self, _offset: u32, _width: u8, value: u32) -> Flow {
        if value & 1 == 0 {
            return Flow::Continue;
        }
        self.0.request(Request::Reset);
        Flow::Stop
    }
}

/// Registered at [`DATA`]; [`Command`] is its other port.
impl Device for I8042 {
    fn read(&self, offset: u32, _width: u8) -> u32 {
        let mut state = lock(&self.state);
        let value = match offset {
            0 => {
                let byte = state.output.pop_front().unwrap_or(0);
                // One interrupt a byte: the line falls in between.
                self.line.set(false);
                self.update(&mut state);
                byte
            }
            4 => {
                let when = |set, bit| if set { bit } else { 0 };
                STATUS_SYSTEM
                    | STATUS_UNLOCKED
                    | when(!state.output.is_empty(), STATUS_OUTPUT)
                    | when(state.commanded, STATUS_COMMAND)
            }
            _ => 0xff,
        };
        u32::from(value)
    }

    fn write(&self, offset: u32, _width: u8, value: u32) -> Flow {
        let mut state = lock(&self.state);
        state.commanded = offset == 4;
        let flow = match offset {
            0 => self.data(&mut state, low8(value)),
            4 => self.command(&mut state, low8(value)),
            _ => Flow::Continue,
        };
        self.update(&mut state);
        flow
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Recorder;

    fn controller() -> (Arc<Recorder>, I8042) {
        let recorder = Arc::new(Recorder::default());
        (
            recorder.clone(),
            I8042::new(Line::new(recorder.clone(), 1), recorder),
        )
    }

    #[test]
    fn resets_the_machine() {
        let (recorder, i8042) = controller();
        assert_eq!(i8042.write(4, 1, 0xfe), Flow::Stop);
        assert_eq!(i8042.write(4, 1, 0xd1), Flow::Continue);
        assert_eq!(i8042.write(0, 1, 0xfe), Flow::Stop);
        assert_eq!(recorder.take_requests(), [Request::Reset, Request::Reset]);
    }

    #[test]
    fn probe_ends_at_once() {
        let (_, i8042) = controller();
        assert_eq!(i8042.read(4, 1) & 3, 0, "ready for a command");
        for (command, reply) in [(0xaa, 0x55), (0x20, 0x44), (0xab, 0), (0xa9, 1)] {
            i8042.write(4, 1, command);
            assert_eq!(i8042.read(4, 1) & 1, 1);
            assert_eq!(i8042.read(0, 1), reply);
        }
        i8042.write(4, 1, 0xd3);
        i8042.write(0, 1, 0x5a);
        assert_eq!(i8042.read(4, 1) & 0x21, 1, "not from the mouse");
    }

    #[test]
    fn interrupts_when_asked() {
        let (recorder, i8042) = controller();
        i8042.write(4, 1, 0x60);
        i8042.write(0, 1, 0x05);
        i8042.write(0, 1, 0xee);
        assert_eq!(recorder.take_lines().last(), Some(&(1, true)));
        assert_eq!(i8042.read(0, 1), 0xee);
        assert_eq!(recorder.take_lines().last(), Some(&(1, false)));
        for _ in 0..100 {
            i8042.write(4, 1, 0x20);
        }
        assert_eq!(i8042.state().output.len(), 16);
        i8042.reset();
        assert_eq!(i8042.state(), I8042State::default());
    }

    #[test]
    fn keys_are_read_as_the_guest_asked_for_them() {
        let (_, i8042) = controller();
        let read = || {
            let more = || (i8042.read(4, 1) & 1 != 0).then(|| i8042.read(0, 1));
            std::iter::from_fn(more).collect::<Vec<_>>()
        };
        let control = |value: u32| {
            i8042.write(4, 1, 0x60);
            i8042.write(0, 1, value);
        };
        i8042.keys(&[0x1d, 0xe053], true);
        i8042.keys(&[0xe053, 0x1d], false);
        assert_eq!(read(), [0x1d, 0xe0, 0x53, 0xe0, 0xd3, 0x9d]);
        // Not translated.
        control(0x04);
        i8042.keys(&[0x1e], true);
        i8042.keys(&[0x1e], false);
        assert_eq!(read(), [0x1c, 0xf0, 0x1c]);
        // Held back until it may send; a command wakes it, too.
        control(0x54);
        i8042.keys(&[0x1e], true);
        assert!(read().is_empty());
        let saved = i8042.state();
        i8042.reset();
        i8042.load(saved);
        i8042.write(4, 1, 0xae);
        assert_eq!(read(), [0x1e]);
        // Its id, with and without translation.
        i8042.write(0, 1, 0xf2);
        assert_eq!(read(), [0xfa, 0xab, 0x41]);
    }
}
