//! One gdb's visit: its packets, and what the machine does about them.

use std::io::{Error, Result};
use std::os::fd::AsFd;

use hypervisor::{DebugControl, VcpuState, Vm, Watchpoint};

use super::packet::{self, Input, Parser, hex, number, unhex};
use super::{Stream, memory, registers, wait};
use crate::memory::GuestMemory;
use crate::num::to_usize;
use crate::vcpu::{Debugger, Stopped};

const FEATURES: &str =
    "PacketSize=4000;qXfer:features:read+;QStartNoAckMode+;vContSupported+;multiprocess-";
/// Signals as gdb numbers them.
const SIGINT: u8 = 2;
const SIGTRAP: u8 = 5;
/// Most breakpoints and most watchpoints.
const POINTS: usize = 256;

/// A visit.
pub(super) struct Session<'a> {
    stream: Box<dyn Stream>,
    parser: Parser,
    debugger: &'a Debugger,
    vm: &'a dyn Vm,
    memory: &'a GuestMemory,
    /// The vCPU that registers and memory are seen from.
    current: usize,
    control: DebugControl,
}

/// What becomes of a packet.
enum Next {
    Reply(String),
    /// The guest goes on: this vCPU alone by one instruction, or all.
    Go(Option<usize>),
    /// Nothing more is wanted.
    Detach,
}

fn ok() -> Next {
    Next::Reply("OK".into())
}

fn error() -> Next {
    Next::Reply("E01".into())
}

impl<'a> Session<'a> {
    pub(super) fn new(
        stream: Box<dyn Stream>,
        debugger: &'a Debugger,
        vm: &'a dyn Vm,
        memory: &'a GuestMemory,
    ) -> Self {
        Self {
            stream,
            parser: Parser::default(),
            debugger,
            vm,
            memory,
            current: 0,
            control: DebugControl::default(),
        }
    }

    /// Serves gdb until it leaves.
    pub(super) fn run(&mut self) -> Result<()> {
        self.stop()?;
        loop {
            let Some(input) = self.parser.next(&mut self.stream)? else {
                if !self.parser.fill(&mut self.stream)? {
                    return Ok(());
                }
                continue;
            };
            let Input::Packet(packet) = input else {
                // Ctrl-C at a machine that stands already.
                continue;
            };
            match self.answer(&packet)? {
                Next::Reply(text) => packet::send(&mut self.stream, &text)?,
                Next::Go(step) => {
                    let Some(reason) = self.go(step)? else {
                        return Ok(());
                    };
                    packet::send(&mut self.stream, &reason)?;
                }
                Next::Detach => return packet::send(&mut self.stream, "OK"),
            }
        }
    }

    /// Leaves the machine as if nobody had ever looked.
    pub(super) fn detach(&mut self) {
        self.control = DebugControl::default();
        if let Err(error) = self.stop().and_then(|()| self.arm(None)) {
            log::warn!("gdb: {error}");
        }
        self.debugger.go(None);
    }

    fn stop(&self) -> Result<()> {
        self.debugger.stop().map_err(Error::other)
    }

    /// Tells every vCPU what to stop at; `step` is to stop after one instruction.
    fn arm(&self, step: Option<usize>) -> Result<()> {
        for index in self.debugger.vcpus() {
            let control = DebugControl {
                single_step: step == Some(index),
                ..self.control.clone()
            };
            self.debugger
                .call(index, move |vcpu| vcpu.set_debug(&control))?
                .map_err(Error::other)?;
        }
        Ok(())
    }

    fn state(&self) -> Result<VcpuState> {
        self.debugger
            .call(self.current, |vcpu| vcpu.state())?
            .map_err(Error::other)
    }

    fn set_state(&self, state: VcpuState) -> Result<bool> {
        let result = self
            .debugger
            .call(self.current, move |vcpu| vcpu.set_state(&state))?;
        if let Err(error) = &result {
            log::info!("gdb: {error}");
        }
        Ok(result.is_ok())
    }

    /// Lets the guest run until it stops or gdb wants it to; what to tell. `None`: gdb left.
    fn go(&mut self, step: Option<usize>) -> Result<Option<String>> {
        self.arm(step)?;
        self.debugger.take_stops();
        self.debugger.go(step);
        let stopped = loop {
            let (input, _) = wait(self.stream.as_fd(), self.debugger.fd())?;
            if let Some(stopped) = self.debugger.take_stops().into_iter().next() {
                break Some(stopped);
            }
            if input {
                if !self.parser.fill(&mut self.stream)? {
                    return Ok(None);
                }
                if self.parser.next(&mut self.stream)? == Some(Input::Interrupt) {
                    break None;
                }
            }
        };
        self.stop()?;
        Ok(Some(self.reason(stopped)))
    }

