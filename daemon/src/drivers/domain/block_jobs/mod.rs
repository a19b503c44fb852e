//! Block jobs: `blockcommit`, `blockpull`, `blockcopy`, `blockjob`. The VMM moves the content, and changes the
//! images' headers at the end; what the definitions say follows.
//!
//! A merge of the image on top leaves that image empty, so that it reads as the one behind it for
//! good: until the definitions name that one, either name is right.

pub mod chain;
mod copy;
mod end;
mod merge;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use vmm_api::control::{
    Answer, BlockJob, BlockJobKind, BlockJobNews, BlockJobStatus, Call, DiskImages,
};
use xml_schemas::dom::Element;

use self::chain::Link;
pub use self::copy::Limits as CopyLimits;
use super::Driver;
use super::devices::open_writable;
use super::job::not_begun;
use super::lifecycle::ask;
use super::machine::Names;
use super::object::{Domain, Pinned};
use super::tuning::find_disk;
use crate::error::{Error, ErrorCode, Result, check_flags};

/// How long the end of a job may take.
const END_LIMIT: Duration = Duration::from_secs(600);
/// How long a VMM may take to begin one.
const BEGIN_LIMIT: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;

/// virDomainBlockCommitFlags
mod commit_flags {
    pub const SHALLOW: u32 = 1;
    pub const DELETE: u32 = 2;
    pub const ACTIVE: u32 = 4;
    pub const RELATIVE: u32 = 8;
    pub const BANDWIDTH_BYTES: u32 = 16;
}

/// virDomainBlockRebaseFlags; a pull knows the last two only.
mod rebase_flags {
    pub const SHALLOW: u32 = 1;
    pub const REUSE_EXT: u32 = 2;
    pub const COPY_RAW: u32 = 4;
    pub const COPY: u32 = 8;
    pub const COPY_DEV: u32 = 32;
    pub const RELATIVE: u32 = 16;
    pub const BANDWIDTH_BYTES: u32 = 64;
}

/// virDomainBlockJobAbortFlags
mod abort_flags {
    pub const ASYNC: u32 = 1;
    pub const PIVOT: u32 = 2;
}

/// virDomainBlockJobType
pub fn kind_number(kind: BlockJobKind) -> i32 {
    match kind {
        BlockJobKind::Pull => 1,
        BlockJobKind::Copy => 2,
        BlockJobKind::Commit => 3,
        BlockJobKind::ActiveCommit => 4,
    }
}

/// What is remembered of a disk's job while this daemon lives.
#[derive(Debug)]
pub struct Pending {
    /// The disk's id.
    disk: String,
    /// What it does.
    kind: BlockJobKind,
    /// Files that go when it has ended well.
    delete: Vec<PathBuf>,
    /// Who works with it, instead of leaving its end to us.
    owner: Option<oneshot::Sender<BlockJobNews>>,
    /// Told when it is ready.
    ready: Option<oneshot::Sender<()>>,
    /// Who waits for its end.
    waiting: Vec<oneshot::Sender<BlockJobNews>>,
}

/// What is told of a job.
#[derive(Debug, Clone, Copy)]
pub struct Info {
    /// virDomainBlockJobType
    pub kind: i32,
    /// Bytes a second, or MiB.
    pub bandwidth: u64,
    /// Done.
    pub cur: u64,
    /// To do.
    pub end: u64,
}

/// Why there is no job, or why it came to nothing.
#[derive(Debug)]
pub struct Failure {
    /// For the caller.
    pub error: Error,
    /// It may have begun: images may have changed.
    pub begun: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            error,
            begun: false,
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        failure.error
    }
}

/// A disk of a running domain.
#[derive(Debug, Clone)]
struct Known {
    id: String,
    target: String,
    links: Vec<Link>,
    direct: bool,
}

/// What to begin.
#[derive(Debug)]
struct Order {
    job: BlockJob,
    speed: u64,
    /// The image to be written, and the one above it, where they are opened anew.
    files: Vec<String>,
    /// What is open already, and what people call it.
    opened: Vec<OwnedFd>,
    names: Names,
    /// What the definition says of it while it is being written.
    mirror: Option<Element>,
    delete: Vec<PathBuf>,
    owner: Option<(oneshot::Sender<BlockJobNews>, oneshot::Sender<()>)>,
}

