//! Networks and their ports.

use std::sync::Arc;

use rpc::args::*;
use rpc::procs;
use rpc::server::Router;
use rpc::types;
use uuid::Uuid;
use xml_schemas::network::port::Port;

use super::devices::{STRINGS, fitting, rate_params, rates};
use super::{Answer, Call, Daemon, count};
use crate::drivers::domain::blocking;
use crate::drivers::domain::metadata::Kind;
use crate::drivers::network::Driver;
use crate::drivers::network::object::Network;
use crate::error::{Error, ErrorCode, ErrorDomain, check_flags};

/// The functions for networks.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::CONNECT_NUM_OF_NETWORKS, num_of_networks)
        .on(procs::CONNECT_LIST_NETWORKS, list_networks)
        .on(procs::CONNECT_NUM_OF_DEFINED_NETWORKS, num_of_defined)
        .on(procs::CONNECT_LIST_DEFINED_NETWORKS, list_defined)
        .on(procs::CONNECT_LIST_ALL_NETWORKS, list_all)
        .on(procs::NETWORK_LOOKUP_BY_NAME, lookup_by_name)
        .on(procs::NETWORK_LOOKUP_BY_UUID, lookup_by_uuid)
        .on(procs::NETWORK_CREATE_XML, create_xml)
        .on(procs::NETWORK_CREATE_XML_FLAGS, create_xml_flags)
        .on(procs::NETWORK_DEFINE_XML, define_xml)
        .on(procs::NETWORK_DEFINE_XML_FLAGS, define_xml_flags)
        .on(procs::NETWORK_UNDEFINE, undefine)
        .on(procs::NETWORK_UPDATE, update)
        .on(procs::NETWORK_CREATE, create)
        .on(procs::NETWORK_DESTROY, destroy)
        .on(procs::NETWORK_GET_XML_DESC, get_xml_desc)
        .on(procs::NETWORK_GET_BRIDGE_NAME, get_bridge_name)
        .on(procs::NETWORK_GET_AUTOSTART, get_autostart)
        .on(procs::NETWORK_SET_AUTOSTART, set_autostart)
        .on(procs::NETWORK_IS_ACTIVE, is_active)
        .on(procs::NETWORK_IS_PERSISTENT, is_persistent)
        .on(procs::NETWORK_GET_DHCP_LEASES, get_dhcp_leases)
        .on(procs::NETWORK_SET_METADATA, set_metadata)
        .on(procs::NETWORK_GET_METADATA, get_metadata)
        .on(procs::NETWORK_LIST_ALL_PORTS, list_all_ports)
        .on(procs::NETWORK_PORT_LOOKUP_BY_UUID, port_lookup)
        .on(procs::NETWORK_PORT_CREATE_XML, port_create)
        .on(procs::NETWORK_PORT_GET_XML_DESC, port_xml)
        .on(procs::NETWORK_PORT_GET_PARAMETERS, port_parameters)
        .on(procs::NETWORK_PORT_SET_PARAMETERS, set_port_parameters)
        .on(procs::NETWORK_PORT_DELETE, port_delete)
}

/// Filters of lists (virConnectListAllNetworksFlags).
mod filters {
    pub const INACTIVE: u32 = 1;
    pub const ACTIVE: u32 = 2;
    pub const PERSISTENT: u32 = 4;
    pub const TRANSIENT: u32 = 8;
    pub const AUTOSTART: u32 = 16;
    pub const NO_AUTOSTART: u32 = 32;
}

fn error(code: ErrorCode, detail: impl Into<String>) -> Error {
    Error::of(ErrorDomain::NETWORK, code, detail)
}

/// A network on the wire.
fn reference(network: &Network) -> types::Network {
    types::Network {
        name: network.name.clone(),
        uuid: network.uuid.into_bytes(),
    }
}

fn driver(call: &Call) -> Arc<Driver> {
    Arc::clone(&call.state().domains.networks)
}

