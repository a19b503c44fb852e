//! Linear memory as instructions see it: TLB hit path inline, everything else out of line.

use std::sync::atomic::Ordering;

use crate::cpu::Cpu;
use crate::exception::{Exception, Fallible};
use crate::machine::Mail;
use crate::paging::{Access, Translation};
use crate::state::{cr4, seg};
use crate::tlb::{MODE_ALIGNED, SLOW, slot};

/// Unsigned integers of the sizes the CPU handles.
pub trait Word: Copy + Default + Eq + std::fmt::Debug + 'static {
    /// Size in bytes.
    const BYTES: usize;
    /// Size in bits.
    const BITS: u32 = Self::BYTES as u32 * 8;
    /// Cuts a value to this size.
    fn cut(value: u64) -> Self;
    /// Zero-extends.
    fn wide(self) -> u64;
    /// Sign-extends.
    fn sign(self) -> i64;
}

macro_rules! word {
    ($($u:ty, $i:ty;)*) => {$(
        impl Word for $u {
            const BYTES: usize = size_of::<$u>();
            #[inline(always)]
            fn cut(value: u64) -> Self {
                value as $u
            }
            #[inline(always)]
            fn wide(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn sign(self) -> i64 {
                self as $i as i64
            }
        }
    )*};
}
word! { u8, i8; u16, i16; u32, i32; u64, i64; }

/// Mark in `Exception::cr2` of a #GP(0): the address was not canonical, so that an access
/// through SS turns it into #SS(0).
pub(crate) const NOT_CANONICAL: u64 = 1;

/// Where a write lands.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// RAM, in one piece.
    Ram(*mut u8),
    /// RAM of a page that holds code: `Cpu::code_written` with the guest-physical address
    /// after the write.
    Code(*mut u8, u64),
    /// Not RAM.
    Mmio,
    /// Runs over a page's end.
    Split,
}

/// #AC(0) unless `addr` is aligned as an operand of `len` bytes must be (Intel SDM vol. 3,
/// table 6-7).
fn check_alignment(addr: u64, len: usize) -> Fallible<()> {
    let mask = match len {
        2 | 14 | 94 => 1,
        4 | 6 | 28 | 108 => 3,
        8 | 10 => 7,
        16 | 32 => 15,
        _ => 0,
    };
    if addr & mask == 0 {
        Ok(())
    } else {
        Err(Exception::AC0)
    }
}

impl Cpu {
    /// Host address of a word that the guest may read directly.
    #[inline(always)]
    pub(crate) fn hit_read<T: Word>(&self, addr: u64) -> Option<*const T> {
        // SAFETY: `tlb` points into `tlbs`; slot() is below the arrays' size.
        let entry = unsafe { (*self.tlb).read.get_unchecked(slot(addr)) };
        // The page of the last byte: a word that runs over the page's end never matches,
        // because the next page has another slot.
        (entry.tag == addr.wrapping_add(T::BYTES as u64 - 1) & !0xfff)
            .then(|| addr.wrapping_add(entry.add) as *const T)
    }

    /// Host address of a word that the guest may write directly.
    #[inline(always)]
    pub(crate) fn hit_write<T: Word>(&self, addr: u64) -> Option<*mut T> {
        // SAFETY: as in `hit_read`.
        let entry = unsafe { (*self.tlb).write.get_unchecked(slot(addr)) };
        (entry.tag == addr.wrapping_add(T::BYTES as u64 - 1) & !0xfff)
            .then(|| addr.wrapping_add(entry.add) as *mut T)
    }

    /// Reads at a linear address, with the guest's current rights.
    #[inline(always)]
    pub fn read<T: Word>(&mut self, addr: u64) -> Fallible<T> {
        if let Some(p) = self.hit_read::<T>(addr) {
            // SAFETY: a hit means the whole word is guest RAM that stays mapped until the
            // TLB entry is gone.
            return Ok(unsafe { p.read_unaligned() });
        }
        Ok(T::cut(self.read_slow(addr, T::BYTES, self.data_mode)?))
    }

    /// Writes at a linear address, with the guest's current rights.
    #[inline(always)]
    pub fn write<T: Word>(&mut self, addr: u64, value: T) -> Fallible<()> {
        if let Some(p) = self.hit_write::<T>(addr) {
            // SAFETY: as in `read`; a hit in the write part means writable.
            unsafe { p.write_unaligned(value) };
            return Ok(());
        }
        self.write_slow(addr, value.wide(), T::BYTES, self.data_mode)
    }

