//! `amend` of a LUKS image's key slots, or those of an encrypted qcow2 image.

use std::time::Duration;

use images::luks::{FilePart, SLOTS, Volume};

use super::Failure;
use super::open::{Secrets, message};

/// What the options say; their names have a prefix in qcow2 images.
#[derive(Default)]
pub struct Keys {
    state: Option<String>,
    new_secret: Option<String>,
    old_secret: Option<String>,
    slot: Option<u64>,
    time: Option<Duration>,
}

impl Keys {
    /// Takes an option; false if it is none of these.
    ///
    /// # Errors
    /// A number that is none.
    pub fn take(&mut self, name: &str, value: &str) -> Result<bool, Failure> {
        let number = || {
            value.parse::<u64>().map_err(|_| {
                Failure::new(format!(
                    "Parameter '{name}' expects a number, not '{value}'"
                ))
            })
        };
        match name {
            "state" => self.state = Some(value.to_owned()),
            "new-secret" => self.new_secret = Some(value.to_owned()),
            "old-secret" => self.old_secret = Some(value.to_owned()),
            "keyslot" => self.slot = Some(number()?),
            "iter-time" => self.time = Some(Duration::from_millis(number()?.min(600_000))),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether any option was given.
    pub fn any(&self) -> bool {
        self.state.is_some()
            || self.new_secret.is_some()
            || self.old_secret.is_some()
            || self.slot.is_some()
            || self.time.is_some()
    }

    /// Changes the slots of the header in `place`, which `secret` opens.
    ///
    /// # Errors
    /// In qemu-img's words: what makes no sense, or would lose the content without `force`.
    pub fn apply(
        &self,
        place: &FilePart<'_>,
        secret: Option<&str>,
        secrets: &Secrets,
        force: bool,
    ) -> Result<(), Failure> {
        let said = |error: images::Error| Failure::new(message(&error));
        let secret = secret
            .ok_or_else(|| Failure::new("Parameter 'key-secret' is required for cipher"))
            .and_then(|id| secrets.get(id))?;
        let slot = match self.slot {
            None => None,
            Some(slot) => match usize::try_from(slot) {
                Ok(slot) if slot < SLOTS => Some(slot),
                _ => {
                    return Err(Failure::new(format!(
                        "Invalid keyslot {slot} specified, must be between 0 and {}",
                        SLOTS - 1
                    )));
                }
            },
        };
        let mut volume = Volume::open(place, secret.as_bytes()).map_err(said)?;
        match self.state.as_deref() {
            Some("active") => self.activate(&mut volume, place, slot, secrets, force),
            Some("inactive") => self.erase(&mut volume, place, slot, secrets, force),
            Some(other) => Err(Failure::new(format!(
                "Parameter 'state' does not accept value '{other}'"
            ))),
            None => Err(Failure::new("Parameter 'state' is missing")),
        }
    }

    fn activate(
        &self,
        volume: &mut Volume,
        place: &FilePart<'_>,
        slot: Option<usize>,
        secrets: &Secrets,
        force: bool,
    ) -> Result<(), Failure> {
        /// As qemu-img.
        const TIME: Duration = Duration::from_secs(2);
        let refuse = |what: String| Err(Failure::new(what));
        let Some(new) = &self.new_secret else {
            return refuse("'new-secret' is required to activate a keyslot".into());
        };
        if self.old_secret.is_some() {
            return refuse("'old-secret' must not be given when activating keyslots".into());
        }
        let secret = secrets.get(new)?;
        let in_use = |slot: usize| volume.header().slots[slot].enabled;
        match slot {
            Some(slot) if in_use(slot) && !force => {
                return refuse(format!(
                    "Refusing to overwrite active keyslot {slot} - please erase it first"
                ));
            }
            None if (0..SLOTS).all(in_use) => {
                return refuse("Can't add a keyslot - all keyslots are in use".into());
            }
            _ => {}
        }
        volume
            .add_key(
                place,
                slot,
                secret.as_bytes(),
                self.time.unwrap_or(TIME),
                force,
            )
            .map(drop)
            .map_err(|error| Failure::new(message(&error)))
    }

    fn erase(
        &self,
        volume: &mut Volume,
        place: &FilePart<'_>,
        slot: Option<usize>,
        secrets: &Secrets,
        force: bool,
    ) -> Result<(), Failure> {
        let refuse = |what: String| Err(Failure::new(what));
        let said = |error: images::Error| Failure::new(message(&error));
        if self.new_secret.is_some() {
            return refuse("'new-secret' must not be given when erasing keyslots".into());
        }
        if self.time.is_some() {
            return refuse("'iter-time' must not be given when erasing keyslots".into());
        }
        let old = self.old_secret.as_deref().map(|id| secrets.get(id));
        let old = old.transpose()?;
        let active = |volume: &Volume| -> Vec<usize> {
            (0..SLOTS)
                .filter(|&slot| volume.header().slots[slot].enabled)
                .collect()
        };
        let all = active(volume);
        let goes = match (slot, old) {
            (None, None) => {
                return refuse(
                    "To erase keyslot(s), either explicit keyslot index or the password currently \
                     contained in them must be given"
                        .into(),
                );
            }
            (Some(slot), old) => {
                if let Some(old) = old
                    && !volume.opens(place, slot, old.as_bytes()).map_err(said)?
                {
                    return refuse(format!(
                        "Given keyslot {slot} doesn't contain the given old password for erase \
                         operation"
                    ));
                }
                if !all.contains(&slot) {
                    return match force {
                        true => Ok(()),
                        false => refuse(format!(
                            "Given keyslot {slot} is already erased (inactive) "
                        )),
                    };
                }
                if all.len() == 1 && !force {
                    return refuse(format!(
                        "Attempt to erase the only active keyslot {slot} which will erase all the \
                         data in the image irreversibly - refusing operation"
                    ));
                }
                vec![slot]
            }
            (None, Some(old)) => {
                let mut found = Vec::new();
                for &slot in &all {
                    if volume.opens(place, slot, old.as_bytes()).map_err(said)? {
                        found.push(slot);
                    }
                }
                if found.is_empty() {
                    return refuse(
                        "No keyslots match given (old) password for erase operation".into(),
                    );
                }
                if found == all && !force {
                    return refuse(
                        "All the active keyslots match the (old) password that was given and \
                         erasing them will erase all the data in the image irreversibly - \
                         refusing operation"
                            .into(),
                    );
                }
                found
            }
        };
        for slot in goes {
            volume.remove_key(place, slot, force).map_err(said)?;
        }
        Ok(())
    }
}
