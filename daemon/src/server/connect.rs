//! Connections and the host.

use rpc::args::*;
use rpc::error::{ErrorCode, ErrorDomain, RemoteError};
use rpc::procs;
use rpc::server::Router;
use rpc::xdr::{CharArray, CharList};

use super::{Answer, Call, Daemon, count, reference};
use crate::capabilities::{self, Wanted};
use crate::drivers::domain::blocking;
use crate::error::{Error, check_flags};
use crate::node;

/// The libvirt whose protocol and behaviour this is: 9.0.0, as virGetVersion counts.
const LIBVIRT_VERSION: u64 = 9_000_000;

/// Features of connections (virDrvFeature) that are there.
mod feature {
    /// Its daemon moves a domain to another by itself.
    pub const MIGRATION_P2P: i32 = 4;
    /// Version 3 of the migration protocol.
    pub const MIGRATION_V3: i32 = 6;
    /// A domain can't be changed while it is moved.
    pub const MIGRATE_CHANGE_PROTECTION: i32 = 7;
    /// A domain that is off can be moved.
    pub const MIGRATION_OFFLINE: i32 = 12;
    /// Migration's extensible parameters.
    pub const MIGRATION_PARAMS: i32 = 13;
    /// Typed parameters may be strings.
    pub const TYPED_PARAM_STRING: i32 = 9;
    /// Keepalive messages are answered.
    pub const KEEPALIVE: i32 = 10;
    /// VIR_DOMAIN_XML_MIGRATABLE is understood.
    pub const XML_MIGRATABLE: i32 = 11;
    /// Events come with the id of their callback.
    pub const EVENT_CALLBACK: i32 = 14;
    /// Close callbacks can be registered.
    pub const CLOSE_CALLBACK: i32 = 15;
    /// virNetworkUpdate's command comes before its section: clients that do not see this bit
    /// send them the wrong way round, as libvirt's own daemons took them for long.
    pub const NETWORK_UPDATE_ORDER: i32 = 16;
}

/// The functions for connections and the host.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::CONNECT_OPEN, open)
        .on(procs::CONNECT_GET_TYPE, get_type)
        .on(procs::CONNECT_GET_VERSION, get_version)
        .on(procs::CONNECT_GET_LIB_VERSION, get_lib_version)
        .on(procs::CONNECT_GET_HOSTNAME, get_hostname)
        .on(procs::CONNECT_GET_URI, get_uri)
        .on(procs::CONNECT_SUPPORTS_FEATURE, supports_feature)
        .on(procs::CONNECT_IS_SECURE, is_secure)
        .on(procs::CONNECT_GET_MAX_VCPUS, get_max_vcpus)
        .on(procs::CONNECT_GET_CAPABILITIES, get_capabilities)
        .on(
            procs::CONNECT_GET_DOMAIN_CAPABILITIES,
            get_domain_capabilities,
        )
        .on(procs::CONNECT_GET_CPU_MODEL_NAMES, get_cpu_model_names)
        .on(procs::CONNECT_REGISTER_CLOSE_CALLBACK, close_callback)
        .on(procs::CONNECT_UNREGISTER_CLOSE_CALLBACK, close_callback)
        .on(procs::CONNECT_LIST_ALL_DOMAINS, list_all_domains)
        .on(procs::CONNECT_LIST_DOMAINS, list_domains)
        .on(procs::CONNECT_NUM_OF_DOMAINS, num_of_domains)
        .on(procs::CONNECT_LIST_DEFINED_DOMAINS, list_defined_domains)
        .on(
            procs::CONNECT_NUM_OF_DEFINED_DOMAINS,
            num_of_defined_domains,
        )
        .on(procs::NODE_GET_INFO, node_info)
        .on(procs::NODE_GET_FREE_MEMORY, node_free_memory)
        .on(procs::NODE_GET_CELLS_FREE_MEMORY, node_cells_free_memory)
        .on(procs::NODE_GET_CPU_MAP, node_cpu_map)
        .on(procs::NODE_GET_SECURITY_MODEL, node_security_model)
}