    /// Read-modify-write, not atomic. `f` is run once, after both rights are certain.
    #[inline(always)]
    pub(crate) fn modify<T: Word>(
        &mut self,
        addr: u64,
        f: impl FnOnce(&mut Self, T) -> T,
    ) -> Fallible<()> {
        if let Some(p) = self.hit_write::<T>(addr) {
            // SAFETY: as in `write`. `f` cannot change the mapping of host memory.
            unsafe {
                let new = f(self, p.read_unaligned());
                p.write_unaligned(new);
            }
            return Ok(());
        }
        self.check_write(addr, T::BYTES)?;
        let old = T::cut(self.read_slow(addr, T::BYTES, self.data_mode)?);
        let new = f(self, old);
        self.write_slow(addr, new.wide(), T::BYTES, self.data_mode)
    }

    /// Reads 8 bits.
    pub fn read_u8(&mut self, addr: u64) -> Fallible<u8> {
        self.read(addr)
    }
    /// Reads 16 bits.
    pub fn read_u16(&mut self, addr: u64) -> Fallible<u16> {
        self.read(addr)
    }
    /// Reads 32 bits.
    pub fn read_u32(&mut self, addr: u64) -> Fallible<u32> {
        self.read(addr)
    }
    /// Reads 64 bits.
    pub fn read_u64(&mut self, addr: u64) -> Fallible<u64> {
        self.read(addr)
    }
    /// Writes 8 bits.
    pub fn write_u8(&mut self, addr: u64, value: u8) -> Fallible<()> {
        self.write(addr, value)
    }
    /// Writes 16 bits.
    pub fn write_u16(&mut self, addr: u64, value: u16) -> Fallible<()> {
        self.write(addr, value)
    }
    /// Writes 32 bits.
    pub fn write_u32(&mut self, addr: u64, value: u32) -> Fallible<()> {
        self.write(addr, value)
    }
    /// Writes 64 bits.
    pub fn write_u64(&mut self, addr: u64, value: u64) -> Fallible<()> {
        self.write(addr, value)
    }

    /// Host address of `len` bytes of guest RAM at a linear address if they lie in one page
    /// that the guest may read (write) directly right now. `None`: use `read_bytes` or
    /// `write_bytes`, which find out why.
    #[inline]
    pub fn host_ptr(&self, addr: u64, len: usize, write: bool) -> Option<*mut u8> {
        let set = &self.tlbs.data[self.data_mode];
        let entry = if write {
            set.write[slot(addr)]
        } else {
            set.read[slot(addr)]
        };
        (entry.tag == addr & !0xfff && (addr & 0xfff) + len as u64 <= 4096)
            .then(|| addr.wrapping_add(entry.add) as *mut u8)
    }

    /// Reads `data.len()` bytes (at most 4096) at a linear address.
    pub fn read_bytes(&mut self, addr: u64, data: &mut [u8]) -> Fallible<()> {
        self.read_bytes_as(addr, data, self.data_mode)
    }

    fn read_bytes_as(&mut self, addr: u64, data: &mut [u8], mode: usize) -> Fallible<()> {
        let len = data.len();
        let first = data.len().min((4096 - (addr & 0xfff)) as usize);
        let (head, tail) = data.split_at_mut(first);
        let head_gpa = self.translate(addr, false, mode)?;
        let tail_gpa = if tail.is_empty() {
            0
        } else {
            self.translate(
                self.wrap_linear(addr.wrapping_add(first as u64)),
                false,
                mode,
            )?
        };
        if mode == MODE_ALIGNED {
            check_alignment(addr, len)?;
        }
        self.phys_read(head_gpa, head);
        self.phys_read(tail_gpa, tail);
        if self.watching {
            self.note_access(addr, len, false);
        }
        Ok(())
    }

    /// Writes `data` (at most 4096 bytes) at a linear address, all or nothing.
    pub fn write_bytes(&mut self, addr: u64, data: &[u8]) -> Fallible<()> {
        self.write_bytes_as(addr, data, self.data_mode)
    }

    fn write_bytes_as(&mut self, addr: u64, data: &[u8], mode: usize) -> Fallible<()> {
        let first = data.len().min((4096 - (addr & 0xfff)) as usize);
        let (head, tail) = data.split_at(first);
        let head_gpa = self.translate(addr, true, mode)?;
        let tail_gpa = if tail.is_empty() {
            0
        } else {
            self.translate(
                self.wrap_linear(addr.wrapping_add(first as u64)),
                true,
                mode,
            )?
        };
        if mode == MODE_ALIGNED {
            check_alignment(addr, data.len())?;
        }
        self.phys_write(head_gpa, head);
        self.phys_write(tail_gpa, tail);
        if self.watching {
            self.note_access(addr, data.len(), true);
        }
        Ok(())
    }

