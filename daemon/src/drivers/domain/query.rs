//! What can be asked about domains.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use vmm_api::control::{Answer, Call};
use xml_schemas::dom::{Element, Node};
use xml_schemas::domain::View;
use xml_schemas::domain::device::Vsock;
use xml_schemas::{Domain as Definition, Validation};

use super::lifecycle::ask_within;
use super::object::{Domain, Inner, not_running};
use super::state::State;
use super::{Driver, channels};
use crate::error::{Error, Result, check_flags};
use crate::events::DomainName;

/// Which domains are listed (virConnectListAllDomainsFlags).
mod list_flags {
    pub const ACTIVE: u32 = 1;
    pub const INACTIVE: u32 = 1 << 1;
    pub const PERSISTENT: u32 = 1 << 2;
    pub const TRANSIENT: u32 = 1 << 3;
    pub const RUNNING: u32 = 1 << 4;
    pub const PAUSED: u32 = 1 << 5;
    pub const SHUTOFF: u32 = 1 << 6;
    pub const OTHER: u32 = 1 << 7;
    pub const MANAGED_SAVE: u32 = 1 << 8;
    pub const NO_MANAGED_SAVE: u32 = 1 << 9;
    pub const AUTOSTART: u32 = 1 << 10;
    pub const NO_AUTOSTART: u32 = 1 << 11;
    pub const HAS_SNAPSHOT: u32 = 1 << 12;
    pub const NO_SNAPSHOT: u32 = 1 << 13;
    pub const HAS_CHECKPOINT: u32 = 1 << 14;
    pub const NO_CHECKPOINT: u32 = 1 << 15;
    pub const ALL: u32 = (1 << 16) - 1;
}

/// All of them.
pub const LIST_FLAGS: u32 = list_flags::ALL;

/// Which document is printed (virDomainXMLFlags).
mod xml_flags {
    /// What is secret too: nothing that is kept here is left out otherwise.
    pub const SECURE: u32 = 1;
    /// The stored one.
    pub const INACTIVE: u32 = 2;
    /// The CPU as the guest sees it: it is written as it was asked for.
    pub const UPDATE_CPU: u32 = 4;
    /// What another host understands: without what is this run's only.
    pub const MIGRATABLE: u32 = 8;
}

/// How long a VMM may take to answer who only looks: lists of domains must not hang with one.
const LOOK_LIMIT: Duration = Duration::from_secs(1);

/// virDomainGetInfo's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// The state.
    pub state: State,
    /// Memory at boot in KiB.
    pub max_memory_kib: u64,
    /// Memory now in KiB.
    pub memory_kib: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// CPU time of the process in nanoseconds.
    pub cpu_time_ns: u64,
}

/// CPU time of a process in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuTime {
    /// In all.
    pub total: u64,
    /// In user mode.
    pub user: u64,
    /// In the kernel.
    pub system: u64,
}

/// Whether a domain passes one group of filters: bits with the condition each stands for.
fn passes(flags: u32, group: &[(u32, bool)]) -> bool {
    let asked = group.iter().any(|(bit, _)| flags & bit != 0);
    !asked || group.iter().any(|&(bit, holds)| flags & bit != 0 && holds)
}

/// What a domain has on the disk beside its definition.
#[derive(Debug, Clone, Copy, Default)]
struct Kept {
    managed_save: bool,
    snapshots: bool,
}

/// Whether `flags` list a domain. Unknown bits are the caller's business.
fn listed(inner: &Inner, kept: Kept, flags: u32) -> bool {
    use list_flags as f;
    let active = inner.is_active();
    let persistent = inner.persistent.is_some();
    let running = matches!(inner.state, State::Running(_));
    let paused = matches!(inner.state, State::Paused(_));
    let off = matches!(inner.state, State::Shutoff(_));
    let groups: [&[(u32, bool)]; 7] = [
        &[(f::ACTIVE, active), (f::INACTIVE, !active)],
        &[(f::PERSISTENT, persistent), (f::TRANSIENT, !persistent)],
        &[
            (f::RUNNING, running),
            (f::PAUSED, paused),
            (f::SHUTOFF, off),
            (f::OTHER, !running && !paused && !off),
        ],
        &[
            (f::MANAGED_SAVE, kept.managed_save),
            (f::NO_MANAGED_SAVE, !kept.managed_save),
        ],
        &[
            (f::AUTOSTART, inner.autostart),
            (f::NO_AUTOSTART, !inner.autostart),
        ],
        &[
            (f::HAS_SNAPSHOT, kept.snapshots),
            (f::NO_SNAPSHOT, !kept.snapshots),
        ],
        &[(f::HAS_CHECKPOINT, false), (f::NO_CHECKPOINT, true)],
    ];
    inner.visible() && groups.iter().all(|group| passes(flags, group))
}

