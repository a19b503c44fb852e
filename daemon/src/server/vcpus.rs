//! Virtual CPUs: how many, where they run, what they use; and I/O threads, of which there are none.

use std::collections::BTreeSet;

use rpc::args::*;
use rpc::error::{ErrorCode, RemoteError};
use rpc::procs;
use rpc::server::Router;
use rpc::types::TypedParam;
use serde_json::json;
use xml_schemas::cpuset;

use super::{Answer, Call, Daemon, count};
use crate::drivers::domain::guest_info;
use crate::drivers::domain::iothreads;
use crate::drivers::domain::metadata::affect;
use crate::drivers::domain::object::{Domain, not_running};
use crate::drivers::domain::query::{self, definition};
use crate::drivers::domain::vcpus::Threads;
use crate::error::{Error, check_flags};
use crate::node;

/// The functions for vCPUs and threads.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::DOMAIN_GET_MAX_VCPUS, get_max_vcpus)
        .on(procs::DOMAIN_GET_VCPUS_FLAGS, get_vcpus_flags)
        .on(procs::DOMAIN_SET_VCPUS, set_vcpus)
        .on(procs::DOMAIN_SET_VCPUS_FLAGS, set_vcpus_flags)
        .on(procs::DOMAIN_SET_VCPU, set_vcpu)
        .on(procs::DOMAIN_GET_VCPUS, get_vcpus)
        .on(procs::DOMAIN_GET_VCPU_PIN_INFO, get_vcpu_pin_info)
        .on(procs::DOMAIN_PIN_VCPU, pin_vcpu)
        .on(procs::DOMAIN_PIN_VCPU_FLAGS, pin_vcpu_flags)
        .on(procs::DOMAIN_GET_EMULATOR_PIN_INFO, get_emulator_pin_info)
        .on(procs::DOMAIN_PIN_EMULATOR, pin_emulator)
        .on(procs::DOMAIN_GET_CPU_STATS, get_cpu_stats)
        .on(procs::DOMAIN_GET_IOTHREAD_INFO, get_iothread_info)
        .on(procs::DOMAIN_ADD_IOTHREAD, add_iothread)
        .on(procs::DOMAIN_DEL_IOTHREAD, del_iothread)
        .on(procs::DOMAIN_PIN_IOTHREAD, pin_iothread)
        .on(procs::DOMAIN_SET_IOTHREAD_PARAMS, set_iothread_params)
}

/// virDomainModificationImpact
const IMPACT: u32 = affect::LIVE | affect::CONFIG;

