//! The secret driver: values that open images, each in a file that only we can read.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;
use xml_schemas::domain::device::SecretUse;
use xml_schemas::secret::{Secret, SecretUsage};

use crate::error::{Error, ErrorCode, ErrorDomain, Result, check_flags, plain};
use crate::events::{Hub, SecretEvent, SecretName};
use crate::files::{self, Durability};

/// Filters of lists (virConnectListAllSecretsFlags).
mod list_flags {
    pub const EPHEMERAL: u32 = 1;
    pub const NO_EPHEMERAL: u32 = 2;
    pub const PRIVATE: u32 = 4;
    pub const NO_PRIVATE: u32 = 8;
}

/// A secret and its value.
struct Entry {
    definition: Secret,
    value: Option<Vec<u8>>,
}

/// All secrets.
pub struct Driver {
    folder: PathBuf,
    hub: Arc<Hub>,
    entries: Mutex<HashMap<Uuid, Entry>>,
}

/// Values are not for logs.
impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Driver({})", self.folder.display())
    }
}

fn error(code: ErrorCode, detail: impl Into<String>) -> Error {
    Error::of(ErrorDomain::SECRET, code, detail)
}

fn missing(uuid: Uuid) -> Error {
    error(
        ErrorCode::NO_SECRET,
        format!("no secret with matching uuid '{uuid}'"),
    )
}

fn cannot_write(path: &Path, cause: &io::Error) -> Error {
    error(
        ErrorCode::SYSTEM_ERROR,
        format!("cannot write {}: {}", path.display(), plain(cause)),
    )
}

fn name(secret: &Secret) -> SecretName {
    SecretName {
        uuid: secret.uuid,
        usage_type: secret.usage.number(),
        usage_id: secret.usage.id().to_owned(),
    }
}

