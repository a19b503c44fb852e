//! Delivery of exceptions and interrupts, and IRET (Intel SDM vol. 3, chapter 6).

use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::segment::{Descriptor, code};
use crate::state::{Segment, cr4, gpr, rflags, seg};

/// Where an event comes from: it decides on privilege checks and error codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A fault or trap of the CPU.
    Exception,
    /// INT n.
    Software,
    /// INT3, INTO, INT1: software, but with their own vectors.
    Trap,
    /// From outside: interrupt or NMI.
    External,
}

/// What is about to be pushed.
#[derive(Debug, Clone, Copy)]
struct Frame {
    vector: u8,
    error: Option<u32>,
    source: Source,
    /// RFLAGS image to push.
    flags: u64,
}

const CLEARED: u64 = rflags::TF | rflags::NT | rflags::RF | rflags::VM;

impl Cpu {
    /// Delivers an event: on success the next instruction is the handler's first. `rip` must
    /// hold the address to return to.
    pub(crate) fn deliver(
        &mut self,
        vector: u8,
        error: Option<u32>,
        source: Source,
    ) -> Fallible<()> {
        // A branch that just ended its block does not lead to the handler.
        self.link = std::ptr::null_mut();
        self.s.halted = false;
        let mut flags = self.s.rflags();
        let software = matches!(source, Source::Software | Source::Trap);
        if software {
            flags &= !rflags::RF;
        }
        // Faults push RF set, so that the instruction is not trapped again by its own
        // breakpoint.
        if source == Source::Exception && vector != 1 {
            flags |= rflags::RF;
        }
        let frame = Frame {
            vector,
            error,
            source,
            flags,
        };
        if !self.s.protected() && !self.s.v8086() {
            return self.deliver_real(frame);
        }
        if self.s.v8086() && source == Source::Software {
            if self.redirected(vector)? {
                return self.deliver_8086(vector);
            }
            if self.s.iopl() < 3 {
                return Err(Exception::GP0);
            }
        }
        let delivered = if self.s.long_mode() {
            self.deliver_long(frame)
        } else {
            self.deliver_protected(frame)
        };
        delivered.map_err(|mut e| {
            // EXT: not by an instruction of the program.
            if matches!(e.vector, 10..=13) && !software {
                e.code |= 1;
            }
            e
        })
    }

    fn deliver_real(&mut self, frame: Frame) -> Fallible<()> {
        let offset = u64::from(frame.vector) * 4;
        if offset + 3 > self.s.idtr.limit.into() {
            return Err(Exception::GP0);
        }
        let entry =
            self.system_read::<u32>(self.wrap_system(self.s.idtr.base.wrapping_add(offset)))?;
        let sp = self.s.gpr[gpr::RSP];
        let sp = self.push_at(sp, self.s.rflags() & 0xffff, 2)?;
        let sp = self.push_at(sp, self.s.seg[seg::CS].selector.into(), 2)?;
        let sp = self.push_at(sp, self.s.rip & 0xffff, 2)?;
        self.set_sp(sp);
        self.s.flags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        self.s.seg[seg::CS] = self.real_segment(seg::CS, (entry >> 16) as u16);
        self.s.rip = u64::from(entry & 0xffff);
        self.update_mode();
        Ok(())
    }

    /// An error code that names an IDT entry.
    fn idt_code(frame: &Frame) -> u32 {
        let ext = !matches!(frame.source, Source::Software | Source::Trap);
        u32::from(frame.vector) << 3 | 2 | u32::from(ext)
    }

    /// Turns a selector's error code into one of this event.
    fn event_code(frame: &Frame, selector: u16) -> u32 {
        let ext = !matches!(frame.source, Source::Software | Source::Trap);
        code(selector) | u32::from(ext)
    }