/// Whether a URI means this daemon: one of a QEMU driver or ours, of the host or of a user.
fn is_ours(uri: &str) -> bool {
    let without_query = uri.split('?').next().unwrap_or_default();
    let Some((scheme, rest)) = without_query.split_once(':') else {
        return false;
    };
    let driver = scheme.split('+').next().unwrap_or_default();
    let path = match rest.strip_prefix("//") {
        Some(with_host) => with_host.find('/').map_or("", |at| &with_host[at..]),
        None => rest,
    };
    matches!(driver, "qemu" | "vireo") && matches!(path, "" | "/" | "/system" | "/session")
}

async fn open(call: Call, args: ConnectOpenArgs) -> Answer<()> {
    /// VIR_CONNECT_RO and VIR_CONNECT_NO_ALIASES.
    const KNOWN: u32 = 3;
    check_flags(args.flags, KNOWN, "virConnectOpenAuth")?;
    let daemon = call.state();
    let default = if daemon.domains.roots.session {
        "qemu:///session"
    } else {
        "qemu:///system"
    };
    let uri = match args.name {
        Some(name) if name.is_empty() => default.to_owned(),
        Some(name) if is_ours(&name) => name,
        Some(name) => {
            return Err(RemoteError::new(
                ErrorCode::NO_CONNECT,
                ErrorDomain::NONE,
                name,
            ));
        }
        None => default.to_owned(),
    };
    daemon
        .clients()
        .entry(call.connection().id())
        .or_default()
        .uri = uri;
    Ok(())
}

async fn get_uri(call: Call, (): ()) -> Answer<ConnectGetUriRet> {
    let clients = call.state().clients();
    let uri = clients
        .get(&call.connection().id())
        .map(|client| client.uri.clone());
    Ok(ConnectGetUriRet {
        uri: uri.unwrap_or_default(),
    })
}

/// Clients choose their ways by this name; those for QEMU are the ones that fit.
async fn get_type(_call: Call, (): ()) -> Answer<ConnectGetTypeRet> {
    Ok(ConnectGetTypeRet {
        kind: "QEMU".to_owned(),
    })
}

/// The QEMU whose machines and devices clients are to expect: they choose by it what a new guest gets (virt-install's
/// qcow2 images, Q35, USB 3). What serves them says its own version by `--version`.
const QEMU_VERSION: u64 = 7_002_000;

async fn get_version(_call: Call, (): ()) -> Answer<ConnectGetVersionRet> {
    Ok(ConnectGetVersionRet {
        hv_ver: QEMU_VERSION,
    })
}

async fn get_lib_version(_call: Call, (): ()) -> Answer<ConnectGetLibVersionRet> {
    Ok(ConnectGetLibVersionRet {
        lib_ver: LIBVIRT_VERSION,
    })
}

async fn get_hostname(_call: Call, (): ()) -> Answer<ConnectGetHostnameRet> {
    Ok(ConnectGetHostnameRet {
        hostname: node::hostname(),
    })
}

async fn supports_feature(
    _call: Call,
    args: ConnectSupportsFeatureArgs,
) -> Answer<ConnectSupportsFeatureRet> {
    use feature::*;
    let supported = matches!(
        args.feature,
        TYPED_PARAM_STRING
            | KEEPALIVE
            | XML_MIGRATABLE
            | EVENT_CALLBACK
            | CLOSE_CALLBACK
            | NETWORK_UPDATE_ORDER
            | MIGRATION_PARAMS
            | MIGRATION_V3
            | MIGRATION_P2P
            | MIGRATE_CHANGE_PROTECTION
            | MIGRATION_OFFLINE
    );
    Ok(ConnectSupportsFeatureRet {
        supported: i32::from(supported),
    })
}

