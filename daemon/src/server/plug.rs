//! Devices that come, go and change.

use rpc::args::*;
use rpc::procs;
use rpc::server::Router;

use super::{Answer, Call, Daemon};
use crate::drivers::domain::metadata::affect;
use crate::drivers::domain::update::FORCE;
use crate::error::check_flags;

/// The functions that change which devices domains have.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::DOMAIN_ATTACH_DEVICE, attach)
        .on(procs::DOMAIN_ATTACH_DEVICE_FLAGS, attach_flags)
        .on(procs::DOMAIN_DETACH_DEVICE, detach)
        .on(procs::DOMAIN_DETACH_DEVICE_FLAGS, detach_flags)
        .on(procs::DOMAIN_DETACH_DEVICE_ALIAS, detach_alias)
        .on(procs::DOMAIN_UPDATE_DEVICE_FLAGS, update_flags)
}

/// virDomainDeviceModifyFlags
const IMPACT: u32 = affect::LIVE | affect::CONFIG;

async fn attach(call: Call, args: DomainAttachDeviceArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .attach_device(domain, &args.xml, affect::LIVE)
        .await?)
}

async fn attach_flags(call: Call, args: DomainAttachDeviceFlagsArgs) -> Answer<()> {
    check_flags(args.flags, IMPACT, "qemuDomainAttachDeviceLiveAndConfig")?;
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains.attach_device(domain, &args.xml, args.flags).await?)
}

async fn detach(call: Call, args: DomainDetachDeviceArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .detach_device(domain, &args.xml, affect::LIVE)
        .await?)
}

async fn detach_flags(call: Call, args: DomainDetachDeviceFlagsArgs) -> Answer<()> {
    check_flags(args.flags, IMPACT, "qemuDomainDetachDeviceLiveAndConfig")?;
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains.detach_device(domain, &args.xml, args.flags).await?)
}

async fn detach_alias(call: Call, args: DomainDetachDeviceAliasArgs) -> Answer<()> {
    let function = "qemuDomainDetachDeviceAliasLiveAndConfig";
    check_flags(args.flags, IMPACT, function)?;
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .detach_alias(domain, &args.alias, args.flags)
        .await?)
}

async fn update_flags(call: Call, args: DomainUpdateDeviceFlagsArgs) -> Answer<()> {
    check_flags(args.flags, IMPACT | FORCE, "qemuDomainUpdateDeviceFlags")?;
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains.update_device(domain, &args.xml, args.flags).await?)
}
