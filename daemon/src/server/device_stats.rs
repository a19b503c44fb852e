//! The parts of virConnectGetAllDomainStats that concern devices.

use std::time::Duration;

use rpc::args::DomainGetBlockInfoRet;
use rpc::types::{TypedParam, TypedValue};
use tokio::time::Instant;
use vmm_api::control::{BalloonStats, DiskStats, NetStats, Stats};
use xml_schemas::Domain as Definition;
use xml_schemas::dom::{Element, Node};
use xml_schemas::domain::device::{Disk, Interface};

use super::Daemon;
use super::devices::{memory_values, resident_kib, stored_info};

/// How long images' headers are read for one domain.
const SIZES_LIMIT: Duration = Duration::from_secs(2);

/// Which parts are wanted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Groups {
    /// `balloon.*`
    pub balloon: bool,
    /// `net.*`
    pub interface: bool,
    /// `block.*`
    pub block: bool,
    /// What is behind images has entries too.
    pub backing: bool,
}

/// Those statistics of a domain with that definition, whose process, if it runs, has said that.
pub(super) async fn all_stats(
    daemon: &Daemon,
    (definition, pid, stats): (&Definition, Option<u32>, &Stats),
    groups: Groups,
    params: &mut Vec<TypedParam>,
) {
    let stored = match pid {
        None if groups.block => stored_sizes(daemon, definition).await,
        _ => Vec::new(),
    };
    let behind = match pid {
        Some(_) if groups.block && groups.backing => sizes_behind(daemon, definition).await,
        _ => Vec::new(),
    };
    let mut add = |name: String, value: TypedValue| params.push(TypedParam::new(name, value));
    if groups.balloon {
        balloon_stats(definition, pid, stats.balloon, &mut add);
    }
    let of = |name: &'static str| {
        definition
            .devices
            .rest
            .iter()
            .filter(move |e| e.name == name)
    };
    if groups.interface && pid.is_some() {
        let cards: Vec<Interface> = of("interface")
            .filter_map(|e| Interface::read(e).ok())
            .collect();
        add("net.count".into(), (cards.len() as u32).into());
        for (at, card) in cards.iter().enumerate() {
            let Some(name) = &card.target else { continue };
            add(format!("net.{at}.name"), TypedValue::String(name.clone()));
            let found = stats
                .nets
                .iter()
                .find(|(id, _)| Some(id) == card.alias.as_ref());
            for (name, value) in net_values(found.map(|(_, s)| *s).unwrap_or_default()) {
                add(format!("net.{at}.{name}"), value.into());
            }
        }
    }
    if groups.block {
        let mut entries: Vec<(String, TypedValue)> = Vec::new();
        let mut at = 0u32;
        for element in of("disk") {
            let Ok(disk) = Disk::read(element) else {
                continue;
            };
            let found = stats
                .disks
                .iter()
                .find(|(id, _)| Some(id) == disk.alias.as_ref());
            let source = element.child("source");
            let mut note = |name: &str, value: TypedValue| {
                entries.push((format!("block.{at}.{name}"), value));
            };
            note("name", TypedValue::String(disk.target.clone()));
            if let Some(path) = disk.source.path() {
                note("path", TypedValue::String(path.to_owned()));
            }
            if let Some(index) = index_of(source) {
                note("backingIndex", index.into());
            }
            if let Some((_, stats)) = found {
                for (name, value) in block_values(stats) {
                    note(name, value.into());
                }
                if stats.threshold > 0 {
                    note("threshold", stats.threshold.into());
                }
            }
            let sizes = stored.iter().find(|(target, _)| *target == disk.target);
            if let Some((_, sizes)) = sizes {
                for (name, value) in [
                    ("allocation", sizes.allocation),
                    ("capacity", sizes.capacity),
                    ("physical", sizes.physical),
                ] {
                    // As libvirt: what is 0 is not said.
                    if value != 0 {
                        note(name, value.into());
                    }
                }
            }
            at += 1;
            let behind_it = layers(element).filter(|_| groups.backing && pid.is_some());
            for (layer, number) in behind_it.zip(1u32..) {
                let mut note = |name: &str, value: TypedValue| {
                    entries.push((format!("block.{at}.{name}"), value));
                };
                note("name", TypedValue::String(disk.target.clone()));
                if let Some(path) = layer.child("source").and_then(|s| s.attr("file")) {
                    note("path", TypedValue::String(path.to_owned()));
                }
                if let Some(index) = index_of(Some(layer)) {
                    note("backingIndex", index.into());
                }
                let of = |(target, known, _): &&Behind| *target == disk.target && *known == number;
                if let Some((_, _, sizes)) = behind.iter().find(of) {
                    // Nobody writes there.
                    note("allocation", 0u64.into());
                    note("capacity", sizes.capacity.into());
                    note("physical", sizes.allocation.into());
                }
                let marked = stats.thresholds.iter();
                let mut marked =
                    marked.filter(|mark| Some(&mark.0) == disk.alias.as_ref() && mark.1 == number);
                if let Some((_, _, bytes)) = marked.next() {
                    note("threshold", (*bytes).into());
                }
                at += 1;
            }
        }
        add("block.count".into(), at.into());
        entries
            .into_iter()
            .for_each(|(name, value)| add(name, value));
    }
}

