//! Saved images: written by a job, opened by a machine that goes on from one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::time::Duration;

use serde::de::DeserializeOwned;
use vmm_api::config::RestoreConfig;
use vmm_api::saved::{Header, Id, Image, Plan, SavedError, Section};

use super::job::Progress;
use super::ram::{self, Cached};
use crate::killpoint::killpoint;
use crate::memory::GuestMemory;
use crate::resource;

/// What a save writes besides guest memory.
#[derive(Debug)]
pub struct Parts {
    /// What tells it from other saves.
    pub id: Id,
    /// The domain's XML.
    pub xml: String,
    /// The guest is to run when it is restored.
    pub running: bool,
    /// The machine's states.
    pub sections: Vec<Section>,
}

/// Writes an image of a machine that stands still.
///
/// # Errors
/// In words for the caller.
pub fn write(
    file: &File,
    parts: &Parts,
    memory: &GuestMemory,
    progress: &Progress,
) -> Result<(), String> {
    let words = |error: SavedError| error.to_string();
    let io = |error: io::Error| error.to_string();
    let cached = Cached::new(file).map_err(io)?;
    let mut plan = Plan::begin(
        file,
        parts.id,
        &parts.xml,
        parts.running,
        &parts.sections,
        memory.size(),
    )
    .map_err(words)?;
    drop(cached);
    killpoint("vmm.states-written");
    let sums = ram::write(memory, file, plan.ram_offset(), progress, false).map_err(io)?;
    killpoint("vmm.ram-written");
    progress.check().map_err(io)?;
    for (index, sum) in sums.into_iter().enumerate() {
        plan.set_sum(index, sum);
    }
    let _cached = Cached::new(file).map_err(io)?;
    plan.finish(file).map_err(words)?;
    killpoint("vmm.image-finished");
    // Too late is too late: but who gave it up is not told that it was done.
    progress.check().map_err(io)
}

/// A saved machine that is being taken over.
#[derive(Debug)]
pub struct Saved {
    /// Where its memory is; `None`: it has come already.
    image: Option<SavedImage>,
    sections: BTreeMap<String, Section>,
}

#[derive(Debug)]
struct SavedImage {
    file: File,
    name: String,
    header: Header,
    sums: Vec<u32>,
}

/// Why a saved machine can't be taken over.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The file.
    #[error("{name}: {source}")]
    File {
        /// How people call it.
        name: String,
        /// What is wrong.
        source: SavedError,
    },
    /// It is whole, but of another machine than this one.
    #[error("the saved machine is not this one: {0}")]
    Other(String),
    /// A state that can't be set.
    #[error("the saved state of {part}: {reason}")]
    State {
        /// Of which part.
        part: String,
        /// What is wrong.
        reason: String,
    },
}

