//! From a definition to a machine: the VMM's configuration, and every descriptor it needs.

mod single;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use vmm_api::config::{
    Backend, BootConfig, CONFIG_VERSION, CharBackend, CpuConfig, LifecycleAction, MachineConfig,
    Resource, SerialConfig, TopologyConfig, VcpuHotplug,
};
use vmm_api::control::Call;
use xml_schemas::Domain;
use xml_schemas::domain::{
    CharDevice, CharSource, Clock, ClockOffset, DomainType, FeaturePolicy,
    LifecycleAction as XmlAction, SocketMode, TcpProtocol,
};

pub use self::single::{CopyImage, CopyWish, Medium, build_copy, build_device, build_medium};

use super::devices::Surroundings;
use super::{image_numbers, iothreads, media, vcpu_plug};
use crate::cgroups::Groups;
use crate::error::{Error, Result};
use crate::files;
use crate::vmm_process::{self, Identity};

/// How long a connection to a serial port's TCP peer may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// COM1 to COM4.
const MAX_SERIALS: usize = 4;

/// A machine's configuration, with what it refers to.
#[derive(Debug)]
pub struct Machine {
    /// For `vireo-vmm`.
    pub config: MachineConfig,
    /// The running definition: as the stored one, and what was chosen at start.
    pub definition: Domain,
    /// The number of the next image.
    pub next_image: u32,
    /// The descriptors whose numbers are in `config`.
    pub descriptors: Vec<OwnedFd>,
    /// What people call them, by number.
    pub names: Names,
    /// What was made on the file system.
    pub made: Made,
}

/// What people call the descriptors of a machine.
#[derive(Debug, Clone, Default)]
pub struct Names(Vec<(RawFd, String)>);

impl Names {
    /// Descriptor `number` is what people call `name`.
    pub fn add(&mut self, number: RawFd, name: String) {
        self.0.push((number, name));
    }

    /// A message of the VMM, which knows descriptors only, with their names.
    pub fn explain(&self, message: &str) -> String {
        let mut text = message.to_owned();
        for (number, name) in &self.0 {
            text = text.replace(&format!("descriptor {number}:"), &format!("'{name}':"));
        }
        text
    }
}

/// What was made on the host for a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Made {
    /// To remove when the domain ends.
    pub sockets: Vec<PathBuf>,
    /// Empty by then: to remove after the sockets.
    pub folders: Vec<PathBuf>,
    /// Network devices to remove when the domain ends. (Taps go with their last descriptor.)
    pub links: Vec<String>,
    /// Helpers to end with the domain.
    pub processes: Vec<Identity>,
    /// What was made for one device only, by its alias: goes with it if it is taken out before.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub devices: BTreeMap<String, Made>,
    /// Control groups to remove when it has ended.
    pub groups: Groups,
    /// Output files that were not there before: to remove if the start fails.
    #[serde(skip)]
    pub outputs: Vec<PathBuf>,
}

impl Made {
    /// A failed start leaves nothing behind.
    pub fn undo(&self) {
        for path in self.all().flat_map(|made| &made.outputs) {
            remove_file(path);
        }
        self.clear_rest();
        self.groups.remove_soon();
    }

    /// With what was made for single devices.
    fn all(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(self.devices.values())
    }

    /// Adds what was made for the device with that alias.
    pub fn add_device(&mut self, alias: &str, made: Self) {
        if made == Self::default() {
            return;
        }
        let own = self.devices.entry(alias.to_owned()).or_default();
        for path in made.sockets {
            // A card that is connected again has its port's file already.
            if !own.sockets.contains(&path) {
                own.sockets.push(path);
            }
        }
        own.folders.extend(made.folders);
        own.links.extend(made.links);
        own.processes.extend(made.processes);
        own.outputs.extend(made.outputs);
        // Parts of it that can go before it does.
        for (alias, made) in made.devices {
            self.add_device(&alias, made);
        }
    }

