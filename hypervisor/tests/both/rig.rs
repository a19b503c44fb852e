//! One VM, one vCPU, a bus that writes down what it sees.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hypervisor::{
    Backend, Bus, CpuidEntry, Exit, Flow, MemorySlot, RunState, Segment, Table, Vcpu, VcpuState, Vm,
};

/// Guest RAM: 2 MiB at 0.
pub const RAM: usize = 2 << 20;
/// Where guests are loaded and entered.
pub const CODE: u64 = 0x1000;
/// Guests write here to stop.
pub const STOP_PORT: u16 = 0xf4;
/// Page tables of the 64-bit guests.
const PML4: u64 = 0x8000;
/// GDT: null, 16-bit code (8), data (0x10), 32-bit code (0x18), 64-bit code (0x20).
const GDT: u64 = 0x7000;
/// IDT of the guests that take interrupts: all zero until they fill it.
pub const IDT: u64 = 0x6000;

/// What a bus access was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    In(u16, usize),
    Out(u16, Vec<u8>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

/// What a test wants done when a port is written: port, value.
type Hook = Box<dyn Fn(u16, u32) + Send + Sync>;

/// Records accesses; answers reads with bytes 0x11, 0x22, 0x33, … one after another.
#[derive(Default)]
pub struct Recorder {
    seen: Mutex<Vec<Access>>,
    next: Mutex<u8>,
    hook: Mutex<Option<Arc<Hook>>>,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder")
            .field("seen", &self.seen())
            .finish_non_exhaustive()
    }
}

impl Recorder {
    pub fn seen(&self) -> Vec<Access> {
        self.seen.lock().unwrap().clone()
    }
    /// Bytes written to `port`, in order.
    pub fn bytes(&self, port: u16) -> Vec<u8> {
        let seen = self.seen();
        let writes = seen.iter().filter_map(|a| match a {
            Access::Out(p, data) if *p == port => Some(data.clone()),
            _ => None,
        });
        writes.flatten().collect()
    }
    /// Calls `hook` on every port write, on the vCPU's thread, as a device would act.
    pub fn on_port(&self, hook: impl Fn(u16, u32) + Send + Sync + 'static) {
        *self.hook.lock().unwrap() = Some(Arc::new(Box::new(hook)));
    }
    fn log(&self, access: Access) {
        self.seen.lock().unwrap().push(access);
    }
    fn fill(&self, data: &mut [u8]) {
        let mut next = self.next.lock().unwrap();
        for byte in data {
            *next = next.wrapping_add(0x11);
            *byte = *next;
        }
    }
}

impl Bus for Recorder {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.log(Access::In(port, data.len()));
        self.fill(data);
    }
    fn port_write(&self, port: u16, data: &[u8]) -> Flow {
        self.log(Access::Out(port, data.to_vec()));
        let hook = self.hook.lock().unwrap().clone();
        if let Some(hook) = hook {
            let mut value = [0; 4];
            value[..data.len()].copy_from_slice(data);
            hook(port, u32::from_le_bytes(value));
        }
        if port == STOP_PORT {
            Flow::Stop
        } else {
            Flow::Continue
        }
    }
    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        self.log(Access::Read(addr, data.len()));
        self.fill(data);
    }
    fn mmio_write(&self, addr: u64, data: &[u8]) -> Flow {
        self.log(Access::Write(addr, data.to_vec()));
        Flow::Continue
    }
}

/// Anonymous shared memory, page-aligned.
#[derive(Debug)]
pub struct Ram {
    pub host: *mut u8,
    pub len: usize,
}

// SAFETY: plain memory that is only accessed through volatile copies below.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    pub fn new(len: usize) -> Self {
        // SAFETY: a fresh anonymous mapping.
        let host = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(host, libc::MAP_FAILED);
        Self {
            host: host.cast(),
            len,
        }
    }
    pub fn write(&self, at: u64, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= self.len);
        // SAFETY: in bounds (asserted), and the mapping lives as long as self.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.host.add(at as usize), bytes.len());
        }
    }
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        assert!(at as usize + len <= self.len);
        let mut out = vec![0; len];
        // SAFETY: in bounds (asserted), and the mapping lives as long as self.
        unsafe {
            std::ptr::copy_nonoverlapping(self.host.add(at as usize), out.as_mut_ptr(), len);
        }
        out
    }
    pub fn read_u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.read(at, 4).try_into().unwrap())
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the rig drops the VM before it.
        unsafe { libc::munmap(self.host.cast(), self.len) };
    }
}

/// The mode a guest is entered in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Real,
    Protected,
    Long,
}

/// A machine with one vCPU (more by `add_vcpu`). Fields are dropped in order.
#[derive(Debug)]
pub struct Rig {
    pub vcpu: Box<dyn Vcpu>,
    pub vm: Arc<dyn Vm>,
    pub bus: Arc<Recorder>,
    pub ram: Arc<Ram>,
}

impl Rig {
    pub fn new(backend: Backend, mode: Mode, code: &[u8]) -> Self {
        let ram = Arc::new(Ram::new(RAM));
        ram.write(CODE, code);
        tables(&ram);
        let vm = hypervisor::create(backend).expect("the backend is there");
        // SAFETY: the rig drops the VM and its vCPUs before the RAM, which is only accessed
        // through raw copies.
        unsafe { vm.map_memory(slot(&ram, 0, 0)) }.unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid(&cpuid(&*vm, 0)).unwrap();
        let mut state = vcpu.state().unwrap();
        enter(&mut state, mode);
        vcpu.set_state(&state).unwrap();
        Self {
            vcpu,
            vm,
            bus: Arc::default(),
            ram,
        }
    }

