//! `host-validate`: what this host has for guests, in the manner of virt-host-validate.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use hypervisor::host::{self, HostReport, KvmDevice, KvmVerdict};

/// How a check ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Pass,
    /// Guests run, but lack something.
    Warn(String),
    /// Guests lack something important.
    Fail(String),
}

/// All checks of a host, and what they mean for guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    checks: Vec<(String, Outcome)>,
    conclusion: String,
}

impl Report {
    /// Whether anything important is missing.
    pub fn failed(&self) -> bool {
        self.checks
            .iter()
            .any(|(_, outcome)| matches!(outcome, Outcome::Fail(_)))
    }

    /// The report as text; in colours for a terminal.
    pub fn format(&self, colours: bool) -> String {
        let mut text = String::new();
        for (what, outcome) in &self.checks {
            let (word, colour, hint) = match outcome {
                Outcome::Pass => ("PASS", 32, None),
                Outcome::Warn(hint) => ("WARN", 33, Some(hint)),
                Outcome::Fail(hint) => ("FAIL", 31, Some(hint)),
            };
            let word = if colours {
                format!("\x1b[{colour}m{word}\x1b[0m")
            } else {
                word.to_owned()
            };
            // Writing to a String cannot fail.
            let _ = write!(text, "  QEMU: Checking {what:<60}: {word}");
            if let Some(hint) = hint {
                let _ = write!(text, " ({hint})");
            }
            text.push('\n');
        }
        let _ = write!(text, "\n{}\n", self.conclusion);
        text
    }
}

/// Looks at this host now.
pub fn check_host() -> Report {
    let report = host::report();
    let root = Path::new("/");
    let mut checks = kvm_checks(&report, root);
    checks.push((
        "if device /dev/vhost-net exists".into(),
        exists(
            root,
            "dev/vhost-net",
            "Without it guests' networks are slower: load the module vhost_net",
        ),
    ));
    checks.push((
        "if device /dev/net/tun exists".into(),
        exists(
            root,
            "dev/net/tun",
            "Without it guests have no network: load the module tun",
        ),
    ));
    checks.extend(cgroup_checks(root));
    checks.push(("for device assignment IOMMU support".into(), iommu(root)));
    checks.push(("for secure guest support".into(), secure_guests(root)));
    Report {
        checks,
        conclusion: conclusion(&report),
    }
}

fn exists(root: &Path, path: &str, hint: &str) -> Outcome {
    if root.join(path).exists() {
        Outcome::Pass
    } else {
        Outcome::Warn(hint.into())
    }
}

fn kvm_checks(report: &HostReport, root: &Path) -> Vec<(String, Outcome)> {
    let hardware = report.hardware != host::HardwareVirtualization::Absent;
    let mut checks = vec![(
        "for hardware virtualization".into(),
        if hardware {
            Outcome::Pass
        } else {
            Outcome::Fail(
                "The CPU shows neither VT-x (vmx) nor AMD-V (svm): guests run on the software CPU, much slower"
                    .into(),
            )
        },
    )];
    let is_there = !matches!(report.kvm, KvmDevice::Missing);
    if hardware || is_there {
        let exists = if is_there {
            Outcome::Pass
        } else if root.join("sys/module/kvm").exists() {
            Outcome::Fail("Load the module kvm_intel or kvm_amd, and see that the firmware leaves virtualization on".into())
        } else {
            Outcome::Fail("The kernel has no KVM: load the module kvm_intel or kvm_amd".into())
        };
        checks.push(("if device /dev/kvm exists".into(), exists));
    }
    if is_there {
        let accessible = match &report.kvm {
            KvmDevice::Closed(why) => {
                Outcome::Fail(format!("{why}: join the group that owns /dev/kvm"))
            }
            _ => Outcome::Pass,
        };
        checks.push(("if device /dev/kvm is accessible".into(), accessible));
    }
    if report.verdict() == KvmVerdict::SoftwareNested {
        checks.push((
            "if /dev/kvm runs ordinary guests".into(),
            Outcome::Fail("It has no hardware behind it: only small guests made for it run".into()),
        ));
    }
    checks
}

/// The controllers by their names in either version of cgroups, and whether they are there.
fn cgroup_checks(root: &Path) -> Vec<(String, Outcome)> {
    let unified =
        fs::read_to_string(root.join("sys/fs/cgroup/cgroup.controllers")).unwrap_or_default();
    let legacy = fs::read_to_string(root.join("proc/cgroups")).unwrap_or_default();
    let in_unified = |name: &str| {
        unified
            .split_whitespace()
            .any(|controller| controller == name)
    };
    // Columns: name, hierarchy, number of groups, enabled. The file also lists what version 2 has.
    let in_legacy = |name: &str| {
        legacy.lines().any(|line| {
            let columns: Vec<&str> = line.split_whitespace().collect();
            matches!(columns[..], [controller, hierarchy, _, "1"] if controller == name && hierarchy != "0")
        })
    };
    let version_2 = root.join("sys/fs/cgroup/cgroup.controllers").exists();
    ["cpu", "cpuacct", "cpuset", "memory", "devices", "blkio"]
        .into_iter()
        .map(|name| {
            let there = match name {
                // Version 2 counts CPU time always, and limits devices by BPF programs.
                "cpuacct" | "devices" if version_2 => true,
                "blkio" => in_unified("io") || in_legacy("blkio"),
                _ => in_unified(name) || in_legacy(name),
            };
            let outcome = if there {
                Outcome::Pass
            } else {
                Outcome::Warn(format!(
                    "Guests run without its limits: turn the controller '{name}' on in the kernel"
                ))
            };
            (format!("for cgroup '{name}' controller support"), outcome)
        })
        .collect()
}

