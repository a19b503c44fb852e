//! Domains' devices: what they count, and what can be changed of them.

use rpc::args::*;
use rpc::error::{ErrorCode, RemoteError};
use rpc::procs;
use rpc::server::Router;
use rpc::types::{TypedParam, TypedValue};
use std::sync::Arc;
use vmm_api::control::{BalloonStats, DiskStats, MAX_PEEK};
use xml_schemas::Domain as Definition;
use xml_schemas::domain::device::{Disk, DiskSource, IoTune, Rate};

use super::{Answer, Call, Daemon, count};
use crate::drivers::domain::lifecycle::ask;
use crate::drivers::domain::metadata::affect;
use crate::drivers::domain::object::Domain;
use crate::drivers::domain::query::definition;
use crate::drivers::domain::tuning::{find_disk, find_interface, id};
use crate::drivers::domain::{agent, blocking, leases};
use crate::error::{Error, check_flags};

/// The functions for devices.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::DOMAIN_BLOCK_STATS, block_stats)
        .on(procs::DOMAIN_BLOCK_STATS_FLAGS, block_stats_flags)
        .on(procs::DOMAIN_GET_BLOCK_INFO, get_block_info)
        .on(procs::DOMAIN_BLOCK_PEEK, block_peek)
        .on(procs::DOMAIN_MEMORY_PEEK, memory_peek)
        .on(procs::DOMAIN_GET_DISK_ERRORS, get_disk_errors)
        .on(procs::DOMAIN_GET_BLOCK_IO_TUNE, get_block_io_tune)
        .on(procs::DOMAIN_SET_BLOCK_IO_TUNE, set_block_io_tune)
        .on(procs::DOMAIN_BLOCK_RESIZE, block_resize)
        .on(procs::DOMAIN_INTERFACE_STATS, interface_stats)
        .on(
            procs::DOMAIN_GET_INTERFACE_PARAMETERS,
            get_interface_parameters,
        )
        .on(
            procs::DOMAIN_SET_INTERFACE_PARAMETERS,
            set_interface_parameters,
        )
        .on(procs::DOMAIN_INTERFACE_ADDRESSES, interface_addresses)
        .on(procs::DOMAIN_MEMORY_STATS, memory_stats)
        .on(
            procs::DOMAIN_SET_MEMORY_STATS_PERIOD,
            set_memory_stats_period,
        )
        .on(procs::DOMAIN_SET_MEMORY, set_memory)
        .on(procs::DOMAIN_SET_MEMORY_FLAGS, set_memory_flags)
        .on(procs::DOMAIN_SET_LIFECYCLE_ACTION, set_lifecycle_action)
}

/// VIR_TYPED_PARAM_STRING_OKAY
pub(super) const STRINGS: u32 = 4;
/// virDomainModificationImpact
const IMPACT: u32 = affect::LIVE | affect::CONFIG;

/// As many parameters as a client has room for; their number to one that asks only for it.
pub(super) fn fitting(params: Vec<TypedParam>, asked: i32) -> (Vec<TypedParam>, i32) {
    let nparams = count(params.len());
    let asked = usize::try_from(asked).unwrap_or(0);
    (params.into_iter().take(asked).collect(), nparams)
}

fn running(domain: &Domain) -> Answer<Arc<Definition>> {
    Ok(Arc::clone(&domain.lock().live()?.definition))
}

