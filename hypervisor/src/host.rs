//! What this host offers a hypervisor. Depends on nothing but the standard library and libc:
//! the daemon and the command use it too.

use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

/// `KVM_GET_API_VERSION`: `_IO(0xAE, 0)`.
const KVM_GET_API_VERSION: u64 = 0xae00;
const API_VERSION: i32 = 12;

/// What opening `/dev/kvm` gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvmDevice {
    /// It is not there.
    Missing,
    /// It is there, but this user may not open it, or it fails to open; why, in words.
    Closed(String),
    /// It is open to us and speaks this API version.
    Open {
        /// `KVM_GET_API_VERSION`; 12 is the only one there is.
        api_version: i32,
    },
}

/// The CPU's own hardware virtualization, by its CPUID flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HardwareVirtualization {
    /// Intel VT-x (`vmx`).
    Vmx,
    /// AMD-V (`svm`).
    Svm,
    /// Neither flag is there.
    Absent,
}

/// What ordinary guests get from this host's KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmVerdict {
    /// Hardware runs them.
    Usable,
    /// `/dev/kvm` works, but without hardware behind it: guests run in the kernel's
    /// instruction emulator, which lacks instructions that operating systems need. Only
    /// small guests made for it run. Never chosen unless asked for.
    SoftwareNested,
    /// There is none, or it can't be opened, or it is of a strange version.
    Unusable,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostReport {
    /// `/dev/kvm`.
    pub kvm: KvmDevice,
    /// VT-x or AMD-V.
    pub hardware: HardwareVirtualization,
    /// The module `kvm_pvm` (KVM without hardware virtualization) is loaded.
    pub kvm_pvm: bool,
}

/// Looks at this host now.
pub fn report() -> HostReport {
    HostReport {
        kvm: kvm_device(Path::new("/dev/kvm")),
        hardware: hardware(),
        kvm_pvm: Path::new("/sys/module/kvm_pvm").exists(),
    }
}

impl HostReport {
    /// What ordinary guests would get from KVM here.
    pub fn verdict(&self) -> KvmVerdict {
        match self.kvm {
            KvmDevice::Open {
                api_version: API_VERSION,
            } if self.hardware != HardwareVirtualization::Absent && !self.kvm_pvm => {
                KvmVerdict::Usable
            }
            KvmDevice::Open {
                api_version: API_VERSION,
            } => KvmVerdict::SoftwareNested,
            _ => KvmVerdict::Unusable,
        }
    }

    /// Whether a domain that names no backend should run on KVM.
    pub fn prefers_kvm(&self) -> bool {
        self.verdict() == KvmVerdict::Usable
    }
}

impl fmt::Display for HostReport {
    /// One sentence on what guests get here, and why.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.verdict(), &self.kvm) {
            (KvmVerdict::Usable, _) => {
                let name = match self.hardware {
                    HardwareVirtualization::Vmx => "Intel VT-x",
                    _ => "AMD-V",
                };
                write!(f, "guests run on KVM with {name}")
            }
            (KvmVerdict::SoftwareNested, _) => {
                let why = if self.kvm_pvm {
                    "the module kvm_pvm provides it in software"
                } else {
                    "the CPU shows neither vmx nor svm"
                };
                write!(
                    f,
                    "guests run on the software CPU: /dev/kvm works, but {why}, and an \
                     operating system does not run on it"
                )
            }
            (KvmVerdict::Unusable, KvmDevice::Missing) => {
                write!(f, "guests run on the software CPU: there is no /dev/kvm")
            }
            (KvmVerdict::Unusable, KvmDevice::Closed(why)) => {
                write!(f, "guests run on the software CPU: /dev/kvm: {why}")
            }
            (KvmVerdict::Unusable, KvmDevice::Open { api_version }) => write!(
                f,
                "guests run on the software CPU: /dev/kvm speaks API version {api_version}, \
                 not {API_VERSION}"
            ),
        }
    }
}

fn kvm_device(path: &Path) -> KvmDevice {
    match File::options().read(true).write(true).open(path) {
        Ok(device) => {
            // SAFETY: this ioctl takes no argument; on a file that is not /dev/kvm it fails.
            let api_version = unsafe { libc::ioctl(device.as_raw_fd(), KVM_GET_API_VERSION, 0) };
            if api_version < 0 {
                KvmDevice::Closed(std::io::Error::last_os_error().to_string())
            } else {
                KvmDevice::Open { api_version }
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => KvmDevice::Missing,
        Err(error) => KvmDevice::Closed(error.to_string()),
    }
}

#[cfg(target_arch = "x86_64")]
fn hardware() -> HardwareVirtualization {
    use std::arch::x86_64::__cpuid;
    // Leaf 1 exists on every x86-64; the extended leaf is asked for.
    if __cpuid(1).ecx & (1 << 5) != 0 {
        HardwareVirtualization::Vmx
    } else if __cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & (1 << 2) != 0 {
        HardwareVirtualization::Svm
    } else {
        HardwareVirtualization::Absent
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn hardware() -> HardwareVirtualization {
    HardwareVirtualization::Absent
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(kvm: KvmDevice, hardware: HardwareVirtualization, kvm_pvm: bool) -> HostReport {
        HostReport {
            kvm,
            hardware,
            kvm_pvm,
        }
    }

    #[test]
    fn only_hardware_behind_an_open_device_is_preferred() {
        use HardwareVirtualization::{Absent, Svm, Vmx};
        let open = || KvmDevice::Open { api_version: 12 };
        assert!(host(open(), Vmx, false).prefers_kvm());
        assert!(host(open(), Svm, false).prefers_kvm());
        assert!(!host(open(), Vmx, true).prefers_kvm());
        assert!(!host(open(), Absent, false).prefers_kvm());
        assert!(!host(KvmDevice::Missing, Vmx, false).prefers_kvm());
        assert!(!host(KvmDevice::Closed("no".into()), Vmx, false).prefers_kvm());
        assert!(!host(KvmDevice::Open { api_version: 11 }, Vmx, false).prefers_kvm());
    }

    #[test]
    fn says_why_in_plain_words() {
        let open = KvmDevice::Open { api_version: 12 };
        let text = host(open, HardwareVirtualization::Absent, true).to_string();
        assert!(text.contains("software CPU"), "{text}");
        assert!(text.contains("kvm_pvm"), "{text}");
        let text = host(KvmDevice::Missing, HardwareVirtualization::Vmx, false).to_string();
        assert!(text.contains("no /dev/kvm"), "{text}");
    }

    #[test]
    fn a_file_that_is_not_kvm_is_closed_and_none_is_missing() {
        assert!(matches!(
            kvm_device(Path::new("/dev/null")),
            KvmDevice::Closed(_)
        ));
        assert_eq!(
            kvm_device(Path::new("/nonexistent/kvm")),
            KvmDevice::Missing
        );
    }
}
