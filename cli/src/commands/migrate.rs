//! Migration: `migrate` and what it is tuned with.

use std::time::Duration;

use rpc::args::{
    ConnectSupportsFeatureArgs, DomainGetStateArgs, DomainMigrateBegin3ParamsArgs,
    DomainMigrateConfirm3ParamsArgs, DomainMigrateFinish3ParamsArgs,
    DomainMigrateGetCompressionCacheArgs, DomainMigrateGetMaxDowntimeArgs,
    DomainMigrateGetMaxSpeedArgs, DomainMigratePerform3ParamsArgs, DomainMigratePrepare3ParamsArgs,
    DomainMigrateSetCompressionCacheArgs, DomainMigrateSetMaxDowntimeArgs,
    DomainMigrateSetMaxSpeedArgs, DomainMigrateStartPostCopyArgs, DomainSuspendArgs,
};
use rpc::client::Client;
use rpc::procs;
use rpc::types::{Domain, TypedParam, TypedValue};

use super::domain::flags;
use super::save::job;
use super::{ANY, find_domain, read_definition};
use crate::command::{Args, Command, DOMAIN, Opt, Values, data, flag, number, text};
use crate::connection::{Connection, failure};
use crate::failure::{Failure, Result};
use crate::shell::Shell;

/// `migrate`
pub const MIGRATE: Command = Command {
    name: "migrate",
    summary: "migrate domain to another host",
    description: "Migrate domain to another host.  Add --live for live migration.",
    options: &[
        DOMAIN,
        data(
            "desturi",
            "connection URI of the destination host as seen from the client (normal migration) or source (p2p migration)",
        ),
        flag("live", "live migration"),
        flag("offline", "offline migration"),
        flag("p2p", "peer-2-peer migration"),
        flag("direct", "direct migration"),
        flag("tunnelled", "tunnelled migration"),
        flag("persistent", "persist VM on destination"),
        flag("undefinesource", "undefine VM on source"),
        flag(
            "suspend",
            "do not restart the domain on the destination host",
        ),
        flag("copy-storage-all", "migration with full disk copy"),
        flag("copy-storage-inc", "migration with incremental disk copy"),
        flag(
            "copy-storage-synchronous-writes",
            "write guest disk writes to both sides",
        ),
        flag(
            "change-protection",
            "prevent any configuration changes to domain until migration ends",
        ),
        flag("unsafe", "force migration even if it may be unsafe"),
        flag("verbose", "display the progress of migration"),
        flag("compressed", "compress memory during live migration"),
        flag("auto-converge", "force convergence during live migration"),
        flag("rdma-pin-all", "pin all memory before RDMA live migration"),
        flag("abort-on-error", "abort on soft errors during migration"),
        flag("postcopy", "enable post-copy migration"),
        flag(
            "postcopy-after-precopy",
            "switch to post-copy after one pass",
        ),
        flag("postcopy-resume", "resume failed post-copy migration"),
        flag("zerocopy", "use zero-copy for migrating memory pages"),
        text("migrateuri", "migration URI, usually can be omitted").named_only(),
        text(
            "graphicsuri",
            "graphics URI for seamless graphics migration",
        )
        .named_only(),
        text("listen-address", "listen address on the destination").named_only(),
        text("dname", "rename to new name during migration").named_only(),
        number("timeout", "act after so many seconds (suspend by default)").named_only(),
        flag("timeout-suspend", "suspend the guest after timeout"),
        flag("timeout-postcopy", "switch to post-copy after timeout"),
        text("xml", "filename containing updated XML for the target")
            .named_only()
            .values(Values::Files),
        text(
            "migrate-disks",
            "comma separated list of disks to be migrated",
        )
        .named_only(),
        number("disks-port", "port for incoming disks migration").named_only(),
        text("disks-uri", "URI to use for disks migration").named_only(),
        text(
            "comp-methods",
            "comma separated list of compression methods",
        )
        .named_only(),
        number("comp-mt-level", "level of multithread compression").named_only(),
        number("comp-mt-threads", "threads of multithread compression").named_only(),
        number("comp-mt-dthreads", "threads of multithread decompression").named_only(),
        number("comp-xbzrle-cache", "page cache size for xbzrle").named_only(),
        number("comp-zstd-level", "level of zstd compression").named_only(),
        number("auto-converge-initial", "initial CPU throttling, percent").named_only(),
        number(
            "auto-converge-increment",
            "CPU throttling increment, percent",
        )
        .named_only(),
        text(
            "persistent-xml",
            "filename containing persistent XML for the target",
        )
        .named_only()
        .values(Values::Files),
        flag("tls", "use TLS for migration"),
        number("postcopy-bandwidth", "post-copy bandwidth limit, MiB/s").named_only(),
        flag("parallel", "enable parallel migration"),
        number("parallel-connections", "number of connections").named_only(),
        number("bandwidth", "migration bandwidth limit in MiB/s").named_only(),
        text(
            "tls-destination",
            "destination host name for TLS verification",
        )
        .named_only(),
    ],
    handler: migrate,
    connects: true,
};

