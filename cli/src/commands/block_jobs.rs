//! Block jobs: `blockcommit`, `blockpull`, `blockcopy`, `blockjob`.

use std::io::Write;
use std::time::{Duration, Instant};

use rpc::args::{
    ConnectDomainEventCallbackRegisterAnyArgs, DomainBlockCommitArgs, DomainBlockCopyArgs,
    DomainBlockJobAbortArgs, DomainBlockJobSetSpeedArgs, DomainBlockPullArgs,
    DomainBlockRebaseArgs, DomainGetBlockJobInfoArgs,
};
use rpc::client::{Client, Event};
use rpc::procs;
use rpc::types::{Domain, TypedParam};
use xml_schemas::dom::{Element, format_element};

use super::save::job::pretty;
use super::{ANY, find_domain, read_definition};
use crate::command::{Args, Command, DOMAIN, Opt, Values, data, flag, number, text};
use crate::connection::failure;
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::signals::Interrupt;

const PATH: Opt = data("path", "fully-qualified path of disk").values(Values::Disks);
const BANDWIDTH: Opt = number("bandwidth", "bandwidth limit in MiB/s");
const BYTES: Opt = flag(
    "bytes",
    "the bandwidth limit is in bytes/s rather than MiB/s",
);
const WAIT: Opt = flag("wait", "wait for job to finish");
const VERBOSE: Opt = flag("verbose", "with --wait, display the progress");
const TIMEOUT: Opt = number(
    "timeout",
    "implies --wait, abort if it exceeds timeout (in seconds)",
)
.named_only();
const ASYNC: Opt = flag("async", "with --wait, don't wait for cancel to finish");
const RELATIVE: Opt = flag(
    "keep-relative",
    "keep the backing chain relatively referenced",
);

/// `blockcommit`
pub const BLOCKCOMMIT: Command = Command {
    name: "blockcommit",
    summary: "Start a block commit operation.",
    description: "Commit changes from a snapshot down to its backing image.",
    options: &[
        DOMAIN,
        PATH,
        BANDWIDTH,
        text(
            "base",
            "path of base file to commit into (default bottom of chain)",
        ),
        flag("shallow", "use backing file of top as base"),
        text(
            "top",
            "path of top file to commit from (default top of chain)",
        ),
        flag("active", "trigger two-stage active commit of top file"),
        flag("delete", "delete files that were successfully committed"),
        flag(
            "wait",
            "wait for job to complete (with --active, wait for job to sync)",
        ),
        VERBOSE,
        TIMEOUT,
        flag(
            "pivot",
            "implies --active --wait, pivot when commit is synced",
        ),
        flag(
            "keep-overlay",
            "implies --active --wait, quit when commit is synced",
        ),
        ASYNC,
        RELATIVE,
        BYTES,
    ],
    handler: blockcommit,
    connects: true,
};

/// `blockpull`
pub const BLOCKPULL: Command = Command {
    name: "blockpull",
    summary: "Populate a disk from its backing image.",
    description: "Populate a disk from its backing image.",
    options: &[
        DOMAIN,
        PATH,
        BANDWIDTH,
        text("base", "path of backing file in chain for a partial pull"),
        WAIT,
        VERBOSE,
        TIMEOUT,
        ASYNC,
        RELATIVE,
        BYTES,
    ],
    handler: blockpull,
    connects: true,
};

