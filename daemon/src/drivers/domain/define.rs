//! Definitions: define, create, undefine, autostart, rename.

use std::collections::HashSet;
use std::sync::Arc;

use xml_schemas::dom::Element;
use xml_schemas::{Domain as Definition, Validation};

use super::object::{Domain, Pinned};
use super::start::{self, StartOptions};
use super::state::{Lifecycle, ShutoffReason, State};
use super::stored::Stored;
use super::{Driver, blocking, iothreads, limits, scsi, tuning};
use crate::error::{Error, ErrorCode, ErrorDomain, Result, check_flags};
use crate::events::DomainEvent;
use crate::store::Identity;

/// VIR_DOMAIN_DEFINE_VALIDATE
const DEFINE_VALIDATE: u32 = 1;

/// Flags of creation (virDomainCreateFlags).
pub mod create_flags {
    /// Its first instruction waits for `resume`.
    pub const PAUSED: u32 = 1;
    /// It ends with the connection that created it.
    pub const AUTODESTROY: u32 = 2;
    /// A saved state is read whole, past the page cache.
    pub const BYPASS_CACHE: u32 = 4;
    /// A saved state is thrown away.
    pub const FORCE_BOOT: u32 = 8;
    /// The document is held against the schema.
    pub const VALIDATE: u32 = 16;
    /// Firmware variables are set back: there are none yet, so nothing changes.
    pub const RESET_NVRAM: u32 = 32;
}

/// Flags of undefine (virDomainUndefineFlagsValues); the others are about things that do not exist yet.
const UNDEFINE_KNOWN: u32 = 0x7f;
/// With everything that goes with the definition.
pub(super) const UNDEFINE_ALL: u32 = UNDEFINE_MANAGED_SAVE | UNDEFINE_SNAPSHOTS;
/// VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
const UNDEFINE_MANAGED_SAVE: u32 = 1;
/// VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
const UNDEFINE_SNAPSHOTS: u32 = 2;

impl Driver {
    /// A definition that came from outside, with all that it leaves to us.
    pub(super) fn parse(&self, xml: &str, validate: bool) -> Result<Definition> {
        let definition = self.parse_any_length(xml, validate)?;
        definition.check_size()?;
        Ok(definition)
    }

    /// The same where what becomes of it is measured anyway.
    fn parse_any_length(&self, xml: &str, validate: bool) -> Result<Definition> {
        let validation = if validate {
            Validation::Strict
        } else {
            Validation::Lenient
        };
        let parsed = Definition::parse(xml, validation)?;
        let definition = self.filled(parsed.domain)?;
        for warning in &parsed.warnings {
            log::warn!(
                "domain '{}': kept out of its definition: {warning}",
                definition.name
            );
        }
        Ok(definition)
    }

    /// A definition that a guest has run with, which an earlier version may have taken: of a saved one, or of one that
    /// comes.
    pub(super) fn parse_of_guest(&self, xml: &str) -> Result<Definition> {
        let parsed = Definition::parse(xml, Validation::Lenient)?;
        self.refill(parsed.domain, true)
    }

    /// The same, parsed; `goes_on`: with the machine that it was of.
    pub(super) fn refill(&self, mut definition: Definition, goes_on: bool) -> Result<Definition> {
        if goes_on {
            scsi::as_it_was(&mut definition);
        }
        let port = |e: &Element| {
            let is_one = e.attr("type") == Some("pci") && e.attr("model") == Some("pcie-root-port");
            let index = e.attr("index").map(str::to_owned);
            index.filter(|_| e.name == "controller" && is_one)
        };
        let had: HashSet<String> = definition.devices.rest.iter().filter_map(port).collect();
        definition.fill_stored(&self.host())?;
        // A machine that goes on has the slots that it had, even if something is in all of them.
        if !had.is_empty() {
            let devices = &mut definition.devices.rest;
            devices.retain(|e| port(e).is_none_or(|index| had.contains(&index)));
        }
        let definition = self.checked(definition)?;
        definition.check_size()?;
        Ok(definition)
    }

    fn filled(&self, mut definition: Definition) -> Result<Definition> {
        definition.fill_defaults(&self.host())?;
        self.checked(definition)
    }

    fn checked(&self, definition: Definition) -> Result<Definition> {
        definition.check_actions()?;
        limits::check(&definition)?;
        iothreads::check(&definition)?;
        tuning::check_groups(&definition)?;
        Ok(definition)
    }