/// A number of vCPUs on the wire.
fn vcpus(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

async fn get_max_vcpus(call: Call, args: DomainGetMaxVcpusArgs) -> Answer<DomainGetMaxVcpusRet> {
    let domain = call.state().find(&args.dom)?;
    let inner = domain.lock();
    inner.live()?;
    let num = vcpus(definition(&inner)?.vcpu.max);
    Ok(DomainGetMaxVcpusRet { num })
}

async fn get_vcpus_flags(
    call: Call,
    args: DomainGetVcpusFlagsArgs,
) -> Answer<DomainGetVcpusFlagsRet> {
    /// VIR_DOMAIN_VCPU_MAXIMUM
    const MAXIMUM: u32 = 4;
    /// VIR_DOMAIN_VCPU_GUEST
    const GUEST: u32 = 8;
    let known = affect::LIVE | affect::CONFIG | MAXIMUM | GUEST;
    check_flags(args.flags, known, "qemuDomainGetVcpusFlags")?;
    let domain = call.state().find(&args.dom)?;
    if args.flags & GUEST != 0 {
        let vcpus = guest_info::vcpus(domain.agent_command("guest-get-vcpus", None).await?)?;
        let maximum = args.flags & MAXIMUM != 0;
        let counted = vcpus.iter().filter(|vcpu| maximum || vcpu.online);
        return Ok(DomainGetVcpusFlagsRet {
            num: count(counted.count()),
        });
    }
    let inner = domain.lock();
    let stored = args.flags & affect::CONFIG != 0;
    if args.flags & affect::LIVE != 0 {
        inner.live()?;
    }
    let definition = match inner.persistent {
        Some(_) if stored => inner.stored()?,
        None if stored => {
            let text = "transient domains do not have any persistent config";
            return Err(Error::invalid(text).into());
        }
        _ => inner.definition()?,
    };
    let vcpu = &definition.ok_or_else(not_running)?.vcpu;
    let num = if args.flags & MAXIMUM != 0 {
        vcpu.max
    } else {
        vcpu.online()
    };
    Ok(DomainGetVcpusFlagsRet { num: vcpus(num) })
}

/// Maps of `length` bytes one behind the other, as many as libvirt's protocol carries.
fn maps(sets: &[BTreeSet<u32>], length: i32) -> Vec<u8> {
    let length = usize::try_from(length).unwrap_or(0);
    let most = rpc::limits::CPUMAPS_MAX / length.max(1);
    let map = |set| cpuset::to_map(set, length);
    sets.iter().take(most).flat_map(map).collect()
}

async fn get_vcpus(call: Call, args: DomainGetVcpusArgs) -> Answer<DomainGetVcpusRet> {
    let domain = call.state().find(&args.dom)?;
    let (there, pid) = {
        let inner = domain.lock();
        let Some(live) = &inner.live else {
            let text = "cannot retrieve vcpu information for inactive domain";
            return Err(Error::invalid(text).into());
        };
        let asked = usize::try_from(args.maxinfo).unwrap_or(0);
        let there = live.definition.online_vcpus().into_iter().take(asked);
        (there.collect::<Vec<u32>>(), live.process.identity().pid)
    };
    let domains = &call.state().domains;
    let times = domains.vcpu_times(&domain).await?;
    let places = query::vcpu_places(pid);
    let info = there.iter().map(|&number| VcpuInfo {
        number,
        // VIR_VCPU_RUNNING
        state: 1,
        cpu_time: times.get(number as usize).copied().unwrap_or(0),
        // VIR_VCPU_INFO_CPU_UNAVAILABLE where it cannot be told.
        cpu: places.get(&number).map_or(-2, |&cpu| vcpus(cpu)),
    });
    let pins = domains.vcpu_pins(&domain, usize::MAX, affect::LIVE)?;
    let pins = there.iter().filter_map(|&n| pins.get(n as usize).cloned());
    let pins: Vec<_> = pins.collect();
    Ok(DomainGetVcpusRet {
        info: info.collect(),
        cpumaps: maps(&pins, args.maplen).into(),
    })
}

async fn get_vcpu_pin_info(
    call: Call,
    args: DomainGetVcpuPinInfoArgs,
) -> Answer<DomainGetVcpuPinInfoRet> {
    check_flags(
        args.flags,
        affect::LIVE | affect::CONFIG,
        "qemuDomainGetVcpuPinInfo",
    )?;
    let domain = call.state().find(&args.dom)?;
    let most = usize::try_from(args.ncpumaps).unwrap_or(0);
    let pins = call.state().domains.vcpu_pins(&domain, most, args.flags)?;
    Ok(DomainGetVcpuPinInfoRet {
        cpumaps: maps(&pins, args.maplen).into(),
        num: count(pins.len()),
    })
}

/// CPU time in all; the answer to a client that asks only for the number of values is that number.
async fn get_cpu_stats(call: Call, args: DomainGetCpuStatsArgs) -> Answer<DomainGetCpuStatsRet> {
    /// VIR_TYPED_PARAM_STRING_OKAY
    const STRINGS: u32 = 4;
    check_flags(args.flags, STRINGS, "qemuDomainGetCPUStats")?;
    let domain = call.state().find(&args.dom)?;
    let pid = domain.lock().live()?.process.identity().pid;
    // By host CPU nothing is counted: a client hears how many CPUs there are, and of no value of one.
    if args.start_cpu >= 0 {
        let cpus = if args.ncpus == 0 {
            node::cpus_present().len()
        } else {
            0
        };
        return Ok(DomainGetCpuStatsRet {
            params: Vec::new().into(),
            nparams: count(cpus),
        });
    }
    let time = query::cpu_time(pid);
    let params = vec![
        TypedParam::new("cpu_time", time.total),
        TypedParam::new("user_time", time.user),
        TypedParam::new("system_time", time.system),
    ];
    let nparams = count(params.len());
    let asked = usize::try_from(args.nparams).unwrap_or(0);
    Ok(DomainGetCpuStatsRet {
        params: params.into_iter().take(asked).collect(),
        nparams,
    })
}

/// Sets vCPUs on or off in the guest, as far as its agent goes.
pub(super) async fn set_in_guest(
    domain: &Domain,
    vcpus: impl Iterator<Item = u32>,
    online: bool,
) -> Answer<()> {
    let list: Vec<_> = vcpus
        .map(|id| json!({"logical-id": id, "online": online}))
        .collect();
    let asked = list.len();
    if asked == 0 {
        return Ok(());
    }
    let arguments = json!({ "vcpus": list });
    let done = domain
        .agent_command("guest-set-vcpus", Some(arguments))
        .await?;
    if done.as_u64() != u64::try_from(asked).ok() {
        let text = "failed to set requested number of vCPUs in guest";
        return Err(Error::internal(text).into());
    }
    Ok(())
}

async fn set_vcpus(call: Call, args: DomainSetVcpusArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .set_vcpus(domain, args.nvcpus, false, affect::LIVE)
        .await?)
}