/// `blockcopy`
pub const BLOCKCOPY: Command = Command {
    name: "blockcopy",
    summary: "Start a block copy operation.",
    description: "Copy a disk backing image chain to dest.",
    options: &[
        DOMAIN,
        PATH,
        text("dest", "path of the copy to create"),
        BANDWIDTH,
        flag("shallow", "make the copy share a backing chain"),
        flag("reuse-external", "reuse existing destination"),
        flag(
            "blockdev",
            "copy destination is block device instead of regular file",
        ),
        flag("wait", "wait for job to reach mirroring phase"),
        VERBOSE,
        TIMEOUT,
        flag("pivot", "implies --wait, pivot when mirroring starts"),
        flag("finish", "implies --wait, quit when mirroring starts"),
        ASYNC,
        text(
            "xml",
            "filename containing XML description of the copy destination",
        )
        .named_only()
        .values(Values::Files),
        text("format", "format of the destination file").named_only(),
        number(
            "granularity",
            "power-of-two granularity to use during the copy",
        )
        .named_only(),
        number(
            "buf-size",
            "maximum amount of in-flight data during the copy",
        )
        .named_only(),
        BYTES,
        flag(
            "transient-job",
            "the copy job is not persisted if VM is turned off",
        ),
        flag(
            "synchronous-writes",
            "the copy job forces guest writes to be synchronously written to the destination",
        ),
        flag(
            "print-xml",
            "print the XML used to start the copy job instead of starting the job",
        ),
    ],
    handler: blockcopy,
    connects: true,
};

/// `blockjob`
pub const BLOCKJOB: Command = Command {
    name: "blockjob",
    summary: "Manage active block operations",
    description: "Query, adjust speed, or cancel active block operations.",
    options: &[
        DOMAIN,
        PATH,
        flag("abort", "abort the active job on the specified disk"),
        flag(
            "async",
            "implies --abort; request but don't wait for job end",
        ),
        flag(
            "pivot",
            "implies --abort; conclude and pivot a copy or commit job",
        ),
        flag("info", "get active job information for the specified disk"),
        flag("bytes", "get/set bandwidth in bytes rather than MiB/s"),
        flag(
            "raw",
            "implies --info; output details rather than human summary",
        ),
        BANDWIDTH,
    ],
    handler: blockjob,
    connects: true,
};

/// virDomainBlockJobAbortFlags
const ABORT_ASYNC: u32 = 1;
const ABORT_PIVOT: u32 = 2;

/// virDomainBlockJobType
const KINDS: [&str; 6] = [
    "Unknown job",
    "Block Pull",
    "Block Copy",
    "Block Commit",
    "Active Block Commit",
    "Backup",
];

fn kind_name(kind: i32) -> &'static str {
    let known = usize::try_from(kind).ok().and_then(|at| KINDS.get(at));
    known.copied().unwrap_or(KINDS[0])
}

/// How a job ended, or stands (virConnectDomainEventBlockJobStatus).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    Completed,
    Failed,
    Cancelled,
    Ready,
}

impl Stand {
    fn of(status: i32) -> Option<Self> {
        Some(match status {
            0 => Self::Completed,
            1 => Self::Failed,
            2 => Self::Cancelled,
            3 => Self::Ready,
            _ => return None,
        })
    }
}

/// A job that is waited for.
struct Waiting {
    dom: Domain,
    path: String,
    label: Option<&'static str>,
    timeout: Option<Duration>,
    abort_flags: u32,
}

/// How often a job is asked about.
const ASK: Duration = Duration::from_millis(200);
/// VIR_DOMAIN_EVENT_ID_BLOCK_JOB
const EVENT: i32 = 8;

impl Waiting {
    fn new(args: &Args, dom: &Domain, path: &str, label: &'static str) -> Result<Self> {
        let timeout = match args.number::<i32>("timeout")? {
            Some(seconds @ 1..) => Some(Duration::from_secs(seconds.unsigned_abs().into())),
            None => None,
            Some(seconds) => {
                return Err(Failure::new(format!(
                    "Numeric value '{seconds}' for <timeout> option is malformed or out of range"
                )));
            }
        };
        Ok(Self {
            dom: dom.clone(),
            path: path.to_owned(),
            label: args.has("verbose").then_some(label),
            timeout,
            abort_flags: if args.has("async") { ABORT_ASYNC } else { 0 },
        })
    }

