//! The host: what it counts, what can be changed of it, and its CPU.

use std::fs;
use std::path::{Path, PathBuf};

use rpc::args::*;
use rpc::error::{ErrorCode, RemoteError};
use rpc::procs;
use rpc::server::Router;
use rpc::types::{TypedParam, TypedValue};

use super::{Answer, Call, Daemon, count};
use crate::cpus::{self, Comparison, CpuSet, baseline_flags};
use crate::drivers::domain::blocking;
use crate::error::{Error, check_flags};
use crate::{capabilities, node, smbios};

/// The functions for the host.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::CONNECT_GET_SYSINFO, get_sysinfo)
        .on(procs::NODE_GET_CPU_STATS, get_cpu_stats)
        .on(procs::NODE_GET_MEMORY_STATS, get_memory_stats)
        .on(procs::NODE_GET_MEMORY_PARAMETERS, get_memory_parameters)
        .on(procs::NODE_SET_MEMORY_PARAMETERS, set_memory_parameters)
        .on(procs::NODE_GET_FREE_PAGES, get_free_pages)
        .on(procs::NODE_ALLOC_PAGES, alloc_pages)
        .on(procs::NODE_SUSPEND_FOR_DURATION, suspend)
        .on(procs::NODE_GET_SEV_INFO, get_sev_info)
        .on(procs::CONNECT_COMPARE_CPU, compare_cpu)
        .on(
            procs::CONNECT_COMPARE_HYPERVISOR_CPU,
            compare_hypervisor_cpu,
        )
        .on(procs::CONNECT_BASELINE_CPU, baseline_cpu)
        .on(
            procs::CONNECT_BASELINE_HYPERVISOR_CPU,
            baseline_hypervisor_cpu,
        )
}

fn invalid(text: impl Into<String>) -> RemoteError {
    Error::new(ErrorCode::INVALID_ARG, text).into()
}

async fn get_sysinfo(_call: Call, args: ConnectGetSysinfoArgs) -> Answer<ConnectGetSysinfoRet> {
    check_flags(args.flags, 0, "qemuConnectGetSysinfo")?;
    let sysinfo = blocking(smbios::sysinfo).await?;
    let sysinfo = sysinfo.ok_or_else(|| {
        RemoteError::from(Error::unsupported(
            "Host SMBIOS information is not available",
        ))
    })?;
    Ok(ConnectGetSysinfoRet { sysinfo })
}

/// As many values as a client has room for, and their number to one that asks only for it.
fn fitting<T>(mut values: Vec<T>, asked: i32) -> (Vec<T>, i32) {
    let all = count(values.len());
    values.truncate(usize::try_from(asked).unwrap_or(0));
    (values, all)
}

async fn get_cpu_stats(_call: Call, args: NodeGetCpuStatsArgs) -> Answer<NodeGetCpuStatsRet> {
    /// VIR_NODE_CPU_STATS_ALL_CPUS
    const ALL: i32 = -1;
    check_flags(args.flags, 0, "virHostCPUGetStats")?;
    /// Kernel, user, idle, iowait.
    const CPU_STATS: i32 = 4;
    if args.nparams == 0 {
        // Whoever asks how many there are hears it of any CPU.
        return Ok(NodeGetCpuStatsRet {
            params: Vec::new().into(),
            nparams: CPU_STATS,
        });
    }
    let text = fs::read_to_string("/proc/stat")
        .map_err(|e| RemoteError::from(Error::system("cannot open /proc/stat", &e)))?;
    let name = match args.cpu_num {
        ALL => "cpu ".to_owned(),
        number => format!("cpu{number} "),
    };
    let line = text.lines().find_map(|line| line.strip_prefix(&name));
    let line = line.ok_or_else(|| {
        RemoteError::from(Error::argument("Invalid cpuNum in virHostCPUGetStatsLinux"))
    })?;
    // proc_stat(5), in hundredths of a second.
    let ticks: Vec<u64> = line
        .split_whitespace()
        .map(|t| t.parse().unwrap_or(0))
        .collect();
    let sum = |fields: &[usize]| {
        let all = fields.iter().filter_map(|at| ticks.get(*at));
        all.sum::<u64>().saturating_mul(10_000_000)
    };
    let params = [
        ("kernel", sum(&[2, 5, 6])),
        ("user", sum(&[0, 1])),
        ("idle", sum(&[3])),
        ("iowait", sum(&[4])),
    ];
    let stat = |(field, value): (&str, u64)| NodeCpuStat {
        field: field.to_owned(),
        value,
    };
    let (params, nparams) = fitting(params.into_iter().map(stat).collect(), args.nparams);
    Ok(NodeGetCpuStatsRet {
        params: params.into(),
        nparams,
    })
}

