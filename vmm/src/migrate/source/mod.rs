//! The side that a machine leaves.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hypervisor::Vm;
use vmm_api::control::{Event, MigrateOptions};
use vmm_api::migrate::{self, Code, Extra, Hello, Kind, LAST_ROUND, StreamError, Verdict};

use super::disks;
use super::link::{Link, STALL, says_gone};
use super::moment;
use crate::devices::lock;
use crate::killpoint::killpoint;
use crate::memory::GuestMemory;
use crate::notices::{Notice, Notices};
use crate::state::dirty;
use crate::state::job::Progress;
use crate::vcpu::Brake;

mod rounds;
mod sending;
mod tuning;

pub use tuning::{Right, Tuning};

/// How long the machine may take to come to rest.
const REST: Duration = Duration::from_secs(30);
/// Bytes of state frames.
const STATE_PART: usize = 1 << 20;
/// How long a side that ended may take to have its last word heard.
const LAST_WORD: Duration = Duration::from_secs(5);
/// How long the other side may take to be gone, and its hold on the disks with it.
const GONE: Duration = Duration::from_secs(2);
/// How long it may take or say nothing while the guest stands still.
const STILL: Duration = Duration::from_secs(15);
/// How long a refusal may take to be sent.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long the other side is given to get ready for the guest's code.
const READY: Duration = Duration::from_millis(30);
/// How long to wait between two looks.
const READY_STEP: Duration = Duration::from_millis(10);
/// How long to wait for a sign of a guest that has been given away: it runs nowhere else.
const GIVEN: Duration = Duration::from_secs(600);

/// A machine that is to leave.
#[derive(Debug)]
pub struct Source {
    /// The connections; the first one leads.
    pub links: Vec<Link>,
    /// Its memory, whose dirty log is on.
    pub memory: Arc<GuestMemory>,
    /// Its VM.
    pub vm: Arc<dyn Vm>,
    /// What it is, but for where its memory holds something.
    pub hello: Hello,
    /// How.
    pub options: MigrateOptions,
    /// What changes.
    pub tuning: Arc<Tuning>,
    /// To the event loop: [`Notice::StandStill`] when it is time.
    pub notices: Arc<Notices>,
    /// The machine was told to stand still.
    pub stood_still: AtomicBool,
    /// Its answer: the sections, when nothing moves any more and the disks are let go of.
    pub states: Mutex<Receiver<Result<Vec<u8>, String>>>,
    /// A hold on the vCPUs, for slowing them down.
    pub brake: Brake,
    /// Disks that go along, as the hello has them.
    pub disks: Vec<disks::Leaving>,
}

impl Source {
    /// Moves the machine.
    ///
    /// # Errors
    /// Why not, in words. [`Tuning::right`] says whether it may go on here.
    pub fn run(mut self, progress: &Arc<Progress>) -> Result<(), String> {
        for link in &mut self.links {
            link.heed(progress.clone());
        }
        let result = self.all(progress).map_err(|error| self.explain(error));
        self.brake.release();
        if let Err(error) = &result
            && let Some(link) = self.links.first()
        {
            // So that the other side knows why; it sees the end of the connection otherwise.
            let verdict = Verdict::refused(error.to_string());
            link.forget_job();
            // One that takes nothing is not waited for twice.
            link.be_patient(FAREWELL);
            if let Ok(frame) = migrate::json_frame(Kind::Verdict, &verdict)
                && let Err(error) = io::Write::write_all(&mut &*link, &frame)
            {
                log::debug!("{error}");
            }
            if self.stood_still.load(Ordering::Relaxed) && self.tuning.right() == Right::Own {
                link.await_end(GONE);
            }
        }
        result.map_err(|error| error.to_string())
    }

    /// A connection that breaks says less than the other side's last words.
    fn explain(&self, error: StreamError) -> StreamError {
        match (&error, self.links.first()) {
            (StreamError::Io(reason), Some(link)) if says_gone(reason) => {
                link.last_word(LAST_WORD).unwrap_or(error)
            }
            _ => error,
        }
    }

    fn main(&self) -> Result<&Link, StreamError> {
        let none = || StreamError::Protocol("no connection".to_owned());
        self.links.first().ok_or_else(none)
    }

    fn all(&self, progress: &Progress) -> Result<(), StreamError> {
        let mut link = self.main()?;
        let began = Instant::now();
        let content = dirty::content(&self.memory);
        let hello = Hello {
            content: dirty::dense(&content),
            ..self.hello.clone()
        };
        let hello = migrate::json_frame(Kind::Hello, &hello)?;
        io::Write::write_all(&mut link, &hello)?;
        let verdict: Verdict = migrate::expect_json(&mut link, Kind::Verdict)?;
        let takes_code = verdict.takes.contains(&Extra::Code);
        verdict.into_result()?;
        killpoint("vmm.migrate-greeted");
        moment("the other side has said that it fits");
        let setup_ms = milliseconds(began.elapsed());
        self.tuning.change(|status| status.setup_ms = setup_ms);
        self.precopy(progress, content, takes_code)?;
        self.hand_over(progress)
    }

