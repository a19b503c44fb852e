//! The vCPU.

use std::sync::Arc;

use crate::apic::Apic;
use crate::attention::Attention;
use crate::bus::{Bus, Flow};
use crate::cache::CodeCache;
use crate::cpuid::{Cpuid, Leaf};
use crate::decode::{MODE_FLAT, MODE_SEGMENTED};
use crate::exception::{Exception, Fallible};
use crate::features::Features;
use crate::machine::{Machine, Peer};
use crate::memory::Slots;
use crate::op::Op;
use crate::state::{CpuState, cr0, cr4, efer, rflags, seg};
use crate::tlb::{MODE_ALIGNED, TlbSet, Tlbs};

/// Why `Cpu::run` returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// `Attention::KICK` was raised.
    Kicked,
    /// A bus write returned `Flow::Stop`.
    Stopped,
    /// Triple fault.
    Shutdown,
    /// The guest acknowledged a level-triggered interrupt with this vector.
    IoapicEoi(u8),
    /// HLT with interrupts off; reported once per halt.
    DeadHalt,
    /// A breakpoint, a watched access (its linear address) or a single step of
    /// `Cpu::set_debug`.
    Debug {
        /// The data breakpoint's address.
        watch: Option<u64>,
    },
    /// The guest's next instruction cannot be executed.
    InternalError {
        /// Why not.
        reason: String,
        /// Guest RIP.
        rip: u64,
    },
}

/// What a debugger outside the guest asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DebugRequest {
    /// Leave `run` after every instruction.
    pub single_step: bool,
    /// Leave `run` before the instruction at one of these linear addresses.
    pub breakpoints: Vec<u64>,
    /// Leave `run` after an instruction that accesses one of these.
    pub watchpoints: Vec<Watchpoint>,
}

/// Data that an external debugger watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watchpoint {
    /// Linear address of the first byte.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Reads count too, not only writes.
    pub reads: bool,
}

/// One virtual CPU. Made on any thread, run on one.
#[repr(C)]
pub struct Cpu {
    /// Architectural state.
    pub s: CpuState,
    /// What floating-point instructions keep beside `s.fp`.
    pub(crate) fp_runtime: crate::simd::Runtime,
    /// The TLBs of the three access modes.
    pub(crate) tlbs: Box<Tlbs>,
    /// The TLBs of other address spaces, by identifier, the last used one last.
    pub(crate) parked: Vec<crate::pcid::Parked>,
    /// Index into `tlbs` for the guest's own data accesses now.
    pub(crate) data_mode: usize,
    /// `tlbs.data[data_mode]`.
    pub(crate) tlb: *const TlbSet,
    /// `attention`, one step nearer.
    attention_ptr: *const Attention,
    /// Blocks that may still run before events are looked at.
    pub(crate) left: i32,
    /// The branch slot that would like to have the next block noted, or null.
    pub(crate) link: *mut Op,
    /// An exception raised by the operation just run, to be delivered.
    pub(crate) pending: Option<Exception>,
    /// Bits of `attention` that matter now.
    pub(crate) attention_mask: u32,
    /// Decode mode of the next block: code size (0: 16, 1: 32, 2: 64 bits) in bits 0..2,
    /// 32-bit stack in bit 2, `MODE_SEGMENTED`, `MODE_FLAT`.
    pub(crate) mode: u8,
    /// The instruction pointer's bits: by CS.
    pub(crate) rip_mask: u64,
    /// The bus of the `run` in progress.
    bus: Option<*const dyn Bus>,
    /// Leave `run` with this after the instruction.
    pub(crate) exit: Option<Exit>,
    /// Decoded code.
    pub(crate) cache: CodeCache,
    /// Memory slots as last seen.
    pub(crate) slots: Arc<Slots>,
    /// The machine this vCPU belongs to.
    pub machine: Arc<Machine>,
    /// Its local APIC.
    pub apic: Arc<Apic>,
    pub(crate) peer: Arc<Peer>,
    /// The flags by which others get its attention.
    pub attention: Arc<Attention>,
    /// CPUID leaves.
    pub cpuid: Cpuid,
    /// The same as the decoder asks for them.
    pub features: Features,
    /// The paravirtual clock and its like.
    pub pv: crate::paravirt::Paravirt,
    /// An external debugger's wishes.
    pub(crate) debug: DebugRequest,
    /// `run` was just entered: a breakpoint at RIP has been seen already.
    pub(crate) debug_resumed: bool,
    /// Data breakpoints are enabled.
    pub(crate) watching: bool,
    /// Traps of the last instruction that wait for delivery, as in DR6.
    pub(crate) watch_hits: u64,
    /// How the instruction that runs alone ends for a single-step trap.
    pub(crate) trap_rule: crate::debug::TrapRule,
    /// Address of the external debugger's watchpoint that the current instruction has hit.
    pub(crate) external_hit: Option<u64>,
    /// Leave the block after this instruction.
    pub(crate) stop_after: bool,
    /// PAUSE instructions run.
    pub(crate) pauses: u32,
    /// HLT with interrupts off has been reported.
    pub(crate) dead_halt_reported: bool,
    /// Host TSC at which the APIC timer fires (cached from the APIC).
    pub(crate) deadline: u64,
}