    /// Takes out a file that is gone.
    pub fn forget_file(&mut self, file: &Path) {
        self.sockets.retain(|own| own != file);
        let devices = self.devices.values_mut();
        devices.for_each(|made| made.forget_file(file));
    }

    /// Takes out what is noted for the devices that `made` was made for.
    pub fn forget_devices(&mut self, made: &Self) {
        for (alias, made) in &made.devices {
            self.devices.remove(alias);
            self.forget_devices(made);
        }
    }

    /// At the domain's end, or the device's. Blocks as long as threads of an ended process still hold its groups.
    pub fn clear_away(&self) {
        self.clear_rest();
        self.groups.remove();
    }

    /// All but groups.
    fn clear_rest(&self) {
        let sockets = self.all().flat_map(|made| &made.sockets);
        sockets.for_each(|path| remove_file(path));
        for folder in self.all().flat_map(|made| &made.folders) {
            match fs::remove_dir(folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    log::warn!("cannot remove {}: {error}", folder.display());
                }
                _ => {}
            }
        }
        for name in self.all().flat_map(|made| &made.links) {
            if let Err(error) = crate::link::remove(name) {
                log::warn!("cannot remove network device {name}: {error}");
            }
        }
        for &identity in self.all().flat_map(|made| &made.processes) {
            let killed = vmm_process::find(identity)
                .and_then(|found| found.map_or(Ok(()), |process| process.kill()));
            if let Err(error) = killed {
                log::warn!("cannot end process {}: {error}", identity.pid);
            }
        }
    }
}

fn remove_file(path: &Path) {
    if let Err(error) = files::remove_if_there(path) {
        log::warn!("cannot remove {}: {error}", path.display());
    }
}

/// Opens everything. Undoes what it made if it fails.
///
/// # Errors
/// What cannot be opened, or is not offered.
pub fn build(definition: &Domain, id: i32, around: Surroundings) -> Result<Machine> {
    let mut builder = Builder::new(around);
    match builder.machine(definition, id) {
        Ok((config, definition, next_image)) => Ok(Machine {
            config,
            definition,
            next_image,
            descriptors: builder.descriptors,
            names: builder.names,
            made: builder.made,
        }),
        Err(error) => {
            builder.made.undo();
            Err(error)
        }
    }
}

/// A machine in the making.
#[derive(Debug)]
pub(super) struct Builder {
    descriptors: Vec<OwnedFd>,
    names: Names,
    pub(super) made: Made,
    pub(super) around: Surroundings,
}

impl Builder {
    fn new(around: Surroundings) -> Self {
        Self {
            descriptors: Vec::new(),
            names: Names::default(),
            made: Made::default(),
            around,
        }
    }

    /// The device at `at` of a running definition.
    fn one(&mut self, live: &mut Domain, at: usize) -> Result<(String, Call, Names)> {
        if live.devices.rest[at].name == "channel" {
            let (controller, mut port) = self.one_port(live, at)?;
            let names = self.count(port.resources_mut())?;
            let (id, port) = (port.id.clone(), Box::new(port));
            return Ok((id, Call::AddPort { controller, port }, names));
        }
        let mut config = self.one_device(live, at)?;
        let names = self.count(config.resources_mut())?;
        Ok((config.id.clone(), Call::AddDevice(Box::new(config)), names))
    }

    /// Has resources name their descriptors by their places among all. What people call those.
    fn count(&self, resources: Vec<&mut Resource>) -> Result<Names> {
        let mut names = Names::default();
        for resource in resources {
            let Resource::Fd(number) = resource else {
                continue;
            };
            let mut all = self.descriptors.iter();
            let own = all.position(|fd| fd.as_raw_fd() == *number);
            let own = own.and_then(|at| RawFd::try_from(at).ok());
            let own = own.ok_or_else(|| Error::internal("a descriptor of a device is lost"))?;
            let name = self.names.0.iter().find(|(known, _)| known == number);
            names.0.extend(name.map(|(_, name)| (own, name.clone())));
            *number = own;
        }
        Ok(names)
    }