async fn is_secure(call: Call, (): ()) -> Answer<ConnectIsSecureRet> {
    let secure = i32::from(call.connection().is_secure());
    Ok(ConnectIsSecureRet { secure })
}

async fn get_max_vcpus(call: Call, args: ConnectGetMaxVcpusArgs) -> Answer<ConnectGetMaxVcpusRet> {
    let host = call.state().domains.host();
    let max = match args.kind.as_deref() {
        None | Some("qemu") => host.soft_max_vcpus,
        Some("kvm") => host.kvm_max_vcpus,
        Some(other) => {
            let text = format!("unknown type '{other}'");
            return Err(Error::new(ErrorCode::INVALID_ARG, text).into());
        }
    };
    Ok(ConnectGetMaxVcpusRet {
        max_vcpus: i32::try_from(max).unwrap_or(i32::MAX),
    })
}

async fn get_capabilities(call: Call, (): ()) -> Answer<ConnectGetCapabilitiesRet> {
    let (vmm, data) = (call.state().vmm(), call.state().domains.roots.data.clone());
    let capabilities = blocking(move || capabilities::host(&vmm, &data)).await?;
    Ok(ConnectGetCapabilitiesRet { capabilities })
}

async fn get_domain_capabilities(
    call: Call,
    args: ConnectGetDomainCapabilitiesArgs,
) -> Answer<ConnectGetDomainCapabilitiesRet> {
    check_flags(args.flags, 0, "qemuConnectGetDomainCapabilities")?;
    let vmm = call.state().vmm();
    let wanted = Wanted {
        emulator: args.emulatorbin,
        arch: args.arch,
        machine: args.machine,
        virttype: args.virttype,
    };
    let capabilities = blocking(move || capabilities::domain(&vmm, &wanted)).await??;
    Ok(ConnectGetDomainCapabilitiesRet { capabilities })
}

async fn get_cpu_model_names(
    _call: Call,
    args: ConnectGetCpuModelNamesArgs,
) -> Answer<ConnectGetCpuModelNamesRet> {
    check_flags(args.flags, 0, "qemuConnectGetCPUModelNames")?;
    let names: Vec<String> = match args.arch.as_str() {
        "x86_64" | "i686" => hypervisor::cpu::models::names()
            .map(str::to_owned)
            .collect(),
        other => {
            let text = format!("cannot find architecture {other}");
            return Err(Error::new(ErrorCode::INVALID_ARG, text).into());
        }
    };
    let ret = count(names.len());
    let names = if args.need_results != 0 {
        names
    } else {
        Vec::new()
    };
    Ok(ConnectGetCpuModelNamesRet {
        models: names.into(),
        ret,
    })
}

/// The client only wants to hear of the connection's end, which it sees for itself here.
async fn close_callback(_call: Call, (): ()) -> Answer<()> {
    Ok(())
}

async fn list_all_domains(
    call: Call,
    args: ConnectListAllDomainsArgs,
) -> Answer<ConnectListAllDomainsRet> {
    let found = call.state().domains.list_names(args.flags)?;
    let ret = u32::try_from(found.len()).unwrap_or(u32::MAX);
    let domains = if args.need_results != 0 {
        found.into_iter().map(reference).collect()
    } else {
        Vec::new().into()
    };
    Ok(ConnectListAllDomainsRet { domains, ret })
}

/// VIR_CONNECT_LIST_DOMAINS_ACTIVE
const ACTIVE: u32 = 1;
/// VIR_CONNECT_LIST_DOMAINS_INACTIVE
const INACTIVE: u32 = 2;

/// How many of a list a client has room for.
fn room(most: i32) -> usize {
    usize::try_from(most).unwrap_or(0)
}

async fn list_domains(call: Call, args: ConnectListDomainsArgs) -> Answer<ConnectListDomainsRet> {
    let found = call.state().domains.list(ACTIVE)?;
    let ids = found.iter().map(|domain| domain.name().id);
    Ok(ConnectListDomainsRet {
        ids: ids.take(room(args.maxids)).collect(),
    })
}