    /// Registers for the job's news, before it begins: where that is not possible the job's progress
    /// has to do.
    fn register(&self, shell: &mut Shell) -> Result {
        let asked = ConnectDomainEventCallbackRegisterAnyArgs {
            event_id: EVENT,
            dom: Some(self.dom.clone()),
        };
        match shell.call(procs::CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY, &asked) {
            Err(failure) if failure.disconnected => Err(failure),
            _ => Ok(()),
        }
    }

    /// Waits until it has ended, or is ready.
    fn run(&self, shell: &mut Shell) -> Result<Stand> {
        shell.out.flush();
        let connection = shell.connection()?;
        connection.run(async |client: Client| self.watch(&client).await)
    }

    fn show(&self, percent: u64) {
        if let Some(label) = self.label {
            eprint!("\r{label}: [{percent:3} %]");
            // Standard error that is gone is no reason to stop.
            let _ = std::io::stderr().flush();
        }
    }

    fn heard(&self, event: &Event) -> Option<Stand> {
        let told = event
            .get(procs::DOMAIN_EVENT_CALLBACK_BLOCK_JOB)
            .transpose()
            .ok()
            .flatten()?;
        let ours = told.msg.dom.uuid == self.dom.uuid;
        Stand::of(told.msg.status).filter(|_| ours)
    }

    async fn watch(&self, client: &Client) -> Result<Stand> {
        let mut events = client.take_events();
        let interrupt = Interrupt::new();
        let mut asked = tokio::time::interval(ASK);
        let deadline = self.timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let stopped = async {
                match &interrupt {
                    Ok(interrupt) => drop(interrupt.wait().await),
                    Err(_) => std::future::pending().await,
                }
            };
            let event = async {
                match &mut events {
                    Some(events) => events.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                event = event => {
                    let Some(event) = event else {
                        events = None;
                        continue;
                    };
                    if let Some(stand) = self.heard(&event) {
                        if matches!(stand, Stand::Completed | Stand::Ready) {
                            self.show(100);
                        }
                        return Ok(stand);
                    }
                }
                () = stopped => return self.abort(client).await,
                _ = asked.tick() => {
                    if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                        return self.abort(client).await;
                    }
                    let info = DomainGetBlockJobInfoArgs {
                        dom: self.dom.clone(),
                        path: self.path.clone(),
                        flags: 0,
                    };
                    let call = client.call(procs::DOMAIN_GET_BLOCK_JOB_INFO, &info);
                    let info = call.await.map_err(failure)?;
                    if info.found == 0 {
                        // An event on its way says more than that.
                        let last = match &mut events {
                            Some(events) => tokio::time::timeout(ASK, events.recv()).await,
                            None => Ok(None),
                        };
                        let heard = last.ok().flatten().and_then(|event| self.heard(&event));
                        self.show(100);
                        return Ok(heard.unwrap_or(Stand::Completed));
                    }
                    if info.cur == info.end {
                        self.show(100);
                        return Ok(Stand::Ready);
                    }
                    let percent = u128::from(info.cur) * 100 / u128::from(info.end.max(1));
                    self.show(u64::try_from(percent.min(99)).unwrap_or(99));
                }
            }
        }
    }

    async fn abort(&self, client: &Client) -> Result<Stand> {
        let abort = DomainBlockJobAbortArgs {
            dom: self.dom.clone(),
            path: self.path.clone(),
            flags: self.abort_flags,
        };
        let call = client.call(procs::DOMAIN_BLOCK_JOB_ABORT, &abort);
        call.await.map_err(failure)?;
        Ok(Stand::Cancelled)
    }
}

fn refuse(what: &str, shell: &mut Shell) -> Failure {
    shell.out.print_extra(format!("\n{what}"));
    Failure::silent()
}

fn abort(shell: &mut Shell, dom: &Domain, path: &str, flags: u32) -> Result {
    let args = DomainBlockJobAbortArgs {
        dom: dom.clone(),
        path: path.to_owned(),
        flags,
    };
    shell.call(procs::DOMAIN_BLOCK_JOB_ABORT, &args)
}