async fn get_memory_stats(
    _call: Call,
    args: NodeGetMemoryStatsArgs,
) -> Answer<NodeGetMemoryStatsRet> {
    /// VIR_NODE_MEMORY_STATS_ALL_CELLS
    const ALL: i32 = -1;
    check_flags(args.flags, 0, "virHostMemGetStats")?;
    let names: &[(&str, &str)] = &[
        ("total", "MemTotal"),
        ("free", "MemFree"),
        ("buffers", "Buffers"),
        ("cached", "Cached"),
    ];
    let params: Vec<NodeMemoryStat> = if args.cell_num == ALL {
        let value = |(field, line): &(&str, &str)| NodeMemoryStat {
            field: (*field).to_owned(),
            value: node::meminfo(line).unwrap_or(0),
        };
        names.iter().map(value).collect()
    } else {
        let nodes = node::nodes();
        let last = nodes.iter().max().copied().unwrap_or(0);
        let cell = u32::try_from(args.cell_num)
            .ok()
            .filter(|cell| *cell <= last);
        let cell = cell.ok_or_else(|| {
            RemoteError::from(Error::argument(format!(
                "cellNum in virHostMemGetStats must be less than or equal to {last}"
            )))
        })?;
        let value = |(field, line): &(&str, &str)| NodeMemoryStat {
            field: (*field).to_owned(),
            value: node::node_memory(cell, line)
                .or_else(|| node::meminfo(line))
                .unwrap_or(0),
        };
        names[..2].iter().map(value).collect()
    };
    let (params, nparams) = fitting(params, args.nparams);
    Ok(NodeGetMemoryStatsRet {
        params: params.into(),
        nparams,
    })
}

/// The kernel's page merging: the parameter, its file, and whether it is a small number.
const SHARED: [(&str, &str, bool); 8] = [
    ("shm_pages_to_scan", "pages_to_scan", true),
    ("shm_sleep_millisecs", "sleep_millisecs", true),
    ("shm_pages_shared", "pages_shared", false),
    ("shm_pages_sharing", "pages_sharing", false),
    ("shm_pages_unshared", "pages_unshared", false),
    ("shm_pages_volatile", "pages_volatile", false),
    ("shm_full_scans", "full_scans", false),
    ("shm_merge_across_nodes", "merge_across_nodes", true),
];
const KSM: &str = "/sys/kernel/mm/ksm";

async fn get_memory_parameters(
    _call: Call,
    args: NodeGetMemoryParametersArgs,
) -> Answer<NodeGetMemoryParametersRet> {
    /// VIR_TYPED_PARAM_STRING_OKAY
    const STRINGS: u32 = 4;
    check_flags(args.flags, STRINGS, "virHostMemGetParameters")?;
    let read = |(name, file, small): (&str, &str, bool)| {
        let text = fs::read_to_string(Path::new(KSM).join(file)).ok()?;
        let value: u64 = text.trim().parse().ok()?;
        Some(if small {
            TypedParam::new(name, u32::try_from(value).unwrap_or(u32::MAX))
        } else {
            TypedParam::new(name, value)
        })
    };
    let (params, nparams) = fitting(SHARED.into_iter().filter_map(read).collect(), args.nparams);
    Ok(NodeGetMemoryParametersRet {
        params: params.into(),
        nparams,
    })
}

async fn set_memory_parameters(_call: Call, args: NodeSetMemoryParametersArgs) -> Answer<()> {
    check_flags(args.flags, 0, "qemuNodeSetMemoryParameters")?;
    let mut writes: Vec<(PathBuf, u32)> = Vec::new();
    for param in &args.params.0 {
        let settable = [0, 1, 7].map(|at: usize| SHARED[at]);
        let known = settable.into_iter().find(|(name, ..)| *name == param.field);
        let (_, file, _) =
            known.ok_or_else(|| invalid(format!("parameter '{}' not supported", param.field)))?;
        let TypedValue::UInt(value) = param.value else {
            return Err(invalid(format!(
                "invalid type for parameter '{}'",
                param.field
            )));
        };
        writes.push((Path::new(KSM).join(file), value));
    }
    for (path, value) in writes {
        fs::write(&path, value.to_string()).map_err(|error| {
            RemoteError::from(Error::system(
                format!("failed to set {}", path.display()),
                &error,
            ))
        })?;
    }
    Ok(())
}

