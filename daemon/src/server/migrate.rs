//! Migration: version 3 of the protocol, with parameters and without.

use rpc::args::*;
use rpc::procs;
use rpc::server::Router;

use super::{Answer, Call, Daemon, reference};
use crate::drivers::domain::migrate::{Params, SPEED_MOST, check_speed, flags};
use crate::error::{Error, ErrorCode, check_flags};

/// The functions for migration.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::DOMAIN_MIGRATE_BEGIN3, begin3)
        .on(procs::DOMAIN_MIGRATE_BEGIN3_PARAMS, begin3_params)
        .on(procs::DOMAIN_MIGRATE_PREPARE3, prepare3)
        .on(procs::DOMAIN_MIGRATE_PREPARE3_PARAMS, prepare3_params)
        .on(procs::DOMAIN_MIGRATE_PERFORM3, perform3)
        .on(procs::DOMAIN_MIGRATE_PERFORM3_PARAMS, perform3_params)
        .on(procs::DOMAIN_MIGRATE_FINISH3, finish3)
        .on(procs::DOMAIN_MIGRATE_FINISH3_PARAMS, finish3_params)
        .on(procs::DOMAIN_MIGRATE_CONFIRM3, confirm3)
        .on(procs::DOMAIN_MIGRATE_CONFIRM3_PARAMS, confirm3_params)
        .on(procs::DOMAIN_MIGRATE_SET_MAX_DOWNTIME, set_max_downtime)
        .on(procs::DOMAIN_MIGRATE_GET_MAX_DOWNTIME, get_max_downtime)
        .on(procs::DOMAIN_MIGRATE_SET_MAX_SPEED, set_max_speed)
        .on(procs::DOMAIN_MIGRATE_GET_MAX_SPEED, get_max_speed)
        .on(procs::DOMAIN_MIGRATE_START_POST_COPY, start_post_copy)
        .on(
            procs::DOMAIN_MIGRATE_GET_COMPRESSION_CACHE,
            get_compression_cache,
        )
        .on(
            procs::DOMAIN_MIGRATE_SET_COMPRESSION_CACHE,
            set_compression_cache,
        )
}

/// The forms without parameters have these.
fn params(
    uri: Option<String>,
    dname: Option<String>,
    dxml: Option<String>,
    mib_per_second: u64,
) -> Params {
    Params {
        uri,
        dname,
        dxml,
        bandwidth: (mib_per_second > 0).then_some(mib_per_second),
        ..Params::default()
    }
}

async fn begin3(call: Call, args: DomainMigrateBegin3Args) -> Answer<DomainMigrateBegin3Ret> {
    let domain = call.state().pin(&args.dom)?;
    let params = params(None, args.dname, args.xmlin, args.resource);
    let begun = call
        .state()
        .domains
        .migrate_begin_for(&domain, call.connection().id(), &params, args.flags)
        .await?;
    Ok(DomainMigrateBegin3Ret {
        cookie_out: begun.cookie.into(),
        xml: begun.xml,
    })
}

async fn begin3_params(
    call: Call,
    args: DomainMigrateBegin3ParamsArgs,
) -> Answer<DomainMigrateBegin3ParamsRet> {
    let domain = call.state().pin(&args.dom)?;
    let params = Params::read(args.params)?;
    let begun = call
        .state()
        .domains
        .migrate_begin_for(&domain, call.connection().id(), &params, args.flags.into())
        .await?;
    Ok(DomainMigrateBegin3ParamsRet {
        cookie_out: begun.cookie.into(),
        xml: begun.xml,
    })
}

async fn prepare3(call: Call, args: DomainMigratePrepare3Args) -> Answer<DomainMigratePrepare3Ret> {
    let params = params(args.uri_in, args.dname, Some(args.dom_xml), args.resource);
    let client = call.connection().id();
    let domains = &call.state().domains;
    let prepared = domains
        .migrate_prepare(client, &params, args.flags, &args.cookie_in.0)
        .await?;
    Ok(DomainMigratePrepare3Ret {
        cookie_out: prepared.cookie.into(),
        uri_out: prepared.uri,
    })
}

async fn prepare3_params(
    call: Call,
    args: DomainMigratePrepare3ParamsArgs,
) -> Answer<DomainMigratePrepare3ParamsRet> {
    let params = Params::read(args.params)?;
    let client = call.connection().id();
    let domains = &call.state().domains;
    let prepared = domains
        .migrate_prepare(client, &params, args.flags.into(), &args.cookie_in.0)
        .await?;
    Ok(DomainMigratePrepare3ParamsRet {
        cookie_out: prepared.cookie.into(),
        uri_out: prepared.uri,
    })
}

async fn perform(
    call: &Call,
    dom: &rpc::types::Domain,
    peer: Option<String>,
    params: &Params,
    flags: u64,
    cookie: &[u8],
) -> Answer<Vec<u8>> {
    let domain = call.state().pin(dom)?;
    let client = call.connection().id();
    let domains = &call.state().domains;
    if flags & flags::PEER2PEER == 0 {
        return Ok(domains
            .migrate_perform(&domain, client, params, flags, cookie)
            .await?);
    }
    let peer = peer.ok_or_else(|| Error::new(ErrorCode::INVALID_ARG, "the target is missing"))?;
    domains
        .migrate_to_peer(&domain, client, &peer, params, flags)
        .await?;
    Ok(Vec::new())
}

async fn perform3(call: Call, args: DomainMigratePerform3Args) -> Answer<DomainMigratePerform3Ret> {
    let params = params(args.uri, args.dname, args.xmlin, args.resource);
    let cookie = perform(
        &call,
        &args.dom,
        args.dconnuri,
        &params,
        args.flags,
        &args.cookie_in.0,
    )
    .await?;
    Ok(DomainMigratePerform3Ret {
        cookie_out: cookie.into(),
    })
}

