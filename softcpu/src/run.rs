//! The block loop, and what happens between blocks.

use std::time::Duration;

use crate::apic::ApicEffect;
use crate::attention::Attention;
use crate::bus::Bus;
use crate::cpu::{Cpu, Exit, host_tsc};
use crate::decode::{MODE_SEGMENTED, MODE_SINGLE};
use crate::exception::{Exception, Fallible};
use crate::interrupt::Source;
use crate::machine::Mail;
use crate::native::Outcome;
use crate::op::{Block, Op};
use crate::state::{rflags, seg};

/// Blocks between two looks at the APIC timer's deadline: some tens of microseconds. Where
/// handlers' last calls may not be jumps, this also bounds the stack.
const BLOCKS_BETWEEN_LOOKS: i32 = if cfg!(debug_assertions) { 32 } else { 512 };

/// Events in a row after which a kick is obeyed wherever they have led: a guest can have each one
/// cause the next, for ever.
const EVENTS_IN_A_ROW: u32 = 64;

/// Handler of operations whose guest code was overwritten: look the code up again.
pub(crate) unsafe fn stale(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: the caller's promise.
    let op = unsafe { &*op };
    cpu.s.rip = cpu.s.block_rip.wrapping_add(u64::from(op.off)) & cpu.rip_mask;
    cpu.link = std::ptr::null_mut();
}

/// The same for a block's first operation: the branch that led here is to learn the new way.
pub(crate) unsafe fn stale_block(cpu: &mut Cpu, _: *const Op) {
    cpu.s.rip = cpu.s.block_rip;
}

impl Cpu {
    /// Does what a local APIC register write asked the core to do.
    pub(crate) fn apic_effect(&mut self, effect: ApicEffect) {
        self.deadline = self.apic.deadline();
        match effect {
            ApicEffect::None => {}
            ApicEffect::Eoi(vector) => self.request_exit(Exit::IoapicEoi(vector)),
        }
    }

    /// Runs the guest until something other than I/O needs the caller. A halted vCPU sleeps
    /// in here.
    pub fn run(&mut self, bus: &dyn Bus) -> Exit {
        self.set_bus(Some(bus));
        self.peer.set_running(true);
        // Memory may have changed while nobody was listening.
        self.attention.raise(Attention::SELF);
        self.take_mail();
        self.refresh_clock();
        self.steal_back();
        self.deadline = self.apic.deadline();
        let exit = loop {
            if let Some(exit) = self.events() {
                break exit;
            }
            self.run_blocks();
        };
        self.settle_eoi();
        self.debug_resumed = matches!(exit, Exit::Debug { .. });
        self.sync_fp();
        self.steal_away();
        self.forget_thread();
        self.peer.set_running(false);
        self.set_bus(None);
        exit
    }

    /// Runs blocks until something wants attention.
    fn run_blocks(&mut self) {
        self.left = BLOCKS_BETWEEN_LOOKS;
        // An event may have led elsewhere than the last branch would have.
        self.link = std::ptr::null_mut();
        while self.pending.is_none()
            && !self.busy()
            && let Some(block) = self.find_block(self.mode)
        {
            if self.cache.native.take_wanted() && self.make_native(block) == Outcome::Full {
                self.cache.clear();
                self.link = std::ptr::null_mut();
                continue;
            }
            // SAFETY: blocks come from this vCPU's cache and live until it is dropped, which
            // happens only here, in `find_block` and between runs.
            unsafe {
                let ops = (*block).ops;
                self.s.block_rip = self.s.rip;
                ((*ops).f)(self, ops);
            }
        }
    }

    /// The block at RIP. `None`: fetching it raised an exception, which is pending.
    #[inline]
    fn find_block(&mut self, mode: u8) -> Option<*const Block> {
        let linear = self.code_linear(self.s.rip);
        if mode & MODE_SINGLE == 0
            && let Some(block) = self.cache.jump(linear)
            && self.fits_segment(block)
        {
            if !self.link.is_null() {
                self.note_link(block);
            }
            return Some(block);
        }
        match self.find_slow(linear, mode) {
            Ok(block) => Some(block),
            Err(exception) => {
                self.raise(exception, false);
                None
            }
        }
    }

