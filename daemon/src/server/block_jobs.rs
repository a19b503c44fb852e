//! Block jobs.

use rpc::args::*;
use rpc::procs;
use rpc::server::Router;

use super::devices::unsigned;
use super::{Answer, Call, Daemon};
use crate::drivers::domain::block_jobs::CopyLimits;
use crate::error::{Error, ErrorCode};

/// The functions about block jobs.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::DOMAIN_BLOCK_JOB_ABORT, abort)
        .on(procs::DOMAIN_GET_BLOCK_JOB_INFO, info)
        .on(procs::DOMAIN_BLOCK_JOB_SET_SPEED, set_speed)
        .on(procs::DOMAIN_BLOCK_PULL, pull)
        .on(procs::DOMAIN_BLOCK_REBASE, rebase)
        .on(procs::DOMAIN_BLOCK_COMMIT, commit)
        .on(procs::DOMAIN_BLOCK_COPY, copy)
}

async fn abort(call: Call, args: DomainBlockJobAbortArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .block_job_abort(domain, &args.path, args.flags)
        .await?)
}

async fn info(call: Call, args: DomainGetBlockJobInfoArgs) -> Answer<DomainGetBlockJobInfoRet> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    let info = domains
        .block_job_info(&domain, &args.path, args.flags)
        .await?;
    Ok(match info {
        Some(info) => DomainGetBlockJobInfoRet {
            found: 1,
            kind: info.kind,
            bandwidth: info.bandwidth,
            cur: info.cur,
            end: info.end,
        },
        None => DomainGetBlockJobInfoRet {
            found: 0,
            kind: 0,
            bandwidth: 0,
            cur: 0,
            end: 0,
        },
    })
}

async fn set_speed(call: Call, args: DomainBlockJobSetSpeedArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .block_job_speed(domain, &args.path, args.bandwidth, args.flags)
        .await?)
}

async fn pull(call: Call, args: DomainBlockPullArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .block_pull(domain, &args.path, None, args.bandwidth, args.flags)
        .await?)
}

async fn rebase(call: Call, args: DomainBlockRebaseArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    let base = args.base.as_deref();
    Ok(domains
        .block_pull(domain, &args.path, base, args.bandwidth, args.flags)
        .await?)
}

async fn commit(call: Call, args: DomainBlockCommitArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    let (base, top) = (args.base.as_deref(), args.top.as_deref());
    Ok(domains
        .block_commit(domain, &args.disk, base, top, args.bandwidth, args.flags)
        .await?)
}

async fn copy(call: Call, args: DomainBlockCopyArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let mut limits = CopyLimits::default();
    for param in &args.params.0 {
        let value = match param.field.as_str() {
            "bandwidth" => &mut limits.bandwidth,
            "granularity" => &mut limits.granularity,
            "buf-size" => &mut limits.buffer,
            other => {
                let text = format!("parameter '{other}' not supported");
                return Err(Error::new(ErrorCode::ARGUMENT_UNSUPPORTED, text).into());
            }
        };
        *value = unsigned(param)?;
    }
    let domains = &call.state().domains;
    Ok(domains
        .block_copy(domain, &args.path, &args.destxml, limits, args.flags)
        .await?)
}
