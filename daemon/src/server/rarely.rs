//! What is rarely asked for, and mostly answered with what is not there.

use rpc::args::*;
use rpc::error::{ErrorCode, ErrorDomain, RemoteError};
use rpc::procs;
use rpc::server::Router;
use rpc::stream::Stream;
use rpc::types;

use super::{Answer, Call, Daemon};
use crate::drivers::domain::{agent, dirtyrate};
use crate::error::{Error, check_flags};

/// Procedures whose only answer is why not, of running domains at least.
pub const REFUSED: &[i32] = &[
    procs::DOMAIN_SCREENSHOT.number(),
    procs::DOMAIN_OPEN_GRAPHICS.number(),
    procs::DOMAIN_OPEN_GRAPHICS_FD.number(),
    procs::DOMAIN_PM_SUSPEND_FOR_DURATION.number(),
    procs::DOMAIN_MIGRATE_GET_COMPRESSION_CACHE.number(),
    procs::DOMAIN_MIGRATE_SET_COMPRESSION_CACHE.number(),
    procs::DOMAIN_SET_LAUNCH_SECURITY_STATE.number(),
    procs::DOMAIN_FD_ASSOCIATE.number(),
    procs::DOMAIN_QEMU_MONITOR_COMMAND.number(),
    procs::DOMAIN_QEMU_ATTACH.number(),
    procs::CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER.number(),
    procs::CONNECT_DOMAIN_XML_FROM_NATIVE.number(),
    procs::CONNECT_DOMAIN_XML_TO_NATIVE.number(),
];

/// These functions.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::DOMAIN_SET_MAX_MEMORY, set_max_memory)
        .on(procs::DOMAIN_SEND_KEY, send_key)
        .on(procs::DOMAIN_SEND_PROCESS_SIGNAL, send_process_signal)
        .on_stream(procs::DOMAIN_SCREENSHOT, screenshot)
        .on(procs::DOMAIN_OPEN_GRAPHICS, open_graphics)
        .on(procs::DOMAIN_OPEN_GRAPHICS_FD, open_graphics_fd)
        .on_stream(procs::DOMAIN_OPEN_CHANNEL, open_channel)
        .on(procs::DOMAIN_PM_SUSPEND_FOR_DURATION, pm_suspend)
        .on(procs::DOMAIN_PM_WAKEUP, pm_wakeup)
        .on(procs::DOMAIN_SET_BLOCK_THRESHOLD, set_block_threshold)
        .on(procs::DOMAIN_START_DIRTY_RATE_CALC, start_dirty_rate_calc)
        .on(
            procs::DOMAIN_GET_LAUNCH_SECURITY_INFO,
            get_launch_security_info,
        )
        .on(
            procs::DOMAIN_SET_LAUNCH_SECURITY_STATE,
            set_launch_security_state,
        )
        .on(procs::DOMAIN_FD_ASSOCIATE, fd_associate)
        .on(procs::DOMAIN_QEMU_MONITOR_COMMAND, monitor_command)
        .on(procs::DOMAIN_QEMU_ATTACH, attach)
        .on(
            procs::CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER,
            monitor_events,
        )
        .on(procs::CONNECT_DOMAIN_XML_FROM_NATIVE, xml_from_native)
        .on(procs::CONNECT_DOMAIN_XML_TO_NATIVE, xml_to_native)
}

fn unsupported(text: impl Into<String>) -> RemoteError {
    Error::new(ErrorCode::OPERATION_UNSUPPORTED, text).into()
}

/// What a libvirt says whose driver lacks a function.
fn no_function(name: &str) -> RemoteError {
    RemoteError::new(ErrorCode::NO_SUPPORT, ErrorDomain::DOMAIN, name)
}

/// The domain must run.
fn running(call: &Call, dom: &types::Domain) -> Answer<std::sync::Arc<xml_schemas::Domain>> {
    let domain = call.state().find(dom)?;
    let inner = domain.lock();
    Ok(std::sync::Arc::clone(&inner.live()?.definition))
}

async fn set_max_memory(call: Call, args: DomainSetMaxMemoryArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains.set_max_memory(domain, args.memory, 0).await?)
}

async fn send_key(call: Call, args: DomainSendKeyArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    let (codes, hold) = (&args.keycodes, args.holdtime);
    Ok(domains
        .send_keys(domain, args.codeset, hold, codes, args.flags)
        .await?)
}

async fn send_process_signal(call: Call, args: DomainSendProcessSignalArgs) -> Answer<()> {
    call.state().find(&args.dom)?;
    Err(no_function("virDomainSendProcessSignal"))
}

async fn screenshot(
    call: Call,
    args: DomainScreenshotArgs,
    _stream: Stream,
) -> Answer<DomainScreenshotRet> {
    check_flags(args.flags, 0, "qemuDomainScreenshot")?;
    running(&call, &args.dom)?;
    Err(Error::invalid("no screens to take screenshot from").into())
}

fn graphics(call: &Call, dom: &types::Domain, index: u32) -> RemoteError {
    match running(call, dom) {
        Ok(_) => Error::internal(format!("cannot find graphics backend with index {index}")).into(),
        Err(error) => error,
    }
}