// SAFETY: the raw pointers in it lead to its own blocks, or to the bus, which is only set
// while `run` borrows it.
unsafe impl Send for Cpu {}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cpu")
            .field("id", &self.apic.id())
            .field("rip", &self.s.rip)
            .finish_non_exhaustive()
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        self.machine.remove_peer(&self.peer);
    }
}

impl Cpu {
    /// Distance of the pointer to the attention flags.
    pub(crate) const ATTENTION: usize = std::mem::offset_of!(Self, attention_ptr);

    /// A vCPU after power-up with initial APIC id `id`.
    pub fn new(machine: &Arc<Machine>, id: u32, leaves: &[Leaf]) -> Box<Self> {
        let attention = Arc::new(Attention::default());
        let apic = Arc::new(Apic::new(id, attention.clone()));
        apic.connect(machine);
        let peer = Arc::new(Peer::new(apic.clone(), attention.clone()));
        machine.add_peer(peer.clone());
        let mut cpu = Box::new(Self {
            s: CpuState::default(),
            fp_runtime: crate::simd::Runtime::default(),
            tlbs: Tlbs::new(),
            parked: Vec::new(),
            data_mode: 0,
            tlb: std::ptr::null(),
            attention_ptr: &raw const *attention,
            left: 0,
            link: std::ptr::null_mut(),
            pending: None,
            attention_mask: 0,
            mode: 0,
            rip_mask: 0,
            bus: None,
            exit: None,
            cache: CodeCache::default(),
            slots: machine.memory.snapshot(),
            machine: machine.clone(),
            apic,
            peer,
            attention,
            cpuid: Cpuid::default(),
            features: Features::default(),
            pv: crate::paravirt::Paravirt::default(),
            debug: DebugRequest::default(),
            debug_resumed: false,
            watching: false,
            watch_hits: 0,
            external_hit: None,
            trap_rule: crate::debug::TrapRule::Before,
            stop_after: false,
            pauses: 0,
            dead_halt_reported: false,
            deadline: u64::MAX,
        });
        cpu.set_cpuid(leaves);
        cpu.set_tsc_offset(machine.tsc_offset());
        cpu.state_changed();
        cpu
    }

    /// Sets what CPUID answers, and with it which instructions exist.
    pub fn set_cpuid(&mut self, leaves: &[Leaf]) {
        self.cpuid = Cpuid::new(leaves);
        let features = self.cpuid.features();
        // What was decoded depends on nothing else.
        if features != self.features {
            self.features = features;
            self.cache.clear();
        }
    }

    /// Sets what an external debugger wants.
    pub fn set_debug(&mut self, debug: DebugRequest) {
        self.debug = debug;
        self.external_hit = None;
        self.cache.clear();
        self.debug_registers_changed();
    }

