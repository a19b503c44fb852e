//! From a config to a machine that is ready to run.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use hypervisor::cpu::{CpuRequest, CpuTemplate, Topology};
use hypervisor::{Bus, CpuidEntry, Vcpu, Vm};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use vmm_api::config::{Backend, CONFIG_VERSION, CharBackend, MachineConfig, Resource};
use vmm_api::control::MachineState;
use vmm_api::migrate::StreamError;

use super::devices::{Parts, PciDevices};
use super::pc::Pc;
use super::save::SavedVcpus;
use super::vcpus::as_made;
use super::{Devices, Machine, MachineError};
use crate::acpi::{Description, mptable};
use crate::bus::{Buses, Device, Space};
use crate::chardev::{Channel, Link, Port, Receiver, Stdio, TOKENS};
use crate::control::Control;
use crate::devices::cpus::{self, Cpus};
use crate::devices::debug::{DebugConsole, DebugExit, EXIT_LEN};
use crate::devices::i8042::{self, I8042};
use crate::devices::ioapic::{self, IoApic};
use crate::devices::pm::{self, Pm};
use crate::devices::pvpanic::{self, Pvpanic};
use crate::devices::rtc::{self, Rtc};
use crate::devices::uart::{self, Uart};
use crate::devices::{Interrupt, Line, Requests, SharedPin};
use crate::firmware::Rom;
use crate::layout;
use crate::loader::{Boot, Named};
use crate::memory::{GuestMemory, MemoryError};
use crate::migrate::ahead::Vcpus;
use crate::migrate::{Ahead, Incoming, Permit, moment};
use crate::notices::Notices;
use crate::num::to_usize;
use crate::pci::{self, Ecam};
use crate::resource;
use crate::state::image::Saved;
use crate::vcpu::{Gate, Threads};

/// Token of the vCPUs' messages.
pub(super) const TOKEN_GATE: u64 = 1;
/// Token of the signals.
pub(super) const TOKEN_SIGNALS: u64 = 2;
/// Token of the devices' notices.
pub(super) const TOKEN_NOTICES: u64 = 3;
/// Token of a job's end.
pub(super) const TOKEN_JOB: u64 = 4;
/// Token of the source of a machine that came from elsewhere.
pub(super) const TOKEN_PERMIT: u64 = 5;
/// First token of the watchdogs' alarms.
pub(super) const TOKEN_WATCHDOGS: u64 = 0x80;
/// First token of the channels; each has `chardev::TOKENS`.
pub(super) const TOKEN_CHANNELS: u64 = 0x100;

pub(super) fn os(call: &'static str) -> impl FnOnce(Errno) -> MachineError {
    move |errno| MachineError::Os {
        call,
        source: errno.into(),
    }
}

/// What a config must not say.
fn check(config: &MachineConfig) -> Result<(), MachineError> {
    let bad = |what: String| Err(MachineError::Config(what));
    if config.version != CONFIG_VERSION {
        return bad(format!(
            "version {} is not {CONFIG_VERSION}",
            config.version
        ));
    }
    if config.vcpus == 0 {
        return bad("a machine needs at least one vCPU".into());
    }
    match (&config.boot.kernel, &config.boot.firmware) {
        (None, None) => return bad("neither a kernel nor firmware to start".into()),
        (Some(_), Some(_)) => {
            return bad("a kernel and firmware: this machine starts one of them".into());
        }
        (None, Some(_)) if config.boot.initrd.is_some() || !config.boot.cmdline.is_empty() => {
            return bad("an initrd or a command line without a kernel".into());
        }
        _ => {}
    }
    if config.serials.len() > uart::COM.len() {
        return bad(format!(
            "{} serial ports are more than {}",
            config.serials.len(),
            uart::COM.len()
        ));
    }
    if let Some(hotplug) = &config.vcpu_hotplug {
        if !config.acpi {
            return bad("vCPUs can only come and go with ACPI".into());
        }
        let absent = &hotplug.absent;
        if absent.contains(&0) || absent.last().is_some_and(|last| *last >= config.vcpus) {
            return bad("absent vCPUs are among the others, but the first".into());
        }
    }
    if !config.acpi && config.vcpus > mptable::MAX_VCPUS {
        return bad(format!("more than {} vCPUs need ACPI", mptable::MAX_VCPUS));
    }
    let mut ids: Vec<&str> = config.devices.iter().map(|d| d.id.as_str()).collect();
    ids.sort_unstable();
    if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        return bad(format!("there are two devices '{}'", pair[0]));
    }
    let stdio = config
        .serials
        .iter()
        .filter(|s| s.backend == CharBackend::Stdio)
        .count();
    if stdio > 1 {
        return bad("standard input and output can serve one serial port only".into());
    }
    Ok(())
}

