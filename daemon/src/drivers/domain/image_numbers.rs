//! The numbers of a running domain's images (`<source index=…>`, `<backingStore index=…>`, `vda[2]`): as libvirt gives
//! them, which never gives one twice.

use xml_schemas::Domain;
use xml_schemas::dom::Element;

fn is_disk(element: &&Element) -> bool {
    element.name == "disk"
}

fn behind(image: &Element) -> Option<&Element> {
    // One that is empty ends a chain.
    let store = image.child("backingStore");
    store.filter(|store| store.child("source").is_some())
}

/// How many images a disk's element names; one without medium counts.
pub fn length(disk: &Element) -> usize {
    1 + std::iter::successors(behind(disk), |store| behind(store)).count()
}

/// The same of each disk, in their order.
pub fn lengths(definition: &Domain) -> Vec<usize> {
    let disks = definition.devices.rest.iter().filter(is_disk);
    disks.map(length).collect()
}

fn set(disk: &mut Element, depth: usize, number: u32) {
    let number = number.to_string();
    if depth == 0 {
        let sources = disk.elements_mut().filter(|e| e.name == "source");
        return sources.for_each(|source| source.set_attr("index", number.clone()));
    }
    let mut image = disk;
    for _ in 0..depth {
        let store = image.elements_mut().find(|e| e.name == "backingStore");
        let Some(store) = store else { return };
        image = store;
    }
    image.set_attr("index", number);
}

/// Numbers all images of a machine that starts: from the last disk to the first what the definition has stated
/// (`stated`: [`lengths`] of it), then, in the same order, what only headers have named. Gives the next number.
pub fn at_start(live: &mut Domain, stated: &[usize]) -> u32 {
    let disks = live.devices.rest.iter_mut();
    let disks = disks.filter(|element| element.name == "disk").zip(stated);
    let mut disks: Vec<(&mut Element, usize)> = disks.map(|(disk, &n)| (disk, n)).collect();
    let mut next = 1;
    let mut number = |disk: &mut Element, depths: std::ops::Range<usize>| {
        for depth in depths {
            set(disk, depth, next);
            next += 1;
        }
    };
    for (disk, stated) in disks.iter_mut().rev() {
        number(disk, 0..*stated);
    }
    for (disk, stated) in disks.iter_mut().rev() {
        let all = length(disk);
        number(disk, *stated..all);
    }
    next
}

/// Numbers the images of a disk that is plugged; the first number, and the next one afterwards. What only headers have
/// named uses numbers up before it gets its own.
pub fn plugged(disk: &mut Element, stated: usize, next: u32) -> u32 {
    let all = length(disk);
    let found = all.saturating_sub(stated);
    let mut next = next.saturating_add(u32::try_from(found).unwrap_or(0));
    for depth in 0..all {
        set(disk, depth, next);
        next = next.saturating_add(1);
    }
    next
}

/// The next number: the noted one, unless somebody has forgotten to note it.
pub fn next(live: &Domain, noted: u32) -> u32 {
    fn highest(element: &Element) -> u32 {
        let own = element.attr("index").and_then(|index| index.parse().ok());
        let below = element.elements().map(highest).max();
        own.unwrap_or(0).max(below.unwrap_or(0))
    }
    let disks = live.devices.rest.iter().filter(is_disk);
    let used = disks.flat_map(|disk| disk.elements()).map(highest).max();
    noted.max(used.unwrap_or(0).saturating_add(1))
}
