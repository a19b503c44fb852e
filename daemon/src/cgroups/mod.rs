//! Control groups: what the kernel limits a running domain by.
//!
//! A domain gets a group of its own in the hierarchies of those controllers that it asks for, and in no other: one
//! that asks for none costs nothing. Version 1 has a hierarchy for each controller, version 2 one for all; a host may
//! have both ([`host`]). What is written where differs by version and is in [`v1`] and [`v2`]; all else is here.
//! (The kernel's documents: `admin-guide/cgroup-v1/` and `admin-guide/cgroup-v2.rst`.)

mod host;
mod v1;
mod v2;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use self::host::Host;
use crate::error::{Error, Result};
use crate::vmm_process::Identity;

/// The period that the kernel starts with, in microseconds.
pub const DEFAULT_PERIOD: u64 = 100_000;
/// How long an ended process's group may still be held by it.
const REMOVE_LIMIT: Duration = Duration::from_millis(500);

/// A part of the kernel that shares something out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Controller {
    /// CPU time.
    Cpu,
    /// NUMA nodes (and CPUs, which are set for each thread instead).
    Cpuset,
    /// Memory.
    Memory,
    /// Block devices.
    Block,
}

/// Which form of control groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Version {
    /// A hierarchy for each controller.
    V1,
    /// One for all.
    V2,
}

/// Limits of memory in KiB; `None`: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryLimits {
    /// Never more memory.
    pub hard: Option<u64>,
    /// No more where memory is scarce.
    pub soft: Option<u64>,
    /// Never more memory and swap.
    pub swap: Option<u64>,
}

/// A limit of one block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceLimit {
    /// Its share of the device.
    Weight,
    /// Reads a second.
    ReadOps,
    /// Writes a second.
    WriteOps,
    /// Bytes read a second.
    ReadBytes,
    /// Bytes written a second.
    WriteBytes,
}

/// What differs between the versions. Folders are groups'.
trait Backend {
    /// For messages.
    fn name(&self) -> &'static str;
    /// Makes the group `below` the hierarchy's root, with the controller in it.
    fn make(&self, root: &Path, below: &Path, controller: Controller) -> Result<()>;
    /// Makes a group for threads of a group's process.
    fn make_part(&self, group: &Path, name: &str, controller: Controller) -> Result<()>;
    /// The file of a part that takes threads.
    fn threads(&self) -> &'static str;
    /// `shares`: least, most, and what the kernel starts with.
    fn shares_range(&self) -> (u64, u64, u64);
    /// How no quota reads.
    fn no_quota(&self) -> i64;
    fn shares(&self, group: &Path) -> Result<u64>;
    fn set_shares(&self, group: &Path, shares: u64) -> Result<()>;
    /// Period and quota, microseconds.
    fn bandwidth(&self, group: &Path) -> Result<(u64, i64)>;
    /// A quota that is not positive is none.
    fn set_bandwidth(&self, group: &Path, period: u64, quota: i64) -> Result<()>;
    fn memory(&self, group: &Path) -> Result<MemoryLimits>;
    fn set_memory(&self, group: &Path, limits: MemoryLimits) -> Result<()>;
    fn weight(&self, group: &Path) -> Result<Option<u64>>;
    /// `None` is what the kernel starts with.
    fn set_weight(&self, group: &Path, weight: Option<u64>) -> Result<()>;
    /// `device` is `MAJOR:MINOR`; 0 takes the limit away.
    fn set_device(&self, group: &Path, device: &str, limit: DeviceLimit, value: u64) -> Result<()>;
    fn set_nodes(&self, group: &Path, nodes: &str) -> Result<()>;
}

impl Version {
    fn backend(self) -> &'static dyn Backend {
        match self {
            Self::V1 => &v1::V1,
            Self::V2 => &v2::V2,
        }
    }
}

/// A domain's group in a hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    controller: Controller,
    version: Version,
    /// The hierarchy's root, as far as this daemon goes.
    root: PathBuf,
    /// The group's folder below it.
    below: PathBuf,
    /// It is made, and the process with its threads is in it.
    #[serde(default)]
    ready: bool,
}