    fn deliver_long(&mut self, frame: Frame) -> Fallible<()> {
        let offset = u64::from(frame.vector) * 16;
        let idt_gp = Exception::gp(Self::idt_code(&frame));
        if offset + 15 > self.s.idtr.limit.into() {
            return Err(idt_gp);
        }
        let addr = self.s.idtr.base.wrapping_add(offset);
        let low = self.system_read::<u64>(addr)?;
        let high = self.system_read::<u64>(addr.wrapping_add(8))?;
        let kind = low >> 40 & 0x1f;
        if kind != 14 && kind != 15 {
            return Err(idt_gp);
        }
        let gate_dpl = (low >> 45) as u8 & 3;
        if matches!(frame.source, Source::Software | Source::Trap) && gate_dpl < self.s.cpl {
            return Err(idt_gp);
        }
        if low >> 47 & 1 == 0 {
            return Err(Exception::np(Self::idt_code(&frame)));
        }
        let selector = (low >> 16) as u16;
        let rip = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        let (descriptor, new_cpl) = self.gate_code(&frame, selector)?;
        if !descriptor.long() || descriptor.big() {
            return Err(Exception::gp(Self::event_code(&frame, selector)));
        }
        let ist = low >> 32 & 7;
        let switch = new_cpl != self.s.cpl;
        let mut sp = if ist != 0 {
            self.tss_stack64(28 + 8 * ist)?
        } else if switch {
            self.tss_stack64(4 + 8 * u64::from(new_cpl))?
        } else {
            self.s.gpr[gpr::RSP]
        };
        sp &= !15;
        self.check_canonical(rip).map_err(|_| Exception::GP0)?;
        let values = [
            self.s.seg[seg::SS].selector.into(),
            self.s.gpr[gpr::RSP],
            frame.flags,
            self.s.seg[seg::CS].selector.into(),
            self.s.rip,
        ];
        self.mark_accessed(&descriptor)?;
        // The frame is written with the rights of the new privilege level.
        let mode = if new_cpl == 3 { 2 } else { self.system_mode() };
        let mut bytes = [0; 48];
        let mut len = 0;
        if let Some(error) = frame.error {
            bytes[..8].copy_from_slice(&u64::from(error).to_le_bytes());
            len = 8;
        }
        for value in values.into_iter().rev() {
            bytes[len..len + 8].copy_from_slice(&u64::to_le_bytes(value));
            len += 8;
        }
        let to = sp.wrapping_sub(len as u64);
        let written = self.write_frame(to, &bytes[..len], mode);
        written.map_err(|e| if e.vector == 13 { Exception::ss(0) } else { e })?;
        if switch {
            self.s.seg[seg::SS] = Segment {
                access: Segment::UNUSABLE | u32::from(new_cpl) << 5 | 0x4093,
                selector: new_cpl.into(),
                ..Segment::default()
            };
        }
        self.s.flags &= !CLEARED;
        if kind == 14 {
            self.s.flags &= !rflags::IF;
        }
        self.enter_code(&descriptor, selector, new_cpl, rip)?;
        self.s.gpr[gpr::RSP] = to;
        Ok(())
    }

    /// Checks the code segment of an interrupt or trap gate; its descriptor and the privilege
    /// level the handler runs at.
    fn gate_code(&mut self, frame: &Frame, selector: u16) -> Fallible<(Descriptor, u8)> {
        let ext = Self::event_code(frame, 0);
        if selector & !3 == 0 {
            return Err(Exception::gp(ext));
        }
        let gp = Exception::gp(Self::event_code(frame, selector));
        let descriptor = self.descriptor(selector)?.ok_or(gp)?;
        if !descriptor.is_code() || descriptor.dpl() > self.s.cpl {
            return Err(gp);
        }
        if !descriptor.present() {
            return Err(Exception::np(Self::event_code(frame, selector)));
        }
        let cpl = if descriptor.conforming() {
            self.s.cpl
        } else {
            descriptor.dpl()
        };
        Ok((descriptor, cpl))
    }

    /// A stack pointer out of the 64-bit TSS.
    pub(crate) fn tss_stack64(&mut self, offset: u64) -> Fallible<u64> {
        let tr = self.s.tr;
        if offset + 7 > tr.limit.into() {
            return Err(Exception::ts(code(tr.selector)));
        }
        let sp = self.system_read::<u64>(tr.base.wrapping_add(offset))?;
        self.check_canonical(sp).map_err(|_| Exception::ss(0))?;
        Ok(sp)
    }

    /// SS and ESP of an inner privilege level out of the 16 or 32-bit TSS.
    pub(crate) fn tss_stack(&mut self, cpl: u8) -> Fallible<(u16, u64)> {
        let tr = self.s.tr;
        let ts = Exception::ts(code(tr.selector));
        let wide = tr.kind() & 8 != 0;
        let (offset, last) = if wide {
            (4 + 8 * u64::from(cpl), 5)
        } else {
            (2 + 4 * u64::from(cpl), 3)
        };
        if offset + last > tr.limit.into() {
            return Err(ts);
        }
        let addr = self.wrap_system(tr.base.wrapping_add(offset));
        if wide {
            let sp = self.system_read::<u32>(addr)?;
            let ss = self.system_read::<u16>(self.wrap_system(addr.wrapping_add(4)))?;
            Ok((ss, sp.into()))
        } else {
            let sp = self.system_read::<u16>(addr)?;
            let ss = self.system_read::<u16>(self.wrap_system(addr.wrapping_add(2)))?;
            Ok((ss, sp.into()))
        }
    }