async fn set_vcpus_flags(call: Call, args: DomainSetVcpusFlagsArgs) -> Answer<()> {
    /// virDomainVcpuFlags
    const MAXIMUM: u32 = 4;
    const GUEST: u32 = 8;
    const HOTPLUGGABLE: u32 = 16;
    let known = IMPACT | MAXIMUM | GUEST | HOTPLUGGABLE;
    check_flags(args.flags, known, "qemuDomainSetVcpusFlags")?;
    let domain = call.state().pin(&args.dom)?;
    let (domains, flags) = (&call.state().domains, args.flags & IMPACT);
    if args.flags & GUEST != 0 {
        let known = guest_info::vcpus(domain.agent_command("guest-get-vcpus", None).await?)?;
        let invalid = |text| RemoteError::from(Error::new(ErrorCode::INVALID_ARG, text));
        let wanted = args.nvcpus as usize;
        if wanted > known.len() {
            return Err(invalid("guest agent reports less cpu than requested"));
        }
        let online = known.iter().filter(|vcpu| vcpu.online).count();
        let fewer = wanted < online;
        let change: Vec<u32> = known
            .iter()
            .rev()
            .filter(|vcpu| {
                if fewer {
                    vcpu.online && vcpu.can_offline
                } else {
                    !vcpu.online
                }
            })
            .map(|vcpu| vcpu.id)
            .take(online.abs_diff(wanted))
            .collect();
        if change.len() < online.abs_diff(wanted) {
            return Err(invalid("Cannot offline enough CPUs"));
        }
        return set_in_guest(&domain, change.into_iter(), !fewer).await;
    }
    if args.flags & MAXIMUM != 0 {
        domains.set_max_vcpus(domain, args.nvcpus, flags).await?;
    } else {
        let hotpluggable = args.flags & HOTPLUGGABLE != 0;
        domains
            .set_vcpus(domain, args.nvcpus, hotpluggable, flags)
            .await?;
    }
    Ok(())
}

async fn set_vcpu(call: Call, args: DomainSetVcpuArgs) -> Answer<()> {
    check_flags(args.flags, IMPACT, "qemuDomainSetVcpu")?;
    let enable = match args.state {
        0 => false,
        1 => true,
        _ => return Err(Error::new(ErrorCode::INVALID_ARG, "unsupported state value").into()),
    };
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .enable_vcpus(domain, &args.cpumap, enable, args.flags)
        .await?)
}

async fn pin(
    call: &Call,
    dom: &rpc::types::Domain,
    threads: Threads,
    map: &[u8],
    flags: u32,
) -> Answer<()> {
    let function = match threads {
        Threads::IoThread(_) => "qemuDomainPinIOThread",
        Threads::Emulator => "qemuDomainPinEmulator",
        Threads::Vcpu(_) => "qemuDomainPinVcpuFlags",
    };
    check_flags(flags, IMPACT, function)?;
    let domain = call.state().pin(dom)?;
    Ok(call
        .state()
        .domains
        .pin_threads(domain, threads, map, flags)
        .await?)
}