async fn open_graphics(call: Call, args: DomainOpenGraphicsArgs) -> Answer<()> {
    Err(graphics(&call, &args.dom, args.idx))
}

async fn open_graphics_fd(call: Call, args: DomainOpenGraphicsFdArgs) -> Answer<()> {
    Err(graphics(&call, &args.dom, args.idx))
}

async fn open_channel(call: Call, args: DomainOpenChannelArgs, stream: Stream) -> Answer<()> {
    let domain = call.state().find(&args.dom)?;
    let domains = &call.state().domains;
    let name = args.name.as_deref();
    Ok(domains
        .open_channel(&domain, name, args.flags, stream)
        .await?)
}

async fn pm_suspend(call: Call, args: DomainPmSuspendForDurationArgs) -> Answer<()> {
    check_flags(args.flags, 0, "qemuDomainPMSuspendForDuration")?;
    // virNodeSuspendTarget
    if args.target > 2 {
        let text = format!("Unknown suspend target: {}", args.target);
        return Err(Error::new(ErrorCode::INVALID_ARG, text).into());
    }
    // It is the agent that would be asked for it.
    agent::socket(&*running(&call, &args.dom)?)?;
    Err(unsupported(
        "the machine has no sleep states: it can only be paused or saved",
    ))
}

async fn pm_wakeup(call: Call, args: DomainPmWakeupArgs) -> Answer<()> {
    check_flags(args.flags, 0, "qemuDomainPMWakeup")?;
    running(&call, &args.dom)?;
    Err(Error::invalid("domain is not suspended by power management").into())
}

async fn set_block_threshold(call: Call, args: DomainSetBlockThresholdArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .set_block_threshold(domain, &args.dev, args.threshold, args.flags)
        .await?)
}

async fn start_dirty_rate_calc(call: Call, args: DomainStartDirtyRateCalcArgs) -> Answer<()> {
    /// virDomainDirtyRateCalcFlags
    const BITMAP_OR_RING: u32 = 3;
    const RING: u32 = 2;
    check_flags(args.flags, BITMAP_OR_RING, "qemuDomainStartDirtyRateCalc")?;
    let domain = call.state().pin(&args.dom)?;
    if args.flags & RING != 0 {
        return Err(unsupported(
            "dirty-ring calculation mode requires dirty-ring feature enabled.",
        ));
    }
    if args.flags & BITMAP_OR_RING != 0 {
        return Err(dirtyrate::only_sampling().into());
    }
    let domains = &call.state().domains;
    Ok(domains.measure_dirty_rate(domain, args.seconds).await?)
}

async fn get_launch_security_info(
    call: Call,
    args: DomainGetLaunchSecurityInfoArgs,
) -> Answer<DomainGetLaunchSecurityInfoRet> {
    // No domain has memory of that kind: there is nothing to tell.
    call.state().find(&args.dom)?;
    Ok(DomainGetLaunchSecurityInfoRet::default())
}

async fn set_launch_security_state(
    call: Call,
    args: DomainSetLaunchSecurityStateArgs,
) -> Answer<()> {
    running(&call, &args.dom)?;
    Err(unsupported(
        "setting a launch secret is only supported in SEV-enabled domains",
    ))
}

async fn fd_associate(call: Call, args: DomainFdAssociateArgs) -> Answer<()> {
    call.state().find(&args.dom)?;
    drop(call.take_fds());
    Err(unsupported(
        "disks are not made from descriptors of clients",
    ))
}

async fn monitor_command(
    call: Call,
    args: QemuDomainMonitorCommandArgs,
) -> Answer<QemuDomainMonitorCommandRet> {
    running(&call, &args.dom)?;
    Err(unsupported(
        "the domain has no QEMU monitor: Vireo's own VMM runs it",
    ))
}

async fn monitor_events(
    _call: Call,
    _args: QemuConnectDomainMonitorEventRegisterArgs,
) -> Answer<QemuConnectDomainMonitorEventRegisterRet> {
    Err(unsupported(
        "domains have no QEMU monitor, and hence no events of one: Vireo's own VMM runs them",
    ))
}

async fn attach(_call: Call, _args: QemuDomainAttachArgs) -> Answer<QemuDomainAttachRet> {
    Err(unsupported("attaching to a QEMU process is not supported"))
}

async fn xml_from_native(
    _call: Call,
    _args: ConnectDomainXmlFromNativeArgs,
) -> Answer<ConnectDomainXmlFromNativeRet> {
    // As libvirt's QEMU driver since it can no longer read command lines.
    Err(RemoteError::new(
        ErrorCode::NO_SUPPORT,
        ErrorDomain::NONE,
        "virConnectDomainXMLFromNative",
    ))
}

async fn xml_to_native(
    _call: Call,
    args: ConnectDomainXmlToNativeArgs,
) -> Answer<ConnectDomainXmlToNativeRet> {
    check_flags(args.flags, 0, "qemuConnectDomainXMLToNative")?;
    let text = format!("unsupported config type {}", args.native_format);
    Err(Error::new(ErrorCode::INVALID_ARG, text).into())
}
