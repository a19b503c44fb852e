//! The process's thunks: one for each distinct key, kept for ever, up to a limit. Past it,
//! instructions run from a scratch buffer: a guest that makes up endless new ones gets slow,
//! not big.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, OnceLock};

use super::arena::{Arena, SCRATCH};
use super::key::Key;
use super::thunk::{self, Desc, Entry};

/// Most thunks that are kept.
const LIMIT: usize = 32_768;

#[derive(Default)]
struct Cache {
    thunks: HashMap<Key, &'static Desc>,
    /// Bytes of the arena in use past the scratch part.
    used: usize,
}

fn lock() -> MutexGuard<'static, Cache> {
    static CACHE: OnceLock<Mutex<Cache>> = OnceLock::new();
    match CACHE.get_or_init(Mutex::default).lock() {
        Ok(guard) => guard,
        Err(poisoned) => poisoned.into_inner(),
    }
}

/// What became of a look-up.
pub(super) enum Found {
    /// Ready to run.
    Kept(&'static Desc),
    /// Only through `with_scratch`.
    NoRoom(Desc),
}

/// The thunk for `key`, made if need be. `None`: this host can't encode or run it.
pub(super) fn find(key: Key) -> Option<Found> {
    let mut cache = lock();
    if let Some(desc) = cache.thunks.get(&key) {
        return Some(Found::Kept(desc));
    }
    let (code, quick, mut desc) = compile(key)?;
    let arena = arena()?;
    if cache.thunks.len() >= LIMIT {
        return Some(Found::NoRoom(desc));
    }
    // SAFETY: bytes from here on have not been given out yet, and the lock is held.
    let Some(at) = (unsafe { arena.place(SCRATCH + cache.used, &code) }) else {
        return Some(Found::NoRoom(desc));
    };
    cache.used += code.len().next_multiple_of(16);
    desc.entry = entry(at);
    desc.quick = entry(at.wrapping_add(quick));
    let desc = Box::leak(Box::new(desc));
    cache.thunks.insert(key, desc);
    Some(Found::Kept(desc))
}

/// Runs `f` with a description whose code is in the scratch buffer. `None` as for `find`.
pub(super) fn with_scratch<T>(key: Key, f: impl FnOnce(&Desc) -> T) -> Option<T> {
    let (code, _, mut desc) = compile(key)?;
    if code.len() > SCRATCH {
        return None;
    }
    let arena = arena()?;
    let guard = lock();
    // SAFETY: the scratch part is used under the lock only. CPUID makes this CPU forget what it
    // has fetched from there (Intel SDM vol. 3, 8.1.3).
    unsafe {
        desc.entry = entry(arena.place(0, &code)?);
        std::arch::x86_64::__cpuid(0);
    }
    let result = f(&desc);
    drop(guard);
    Some(result)
}

fn compile(key: Key) -> Option<(Vec<u8>, usize, Desc)> {
    match thunk::compile(key) {
        Ok(made) => Some(made),
        Err(error) => {
            log::warn!("{error}");
            None
        }
    }
}

fn arena() -> Option<&'static Arena> {
    match Arena::get() {
        Ok(arena) => Some(arena),
        Err(error) => {
            log::error!("no memory for generated code, so no SSE for guests: {error}");
            None
        }
    }
}

fn entry(at: *const u8) -> Entry {
    // SAFETY: `at` points to code that `thunk::compile` made with this signature.
    unsafe { std::mem::transmute::<*const u8, Entry>(at) }
}
