//! A vCPU on KVM: the exit loop.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_EXIT_IO_OUT, KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_cpuid_entry2, kvm_guest_debug,
    kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::Shared;
use super::ioctl::os;
use super::kick::{Entered, KvmKicker};
use crate::{Bus, CpuidEntry, DebugControl, Error, Exit, Flow, Kicker, Result, Vcpu, VcpuState};

/// One vCPU.
#[derive(Debug)]
pub(super) struct KvmVcpu {
    id: u32,
    fd: VcpuFd,
    shared: Arc<Shared>,
    kicker: Arc<KvmKicker>,
    /// By debug register: the address of the data it watches for an external debugger.
    watched: [Option<u64>; 4],
}

/// An exit, freed from the borrow of the `kvm_run` page.
enum Step {
    Port,
    Done(Flow),
    Leave(Exit),
    EmulationFailure,
    Eintr,
    Again,
}

impl KvmVcpu {
    pub(super) fn new(id: u32, fd: VcpuFd, shared: Arc<Shared>) -> Self {
        Self {
            id,
            fd,
            shared,
            kicker: Arc::default(),
            watched: [None; 4],
        }
    }

    /// Its kicker, for the VM.
    pub(super) fn own_kicker(&self) -> Arc<KvmKicker> {
        Arc::clone(&self.kicker)
    }

    /// Carries an interrupt of the PC/AT's controllers to vCPU 0, or asks for an exit as soon
    /// as it can take one (Linux, Documentation/virt/kvm/api.rst, KVM_INTERRUPT).
    fn offer_pic_interrupt(&mut self, bus: &dyn Bus) -> Result<()> {
        if self.id != 0 {
            return Ok(());
        }
        let mut waits = self.shared.pic_output.load(Ordering::SeqCst);
        if waits && self.fd.get_kvm_run().ready_for_interrupt_injection != 0 {
            if let Some(vector) = bus.interrupt_acknowledge() {
                super::ioctl::interrupt(&self.fd, vector)?;
                // Taken: not twice before the kernel has said so again.
                self.fd.get_kvm_run().ready_for_interrupt_injection = 0;
            }
            waits = self.shared.pic_output.load(Ordering::SeqCst);
        }
        self.fd.get_kvm_run().request_interrupt_window = u8::from(waits);
        Ok(())
    }

