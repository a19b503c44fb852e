//! Descriptors, segment registers, and far transfers of control (Intel SDM vol. 3, chapters 3
//! and 5).

use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::state::{Segment, gpr, rflags, seg};

/// A descriptor as it lies in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Descriptor {
    pub raw: u64,
    /// Linear address it was read from.
    pub addr: u64,
}

impl Descriptor {
    /// The hidden part it stands for, with `selector`.
    pub(crate) fn segment(&self, selector: u16) -> Segment {
        let raw = self.raw;
        let mut limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
        if raw >> 55 & 1 != 0 {
            limit = limit << 12 | 0xfff;
        }
        Segment {
            base: raw >> 16 & 0xff_ffff | (raw >> 56) << 24,
            limit,
            access: (raw >> 40) as u32 & 0xf0ff,
            selector,
        }
    }

    pub(crate) fn kind(&self) -> u32 {
        (self.raw >> 40) as u32 & 15
    }
    pub(crate) fn is_code_or_data(&self) -> bool {
        self.raw >> 44 & 1 != 0
    }
    pub(crate) fn is_code(&self) -> bool {
        self.is_code_or_data() && self.kind() & 8 != 0
    }
    pub(crate) fn conforming(&self) -> bool {
        self.kind() & 4 != 0
    }
    pub(crate) fn dpl(&self) -> u8 {
        (self.raw >> 45) as u8 & 3
    }
    pub(crate) fn present(&self) -> bool {
        self.raw >> 47 & 1 != 0
    }
    pub(crate) fn long(&self) -> bool {
        self.raw >> 53 & 1 != 0
    }
    pub(crate) fn big(&self) -> bool {
        self.raw >> 54 & 1 != 0
    }
}

/// An error code that names a selector.
pub(crate) fn code(selector: u16) -> u32 {
    u32::from(selector & !3)
}

impl Cpu {
    /// Reads the descriptor of a selector; `None`: beyond its table, or no LDT.
    pub(crate) fn descriptor(&mut self, selector: u16) -> Fallible<Option<Descriptor>> {
        let (base, limit) = if selector & 4 != 0 {
            if self.s.ldtr.unusable() || !self.s.ldtr.present() {
                return Ok(None);
            }
            (self.s.ldtr.base, self.s.ldtr.limit)
        } else {
            (self.s.gdtr.base, self.s.gdtr.limit.into())
        };
        let offset = u32::from(selector & !7);
        if offset + 7 > limit {
            return Ok(None);
        }
        let addr = self.wrap_system(base.wrapping_add(offset.into()));
        let raw = self.system_read::<u64>(addr)?;
        Ok(Some(Descriptor { raw, addr }))
    }

    /// Tables lie in 32 bits outside long mode.
    pub(crate) fn wrap_system(&self, addr: u64) -> u64 {
        if self.s.long_mode() {
            addr
        } else {
            addr & 0xffff_ffff
        }
    }

    /// Reads the descriptor of a selector or raises #GP(selector).
    pub(crate) fn descriptor_or_gp(&mut self, selector: u16) -> Fallible<Descriptor> {
        self.descriptor(selector)?
            .ok_or(Exception::gp(code(selector)))
    }

    /// Sets a descriptor's accessed bit.
    pub(crate) fn mark_accessed(&mut self, descriptor: &Descriptor) -> Fallible<()> {
        if descriptor.raw >> 40 & 1 == 0 {
            let byte = (descriptor.raw >> 40) as u8 | 1;
            self.system_write::<u8>(descriptor.addr.wrapping_add(5), byte)?;
        }
        Ok(())
    }

    /// Loads a segment register as MOV, POP, LDS and such do. Not CS.
    pub(crate) fn load_segment(&mut self, index: usize, selector: u16) -> Fallible<()> {
        if !self.s.protected() {
            let real = self.real_segment(index, selector);
            self.s.seg[index] = real;
            self.update_mode();
            return Ok(());
        }
        let segment = self.checked_segment(index, selector, self.s.cpl)?;
        self.s.seg[index] = segment;
        self.update_mode();
        Ok(())
    }

    /// What a register holds after loading `selector` in real or virtual-8086 mode.
    pub(crate) fn real_segment(&self, index: usize, selector: u16) -> Segment {
        let base = u64::from(selector) << 4;
        if self.s.v8086() {
            return Segment {
                base,
                limit: 0xffff,
                access: 0xf3,
                selector,
            };
        }
        // Limit and size stay as they were last loaded ("unreal mode").
        let old = self.s.seg[index];
        Segment {
            base,
            limit: old.limit,
            access: if index == seg::CS {
                0x9b
            } else {
                old.access & 0xd000 | 0x93
            } | old.access & 0x4000,
            selector,
        }
    }