    /// To be called after `s` was changed from outside: everything derived from it is brought
    /// up to date.
    pub fn state_changed(&mut self) {
        self.s.zero = 0;
        // The branch that ended the last block does not lead to the new RIP.
        self.link = std::ptr::null_mut();
        self.update_mode();
        self.tlbs.phys_mask = (1 << self.features.phys_bits.clamp(32, 52)) - 1;
        self.flush_tlb_all();
        self.debug_registers_changed();
    }

    /// To be called instead of `state_changed` where only general, vector and flags registers, RIP
    /// and the privilege level were changed: what is known of the address space stays.
    pub fn registers_changed(&mut self) {
        self.link = std::ptr::null_mut();
        self.update_mode();
    }

    /// To be called after CS, SS, CR0, EFER, RFLAGS (VM, AC, IF, TF) or CPL changed.
    pub(crate) fn update_mode(&mut self) {
        let s = &mut self.s;
        let long = s.long_mode();
        let cs = &s.seg[seg::CS];
        let mut mode = if long && cs.long() {
            2
        } else if cs.big() {
            1
        } else {
            0
        };
        let mode64 = mode == 2;
        if !mode64 && (cs.base != 0 || cs.limit != u32::MAX) {
            mode |= MODE_SEGMENTED;
        }
        if mode64 || s.seg[seg::SS].big() {
            mode |= 4;
        }
        if mode == 1 | 4
            && s.protected()
            && [seg::DS, seg::ES, seg::SS]
                .into_iter()
                .all(|index| s.seg[index].flat_data())
        {
            mode |= MODE_FLAT;
        }
        self.mode = mode;
        self.rip_mask = if mode64 { u64::MAX } else { 0xffff_ffff };
        for i in 0..6 {
            s.ea_base[i] = if mode64 && i < 4 { 0 } else { s.seg[i].base };
        }
        self.data_mode = if s.cpl == 3 {
            if s.flags & rflags::AC != 0 && s.cr0 & cr0::AM != 0 {
                MODE_ALIGNED
            } else {
                2
            }
        } else if s.cr4 & cr4::SMAP != 0 && s.flags & rflags::AC == 0 {
            1
        } else {
            0
        };
        let user = s.cpl == 3;
        self.select_tlb();
        self.update_attention_mask();
        self.cache.set_context(mode, user);
    }

    /// To be called after `data_mode` changed.
    #[inline]
    pub(crate) fn select_tlb(&mut self) {
        self.tlb = &raw const self.tlbs.data[self.data_mode];
    }

    /// Something wants attention, or the time for a look has come. To be asked once a block.
    #[inline(always)]
    pub(crate) fn busy(&mut self) -> bool {
        self.left -= 1;
        // SAFETY: `attention` keeps it alive.
        let flags = unsafe { (*self.attention_ptr).get() };
        flags & self.attention_mask != 0 || self.left < 0
    }

    /// To be called after RFLAGS.IF or the NMI mask changed.
    #[inline]
    pub(crate) fn update_attention_mask(&mut self) {
        let mut mask =
            Attention::INIT | Attention::SIPI | Attention::KICK | Attention::MAIL | Attention::SELF;
        if self.s.flags & rflags::IF != 0 {
            mask |= Attention::IRQ;
        }
        if !self.s.nmi_masked {
            mask |= Attention::NMI;
        }
        self.attention_mask = mask;
    }

    /// Whether code's linear address is its RIP, as what `cache` knows of jumps is about.
    #[inline(always)]
    pub(crate) fn finds_code_by_rip(&self) -> bool {
        self.mode & (2 | MODE_FLAT) != 0
    }

