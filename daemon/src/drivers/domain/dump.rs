//! A running domain's memory and registers into a file.

use std::path::Path;
use std::sync::Arc;

use vmm_api::control::Call;

use super::Driver;
use super::job::{self, End, Operation, Saving};
use super::lifecycle::{ask, end};
use super::object::Pinned;
use super::saved_image;
use super::state::State;
use crate::error::{Error, ErrorCode, Result, check_flags};
use crate::events::DomainEvent;
use crate::killpoint::killpoint;

/// virDomainCoreDumpFlags
mod flags {
    /// The domain is taken for crashed afterwards.
    pub const CRASH: u32 = 1;
    /// It runs meanwhile.
    pub const LIVE: u32 = 2;
    /// Past the page cache.
    pub const BYPASS_CACHE: u32 = 4;
    /// It is reset afterwards.
    pub const RESET: u32 = 8;
    /// Memory and registers only.
    pub const MEMORY_ONLY: u32 = 16;
}

impl Driver {
    /// Dumps a domain to `to`. Always an ELF core; without "memory only" it holds the devices'
    /// states too, in a note.
    ///
    /// # Errors
    /// It is off; another format than `raw`; what the host says.
    pub async fn core_dump(
        self: &Arc<Self>,
        domain: Pinned,
        to: String,
        format: u32,
        flags: u32,
    ) -> Result<()> {
        use flags::{BYPASS_CACHE, CRASH, LIVE, MEMORY_ONLY, RESET};
        let known = CRASH | LIVE | BYPASS_CACHE | RESET | MEMORY_ONLY;
        check_flags(flags, known, "qemuDomainCoreDumpWithFormat")?;
        let has = |flag| flags & flag != 0;
        if has(CRASH) && has(LIVE) || has(CRASH) && has(RESET) || has(LIVE) && has(RESET) {
            return Err(Error::new(
                ErrorCode::INVALID_ARG,
                "crash, live and reset flags are mutually exclusive",
            ));
        }
        if format != 0 {
            return Err(Error::new(
                ErrorCode::OPERATION_UNSUPPORTED,
                "the only format of dumps is raw (ELF)",
            ));
        }
        let _job = domain.job().await?;
        let path = Path::new(&to);
        let file = saved_image::create(path, has(BYPASS_CACHE))?;
        let passed = file.file().try_clone();
        let passed =
            passed.map_err(|e| Error::system(format!("Failed to create file '{to}'"), &e))?;
        let control = {
            let mut inner = domain.lock();
            let was_running = matches!(inner.state, State::Running(_));
            let live = inner.live_mut()?;
            live.work.begin(Operation::Dump)?;
            // Never taken for a finished save: whoever finds it removes the file.
            live.work.saving = Some(Saving {
                temp: file.temp().to_owned(),
                path: file.temp().to_owned(),
                id: [0; 16],
                was_running,
            });
            let control = live.control.clone();
            self.write_record(&inner);
            control
        };
        let call = Call::Dump {
            live: has(LIVE),
            devices: !has(MEMORY_ONLY),
        };
        let result = match control.send_with(call, vec![passed.into()]) {
            Ok(answer) => job::wait(&domain, answer).await,
            Err(error) => Err(job::not_begun(error)),
        };
        killpoint("dump.written");
        let put = match result {
            Ok(status) => file
                .put()
                .map(|()| status)
                .map_err(|e| Error::system(format!("cannot write '{to}'"), &e)),
            Err(error) => Err(error),
        };
        let finished = {
            let mut inner = domain.lock();
            let finished = inner.live_mut().ok().and_then(|live| {
                live.work.saving = None;
                live.work.finish(put.as_ref().ok().copied())
            });
            self.write_record(&inner);
            finished
        };
        put?;
        if let Some(statistics) = finished {
            let event = DomainEvent::JobCompleted(statistics.params(true));
            self.emit(&domain.name(), &event);
        }
        if has(CRASH) {
            domain.lock().live_mut()?.work.end = Some(End::Crashed);
            return end(&domain, false).await;
        }
        if has(RESET) {
            domain.lock().live_mut()?.resetting = true;
            ask(&domain, Call::Reset).await?;
        }
        Ok(())
    }
}
