//! Control groups, version 2: one hierarchy. A group has a controller's files where its parent's
//! `cgroup.subtree_control` names the controller; groups of threads are `threaded`, which only some controllers know.

use std::path::Path;

use super::{
    Backend, Controller, DEFAULT_PERIOD, DeviceLimit, MemoryLimits, Version, make_folder, number,
    read, write,
};
use crate::error::{Error, Result};

/// Version 2.
#[derive(Debug)]
pub struct V2;

/// Share files of schedulers, and what they start with.
const WEIGHTS: [(&str, &str); 2] = [("io.bfq.weight", "100"), ("io.weight", "100")];

impl Backend for V2 {
    fn name(&self) -> &'static str {
        "v2"
    }

    fn make(&self, root: &Path, below: &Path, controller: Controller) -> Result<()> {
        let mut folder = root.to_owned();
        let count = below.components().count();
        for (at, part) in below.components().enumerate() {
            // What is below gets the controller from above.
            enable(&folder, controller)?;
            folder.push(part);
            // `/machine` and the domain's own; a partition between them is the administrator's to make.
            if at == 0 || at + 1 == count || folder.is_dir() {
                make_folder(self, &folder)?;
            } else {
                let error = std::io::Error::from_raw_os_error(libc::ENOENT);
                let text = format!("Failed to create v2 cgroup '{}'", folder.display());
                return Err(Error::system(text, &error));
            }
        }
        Ok(())
    }

    fn make_part(&self, group: &Path, name: &str, controller: Controller) -> Result<()> {
        let folder = group.join(name);
        make_folder(self, &folder)?;
        if read(&folder, "cgroup.type")? != "threaded" {
            write(&folder, "cgroup.type", "threaded")?;
        }
        enable(group, controller)
    }

    fn threads(&self) -> &'static str {
        "cgroup.threads"
    }

    fn shares_range(&self) -> (u64, u64, u64) {
        (1, 10_000, 100)
    }

    fn no_quota(&self) -> i64 {
        // As libvirt gives it.
        i64::try_from(u64::MAX / 1000).unwrap_or(i64::MAX)
    }

    fn shares(&self, group: &Path) -> Result<u64> {
        number("cpu.weight", &read(group, "cpu.weight")?)
    }

    fn set_shares(&self, group: &Path, shares: u64) -> Result<()> {
        write(group, "cpu.weight", &shares.to_string())
    }

    fn bandwidth(&self, group: &Path) -> Result<(u64, i64)> {
        let text = read(group, "cpu.max")?;
        let (quota, period) = text.split_once(' ').unwrap_or((&text, ""));
        let quota = match quota {
            "max" => self.no_quota(),
            quota => number("cpu.max", quota)?,
        };
        let period = match period {
            "" => DEFAULT_PERIOD,
            period => number("cpu.max", period)?,
        };
        Ok((period, quota))
    }

    fn set_bandwidth(&self, group: &Path, period: u64, quota: i64) -> Result<()> {
        let quota = if quota > 0 {
            quota.to_string()
        } else {
            "max".to_owned()
        };
        write(group, "cpu.max", &format!("{quota} {period}"))
    }

    fn memory(&self, group: &Path) -> Result<MemoryLimits> {
        let limit = |file: &str| -> Result<Option<u64>> {
            match read(group, file)?.as_str() {
                "max" => Ok(None),
                bytes => Ok(Some(number::<u64>(file, bytes)? / 1024)),
            }
        };
        let hard = limit("memory.max")?;
        let swap = if group.join("memory.swap.max").exists() {
            limit("memory.swap.max")?
        } else {
            None
        };
        Ok(MemoryLimits {
            hard,
            soft: limit("memory.high")?,
            // The kernel counts swap alone; libvirt's value is both together.
            swap: swap.map(|swap| swap.saturating_add(hard.unwrap_or(0))),
        })
    }

    fn set_memory(&self, group: &Path, limits: MemoryLimits) -> Result<()> {
        let text = |limit: Option<u64>| match limit {
            Some(kib) => kib.saturating_mul(1024).to_string(),
            None => "max".to_owned(),
        };
        write(group, "memory.max", &text(limits.hard))?;
        write(group, "memory.high", &text(limits.soft))?;
        let swap = limits
            .swap
            .map(|both| both.saturating_sub(limits.hard.unwrap_or(0)));
        let file = "memory.swap.max";
        if swap.is_none() && !group.join(file).exists() {
            return Ok(());
        }
        write(group, file, &text(swap))
    }

    fn weight(&self, group: &Path) -> Result<Option<u64>> {
        for (file, _) in WEIGHTS {
            if group.join(file).exists() {
                let text = read(group, file)?;
                let default = text.lines().find_map(|line| line.strip_prefix("default "));
                return number(file, default.unwrap_or(&text)).map(Some);
            }
        }
        Ok(None)
    }

    fn set_weight(&self, group: &Path, weight: Option<u64>) -> Result<()> {
        let known = WEIGHTS.iter().find(|(file, _)| group.join(file).exists());
        match (known, weight) {
            (Some((file, default)), None) => write(group, file, default),
            (Some((file, _)), Some(weight)) => write(group, file, &weight.to_string()),
            (None, None) => Ok(()),
            (None, Some(weight)) => write(group, WEIGHTS[1].0, &format!("default {weight}")),
        }
    }

    fn set_device(&self, group: &Path, device: &str, limit: DeviceLimit, value: u64) -> Result<()> {
        let key = match limit {
            DeviceLimit::Weight => {
                let known = WEIGHTS.iter().find(|(file, _)| group.join(file).exists());
                let Some((file, default)) = known else {
                    return Err(Error::invalid(
                        "blkio device weight is valid only for cfq scheduler",
                    ));
                };
                let text = match value {
                    0 => format!("{device} {default}"),
                    value => format!("{device} {value}"),
                };
                return write(group, file, &text);
            }
            DeviceLimit::ReadOps => "riops",
            DeviceLimit::WriteOps => "wiops",
            DeviceLimit::ReadBytes => "rbps",
            DeviceLimit::WriteBytes => "wbps",
        };
        let value = match value {
            0 => "max".to_owned(),
            value => value.to_string(),
        };
        write(group, "io.max", &format!("{device} {key}={value}"))
    }

    fn set_nodes(&self, group: &Path, nodes: &str) -> Result<()> {
        write(group, "cpuset.mems", nodes)
    }
}