impl Driver {
    /// Loads the secrets in `folder`, which is made if it is missing. Damaged ones are reported
    /// and left alone.
    ///
    /// # Errors
    /// The system's.
    pub fn open(folder: PathBuf, hub: Arc<Hub>) -> io::Result<Self> {
        files::make_folder(&folder, 0o700)?;
        files::remove_leftovers(&folder)?;
        let mut entries = HashMap::new();
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.extension().is_none_or(|e| e != "xml") {
                continue;
            }
            let read = fs::read_to_string(&path).map_err(|e| e.to_string());
            match read.and_then(|text| Secret::parse(&text).map_err(|e| e.to_string())) {
                Ok(definition)
                    if path.file_stem().and_then(|s| s.to_str())
                        == Some(&definition.uuid.to_string()) =>
                {
                    let value = match fs::read(path.with_extension("value")) {
                        Ok(value) => Some(value),
                        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                        Err(error) => return Err(error),
                    };
                    entries.insert(definition.uuid, Entry { definition, value });
                }
                Ok(_) => log::error!("{}: left out: its uuid is another one", path.display()),
                Err(why) => log::error!("{}: left out: {why}", path.display()),
            }
        }
        Ok(Self {
            folder,
            hub,
            entries: Mutex::new(entries),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn definition_file(&self, uuid: Uuid) -> PathBuf {
        self.folder.join(format!("{uuid}.xml"))
    }

    fn value_file(&self, uuid: Uuid) -> PathBuf {
        self.folder.join(format!("{uuid}.value"))
    }

    /// Defines a secret, or defines it anew.
    ///
    /// # Errors
    /// A bad document; another secret is for the same thing; the disk.
    pub fn define(&self, xml: &str, flags: u32) -> Result<Secret> {
        /// VIR_SECRET_DEFINE_VALIDATE: unknown parts are refused anyhow by what is read.
        const VALIDATE: u32 = 1;
        check_flags(flags, VALIDATE, "secretDefineXML")?;
        let new = Secret::parse(xml)?;
        let mut entries = self.lock();
        if let Some(known) = entries.get(&new.uuid) {
            if known.definition.usage != new.usage {
                let usage = match known.definition.usage.id() {
                    "" => "(null)",
                    id => id,
                };
                return Err(error(
                    ErrorCode::INTERNAL_ERROR,
                    format!(
                        "a secret with UUID {} is already defined for use with {usage}",
                        new.uuid
                    ),
                ));
            }
            if known.definition.private && !new.private {
                return Err(error(
                    ErrorCode::INTERNAL_ERROR,
                    "cannot change private flag on existing secret",
                ));
            }
        } else if new.usage != SecretUsage::None
            && let Some(other) = entries.values().find(|e| e.definition.usage == new.usage)
        {
            return Err(error(
                ErrorCode::INTERNAL_ERROR,
                format!(
                    "a secret with UUID {} already defined for use with {}",
                    other.definition.uuid,
                    new.usage.id()
                ),
            ));
        }
        let value = entries.get(&new.uuid).and_then(|e| e.value.clone());
        if new.ephemeral {
            self.remove_files(new.uuid)?;
        } else {
            if let Some(value) = &value {
                self.write(&self.value_file(new.uuid), value)?;
            }
            self.write(&self.definition_file(new.uuid), new.format().as_bytes())?;
        }
        entries.insert(
            new.uuid,
            Entry {
                definition: new.clone(),
                value,
            },
        );
        self.hub.secret(&name(&new), SecretEvent::Defined);
        Ok(new)
    }

    fn write(&self, path: &Path, contents: &[u8]) -> Result<()> {
        files::write_atomically(path, contents, Durability::Disk)
            .map_err(|e| cannot_write(path, &e))
    }

    fn remove_files(&self, uuid: Uuid) -> Result<()> {
        // The value first: it is nothing without its definition.
        for path in [self.value_file(uuid), self.definition_file(uuid)] {
            files::remove_if_there(&path).map_err(|e| cannot_write(&path, &e))?;
        }
        files::sync_folder(&self.folder).map_err(|e| cannot_write(&self.folder, &e))
    }

    /// Removes a secret with its value.
    ///
    /// # Errors
    /// VIR_ERR_NO_SECRET; the disk.
    pub fn undefine(&self, uuid: Uuid) -> Result<()> {
        let mut entries = self.lock();
        let entry = entries.get(&uuid).ok_or_else(|| missing(uuid))?;
        if !entry.definition.ephemeral {
            self.remove_files(uuid)?;
        }
        let name = name(&entry.definition);
        entries.remove(&uuid);
        self.hub.secret(&name, SecretEvent::Undefined);
        Ok(())
    }

    /// Gives a secret its value.
    ///
    /// # Errors
    /// VIR_ERR_NO_SECRET; the disk.
    pub fn set_value(&self, uuid: Uuid, value: Vec<u8>, flags: u32) -> Result<()> {
        check_flags(flags, 0, "secretSetValue")?;
        if value.is_empty() {
            return Err(Error::argument(
                "value in virSecretSetValue must not be NULL",
            ));
        }
        let mut entries = self.lock();
        let entry = entries.get_mut(&uuid).ok_or_else(|| missing(uuid))?;
        if !entry.definition.ephemeral {
            self.write(&self.value_file(uuid), &value)?;
        }
        entry.value = Some(value);
        // Still under the lock, as all of them: told in the order in which they happened.
        self.hub
            .secret(&name(&entry.definition), SecretEvent::ValueChanged);
        Ok(())
    }

    /// A secret's value, for a client.
    ///
    /// # Errors
    /// VIR_ERR_NO_SECRET if there is none or it has no value; VIR_ERR_INVALID_SECRET: it is private.
    pub fn value(&self, uuid: Uuid, flags: u32) -> Result<Vec<u8>> {
        check_flags(flags, 0, "secretGetValue")?;
        let entries = self.lock();
        let entry = entries.get(&uuid).ok_or_else(|| missing(uuid))?;
        if entry.definition.private {
            return Err(error(ErrorCode::INVALID_SECRET, "secret is private"));
        }
        entry.own_value()
    }

    /// The value that a definition refers to, for the machine.
    ///
    /// # Errors
    /// VIR_ERR_NO_SECRET if there is none or it has no value.
    pub fn value_of(&self, used: &SecretUse) -> Result<Vec<u8>> {
        let entries = self.lock();
        let found = match (&used.uuid, &used.usage) {
            (Some(text), _) => {
                let uuid: Uuid = text.parse().map_err(|_| {
                    error(
                        ErrorCode::XML_ERROR,
                        format!("malformed secret uuid '{text}'"),
                    )
                })?;
                entries.get(&uuid).ok_or_else(|| missing(uuid))?
            }
            (None, Some(usage)) => entries
                .values()
                .find(|e| matches!(&e.definition.usage, SecretUsage::Volume(v) if v == usage))
                .ok_or_else(|| {
                    error(
                        ErrorCode::NO_SECRET,
                        format!("no secret with matching usage '{usage}'"),
                    )
                })?,
            (None, None) => {
                return Err(error(
                    ErrorCode::XML_ERROR,
                    "an <encryption> needs a <secret> with uuid or usage",
                ));
            }
        };
        found.own_value()
    }

    /// A definition.
    ///
    /// # Errors
    /// VIR_ERR_NO_SECRET.
    pub fn by_uuid(&self, uuid: Uuid) -> Result<Secret> {
        let entries = self.lock();
        let entry = entries.get(&uuid).ok_or_else(|| missing(uuid))?;
        Ok(entry.definition.clone())
    }

    /// The definition for a use.
    ///
    /// # Errors
    /// VIR_ERR_NO_SECRET.
    pub fn by_usage(&self, kind: i32, id: &str) -> Result<Secret> {
        let entries = self.lock();
        let found = entries
            .values()
            .find(|e| e.definition.usage.number() == kind && e.definition.usage.id() == id);
        match found {
            Some(entry) => Ok(entry.definition.clone()),
            None => Err(error(
                ErrorCode::NO_SECRET,
                format!("no secret with matching usage '{id}'"),
            )),
        }
    }

    /// All that pass the filters, by uuid.
    ///
    /// # Errors
    /// Unknown flags.
    pub fn list(&self, flags: u32) -> Result<Vec<Secret>> {
        use list_flags::{EPHEMERAL, NO_EPHEMERAL, NO_PRIVATE, PRIVATE};
        check_flags(
            flags,
            EPHEMERAL | NO_EPHEMERAL | PRIVATE | NO_PRIVATE,
            "secretConnectListAllSecrets",
        )?;
        let passes = |yes: u32, no: u32, holds: bool| {
            flags & (yes | no) == 0 || flags & if holds { yes } else { no } != 0
        };
        let entries = self.lock();
        let mut found: Vec<Secret> = entries
            .values()
            .map(|e| &e.definition)
            .filter(|d| {
                passes(EPHEMERAL, NO_EPHEMERAL, d.ephemeral)
                    && passes(PRIVATE, NO_PRIVATE, d.private)
            })
            .cloned()
            .collect();
        found.sort_by_key(|d| d.uuid);
        Ok(found)
    }
}

impl Entry {
    fn own_value(&self) -> Result<Vec<u8>> {
        self.value.clone().ok_or_else(|| {
            error(
                ErrorCode::NO_SECRET,
                format!("secret '{}' does not have a value", self.definition.uuid),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::files::testing::TempFolder;

    const ONE: Uuid = Uuid::from_u128(1);

    fn xml(uuid: Uuid, attributes: &str, volume: &str) -> String {
        format!(
            "<secret {attributes}><uuid>{uuid}</uuid><usage type='volume'><volume>{volume}</volume>\
             </usage></secret>"
        )
    }

    #[test]
    fn values_survive_the_daemon_and_only_we_can_read_them() {
        let temp = TempFolder::new();
        let driver = Driver::open(temp.0.join("secrets"), Arc::default()).unwrap();
        driver.define(&xml(ONE, "", "/x"), 0).unwrap();
        assert_eq!(driver.value(ONE, 0).unwrap_err().code, ErrorCode::NO_SECRET);
        driver.set_value(ONE, b"hello".to_vec(), 0).unwrap();
        for entry in fs::read_dir(temp.0.join("secrets")).unwrap() {
            let mode = entry.unwrap().metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        let driver = Driver::open(temp.0.join("secrets"), Arc::default()).unwrap();
        assert_eq!(driver.value(ONE, 0).unwrap(), b"hello");
        let used = SecretUse {
            format: "luks".into(),
            uuid: None,
            usage: Some("/x".into()),
        };
        assert_eq!(driver.value_of(&used).unwrap(), b"hello");
        driver.undefine(ONE).unwrap();
        assert_eq!(fs::read_dir(temp.0.join("secrets")).unwrap().count(), 0);
        assert_eq!(driver.undefine(ONE).unwrap_err().code, ErrorCode::NO_SECRET);
    }

    #[test]
    fn private_and_ephemeral_secrets() {
        let temp = TempFolder::new();
        let driver = Driver::open(temp.0.clone(), Arc::default()).unwrap();
        driver
            .define(&xml(ONE, "private='yes' ephemeral='yes'", "/x"), 0)
            .unwrap();
        driver.set_value(ONE, b"v".to_vec(), 0).unwrap();
        assert_eq!(
            driver.value(ONE, 0).unwrap_err().code,
            ErrorCode::INVALID_SECRET
        );
        let used = SecretUse {
            format: "luks".into(),
            uuid: Some(ONE.to_string()),
            usage: None,
        };
        assert_eq!(driver.value_of(&used).unwrap(), b"v");
        assert_eq!(fs::read_dir(&temp.0).unwrap().count(), 0);
        let other = driver
            .define(&xml(Uuid::from_u128(2), "", "/x"), 0)
            .unwrap_err();
        assert!(other.message.contains("already defined for use with /x"));
        assert_eq!(driver.list(4).unwrap().len(), 1);
        assert_eq!(driver.list(8).unwrap().len(), 0);
    }
}