const POSTCOPY: Opt = flag("postcopy", "of post-copy migration");

/// `migrate-setmaxdowntime`
pub const SETMAXDOWNTIME: Command = Command {
    name: "migrate-setmaxdowntime",
    summary: "set maximum tolerable downtime",
    description: "Set maximum tolerable downtime of a domain which is being live-migrated to another host.",
    options: &[
        DOMAIN,
        number(
            "downtime",
            "maximum tolerable downtime (in milliseconds) for migration",
        )
        .required(),
    ],
    handler: set_max_downtime,
    connects: true,
};

/// `migrate-getmaxdowntime`
pub const GETMAXDOWNTIME: Command = Command {
    name: "migrate-getmaxdowntime",
    summary: "get maximum tolerable downtime",
    description: "Get maximum tolerable downtime of a domain which is being live-migrated to another host.",
    options: &[DOMAIN],
    handler: get_max_downtime,
    connects: true,
};

/// `migrate-setspeed`
pub const SETSPEED: Command = Command {
    name: "migrate-setspeed",
    summary: "Set the maximum migration bandwidth",
    description: "Set the maximum migration bandwidth (in MiB/s) for a domain which is being migrated to another host.",
    options: &[
        DOMAIN,
        number("bandwidth", "migration bandwidth limit in MiB/s").required(),
        POSTCOPY,
    ],
    handler: set_speed,
    connects: true,
};

/// `migrate-getspeed`
pub const GETSPEED: Command = Command {
    name: "migrate-getspeed",
    summary: "Get the maximum migration bandwidth",
    description: "Get the maximum migration bandwidth (in MiB/s) for a domain.",
    options: &[DOMAIN, POSTCOPY],
    handler: get_speed,
    connects: true,
};

/// `migrate-compcache`
pub const COMPCACHE: Command = Command {
    name: "migrate-compcache",
    summary: "get/set compression cache size",
    description: "Get/set size of the cache (in bytes) used for compressing repeatedly transferred memory pages during live migration. vireod has no such cache.",
    options: &[
        DOMAIN,
        number(
            "size",
            "requested size of the cache (in bytes) used for compression",
        )
        .named_only(),
    ],
    handler: compression_cache,
    connects: true,
};

/// `migrate-postcopy`
pub const POSTCOPY_NOW: Command = Command {
    name: "migrate-postcopy",
    summary: "Switch running migration from pre-copy to post-copy",
    description: "Switch running migration from pre-copy to post-copy. The migration must have been started with --postcopy option.",
    options: &[DOMAIN],
    handler: postcopy,
    connects: true,
};

