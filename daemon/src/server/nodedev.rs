//! The host's devices.

use rpc::args::*;
use rpc::error::{ErrorCode, ErrorDomain, RemoteError};
use rpc::procs;
use rpc::server::Router;
use rpc::types::NodeDevice;

use super::{Answer, Call, Daemon, count};
use crate::drivers::domain::blocking;
use crate::drivers::nodedev::{CAPS, Device, Sysfs};
use crate::error::{Error, check_flags};

/// The functions for the host's devices.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::NODE_NUM_OF_DEVICES, num_of_devices)
        .on(procs::NODE_LIST_DEVICES, list_devices)
        .on(procs::CONNECT_LIST_ALL_NODE_DEVICES, list_all)
        .on(procs::NODE_DEVICE_LOOKUP_BY_NAME, lookup_by_name)
        .on(procs::NODE_DEVICE_LOOKUP_SCSI_HOST_BY_WWN, lookup_by_wwn)
        .on(procs::NODE_DEVICE_GET_XML_DESC, get_xml_desc)
        .on(procs::NODE_DEVICE_GET_PARENT, get_parent)
        .on(procs::NODE_DEVICE_NUM_OF_CAPS, num_of_caps)
        .on(procs::NODE_DEVICE_LIST_CAPS, list_caps)
        .on(procs::NODE_DEVICE_IS_ACTIVE, is_active)
        .on(procs::NODE_DEVICE_IS_PERSISTENT, is_persistent)
        .on(procs::NODE_DEVICE_GET_AUTOSTART, get_autostart)
        .on(procs::NODE_DEVICE_SET_AUTOSTART, set_autostart)
        .on(procs::NODE_DEVICE_DETTACH, detach)
        .on(procs::NODE_DEVICE_DETACH_FLAGS, detach_flags)
        .on(procs::NODE_DEVICE_RE_ATTACH, re_attach)
        .on(procs::NODE_DEVICE_RESET, reset)
        .on(procs::NODE_DEVICE_CREATE_XML, create_xml)
        .on(procs::NODE_DEVICE_DESTROY, destroy)
        .on(procs::NODE_DEVICE_DEFINE_XML, define_xml)
        .on(procs::NODE_DEVICE_UNDEFINE, undefine)
        .on(procs::NODE_DEVICE_CREATE, create)
}

async fn find(name: String) -> Answer<Device> {
    Ok(blocking(move || Sysfs::default().find(&name)).await??)
}

/// The names of all devices, or of those with a capability.
async fn names(cap: Option<String>) -> Answer<Vec<String>> {
    let flags = match cap.as_deref() {
        None => 0,
        Some(name) => match CAPS.iter().find(|(known, _)| *known == name) {
            Some((_, bit)) => *bit,
            None => return Ok(Vec::new()),
        },
    };
    let all = blocking(move || Sysfs::default().list(flags)).await?;
    Ok(all.into_iter().map(|device| device.name).collect())
}

/// Only mediated devices are made and taken away, and there are none.
fn refused() -> RemoteError {
    let (domain, code) = (ErrorDomain::NODEDEV, ErrorCode::CONFIG_UNSUPPORTED);
    Error::of(domain, code, "Unsupported device type").into()
}

async fn num_of_devices(_call: Call, args: NodeNumOfDevicesArgs) -> Answer<NodeNumOfDevicesRet> {
    check_flags(args.flags, 0, "nodeNumOfDevices")?;
    Ok(NodeNumOfDevicesRet {
        num: count(names(args.cap).await?.len()),
    })
}

async fn list_devices(_call: Call, args: NodeListDevicesArgs) -> Answer<NodeListDevicesRet> {
    check_flags(args.flags, 0, "nodeListDevices")?;
    let most = usize::try_from(args.maxnames).unwrap_or(0);
    let names = names(args.cap).await?;
    Ok(NodeListDevicesRet {
        names: names.into_iter().take(most).collect(),
    })
}

async fn list_all(
    _call: Call,
    args: ConnectListAllNodeDevicesArgs,
) -> Answer<ConnectListAllNodeDevicesRet> {
    const KNOWN: u32 = ((1 << 22) - 1) | 1 << 30 | 1 << 31;
    check_flags(args.flags, KNOWN, "nodeConnectListAllNodeDevices")?;
    let all = blocking(move || Sysfs::default().list(args.flags)).await?;
    let ret = u32::try_from(all.len()).unwrap_or(u32::MAX);
    let devices = if args.need_results != 0 {
        let name = |device: Device| NodeDevice { name: device.name };
        all.into_iter().map(name).collect()
    } else {
        Vec::new().into()
    };
    Ok(ConnectListAllNodeDevicesRet { devices, ret })
}

async fn lookup_by_name(
    _call: Call,
    args: NodeDeviceLookupByNameArgs,
) -> Answer<NodeDeviceLookupByNameRet> {
    let name = find(args.name).await?.name;
    Ok(NodeDeviceLookupByNameRet {
        dev: NodeDevice { name },
    })
}