async fn perform3_params(
    call: Call,
    args: DomainMigratePerform3ParamsArgs,
) -> Answer<DomainMigratePerform3ParamsRet> {
    let params = Params::read(args.params)?;
    let cookie = perform(
        &call,
        &args.dom,
        args.dconnuri,
        &params,
        args.flags.into(),
        &args.cookie_in.0,
    )
    .await?;
    Ok(DomainMigratePerform3ParamsRet {
        cookie_out: cookie.into(),
    })
}

async fn finish3(call: Call, args: DomainMigrateFinish3Args) -> Answer<DomainMigrateFinish3Ret> {
    let domain = call
        .state()
        .domains
        .migrate_finish(
            &args.dname,
            &args.cookie_in.0,
            args.flags,
            args.cancelled != 0,
        )
        .await?;
    Ok(DomainMigrateFinish3Ret {
        dom: reference(domain.name()),
        cookie_out: Vec::new().into(),
    })
}

async fn finish3_params(
    call: Call,
    args: DomainMigrateFinish3ParamsArgs,
) -> Answer<DomainMigrateFinish3ParamsRet> {
    let params = Params::read(args.params)?;
    let name = params.dname.ok_or_else(|| {
        Error::new(
            ErrorCode::INTERNAL_ERROR,
            "the finished domain's name is missing",
        )
    })?;
    let domain = call
        .state()
        .domains
        .migrate_finish(
            &name,
            &args.cookie_in.0,
            args.flags.into(),
            args.cancelled != 0,
        )
        .await?;
    Ok(DomainMigrateFinish3ParamsRet {
        dom: reference(domain.name()),
        cookie_out: Vec::new().into(),
    })
}

async fn confirm3(call: Call, args: DomainMigrateConfirm3Args) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .migrate_confirm(&domain, args.flags, args.cancelled != 0)
        .await?)
}

async fn confirm3_params(call: Call, args: DomainMigrateConfirm3ParamsArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .migrate_confirm(&domain, args.flags.into(), args.cancelled != 0)
        .await?)
}

async fn set_max_downtime(call: Call, args: DomainMigrateSetMaxDowntimeArgs) -> Answer<()> {
    check_flags(args.flags, 0, "qemuDomainMigrateSetMaxDowntime")?;
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .migrate_tune(&domain, None, Some(args.downtime))
        .await?)
}

async fn get_max_downtime(
    call: Call,
    args: DomainMigrateGetMaxDowntimeArgs,
) -> Answer<DomainMigrateGetMaxDowntimeRet> {
    check_flags(args.flags, 0, "qemuDomainMigrateGetMaxDowntime")?;
    let domain = call.state().find(&args.dom)?;
    let downtime = {
        let inner = domain.lock();
        inner.live()?;
        inner.migration.downtime_ms
    };
    Ok(DomainMigrateGetMaxDowntimeRet { downtime })
}

/// VIR_DOMAIN_MIGRATE_MAX_SPEED_POSTCOPY
const SPEED_POSTCOPY: u32 = 1;
fn check_speed_flags(flags: u32, function: &str) -> Answer<()> {
    check_flags(flags, SPEED_POSTCOPY, function)?;
    if flags & SPEED_POSTCOPY != 0 {
        let text = "post-copy migration is not supported";
        return Err(Error::new(ErrorCode::ARGUMENT_UNSUPPORTED, text).into());
    }
    Ok(())
}

async fn set_max_speed(call: Call, args: DomainMigrateSetMaxSpeedArgs) -> Answer<()> {
    check_speed_flags(args.flags, "qemuDomainMigrateSetMaxSpeed")?;
    check_speed(args.bandwidth)?;
    let domain = call.state().pin(&args.dom)?;
    // What is as fast as can be said has no limit.
    let bandwidth = match args.bandwidth {
        SPEED_MOST => 0,
        mib => mib << 20,
    };
    let domains = &call.state().domains;
    Ok(domains.migrate_tune(&domain, Some(bandwidth), None).await?)
}

async fn get_max_speed(
    call: Call,
    args: DomainMigrateGetMaxSpeedArgs,
) -> Answer<DomainMigrateGetMaxSpeedRet> {
    check_speed_flags(args.flags, "qemuDomainMigrateGetMaxSpeed")?;
    let domain = call.state().find(&args.dom)?;
    let bandwidth = match domain.lock().migration.bandwidth {
        0 => SPEED_MOST,
        bytes => bytes >> 20,
    };
    Ok(DomainMigrateGetMaxSpeedRet { bandwidth })
}

/// QEMU's XBZRLE sends differences to pages that it has sent before, and keeps those.
fn no_compression_cache() -> Error {
    let text = "there is no compression cache: memory is packed with zstd, page by page";
    Error::new(ErrorCode::OPERATION_UNSUPPORTED, text)
}

async fn get_compression_cache(
    call: Call,
    args: DomainMigrateGetCompressionCacheArgs,
) -> Answer<DomainMigrateGetCompressionCacheRet> {
    call.state().find(&args.dom)?;
    Err(no_compression_cache().into())
}

async fn set_compression_cache(
    call: Call,
    args: DomainMigrateSetCompressionCacheArgs,
) -> Answer<()> {
    call.state().find(&args.dom)?;
    Err(no_compression_cache().into())
}

async fn start_post_copy(call: Call, args: DomainMigrateStartPostCopyArgs) -> Answer<()> {
    call.state().find(&args.dom)?;
    let text = "post-copy migration is not supported";
    Err(Error::new(ErrorCode::ARGUMENT_UNSUPPORTED, text).into())
}
