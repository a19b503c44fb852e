//! Which controllers this host has, and where.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Controller, Version};

/// Where groups of a controller are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Its version.
    pub version: Version,
    /// The folder below which this daemon makes groups.
    pub root: PathBuf,
}

/// The hierarchies of a host, by controller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host(Vec<(Controller, Hierarchy)>);

const ALL: [Controller; 4] = [
    Controller::Cpu,
    Controller::Cpuset,
    Controller::Memory,
    Controller::Block,
];

impl Controller {
    /// Its name in either version.
    pub(super) fn name(self, version: Version) -> &'static str {
        match (self, version) {
            (Self::Cpu, _) => "cpu",
            (Self::Cpuset, _) => "cpuset",
            (Self::Memory, _) => "memory",
            (Self::Block, Version::V1) => "blkio",
            (Self::Block, Version::V2) => "io",
        }
    }
}

impl Host {
    /// As it is now. A host without control groups has none of them.
    pub fn look() -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::read(&mounts, &own, is_delegated)
    }

    /// From proc(5)'s mountinfo and cgroup.
    fn read(mounts: &str, own: &str, is_delegated: impl Fn(&Path) -> bool) -> Self {
        let mut found: Vec<(Controller, Hierarchy)> = Vec::new();
        for line in mounts.lines() {
            let Some(mount) = Mount::parse(line) else {
                continue;
            };
            let (version, root) = match mount.kind {
                "cgroup" => (Version::V1, mount.point.clone()),
                "cgroup2" => (Version::V2, root_v2(&mount.point, own, &is_delegated)),
                _ => continue,
            };
            let names = match version {
                Version::V1 => mount.options.replace(',', " "),
                Version::V2 => {
                    fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default()
                }
            };
            for controller in ALL {
                let name = controller.name(version);
                let there = names.split_whitespace().any(|known| known == name);
                if there && !found.iter().any(|(known, _)| *known == controller) {
                    let root = root.clone();
                    found.push((controller, Hierarchy { version, root }));
                }
            }
        }
        Self(found)
    }

    /// Where groups of that controller are made, if it is there.
    pub fn hierarchy(&self, controller: Controller) -> Option<&Hierarchy> {
        let mut all = self.0.iter();
        all.find_map(|(known, hierarchy)| (*known == controller).then_some(hierarchy))
    }
}

/// Where systemd has given us a group that holds ours (`Delegate=` with `DelegateSubgroup=`): below that. Else at the
/// hierarchy's root, as libvirt does without systemd. A delegated group that the daemon itself is in is not used:
/// groups with controllers in it would keep systemd from starting the daemon there again while domains run, as
/// processes may not be in such a group.
fn root_v2(mount: &Path, own: &str, is_delegated: &impl Fn(&Path) -> bool) -> PathBuf {
    let group = own.lines().find_map(|line| line.strip_prefix("0::/"));
    let parent = group.and_then(|group| Some(mount.join(Path::new(group).parent()?)));
    parent
        .filter(|parent| parent != mount && is_delegated(parent))
        .unwrap_or_else(|| mount.to_owned())
}

/// Whether systemd says so (systemd.resource-control(5), `Delegate=`).
fn is_delegated(group: &Path) -> bool {
    let Ok(path) = std::ffi::CString::new(group.as_os_str().as_bytes()) else {
        return false;
    };
    [c"trusted.delegate", c"user.delegate"].iter().any(|name| {
        let mut value = [0u8; 8];
        // SAFETY: both names end with a zero, and the buffer has the length that is given.
        let length = unsafe {
            libc::getxattr(
                path.as_ptr(),
                name.as_ptr(),
                value.as_mut_ptr().cast(),
                value.len(),
            )
        };
        length == 1 && value[0] == b'1'
    })
}

/// A line of `/proc/self/mountinfo`.
struct Mount<'a> {
    point: PathBuf,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (first, last) = line.split_once(" - ")?;
        let mut last = last.split(' ');
        let kind = last.next()?;
        Some(Self {
            point: unescape(first.split(' ').nth(4)?),
            kind,
            options: last.nth(1).unwrap_or_default(),
        })
    }
}

/// Blanks and the like are written in octal: `\040`.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = after
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from(std::ffi::OsStr::from_bytes(
        &bytes,
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::TempFolder;

    #[test]
    fn controllers_are_found_in_either_version() {
        let temp = TempFolder::new();
        let unified = temp.0.join("uni fied");
        fs::create_dir(&unified).unwrap();
        fs::write(unified.join("cgroup.controllers"), "io memory pids\n").unwrap();
        let mounts = format!(
            "30 25 0:26 / /sys/fs/cgroup ro shared:9 - tmpfs tmpfs ro,mode=755\n\
             31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:15 - cgroup cgroup rw,cpu,cpuacct\n\
             32 30 0:28 / {} rw shared:15 - cgroup2 cgroup2 rw,nsdelegate\n\
             garbage - \n",
            unified.display().to_string().replace(' ', "\\040")
        );
        let host = Host::read(&mounts, "0::/a/b\n", |_| false);
        let of = |controller| {
            let hierarchy = host.hierarchy(controller)?;
            Some((hierarchy.version, hierarchy.root.clone()))
        };
        let together = Some((Version::V1, "/sys/fs/cgroup/cpu,cpuacct".into()));
        assert_eq!(of(Controller::Cpu), together);
        assert_eq!(of(Controller::Memory), Some((Version::V2, unified.clone())));
        assert_eq!(of(Controller::Block), Some((Version::V2, unified)));
        assert_eq!(of(Controller::Cpuset), None);
        assert_eq!(Host::read("", "", |_| true), Host::default());
    }

    #[test]
    fn a_delegated_group_is_used_where_the_daemon_is_below_it() {
        let delegated = |path: &Path| path.ends_with("vireod.service");
        let of = |own: &str| {
            root_v2(Path::new("/c"), own, &delegated)
                .display()
                .to_string()
        };
        assert_eq!(
            of("1:cpu:/x\n0::/system.slice/vireod.service/daemon\n"),
            "/c/system.slice/vireod.service"
        );
        assert_eq!(of("0::/system.slice/vireod.service\n"), "/c");
        assert_eq!(of("0::/\n"), "/c");
        assert_eq!(of("1:cpu:/x\n"), "/c");
    }
}