    pub(super) fn pass(&mut self, descriptor: impl Into<OwnedFd>) -> Resource {
        let descriptor = descriptor.into();
        let number = descriptor.as_raw_fd();
        self.descriptors.push(descriptor);
        Resource::Fd(number)
    }

    /// The same, and what people call it.
    pub(super) fn pass_as(&mut self, descriptor: impl Into<OwnedFd>, name: &str) -> Resource {
        let passed = self.pass(descriptor);
        if let Resource::Fd(number) = passed {
            self.names.0.push((number, name.to_owned()));
        }
        passed
    }

    fn machine(&mut self, stored: &Domain, id: i32) -> Result<(MachineConfig, Domain, u32)> {
        let mut live = stored.clone();
        live.id = u32::try_from(id).ok();
        live.place_drives()?;
        live.devices.assign_aliases();
        let (kernel, firmware) = match live.os.kernel.as_deref() {
            Some(path) => (Some(self.input("kernel", path)?), None),
            None => (None, Some(self.firmware(&live)?)),
        };
        let boot = BootConfig {
            kernel,
            firmware,
            initrd: match live.os.initrd.as_deref() {
                Some(path) => Some(self.input("initrd", path)?),
                None => None,
            },
            cmdline: live.os.cmdline.clone().unwrap_or_default(),
            no_unpack: false,
        };
        if live.lists_vcpus() {
            let mut states = live.vcpus();
            vcpu_plug::put_in_order(&mut states);
            live.list_vcpus(&states);
        }
        let (vcpus, vcpu_hotplug) = vcpus(&live)?;
        let serials = self.serials(&mut live)?;
        let stated = image_numbers::lengths(&live);
        let devices = self.devices(&mut live)?;
        let next_image = image_numbers::at_start(&mut live, &stated);
        media::at_start(&mut live);
        let config = MachineConfig {
            version: CONFIG_VERSION,
            name: live.name.clone(),
            uuid: live.uuid.unwrap_or_default().to_string(),
            backend: match live.domain_type {
                DomainType::Kvm => Backend::Kvm,
                DomainType::Qemu => Backend::Soft,
            },
            memory_bytes: memory_bytes(live.memory.total_kib)?,
            vcpus,
            vcpu_hotplug,
            cpu: cpu(&live),
            boot,
            acpi: live.has_feature("acpi"),
            serials,
            pvpanic: live
                .devices
                .rest
                .iter()
                .any(|device| device.name == "panic"),
            iothreads: iothreads::configs(&live),
            devices,
            generation_id: generation_id(&live)?,
            debug_exit_port: None,
            debug_console_port: None,
            rtc_offset_seconds: rtc_offset(&live.clock, SystemTime::now())?,
            on_poweroff: action("on_poweroff", live.on_poweroff)?,
            on_reboot: action("on_reboot", live.on_reboot)?,
            on_crash: action("on_crash", live.on_crash)?,
            // Set going when everything about it is on record.
            restore: None,
            incoming: Vec::new(),
            start_paused: true,
            control: None,
            exit_record: None,
        };
        Ok((config, live, next_image))
    }

    /// A file that is read whole at start.
    pub(super) fn input(&mut self, what: &str, path: &str) -> Result<Resource> {
        let cannot =
            |error: &io::Error| Error::system(format!("cannot open {what} '{path}'"), error);
        // Without O_NONBLOCK a FIFO would block here.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|e| cannot(&e))?;
        if !file.metadata().map_err(|e| cannot(&e))?.is_file() {
            return Err(Error::unsupported(format!("{what} '{path}' is not a file")));
        }
        Ok(self.pass_as(file, path))
    }