/// A domain's groups. Planned before they are made, so that they can be noted first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Groups(Vec<Group>);

impl Groups {
    /// Adds a group for a controller that is there.
    pub fn plan(&mut self, host: &Host, controller: Controller, below: &Path) -> bool {
        let Some(hierarchy) = host.hierarchy(controller) else {
            return false;
        };
        if self.get(controller).is_none() {
            self.0.push(Group {
                controller,
                version: hierarchy.version,
                root: hierarchy.root.clone(),
                below: below.to_owned(),
                ready: false,
            });
        }
        true
    }

    /// The group of a controller that is made, with the process in it.
    pub fn ready(&self, controller: Controller) -> Option<&Group> {
        self.get(controller).filter(|group| group.ready)
    }

    /// Notes that all of them are made, with the process in them.
    pub fn mark_all_ready(&mut self) {
        self.0.iter_mut().for_each(|group| group.ready = true);
    }

    /// As [`Self::mark_all_ready`], for one controller's.
    pub fn mark_ready(&mut self, controller: Controller) {
        let own = |group: &&mut Group| group.controller == controller;
        self.0
            .iter_mut()
            .filter(own)
            .for_each(|group| group.ready = true);
    }

    /// The process is in a controller's group already, as that is another one's as well.
    pub fn is_in(&self, controller: Controller) -> bool {
        self.shared(controller).any(|group| group.ready)
    }

    /// Others that have the folder of a controller's.
    fn shared(&self, controller: Controller) -> impl Iterator<Item = &Group> {
        let folder = self.get(controller).map(Group::folder);
        self.0.iter().filter(move |group| {
            group.controller != controller && folder.as_ref() == Some(&group.folder())
        })
    }

    /// The group of a controller, made or not.
    pub fn get(&self, controller: Controller) -> Option<&Group> {
        self.0.iter().find(|group| group.controller == controller)
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Group> {
        self.0.iter()
    }

    /// Where they are below their hierarchies' roots.
    pub fn below(&self) -> Option<&Path> {
        self.0.first().map(|group| group.below.as_path())
    }

    /// Forgets the group of a controller if it is another one's as well, or else if it can be removed.
    pub fn discard(&mut self, controller: Controller) {
        let shared = self.shared(controller).next().is_some();
        self.0.retain(|group| {
            group.controller != controller || !shared && remove_once(&group.folder()).is_err()
        });
    }

    fn folders(&self) -> Vec<PathBuf> {
        let mut folders: Vec<PathBuf> = self.0.iter().map(Group::folder).collect();
        folders.sort();
        folders.dedup();
        folders
    }

    /// Opens what puts a process into all of them: it writes `0` to each file.
    ///
    /// # Errors
    /// The system's.
    pub fn entries(&self) -> Result<Vec<File>> {
        let open = |folder: &PathBuf| {
            let path = folder.join("cgroup.procs");
            let opened = OpenOptions::new().write(true).open(&path);
            opened.map_err(|e| unwritable(&path, &e))
        };
        self.folders().iter().map(open).collect()
    }

    /// Removes them with their parts. Their process has ended, or was never there; threads of one that has just ended
    /// are waited for.
    pub fn remove(&self) {
        remove_all(&self.folders());
    }

    /// As [`Self::remove`], without waiting: what is still held then is removed by a thread.
    pub fn remove_soon(&self) {
        let mut held = self.folders();
        held.retain(|folder| remove_once(folder).is_err());
        if held.is_empty() {
            return;
        }
        let thread = std::thread::Builder::new().name("cgroups".to_owned());
        if let Err(error) = thread.spawn(move || remove_all(&held)) {
            log::warn!("control groups are left: no thread to remove them: {error}");
        }
    }
}

impl Group {
    fn folder(&self) -> PathBuf {
        self.root.join(&self.below)
    }

    fn part(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    fn backend(&self) -> &'static dyn Backend {
        self.version.backend()
    }

    /// Makes it.
    ///
    /// # Errors
    /// The system's.
    pub fn make(&self) -> Result<()> {
        self.backend()
            .make(&self.root, &self.below, self.controller)
    }