    fn find_slow(&mut self, linear: u64, mode: u8) -> Fallible<*const Block> {
        let gpa = self.translate_fetch(linear)?;
        let mut found: Option<*const Block> = None;
        if let Some(block) = self.cache.find(linear, gpa, mode) {
            found = Some(block);
            if block.crosses {
                let expected = block.gpa2;
                let next_page = self.wrap_linear((linear & !0xfff).wrapping_add(4096));
                if self.translate_fetch(next_page)? != expected {
                    // The same first part with another second one: decoded anew each time.
                    found = None;
                }
            }
        }
        let block = match found {
            Some(block) => block,
            None => self.decode_block(linear, gpa, mode)?,
        };
        if !self.fits_segment(block) {
            // As much of it as does, and then the fault.
            if mode & MODE_SINGLE != 0 {
                return Err(Exception::GP0);
            }
            return self.find_slow(linear, mode | MODE_SINGLE);
        }
        if mode & MODE_SINGLE == 0 {
            self.cache.remember(linear, block);
            self.note_link(block);
        }
        self.link = std::ptr::null_mut();
        Ok(block)
    }

    /// A block, decoded when CS may have been another, lies inside it now.
    #[inline]
    fn fits_segment(&self, block: *const Block) -> bool {
        if self.mode & MODE_SEGMENTED == 0 {
            return true;
        }
        // SAFETY: blocks come from this vCPU's cache.
        let len = u64::from(unsafe { (*block).len });
        self.s.rip.wrapping_add(len).wrapping_sub(1) <= u64::from(self.s.seg[seg::CS].limit)
    }

    /// Notes `block` as where the branch that just ended its block leads, if that holds for
    /// ever: both lie in the same page.
    fn note_link(&mut self, block: *const Block) {
        let unlimited = self.mode & MODE_SEGMENTED == 0;
        // SAFETY: `link` is a slot of this vCPU's cache, and is cleared when that is dropped.
        unsafe {
            if let Some(link) = self.link.as_mut()
                && link.b != 0
                && !(*block).crosses
                && unlimited
            {
                link.disp = (*block).ops as i64;
            }
        }
    }

    /// Runs exactly one instruction; its length.
    pub(crate) fn step(&mut self) -> u64 {
        self.link = std::ptr::null_mut();
        let Some(block) = self.find_block(self.mode | MODE_SINGLE) else {
            return 0;
        };
        // No successor: one that is known must not be run as well.
        self.left = 0;
        // SAFETY: as in `run_blocks`.
        unsafe {
            let (ops, len) = ((*block).ops, (*block).len);
            self.s.block_rip = self.s.rip;
            ((*ops).f)(self, ops);
            self.link = std::ptr::null_mut();
            len.into()
        }
    }

    /// Everything that is looked at between blocks. `Some`: leave `run`.
    fn events(&mut self) -> Option<Exit> {
        let mut rounds = 0;
        loop {
            rounds += 1;
            if rounds > EVENTS_IN_A_ROW {
                // A benign exception on the way to another; a #DB whose own delivery meets a
                // data breakpoint. What is pending stays so.
                if self.attention.get() & Attention::MAIL != 0 {
                    self.take_mail();
                }
                if self.attention.get() & Attention::KICK != 0 {
                    if let Some(exit) = self.exit.take() {
                        return Some(exit);
                    }
                    self.attention.clear(Attention::KICK);
                    return Some(Exit::Kicked);
                }
            }
            if let Some(exception) = self.pending.take() {
                if let Err(exit) = self.deliver_exception(exception) {
                    return Some(exit);
                }
                if self.pending.is_some() {
                    continue;
                }
            }
            self.attention.clear(Attention::SELF);
            self.stop_after = false;
            if let Some(address) = self.external_hit.take() {
                return Some(Exit::Debug {
                    watch: Some(address),
                });
            }
            if self.watch_hits != 0 {
                if self.traps_held() {
                    self.s.shadow = false;
                    self.step();
                } else {
                    self.take_watch_hits();
                }
                continue;
            }
            if let Some(exit) = self.exit.take() {
                return Some(exit);
            }
            if host_tsc() >= self.deadline {
                self.update_steal_time();
                self.apic.poll_timer(host_tsc());
                self.deadline = self.apic.deadline();
            }
            let flags = self.attention.get();
            if flags & Attention::MAIL != 0 {
                self.take_mail();
            }
            if flags & Attention::KICK != 0 {
                self.attention.clear(Attention::KICK);
                return Some(Exit::Kicked);
            }
            if self.startup_events() {
                continue;
            }
            if self.s.shadow && self.s.rip != self.s.shadow_rip {
                self.s.shadow = false;
            }
            let wanted = flags & self.attention_mask & (Attention::NMI | Attention::IRQ) != 0;
            if wanted && self.s.shadow && !self.s.halted {
                self.s.shadow = false;
                self.step();
                continue;
            }
            if wanted && self.interrupt(flags) {
                continue;
            }
            if self.s.halted && self.attention.clear(Attention::UNHALT) & Attention::UNHALT != 0 {
                self.s.halted = false;
            }
            if self.s.halted {
                if let Some(exit) = self.sleep() {
                    return Some(exit);
                }
                continue;
            }
            if self.stepping() {
                if let Some(exit) = self.run_one() {
                    return Some(exit);
                }
                continue;
            }
            return None;
        }
    }

