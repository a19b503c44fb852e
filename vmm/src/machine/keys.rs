//! Keys that somebody outside presses.

use std::time::{Duration, Instant};

use super::Machine;
use crate::devices::i8042::I8042State;

/// How long keys are held when nobody says: long enough for a guest to see them, too short for it to
/// repeat them (and what QEMU does).
const HOLD: Duration = Duration::from_millis(100);
/// Chords that are held at a time.
const MOST_HELD: usize = 64;
/// Keys of one chord.
const MOST_KEYS: usize = 16;

/// Keys that are held, and until when.
#[derive(Debug)]
pub(super) struct Chord {
    until: Instant,
    keys: Vec<u16>,
}

impl Machine {
    /// Presses keys, one after the other, and lets go of them later, the last one first.
    pub(super) fn send_keys(&mut self, keys: &[u16], hold_ms: u32) -> Result<(), String> {
        let known = |key: &&u16| matches!(**key, 1..=0x7f | 0xe001..=0xe07f);
        if keys.len() > MOST_KEYS || !keys.iter().all(|key| known(&key)) {
            return Err("no such keys".to_owned());
        }
        if self.held.len() >= MOST_HELD {
            return Err("too many keys are being held".to_owned());
        }
        let hold = match hold_ms {
            0 => HOLD,
            some => Duration::from_millis(some.into()),
        };
        self.devices.i8042.keys(keys, true);
        self.held.push(Chord {
            until: Instant::now() + hold,
            keys: keys.iter().rev().copied().collect(),
        });
        Ok(())
    }

    /// When the next keys are to be let go of.
    pub(super) fn held_until(&self) -> Option<Instant> {
        self.held.iter().map(|chord| chord.until).min()
    }

    /// Lets go of the keys whose time has come.
    pub(super) fn let_go_of_keys(&mut self) {
        let now = Instant::now();
        let due = self.held.extract_if(.., |chord| chord.until <= now);
        for chord in due {
            self.devices.i8042.keys(&chord.keys, false);
        }
    }

    /// The keyboard's state for where the machine goes: nobody there would let go of the keys.
    pub(super) fn keyboard_without_hands(&self) -> I8042State {
        let mut state = self.devices.i8042.state();
        for key in self.held.iter().flat_map(|chord| &chord.keys) {
            state.keyboard.key(*key, false);
        }
        state
    }
}
