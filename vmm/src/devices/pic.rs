//! Interrupt controllers of the PC/AT: two cascaded Intel 8259A, with the edge/level registers
//! that came with PCI.
//!
//! Their one output goes to the first processor, which asks for the vector when it takes the
//! interrupt (`Bus::interrupt_acknowledge`).

use std::sync::Mutex;

use hypervisor::Flow;
use serde::{Deserialize, Serialize};

use super::{Interrupt, lock};
use crate::bus::Device;
use crate::num::low8;

/// Ports of the first and the second controller: command and data.
pub const BASES: [u16; 2] = [0x20, 0xa0];
/// Ports of each.
pub const LEN: u32 = 2;
/// Edge/level control registers, one port a controller.
pub const ELCR: u16 = 0x4d0;

/// The input of the first controller that the second's output drives.
const CASCADE: u8 = 2;
/// Inputs that are always edge-triggered: timer, keyboard, cascade; clock, coprocessor.
const EDGE_ONLY: [u8; 2] = [0x07, 0x21];

/// Initialisation words still to come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expect {
    /// None: the data port is the mask.
    #[default]
    Nothing,
    /// The vector base.
    Icw2,
    /// The cascade's place.
    Icw3,
    /// Modes.
    Icw4,
}

/// One 8259A.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipState {
    /// Requests.
    pub irr: u8,
    /// In service.
    pub isr: u8,
    /// Mask.
    pub imr: u8,
    /// Levels of the inputs.
    pub lines: u8,
    /// Level-triggered inputs.
    pub elcr: u8,
    /// Vector of input 0.
    pub base: u8,
    /// The input with the lowest priority.
    pub lowest: u8,
    /// Initialisation in progress.
    pub expect: Expect,
    /// ICW1 announced an ICW4.
    pub icw4: bool,
    /// Alone: no ICW3.
    pub single: bool,
    /// All inputs level-triggered (ICW1's LTIM).
    pub all_level: bool,
    /// Interrupts end by themselves.
    pub auto_eoi: bool,
    /// And rotate priorities then.
    pub rotate_on_auto_eoi: bool,
    /// A request is held back only by its own input in service.
    pub special_mask: bool,
    /// The second controller's further requests pass while it is in service.
    pub special_nested: bool,
    /// The command port reads ISR, not IRR.
    pub read_isr: bool,
    /// The next read of the command port acknowledges.
    pub poll: bool,
}

/// What the guest can observe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    /// The first controller, and the second.
    pub chips: [ChipState; 2],
}

impl ChipState {
    /// The highest-priority input among `bits`: its number and its place in the order.
    fn first(&self, bits: u8) -> Option<(u8, u32)> {
        let turned = bits.rotate_right(u32::from(self.lowest) + 1);
        (bits != 0).then(|| {
            let order = turned.trailing_zeros();
            (low8(u32::from(self.lowest) + 1 + order) & 7, order)
        })
    }

    /// The input whose request is to be passed on now.
    fn request(&self, master: bool) -> Option<u8> {
        let (input, order) = self.first(self.irr & !self.imr)?;
        let mut serving = self.isr;
        if self.special_mask {
            serving &= !self.imr;
        }
        if self.special_nested && master {
            serving &= !(1 << CASCADE);
        }
        match self.first(serving) {
            Some((_, held)) if held <= order => None,
            _ => Some(input),
        }
    }