    /// Delivers an NMI or an interrupt; whether there was one.
    fn interrupt(&mut self, flags: u32) -> bool {
        let (vector, nmi) = if flags & self.attention_mask & Attention::NMI != 0 {
            self.attention.clear(Attention::NMI);
            (2, true)
        } else {
            let Some(vector) = self.take_interrupt() else {
                return false;
            };
            (vector, false)
        };
        self.s.halted = false;
        self.s.flags &= !rflags::RF;
        match self.deliver(vector, None, Source::External) {
            Ok(()) => {
                if nmi {
                    self.s.nmi_masked = true;
                    self.update_attention_mask();
                } else {
                    self.offer_eoi(vector);
                }
            }
            Err(exception) => self.pending = Some(exception),
        }
        true
    }

    /// The vector of the interrupt to deliver: the PC/AT's controllers come first, as their pin
    /// bypasses the APIC's priorities.
    fn take_interrupt(&mut self) -> Option<u8> {
        self.settle_eoi();
        if self.apic.has_extint()
            && let Some(vector) = self.bus().and_then(|bus| bus.interrupt_acknowledge())
        {
            return Some(vector);
        }
        self.apic.take_interrupt()
    }

    /// A `hlt` with interrupts off may be a wait for a lock, which another vCPU ends.
    fn waits_for_lock(&self) -> bool {
        self.machine.peers().len() > 1 && self.offered(crate::paravirt::feature::PV_UNHALT)
    }

    /// HLT: sleeps until something may have woken the vCPU.
    fn sleep(&mut self) -> Option<Exit> {
        let mask = self.attention_mask | Attention::UNHALT;
        if mask & Attention::IRQ == 0 && !self.dead_halt_reported && !self.waits_for_lock() {
            self.dead_halt_reported = true;
            return Some(Exit::DeadHalt);
        }
        let mut timeout = Duration::from_secs(3600);
        if self.deadline != u64::MAX {
            let ticks = self.deadline.saturating_sub(host_tsc());
            timeout = timeout.min(Duration::from_nanos(crate::tsc::to_ns(ticks)));
        }
        self.steal_away();
        self.attention.wait(mask, timeout);
        self.steal_back();
        None
    }

    /// Delivers an exception, or the double fault it ends in, or leaves another one pending that
    /// takes its place. `Err`: triple fault.
    fn deliver_exception(&mut self, exception: Exception) -> Result<(), Exit> {
        let contributory = |v: u8| matches!(v, 0 | 10..=13);
        let mut current = exception;
        loop {
            if current.vector == 14 {
                self.s.cr2 = current.cr2;
            }
            if current.vector == 1 {
                self.debug_exception();
            }
            let code = (current.has_code && self.s.protected_or_v86()).then_some(current.code);
            log::trace!("{current:x?} at {:#x}", self.s.rip);
            match self.deliver(current.vector, code, Source::Exception) {
                Ok(()) => return Ok(()),
                Err(second) => {
                    if current.vector == 8 {
                        return Err(Exit::Shutdown);
                    }
                    let double = contributory(current.vector) && contributory(second.vector)
                        || current.vector == 14
                            && (second.vector == 14 || contributory(second.vector));
                    if !double {
                        self.pending = Some(second);
                        return Ok(());
                    }
                    current = Exception::coded(8, 0);
                }
            }
        }
    }

    /// Acts on what other vCPUs and the machine have told.
    pub(crate) fn take_mail(&mut self) {
        let mail = self.peer.take_mail();
        for message in mail {
            match message {
                Mail::CodeWritten { page, chunks } => {
                    self.cache.invalidate(page, chunks);
                }
                Mail::CodePage { page } => {
                    if self.slow_writes(page) {
                        // What this vCPU wrote there meanwhile went unnoticed.
                        for peer in self.machine.peers() {
                            peer.post(Mail::CodeWritten {
                                page,
                                chunks: u64::MAX,
                            });
                        }
                    }
                }
                Mail::Slots => {
                    self.slots = self.machine.memory.snapshot();
                    self.flush_tlb_all();
                    self.cache.clear();
                    self.link = std::ptr::null_mut();
                }
                Mail::DirtyLog => self.clear_writes(),
                Mail::Recent => self.peer.tell_recent(self.cache.recent()),
                Mail::Logging => {
                    self.slots = self.machine.memory.snapshot();
                    self.flush_tlb_all();
                }
            }
        }
        self.peer.acknowledge();
    }
}
