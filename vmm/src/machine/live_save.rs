//! Saving the machine while it runs: what the event loop has to do with it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use images::Image;
use vmm_api::control::MachineState;
use vmm_api::saved::Id;

use super::Machine;
use super::devices::Layer;
use crate::state::job::{Job, Progress};
use crate::state::live::{Moment, Writer};

/// What the event loop keeps of a live save.
#[derive(Debug)]
pub(super) struct LiveSave {
    moment: SyncSender<Result<Moment, String>>,
    switched: SyncSender<Result<Vec<Arc<dyn Image>>, String>>,
    /// Images that come on top of disks, by their ids.
    tops: Vec<(String, Layer)>,
    /// The guest stands still, whatever the machine's state says.
    stands_still: bool,
}

impl LiveSave {
    /// Nothing may run now.
    pub(super) fn stands_still(&self) -> bool {
        self.stands_still
    }
}

impl Machine {
    /// Begins a live save into the first of `descriptors`; the others are new images for disks.
    pub(super) fn save_live(
        &mut self,
        (id, xml): (Id, String),
        disks: &[(String, String)],
        descriptors: Vec<OwnedFd>,
    ) -> Result<Job, String> {
        if let MachineState::Crashed | MachineState::Halted = self.state {
            return Err("the guest has ended".to_owned());
        }
        if self.permit.is_some() {
            return Err("the machine has not come here yet".to_owned());
        }
        let mut descriptors = descriptors.into_iter();
        let file = descriptors.next().ok_or("the file is not there")?;
        if descriptors.len() != disks.len() {
            return Err("each disk needs one descriptor".to_owned());
        }
        let mut tops = Vec::new();
        for ((disk, name), fd) in disks.iter().zip(descriptors) {
            let found = self.devices.pci.disk(disk)?;
            tops.push((disk.clone(), found.open_top(fd, name)?));
        }
        // One answer to one question each: they never have to wait.
        let (moment, states) = sync_channel(1);
        let (switched, images) = sync_channel(1);
        self.log_writes(true)?;
        let writer = Writer {
            file: File::from(file),
            id,
            xml,
            memory: self.memory.clone(),
            vm: self.vm.clone(),
            notices: self.notices.clone(),
            moment: Mutex::new(states),
            switched: Mutex::new(images),
        };
        let progress = Progress::new(self.memory.size());
        match Job::start(progress, move |progress| writer.run(progress)) {
            Ok(job) => {
                self.live_save = Some(LiveSave {
                    moment,
                    switched,
                    tops,
                    stands_still: false,
                });
                Ok(job)
            }
            Err(error) => {
                self.log_writes(false)?;
                Err(error.to_string())
            }
        }
    }

    /// The time has come: nothing moves until all of memory is written. Nobody need be told.
    pub(super) fn live_moment(&mut self) {
        if let Some(saving) = &mut self.live_save {
            saving.stands_still = true;
        }
        let moment = self.come_to_rest(false).and_then(|()| {
            Ok(Moment {
                running: self.state == MachineState::Running,
                sections: self.sections()?,
            })
        });
        self.answer_live(moment.is_err(), |saving| {
            saving.moment.try_send(moment).is_ok()
        });
    }

    /// All is written: the disks go on with their new images, and the guest goes on.
    pub(super) fn live_switch(&mut self) {
        let tops = self
            .live_save
            .as_mut()
            .map(|saving| std::mem::take(&mut saving.tops));
        let switched = tops
            .ok_or("no save is running".to_owned())
            .and_then(|tops| {
                let mut all = Vec::new();
                for (id, top) in tops {
                    let disk = self.devices.pci.disk(&id)?;
                    all.push((disk, disk.top_image()?, top));
                }
                // Nothing has changed so far, and nothing goes wrong from here on.
                let mut left_behind = Vec::new();
                for (disk, old, top) in all {
                    disk.put_top(top)?;
                    left_behind.push(old);
                }
                Ok(left_behind)
            });
        self.answer_live(true, |saving| saving.switched.try_send(switched).is_ok());
    }

    /// Tells the job; the guest goes on if that is how it is.
    fn answer_live(&mut self, go_on: bool, tell: impl FnOnce(&LiveSave) -> bool) {
        if go_on {
            self.live_go_on();
        }
        // A job that was given up meanwhile does not ask any more.
        if self.live_save.as_ref().is_some_and(|saving| !tell(saving)) {
            log::debug!(
                "{}: nobody waits for the machine any more",
                self.config.name
            );
        }
    }

    fn live_go_on(&mut self) {
        let stood = match &mut self.live_save {
            Some(saving) => std::mem::take(&mut saving.stands_still),
            None => false,
        };
        // It may have been paused meanwhile.
        if stood && self.state == MachineState::Running && self.ending.is_none() {
            self.resume();
        }
    }

    /// The job has ended, if it was a live save.
    pub(super) fn live_save_ended(&mut self) {
        if self.live_save.is_none() {
            return;
        }
        self.live_go_on();
        self.live_save = None;
        if let Err(error) = self.log_writes(false) {
            log::warn!("{}: {error}", self.config.name);
        }
    }
}