    /// The stack segment of an inner privilege level: #TS where anything else would be #GP.
    pub(crate) fn inner_stack(&mut self, selector: u16, cpl: u8) -> Fallible<Segment> {
        if selector & !3 == 0 {
            return Err(Exception::ts(0));
        }
        self.checked_segment(seg::SS, selector, cpl).map_err(|e| {
            if e.vector == 13 {
                Exception::ts(e.code)
            } else {
                e
            }
        })
    }

    fn deliver_protected(&mut self, frame: Frame) -> Fallible<()> {
        let offset = u64::from(frame.vector) * 8;
        let idt_gp = Exception::gp(Self::idt_code(&frame));
        if offset + 7 > self.s.idtr.limit.into() {
            return Err(idt_gp);
        }
        let addr = self.wrap_system(self.s.idtr.base.wrapping_add(offset));
        let gate = self.system_read::<u64>(addr)?;
        let kind = gate >> 40 & 0x1f;
        if !matches!(kind, 5 | 6 | 7 | 14 | 15) {
            return Err(idt_gp);
        }
        let gate_dpl = (gate >> 45) as u8 & 3;
        if matches!(frame.source, Source::Software | Source::Trap) && gate_dpl < self.s.cpl {
            return Err(idt_gp);
        }
        if gate >> 47 & 1 == 0 {
            return Err(Exception::np(Self::idt_code(&frame)));
        }
        let selector = (gate >> 16) as u16;
        if kind == 5 {
            return self.task_gate(selector, frame.error);
        }
        let bytes = if kind & 8 != 0 { 4 } else { 2 };
        let rip = gate & 0xffff
            | if bytes == 4 {
                gate >> 32 & 0xffff_0000
            } else {
                0
            };
        let (descriptor, new_cpl) = self.gate_code(&frame, selector)?;
        let from_v86 = self.s.v8086();
        if from_v86 && new_cpl != 0 {
            return Err(Exception::gp(Self::event_code(&frame, selector)));
        }
        self.check_entry(&descriptor, rip)?;
        self.mark_accessed(&descriptor)?;

        let old = (
            self.s.seg[seg::SS].selector,
            self.s.gpr[gpr::RSP],
            self.s.seg[seg::CS].selector,
            self.s.rip,
        );
        // Everything that can fail is done before anything changes: the new stack is tried
        // on a copy of the state that is put back on failure.
        let saved = (self.s.seg, self.s.flags, self.s.cpl, self.s.gpr[gpr::RSP]);
        let result = self.push_protected(&frame, bytes, new_cpl, from_v86, old);
        if let Err(e) = result {
            (self.s.seg, self.s.flags, self.s.cpl, self.s.gpr[gpr::RSP]) = saved;
            self.update_mode();
            return Err(e);
        }
        self.s.flags &= !CLEARED;
        if kind & 1 == 0 {
            self.s.flags &= !rflags::IF;
        }
        self.enter_code(&descriptor, selector, new_cpl, rip)
    }

