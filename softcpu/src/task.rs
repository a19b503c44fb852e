//! Task switches through the TSS (Intel SDM vol. 3, chapter 7).

use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::segment::{Descriptor, code};
use crate::state::{Segment, gpr, rflags, seg};

/// How a task switch was asked for: it decides about busy bits and the back link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Switch {
    Jump,
    Call,
    Return,
}

/// DR6: a switch to a task with the T bit.
const BT: u64 = 1 << 15;

impl Cpu {
    /// JMP or CALL far to something that is not a code segment.
    pub(crate) fn far_system(
        &mut self,
        selector: u16,
        descriptor: &Descriptor,
        bytes: usize,
        call: bool,
    ) -> Fallible<()> {
        let _ = bytes;
        let gp = Exception::gp(code(selector));
        let (cpl, rpl) = (self.s.cpl, selector as u8 & 3);
        let long = self.s.long_mode();
        let way = if call { Switch::Call } else { Switch::Jump };
        match descriptor.kind() {
            4 if !long => self.call_gate(selector, descriptor, 2, call),
            12 => self.call_gate(selector, descriptor, if long { 8 } else { 4 }, call),
            1 | 9 if !long => {
                if descriptor.dpl() < cpl || descriptor.dpl() < rpl {
                    return Err(gp);
                }
                self.switch_task(selector, way, None)
            }
            5 if !long => {
                if descriptor.dpl() < cpl || descriptor.dpl() < rpl {
                    return Err(gp);
                }
                if !descriptor.present() {
                    return Err(Exception::np(code(selector)));
                }
                self.switch_task((descriptor.raw >> 16) as u16, way, None)
            }
            _ => Err(gp),
        }
    }

    /// Through a call gate whose stack words have `bytes`.
    fn call_gate(
        &mut self,
        selector: u16,
        gate: &Descriptor,
        bytes: usize,
        call: bool,
    ) -> Fallible<()> {
        let (cpl, rpl) = (self.s.cpl, selector as u8 & 3);
        let gate_gp = Exception::gp(code(selector));
        if gate.dpl() < cpl || gate.dpl() < rpl {
            return Err(gate_gp);
        }
        if !gate.present() {
            return Err(Exception::np(code(selector)));
        }
        let mut rip = gate.raw & 0xffff | gate.raw >> 32 & 0xffff_0000;
        if bytes == 2 {
            rip &= 0xffff;
        }
        if bytes == 8 {
            let high = self.system_read::<u64>(gate.addr.wrapping_add(8))?;
            if high >> 40 & 0x1f != 0 {
                return Err(gate_gp);
            }
            rip |= high << 32;
        }
        let target = (gate.raw >> 16) as u16;
        if target & !3 == 0 {
            return Err(Exception::GP0);
        }
        let gp = Exception::gp(code(target));
        let descriptor = self.descriptor_or_gp(target)?;
        if !descriptor.is_code() || descriptor.dpl() > cpl {
            return Err(gp);
        }
        if bytes == 8 && (!descriptor.long() || descriptor.big()) {
            return Err(gp);
        }
        if !descriptor.present() {
            return Err(Exception::np(code(target)));
        }
        self.check_entry(&descriptor, rip)?;
        let inner = !descriptor.conforming() && descriptor.dpl() < cpl;
        if !call {
            if inner {
                return Err(gp);
            }
            return self.enter_code(&descriptor, target, cpl, rip);
        }
        let (old_cs, old_rip) = (self.s.seg[seg::CS].selector, self.s.rip);
        if !inner {
            let sp = self.push_at(self.s.gpr[gpr::RSP], old_cs.into(), bytes)?;
            let sp = self.push_at(sp, old_rip, bytes)?;
            self.enter_code(&descriptor, target, cpl, rip)?;
            self.set_sp(sp);
            return Ok(());
        }
        let new_cpl = descriptor.dpl();
        let (old_ss, old_sp) = (self.s.seg[seg::SS].selector, self.s.gpr[gpr::RSP]);
        if bytes == 8 {
            let mut sp = self.tss_stack64(4 + 8 * u64::from(new_cpl))?;
            let mode = self.system_mode();
            for value in [old_ss.into(), old_sp, old_cs.into(), old_rip] {
                sp = sp.wrapping_sub(8);
                self.write_frame(sp, &u64::to_le_bytes(value), mode)?;
            }
            self.s.seg[seg::SS] = Segment {
                access: Segment::UNUSABLE | u32::from(new_cpl) << 5 | 0x4093,
                selector: new_cpl.into(),
                ..Segment::default()
            };
            self.enter_code(&descriptor, target, new_cpl, rip)?;
            self.s.gpr[gpr::RSP] = sp;
            return Ok(());
        }
        let count = (gate.raw >> 32) as usize & 31;
        let mut parameters = [0; 31];
        for (i, value) in parameters.iter_mut().enumerate().take(count) {
            *value = self.peek_at(old_sp.wrapping_add((i * bytes) as u64), bytes)?;
        }
        let (ss, new_sp) = self.tss_stack(new_cpl)?;
        let stack = self.inner_stack(ss, new_cpl)?;
        let saved = (self.s.seg, self.s.cpl, old_sp);
        self.s.cpl = new_cpl;
        self.s.seg[seg::SS] = stack;
        self.update_mode();
        let pushed = (|| {
            let mut sp = self.push_at(new_sp, old_ss.into(), bytes)?;
            sp = self.push_at(sp, old_sp, bytes)?;
            for &value in parameters[..count].iter().rev() {
                sp = self.push_at(sp, value, bytes)?;
            }
            sp = self.push_at(sp, old_cs.into(), bytes)?;
            self.push_at(sp, old_rip, bytes)
        })();
        match pushed {
            Ok(sp) => {
                self.set_sp(sp);
                self.enter_code(&descriptor, target, new_cpl, rip)
            }
            Err(e) => {
                (self.s.seg, self.s.cpl, self.s.gpr[gpr::RSP]) = saved;
                self.update_mode();
                Err(e)
            }
        }
    }