    fn serials(&mut self, live: &mut Domain) -> Result<Vec<SerialConfig>> {
        let mut ports: Vec<Option<SerialConfig>> = Vec::new();
        for index in 0..live.devices.serials.len() {
            let device = live.devices.serials[index].clone();
            let port = device.target.port.map_or(index, |port| port as usize);
            if port >= MAX_SERIALS {
                return Err(Error::unsupported(format!(
                    "serial port {port}: there are {MAX_SERIALS} at most"
                )));
            }
            if ports.len() <= port {
                ports.resize_with(port + 1, || None);
            }
            if ports[port].is_some() {
                return Err(Error::unsupported(format!(
                    "serial port {port} is there twice"
                )));
            }
            let (backend, pty) = self.backend(&format!("serial port {port}"), &device)?;
            let log = match &device.log {
                Some(log) => Some(self.output(Path::new(&log.file), log.append.unwrap_or(false))?),
                None => None,
            };
            ports[port] = Some(SerialConfig { backend, log });
            if device.alias.is_none() {
                live.devices.serials[index].alias = Some(format!("serial{port}"));
            }
            if let Some(path) = pty {
                live.devices.set_pty_path(index, &path);
            }
        }
        let null = || SerialConfig {
            backend: CharBackend::Null,
            log: None,
        };
        Ok(ports
            .into_iter()
            .map(|port| port.unwrap_or_else(null))
            .collect())
    }

    /// Opens the host's end of a character device; also its pseudo-terminal's path.
    pub(super) fn backend(
        &mut self,
        name: &str,
        device: &CharDevice,
    ) -> Result<(CharBackend, Option<String>)> {
        let unsupported = |what: &str| Err(Error::unsupported(format!("{name}: {what}")));
        let backend = match &device.source {
            CharSource::Null => CharBackend::Null,
            CharSource::Pty { .. } => {
                let (master, path) =
                    open_pty().map_err(|e| Error::system("cannot open a pseudo-terminal", &e))?;
                let master = self.pass(master);
                return Ok((CharBackend::Pty(Some(master)), Some(path)));
            }
            CharSource::File { path, append } => {
                CharBackend::File(self.output(Path::new(path), append.unwrap_or(false))?)
            }
            CharSource::Unix { mode, path } => {
                let Some(path) = path.as_deref().map(Path::new) else {
                    return unsupported("a UNIX socket needs a path");
                };
                match mode {
                    SocketMode::Bind => CharBackend::Listen {
                        socket: self.listen_unix(path)?,
                        telnet: false,
                        wait: false,
                    },
                    SocketMode::Connect => {
                        let stream = files::connect_unix(path).map_err(|e| {
                            Error::system(format!("cannot connect to '{}'", path.display()), &e)
                        })?;
                        CharBackend::Connected(self.pass(stream))
                    }
                }
            }
            CharSource::Tcp {
                mode,
                host,
                service,
                protocol,
                tls,
            } => {
                let telnet = match protocol {
                    TcpProtocol::Raw => false,
                    TcpProtocol::Telnet => true,
                    TcpProtocol::Telnets | TcpProtocol::Tls => return unsupported("no TLS yet"),
                };
                if *tls == Some(true) {
                    return unsupported("no TLS yet");
                }
                match mode {
                    SocketMode::Bind => {
                        let address = (host.as_deref().unwrap_or("0.0.0.0"), service.as_str());
                        CharBackend::Listen {
                            socket: self.listen_tcp(address)?,
                            telnet,
                            wait: false,
                        }
                    }
                    SocketMode::Connect if telnet => {
                        return unsupported("telnet needs mode='bind'");
                    }
                    SocketMode::Connect => {
                        let address = (host.as_deref().unwrap_or("127.0.0.1"), service.as_str());
                        CharBackend::Connected(self.connect_tcp(address)?)
                    }
                }
            }
            CharSource::Other { kind, .. } => return unsupported(&format!("no type '{kind}'")),
        };
        Ok((backend, None))
    }

    /// A file that gets output.
    pub(super) fn output(&mut self, path: &Path, append: bool) -> Result<Resource> {
        let there = path.symlink_metadata().is_ok();
        let file = OpenOptions::new()
            .create(true)
            .append(append)
            .write(true)
            .truncate(!append)
            .mode(0o600)
            // A FIFO that nobody reads is an error, not a wait.
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(|e| Error::system(format!("cannot open '{}'", path.display()), &e))?;
        if !there {
            self.made.outputs.push(path.to_owned());
        }
        Ok(self.pass(file))
    }

