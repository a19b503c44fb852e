//! Random numbers from a printed seed.

/// SplitMix64.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// An integer, with a taste for the edges.
    pub fn integer(&mut self) -> u64 {
        let value = self.next();
        match self.below(8) {
            0 => self.pick(&[0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, u64::MAX]),
            1 => self.pick(&[
                0x7fff_ffff,
                0x8000_0000,
                0xffff_ffff,
                0x1_0000_0000,
                i64::MAX as u64,
                i64::MIN as u64,
            ]),
            2 => value & 0xff,
            3 => value as i8 as u64,
            4 => value as i32 as u64,
            5 => 1 << (value & 63),
            _ => value,
        }
    }

    /// A double, with a taste for the edges.
    pub fn double(&mut self) -> u64 {
        let sign = self.next() & 1 << 63;
        sign | match self.below(10) {
            0 => 0,
            1 => f64::INFINITY.to_bits(),
            2 => 0x7ff8_0000_0000_0000 | self.next() & 0xffff,
            3 => 0x7ff0_0000_0000_0001 | self.next() & 0xffff,
            4 => self.next() >> 12,
            5 => f64::MAX.to_bits() - self.next() % 4,
            6 => 0x0010_0000_0000_0000 + self.next() % 4,
            _ => (1023 - 40 + self.next() % 80) << 52 | self.next() >> 12,
        }
    }

    /// A single, likewise.
    pub fn single(&mut self) -> u32 {
        let sign = (self.next() as u32) & 1 << 31;
        sign | match self.below(10) {
            0 => 0,
            1 => f32::INFINITY.to_bits(),
            2 => 0x7fc0_0000 | self.next() as u32 & 0xff,
            3 => 0x7f80_0001 | self.next() as u32 & 0xff,
            4 => (self.next() as u32) >> 9,
            5 => f32::MAX.to_bits() - self.next() as u32 % 4,
            6 => 0x0080_0000 + self.next() as u32 % 4,
            _ => (127 - 20 + self.next() as u32 % 40) << 23 | (self.next() as u32) >> 9,
        }
    }

    /// 16 bytes of one kind of number or another.
    pub fn vector(&mut self) -> [u8; 16] {
        let mut bytes = [0; 16];
        match self.below(4) {
            0 => {
                for b in bytes.chunks_exact_mut(8) {
                    b.copy_from_slice(&self.double().to_le_bytes());
                }
            }
            1 => {
                for b in bytes.chunks_exact_mut(4) {
                    b.copy_from_slice(&self.single().to_le_bytes());
                }
            }
            2 => {
                for b in bytes.chunks_exact_mut(8) {
                    b.copy_from_slice(&self.integer().to_le_bytes());
                }
            }
            _ => {
                for b in bytes.chunks_exact_mut(8) {
                    b.copy_from_slice(&self.next().to_le_bytes());
                }
            }
        }
        bytes
    }

    /// An 80-bit number, sometimes of a kind that no arithmetic makes.
    pub fn extended(&mut self) -> [u8; 10] {
        let mut bytes = [0; 10];
        let significand = match self.below(8) {
            0 => 0,
            1 => 1 << 63,
            2 => 0xc000_0000_0000_0000 | self.next() & 0xff,
            3 => self.next(),
            _ => self.next() | 1 << 63,
        };
        let exponent = match self.below(8) {
            0 => 0,
            1 => 0x7fff,
            2 => self.next() as u16 & 0x7fff,
            _ => 0x3fff - 40 + self.next() as u16 % 80,
        };
        let sign = (self.next() as u16) << 15;
        bytes[..8].copy_from_slice(&significand.to_le_bytes());
        bytes[8..].copy_from_slice(&(exponent | sign).to_le_bytes());
        bytes
    }
}
