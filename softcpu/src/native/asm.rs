//! The few host instructions that translated code needs around the guest's own.

/// Host registers by their numbers in encodings.
pub(super) mod host {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R8: u8 = 8;
    pub const R9: u8 = 9;
    pub const R10: u8 = 10;
    pub const R11: u8 = 11;
    pub const R12: u8 = 12;
    pub const R13: u8 = 13;
    pub const R14: u8 = 14;
    pub const R15: u8 = 15;
}

/// Condition codes of JCC and SETCC.
pub(super) mod cond {
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const S: u8 = 8;
}

/// `[base + index * 2^scale + disp]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mem {
    pub base: u8,
    /// Register and log2 of its factor.
    pub index: Option<(u8, u8)>,
    pub disp: i32,
}

/// `[base + disp]`.
pub(super) fn at(base: u8, disp: i32) -> Mem {
    Mem {
        base,
        index: None,
        disp,
    }
}

/// A place of a 32-bit distance that is filled in later.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patch(usize);

/// Collects code.
#[derive(Debug, Default)]
pub(super) struct Asm {
    pub code: Vec<u8>,
}

impl Asm {
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    pub(super) fn len(&self) -> usize {
        self.code.len()
    }

    /// `opcode` with a register and a memory operand. 64 bits wide if `wide`.
    pub(super) fn mem(&mut self, wide: bool, opcode: &[u8], reg: u8, m: Mem) {
        let index = m.index.map_or(0, |(r, _)| r);
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | m.base >> 3;
        if rex != 0x40 {
            self.bytes(&[rex]);
        }
        self.bytes(opcode);
        let short = i8::try_from(m.disp);
        let mode = if short.is_ok() { 0x40 } else { 0x80 } | (reg & 7) << 3;
        match m.index {
            Some((r, scale)) => self.bytes(&[mode | 4, scale << 6 | (r & 7) << 3 | m.base & 7]),
            None if m.base & 7 == host::RSP => self.bytes(&[mode | 4, 0x24]),
            None => self.bytes(&[mode | m.base & 7]),
        }
        match short {
            Ok(disp) => self.bytes(&disp.to_le_bytes()),
            Err(_) => self.bytes(&m.disp.to_le_bytes()),
        }
    }

    /// `opcode` with two registers, the second in ModRM's r/m field.
    pub(super) fn reg(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: u8) {
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | rm >> 3;
        if rex != 0x40 {
            self.bytes(&[rex]);
        }
        self.bytes(opcode);
        self.bytes(&[0xc0 | (reg & 7) << 3 | rm & 7]);
    }

    pub(super) fn load(&mut self, reg: u8, m: Mem) {
        self.mem(true, &[0x8b], reg, m);
    }

    pub(super) fn load32(&mut self, reg: u8, m: Mem) {
        self.mem(false, &[0x8b], reg, m);
    }

    pub(super) fn store(&mut self, reg: u8, m: Mem) {
        self.mem(true, &[0x89], reg, m);
    }

    pub(super) fn lea(&mut self, reg: u8, m: Mem) {
        self.mem(true, &[0x8d], reg, m);
    }

    pub(super) fn mov(&mut self, to: u8, from: u8) {
        self.reg(true, &[0x89], from, to);
    }

    pub(super) fn imm64(&mut self, reg: u8, value: u64) {
        match u32::try_from(value) {
            Ok(value) => {
                if reg >= 8 {
                    self.bytes(&[0x41]);
                }
                self.bytes(&[0xb8 | reg & 7]);
                self.bytes(&value.to_le_bytes());
            }
            Err(_) => {
                self.bytes(&[0x48 | reg >> 3, 0xb8 | reg & 7]);
                self.bytes(&value.to_le_bytes());
            }
        }
    }

    /// `add`, `or`, `and`, `sub`, `xor`, `cmp` (0, 1, 4, 5, 6, 7) with a sign-extended constant.
    pub(super) fn alu(&mut self, wide: bool, kind: u8, reg: u8, value: i32) {
        match i8::try_from(value) {
            Ok(short) => {
                self.reg(wide, &[0x83], kind, reg);
                self.bytes(&short.to_le_bytes());
            }
            Err(_) => {
                self.reg(wide, &[0x81], kind, reg);
                self.bytes(&value.to_le_bytes());
            }
        }
    }

    /// `shl` (4) or `shr` (5) or `sar` (7).
    pub(super) fn shift(&mut self, wide: bool, kind: u8, reg: u8, count: u8) {
        self.reg(wide, &[0xc1], kind, reg);
        self.bytes(&[count]);
    }

    /// A conditional jump to be directed later.
    pub(super) fn jcc(&mut self, condition: u8) -> Patch {
        self.bytes(&[0x0f, 0x80 | condition, 0, 0, 0, 0]);
        Patch(self.code.len() - 4)
    }

    /// A jump to be directed later.
    pub(super) fn jmp(&mut self) -> Patch {
        self.bytes(&[0xe9, 0, 0, 0, 0]);
        Patch(self.code.len() - 4)
    }

    /// Directs a jump to position `to` of the code, which may be negative: before it.
    pub(super) fn patch(&mut self, Patch(at): Patch, to: i64) {
        let distance = (to - (at as i64 + 4)) as i32;
        if let Some(place) = self.code.get_mut(at..at + 4) {
            place.copy_from_slice(&distance.to_le_bytes());
        }
    }

    /// Directs a jump to here.
    pub(super) fn here(&mut self, patch: Patch) {
        self.patch(patch, self.code.len() as i64);
    }
}