fn has_entries(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some())
}

fn iommu(root: &Path) -> Outcome {
    if has_entries(&root.join("sys/kernel/iommu_groups")) {
        return Outcome::Pass;
    }
    let tables = root.join("sys/firmware/acpi/tables");
    if tables.join("DMAR").exists() {
        Outcome::Warn("The IOMMU is off: boot the kernel with intel_iommu=on".into())
    } else if tables.join("IVRS").exists() {
        Outcome::Warn("The IOMMU is off: boot the kernel with amd_iommu=on".into())
    } else {
        Outcome::Warn("No IOMMU was found: host devices cannot be given to guests".into())
    }
}

fn secure_guests(root: &Path) -> Outcome {
    let parameter = |name: &str| {
        fs::read_to_string(root.join("sys/module/kvm_amd/parameters").join(name))
            .is_ok_and(|value| matches!(value.trim(), "1" | "Y" | "y"))
    };
    let flags = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
    let has_sev = flags
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| line.split_whitespace().any(|flag| flag == "sev"));
    if has_sev && parameter("sev") {
        Outcome::Pass
    } else if has_sev {
        Outcome::Warn("AMD SEV is off: load kvm_amd with sev=1".into())
    } else {
        Outcome::Warn("The CPU offers none that is known here".into())
    }
}

/// Which CPU guests will get, and why, in plain words.
fn conclusion(report: &HostReport) -> String {
    let mut text = format!("On this machine {report}.\n");
    text.push_str(match report.verdict() {
        KvmVerdict::Usable => {
            "<domain type='kvm'> runs at the processor's own speed; <domain type='qemu'> runs on the \
             software CPU, which is slower and needs nothing of the host."
        }
        KvmVerdict::SoftwareNested => {
            "<domain type='qemu'> runs on the software CPU: slower than hardware, but everything runs.\n\
             <domain type='kvm'> would use /dev/kvm all the same, because it was asked for; an ordinary \
             operating system stops there at the first instruction that the kernel's emulator lacks."
        }
        KvmVerdict::Unusable => {
            "<domain type='qemu'> runs on the software CPU: slower than hardware, but everything runs.\n\
             <domain type='kvm'> cannot start here."
        }
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypervisor::host::HardwareVirtualization;

    fn host(kvm: KvmDevice, hardware: HardwareVirtualization, kvm_pvm: bool) -> HostReport {
        HostReport {
            kvm,
            hardware,
            kvm_pvm,
        }
    }

    fn outcomes(report: &HostReport) -> Vec<bool> {
        kvm_checks(report, Path::new("/nonexistent"))
            .into_iter()
            .map(|(_, outcome)| outcome == Outcome::Pass)
            .collect()
    }

    #[test]
    fn a_host_with_hardware_passes() {
        let report = host(
            KvmDevice::Open { api_version: 12 },
            HardwareVirtualization::Vmx,
            false,
        );
        assert_eq!(outcomes(&report), [true, true, true]);
        assert!(conclusion(&report).contains("runs at the processor's own speed"));
    }

    #[test]
    fn kvm_without_hardware_is_recognised() {
        let report = host(
            KvmDevice::Open { api_version: 12 },
            HardwareVirtualization::Absent,
            true,
        );
        assert_eq!(outcomes(&report), [false, true, true, false]);
        let text = conclusion(&report);
        assert!(
            text.contains("kvm_pvm") && text.contains("software CPU"),
            "{text}"
        );
    }

    #[test]
    fn a_host_without_kvm_gets_the_software_cpu() {
        let report = host(KvmDevice::Missing, HardwareVirtualization::Absent, false);
        assert_eq!(outcomes(&report), [false]);
        assert!(conclusion(&report).contains("<domain type='kvm'> cannot start here"));
        let report = host(KvmDevice::Missing, HardwareVirtualization::Svm, false);
        assert_eq!(outcomes(&report), [true, false]);
        let report = host(
            KvmDevice::Closed("Permission denied".into()),
            HardwareVirtualization::Vmx,
            false,
        );
        assert_eq!(outcomes(&report), [true, true, false]);
    }

    #[test]
    fn controllers_of_either_cgroup_version_count() {
        let root = std::env::temp_dir().join(format!("vireo-validate-{}", std::process::id()));
        let put = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let passed = || {
            cgroup_checks(&root)
                .into_iter()
                .map(|(_, outcome)| outcome == Outcome::Pass)
                .collect::<Vec<_>>()
        };
        put(
            "proc/cgroups",
            "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t3\t1\t1\nmemory\t4\t1\t0\nblkio\t5\t1\t1\n",
        );
        assert_eq!(passed(), [true, false, false, false, false, true]);
        put(
            "sys/fs/cgroup/cgroup.controllers",
            "cpuset cpu io memory pids\n",
        );
        assert_eq!(passed(), [true; 6]);
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn the_layout_is_virt_host_validates() {
        let report = Report {
            checks: vec![("if device /dev/kvm exists".into(), Outcome::Pass)],
            conclusion: "So.".into(),
        };
        assert_eq!(
            report.format(false),
            format!(
                "  QEMU: Checking {:<60}: PASS\n\nSo.\n",
                "if device /dev/kvm exists"
            )
        );
    }
}
