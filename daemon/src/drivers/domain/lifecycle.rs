//! What is done to a running domain: suspend, resume, shutdown, reboot, reset, destroy.

use std::sync::Arc;
use std::time::Duration;

use vmm_api::config::LifecycleAction;
use vmm_api::control::{Answer, Call};

use super::Driver;
use super::job::Operation;
use super::object::{Domain, Pinned, not_running};
use super::state::{PausedReason, State};
use crate::control::ControlError;
use crate::error::{Error, ErrorCode, Result, check_flags};

/// How long a VMM may take to answer.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// How long a VMM that was told to end may take before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// How long it may take where nobody wants it killed.
const GRACEFUL_LIMIT: Duration = Duration::from_secs(15);
/// How long a killed process may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(15);

/// How a guest is asked to power off or reboot (virDomainShutdownFlagValues).
mod power_flags {
    /// The power button.
    pub const ACPI: u32 = 1;
    /// The guest agent.
    pub const AGENT: u32 = 2;
}

/// VIR_DOMAIN_DESTROY_GRACEFUL
const DESTROY_GRACEFUL: u32 = 1;

/// Asks a domain's VMM.
///
/// # Errors
/// Its refusal or silence, or that it does not run (any longer).
pub async fn ask(domain: &Domain, call: Call) -> Result<Answer> {
    ask_within(domain, call, CALL_LIMIT).await
}

/// As [`ask`], with a limit of its own.
///
/// # Errors
/// As [`ask`].
pub async fn ask_within(domain: &Domain, call: Call, limit: Duration) -> Result<Answer> {
    /// From the end of its connection to the end of the process.
    const GONE_LIMIT: Duration = Duration::from_secs(1);
    let (control, mut ended) = {
        let inner = domain.lock();
        let live = inner.live()?;
        (live.control.clone(), live.ended.clone())
    };
    match control.call(call, limit).await {
        Ok(answer) => Ok(answer),
        Err(ControlError::Refused(message)) => Err(Error::failed(message)),
        Err(ControlError::TimedOut) => Err(Error::new(
            ErrorCode::OPERATION_TIMEOUT,
            format!(
                "the VMM of domain '{}' has not answered for {}s",
                domain.name().name,
                limit.as_secs()
            ),
        )),
        Err(error @ ControlError::Closed) => {
            let end = ended.wait_for(|&ended| ended);
            let gone = tokio::time::timeout(GONE_LIMIT, end).await.is_ok();
            Err(if gone {
                Error::failed("domain is no longer running")
            } else {
                Error::failed(error.to_string())
            })
        }
    }
}

fn check_power_flags(flags: u32, function: &str) -> Result<()> {
    check_flags(flags, power_flags::ACPI | power_flags::AGENT, function)?;
    Ok(())
}

/// Whether the guest's agent was asked to power off or reboot, and agreed: it is where a client
/// wants it or has no wish, and the power button is left where it fails and that is allowed.
async fn agent_agrees(domain: &Domain, flags: u32, reboot: bool) -> Result<bool> {
    let wanted = flags & power_flags::AGENT != 0;
    if !(wanted || flags == 0 && domain.has_agent()) {
        return Ok(false);
    }
    match domain.agent_shutdown(reboot).await {
        Ok(()) => Ok(true),
        Err(_) if flags & power_flags::ACPI != 0 || flags == 0 => Ok(false),
        Err(error) => Err(error),
    }
}

impl Driver {
    /// Stops a domain's vCPUs.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it is off.
    pub async fn suspend(self: &Arc<Self>, domain: Pinned) -> Result<()> {
        let _job = domain.job_in_migration().await?;
        {
            let inner = domain.lock();
            inner.live()?;
            if matches!(inner.state, State::Paused(_)) {
                return Ok(());
            }
        }
        ask(&domain, Call::Pause).await?;
        if let Ok(live) = domain.lock().live_mut() {
            live.suspended = true;
        }
        Ok(())
    }