/// A counter on the wire.
fn counter(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Counters of one disk, or of all together for an empty name.
async fn disk_stats(call: &Call, dom: &rpc::types::Domain, path: &str) -> Answer<DiskStats> {
    let domain = call.state().find(dom)?;
    let definition = running(&domain)?;
    let wanted = if path.is_empty() {
        None
    } else {
        let words = format!("invalid path: {path}");
        Some(id(find_disk(&definition, path, &words)?.alias.as_ref())?)
    };
    let stats = call.state().domains.device_stats(&domain).await?;
    let mut sum = DiskStats::default();
    for (id, disk) in &stats.disks {
        if wanted.as_ref().is_none_or(|wanted| wanted == id) {
            add(&mut sum, disk);
        }
    }
    Ok(sum)
}

fn add(sum: &mut DiskStats, disk: &DiskStats) {
    for (to, from) in [
        (&mut sum.read_requests, disk.read_requests),
        (&mut sum.read_bytes, disk.read_bytes),
        (&mut sum.read_ns, disk.read_ns),
        (&mut sum.write_requests, disk.write_requests),
        (&mut sum.write_bytes, disk.write_bytes),
        (&mut sum.write_ns, disk.write_ns),
        (&mut sum.flush_requests, disk.flush_requests),
        (&mut sum.flush_ns, disk.flush_ns),
        (&mut sum.errors, disk.errors),
        (&mut sum.capacity, disk.capacity),
        (&mut sum.allocation, disk.allocation),
        (&mut sum.physical, disk.physical),
    ] {
        *to = to.saturating_add(from);
    }
}

async fn block_stats(call: Call, args: DomainBlockStatsArgs) -> Answer<DomainBlockStatsRet> {
    let stats = disk_stats(&call, &args.dom, &args.path).await?;
    Ok(DomainBlockStatsRet {
        rd_req: counter(stats.read_requests),
        rd_bytes: counter(stats.read_bytes),
        wr_req: counter(stats.write_requests),
        wr_bytes: counter(stats.write_bytes),
        // QEMU counts no errors here either: -1 is "not known".
        errs: -1,
    })
}

async fn block_stats_flags(
    call: Call,
    args: DomainBlockStatsFlagsArgs,
) -> Answer<DomainBlockStatsFlagsRet> {
    check_flags(args.flags, STRINGS, "qemuDomainBlockStatsFlags")?;
    let stats = disk_stats(&call, &args.dom, &args.path).await?;
    let params = [
        ("wr_bytes", stats.write_bytes),
        ("wr_operations", stats.write_requests),
        ("rd_bytes", stats.read_bytes),
        ("rd_operations", stats.read_requests),
        ("flush_operations", stats.flush_requests),
        ("wr_total_times", stats.write_ns),
        ("rd_total_times", stats.read_ns),
        ("flush_total_times", stats.flush_ns),
    ];
    let params = params
        .into_iter()
        .map(|(name, value)| TypedParam::new(name, counter(value)))
        .collect();
    let (params, nparams) = fitting(params, args.nparams);
    Ok(DomainBlockStatsFlagsRet {
        params: params.into(),
        nparams,
    })
}

async fn get_block_info(call: Call, args: DomainGetBlockInfoArgs) -> Answer<DomainGetBlockInfoRet> {
    check_flags(args.flags, 0, "qemuDomainGetBlockInfo")?;
    let domain = call.state().find(&args.dom)?;
    let (disk, active) = {
        let inner = domain.lock();
        let words = format!("invalid path {} not assigned to domain", args.path);
        (
            find_disk(&*definition(&inner)?, &args.path, &words)?,
            inner.live.is_some(),
        )
    };
    if active {
        let stats = call.state().domains.device_stats(&domain).await?;
        let alias = id(disk.alias.as_ref())?;
        if let Some((_, stats)) = stats.disks.iter().find(|(id, _)| *id == alias) {
            return Ok(DomainGetBlockInfoRet {
                allocation: stats.allocation,
                capacity: stats.capacity,
                physical: stats.physical,
            });
        }
    }
    stored_info(call.state(), disk).await
}

/// A few bytes of a disk without a format, as its guest sees them.
async fn block_peek(call: Call, args: DomainBlockPeekArgs) -> Answer<DomainBlockPeekRet> {
    check_flags(args.flags, 0, "qemuDomainBlockPeek")?;
    let size = args.size as usize;
    if size > rpc::limits::PEEK_MAX {
        let text = format!("size too large: {size} > {}", rpc::limits::PEEK_MAX);
        return Err(Error::internal(text).into());
    }
    let domain = call.state().find(&args.dom)?;
    let disk = {
        let words = format!("disk '{}' not found in domain", args.path);
        find_disk(&*definition(&domain.lock())?, &args.path, &words)?
    };
    let storage = Arc::clone(&call.state().domains.storage);
    let read = blocking(move || {
        let disk = located(&storage, disk)?;
        crate::drivers::domain::devices::peek(&disk, args.offset, size)
    });
    Ok(DomainBlockPeekRet {
        buffer: read.await??.into(),
    })
}

/// A few bytes of a running guest's memory.
async fn memory_peek(call: Call, args: DomainMemoryPeekArgs) -> Answer<DomainMemoryPeekRet> {
    /// VIR_MEMORY_VIRTUAL and VIR_MEMORY_PHYSICAL
    const VIRTUAL: u32 = 1;
    const PHYSICAL: u32 = 2;
    let linear = match args.flags {
        VIRTUAL => true,
        PHYSICAL => false,
        _ => {
            let text = "flags parameter must be VIR_MEMORY_VIRTUAL or VIR_MEMORY_PHYSICAL";
            return Err(Error::new(ErrorCode::INVALID_ARG, text).into());
        }
    };
    let size = args.size as usize;
    if size > rpc::limits::PEEK_MAX {
        let text = format!("size too large: {size} > {}", rpc::limits::PEEK_MAX);
        return Err(Error::internal(text).into());
    }
    let domain = call.state().find(&args.dom)?;
    domain.lock().live()?;
    let mut buffer = Vec::with_capacity(size);
    while buffer.len() < size {
        let bytes = u32::try_from(size - buffer.len()).unwrap_or(MAX_PEEK);
        let address = args.offset.checked_add(buffer.len() as u64);
        let asked = vmm_api::control::Call::Peek {
            address: address.ok_or_else(|| Error::failed("no memory has such addresses"))?,
            bytes: bytes.min(MAX_PEEK),
            linear,
        };
        match ask(&domain, asked).await? {
            vmm_api::control::Answer::Memory(found) if !found.is_empty() => buffer.extend(found),
            _ => return Err(Error::internal("the VMM's answer makes no sense").into()),
        }
    }
    buffer.truncate(size);
    Ok(DomainMemoryPeekRet {
        buffer: buffer.into(),
    })
}

/// A disk whose volume, if it is one, has been found.
fn located(storage: &crate::drivers::storage::Driver, mut disk: Disk) -> Result<Disk, Error> {
    if let DiskSource::Volume { pool, volume } = &disk.source {
        disk.source = DiskSource::File(storage.disk_path(pool, volume)?);
    }
    Ok(disk)
}

/// What there is to say of a disk that no running domain has.
pub(super) async fn stored_info(
    daemon: &super::Daemon,
    disk: Disk,
) -> Answer<DomainGetBlockInfoRet> {
    let storage = Arc::clone(&daemon.domains.storage);
    let info = blocking(move || {
        let disk = located(&storage, disk)?;
        crate::drivers::domain::devices::image_info(&disk)
    })
    .await??;
    Ok(DomainGetBlockInfoRet {
        allocation: info.allocation,
        capacity: info.capacity,
        physical: info.physical,
    })
}

async fn get_disk_errors(
    call: Call,
    args: DomainGetDiskErrorsArgs,
) -> Answer<DomainGetDiskErrorsRet> {
    check_flags(args.flags, 0, "qemuDomainGetDiskErrors")?;
    let domain = call.state().find(&args.dom)?;
    let inner = domain.lock();
    let live = inner.live()?;
    let errors: Vec<DomainDiskError> = live
        .disk_errors
        .iter()
        .map(|(disk, error)| DomainDiskError {
            disk: disk.clone(),
            error: *error,
        })
        .collect();
    let disks = live.definition.devices.rest.iter();
    let nerrors = if args.maxerrors == 0 {
        count(disks.filter(|e| e.name == "disk").count())
    } else {
        count(errors.len().min(args.maxerrors as usize))
    };
    Ok(DomainGetDiskErrorsRet {
        errors: errors.into_iter().take(args.maxerrors as usize).collect(),
        nerrors,
    })
}

async fn get_block_io_tune(
    call: Call,
    args: DomainGetBlockIoTuneArgs,
) -> Answer<DomainGetBlockIoTuneRet> {
    check_flags(args.flags, IMPACT | STRINGS, "qemuDomainGetBlockIoTune")?;
    let domain = call.state().find(&args.dom)?;
    let flags = args.flags & IMPACT;
    let disk = args.disk.unwrap_or_default();
    // A client that asks only for their number need not name a disk.
    let tune = if disk.is_empty() && args.nparams == 0 {
        IoTune::default()
    } else {
        call.state().domains.io_tune(&domain, &disk, flags)?
    };
    let mut params: Vec<TypedParam> = IoTune::NAMES
        .iter()
        .zip(tune.values)
        .map(|(name, value)| TypedParam::new(*name, value))
        .collect();
    if args.flags & STRINGS != 0 {
        let group = tune.group.unwrap_or_default();
        params.insert(13, TypedParam::new("group_name", TypedValue::String(group)));
    }
    let (params, nparams) = fitting(params, args.nparams);
    Ok(DomainGetBlockIoTuneRet {
        params: params.into(),
        nparams,
    })
}

fn bad_parameter(param: &TypedParam) -> RemoteError {
    let text = format!("parameter '{}' has a wrong type or value", param.field);
    Error::new(ErrorCode::INVALID_ARG, text).into()
}

pub(super) fn unsigned(param: &TypedParam) -> Answer<u64> {
    match param.value {
        TypedValue::UInt(value) => Ok(value.into()),
        TypedValue::ULLong(value) => Ok(value),
        TypedValue::Int(value) => u64::try_from(value).map_err(|_| bad_parameter(param)),
        TypedValue::LLong(value) => u64::try_from(value).map_err(|_| bad_parameter(param)),
        _ => Err(bad_parameter(param)),
    }
}

async fn set_block_io_tune(call: Call, args: DomainSetBlockIoTuneArgs) -> Answer<()> {
    check_flags(args.flags, IMPACT, "qemuDomainSetBlockIoTune")?;
    let domain = call.state().pin(&args.dom)?;
    let mut values = Vec::new();
    let mut group = None;
    for param in &args.params.0 {
        if param.field == "group_name" {
            let TypedValue::String(name) = &param.value else {
                return Err(bad_parameter(param));
            };
            group = Some(name.clone());
            continue;
        }
        values.push((param.field.clone(), unsigned(param)?));
    }
    Ok(call
        .state()
        .domains
        .set_io_tune(domain, &args.disk, (&values, group), args.flags)
        .await?)
}

async fn block_resize(call: Call, args: DomainBlockResizeArgs) -> Answer<()> {
    /// VIR_DOMAIN_BLOCK_RESIZE_BYTES
    const BYTES: u32 = 1;
    /// VIR_DOMAIN_BLOCK_RESIZE_CAPACITY: all that its block device has.
    const CAPACITY: u32 = 2;
    check_flags(args.flags, BYTES | CAPACITY, "qemuDomainBlockResize")?;
    let bytes = if args.flags & BYTES != 0 {
        args.size
    } else {
        args.size.checked_mul(1024).ok_or_else(|| {
            RemoteError::from(Error::new(
                ErrorCode::OVERFLOW,
                "size must be less than 18014398509481983",
            ))
        })?
    };
    let domain = call.state().pin(&args.dom)?;
    Ok(call
        .state()
        .domains
        .resize_disk(domain, &args.disk, bytes, args.flags & CAPACITY != 0)
        .await?)
}

async fn interface_stats(
    call: Call,
    args: DomainInterfaceStatsArgs,
) -> Answer<DomainInterfaceStatsRet> {
    let domain = call.state().find(&args.dom)?;
    let card = find_interface(&*running(&domain)?, &args.device)?;
    let alias = id(card.alias.as_ref())?;
    let stats = call.state().domains.device_stats(&domain).await?;
    let found = stats.nets.iter().find(|(id, _)| *id == alias);
    let stats = found.map(|(_, stats)| *stats).unwrap_or_default();
    Ok(DomainInterfaceStatsRet {
        rx_bytes: counter(stats.rx_bytes),
        rx_packets: counter(stats.rx_packets),
        rx_errs: counter(stats.rx_errors),
        rx_drop: counter(stats.rx_dropped),
        tx_bytes: counter(stats.tx_bytes),
        tx_packets: counter(stats.tx_packets),
        tx_errs: counter(stats.tx_errors),
        tx_drop: counter(stats.tx_dropped),
    })
}

const DIRECTIONS: [&str; 2] = ["inbound", "outbound"];

async fn get_interface_parameters(
    call: Call,
    args: DomainGetInterfaceParametersArgs,
) -> Answer<DomainGetInterfaceParametersRet> {
    check_flags(
        args.flags,
        IMPACT | STRINGS,
        "qemuDomainGetInterfaceParameters",
    )?;
    let domain = call.state().find(&args.dom)?;
    let (inbound, outbound) = if args.nparams == 0 {
        (None, None)
    } else {
        let flags = args.flags & IMPACT;
        call.state()
            .domains
            .bandwidth(&domain, &args.device, flags)?
    };
    let (params, nparams) = fitting(rate_params([inbound, outbound]), args.nparams);
    Ok(DomainGetInterfaceParametersRet {
        params: params.into(),
        nparams,
    })
}

async fn set_interface_parameters(
    call: Call,
    args: DomainSetInterfaceParametersArgs,
) -> Answer<()> {
    check_flags(args.flags, IMPACT, "qemuDomainSetInterfaceParameters")?;
    let domain = call.state().pin(&args.dom)?;
    let [inbound, outbound] = rates(&args.params.0)?;
    Ok(call
        .state()
        .domains
        .set_bandwidth(domain, &args.device, (inbound, outbound), args.flags)
        .await?)
}

/// Limits of a card, inbound and outbound, as parameters.
pub(super) fn rate_params(rates: [Option<Rate>; 2]) -> Vec<TypedParam> {
    let mut params = Vec::new();
    for (direction, rate) in DIRECTIONS.into_iter().zip(rates) {
        let rate = rate.unwrap_or_default();
        let mut add = |name: &str, value: u64| {
            let value = u32::try_from(value).unwrap_or(u32::MAX);
            params.push(TypedParam::new(format!("{direction}.{name}"), value));
        };
        add("average", rate.average);
        add("peak", rate.peak);
        add("burst", rate.burst);
        if direction == "inbound" {
            add("floor", rate.floor);
        }
    }
    params
}

/// The reverse of [`rate_params`]; none for a direction that nothing is said of.
pub(super) fn rates(params: &[TypedParam]) -> Answer<[Option<Rate>; 2]> {
    let mut rates: [Option<Rate>; 2] = [None, None];
    for param in params {
        let value = unsigned(param)?;
        let (direction, name) = param
            .field
            .split_once('.')
            .ok_or_else(|| bad_parameter(param))?;
        let at = DIRECTIONS.iter().position(|d| *d == direction);
        let rate = rates[at.ok_or_else(|| bad_parameter(param))?].get_or_insert_default();
        match name {
            "average" => rate.average = value,
            "peak" => rate.peak = value,
            "burst" => rate.burst = value,
            "floor" if direction == "inbound" => rate.floor = value,
            _ => return Err(bad_parameter(param)),
        }
    }
    for rate in rates.into_iter().flatten() {
        if rate.average == 0 && rate.floor == 0 && (rate.peak != 0 || rate.burst != 0) {
            let text = "'average' is mandatory where 'peak' or 'burst' is set";
            return Err(Error::new(ErrorCode::INVALID_ARG, text).into());
        }
    }
    Ok(rates)
}

async fn interface_addresses(
    call: Call,
    args: DomainInterfaceAddressesArgs,
) -> Answer<DomainInterfaceAddressesRet> {
    /// virDomainInterfaceAddressesSource
    const LEASE: u32 = 0;
    const AGENT: u32 = 1;
    const ARP: u32 = 2;
    check_flags(args.flags, 0, "qemuDomainInterfaceAddresses")?;
    let domain = call.state().find(&args.dom)?;
    let definition = running(&domain)?;
    let found = match args.source {
        LEASE => {
            let domains = std::sync::Arc::clone(&call.state().domains);
            blocking(move || domains.leased(&definition)).await??
        }
        AGENT => blocking(move || agent::interfaces(&definition)).await??,
        ARP => blocking(move || leases::neighbours(&definition)).await??,
        other => {
            let text = format!("Unknown IP address data source {other}");
            return Err(Error::new(ErrorCode::ARGUMENT_UNSUPPORTED, text).into());
        }
    };
    let wire = found.into_iter().map(|card| DomainInterface {
        name: card.name,
        hwaddr: Some(card.mac),
        addrs: card
            .addresses
            .into_iter()
            .map(|(address, prefix)| DomainIpAddr {
                // virIPAddrType
                kind: i32::from(address.is_ipv6()),
                addr: address.to_string(),
                prefix,
            })
            .collect(),
    });
    Ok(DomainInterfaceAddressesRet {
        ifaces: wire.collect(),
    })
}

/// virDomainMemoryStatTags with their values.
pub(super) fn memory_values(balloon: &BalloonStats, resident_kib: u64) -> Vec<(i32, u64)> {
    let kib = |bytes: Option<u64>| bytes.map(|bytes| bytes / 1024);
    [
        (6, kib(Some(balloon.actual_bytes))),
        (0, kib(balloon.swap_in)),
        (1, kib(balloon.swap_out)),
        (2, balloon.major_faults),
        (3, balloon.minor_faults),
        (4, kib(balloon.free)),
        (5, kib(balloon.total)),
        (8, kib(balloon.available)),
        (9, Some(balloon.updated)),
        (10, kib(balloon.disk_caches)),
        (11, balloon.hugetlb_allocations),
        (12, balloon.hugetlb_failures),
        (7, Some(resident_kib)),
    ]
    .into_iter()
    .filter_map(|(tag, value)| Some((tag, value?)))
    .collect()
}

/// KiB of a process in the host's memory.
pub(super) fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|rest| rest.trim().split(' ').next()?.parse().ok())
        .unwrap_or(0)
}

