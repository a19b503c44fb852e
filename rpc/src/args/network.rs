//! Networks and their ports: the arguments and answers of their procedures.

use crate::limits::{LIST_MAX, NETWORK_DHCP_LEASES_MAX};
use crate::types::{Network, NetworkPort, TypedParam};
use crate::xdr::{List, Uuid, xdr_structs};

xdr_structs! {
    NetworkLookupByUuidArgs {
        uuid: Uuid,
    }
    NetworkLookupByUuidRet {
        net: Network,
    }
    NetworkLookupByNameArgs {
        name: String,
    }
    NetworkLookupByNameRet {
        net: Network,
    }
    NetworkCreateXmlArgs {
        xml: String,
    }
    NetworkCreateXmlRet {
        net: Network,
    }
    NetworkCreateXmlFlagsArgs {
        xml: String,
        flags: u32,
    }
    NetworkCreateXmlFlagsRet {
        net: Network,
    }
    NetworkDefineXmlArgs {
        xml: String,
    }
    NetworkDefineXmlRet {
        net: Network,
    }
    NetworkDefineXmlFlagsArgs {
        xml: String,
        flags: u32,
    }
    NetworkDefineXmlFlagsRet {
        net: Network,
    }
    NetworkUndefineArgs {
        net: Network,
    }
    NetworkUpdateArgs {
        net: Network,
        command: u32,
        section: u32,
        parent_index: i32,
        xml: String,
        flags: u32,
    }
    NetworkCreateArgs {
        net: Network,
    }
    NetworkDestroyArgs {
        net: Network,
    }
    NetworkGetXmlDescArgs {
        net: Network,
        flags: u32,
    }
    NetworkGetXmlDescRet {
        xml: String,
    }
    NetworkGetBridgeNameArgs {
        net: Network,
    }
    NetworkGetBridgeNameRet {
        name: String,
    }
    NetworkGetAutostartArgs {
        net: Network,
    }
    NetworkGetAutostartRet {
        autostart: i32,
    }
    NetworkSetAutostartArgs {
        net: Network,
        autostart: i32,
    }
    NetworkIsActiveArgs {
        net: Network,
    }
    NetworkIsActiveRet {
        active: i32,
    }
    NetworkIsPersistentArgs {
        net: Network,
    }
    NetworkIsPersistentRet {
        persistent: i32,
    }
    NetworkDhcpLease {
        iface: String,
        expirytime: i64,
        kind: i32,
        mac: Option<String>,
        iaid: Option<String>,
        ipaddr: String,
        prefix: u32,
        hostname: Option<String>,
        clientid: Option<String>,
    }
    NetworkGetDhcpLeasesArgs {
        net: Network,
        mac: Option<String>,
        need_results: i32,
        flags: u32,
    }
    NetworkGetDhcpLeasesRet {
        leases: List<NetworkDhcpLease, NETWORK_DHCP_LEASES_MAX>,
        ret: u32,
    }
    NetworkListAllPortsArgs {
        network: Network,
        need_results: i32,
        flags: u32,
    }
    NetworkListAllPortsRet {
        ports: List<NetworkPort, LIST_MAX>,
        ret: u32,
    }
    NetworkPortLookupByUuidArgs {
        network: Network,
        uuid: Uuid,
    }
    NetworkPortLookupByUuidRet {
        port: NetworkPort,
    }
    NetworkPortCreateXmlArgs {
        network: Network,
        xml: String,
        flags: u32,
    }
    NetworkPortCreateXmlRet {
        port: NetworkPort,
    }
    NetworkPortSetParametersArgs {
        port: NetworkPort,
        params: List<TypedParam, 16>,
        flags: u32,
    }
    NetworkPortGetParametersArgs {
        port: NetworkPort,
        nparams: i32,
        flags: u32,
    }
    NetworkPortGetParametersRet {
        params: List<TypedParam, 16>,
        nparams: i32,
    }
    NetworkPortGetXmlDescArgs {
        port: NetworkPort,
        flags: u32,
    }
    NetworkPortGetXmlDescRet {
        xml: String,
    }
    NetworkPortDeleteArgs {
        port: NetworkPort,
        flags: u32,
    }
    NetworkSetMetadataArgs {
        net: Network,
        kind: i32,
        metadata: Option<String>,
        key: Option<String>,
        uri: Option<String>,
        flags: u32,
    }
    NetworkGetMetadataArgs {
        net: Network,
        kind: i32,
        uri: Option<String>,
        flags: u32,
    }
    NetworkGetMetadataRet {
        metadata: String,
    }
}