/// Numbers of the vCPUs that are there at the start.
fn present(config: &MachineConfig) -> impl Iterator<Item = u32> + use<> {
    let hotplug = config.vcpu_hotplug.clone().unwrap_or_default();
    (0..config.vcpus).filter(move |id| !hotplug.absent.contains(id))
}

pub(super) fn named(at: &Resource) -> Result<Named, MachineError> {
    Ok(Named {
        file: resource::open_read(at)?,
        name: resource::name(at),
    })
}

/// The first token of channel `index`.
pub(super) fn token(index: usize) -> u64 {
    TOKEN_CHANNELS + index as u64 * TOKENS
}

pub(super) struct Builder {
    pub(super) buses: Buses,
    epoll: Epoll,
    channels: BTreeMap<usize, Channel>,
}

impl Builder {
    fn insert(
        space: &mut Space,
        at: u64,
        len: u32,
        name: &'static str,
        device: Arc<dyn Device>,
    ) -> Result<(), MachineError> {
        space
            .insert(at, len, device)
            .map_err(|source| MachineError::Overlap {
                device: name,
                source,
            })
    }

    pub(super) fn port(
        &mut self,
        at: u16,
        len: u32,
        name: &'static str,
        device: Arc<dyn Device>,
    ) -> Result<(), MachineError> {
        Self::insert(&mut self.buses.ports, at.into(), len, name, device)
    }

    fn mmio(
        &mut self,
        at: u64,
        len: u32,
        name: &'static str,
        device: Arc<dyn Device>,
    ) -> Result<(), MachineError> {
        Self::insert(&mut self.buses.mmio, at, len, name, device)
    }

    fn watch(&self, fd: BorrowedFd<'_>, token: u64) -> Result<(), MachineError> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
        self.epoll.add(fd, event).map_err(os("epoll"))
    }

    fn channel(
        &mut self,
        port: Arc<Port>,
        receiver: Option<Arc<dyn Receiver>>,
        link: Link,
        log: Option<std::fs::File>,
    ) -> Result<(), crate::chardev::CharError> {
        let index = self.channels.len();
        let channel = Channel::new(&self.epoll, token(index), port, receiver, link, log)?;
        self.channels.insert(index, channel);
        Ok(())
    }

    fn serials(
        &mut self,
        config: &MachineConfig,
        lines: &Arc<dyn Interrupt>,
    ) -> Result<Vec<Arc<Uart>>, MachineError> {
        let mut uarts = Vec::new();
        let pins = [uart::COM[0].1, uart::COM[1].1]
            .map(|pin| Arc::new(SharedPin::new(lines.clone(), pin)));
        for (index, serial) in config.serials.iter().enumerate() {
            let failed = |source| MachineError::Serial {
                port: index + 1,
                source,
            };
            let (base, _) = uart::COM[index];
            // COM3 is on COM1's pin, COM4 on COM2's.
            let line = Line::new(pins[index % 2].clone(), u8::from(index >= 2));
            let port = Arc::new(Port::new().map_err(failed)?);
            let uart = Arc::new(Uart::new(line, port.clone()));
            self.port(base, uart::LEN, "serial port", uart.clone())?;
            let link = Link::open(&serial.backend).map_err(failed)?;
            let log = serial.log.as_ref().map(resource::open_append).transpose()?;
            self.channel(port, Some(uart.clone()), link, log)
                .map_err(failed)?;
            uarts.push(uart);
        }
        Ok(uarts)
    }