    /// Defines a domain, or changes its definition.
    ///
    /// # Errors
    /// The document's, a conflict with another domain, or the disk's. Nothing has changed then.
    pub async fn define(self: &Arc<Self>, xml: &str, flags: u32) -> Result<Arc<Domain>> {
        check_flags(flags, DEFINE_VALIDATE, "qemuDomainDefineXMLFlags")?;
        let definition = self.parse_any_length(xml, flags & DEFINE_VALIDATE != 0)?;
        let uuid = definition.uuid.unwrap_or_default();
        let domain = self.registry.pin_or_make(uuid, &definition.name)?;
        let _job = domain.job_in_migration().await?;
        if domain.lock().name != definition.name {
            return Err(Error::of(
                ErrorDomain::DOMAIN,
                ErrorCode::OPERATION_FAILED,
                "domain was renamed meanwhile",
            ));
        }
        let stored = self.save(&Arc::new(definition)).await?;
        let mut inner = domain.lock();
        let event = match inner.persistent.replace(stored) {
            Some(_) => Lifecycle::DefinedUpdated,
            None => Lifecycle::DefinedAdded,
        };
        let name = domain.name_in(&inner);
        self.emit(&name, &DomainEvent::Lifecycle(event));
        drop(inner);
        Ok(Arc::clone(&domain))
    }

    /// Writes a definition to the store; gives what is kept of it.
    pub(super) async fn save(self: &Arc<Self>, definition: &Arc<Definition>) -> Result<Stored> {
        let stored = Stored::new(definition)?;
        // Other threads take over what this one would do, rather than this call: it has nothing to wait for but the disk.
        let saved =
            tokio::task::block_in_place(|| self.store.save(&definition.name, stored.text()));
        saved.map_err(|error| {
            let path = self.store.path(&definition.name);
            Error::system(format!("cannot write '{}'", path.display()), &error)
        })?;
        Ok(stored)
    }

    /// Starts a domain that exists only while it runs; or, if it is defined, starts it once with
    /// another definition.
    ///
    /// # Errors
    /// As for [`Driver::define`] and [`start::start`].
    pub async fn create_xml(self: &Arc<Self>, xml: &str, flags: u32) -> Result<Arc<Domain>> {
        use create_flags::{AUTODESTROY, PAUSED, VALIDATE};
        let known = PAUSED | AUTODESTROY | VALIDATE | create_flags::RESET_NVRAM;
        check_flags(flags, known, "qemuDomainCreateXML")?;
        let definition = Arc::new(self.parse(xml, flags & VALIDATE != 0)?);
        let uuid = definition.uuid.unwrap_or_default();
        let domain = self.registry.pin_or_make(uuid, &definition.name)?;
        let options = options(flags);
        let _job = domain.job().await?;
        if domain.lock().live.is_some() {
            return Err(Error::of(
                ErrorDomain::DOMAIN,
                ErrorCode::OPERATION_INVALID,
                format!("domain is already active as '{}'", definition.name),
            ));
        }
        start::start(self, &domain, &definition, options).await?;
        Ok(Arc::clone(&domain))
    }

    /// Starts a defined domain.
    ///
    /// # Errors
    /// As for [`start::start`].
    pub async fn create(self: &Arc<Self>, domain: Pinned, flags: u32) -> Result<()> {
        use create_flags::{AUTODESTROY, BYPASS_CACHE, FORCE_BOOT, PAUSED, RESET_NVRAM};
        let known = PAUSED | AUTODESTROY | BYPASS_CACHE | FORCE_BOOT | RESET_NVRAM;
        check_flags(flags, known, "qemuDomainCreateWithFlags")?;
        let _job = domain.job().await?;
        let definition = {
            let inner = domain.lock();
            if inner.live.is_some() {
                return Err(Error::invalid("domain is already running"));
            }
            inner.stored()?
        };
        let definition = definition.ok_or_else(|| {
            let name = domain.name();
            super::no_domain(format!(
                "no domain with matching uuid '{}' ({})",
                name.uuid, name.name
            ))
        })?;
        let has = |flag| flags & flag != 0;
        let name = definition.name.clone();
        let managed = self
            .managed_origin(&name, has(BYPASS_CACHE), has(FORCE_BOOT))
            .await?;
        let mut options = options(flags);
        let definition = match managed {
            Some((saved, running, origin)) => {
                options.paused |= !running;
                options.from = Some(origin);
                saved
            }
            None => definition,
        };
        start::start(self, &domain, &definition, options).await
    }

