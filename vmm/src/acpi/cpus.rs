//! AML for vCPUs that come and go (ACPI 6.5, 8.4): a device for each possible one, and what runs when
//! the machine's register block ([`crate::devices::cpus`]) has something to tell.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Acquire, Arg, BufferData, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, If, Local, Method, MethodCall, Mutex, Name, Notify, OpRegion,
    OpRegionSpace, Path, Release, Return, Scope, Store, While,
};

use super::processor;
use crate::devices::cpus::{BASE, LEN};
use crate::devices::pm::Gpe;

/// Notifications (5.6.6): something came; eject request.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// `_STA` of what is there and works (6.3.7).
const THERE: u8 = 0x0f;

/// AML made elsewhere.
struct Raw(Vec<u8>);

impl Raw {
    fn of(parts: &[&dyn Aml]) -> Self {
        let mut bytes = Vec::new();
        parts.iter().for_each(|part| part.to_aml_bytes(&mut bytes));
        Self(bytes)
    }
}

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// A vCPU's device.
fn name(id: u32) -> Path {
    Path::new(&format!("C{:03X}", id & 0xfff))
}

/// `parts` with the registers to themselves.
fn locked(parts: &[&dyn Aml]) -> Raw {
    let (acquire, release) = (
        Acquire::new("CPLK".into(), 0xffff),
        Release::new("CPLK".into()),
    );
    Raw::of(&[&acquire, &Raw::of(parts), &release])
}

fn set(register: &str, value: &dyn Aml) -> Raw {
    Raw::of(&[&Store::new(&Path::new(register), value)])
}

/// The devices' body, for `\_SB_`, of vCPUs with these APIC ids.
pub fn devices(apic_ids: &[u32]) -> Vec<u8> {
    let bits = |name: &[u8; 4], bits| FieldEntry::Named(*name, bits);
    let skipped = FieldEntry::Reserved;
    let region = OpRegion::new("CPRG".into(), OpRegionSpace::SystemIO, &BASE, &LEN);
    let flags = Field::new(
        "CPRG".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![
            skipped(32),
            bits(b"CPEN", 1),
            bits(b"CINS", 1),
            bits(b"CRMV", 1),
            bits(b"CEJC", 1),
            skipped(4),
            bits(b"CCMD", 8),
        ],
    );
    let words = Field::new(
        "CPRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![bits(b"CSEL", 32), skipped(32), bits(b"CDAT", 32)],
    );
    let mut parts: Vec<Raw> = vec![
        Raw::of(&[&Name::new("_HID".into(), &"ACPI0010")]),
        Raw::of(&[&Name::new("_CID".into(), &EISAName::new("PNP0A05"))]),
        Raw::of(&[&region, &flags, &words]),
        Raw::of(&[&Mutex::new("CPLK".into(), 0)]),
        methods(),
    ];
    let mut told = Vec::new();
    for (id, _) in (0_u32..).zip(apic_ids) {
        let notify = Notify::new(&name(id), &Arg(1)).to_raw();
        told.push(If::new(&Equal::new(&Arg(0), &id), vec![&notify]).to_raw());
    }
    let told = told.iter().map(|part| part as &dyn Aml).collect();
    parts.push(Method::new("CTFY".into(), 2, false, told).to_raw());
    let devices = (0..).zip(apic_ids);
    parts.extend(devices.map(|(id, apic_id)| device(id, *apic_id)));
    let parts = parts.iter().map(|part| part as &dyn Aml).collect();
    Device::new("CPUS".into(), parts).to_raw().0
}

/// What the event runs, for the root.
pub fn event() -> Vec<u8> {
    let scan = MethodCall::new("\\_SB_.CPUS.CSCN".into(), Vec::new());
    let number = Gpe::Cpus as u8;
    let handler = Method::new(Path::new(&format!("_E{number:02X}")), 0, false, vec![&scan]);
    Scope::new("\\_GPE".into(), vec![&handler]).to_raw().0
}

trait ToRaw {
    fn to_raw(&self) -> Raw;
}

impl<T: Aml> ToRaw for T {
    fn to_raw(&self) -> Raw {
        Raw::of(&[self])
    }
}

/// A method that takes `args` arguments and runs for one caller at a time.
fn method(name: &str, args: u8, body: &[&dyn Aml]) -> Raw {
    Method::new(name.into(), args, true, vec![&Raw::of(body)]).to_raw()
}

/// `CSTA`, `CEJ0`, `COST` (of one vCPU, their first argument) and `CSCN`.
fn methods() -> Raw {
    let select = set("CSEL", &Arg(0));
    let is_set =
        |flag: &str, then: &Raw| If::new(&Equal::new(&Path::new(flag), &1_u8), vec![then]).to_raw();
    let there = is_set("CPEN", &set_local(0, &THERE));
    let status = method(
        "CSTA",
        1,
        &[
            &set_local(0, &0_u8),
            &locked(&[&select, &there]),
            &Return::new(&Local(0)),
        ],
    );
    let eject = method("CEJ0", 1, &[&locked(&[&select, &set("CEJC", &1_u8)])]);
    let tell = locked(&[
        &select,
        &set("CCMD", &1_u8),
        &set("CDAT", &Arg(1)),
        &set("CCMD", &2_u8),
        &set("CDAT", &Arg(2)),
    ]);
    let tell = method("COST", 3, &[&tell]);
    let seen = |flag: &str, notification: u8| {
        let data = Path::new("CDAT");
        let notify = MethodCall::new("CTFY".into(), vec![&data, &notification]);
        let parts = Raw::of(&[&notify, &set(flag, &1_u8), &set_local(0, &1_u8)]);
        is_set(flag, &parts)
    };
    let round = Raw::of(&[
        &set_local(0, &0_u8),
        &set("CCMD", &0_u8),
        &seen("CINS", DEVICE_CHECK),
        &seen("CRMV", EJECT_REQUEST),
    ]);
    let rounds = While::new(&Equal::new(&Local(0), &1_u8), vec![&round]).to_raw();
    let scan = locked(&[&set("CSEL", &0_u8), &set_local(0, &1_u8), &rounds]);
    let scan = method("CSCN", 0, &[&scan]);
    Raw::of(&[&status, &eject, &tell, &scan])
}

fn set_local(number: u8, value: &dyn Aml) -> Raw {
    Store::new(&Local(number), value).to_raw()
}

/// A vCPU's device. The first one stays.
fn device(id: u32, apic_id: u32) -> Raw {
    let of = |method: &str| MethodCall::new(method.into(), vec![&id]).to_raw();
    // With its entry as it is when it is there.
    let entry = BufferData::new(processor(id, apic_id, true)).to_raw();
    let status = of("CSTA");
    let tell = MethodCall::new("COST".into(), vec![&id, &Arg(0), &Arg(1)]).to_raw();
    let ejected = of("CEJ0");
    let mut parts = vec![
        Name::new("_HID".into(), &"ACPI0007").to_raw(),
        Name::new("_UID".into(), &id).to_raw(),
        Name::new("_MAT".into(), &entry).to_raw(),
        method("_STA", 0, &[&Return::new(&status)]),
        method("_OST", 3, &[&tell]),
    ];
    if id != 0 {
        parts.push(method("_EJ0", 1, &[&ejected]));
    }
    let parts = parts.iter().map(|part| part as &dyn Aml).collect();
    Device::new(name(id), parts).to_raw()
}