impl Default for Order {
    /// All of a disk is pulled.
    fn default() -> Self {
        Self {
            job: BlockJob::Pull {
                base: None,
                name: None,
            },
            speed: 0,
            files: Vec::new(),
            opened: Vec::new(),
            names: Names::default(),
            mirror: None,
            delete: Vec::new(),
            owner: None,
        }
    }
}

fn disk_of(domain: &Domain, path: &str) -> Result<Known> {
    let inner = domain.lock();
    let definition = &inner.live()?.definition;
    let words = format!("disk '{path}' not found in domain");
    let disk = find_disk(definition, path, &words)?;
    if disk.is_empty_drive() {
        let words = format!("disk {} has no source file", disk.target);
        return Err(Error::new(ErrorCode::INVALID_ARG, words));
    }
    let links = chain::links(definition, &disk.target);
    let cache = disk.cache.as_deref();
    Ok(Known {
        id: super::tuning::id(disk.alias.as_ref())?,
        links,
        direct: matches!(cache, Some("none" | "directsync")),
        target: disk.target,
    })
}

/// How the image at `above` names the one at `path` from now on.
fn called(above: &str, path: &str, relative: bool) -> Result<String> {
    if !relative {
        return Ok(path.to_owned());
    }
    let (above, path) = (Path::new(above), Path::new(path));
    match path.file_name().filter(|_| above.parent() == path.parent()) {
        Some(name) => Ok(name.to_string_lossy().into_owned()),
        None => Err(Error::new(
            ErrorCode::CONFIG_UNSUPPORTED,
            "can't keep relative backing relationship",
        )),
    }
}

/// Bytes a second.
fn speed(bandwidth: u64, bytes: bool) -> Result<u64> {
    if bytes {
        return Ok(bandwidth);
    }
    const MOST: u64 = i64::MAX as u64 / MIB;
    let within = bandwidth.checked_mul(MIB).filter(|_| bandwidth <= MOST);
    within.ok_or_else(|| {
        Error::new(
            ErrorCode::OVERFLOW,
            format!("bandwidth must be less than {MOST}"),
        )
    })
}

async fn images_of(domain: &Domain, disk: &str) -> Result<DiskImages> {
    match ask(domain, Call::Disks).await? {
        Answer::Disks(all) => all
            .into_iter()
            .find(|one| one.id == disk)
            .ok_or_else(|| Error::internal("the disk is gone")),
        other => Err(Error::internal(format!("the VMM answered {other:?}"))),
    }
}

/// An image that a block job works with is left alone.
///
/// # Errors
/// It has a job.
pub async fn disk_without_block_job(domain: &Domain, id: &str) -> Result<()> {
    let Some(job) = images_of(domain, id).await?.job else {
        return Ok(());
    };
    let target = chain::target_of(&domain.lock().live()?.definition, id);
    Err(busy(target.as_deref().unwrap_or(id), job.kind))
}

/// libvirt's words for a disk that has a job: a mirror is another matter to it.
fn busy(target: &str, kind: BlockJobKind) -> Error {
    let code = match kind {
        BlockJobKind::ActiveCommit | BlockJobKind::Copy => ErrorCode::BLOCK_COPY_ACTIVE,
        _ => ErrorCode::OPERATION_UNSUPPORTED,
    };
    Error::new(code, format!("disk '{target}' already in active block job"))
}

/// The same of all disks, in the words for one.
///
/// # Errors
/// A disk of the running domain has a job.
pub async fn disks_without_block_job(domain: &Domain) -> Result<()> {
    let ids: Vec<String> = match ask(domain, Call::Disks).await? {
        Answer::Disks(all) => all.into_iter().map(|disk| disk.id).collect(),
        other => return Err(Error::internal(format!("the VMM answered {other:?}"))),
    };
    for id in ids {
        disk_without_block_job(domain, &id).await?;
    }
    Ok(())
}