/// The network a client means.
fn find(call: &Call, net: &types::Network) -> Answer<Arc<Network>> {
    let uuid = Uuid::from_bytes(net.uuid);
    let found = driver(call).registry.by_uuid(uuid);
    Ok(found.map_err(|_| {
        error(
            ErrorCode::NO_NETWORK,
            format!("no network with matching uuid '{uuid}' ({})", net.name),
        )
    })?)
}

fn names(call: &Call, active: bool, most: i32) -> Vec<String> {
    let most = usize::try_from(most).unwrap_or(0);
    let all = driver(call).registry.all().into_iter();
    all.filter(|n| n.lock().live.is_some() == active)
        .map(|n| n.name.clone())
        .take(most)
        .collect()
}

async fn num_of_networks(call: Call, (): ()) -> Answer<ConnectNumOfNetworksRet> {
    let num = count(names(&call, true, i32::MAX).len());
    Ok(ConnectNumOfNetworksRet { num })
}

async fn list_networks(
    call: Call,
    args: ConnectListNetworksArgs,
) -> Answer<ConnectListNetworksRet> {
    let names = names(&call, true, args.maxnames).into();
    Ok(ConnectListNetworksRet { names })
}

async fn num_of_defined(call: Call, (): ()) -> Answer<ConnectNumOfDefinedNetworksRet> {
    let num = count(names(&call, false, i32::MAX).len());
    Ok(ConnectNumOfDefinedNetworksRet { num })
}

async fn list_defined(
    call: Call,
    args: ConnectListDefinedNetworksArgs,
) -> Answer<ConnectListDefinedNetworksRet> {
    let names = names(&call, false, args.maxnames).into();
    Ok(ConnectListDefinedNetworksRet { names })
}

async fn list_all(
    call: Call,
    args: ConnectListAllNetworksArgs,
) -> Answer<ConnectListAllNetworksRet> {
    use filters::*;
    check_flags(
        args.flags,
        INACTIVE | ACTIVE | PERSISTENT | TRANSIENT | AUTOSTART | NO_AUTOSTART,
        "networkConnectListAllNetworks",
    )?;
    let passes = |yes: u32, no: u32, holds: bool| {
        args.flags & (yes | no) == 0 || args.flags & if holds { yes } else { no } != 0
    };
    let all = driver(&call).registry.all().into_iter();
    let found: Vec<types::Network> = all
        .filter(|network| {
            let inner = network.lock();
            passes(ACTIVE, INACTIVE, inner.live.is_some())
                && passes(PERSISTENT, TRANSIENT, inner.persistent.is_some())
                && passes(AUTOSTART, NO_AUTOSTART, inner.autostart)
        })
        .map(|network| reference(&network))
        .collect();
    let ret = u32::try_from(found.len()).unwrap_or(u32::MAX);
    let nets = if args.need_results != 0 {
        found
    } else {
        Vec::new()
    };
    Ok(ConnectListAllNetworksRet {
        nets: nets.into(),
        ret,
    })
}

async fn lookup_by_name(
    call: Call,
    args: NetworkLookupByNameArgs,
) -> Answer<NetworkLookupByNameRet> {
    let network = driver(&call).registry.by_name(&args.name)?;
    Ok(NetworkLookupByNameRet {
        net: reference(&network),
    })
}

async fn lookup_by_uuid(
    call: Call,
    args: NetworkLookupByUuidArgs,
) -> Answer<NetworkLookupByUuidRet> {
    let network = driver(&call)
        .registry
        .by_uuid(Uuid::from_bytes(args.uuid))?;
    Ok(NetworkLookupByUuidRet {
        net: reference(&network),
    })
}

/// Starting takes as long as the programs do that it needs: it goes on if its client leaves.
async fn started<T: Send + 'static>(
    work: impl Future<Output = crate::error::Result<T>> + Send + 'static,
) -> Answer<T> {
    match tokio::spawn(work).await {
        Ok(done) => Ok(done?),
        Err(failed) => Err(error(
            ErrorCode::INTERNAL_ERROR,
            format!("a call failed inside: {failed}"),
        )
        .into()),
    }
}

