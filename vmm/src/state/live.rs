//! Saved images of a machine that runs on: written while its guest runs, round after round, until so little is left
//! that the guest need only stand still for a moment.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hypervisor::Vm;
use images::Image;
use vmm_api::saved::{CHUNK, ChunkSum, Id, PAGE, Plan, SavedError, Section, runs};

use super::dirty;
use super::job::Progress;
use super::ram::{for_chunks, has_data};
use crate::devices::lock;
use crate::killpoint::killpoint;
use crate::memory::GuestMemory;
use crate::notices::{Notice, Notices};
use crate::num::to_usize;

/// So many bytes are written while the guest stands still.
const FEW: u64 = 2 << 20;
/// A guest that writes faster than that stands still for as much as it has written last.
const ROUNDS_MOST: u32 = 20;
/// How long the machine may take to come to rest, and to exchange its images.
const PATIENCE: Duration = Duration::from_secs(30);
const WORDS: usize = (CHUNK / PAGE / 64) as usize;

/// The machine at the moment of the snapshot.
#[derive(Debug)]
pub struct Moment {
    /// Its guest is to run when it is restored.
    pub running: bool,
    /// Its states.
    pub sections: Vec<Section>,
}

/// What the event loop says in the end, or why not.
pub type Answer<T> = Mutex<Receiver<Result<T, String>>>;

/// What writes the image.
#[derive(Debug)]
pub struct Writer {
    /// Where to.
    pub file: File,
    /// What tells it from other saves.
    pub id: Id,
    /// The domain's XML.
    pub xml: String,
    /// Guest memory, whose dirty log is on.
    pub memory: Arc<GuestMemory>,
    /// Its VM.
    pub vm: Arc<dyn Vm>,
    /// To the event loop: [`Notice::StandStill`] when it is time, [`Notice::MemoryWritten`] when the guest may go on.
    pub notices: Arc<Notices>,
    /// The answer to the first.
    pub moment: Answer<Moment>,
    /// The answer to the second: images that the guest has left behind, to be on the disk in the end.
    pub switched: Answer<Vec<Arc<dyn Image>>>,
}

impl Writer {
    /// Writes it.
    ///
    /// # Errors
    /// In words for the caller.
    pub fn run(&self, progress: &Progress) -> Result<(), String> {
        let words = |error: SavedError| error.to_string();
        let mut plan =
            Plan::reserve(&self.file, self.id, &self.xml, self.memory.size()).map_err(words)?;
        // What was written so far is part of the content.
        self.written()?;
        let mut dirty = dirty::content(&self.memory);
        for round in 0..ROUNDS_MOST {
            let bytes = dirty::count(&dirty) * PAGE;
            self.round(&plan, &dirty, (round == 0).then_some(progress), progress)?;
            killpoint("vmm.live-round");
            dirty = self.written()?;
            let left = dirty::count(&dirty) * PAGE;
            // It does not get less any more.
            if left <= FEW || round > 2 && left > bytes / 4 * 3 {
                break;
            }
        }
        // What was taken out of the log has to be written, whatever comes after.
        self.round(&plan, &dirty, None, progress)?;
        self.notices.send(Notice::StandStill);
        let moment = answer(&self.moment, progress)?;
        killpoint("vmm.live-still");
        let left = self.written()?;
        self.round(&plan, &left, None, progress)?;
        plan.set_states(&self.file, moment.running, &moment.sections)
            .map_err(words)?;
        progress.check().map_err(|error| error.to_string())?;
        self.notices.send(Notice::MemoryWritten);
        // From here on it is too late to give it up.
        let left_behind = answer(&self.switched, &Progress::new(0))?;
        killpoint("vmm.live-switched");
        for image in left_behind {
            image.flush().map_err(|error| error.to_string())?;
        }
        self.sum(&mut plan)?;
        plan.finish(&self.file).map_err(words)?;
        killpoint("vmm.image-finished");
        Ok(())
    }

    fn written(&self) -> Result<Vec<u64>, String> {
        dirty::written(&*self.vm, &self.memory).map_err(|error| error.to_string())
    }

    /// Writes these pages. In the first round what is zero can be left out.
    fn round(
        &self,
        plan: &Plan,
        dirty: &[u64],
        first: Option<&Progress>,
        progress: &Progress,
    ) -> Result<(), String> {
        let size = self.memory.size();
        let written = for_chunks(size.div_ceil(CHUNK), |index, buffer| {
            progress.check()?;
            let ram = self.memory.bytes().0;
            let at = index * CHUNK;
            let words = dirty.get(to_usize(index) * WORDS..).unwrap_or_default();
            let words = words.get(..WORDS.min(words.len())).unwrap_or_default();
            let mut bytes = 0;
            for (page, count) in dirty::runs(words) {
                let start = at + page * PAGE;
                let len = to_usize((count * PAGE).min(size.saturating_sub(start)));
                let (Some(copy), from) = (buffer.get_mut(..len), ram.wrapping_add(to_usize(start)))
                else {
                    continue;
                };
                // SAFETY: `len` bytes inside the mapping of guest RAM, which lives as long as `memory`, into a buffer of
                // ours that is as long. The guest may write them meanwhile: then the dirty log has them.
                unsafe { std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), len) };
                let to = plan.ram_offset() + start;
                if first.is_none() {
                    self.file.write_all_at(copy, to)?;
                    continue;
                }
                for (page, pages) in runs(copy) {
                    self.file.write_all_at(pages, to + u64::from(page) * PAGE)?;
                    bytes += pages.len() as u64;
                }
            }
            if let Some(first) = first {
                let len = (size - at).min(CHUNK);
                first.add(len, len.saturating_sub(bytes));
            }
            Ok(())
        });
        written.map_err(|error| error.to_string())
    }

    /// Sums what is in the file now.
    fn sum(&self, plan: &mut Plan) -> Result<(), String> {
        let size = self.memory.size();
        let chunks = size.div_ceil(CHUNK);
        let sums = Mutex::new(vec![ChunkSum::default(); to_usize(chunks)]);
        let summed = for_chunks(chunks, |index, buffer| {
            let at = index * CHUNK;
            let len = (size - at).min(CHUNK);
            let from = plan.ram_offset() + at;
            if !has_data(&self.file, from, from + len) {
                return Ok(());
            }
            let bytes = buffer.get_mut(..to_usize(len)).unwrap_or_default();
            self.file.read_exact_at(bytes, from)?;
            let mut sum = ChunkSum::default();
            for (page, pages) in runs(bytes) {
                sum.add(page, pages);
            }
            if let Some(place) = lock(&sums).get_mut(to_usize(index)) {
                *place = sum;
            }
            Ok(())
        });
        summed.map_err(|error| error.to_string())?;
        let sums = sums
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        for (index, sum) in sums.into_iter().enumerate() {
            plan.set_sum(index, sum);
        }
        Ok(())
    }
}

/// What the event loop says, which answers soon.
fn answer<T>(from: &Answer<T>, progress: &Progress) -> Result<T, String> {
    let since = Instant::now();
    loop {
        progress.check().map_err(|error| error.to_string())?;
        match lock(from).recv_timeout(Duration::from_millis(100)) {
            Ok(answer) => return answer,
            Err(RecvTimeoutError::Timeout) if since.elapsed() < PATIENCE => {}
            Err(error) => return Err(format!("the machine does not rest: {error}")),
        }
    }
}
