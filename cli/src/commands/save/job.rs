//! Jobs: `domjobinfo`, `domjobabort`, and watching one while it is waited for.

use std::io::Write;
use std::time::Duration;

use rpc::args::{
    DomainAbortJobArgs, DomainAbortJobFlagsArgs, DomainGetJobInfoArgs, DomainGetJobStatsArgs,
    DomainMigrateGetMaxDowntimeArgs,
};
use rpc::client::Client;
use rpc::procs::{self, Procedure};
use rpc::types::{Domain, TypedParam, TypedValue};
use rpc::xdr::{Decode, Encode};

use super::super::{ANY, find_domain};
use crate::command::{Args, Command, DOMAIN, flag};
use crate::connection::failure;
use crate::failure::Result;
use crate::shell::Shell;
use crate::signals::Interrupt;

/// `domjobinfo`
pub const DOMJOBINFO: Command = Command {
    name: "domjobinfo",
    summary: "domain job information",
    description: "Tells how far a domain's job is.",
    options: &[
        DOMAIN,
        flag("completed", "return statistics of a recently completed job"),
        flag("keep-completed", "and keep them"),
        flag("anystats", "print statistics for any kind of job"),
        flag("rawstats", "print the raw data returned by libvirt"),
    ],
    handler: domjobinfo,
    connects: true,
};

/// `domjobabort`
pub const DOMJOBABORT: Command = Command {
    name: "domjobabort",
    summary: "abort active domain job",
    description: "Gives a domain's job up; the guest runs on.",
    options: &[DOMAIN, flag("postcopy", "interrupt post-copy migration")],
    handler: domjobabort,
    connects: true,
};

/// virDomainJobType
const TYPES: [&str; 6] = [
    "None",
    "Bounded",
    "Unbounded",
    "Completed",
    "Failed",
    "Cancelled",
];
const BOUNDED: i32 = 1;
const UNBOUNDED: i32 = 2;
const COMPLETED: i32 = 3;

/// virDomainJobOperation
const OPERATIONS: [&str; 11] = [
    "Unknown",
    "Start",
    "Save",
    "Restore",
    "Incoming migration",
    "Outgoing migration",
    "Snapshot",
    "Snapshot revert",
    "Dump",
    "Backup",
    "Snapshot delete",
];

