//! Executable memory for thunks: one memfd mapped twice, once writable and once executable, so
//! that no page is ever both.

use std::io;
use std::sync::OnceLock;

/// Bytes of code the process may hold.
const SIZE: usize = 4 << 20;
/// Bytes at the start, rewritten for every run of an instruction that found no room.
pub(super) const SCRATCH: usize = 512;

/// The two mappings. Code is only ever added, except for the scratch part.
#[derive(Debug)]
pub(super) struct Arena {
    write: *mut u8,
    execute: *const u8,
}

// SAFETY: the mappings live as long as the process; who may write where is decided under the
// cache's lock.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    fn new() -> io::Result<Self> {
        // SAFETY: plain system calls with constant arguments. The descriptor is closed on every
        // path, the mappings are ours until the process ends.
        unsafe {
            let fd = libc::memfd_create(c"vireo-softcpu-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let map = |protection| {
                libc::mmap(
                    std::ptr::null_mut(),
                    SIZE,
                    protection,
                    libc::MAP_SHARED,
                    fd,
                    0,
                )
            };
            let result = if libc::ftruncate(fd, SIZE as libc::off_t) != 0 {
                Err(io::Error::last_os_error())
            } else {
                let write = map(libc::PROT_READ | libc::PROT_WRITE);
                let execute = map(libc::PROT_READ | libc::PROT_EXEC);
                if write == libc::MAP_FAILED || execute == libc::MAP_FAILED {
                    let error = io::Error::last_os_error();
                    for half in [write, execute] {
                        if half != libc::MAP_FAILED {
                            libc::munmap(half, SIZE);
                        }
                    }
                    Err(error)
                } else {
                    Ok(Self {
                        write: write.cast(),
                        execute: execute.cast_const().cast(),
                    })
                }
            };
            libc::close(fd);
            result
        }
    }

    /// The process's one arena, made at the first call.
    pub(super) fn get() -> Result<&'static Self, &'static io::Error> {
        static ARENA: OnceLock<io::Result<Arena>> = OnceLock::new();
        ARENA.get_or_init(Self::new).as_ref()
    }

    /// Copies `code` to `offset`; its executable address, or `None` if it doesn't fit.
    ///
    /// # Safety
    /// Nobody executes or writes these bytes meanwhile.
    pub(super) unsafe fn place(&self, offset: usize, code: &[u8]) -> Option<*const u8> {
        if offset > SIZE || SIZE - offset < code.len() {
            return None;
        }
        // SAFETY: just checked to be inside both mappings; exclusive by the caller's promise.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(offset), code.len());
            Some(self.execute.add(offset))
        }
    }
}