    /// Runs until `Exit::Stopped`; other exits on the way.
    pub fn run_to_stop(&mut self) -> Vec<Exit> {
        let mut exits = Vec::new();
        loop {
            match self.run() {
                Exit::Stopped => return exits,
                exit => {
                    let done = !matches!(exit, Exit::IoapicEoi(_) | Exit::DeadHalt);
                    exits.push(exit);
                    assert!(!done, "{exits:?}, seen {:x?}", self.bus.seen());
                }
            }
        }
    }

    /// Points a gate at `offset` in the guest's code.
    pub fn gate(&self, mode: Mode, vector: u64, offset: u64) {
        let target = CODE + offset;
        if mode == Mode::Long {
            let low = target & 0xffff | 0x20 << 16 | 0x8e00 << 32 | (target >> 16) << 48;
            self.ram.write(IDT + vector * 16, &low.to_le_bytes());
            self.ram.write(IDT + vector * 16 + 8, &[0; 8]);
        } else {
            let gate = target & 0xffff | 0x18 << 16 | 0x8e00 << 32 | (target >> 16) << 48;
            self.ram.write(IDT + vector * 8, &gate.to_le_bytes());
        }
    }

    /// Runs once, for at most 20 s.
    pub fn run(&mut self) -> Exit {
        let bus = Arc::clone(&self.bus);
        run_limited(&mut *self.vcpu, &*bus)
    }

    pub fn add_vcpu(&self, id: u32) -> Box<dyn Vcpu> {
        let mut vcpu = self.vm.create_vcpu(id).unwrap();
        vcpu.set_cpuid(&cpuid(&*self.vm, id)).unwrap();
        vcpu
    }
}

/// Runs `vcpu` once; a run that would take longer than 20 s is a failure.
pub fn run_limited(vcpu: &mut dyn Vcpu, bus: &dyn Bus) -> Exit {
    let done = Arc::new(AtomicBool::new(false));
    let kicker = vcpu.kicker();
    let watch = {
        let done = Arc::clone(&done);
        std::thread::spawn(move || {
            let start = Instant::now();
            while !done.load(Ordering::SeqCst) {
                if start.elapsed() > Duration::from_secs(20) {
                    kicker.kick();
                    return true;
                }
                std::thread::park_timeout(Duration::from_secs(1));
            }
            false
        })
    };
    let exit = vcpu.run(bus).unwrap();
    done.store(true, Ordering::SeqCst);
    watch.thread().unpark();
    assert!(
        !watch.join().unwrap(),
        "the guest ran for 20 s; now at {:x?}",
        vcpu.state().map(|s| s.regs)
    );
    exit
}

pub fn slot(ram: &Ram, id: u32, gpa: u64) -> MemorySlot {
    MemorySlot {
        id,
        gpa,
        len: ram.len as u64,
        host: ram.host,
        readonly: false,
        log_dirty: false,
    }
}

/// CPUID leaves both backends can give: what the guests here need.
pub fn cpuid(vm: &dyn Vm, id: u32) -> Vec<CpuidEntry> {
    let mut leaves = vm.supported_cpuid().unwrap();
    for leaf in &mut leaves {
        if leaf.function == 1 {
            leaf.ebx = leaf.ebx & 0x00ff_ffff | id << 24;
        }
    }
    leaves
}

fn tables(ram: &Ram) {
    let gdt: [u64; 5] = [
        0,
        0x0000_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_9b00_0000_ffff,
        0x00af_9b00_0000_ffff,
    ];
    for (index, entry) in gdt.iter().enumerate() {
        ram.write(GDT + index as u64 * 8, &entry.to_le_bytes());
    }
    // One GiB identity-mapped by 2 MiB pages, and the fourth (with the APIC) by one too.
    let put = |at: u64, value: u64| ram.write(at, &value.to_le_bytes());
    put(PML4, (PML4 + 0x1000) | 3);
    put(PML4 + 0x1000, (PML4 + 0x2000) | 3);
    put(PML4 + 0x1018, (PML4 + 0x3000) | 3);
    put(PDPT, (PML4 + 0x2000) | 1);
    for i in 0..512 {
        put(PML4 + 0x2000 + i * 8, (i << 21) | 0x83);
        put(PML4 + 0x3000 + i * 8, (3 << 30) | (i << 21) | 0x83);
    }
}

/// Page-directory pointers of the PAE guest: the first GiB, by the tables of the 64-bit guests.
pub const PDPT: u64 = 0xc000;

/// Puts a vCPU at `CODE` in `mode`, interrupts off, stack at 0x5000.
pub fn enter(state: &mut VcpuState, mode: Mode) {
    let flat = |selector, access| Segment {
        selector,
        base: 0,
        limit: 0xffff_ffff,
        access,
    };
    let sregs = &mut state.sregs;
    let data = if mode == Mode::Real {
        Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            access: 0x93,
        }
    } else {
        flat(0x10, 0xc093)
    };
    for seg in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *seg = data;
    }
    sregs.cs = match mode {
        Mode::Real => Segment {
            access: 0x9b,
            ..data
        },
        Mode::Protected => flat(0x18, 0xc09b),
        Mode::Long => flat(0x20, 0xa09b),
    };
    sregs.gdt = Table {
        base: GDT,
        limit: 39,
    };
    if mode != Mode::Real {
        sregs.cr0 = 0x11;
        sregs.tr = Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            access: 0x8b,
        };
        sregs.idt = Table {
            base: IDT,
            limit: 0xfff,
        };
    }
    if mode == Mode::Long {
        sregs.cr0 = 0x8000_0011;
        sregs.cr3 = PML4;
        sregs.cr4 = 0x20;
        sregs.efer = 0x500;
    }
    state.regs.rip = CODE;
    state.regs.rsp = 0x5000;
    state.regs.rflags = 2;
    state.run_state = RunState::Runnable;
}