    /// Lets them run again.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it is off or runs already.
    pub async fn resume(self: &Arc<Self>, domain: Pinned) -> Result<()> {
        let _job = domain.job_in_migration().await?;
        {
            let inner = domain.lock();
            let live = inner.live()?;
            if live.settling && live.work.is(Operation::MigrationOut) {
                return Err(Error::invalid(
                    "whether the guest runs on the other side of its migration is being found out",
                ));
            }
            match inner.state {
                State::Running(_) => {
                    return Err(Error::invalid("domain is already running"));
                }
                State::Paused(PausedReason::ShuttingDown) | State::Shutdown => {
                    return Err(Error::invalid(
                        "the guest has powered off: reset it instead",
                    ));
                }
                _ => {}
            }
        }
        ask(&domain, Call::Resume).await?;
        if let Ok(live) = domain.lock().live_mut() {
            live.suspended = false;
        }
        Ok(())
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it is off; flags for ways there are not.
    pub async fn shutdown(self: &Arc<Self>, domain: Pinned, flags: u32) -> Result<()> {
        check_power_flags(flags, "qemuDomainShutdownFlags")?;
        domain.lock().live()?;
        if agent_agrees(&domain, flags, false).await? {
            return Ok(());
        }
        self.press(domain, false).await
    }

    /// Presses the power button; the guest's power-off is then a reset.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it is off; flags for ways there are not.
    pub async fn reboot(self: &Arc<Self>, domain: Pinned, flags: u32) -> Result<()> {
        check_power_flags(flags, "qemuDomainReboot")?;
        domain.lock().live()?;
        if agent_agrees(&domain, flags, true).await? {
            return Ok(());
        }
        self.press(domain, true).await
    }

    async fn press(self: &Arc<Self>, domain: Pinned, reboot: bool) -> Result<()> {
        let _job = domain.job_in_migration().await?;
        let definition = Arc::clone(&domain.lock().live()?.definition);
        if !definition.has_feature("acpi") {
            return Err(Error::new(
                ErrorCode::OPERATION_UNSUPPORTED,
                "the domain has no power button: <acpi/> is missing in its <features>",
            ));
        }
        let action = if reboot {
            LifecycleAction::Restart
        } else {
            super::machine::action("on_poweroff", definition.on_poweroff)?
        };
        let was_rebooting = domain.lock().live()?.rebooting;
        if reboot || was_rebooting {
            // The last word counts: a shutdown after a reboot that the guest ignored.
            ask(&domain, Call::OnPoweroff(action)).await?;
            domain.lock().live_mut()?.rebooting = reboot;
        }
        ask(&domain, Call::PowerButton).await.map(drop)
    }

    /// Pushes the reset button.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it is off.
    pub async fn reset(self: &Arc<Self>, domain: Pinned, flags: u32) -> Result<()> {
        check_flags(flags, 0, "qemuDomainReset")?;
        let _job = domain.job().await?;
        domain.lock().live_mut()?.resetting = true;
        let done = ask(&domain, Call::Reset).await;
        if let (Err(_), Ok(live)) = (&done, domain.lock().live_mut()) {
            live.resetting = false;
        }
        done.map(drop)
    }

    /// Sends an NMI.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it is off.
    pub async fn inject_nmi(self: &Arc<Self>, domain: Pinned, flags: u32) -> Result<()> {
        check_flags(flags, 0, "qemuDomainInjectNMI")?;
        let _job = domain.job().await?;
        ask(&domain, Call::Nmi).await.map(drop)
    }

    /// Ends a domain at once. Does not wait for other calls on it, unless it is being started.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it is off.
    pub async fn destroy(self: &Arc<Self>, domain: Pinned, flags: u32) -> Result<()> {
        check_flags(flags, DESTROY_GRACEFUL, "qemuDomainDestroyFlags")?;
        let graceful = flags & DESTROY_GRACEFUL != 0;
        if give_arrival_up(&domain).await? {
            return Ok(());
        }
        if domain.lock().live.is_none() {
            // It may be about to run.
            let _job = domain.job_in_migration().await?;
            if domain.lock().live.is_none() {
                return Err(not_running());
            }
        }
        end(&domain, graceful).await
    }
}

/// Gives up a domain that is on its way here, and waits until it is known that it does not come; false if it is not.
async fn give_arrival_up(domain: &Domain) -> Result<bool> {
    let (mut settled, is_there) = {
        let mut inner = domain.lock();
        let Some(coming) = inner.coming.as_mut() else {
            return Ok(false);
        };
        coming.destroyed = true;
        coming
            .given_up
            .send_replace(Some("domain was destroyed on the target host"));
        let settled = coming.given_up.subscribe();
        (settled, inner.live.is_some())
    };
    if is_there {
        // If its machine is given the right to run meanwhile, it ends all the same.
        return end(domain, false).await.map(|()| true);
    }
    let gone = async { while settled.changed().await.is_ok() {} };
    match tokio::time::timeout(KILL_LIMIT, gone).await {
        Ok(()) => Ok(true),
        Err(_) => Err(Error::new(
            ErrorCode::OPERATION_TIMEOUT,
            "the domain's arrival can't be stopped",
        )),
    }
}

/// Ends a running domain and waits until it is off.
///
/// # Errors
/// It does not end, or is off.
pub async fn end(domain: &Domain, graceful: bool) -> Result<()> {
    let (control, process, mut ended) = {
        let mut inner = domain.lock();
        let live = inner.live_mut()?;
        live.destroying = true;
        (
            live.control.clone(),
            Arc::clone(&live.process),
            live.ended.clone(),
        )
    };
    let mut gone = async |limit| {
        let end = ended.wait_for(|&ended| ended);
        // The sender is dropped only after it has told.
        tokio::time::timeout(limit, end).await.is_ok()
    };
    match control.send(Call::Stop) {
        Ok(_) if graceful => {
            if gone(GRACEFUL_LIMIT).await {
                return Ok(());
            }
            if let Ok(live) = domain.lock().live_mut() {
                live.destroying = false;
            }
            let pid = process.identity().pid;
            return Err(Error::new(
                ErrorCode::SYSTEM_ERROR,
                format!("Failed to terminate process {pid} gracefully: Device or resource busy"),
            ));
        }
        Ok(_) => {
            if gone(STOP_LIMIT).await {
                return Ok(());
            }
            log::warn!(
                "domain '{}': its VMM does not stop, and is killed",
                domain.name().name
            );
        }
        Err(error) => {
            log::warn!(
                "domain '{}': {error}; its VMM is killed",
                domain.name().name
            );
        }
    }
    let pid = process.identity().pid;
    process.kill().map_err(|e| {
        Error::system(
            format!("Failed to terminate process {pid} with SIGKILL"),
            &e,
        )
    })?;
    if gone(KILL_LIMIT).await {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::OPERATION_TIMEOUT,
        format!("process {pid} does not end"),
    ))
}