/// What is behind a running disk's image, the nearest first.
fn layers(disk: &Element) -> impl Iterator<Item = &Element> {
    let there = |layer: &&Element| layer.attr("type").is_some();
    let first = disk.child("backingStore").filter(there);
    std::iter::successors(first, move |layer| {
        layer.child("backingStore").filter(there)
    })
}

/// The sizes of an image behind a disk's, by target and number.
type Behind = (String, u32, DomainGetBlockInfoRet);

/// The sizes of what is behind the images of a running domain: those that can be had in a moment.
async fn sizes_behind(daemon: &Daemon, definition: &Definition) -> Vec<Behind> {
    let until = Instant::now() + SIZES_LIMIT;
    let mut sizes = Vec::new();
    for disk in definition.devices.rest.iter().filter(|e| e.name == "disk") {
        for (layer, number) in layers(disk).zip(1..) {
            let mut alone = disk.clone();
            for part in ["source", "backingStore", "driver"] {
                alone.take_children(part);
            }
            alone.set_opt_attr("type", layer.attr("type").map(str::to_owned));
            let format = layer.child("format").and_then(|e| e.attr("type"));
            let driver = Element::new("driver").with_attr("name", "qemu");
            alone.push(driver.with_attr("type", format.unwrap_or("raw")));
            alone
                .children
                .extend(layer.child("source").cloned().map(Node::Element));
            let Ok(alone) = Disk::read(&alone) else {
                continue;
            };
            let target = alone.target.clone();
            let found = tokio::time::timeout_at(until, stored_info(daemon, alone)).await;
            if let Ok(Ok(found)) = found {
                sizes.push((target, number, found));
            }
        }
    }
    sizes
}

/// The sizes of the images of a domain that is off, by target: those that can be had in a moment.
async fn stored_sizes(
    daemon: &Daemon,
    definition: &Definition,
) -> Vec<(String, DomainGetBlockInfoRet)> {
    let until = Instant::now() + SIZES_LIMIT;
    let disks = definition.devices.rest.iter().filter(|e| e.name == "disk");
    let mut sizes = Vec::new();
    for disk in disks.filter_map(|e| Disk::read(e).ok()) {
        let target = disk.target.clone();
        let found = tokio::time::timeout_at(until, stored_info(daemon, disk)).await;
        // An image that is not there, or that nobody can read now, has none.
        if let Ok(Ok(found)) = found {
            sizes.push((target, found));
        }
    }
    sizes
}

fn index_of(element: Option<&xml_schemas::dom::Element>) -> Option<u32> {
    element?.attr("index")?.parse().ok()
}

fn balloon_stats(
    definition: &Definition,
    pid: Option<u32>,
    balloon: Option<BalloonStats>,
    add: &mut impl FnMut(String, TypedValue),
) {
    let actual = balloon
        .map(|b| b.actual_bytes / 1024)
        .filter(|&kib| kib != 0);
    let current = actual.unwrap_or(definition.memory.current_kib);
    add("balloon.current".into(), current.into());
    add("balloon.maximum".into(), definition.memory.total_kib.into());
    let Some(pid) = pid else { return };
    for (tag, value) in memory_values(&balloon.unwrap_or_default(), resident_kib(pid)) {
        let name = match tag {
            0 => "swap_in",
            1 => "swap_out",
            2 => "major_fault",
            3 => "minor_fault",
            4 => "unused",
            5 => "available",
            7 => "rss",
            8 => "usable",
            9 => "last-update",
            10 => "disk_caches",
            11 => "hugetlb_pgalloc",
            12 => "hugetlb_pgfail",
            _ => continue,
        };
        add(format!("balloon.{name}"), value.into());
    }
}

fn net_values(stats: NetStats) -> [(&'static str, u64); 8] {
    [
        ("rx.bytes", stats.rx_bytes),
        ("rx.pkts", stats.rx_packets),
        ("rx.errs", stats.rx_errors),
        ("rx.drop", stats.rx_dropped),
        ("tx.bytes", stats.tx_bytes),
        ("tx.pkts", stats.tx_packets),
        ("tx.errs", stats.tx_errors),
        ("tx.drop", stats.tx_dropped),
    ]
}

fn block_values(stats: &DiskStats) -> [(&'static str, u64); 11] {
    [
        ("rd.reqs", stats.read_requests),
        ("rd.bytes", stats.read_bytes),
        ("rd.times", stats.read_ns),
        ("wr.reqs", stats.write_requests),
        ("wr.bytes", stats.write_bytes),
        ("wr.times", stats.write_ns),
        ("fl.reqs", stats.flush_requests),
        ("fl.times", stats.flush_ns),
        ("allocation", stats.physical),
        ("capacity", stats.capacity),
        // As libvirt: what the host has given, however long the file is.
        ("physical", stats.allocation),
    ]
}