    /// Forgets a definition. A running domain runs on without one.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID for a transient domain, or the disk's.
    pub async fn undefine(self: &Arc<Self>, domain: Pinned, flags: u32) -> Result<()> {
        check_flags(flags, UNDEFINE_KNOWN, "qemuDomainUndefineFlags")?;
        let _job = domain.job().await?;
        let name = {
            let inner = domain.lock();
            if inner.persistent.is_none() {
                return Err(Error::invalid("cannot undefine transient domain"));
            }
            inner.name.clone()
        };
        if self.has_managed_save(&domain) {
            if flags & UNDEFINE_MANAGED_SAVE == 0 {
                return Err(Error::invalid(
                    "Refusing to undefine while domain managed save image exists",
                ));
            }
            self.remove_managed_save(&domain)?;
        }
        self.forget_snapshots(&domain, flags & UNDEFINE_SNAPSHOTS != 0)?;
        let driver = Arc::clone(self);
        blocking(move || {
            driver.store.remove(&name).map_err(|error| {
                let path = driver.store.path(&name);
                Error::system(format!("cannot remove '{}'", path.display()), &error)
            })
        })
        .await??;
        let mut inner = domain.lock();
        inner.persistent = None;
        inner.autostart = false;
        if inner.live.is_none() {
            self.forget_job(&domain);
        }
        let name = domain.name_in(&inner);
        self.emit(&name, &DomainEvent::Lifecycle(Lifecycle::UndefinedRemoved));
        Ok(())
    }

    /// Has a domain started with the host, or not.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID for a transient domain, or the disk's.
    pub async fn set_autostart(self: &Arc<Self>, domain: Pinned, on: bool) -> Result<()> {
        let _job = domain.job().await?;
        let name = {
            let inner = domain.lock();
            if inner.persistent.is_none() {
                return Err(Error::invalid("cannot set autostart for transient domain"));
            }
            if inner.autostart == on {
                return Ok(());
            }
            inner.name.clone()
        };
        let driver = Arc::clone(self);
        blocking(move || {
            driver.store.set_autostart(&name, on).map_err(|error| {
                Error::system(format!("cannot change autostart of '{name}'"), &error)
            })
        })
        .await??;
        domain.lock().autostart = on;
        Ok(())
    }

    /// Gives a domain that is off another name.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if it runs, is transient, or the name is taken; a bad name's; the
    /// disk's.
    pub async fn rename(self: &Arc<Self>, domain: Pinned, new: String) -> Result<()> {
        xml_schemas::domain::check_name(&new)?;
        let _job = domain.job().await?;
        let (old, definition) = {
            let inner = domain.lock();
            let Some(definition) = inner.stored()? else {
                return Err(Error::invalid("cannot rename a transient domain"));
            };
            if inner.live.is_some() {
                return Err(Error::invalid("cannot rename active domain"));
            }
            if !matches!(inner.state, State::Shutoff(_)) {
                return Err(Error::invalid("domain has to be shutoff before renaming"));
            }
            if inner.name == new {
                return Err(Error::invalid("Can't rename domain to itself"));
            }
            (domain.name_in(&inner), definition)
        };
        if self.has_managed_save(&domain) {
            return Err(Error::invalid(
                "domain with a managed saved state can't be renamed",
            ));
        }
        if self.count_snapshots(&domain)? > 0 {
            return Err(Error::invalid("cannot rename domain with snapshots"));
        }
        let mut renamed = Definition::clone(&definition);
        renamed.name.clone_from(&new);
        let stored = Stored::new(&Arc::new(renamed))?;
        self.registry.claim_name(&domain, &new)?;
        let written = {
            let (driver, old, new) = (Arc::clone(self), old.name.clone(), new.clone());
            blocking(move || {
                let written = driver.store.rename(&old, &new, stored.text());
                written.map(|()| stored)
            })
            .await
        };
        let done = matches!(written, Ok(Ok(_)));
        self.registry.finish_rename(&domain, &new, done);
        let stored =
            written?.map_err(|e| Error::system(format!("cannot rename '{}'", old.name), &e))?;
        let mut inner = domain.lock();
        inner.persistent = Some(stored);
        let name = domain.name_in(&inner);
        self.emit(&old, &DomainEvent::Lifecycle(Lifecycle::UndefinedRenamed));
        self.emit(&name, &DomainEvent::Lifecycle(Lifecycle::DefinedRenamed));
        Ok(())
    }

    /// Takes up a definition that the store has.
    pub(super) fn adopt(&self, who: &Identity, stored: Stored, autostart: bool) -> Result<Pinned> {
        let domain = self.registry.pin_or_make(who.uuid, &who.name)?;
        let mut inner = domain.lock();
        inner.persistent = Some(stored);
        inner.autostart = autostart;
        if !inner.is_active() {
            inner.state = State::Shutoff(ShutoffReason::Unknown);
        }
        drop(inner);
        Ok(domain)
    }
}

fn options(flags: u32) -> StartOptions {
    StartOptions {
        paused: flags & create_flags::PAUSED != 0,
        autodestroy: flags & create_flags::AUTODESTROY != 0,
        from: None,
        arriving: None,
    }
}