/// Images that a block job works with are left alone.
///
/// # Errors
/// A disk of the running domain has a job.
pub async fn without_block_job(domain: &Domain) -> Result<()> {
    match ask(domain, Call::Disks).await? {
        Answer::Disks(all) if all.iter().all(|disk| disk.job.is_none()) => Ok(()),
        Answer::Disks(_) => Err(Error::invalid("domain has active block job")),
        other => Err(Error::internal(format!("the VMM answered {other:?}"))),
    }
}

fn no_job(target: &str) -> Error {
    Error::new(
        ErrorCode::INVALID_ARG,
        format!("disk {target} does not have an active block job"),
    )
}

impl Driver {
    /// Merges images of a disk into one behind them.
    ///
    /// # Errors
    /// They are not there, or it is not possible; the VMM's refusal.
    pub async fn block_commit(
        self: &Arc<Self>,
        domain: Pinned,
        path: &str,
        base: Option<&str>,
        top: Option<&str>,
        bandwidth: u64,
        flags: u32,
    ) -> Result<()> {
        use commit_flags::{ACTIVE, BANDWIDTH_BYTES, DELETE, RELATIVE, SHALLOW};
        let known = SHALLOW | DELETE | ACTIVE | RELATIVE | BANDWIDTH_BYTES;
        check_flags(flags, known, "qemuDomainBlockCommit")?;
        let _job = domain.job().await?;
        let speed = speed(bandwidth, flags & BANDWIDTH_BYTES != 0)?;
        let disk = disk_of(&domain, path)?;
        let links = &disk.links;
        let top = match top {
            Some(top) => chain::find(links, &disk.target, top, None)?,
            None => 0,
        };
        let invalid = |words: String| Error::new(ErrorCode::INVALID_ARG, words);
        let name = |at: usize| links.get(at).map_or("", |link| link.path.as_str());
        if top == 0 && flags & ACTIVE == 0 {
            return Err(invalid(format!(
                "commit of '{}' active layer requires active flag",
                disk.target
            )));
        }
        if top > 0 && flags & ACTIVE != 0 {
            return Err(invalid(format!(
                "active commit requested but '{}' is not active",
                name(top)
            )));
        }
        if top + 1 >= links.len() {
            return Err(invalid(format!(
                "top '{}' in chain for '{path}' has no backing file",
                name(top)
            )));
        }
        let base = match base {
            Some(base) => chain::find(links, &disk.target, base, Some(top))?,
            None if flags & SHALLOW != 0 => top + 1,
            None => links.len() - 1,
        };
        if flags & SHALLOW != 0 && base != top + 1 {
            return Err(invalid(format!(
                "base '{}' is not immediately below '{}' in chain for '{path}'",
                name(base),
                name(top)
            )));
        }
        let mut order = Order::commit(&disk, top, base, flags & RELATIVE != 0)?;
        order.speed = speed;
        if flags & DELETE != 0 {
            let gone = links.get(top..base).unwrap_or_default();
            order.delete = gone.iter().map(|link| link.path.clone().into()).collect();
        }
        Ok(self.begin_block_job(&domain, &disk, order).await?)
    }

