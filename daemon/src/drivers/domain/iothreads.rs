//! I/O threads in definitions. The machine has none: a disk's engine brings its own.

use std::collections::BTreeSet;
use std::sync::Arc;

use xml_schemas::Domain as Definition;
use xml_schemas::cpuset;
use xml_schemas::dom::Element;

use super::Driver;
use super::metadata::impact;
use super::object::{Domain, Pinned};
use super::sections::{self, section};
use crate::error::{Error, ErrorCode, Result};

/// An I/O thread that a definition has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoThread {
    /// Its number, from 1.
    pub id: u32,
    /// The CPUs it may run on; `None`: any.
    pub cpus: Option<BTreeSet<u32>>,
}

/// What is done to one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It is new.
    Add,
    /// It goes.
    Remove,
    /// Where it runs.
    Pin(BTreeSet<u32>),
    /// How it polls.
    Set,
}

fn number(element: &Element, name: &str) -> Option<u32> {
    element.attr(name)?.parse().ok()
}

pub(super) fn ids(definition: &Definition) -> BTreeSet<u32> {
    let listed = section(definition, "iothreadids").into_iter();
    let mut ids: BTreeSet<u32> = listed
        .flat_map(Element::elements)
        .filter_map(|thread| number(thread, "id"))
        .collect();
    let count =
        section(definition, "iothreads").and_then(|e| e.text().trim().parse::<usize>().ok());
    // Those without a number of their own get the lowest free ones.
    let mut free = (1..=cpuset::MAX)
        .filter(|id| !ids.contains(id))
        .collect::<Vec<_>>()
        .into_iter();
    while ids.len() < count.unwrap_or(0) {
        match free.next() {
            Some(id) => ids.insert(id),
            None => break,
        };
    }
    ids
}

/// Whether a definition has any.
pub(super) fn has_any(definition: &Definition) -> bool {
    !ids(definition).is_empty()
}

fn write(definition: &mut Definition, ids: &BTreeSet<u32>) {
    definition
        .rest
        .retain(|e| e.name != "iothreads" && e.name != "iothreadids");
    if ids.is_empty() {
        return;
    }
    let count = Element::with_text("iothreads", ids.len().to_string());
    definition.rest.push(count);
    let in_order = ids
        .iter()
        .copied()
        .eq(1..=u32::try_from(ids.len()).unwrap_or(0));
    if !in_order {
        let mut list = Element::new("iothreadids");
        for id in ids {
            list.push(Element::new("iothread").with_attr("id", id.to_string()));
        }
        definition.rest.push(list);
    }
}

impl Driver {
    /// The I/O threads of a definition; a running domain has none.
    ///
    /// # Errors
    /// There is no such definition.
    pub fn iothreads(&self, domain: &Domain, flags: u32) -> Result<Vec<IoThread>> {
        let inner = domain.lock();
        let (live, _) = impact(&inner, flags)?;
        let stored = if live { None } else { inner.stored()? };
        let Some(definition) = stored else {
            return Ok(Vec::new());
        };
        let tune = section(&definition, "cputune");
        let pinned = |id: u32| {
            let mut pins = tune.into_iter().flat_map(Element::elements);
            let pin =
                pins.find(|e| e.name == "iothreadpin" && number(e, "iothread") == Some(id))?;
            cpuset::parse(pin.attr("cpuset")?)
        };
        Ok(ids(&definition)
            .into_iter()
            .map(|id| IoThread {
                id,
                cpus: pinned(id),
            })
            .collect())
    }

    /// Changes an I/O thread of a definition.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG where it is there already or not at all; a running domain's.
    pub async fn change_iothread(
        self: &Arc<Self>,
        domain: Pinned,
        id: u32,
        what: Change,
        flags: u32,
    ) -> Result<()> {
        let invalid = |text: String| Error::new(ErrorCode::INVALID_ARG, text);
        let live = async |_: &Definition| {
            Err(Error::unsupported(
                "IOThreads not supported with this binary",
            ))
        };
        let change = |definition: &mut Definition| {
            let mut all = ids(definition);
            if id == 0 || id > cpuset::MAX {
                return Err(invalid(format!("invalid value of 0 for iothread_id: {id}")));
            }
            let known = all.contains(&id);
            match &what {
                Change::Add if known => {
                    let text = format!("an IOThread is already using iothread_id '{id}'");
                    return Err(invalid(text));
                }
                Change::Add => {}
                _ if !known => {
                    let list = match what {
                        Change::Set => "iothreadids",
                        _ => "iothreadids list",
                    };
                    return Err(invalid(format!("cannot find IOThread '{id}' in {list}")));
                }
                _ => {}
            }
            let drop_pin = |definition: &mut Definition| {
                sections::change(definition, "cputune", |tune| {
                    let mut pins = tune.take_children("iothreadpin");
                    pins.retain(|pin| number(pin, "iothread") != Some(id));
                    pins.into_iter().for_each(|pin| tune.push(pin));
                });
            };
            match &what {
                Change::Add => {
                    all.insert(id);
                    write(definition, &all);
                }
                Change::Remove => {
                    let mut disks = definition
                        .devices
                        .rest
                        .iter()
                        .filter_map(|e| e.child("driver"));
                    if disks.any(|driver| number(driver, "iothread") == Some(id)) {
                        return Err(invalid(format!(
                            "cannot remove IOThread '{id}' since it is being used by disk"
                        )));
                    }
                    all.remove(&id);
                    write(definition, &all);
                    drop_pin(definition);
                }
                Change::Pin(cpus) => {
                    if cpus.is_empty() {
                        return Err(invalid("Empty iothread cpumap list for pinning".into()));
                    }
                    drop_pin(definition);
                    sections::change(definition, "cputune", |tune| {
                        tune.push(
                            Element::new("iothreadpin")
                                .with_attr("iothread", id.to_string())
                                .with_attr("cpuset", cpuset::format(cpus)),
                        );
                    });
                }
                Change::Set => {
                    return Err(Error::new(
                        ErrorCode::OPERATION_UNSUPPORTED,
                        "configuring persistent polling values is not supported",
                    ));
                }
            }
            Ok(())
        };
        self.modify(&domain, flags, live, change).await
    }
}
