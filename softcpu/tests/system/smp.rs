//! Two vCPUs on two threads: memory order, atomicity, and code that one changes for the other.

use std::sync::Arc;

use softcpu::state::gpr;
use softcpu::{Cpu, Exit, Machine};

use crate::rig::{CODE, DATA, Guest, Ports, STACK, TRANSLATED, leaves};

/// Where the second vCPU's code is.
const CODE_2: u64 = CODE + 0x2000;

/// A second vCPU in the state of the first, at `CODE_2` with a stack of its own.
pub(crate) fn second(g: &Guest, code: &[u8]) -> Box<Cpu> {
    g.put(CODE_2, code);
    let machine: &Arc<Machine> = &g.machine;
    let mut cpu = Cpu::new(machine, 1, &leaves());
    if TRANSLATED {
        cpu.translate_after(0);
    }
    cpu.s = g.cpu.s.clone();
    cpu.s.rip = CODE_2;
    cpu.s.gpr[gpr::RSP] = STACK - 0x4000;
    cpu.state_changed();
    cpu
}

/// Runs both to their HLT.
fn both(g: &mut Guest, other: &mut Cpu) {
    let ports = Ports::default();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(other.run(&ports), Exit::DeadHalt));
        g.halt();
    });
}

/// `body` between a meeting of both vCPUs (they count RDI's word up) and a loop of `rounds`.
/// In it RSI points to data; ECX is the round's number; R12 counts odd findings.
fn rounds(body: &[u8], rounds: u32) -> Vec<u8> {
    // mov ecx, rounds
    let mut code = vec![0xb9];
    code.extend(rounds.to_le_bytes());
    let start = code.len();
    // lock inc dword [rdi]; lea eax, [rcx*2 - ...] is avoided: the target is kept in ebx.
    // add ebx, 2; lock inc dword [rdi]; wait: mov eax, [rdi]; sub eax, ebx; js wait (pause)
    code.extend([0x83, 0xc3, 0x02]);
    code.extend([0xf0, 0xff, 0x07]);
    code.extend([0xf3, 0x90, 0x8b, 0x07, 0x29, 0xd8, 0x78, 0xf8]);
    code.extend(body);
    // dec ecx; jnz start (near)
    code.extend([0xff, 0xc9]);
    let end = code.len() + 6;
    code.extend([0x0f, 0x85]);
    code.extend((start as i32 - end as i32).to_le_bytes());
    code.push(0xf4);
    code
}

fn pair(body: &[u8], other_body: &[u8], n: u32) -> (Guest, Box<Cpu>) {
    let mut g = Guest::long(&rounds(body, n));
    g.cpu.s.gpr[gpr::RDI] = DATA;
    g.cpu.s.gpr[gpr::RSI] = DATA + 0x100;
    g.cpu.s.gpr[gpr::RBX] = 0;
    let mut other = second(&g, &rounds(other_body, n));
    both(&mut g, &mut other);
    (g, other)
}

const N: u32 = 3000;

#[test]
fn stores_with_a_fence_between_them_and_loads_are_seen() {
    // x = ecx; mfence; r8 = y, and the same the other way round: one of them sees the other's.
    let (g, other) = pair(
        &[
            0x89, 0x0e, 0x0f, 0xae, 0xf0, 0x44, 0x8b, 0x46, 0x40, 0x44, 0x89, 0x84, 0x8e, 0, 0x10,
            0, 0,
        ],
        &[
            0x89, 0x4e, 0x40, 0x0f, 0xae, 0xf0, 0x44, 0x8b, 0x06, 0x44, 0x89, 0x84, 0x8e, 0, 0x60,
            0, 0,
        ],
        N,
    );
    drop(other);
    let word = |at: u64| g.get64(at) as u32;
    for round in 1..=N {
        let at = DATA + 0x100 + 4 * u64::from(round);
        let (first, second) = (word(at + 0x1000), word(at + 0x6000));
        assert!(
            first == round || second == round,
            "round {round}: {first}, {second}"
        );
    }
}

#[test]
fn a_message_is_there_when_its_flag_is() {
    // data = ecx; flag = ecx | the other reads flag, then data: never a new flag and old data.
    // r8d = flag; r9d = data; cmp r9d, r8d; seta al (counts go down: newer is smaller)
    let (_, other) = pair(
        &[0x89, 0x0e, 0x89, 0x4e, 0x40],
        &[
            0x44, 0x8b, 0x46, 0x40, 0x44, 0x8b, 0x0e, 0x45, 0x85, 0xc0, 0x74, 0x0c, 0x45, 0x39,
            0xc1, 0x0f, 0x97, 0xc0, 0x0f, 0xb6, 0xc0, 0x41, 0x01, 0xc4,
        ],
        N,
    );
    assert_eq!(other.s.gpr[12], 0);
}