    fn debug(
        &mut self,
        config: &MachineConfig,
        requests: &Arc<dyn Requests>,
    ) -> Result<(), MachineError> {
        if let Some(at) = config.debug_exit_port {
            self.port(
                at,
                EXIT_LEN,
                "debug_exit_port",
                Arc::new(DebugExit::new(requests.clone())),
            )?;
        }
        if let Some(at) = config.debug_console_port {
            let failed = |source| MachineError::Serial { port: 0, source };
            let port = Arc::new(Port::new().map_err(failed)?);
            self.port(
                at,
                1,
                "debug_console_port",
                Arc::new(DebugConsole::new(port.clone())),
            )?;
            let link = Link::Stdio(Stdio::stderr().map_err(failed)?);
            self.channel(port, None, link, None).map_err(failed)?;
        }
        Ok(())
    }
}

impl Machine {
    /// Builds the machine: everything is opened, loaded and checked; nothing runs yet.
    ///
    /// # Errors
    /// Whatever keeps it from running, named.
    pub fn new(config: MachineConfig) -> Result<Self, MachineError> {
        if config.incoming.is_empty() {
            return Self::build(config, &mut None);
        }
        let mut permit = None;
        let machine = Self::build(config, &mut permit);
        let Some(permit) = permit else { return machine };
        match machine {
            Ok(mut machine) => {
                machine.starts_by_itself = false;
                machine.arrived(permit)?;
                Ok(machine)
            }
            Err(error) => {
                permit.refuse(&error.to_string());
                Err(error)
            }
        }
    }

