//! Real-time clock and CMOS RAM (Motorola MC146818), ports 0x70 and 0x71.
//!
//! The time follows the host's, with an offset. Alarms and periodic interrupts are not wired:
//! ACPI describes the clock without an interrupt.

use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use hypervisor::Flow;
use serde::{Deserialize, Serialize};

use super::lock;
use crate::bus::Device;
use crate::num::low8;

/// Index port; data is the next.
pub const BASE: u16 = 0x70;
/// Ports.
pub const LEN: u32 = 2;

const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const STATUS_A: u8 = 10;
const STATUS_B: u8 = 11;
const STATUS_C: u8 = 12;
const STATUS_D: u8 = 13;
/// Where the century is kept, as FADT says too.
pub const CENTURY: u8 = 0x32;

/// Bytes of CMOS RAM.
const CELLS: usize = 128;
/// A century off is a mistake, not a wish: keeps every later sum far from overflow.
const OFFSET_MOST: i64 = 1 << 40;

const B_24H: u8 = 2;
const B_BINARY: u8 = 4;
const B_SET: u8 = 0x80;

/// What the guest can observe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// Index register.
    pub index: u8,
    /// CMOS RAM; the time's cells are used only while the clock is stopped (SET).
    pub cells: Vec<u8>,
    /// Seconds the guest's clock is ahead of the host's UTC.
    pub offset: i64,
}

/// The clock.
#[derive(Debug)]
pub struct Rtc {
    state: Mutex<RtcState>,
}

/// A calendar time, UTC (proleptic Gregorian).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Calendar {
    year: i64,
    month: i64,
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
}

/// Days since 1970-01-01 of a date; years start in March so that leap days come last.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

impl Calendar {
    fn at(seconds: i64) -> Self {
        let (day_number, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let z = day_number + 719_468;
        let era = z.div_euclid(146_097);
        let of_era = z.rem_euclid(146_097);
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted = (5 * of_year + 2) / 153;
        let day = of_year - (153 * shifted + 2) / 5 + 1;
        let month = if shifted < 10 {
            shifted + 3
        } else {
            shifted - 9
        };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        Self {
            year,
            month,
            day,
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }

    fn seconds(&self) -> i64 {
        days(self.year, self.month, self.day) * 86_400
            + self.hour * 3600
            + self.minute * 60
            + self.second
    }

    fn weekday(&self) -> i64 {
        // 1970-01-01 was a Thursday; the chip counts from Sunday = 1.
        (days(self.year, self.month, self.day) + 4).rem_euclid(7) + 1
    }
}

fn host_now() -> i64 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_secs()).unwrap_or(i64::MAX),
    }
}

fn encode(status_b: u8, value: i64) -> u8 {
    let value = u8::try_from(value.rem_euclid(100)).unwrap_or(0);
    if status_b & B_BINARY != 0 {
        value
    } else {
        ((value / 10) << 4) | (value % 10)
    }
}

fn decode(status_b: u8, cell: u8) -> i64 {
    if status_b & B_BINARY != 0 {
        cell.into()
    } else {
        i64::from(cell >> 4) * 10 + i64::from(cell & 15)
    }
}

fn encode_hour(status_b: u8, hour: i64) -> u8 {
    if status_b & B_24H != 0 {
        return encode(status_b, hour);
    }
    let half = (hour + 11) % 12 + 1;
    encode(status_b, half) | if hour >= 12 { 0x80 } else { 0 }
}

fn decode_hour(status_b: u8, cell: u8) -> i64 {
    if status_b & B_24H != 0 {
        return decode(status_b, cell);
    }
    decode(status_b, cell & 0x7f) % 12 + if cell & 0x80 != 0 { 12 } else { 0 }
}

impl RtcState {
    fn new(offset: i64) -> Self {
        let mut cells = vec![0; CELLS];
        cells[usize::from(STATUS_A)] = 0x26;
        cells[usize::from(STATUS_B)] = B_24H;
        Self {
            index: 0,
            cells,
            offset,
        }
    }

    fn cell(&self, index: u8) -> u8 {
        self.cells.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    fn set_cell(&mut self, index: u8, value: u8) {
        if let Some(cell) = self.cells.get_mut(usize::from(index)) {
            *cell = value;
        }
    }

    /// Writes the running time into its cells.
    fn latch(&mut self) {
        let b = self.cell(STATUS_B);
        if b & B_SET != 0 {
            return;
        }
        let now = Calendar::at(host_now().saturating_add(self.offset));
        self.set_cell(SECONDS, encode(b, now.second));
        self.set_cell(MINUTES, encode(b, now.minute));
        self.set_cell(HOURS, encode_hour(b, now.hour));
        self.set_cell(WEEKDAY, encode(b, now.weekday()));
        self.set_cell(DAY, encode(b, now.day));
        self.set_cell(MONTH, encode(b, now.month));
        self.set_cell(YEAR, encode(b, now.year));
        self.set_cell(CENTURY, encode(b, now.year.div_euclid(100)));
    }

    /// The time goes on from what the cells say.
    fn take_over(&mut self) {
        let b = self.cell(STATUS_B);
        let time = Calendar {
            year: decode(b, self.cell(CENTURY)) * 100 + decode(b, self.cell(YEAR)),
            month: decode(b, self.cell(MONTH)).clamp(1, 12),
            day: decode(b, self.cell(DAY)).clamp(1, 31),
            hour: decode_hour(b, self.cell(HOURS)),
            minute: decode(b, self.cell(MINUTES)),
            second: decode(b, self.cell(SECONDS)),
        };
        self.offset = time.seconds().saturating_sub(host_now());
    }
}

impl Rtc {
    /// A clock `offset` seconds ahead of UTC.
    #[must_use]
    pub fn new(offset: i64) -> Self {
        Self {
            state: Mutex::new(RtcState::new(offset.clamp(-OFFSET_MOST, OFFSET_MOST))),
        }
    }

