//! Initial floating-point state and memory.

use crate::case::{DATA_LEN, XMM, XSAVE_LEN, YMM_HIGH};
use crate::generate::Generator;

impl Generator {
    /// An XSAVE area with all kinds of numbers, rounding modes, masks and flags.
    pub fn xsave(&mut self) -> [u8; XSAVE_LEN] {
        let r = &mut self.random;
        let mut area = [0; XSAVE_LEN];
        // FCW: mostly all masked.
        let mut fcw = 0x37f;
        if r.one_in(3) {
            fcw = fcw & !0xf00 | (r.next() as u16 & 0xf00);
        }
        if r.one_in(8) {
            fcw = fcw & !0x3f | (r.next() as u16 & 0x3f);
        }
        let top = r.next() as u16 & 7;
        let flags = if r.one_in(3) {
            r.next() as u16 & 0x4740
        } else {
            0
        };
        // Exceptions that wait only now and then.
        let raised = if r.one_in(4) {
            r.next() as u16 & 0x3f
        } else {
            0
        };
        let raised = if r.one_in(8) { raised } else { raised & fcw };
        let summary = if raised & !fcw & 0x3f != 0 { 0x8080 } else { 0 };
        area[..2].copy_from_slice(&fcw.to_le_bytes());
        area[2..4].copy_from_slice(&(top << 11 | flags | raised | summary).to_le_bytes());
        area[4] = match r.below(3) {
            0 => 0xff,
            1 => 0,
            _ => r.next() as u8,
        };
        let mut mxcsr = 0x1f80_u32;
        if r.one_in(2) {
            mxcsr |= r.next() as u32 & 0xe07f;
        }
        if r.one_in(8) {
            mxcsr &= !(r.next() as u32 & 0x1f80);
        }
        area[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        for slot in area[32..160].chunks_exact_mut(16) {
            slot[..10].copy_from_slice(&r.extended());
        }
        for range in [XMM, YMM_HIGH] {
            for register in area[range].chunks_exact_mut(16) {
                register.copy_from_slice(&r.vector());
            }
        }
        area
    }

    /// What `DATA` holds for the next cases.
    pub fn data(&mut self) -> Box<[u8; DATA_LEN]> {
        let mut data = Box::new([0; DATA_LEN]);
        for chunk in data.chunks_exact_mut(16) {
            chunk.copy_from_slice(&self.random.vector());
        }
        data
    }
}