/// virDomainMigrateFlags
const FLAGS: [(&str, u32); 23] = [
    ("live", 1 << 0),
    ("p2p", 1 << 1),
    ("tunnelled", 1 << 2),
    ("persistent", 1 << 3),
    ("undefinesource", 1 << 4),
    ("suspend", PAUSED),
    ("copy-storage-all", 1 << 6),
    ("copy-storage-inc", 1 << 7),
    ("change-protection", CHANGE_PROTECTION),
    ("unsafe", 1 << 9),
    ("offline", 1 << 10),
    ("compressed", 1 << 11),
    ("abort-on-error", 1 << 12),
    ("auto-converge", 1 << 13),
    ("rdma-pin-all", 1 << 14),
    ("postcopy", 1 << 15),
    ("tls", 1 << 16),
    ("parallel", 1 << 17),
    ("copy-storage-synchronous-writes", 1 << 18),
    ("postcopy-resume", 1 << 19),
    ("zerocopy", 1 << 20),
    ("postcopy-after-precopy", 1 << 15),
    ("timeout-postcopy", 1 << 15),
];
const PEER2PEER: u32 = 1 << 1;
const PAUSED: u32 = 1 << 5;
const CHANGE_PROTECTION: u32 = 1 << 8;
const OFFLINE: u32 = 1 << 10;
/// VIR_DOMAIN_PAUSED
const STATE_PAUSED: i32 = 3;
/// VIR_DRV_FEATURE_MIGRATION_PARAMS
const FEATURE_PARAMS: i32 = 13;

fn string(name: &str, value: impl Into<String>) -> TypedParam {
    TypedParam::new(name, TypedValue::String(value.into()))
}

/// The parameters that the options say.
fn params(args: &Args) -> Result<Vec<TypedParam>> {
    let mut all = Vec::new();
    for (option, name) in [
        ("migrateuri", "migrate_uri"),
        ("graphicsuri", "graphics_uri"),
        ("listen-address", "listen_address"),
        ("dname", "destination_name"),
        ("disks-uri", "disks_uri"),
        ("tls-destination", "tls.destination"),
    ] {
        if let Some(value) = args.text(option)? {
            all.push(string(name, value));
        }
    }
    for (option, name) in [
        ("xml", "destination_xml"),
        ("persistent-xml", "persistent_xml"),
    ] {
        if let Some(file) = args.text(option)? {
            all.push(string(name, read_definition(file)?));
        }
    }
    for (option, name) in [
        ("migrate-disks", "migrate_disks"),
        ("comp-methods", "compression"),
    ] {
        if let Some(list) = args.text(option)? {
            all.extend(list.split(',').map(|word| string(name, word)));
        }
    }
    for (option, name) in [
        ("disks-port", "disks_port"),
        ("comp-mt-level", "compression.mt.level"),
        ("comp-mt-threads", "compression.mt.threads"),
        ("comp-mt-dthreads", "compression.mt.dthreads"),
        ("comp-zstd-level", "compression.zstd.level"),
        ("auto-converge-initial", "auto_converge.initial"),
        ("auto-converge-increment", "auto_converge.increment"),
        ("parallel-connections", "parallel.connections"),
    ] {
        if let Some(value) = args.number::<i32>(option)? {
            all.push(TypedParam::new(name, TypedValue::Int(value)));
        }
    }
    for (option, name) in [
        ("comp-xbzrle-cache", "compression.xbzrle.cache"),
        ("postcopy-bandwidth", "bandwidth.postcopy"),
        ("bandwidth", "bandwidth"),
    ] {
        if let Some(value) = args.number::<u64>(option)? {
            all.push(TypedParam::new(name, TypedValue::ULLong(value)));
        }
    }
    Ok(all)
}

