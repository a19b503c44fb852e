//! vCPU threads: running, stopping, and what they tell the event loop.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hypervisor::{Bus, Exit, Kicker, Vcpu, VcpuState};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::devices::ioapic::IoApic;
use crate::devices::{Request, Requests, lock};
use crate::loader::LoadError;

/// Longest time all vCPUs together may take to stop: one that is loading a kernel first
/// finishes that.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// A vCPU that has not stopped after this long is kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(20);

/// What a vCPU thread tells the event loop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A device's request.
    Request(Request),
    /// Triple fault.
    TripleFault,
    /// The backend cannot go on.
    Broken(String),
}

/// Puts a kernel into guest memory; gives the state of the vCPU that enters it.
pub type Load = Box<dyn FnOnce() -> Result<VcpuState, LoadError> + Send>;

/// A job for a vCPU's own thread, done before it runs on.
pub enum Job {
    /// Load what it is to enter. Here, because unpacking a kernel takes long and whoever
    /// starts a machine need not wait for it.
    Boot(Load),
    /// Replace its whole state.
    Load(Box<VcpuState>),
    /// Non-maskable interrupt.
    Nmi,
    /// Tell the guest that it was stopped.
    WasStopped,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Boot(_) => "Boot",
            Self::Load(_) => "Load",
            Self::Nmi => "Nmi",
            Self::WasStopped => "WasStopped",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Hold,
    /// As `Hold`, once there are no more jobs.
    Settle,
    Run,
    Quit,
}

/// Which vCPUs a debugger lets run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leave {
    All,
    Only(usize),
    None,
}

/// Something a debugger does to a vCPU that stands still, on its own thread.
struct Call(Action);

type Action = Box<dyn FnOnce(&mut dyn Vcpu) + Send>;

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Call")
    }
}

/// A vCPU came to a breakpoint, a watchpoint, or the end of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped {
    /// Which.
    pub vcpu: usize,
    /// Address of what is watched and was accessed.
    pub watch: Option<u64>,
}

/// A possible vCPU's place. vCPUs come and go while the machine runs.
#[derive(Debug, Default)]
struct Seat {
    /// Gets its thread out of the backend; none: the vCPU is not there.
    kicker: Option<Arc<dyn Kicker>>,
    /// Its thread is to end.
    leaving: bool,
    calls: VecDeque<Call>,
    jobs: VecDeque<Job>,
}

#[derive(Debug)]
struct GateState {
    mode: Mode,
    /// What a debugger lets run.
    debugger: Leave,
    /// A migration slows the guest down: nobody runs just now.
    braked: bool,
    /// Threads that wait.
    parked: usize,
    seats: Vec<Seat>,
}

impl GateState {
    fn kickers(&self) -> impl Iterator<Item = &Arc<dyn Kicker>> {
        self.seats.iter().filter_map(|seat| seat.kicker.as_ref())
    }

    /// Threads that do not wait.
    fn running(&self) -> usize {
        self.kickers().count().saturating_sub(self.parked)
    }
}

/// Where vCPU threads wait while the machine is stopped, and what they report.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<GateState>,
    /// vCPU threads wait here.
    changed: Condvar,
    /// Whoever waits for them waits here: a thread that parks must not wake those that have.
    parking: Condvar,
    messages: Mutex<VecDeque<Message>>,
    wake: EventFd,
    stops: Mutex<VecDeque<Stopped>>,
    /// Readable when there are stops for the debugger.
    stopped: EventFd,
}

enum Next {
    Run,
    Call(Call),
    Job(Job),
    Quit,
}