async fn num_of_domains(call: Call, (): ()) -> Answer<ConnectNumOfDomainsRet> {
    Ok(ConnectNumOfDomainsRet {
        num: count(call.state().domains.list(ACTIVE)?.len()),
    })
}

async fn list_defined_domains(
    call: Call,
    args: ConnectListDefinedDomainsArgs,
) -> Answer<ConnectListDefinedDomainsRet> {
    let found = call.state().domains.list(INACTIVE)?;
    let names = found.iter().map(|domain| domain.name().name);
    Ok(ConnectListDefinedDomainsRet {
        names: names.take(room(args.maxnames)).collect(),
    })
}

async fn num_of_defined_domains(call: Call, (): ()) -> Answer<ConnectNumOfDefinedDomainsRet> {
    Ok(ConnectNumOfDefinedDomainsRet {
        num: count(call.state().domains.list(INACTIVE)?.len()),
    })
}

async fn node_info(_call: Call, (): ()) -> Answer<NodeGetInfoRet> {
    let info = blocking(node::info).await?;
    let number = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
    Ok(NodeGetInfoRet {
        model: CharArray::from_text("x86_64"),
        memory: info.memory_kib,
        cpus: number(info.cpus),
        mhz: number(info.mhz),
        nodes: number(info.nodes),
        sockets: number(info.sockets),
        cores: number(info.cores),
        threads: number(info.threads),
    })
}

async fn node_free_memory(_call: Call, (): ()) -> Answer<NodeGetFreeMemoryRet> {
    Ok(NodeGetFreeMemoryRet {
        free_mem: node::free_memory(),
    })
}

async fn node_cells_free_memory(
    _call: Call,
    args: NodeGetCellsFreeMemoryArgs,
) -> Answer<NodeGetCellsFreeMemoryRet> {
    let nodes = node::nodes();
    let last = nodes.iter().max().copied().unwrap_or(0);
    let start = u32::try_from(args.start_cell)
        .ok()
        .filter(|&start| start <= last);
    let Some(start) = start else {
        let text = format!("start cell {} out of range (0-{last})", args.start_cell);
        return Err(Error::internal(text).into());
    };
    let free = |&node: &u32| {
        node::node_memory(node, "MemFree").map_or_else(node::free_memory, |kib| kib * 1024)
    };
    let wanted = nodes.iter().filter(|&&node| node >= start);
    Ok(NodeGetCellsFreeMemoryRet {
        cells: wanted.take(room(args.maxcells)).map(free).collect(),
    })
}

async fn node_cpu_map(_call: Call, args: NodeGetCpuMapArgs) -> Answer<NodeGetCpuMapRet> {
    check_flags(args.flags, 0, "virHostCPUGetMap")?;
    let (present, online) = (node::cpus_present(), node::cpus_online());
    let map = if args.need_map != 0 {
        node::cpu_map(&online)
    } else {
        Vec::new()
    };
    Ok(NodeGetCpuMapRet {
        cpumap: map.into(),
        online: if args.need_online != 0 {
            u32::try_from(online.len()).unwrap_or(u32::MAX)
        } else {
            0
        },
        ret: count(present.len()),
    })
}

async fn node_security_model(_call: Call, (): ()) -> Answer<NodeGetSecurityModelRet> {
    Ok(NodeGetSecurityModelRet {
        model: CharList::from_text("none"),
        doi: CharList::from_text("0"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_of_this_daemon() {
        for uri in [
            "qemu:///system",
            "qemu:///session",
            "vireo:///system",
            "qemu+unix:///system?socket=/x",
            "vireo:",
            "qemu://host/system",
        ] {
            assert!(is_ours(uri), "{uri}");
        }
        for uri in ["xen:///system", "test:///default", "qemu:///other", "x"] {
            assert!(!is_ours(uri), "{uri}");
        }
    }
}
