//! Executable memory: one memfd mapped twice, once writable and once executable, so that no page
//! is ever both.

use std::io;
use std::sync::OnceLock;

/// Bytes of thunks the process may hold.
const SIZE: usize = 4 << 20;
/// Bytes at the start, rewritten for every run of an instruction that found no room.
pub(super) const SCRATCH: usize = 512;

/// The two mappings.
#[derive(Debug)]
pub(crate) struct Arena {
    write: *mut u8,
    execute: *const u8,
    size: usize,
}

// SAFETY: the mappings live as long as the arena; who may write where is its owner's affair
// (of the process's one: decided under the cache's lock).
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// Room for `size` bytes of code. Pages nobody has written cost nothing.
    pub(crate) fn new(size: usize) -> io::Result<Self> {
        // SAFETY: plain system calls. The descriptor is closed on every path, the mappings are
        // ours until `drop`.
        unsafe {
            let fd = libc::memfd_create(c"vireo-softcpu-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let map = |protection| {
                libc::mmap(
                    std::ptr::null_mut(),
                    size,
                    protection,
                    libc::MAP_SHARED,
                    fd,
                    0,
                )
            };
            let result = if libc::ftruncate(fd, size as libc::off_t) != 0 {
                Err(io::Error::last_os_error())
            } else {
                let write = map(libc::PROT_READ | libc::PROT_WRITE);
                let execute = map(libc::PROT_READ | libc::PROT_EXEC);
                if write == libc::MAP_FAILED || execute == libc::MAP_FAILED {
                    let error = io::Error::last_os_error();
                    for half in [write, execute] {
                        if half != libc::MAP_FAILED {
                            libc::munmap(half, size);
                        }
                    }
                    Err(error)
                } else {
                    Ok(Self {
                        write: write.cast(),
                        execute: execute.cast_const().cast(),
                        size,
                    })
                }
            };
            libc::close(fd);
            result
        }
    }

    /// The process's one arena for thunks, made at the first call.
    pub(super) fn get() -> Result<&'static Self, &'static io::Error> {
        static ARENA: OnceLock<io::Result<Arena>> = OnceLock::new();
        ARENA.get_or_init(|| Self::new(SIZE)).as_ref()
    }

    /// Copies `code` to `offset`; its executable address, or `None` if it doesn't fit.
    ///
    /// # Safety
    /// Nobody executes or writes these bytes meanwhile.
    pub(crate) unsafe fn place(&self, offset: usize, code: &[u8]) -> Option<*const u8> {
        if offset > self.size || self.size - offset < code.len() {
            return None;
        }
        // SAFETY: just checked to be inside both mappings; exclusive by the caller's promise.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(offset), code.len());
            Some(self.execute.add(offset))
        }
    }
}

/// Size of a page of the mappings.
const PAGE: usize = 4096;

impl Arena {
    /// Lets go of the pages of the writable mapping from `from` to `to`, which are written: what
    /// is in them stays.
    pub(crate) fn written(&self, from: usize, to: usize) {
        self.advise(from, to, libc::MADV_DONTNEED);
    }

    /// Gives back the memory from `from` to `to`. Nobody may run what is in it.
    pub(crate) fn discard(&self, from: usize, to: usize) {
        self.advise(from, to, libc::MADV_REMOVE);
    }

    fn advise(&self, from: usize, to: usize, advice: libc::c_int) {
        let (from, to) = (from.next_multiple_of(PAGE), to.min(self.size) & !(PAGE - 1));
        if from >= to {
            return;
        }
        // SAFETY: a part of the writable mapping, which is shared: neither piece of advice takes
        // it away.
        let result = unsafe { libc::madvise(self.write.add(from).cast(), to - from, advice) };
        if result != 0 {
            // Only memory is lost.
            log::debug!("madvise of code: {}", io::Error::last_os_error());
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both are mappings of this size that `new` made; the owner executes nothing in
        // them any more.
        unsafe {
            libc::munmap(self.write.cast(), self.size);
            libc::munmap(self.execute.cast_mut().cast(), self.size);
        }
    }
}
