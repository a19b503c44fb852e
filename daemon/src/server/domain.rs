//! Domains: what changes them.

use rpc::args::*;
use rpc::error::{ErrorCode, RemoteError};
use rpc::procs;
use rpc::server::Router;
use rpc::stream::Stream;
use rpc::types;
use uuid::Uuid;

use super::{Answer, Call, Daemon, reference};
use crate::drivers::domain::define::create_flags;
use crate::drivers::domain::metadata::Kind;
use crate::error::{Error, check_flags};

/// The functions that change domains, and those that find them.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::DOMAIN_LOOKUP_BY_ID, lookup_by_id)
        .on(procs::DOMAIN_LOOKUP_BY_NAME, lookup_by_name)
        .on(procs::DOMAIN_LOOKUP_BY_UUID, lookup_by_uuid)
        .on(procs::DOMAIN_DEFINE_XML, define_xml)
        .on(procs::DOMAIN_DEFINE_XML_FLAGS, define_xml_flags)
        .on(procs::DOMAIN_UNDEFINE, undefine)
        .on(procs::DOMAIN_UNDEFINE_FLAGS, undefine_flags)
        .on(procs::DOMAIN_CREATE_XML, create_xml)
        .on(procs::DOMAIN_CREATE, create)
        .on(procs::DOMAIN_CREATE_WITH_FLAGS, create_with_flags)
        .on(procs::DOMAIN_DESTROY, destroy)
        .on(procs::DOMAIN_DESTROY_FLAGS, destroy_flags)
        .on(procs::DOMAIN_SHUTDOWN, shutdown)
        .on(procs::DOMAIN_SHUTDOWN_FLAGS, shutdown_flags)
        .on(procs::DOMAIN_REBOOT, reboot)
        .on(procs::DOMAIN_RESET, reset)
        .on(procs::DOMAIN_SUSPEND, suspend)
        .on(procs::DOMAIN_RESUME, resume)
        .on(procs::DOMAIN_INJECT_NMI, inject_nmi)
        .on(procs::DOMAIN_SET_AUTOSTART, set_autostart)
        .on(procs::DOMAIN_RENAME, rename)
        .on(procs::DOMAIN_SET_METADATA, set_metadata)
        .on(procs::DOMAIN_GET_METADATA, get_metadata)
        .on_stream(procs::DOMAIN_OPEN_CONSOLE, open_console)
}

async fn lookup_by_id(call: Call, args: DomainLookupByIdArgs) -> Answer<DomainLookupByIdRet> {
    let domain = call.state().domains.by_id(args.id)?;
    Ok(DomainLookupByIdRet {
        dom: reference(domain.name()),
    })
}

async fn lookup_by_name(call: Call, args: DomainLookupByNameArgs) -> Answer<DomainLookupByNameRet> {
    let domain = call.state().domains.by_name(&args.name)?;
    Ok(DomainLookupByNameRet {
        dom: reference(domain.name()),
    })
}

async fn lookup_by_uuid(call: Call, args: DomainLookupByUuidArgs) -> Answer<DomainLookupByUuidRet> {
    let domain = call.state().domains.by_uuid(Uuid::from_bytes(args.uuid))?;
    Ok(DomainLookupByUuidRet {
        dom: reference(domain.name()),
    })
}

async fn define(call: &Call, xml: &str, flags: u32) -> Answer<types::Domain> {
    let domain = call.state().domains.define(xml, flags).await?;
    Ok(reference(domain.name()))
}

async fn define_xml(call: Call, args: DomainDefineXmlArgs) -> Answer<DomainDefineXmlRet> {
    let dom = define(&call, &args.xml, 0).await?;
    Ok(DomainDefineXmlRet { dom })
}

async fn define_xml_flags(
    call: Call,
    args: DomainDefineXmlFlagsArgs,
) -> Answer<DomainDefineXmlFlagsRet> {
    let dom = define(&call, &args.xml, args.flags).await?;
    Ok(DomainDefineXmlFlagsRet { dom })
}

async fn undefine(call: Call, args: DomainUndefineArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call.state().domains.undefine(domain, 0).await?)
}

async fn undefine_flags(call: Call, args: DomainUndefineFlagsArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call.state().domains.undefine(domain, args.flags).await?)
}