    /// Tells the other side where the guest's code is, so that it can get ready for that.
    fn tell_code(&self) -> Result<(), StreamError> {
        let code = Code::new(self.vm.recent_code());
        let body = code.encode();
        self.count_sent(body.len() as u64);
        migrate::send(&mut self.main()?, Kind::Code, &body)
    }

    /// Gives the other side a moment to do so, while the guest runs.
    fn await_code_taken(&self, progress: &Progress) -> Result<(), StreamError> {
        let link = self.main()?;
        let since = Instant::now();
        while !link.has_something_within(READY_STEP)? && since.elapsed() < READY {
            progress.check()?;
        }
        self.listen(link)
    }

    /// The machine stands still; the rest goes, then the right to run.
    fn hand_over(&self, progress: &Progress) -> Result<(), StreamError> {
        let failed = |why: String| StreamError::Refused(why);
        let mut link = self.main()?;
        let began = Instant::now();
        moment("the guest is to stand still");
        // From here on the machine's own hold on them is enough.
        self.brake.release();
        self.stood_still.store(true, Ordering::Relaxed);
        for link in &self.links {
            link.be_patient(STILL);
        }
        self.tuning.throttle.store(0, Ordering::Relaxed);
        self.notices.send(Notice::StandStill);
        let states = loop {
            progress.check()?;
            match lock(&self.states).recv_timeout(Duration::from_millis(100)) {
                Ok(states) => break states.map_err(failed)?,
                Err(RecvTimeoutError::Timeout) if began.elapsed() < REST => {}
                Err(error) => return Err(failed(format!("the machine does not rest: {error}"))),
            }
        };
        moment("its states are there");
        killpoint("vmm.migrate-still");
        let dirty = self.written()?;
        let rest = self.round(&dirty, LAST_ROUND, progress, false);
        rest.map_err(|error| {
            silent(
                error,
                "for the other side to take the rest of the guest",
                STILL,
            )
        })?;
        moment("the last pages have been sent");
        for states in states.chunks(STATE_PART) {
            self.count_sent(states.len() as u64);
            migrate::send(&mut link, Kind::State, states)?;
        }
        migrate::send(&mut link, Kind::State, &[])?;
        killpoint("vmm.migrate-sent");
        let verdict = migrate::expect_json::<Verdict>(&mut link, Kind::Verdict);
        let verdict = verdict
            .map_err(|error| silent(error, "for the other side to build the machine", STILL))?;
        verdict.into_result()?;
        moment("the other side has all of it");
        self.tuning.change(|status| status.ready = true);
        self.notices.send(Notice::Tell(Event::MigrationReady));
        // The other side's owner decides when it is to run: mostly at once, sometimes never.
        link.be_patient(STALL);
        migrate::expect(&mut link, Kind::Ask)
            .map_err(|error| silent(error, "for the other side to want to run the guest", STALL))?;
        moment("the other side wants to run");
        killpoint("vmm.migrate-asked");
        // From now on not even a failed write means that it did not arrive.
        self.tuning.give(Right::Given);
        // Nor does it help to give up, or to be told to: what is waited for is only how it was decided.
        link.forget_job();
        link.be_patient(GIVEN);
        let arrived = migrate::send(&mut link, Kind::Grant, &[]).and_then(|()| {
            killpoint("vmm.migrate-given");
            migrate::expect(&mut link, Kind::Running)
        });
        let downtime = milliseconds(began.elapsed());
        moment("the other side runs, or not");
        self.tuning.change(|status| status.downtime_ms = downtime);
        match arrived {
            Ok(_) => Ok(()),
            Err(_) if self.tuning.is_not_taken() => {
                self.tuning.give(Right::Own);
                Err(failed("the other side has not taken the guest over".into()))
            }
            // Nor does a connection that ends say that the other side has: somebody in between may have closed it.
            Err(error) => {
                self.tuning.give(Right::Unknown);
                Err(failed(format!("{error}; {}", migrate::UNKNOWN)))
            }
        }
    }
}

/// A wait that has come to its limit says what it was for.
fn silent(error: StreamError, what: &str, limit: Duration) -> StreamError {
    match error {
        StreamError::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
            let text = format!(
                "waited {} s in vain {what}, while the guest stood still",
                limit.as_secs()
            );
            StreamError::Refused(text)
        }
        other => other,
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}