    /// An interrupt through a task gate.
    pub(crate) fn task_gate(&mut self, selector: u16, error: Option<u32>) -> Fallible<()> {
        self.switch_task(selector, Switch::Call, error)
    }

    /// IRET with NT set.
    pub(crate) fn task_return(&mut self) -> Fallible<()> {
        let link = self.system_read::<u16>(self.wrap_system(self.s.tr.base))?;
        self.switch_task(link, Switch::Return, None)
    }

    /// Switches to the task whose TSS `selector` names.
    pub(crate) fn switch_task(
        &mut self,
        selector: u16,
        way: Switch,
        error: Option<u32>,
    ) -> Fallible<()> {
        let bad = if way == Switch::Return {
            Exception::ts(code(selector))
        } else {
            Exception::gp(code(selector))
        };
        if selector & 4 != 0 || selector & !3 == 0 {
            return Err(bad);
        }
        let descriptor = self.descriptor(selector)?.ok_or(bad)?;
        let wanted: [u32; 2] = if way == Switch::Return {
            [3, 11]
        } else {
            [1, 9]
        };
        if descriptor.is_code_or_data() || !wanted.contains(&descriptor.kind()) {
            return Err(bad);
        }
        if !descriptor.present() {
            return Err(Exception::np(code(selector)));
        }
        let mut new_tr = descriptor.segment(selector);
        let wide = new_tr.kind() & 8 != 0;
        if new_tr.limit < if wide { 103 } else { 43 } {
            return Err(Exception::ts(code(selector)));
        }
        let next = self.read_task(new_tr.base, wide)?;
        self.save_task(way)?;

        let old_tr = self.s.tr;
        let busy = |cpu: &mut Self, sel: u16, set: bool| -> Fallible<()> {
            if let Some(d) = cpu.descriptor(sel)? {
                let byte = (d.raw >> 40) as u8;
                let byte = if set { byte | 2 } else { byte & !2 };
                cpu.system_write::<u8>(d.addr.wrapping_add(5), byte)?;
            }
            Ok(())
        };
        if way != Switch::Call {
            busy(self, old_tr.selector, false)?;
        }
        if way != Switch::Return {
            busy(self, selector, true)?;
        }
        if way == Switch::Call {
            self.system_write::<u16>(self.wrap_system(new_tr.base), old_tr.selector)?;
        }
        new_tr.access |= 2;
        self.s.tr = new_tr;
        self.enter_task(&next, way)?;
        if let Some(error) = error {
            self.push(error.into(), if wide { 4 } else { 2 })?;
        }
        Ok(())
    }

    fn read_task(&mut self, base: u64, wide: bool) -> Fallible<TaskImage> {
        let mut image = TaskImage {
            wide,
            ..TaskImage::default()
        };
        let at = |cpu: &mut Self, offset: u64| -> Fallible<u32> {
            let addr = cpu.wrap_system(base.wrapping_add(offset));
            if wide {
                cpu.system_read::<u32>(addr)
            } else {
                cpu.system_read::<u16>(addr).map(u32::from)
            }
        };
        let (step, start) = if wide { (4, 32) } else { (2, 14) };
        image.eip = at(self, start)?;
        image.eflags = at(self, start + step)?;
        for (i, value) in image.gpr.iter_mut().enumerate() {
            *value = at(self, start + step * (2 + i as u64))?;
        }
        let segments = if wide { 6 } else { 4 };
        for (i, value) in image.seg.iter_mut().enumerate().take(segments) {
            *value = at(self, start + step * (10 + i as u64))? as u16;
        }
        image.ldt = at(self, start + step * (10 + segments as u64))? as u16;
        if wide {
            image.cr3 = at(self, 28)?;
            image.trap = at(self, 100)? & 1 != 0;
        }
        Ok(image)
    }

