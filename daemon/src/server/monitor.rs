//! Domains: what only looks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rpc::args::*;
use rpc::error::{ErrorCode, RemoteError};
use rpc::procs;
use rpc::server::Router;
use rpc::types::TypedParam;
use rpc::xdr::CharList;
use uuid::Uuid;
use vmm_api::control::Stats;
use vmm_api::devices::IoThreadConfig;

use super::{Answer, Call, Daemon, device_stats, reference};
use crate::drivers::domain::dirtyrate::Status;
use crate::drivers::domain::object::{Domain, not_running};
use crate::drivers::domain::query::{self, definition};
use crate::drivers::domain::{iothreads, vcpus};
use crate::error::{Error, check_flags};

/// The functions that look at domains.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::DOMAIN_GET_INFO, get_info)
        .on(procs::DOMAIN_GET_STATE, get_state)
        .on(procs::DOMAIN_GET_XML_DESC, get_xml_desc)
        .on(procs::DOMAIN_GET_OS_TYPE, get_os_type)
        .on(procs::DOMAIN_GET_MAX_MEMORY, get_max_memory)
        .on(procs::DOMAIN_GET_AUTOSTART, get_autostart)
        .on(procs::DOMAIN_IS_ACTIVE, is_active)
        .on(procs::DOMAIN_IS_PERSISTENT, is_persistent)
        .on(procs::DOMAIN_IS_UPDATED, is_updated)
        .on(procs::DOMAIN_GET_SECURITY_LABEL, get_security_label)
        .on(
            procs::DOMAIN_GET_SECURITY_LABEL_LIST,
            get_security_label_list,
        )
        .on(procs::DOMAIN_GET_MESSAGES, get_messages)
        .on(procs::DOMAIN_GET_CONTROL_INFO, get_control_info)
        .on(procs::CONNECT_GET_ALL_DOMAIN_STATS, get_all_domain_stats)
}

async fn get_info(call: Call, args: DomainGetInfoArgs) -> Answer<DomainGetInfoRet> {
    let domain = call.state().find(&args.dom)?;
    let info = call.state().domains.info(&domain)?;
    Ok(DomainGetInfoRet {
        state: info.state.numbers().0.unsigned_abs(),
        max_mem: info.max_memory_kib,
        memory: info.memory_kib,
        nr_virt_cpu: info.vcpus,
        cpu_time: info.cpu_time_ns,
    })
}

async fn get_state(call: Call, args: DomainGetStateArgs) -> Answer<DomainGetStateRet> {
    check_flags(args.flags, 0, "qemuDomainGetState")?;
    let domain = call.state().find(&args.dom)?;
    let (state, reason) = domain.lock().state.numbers();
    Ok(DomainGetStateRet { state, reason })
}

async fn get_xml_desc(call: Call, args: DomainGetXmlDescArgs) -> Answer<DomainGetXmlDescRet> {
    let domain = call.state().find(&args.dom)?;
    let xml = call.state().domains.xml(&domain, args.flags)?;
    Ok(DomainGetXmlDescRet { xml })
}

async fn get_os_type(call: Call, args: DomainGetOsTypeArgs) -> Answer<DomainGetOsTypeRet> {
    let domain = call.state().find(&args.dom)?;
    let kind = definition(&domain.lock())?.os.os_type.clone();
    Ok(DomainGetOsTypeRet { kind })
}

async fn get_max_memory(call: Call, args: DomainGetMaxMemoryArgs) -> Answer<DomainGetMaxMemoryRet> {
    let domain = call.state().find(&args.dom)?;
    let memory = definition(&domain.lock())?.memory.total_kib;
    Ok(DomainGetMaxMemoryRet { memory })
}

async fn get_autostart(call: Call, args: DomainGetAutostartArgs) -> Answer<DomainGetAutostartRet> {
    let domain = call.state().find(&args.dom)?;
    let autostart = i32::from(domain.lock().autostart);
    Ok(DomainGetAutostartRet { autostart })
}

async fn is_active(call: Call, args: DomainIsActiveArgs) -> Answer<DomainIsActiveRet> {
    let domain = call.state().find(&args.dom)?;
    let active = i32::from(domain.lock().is_active());
    Ok(DomainIsActiveRet { active })
}