impl Saved {
    /// Opens an image, and checks everything in it but guest memory.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn open(config: &RestoreConfig) -> Result<Self, crate::machine::MachineError> {
        let file = resource::open_read(&config.image)?;
        let name = resource::name(&config.image);
        match Self::read(&file) {
            Ok((header, sums, sections)) => Ok(Self {
                image: Some(SavedImage {
                    file,
                    name,
                    header,
                    sums,
                }),
                sections,
            }),
            Err(source) => Err(RestoreError::File { name, source }.into()),
        }
    }

    /// One whose memory has come already, and these states with it.
    #[must_use]
    pub fn received(sections: BTreeMap<String, Section>) -> Self {
        Self {
            image: None,
            sections,
        }
    }

    #[expect(clippy::type_complexity, reason = "the parts of one value")]
    fn read(file: &File) -> Result<(Header, Vec<u32>, BTreeMap<String, Section>), SavedError> {
        let _cached = Cached::new(file)?;
        let image = Image::open(file)?;
        // The daemon has read it: here it only has to be whole.
        image.xml()?;
        let sums = image.sums()?;
        let mut sections = BTreeMap::new();
        for section in image.sections()? {
            let id = section.id.clone();
            if sections.insert(id.clone(), section).is_some() {
                return Err(SavedError::Damaged(format!("there are two states of {id}")));
            }
        }
        Ok((image.header, sums, sections))
    }

    /// Guest memory with the saved content: mapped, or copied and checked.
    ///
    /// # Errors
    /// It is of another size, or damaged; the host's refusal.
    pub fn memory(
        &self,
        size: u64,
        copy: bool,
    ) -> Result<GuestMemory, crate::machine::MachineError> {
        let Some(image) = &self.image else {
            return Err(RestoreError::Other("its memory came by itself".to_owned()).into());
        };
        let saved = image.header.ram_bytes;
        if saved != size {
            let reason = format!("it has {saved} bytes of memory, this one {size}");
            return Err(RestoreError::Other(reason).into());
        }
        if !copy {
            let _cached = Cached::new(&image.file).map_err(|error| image.failed(error))?;
            let memory = GuestMemory::from_file(size, &image.file, image.header.ram_offset)?;
            return Ok(memory);
        }
        let memory = GuestMemory::new(size)?;
        ram::read(&memory, &image.file, image.header.ram_offset, &image.sums)
            .map_err(|error| image.failed(error))?;
        Ok(memory)
    }

    /// Takes the state of one part out.
    ///
    /// # Errors
    /// There is none, or of another kind.
    pub fn take(&mut self, id: &str) -> Result<Section, RestoreError> {
        let none = || RestoreError::Other(format!("it has no {id}"));
        self.sections.remove(id).ok_or_else(none)
    }

    /// Whether there is a state of that part.
    pub fn has(&self, id: &str) -> bool {
        self.sections.contains_key(id)
    }

    /// Takes the state of one part out, of this kind and layout.
    ///
    /// # Errors
    /// There is none, or it is another.
    pub fn state<T: DeserializeOwned>(
        &mut self,
        id: &str,
        version: u32,
    ) -> Result<T, RestoreError> {
        let section = self.take(id)?;
        let state = |reason| RestoreError::State {
            part: id.to_owned(),
            reason,
        };
        if section.version != version {
            return Err(state(format!(
                "version {} is not known, only {version}",
                section.version
            )));
        }
        section.state().map_err(|error| state(error.to_string()))
    }

    /// Everything must have been taken.
    ///
    /// # Errors
    /// What is left: parts that this machine has not.
    pub fn finish(&self) -> Result<(), RestoreError> {
        if self.sections.is_empty() {
            return Ok(());
        }
        let left: Vec<&str> = self.sections.keys().map(String::as_str).collect();
        Err(RestoreError::Other(format!(
            "it has {} besides",
            left.join(", ")
        )))
    }

    /// Checks guest memory in the background, at the host's leisure; `damaged` hears of what is wrong.
    ///
    /// # Errors
    /// No thread.
    pub fn verify(self, damaged: impl FnOnce(String) + Send + 'static) -> io::Result<()> {
        /// The guest's first moments are its own.
        const AFTER: Duration = Duration::from_millis(500);
        let Some(image) = self.image else {
            return Ok(());
        };
        std::thread::Builder::new()
            .name("verify".into())
            .spawn(move || {
                std::thread::sleep(AFTER);
                idle();
                let (at, size) = (image.header.ram_offset, image.header.ram_bytes);
                if let Err(error) = ram::verify(&image.file, at, size, &image.sums, || true) {
                    damaged(image.failed(error).to_string());
                }
            })?;
        Ok(())
    }
}

impl SavedImage {
    fn failed(&self, error: io::Error) -> RestoreError {
        RestoreError::File {
            name: self.name.clone(),
            source: error.into(),
        }
    }
}

/// This thread gets what processor time nobody else wants.
fn idle() {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread, and the struct lives for the call.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
    if result != 0 {
        log::debug!("SCHED_IDLE: {}", io::Error::last_os_error());
    }
}
