//! A machine without a daemon: `vireo-vmm --config`, its Linux guest answering commands on the
//! first serial port.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use vmm_api::config::{
    Backend, BootConfig, CONFIG_VERSION, CharBackend, CpuConfig, LifecycleAction, MachineConfig,
    Resource, SerialConfig,
};
use vmm_api::devices::DeviceConfig;

use crate::{Kernel, Rig, Terminal};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(200);
/// The longest a command in the guest may take.
const SOON: Duration = Duration::from_secs(60);

/// A running guest with a shell.
#[derive(Debug)]
pub struct Guest {
    terminal: Terminal,
}

/// What a guest's command came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// Its output, lines ended by a newline.
    pub output: String,
    /// Its exit status.
    pub status: i32,
}

impl Said {
    /// The output of a command that is to succeed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.status, 0, "{}", self.output);
        self.output
    }
}

/// A machine of 256 MiB with these devices, on the software CPU.
pub fn machine(kernel: Kernel, devices: Vec<DeviceConfig>) -> MachineConfig {
    let folder = kernel.folder();
    MachineConfig {
        version: CONFIG_VERSION,
        name: "guest".into(),
        uuid: "00000000-0000-4000-8000-000000000001".into(),
        backend: Backend::Soft,
        memory_bytes: 256 << 20,
        vcpus: 1,
        vcpu_hotplug: None,
        cpu: CpuConfig::default(),
        boot: BootConfig {
            kernel: Some(Resource::Path(folder.join("vmlinuz"))),
            firmware: None,
            initrd: Some(Resource::Path(folder.join("initrd.img"))),
            cmdline: "console=ttyS0 quiet".into(),
            no_unpack: false,
        },
        acpi: true,
        serials: vec![SerialConfig {
            backend: CharBackend::Stdio,
            log: None,
        }],
        pvpanic: false,
        iothreads: Vec::new(),
        devices,
        generation_id: None,
        debug_exit_port: None,
        debug_console_port: None,
        rtc_offset_seconds: 0,
        on_poweroff: LifecycleAction::Destroy,
        on_reboot: LifecycleAction::Restart,
        on_crash: LifecycleAction::Destroy,
        restore: None,
        incoming: Vec::new(),
        start_paused: false,
        control: None,
        exit_record: None,
    }
}

impl Guest {
    /// Boots it to its shell. `descriptors` are inherited under their present numbers.
    pub fn boot(rig: &Rig, config: &MachineConfig, descriptors: &[OwnedFd]) -> Self {
        let config = serde_json::to_vec_pretty(config).unwrap();
        let path = rig.write("machine.json", config);
        let mut command = rig.command("vireo-vmm");
        command.args(["--config", &path]);
        Self::start(&mut command, descriptors)
    }

    /// Goes on with a guest that was saved while its shell waited for a line.
    pub fn resume(rig: &Rig, config: &MachineConfig) -> Self {
        let config = serde_json::to_vec_pretty(config).unwrap();
        let path = rig.write("machine.json", config);
        let mut command = rig.command("vireo-vmm");
        command.args(["--config", &path]);
        let mut terminal = Terminal::start(&mut command);
        terminal.wait_raw(SOON);
        Self { terminal }
    }

    /// Waits for the end of its VMM.
    pub fn wait(&mut self) -> i32 {
        self.terminal.wait(SOON)
    }

    /// Boots the same guest by another program, whose standard input and output are the guest's
    /// first serial port.
    pub fn start(command: &mut Command, descriptors: &[OwnedFd]) -> Self {
        let inherited: Vec<i32> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
        // SAFETY: fcntl is async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                for fd in &inherited {
                    libc::fcntl(*fd, libc::F_SETFD, 0);
                }
                Ok(())
            });
        }
        let mut guest = Self {
            terminal: Terminal::start(command),
        };
        guest.ready();
        guest
    }

    /// Waits for the shell of a guest that boots (again).
    pub fn ready(&mut self) {
        self.terminal.expect("guest:/root# ", BOOT);
        // No echo and no prompts: what comes back is the commands' own.
        self.terminal.send(
            "stty -echo; echo; echo go; while read -r l; do eval \"$l\"; echo \"<$?>\"; done\r",
        );
        // Some programs leave it to the terminal to add a carriage return: there are two then.
        self.terminal.expect("\ngo\r", SOON);
        self.terminal.expect("\n", SOON);
    }

    /// Runs one line in the guest's shell.
    #[track_caller]
    pub fn run(&mut self, line: &str) -> Said {
        self.run_within(line, SOON)
    }

    /// As [`Guest::run`], for what takes longer.
    #[track_caller]
    pub fn run_within(&mut self, line: &str, limit: Duration) -> Said {
        self.terminal.send(&format!("{line}\r"));
        let mut seen = String::new();
        loop {
            seen += &self.terminal.expect(">\r", limit);
            seen += &self.terminal.expect("\n", limit);
            let text = seen.replace('\r', "");
            let Some((output, status)) = text.trim_end().rsplit_once('<') else {
                continue;
            };
            if let Some(Ok(status)) = status.strip_suffix('>').map(str::parse) {
                return Said {
                    output: output.to_owned(),
                    status,
                };
            }
        }
    }

    /// The terminal itself.
    pub fn terminal(&mut self) -> &mut Terminal {
        &mut self.terminal
    }

    /// Powers it off; the VMM must end well.
    #[track_caller]
    pub fn power_off(mut self) {
        self.terminal.send("poweroff -f\r");
        assert_eq!(self.terminal.wait(SOON), 0, "{}", self.terminal.seen());
    }

    /// Pulls the plug: the VMM is killed where it stands.
    pub fn kill(self) {
        drop(self);
    }
}