async fn create_xml(call: Call, args: DomainCreateXmlArgs) -> Answer<DomainCreateXmlRet> {
    let daemon = call.state();
    let domain = daemon
        .domains
        .create_xml(&args.xml_desc, args.flags)
        .await?;
    if args.flags & create_flags::AUTODESTROY != 0 {
        daemon.tie(call.connection(), domain.uuid);
    }
    Ok(DomainCreateXmlRet {
        dom: reference(domain.name()),
    })
}

async fn start(call: &Call, dom: &types::Domain, flags: u32) -> Answer<types::Domain> {
    let daemon = call.state();
    let domain = daemon.pin(dom)?;
    let known = std::sync::Arc::clone(&domain);
    daemon.domains.create(domain, flags).await?;
    if flags & create_flags::AUTODESTROY != 0 {
        daemon.tie(call.connection(), known.uuid);
    }
    Ok(reference(known.name()))
}

async fn create(call: Call, args: DomainCreateArgs) -> Answer<()> {
    start(&call, &args.dom, 0).await.map(drop)
}

async fn create_with_flags(
    call: Call,
    args: DomainCreateWithFlagsArgs,
) -> Answer<DomainCreateWithFlagsRet> {
    let dom = start(&call, &args.dom, args.flags).await?;
    Ok(DomainCreateWithFlagsRet { dom })
}

async fn destroy(call: Call, args: DomainDestroyArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call.state().domains.destroy(domain, 0).await?)
}

async fn destroy_flags(call: Call, args: DomainDestroyFlagsArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call.state().domains.destroy(domain, args.flags).await?)
}

async fn shutdown(call: Call, args: DomainShutdownArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call.state().domains.shutdown(domain, 0).await?)
}

async fn shutdown_flags(call: Call, args: DomainShutdownFlagsArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call.state().domains.shutdown(domain, args.flags).await?)
}

async fn reboot(call: Call, args: DomainRebootArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call.state().domains.reboot(domain, args.flags).await?)
}

async fn reset(call: Call, args: DomainResetArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call.state().domains.reset(domain, args.flags).await?)
}

async fn suspend(call: Call, args: DomainSuspendArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call.state().domains.suspend(domain).await?)
}

async fn resume(call: Call, args: DomainResumeArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call.state().domains.resume(domain).await?)
}

async fn inject_nmi(call: Call, args: DomainInjectNmiArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call.state().domains.inject_nmi(domain, args.flags).await?)
}

async fn set_autostart(call: Call, args: DomainSetAutostartArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call
        .state()
        .domains
        .set_autostart(domain, args.autostart != 0)
        .await?)
}

async fn rename(call: Call, args: DomainRenameArgs) -> Answer<DomainRenameRet> {
    check_flags(args.flags, 0, "qemuDomainRename")?;
    let domain = call.state().pin(&args.dom)?;
    let new = args.new_name.ok_or_else(|| {
        RemoteError::from(Error::new(ErrorCode::INVALID_ARG, "a new name is needed"))
    })?;
    call.state().domains.rename(domain, new).await?;
    Ok(DomainRenameRet { retcode: 0 })
}

async fn set_metadata(call: Call, args: DomainSetMetadataArgs) -> Answer<()> {
    let daemon = call.state();
    let domain = daemon.pin(&args.dom)?;
    let kind = Kind::from_wire(args.kind, args.uri)?;
    daemon
        .domains
        .set_metadata(domain, kind, args.metadata, args.key, args.flags)
        .await?;
    Ok(())
}

async fn get_metadata(call: Call, args: DomainGetMetadataArgs) -> Answer<DomainGetMetadataRet> {
    let daemon = call.state();
    let domain = daemon.find(&args.dom)?;
    let kind = Kind::from_wire(args.kind, args.uri)?;
    let metadata = daemon.domains.metadata(&domain, &kind, args.flags)?;
    Ok(DomainGetMetadataRet { metadata })
}

async fn open_console(call: Call, args: DomainOpenConsoleArgs, stream: Stream) -> Answer<()> {
    let daemon = call.state();
    let domain = daemon.find(&args.dom)?;
    daemon
        .domains
        .open_console(&domain, args.dev_name.as_deref(), args.flags, stream)?;
    Ok(())
}