    /// Checks `selector` for a data or stack register at privilege `cpl` and gives its
    /// hidden part.
    pub(crate) fn checked_segment(
        &mut self,
        index: usize,
        selector: u16,
        cpl: u8,
    ) -> Fallible<Segment> {
        let rpl = selector as u8 & 3;
        let gp = Exception::gp(code(selector));
        if selector & !3 == 0 {
            if index == seg::SS && !(self.mode & 3 == 2 && cpl < 3 && rpl == cpl) {
                return Err(Exception::GP0);
            }
            // A null selector. In long mode the base of FS and GS is cleared too.
            return Ok(Segment {
                access: Segment::UNUSABLE
                    | if index == seg::SS {
                        u32::from(cpl) << 5 | 0x4093
                    } else {
                        0
                    },
                selector,
                ..Segment::default()
            });
        }
        let descriptor = self.descriptor_or_gp(selector)?;
        let kind = descriptor.kind();
        if !descriptor.is_code_or_data() {
            return Err(gp);
        }
        if index == seg::SS {
            if rpl != cpl || descriptor.is_code() || kind & 2 == 0 || descriptor.dpl() != cpl {
                return Err(gp);
            }
            if !descriptor.present() {
                return Err(Exception::ss(code(selector)));
            }
        } else {
            if descriptor.is_code() && kind & 2 == 0 {
                return Err(gp);
            }
            let conforming = descriptor.is_code() && descriptor.conforming();
            if !conforming && (rpl > descriptor.dpl() || cpl > descriptor.dpl()) {
                return Err(gp);
            }
            if !descriptor.present() {
                return Err(Exception::np(code(selector)));
            }
        }
        self.mark_accessed(&descriptor)?;
        let mut segment = descriptor.segment(selector);
        segment.access |= 1;
        Ok(segment)
    }

    /// Makes a checked code descriptor CS at privilege `cpl` and goes to `rip`.
    pub(crate) fn enter_code(
        &mut self,
        descriptor: &Descriptor,
        selector: u16,
        cpl: u8,
        rip: u64,
    ) -> Fallible<()> {
        self.mark_accessed(descriptor)?;
        let mut segment = descriptor.segment(selector & !3 | u16::from(cpl));
        segment.access |= 1;
        self.s.seg[seg::CS] = segment;
        self.s.cpl = cpl;
        self.s.rip = rip;
        self.update_mode();
        Ok(())
    }

    /// Checks that `rip` lies in the code segment `descriptor` stands for.
    pub(crate) fn check_entry(&self, descriptor: &Descriptor, rip: u64) -> Fallible<()> {
        if self.s.long_mode() && descriptor.long() {
            self.check_canonical(rip).map_err(|_| Exception::GP0)
        } else if rip > u64::from(descriptor.segment(0).limit) {
            Err(Exception::GP0)
        } else {
            Ok(())
        }
    }

    /// In long mode a code segment cannot have both L and D.
    pub(crate) fn bad_long(&self, descriptor: &Descriptor) -> bool {
        self.s.long_mode() && descriptor.long() && descriptor.big()
    }

    /// JMP or CALL far to a code segment, a gate or a task.
    pub(crate) fn far_transfer(
        &mut self,
        selector: u16,
        offset: u64,
        bytes: usize,
        call: bool,
    ) -> Fallible<()> {
        let back = self.s.rip;
        let old_cs = self.s.seg[seg::CS].selector;
        if !self.s.protected() {
            let offset = if bytes == 2 { offset & 0xffff } else { offset };
            if offset > u64::from(self.s.seg[seg::CS].limit) {
                return Err(Exception::GP0);
            }
            if call {
                let sp = self.push_at(self.s.gpr[gpr::RSP], old_cs.into(), bytes)?;
                let sp = self.push_at(sp, back, bytes)?;
                self.set_sp(sp);
            }
            self.s.seg[seg::CS] = self.real_segment(seg::CS, selector);
            self.s.rip = offset;
            self.update_mode();
            return Ok(());
        }
        if selector & !3 == 0 {
            return Err(Exception::GP0);
        }
        let gp = Exception::gp(code(selector));
        let descriptor = self.descriptor_or_gp(selector)?;
        if !descriptor.is_code_or_data() {
            return self.far_system(selector, &descriptor, bytes, call);
        }
        let (cpl, rpl) = (self.s.cpl, selector as u8 & 3);
        if !descriptor.is_code() || self.bad_long(&descriptor) {
            return Err(gp);
        }
        let allowed = if descriptor.conforming() {
            descriptor.dpl() <= cpl
        } else {
            rpl <= cpl && descriptor.dpl() == cpl
        };
        if !allowed {
            return Err(gp);
        }
        if !descriptor.present() {
            return Err(Exception::np(code(selector)));
        }
        let rip = match bytes {
            2 => offset & 0xffff,
            4 => offset & 0xffff_ffff,
            _ => offset,
        };
        self.check_entry(&descriptor, rip)?;
        if call {
            let sp = self.push_at(self.s.gpr[gpr::RSP], old_cs.into(), bytes)?;
            let sp = self.push_at(sp, back, bytes)?;
            self.enter_code(&descriptor, selector, cpl, rip)?;
            self.set_sp(sp);
            return Ok(());
        }
        self.enter_code(&descriptor, selector, cpl, rip)
    }