/// Nanoseconds of CPU time that a process has used.
pub fn cpu_time(pid: u32) -> CpuTime {
    let ticks = || -> Option<(u64, u64)> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        Some((fields.get(11)?.parse().ok()?, fields.get(12)?.parse().ok()?))
    };
    let (user, system) = ticks().unwrap_or_default();
    // SAFETY: sysconf takes and returns a number.
    let per_second = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100);
    let ns = |ticks: u64| ticks.saturating_mul(1_000_000_000 / per_second.max(1));
    CpuTime {
        total: precise_cpu_time(pid).unwrap_or(ns(user.saturating_add(system))),
        user: ns(user),
        system: ns(system),
    }
}

fn precise_cpu_time(pid: u32) -> Option<u64> {
    let pid = libc::pid_t::try_from(pid).ok()?;
    // SAFETY: both calls fill the variables given to them, which live here.
    let time = unsafe {
        let mut clock: libc::clockid_t = 0;
        let mut time: libc::timespec = std::mem::zeroed();
        if libc::clock_getcpuclockid(pid, &mut clock) != 0
            || libc::clock_gettime(clock, &mut time) != 0
        {
            return None;
        }
        time
    };
    let seconds = u64::try_from(time.tv_sec).ok()?;
    seconds
        .checked_mul(1_000_000_000)?
        .checked_add(u64::try_from(time.tv_nsec).ok()?)
}

/// The host CPU that each vCPU's thread runs on or ran on last.
pub fn vcpu_places(pid: u32) -> HashMap<u32, u32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return HashMap::new();
    };
    let place = |task: fs::DirEntry| -> Option<(u32, u32)> {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let number = name.trim().strip_prefix("vcpu")?.parse().ok()?;
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        // proc(5): processor is field 39, and these begin with field 3.
        let cpu = stat.rsplit_once(") ")?.1.split(' ').nth(36)?;
        Some((number, cpu.parse().ok()?))
    };
    tasks.filter_map(|task| place(task.ok()?)).collect()
}

impl Driver {
    /// The domains that `flags` list.
    ///
    /// # Errors
    /// Unknown flags.
    pub fn list(&self, flags: u32) -> Result<Vec<Arc<Domain>>> {
        check_flags(flags, list_flags::ALL, "qemuConnectListAllDomains")?;
        let mut all = self.registry.all();
        all.retain(|domain| self.is_listed(domain, flags));
        Ok(all)
    }

    /// How those are named that `flags` list.
    ///
    /// # Errors
    /// Unknown flags.
    pub fn list_names(&self, flags: u32) -> Result<Vec<DomainName>> {
        use list_flags::{HAS_SNAPSHOT, MANAGED_SAVE, NO_MANAGED_SAVE, NO_SNAPSHOT};
        if flags & (MANAGED_SAVE | NO_MANAGED_SAVE | HAS_SNAPSHOT | NO_SNAPSHOT) != 0 {
            // The disk has to be asked.
            let all = self.list(flags)?;
            return Ok(all.iter().map(|domain| domain.name()).collect());
        }
        check_flags(flags, list_flags::ALL, "qemuConnectListAllDomains")?;
        let named = |domain: &Arc<Domain>, inner: &Inner| {
            let found = listed(inner, Kept::default(), flags);
            found.then(|| domain.name_in(inner))
        };
        Ok(self.registry.each(named))
    }

    /// Filters `domains` by those bits of `flags` that are filters.
    pub fn filter(&self, domains: Vec<Arc<Domain>>, flags: u32) -> Vec<Arc<Domain>> {
        let keep = |domain: &Arc<Domain>| self.is_listed(domain, flags & list_flags::ALL);
        domains.into_iter().filter(keep).collect()
    }

    fn is_listed(&self, domain: &Domain, flags: u32) -> bool {
        use list_flags::{HAS_SNAPSHOT, MANAGED_SAVE, NO_MANAGED_SAVE, NO_SNAPSHOT};
        // Looked up only where it matters: it is on the disk.
        let asked = |bits: u32| flags & bits != 0;
        let kept = Kept {
            managed_save: asked(MANAGED_SAVE | NO_MANAGED_SAVE) && self.has_managed_save(domain),
            snapshots: asked(HAS_SNAPSHOT | NO_SNAPSHOT)
                && self.count_snapshots(domain).is_ok_and(|count| count > 0),
        };
        listed(&domain.lock(), kept, flags)
    }