fn bandwidth(args: &Args) -> Result<u64> {
    Ok(args.number("bandwidth")?.unwrap_or(0))
}

fn blockcommit(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("pivot", "keep-overlay")?;
    let (pivot, finish) = (args.has("pivot"), args.has("keep-overlay"));
    let active = args.has("active") || pivot || finish;
    let waits = waits(args) || pivot || finish;
    let flags = [
        (1, args.has("shallow")),
        (2, args.has("delete")),
        (4, active),
        (8, args.has("keep-relative")),
        (16, args.has("bytes")),
    ];
    let path = args.required("path")?.to_owned();
    let dom = find_domain(shell, args, ANY)?;
    let waiting = Waiting::new(args, &dom, &path, "Block commit")?;
    if waits {
        waiting.register(shell)?;
    }
    let call = DomainBlockCommitArgs {
        dom: dom.clone(),
        disk: path.clone(),
        base: args.text("base")?.map(str::to_owned),
        top: args.text("top")?.map(str::to_owned),
        bandwidth: bandwidth(args)?,
        flags: sum(&flags),
    };
    shell.call(procs::DOMAIN_BLOCK_COMMIT, &call)?;
    if !waits {
        let what = if active {
            "Active Block Commit"
        } else {
            "Block Commit"
        };
        shell.out.print_extra(format!("{what} started"));
        return Ok(());
    }
    match waiting.run(shell)? {
        Stand::Cancelled => return Err(refuse("Commit aborted", shell)),
        Stand::Failed => return Err(refuse("Commit failed", shell)),
        Stand::Completed | Stand::Ready => {}
    }
    if pivot {
        abort(shell, &dom, &path, ABORT_PIVOT)
            .with_context(|| format!("failed to pivot job for disk {path}"))?;
        shell.out.print_extra("\nSuccessfully pivoted");
    } else if finish {
        abort(shell, &dom, &path, 0)
            .with_context(|| format!("failed to finish job for disk {path}"))?;
        shell
            .out
            .print_extra("\nCommit complete, overlay image kept");
    } else if active {
        shell.out.print_extra("\nNow in synchronized phase");
    } else {
        shell.out.print_extra("\nCommit complete");
    }
    Ok(())
}

/// Whether a command waits for its job.
fn waits(args: &Args) -> bool {
    args.has("wait") || args.has("timeout")
}

fn sum(flags: &[(u32, bool)]) -> u32 {
    let set = flags.iter().filter(|flag| flag.1);
    set.fold(0, |sum, flag| sum | flag.0)
}

fn blockpull(shell: &mut Shell, args: &Args) -> Result {
    let path = args.required("path")?.to_owned();
    let dom = find_domain(shell, args, ANY)?;
    let waiting = Waiting::new(args, &dom, &path, "Block Pull")?;
    if waits(args) {
        waiting.register(shell)?;
    }
    let base = args.text("base")?.map(str::to_owned);
    let flags = sum(&[(16, args.has("keep-relative")), (64, args.has("bytes"))]);
    let bandwidth = bandwidth(args)?;
    // An older daemon knows the simpler call only.
    if base.is_some() || flags != 0 {
        let call = DomainBlockRebaseArgs {
            dom: dom.clone(),
            path: path.clone(),
            base,
            bandwidth,
            flags,
        };
        shell.call(procs::DOMAIN_BLOCK_REBASE, &call)?;
    } else {
        let call = DomainBlockPullArgs {
            dom: dom.clone(),
            path: path.clone(),
            bandwidth,
            flags: 0,
        };
        shell.call(procs::DOMAIN_BLOCK_PULL, &call)?;
    }
    if !waits(args) {
        shell.out.print_extra("Block Pull started");
        return Ok(());
    }
    match waiting.run(shell)? {
        Stand::Cancelled => Err(refuse("Pull aborted", shell)),
        Stand::Failed => Err(refuse("Pull failed", shell)),
        Stand::Completed | Stand::Ready => {
            shell.out.print_extra("\nPull complete");
            Ok(())
        }
    }
}