/// Gives the groups below a group a controller.
fn enable(group: &Path, controller: Controller) -> Result<()> {
    let file = "cgroup.subtree_control";
    let name = controller.name(Version::V2);
    if read(group, file)?.split(' ').any(|known| known == name) {
        return Ok(());
    }
    write(group, file, &format!("+{name}"))
}

#[cfg(test)]
mod tests {
    use std::fs;

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

    /// Ordinary files are overwritten from the start, not cut: short values after long ones keep a tail.
    fn set(group: &TempFolder, file: &str) {
        fs::write(group.0.join(file), "").unwrap();
    }

    #[test]
    fn cpu_time_is_limited_by_one_file() {
        let group = group(&[("cpu.max", "max 100000\n"), ("cpu.weight", "100\n")]);
        assert_eq!(
            V2.bandwidth(&group.0).unwrap(),
            (100_000, 18_446_744_073_709_551)
        );
        set(&group, "cpu.max");
        V2.set_bandwidth(&group.0, 50_000, 10_000).unwrap();
        assert_eq!(text(&group, "cpu.max"), "10000 50000");
        assert_eq!(V2.bandwidth(&group.0).unwrap(), (50_000, 10_000));
        set(&group, "cpu.max");
        V2.set_bandwidth(&group.0, 50_000, -1).unwrap();
        assert_eq!(text(&group, "cpu.max"), "max 50000");
        assert_eq!(V2.shares(&group.0).unwrap(), 100);
    }

    #[test]
    fn swap_is_counted_without_memory() {
        let group = group(&[
            ("memory.max", ""),
            ("memory.high", ""),
            ("memory.swap.max", ""),
        ]);
        let limits = MemoryLimits {
            hard: Some(1000),
            soft: None,
            swap: Some(1500),
        };
        V2.set_memory(&group.0, limits).unwrap();
        assert_eq!(text(&group, "memory.max"), "1024000");
        assert_eq!(text(&group, "memory.high"), "max");
        assert_eq!(text(&group, "memory.swap.max"), "512000");
        assert_eq!(V2.memory(&group.0).unwrap(), limits);
    }

    #[test]
    fn devices_share_a_file() {
        let group = group(&[("io.max", ""), ("io.weight", "default 100\n")]);
        V2.set_device(&group.0, "8:0", DeviceLimit::ReadBytes, 4096)
            .unwrap();
        assert_eq!(text(&group, "io.max"), "8:0 rbps=4096");
        set(&group, "io.max");
        V2.set_device(&group.0, "8:0", DeviceLimit::WriteOps, 0)
            .unwrap();
        assert_eq!(text(&group, "io.max"), "8:0 wiops=max");
        assert_eq!(V2.weight(&group.0).unwrap(), Some(100));
        set(&group, "io.weight");
        V2.set_device(&group.0, "8:0", DeviceLimit::Weight, 300)
            .unwrap();
        assert_eq!(text(&group, "io.weight"), "8:0 300");
    }

    #[test]
    fn controllers_are_enabled_from_above_and_parts_are_threaded() {
        let temp = group(&[("cgroup.subtree_control", "")]);
        for folder in ["machine", "machine/d", "machine/d/vcpu0"] {
            let folder = temp.0.join(folder);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("cgroup.subtree_control"), "").unwrap();
            fs::write(folder.join("cgroup.type"), "domain\n").unwrap();
        }
        let below = Path::new("machine/d");
        V2.make(&temp.0, below, Controller::Memory).unwrap();
        assert_eq!(text(&temp, "cgroup.subtree_control"), "+memory");
        assert_eq!(text(&temp, "machine/cgroup.subtree_control"), "+memory");
        // A controller that threads cannot share must not go further down.
        assert_eq!(text(&temp, "machine/d/cgroup.subtree_control"), "");
        V2.make_part(&temp.0.join(below), "vcpu0", Controller::Cpu)
            .unwrap();
        assert_eq!(text(&temp, "machine/d/vcpu0/cgroup.type"), "threaded");
        assert_eq!(text(&temp, "machine/d/cgroup.subtree_control"), "+cpu");
    }
}
