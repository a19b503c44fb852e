//! What CPUID does not offer is not there.

use softcpu::cpuid::Leaf;
use softcpu::state::{cr4, gpr};

use crate::rig::{CODE, DATA, Guest};

/// CPUID of a processor with long mode and nothing else.
fn bare() -> Vec<Leaf> {
    let leaf = |function, regs| Leaf {
        function,
        index: None,
        regs,
    };
    vec![
        leaf(0, [7, 0, 0, 0]),
        leaf(1, [0; 4]),
        leaf(7, [0; 4]),
        leaf(0x8000_0000, [0x8000_0008, 0, 0, 0]),
        leaf(0x8000_0001, [0, 0, 0, 1 << 29]),
        leaf(0x8000_0008, [40, 0, 0, 0]),
    ]
}

#[test]
fn instructions_of_features_that_are_not_offered_are_undefined() {
    let cases: [(&str, &[u8]); 44] = [
        ("fld1", &[0xd9, 0xe8]),
        ("emms", &[0x0f, 0x77]),
        ("rdtsc", &[0x0f, 0x31]),
        ("rdmsr", &[0x0f, 0x32]),
        ("wrmsr", &[0x0f, 0x30]),
        ("cmpxchg8b", &[0x0f, 0xc7, 0x0f]),
        ("cmpxchg16b", &[0x48, 0x0f, 0xc7, 0x0f]),
        ("sysenter", &[0x0f, 0x34]),
        ("sysexit", &[0x0f, 0x35]),
        ("syscall", &[0x0f, 0x05]),
        ("sysret", &[0x48, 0x0f, 0x07]),
        ("cmovz", &[0x0f, 0x44, 0xc1]),
        ("clflush", &[0x0f, 0xae, 0x3f]),
        ("clflushopt", &[0x66, 0x0f, 0xae, 0x3f]),
        ("clwb", &[0x66, 0x0f, 0xae, 0x37]),
        ("fxsave", &[0x0f, 0xae, 0x07]),
        ("xsave", &[0x0f, 0xae, 0x27]),
        ("xgetbv", &[0x0f, 0x01, 0xd0]),
        ("xsetbv", &[0x0f, 0x01, 0xd1]),
        ("addps", &[0x0f, 0x58, 0xc1]),
        ("addpd", &[0x66, 0x0f, 0x58, 0xc1]),
        ("movnti", &[0x0f, 0xc3, 0x07]),
        ("sfence", &[0x0f, 0xae, 0xf8]),
        ("lfence", &[0x0f, 0xae, 0xe8]),
        ("mfence", &[0x0f, 0xae, 0xf0]),
        ("haddps", &[0xf2, 0x0f, 0x7c, 0xc1]),
        ("pshufb", &[0x66, 0x0f, 0x38, 0x00, 0xc1]),
        ("crc32", &[0xf2, 0x0f, 0x38, 0xf1, 0xc1]),
        ("popcnt", &[0xf3, 0x0f, 0xb8, 0xc1]),
        ("movbe", &[0x0f, 0x38, 0xf0, 0x07]),
        ("aesenc", &[0x66, 0x0f, 0x38, 0xdc, 0xc1]),
        ("rdrand", &[0x0f, 0xc7, 0xf0]),
        ("rdseed", &[0x0f, 0xc7, 0xf8]),
        ("vaddps", &[0xc5, 0xf8, 0x58, 0xc1]),
        ("andn", &[0xc4, 0xe2, 0x78, 0xf2, 0xc1]),
        ("mulx", &[0xc4, 0xe2, 0x7b, 0xf6, 0xc1]),
        ("adcx", &[0x66, 0x0f, 0x38, 0xf6, 0xc1]),
        ("rdfsbase", &[0xf3, 0x0f, 0xae, 0xc0]),
        ("rdpid", &[0xf3, 0x0f, 0xc7, 0xf8]),
        ("rdtscp", &[0x0f, 0x01, 0xf9]),
        ("clac", &[0x0f, 0x01, 0xca]),
        ("invpcid", &[0x66, 0x0f, 0x38, 0x82, 0x07]),
        ("monitor", &[0x0f, 0x01, 0xc8]),
        ("clzero", &[0x0f, 0x01, 0xfc]),
    ];
    for (name, code) in cases {
        let mut g = Guest::long(code);
        g.cpu.set_cpuid(&bare());
        g.cpu.s.cr4 |= cr4::OSFXSR | cr4::OSXSAVE | cr4::FSGSBASE;
        g.cpu.s.gpr[gpr::RDI] = DATA;
        g.cpu.s.gpr[gpr::RAX] = DATA;
        g.cpu.state_changed();
        let seen = g.exception();
        assert_eq!((seen.vector, seen.rip), (6, CODE), "{name}");
    }
}

#[test]
fn older_instructions_take_the_place_of_those_that_are_not_offered() {
    // tzcnt and lzcnt are bsf and bsr: of 0x10, 4 and 4 (lzcnt would be 27).
    let mut g = Guest::long(&[
        0xb9, 0x10, 0, 0, 0, 0xf3, 0x0f, 0xbc, 0xc1, 0xf3, 0x0f, 0xbd, 0xd9, 0xf4,
    ]);
    g.cpu.set_cpuid(&bare());
    g.cpu.state_changed();
    g.halt();
    assert_eq!((g.rax(), g.cpu.s.gpr[gpr::RBX]), (4, 4));
}

#[test]
fn control_bits_of_what_is_not_offered_cannot_be_set() {
    for bit in [
        cr4::VME,
        cr4::PVI,
        cr4::DE,
        cr4::PGE,
        cr4::OSFXSR,
        cr4::FSGSBASE,
        cr4::PCIDE,
        cr4::OSXSAVE,
        cr4::SMEP,
        cr4::SMAP,
        cr4::UMIP,
        cr4::LA57,
        1 << 22,
        1 << 23,
        1 << 40,
    ] {
        // mov cr4, rax
        let mut g = Guest::long(&[0x0f, 0x22, 0xe0]);
        g.cpu.set_cpuid(&bare());
        g.cpu.s.cr4 = cr4::PAE;
        g.cpu.s.gpr[gpr::RAX] = cr4::PAE | bit;
        g.cpu.state_changed();
        assert_eq!(g.exception().vector, 13, "{bit:#x}");
    }
}
