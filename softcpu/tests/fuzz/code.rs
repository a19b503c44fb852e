//! Random code: any bytes, and more often than chance would have it the instructions that
//! change what the processor is.

use crate::random::Random;

/// Instructions and beginnings of instructions that random bytes rarely hit.
const SPECIAL: [&[u8]; 62] = [
    &[0x0f, 0x20],       // mov r, cr
    &[0x0f, 0x22],       // mov cr, r
    &[0x0f, 0x22, 0xd8], // mov cr3, rax
    &[0x0f, 0x22, 0xe0], // mov cr4, rax
    &[0x0f, 0x21],       // mov r, dr
    &[0x0f, 0x23],       // mov dr, r
    &[0x0f, 0x30],       // wrmsr
    &[0x0f, 0x32],       // rdmsr
    &[0x0f, 0x01],       // group 7
    &[0x0f, 0x01, 0xd1], // xsetbv
    &[0x0f, 0x01, 0xf8], // swapgs
    &[0x0f, 0x00],       // group 6
    &[0x0f, 0xae],       // fxsave and family
    &[0x48, 0x0f, 0xae],
    &[0x0f, 0xc7], // cmpxchg8b, xsaves, rdrand
    &[0x48, 0x0f, 0xc7],
    &[0xf0, 0x48, 0x0f, 0xc7], // lock cmpxchg16b
    &[0x66, 0x0f, 0x38, 0x82], // invpcid
    &[0x0f, 0x05],             // syscall
    &[0x0f, 0x07],             // sysret
    &[0x48, 0x0f, 0x07],
    &[0x0f, 0x34], // sysenter
    &[0x0f, 0x35], // sysexit
    &[0x48, 0x0f, 0x35],
    &[0xcf], // iret
    &[0x48, 0xcf],
    &[0x66, 0xcf],
    &[0xcb], // retf
    &[0xca],
    &[0x9a],       // call far
    &[0xea],       // jmp far
    &[0xff, 0x18], // call far [rax]
    &[0xff, 0x2b], // jmp far [rbx]
    &[0xcd],       // int n
    &[0xcc],
    &[0xf1],
    &[0xce],
    &[0xf4],       // hlt
    &[0xfb],       // sti
    &[0xfa],       // cli
    &[0x8e, 0xd0], // mov ss, ax
    &[0x8e],       // mov sreg
    &[0x17],       // pop ss
    &[0x9d],       // popf
    &[0x9c],       // pushf
    &[0xf3, 0xa4], // rep movsb
    &[0xf3, 0x48, 0xa5],
    &[0xf3, 0xab],
    &[0xf2, 0xae],
    &[0xf3, 0x6c], // rep insb
    &[0xf3, 0x6f], // rep outsd
    &[0x88, 0x05], // mov [rip + disp], al: code that changes itself
    &[0x48, 0x89, 0x05],
    &[0xf0, 0x0f, 0xb1], // lock cmpxchg
    &[0xf0, 0x48, 0x0f, 0xc1],
    &[0x0f, 0xb2], // lss
    &[0xc8],       // enter
    &[0x66, 0x60], // pusha
    &[0x0f, 0x78],
    &[0xdd],                   // x87
    &[0xc5, 0xfc],             // avx
    &[0xc4, 0xe2, 0x7d, 0x90], // gather
];

const PREFIXES: [u8; 12] = [
    0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65, 0x48,
];

/// Loads a register with something that matters to the instruction after it.
fn load(random: &mut Random, bytes: &mut Vec<u8>) {
    let register = random.pick(&[0, 1, 2, 3, 6, 7]);
    let value = match random.below(8) {
        // MSRs and control bits.
        0 => random.pick(&[
            0xc000_0080,
            0xc000_0081,
            0xc000_0082,
            0xc000_0084,
            0xc000_0100,
            0xc000_0101,
            0xc000_0102,
            0x1b,
            0x10,
            0x6e0,
            0x174,
            0x175,
            0x176,
            0x1d9,
            0x277,
            0x4b56_4d00,
            0x4b56_4d01,
            0x800 + random.clone().next() as u32 % 0x40,
        ]),
        1 => 1 << (random.next() % 32),
        2 => random.next() as u32 & 0x0037_ffff,
        3 => 0x8005_0033,
        4 => 0x1_0000 + (random.next() as u32 % 16) * 4096,
        5 => random.next() as u32 % 0x10_0000,
        6 => 0xfee0_0000 + (random.next() as u32 % 0x40) * 16,
        _ => random.next() as u32,
    };
    bytes.push(0xb8 + register);
    bytes.extend(value.to_le_bytes());
}

/// A page of code, often with something that runs over its end.
pub fn page(random: &mut Random) -> [u8; 4096] {
    let mut bytes = Vec::with_capacity(4200);
    while bytes.len() < 4096 {
        match random.below(8) {
            0 => {
                for _ in 0..random.below(16) {
                    bytes.push(random.pick(&PREFIXES));
                }
            }
            1 | 2 => load(random, &mut bytes),
            3..=5 => {
                bytes.extend(random.pick(&SPECIAL));
                for _ in 0..random.below(3) {
                    bytes.push(random.next() as u8);
                }
            }
            _ => {
                for _ in 0..1 + random.below(8) {
                    bytes.push(random.next() as u8);
                }
            }
        }
    }
    let mut page = [0; 4096];
    page.copy_from_slice(&bytes[..4096]);
    if random.one_in(3) {
        // As many prefixes before the page's end as an instruction may have bytes, about.
        let n = 12 + random.below(6);
        page[4096 - n..].fill(random.pick(&PREFIXES));
    }
    page
}