async fn is_persistent(call: Call, args: DomainIsPersistentArgs) -> Answer<DomainIsPersistentRet> {
    let domain = call.state().find(&args.dom)?;
    let persistent = i32::from(domain.lock().persistent.is_some());
    Ok(DomainIsPersistentRet { persistent })
}

async fn is_updated(call: Call, args: DomainIsUpdatedArgs) -> Answer<DomainIsUpdatedRet> {
    call.state().find(&args.dom)?;
    Ok(DomainIsUpdatedRet { updated: 0 })
}

/// No security driver labels domains.
async fn get_security_label(
    call: Call,
    args: DomainGetSecurityLabelArgs,
) -> Answer<DomainGetSecurityLabelRet> {
    call.state().find(&args.dom)?;
    Ok(DomainGetSecurityLabelRet {
        label: CharList::from_text(""),
        enforcing: 0,
    })
}

async fn get_security_label_list(
    call: Call,
    args: DomainGetSecurityLabelListArgs,
) -> Answer<DomainGetSecurityLabelListRet> {
    call.state().find(&args.dom)?;
    Ok(DomainGetSecurityLabelListRet {
        labels: Vec::new().into(),
        ret: 0,
    })
}

async fn get_messages(call: Call, args: DomainGetMessagesArgs) -> Answer<DomainGetMessagesRet> {
    /// VIR_DOMAIN_MESSAGE_DEPRECATION
    const DEPRECATION: u32 = 1;
    /// VIR_DOMAIN_MESSAGE_TAINTING
    const TAINTING: u32 = 2;
    check_flags(args.flags, DEPRECATION | TAINTING, "qemuDomainGetMessages")?;
    let domain = call.state().find(&args.dom)?;
    let only_deprecations = args.flags == DEPRECATION;
    let messages = if only_deprecations {
        Vec::new()
    } else {
        call.state().domains.messages(&domain)?
    };
    Ok(DomainGetMessagesRet {
        msgs: messages.into(),
    })
}

/// Whether the VMM answers: asked, and not guessed.
async fn get_control_info(
    call: Call,
    args: DomainGetControlInfoArgs,
) -> Answer<DomainGetControlInfoRet> {
    check_flags(args.flags, 0, "qemuDomainGetControlInfo")?;
    // virDomainControlState, virDomainControlErrorReason
    const OK: u32 = 0;
    const JOB: u32 = 1;
    const OCCUPIED: u32 = 2;
    const ERROR: u32 = 3;
    const MONITOR: u32 = 2;
    let domain = call.state().find(&args.dom)?;
    domain.lock().live()?;
    let asked = Instant::now();
    let says = call.state().domains.vcpu_times(&domain).await;
    let job = domain.lock().live()?.work.since();
    let (state, details, since) = match says {
        Ok(_) => match job {
            Some(began) => (JOB, 0, Some(began)),
            None => (OK, 0, None),
        },
        Err(error) if error.code == ErrorCode::OPERATION_TIMEOUT => (OCCUPIED, 0, Some(asked)),
        Err(_) => (ERROR, MONITOR, Some(asked)),
    };
    let since = since.map_or(Duration::ZERO, |since| since.elapsed());
    Ok(DomainGetControlInfoRet {
        state,
        details,
        state_time: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
    })
}

/// Groups of statistics (virDomainStatsTypes).
mod stats {
    pub const STATE: u32 = 1;
    pub const CPU_TOTAL: u32 = 1 << 1;
    pub const BALLOON: u32 = 1 << 2;
    pub const VCPU: u32 = 1 << 3;
    pub const INTERFACE: u32 = 1 << 4;
    pub const BLOCK: u32 = 1 << 5;
    pub const IOTHREAD: u32 = 1 << 7;
    /// Those that are there. Of performance events and memory bandwidth (bits 6 and 8) there is nothing to tell, as
    /// where libvirt has none of them.
    pub const KNOWN: u32 = (1 << 10) - 1;
    pub const DIRTY_RATE: u32 = 1 << 9;
    /// VIR_CONNECT_GET_ALL_DOMAINS_STATS_ENFORCE_STATS
    pub const ENFORCE: u32 = 1 << 31;
    /// VIR_CONNECT_GET_ALL_DOMAINS_STATS_BACKING
    pub const BACKING: u32 = 1 << 30;
    /// VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
    pub const NOWAIT: u32 = 1 << 29;
}