    /// Writes the running task's registers into its TSS.
    fn save_task(&mut self, way: Switch) -> Fallible<()> {
        let tr = self.s.tr;
        let wide = tr.kind() & 8 != 0;
        let (step, start) = if wide { (4, 32) } else { (2, 14) };
        let mut flags = self.s.rflags();
        if way == Switch::Return {
            flags &= !rflags::NT;
        }
        let mut values = [0; 16];
        values[0] = self.s.rip;
        values[1] = flags;
        values[2..10].copy_from_slice(&self.s.gpr[..8]);
        let segments = if wide { 6 } else { 4 };
        for i in 0..segments {
            values[10 + i] = self.s.seg[i].selector.into();
        }
        for (i, &value) in values.iter().enumerate().take(10 + segments) {
            let addr = self.wrap_system(tr.base.wrapping_add(start + step * i as u64));
            if wide {
                self.system_write::<u32>(addr, value as u32)?;
            } else {
                self.system_write::<u16>(addr, value as u16)?;
            }
        }
        Ok(())
    }

    /// Makes a task image the running state. Faults from here on belong to the new task.
    fn enter_task(&mut self, image: &TaskImage, way: Switch) -> Fallible<()> {
        if image.wide && self.paging() {
            self.write_cr3(image.cr3.into(), false)?;
        }
        self.s.rip = image.eip.into();
        for (register, &value) in self.s.gpr.iter_mut().zip(&image.gpr) {
            *register = if image.wide {
                value.into()
            } else {
                *register & 0xffff_0000 | u64::from(value)
            };
        }
        self.s.flags &= !rflags::VM;
        self.load_flags(image.eflags.into(), if image.wide { 4 } else { 2 }, 0);
        if way == Switch::Call {
            self.s.flags |= rflags::NT;
        }
        self.s.cr0 |= crate::state::cr0::TS;
        self.s.dr7 &= !0x155;
        self.debug_registers_changed();
        for segment in &mut self.s.seg {
            *segment = Segment {
                access: Segment::UNUSABLE,
                ..Segment::default()
            };
        }
        self.s.ldtr = Segment {
            access: Segment::UNUSABLE,
            ..Segment::default()
        };
        let ts = |e: Exception| {
            if e.vector == 13 || e.vector == 11 && e.code == code(image.ldt) {
                Exception::ts(e.code)
            } else {
                e
            }
        };
        if self.s.flags & rflags::VM != 0 {
            let [es, cs, ss, ds, fs, gs] = image.seg;
            self.load_ldt(image.ldt).map_err(ts)?;
            self.enter_v8086([es, cs, ss, ds, fs, gs]);
            if image.trap {
                self.note_trap(BT);
            }
            return Ok(());
        }
        self.s.cpl = image.seg[seg::CS] as u8 & 3;
        self.load_ldt(image.ldt).map_err(ts)?;
        let selector = image.seg[seg::CS];
        let bad = Exception::ts(code(selector));
        let descriptor = self.descriptor(selector)?.ok_or(bad)?;
        let cpl = self.s.cpl;
        let allowed = if descriptor.conforming() {
            descriptor.dpl() <= cpl
        } else {
            descriptor.dpl() == cpl
        };
        if !descriptor.is_code() || !allowed {
            return Err(bad);
        }
        if !descriptor.present() {
            return Err(Exception::np(code(selector)));
        }
        self.enter_code(&descriptor, selector, cpl, image.eip.into())?;
        for index in [seg::SS, seg::ES, seg::DS, seg::FS, seg::GS] {
            let segment = self
                .checked_segment(index, image.seg[index], cpl)
                .map_err(ts)?;
            self.s.seg[index] = segment;
        }
        self.update_mode();
        if image.eip > self.s.seg[seg::CS].limit {
            return Err(Exception::GP0);
        }
        if image.trap {
            self.note_trap(BT);
        }
        Ok(())
    }
}

/// The dynamic part of a TSS.
#[derive(Debug, Default)]
struct TaskImage {
    wide: bool,
    cr3: u32,
    eip: u32,
    eflags: u32,
    gpr: [u32; 8],
    seg: [u16; 6],
    ldt: u16,
    /// The T bit: a debug trap follows the switch.
    trap: bool,
}