async fn create_any(call: Call, xml: String, flags: u32) -> Answer<types::Network> {
    let (driver, domains) = (driver(&call), Arc::clone(&call.state().domains));
    let network = started(async move {
        let network = driver.create(&xml, flags).await?;
        domains.plug_again(&network.name).await;
        Ok(network)
    })
    .await?;
    Ok(reference(&network))
}

async fn create_xml(call: Call, args: NetworkCreateXmlArgs) -> Answer<NetworkCreateXmlRet> {
    let net = create_any(call, args.xml, 0).await?;
    Ok(NetworkCreateXmlRet { net })
}

async fn create_xml_flags(
    call: Call,
    args: NetworkCreateXmlFlagsArgs,
) -> Answer<NetworkCreateXmlFlagsRet> {
    let net = create_any(call, args.xml, args.flags).await?;
    Ok(NetworkCreateXmlFlagsRet { net })
}

async fn define_any(call: Call, xml: String, flags: u32) -> Answer<types::Network> {
    let driver = driver(&call);
    let network = started(async move { driver.define(&xml, flags).await }).await?;
    Ok(reference(&network))
}

async fn define_xml(call: Call, args: NetworkDefineXmlArgs) -> Answer<NetworkDefineXmlRet> {
    let net = define_any(call, args.xml, 0).await?;
    Ok(NetworkDefineXmlRet { net })
}

async fn define_xml_flags(
    call: Call,
    args: NetworkDefineXmlFlagsArgs,
) -> Answer<NetworkDefineXmlFlagsRet> {
    let net = define_any(call, args.xml, args.flags).await?;
    Ok(NetworkDefineXmlFlagsRet { net })
}

async fn undefine(call: Call, args: NetworkUndefineArgs) -> Answer<()> {
    let (driver, network) = (driver(&call), find(&call, &args.net)?);
    started(async move { driver.undefine(&network).await }).await
}

async fn update(call: Call, args: NetworkUpdateArgs) -> Answer<()> {
    let (driver, network) = (driver(&call), find(&call, &args.net)?);
    started(async move {
        driver
            .update(
                &network,
                args.command,
                args.section,
                args.parent_index,
                args.xml,
                args.flags,
            )
            .await
    })
    .await
}

async fn create(call: Call, args: NetworkCreateArgs) -> Answer<()> {
    let (driver, network) = (driver(&call), find(&call, &args.net)?);
    let domains = Arc::clone(&call.state().domains);
    started(async move {
        driver.start(&network).await?;
        domains.plug_again(&network.name).await;
        Ok(())
    })
    .await
}

async fn destroy(call: Call, args: NetworkDestroyArgs) -> Answer<()> {
    let (driver, network) = (driver(&call), find(&call, &args.net)?);
    started(async move { driver.stop(&network).await }).await
}

async fn get_xml_desc(call: Call, args: NetworkGetXmlDescArgs) -> Answer<NetworkGetXmlDescRet> {
    let (driver, network) = (driver(&call), find(&call, &args.net)?);
    let xml = blocking(move || driver.xml(&network, args.flags)).await??;
    Ok(NetworkGetXmlDescRet { xml })
}

async fn get_bridge_name(
    call: Call,
    args: NetworkGetBridgeNameArgs,
) -> Answer<NetworkGetBridgeNameRet> {
    let network = find(&call, &args.net)?;
    let bridge = network.lock().definition().and_then(|d| d.bridge.clone());
    let name = bridge.ok_or_else(|| {
        error(
            ErrorCode::INTERNAL_ERROR,
            format!("network '{}' does not have a bridge name.", network.name),
        )
    })?;
    Ok(NetworkGetBridgeNameRet { name })
}

async fn get_autostart(
    call: Call,
    args: NetworkGetAutostartArgs,
) -> Answer<NetworkGetAutostartRet> {
    let autostart = i32::from(find(&call, &args.net)?.lock().autostart);
    Ok(NetworkGetAutostartRet { autostart })
}

