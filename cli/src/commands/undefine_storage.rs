//! The volumes that go with a domain: `undefine --storage`, `--remove-all-storage`.

use rpc::args::{StorageVolLookupByNameArgs, StorageVolLookupByPathArgs};
use rpc::procs;
use rpc::types::{Domain, StorageVol};
use xml_schemas::dom::{self, Element};

use super::{domain_xml, pool, volume};
use crate::command::Args;
use crate::failure::{Failure, Result};
use crate::shell::Shell;

/// `VIR_DOMAIN_XML_INACTIVE`
const XML_INACTIVE: u32 = 1 << 1;
/// `VIR_STORAGE_VOL_DELETE_WITH_SNAPSHOTS`
const WITH_SNAPSHOTS: u32 = 1 << 1;

/// A volume of a domain.
#[derive(Debug)]
struct Found {
    target: String,
    path: String,
    vol: StorageVol,
}

/// The volumes that go when the domain has gone.
#[derive(Debug, Default)]
pub struct Volumes {
    found: Vec<Found>,
    wipe: bool,
    flags: u32,
}

/// Where a disk's image is, as the definition says it.
enum Place {
    Path(String),
    Volume(String, String),
}

fn place(disk: &Element) -> Option<Place> {
    let source = disk.child("source")?;
    let of = |name: &str| source.attr(name).map(str::to_owned);
    if let (Some(pool), Some(volume)) = (of("pool"), of("volume")) {
        return Some(Place::Volume(pool, volume));
    }
    of("file").or_else(|| of("dev")).map(Place::Path)
}

impl Volumes {
    /// Finds the volumes that the options mean, before anything is removed.
    ///
    /// # Errors
    ///
    /// One that is named is none of the domain's.
    pub fn find(shell: &mut Shell, args: &Args, dom: &Domain) -> Result<Self> {
        let mut wanted: Option<Vec<String>> = args
            .text("storage")?
            .map(|list| list.split(',').map(str::to_owned).collect());
        let xml = domain_xml(shell, dom, XML_INACTIVE)?;
        let tree = dom::parse(&xml, "(domain_definition)")
            .map_err(|error| Failure::new(error.to_string()))?;
        let mut found = Vec::new();
        let disks = tree
            .child("devices")
            .into_iter()
            .flat_map(Element::elements);
        for disk in disks.filter(|e| e.name == "disk") {
            let target = disk
                .child("target")
                .and_then(|target| target.attr("dev"))
                .unwrap_or_default();
            let Some(place) = place(disk) else { continue };
            let path = match &place {
                Place::Path(path) => path.clone(),
                Place::Volume(_, volume) => volume.clone(),
            };
            match &mut wanted {
                Some(list) => {
                    let before = list.len();
                    list.retain(|word| *word != target && *word != path);
                    if list.len() == before {
                        continue;
                    }
                }
                // Media that were put in are not the domain's own.
                None if matches!(disk.attr("device"), Some("cdrom" | "floppy")) => continue,
                None => {}
            }
            match lookup(shell, &place) {
                Ok(vol) => found.push(Found {
                    target: target.to_owned(),
                    path: vol.key.clone(),
                    vol,
                }),
                Err(failure) if failure.disconnected => return Err(failure),
                Err(_) => shell.out.error(&format!(
                    "Storage volume '{target}'({path}) is not managed by libvirt. Remove it manually.\n"
                )),
            }
        }
        if let Some(missing) = wanted.and_then(|list| list.into_iter().next()) {
            return Err(Failure::new(format!(
                "Volume '{missing}' was not found in domain's definition."
            )));
        }
        let snapshots = args.has("delete-storage-volume-snapshots");
        Ok(Self {
            found,
            wipe: args.has("wipe-storage"),
            flags: if snapshots { WITH_SNAPSHOTS } else { 0 },
        })
    }

    /// Removes them. All are tried.
    ///
    /// # Errors
    ///
    /// Some are still there; which was told already.
    pub fn remove(self, shell: &mut Shell) -> Result {
        let mut failed = false;
        for Found { target, path, vol } in self.found {
            if self.wipe {
                shell
                    .out
                    .print_extra(format!("Wiping volume '{target}'({path}) ... "));
                shell.out.flush();
                if let Err(failure) = volume::wipe_with_zeroes(shell, vol.clone()) {
                    failed = true;
                    tell(shell, &failure, "Failed! Volume not removed.");
                    continue;
                }
                shell.out.print_extra("Done.\n");
            }
            match volume::remove(shell, vol, self.flags) {
                Ok(()) => shell
                    .out
                    .print_extra(format!("Volume '{target}'({path}) removed.\n")),
                Err(failure) => {
                    failed = true;
                    let what = format!("Failed to remove storage volume '{target}'({path})");
                    tell(shell, &failure, &what);
                }
            }
        }
        if failed {
            Err(Failure::silent())
        } else {
            Ok(())
        }
    }
}

fn tell(shell: &mut Shell, failure: &Failure, what: &str) {
    shell.out.error(what);
    for line in &failure.lines {
        shell.out.error(line);
    }
}

fn lookup(shell: &mut Shell, place: &Place) -> Result<StorageVol> {
    match place {
        Place::Path(path) => {
            let asked = StorageVolLookupByPathArgs { path: path.clone() };
            Ok(shell.call(procs::STORAGE_VOL_LOOKUP_BY_PATH, &asked)?.vol)
        }
        Place::Volume(pool, name) => {
            let asked = StorageVolLookupByNameArgs {
                pool: pool::lookup(shell, pool)?,
                name: name.clone(),
            };
            Ok(shell.call(procs::STORAGE_VOL_LOOKUP_BY_NAME, &asked)?.vol)
        }
    }
}