    fn reason(&mut self, stopped: Option<Stopped>) -> String {
        let signal = if stopped.is_some() { SIGTRAP } else { SIGINT };
        let mut text = format!("T{signal:02x}");
        if let Some(stopped) = stopped {
            self.current = stopped.vcpu;
            if let Some(address) = stopped.watch {
                let reads = |w: &Watchpoint| w.address == address && w.reads;
                let kind = match self.control.watchpoints.iter().any(reads) {
                    true => "awatch",
                    false => "watch",
                };
                text += &format!("{kind}:{address:x};");
            }
        }
        text + &format!("thread:{:x};", self.current + 1)
    }

    fn answer(&mut self, packet: &[u8]) -> Result<Next> {
        let Some((kind, rest)) = packet.split_first() else {
            return Ok(Next::Reply(String::new()));
        };
        Ok(match kind {
            b'?' => Next::Reply(self.reason(None).replacen("T02", "T05", 1)),
            b'g' => Next::Reply(hex(&registers::get(&self.state()?))),
            b'G' => {
                let Some(bytes) = unhex(rest) else {
                    return Ok(error());
                };
                let mut state = self.state()?;
                registers::set(&mut state, &bytes);
                self.done(state)?
            }
            b'p' => self.read_register(rest)?,
            b'P' => self.write_register(rest)?,
            b'm' => self.read_memory(rest)?,
            b'M' => self.write_memory(rest)?,
            b'H' => self.select(rest),
            b'T' => match self.thread(rest) {
                Some(_) => ok(),
                None => error(),
            },
            b'c' => Next::Go(None),
            b's' => Next::Go(Some(self.current)),
            b'Z' | b'z' => self.point(*kind == b'Z', rest),
            b'D' | b'k' => Next::Detach,
            b'v' => self.resume(rest),
            b'q' | b'Q' => self.query(packet),
            _ => Next::Reply(String::new()),
        })
    }

    fn done(&self, state: VcpuState) -> Result<Next> {
        Ok(if self.set_state(state)? {
            ok()
        } else {
            error()
        })
    }

    fn read_register(&self, rest: &[u8]) -> Result<Next> {
        let place = number(rest).and_then(|n| registers::place(to_usize(n)));
        let Some(place) = place else {
            return Ok(error());
        };
        Ok(Next::Reply(hex(&registers::get(&self.state()?)[place])))
    }

    fn write_register(&self, rest: &[u8]) -> Result<Next> {
        let mut parts = rest.splitn(2, |byte| *byte == b'=');
        let place = parts
            .next()
            .and_then(number)
            .and_then(|n| registers::place(to_usize(n)));
        let (Some(place), Some(value)) = (place, parts.next().and_then(unhex)) else {
            return Ok(error());
        };
        let mut state = self.state()?;
        let mut all = registers::get(&state);
        if value.len() != place.len() {
            return Ok(error());
        }
        all[place].copy_from_slice(&value);
        registers::set(&mut state, &all);
        self.done(state)
    }

    fn read_memory(&self, rest: &[u8]) -> Result<Next> {
        let Some((address, len)) = two(rest) else {
            return Ok(error());
        };
        let len = to_usize(len).min(packet::MAX / 2 - 8);
        let bytes = memory::read(self.memory, &self.state()?.sregs, address, len);
        Ok(if bytes.is_empty() && len > 0 {
            error()
        } else {
            Next::Reply(hex(&bytes))
        })
    }

    fn write_memory(&self, rest: &[u8]) -> Result<Next> {
        let mut parts = rest.splitn(2, |byte| *byte == b':');
        let place = parts.next().and_then(two);
        let (Some((address, len)), Some(bytes)) = (place, parts.next().and_then(unhex)) else {
            return Ok(error());
        };
        let sregs = self.state()?.sregs;
        let written = bytes.len() as u64 == len
            && memory::write(self.memory, self.vm, &sregs, address, &bytes);
        Ok(if written { ok() } else { error() })
    }

    /// A thread's number, `None` where there is no such thread; 0 and -1 are the current one.
    fn thread(&self, text: &[u8]) -> Option<usize> {
        if matches!(text, b"0" | b"-1") {
            return Some(self.current);
        }
        let index = to_usize(number(text)?).checked_sub(1)?;
        self.debugger.vcpus().contains(&index).then_some(index)
    }