    /// Checks that `len` bytes (at most 4096) at a linear address may be written.
    pub fn check_write(&mut self, addr: u64, len: usize) -> Fallible<()> {
        self.translate(addr, true, self.data_mode)?;
        let last = self.wrap_linear(addr.wrapping_add(len as u64 - 1));
        if (addr ^ last) >> 12 != 0 {
            self.translate(last & !0xfff, true, self.data_mode)?;
        }
        if self.data_mode == MODE_ALIGNED {
            check_alignment(addr, len)?;
        }
        Ok(())
    }

    /// Outside 64-bit mode linear addresses have 32 bits.
    #[inline]
    pub(crate) fn wrap_linear(&self, addr: u64) -> u64 {
        if self.mode & 3 == 2 {
            addr
        } else {
            addr & 0xffff_ffff
        }
    }

    /// #GP(0) unless `addr` is canonical.
    pub(crate) fn check_canonical(&self, addr: u64) -> Fallible<()> {
        let unused = if self.s.cr4 & cr4::LA57 != 0 { 7 } else { 16 };
        if ((addr << unused) as i64 >> unused) as u64 == addr {
            Ok(())
        } else {
            Err(Exception {
                cr2: NOT_CANONICAL,
                ..Exception::GP0
            })
        }
    }

    /// Access mode of implicit supervisor accesses (descriptor tables, TSS, exception frames).
    pub(crate) fn system_mode(&self) -> usize {
        usize::from(self.s.cr4 & cr4::SMAP != 0)
    }

    /// Walks the page tables for a data access and enters the result into the TLB.
    fn translate(&mut self, addr: u64, write: bool, mode: usize) -> Fallible<u64> {
        let set = &self.tlbs.data[mode];
        let i = slot(addr);
        let (entry, aux) = if write {
            (&set.write[i], &set.write_aux[i])
        } else {
            (&set.read[i], &set.read_aux[i])
        };
        if entry.tag & !SLOW == addr & !0xfff {
            let gpa = aux.gpa() | addr & 0xfff;
            // A page that holds no code any more may be written directly again.
            let again = write
                && entry.tag & SLOW != 0
                && self
                    .slots
                    .find(gpa)
                    .is_some_and(|s| !s.readonly && s.code_map(gpa).load(Ordering::Acquire) == 0);
            if !again {
                return Ok(gpa);
            }
        }
        self.check_canonical(addr)?;
        let Translation { gpa, global, size } = self.walk(
            addr,
            Access {
                write,
                fetch: false,
                user: mode >= 2,
                smap: mode == 1,
            },
        )?;
        let mut host = std::ptr::null_mut();
        let mut slow = self.watching && self.page_watched(addr);
        if let Some(slot) = self.slots.find(gpa) {
            let page = gpa & !0xfff;
            // SAFETY: the page lies inside the slot, which is made of whole pages.
            host = unsafe { slot.host.add((page - slot.gpa) as usize) };
            if write {
                slow |= slot.readonly || slot.code_map(page).load(Ordering::Acquire) != 0;
                if !slot.readonly {
                    slot.mark_dirty(page);
                }
            }
        }
        self.tlbs
            .fill(mode, write, addr, gpa, host, slow, global, size);
        Ok(gpa)
    }

