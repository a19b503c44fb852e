//! The differentiated description table's AML: devices a guest can't find by itself.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    IO, If, Interrupt, Memory32Fixed, Method, Name, Or, Package, PackageBuilder, Path,
    ResourceTemplate, Return, Scope, Uuid,
};

use super::{Description, cpus};
use crate::devices::{cpus as registers, i8042, pm, pvpanic, rtc, uart};
use crate::layout::PCI_LOW;
use crate::num::{low8, low32};
use crate::pci;

/// I/O APIC pins of PCI's INTx: slot S's pin P (0 is INTA#) is line `(S + P) % count`.
#[derive(Debug, Clone, Copy)]
pub struct PciPins {
    /// First pin.
    pub first: u8,
    /// How many.
    pub count: u8,
}

/// See [`PciPins`].
pub const PCI_PINS: PciPins = PciPins {
    first: 16,
    count: 8,
};

fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(path), value)
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    aml.to_aml_bytes(&mut out);
    out
}

/// The generation id's address before it is known: written as four bytes, as any such number is.
const UNKNOWN: u32 = 0x5a7e_a5e1;

/// The table's body. The generation id, where there is one, is at `generation` in the tables; the
/// offset of that in the body.
pub fn aml(machine: &Description, generation: Option<u64>) -> (Vec<u8>, Option<usize>) {
    let mut out = bytes(&name(
        "\\_S5_",
        &Package::new(vec![&pm::S5, &pm::S5, &0_u8, &0_u8]),
    ));
    let mut children = pci_bridge(machine);
    children.extend(motherboard(machine));
    for (index, (base, pin)) in uart::COM.iter().take(machine.serials).enumerate() {
        children.extend(serial(index, *base, *pin));
    }
    children.extend(clock());
    children.extend(keyboard());
    if machine.pvpanic {
        children.extend(panic_port());
    }
    if generation.is_some() {
        children.extend(generation_id());
    }
    if machine.absent.is_some() {
        children.extend(cpus::devices(&machine.apic_ids));
        out.extend(cpus::event());
    }
    out.extend(Scope::raw(Path::new("\\_SB_"), children));
    let place = generation.and_then(|offset| {
        let unknown = UNKNOWN.to_le_bytes();
        let at = out.windows(4).position(|bytes| bytes == unknown)?;
        out[at..at + 4].copy_from_slice(&low32(offset).to_le_bytes());
        Some(at)
    });
    (out, place)
}

/// PCI Express host bridge: bus numbers, windows, interrupt routing.
fn pci_bridge(machine: &Description) -> Vec<u8> {
    let buses = AddressSpace::<u16>::new_bus_number(0, 255);
    let config = IO::new(pci::PORTS, pci::PORTS, 1, 8);
    let ports_below = AddressSpace::<u16>::new_io(0, pci::PORTS - 1, None);
    let ports_above = AddressSpace::<u16>::new_io(pci::PORTS + 8, 0xffff, None);
    let window = |range: &std::ops::Range<u64>| {
        let (first, last) = (low32(range.start), low32(range.end - 1));
        AddressSpace::<u32>::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            first,
            last,
            None,
        )
    };
    let low = PCI_LOW.each_ref().map(window);
    let high = machine.pci_high.as_ref().map(|range| {
        AddressSpace::<u64>::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            range.start,
            range.end - 1,
            None,
        )
    });
    let mut resources: Vec<&dyn Aml> = vec![
        &buses,
        &config,
        &ports_below,
        &ports_above,
        &low[0],
        &low[1],
    ];
    if let Some(high) = &high {
        resources.push(high);
    }
    // Every slot's four pins, spread over the lines so that neighbours don't share one.
    let mut routing = PackageBuilder::new();
    for slot in 0..32_u32 {
        for pin in 0..4_u32 {
            let line = u32::from(PCI_PINS.first) + (slot + pin) % u32::from(PCI_PINS.count);
            routing.add_element(&Package::new(vec![
                &(slot << 16 | 0xffff),
                &pin,
                &0_u8,
                &line,
            ]));
        }
    }
    bytes(&Device::new(
        Path::new("PCI0"),
        vec![
            &name("_HID", &EISAName::new("PNP0A08")),
            &name("_CID", &EISAName::new("PNP0A03")),
            &name("_UID", &0_u8),
            &name("_SEG", &0_u8),
            &name("_BBN", &0_u8),
            &name("_CRS", &ResourceTemplate::new(resources)),
            &name("_PRT", &routing),
            &PciControl,
        ],
    ))
}