impl Gate {
    /// A closed gate for at most `vcpus` threads.
    ///
    /// # Errors
    /// No eventfd.
    pub fn new(vcpus: u32) -> Result<Self, Errno> {
        let eventfd = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self {
            state: Mutex::new(GateState {
                mode: Mode::Hold,
                parked: 0,
                debugger: Leave::All,
                braked: false,
                seats: (0..vcpus).map(|_| Seat::default()).collect(),
            }),
            changed: Condvar::new(),
            parking: Condvar::new(),
            messages: Mutex::default(),
            wake: eventfd()?,
            stops: Mutex::default(),
            stopped: eventfd()?,
        })
    }

    /// Readable when there are messages.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// All messages so far.
    pub fn take_messages(&self) -> VecDeque<Message> {
        if let Err(error) = self.wake.read()
            && error != Errno::EAGAIN
        {
            log::error!("eventfd: {error}");
        }
        std::mem::take(&mut *lock(&self.messages))
    }

    /// Whether nobody has anything to report.
    pub fn is_quiet(&self) -> bool {
        lock(&self.messages).is_empty()
    }

    /// The machine can't go on, for a reason outside its vCPUs.
    pub fn broken(&self, why: String) {
        self.report(Message::Broken(why));
    }

    /// Closes the gate and reports.
    fn report(&self, message: Message) {
        self.set_mode(Mode::Hold);
        lock(&self.messages).push_back(message);
        if let Err(error) = self.wake.write(1) {
            log::error!("eventfd: {error}");
        }
    }

    fn set_mode(&self, mode: Mode) {
        let mut state = lock(&self.state);
        if state.mode != Mode::Quit {
            state.mode = mode;
        }
        self.changed.notify_all();
        self.parking.notify_all();
    }

    fn next(&self, index: usize) -> Next {
        let mut state = lock(&self.state);
        loop {
            if state.mode == Mode::Quit {
                return Next::Quit;
            }
            let GateState { mode, seats, .. } = &mut *state;
            let Some(seat) = seats.get_mut(index) else {
                return Next::Quit;
            };
            if seat.leaving {
                *seat = Seat::default();
                self.parking.notify_all();
                return Next::Quit;
            }
            if let Some(call) = seat.calls.pop_front() {
                return Next::Call(call);
            }
            if matches!(mode, Mode::Run | Mode::Settle)
                && let Some(job) = seat.jobs.pop_front()
            {
                return Next::Job(job);
            }
            let left = matches!(state.debugger, Leave::All) || state.debugger == Leave::Only(index);
            if state.mode == Mode::Run && left && !state.braked {
                return Next::Run;
            }
            state.parked += 1;
            self.parking.notify_all();
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.parked -= 1;
        }
    }
}

impl Gate {
    /// Runs `action` on the thread of vCPU `index`, which stands still; what it returned.
    fn call<T: Send + 'static>(
        &self,
        index: usize,
        action: impl FnOnce(&mut dyn Vcpu) -> T + Send + 'static,
    ) -> std::io::Result<T> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let call = Call(Box::new(move |vcpu| {
            // Nobody waits any more: nobody misses it.
            let _ = sender.send(action(vcpu));
        }));
        match lock(&self.state).seats.get_mut(index) {
            Some(seat) if seat.kicker.is_some() => seat.calls.push_back(call),
            _ => return Err(std::io::Error::other(format!("there is no vCPU {index}"))),
        }
        self.changed.notify_all();
        receiver
            .recv_timeout(STOP_LIMIT)
            .map_err(|_| std::io::Error::other(format!("vCPU {index} does not answer")))
    }

    /// The vCPUs that are there.
    fn present(&self) -> Vec<usize> {
        let state = lock(&self.state);
        let seats = state.seats.iter().enumerate();
        seats
            .filter(|(_, seat)| seat.kicker.is_some())
            .map(|(index, _)| index)
            .collect()
    }

    fn kick(&self) {
        lock(&self.state).kickers().for_each(|kicker| kicker.kick());
    }

    /// Kicks all vCPUs until `done`; those that need not stop only look up.
    fn kick_until(
        &self,
        limit: Duration,
        done: impl Fn(&GateState) -> bool,
    ) -> Result<(), MutexGuard<'_, GateState>> {
        let deadline = Instant::now() + limit;
        let mut state = lock(&self.state);
        while !done(&state) {
            if Instant::now() >= deadline {
                return Err(state);
            }
            state.kickers().for_each(|kicker| kicker.kick());
            let waited = self
                .parking
                .wait_timeout_while(state, KICK_AGAIN, |state| !done(state));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn set_leave(&self, leave: Leave) {
        lock(&self.state).debugger = leave;
        self.changed.notify_all();
    }

    /// A vCPU stops for the debugger; the others are to follow.
    fn debug_stop(&self, stopped: Stopped) {
        self.set_leave(Leave::None);
        lock(&self.stops).push_back(stopped);
        if let Err(error) = self.stopped.write(1) {
            log::error!("eventfd: {error}");
        }
    }
}

/// A debugger's hold on the vCPUs, beside the machine's own: they run while both let them.
#[derive(Debug)]
pub struct Debugger {
    gate: Arc<Gate>,
}