fn name(of: &[&'static str], number: i32) -> &'static str {
    let known = usize::try_from(number).ok().and_then(|at| of.get(at));
    known.copied().unwrap_or("unknown")
}

/// A number of bytes in the largest unit that leaves something before the point.
pub fn pretty(bytes: u64) -> (f64, &'static str) {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    (value, UNITS[unit])
}

struct Report<'a> {
    shell: &'a mut Shell,
    params: &'a [TypedParam],
}

impl Report<'_> {
    fn get(&self, field: &str) -> Option<u64> {
        let param = self.params.iter().find(|param| param.field == field)?;
        match param.value {
            TypedValue::ULLong(value) => Some(value),
            TypedValue::UInt(value) => Some(value.into()),
            TypedValue::Int(value) => u64::try_from(value).ok(),
            TypedValue::LLong(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    fn line(&mut self, label: &str, text: &str) {
        self.shell.out.print(format!("{label:<17} {text}\n"));
    }

    fn number(&mut self, label: &str, field: &str, unit: &str) {
        if let Some(value) = self.get(field) {
            self.line(label, &format!("{value:<12}{unit}"));
        }
    }

    fn capacity(&mut self, label: &str, field: &str, per: &str) {
        if let Some(value) = self.get(field) {
            let (value, unit) = pretty(value);
            self.line(label, &format!("{value:.3} {unit}{per}"));
        }
    }

    fn capacities(&mut self, what: &str, prefix: &str) {
        let fields = ["processed", "remaining", "total"].map(|kind| format!("{prefix}_{kind}"));
        if fields.iter().all(|field| self.get(field).unwrap_or(0) == 0) {
            return;
        }
        for (field, kind) in fields.iter().zip(["processed:", "remaining:", "total:"]) {
            self.capacity(&format!("{what} {kind}"), field, "");
        }
    }
}

fn domjobinfo(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("completed", "anystats")?;
    let dom = find_domain(shell, args, ANY)?;
    let mut flags = 0;
    if args.has("completed") {
        flags |= 1;
    }
    if args.has("keep-completed") {
        flags |= 1 | 2;
    }
    let call = DomainGetJobStatsArgs {
        dom: dom.clone(),
        flags,
    };
    let stats = shell.call(procs::DOMAIN_GET_JOB_STATS, &call)?;
    let params: Vec<TypedParam> = stats.params.into_iter().collect();
    if args.has("rawstats") {
        shell.out.print(format!("Job type: {}\n\n", stats.kind));
        for param in &params {
            let value = match &param.value {
                TypedValue::Int(value) => value.to_string(),
                TypedValue::UInt(value) => value.to_string(),
                TypedValue::LLong(value) => value.to_string(),
                TypedValue::ULLong(value) => value.to_string(),
                TypedValue::Double(value) => format!("{value:.6}"),
                TypedValue::Boolean(value) => (if *value { "yes" } else { "no" }).to_owned(),
                TypedValue::String(value) => value.clone(),
            };
            shell.out.print(format!("{}: {value}\n", param.field));
        }
        return Ok(());
    }
    let mut report = Report {
        shell,
        params: &params,
    };
    report.line("Job type:", &format!("{:<12}", name(&TYPES, stats.kind)));
    let shown = match stats.kind {
        BOUNDED | UNBOUNDED => true,
        COMPLETED => flags != 0,
        _ => false,
    };
    let wanted = args.has("anystats") && !params.is_empty();
    if !shown && !wanted {
        return Ok(());
    }
    if let Some(operation) = report.get("operation") {
        let operation = i32::try_from(operation).unwrap_or(-1);
        report.line(
            "Operation:",
            &format!("{:<12}", name(&OPERATIONS, operation)),
        );
    }
    report.number("Time elapsed:", "time_elapsed", " ms");
    report.number("Time elapsed w/o network:", "time_elapsed_net", " ms");
    if stats.kind == BOUNDED {
        report.number("Time remaining:", "time_remaining", " ms");
    }
    report.capacities("Data", "data");
    report.capacities("Memory", "memory");
    if report.get("memory_bps").is_some_and(|rate| rate > 0) {
        report.capacity("Memory bandwidth:", "memory_bps", "/s");
    }
    if report.get("memory_dirty_rate").is_some() {
        report.number("Dirty rate:", "memory_dirty_rate", " pages/s");
    }
    if report.get("memory_page_size").is_some() {
        report.number("Page size:", "memory_page_size", " bytes");
    }
    report.number("Iteration:", "memory_iteration", "");
    report.capacities("File", "disk");
    if report.get("disk_bps").is_some_and(|rate| rate > 0) {
        report.capacity("File bandwidth:", "disk_bps", "/s");
    }
    report.number("Constant pages:", "memory_constant", "");
    report.number("Normal pages:", "memory_normal", "");
    report.capacity("Normal data:", "memory_normal_bytes", "");
    let downtime = match stats.kind {
        COMPLETED => "Total downtime:",
        _ => "Expected downtime:",
    };
    report.number(downtime, "downtime", " ms");
    report.number("Setup time:", "setup_time", " ms");
    if let Some(throttle) = report.get("auto_converge_throttle") {
        report.line("Auto converge throttle:", &format!("{throttle:<13}"));
    }
    Ok(())
}

fn domjobabort(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    if args.has("postcopy") {
        let call = DomainAbortJobFlagsArgs { dom, flags: 1 };
        return shell.call(procs::DOMAIN_ABORT_JOB_FLAGS, &call);
    }
    shell.call(procs::DOMAIN_ABORT_JOB, &DomainAbortJobArgs { dom })
}

/// How often the progress is asked for.
const ASK: Duration = Duration::from_millis(500);

/// Calls what takes long. `watched`: tells how far it is meanwhile. Ctrl-C gives the job up.
///
/// # Errors
///
/// As for any call.
pub fn call<A: Encode, R: Decode>(
    shell: &mut Shell,
    watched: Option<(&str, &Domain)>,
    procedure: Procedure<A, R>,
    args: A,
) -> Result<R> {
    let Some((label, dom)) = watched else {
        return shell.call(procedure, &args);
    };
    let connection = shell.connection()?;
    connection.check_access(procedure.number())?;
    let result = connection.run(async |client: Client| {
        let work = client.call(procedure, &args);
        tokio::pin!(work);
        let interrupt = Interrupt::new();
        let mut asked = tokio::time::interval(ASK);
        let mut told = false;
        loop {
            let stopped = async {
                match &interrupt {
                    Ok(interrupt) => interrupt.wait().await,
                    Err(_) => std::future::pending().await,
                }
            };
            tokio::select! {
                result = &mut work => {
                    if result.is_ok() {
                        show(label, 100);
                    }
                    return result;
                }
                _ = stopped => {
                    let abort = DomainAbortJobArgs { dom: dom.clone() };
                    // The call itself says how it ended.
                    let _ = client.call(procs::DOMAIN_ABORT_JOB, &abort).await;
                    return work.await;
                }
                _ = asked.tick() => {
                    let info = DomainGetJobInfoArgs { dom: dom.clone() };
                    if let Ok(info) = client.call(procs::DOMAIN_GET_JOB_INFO, &info).await
                        && (info.kind == BOUNDED || info.kind == UNBOUNDED)
                    {
                        show(label, percent(info.data_processed, info.data_total));
                        if !told && let Some(why) = why_not_done(&client, dom).await {
                            told = true;
                            eprintln!("\n{why}");
                        }
                    }
                }
            }
        }
    });
    result.map_err(failure)
}

/// Asks for what [`too_slow`] tells.
async fn why_not_done(client: &Client, dom: &Domain) -> Option<String> {
    let call = DomainGetJobStatsArgs {
        dom: dom.clone(),
        flags: 0,
    };
    let stats = client.call(procs::DOMAIN_GET_JOB_STATS, &call).await.ok()?;
    let limit = DomainMigrateGetMaxDowntimeArgs {
        dom: dom.clone(),
        flags: 0,
    };
    // Other jobs than migrations end here, or have no rounds.
    let limit = client.call(procs::DOMAIN_MIGRATE_GET_MAX_DOWNTIME, &limit);
    let params: Vec<TypedParam> = stats.params.into_iter().collect();
    too_slow(&params, limit.await.ok()?.downtime)
}

/// Why a migration goes round for longer than usual, if it does.
fn too_slow(params: &[TypedParam], limit_ms: u64) -> Option<String> {
    /// From this round on.
    const ROUND: u64 = 6;
    let get = |field: &str| {
        let param = params.iter().find(|param| param.field == field)?;
        match param.value {
            TypedValue::ULLong(value) => Some(value),
            _ => None,
        }
    };
    let downtime = get("downtime")?;
    if get("memory_iteration")? < ROUND || downtime <= limit_ms {
        return None;
    }
    let written = get("memory_dirty_rate")?.saturating_mul(get("memory_page_size")?);
    let (written, unit) = pretty(written);
    let (sent, sent_unit) = pretty(get("memory_bps")?);
    Some(format!(
        "the guest writes {written:.1} {unit}/s, {sent:.1} {sent_unit}/s are sent: it would stand still for {downtime} ms, \
         and {limit_ms} ms are allowed (migrate-setmaxdowntime)"
    ))
}

fn percent(done: u64, total: u64) -> u64 {
    // The last percent is the end's.
    match total {
        0 => 0,
        _ => (u128::from(done) * 100 / u128::from(total)).min(99) as u64,
    }
}

fn show(label: &str, percent: u64) {
    eprint!("\r{label}: [{percent:3} %]");
    // Standard error that is gone is no reason to stop.
    let _ = std::io::stderr().flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_that_goes_round_says_why() {
        let of = |round, downtime| {
            let all = [
                ("memory_iteration", round),
                ("downtime", downtime),
                ("memory_dirty_rate", 2560),
                ("memory_page_size", 4096),
                ("memory_bps", 5 << 20),
            ];
            let params = all.map(|(name, value)| TypedParam::new(name, TypedValue::ULLong(value)));
            too_slow(&params, 300)
        };
        assert_eq!(
            of(6, 2000).unwrap(),
            "the guest writes 10.0 MiB/s, 5.0 MiB/s are sent: it would stand still for 2000 ms, and 300 ms are allowed \
             (migrate-setmaxdowntime)"
        );
        assert_eq!(of(6, 300), None);
        assert_eq!(of(5, 2000), None);
        assert_eq!(too_slow(&[], 300), None);
    }
}