    pub(super) fn listen_unix(&mut self, path: &Path) -> Result<Resource> {
        let cannot = |error: io::Error| {
            Error::system(format!("cannot listen on '{}'", path.display()), &error)
        };
        // As QEMU does: a socket of that name is taken for a leftover; anything else is not touched.
        if path
            .symlink_metadata()
            .is_ok_and(|m| m.file_type().is_socket())
        {
            fs::remove_file(path).map_err(cannot)?;
        }
        let listener = files::listen_unix(path).map_err(cannot)?;
        self.made.sockets.push(path.to_owned());
        Ok(self.pass(listener))
    }

    fn listen_tcp(&mut self, (host, service): (&str, &str)) -> Result<Resource> {
        let listener = TcpListener::bind((host, port(service)?))
            .map_err(|e| Error::system(format!("cannot listen on '{host}:{service}'"), &e))?;
        Ok(self.pass(listener))
    }

    fn connect_tcp(&mut self, (host, service): (&str, &str)) -> Result<Resource> {
        let cannot = |error: &io::Error| {
            Error::system(format!("cannot connect to '{host}:{service}'"), error)
        };
        let addresses = (host, port(service)?)
            .to_socket_addrs()
            .map_err(|e| cannot(&e))?;
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for address in addresses {
            match TcpStream::connect_timeout(&address, CONNECT_LIMIT) {
                Ok(stream) => return Ok(self.pass(stream)),
                Err(error) => last = error,
            }
        }
        Err(cannot(&last))
    }
}

fn port(service: &str) -> Result<u16> {
    service
        .parse()
        .map_err(|_| Error::unsupported(format!("'{service}' is no TCP port number")))
}

