//! A merge that somebody waits for: of a snapshot that is deleted.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::oneshot;
use vmm_api::control::{BlockJobKind, BlockJobNews, Call};

use super::{Failure, Known, Order, chain, disk_of};
use crate::drivers::domain::Driver;
use crate::drivers::domain::lifecycle::ask;
use crate::drivers::domain::object::Pinned;
use crate::error::{Error, Result};

/// A job that somebody works with.
#[derive(Debug)]
pub struct Owned {
    ready: oneshot::Receiver<()>,
    ended: oneshot::Receiver<BlockJobNews>,
}

impl Driver {
    /// Merges the image at `top` into the one right behind it, and waits for the end. The caller has
    /// the domain's job, and keeps the definitions true itself but for the running domain's.
    ///
    /// # Errors
    /// As [`Driver::block_commit`]; what the job ended with.
    pub async fn merge_live(
        self: &Arc<Self>,
        domain: &Pinned,
        target: &str,
        overlay: &Path,
    ) -> std::result::Result<(), Failure> {
        let disk = disk_of(domain, target)?;
        let name = overlay.display().to_string();
        let top = chain::find(&disk.links, &disk.target, &name, None)?;
        let mut order = Order::commit(&disk, top, top + 1, false)?;
        let (owner, ended) = oneshot::channel();
        let (tell_ready, ready) = oneshot::channel();
        order.owner = Some((owner, tell_ready));
        self.begin_block_job(domain, &disk, order).await?;
        let owned = Owned { ready, ended };
        let merged = self.see_merged(domain, &disk, top, &name, owned).await;
        merged.map_err(|error| Failure { error, begun: true })
    }

    async fn see_merged(
        self: &Arc<Self>,
        domain: &Pinned,
        disk: &Known,
        top: usize,
        name: &str,
        owned: Owned,
    ) -> Result<()> {
        let news = match self.merged(domain, disk, top, owned).await {
            Ok(news) => news,
            // Its end comes to nobody now, and is dealt with where all are.
            Err(error) => {
                let call = Call::EndBlockJob {
                    disk: disk.id.clone(),
                    pivot: false,
                };
                drop(ask(domain, call).await);
                return Err(error);
            }
        };
        let kind = match top {
            0 => BlockJobKind::ActiveCommit,
            _ => BlockJobKind::Commit,
        };
        let settled = self.block_job_ended(domain, &disk.id, kind, news.clone());
        match (settled.await, news) {
            (settled, BlockJobNews::Completed) => settled,
            (_, BlockJobNews::Failed(why)) => {
                Err(Error::failed(format!("merging '{name}': {why}")))
            }
            (..) => Err(Error::failed(format!("merging '{name}' was given up"))),
        }
    }

    /// What a merge ends with.
    async fn merged(
        &self,
        domain: &Pinned,
        disk: &Known,
        top: usize,
        mut owned: Owned,
    ) -> Result<BlockJobNews> {
        let gone = |_| Error::failed("domain is no longer running");
        if top == 0 {
            tokio::select! {
                _ = &mut owned.ready => {
                    let call = Call::EndBlockJob { disk: disk.id.clone(), pivot: true };
                    ask(domain, call).await?;
                }
                news = &mut owned.ended => return news.map_err(gone),
            }
        }
        owned.ended.await.map_err(gone)
    }
}