async fn pin_vcpu(call: Call, args: DomainPinVcpuArgs) -> Answer<()> {
    let threads = Threads::Vcpu(args.vcpu);
    pin(&call, &args.dom, threads, &args.cpumap, affect::LIVE).await
}

async fn pin_vcpu_flags(call: Call, args: DomainPinVcpuFlagsArgs) -> Answer<()> {
    let threads = Threads::Vcpu(args.vcpu);
    pin(&call, &args.dom, threads, &args.cpumap, args.flags).await
}

async fn pin_emulator(call: Call, args: DomainPinEmulatorArgs) -> Answer<()> {
    pin(
        &call,
        &args.dom,
        Threads::Emulator,
        &args.cpumap,
        args.flags,
    )
    .await
}

async fn get_emulator_pin_info(
    call: Call,
    args: DomainGetEmulatorPinInfoArgs,
) -> Answer<DomainGetEmulatorPinInfoRet> {
    check_flags(args.flags, IMPACT, "qemuDomainGetEmulatorPinInfo")?;
    let domain = call.state().find(&args.dom)?;
    let set = call.state().domains.emulator_pin(&domain, args.flags)?;
    Ok(DomainGetEmulatorPinInfoRet {
        cpumaps: maps(&[set], args.maplen).into(),
        ret: 1,
    })
}

async fn get_iothread_info(
    call: Call,
    args: DomainGetIothreadInfoArgs,
) -> Answer<DomainGetIothreadInfoRet> {
    check_flags(args.flags, IMPACT, "qemuDomainGetIOThreadInfo")?;
    let domain = call.state().find(&args.dom)?;
    let host: BTreeSet<u32> = node::cpus_present().into_iter().collect();
    let length = host.last().map_or(1, |last| *last as usize / 8 + 1);
    let info: Vec<DomainIothreadInfo> = call
        .state()
        .domains
        .iothreads(&domain, args.flags)?
        .into_iter()
        .map(|thread| DomainIothreadInfo {
            iothread_id: thread.id,
            cpumap: cpuset::to_map(thread.cpus.as_ref().unwrap_or(&host), length).into(),
        })
        .collect();
    Ok(DomainGetIothreadInfoRet {
        ret: u32::try_from(info.len()).unwrap_or(0),
        info: info.into(),
    })
}

async fn change_iothread(
    call: &Call,
    dom: &rpc::types::Domain,
    id: u32,
    change: iothreads::Change,
    flags: u32,
) -> Answer<()> {
    let function = match change {
        iothreads::Change::Add => "qemuDomainAddIOThread",
        iothreads::Change::Remove => "qemuDomainDelIOThread",
        iothreads::Change::Pin(_) => "qemuDomainPinIOThread",
        iothreads::Change::Set(_) => "qemuDomainSetIOThreadParams",
    };
    check_flags(flags, IMPACT, function)?;
    let domain = call.state().pin(dom)?;
    Ok(call
        .state()
        .domains
        .change_iothread(domain, id, change, flags)
        .await?)
}

async fn add_iothread(call: Call, args: DomainAddIothreadArgs) -> Answer<()> {
    let change = iothreads::Change::Add;
    change_iothread(&call, &args.dom, args.iothread_id, change, args.flags).await
}

async fn del_iothread(call: Call, args: DomainDelIothreadArgs) -> Answer<()> {
    let change = iothreads::Change::Remove;
    change_iothread(&call, &args.dom, args.iothread_id, change, args.flags).await
}

async fn pin_iothread(call: Call, args: DomainPinIothreadArgs) -> Answer<()> {
    let change = iothreads::Change::Pin(cpuset::from_map(&args.cpumap));
    change_iothread(&call, &args.dom, args.iothreads_id, change, args.flags).await
}

async fn set_iothread_params(call: Call, args: DomainSetIothreadParamsArgs) -> Answer<()> {
    let change = iothreads::Change::Set(iothreads::Settings::read(&args.params)?);
    change_iothread(&call, &args.dom, args.iothread_id, change, args.flags).await
}