    /// Moves a process with all its threads into it.
    ///
    /// # Errors
    /// It has ended; the system's.
    pub fn take(&self, process: Identity) -> Result<()> {
        // The kernel knows a number here, which may be another process's one day.
        let is_there = || match Identity::of(process.pid) == Some(process) {
            true => Ok(()),
            false => Err(Error::invalid("the domain's process has ended")),
        };
        is_there()?;
        write(&self.folder(), "cgroup.procs", &process.pid.to_string())?;
        is_there()
    }

    /// Makes a part for some of the process's threads.
    ///
    /// # Errors
    /// The system's.
    pub fn make_part(&self, name: &str) -> Result<()> {
        self.backend()
            .make_part(&self.folder(), name, self.controller)
    }

    /// Moves a thread into a part. One that has ended is left alone.
    ///
    /// # Errors
    /// The system's.
    pub fn take_thread(&self, part: &str, thread: i32) -> Result<()> {
        let path = self.part(part).join(self.backend().threads());
        match put(&path, &thread.to_string()) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            Err(error) => Err(unwritable(&path, &error)),
            Ok(()) => Ok(()),
        }
    }

    /// Parts that are there.
    ///
    /// # Errors
    /// The system's.
    pub fn parts(&self) -> Result<Vec<String>> {
        let folder = self.folder();
        let read = || -> io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in fs::read_dir(&folder)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    names.extend(entry.file_name().into_string());
                }
            }
            Ok(names)
        };
        read().map_err(|e| unreadable(&folder, &e))
    }

    /// `shares`: least and most, and what the kernel starts with.
    pub fn shares_range(&self) -> (u64, u64, u64) {
        self.backend().shares_range()
    }

    /// How no quota reads.
    pub fn no_quota(&self) -> i64 {
        self.backend().no_quota()
    }

    /// Its share of CPU time.
    ///
    /// # Errors
    /// The system's.
    pub fn shares(&self) -> Result<u64> {
        self.backend().shares(&self.folder())
    }

    /// Sets it.
    ///
    /// # Errors
    /// The system's.
    pub fn set_shares(&self, shares: u64) -> Result<()> {
        self.backend().set_shares(&self.folder(), shares)
    }

    /// Period and quota of the group (`None`) or a part of it.
    ///
    /// # Errors
    /// The system's.
    pub fn bandwidth(&self, part: Option<&str>) -> Result<(u64, i64)> {
        self.backend().bandwidth(&self.of(part))
    }

    /// Sets them; a quota that is not positive is none.
    ///
    /// # Errors
    /// The system's.
    pub fn set_bandwidth(&self, part: Option<&str>, period: u64, quota: i64) -> Result<()> {
        self.backend().set_bandwidth(&self.of(part), period, quota)
    }

    fn of(&self, part: Option<&str>) -> PathBuf {
        part.map_or_else(|| self.folder(), |part| self.part(part))
    }

    /// Its limits of memory.
    ///
    /// # Errors
    /// The system's.
    pub fn memory(&self) -> Result<MemoryLimits> {
        self.backend().memory(&self.folder())
    }

    /// Sets them.
    ///
    /// # Errors
    /// The system's.
    pub fn set_memory(&self, limits: MemoryLimits) -> Result<()> {
        self.backend().set_memory(&self.folder(), limits)
    }

    /// Its share of block devices, where any of the host's schedulers knows shares.
    ///
    /// # Errors
    /// The system's.
    pub fn weight(&self) -> Result<Option<u64>> {
        self.backend().weight(&self.folder())
    }

    /// Sets it; `None` is what the kernel starts with.
    ///
    /// # Errors
    /// The system's.
    pub fn set_weight(&self, weight: Option<u64>) -> Result<()> {
        self.backend().set_weight(&self.folder(), weight)
    }

    /// Sets a limit of the block device at a path; 0 takes it away.
    ///
    /// # Errors
    /// The path is no block device; the system's.
    pub fn set_device(&self, path: &str, limit: DeviceLimit, value: u64) -> Result<()> {
        let device = device(path)?;
        self.backend()
            .set_device(&self.folder(), &device, limit, value)
    }

    /// Sets the NUMA nodes that memory comes from; what was taken from others moves.
    ///
    /// # Errors
    /// The system's.
    pub fn set_nodes(&self, nodes: &str) -> Result<()> {
        self.backend().set_nodes(&self.folder(), nodes)
    }
}