    /// Moves what is behind a disk's image into it, down to `base`.
    ///
    /// # Errors
    /// As [`Driver::block_commit`].
    pub async fn block_pull(
        self: &Arc<Self>,
        domain: Pinned,
        path: &str,
        base: Option<&str>,
        bandwidth: u64,
        flags: u32,
    ) -> Result<()> {
        use rebase_flags::{
            BANDWIDTH_BYTES, COPY, COPY_DEV, COPY_RAW, RELATIVE, REUSE_EXT, SHALLOW,
        };
        let known = SHALLOW | REUSE_EXT | COPY_RAW | COPY | RELATIVE | COPY_DEV | BANDWIDTH_BYTES;
        check_flags(flags, known, "qemuDomainBlockRebase")?;
        if flags & COPY != 0 {
            return self
                .block_rebase_copy(domain, path, base, bandwidth, flags)
                .await;
        }
        check_flags(flags, BANDWIDTH_BYTES | RELATIVE, "qemuDomainBlockPull")?;
        let _job = domain.job().await?;
        let speed = speed(bandwidth, flags & BANDWIDTH_BYTES != 0)?;
        let disk = disk_of(&domain, path)?;
        if flags & RELATIVE != 0 && base.is_none() {
            return Err(Error::new(
                ErrorCode::INVALID_ARG,
                "flag VIR_DOMAIN_BLOCK_REBASE_RELATIVE is valid only with non-null base",
            ));
        }
        let base = match base {
            Some(base) => Some(chain::find(&disk.links, &disk.target, base, Some(0))?),
            None => None,
        };
        let link = base.and_then(|base| disk.links.get(base));
        let top = disk.links.first().map_or("", |link| &link.path);
        let name = link.map(|link| called(top, &link.path, flags & RELATIVE != 0));
        let order = Order {
            job: BlockJob::Pull {
                base: base.map(number),
                name: name.transpose()?,
            },
            speed,
            ..Order::default()
        };
        Ok(self.begin_block_job(&domain, &disk, order).await?)
    }

    /// How a disk's job stands.
    ///
    /// # Errors
    /// There is no such disk; the domain is off.
    pub async fn block_job_info(
        &self,
        domain: &Domain,
        path: &str,
        flags: u32,
    ) -> Result<Option<Info>> {
        /// VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES
        const BYTES: u32 = 1;
        check_flags(flags, BYTES, "qemuDomainGetBlockJobInfo")?;
        let disk = disk_of(domain, path)?;
        let Some(status) = images_of(domain, &disk.id).await?.job else {
            return Ok(None);
        };
        let (cur, end) = told(&status);
        Ok(Some(Info {
            kind: kind_number(status.kind),
            bandwidth: match flags & BYTES {
                0 => status.speed.div_ceil(MIB),
                _ => status.speed,
            },
            cur,
            end,
        }))
    }

    /// Changes the speed of a disk's job.
    ///
    /// # Errors
    /// There is none; the VMM's refusal.
    pub async fn block_job_speed(
        &self,
        domain: Pinned,
        path: &str,
        bandwidth: u64,
        flags: u32,
    ) -> Result<()> {
        /// VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES
        const BYTES: u32 = 1;
        check_flags(flags, BYTES, "qemuDomainBlockJobSetSpeed")?;
        let speed = speed(bandwidth, flags & BYTES != 0)?;
        let _job = domain.job().await?;
        let disk = disk_of(&domain, path)?;
        if images_of(&domain, &disk.id).await?.job.is_none() {
            return Err(no_job(&disk.target));
        }
        let call = Call::SetBlockJobSpeed {
            disk: disk.id,
            speed,
        };
        ask(&domain, call).await.map(drop)
    }

    /// Gives a disk's job up, or has the disk go on with the image that was merged into.
    ///
    /// # Errors
    /// There is none; it is not ready for that; what it ended with.
    pub async fn block_job_abort(
        self: &Arc<Self>,
        domain: Pinned,
        path: &str,
        flags: u32,
    ) -> Result<()> {
        use abort_flags::{ASYNC, PIVOT};
        check_flags(flags, ASYNC | PIVOT, "qemuDomainBlockJobAbort")?;
        let pivot = flags & PIVOT != 0;
        let ended = {
            let _job = domain.job().await?;
            let disk = disk_of(&domain, path)?;
            let Some(status) = images_of(&domain, &disk.id).await?.job else {
                return Err(no_job(&disk.target));
            };
            if pivot {
                can_pivot(&disk, &status)?;
            }
            let ended = wait_for(&domain, &disk.id, status.kind)?;
            let call = Call::EndBlockJob {
                disk: disk.id,
                pivot,
            };
            ask(&domain, call).await?;
            ended
        };
        if flags & ASYNC != 0 {
            return Ok(());
        }
        let news = match tokio::time::timeout(END_LIMIT, ended).await {
            Ok(Ok(news)) => news,
            Ok(Err(_)) => return Err(Error::failed("domain is no longer running")),
            Err(_) => {
                return Err(Error::new(
                    ErrorCode::OPERATION_TIMEOUT,
                    "the block job does not end",
                ));
            }
        };
        match news {
            BlockJobNews::Failed(why) => Err(Error::failed(format!("block job failed: {why}"))),
            _ => Ok(()),
        }
    }