    fn level(&self, input: u8) -> bool {
        self.all_level || self.elcr >> input & 1 != 0
    }

    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << input;
        if self.level(input) {
            self.irr = if high {
                self.irr | bit
            } else {
                self.irr & !bit
            };
        } else if high && self.lines & bit == 0 {
            self.irr |= bit;
        }
        self.lines = if high {
            self.lines | bit
        } else {
            self.lines & !bit
        };
    }

    /// The processor takes `input`.
    fn serve(&mut self, input: u8) {
        let bit = 1 << input;
        if !self.level(input) {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = input;
        }
    }

    /// Takes what is requested; with nothing, the spurious input 7.
    fn acknowledge(&mut self, master: bool) -> u8 {
        match self.request(master) {
            Some(input) => {
                self.serve(input);
                input
            }
            None => 7,
        }
    }

    /// Operation command word 2: ends of interrupts and priorities.
    fn end(&mut self, value: u8) {
        let named = value & 7;
        let highest = self.first(self.isr).map(|(input, _)| input);
        match value >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            code @ (1 | 5) => {
                if let Some(input) = highest {
                    self.isr &= !(1 << input);
                    if code == 5 {
                        self.lowest = input;
                    }
                }
            }
            code @ (3 | 7) => {
                self.isr &= !(1 << named);
                if code == 7 {
                    self.lowest = named;
                }
            }
            6 => self.lowest = named,
            _ => {}
        }
    }

    fn command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1: edge detection starts anew, the mask opens.
            *self = Self {
                lines: self.lines,
                elcr: self.elcr,
                base: self.base,
                lowest: 7,
                expect: Expect::Icw2,
                icw4: value & 1 != 0,
                single: value & 2 != 0,
                all_level: value & 8 != 0,
                ..Self::default()
            };
            for input in 0..8 {
                if self.level(input) {
                    self.irr |= self.lines & 1 << input;
                }
            }
        } else if value & 8 != 0 {
            // OCW3.
            self.poll = value & 4 != 0;
            if value & 2 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.end(value);
        }
    }

    fn data(&mut self, value: u8) {
        let after = |icw4: bool| if icw4 { Expect::Icw4 } else { Expect::Nothing };
        match self.expect {
            Expect::Nothing => self.imr = value,
            Expect::Icw2 => {
                self.base = value & 0xf8;
                self.expect = if self.single {
                    after(self.icw4)
                } else {
                    Expect::Icw3
                };
            }
            // The cascade is soldered.
            Expect::Icw3 => self.expect = after(self.icw4),
            Expect::Icw4 => {
                self.auto_eoi = value & 2 != 0;
                self.special_nested = value & 0x10 != 0;
                self.expect = Expect::Nothing;
            }
        }
    }

    fn read(&mut self, offset: u32, master: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.request(master) {
                Some(input) => {
                    self.serve(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        match (offset, self.read_isr) {
            (0, false) => self.irr,
            (0, true) => self.isr,
            _ => self.imr,
        }
    }
}

/// Whoever the output goes to.
pub trait Output: Send + Sync + std::fmt::Debug {
    /// The output is now `level`.
    fn set(&self, level: bool);
}

#[derive(Debug, Default)]
struct Inner {
    state: PicState,
    output: bool,
}

/// Both controllers.
#[derive(Debug)]
pub struct Pic {
    inner: Mutex<Inner>,
    output: Box<dyn Output>,
}

impl Pic {
    /// Uninitialised controllers.
    pub fn new(output: Box<dyn Output>) -> Self {
        Self {
            inner: Mutex::default(),
            output,
        }
    }

    /// What the guest can observe.
    pub fn state(&self) -> PicState {
        lock(&self.inner).state.clone()
    }

    /// Takes over a saved state; the processor learns of the output anew.
    pub fn load(&self, state: PicState) {
        let mut inner = lock(&self.inner);
        inner.state = state;
        for chip in &mut inner.state.chips {
            chip.lowest &= 7;
        }
        self.update(&mut inner);
        self.output.set(inner.output);
    }

    /// Power-on state; inputs stay as their devices drive them.
    pub fn reset(&self) {
        let mut inner = lock(&self.inner);
        for chip in &mut inner.state.chips {
            *chip = ChipState {
                lines: chip.lines,
                ..ChipState::default()
            };
        }
        self.update(&mut inner);
    }

    /// Carries the second controller's output to the first, and the first's to the processor.
    fn update(&self, inner: &mut Inner) {
        let [first, second] = &mut inner.state.chips;
        // Followed as it is: what the second takes back is no longer asked for.
        let cascade = 1 << CASCADE;
        first.irr = match second.request(false) {
            Some(_) => first.irr | cascade,
            None => first.irr & !cascade,
        };
        let output = first.request(true).is_some();
        if output != inner.output {
            inner.output = output;
            self.output.set(output);
        }
    }

    /// The processor takes the interrupt: its vector. The output may fall, and rise again.
    pub fn acknowledge(&self) -> u8 {
        let mut inner = lock(&self.inner);
        let [first, second] = &mut inner.state.chips;
        let input = first.acknowledge(true);
        let vector = if input == CASCADE {
            second.base | second.acknowledge(false)
        } else {
            first.base | input
        };
        self.update(&mut inner);
        vector
    }

    fn read(&self, chip: usize, offset: u32) -> u32 {
        let mut inner = lock(&self.inner);
        let value = inner.state.chips[chip].read(offset, chip == 0);
        self.update(&mut inner);
        u32::from(value)
    }

    fn write(&self, chip: usize, offset: u32, value: u8) -> Flow {
        let mut inner = lock(&self.inner);
        let state = &mut inner.state.chips[chip];
        if offset == 0 {
            state.command(value);
        } else {
            state.data(value);
        }
        self.update(&mut inner);
        Flow::Continue
    }
}

impl Interrupt for Pic {
    /// Inputs 0 to 15; others are not the PIC's.
    fn set(&self, pin: u8, level: bool) {
        let mut inner = lock(&self.inner);
        let Some(chip) = inner.state.chips.get_mut(usize::from(pin >> 3)) else {
            return;
        };
        if pin == CASCADE {
            return;
        }
        chip.set_line(pin & 7, level);
        self.update(&mut inner);
    }
}

/// One controller's ports.
#[derive(Debug)]
pub struct Ports {
    /// The pair it belongs to.
    pub pic: std::sync::Arc<Pic>,
    /// 0: the first; 1: the second.
    pub chip: usize,
}

impl Device for Ports {
    fn read(&self, offset: u32, _width: u8) -> u32 {
        self.pic.read(self.chip & 1, offset)
    }

    fn write(&self, offset: u32, _width: u8, value: u32) -> Flow {
        self.pic.write(self.chip & 1, offset, low8(value))
    }
}

/// The edge/level registers: a bit an input, 1 is level.
#[derive(Debug)]
pub struct Elcr(pub std::sync::Arc<Pic>);

impl Device for Elcr {
    fn read(&self, offset: u32, _width: u8) -> u32 {
        lock(&self.0.inner).state.chips[usize::from(offset & 1 != 0)]
            .elcr
            .into()
    }

    fn write(&self, offset: u32, _width: u8, value: u32) -> Flow {
        let chip = usize::from(offset & 1 != 0);
        let mut inner = lock(&self.0.inner);
        inner.state.chips[chip].elcr = low8(value) & !EDGE_ONLY[chip];
        self.0.update(&mut inner);
        Flow::Continue
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[derive(Debug, Default, Clone)]
    struct Pin(Arc<AtomicBool>);

    impl Output for Pin {
        fn set(&self, level: bool) {
            self.0.store(level, Ordering::SeqCst);
        }
    }

    impl Pin {
        fn high(&self) -> bool {
            self.0.load(Ordering::SeqCst)
        }
    }

    /// As every firmware programs them: vectors 8 and 0x70, all open.
    fn ready() -> (Pin, Pic) {
        let pin = Pin::default();
        let pic = Pic::new(Box::new(pin.clone()));
        for (chip, base, cascade) in [(0, 0x08, 4), (1, 0x70, 2)] {
            pic.write(chip, 0, 0x11);
            for word in [base, cascade, 1, 0] {
                pic.write(chip, 1, word);
            }
        }
        (pin, pic)
    }

    #[test]
    fn edge_is_taken_once_and_ended() {
        let (pin, pic) = ready();
        assert!(!pin.high());
        pic.set(0, true);
        assert!(pin.high());
        assert_eq!(pic.acknowledge(), 8);
        assert!(!pin.high(), "in service, and the edge is used up");
        pic.set(0, false);
        pic.set(0, true);
        assert!(!pin.high(), "held back by itself in service");
        pic.write(0, 0, 0x20);
        assert!(pin.high());
        assert_eq!(pic.acknowledge(), 8);
    }

    #[test]
    fn higher_priority_interrupts_lower() {
        let (pin, pic) = ready();
        pic.set(4, true);
        assert_eq!(pic.acknowledge(), 12);
        pic.set(5, true);
        assert!(!pin.high());
        pic.set(1, true);
        assert!(pin.high());
        assert_eq!(pic.acknowledge(), 9);
        pic.write(0, 0, 0x20);
        assert!(!pin.high(), "4 is still in service");
        pic.write(0, 0, 0x64);
        assert_eq!(pic.acknowledge(), 13);
    }

    #[test]
    fn second_controller_comes_through_the_first() {
        let (pin, pic) = ready();
        pic.set(8, true);
        pic.set(3, true);
        assert_eq!(pic.acknowledge(), 0x70);
        assert_eq!(pic.state().chips[0].isr, 4);
        pic.write(1, 0, 0x20);
        assert!(!pin.high(), "the cascade is still in service");
        pic.write(0, 0, 0x20);
        assert_eq!(pic.acknowledge(), 11);
    }

    #[test]
    fn level_input_repeats_until_released() {
        let (pin, pic) = ready();
        let pic = Arc::new(pic);
        Elcr(pic.clone()).write(1, 1, 0xff);
        assert_eq!(Elcr(pic.clone()).read(1, 1), 0xde);
        pic.set(10, true);
        assert_eq!(pic.acknowledge(), 0x72);
        pic.write(1, 0, 0x20);
        pic.write(0, 0, 0x20);
        assert!(pin.high(), "still asserted");
        pic.set(10, false);
        assert!(!pin.high());
        assert_eq!(pic.acknowledge(), 15, "gone meanwhile: spurious");
        assert_eq!(pic.state().chips[0].isr, 0);
    }

    #[test]
    fn mask_poll_and_registers() {
        let (pin, pic) = ready();
        pic.write(0, 1, 0xfe);
        assert_eq!(pic.read(0, 1), 0xfe);
        pic.set(1, true);
        assert!(!pin.high());
        assert_eq!(pic.read(0, 0), 2, "IRR");
        pic.write(0, 1, 0);
        assert!(pin.high());
        pic.write(0, 0, 0x0c);
        assert_eq!(pic.read(0, 0), 0x81, "polled");
        pic.write(0, 0, 0x0b);
        assert_eq!(pic.read(0, 0), 2, "ISR");
        pic.reset();
        assert_eq!(pic.state().chips[0].imr, 0);
        pic.set(200, true);
    }

    #[test]
    fn priorities_rotate() {
        let (_, pic) = ready();
        pic.set(0, true);
        pic.set(1, true);
        assert_eq!(pic.acknowledge(), 8);
        pic.write(0, 0, 0xa0);
        pic.set(0, false);
        pic.set(0, true);
        assert_eq!(pic.acknowledge(), 9, "0 has the lowest priority now");
        pic.write(0, 0, 0xc7);
        pic.write(0, 0, 0x20);
        assert_eq!(pic.acknowledge(), 8);
    }
}