async fn balloon(call: &Call, domain: &Domain) -> Answer<(BalloonStats, u64)> {
    let (pid, current) = {
        let inner = domain.lock();
        let live = inner.live()?;
        let current = live.definition.memory.current_kib;
        (live.process.identity().pid, current)
    };
    let stats = call.state().domains.device_stats(domain).await?;
    let balloon = stats.balloon.unwrap_or(BalloonStats {
        actual_bytes: current.saturating_mul(1024),
        ..BalloonStats::default()
    });
    Ok((balloon, resident_kib(pid)))
}

async fn memory_stats(call: Call, args: DomainMemoryStatsArgs) -> Answer<DomainMemoryStatsRet> {
    check_flags(args.flags, 0, "qemuDomainMemoryStats")?;
    let domain = call.state().find(&args.dom)?;
    let (balloon, resident) = balloon(&call, &domain).await?;
    let stats = memory_values(&balloon, resident)
        .into_iter()
        .map(|(tag, val)| DomainMemoryStat { tag, val });
    Ok(DomainMemoryStatsRet {
        stats: stats.take(args.max_stats as usize).collect(),
    })
}

async fn set_memory_stats_period(call: Call, args: DomainSetMemoryStatsPeriodArgs) -> Answer<()> {
    check_flags(args.flags, IMPACT, "qemuDomainSetMemoryStatsPeriod")?;
    let domain = call.state().pin(&args.dom)?;
    Ok(call
        .state()
        .domains
        .set_memory_stats_period(domain, args.period, args.flags)
        .await?)
}

async fn set_memory(call: Call, args: DomainSetMemoryArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call
        .state()
        .domains
        .set_memory(domain, args.memory, affect::LIVE)
        .await?)
}

async fn set_memory_flags(call: Call, args: DomainSetMemoryFlagsArgs) -> Answer<()> {
    /// VIR_DOMAIN_MEM_MAXIMUM
    const MAXIMUM: u32 = 4;
    check_flags(args.flags, IMPACT | MAXIMUM, "qemuDomainSetMemoryFlags")?;
    let domain = call.state().pin(&args.dom)?;
    let (domains, flags) = (&call.state().domains, args.flags & IMPACT);
    if args.flags & MAXIMUM != 0 {
        domains.set_max_memory(domain, args.memory, flags).await?;
    } else {
        domains.set_memory(domain, args.memory, flags).await?;
    }
    Ok(())
}

async fn set_lifecycle_action(call: Call, args: DomainSetLifecycleActionArgs) -> Answer<()> {
    check_flags(args.flags, IMPACT, "qemuDomainSetLifecycleAction")?;
    let domain = call.state().pin(&args.dom)?;
    Ok(call
        .state()
        .domains
        .set_lifecycle_action(domain, args.kind, args.action, args.flags)
        .await?)
}
