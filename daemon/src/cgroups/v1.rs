//! Control groups, version 1: a hierarchy for each controller.

use std::fs;
use std::path::Path;

use super::{Backend, Controller, DeviceLimit, MemoryLimits, make_folder, number, read, write};
use crate::error::{Error, Result};

/// Version 1.
#[derive(Debug)]
pub struct V1;

/// Limits from here on are none: the kernel's largest is a whole number of pages.
const UNLIMITED_KIB: u64 = (i64::MAX as u64 >> 10) - (1 << 10);
/// A scheduler's share files, newest first.
const WEIGHTS: [(&str, &str, &str); 2] = [
    ("blkio.bfq.weight", "blkio.bfq.weight_device", "100"),
    ("blkio.weight", "blkio.weight_device", "500"),
];

impl Backend for V1 {
    fn name(&self) -> &'static str {
        "v1"
    }

    fn make(&self, root: &Path, below: &Path, controller: Controller) -> Result<()> {
        let mut folder = root.to_owned();
        let count = below.components().count();
        for (at, part) in below.components().enumerate() {
            let parent = folder.clone();
            folder.push(part);
            // `/machine` and the domain's own; a partition between them is the administrator's to make.
            if at == 0 || at + 1 == count || folder.is_dir() {
                make_folder(self, &folder)?;
            } else {
                let error = std::io::Error::from_raw_os_error(libc::ENOENT);
                let text = format!("Failed to create v1 cgroup '{}'", folder.display());
                return Err(Error::system(text, &error));
            }
            if controller == Controller::Cpuset {
                inherit(&parent, &folder)?;
            }
        }
        Ok(())
    }

    fn make_part(&self, group: &Path, name: &str, controller: Controller) -> Result<()> {
        let folder = group.join(name);
        make_folder(self, &folder)?;
        match controller {
            Controller::Cpuset => inherit(group, &folder),
            _ => Ok(()),
        }
    }

    fn threads(&self) -> &'static str {
        "tasks"
    }

    fn shares_range(&self) -> (u64, u64, u64) {
        (2, 262_144, 1024)
    }

    fn no_quota(&self) -> i64 {
        -1
    }

    fn shares(&self, group: &Path) -> Result<u64> {
        number("cpu.shares", &read(group, "cpu.shares")?)
    }

    fn set_shares(&self, group: &Path, shares: u64) -> Result<()> {
        write(group, "cpu.shares", &shares.to_string())
    }

    fn bandwidth(&self, group: &Path) -> Result<(u64, i64)> {
        Ok((
            number("cpu.cfs_period_us", &read(group, "cpu.cfs_period_us")?)?,
            number("cpu.cfs_quota_us", &read(group, "cpu.cfs_quota_us")?)?,
        ))
    }

    fn set_bandwidth(&self, group: &Path, period: u64, quota: i64) -> Result<()> {
        let (old_period, _) = self.bandwidth(group)?;
        if period != old_period {
            // One after the other they might mean something that is not allowed in between.
            write(group, "cpu.cfs_quota_us", "-1")?;
            write(group, "cpu.cfs_period_us", &period.to_string())?;
        }
        let quota = if quota > 0 { quota } else { -1 };
        write(group, "cpu.cfs_quota_us", &quota.to_string())
    }

    fn memory(&self, group: &Path) -> Result<MemoryLimits> {
        let limit = |file: &str| -> Result<Option<u64>> {
            let kib = number::<u64>(file, &read(group, file)?)? / 1024;
            Ok((kib < UNLIMITED_KIB).then_some(kib))
        };
        let accounts_swap = group.join("memory.memsw.limit_in_bytes").exists();
        Ok(MemoryLimits {
            hard: limit("memory.limit_in_bytes")?,
            soft: limit("memory.soft_limit_in_bytes")?,
            swap: if accounts_swap {
                limit("memory.memsw.limit_in_bytes")?
            } else {
                None
            },
        })
    }

    fn set_memory(&self, group: &Path, limits: MemoryLimits) -> Result<()> {
        let text = |limit: Option<u64>| match limit {
            Some(kib) => kib.saturating_mul(1024).to_string(),
            None => "-1".to_owned(),
        };
        let hard = || write(group, "memory.limit_in_bytes", &text(limits.hard));
        let swap = || {
            let file = "memory.memsw.limit_in_bytes";
            if limits.swap.is_none() && !group.join(file).exists() {
                return Ok(());
            }
            write(group, file, &text(limits.swap))
        };
        // Memory alone may never be allowed more than with swap, not for a moment either.
        let most = self.memory(group)?.swap.unwrap_or(u64::MAX);
        if limits.hard.unwrap_or(u64::MAX) > most {
            swap()?;
            hard()?;
        } else {
            hard()?;
            swap()?;
        }
        write(group, "memory.soft_limit_in_bytes", &text(limits.soft))
    }

    fn weight(&self, group: &Path) -> Result<Option<u64>> {
        for (file, _, _) in WEIGHTS {
            if group.join(file).exists() {
                return number(file, &read(group, file)?).map(Some);
            }
        }
        Ok(None)
    }

    fn set_weight(&self, group: &Path, weight: Option<u64>) -> Result<()> {
        let known = WEIGHTS
            .iter()
            .find(|(file, _, _)| group.join(file).exists());
        match (known, weight) {
            (Some((file, _, default)), None) => write(group, file, default),
            (Some((file, _, _)), Some(weight)) => write(group, file, &weight.to_string()),
            (None, None) => Ok(()),
            (None, Some(weight)) => write(group, WEIGHTS[1].0, &weight.to_string()),
        }
    }

    fn set_device(&self, group: &Path, device: &str, limit: DeviceLimit, value: u64) -> Result<()> {
        let file = match limit {
            DeviceLimit::Weight => {
                let known = WEIGHTS
                    .iter()
                    .find(|(_, file, _)| group.join(file).exists());
                let Some((_, file, _)) = known else {
                    return Err(Error::invalid(
                        "blkio device weight is valid only for cfq scheduler",
                    ));
                };
                file
            }
            DeviceLimit::ReadOps => "blkio.throttle.read_iops_device",
            DeviceLimit::WriteOps => "blkio.throttle.write_iops_device",
            DeviceLimit::ReadBytes => "blkio.throttle.read_bps_device",
            DeviceLimit::WriteBytes => "blkio.throttle.write_bps_device",
        };
        write(group, file, &format!("{device} {value}"))
    }

    fn set_nodes(&self, group: &Path, nodes: &str) -> Result<()> {
        // What is on other nodes comes along.
        write(group, "cpuset.memory_migrate", "1")?;
        write(group, "cpuset.mems", nodes)
    }
}