    /// RETF, dropping `extra` more bytes.
    pub(crate) fn far_return(&mut self, bytes: usize, extra: u64) -> Fallible<()> {
        let sp = self.s.gpr[gpr::RSP];
        let step = bytes as u64;
        let rip = self.peek_at(sp, bytes)?;
        let selector = self.peek_at(sp.wrapping_add(step), bytes)? as u16;
        let sp = sp.wrapping_add(2 * step);
        if !self.s.protected() {
            if rip > u64::from(self.s.seg[seg::CS].limit) {
                return Err(Exception::GP0);
            }
            self.s.seg[seg::CS] = self.real_segment(seg::CS, selector);
            self.s.rip = rip;
            self.set_sp(sp.wrapping_add(extra));
            self.update_mode();
            return Ok(());
        }
        let (descriptor, rpl) = self.return_code(selector)?;
        if rpl == self.s.cpl {
            self.check_entry(&descriptor, rip)?;
            let sp = sp.wrapping_add(extra);
            self.set_sp(sp);
            return self.enter_code(&descriptor, selector, rpl, rip);
        }
        let sp = sp.wrapping_add(extra);
        let new_sp = self.peek_at(sp, bytes)?;
        let new_ss = self.peek_at(sp.wrapping_add(step), bytes)? as u16;
        self.return_outer(&descriptor, selector, rpl, rip, new_ss, new_sp)?;
        let sp = self.s.gpr[gpr::RSP].wrapping_add(extra);
        self.set_sp(sp);
        Ok(())
    }

    /// Checks a code selector popped by RETF or IRET.
    pub(crate) fn return_code(&mut self, selector: u16) -> Fallible<(Descriptor, u8)> {
        if selector & !3 == 0 {
            return Err(Exception::GP0);
        }
        let gp = Exception::gp(code(selector));
        let descriptor = self.descriptor_or_gp(selector)?;
        let rpl = selector as u8 & 3;
        if !descriptor.is_code() || rpl < self.s.cpl || self.bad_long(&descriptor) {
            return Err(gp);
        }
        let allowed = if descriptor.conforming() {
            descriptor.dpl() <= rpl
        } else {
            descriptor.dpl() == rpl
        };
        if !allowed {
            return Err(gp);
        }
        if !descriptor.present() {
            return Err(Exception::np(code(selector)));
        }
        Ok((descriptor, rpl))
    }

    /// The end of a return to an outer privilege level (or, for IRET in 64-bit mode, to the
    /// same one): new CS:RIP and SS:RSP.
    pub(crate) fn return_outer(
        &mut self,
        descriptor: &Descriptor,
        selector: u16,
        rpl: u8,
        rip: u64,
        new_ss: u16,
        new_sp: u64,
    ) -> Fallible<()> {
        let to64 = self.s.long_mode() && descriptor.long();
        let stack = if new_ss & !3 == 0 {
            if !to64 || rpl == 3 || new_ss as u8 & 3 != rpl {
                return Err(Exception::GP0);
            }
            Segment {
                access: Segment::UNUSABLE | u32::from(rpl) << 5 | 0x4093,
                selector: new_ss,
                ..Segment::default()
            }
        } else {
            self.checked_segment(seg::SS, new_ss, rpl)?
        };
        self.check_entry(descriptor, rip)?;
        let old_cpl = self.s.cpl;
        self.enter_code(descriptor, selector, rpl, rip)?;
        self.s.seg[seg::SS] = stack;
        self.update_mode();
        if to64 {
            self.s.gpr[gpr::RSP] = new_sp;
        } else {
            self.set_sp(new_sp);
        }
        if rpl > old_cpl {
            self.drop_privileged_segments();
        }
        Ok(())
    }