    fn step(&mut self, bus: &dyn Bus) -> Result<Step> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) => {
                return match error.errno() {
                    libc::EINTR => Ok(Step::Eintr),
                    // The state of an application processor changed while it waited.
                    libc::EAGAIN => Ok(Step::Again),
                    _ => os("KVM_RUN", Err(error)),
                };
            }
        };
        Ok(match exit {
            VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => Step::Port,
            VcpuExit::MmioRead(addr, data) => {
                bus.mmio_read(addr, data);
                Step::Done(Flow::Continue)
            }
            VcpuExit::MmioWrite(addr, data) => Step::Done(bus.mmio_write(addr, data)),
            VcpuExit::IoapicEoi(vector) => Step::Leave(Exit::IoapicEoi(vector)),
            VcpuExit::Shutdown => Step::Leave(Exit::Shutdown),
            VcpuExit::Debug(debug) => {
                let hit = (0..self.watched.len()).find(|n| debug.dr6 >> n & 1 != 0);
                let watch = hit.and_then(|n| self.watched[n]);
                Step::Leave(Exit::Debug { watch })
            }
            VcpuExit::X86Rdmsr(msr) => {
                log::debug!("vCPU {}: rdmsr {:#x}: #GP", self.id, msr.index);
                *msr.error = 1;
                Step::Done(Flow::Continue)
            }
            VcpuExit::X86Wrmsr(msr) => {
                log::debug!(
                    "vCPU {}: wrmsr {:#x}, {:#x}: #GP",
                    self.id,
                    msr.index,
                    msr.data
                );
                *msr.error = 1;
                Step::Done(Flow::Continue)
            }
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => Step::Again,
            VcpuExit::InternalError => Step::EmulationFailure,
            VcpuExit::FailEntry(reason, cpu) => {
                let reason = format!(
                    "the processor refused to enter the guest: reason {reason:#x} on CPU {cpu}"
                );
                Step::Leave(Exit::InternalError { reason, rip: 0 })
            }
            other => {
                let reason = format!("unexpected exit of KVM: {other:?}");
                Step::Leave(Exit::InternalError { reason, rip: 0 })
            }
        })
    }

    /// Port I/O: one bus call an element, all of them even after a `Stop`, because KVM has
    /// already counted them as done.
    fn port_io(&mut self, bus: &dyn Bus) -> Flow {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: called after KVM_EXIT_IO, when `io` is the union's field in use; the page
        // stays mapped as long as `self.fd`.
        let io = unsafe { (*run).__bindgen_anon_1.io };
        let size = usize::from(io.size);
        let mut flow = Flow::Continue;
        for index in 0..io.count as usize {
            // SAFETY: the kernel put `count` elements of `size` bytes at `data_offset`, all
            // inside the mapping of `kvm_run`; nobody else touches them until the next
            // KVM_RUN.
            let element = unsafe {
                let first = run.cast::<u8>().add(io.data_offset as usize);
                std::slice::from_raw_parts_mut(first.add(index * size), size)
            };
            if u32::from(io.direction) == KVM_EXIT_IO_OUT {
                if bus.port_write(io.port, element) == Flow::Stop {
                    flow = Flow::Stop;
                }
            } else {
                bus.port_read(io.port, element);
            }
        }
        flow
    }

    fn serve(&mut self, step: Step, bus: &dyn Bus) -> std::result::Result<Flow, Step> {
        match step {
            Step::Port => Ok(self.port_io(bus)),
            Step::Done(flow) => Ok(flow),
            other => Err(other),
        }
    }

    /// Lets KVM finish the instruction whose I/O was just served, so that the state can be
    /// read. Further pieces of the same instruction are served too.
    fn complete(&mut self, bus: &dyn Bus) -> Result<Option<Exit>> {
        loop {
            self.fd.set_kvm_immediate_exit(1);
            let step = self.step(bus)?;
            match self.serve(step, bus) {
                Ok(_) | Err(Step::Again) => {}
                Err(Step::Leave(exit)) => return Ok(Some(exit)),
                Err(Step::EmulationFailure) => return self.internal_error().map(Some),
                Err(_) => return Ok(None),
            }
        }
    }

    fn internal_error(&mut self) -> Result<Exit> {
        let rip = os("KVM_GET_REGS", self.fd.get_regs())?.rip;
        let sregs = os("KVM_GET_SREGS", self.fd.get_sregs())?;
        let bitness = match (sregs.efer & (1 << 10) != 0 && sregs.cs.l != 0, sregs.cs.db) {
            (true, _) => 64,
            (false, 0) => 16,
            (false, _) => 32,
        };
        let run = self.fd.get_kvm_run();
        // SAFETY: called after KVM_EXIT_INTERNAL_ERROR, when `internal` is in use;
        // `emulation_failure` is the same bytes with the names used for suberror 1.
        let (error, failure) = unsafe {
            (
                run.__bindgen_anon_1.internal,
                run.__bindgen_anon_1.emulation_failure,
            )
        };
        let reason = if error.suberror == KVM_INTERNAL_ERROR_EMULATION {
            let flag = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
            let bytes = if failure.ndata >= 3 && failure.flags & flag != 0 {
                // SAFETY: the flag says that the kernel filled these fields.
                unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 }
            } else {
                Default::default()
            };
            let len = usize::from(bytes.insn_size).min(bytes.insn_bytes.len());
            format!(
                "KVM cannot emulate {}",
                super::insn::describe(&bytes.insn_bytes[..len], bitness, rip)
            )
        } else {
            let count = (error.ndata as usize).min(error.data.len());
            format!(
                "KVM internal error {}, data {:x?}",
                error.suberror,
                &error.data[..count]
            )
        };
        Ok(Exit::InternalError { reason, rip })
    }

    /// Fills in the RIP of an internal error that KVM reported without one.
    fn locate(&self, exit: Exit) -> Result<Exit> {
        Ok(match exit {
            Exit::InternalError { reason, .. } => Exit::InternalError {
                reason,
                rip: os("KVM_GET_REGS", self.fd.get_regs())?.rip,
            },
            exit => exit,
        })
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, bus: &dyn Bus) -> Result<Exit> {
        // SAFETY: `entered` is dropped at the end of this function, before `self.fd` and its
        // mapping can be.
        let entered = unsafe { Entered::new(&self.kicker, self.fd.get_kvm_run()) };
        if entered.take_kick() {
            return Ok(Exit::Kicked);
        }
        loop {
            self.offer_pic_interrupt(bus)?;
            let step = self.step(bus)?;
            match self.serve(step, bus) {
                Ok(Flow::Continue) | Err(Step::Again) => {}
                Ok(Flow::Stop) => {
                    let exit = self.complete(bus)?;
                    return exit.map_or(Ok(Exit::Stopped), |exit| self.locate(exit));
                }
                Err(Step::Leave(exit)) => return self.locate(exit),
                Err(Step::EmulationFailure) => return self.internal_error(),
                Err(_) => {
                    entered.take_kick();
                    return Ok(Exit::Kicked);
                }
            }
        }
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::clone(&self.kicker) as Arc<dyn Kicker>
    }

    fn set_cpuid(&mut self, leaves: &[CpuidEntry]) -> Result<()> {
        let entries: Vec<_> = leaves
            .iter()
            .map(|leaf| kvm_cpuid_entry2 {
                function: leaf.function,
                index: leaf.index,
                flags: if leaf.index_significant {
                    KVM_CPUID_FLAG_SIGNIFCANT_INDEX
                } else {
                    0
                },
                eax: leaf.eax,
                ebx: leaf.ebx,
                ecx: leaf.ecx,
                edx: leaf.edx,
                ..Default::default()
            })
            .collect();
        let cpuid = CpuId::from_entries(&entries)
            .map_err(|_| Error::Invalid(format!("{} CPUID leaves are too many", leaves.len())))?;
        os("KVM_SET_CPUID2", self.fd.set_cpuid2(&cpuid))
    }

    fn state(&mut self) -> Result<VcpuState> {
        super::state::get(&self.fd, &self.shared)
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<()> {
        super::state::set(&self.fd, &self.shared, state)
    }

    fn set_debug(&mut self, control: &DebugControl) -> Result<()> {
        let mut request = kvm_guest_debug::default();
        self.watched = [None; 4];
        let refused = |what: &str| Err(Error::Invalid(what.into()));
        let mut used = 0;
        let mut place = |address: u64, kind: u64, len: u64| {
            let bits = match len {
                1 => 0,
                2 => 1,
                4 => 3,
                8 => 2,
                _ => return refused("KVM watches 1, 2, 4 or 8 bytes"),
            };
            if !address.is_multiple_of(len) {
                return refused("KVM watches only what is aligned to its size");
            }
            if used == 4 {
                return refused("KVM has four breakpoints and watchpoints");
            }
            request.arch.debugreg[used] = address;
            request.arch.debugreg[7] |= 2 << (2 * used) | (kind | bits << 2) << (16 + 4 * used);
            used += 1;
            Ok(())
        };
        let mut watched = [None; 4];
        for (watch, place_of) in control.watchpoints.iter().zip(&mut watched) {
            place(watch.address, if watch.reads { 3 } else { 1 }, watch.len)?;
            *place_of = Some(watch.address);
        }
        if control.watchpoints.len() > 4 {
            return refused("KVM has four breakpoints and watchpoints");
        }
        for address in &control.breakpoints {
            place(*address, 0, 1)?;
        }
        let active = used > 0 || control.single_step;
        if active {
            request.control = KVM_GUESTDBG_ENABLE;
        }
        if used > 0 {
            request.control |= KVM_GUESTDBG_USE_HW_BP;
        }
        if control.single_step {
            request.control |= KVM_GUESTDBG_SINGLESTEP;
        }
        self.watched = watched;
        os("KVM_SET_GUEST_DEBUG", self.fd.set_guest_debug(&request))
    }

    fn was_stopped(&mut self) -> Result<()> {
        match self.fd.kvmclock_ctrl() {
            // The guest has no such clock.
            Err(error) if error.errno() == libc::EINVAL => Ok(()),
            result => os("KVM_KVMCLOCK_CTRL", result),
        }
    }

    fn inject_nmi(&self) -> Result<()> {
        os("KVM_NMI", self.fd.nmi())
    }
}
