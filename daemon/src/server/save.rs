//! Save, restore, managed save, dump, and the jobs they are.

use rpc::args::*;
use rpc::error::{ErrorCode, RemoteError};
use rpc::procs;
use rpc::server::Router;
use rpc::types::{TypedParam, TypedValue};

use super::{Answer, Call, Daemon};
use crate::error::{Error, check_flags};

/// The functions about saved domains.
pub fn routes(router: Router<Daemon>) -> Router<Daemon> {
    router
        .on(procs::DOMAIN_SAVE, save)
        .on(procs::DOMAIN_SAVE_FLAGS, save_flags)
        .on(procs::DOMAIN_SAVE_PARAMS, save_params)
        .on(procs::DOMAIN_RESTORE, restore)
        .on(procs::DOMAIN_RESTORE_FLAGS, restore_flags)
        .on(procs::DOMAIN_RESTORE_PARAMS, restore_params)
        .on(procs::DOMAIN_SAVE_IMAGE_GET_XML_DESC, image_xml)
        .on(procs::DOMAIN_SAVE_IMAGE_DEFINE_XML, image_define)
        .on(procs::DOMAIN_MANAGED_SAVE, managed_save)
        .on(procs::DOMAIN_HAS_MANAGED_SAVE_IMAGE, has_managed_save)
        .on(procs::DOMAIN_MANAGED_SAVE_REMOVE, managed_save_remove)
        .on(procs::DOMAIN_MANAGED_SAVE_GET_XML_DESC, managed_save_xml)
        .on(procs::DOMAIN_MANAGED_SAVE_DEFINE_XML, managed_save_define)
        .on(procs::DOMAIN_CORE_DUMP, core_dump)
        .on(procs::DOMAIN_CORE_DUMP_WITH_FORMAT, core_dump_with_format)
        .on(procs::DOMAIN_GET_JOB_INFO, job_info)
        .on(procs::DOMAIN_GET_JOB_STATS, job_stats)
        .on(procs::DOMAIN_ABORT_JOB, abort_job)
        .on(procs::DOMAIN_ABORT_JOB_FLAGS, abort_job_flags)
}

async fn save(call: Call, args: DomainSaveArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains.save_to(domain, args.to, None, 0).await?)
}

async fn save_flags(call: Call, args: DomainSaveFlagsArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .save_to(domain, args.to, args.dxml, args.flags)
        .await?)
}

/// The parameters `file` and `dxml` of a call that knows no others.
fn file_and_xml(params: Vec<TypedParam>) -> Answer<(Option<String>, Option<String>)> {
    let (mut file, mut dxml) = (None, None);
    for param in params {
        match (param.field.as_str(), param.value) {
            ("file", TypedValue::String(value)) => file = Some(value),
            ("dxml", TypedValue::String(value)) => dxml = Some(value),
            (name, _) => {
                let text = format!("parameter '{name}' not supported");
                return Err(Error::new(ErrorCode::INVALID_ARG, text).into());
            }
        }
    }
    Ok((file, dxml))
}

fn no_file() -> RemoteError {
    Error::new(ErrorCode::INVALID_ARG, "missing 'file' parameter").into()
}

async fn save_params(call: Call, args: DomainSaveParamsArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    let (file, dxml) = file_and_xml(args.params.into_iter().collect())?;
    match file {
        Some(file) => Ok(domains.save_to(domain, file, dxml, args.flags).await?),
        None => Ok(domains.managed_save_domain(domain, args.flags).await?),
    }
}

async fn restore(call: Call, args: DomainRestoreArgs) -> Answer<()> {
    let domains = &call.state().domains;
    Ok(domains.restore(args.from, None, 0).await.map(drop)?)
}

async fn restore_flags(call: Call, args: DomainRestoreFlagsArgs) -> Answer<()> {
    let domains = &call.state().domains;
    let restored = domains.restore(args.from, args.dxml, args.flags).await;
    Ok(restored.map(drop)?)
}

async fn restore_params(call: Call, args: DomainRestoreParamsArgs) -> Answer<()> {
    let (file, dxml) = file_and_xml(args.params.into_iter().collect())?;
    let file = file.ok_or_else(no_file)?;
    let restored = call.state().domains.restore(file, dxml, args.flags).await;
    Ok(restored.map(drop)?)
}

/// VIR_DOMAIN_SAVE_IMAGE_XML_SECURE: nothing is kept out of an image's XML.
const SECURE: u32 = 1;