async fn set_autostart(call: Call, args: NetworkSetAutostartArgs) -> Answer<()> {
    let (driver, network) = (driver(&call), find(&call, &args.net)?);
    Ok(driver.set_autostart(&network, args.autostart != 0).await?)
}

async fn is_active(call: Call, args: NetworkIsActiveArgs) -> Answer<NetworkIsActiveRet> {
    let active = i32::from(find(&call, &args.net)?.lock().live.is_some());
    Ok(NetworkIsActiveRet { active })
}

async fn is_persistent(
    call: Call,
    args: NetworkIsPersistentArgs,
) -> Answer<NetworkIsPersistentRet> {
    let persistent = i32::from(find(&call, &args.net)?.lock().persistent.is_some());
    Ok(NetworkIsPersistentRet { persistent })
}

async fn get_dhcp_leases(
    call: Call,
    args: NetworkGetDhcpLeasesArgs,
) -> Answer<NetworkGetDhcpLeasesRet> {
    check_flags(args.flags, 0, "networkGetDHCPLeases")?;
    let (driver, network) = (driver(&call), find(&call, &args.net)?);
    let mac = args.mac.as_deref();
    if let Some(mac) = mac.filter(|mac| !xml_schemas::domain::device::is_mac(mac)) {
        return Err(error(ErrorCode::INVALID_MAC, mac).into());
    }
    let definition = network.lock().definition().cloned();
    let iface = definition
        .as_ref()
        .and_then(|d| d.bridge.clone())
        .unwrap_or_default();
    let prefix = |address: std::net::IpAddr| {
        let subnets = definition
            .iter()
            .flat_map(|d| &d.ips)
            .filter_map(|ip| ip.subnet());
        let found = subnets.into_iter().find(|subnet| subnet.contains(address));
        found.map_or(0, |subnet| u32::from(subnet.prefix))
    };
    let target = Arc::clone(&network);
    let found = blocking(move || driver.leases(&target)).await??;
    let wanted = |mac: &Option<String>| match &args.mac {
        None => true,
        Some(wanted) => mac
            .as_ref()
            .is_some_and(|mac| mac.eq_ignore_ascii_case(wanted)),
    };
    let leases: Vec<NetworkDhcpLease> = found
        .into_iter()
        .filter(|lease| wanted(&lease.mac))
        .map(|lease| NetworkDhcpLease {
            iface: iface.clone(),
            expirytime: lease.expiry,
            // virIPAddrType
            kind: i32::from(lease.address.is_ipv6()),
            mac: lease.mac,
            iaid: lease.iaid,
            ipaddr: lease.address.to_string(),
            prefix: prefix(lease.address),
            hostname: lease.hostname,
            clientid: lease.client_id,
        })
        .collect();
    let ret = u32::try_from(leases.len()).unwrap_or(u32::MAX);
    let leases = if args.need_results != 0 {
        leases
    } else {
        Vec::new()
    };
    Ok(NetworkGetDhcpLeasesRet {
        leases: leases.into(),
        ret,
    })
}

async fn set_metadata(call: Call, args: NetworkSetMetadataArgs) -> Answer<()> {
    let (driver, network) = (driver(&call), find(&call, &args.net)?);
    let kind = Kind::from_wire(args.kind, args.uri)?;
    Ok(driver
        .set_metadata(&network, kind, args.metadata, args.key, args.flags)
        .await?)
}

async fn get_metadata(call: Call, args: NetworkGetMetadataArgs) -> Answer<NetworkGetMetadataRet> {
    let network = find(&call, &args.net)?;
    let kind = Kind::from_wire(args.kind, args.uri)?;
    let metadata = driver(&call).metadata(&network, &kind, args.flags)?;
    Ok(NetworkGetMetadataRet { metadata })
}

/// A port on the wire.
fn port_reference(network: &Network, uuid: Uuid) -> types::NetworkPort {
    types::NetworkPort {
        net: reference(network),
        uuid: uuid.into_bytes(),
    }
}