    async fn begin_block_job(
        self: &Arc<Self>,
        domain: &Pinned,
        disk: &Known,
        order: Order,
    ) -> std::result::Result<(), Failure> {
        let now = images_of(domain, &disk.id).await?;
        if let Some(job) = &now.job {
            return Err(busy(&disk.target, job.kind).into());
        }
        let listed: Vec<&str> = disk.links.iter().map(|link| link.path.as_str()).collect();
        if now.images != listed {
            let words = format!(
                "disk '{}' has the images {:?}, and not those of its definition",
                disk.target, now.images
            );
            return Err(Error::internal(words).into());
        }
        let (files, direct) = (order.files.clone(), disk.direct);
        let mut opened = order.opened;
        if !files.is_empty() {
            let more = super::blocking(move || {
                let files = files.iter();
                files
                    .map(|file| open_writable(Path::new(file), direct).map(Into::into))
                    .collect::<Result<Vec<_>>>()
            });
            opened.extend(more.await??);
        }
        let control = domain.lock().live()?.control.clone();
        let mirror = match &order.job {
            BlockJob::Commit { top: 0, base, .. } => {
                disk.links.get(*base as usize).map(mirror_element)
            }
            _ => order.mirror,
        };
        {
            // Known before its first news can come.
            let mut inner = domain.lock();
            let live = inner.live_mut()?;
            let (owner, ready) = order
                .owner
                .map_or((None, None), |(o, r)| (Some(o), Some(r)));
            live.block_jobs.retain(|job| job.disk != disk.id);
            live.block_jobs.push(Pending {
                disk: disk.id.clone(),
                kind: kind_of(&order.job),
                delete: order.delete,
                owner,
                ready,
                waiting: Vec::new(),
            });
            if let Some(mirror) = mirror {
                let definition = Arc::make_mut(&mut live.definition);
                if let Some(element) = chain::disk_mut(definition, &disk.target) {
                    copy::put_mirror(element, mirror);
                }
            }
        }
        self.write_live(domain).await;
        let call = Call::StartBlockJob {
            disk: disk.id.clone(),
            job: order.job,
            speed: order.speed,
        };
        let answer = match control.send_with(call, opened) {
            Ok(answer) => match tokio::time::timeout(BEGIN_LIMIT, answer).await {
                Ok(Ok(Ok(_))) => Ok(()),
                Ok(Ok(Err(refused))) => {
                    Err(Error::failed(order.names.explain(&refused.message)).into())
                }
                Ok(Err(_)) => Err(Failure {
                    error: Error::failed("domain is no longer running"),
                    begun: true,
                }),
                Err(_) => Err(Failure {
                    error: Error::new(
                        ErrorCode::OPERATION_TIMEOUT,
                        "the domain's VMM does not answer",
                    ),
                    begun: true,
                }),
            },
            Err(error) => Err(Failure::from(not_begun(error))),
        };
        if answer.is_err() {
            if let Ok(live) = domain.lock().live_mut() {
                live.block_jobs.retain(|job| job.disk != disk.id);
                let definition = Arc::make_mut(&mut live.definition);
                if let Some(element) = chain::disk_mut(definition, &disk.target) {
                    element.take_children("mirror");
                }
            }
            self.write_live(domain).await;
        }
        answer
    }
}