    /// The same; `permit` is the right to run a machine that comes from elsewhere, as soon as all of
    /// it has come.
    fn build(mut config: MachineConfig, permit: &mut Option<Permit>) -> Result<Self, MachineError> {
        check(&config)?;
        if !config.acpi {
            log::warn!("without ACPI only kernels that read an MP table get interrupts of devices");
        }
        let kernel = config.boot.kernel.as_ref().map(named).transpose()?;
        let initrd = config.boot.initrd.as_ref().map(named).transpose()?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(os("epoll_create1"))?;
        let control = match &config.control {
            Some(at) => {
                Some(Control::new(&epoll, resource::listen(at)?).map_err(os("control socket"))?)
            }
            None => None,
        };

        let vm = hypervisor::create(match config.backend {
            Backend::Kvm => hypervisor::Backend::Kvm,
            Backend::Soft => hypervisor::Backend::Soft,
        })?;
        let max = vm.max_vcpus();
        if config.vcpus > max {
            return Err(MachineError::Config(format!(
                "{} vCPUs are more than the {max} this backend has",
                config.vcpus
            )));
        }
        let mut saved = config.restore.as_ref().map(Saved::open).transpose()?;
        let memory = Arc::new(match (&saved, &config.restore) {
            (Some(saved), Some(from)) => saved.memory(config.memory_bytes, from.copy)?,
            _ if !config.incoming.is_empty() => GuestMemory::arriving(config.memory_bytes)?,
            _ => GuestMemory::new(config.memory_bytes)?,
        });
        let mut made = BTreeMap::new();
        let mut rom = None;
        let mut is_mapped = false;
        if !config.incoming.is_empty() {
            let mut incoming = Incoming::open(&config.incoming)?;
            let failed = |error: StreamError| MachineError::Incoming(error.to_string());
            let open = |id: &str| super::devices::open_image(&config.devices, id);
            let shown = incoming.greet(&*vm, &config, &open).map_err(failed)?;
            // What takes long and needs nothing of the guest's is done while the guest still runs elsewhere.
            let ready = get_ready(&config, &*vm, &memory, &shown);
            let ready = ready.inspect_err(|error| incoming.refuse(&error.to_string()))?;
            rom = ready.rom;
            is_mapped = ready.is_mapped;
            let topology = topology(&config, Some(&shown))?;
            let apic_ids = (0..config.vcpus).map(|id| topology.apic_id(id)).collect();
            let ahead = Ahead::new(vm.clone(), ready.vcpus, apic_ids);
            let received = incoming.receive(&memory, &ahead).map_err(failed);
            let vcpus = ahead.finish();
            let (sections, right) = received?;
            *permit = Some(right);
            made = vcpus.map_err(MachineError::Incoming)?;
            saved = Some(Saved::received(sections));
        }
        let saved_vcpus = saved
            .as_mut()
            .map(|saved| SavedVcpus::take(saved, &mut config))
            .transpose()?;
        if let Some(vcpus) = &saved_vcpus {
            hypervisor::cpu::check_shown(&*vm, vcpus.cpuid(0).unwrap_or_default())?;
        }
        if memory.size() < layout::ACPI_END {
            return Err(MemoryError::Size(memory.size()).into());
        }

        let gate = Arc::new(Gate::new(config.vcpus).map_err(os("eventfd"))?);
        epoll
            .add(gate.fd(), EpollEvent::new(EpollFlags::EPOLLIN, TOKEN_GATE))
            .map_err(os("epoll"))?;
        let requests: Arc<dyn Requests> = gate.clone();
        let ioapic = Arc::new(IoApic::new(vm.clone()));
        let mut builder = Builder {
            buses: Buses::default(),
            epoll,
            channels: BTreeMap::new(),
        };
        let notices = Arc::new(Notices::new().map_err(os("eventfd"))?);
        let parts = Parts {
            vm: vm.clone(),
            memory: memory.clone(),
            bars: builder.buses.bars.clone(),
            controller: ioapic.clone(),
            requests: requests.clone(),
            notices: notices.clone(),
        };
        builder.watch(notices.fd(), TOKEN_NOTICES)?;
        let pci = PciDevices::new(&config, &parts)?;
        for (index, watchdog) in pci.watchdogs.iter().enumerate() {
            let token = TOKEN_WATCHDOGS + index as u64;
            builder.watch(watchdog.device.alarm(), token)?;
        }
        moment("PCI devices are built");
        let first = saved_vcpus
            .as_ref()
            .map(|vcpus| vcpus.cpuid(0).unwrap_or(&[]));
        let topology = topology(&config, first)?;
        let template = hypervisor::cpu::template(
            &*vm,
            &CpuRequest {
                model: config.cpu.model.as_deref(),
                features: &config.cpu.features,
                topology,
            },
        )?;
        // The guest has seen what it has seen, and is shown the like of vCPUs that are yet to come.
        let seen = saved_vcpus.as_ref().and_then(|vcpus| vcpus.cpuid(0));
        let template = seen.map_or(template, |leaves| CpuTemplate::shown(leaves, topology));
        let shown = |id| {
            let seen = saved_vcpus.as_ref().and_then(|vcpus| vcpus.cpuid(id));
            seen.map_or_else(|| template.for_vcpu(topology.apic_id(id)), <[_]>::to_vec)
        };
        let cpuid: Vec<_> = (0..config.vcpus).map(shown).collect();
        let sizes = cpuid
            .iter()
            .flatten()
            .find_map(|leaf| (leaf.function == 0x8000_0008).then_some(leaf.eax & 0xff));
        let description = Description {
            apic_ids: (0..config.vcpus).map(|id| topology.apic_id(id)).collect(),
            absent: config.vcpu_hotplug.as_ref().map(|h| h.absent.clone()),
            serials: config.serials.len(),
            pc: config.boot.firmware.is_some(),
            pvpanic: config.pvpanic,
            pci_high: layout::pci_high(&memory, sizes.unwrap_or(36)),
            generation_id: config
                .generation_id
                .as_deref()
                .map(generation_id)
                .transpose()?,
        };
        let pc = match &config.boot.firmware {
            Some(firmware) => Some(Pc::new(
                &mut builder,
                &config,
                (firmware, &description),
                &vm,
                &memory,
                &ioapic,
                &requests,
            )?),
            None => None,
        };
        if !is_mapped {
            rom = map_rom(&config, &*vm)?;
        }
        let tell = (&requests, &notices);
        let mut devices = build_devices(
            &mut builder,
            &config,
            &description.apic_ids,
            &ioapic,
            tell,
            pci,
            pc,
        )?;
        if devices.pc.is_some() {
            Pc::describe(description.present(), &memory, &devices.rtc);
        }

        if !is_mapped {
            map(&*vm, &memory, false)?;
        }
        moment("all devices are built");
        let mut vcpus: Vec<(usize, Box<dyn Vcpu>)> = Vec::new();
        let mut power_on = BTreeMap::new();
        for id in present(&config) {
            let mut vcpu = match made.remove(&id) {
                Some(vcpu) => vcpu,
                None => vm.create_vcpu(topology.apic_id(id))?,
            };
            let index = to_usize(id.into());
            vcpu.set_cpuid(&cpuid[index])?;
            power_on.insert(index, as_made(vcpu.state()?));
            vcpus.push((index, vcpu));
        }
        let mut gone = BTreeMap::new();
        if vm.backend() == hypervisor::Backend::Kvm {
            // Made for nothing: the machine that came had let go of them.
            for (id, mut vcpu) in made {
                let index = to_usize(id.into());
                vcpu.set_cpuid(&cpuid[index])?;
                gone.insert(index, vcpu);
            }
        }
        moment("vCPUs are made");
        let boot = kernel.map(|kernel| Boot {
            kernel,
            initrd,
            cmdline: config.boot.cmdline.clone(),
            no_unpack: config.boot.no_unpack,
            rsdp: config.acpi.then_some(layout::RSDP),
        });
        let bus: Arc<dyn Bus> = Arc::new(std::mem::take(&mut builder.buses));
        let threads =
            Threads::start(&gate, vcpus, &bus, &ioapic).map_err(|source| MachineError::Os {
                call: "starting a vCPU thread",
                source,
            })?;
        let mut awaited = awaited(&config);
        let mut port_channels = Vec::new();
        for pending in std::mem::take(&mut devices.pci.ports) {
            let index = builder.channels.len();
            if pending.wait {
                awaited.push(index);
            }
            let id = pending.id.clone();
            builder
                .channel(pending.port, Some(pending.end), pending.link, pending.log)
                .map_err(|error| MachineError::Config(format!("{id}: {error}")))?;
            port_channels.push((id, index));
        }
        let mut machine = Self {
            threads,
            gate,
            notices,
            devices,
            next_channel: builder.channels.len(),
            channels: builder.channels,
            port_channels,
            open_ports: BTreeSet::new(),
            control,
            signals: None,
            epoll: builder.epoll,
            boot: boot.map(Arc::new),
            description,
            power_on,
            cpuid,
            gone,
            job: None,
            block_jobs: Vec::new(),
            ended_block_jobs: BTreeMap::new(),
            leaving: None,
            live_save: None,
            without_disks: false,
            permit: None,
            undecided: false,
            state: MachineState::Paused,
            was_stopped: false,
            devices_paused: false,
            unplugging: Vec::new(),
            units_going: Vec::new(),
            held: Vec::new(),
            starts_by_itself: !config.start_paused,
            awaited,
            ending: None,
            vm,
            memory,
            rom,
            config,
        };
        moment("vCPUs have threads");
        match (saved, saved_vcpus) {
            (Some(saved), Some(vcpus)) => machine.take_over(saved, vcpus)?,
            _ => machine.load()?,
        }
        Ok(machine)
    }
}

