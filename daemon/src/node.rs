//! The host: CPUs, memory, name.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use hypervisor::host::{self, KvmVerdict};
use xml_schemas::domain::{HostFacts, MAX_VCPUS};

/// What virNodeGetInfo tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeInfo {
    /// Memory in KiB.
    pub memory_kib: u64,
    /// CPUs online.
    pub cpus: u32,
    /// Frequency in MHz, 0 if unknown.
    pub mhz: u32,
    /// NUMA nodes.
    pub nodes: u32,
    /// Sockets in a node.
    pub sockets: u32,
    /// Cores in a socket.
    pub cores: u32,
    /// Threads in a core.
    pub threads: u32,
}

/// A host CPU's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CpuPlace {
    /// The kernel's number.
    pub id: u32,
    /// Socket.
    pub socket: u32,
    /// Die.
    pub die: u32,
    /// Core.
    pub core: u32,
}

/// What definitions are held against.
pub fn facts(vmm: &Path) -> HostFacts {
    let report = host::report();
    HostFacts {
        emulator: vmm.display().to_string(),
        // KVM in software runs small guests, for whoever asks for it by name.
        kvm: match report.verdict() {
            KvmVerdict::Usable | KvmVerdict::SoftwareNested => Ok(()),
            KvmVerdict::Unusable => Err(report.to_string()),
        },
        memory_kib: meminfo("MemTotal").unwrap_or(u64::MAX),
        kvm_max_vcpus: MAX_VCPUS,
        soft_max_vcpus: MAX_VCPUS,
    }
}

/// A line of `/proc/meminfo`, in KiB.
pub fn meminfo(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Memory that is free, in bytes.
pub fn free_memory() -> u64 {
    meminfo("MemFree").unwrap_or(0).saturating_mul(1024)
}

/// The host's memory in KiB.
pub fn memory_kib() -> u64 {
    meminfo("MemTotal").unwrap_or(0)
}

/// Sizes of huge pages, in KiB.
pub fn huge_pages_kib() -> Vec<u64> {
    let entries = fs::read_dir("/sys/kernel/mm/hugepages")
        .into_iter()
        .flatten();
    let size = |entry: fs::DirEntry| -> Option<u64> {
        let name = entry.file_name();
        let name = name.to_str()?.strip_prefix("hugepages-")?;
        name.strip_suffix("kB")?.parse().ok()
    };
    let mut sizes: Vec<u64> = entries.filter_map(|entry| size(entry.ok()?)).collect();
    sizes.sort_unstable();
    sizes
}

/// How many huge pages of a size a node has.
pub fn huge_pages(node: u32, kib: u64) -> u64 {
    let on_node = format!("/sys/devices/system/node/node{node}/hugepages/hugepages-{kib}kB");
    let on_host = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB");
    let count = |folder: &str| -> Option<u64> {
        let text = fs::read_to_string(format!("{folder}/nr_hugepages")).ok()?;
        text.trim().parse().ok()
    };
    count(&on_node).or_else(|| count(&on_host)).unwrap_or(0)
}

/// Numbers in a list like `0-3,8`.
pub fn parse_list(list: &str) -> Vec<u32> {
    /// More CPUs than any kernel has; keeps a strange file from filling memory.
    const MOST: u32 = 1 << 16;
    let mut numbers = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) {
            numbers.extend(first..=last.min(MOST));
        }
    }
    numbers
}

fn sys(path: impl AsRef<Path>) -> Option<String> {
    let text = fs::read_to_string(Path::new("/sys/devices/system").join(path)).ok()?;
    Some(text.trim().to_owned())
}

fn list(path: &str) -> Vec<u32> {
    match sys(path).map(|text| parse_list(&text)) {
        Some(numbers) if !numbers.is_empty() => numbers,
        _ => vec![0],
    }
}

/// CPUs that are there.
pub fn cpus_present() -> Vec<u32> {
    list("cpu/present")
}

/// CPUs that run.
pub fn cpus_online() -> Vec<u32> {
    list("cpu/online")
}

/// NUMA nodes.
pub fn nodes() -> Vec<u32> {
    list("node/online")
}

/// CPUs that run in a NUMA node.
pub fn node_cpus(node: u32) -> Vec<u32> {
    sys(format!("node/node{node}/cpulist")).map_or_else(cpus_online, |text| parse_list(&text))
}

/// A value of a NUMA node's memory, in KiB.
pub fn node_memory(node: u32, name: &str) -> Option<u64> {
    let text = sys(format!("node/node{node}/meminfo"))?;
    let line = text
        .lines()
        .find(|line| line.contains(&format!(" {name}:")))?;
    line.split_whitespace().rev().nth(1)?.parse().ok()
}