/// What a copy is written to, as libvirt's XML has it.
fn copy_target(args: &Args) -> Result<String> {
    let (dest, xml) = (args.text("dest")?, args.text("xml")?);
    if let Some(file) = xml {
        return read_definition(file);
    }
    let dest = dest.ok_or_else(|| Failure::new("need either --dest or --xml"))?;
    let (kind, attribute) = match args.has("blockdev") {
        true => ("block", "dev"),
        false => ("file", "file"),
    };
    let mut disk = Element::new("disk").with_attr("type", kind);
    disk.push(Element::new("source").with_attr(attribute, dest));
    if let Some(format) = args.text("format")? {
        disk.push(Element::new("driver").with_attr("type", format));
    }
    let mut xml = String::new();
    format_element(&mut xml, &disk, 0);
    Ok(xml)
}

/// The values that a copy keeps to.
fn copy_params(args: &Args, bandwidth: u64) -> Result<Vec<TypedParam>> {
    let mut params = Vec::new();
    if bandwidth > 0 {
        let unit = if args.has("bytes") { 1 } else { 1 << 20 };
        let bytes = bandwidth.checked_mul(unit).ok_or_else(|| {
            Failure::new(format!("bandwidth must be less than {}", u64::MAX / unit))
        })?;
        params.push(TypedParam::new("bandwidth", bytes));
    }
    if let Some(granularity) = args.number::<u32>("granularity")? {
        params.push(TypedParam::new("granularity", granularity));
    }
    if let Some(size) = args.number::<u64>("buf-size")? {
        params.push(TypedParam::new("buf-size", size));
    }
    Ok(params)
}

/// A copy that virDomainBlockRebase has words for: where to, and its flags.
fn simple_copy(args: &Args) -> Result<Option<(String, u32)>> {
    let format = args.text("format")?;
    let beyond = ["granularity", "buf-size", "xml"];
    let beyond = beyond
        .iter()
        .any(|name| args.text(name).is_ok_and(|value| value.is_some()));
    let flagged = args.has("transient-job") || args.has("synchronous-writes");
    let Some(dest) = args.text("dest")?.filter(|_| !beyond && !flagged) else {
        return Ok(None);
    };
    if format.is_some_and(|format| format != "raw") {
        return Ok(None);
    }
    let flags = sum(&[
        (1, args.has("shallow")),
        (2, args.has("reuse-external")),
        (4, format.is_some()),
        (8, true),
        (32, args.has("blockdev")),
        (64, args.has("bytes")),
    ]);
    Ok(Some((dest.to_owned(), flags)))
}

