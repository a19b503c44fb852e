//! Pairs of operations run by one handler: a dispatch less. Each keeps its own slot, so that
//! whatever is rare (a miss in the TLB, an exception) goes on with the ordinary handlers.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::OnceLock;

use super::{Base, Ea, Full, arith, branch, mov, next, stack};
use crate::alu::{Alu, kind, shift};
use crate::cpu::Cpu;
use crate::mmu::Word;
use crate::op::{Handler, Op};
use crate::state::gpr;

/// What an operation does in the common case.
trait Body {
    /// The ordinary handler, which also deals with all other cases.
    const HANDLER: Handler;

    /// Runs it. `false`: nothing has been done, `HANDLER` has to.
    ///
    /// # Safety
    /// As `Handler`, for an operation that is `HANDLER`'s.
    unsafe fn run(cpu: &mut Cpu, op: *const Op) -> bool;
}

unsafe fn pair<A: Body, B: Body>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: `fuse` has seen that the next slot is B's operation, which falls through.
    unsafe {
        if !A::run(cpu, op) {
            return (A::HANDLER)(cpu, op);
        }
        let op = op.add(1);
        if !B::run(cpu, op) {
            return (B::HANDLER)(cpu, op);
        }
        next(cpu, op)
    }
}

/// An operation that ends a block, as the second of a pair.
trait End {
    const HANDLER: Handler;
}

unsafe fn ending<A: Body, B: End>(cpu: &mut Cpu, op: *const Op) {
    // SAFETY: `fuse` has seen that the next slot is B's operation.
    unsafe {
        if !A::run(cpu, op) {
            return (A::HANDLER)(cpu, op);
        }
        (B::HANDLER)(cpu, op.add(1))
    }
}

struct MovRr<T>(PhantomData<T>);
impl<T: Word> Body for MovRr<T> {
    const HANDLER: Handler = mov::rr::<T>;
    #[inline(always)]
    unsafe fn run(cpu: &mut Cpu, op: *const Op) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            let value = cpu.reg::<T>((*op).b);
            cpu.set_reg::<T>((*op).a, value);
        }
        true
    }
}

struct MovRi<T>(PhantomData<T>);
impl<T: Word> Body for MovRi<T> {
    const HANDLER: Handler = mov::ri::<T>;
    #[inline(always)]
    unsafe fn run(cpu: &mut Cpu, op: *const Op) -> bool {
        // SAFETY: the caller's promise.
        unsafe { cpu.set_reg::<T>((*op).a, T::cut((*op).imm)) };
        true
    }
}

struct Load<T, E>(PhantomData<(T, E)>);
impl<T: Word, E: Ea> Body for Load<T, E> {
    const HANDLER: Handler = mov::rm::<T, E>;
    #[inline(always)]
    unsafe fn run(cpu: &mut Cpu, op: *const Op) -> bool {
        let Some(p) = cpu.hit_read::<T>(E::addr(cpu, op)) else {
            return false;
        };
        // SAFETY: the caller's promise; a hit is readable guest RAM.
        unsafe { cpu.set_reg::<T>((*op).a, p.read_unaligned()) };
        true
    }
}

struct LoadByte<E>(PhantomData<E>);
impl<E: Ea> Body for LoadByte<E> {
    const HANDLER: Handler = mov::zx_rm::<u32, u8, E>;
    #[inline(always)]
    unsafe fn run(cpu: &mut Cpu, op: *const Op) -> bool {
        let Some(p) = cpu.hit_read::<u8>(E::addr(cpu, op)) else {
            return false;
        };
        // SAFETY: the caller's promise; a hit is readable guest RAM.
        unsafe { cpu.set_reg::<u32>((*op).a, p.read().into()) };
        true
    }
}

struct Store<T, E>(PhantomData<(T, E)>);
impl<T: Word, E: Ea> Body for Store<T, E> {
    const HANDLER: Handler = mov::mr::<T, E>;
    #[inline(always)]
    unsafe fn run(cpu: &mut Cpu, op: *const Op) -> bool {
        let Some(p) = cpu.hit_write::<T>(E::addr(cpu, op)) else {
            return false;
        };
        // SAFETY: the caller's promise; a hit is writable guest RAM without code.
        unsafe { p.write_unaligned(cpu.reg::<T>((*op).a)) };
        true
    }
}

struct Lea;
impl Body for Lea {
    const HANDLER: Handler = mov::lea_base::<u64>;
    #[inline(always)]
    unsafe fn run(cpu: &mut Cpu, op: *const Op) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            let addr = cpu.reg64((*op).base).wrapping_add((*op).disp as u64);
            cpu.set_reg::<u64>((*op).a, addr);
        }
        true
    }
}

struct Zero;
impl Body for Zero {
    const HANDLER: Handler = arith::zero::<u32>;
    #[inline(always)]
    unsafe fn run(cpu: &mut Cpu, op: *const Op) -> bool {
        cpu.s.cc = arith::ZERO_FLAGS;
        // SAFETY: the caller's promise.
        unsafe { cpu.set_reg::<u32>((*op).a, 0) };
        true
    }
}

struct QuietRr<const K: u8, T>(PhantomData<T>);
impl<const K: u8, T: Alu> Body for QuietRr<K, T> {
    const HANDLER: Handler = arith::quiet_rr::<K, T>;
    #[inline(always)]
    unsafe fn run(cpu: &mut Cpu, op: *const Op) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            let r = T::quiet::<K>(cpu.reg((*op).a), cpu.reg((*op).b));
            cpu.set_reg::<T>((*op).a, r);
        }
        true
    }
}