/// A new pseudo-terminal: its master, and its slave's path. Bytes pass unchanged.
fn open_pty() -> io::Result<(File, String)> {
    let check = |result: libc::c_int| match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: posix_openpt(3) takes flags and returns a descriptor or -1.
    let fd = unsafe { libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else knows it.
    let master = unsafe { File::from_raw_fd(fd) };
    let mut name = [0u8; 64];
    // SAFETY: both calls take the valid descriptor; ptsname_r(3) gets the buffer's true length and
    // returns an error number.
    unsafe {
        check(libc::grantpt(fd))?;
        check(libc::unlockpt(fd))?;
        match libc::ptsname_r(fd, name.as_mut_ptr().cast(), name.len()) {
            0 => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
    let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
    let path = String::from_utf8_lossy(&name[..end]).into_owned();
    // The slave's settings stay while the master is open, so it can be closed again.
    let slave = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(&path)?;
    // SAFETY: the termios is filled by tcgetattr(3) before anything reads it.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        check(libc::tcgetattr(slave.as_raw_fd(), &mut settings))?;
        libc::cfmakeraw(&mut settings);
        check(libc::tcsetattr(slave.as_raw_fd(), libc::TCSANOW, &settings))?;
    }
    Ok((master, path))
}

/// How many vCPUs the machine can have, and those that come and go.
fn vcpus(domain: &Domain) -> Result<(u32, Option<VcpuHotplug>)> {
    let states = domain.vcpus();
    let numbered = (0..).zip(&states);
    let absent = numbered.filter(|(_, vcpu)| !vcpu.online);
    let absent: BTreeSet<u32> = absent.map(|(number, _)| number).collect();
    let (most, online) = (domain.vcpu.max, domain.vcpu.online());
    if absent.is_empty() && !states.iter().any(|vcpu| vcpu.hotpluggable) {
        return Ok((most, None));
    }
    if domain.has_feature("acpi") {
        return Ok((most, Some(VcpuHotplug { absent })));
    }
    // It is ACPI that tells a guest of them.
    match absent.first() {
        Some(first) if *first < online => Err(Error::unsupported(
            "without ACPI a domain has the first ones of its vCPUs",
        )),
        _ => Ok((online, None)),
    }
}

/// `<genid>`.
fn generation_id(domain: &Domain) -> Result<Option<String>> {
    let Some(genid) = domain.rest.iter().find(|e| e.name == "genid") else {
        return Ok(None);
    };
    let text = genid.text();
    let id: uuid::Uuid = text
        .trim()
        .parse()
        .map_err(|_| Error::unsupported(format!("malformed genid '{text}'")))?;
    Ok(Some(id.to_string()))
}

fn memory_bytes(kib: u64) -> Result<u64> {
    const PAGE: u64 = 4096;
    kib.checked_mul(1024)
        .and_then(|bytes| bytes.checked_next_multiple_of(PAGE))
        .ok_or_else(|| Error::unsupported(format!("{kib} KiB are more memory than there can be")))
}

fn cpu(domain: &Domain) -> CpuConfig {
    let Some(cpu) = &domain.cpu else {
        return CpuConfig::default();
    };
    let features = cpu.features.iter().map(|feature| {
        let on = !matches!(
            feature.policy,
            Some(FeaturePolicy::Disable | FeaturePolicy::Forbid)
        );
        (feature.name.clone(), on)
    });
    let custom = cpu.mode.as_deref().is_none_or(|mode| mode == "custom");
    CpuConfig {
        model: cpu
            .model
            .as_ref()
            .filter(|model| custom && !model.name.is_empty())
            .map(|model| model.name.clone()),
        features: features.collect(),
        topology: cpu
            .topology
            .filter(|topology| topology.vcpus() == Some(domain.vcpu.max) && topology.has_ids())
            .map(|topology| TopologyConfig {
                sockets: topology.sockets,
                cores: topology.dies * topology.cores,
                threads: topology.threads,
            }),
    }
}

pub(super) fn action(element: &str, action: XmlAction) -> Result<LifecycleAction> {
    match action {
        XmlAction::Destroy => Ok(LifecycleAction::Destroy),
        XmlAction::Restart => Ok(LifecycleAction::Restart),
        // A daemon dumps what has been preserved, and does the rest.
        XmlAction::Preserve | XmlAction::CoredumpDestroy | XmlAction::CoredumpRestart => {
            Ok(LifecycleAction::Preserve)
        }
        XmlAction::RenameRestart => Err(Error::unsupported(format!(
            "{element} '{}': only destroy, restart and preserve",
            action.as_str()
        ))),
    }
}

/// What the guest's clock shows beyond UTC, in seconds.
fn rtc_offset(clock: &Clock, now: SystemTime) -> Result<i64> {
    let now = now
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX));
    let adjusted = |adjustment: &Option<String>| match adjustment.as_deref() {
        None | Some("reset") => Ok(0),
        Some(text) => text.parse::<i64>().map_err(|_| {
            Error::unsupported(format!("clock adjustment '{text}' is no number of seconds"))
        }),
    };
    Ok(match &clock.offset {
        ClockOffset::Utc { adjustment } => adjusted(adjustment)?,
        ClockOffset::Localtime { adjustment } => {
            local_offset(now).saturating_add(adjusted(adjustment)?)
        }
        ClockOffset::Variable {
            adjustment,
            localtime,
        } => {
            let base = if *localtime { local_offset(now) } else { 0 };
            base.saturating_add(*adjustment)
        }
        ClockOffset::Absolute { start } => start.map_or(0, |start| start.saturating_sub(now)),
        ClockOffset::Timezone(zone) => {
            return Err(Error::unsupported(format!(
                "clock offset 'timezone' ({zone}): use 'variable' with an adjustment"
            )));
        }
    })
}

/// Seconds east of UTC at the host.
fn local_offset(now: i64) -> i64 {
    // SAFETY: an all-zero tm is valid, and localtime_r(3) fills it from a valid time.
    unsafe {
        let mut local: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now, &mut local).is_null() {
            return 0;
        }
        local.tm_gmtoff
    }
}

#[cfg(test)]
mod tests;