fn blockcopy(shell: &mut Shell, args: &Args) -> Result {
    for (one, other) in [
        ("dest", "xml"),
        ("format", "xml"),
        ("blockdev", "xml"),
        ("pivot", "finish"),
    ] {
        args.exclusive(one, other)?;
    }
    let waits = waits(args) || args.has("pivot") || args.has("finish");
    let path = args.required("path")?.to_owned();
    let destxml = copy_target(args)?;
    let bandwidth = bandwidth(args)?;
    let flags = sum(&[
        (1, args.has("shallow")),
        (2, args.has("reuse-external")),
        (4, args.has("transient-job")),
        (8, args.has("synchronous-writes")),
    ]);
    let dom = find_domain(shell, args, ANY)?;
    if args.has("print-xml") {
        shell.out.print(destxml);
        return Ok(());
    }
    let waiting = Waiting::new(args, &dom, &path, "Block Copy")?;
    if waits {
        waiting.register(shell)?;
    }
    match simple_copy(args)? {
        // An older daemon knows the simpler call only.
        Some((dest, flags)) => {
            let call = DomainBlockRebaseArgs {
                dom: dom.clone(),
                path: path.clone(),
                base: Some(dest),
                bandwidth,
                flags,
            };
            shell.call(procs::DOMAIN_BLOCK_REBASE, &call)?;
        }
        None => {
            let call = DomainBlockCopyArgs {
                dom: dom.clone(),
                path: path.clone(),
                destxml,
                params: copy_params(args, bandwidth)?.into(),
                flags,
            };
            shell.call(procs::DOMAIN_BLOCK_COPY, &call)?;
        }
    }
    if !waits {
        shell.out.print_extra("Block Copy started");
        return Ok(());
    }
    match waiting.run(shell)? {
        Stand::Cancelled => return Err(refuse("Copy aborted", shell)),
        Stand::Failed => return Err(refuse("Copy failed", shell)),
        Stand::Completed | Stand::Ready => {}
    }
    if args.has("pivot") {
        abort(shell, &dom, &path, ABORT_PIVOT)
            .with_context(|| format!("failed to pivot job for disk {path}"))?;
        shell.out.print_extra("\nSuccessfully pivoted");
    } else if args.has("finish") {
        abort(shell, &dom, &path, 0)
            .with_context(|| format!("failed to finish job for disk {path}"))?;
        shell.out.print_extra("\nSuccessfully copied");
    } else {
        shell.out.print_extra("\nNow in mirroring phase");
    }
    Ok(())
}

fn blockjob(shell: &mut Shell, args: &Args) -> Result {
    let raw = args.has("raw");
    let aborts = args.has("abort") || args.has("async") || args.has("pivot");
    let speed = args.text("bandwidth")?.is_some();
    for look in ["info", "raw", "bandwidth"] {
        for end in ["abort", "async", "pivot"] {
            args.exclusive(look, end)?;
        }
    }
    args.exclusive("info", "bandwidth")?;
    args.exclusive("raw", "bandwidth")?;
    args.exclusive("abort", "bytes")?;
    let path = args.required("path")?.to_owned();
    let dom = find_domain(shell, args, ANY)?;
    let bytes = args.has("bytes");
    if speed {
        let call = DomainBlockJobSetSpeedArgs {
            dom,
            path,
            bandwidth: bandwidth(args)?,
            flags: u32::from(bytes),
        };
        return shell.call(procs::DOMAIN_BLOCK_JOB_SET_SPEED, &call);
    }
    if aborts {
        let flags = [
            (ABORT_ASYNC, args.has("async")),
            (ABORT_PIVOT, args.has("pivot")),
        ];
        return abort(shell, &dom, &path, sum(&flags));
    }
    let in_bytes = bytes || !raw;
    let call = DomainGetBlockJobInfoArgs {
        dom,
        path: path.clone(),
        flags: u32::from(in_bytes),
    };
    let info = shell.call(procs::DOMAIN_GET_BLOCK_JOB_INFO, &call)?;
    if info.found == 0 {
        if !raw {
            let none = format!("No current block job for {path}");
            shell.out.print_extra(none);
        }
        return Ok(());
    }
    let kind = kind_name(info.kind);
    if raw {
        shell.out.print(format!(
            " type={kind}\n bandwidth={}\n cur={}\n end={}\n",
            info.bandwidth, info.cur, info.end
        ));
        return Ok(());
    }
    let percent = match info.end {
        _ if info.cur == info.end => 100,
        end => (u128::from(info.cur) * 100 / u128::from(end.max(1))).min(99),
    };
    eprint!("\r{kind}: [{percent:3} %]");
    if info.bandwidth > 0 {
        let (value, unit) = pretty(info.bandwidth);
        shell.out.print(format!(
            "    Bandwidth limit: {} bytes/s ({value:.3} {unit}/s)",
            info.bandwidth
        ));
    }
    shell.out.print("\n");
    Ok(())
}