/// What of a machine that is to come can be made before anything of it has.
struct Ready {
    vcpus: Vcpus,
    rom: Option<Rom>,
    /// RAM and ROM are known to the VM.
    is_mapped: bool,
}

/// Makes that, for a guest that was `shown` this of its first CPU.
fn get_ready(
    config: &MachineConfig,
    vm: &dyn Vm,
    memory: &GuestMemory,
    shown: &[CpuidEntry],
) -> Result<Ready, MachineError> {
    let mut ready = Ready {
        vcpus: BTreeMap::new(),
        rom: None,
        // KVM would hear of each page that comes.
        is_mapped: vm.backend() == hypervisor::Backend::Soft,
    };
    if ready.is_mapped {
        ready.rom = map_rom(config, vm)?;
        map(vm, memory, false)?;
    }
    let topology = topology(config, Some(shown))?;
    for id in present(config) {
        let mut vcpu = vm.create_vcpu(topology.apic_id(id))?;
        if ready.is_mapped {
            vcpu.set_cpuid(shown)?;
        }
        ready.vcpus.insert(id, vcpu);
    }
    vm.get_ready();
    virtio::worker::start_from_a_thread_of_its_own().map_err(|source| MachineError::Os {
        call: "starting a thread",
        source,
    })?;
    Ok(ready)
}