    /// Takes over a saved state: the time is the host's again, as far ahead as it was.
    pub fn load(&self, saved: RtcState) {
        let mut cells = saved.cells;
        cells.resize(CELLS, 0);
        *lock(&self.state) = RtcState {
            index: saved.index,
            cells,
            offset: saved.offset.clamp(-OFFSET_MOST, OFFSET_MOST),
        };
    }

    /// Tells the size of memory the way a PC's firmware looks for it: bytes below and above
    /// 4 GiB; and the number of vCPUs.
    pub fn describe(&self, low: u64, high: u64, vcpus: u32) {
        let mut state = lock(&self.state);
        let mut put = |index: u8, value: u64, bytes: u8| {
            for (byte, index) in value.to_le_bytes().iter().zip(index..index + bytes) {
                state.set_cell(index, *byte);
            }
        };
        let above = |from: u64, unit: u64| (low.saturating_sub(from) / unit).min(0xffff);
        put(0x15, 640, 2);
        put(0x17, above(1 << 20, 1 << 10), 2);
        put(0x30, above(1 << 20, 1 << 10), 2);
        put(0x34, above(16 << 20, 64 << 10), 2);
        put(0x5b, (high / (64 << 10)).min(0xff_ffff), 3);
        put(0x5f, u64::from(vcpus.saturating_sub(1)).min(255), 1);
    }

    /// What the guest can observe.
    pub fn state(&self) -> RtcState {
        lock(&self.state).clone()
    }

    /// The clock is battery-backed: a reset touches only the index and interrupt enables.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        state.index = 0;
        let b = state.cell(STATUS_B) & 0x07;
        state.set_cell(STATUS_B, b);
    }
}

impl Device for Rtc {
    fn read(&self, offset: u32, _width: u8) -> u32 {
        let mut state = lock(&self.state);
        if offset == 0 {
            return 0xff;
        }
        let index = state.index;
        let value = match index {
            STATUS_C => 0,
            STATUS_D => 0x80,
            0..=9 | CENTURY => {
                state.latch();
                state.cell(index)
            }
            _ => state.cell(index),
        };
        u32::from(value)
    }

    fn write(&self, offset: u32, _width: u8, value: u32) -> Flow {
        let value = low8(value);
        let mut state = lock(&self.state);
        if offset == 0 {
            state.index = value & 0x7f;
            return Flow::Continue;
        }
        let index = state.index;
        match index {
            STATUS_A => state.set_cell(STATUS_A, value & 0x7f),
            STATUS_B => {
                let was_set = state.cell(STATUS_B) & B_SET != 0;
                if value & B_SET != 0 && !was_set {
                    state.latch();
                }
                // Interrupt enables stay off: there is no interrupt.
                state.set_cell(STATUS_B, value & 0x8f);
                if value & B_SET == 0 && was_set {
                    state.take_over();
                }
            }
            STATUS_C | STATUS_D => {}
            0..=9 | CENTURY if index.is_multiple_of(2) || index > 5 => {
                state.latch();
                state.set_cell(index, value);
                if state.cell(STATUS_B) & B_SET == 0 {
                    state.take_over();
                }
            }
            _ => state.set_cell(index, value),
        }
        Flow::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(rtc: &Rtc, index: u8) -> u8 {
        rtc.write(0, 1, index.into());
        low8(rtc.read(1, 1))
    }

    fn set(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(0, 1, index.into());
        rtc.write(1, 1, value.into());
    }

    #[test]
    fn calendar_goes_there_and_back() {
        for seconds in [
            0,
            951_782_400,
            951_868_799,
            4_107_542_399,
            -1,
            1_709_164_800,
        ] {
            assert_eq!(Calendar::at(seconds).seconds(), seconds);
        }
        let leap = Calendar::at(951_782_400);
        assert_eq!(
            (leap.year, leap.month, leap.day, leap.weekday()),
            (2000, 2, 29, 3)
        );
    }

    #[test]
    fn guest_sets_the_time_and_it_goes_on_from_there() {
        let rtc = Rtc::new(0);
        set(&rtc, STATUS_B, B_SET | B_24H);
        for (index, value) in [
            (CENTURY, 0x20),
            (YEAR, 0x30),
            (MONTH, 0x12),
            (DAY, 0x24),
            (HOURS, 0x18),
            (MINUTES, 0x30),
            (SECONDS, 0),
        ] {
            set(&rtc, index, value);
        }
        set(&rtc, STATUS_B, B_24H);
        assert_eq!(get(&rtc, YEAR), 0x30);
        assert_eq!(get(&rtc, DAY), 0x24);
        assert_eq!(get(&rtc, HOURS), 0x18);
        set(&rtc, STATUS_B, B_BINARY);
        assert_eq!(get(&rtc, HOURS), 0x80 | 6, "6 pm");
        assert_eq!(get(&rtc, MONTH), 12);
        rtc.reset();
        assert_eq!(get(&rtc, CENTURY), 20, "battery-backed");
    }

    #[test]
    fn is_valid_and_never_updating() {
        let rtc = Rtc::new(3600);
        assert_eq!(get(&rtc, STATUS_D), 0x80);
        assert_eq!(get(&rtc, STATUS_A) & 0x80, 0);
        assert_eq!(rtc.state().offset, 3600);
        for index in 0..=255 {
            set(&rtc, index, 0xff);
            get(&rtc, index);
        }
    }
}