async fn get_all_domain_stats(
    call: Call,
    args: ConnectGetAllDomainStatsArgs,
) -> Answer<ConnectGetAllDomainStatsRet> {
    let daemon = call.state();
    let options = stats::ENFORCE | stats::BACKING | stats::NOWAIT;
    let unknown = args.stats & !stats::KNOWN;
    if unknown != 0 && args.flags & stats::ENFORCE != 0 {
        let text =
            format!("Stats types bits 0x{unknown:x} are not supported by this daemon or QEMU");
        return Err(Error::new(ErrorCode::ARGUMENT_UNSUPPORTED, text).into());
    }
    let groups = if args.stats == 0 {
        stats::KNOWN
    } else {
        args.stats
    };
    let filters = args.flags & !options;
    check_flags(filters, query::LIST_FLAGS, "qemuConnectGetAllDomainStats")?;
    let chosen = if args.doms.is_empty() {
        daemon.domains.list(filters)?
    } else {
        let find =
            |dom: &rpc::types::Domain| daemon.domains.find(&dom.name, Uuid::from_bytes(dom.uuid));
        let found = args.doms.iter().map(find).collect::<Result<Vec<_>, _>>()?;
        daemon.domains.filter(found, filters)
    };
    let backing = args.flags & stats::BACKING != 0;
    // All VMMs are asked before the first answer is waited for: those that are silent cost no more than one does.
    let ask = |domain: Arc<Domain>| {
        let running = domain.lock().live.is_some();
        let said =
            running.then(|| tokio::spawn(ask_vmm(Arc::clone(daemon), domain.clone(), groups)));
        (domain, said)
    };
    let asked: Vec<_> = chosen.into_iter().map(ask).collect();
    let mut records = Vec::with_capacity(asked.len());
    for (domain, said) in asked {
        let said = match said {
            Some(said) => said.await.unwrap_or_default(),
            None => Said::default(),
        };
        // One that is gone by now is left out.
        if let Ok(params) = domain_stats(daemon, &domain, groups, backing, said).await {
            records.push(DomainStatsRecord {
                dom: reference(domain.name()),
                params: params.into(),
            });
        }
    }
    Ok(ConnectGetAllDomainStatsRet {
        ret_stats: records.into(),
    })
}

/// How fast a running domain's memory changes, where somebody has asked for it.
fn dirty_rate(domain: &Domain, params: &mut Vec<TypedParam>) {
    let inner = domain.lock();
    let Some(rate) = inner.live.as_ref().map(|live| live.dirty_rate) else {
        return;
    };
    let status = match rate.status {
        Status::Unstarted => 0,
        Status::Measuring => 1,
        Status::Measured => 2,
    };
    params.push(TypedParam::new("dirtyrate.calc_status", status));
    params.push(TypedParam::new("dirtyrate.calc_start_time", rate.began));
    params.push(TypedParam::new("dirtyrate.calc_period", rate.seconds));
    params.push(TypedParam::new("dirtyrate.calc_mode", "page-sampling"));
    if rate.status == Status::Measured {
        let name = "dirtyrate.megabytes_per_second";
        params.push(TypedParam::new(name, rate.mib));
    }
}

/// What a VMM says. One that does not answer costs its domain these values, not the client its answer.
#[derive(Debug, Default)]
struct Said {
    vcpu_times: Vec<u64>,
    devices: Stats,
    iothreads: Vec<IoThreadConfig>,
}

async fn ask_vmm(daemon: Arc<Daemon>, domain: Arc<Domain>, groups: u32) -> Said {
    let times = async {
        match groups & stats::VCPU {
            0 => Vec::new(),
            _ => daemon.domains.vcpu_times(&domain).await.unwrap_or_default(),
        }
    };
    let devices = async {
        match groups & (stats::BALLOON | stats::INTERFACE | stats::BLOCK) {
            0 => Stats::default(),
            _ => daemon
                .domains
                .device_stats(&domain)
                .await
                .unwrap_or_default(),
        }
    };
    let has_any = || {
        let inner = domain.lock();
        let live = inner.live.as_ref();
        live.is_some_and(|live| iothreads::has_any(&live.definition))
    };
    let iothreads = async {
        match groups & stats::IOTHREAD != 0 && has_any() {
            false => Vec::new(),
            true => iothreads::all(&domain).await.unwrap_or_default(),
        }
    };
    let (vcpu_times, devices, iothreads) = tokio::join!(times, devices, iothreads);
    Said {
        vcpu_times,
        devices,
        iothreads,
    }
}