fn migrate(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("live", "offline")?;
    args.exclusive("timeout-suspend", "timeout-postcopy")?;
    args.requires("postcopy-resume", "postcopy")?;
    args.requires("timeout-postcopy", "postcopy")?;
    args.requires("persistent-xml", "persistent")?;
    args.requires("tls-destination", "tls")?;
    let timeout: Option<u64> = args.number("timeout")?;
    if timeout.is_some() && !args.has("live") {
        return Err(Failure::new(
            "migrate: Unexpected timeout for offline migration",
        ));
    }
    if timeout.is_none() && (args.has("timeout-suspend") || args.has("timeout-postcopy")) {
        return Err(Failure::new(
            "migrate: Unexpected --timeout-* option without --timeout",
        ));
    }
    let mut flags = flags(args, &FLAGS);
    let dom = find_domain(shell, args, ANY)?;
    let target = args.required("desturi")?.to_owned();
    let mut params = params(args)?;
    if flags & OFFLINE == 0 {
        let state = shell.call(
            procs::DOMAIN_GET_STATE,
            &DomainGetStateArgs {
                dom: dom.clone(),
                flags: 0,
            },
        )?;
        // Whoever is paused here is to be paused there.
        if state.state == STATE_PAUSED {
            flags |= PAUSED;
        }
    }
    let watched = Watched {
        label: args.has("verbose").then_some("Migration"),
        suspend_after: timeout.map(Duration::from_secs),
    };
    if flags & PEER2PEER != 0 {
        let perform = DomainMigratePerform3ParamsArgs {
            dom: dom.clone(),
            dconnuri: Some(target),
            params: params.into(),
            cookie_in: Vec::new().into(),
            flags,
        };
        return watched.perform(shell, &dom, perform).map(drop);
    }
    if args.has("direct") {
        return Err(Failure::new(
            "this function is not supported by the connection driver: direct migration",
        ));
    }
    let mut far = shell.other(&target)?;
    let feature = ConnectSupportsFeatureArgs {
        feature: FEATURE_PARAMS,
    };
    for connection in [&mut far, shell.connection()?] {
        let known = connection.call(procs::CONNECT_SUPPORTS_FEATURE, &feature)?;
        if known.supported == 0 {
            return Err(Failure::new(
                "argument unsupported: Migration APIs with extensible parameters are not supported by both hosts",
            ));
        }
    }
    flags |= CHANGE_PROTECTION;
    let begin = DomainMigrateBegin3ParamsArgs {
        dom: dom.clone(),
        params: params.clone().into(),
        flags,
    };
    let begun = shell.call(procs::DOMAIN_MIGRATE_BEGIN3_PARAMS, &begin)?;
    params.retain(|param| param.field != "destination_xml");
    let mut to_target = params.clone();
    to_target.push(string("destination_xml", begun.xml));
    let prepare = DomainMigratePrepare3ParamsArgs {
        params: to_target.into(),
        cookie_in: begun.cookie_out,
        flags,
    };
    let procedure = procs::DOMAIN_MIGRATE_PREPARE3_PARAMS;
    let prepared = match shell.connection()?.call_on(&far, procedure, &prepare) {
        Ok(prepared) => prepared,
        Err(error) => {
            confirm(shell, &dom, &params, flags, true)?;
            return Err(error);
        }
    };
    if let Some(uri) = prepared.uri_out {
        params.retain(|param| param.field != "migrate_uri");
        params.push(string("migrate_uri", uri));
    }
    let perform = DomainMigratePerform3ParamsArgs {
        dom: dom.clone(),
        dconnuri: None,
        params: params.clone().into(),
        cookie_in: prepared.cookie_out,
        flags,
    };
    let performed = watched.perform(shell, &dom, perform);
    let mut to_finish = params.clone();
    if !to_finish
        .iter()
        .any(|param| param.field == "destination_name")
    {
        to_finish.push(string("destination_name", dom.name.clone()));
    }
    let (cookie, failed) = match performed {
        Ok(cookie) => (cookie, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    let finish = DomainMigrateFinish3ParamsArgs {
        params: to_finish.into(),
        cookie_in: cookie.into(),
        flags,
        cancelled: i32::from(failed.is_some()),
    };
    let procedure = procs::DOMAIN_MIGRATE_FINISH3_PARAMS;
    let finished = shell.connection()?.call_on(&far, procedure, &finish);
    if let Some(error) = failed {
        confirm(shell, &dom, &params, flags, true)?;
        return Err(error);
    }
    let confirmed = confirm(shell, &dom, &params, flags, finished.is_err());
    // What went wrong first is what the user hears; what comes of it may be worth a word, too.
    match (finished, confirmed) {
        (Err(mut error), Err(later)) => {
            error.lines.extend(later.lines);
            Err(error)
        }
        (finished, confirmed) => finished.map(drop).and(confirmed),
    }
}

fn confirm(
    shell: &mut Shell,
    dom: &Domain,
    params: &[TypedParam],
    flags: u32,
    cancelled: bool,
) -> Result {
    let confirm = DomainMigrateConfirm3ParamsArgs {
        dom: dom.clone(),
        params: params.to_vec().into(),
        cookie_in: Vec::new().into(),
        flags,
        cancelled: i32::from(cancelled),
    };
    shell.call(procs::DOMAIN_MIGRATE_CONFIRM3_PARAMS, &confirm)
}

/// What is done while the guest moves.
struct Watched {
    label: Option<&'static str>,
    suspend_after: Option<Duration>,
}

impl Watched {
    fn perform(
        &self,
        shell: &mut Shell,
        dom: &Domain,
        args: DomainMigratePerform3ParamsArgs,
    ) -> Result<Vec<u8>> {
        let procedure = procs::DOMAIN_MIGRATE_PERFORM3_PARAMS;
        let Some(after) = self.suspend_after else {
            let watched = self.label.map(|label| (label, dom));
            let done = job::call(shell, watched, procedure, args)?;
            return Ok(done.cookie_out.0);
        };
        let connection: &mut Connection = shell.connection()?;
        connection.check_access(procedure.number())?;
        let done = connection.run(async |client: Client| {
            let work = client.call(procedure, &args);
            tokio::pin!(work);
            tokio::select! {
                done = &mut work => return done,
                () = tokio::time::sleep(after) => {}
            }
            let suspend = DomainSuspendArgs { dom: dom.clone() };
            // It may just have gone.
            let _ = client.call(procs::DOMAIN_SUSPEND, &suspend).await;
            work.await
        });
        Ok(done.map_err(failure)?.cookie_out.0)
    }
}

fn set_max_downtime(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let downtime: u64 = args.number("downtime")?.unwrap_or(0);
    if downtime < 1 {
        return Err(Failure::new("migrate: Invalid downtime"));
    }
    let set = DomainMigrateSetMaxDowntimeArgs {
        dom,
        downtime,
        flags: 0,
    };
    shell.call(procs::DOMAIN_MIGRATE_SET_MAX_DOWNTIME, &set)
}

fn get_max_downtime(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let get = DomainMigrateGetMaxDowntimeArgs { dom, flags: 0 };
    let got = shell.call(procs::DOMAIN_MIGRATE_GET_MAX_DOWNTIME, &get)?;
    shell.out.print(format!("{}\n", got.downtime));
    Ok(())
}

fn set_speed(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let set = DomainMigrateSetMaxSpeedArgs {
        dom,
        bandwidth: args.number("bandwidth")?.unwrap_or(0),
        flags: u32::from(args.has("postcopy")),
    };
    shell.call(procs::DOMAIN_MIGRATE_SET_MAX_SPEED, &set)
}

fn get_speed(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let get = DomainMigrateGetMaxSpeedArgs {
        dom,
        flags: u32::from(args.has("postcopy")),
    };
    let got = shell.call(procs::DOMAIN_MIGRATE_GET_MAX_SPEED, &get)?;
    shell.out.print(format!("{}\n", got.bandwidth));
    Ok(())
}

fn compression_cache(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    if let Some(size) = args.number::<u64>("size")? {
        let set = DomainMigrateSetCompressionCacheArgs {
            dom: dom.clone(),
            cache_size: size,
            flags: 0,
        };
        shell.call(procs::DOMAIN_MIGRATE_SET_COMPRESSION_CACHE, &set)?;
    }
    let get = DomainMigrateGetCompressionCacheArgs { dom, flags: 0 };
    let got = shell.call(procs::DOMAIN_MIGRATE_GET_COMPRESSION_CACHE, &get)?;
    let (value, unit) = job::pretty(got.cache_size);
    shell
        .out
        .print(format!("Compression cache: {value:.3} {unit}"));
    Ok(())
}

fn postcopy(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let start = DomainMigrateStartPostCopyArgs { dom, flags: 0 };
    shell.call(procs::DOMAIN_MIGRATE_START_POST_COPY, &start)
}
