//! Getting ready for the guest's code before it is here: vCPUs decode what the source says they have run lately, on
//! threads of their own, while the last pages are still coming.
//!
//! What the source says are hints: as many as fit into one frame, taken once. What is decoded is found only by code at
//! that address, and forgotten when the page comes again.

use std::collections::BTreeMap;
use std::io::Write;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use hypervisor::{Backend, Vcpu, Vm};
use vmm_api::migrate::{self, Code, Extra, Kind};

use super::link::Link;
use super::moment;
use crate::devices::lock;
use crate::killpoint::killpoint;
use crate::memory::GuestMemory;
use crate::num::to_usize;

/// vCPUs of a machine that is coming, by their number.
pub type Vcpus = BTreeMap<u32, Box<dyn Vcpu>>;

/// The vCPUs of a machine that is coming, and those who get them ready.
#[derive(Debug)]
pub struct Ahead {
    vm: Arc<dyn Vm>,
    state: Mutex<State>,
    /// By the vCPUs' numbers: the source has code by APIC id.
    apic_ids: Arc<[u32]>,
    /// Something was decoded of what may come again.
    begun: AtomicBool,
    /// It is time to run.
    enough: Arc<AtomicBool>,
}

#[derive(Debug)]
enum State {
    Idle(Vcpus),
    Busy(JoinHandle<Vcpus>),
    Gone,
}

impl Ahead {
    /// Of vCPUs that nobody uses yet.
    #[must_use]
    pub fn new(vm: Arc<dyn Vm>, vcpus: Vcpus, apic_ids: Arc<[u32]>) -> Self {
        Self {
            vm,
            state: Mutex::new(State::Idle(vcpus)),
            apic_ids,
            begun: AtomicBool::new(false),
            enough: Arc::default(),
        }
    }

    /// What the source may say to this.
    #[must_use]
    pub fn takes(vm: &dyn Vm) -> Vec<Extra> {
        match vm.backend() {
            Backend::Soft => vec![Extra::Code],
            Backend::Kvm => Vec::new(),
        }
    }

    /// Gets ready for this code in the background, and tells the source when that is done; the first time only.
    ///
    /// # Errors
    /// No thread; the connection's.
    pub fn begin(&self, code: Code, link: &Link) -> std::io::Result<()> {
        let mut state = lock(&self.state);
        let State::Idle(vcpus) = &mut *state else {
            return Ok(());
        };
        let vcpus = std::mem::take(vcpus);
        // Before anything is read: see `wrote`.
        self.begun.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        killpoint("vmm.incoming-code");
        let (enough, apic_ids) = (self.enough.clone(), self.apic_ids.clone());
        let link = link.try_clone()?;
        let work = move || {
            let vcpus = decode(vcpus, code, &apic_ids, &enough);
            moment("code is decoded");
            let told = migrate::frame(Kind::CodeTaken, &[]);
            if let Ok(frame) = told
                && let Err(error) = (&mut &link).write_all(&frame)
            {
                // It finds out by itself.
                log::debug!("{error}");
            }
            vcpus
        };
        let thread = std::thread::Builder::new().name("ahead".into());
        *state = State::Busy(thread.spawn(work)?);
        Ok(())
    }

    /// `len` bytes of guest memory have come, `start` as in [`GuestMemory::bytes`]: what was decoded of what was there is
    /// void.
    pub fn wrote(&self, memory: &GuestMemory, start: u64, len: u64) {
        // Either this sees that it has begun, or whoever decodes sees the new bytes.
        fence(Ordering::SeqCst);
        if self.begun.load(Ordering::SeqCst) {
            for (gpa, len) in memory.places(start, len) {
                self.vm.memory_written(gpa, len);
            }
        }
    }

    /// What is not decoded by now is decoded when it is run.
    pub fn enough(&self) {
        self.enough.store(true, Ordering::Relaxed);
    }

    /// The vCPUs.
    ///
    /// # Errors
    /// A thread that had some panicked.
    pub fn finish(&self) -> Result<Vcpus, String> {
        self.enough();
        match std::mem::replace(&mut *lock(&self.state), State::Gone) {
            State::Idle(vcpus) => Ok(vcpus),
            State::Busy(thread) => thread
                .join()
                .map_err(|_| "a thread that decodes ahead panicked".to_owned()),
            State::Gone => Err("its vCPUs were taken before".to_owned()),
        }
    }
}

/// Each vCPU by one thread, on as many as there are processors.
fn decode(vcpus: Vcpus, mut code: Code, apic_ids: &[u32], enough: &AtomicBool) -> Vcpus {
    let most = std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = most.min(code.vcpus.len());
    let queue: Vec<_> = vcpus
        .into_iter()
        .map(|(id, vcpu)| {
            let apic_id = apic_ids.get(to_usize(id.into()));
            let places = apic_id.and_then(|apic_id| code.vcpus.remove(apic_id));
            (id, vcpu, places.unwrap_or_default())
        })
        .collect();
    let queue = Mutex::new(queue);
    let done = Mutex::new(Vcpus::new());
    let work = || {
        while let Some((id, mut vcpu, places)) = { lock(&queue).pop() } {
            vcpu.decode_ahead(&places, &|| !enough.load(Ordering::Relaxed));
            lock(&done).insert(id, vcpu);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            let thread = std::thread::Builder::new().name("ahead".into());
            if let Err(error) = thread.spawn_scoped(scope, work) {
                log::debug!("a thread to decode ahead: {error}");
            }
        }
        work();
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner)
}
