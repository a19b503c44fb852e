//! How much of the host a domain gets.

use rpc::args::*;
use rpc::procs;
use rpc::server::Router;
use rpc::types::{TypedParam, TypedValue};

use super::{Answer, Call, Daemon, count};
use crate::drivers::domain::metadata::affect;
use crate::drivers::domain::tunables::Tunable;
use crate::error::check_flags;

/// VIR_TYPED_PARAM_STRING_OKAY
const STRINGS: u32 = 4;
/// virDomainModificationImpact
const IMPACT: u32 = affect::LIVE | affect::CONFIG;

/// The functions for tunables.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::DOMAIN_GET_SCHEDULER_TYPE, get_scheduler_type)
        .on(procs::DOMAIN_GET_SCHEDULER_PARAMETERS, get_scheduler)
        .on(
            procs::DOMAIN_GET_SCHEDULER_PARAMETERS_FLAGS,
            get_scheduler_flags,
        )
        .on(procs::DOMAIN_SET_SCHEDULER_PARAMETERS, set_scheduler)
        .on(
            procs::DOMAIN_SET_SCHEDULER_PARAMETERS_FLAGS,
            set_scheduler_flags,
        )
        .on(procs::DOMAIN_GET_MEMORY_PARAMETERS, get_memory)
        .on(procs::DOMAIN_SET_MEMORY_PARAMETERS, set_memory)
        .on(procs::DOMAIN_GET_BLKIO_PARAMETERS, get_blkio)
        .on(procs::DOMAIN_SET_BLKIO_PARAMETERS, set_blkio)
        .on(procs::DOMAIN_GET_NUMA_PARAMETERS, get_numa)
        .on(procs::DOMAIN_SET_NUMA_PARAMETERS, set_numa)
        .on(procs::DOMAIN_GET_PERF_EVENTS, get_perf)
        .on(procs::DOMAIN_SET_PERF_EVENTS, set_perf)
}

/// The values, as many as a client has room for, and their number to one that asks only for it.
fn get(
    call: &Call,
    dom: &rpc::types::Domain,
    kind: Tunable,
    asked: i32,
    flags: u32,
) -> Answer<(Vec<TypedParam>, i32)> {
    let function = match kind {
        Tunable::Scheduler => "qemuDomainGetSchedulerParametersFlags",
        Tunable::Memory => "qemuDomainGetMemoryParameters",
        Tunable::Block => "qemuDomainGetBlkioParameters",
        Tunable::Numa => "qemuDomainGetNumaParameters",
        Tunable::Perf => "qemuDomainGetPerfEvents",
    };
    check_flags(flags, IMPACT | STRINGS, function)?;
    let domain = call.state().find(dom)?;
    let mut params = call
        .state()
        .domains
        .tunables(&domain, kind, flags & IMPACT)?;
    let nparams = count(params.len());
    if flags & STRINGS == 0 {
        params.retain(|param| !matches!(param.value, TypedValue::String(_)));
    }
    params.truncate(usize::try_from(asked).unwrap_or(0));
    Ok((params, nparams))
}

async fn set(
    call: &Call,
    dom: &rpc::types::Domain,
    kind: Tunable,
    params: &[TypedParam],
    flags: u32,
) -> Answer<()> {
    check_flags(flags, IMPACT, "qemuDomainSetParameters")?;
    let domain = call.state().pin(dom)?;
    let domains = &call.state().domains;
    Ok(domains.set_tunables(domain, kind, params, flags).await?)
}

async fn get_scheduler_type(
    call: Call,
    args: DomainGetSchedulerTypeArgs,
) -> Answer<DomainGetSchedulerTypeRet> {
    let domain = call.state().find(&args.dom)?;
    let domains = &call.state().domains;
    let params = domains.tunables(&domain, Tunable::Scheduler, 0)?;
    Ok(DomainGetSchedulerTypeRet {
        kind: "posix".to_owned(),
        nparams: count(params.len()),
    })
}

async fn get_scheduler(
    call: Call,
    args: DomainGetSchedulerParametersArgs,
) -> Answer<DomainGetSchedulerParametersRet> {
    let (params, _) = get(&call, &args.dom, Tunable::Scheduler, args.nparams, 0)?;
    Ok(DomainGetSchedulerParametersRet {
        params: params.into(),
    })
}

async fn get_scheduler_flags(
    call: Call,
    args: DomainGetSchedulerParametersFlagsArgs,
) -> Answer<DomainGetSchedulerParametersFlagsRet> {
    let (params, _) = get(
        &call,
        &args.dom,
        Tunable::Scheduler,
        args.nparams,
        args.flags,
    )?;
    Ok(DomainGetSchedulerParametersFlagsRet {
        params: params.into(),
    })
}

async fn set_scheduler(call: Call, args: DomainSetSchedulerParametersArgs) -> Answer<()> {
    set(&call, &args.dom, Tunable::Scheduler, &args.params, 0).await
}

async fn set_scheduler_flags(
    call: Call,
    args: DomainSetSchedulerParametersFlagsArgs,
) -> Answer<()> {
    set(
        &call,
        &args.dom,
        Tunable::Scheduler,
        &args.params,
        args.flags,
    )
    .await
}

async fn get_memory(
    call: Call,
    args: DomainGetMemoryParametersArgs,
) -> Answer<DomainGetMemoryParametersRet> {
    let (params, nparams) = get(&call, &args.dom, Tunable::Memory, args.nparams, args.flags)?;
    Ok(DomainGetMemoryParametersRet {
        params: params.into(),
        nparams,
    })
}

async fn set_memory(call: Call, args: DomainSetMemoryParametersArgs) -> Answer<()> {
    set(&call, &args.dom, Tunable::Memory, &args.params, args.flags).await
}

async fn get_blkio(
    call: Call,
    args: DomainGetBlkioParametersArgs,
) -> Answer<DomainGetBlkioParametersRet> {
    let (params, nparams) = get(&call, &args.dom, Tunable::Block, args.nparams, args.flags)?;
    Ok(DomainGetBlkioParametersRet {
        params: params.into(),
        nparams,
    })
}

async fn set_blkio(call: Call, args: DomainSetBlkioParametersArgs) -> Answer<()> {
    set(&call, &args.dom, Tunable::Block, &args.params, args.flags).await
}

async fn get_numa(
    call: Call,
    args: DomainGetNumaParametersArgs,
) -> Answer<DomainGetNumaParametersRet> {
    let (params, nparams) = get(&call, &args.dom, Tunable::Numa, args.nparams, args.flags)?;
    Ok(DomainGetNumaParametersRet {
        params: params.into(),
        nparams,
    })
}

async fn set_numa(call: Call, args: DomainSetNumaParametersArgs) -> Answer<()> {
    set(&call, &args.dom, Tunable::Numa, &args.params, args.flags).await
}

async fn get_perf(call: Call, args: DomainGetPerfEventsArgs) -> Answer<DomainGetPerfEventsRet> {
    let (params, _) = get(&call, &args.dom, Tunable::Perf, i32::MAX, args.flags)?;
    Ok(DomainGetPerfEventsRet {
        params: params.into(),
    })
}

async fn set_perf(call: Call, args: DomainSetPerfEventsArgs) -> Answer<()> {
    set(&call, &args.dom, Tunable::Perf, &args.params, args.flags).await
}