/// Where the pages of a size are counted: on the whole host, or on a node.
fn page_folder(cell: i32, kib: u32) -> PathBuf {
    let file = format!("hugepages-{kib}kB");
    match cell {
        -1 => Path::new("/sys/kernel/mm/hugepages").join(file),
        cell => PathBuf::from(format!("/sys/devices/system/node/node{cell}/hugepages")).join(file),
    }
}

/// The cells that are meant, of those that there are.
fn cells(start: i32, number: u32) -> Answer<Vec<i32>> {
    let last = node::nodes().iter().max().copied().unwrap_or(0);
    let last = i32::try_from(last).unwrap_or(0);
    if start < -1 || start > last {
        let text = format!("start cell {start} out of range (0-{last})");
        return Err(Error::internal(text).into());
    }
    let all = start..=last;
    Ok(all.take(usize::try_from(number).unwrap_or(0)).collect())
}

async fn get_free_pages(_call: Call, args: NodeGetFreePagesArgs) -> Answer<NodeGetFreePagesRet> {
    check_flags(args.flags, 0, "qemuNodeGetFreePages")?;
    let mut counts = Vec::new();
    for cell in cells(args.start_cell, args.cell_count)? {
        for &kib in &args.pages.0 {
            counts.push(free_pages(cell, kib)?);
        }
    }
    counts.truncate(1024);
    Ok(NodeGetFreePagesRet {
        counts: counts.into(),
    })
}

fn free_pages(cell: i32, kib: u32) -> Answer<u64> {
    const PAGE_KIB: u64 = 4;
    if u64::from(kib) == PAGE_KIB {
        let free = u32::try_from(cell)
            .ok()
            .and_then(|cell| node::node_memory(cell, "MemFree"));
        return Ok(free.unwrap_or_else(|| node::free_memory() / 1024) / PAGE_KIB);
    }
    let text = fs::read_to_string(page_folder(cell, kib).join("free_hugepages")).ok();
    text.and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| {
            Error::failed(format!("page size {kib} is not available on node {cell}")).into()
        })
}

async fn alloc_pages(_call: Call, args: NodeAllocPagesArgs) -> Answer<NodeAllocPagesRet> {
    /// VIR_NODE_ALLOC_PAGES_SET
    const SET: u32 = 1;
    check_flags(args.flags, SET, "qemuNodeAllocPages")?;
    let mut done = 0;
    for cell in cells(args.start_cell, args.cell_count)? {
        for (&kib, &pages) in args.page_sizes.0.iter().zip(&args.page_counts.0) {
            if kib == 4 {
                return Err(Error::new(
                    ErrorCode::OPERATION_UNSUPPORTED,
                    "system pages pool can't be modified",
                )
                .into());
            }
            let file = page_folder(cell, kib).join("nr_hugepages");
            let now = fs::read_to_string(&file)
                .ok()
                .and_then(|t| t.trim().parse::<u64>().ok());
            let now = now.ok_or_else(|| {
                RemoteError::from(Error::failed(format!("page size {kib} is not available")))
            })?;
            let wanted = if args.flags & SET != 0 {
                pages
            } else {
                now.saturating_add(pages)
            };
            fs::write(&file, wanted.to_string()).map_err(|error| {
                RemoteError::from(Error::system(
                    format!("Unable to write to {}", file.display()),
                    &error,
                ))
            })?;
            // The kernel gives what it has.
            let got = fs::read_to_string(&file)
                .ok()
                .and_then(|t| t.trim().parse::<u64>().ok());
            if got != Some(wanted) {
                return Err(Error::failed(format!(
                    "Unable to allocate {wanted} pages. Allocated only {}",
                    got.unwrap_or(0)
                ))
                .into());
            }
            done += 1;
        }
    }
    Ok(NodeAllocPagesRet { ret: done })
}