    fn push_protected(
        &mut self,
        frame: &Frame,
        bytes: usize,
        new_cpl: u8,
        from_v86: bool,
        (old_ss, old_sp, old_cs, old_rip): (u16, u64, u16, u64),
    ) -> Fallible<()> {
        let v86_segs = [
            self.s.seg[seg::GS].selector,
            self.s.seg[seg::FS].selector,
            self.s.seg[seg::DS].selector,
            self.s.seg[seg::ES].selector,
        ];
        let mut sp = self.s.gpr[gpr::RSP];
        if new_cpl != self.s.cpl || from_v86 {
            let (ss, new_sp) = self.tss_stack(new_cpl)?;
            self.s.flags &= !rflags::VM;
            let stack = self.inner_stack(ss, new_cpl)?;
            self.s.cpl = new_cpl;
            self.s.seg[seg::SS] = stack;
            self.update_mode();
            self.set_sp(new_sp);
            sp = self.s.gpr[gpr::RSP];
            if from_v86 {
                for selector in v86_segs {
                    sp = self.push_at(sp, selector.into(), bytes)?;
                }
                for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
                    self.s.seg[index] = Segment {
                        access: Segment::UNUSABLE,
                        ..Segment::default()
                    };
                }
            }
            sp = self.push_at(sp, old_ss.into(), bytes)?;
            sp = self.push_at(sp, old_sp, bytes)?;
        }
        sp = self.push_at(sp, frame.flags, bytes)?;
        sp = self.push_at(sp, old_cs.into(), bytes)?;
        sp = self.push_at(sp, old_rip, bytes)?;
        if let Some(error) = frame.error {
            sp = self.push_at(sp, error.into(), bytes)?;
        }
        self.set_sp(sp);
        Ok(())
    }

    /// IRET.
    pub(crate) fn iret(&mut self, bytes: usize) -> Fallible<()> {
        let unmask = |cpu: &mut Self| {
            cpu.s.nmi_masked = false;
            cpu.update_attention_mask();
        };
        let step = bytes as u64;
        if !self.s.protected() {
            let virtual_if = self.s.v8086() && self.s.iopl() < 3;
            if virtual_if && (self.s.cr4 & cr4::VME == 0 || bytes != 2) {
                return Err(Exception::GP0);
            }
            let sp = self.s.gpr[gpr::RSP];
            let rip = self.peek_at(sp, bytes)?;
            let selector = self.peek_at(sp.wrapping_add(step), bytes)? as u16;
            let flags = self.peek_at(sp.wrapping_add(2 * step), bytes)?;
            if rip > u64::from(self.s.seg[seg::CS].limit) {
                return Err(Exception::GP0);
            }
            if virtual_if {
                self.check_virtual_flags(flags)?;
            }
            self.set_sp(sp.wrapping_add(3 * step));
            self.s.seg[seg::CS] = self.real_segment(seg::CS, selector);
            self.s.rip = rip;
            let mut keep = rflags::VM | rflags::VIF | rflags::VIP;
            if self.s.v8086() {
                keep |= rflags::IOPL;
            }
            if virtual_if {
                self.load_virtual_flags(flags);
            } else {
                self.load_flags(flags, bytes, keep);
            }
            unmask(self);
            self.update_mode();
            return Ok(());
        }
        if self.s.flags & rflags::NT != 0 {
            if self.s.long_mode() {
                return Err(Exception::GP0);
            }
            self.task_return()?;
            unmask(self);
            return Ok(());
        }
        let sp = self.s.gpr[gpr::RSP];
        let rip = self.peek_at(sp, bytes)?;
        let selector = self.peek_at(sp.wrapping_add(step), bytes)? as u16;
        let flags = self.peek_at(sp.wrapping_add(2 * step), bytes)?;
        let old_cpl = self.s.cpl;
        if flags & rflags::VM != 0 && bytes == 4 && old_cpl == 0 && !self.s.long_mode() {
            self.iret_to_v8086(sp, rip, selector, flags)?;
            unmask(self);
            return Ok(());
        }
        // What the current privilege may not change.
        let mut keep = rflags::VM | rflags::VIF | rflags::VIP;
        if old_cpl == 0 {
            keep &= !(rflags::VIF | rflags::VIP);
        } else {
            keep |= rflags::IOPL;
        }
        if old_cpl > self.s.iopl() {
            keep |= rflags::IF;
        }
        let (descriptor, rpl) = self.return_code(selector)?;
        if rpl == old_cpl && self.mode & 3 != 2 {
            self.check_entry(&descriptor, rip)?;
            self.enter_code(&descriptor, selector, rpl, rip)?;
            self.set_sp(sp.wrapping_add(3 * step));
        } else {
            let new_sp = self.peek_at(sp.wrapping_add(3 * step), bytes)?;
            let new_ss = self.peek_at(sp.wrapping_add(4 * step), bytes)? as u16;
            self.return_outer(&descriptor, selector, rpl, rip, new_ss, new_sp)?;
        }
        self.load_flags(flags, bytes, keep);
        unmask(self);
        self.update_mode();
        Ok(())
    }

    fn iret_to_v8086(&mut self, sp: u64, rip: u64, cs: u16, flags: u64) -> Fallible<()> {
        let mut values = [0; 6];
        for (i, value) in values.iter_mut().enumerate() {
            *value = self.peek_at(sp.wrapping_add(12 + 4 * i as u64), 4)?;
        }
        let [new_sp, ss, es, ds, fs, gs] = values;
        self.load_flags(flags, 4, 0);
        self.enter_v8086([es as u16, cs, ss as u16, ds as u16, fs as u16, gs as u16]);
        self.s.rip = rip & 0xffff;
        self.s.gpr[gpr::RSP] = new_sp;
        Ok(())
    }

    /// Sets RFLAGS from a value popped with operand size `bytes`, except the bits in `keep`.
    pub(crate) fn load_flags(&mut self, value: u64, bytes: usize, keep: u64) {
        let mut writable = 0x0000_7fd5
            | rflags::RF
            | rflags::VM
            | rflags::AC
            | rflags::VIF
            | rflags::VIP
            | rflags::ID;
        if bytes == 2 {
            writable &= 0xffff;
        }
        writable &= !keep;
        let new = self.s.rflags() & !writable | value & writable | 2;
        self.s.set_status(new);
        self.s.flags = new & !rflags::STATUS;
        if self.s.flags & rflags::TF != 0 {
            self.attention.raise(crate::attention::Attention::SELF);
        }
        self.update_attention_mask();
    }
}
