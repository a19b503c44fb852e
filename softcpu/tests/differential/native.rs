//! Cases on the host's own CPU: a forked child runs them one after the other. A signal handler
//! on an alternate stack is both ends of every case: it takes the state that the case ended
//! with out of its signal frame, and puts the next one's initial state in.

use std::io;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use crate::case::{CODE, CODE_LEN, DATA, DATA_LEN, Input, Output, XSAVE_LEN};

/// Cases per child.
pub const BATCH: usize = 256;

/// Memory the child shares with us.
#[repr(C, align(4096))]
struct Shared {
    /// What `DATA` holds at every case's start.
    data: [u8; DATA_LEN],
    /// Cases done.
    done: AtomicUsize,
    count: usize,
    inputs: [Input; BATCH],
    outputs: [Output; BATCH],
}

/// The memory of the child's machine.
struct Mapping {
    shared: *mut Shared,
    /// Memory behind `CODE` and `DATA`.
    code: *mut u8,
    machine: libc::c_int,
}

/// Runs cases natively.
pub struct Native {
    map: Mapping,
}

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());
static CODE_WRITE: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
/// The case now running; `usize::MAX` before the first.
static CURRENT: AtomicUsize = AtomicUsize::new(usize::MAX);

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// # Safety
/// As for mmap.
unsafe fn map(
    addr: u64,
    len: usize,
    protection: libc::c_int,
    fd: libc::c_int,
    offset: usize,
) -> io::Result<*mut u8> {
    let fixed = if addr != 0 {
        libc::MAP_FIXED_NOREPLACE
    } else {
        0
    };
    let anonymous = if fd < 0 { libc::MAP_ANONYMOUS } else { 0 };
    // SAFETY: the caller's promise.
    let p = unsafe {
        libc::mmap(
            addr as usize as *mut libc::c_void,
            len,
            protection,
            libc::MAP_SHARED | libc::MAP_POPULATE | fixed | anonymous,
            fd,
            offset as libc::off_t,
        )
    };
    if p == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(p.cast())
}

/// Whether the kernel makes segments for 16-bit code. (It does so in a child: a thread keeps its
/// table.)
pub fn has_segments() -> bool {
    // SAFETY: the child only makes system calls.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::_exit(i32::from(segments().is_err()));
        }
        let mut status = 0;
        pid > 0 && libc::waitpid(pid, &raw mut status, 0) == pid && status == 0
    }
}

impl Native {
    pub fn new() -> io::Result<Self> {
        const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: new mappings of new memory, never unmapped.
        unsafe {
            let machine = check(libc::memfd_create(c"case".as_ptr(), libc::MFD_CLOEXEC))?;
            check(libc::ftruncate(machine, (4096 + DATA_LEN) as libc::off_t))?;
            let shared = map(0, size_of::<Shared>(), RW, -1, 0)?.cast();
            let code = map(0, 4096, RW, machine, 0)?;
            code.write_bytes(0xcc, 4096);
            Ok(Self {
                map: Mapping {
                    shared,
                    code,
                    machine,
                },
            })
        }
    }

    /// Runs up to `BATCH` cases. The error says which one the child didn't survive.
    pub fn run(&mut self, data: &[u8; DATA_LEN], inputs: &[Input]) -> Result<Vec<Output>, String> {
        assert!(inputs.len() <= BATCH);
        // SAFETY: `shared` is ours alone while no child lives. The child calls nothing but
        // system calls and copies memory.
        unsafe {
            let shared = self.map.shared;
            (*shared).data = *data;
            (*shared).count = inputs.len();
            (*shared).done.store(0, Ordering::SeqCst);
            (&mut (*shared).inputs)[..inputs.len()].copy_from_slice(inputs);
            let pid = libc::fork();
            if pid < 0 {
                return Err(io::Error::last_os_error().to_string());
            }
            if pid == 0 {
                let code = match child(&self.map) {
                    Ok(()) => 3,
                    Err(_) => 2,
                };
                libc::_exit(code);
            }
            let mut status = 0;
            while libc::waitpid(pid, &raw mut status, 0) < 0 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error.to_string());
                }
            }
            let done = (*shared).done.load(Ordering::SeqCst);
            if done != inputs.len() || status != 0 {
                return Err(format!(
                    "the native child ended with status {status:#x} in case {done}: {:02x?}",
                    inputs.get(done).map(|i| &i.code[..64])
                ));
            }
            Ok((&(*shared).outputs)[..inputs.len()].to_vec())
        }
    }
}

/// The child's life. Returns only if something is wrong.
///
/// # Safety
/// Called in a newly forked child only.
unsafe fn child(mapping: &Mapping) -> io::Result<()> {
    const STACK: usize = 64 << 10;
    const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: new mappings at addresses that MAP_FIXED_NOREPLACE makes sure are free; the
    // handlers' stack is never freed.
    unsafe {
        libc::alarm(20);
        // Cases that need them are only run where they can be made.
        let _ = segments();
        // 64-bit processes have null selectors there, which 32-bit code could not use.
        std::arch::asm!("mov ds, {0:e}", "mov es, {0:e}", in(reg) 0x2b);
        map(
            CODE,
            4096,
            libc::PROT_READ | libc::PROT_EXEC,
            mapping.machine,
            0,
        )?;
        map(DATA, 4096, libc::PROT_READ, mapping.machine, 4096)?;
        map(DATA + 4096, DATA_LEN - 4096, RW, mapping.machine, 8192)?;
        let write = map(0, DATA_LEN, RW, mapping.machine, 4096)?;
        DATA_WRITE.store(write, Ordering::SeqCst);
        SHARED.store(mapping.shared, Ordering::SeqCst);
        CODE_WRITE.store(mapping.code, Ordering::SeqCst);
        CURRENT.store(usize::MAX, Ordering::SeqCst);
        let stack = libc::stack_t {
            ss_sp: map(0, STACK, RW, -1, 0)?.cast(),
            ss_flags: 0,
            ss_size: STACK,
        };
        check(libc::sigaltstack(&raw const stack, std::ptr::null_mut()))?;
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = entered as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        for signal in [
            libc::SIGTRAP,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGSEGV,
            libc::SIGBUS,
        ] {
            check(libc::sigaction(
                signal,
                &raw const action,
                std::ptr::null_mut(),
            ))?;
        }
        check(libc::raise(libc::SIGTRAP))?;
    }
    Ok(())
}