async fn list_all_ports(
    call: Call,
    args: NetworkListAllPortsArgs,
) -> Answer<NetworkListAllPortsRet> {
    check_flags(args.flags, 0, "networkListAllPorts")?;
    let (driver, network) = (driver(&call), find(&call, &args.network)?);
    let target = Arc::clone(&network);
    let found = blocking(move || driver.ports(&target)).await??;
    let ret = u32::try_from(found.len()).unwrap_or(u32::MAX);
    let ports = if args.need_results != 0 {
        found
            .iter()
            .map(|port| port_reference(&network, port.uuid))
            .collect()
    } else {
        Vec::new().into()
    };
    Ok(NetworkListAllPortsRet { ports, ret })
}

async fn port_lookup(
    call: Call,
    args: NetworkPortLookupByUuidArgs,
) -> Answer<NetworkPortLookupByUuidRet> {
    let (driver, network) = (driver(&call), find(&call, &args.network)?);
    let uuid = Uuid::from_bytes(args.uuid);
    let target = Arc::clone(&network);
    blocking(move || driver.port(&target, uuid)).await??;
    Ok(NetworkPortLookupByUuidRet {
        port: port_reference(&network, uuid),
    })
}

async fn port_create(
    call: Call,
    args: NetworkPortCreateXmlArgs,
) -> Answer<NetworkPortCreateXmlRet> {
    /// VIR_NETWORK_PORT_CREATE_VALIDATE: what is unknown has no effect either way.
    const VALIDATE: u32 = 2;
    check_flags(args.flags, VALIDATE, "networkPortCreateXML")?;
    let (driver, network) = (driver(&call), find(&call, &args.network)?);
    let port = Port::parse(&args.xml).map_err(Error::from)?;
    if port.plug.is_some() {
        return Err(error(
            ErrorCode::INVALID_ARG,
            "Port reclaim not requested but plug type is not none",
        )
        .into());
    }
    let target = Arc::clone(&network);
    let (_, port) = blocking(move || driver.make_port(&target, port)).await??;
    Ok(NetworkPortCreateXmlRet {
        port: port_reference(&network, port.uuid),
    })
}

async fn port_xml(call: Call, args: NetworkPortGetXmlDescArgs) -> Answer<NetworkPortGetXmlDescRet> {
    check_flags(args.flags, 0, "networkPortGetXMLDesc")?;
    let (driver, network) = (driver(&call), find(&call, &args.port.net)?);
    let uuid = Uuid::from_bytes(args.port.uuid);
    let port = blocking(move || driver.port(&network, uuid)).await??;
    Ok(NetworkPortGetXmlDescRet { xml: port.format() })
}

async fn port_parameters(
    call: Call,
    args: NetworkPortGetParametersArgs,
) -> Answer<NetworkPortGetParametersRet> {
    check_flags(args.flags, STRINGS, "networkPortGetParameters")?;
    let (driver, network) = (driver(&call), find(&call, &args.port.net)?);
    let uuid = Uuid::from_bytes(args.port.uuid);
    let port = blocking(move || driver.port(&network, uuid)).await??;
    let limits = port.bandwidth;
    let (params, nparams) = fitting(rate_params([limits.inbound, limits.outbound]), args.nparams);
    Ok(NetworkPortGetParametersRet {
        params: params.into(),
        nparams,
    })
}

async fn set_port_parameters(call: Call, args: NetworkPortSetParametersArgs) -> Answer<()> {
    check_flags(args.flags, 0, "networkPortSetParameters")?;
    let (driver, network) = (driver(&call), find(&call, &args.port.net)?);
    let uuid = Uuid::from_bytes(args.port.uuid);
    let rates = rates(&args.params.0)?;
    Ok(blocking(move || driver.limit_port(&network, uuid, rates)).await??)
}

async fn port_delete(call: Call, args: NetworkPortDeleteArgs) -> Answer<()> {
    check_flags(args.flags, 0, "networkPortDelete")?;
    let (driver, network) = (driver(&call), find(&call, &args.port.net)?);
    let uuid = Uuid::from_bytes(args.port.uuid);
    Ok(blocking(move || driver.delete_port(&network, uuid)).await??)
}