impl Debugger {
    /// The vCPUs that are there.
    #[must_use]
    pub fn vcpus(&self) -> Vec<usize> {
        self.gate.present()
    }

    /// Stops all vCPUs between two instructions; returns when they have.
    ///
    /// # Errors
    /// A vCPU is stuck in the backend.
    pub fn stop(&self) -> Result<(), NotStopping> {
        self.gate.set_leave(Leave::None);
        stop(&self.gate)
    }

    /// Lets all of them run, or only one.
    pub fn go(&self, only: Option<usize>) {
        self.gate.set_leave(only.map_or(Leave::All, Leave::Only));
    }

    /// Runs `action` on the thread of vCPU `index`, which stands still; what it returned.
    ///
    /// # Errors
    /// The thread doesn't answer: the machine is ending.
    pub fn call<T: Send + 'static>(
        &self,
        index: usize,
        action: impl FnOnce(&mut dyn Vcpu) -> T + Send + 'static,
    ) -> std::io::Result<T> {
        self.gate.call(index, action)
    }

    /// Readable when there are stops to take.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.gate.stopped.as_fd()
    }

    /// All stops since the last call.
    pub fn take_stops(&self) -> VecDeque<Stopped> {
        if let Err(error) = self.gate.stopped.read()
            && error != Errno::EAGAIN
        {
            log::error!("eventfd: {error}");
        }
        std::mem::take(&mut *lock(&self.gate.stops))
    }
}

/// A third hold on the vCPUs, by which a migration slows the guest down.
#[derive(Debug)]
pub struct Brake {
    gate: Arc<Gate>,
}

impl Brake {
    /// Stops all vCPUs; returns when they have.
    ///
    /// # Errors
    /// A vCPU is stuck in the backend.
    pub fn pull(&self) -> Result<(), NotStopping> {
        lock(&self.gate.state).braked = true;
        stop(&self.gate)
    }

    /// They run as far as others let them.
    pub fn release(&self) {
        lock(&self.gate.state).braked = false;
        self.gate.changed.notify_all();
    }
}

/// Kicks the vCPUs until all wait at the gate, which has been closed.
fn stop(gate: &Gate) -> Result<(), NotStopping> {
    let running = gate.kick_until(STOP_LIMIT, |state| state.running() == 0);
    running.map_err(|state| NotStopping(state.running()))
}

impl Requests for Gate {
    fn request(&self, request: Request) {
        self.report(Message::Request(request));
    }
}

/// Gives its vCPU back when it ends.
type Thread = JoinHandle<Box<dyn Vcpu>>;

/// All vCPU threads of a machine.
pub struct Threads {
    gate: Arc<Gate>,
    bus: Arc<dyn Bus>,
    ioapic: Arc<IoApic>,
    threads: BTreeMap<usize, Thread>,
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Threads").field(&self.threads).finish()
    }
}

/// A vCPU did not leave its `run`.
#[derive(Debug, thiserror::Error)]
#[error("{0} of the vCPUs did not stop within {STOP_LIMIT:?}")]
pub struct NotStopping(usize);

impl Threads {
    /// Starts a thread for each vCPU, all waiting at the closed `gate`.
    ///
    /// # Errors
    /// No thread.
    pub fn start(
        gate: &Arc<Gate>,
        vcpus: impl IntoIterator<Item = (usize, Box<dyn Vcpu>)>,
        bus: &Arc<dyn Bus>,
        ioapic: &Arc<IoApic>,
    ) -> std::io::Result<Self> {
        virtio::worker::start_from_a_thread_of_its_own()?;
        let mut threads = Self {
            gate: gate.clone(),
            bus: bus.clone(),
            ioapic: ioapic.clone(),
            threads: BTreeMap::new(),
        };
        let (named, all_named) = mpsc::channel();
        for (index, vcpu) in vcpus {
            threads.spawn(index, vcpu, named.clone())?;
        }
        drop(named);
        // Fails when all have.
        let _ = all_named.recv();
        Ok(threads)
    }

    /// Starts the thread of another vCPU, which runs when the others do.
    ///
    /// # Errors
    /// No thread; there is such a vCPU already.
    pub fn add(&mut self, index: usize, vcpu: Box<dyn Vcpu>) -> std::io::Result<()> {
        let (named, is_named) = mpsc::channel();
        self.spawn(index, vcpu, named)?;
        let _ = is_named.recv();
        Ok(())
    }

