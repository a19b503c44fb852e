//! A whole machine's state on its way to a file and back: guest memory, ELF cores, the job that
//! writes them. What the states are is the machine's business (`machine::save`).

pub mod block_job;
pub mod core;
pub mod dirty;
pub mod image;
pub mod job;
pub mod live;
pub mod ram;
pub mod switch;

/// This thread gets what processor time nobody else wants.
pub fn idle() {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread, and the struct lives for the call.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
    if result != 0 {
        log::debug!("SCHED_IDLE: {}", std::io::Error::last_os_error());
    }
}