/// What a group's file refuses; in libvirt's words.
fn unwritable(path: &Path, error: &io::Error) -> Error {
    Error::system(format!("Unable to write to '{}'", path.display()), error)
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    Error::system(format!("Unable to read from '{}'", path.display()), error)
}

fn put(path: &Path, value: &str) -> io::Result<()> {
    use std::io::Write;
    // Neither made nor cut: these files are the kernel's.
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

fn write(folder: &Path, file: &str, value: &str) -> Result<()> {
    let path = folder.join(file);
    put(&path, value).map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => {
            Error::system(format!("Invalid value '{value}' for '{file}'"), &error)
        }
        _ => unwritable(&path, &error),
    })
}

fn read(folder: &Path, file: &str) -> Result<String> {
    let path = folder.join(file);
    let text = fs::read_to_string(&path).map_err(|e| unreadable(&path, &e))?;
    Ok(text.trim().to_owned())
}

fn number<T: std::str::FromStr>(file: &str, text: &str) -> Result<T> {
    text.trim()
        .parse()
        .map_err(|_| Error::internal(format!("Unable to parse '{text}' of '{file}'")))
}

/// Makes a folder that may be there already.
fn make_folder(backend: &dyn Backend, path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(Error::system(
            format!(
                "Failed to create {} cgroup '{}'",
                backend.name(),
                path.display()
            ),
            &error,
        )),
        _ => Ok(()),
    }
}

/// `MAJOR:MINOR` of the block device at a path.
fn device(path: &str) -> Result<String> {
    let meta = fs::metadata(path)
        .map_err(|e| Error::system(format!("Path '{path}' is not accessible"), &e))?;
    if !meta.file_type().is_block_device() {
        return Err(Error::system(
            format!("Path '{path}' must be a block device"),
            &io::Error::from_raw_os_error(libc::EINVAL),
        ));
    }
    let number = meta.rdev();
    Ok(format!("{}:{}", libc::major(number), libc::minor(number)))
}

fn remove_all(folders: &[PathBuf]) {
    let deadline = Instant::now() + REMOVE_LIMIT;
    for folder in folders {
        if let Err(error) = remove(folder, deadline) {
            log::warn!("cannot remove {}: {error}", folder.display());
        }
    }
}

/// Removes a group with its parts; one that is not there is removed already.
fn remove(folder: &Path, deadline: Instant) -> io::Result<()> {
    loop {
        match remove_once(folder) {
            // Threads of an ended process are gone a moment after it.
            Err(error)
                if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            done => return done,
        }
    }
}

fn remove_once(folder: &Path) -> io::Result<()> {
    let gone = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    };
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            gone(fs::remove_dir(entry.path()))?;
        }
    }
    gone(fs::remove_dir(folder))
}