/// Reads the firmware, if there is one, and makes it visible to the guest.
fn map_rom(config: &MachineConfig, vm: &dyn Vm) -> Result<Option<Rom>, MachineError> {
    let Some(firmware) = &config.boot.firmware else {
        return Ok(None);
    };
    let mut rom = Rom::read(&named(&firmware.rom)?)?;
    // SAFETY: as in `map`: the machine keeps the ROM as long as the VM, and refers to it only to copy from it while no vCPU
    // runs.
    unsafe { vm.map_memory(rom.slot())? };
    Ok(Some(rom))
}

/// How the guest sees its vCPUs arranged. One that goes on, and was `shown` this of its first one, may have been built when
/// all were cores of one socket, or those of uneven topologies were.
fn topology(
    config: &MachineConfig,
    shown: Option<&[CpuidEntry]>,
) -> Result<Topology, MachineError> {
    let Some(wanted) = config.cpu.topology else {
        return Ok(Topology::flat(config.vcpus));
    };
    let topology = Topology {
        sockets: wanted.sockets,
        cores: wanted.cores,
        threads: wanted.threads,
    };
    let counts = [wanted.cores, wanted.threads];
    let product = counts
        .iter()
        .try_fold(wanted.sockets, |all, count| all.checked_mul(*count));
    if product != Some(config.vcpus) || config.vcpus == 0 {
        if shown.is_some() {
            return Ok(Topology::flat(config.vcpus));
        }
        return Err(MachineError::Config(format!(
            "topology {wanted:?} is not one of {} vCPUs",
            config.vcpus
        )));
    }
    let other = shown.is_some_and(|leaves| !topology.was_shown(leaves));
    Ok(if other {
        Topology::flat(config.vcpus)
    } else {
        topology
    })
}

/// A UUID's text form as Windows keeps it in memory: the first three fields little-endian.
fn generation_id(text: &str) -> Result<[u8; 16], MachineError> {
    let bad = || MachineError::Config(format!("generation_id '{text}' is not a UUID"));
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    if digits.len() != 32 || !digits.is_ascii() {
        return Err(bad());
    }
    let mut id = u128::from_str_radix(&digits, 16)
        .map_err(|_| bad())?
        .to_be_bytes();
    id[..4].reverse();
    id[4..6].reverse();
    id[6..8].reverse();
    Ok(id)
}

/// The guest starts only when somebody is at the other end.
pub(super) fn waits(backend: &CharBackend) -> bool {
    matches!(backend, CharBackend::Listen { wait: true, .. })
}