    /// Drops `named` once the thread has its name. Others tell vCPUs by it, to pin them and to put them into control
    /// groups, as soon as the machine says that they are there; a thread names itself, when it first runs.
    fn spawn(
        &mut self,
        index: usize,
        vcpu: Box<dyn Vcpu>,
        named: mpsc::Sender<Infallible>,
    ) -> std::io::Result<()> {
        {
            let mut state = lock(&self.gate.state);
            match state.seats.get_mut(index) {
                Some(seat) if seat.kicker.is_none() => seat.kicker = Some(vcpu.kicker()),
                _ => return Err(std::io::Error::other(format!("vCPU {index} is taken"))),
            }
        }
        let (gate, bus, ioapic) = (self.gate.clone(), self.bus.clone(), self.ioapic.clone());
        let started = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                drop(named);
                work(index, vcpu, &gate, &*bus, &ioapic)
            });
        match started {
            Ok(thread) => {
                self.threads.insert(index, thread);
                Ok(())
            }
            Err(error) => {
                if let Some(seat) = lock(&self.gate.state).seats.get_mut(index) {
                    *seat = Seat::default();
                }
                Err(error)
            }
        }
    }

    /// Ends the thread of a vCPU; that vCPU.
    ///
    /// # Errors
    /// It is stuck in the backend; its thread ends when it comes out.
    pub fn remove(&mut self, index: usize) -> Result<Option<Box<dyn Vcpu>>, NotStopping> {
        if let Some(seat) = lock(&self.gate.state).seats.get_mut(index) {
            seat.leaving = true;
        }
        self.gate.changed.notify_all();
        let gone = |state: &GateState| {
            let seat = state.seats.get(index);
            seat.is_none_or(|seat| seat.kicker.is_none())
        };
        self.gate
            .kick_until(STOP_LIMIT, gone)
            .map_err(|_| NotStopping(1))?;
        let thread = self.threads.remove(&index).map(JoinHandle::join);
        if let Some(Err(_)) = &thread {
            log::error!("the thread of vCPU {index} panicked");
        }
        Ok(thread.and_then(Result::ok))
    }

    /// The vCPUs that are there.
    #[must_use]
    pub fn present(&self) -> Vec<usize> {
        self.gate.present()
    }

    /// Lets all vCPUs run.
    pub fn run(&self) {
        self.gate.set_mode(Mode::Run);
    }

    /// Stops all vCPUs between two instructions; returns when they have.
    ///
    /// # Errors
    /// A vCPU is stuck in the backend.
    pub fn hold(&self) -> Result<(), NotStopping> {
        self.gate.set_mode(Mode::Hold);
        stop(&self.gate)
    }

    /// A debugger's hold on them. `stopped`: it has them stand still from now on.
    #[must_use]
    pub fn debugger(&self, stopped: bool) -> Debugger {
        if stopped {
            self.gate.set_leave(Leave::None);
        }
        Debugger {
            gate: self.gate.clone(),
        }
    }

    /// The hold by which a migration slows them down; not pulled.
    #[must_use]
    pub fn brake(&self) -> Brake {
        Brake {
            gate: self.gate.clone(),
        }
    }

    /// Has the vCPUs, which are stopped, do the jobs they would do before running on. Returns
    /// when they have, or one of them reported something.
    ///
    /// # Errors
    /// A job takes too long.
    pub fn settle(&self) -> Result<(), NotStopping> {
        self.gate.set_mode(Mode::Settle);
        let busy = |state: &mut GateState| {
            let idle = state.running() == 0 && state.seats.iter().all(|s| s.jobs.is_empty());
            state.mode == Mode::Settle && !idle
        };
        let state = lock(&self.gate.state);
        let (state, timeout) = self
            .gate
            .parking
            .wait_timeout_while(state, STOP_LIMIT, busy)
            .unwrap_or_else(PoisonError::into_inner);
        let running = state.running();
        drop(state);
        if timeout.timed_out() {
            return Err(NotStopping(running.max(1)));
        }
        self.hold()
    }

    /// Runs `action` on the thread of vCPU `index`, which stands still; what it returned.
    ///
    /// # Errors
    /// The thread doesn't answer.
    pub fn call<T: Send + 'static>(
        &self,
        index: usize,
        action: impl FnOnce(&mut dyn Vcpu) -> T + Send + 'static,
    ) -> std::io::Result<T> {
        self.gate.call(index, action)
    }

    /// Has all vCPUs stop for good, without waiting until they have.
    pub fn dismiss(&self) {
        self.gate.set_mode(Mode::Quit);
        self.gate.kick();
    }

    /// Gives every vCPU a job, done as soon as it runs again, or now if it does.
    pub fn each<F: FnMut(usize) -> Job>(&self, mut job: F) {
        let mut state = lock(&self.gate.state);
        for (index, seat) in state.seats.iter_mut().enumerate() {
            if seat.kicker.is_some() {
                seat.jobs.push_back(job(index));
            }
        }
        let running = state.mode == Mode::Run;
        drop(state);
        if running {
            self.gate.kick();
        }
    }

    /// Jobs not begun are forgotten.
    pub fn forget_jobs(&self) {
        for seat in &mut lock(&self.gate.state).seats {
            seat.jobs.clear();
        }
    }

    /// CPU time of each thread so far, nanoseconds, by vCPU; 0 for one that is not there.
    #[must_use]
    pub fn cpu_times(&self) -> Vec<u64> {
        let seats = lock(&self.gate.state).seats.len();
        let time = |index| self.threads.get(&index).map_or(0, thread_time);
        (0..seats).map(time).collect()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.gate.set_mode(Mode::Quit);
        let deadline = Instant::now() + STOP_LIMIT;
        for (_, thread) in std::mem::take(&mut self.threads) {
            while !thread.is_finished() && Instant::now() < deadline {
                self.gate.kick();
                std::thread::sleep(Duration::from_micros(100));
            }
            if !thread.is_finished() {
                log::error!("a vCPU thread does not end");
            } else if thread.join().is_err() {
                log::error!("a vCPU thread panicked");
            }
        }
    }
}