fn iothread_stats(threads: &[IoThreadConfig], params: &mut Vec<TypedParam>) {
    let count = u32::try_from(threads.len()).unwrap_or(u32::MAX);
    params.push(TypedParam::new("iothread.count", count));
    for thread in threads {
        let mut add = |name: &str, value: rpc::types::TypedValue| {
            let name = format!("iothread.{}.{name}", thread.id);
            params.push(TypedParam::new(name.as_str(), value));
        };
        add("poll-max-ns", thread.poll_max_ns.into());
        add("poll-grow", thread.poll_grow.into());
        add("poll-shrink", thread.poll_shrink.into());
    }
}

async fn domain_stats(
    daemon: &Daemon,
    domain: &Domain,
    groups: u32,
    backing: bool,
    said: Said,
) -> Result<Vec<TypedParam>, RemoteError> {
    let mut params = Vec::new();
    let (pid, state, definition) = {
        let inner = domain.lock();
        // Not read for who asks for none of it: a list of thousands of domains asks for their states.
        let needed = stats::BALLOON | stats::VCPU | stats::INTERFACE | stats::BLOCK;
        let definition = match groups & needed {
            0 => None,
            _ => Some(definition(&inner)?),
        };
        let pid = inner.live.as_ref().map(|live| live.process.identity().pid);
        (pid, inner.state, definition)
    };
    let mut add = |name: &str, value: rpc::types::TypedValue| {
        params.push(TypedParam::new(name, value));
    };
    if groups & stats::STATE != 0 {
        let (state, reason) = state.numbers();
        add("state.state", state.into());
        add("state.reason", reason.into());
    }
    if let Some(pid) = pid.filter(|_| groups & stats::CPU_TOTAL != 0) {
        let time = query::cpu_time(pid);
        add("cpu.time", time.total.into());
        add("cpu.user", time.user.into());
        add("cpu.system", time.system.into());
        // There is no such monitoring.
        add("cpu.cache.monitor.count", 0u32.into());
    }
    let device_groups = |balloon: bool| device_stats::Groups {
        balloon,
        interface: !balloon && groups & stats::INTERFACE != 0,
        block: !balloon && groups & stats::BLOCK != 0,
        backing,
    };
    if let Some(definition) = definition.as_ref().filter(|_| groups & stats::BALLOON != 0) {
        let from = (&**definition, pid, &said.devices);
        device_stats::all_stats(daemon, from, device_groups(true), &mut params).await;
    }
    let mut add = |name: &str, value: rpc::types::TypedValue| {
        params.push(TypedParam::new(name, value));
    };
    if let Some(definition) = definition.as_ref().filter(|_| groups & stats::VCPU != 0) {
        let online = definition.online_vcpus();
        add("vcpu.current", definition.vcpu.online().into());
        add("vcpu.maximum", definition.vcpu.max.into());
        let waits = pid.map(vcpus::vcpu_waits).unwrap_or_default();
        let times = (0..).zip(&said.vcpu_times);
        for (number, time) in times.filter(|(number, _)| online.contains(number)) {
            add(&format!("vcpu.{number}.state"), 1i32.into());
            add(&format!("vcpu.{number}.time"), (*time).into());
            if let Some((wait, delay)) = waits.get(&number) {
                add(&format!("vcpu.{number}.wait"), (*wait).into());
                add(&format!("vcpu.{number}.delay"), (*delay).into());
            }
        }
    }
    let others = groups & (stats::INTERFACE | stats::BLOCK);
    if let Some(definition) = definition.as_ref().filter(|_| others != 0) {
        let from = (&**definition, pid, &said.devices);
        device_stats::all_stats(daemon, from, device_groups(false), &mut params).await;
    }
    if !said.iothreads.is_empty() {
        iothread_stats(&said.iothreads, &mut params);
    }
    if groups & stats::DIRTY_RATE != 0 {
        dirty_rate(domain, &mut params);
    }
    if !domain.lock().visible() {
        return Err(not_running().into());
    }
    Ok(params)
}