/// A new group of this controller takes no process until it has CPUs and nodes.
fn inherit(parent: &Path, group: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let path = group.join(file);
        let own = fs::read_to_string(&path).unwrap_or_default();
        if own.trim().is_empty() {
            write(group, file, &read(parent, file)?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::TempFolder;

    fn group(files: &[(&str, &str)]) -> TempFolder {
        let temp = TempFolder::new();
        for (file, text) in files {
            fs::write(temp.0.join(file), text).unwrap();
        }
        temp
    }

    fn text(group: &TempFolder, file: &str) -> String {
        fs::read_to_string(group.0.join(file)).unwrap()
    }

    #[test]
    fn cpu_time_is_limited_by_three_files() {
        let group = group(&[
            ("cpu.shares", "1024\n"),
            ("cpu.cfs_period_us", "100000\n"),
            ("cpu.cfs_quota_us", "-1    \n"),
        ]);
        assert_eq!(V1.bandwidth(&group.0).unwrap(), (100_000, -1));
        V1.set_shares(&group.0, 4096).unwrap();
        assert_eq!(V1.shares(&group.0).unwrap(), 4096);
        V1.set_bandwidth(&group.0, 100_000, 20_000).unwrap();
        assert_eq!(text(&group, "cpu.cfs_quota_us").trim(), "20000");
    }

    #[test]
    fn unlimited_memory_reads_as_none() {
        let group = group(&[
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory.soft_limit_in_bytes", "1048576\n"),
            ("memory.memsw.limit_in_bytes", "9223372036854771712\n"),
        ]);
        let limits = V1.memory(&group.0).unwrap();
        let soft = Some(1024);
        assert_eq!(
            limits,
            MemoryLimits {
                soft,
                ..MemoryLimits::default()
            }
        );
    }

    #[test]
    fn devices_have_a_file_for_each_limit() {
        let files = [
            ("blkio.throttle.read_iops_device", ""),
            ("blkio.throttle.write_bps_device", ""),
        ];
        let group = group(&files);
        V1.set_device(&group.0, "8:16", DeviceLimit::ReadOps, 5)
            .unwrap();
        V1.set_device(&group.0, "8:16", DeviceLimit::WriteBytes, 0)
            .unwrap();
        assert_eq!(text(&group, files[0].0), "8:16 5");
        assert_eq!(text(&group, files[1].0), "8:16 0");
        let refused = V1.set_device(&group.0, "8:16", DeviceLimit::Weight, 5);
        assert_eq!(
            refused.unwrap_err().message,
            "Requested operation is not valid: blkio device weight is valid only for cfq scheduler"
        );
        assert_eq!(V1.weight(&group.0).unwrap(), None);
        V1.set_weight(&group.0, None).unwrap();
        assert!(
            V1.set_weight(&group.0, Some(100)).is_err(),
            "there is no scheduler for it"
        );
    }

    #[test]
    fn a_new_cpuset_has_what_its_parent_has() {
        let temp = group(&[("cpuset.cpus", "0-1\n"), ("cpuset.mems", "0\n")]);
        // The kernel makes the files with the folder.
        for folder in ["machine", "machine/d"] {
            let folder = temp.0.join(folder);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("cpuset.cpus"), "\n").unwrap();
            fs::write(folder.join("cpuset.mems"), "\n").unwrap();
        }
        V1.make(&temp.0, Path::new("machine/d"), Controller::Cpuset)
            .unwrap();
        assert_eq!(text(&temp, "machine/d/cpuset.cpus"), "0-1");
        assert_eq!(text(&temp, "machine/d/cpuset.mems").trim(), "0");
        let partition = V1.make(&temp.0, Path::new("machine/p.partition/d"), Controller::Cpu);
        let message = partition.unwrap_err().message;
        assert!(
            message.starts_with("Failed to create v1 cgroup"),
            "{message}"
        );
        assert!(
            message.ends_with("p.partition': No such file or directory"),
            "{message}"
        );
    }
}