fn thread_time(handle: &Thread) -> u64 {
    if handle.is_finished() {
        return 0;
    }
    let mut clock: libc::clockid_t = 0;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the handle keeps the thread from being forgotten; both calls fill the variables
    // they are given.
    let failed = unsafe {
        libc::pthread_getcpuclockid(handle.as_pthread_t(), &raw mut clock) != 0
            || libc::clock_gettime(clock, &raw mut time) != 0
    };
    if failed { 0 } else { nanoseconds(&time) }
}

/// A time in nanoseconds.
#[must_use]
pub fn nanoseconds(time: &libc::timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// Runs a vCPU until it is to end; the vCPU.
fn work(
    index: usize,
    mut vcpu: Box<dyn Vcpu>,
    gate: &Gate,
    bus: &dyn Bus,
    ioapic: &IoApic,
) -> Box<dyn Vcpu> {
    let broken = |what: &str| gate.report(Message::Broken(format!("vCPU {index}: {what}")));
    loop {
        match gate.next(index) {
            Next::Quit => return vcpu,
            Next::Run => {}
            Next::Call(Call(action)) => {
                action(&mut *vcpu);
                continue;
            }
            Next::Job(job) => {
                let done = match job {
                    Job::Boot(load) => match load() {
                        Ok(state) => vcpu.set_state(&state),
                        Err(error) => {
                            gate.report(Message::Broken(error.to_string()));
                            continue;
                        }
                    },
                    Job::Load(state) => vcpu.set_state(&state),
                    Job::Nmi => vcpu.inject_nmi(),
                    Job::WasStopped => vcpu.was_stopped(),
                };
                if let Err(error) = done {
                    broken(&error.to_string());
                }
                continue;
            }
        }
        match vcpu.run(bus) {
            // A stop was reported by the device that wanted it.
            Ok(Exit::Kicked | Exit::Stopped) => {}
            Ok(Exit::IoapicEoi(vector)) => ioapic.eoi(vector),
            Ok(Exit::Shutdown) => gate.report(Message::TripleFault),
            Ok(Exit::DeadHalt) => log::info!("vCPU {index} halted with interrupts off"),
            Ok(Exit::Debug { watch }) => gate.debug_stop(Stopped { vcpu: index, watch }),
            Ok(Exit::InternalError { reason, rip }) => broken(&format!("{reason} at {rip:#x}")),
            Err(error) => broken(&error.to_string()),
        }
    }
}