    /// Data registers that the outer privilege level may not use become null.
    fn drop_privileged_segments(&mut self) {
        let cpl = self.s.cpl;
        for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let segment = &mut self.s.seg[index];
            let conforming = segment.access & 0x1c == 0x1c;
            if !conforming && segment.dpl() < cpl && !segment.unusable() {
                *segment = Segment {
                    access: Segment::UNUSABLE,
                    ..Segment::default()
                };
            }
        }
        self.update_mode();
    }

    /// The descriptor LAR, LSL, VERR and VERW talk about, if it may be seen.
    pub(crate) fn visible_descriptor(&mut self, selector: u16) -> Fallible<Option<Descriptor>> {
        if selector & !3 == 0 {
            return Ok(None);
        }
        let Some(descriptor) = self.descriptor(selector)? else {
            return Ok(None);
        };
        let rpl = selector as u8 & 3;
        let conforming = descriptor.is_code() && descriptor.conforming();
        let privileged = descriptor.dpl() < self.s.cpl || descriptor.dpl() < rpl;
        Ok((conforming || !privileged).then_some(descriptor))
    }

    /// VERR, VERW.
    pub(crate) fn verify(&mut self, selector: u16, write: bool) -> Fallible<bool> {
        Ok(self.visible_descriptor(selector)?.is_some_and(|d| {
            let readable = !d.is_code() || d.kind() & 2 != 0;
            let writable = !d.is_code() && d.kind() & 2 != 0;
            d.is_code_or_data() && if write { writable } else { readable }
        }))
    }

    /// LAR: access rights, if valid.
    pub(crate) fn access_rights(&mut self, selector: u16) -> Fallible<Option<u32>> {
        let long = self.s.long_mode();
        Ok(self.visible_descriptor(selector)?.and_then(|d| {
            let valid = d.is_code_or_data()
                || match d.kind() {
                    1 | 3 | 4 | 5 => !long,
                    2 | 9 | 11 | 12 => true,
                    _ => false,
                };
            valid.then_some((d.raw >> 32) as u32 & 0x00ff_ff00)
        }))
    }

    /// LSL: limit, if valid.
    pub(crate) fn segment_limit(&mut self, selector: u16) -> Fallible<Option<u32>> {
        let long = self.s.long_mode();
        Ok(self.visible_descriptor(selector)?.and_then(|d| {
            let valid = d.is_code_or_data()
                || match d.kind() {
                    1 | 3 => !long,
                    2 | 9 | 11 => true,
                    _ => false,
                };
            valid.then_some(d.segment(selector).limit)
        }))
    }

    /// LLDT.
    pub(crate) fn load_ldt(&mut self, selector: u16) -> Fallible<()> {
        if selector & !3 == 0 {
            self.s.ldtr = Segment {
                access: Segment::UNUSABLE,
                selector,
                ..Segment::default()
            };
            return Ok(());
        }
        let gp = Exception::gp(code(selector));
        if selector & 4 != 0 {
            return Err(gp);
        }
        let (descriptor, segment) = self.system_segment(selector)?;
        if descriptor.is_code_or_data() || descriptor.kind() != 2 {
            return Err(gp);
        }
        if !descriptor.present() {
            return Err(Exception::np(code(selector)));
        }
        self.s.ldtr = segment;
        Ok(())
    }

    /// LTR.
    pub(crate) fn load_tr(&mut self, selector: u16) -> Fallible<()> {
        if selector & !3 == 0 {
            return Err(Exception::GP0);
        }
        let gp = Exception::gp(code(selector));
        if selector & 4 != 0 {
            return Err(gp);
        }
        let (descriptor, mut segment) = self.system_segment(selector)?;
        let available = descriptor.kind() == 9 || descriptor.kind() == 1 && !self.s.long_mode();
        if descriptor.is_code_or_data() || !available {
            return Err(gp);
        }
        if !descriptor.present() {
            return Err(Exception::np(code(selector)));
        }
        let byte = (descriptor.raw >> 40) as u8 | 2;
        self.system_write::<u8>(descriptor.addr.wrapping_add(5), byte)?;
        segment.access |= 2;
        self.s.tr = segment;
        Ok(())
    }

    /// A system descriptor of the GDT: 16 bytes in long mode.
    fn system_segment(&mut self, selector: u16) -> Fallible<(Descriptor, Segment)> {
        let descriptor = self.descriptor_or_gp(selector)?;
        let mut segment = descriptor.segment(selector);
        if self.s.long_mode() {
            if u32::from(selector & !7) + 15 > u32::from(self.s.gdtr.limit) {
                return Err(Exception::gp(code(selector)));
            }
            let high = self.system_read::<u64>(descriptor.addr.wrapping_add(8))?;
            if high >> 40 & 0x1f != 0 {
                return Err(Exception::gp(code(selector)));
            }
            segment.base |= high << 32;
            self.check_canonical(segment.base)
                .map_err(|_| Exception::gp(code(selector)))?;
        }
        Ok((descriptor, segment))
    }

    /// Virtual-8086 mode's segments.
    pub(crate) fn enter_v8086(&mut self, selectors: [u16; 6]) {
        self.s.flags |= rflags::VM;
        self.s.cpl = 3;
        for (index, selector) in selectors.into_iter().enumerate() {
            self.s.seg[index] = self.real_segment(index, selector);
        }
        self.update_mode();
    }
}
