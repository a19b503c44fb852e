//! A running domain's memory and registers into a file.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use vmm_api::control::Call;

use super::Driver;
use super::job::{End, Operation};
use super::lifecycle::{ask, end};
use super::object::{Domain, Pinned};
use super::saved_image;
use super::state::{PausedReason, State};
use super::written::Writing;
use crate::error::{Error, ErrorCode, Result, check_flags};
use crate::events::DomainEvent;
use crate::logger;

/// So many dumps that a guest's watchdog, or its panic, has asked for are kept: a guest could fill the disk.
const OWN_DUMPS: usize = 5;

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
    /// What the watchdog's action `dump` asks for, once the guest is paused: a dump where libvirt
    /// has them, and the guest goes on.
    pub fn dump_for_watchdog(self: &Arc<Self>, domain: &Arc<Domain>) {
        let (driver, domain) = (Arc::clone(self), Arc::clone(domain));
        // Not at once: whoever calls holds the domain's lock.
        tokio::spawn(async move {
            let pin = || driver.registry.pin(&domain);
            let (Some(pinned), Some(again)) = (pin(), pin()) else {
                return;
            };
            let name = domain.name().name;
            driver
                .own_dump(pinned, &name, "its watchdog was not fed")
                .await;
            // Somebody may have resumed it, or paused it for a reason of their own.
            let waits = matches!(
                domain.lock().state,
                State::Paused(PausedReason::Watchdog | PausedReason::Dump)
            );
            if waits && let Err(error) = driver.resume(again).await {
                log::error!("{name}: it stays paused after the watchdog's dump: {error}");
            }
        });
    }

    /// Dumps a domain without anybody waiting for it; what came of it is in the log.
    async fn own_dump(self: &Arc<Self>, domain: Pinned, name: &str, why: &str) {
        let to = match self.dump_path(name) {
            Ok(Some(path)) => path.display().to_string(),
            Ok(None) => {
                return log::error!("{name}: {why}: no dump: there are {OWN_DUMPS} already");
            }
            Err(error) => return log::error!("{name}: {why}: no dump: {error}"),
        };
        match self.core_dump(domain, to.clone(), 0, 0).await {
            Ok(()) => log::warn!("{name}: {why}: dumped to {to}"),
            Err(error) => log::error!("{name}: {why}: no dump: {error}"),
        }
    }

    /// What `on_crash` asks for with `coredump-destroy` and `coredump-restart`, once the guest has crashed and is
    /// preserved.
    pub fn dump_for_crash(self: &Arc<Self>, domain: &Arc<Domain>, restart: bool) {
        let (driver, domain) = (Arc::clone(self), Arc::clone(domain));
        // Not at once: whoever calls holds the domain's lock.
        tokio::spawn(async move {
            let pin = || driver.registry.pin(&domain);
            let (Some(pinned), Some(again)) = (pin(), pin()) else {
                return;
            };
            let name = domain.name().name;
            driver.own_dump(pinned, &name, "it crashed").await;
            // Somebody may have ended it, or reset it.
            if domain.lock().state == State::Crashed
                && let Err(error) = driver.after_dump(&again, !restart, restart).await
            {
                log::error!("{name}: it stays crashed after its dump: {error}");
            }
        });
    }

    /// What a dump's flags say comes after it.
    async fn after_dump(&self, domain: &Pinned, crash: bool, reset: bool) -> Result<()> {
        if crash {
            domain.lock().live_mut()?.work.end = Some(End::Crashed);
            return end(domain, false).await;
        }
        if reset {
            domain.lock().live_mut()?.resetting = true;
            ask(domain, Call::Reset).await?;
        }
        Ok(())
    }

    /// Where the next one goes; none if there are enough.
    fn dump_path(&self, name: &str) -> std::io::Result<Option<PathBuf>> {
        let folder = self.roots.dumps();
        std::fs::create_dir_all(&folder)?;
        let own = format!("{name}-");
        let now = logger::timestamp(SystemTime::now());
        let now = now.split('+').next().unwrap_or(&now).replace(' ', "-");
        let mut there = 0;
        for entry in std::fs::read_dir(&folder)? {
            let file = entry?.file_name();
            // A domain `a` is not one `a-b`: all times are as long.
            let time = file.to_str().and_then(|file| file.strip_prefix(&own));
            there += usize::from(time.is_some_and(|time| time.len() == now.len()));
        }
        Ok((there < OWN_DUMPS).then(|| folder.join(own + &now)))
    }

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
        let call = Call::Dump {
            live: has(LIVE),
            // What comes afterwards comes before it goes on, as in libvirt.
            hold: true,
            devices: !has(MEMORY_ONLY),
        };
        let writing = Writing {
            operation: Operation::Dump,
            call,
            more: Vec::new(),
            was_running: None,
            id: None,
            points: ["dump.begun", "dump.written"],
        };
        let put = self.written(&domain, file, path, writing).await?;
        let finished = {
            let mut inner = domain.lock();
            let finished = inner.live_mut().ok().and_then(|live| {
                live.work.saving = None;
                // Of a dump of memory only libvirt keeps no statistics, nor does it tell of its end.
                let status = put.as_ref().ok().copied();
                live.work.finish(status.filter(|_| !has(MEMORY_ONLY)))
            });
            self.write_record(&inner);
            finished
        };
        if put.is_ok()
            && let Some(statistics) = finished
        {
            let event = DomainEvent::JobCompleted(statistics.params(true));
            self.emit(&domain.name(), &event);
        }
        let result = match put {
            Ok(_) => self.after_dump(&domain, has(CRASH), has(RESET)).await,
            Err(error) => Err(error),
        };
        // One that somebody else has paused stays so.
        let held = matches!(domain.lock().state, State::Paused(PausedReason::Dump));
        if held && let Err(error) = ask(&domain, Call::Resume).await {
            log::error!("domain '{}': after its dump: {error}", domain.name().name);
        }
        result
    }
}