async fn lookup_by_wwn(
    _call: Call,
    args: NodeDeviceLookupScsiHostByWwnArgs,
) -> Answer<NodeDeviceLookupScsiHostByWwnRet> {
    let text = format!(
        "no node device with matching wwnn '{}' and wwpn '{}'",
        args.wwnn, args.wwpn
    );
    Err(Error::of(ErrorDomain::NODEDEV, ErrorCode::NO_NODE_DEVICE, text).into())
}

async fn get_xml_desc(
    _call: Call,
    args: NodeDeviceGetXmlDescArgs,
) -> Answer<NodeDeviceGetXmlDescRet> {
    check_flags(args.flags, 0, "nodeDeviceGetXMLDesc")?;
    Ok(NodeDeviceGetXmlDescRet {
        xml: find(args.name).await?.format(),
    })
}

async fn get_parent(_call: Call, args: NodeDeviceGetParentArgs) -> Answer<NodeDeviceGetParentRet> {
    Ok(NodeDeviceGetParentRet {
        parent_name: find(args.name).await?.parent,
    })
}

async fn num_of_caps(_call: Call, args: NodeDeviceNumOfCapsArgs) -> Answer<NodeDeviceNumOfCapsRet> {
    find(args.name).await?;
    Ok(NodeDeviceNumOfCapsRet { num: 1 })
}

async fn list_caps(_call: Call, args: NodeDeviceListCapsArgs) -> Answer<NodeDeviceListCapsRet> {
    let device = find(args.name).await?;
    let most = usize::try_from(args.maxnames).unwrap_or(0);
    let names = [device.capability.to_owned()];
    Ok(NodeDeviceListCapsRet {
        names: names.into_iter().take(most).collect(),
    })
}

async fn is_active(_call: Call, args: NodeDeviceIsActiveArgs) -> Answer<NodeDeviceIsActiveRet> {
    find(args.name).await?;
    Ok(NodeDeviceIsActiveRet { active: 1 })
}

/// What the host has is there, and will be.
async fn is_persistent(
    _call: Call,
    args: NodeDeviceIsPersistentArgs,
) -> Answer<NodeDeviceIsPersistentRet> {
    find(args.name).await?;
    Ok(NodeDeviceIsPersistentRet { persistent: 1 })
}

async fn get_autostart(
    _call: Call,
    args: NodeDeviceGetAutostartArgs,
) -> Answer<NodeDeviceGetAutostartRet> {
    find(args.name).await?;
    Ok(NodeDeviceGetAutostartRet { autostart: 1 })
}

async fn set_autostart(_call: Call, args: NodeDeviceSetAutostartArgs) -> Answer<()> {
    find(args.name).await?;
    Err(refused())
}

/// Guests get no devices of the host: there is no VFIO here that one would be handed to.
async fn handed(name: String, what: &str) -> Answer<()> {
    let device = find(name).await?;
    if device.capability != "pci" {
        let text = format!("Device {} is not a PCI device", device.name);
        return Err(Error::new(ErrorCode::INVALID_ARG, text).into());
    }
    Err(Error::new(
        ErrorCode::OPERATION_UNSUPPORTED,
        format!(
            "cannot {what} device {}: devices of the host are not given to guests",
            device.name
        ),
    )
    .into())
}

async fn detach(_call: Call, args: NodeDeviceDettachArgs) -> Answer<()> {
    handed(args.name, "detach").await
}

async fn detach_flags(_call: Call, args: NodeDeviceDetachFlagsArgs) -> Answer<()> {
    check_flags(args.flags, 0, "qemuNodeDeviceDetachFlags")?;
    handed(args.name, "detach").await
}

async fn re_attach(_call: Call, args: NodeDeviceReAttachArgs) -> Answer<()> {
    handed(args.name, "re-attach").await
}

async fn reset(_call: Call, args: NodeDeviceResetArgs) -> Answer<()> {
    handed(args.name, "reset").await
}

async fn create_xml(_call: Call, _args: NodeDeviceCreateXmlArgs) -> Answer<NodeDeviceCreateXmlRet> {
    Err(refused())
}

async fn define_xml(_call: Call, _args: NodeDeviceDefineXmlArgs) -> Answer<NodeDeviceDefineXmlRet> {
    Err(refused())
}

async fn destroy(_call: Call, args: NodeDeviceDestroyArgs) -> Answer<()> {
    find(args.name).await?;
    Err(refused())
}

async fn undefine(_call: Call, args: NodeDeviceUndefineArgs) -> Answer<()> {
    find(args.name).await?;
    Err(refused())
}

async fn create(_call: Call, args: NodeDeviceCreateArgs) -> Answer<()> {
    find(args.name).await?;
    let (domain, code) = (ErrorDomain::NODEDEV, ErrorCode::OPERATION_INVALID);
    Err(Error::of(domain, code, "Device is already active").into())
}