fn number(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

impl Order {
    fn commit(disk: &Known, top: usize, base: usize, relative: bool) -> Result<Self> {
        let gone = || Error::internal("the chain is shorter than that");
        let written = disk.links.get(base).ok_or_else(gone)?;
        // The image on top is emptied in the end, and reads as the one that was written.
        let above = disk.links.get(top.saturating_sub(1)).ok_or_else(gone)?;
        let mut files = vec![written.path.clone()];
        if top > 1 {
            files.push(above.path.clone());
        }
        Ok(Self {
            job: BlockJob::Commit {
                top: number(top),
                base: number(base),
                name: called(&above.path, &written.path, relative)?,
            },
            files,
            ..Self::default()
        })
    }
}

fn mirror_element(base: &Link) -> Element {
    let (kind, mut source) = chain::source_element(&base.path);
    source.set_opt_attr("index", base.index.map(|index| index.to_string()));
    Element::new("mirror")
        .with_attr("type", kind)
        .with_attr("job", "active-commit")
        .with_child(Element::new("format").with_attr("type", base.format.as_str()))
        .with_child(source)
}

fn kind_of(job: &BlockJob) -> BlockJobKind {
    match job {
        BlockJob::Pull { .. } => BlockJobKind::Pull,
        BlockJob::Commit { top: 0, .. } => BlockJobKind::ActiveCommit,
        BlockJob::Commit { .. } => BlockJobKind::Commit,
        BlockJob::Copy(_) => BlockJobKind::Copy,
    }
}

fn wait_for(
    domain: &Domain,
    disk: &str,
    kind: BlockJobKind,
) -> Result<oneshot::Receiver<BlockJobNews>> {
    let (sender, receiver) = oneshot::channel();
    let mut inner = domain.lock();
    let live = inner.live_mut()?;
    match live.block_jobs.iter_mut().find(|job| job.disk == disk) {
        Some(job) => job.waiting.push(sender),
        // Begun under another daemon.
        None => live.block_jobs.push(Pending {
            disk: disk.to_owned(),
            kind,
            delete: Vec::new(),
            owner: None,
            ready: None,
            waiting: vec![sender],
        }),
    }
    Ok(receiver)
}

fn can_pivot(disk: &Known, status: &BlockJobStatus) -> Result<()> {
    let early = |what: String| {
        Err(Error::new(
            ErrorCode::BLOCK_COPY_ACTIVE,
            format!("{what} not ready for pivot yet"),
        ))
    };
    let kind = match status.kind {
        BlockJobKind::ActiveCommit | BlockJobKind::Copy if status.ready => return Ok(()),
        BlockJobKind::ActiveCommit => return early(format!("disk '{}'", disk.target)),
        BlockJobKind::Copy => {
            let name = copy::job_name(&disk.target, &disk.links);
            return early(format!("block job '{name}'"));
        }
        BlockJobKind::Pull => "pull",
        BlockJobKind::Commit => "commit",
    };
    Err(Error::invalid(format!(
        "job type '{kind}' does not support pivot"
    )))
}

/// As libvirt does it: only what is ready is told as done.
fn told(status: &BlockJobStatus) -> (u64, u64) {
    let end = status.total;
    if status.ready {
        return (end.max(1), end.max(1));
    }
    match status.done.min(end) {
        _ if end == 0 => (0, 1),
        done if done == end => (end - 1, end),
        done => (done, end),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_ready_is_told_as_done() {
        let status = |done, total, ready| BlockJobStatus {
            kind: BlockJobKind::ActiveCommit,
            done,
            total,
            speed: 0,
            ready,
        };
        assert_eq!(told(&status(0, 0, false)), (0, 1));
        assert_eq!(told(&status(5, 5, false)), (4, 5));
        assert_eq!(told(&status(3, 5, false)), (3, 5));
        assert_eq!(told(&status(4, 5, true)), (5, 5));
        assert_eq!(told(&status(0, 0, true)), (1, 1));
    }

    #[test]
    fn names_stay_relative_where_they_can() {
        let of = |above, path, relative| called(above, path, relative).map_err(|e| e.message);
        assert_eq!(of("/d/a", "/d/b", false), Ok("/d/b".to_owned()));
        assert_eq!(of("/d/a", "/d/b", true), Ok("b".to_owned()));
        assert!(of("/d/a", "/e/b", true).is_err());
        assert_eq!(speed(2, false).unwrap(), 2 << 20);
        assert!(speed(u64::MAX, false).is_err());
    }
}