    /// State, memory, vCPUs, CPU time.
    ///
    /// # Errors
    /// The domain is gone.
    pub fn info(&self, domain: &Domain) -> Result<Info> {
        let inner = domain.lock();
        let definition = definition(&inner)?;
        let cpu_time = inner
            .live
            .as_ref()
            .map_or(0, |live| cpu_time(live.process.identity().pid).total);
        Ok(Info {
            state: inner.state,
            max_memory_kib: definition.memory.total_kib,
            memory_kib: definition.memory.current_kib,
            vcpus: definition.vcpu.online(),
            cpu_time_ns: cpu_time,
        })
    }

    /// The document.
    ///
    /// # Errors
    /// Unknown flags, or the domain is gone.
    pub fn xml(&self, domain: &Domain, flags: u32) -> Result<String> {
        use xml_flags::{INACTIVE, MIGRATABLE, SECURE, UPDATE_CPU};
        check_flags(
            flags,
            SECURE | INACTIVE | UPDATE_CPU | MIGRATABLE,
            "qemuDomainGetXMLDesc",
        )?;
        let inner = domain.lock();
        let stored = match flags & INACTIVE {
            0 => None,
            _ => inner.stored()?,
        };
        let (definition, view) = match stored {
            Some(stored) => (stored, View::Inactive),
            None if flags & INACTIVE == 0 && inner.is_active() => (definition(&inner)?, View::Live),
            None => (definition(&inner)?, View::Inactive),
        };
        let (definition, view) = match view {
            View::Live if flags & MIGRATABLE != 0 => {
                (self.migratable(&definition)?, View::Inactive)
            }
            view => (definition, view),
        };
        // The flag is refused on read-only connections before it comes here.
        Ok(if flags & SECURE != 0 {
            definition.format(view)
        } else {
            definition.format_public(view)
        })
    }

    /// A running domain's definition without what its next run would choose anew.
    fn migratable(&self, running: &Definition) -> Result<Arc<Definition>> {
        let text = running.format(View::Live);
        let parsed = Definition::parse(&text, Validation::Lenient)?.domain;
        let mut definition = channels::without_paths(parsed, &self.roots.channels());
        for device in &mut definition.devices.rest {
            // What an image's header says of what is behind it.
            let found = |e: &Element| e.name == "backingStore" && e.attr("type").is_some();
            let keep = |node: &Node| !matches!(node, Node::Element(e) if found(e));
            device.children.retain(keep);
        }
        Ok(Arc::new(definition))
    }

    /// Guest ids of vsock that running domains have.
    pub fn guest_cids(&self) -> Vec<u32> {
        let of = |definition: &Definition| {
            let vsock = definition.devices.rest.iter().find(|e| e.name == "vsock")?;
            Vsock::read(vsock).ok()?.cid
        };
        let all = self.registry.all();
        all.iter()
            .filter_map(|domain| of(&domain.lock().live.as_ref()?.definition))
            .collect()
    }

    /// What a person should know of a domain: what was left out of its machine.
    ///
    /// # Errors
    /// The domain is gone.
    pub fn messages(&self, domain: &Domain) -> Result<Vec<String>> {
        let inner = domain.lock();
        let left_out = definition(&inner)?.left_out();
        let message = |device| format!("left out of the machine: {device}");
        Ok(left_out.into_iter().map(message).collect())
    }

    /// CPU time of each vCPU in nanoseconds.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it is off; the VMM's silence.
    pub async fn vcpu_times(&self, domain: &Domain) -> Result<Vec<u64>> {
        match ask_within(domain, Call::Query, LOOK_LIMIT).await? {
            Answer::Status(status) => Ok(status.vcpu_time_ns),
            _ => Err(Error::internal("the VMM's answer makes no sense")),
        }
    }
}

/// The definition in effect.
///
/// # Errors
/// The domain is gone.
pub fn definition(inner: &Inner) -> Result<Arc<Definition>> {
    inner.definition()?.ok_or_else(not_running)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_of_one_group_add_up_and_groups_narrow() {
        let group = [(1, true), (2, false)];
        assert!(passes(0, &group), "nothing asked");
        assert!(passes(1, &group));
        assert!(!passes(2, &group));
        assert!(passes(3, &group));
        assert!(passes(4, &group), "another group's bit");
    }

    #[test]
    fn a_process_uses_time() {
        let mut sum = 0u64;
        let before = cpu_time(std::process::id()).total;
        while cpu_time(std::process::id()).total == before {
            sum = sum.wrapping_add(1);
        }
        assert_eq!(cpu_time(u32::MAX), CpuTime::default());
    }
}