/// `_OSC` (PCI Firmware Specification 3.2, 4.5.1): the guest's own driver may have hot-plug, which is native, and
/// the Express capability; no firmware has the rest either, so that nothing else is granted.
struct PciControl;

impl Aml for PciControl {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        /// Control bits: native hot-plug, Express capability structure.
        const GRANTED: u8 = 1 << 0 | 1 << 4;
        /// Status bit: the UUID is unknown.
        const UNKNOWN: u8 = 1 << 2;
        let host_bridge = Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
        let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
        let field = CreateDWordField::new(&control, &Arg(3), &8_u8);
        let grant = And::new(&control, &control, &GRANTED);
        let refuse = Or::new(&status, &status, &UNKNOWN);
        Method::new(
            Path::new("_OSC"),
            4,
            true,
            vec![
                &CreateDWordField::new(&status, &Arg(3), &0_u8),
                &If::new(&Equal::new(&Arg(0), &host_bridge), vec![&field, &grant]),
                &Else::new(vec![&refuse]),
                &Return::new(&Arg(3)),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Ports and memory taken by no device a driver binds to: ECAM must be among them.
fn motherboard(machine: &Description) -> Vec<u8> {
    let ecam = Memory32Fixed::new(true, low32(pci::ECAM), pci::ECAM_LEN);
    let ports = IO::new(pm::BASE, pm::BASE, 1, 12);
    let events = IO::new(pm::GPE_BASE, pm::GPE_BASE, 1, pm::GPE_LEN);
    let vcpus = IO::new(registers::BASE, registers::BASE, 1, low8(registers::LEN));
    let mut resources: Vec<&dyn Aml> = vec![&ecam, &ports];
    if machine.absent.is_some() {
        resources.extend([&events as &dyn Aml, &vcpus]);
    }
    bytes(&Device::new(
        Path::new("MRES"),
        vec![
            &name("_HID", &EISAName::new("PNP0C02")),
            &name("_CRS", &ResourceTemplate::new(resources)),
        ],
    ))
}

fn serial(index: usize, base: u16, pin: u8) -> Vec<u8> {
    let number = u8::try_from(index + 1).unwrap_or(0);
    let ports = IO::new(base, base, 1, 8);
    // COM1 and COM3 share a pin, COM2 and COM4 too.
    let interrupt = Interrupt::new(true, true, false, true, pin.into());
    bytes(&Device::new(
        Path::new(
            ["COM1", "COM2", "COM3", "COM4"]
                .get(index)
                .unwrap_or(&"COMX"),
        ),
        vec![
            &name("_HID", &EISAName::new("PNP0501")),
            &name("_UID", &number),
            &name("_CRS", &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    ))
}

fn clock() -> Vec<u8> {
    let ports = IO::new(rtc::BASE, rtc::BASE, 1, 2);
    bytes(&Device::new(
        Path::new("RTC_"),
        vec![
            &name("_HID", &EISAName::new("PNP0B00")),
            &name("_CRS", &ResourceTemplate::new(vec![&ports])),
        ],
    ))
}

/// The controller's two ports, with a keyboard and no mouse.
fn keyboard() -> Vec<u8> {
    let data = IO::new(i8042::DATA, i8042::DATA, 1, 1);
    let command = IO::new(i8042::COMMAND, i8042::COMMAND, 1, 1);
    let interrupt = Interrupt::new(true, true, false, false, i8042::PIN.into());
    bytes(&Device::new(
        Path::new("KBD_"),
        vec![
            &name("_HID", &EISAName::new("PNP0303")),
            &name(
                "_CRS",
                &ResourceTemplate::new(vec![&data, &command, &interrupt]),
            ),
        ],
    ))
}

fn panic_port() -> Vec<u8> {
    let ports = IO::new(pvpanic::PORT, pvpanic::PORT, 1, 1);
    bytes(&Device::new(
        Path::new("PEVT"),
        vec![
            &name("_HID", &"QEMU0001"),
            &name("_STA", &0x0f_u8),
            &name("_CRS", &ResourceTemplate::new(vec![&ports])),
        ],
    ))
}

/// Microsoft's "Virtual Machine Generation ID" (2012): where the id is in memory.
fn generation_id() -> Vec<u8> {
    // The tables lie below 4 GiB.
    let (low, high) = (UNKNOWN, 0_u32);
    bytes(&Device::new(
        Path::new("VMGI"),
        vec![
            &name("_HID", &"VIRE0001"),
            &name("_CID", &"VM_Gen_Counter"),
            &name("_DDN", &"VM_Gen_Counter"),
            &name("ADDR", &Package::new(vec![&low, &high])),
        ],
    ))
}