struct QuietRi<const K: u8, T>(PhantomData<T>);
impl<const K: u8, T: Alu> Body for QuietRi<K, T> {
    const HANDLER: Handler = arith::quiet_ri::<K, T>;
    #[inline(always)]
    unsafe fn run(cpu: &mut Cpu, op: *const Op) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            let r = T::quiet::<K>(cpu.reg((*op).a), T::cut((*op).imm));
            cpu.set_reg::<T>((*op).a, r);
        }
        true
    }
}

struct QuietShift<const K: u8, T>(PhantomData<T>);
impl<const K: u8, T: Alu> Body for QuietShift<K, T> {
    const HANDLER: Handler = arith::quiet_shift::<K, T>;
    #[inline(always)]
    unsafe fn run(cpu: &mut Cpu, op: *const Op) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            let r = T::quiet_shift::<K>(cpu.reg((*op).a), (*op).imm as u8);
            cpu.set_reg::<T>((*op).a, r);
        }
        true
    }
}

struct Push;
impl Body for Push {
    const HANDLER: Handler = stack::push_r::<u64>;
    #[inline(always)]
    unsafe fn run(cpu: &mut Cpu, op: *const Op) -> bool {
        let sp = cpu.s.gpr[gpr::RSP].wrapping_sub(8);
        let Some(p) = cpu.hit_write::<u64>(sp) else {
            return false;
        };
        // SAFETY: the caller's promise; a hit is writable guest RAM without code.
        unsafe { p.write_unaligned(cpu.reg::<u64>((*op).a)) };
        cpu.s.gpr[gpr::RSP] = sp;
        true
    }
}

struct Pop;
impl Body for Pop {
    const HANDLER: Handler = stack::pop_r::<u64>;
    #[inline(always)]
    unsafe fn run(cpu: &mut Cpu, op: *const Op) -> bool {
        let sp = cpu.s.gpr[gpr::RSP];
        let Some(p) = cpu.hit_read::<u64>(sp) else {
            return false;
        };
        // SAFETY: the caller's promise; a hit is readable guest RAM.
        unsafe {
            let value = p.read_unaligned();
            cpu.s.gpr[gpr::RSP] = sp.wrapping_add(8);
            cpu.set_reg::<u64>((*op).a, value);
        }
        true
    }
}

struct Ret;
impl End for Ret {
    const HANDLER: Handler = branch::ret::<u64>;
}

struct Call;
impl End for Call {
    const HANDLER: Handler = branch::call::<u64>;
}

struct Jmp;
impl End for Jmp {
    const HANDLER: Handler = branch::jmp;
}

/// TEST of a register and a branch on zero (C 4) or not (C 5).
struct TestJcc<T, const C: u8>(PhantomData<T>);
impl<T: Alu, const C: u8> End for TestJcc<T, C> {
    const HANDLER: Handler = branch::rr_jcc::<{ kind::TEST }, T, C>;
}

/// For handlers by address: a number in `singles`, and what it makes with a second one.
struct Table {
    numbers: HashMap<usize, usize>,
    handlers: Vec<Vec<Handler>>,
}

macro_rules! table {
    (bodies { $($body:ty,)* } ends { $($end:ty,)* }) => {
        fn row<A: Body>() -> Vec<Handler> {
            vec![$(pair::<A, $body>,)* $(ending::<A, $end>,)*]
        }

        fn table() -> Table {
            let singles: &[Handler] =
                &[$(<$body as Body>::HANDLER,)* $(<$end as End>::HANDLER,)*];
            Table {
                numbers: singles.iter().enumerate().map(|(i, f)| (*f as usize, i)).collect(),
                handlers: vec![$(row::<$body>(),)*],
            }
        }
    };
}

table! {
    bodies {
    MovRr<u32>,
    MovRr<u64>,
    MovRi<u32>,
    Load<u32, Base>,
    Load<u64, Base>,
    Load<u64, Full>,
    LoadByte<Base>,
    Store<u32, Base>,
    Store<u64, Base>,
    Lea,
    Zero,
    Push,
    Pop,
    QuietRr<{ kind::ADD }, u32>,
    QuietRr<{ kind::ADD }, u64>,
    QuietRr<{ kind::AND }, u32>,
    QuietRr<{ kind::OR }, u32>,
    QuietRr<{ kind::XOR }, u32>,
    QuietRi<{ kind::ADD }, u32>,
    QuietRi<{ kind::ADD }, u64>,
    QuietRi<{ kind::SUB }, u64>,
    QuietRi<{ kind::AND }, u32>,
    QuietShift<{ shift::SHL }, u64>,
    QuietShift<{ shift::SHR }, u64>,
    QuietShift<{ shift::ROR }, u32>,
    }
    ends {
    Ret,
    Call,
    Jmp,
    TestJcc<u32, 4>,
    TestJcc<u32, 5>,
    TestJcc<u64, 4>,
    TestJcc<u64, 5>,
    }
}

/// Gives pairs of a block's operations the handlers that run both.
pub(crate) fn fuse(ops: &mut [Op]) {
    static TABLE: OnceLock<Table> = OnceLock::new();
    let table = TABLE.get_or_init(table);
    // The operation before, unless it is the second of a pair.
    let mut before = None;
    for i in 0..ops.len() {
        let number = table.numbers.get(&(ops[i].f as usize)).copied();
        let both = before
            .zip(number)
            .and_then(|(a, b): (usize, usize)| table.handlers.get(a)?.get(b));
        before = number;
        if let Some(&f) = both {
            // The second slot keeps its own handler for those who come the rare way.
            ops[i - 1].f = f;
            before = None;
        }
    }
}