async fn image_xml(
    call: Call,
    args: DomainSaveImageGetXmlDescArgs,
) -> Answer<DomainSaveImageGetXmlDescRet> {
    check_flags(args.flags, SECURE, "qemuDomainSaveImageGetXMLDesc")?;
    let xml = call.state().domains.image_xml(args.file).await?;
    Ok(DomainSaveImageGetXmlDescRet { xml })
}

async fn image_define(call: Call, args: DomainSaveImageDefineXmlArgs) -> Answer<()> {
    let domains = &call.state().domains;
    Ok(domains
        .image_define(args.file.into(), args.dxml, args.flags)
        .await?)
}

async fn managed_save(call: Call, args: DomainManagedSaveArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains.managed_save_domain(domain, args.flags).await?)
}

async fn has_managed_save(
    call: Call,
    args: DomainHasManagedSaveImageArgs,
) -> Answer<DomainHasManagedSaveImageRet> {
    check_flags(args.flags, 0, "qemuDomainHasManagedSaveImage")?;
    let domain = call.state().find(&args.dom)?;
    let result = i32::from(call.state().domains.has_managed_save(&domain));
    Ok(DomainHasManagedSaveImageRet { result })
}

async fn managed_save_remove(call: Call, args: DomainManagedSaveRemoveArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains.managed_save_remove(domain, args.flags).await?)
}

async fn managed_save_xml(
    call: Call,
    args: DomainManagedSaveGetXmlDescArgs,
) -> Answer<DomainManagedSaveGetXmlDescRet> {
    check_flags(args.flags, SECURE, "qemuDomainManagedSaveGetXMLDesc")?;
    let domains = &call.state().domains;
    let domain = call.state().find(&args.dom)?;
    let path = domains.existing_managed_save(&domain)?;
    let xml = domains.image_xml(path.display().to_string()).await?;
    Ok(DomainManagedSaveGetXmlDescRet { xml })
}

async fn managed_save_define(call: Call, args: DomainManagedSaveDefineXmlArgs) -> Answer<()> {
    let domains = &call.state().domains;
    let domain = call.state().pin(&args.dom)?;
    let _job = domain.job().await?;
    let path = domains.existing_managed_save(&domain)?;
    let dxml = args
        .dxml
        .ok_or_else(|| RemoteError::from(Error::new(ErrorCode::INVALID_ARG, "XML is needed")))?;
    Ok(domains.image_define(path, dxml, args.flags).await?)
}

async fn core_dump(call: Call, args: DomainCoreDumpArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains.core_dump(domain, args.to, 0, args.flags).await?)
}

async fn core_dump_with_format(call: Call, args: DomainCoreDumpWithFormatArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    let domains = &call.state().domains;
    Ok(domains
        .core_dump(domain, args.to, args.dumpformat, args.flags)
        .await?)
}

async fn job_info(call: Call, args: DomainGetJobInfoArgs) -> Answer<DomainGetJobInfoRet> {
    let domain = call.state().find(&args.dom)?;
    let told = call.state().domains.job(&domain, 0).await?;
    let (kind, statistics) = (told.kind, told.statistics);
    let disks = statistics
        .and_then(|s| s.status.migration)
        .unwrap_or_default();
    let (total, processed, remaining) = statistics.map_or((0, 0, 0), |s| s.memory());
    Ok(DomainGetJobInfoRet {
        kind: kind as i32,
        time_elapsed: statistics.map_or(0, |s| s.milliseconds()),
        time_remaining: 0,
        data_total: total,
        data_processed: processed,
        data_remaining: remaining,
        mem_total: total,
        mem_processed: processed,
        mem_remaining: remaining,
        file_total: disks.disk_total,
        file_processed: disks.disk_sent,
        file_remaining: disks.disk_left,
    })
}

async fn job_stats(call: Call, args: DomainGetJobStatsArgs) -> Answer<DomainGetJobStatsRet> {
    let domain = call.state().find(&args.dom)?;
    let told = call.state().domains.job(&domain, args.flags).await?;
    Ok(DomainGetJobStatsRet {
        kind: told.kind as i32,
        params: told.params().into(),
    })
}

async fn abort_job(call: Call, args: DomainAbortJobArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call.state().domains.abort_job(domain, 0).await?)
}

async fn abort_job_flags(call: Call, args: DomainAbortJobFlagsArgs) -> Answer<()> {
    let domain = call.state().pin(&args.dom)?;
    Ok(call.state().domains.abort_job(domain, args.flags).await?)
}