    fn select(&mut self, rest: &[u8]) -> Next {
        let thread = rest
            .split_first()
            .and_then(|(_, thread)| self.thread(thread));
        match thread {
            Some(index) => {
                self.current = index;
                ok()
            }
            None => error(),
        }
    }

    /// Sets or takes away a breakpoint or watchpoint: type, address, length.
    fn point(&mut self, set: bool, rest: &[u8]) -> Next {
        let mut parts = rest.splitn(2, |byte| *byte == b',');
        let kind = parts.next();
        let place = parts
            .next()
            .and_then(|rest| two(rest.split(|b| *b == b';').next()?));
        let Some((address, len)) = place else {
            return error();
        };
        match kind {
            // Neither patches the guest's code: both are the CPU's.
            Some(b"0" | b"1") => {
                let list = &mut self.control.breakpoints;
                list.retain(|other| *other != address);
                if set && list.len() >= POINTS {
                    return error();
                }
                if set {
                    list.push(address);
                }
            }
            // Writes; reads and accesses, which the CPU doesn't tell apart.
            Some(kind @ (b"2" | b"3" | b"4")) => {
                let watch = Watchpoint {
                    address,
                    len: len.clamp(1, 4096),
                    reads: kind != b"2",
                };
                let list = &mut self.control.watchpoints;
                list.retain(|other| *other != watch);
                if set && list.len() >= POINTS {
                    return error();
                }
                if set {
                    list.push(watch);
                }
            }
            _ => return Next::Reply(String::new()),
        }
        // A backend with few of them says so here, not when the guest is to run.
        match self.arm(None) {
            Ok(()) => ok(),
            Err(refused) => {
                log::info!("gdb: {refused}");
                self.control.breakpoints.retain(|other| *other != address);
                self.control
                    .watchpoints
                    .retain(|other| other.address != address);
                error()
            }
        }
    }

    /// vCont: actions with threads they are for; the first that fits one counts.
    fn resume(&mut self, rest: &[u8]) -> Next {
        if rest == b"Cont?" {
            return Next::Reply("vCont;c;C;s;S".into());
        }
        let Some(actions) = rest.strip_prefix(b"Cont;") else {
            return Next::Reply(String::new());
        };
        for action in actions.split(|byte| *byte == b';') {
            let mut parts = action.splitn(2, |byte| *byte == b':');
            let what = parts.next().and_then(|what| what.first());
            let thread = match parts.next() {
                Some(text) => self.thread(text),
                None => Some(self.current),
            };
            match (what, thread) {
                (Some(b's' | b'S'), Some(index)) => {
                    self.current = index;
                    return Next::Go(Some(index));
                }
                (Some(b'c' | b'C'), Some(_)) => {}
                _ => return error(),
            }
        }
        Next::Go(None)
    }

    fn query(&mut self, packet: &[u8]) -> Next {
        let text = String::from_utf8_lossy(packet);
        let reply = match &*text {
            "QStartNoAckMode" => {
                self.parser.no_ack = true;
                return ok();
            }
            "qC" => format!("QC{:x}", self.current + 1),
            "qAttached" => "1".into(),
            "qfThreadInfo" => {
                let vcpus = self.debugger.vcpus().into_iter();
                let ids = vcpus.map(|index| format!("{:x}", index + 1));
                format!("m{}", ids.collect::<Vec<_>>().join(","))
            }
            "qsThreadInfo" => "l".into(),
            _ if text.starts_with("qSupported") => FEATURES.into(),
            _ => {
                if let Some(id) = text.strip_prefix("qThreadExtraInfo,") {
                    match self.thread(id.as_bytes()) {
                        Some(index) => hex(format!("vCPU {index}").as_bytes()),
                        None => return error(),
                    }
                } else if let Some(range) = text.strip_prefix("qXfer:features:read:target.xml:") {
                    return self.describe(range.as_bytes());
                } else {
                    String::new()
                }
            }
        };
        Next::Reply(reply)
    }

    fn describe(&self, range: &[u8]) -> Next {
        let Some((offset, len)) = two(range) else {
            return error();
        };
        let xml = registers::description();
        let start = to_usize(offset).min(xml.len());
        // Escapes may double it.
        let end = xml.len().min(start + to_usize(len).min(packet::MAX / 2));
        let more = if end < xml.len() { 'm' } else { 'l' };
        Next::Reply(format!("{more}{}", &xml[start..end]))
    }
}

/// `A,B` in hexadecimal.
fn two(text: &[u8]) -> Option<(u64, u64)> {
    let mut parts = text.splitn(2, |byte| *byte == b',');
    Some((number(parts.next()?)?, number(parts.next()?)?))
}