/// The folder of a domain's group, below a hierarchy's root.
///
/// `unique` keeps apart the domains of daemons that know nothing of each other.
///
/// # Errors
/// VIR_ERR_CONFIG_UNSUPPORTED for a partition that is no absolute path.
pub fn below(partition: Option<&str>, id: i32, name: &str, unique: &str) -> Result<PathBuf> {
    let partition = partition.unwrap_or("/machine");
    let Some(inside) = partition.strip_prefix('/') else {
        return Err(Error::unsupported(format!(
            "Resource partition '{partition}' must start with '/'"
        )));
    };
    let mut folder = PathBuf::new();
    for (at, part) in inside
        .split('/')
        .filter(|part| !part.is_empty())
        .enumerate()
    {
        if matches!(part, "." | "..") || part.contains('\0') {
            return Err(Error::unsupported(format!(
                "Resource partition '{partition}' is no path of groups"
            )));
        }
        // As libvirt names them, so that a partition made for it can be shared.
        let known = ["slice", "partition", "scope", "service", "machine"];
        let suffix = Path::new(part).extension().and_then(OsStr::to_str);
        let plain = at > 0 && !suffix.is_some_and(|suffix| known.contains(&suffix));
        folder.push(if plain {
            format!("{part}.partition")
        } else {
            part.to_owned()
        });
    }
    const LONGEST: usize = 48;
    let plain = |c: char| match c {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '-' => c,
        _ => '-',
    };
    let name: String = name.chars().map(plain).take(LONGEST).collect();
    folder.push(format!("vireo-{id}-{name}{unique}"));
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::TempFolder;

    #[test]
    fn groups_are_named_after_their_domains_and_nothing_else() {
        let of = |partition, name: &str| {
            below(partition, 7, name, ".x").map(|p| p.display().to_string())
        };
        assert_eq!(of(None, "one").unwrap(), "machine/vireo-7-one.x");
        assert_eq!(of(None, "../a b/ü").unwrap(), "machine/vireo-7----a-b--.x");
        assert_eq!(
            of(Some("/machine/web/a.slice"), "one").unwrap(),
            "machine/web.partition/a.slice/vireo-7-one.x"
        );
        assert!(of(Some("/machine/../x"), "one").is_err());
        assert_eq!(
            of(Some("machine"), "one").unwrap_err().message,
            "unsupported configuration: Resource partition 'machine' must start with '/'"
        );
        let long = of(None, &"n".repeat(300)).unwrap();
        assert!(long.len() < 100, "{long}");
    }

    #[test]
    fn devices_are_block_devices() {
        let no = |path: &str| device(path).unwrap_err().message;
        assert_eq!(
            no("/nope"),
            "Path '/nope' is not accessible: No such file or directory"
        );
        assert_eq!(
            no("/dev/null"),
            "Path '/dev/null' must be a block device: Invalid argument"
        );
    }

    #[test]
    fn removing_takes_the_parts_along_and_can_be_repeated() {
        let temp = TempFolder::new();
        let group = temp.0.join("g");
        fs::create_dir_all(group.join("vcpu0")).unwrap();
        let now = Instant::now();
        remove(&group, now).unwrap();
        assert!(!group.exists());
        remove(&group, now).unwrap();
    }

    #[test]
    fn half_made_groups_are_not_ready_and_shared_ones_are_only_forgotten() {
        let temp = TempFolder::new();
        let group = |controller, below: &str| Group {
            controller,
            version: Version::V2,
            root: temp.0.clone(),
            below: below.into(),
            ready: false,
        };
        let mut groups = Groups(vec![
            group(Controller::Cpu, "a"),
            group(Controller::Memory, "a"),
            group(Controller::Block, "b"),
        ]);
        for folder in ["a", "b/held/by"] {
            fs::create_dir_all(temp.0.join(folder)).unwrap();
        }
        assert_eq!(groups.ready(Controller::Cpu), None);
        groups.mark_ready(Controller::Cpu);
        assert!(groups.ready(Controller::Cpu).is_some());
        assert!(groups.is_in(Controller::Memory));
        assert!(!groups.is_in(Controller::Cpu) && !groups.is_in(Controller::Block));

        groups.discard(Controller::Memory);
        assert!(groups.get(Controller::Memory).is_none() && temp.0.join("a").exists());
        // Something is in it: noted, so that it is removed one day, and not ready.
        groups.discard(Controller::Block);
        assert!(groups.get(Controller::Block).is_some());
        assert_eq!(groups.ready(Controller::Block), None);
        fs::remove_dir(temp.0.join("b/held/by")).unwrap();
        groups.remove_soon();
        assert!(!temp.0.join("a").exists() && !temp.0.join("b").exists());
    }

    #[test]
    fn groups_are_recorded() {
        let group = Group {
            controller: Controller::Block,
            version: Version::V1,
            root: "/sys/fs/cgroup/blkio".into(),
            below: "machine/vireo-1-a".into(),
            ready: false,
        };
        let groups = Groups(vec![group]);
        let text = serde_json::to_string(&groups).unwrap();
        assert_eq!(serde_json::from_str::<Groups>(&text).unwrap(), groups);
    }
}
