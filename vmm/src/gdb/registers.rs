//! Registers as gdb numbers them (gdb manual, G.5.x "x86 Features"), and the description of the
//! target that tells it so.

use std::fmt::Write;

use hypervisor::VcpuState;

/// A register: name, bits, gdb's type.
type Register = (&'static str, u32, &'static str);

const CORE: [Register; 24] = [
    ("rax", 64, "int64"),
    ("rbx", 64, "int64"),
    ("rcx", 64, "int64"),
    ("rdx", 64, "int64"),
    ("rsi", 64, "int64"),
    ("rdi", 64, "int64"),
    ("rbp", 64, "data_ptr"),
    ("rsp", 64, "data_ptr"),
    ("r8", 64, "int64"),
    ("r9", 64, "int64"),
    ("r10", 64, "int64"),
    ("r11", 64, "int64"),
    ("r12", 64, "int64"),
    ("r13", 64, "int64"),
    ("r14", 64, "int64"),
    ("r15", 64, "int64"),
    ("rip", 64, "code_ptr"),
    ("eflags", 32, "int32"),
    ("cs", 32, "int32"),
    ("ss", 32, "int32"),
    ("ds", 32, "int32"),
    ("es", 32, "int32"),
    ("fs", 32, "int32"),
    ("gs", 32, "int32"),
];
const FLOAT: [&str; 8] = [
    "fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop",
];
const BASES: [&str; 2] = ["fs_base", "gs_base"];
const SYSTEM: [&str; 6] = ["cr0", "cr2", "cr3", "cr4", "cr8", "efer"];

// The FXSAVE image (Intel SDM vol. 1, 10.5.1).
const ST: usize = 32;
const XMM: usize = 160;
const MXCSR: usize = 24;

/// target.xml.
pub fn description() -> String {
    let mut xml = String::from(
        "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target>\
         <architecture>i386:x86-64</architecture><feature name=\"org.gnu.gdb.i386.core\">",
    );
    // Writing to a String cannot fail.
    let mut add = |name: &str, bits: u32, kind: &str| {
        let _ = write!(
            xml,
            "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"/>"
        );
    };
    for (name, bits, kind) in CORE {
        add(name, bits, kind);
    }
    for n in 0..8 {
        add(&format!("st{n}"), 80, "i387_ext");
    }
    for name in FLOAT {
        add(name, 32, "int");
    }
    xml.push_str(
        "</feature><feature name=\"org.gnu.gdb.i386.sse\">\
         <vector id=\"v4f\" type=\"ieee_single\" count=\"4\"/>\
         <vector id=\"v2d\" type=\"ieee_double\" count=\"2\"/>\
         <vector id=\"v16i8\" type=\"int8\" count=\"16\"/>\
         <vector id=\"v8i16\" type=\"int16\" count=\"8\"/>\
         <vector id=\"v4i32\" type=\"int32\" count=\"4\"/>\
         <vector id=\"v2i64\" type=\"int64\" count=\"2\"/>\
         <union id=\"vec128\"><field name=\"v4_float\" type=\"v4f\"/>\
         <field name=\"v2_double\" type=\"v2d\"/><field name=\"v16_int8\" type=\"v16i8\"/>\
         <field name=\"v8_int16\" type=\"v8i16\"/><field name=\"v4_int32\" type=\"v4i32\"/>\
         <field name=\"v2_int64\" type=\"v2i64\"/><field name=\"uint128\" type=\"uint128\"/></union>",
    );
    let mut add = |name: &str, bits: u32, kind: &str| {
        let _ = write!(
            xml,
            "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"/>"
        );
    };
    for n in 0..16 {
        add(&format!("xmm{n}"), 128, "vec128");
    }
    add("mxcsr", 32, "int");
    xml.push_str("</feature><feature name=\"org.gnu.gdb.i386.segments\">");
    let mut add = |name: &str| {
        let _ = write!(xml, "<reg name=\"{name}\" bitsize=\"64\" type=\"int64\"/>");
    };
    BASES.into_iter().for_each(&mut add);
    xml.push_str("</feature><feature name=\"org.vireo.system\">");
    let mut add = |name: &str| {
        let _ = write!(xml, "<reg name=\"{name}\" bitsize=\"64\" type=\"int64\"/>");
    };
    SYSTEM.into_iter().for_each(&mut add);
    xml.push_str("</feature></target>");
    xml
}

/// Bytes of each register, in gdb's order.
fn sizes() -> impl Iterator<Item = usize> {
    let core = CORE.into_iter().map(|(_, bits, _)| bits as usize / 8);
    let float = std::iter::repeat_n(10, 8).chain(std::iter::repeat_n(4, FLOAT.len()));
    let sse = std::iter::repeat_n(16, 16).chain([4]);
    core.chain(float)
        .chain(sse)
        .chain(std::iter::repeat_n(8, BASES.len() + SYSTEM.len()))
}