async fn suspend(_call: Call, args: NodeSuspendForDurationArgs) -> Answer<()> {
    check_flags(args.flags, 0, "virNodeSuspend")?;
    let names = ["Suspend-to-RAM", "Suspend-to-Disk", "Hybrid-Suspend"];
    let target = usize::try_from(args.target)
        .ok()
        .and_then(|at| names.get(at));
    let target = target.ok_or_else(|| invalid("unknown suspend target"))?;
    // A host that runs guests is not put to sleep by this daemon, as where there is no way to.
    Err(Error::new(ErrorCode::ARGUMENT_UNSUPPORTED, *target).into())
}

async fn get_sev_info(_call: Call, _args: NodeGetSevInfoArgs) -> Answer<NodeGetSevInfoRet> {
    let text = "QEMU does not support SEV guest";
    Err(Error::new(ErrorCode::OPERATION_UNSUPPORTED, text).into())
}

/// virConnectCompareCPUFlags
mod compare_flags {
    /// An incompatible CPU is an error.
    pub const FAIL: u32 = 1;
    /// The document is held against the schema.
    pub const VALIDATE: u32 = 2;
}

fn compare(have: &CpuSet, xml: &str, flags: u32) -> Answer<i32> {
    use compare_flags::{FAIL, VALIDATE};
    check_flags(flags, FAIL | VALIDATE, "qemuConnectCompareCPU")?;
    let wanted = CpuSet::read(xml)?;
    let result = have.compare(&wanted);
    if result == Comparison::Incompatible && flags & FAIL != 0 {
        let missing = have.missing(&wanted);
        let text = if missing.is_empty() {
            "host CPU vendor does not match required CPU vendor".to_owned()
        } else {
            format!("Host CPU does not provide required features: {missing}")
        };
        return Err(Error::new(ErrorCode::CPU_INCOMPATIBLE, text).into());
    }
    Ok(result as i32)
}

async fn compare_cpu(_call: Call, args: ConnectCompareCpuArgs) -> Answer<ConnectCompareCpuRet> {
    Ok(ConnectCompareCpuRet {
        result: compare(&CpuSet::host(), &args.xml, args.flags)?,
    })
}

/// What guests of that kind can be shown.
async fn shown(call: &Call, wanted: capabilities::Wanted) -> Answer<CpuSet> {
    let vmm = call.state().vmm();
    // Whatever is not there is refused as for domain capabilities.
    let document = blocking(move || capabilities::domain(&vmm, &wanted)).await??;
    Ok(if document.contains("<domain>kvm</domain>") {
        CpuSet::host()
    } else {
        CpuSet::soft()
    })
}

async fn compare_hypervisor_cpu(
    call: Call,
    args: ConnectCompareHypervisorCpuArgs,
) -> Answer<ConnectCompareHypervisorCpuRet> {
    let wanted = capabilities::Wanted {
        emulator: args.emulator,
        arch: args.arch,
        machine: args.machine,
        virttype: args.virttype,
    };
    let have = shown(&call, wanted).await?;
    Ok(ConnectCompareHypervisorCpuRet {
        result: compare(&have, &args.xml_cpu, args.flags)?,
    })
}

const BASELINE: u32 = baseline_flags::EXPAND | baseline_flags::MIGRATABLE;

async fn baseline_cpu(_call: Call, args: ConnectBaselineCpuArgs) -> Answer<ConnectBaselineCpuRet> {
    check_flags(args.flags, BASELINE, "qemuConnectBaselineCPU")?;
    Ok(ConnectBaselineCpuRet {
        cpu: cpus::baseline(&args.xml_cpus.0, args.flags, None)?,
    })
}

async fn baseline_hypervisor_cpu(
    call: Call,
    args: ConnectBaselineHypervisorCpuArgs,
) -> Answer<ConnectBaselineHypervisorCpuRet> {
    check_flags(args.flags, BASELINE, "qemuConnectBaselineHypervisorCPU")?;
    let wanted = capabilities::Wanted {
        emulator: args.emulator,
        arch: args.arch,
        machine: args.machine,
        virttype: args.virttype,
    };
    let have = shown(&call, wanted).await?;
    Ok(ConnectBaselineHypervisorCpuRet {
        cpu: cpus::baseline(&args.xml_cpus.0, args.flags, Some(&have))?,
    })
}