/// Distances of a NUMA node to all nodes.
pub fn node_distances(node: u32) -> Vec<u32> {
    sys(format!("node/node{node}/distance"))
        .map(|text| {
            text.split_whitespace()
                .filter_map(|d| d.parse().ok())
                .collect()
        })
        .unwrap_or_default()
}

/// Where a CPU is.
pub fn place(id: u32) -> CpuPlace {
    let part = |name: &str| {
        sys(format!("cpu/cpu{id}/topology/{name}"))
            .and_then(|text| text.parse().ok())
            .unwrap_or(0)
    };
    CpuPlace {
        id,
        socket: part("physical_package_id"),
        die: part("die_id"),
        core: part("core_id"),
    }
}

/// The CPUs on the same core, as a list.
pub fn siblings(id: u32) -> Option<String> {
    sys(format!("cpu/cpu{id}/topology/thread_siblings_list"))
}

/// A field of the first CPU in `/proc/cpuinfo`.
pub fn cpuinfo(name: &str) -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

/// CPUs and memory.
pub fn info() -> NodeInfo {
    let places: BTreeSet<CpuPlace> = cpus_online().into_iter().map(place).collect();
    let cpus = places.len();
    let sockets: BTreeSet<u32> = places.iter().map(|p| p.socket).collect();
    let cores: BTreeSet<(u32, u32, u32)> =
        places.iter().map(|p| (p.socket, p.die, p.core)).collect();
    let nodes = nodes().len().max(1);
    let per = |all: usize, of: usize| u32::try_from((all / of.max(1)).max(1)).unwrap_or(1);
    let (mut node_count, mut socket_count) = (per(nodes, 1), per(sockets.len(), nodes));
    let mut core_count = per(cores.len(), sockets.len());
    let mut thread_count = per(cpus, cores.len());
    let product = node_count * socket_count * core_count * thread_count;
    if usize::try_from(product) != Ok(cpus) {
        // libvirt's way out where the host is lopsided.
        (node_count, socket_count, thread_count) = (1, 1, 1);
        core_count = per(cpus, 1);
    }
    let mhz = cpuinfo("cpu MHz").and_then(|text| text.parse::<f64>().ok());
    NodeInfo {
        memory_kib: memory_kib(),
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        // A float's cast saturates.
        mhz: mhz.map_or(0, |mhz| mhz as u32),
        nodes: node_count,
        sockets: socket_count,
        cores: core_count,
        threads: thread_count,
    }
}

/// The host's name.
pub fn hostname() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_else(|_| "localhost".to_owned())
}

/// The host's uuid: the mainboard's, or one that was made once and is kept in `folder`.
pub fn host_uuid(folder: &Path) -> Option<String> {
    let parse = |path: PathBuf| -> Option<uuid::Uuid> {
        let uuid: uuid::Uuid = fs::read_to_string(path).ok()?.trim().parse().ok()?;
        (!uuid.is_nil() && !uuid.is_max()).then_some(uuid)
    };
    let file = folder.join("host-uuid");
    let known = parse("/sys/class/dmi/id/product_uuid".into()).or_else(|| parse(file.clone()));
    let uuid = known.unwrap_or_else(|| {
        let made = uuid::Uuid::new_v4();
        let text = format!("{made}\n");
        let durability = crate::files::Durability::Disk;
        if let Err(error) = crate::files::write_atomically(&file, text.as_bytes(), durability) {
            log::warn!("cannot keep the host's uuid: {error}");
        }
        made
    });
    Some(uuid.to_string())
}

/// A map with one bit a CPU, as many bytes as the highest number needs.
pub fn cpu_map(cpus: &[u32]) -> Vec<u8> {
    let highest = cpus.iter().max().copied().unwrap_or(0);
    let mut map = vec![0u8; highest as usize / 8 + 1];
    for &cpu in cpus {
        map[cpu as usize / 8] |= 1 << (cpu % 8);
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_maps() {
        assert_eq!(parse_list("0-2,5\n"), [0, 1, 2, 5]);
        assert!(parse_list("x").is_empty());
        assert_eq!(cpu_map(&[0, 9]), [1, 2]);
    }

    #[test]
    fn this_host_has_what_hosts_have() {
        let info = info();
        assert!(info.memory_kib > 0);
        assert_eq!(
            info.cpus,
            info.nodes * info.sockets * info.cores * info.threads
        );
        assert!(!hostname().is_empty());
    }
}