    /// Guest-physical address of code at a linear address.
    pub(crate) fn translate_fetch(&mut self, addr: u64) -> Fallible<u64> {
        let user = self.s.cpl == 3;
        let entry = &self.tlbs.fetch[usize::from(user)][slot(addr)];
        if entry.tag == addr & !0xfff {
            return Ok(entry.to.gpa() | addr & 0xfff);
        }
        self.check_canonical(addr)?;
        let Translation { gpa, global, size } = self.walk(
            addr,
            Access {
                write: false,
                fetch: true,
                user,
                smap: false,
            },
        )?;
        if addr >> 63 != 0 && !global {
            self.cache.local_upper();
        }
        self.tlbs.fill_fetch(user, addr, gpa, global, size);
        Ok(gpa)
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn read_slow(&mut self, addr: u64, len: usize, mode: usize) -> Fallible<u64> {
        let mut data = [0; 8];
        self.read_bytes_as(addr, &mut data[..len], mode)?;
        Ok(u64::from_le_bytes(data))
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn write_slow(
        &mut self,
        addr: u64,
        value: u64,
        len: usize,
        mode: usize,
    ) -> Fallible<()> {
        self.write_bytes_as(addr, &value.to_le_bytes()[..len], mode)
    }

    /// Writes a stack frame with the rights of access mode `mode`.
    pub(crate) fn write_frame(&mut self, addr: u64, data: &[u8], mode: usize) -> Fallible<()> {
        self.write_bytes_as(addr, data, mode)
    }

    /// Implicit supervisor read.
    pub(crate) fn system_read<T: Word>(&mut self, addr: u64) -> Fallible<T> {
        Ok(T::cut(self.read_slow(
            addr,
            T::BYTES,
            self.system_mode(),
        )?))
    }

    /// Implicit supervisor write.
    pub(crate) fn system_write<T: Word>(&mut self, addr: u64, value: T) -> Fallible<()> {
        self.write_slow(addr, value.wide(), T::BYTES, self.system_mode())
    }

    /// Finds out where a locked access goes, after all checks.
    #[inline]
    pub(crate) fn locate_write(&mut self, addr: u64, len: usize) -> Fallible<Target> {
        if let Some(p) = self.host_ptr(addr, len, true) {
            return Ok(Target::Ram(p));
        }
        self.locate_write_slow(addr, len)
    }

    #[cold]
    fn locate_write_slow(&mut self, addr: u64, len: usize) -> Fallible<Target> {
        if (addr & 0xfff) + len as u64 > 4096 {
            self.check_write(addr, len)?;
            return Ok(Target::Split);
        }
        let gpa = self.translate(addr, true, self.data_mode)?;
        if self.data_mode == MODE_ALIGNED {
            check_alignment(addr, len)?;
        }
        if self.watching {
            self.note_access(addr, len, true);
        }
        Ok(match self.slots.find(gpa) {
            Some(slot) if !slot.readonly => {
                // SAFETY: gpa lies inside the slot.
                let p = unsafe { slot.host.add((gpa - slot.gpa) as usize) };
                if slot.code_map(gpa).load(Ordering::Acquire) != 0 {
                    Target::Code(p, gpa)
                } else {
                    Target::Ram(p)
                }
            }
            _ => Target::Mmio,
        })
    }

    /// Reads physical memory within one page: RAM, local APIC or bus.
    pub(crate) fn phys_read(&mut self, gpa: u64, data: &mut [u8]) {
        if data.is_empty() {
            return;
        }
        if let Some(host) = self.slots.host(gpa) {
            // SAFETY: inside one page of a slot, and slots are made of whole pages. Word sizes
            // go in one access, so that aligned ones stay atomic.
            unsafe {
                match data {
                    [_] => data[0] = host.read(),
                    [_, _] => {
                        data.copy_from_slice(&host.cast::<u16>().read_unaligned().to_ne_bytes())
                    }
                    [_, _, _, _] => {
                        data.copy_from_slice(&host.cast::<u32>().read_unaligned().to_ne_bytes())
                    }
                    [_, _, _, _, _, _, _, _] => {
                        data.copy_from_slice(&host.cast::<u64>().read_unaligned().to_ne_bytes())
                    }
                    _ => std::ptr::copy_nonoverlapping(host, data.as_mut_ptr(), data.len()),
                }
            }
            return;
        }
        self.mmio_pieces(gpa, data.len(), |cpu, gpa, range| {
            let piece = &mut data[range];
            if cpu.is_apic(gpa) {
                cpu.settle_eoi();
                let value = cpu.apic.mmio_read(gpa as u32 & 0xff0);
                let bytes = (u64::from(value) >> (8 * (gpa & 15).min(7))).to_le_bytes();
                let len = piece.len();
                piece.copy_from_slice(&bytes[..len]);
            } else if let Some(bus) = cpu.bus() {
                bus.mmio_read(gpa, piece);
            } else {
                piece.fill(0xff);
            }
        });
    }

    /// Writes physical memory within one page: RAM, local APIC or bus.
    pub(crate) fn phys_write(&mut self, gpa: u64, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        if let Some(slot) = self.slots.find(gpa)
            && !slot.readonly
        {
            // SAFETY: as in `phys_read`.
            unsafe {
                let host = slot.host.add((gpa - slot.gpa) as usize);
                match *data {
                    [a] => host.write(a),
                    [a, b] => host
                        .cast::<u16>()
                        .write_unaligned(u16::from_ne_bytes([a, b])),
                    [a, b, c, d] => host
                        .cast::<u32>()
                        .write_unaligned(u32::from_ne_bytes([a, b, c, d])),
                    [a, b, c, d, e, f, g, h] => host
                        .cast::<u64>()
                        .write_unaligned(u64::from_ne_bytes([a, b, c, d, e, f, g, h])),
                    _ => std::ptr::copy_nonoverlapping(data.as_ptr(), host, data.len()),
                }
            }
            if slot.code_map(gpa).load(Ordering::Acquire) != 0 {
                self.code_written(gpa, data.len());
            }
            return;
        }
        self.mmio_pieces(gpa, data.len(), |cpu, gpa, range| {
            let piece = &data[range];
            if cpu.is_apic(gpa) {
                // Only whole registers can be written (Intel SDM vol. 3, 11.4.1).
                cpu.settle_eoi();
                if let (0, Some(bytes)) = (gpa & 15, piece.first_chunk::<4>()) {
                    let effect = cpu
                        .apic
                        .clone()
                        .mmio_write(gpa as u32 & 0xff0, u32::from_le_bytes(*bytes));
                    cpu.apic_effect(effect);
                }
            } else if let Some(bus) = cpu.bus() {
                let flow = bus.mmio_write(gpa, piece);
                cpu.after_write(flow);
            }
        });
    }

    /// Cuts a device access into pieces of 1, 2, 4 or 8 bytes: whole if it has such a size,
    /// else naturally aligned ones.
    fn mmio_pieces(
        &mut self,
        gpa: u64,
        len: usize,
        mut f: impl FnMut(&mut Self, u64, std::ops::Range<usize>),
    ) {
        if matches!(len, 1 | 2 | 4 | 8) {
            return f(self, gpa, 0..len);
        }
        let mut at = 0;
        while at < len {
            let addr = gpa + at as u64;
            let mut size = 8;
            while addr & (size as u64 - 1) != 0 || at + size > len {
                size /= 2;
            }
            f(self, addr, at..at + size);
            at += size;
        }
    }

    fn is_apic(&self, gpa: u64) -> bool {
        let base = self.apic.base();
        // Enabled (bit 11) and not in x2APIC mode (bit 10).
        base >> 10 & 3 == 2 && gpa & !0xfff == base & self.tlbs.phys_mask & !0xfff
    }

    /// Guest code at `gpa` may have been overwritten (within one page): drops the blocks made
    /// of it, here and on all vCPUs.
    #[cold]
    pub(crate) fn code_written(&mut self, gpa: u64, len: usize) {
        let page = gpa & !0xfff;
        let first = gpa >> 6 & 63;
        let last = (gpa + len as u64 - 1) >> 6 & 63;
        let chunks = (u64::MAX >> (63 - (last - first))) << first;
        let Some(slot) = self.slots.find(gpa) else {
            return;
        };
        // Whoever decodes from here again sets the bits again, before it reads the bytes.
        if slot.code_map(page).fetch_and(!chunks, Ordering::AcqRel) & chunks == 0 {
            return;
        }
        self.cache.invalidate(page, chunks);
        let peers = self.machine.peers();
        for peer in peers {
            if !std::sync::Arc::ptr_eq(&peer, &self.peer) {
                peer.post(Mail::CodeWritten { page, chunks });
            }
        }
    }

    /// Forgets all translations.
    pub(crate) fn flush_tlb_all(&mut self) {
        self.tlbs.clear();
        self.parked.clear();
        self.cache.forget_addresses(true);
    }

    /// Forgets translations that are not global.
    pub(crate) fn flush_tlb_local(&mut self) {
        self.tlbs.clear_local();
        self.cache.forget_addresses(false);
    }

    /// Forgets the translation of one page (INVLPG).
    pub(crate) fn flush_tlb_page(&mut self, addr: u64) {
        if self.tlbs.clear_page(addr) {
            self.cache.forget_addresses(addr >> 63 != 0);
        } else {
            self.cache.forget_page(addr);
        }
        self.flush_parked_page(addr);
    }

    /// Linear address of the code segment's offset `rip`.
    #[inline]
    pub(crate) fn code_linear(&self, rip: u64) -> u64 {
        if self.mode & 3 == 2 {
            rip
        } else {
            self.s.seg[seg::CS].base.wrapping_add(rip) & 0xffff_ffff
        }
    }
}