/// Channels whose first peer the start waits for.
fn awaited(config: &MachineConfig) -> Vec<usize> {
    let serials = config.serials.iter().enumerate();
    serials
        .filter(|(_, serial)| waits(&serial.backend))
        .map(|(index, _)| index)
        .collect()
}

/// Makes RAM visible to the guest; a second time, tells the backend that its content is new.
pub(super) fn map(vm: &dyn Vm, memory: &GuestMemory, log_dirty: bool) -> Result<(), MachineError> {
    for mut slot in memory.slots() {
        slot.log_dirty = log_dirty;
        // SAFETY: the machine keeps the memory as long as the VM (fields drop in order: vCPUs,
        // VM, memory), and nothing but short-lived loader slices ever refers to it.
        unsafe { vm.map_memory(slot)? };
    }
    Ok(())
}

/// Has writes to RAM recorded from now on, or no longer.
pub(super) fn log_writes(vm: &dyn Vm, memory: &GuestMemory, on: bool) -> Result<(), MachineError> {
    for mut slot in memory.slots() {
        slot.log_dirty = on;
        // SAFETY: as in `map`.
        unsafe { vm.log_writes(slot)? };
    }
    Ok(())
}

fn build_devices(
    builder: &mut Builder,
    config: &MachineConfig,
    apic_ids: &[u32],
    ioapic: &Arc<IoApic>,
    (requests, notices): (&Arc<dyn Requests>, &Arc<Notices>),
    pci: PciDevices,
    pc: Option<Pc>,
) -> Result<Devices, MachineError> {
    let lines: Arc<dyn Interrupt> = match &pc {
        Some(pc) => pc.lines.clone(),
        None => ioapic.clone(),
    };
    let uarts = builder.serials(config, &lines)?;
    builder.debug(config, requests)?;
    let i8042 = Arc::new(I8042::new(
        Line::new(lines.clone(), i8042::PIN),
        requests.clone(),
    ));
    let pm = Arc::new(Pm::new(Line::new(lines.clone(), pm::SCI), requests.clone()));
    let rtc = Arc::new(Rtc::new(config.rtc_offset_seconds));
    builder.port(i8042::DATA, 1, "i8042", i8042.clone())?;
    let command = Arc::new(i8042::Command(i8042.clone()));
    builder.port(i8042::COMMAND, 1, "i8042", command)?;
    builder.port(rtc::BASE, rtc::LEN, "RTC", rtc.clone())?;
    builder.port(pm::BASE, pm::LEN, "ACPI registers", pm.clone())?;
    let cpus = config.vcpu_hotplug.as_ref().map(|hotplug| {
        let possible = (0..).zip(apic_ids);
        let possible = possible.map(|(id, apic_id)| (*apic_id, !hotplug.absent.contains(&id)));
        Arc::new(Cpus::new(possible, pm.clone(), notices.clone()))
    });
    if let Some(cpus) = &cpus {
        builder.port(cpus::BASE, cpus::LEN, "vCPU registers", cpus.clone())?;
        let events = Arc::new(pm::Events(pm.clone()));
        let len = pm::GPE_LEN.into();
        builder.port(pm::GPE_BASE, len, "ACPI events", events)?;
    }
    let root = pci.root.clone();
    builder.port(pci::PORTS, pci::PORTS_LEN, "PCI host bridge", root.clone())?;
    builder.mmio(pci::ECAM, pci::ECAM_LEN, "ECAM", Arc::new(Ecam(root)))?;
    builder.mmio(ioapic::BASE, ioapic::LEN, "I/O APIC", ioapic.clone())?;
    if config.pvpanic {
        builder.port(
            pvpanic::PORT,
            1,
            "pvpanic",
            Arc::new(Pvpanic::new(requests.clone())),
        )?;
    }
    Ok(Devices {
        ioapic: ioapic.clone(),
        uarts,
        i8042,
        pm,
        cpus,
        rtc,
        pci,
        pc,
    })
}