    /// Linear address of `op`'s memory operand of `len` bytes, after the segment checks its
    /// mode needs. (Pages are checked by the access itself.)
    pub fn operand(&mut self, op: &Op, len: usize, write: bool) -> Fallible<u64> {
        let reg = |cpu: &Self, offset: u8| cpu.reg64(offset);
        let offset = reg(self, op.base)
            .wrapping_add(reg(self, op.index) << op.scale())
            .wrapping_add(op.disp as u64);
        let seg = op.seg();
        match op.ea_kind() {
            Op::EA_64 => {
                let addr = offset.wrapping_add(self.s.ea_base[seg]);
                Ok(addr)
            }
            Op::EA_64_32 => Ok((offset & 0xffff_ffff).wrapping_add(self.s.ea_base[seg])),
            Op::EA_32 => self.segmented(seg, offset & 0xffff_ffff, len, write),
            _ => self.segmented(seg, offset & 0xffff, len, write),
        }
    }

    /// Linear address of `offset` in a segment, outside 64-bit mode: checks presence, type and
    /// limit (Intel SDM vol. 3, 5.3 to 5.5).
    pub(crate) fn segmented(
        &mut self,
        index: usize,
        offset: u64,
        len: usize,
        write: bool,
    ) -> Fallible<u64> {
        let segment = &self.s.seg[index];
        let fault = if index == seg::SS {
            Exception::SS0
        } else {
            Exception::GP0
        };
        let code = segment.access & 8 != 0;
        let rw = segment.access & 2 != 0;
        let expand_down = !code && segment.access & 4 != 0;
        if self.s.protected() {
            if segment.unusable() {
                return Err(fault);
            }
            // Writes need writable data, reads data or readable code.
            if if write { code || !rw } else { code && !rw } {
                return Err(fault);
            }
        }
        let last = offset + len as u64 - 1;
        let limit = u64::from(segment.limit);
        let bad = if expand_down {
            let top = if segment.big() { 0xffff_ffff } else { 0xffff };
            offset <= limit || last > top
        } else {
            last > limit
        };
        if bad {
            return Err(fault);
        }
        Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// The general register (or zero, or the block's RIP) at a byte offset as in `Op::a`.
    #[inline(always)]
    pub fn reg64(&self, offset: u8) -> u64 {
        debug_assert!(offset <= Op::RIP && offset.is_multiple_of(8));
        // SAFETY: gpr, zero and block_rip lie one after another at the start of the repr(C)
        // state, and offsets come from the decoder, which knows no others.
        unsafe {
            (&raw const self.s)
                .cast::<u8>()
                .add(usize::from(offset))
                .cast::<u64>()
                .read()
        }
    }

    /// Guest TSC now.
    pub fn tsc(&self) -> u64 {
        host_tsc().wrapping_add(self.s.tsc_offset)
    }

    /// Pages are on.
    pub fn paging(&self) -> bool {
        self.s.cr0 & cr0::PG != 0
    }

    /// EFER.NXE.
    pub(crate) fn nx_enabled(&self) -> bool {
        self.s.efer & efer::NXE != 0
    }

    pub(crate) fn set_bus(&mut self, bus: Option<&dyn Bus>) {
        // SAFETY: only the lifetime is changed; `run` clears the field before its borrow ends.
        self.bus = bus.map(|b| unsafe {
            std::mem::transmute::<*const (dyn Bus + '_), *const (dyn Bus + 'static)>(
                std::ptr::from_ref(b),
            )
        });
    }

    /// The bus, while in `run`.
    pub(crate) fn bus(&mut self) -> Option<&dyn Bus> {
        self.sync_mxcsr();
        // SAFETY: set by `run` from a reference that outlives it, cleared before it returns.
        self.bus.map(|b| unsafe { &*b })
    }

    /// Leaves `run` with `exit` after the current instruction.
    pub(crate) fn request_exit(&mut self, exit: Exit) {
        if self.exit.is_none() {
            self.exit = Some(exit);
        }
        self.stop_after = true;
        self.attention.raise(Attention::SELF);
    }

    pub(crate) fn after_write(&mut self, flow: Flow) {
        if flow == Flow::Stop {
            self.request_exit(Exit::Stopped);
        }
    }
}

/// The host's time-stamp counter.
#[inline(always)]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 CPU and Linux leaves it enabled.
    unsafe { std::arch::x86_64::_rdtsc() }
}