#[test]
fn locked_operations_lose_nothing_wherever_they_lie() {
    for offset in [0, 3, 62, 61, 0xefe, 0xefd] {
        // lock add dword [rsi + offset], 1; lock xadd; lock cmpxchg loop
        let disp = i32::to_le_bytes(offset);
        let mut body = vec![0xf0, 0x83, 0x86];
        body.extend(disp);
        body.push(1);
        // mov eax, 1; lock xadd [rsi + offset], eax
        body.extend([0xb8, 1, 0, 0, 0, 0xf0, 0x0f, 0xc1, 0x86]);
        body.extend(disp);
        // mov eax, [rsi + offset]; l: lea edx, [rax + 1]; lock cmpxchg [..], edx; jne l
        body.extend([0x8b, 0x86]);
        body.extend(disp);
        body.extend([0x8d, 0x50, 0x01, 0xf0, 0x0f, 0xb1, 0x96]);
        body.extend(disp);
        body.extend([0x75, 0xf3]);
        let (g, _) = pair(&body, &body, 500);
        let seen = g.get64(DATA + 0x100 + offset as u64) as u32;
        assert_eq!(seen, 2 * 3 * 500, "at {offset:#x}");
    }
}

#[test]
fn sixteen_bytes_are_exchanged_in_one_go() {
    // mov rax, [rsi]; mov rdx, [rsi+8]; l: lea rbx', ... keeps both halves equal:
    // push rbx; push rcx; l: lea rbx, [rax+1]; mov rcx, rbx; lock cmpxchg16b [rsi]; jne l
    // pop rcx; pop rbx
    let body = [
        0x48, 0x8b, 0x06, 0x48, 0x8b, 0x56, 0x08, 0x53, 0x51, 0x48, 0x8d, 0x58, 0x01, 0x48, 0x89,
        0xd9, 0xf0, 0x48, 0x0f, 0xc7, 0x0e, 0x75, 0xf2, 0x59, 0x5b,
    ];
    let (g, _) = pair(&body, &body, 1000);
    assert_eq!(g.get64(DATA + 0x100), 2000);
    assert_eq!(g.get64(DATA + 0x108), 2000);
}

#[test]
fn code_that_another_changes_is_run_old_or_new_and_new_after_a_message() {
    // The first changes the immediate of the second's MOV EAX, then sets the flag; the second,
    // on seeing the flag's value, must run an immediate that is as new (after CPUID).
    // first: mov [rdx], ecx (the immediate); mov [rsi], ecx; wait for the other: [rsi+0x40]==ecx
    let first = [
        0x89, 0x0a, 0x89, 0x0e, 0xf3, 0x90, 0x39, 0x4e, 0x40, 0x75, 0xf9,
    ];
    // second: l: pause; cmp [rsi], ecx; jne l; push rbx; push rcx; xor eax, eax; cpuid;
    // pop rcx; pop rbx; mov eax, imm32; cmp eax, ecx; setne al; movzx eax, al; add r12d, eax;
    // mov [rsi+0x40], ecx
    let second_body = [
        0xf3, 0x90, 0x39, 0x0e, 0x75, 0xfa, 0x53, 0x51, 0x31, 0xc0, 0x0f, 0xa2, 0x59, 0x5b, 0xb8,
        0, 0, 0, 0, 0x39, 0xc8, 0x0f, 0x95, 0xc0, 0x0f, 0xb6, 0xc0, 0x41, 0x01, 0xc4, 0x89, 0x4e,
        0x40,
    ];
    let n = 400;
    let mut g = Guest::long(&rounds(&first, n));
    let code = rounds(&second_body, n);
    let at = code
        .windows(5)
        .position(|w| w == [0xb8, 0, 0, 0, 0])
        .unwrap() as u64;
    g.cpu.s.gpr[gpr::RDI] = DATA;
    g.cpu.s.gpr[gpr::RSI] = DATA + 0x100;
    g.cpu.s.gpr[gpr::RDX] = CODE_2 + at + 1;
    g.cpu.s.gpr[gpr::RBX] = 0;
    let mut other = second(&g, &code);
    both(&mut g, &mut other);
    assert_eq!(other.s.gpr[12], 0, "an old instruction was run");
}