/// Where register `number` is among all of them.
pub fn place(number: usize) -> Option<std::ops::Range<usize>> {
    let start = sizes().take(number).sum();
    sizes().nth(number).map(|size| start..start + size)
}

/// Something that is read from a register, or written to it.
trait Visit {
    fn number(&mut self, value: &mut u64, size: usize);
    fn bytes(&mut self, bytes: &mut [u8]);
}

struct Get(Vec<u8>);

impl Visit for Get {
    fn number(&mut self, value: &mut u64, size: usize) {
        self.0.extend(&value.to_le_bytes()[..size]);
    }
    fn bytes(&mut self, bytes: &mut [u8]) {
        self.0.extend_from_slice(bytes);
    }
}

struct Set<'a>(&'a [u8]);

impl Set<'_> {
    fn take(&mut self, size: usize) -> &[u8] {
        let (now, later) = self.0.split_at(size.min(self.0.len()));
        self.0 = later;
        now
    }
}

impl Visit for Set<'_> {
    fn number(&mut self, value: &mut u64, size: usize) {
        let mut bytes = value.to_le_bytes();
        let new = self.take(size);
        bytes[..new.len()].copy_from_slice(new);
        *value = u64::from_le_bytes(bytes);
    }
    fn bytes(&mut self, bytes: &mut [u8]) {
        let new = self.take(bytes.len());
        bytes[..new.len()].copy_from_slice(new);
    }
}

/// All registers in gdb's order: one list for reading and for writing.
fn visit(state: &mut VcpuState, v: &mut impl Visit) {
    let r = &mut state.regs;
    for value in [
        &mut r.rax, &mut r.rbx, &mut r.rcx, &mut r.rdx, &mut r.rsi, &mut r.rdi, &mut r.rbp,
        &mut r.rsp, &mut r.r8, &mut r.r9, &mut r.r10, &mut r.r11, &mut r.r12, &mut r.r13,
        &mut r.r14, &mut r.r15, &mut r.rip,
    ] {
        v.number(value, 8);
    }
    v.number(&mut r.rflags, 4);
    let s = &mut state.sregs;
    for segment in [&s.cs, &s.ss, &s.ds, &s.es, &s.fs, &s.gs] {
        // A selector alone is no segment: read only.
        v.number(&mut segment.selector.into(), 4);
    }
    if state.xsave.len() < 512 {
        state.xsave.resize(512, 0);
    }
    let area = &mut state.xsave;
    for n in 0..8 {
        v.bytes(&mut area[ST + n * 16..ST + n * 16 + 10]);
    }
    // FCW, FSW, FTW (abridged), FOP; the pointers' selectors are history.
    for (at, size) in [
        (0, 2),
        (2, 2),
        (4, 1),
        (0, 0),
        (8, 4),
        (0, 0),
        (16, 4),
        (6, 2),
    ] {
        let mut word = [0; 4];
        word[..size].copy_from_slice(&area[at..at + size]);
        let mut value = u64::from(u32::from_le_bytes(word));
        v.number(&mut value, 4);
        area[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
    for n in 0..16 {
        v.bytes(&mut area[XMM + n * 16..XMM + n * 16 + 16]);
    }
    v.bytes(&mut area[MXCSR..MXCSR + 4]);
    let s = &mut state.sregs;
    for value in [
        &mut s.fs.base,
        &mut s.gs.base,
        &mut s.cr0,
        &mut s.cr2,
        &mut s.cr3,
        &mut s.cr4,
        &mut s.cr8,
        &mut s.efer,
    ] {
        v.number(value, 8);
    }
}

/// All registers.
pub fn get(state: &VcpuState) -> Vec<u8> {
    let mut get = Get(Vec::new());
    visit(&mut state.clone(), &mut get);
    get.0
}

/// Sets registers from the beginning of the list on; those that `bytes` does not reach stay.
pub fn set(state: &mut VcpuState, bytes: &[u8]) {
    visit(state, &mut Set(bytes));
    state.regs.rflags |= 2;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_what_is_got() {
        let mut state = VcpuState {
            xsave: vec![0; 832],
            ..VcpuState::default()
        };
        state.sregs.cs.selector = 0x10;
        let mut bytes = get(&state);
        assert_eq!(bytes.len(), sizes().sum::<usize>());
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::try_from(index % 251).unwrap();
        }
        set(&mut state, &bytes);
        let again = get(&state);
        let rip = place(16).unwrap();
        assert_eq!(again[rip.clone()], bytes[rip]);
        assert_eq!(again[place(18).unwrap()], [0x10, 0, 0, 0], "selectors stay");
        let xmm = place(24 + 16 + 3).unwrap();
        assert_eq!(xmm.len(), 16);
        assert_eq!(again[xmm.clone()], bytes[xmm]);
        assert_eq!(place(24 + 16 + 17 + 8), None);
        assert_eq!(description().matches("<reg ").count(), sizes().count());
    }
}