static DATA_WRITE: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

/// General registers in encoding order, as the signal frame numbers them.
const ORDER: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Selectors of the local descriptor table.
const CODE_16: u64 = 7;
const DATA_16: u64 = 0xf;
const DATA_32: u64 = 0x17;
const CODE_32: u64 = 0x1f;

/// Makes the segments that `Shape::segmented` promises.
fn segments() -> io::Result<()> {
    // struct user_desc of modify_ldt(2): entry, base, limit, flags.
    const BIG: u32 = 1;
    const IS_CODE: u32 = 2 << 1;
    const USEABLE: u32 = 1 << 6;
    let data = DATA_LEN as u32 - 1;
    let (code_at, data_at) = (CODE as u32, DATA as u32);
    for entry in [
        [0, code_at, 0xfff, IS_CODE | USEABLE],
        [1, data_at, data, USEABLE],
        [2, data_at, data, BIG | USEABLE],
        [3, code_at, 0xfff, BIG | IS_CODE | USEABLE],
    ] {
        // SAFETY: the kernel copies 16 bytes.
        let result = unsafe { libc::syscall(libc::SYS_modify_ldt, 1, entry.as_ptr(), 16) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

// Alignment checks of a case must not go on in its signal handler.
std::arch::global_asm!(
    ".pushsection .text.differential, \"ax\"",
    "differential_entered:",
    "pushfq",
    "and dword ptr [rsp], 0xfffbffff",
    "popfq",
    "jmp {handler}",
    ".popsection",
    handler = sym on_signal,
);

unsafe extern "C" {
    #[link_name = "differential_entered"]
    fn entered(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::ucontext_t);
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    // SAFETY: the kernel hands over a valid frame whose FP part is an XSAVE area of at least
    // XSAVE_LEN bytes (this host has AVX, or the test left itself out). The shared memory is
    // the child's while it lives.
    unsafe {
        let machine = &mut (*context).uc_mcontext;
        let area = machine.fpregs.cast::<[u8; XSAVE_LEN]>();
        let shared = SHARED.load(Ordering::SeqCst);
        let data = DATA_WRITE.load(Ordering::SeqCst);
        let mut current = CURRENT.load(Ordering::SeqCst);
        if current == usize::MAX {
            current = 0;
        } else {
            let out = &mut (*shared).outputs[current];
            for (value, index) in out.gpr.iter_mut().zip(ORDER) {
                *value = machine.gregs[index as usize] as u64;
            }
            out.rip = machine.gregs[libc::REG_RIP as usize] as u64;
            out.rflags = machine.gregs[libc::REG_EFL as usize] as u64;
            out.vector = machine.gregs[libc::REG_TRAPNO as usize] as u64;
            out.error = machine.gregs[libc::REG_ERR as usize] as u64;
            out.cr2 = machine.gregs[libc::REG_CR2 as usize] as u64;
            out.xsave = *area;
            std::ptr::copy_nonoverlapping(data, out.data.as_mut_ptr(), DATA_LEN);
            current += 1;
            (*shared).done.store(current, Ordering::SeqCst);
        }
        if current >= (*shared).count {
            libc::_exit(0);
        }
        CURRENT.store(current, Ordering::SeqCst);
        let input = &(*shared).inputs[current];
        std::ptr::copy_nonoverlapping((*shared).data.as_ptr(), data, DATA_LEN);
        std::ptr::copy_nonoverlapping(
            input.code.as_ptr(),
            CODE_WRITE.load(Ordering::SeqCst),
            CODE_LEN,
        );
        for (value, index) in input.gpr.iter().zip(ORDER) {
            machine.gregs[index as usize] = *value as i64;
        }
        let shape = input.shape;
        machine.gregs[libc::REG_RIP as usize] = shape.code() as i64;
        // CS is the lowest of four words, SS the highest; Linux's flat user segments, or ours.
        let (cs, ss, ds) = match (shape.segmented, shape.bits, shape.stack) {
            (true, 16, 16) => (CODE_16, DATA_16, DATA_16),
            (true, 16, _) => (CODE_16, DATA_32, DATA_16),
            (true, _, 16) => (CODE_32, DATA_16, DATA_16),
            (true, ..) => (CODE_32, DATA_32, DATA_16),
            (_, 64, _) => (0x33, 0x2b, 0x2b),
            _ => (0x23, 0x2b, 0x2b),
        };
        let segments = &mut machine.gregs[libc::REG_CSGSFS as usize];
        let others = *segments as u64 & 0x0000_ffff_ffff_0000;
        *segments = (others | cs | ss << 48) as i64;
        std::arch::asm!("mov ds, {0:e}", "mov es, {0:e}", in(reg) ds);
        machine.gregs[libc::REG_EFL as usize] = input.rflags as i64;
        // Bytes 464..512 tell the kernel how to read the area; the header stays but for the
        // components present.
        (&mut (*area))[..464].copy_from_slice(&input.xsave[..464]);
        (&mut (*area))[512] = 7;
        (&mut (*area))[576..].copy_from_slice(&input.xsave[576..]);
    }
}
