//! Keyboard controller (Intel 8042), ports 0x60 and 0x64: the reset line, and enough of the
//! rest that a driver's probe ends at once. No keyboard and no mouse is plugged in.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use hypervisor::Flow;
use serde::{Deserialize, Serialize};

use super::{Line, Request, Requests, lock};
use crate::bus::Device;
use crate::num::low8;

/// Data port.
pub const DATA: u16 = 0x60;
/// Status and command port.
pub const COMMAND: u16 = 0x64;

const STATUS_OUTPUT: u8 = 1;
const STATUS_SYSTEM: u8 = 4;
const CONTROL_INTERRUPT: u8 = 1;
/// Bytes the controller keeps for a guest that does not read.
const BUFFER: usize = 16;
/// A device that understood nothing asks to say it again.
const RESEND: u8 = 0xfe;

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
}

impl Default for I8042State {
    fn default() -> Self {
        Self {
            control: 0x04,
            output_port: 0x03,
            command: None,
            output: VecDeque::new(),
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
        self.update(&state);
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
            None => state.reply(RESEND),
        }
        Flow::Continue
    }

    fn update(&self, state: &I8042State) {
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
                self.update(&state);
                byte
            }
            4 => {
                STATUS_SYSTEM
                    | if state.output.is_empty() {
                        0
                    } else {
                        STATUS_OUTPUT
                    }
            }
            _ => 0xff,
        };
        u32::from(value)
    }

    fn write(&self, offset: u32, _width: u8, value: u32) -> Flow {
        let mut state = lock(&self.state);
        let flow = match offset {
            0 => self.data(&mut state, low8(value)),
            4 => self.command(&mut state, low8(value)),
            _ => Flow::Continue,
        };
        self.update(&state);
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
        for (command, reply) in [(0xaa, 0x55), (0x20, 0x04), (0xab, 0), (0xa9, 1)] {
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
        i8042.write(0, 1, 0xf2);
        assert_eq!(recorder.take_lines().last(), Some(&(1, true)));
        assert_eq!(i8042.read(0, 1), u32::from(RESEND));
        assert_eq!(recorder.take_lines().last(), Some(&(1, false)));
        for _ in 0..100 {
            i8042.write(0, 1, 1);
        }
        assert_eq!(i8042.state().output.len(), 16);
        i8042.reset();
        assert_eq!(i8042.state(), I8042State::default());
    }
}
