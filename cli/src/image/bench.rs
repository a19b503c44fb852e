//! `bench`: how fast requests to an image are.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use images::engine::{Aio, Cache, Completion, Engine, Op, Options, Request};
use images::iovec::AlignedBuf;
use images::tree::Opener;

use super::args::{Args, Spec, flag, size, value};
use super::open::{self, FORMAT, HELP, IMAGE_OPTS, QUIET, SHARE, Secrets, message};
use super::{Done, Failure, say};

pub const SPECS: &[Spec] = &[
    HELP,
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    SHARE,
    value('t', &["cache"]),
    value('c', &["count"]),
    value('s', &["buffer-size"]),
    value('d', &["depth"]),
    value('o', &["offset"]),
    value('S', &["step-size"]),
    value('i', &["aio"]),
    flag('n', &["native"]),
    flag('w', &["write"]),
    value('\0', &["pattern"]),
    value('\0', &["flush-interval"]),
    flag('\0', &["no-drain"]),
];

/// How long the host may take to answer a request.
const PATIENCE_MS: i32 = 60_000;

struct Plan {
    count: u64,
    depth: u64,
    buffer: u64,
    step: u64,
    offset: u64,
    write: bool,
    flush: u64,
    drain: bool,
    size: u64,
}

pub fn run(args: Args) -> Done {
    let number = |name: &str, default: u64, what: &str| match args.text(name) {
        None => Ok(default),
        Some(text) => size(&text)
            .filter(|number| *number <= i64::MAX as u64)
            .ok_or_else(|| Failure::new(format!("Invalid {what} specified: '{text}'."))),
    };
    let small = |name: &str, default: u64, what: &str| {
        number(name, default, what).and_then(|number| {
            if number > i32::MAX as u64 {
                return Err(Failure::new(format!(
                    "Invalid {what} specified. Must be between 1 and {}.",
                    i32::MAX
                )));
            }
            Ok(number)
        })
    };
    let named = open::one_file(&args, "bench", "Expecting one image file name")?;
    let buffer = small("buffer-size", 4096, "buffer size")?.max(1);
    let step = small("step-size", 0, "step size")?;
    let mut plan = Plan {
        count: small("count", 75000, "request count")?,
        depth: small("depth", 64, "queue depth")?.max(1),
        buffer,
        step: if step == 0 { buffer } else { step },
        offset: number("offset", 0, "offset")?,
        write: args.has("write"),
        flush: small("flush-interval", 0, "flush interval")?,
        drain: !args.has("no-drain"),
        size: 0,
    };
    let pattern = small("pattern", 0, "pattern byte")?;
    if pattern > 0xff {
        return Err(Failure::new(
            "Invalid pattern byte specified. Must be between 0 and 255.",
        ));
    }
    if !plan.write && plan.flush > 0 {
        return Err(Failure::new(
            "--flush-interval is only available in write tests",
        ));
    }
    if plan.flush > 0 && plan.flush < plan.depth && plan.drain {
        return Err(Failure::new("Flush interval can't be smaller than depth"));
    }
    let ring = match args.text("aio").as_deref() {
        None => args.has("native"),
        Some("threads") => false,
        Some("native" | "io_uring") => true,
        Some(other) => {
            return Err(Failure::new(format!("Invalid aio option: {other}")));
        }
    };
    let mode = args.text("cache");
    let cache = match mode.as_deref() {
        None | Some("writeback") => Cache::Writeback,
        Some("none" | "off") => Cache::None,
        Some("writethrough") => Cache::Writethrough,
        Some("directsync") => Cache::DirectSync,
        Some("unsafe") => Cache::Unsafe,
        Some(_) => return Err(Failure::new("Invalid cache mode")),
    };
    let (direct, _) = open::cache(mode.as_deref(), "cache")?;
    let quiet = args.has("quiet");
    let opener = Opener {
        share: args.has("force-share"),
        direct,
        ..Opener::default()
    };
    let secrets = Secrets::default();
    let layers = if plan.write {
        open::open_writable(&named, &opener, &secrets, quiet)?
    } else {
        named.open(&opener, &secrets)?
    };
    let layer = open::first(layers)?;
    plan.size = layer.image.size();
    if plan.size == 0 {
        return Err(Failure::new("the image has no bytes"));
    }
    let engine = Engine::new(
        layer.image.clone(),
        Options {
            cache,
            aio: if ring { Aio::Ring } else { Aio::Threads },
            ..Options::default()
        },
    );
    if !quiet {
        say(&format!(
            "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step \
             size {})\n",
            plan.count,
            if plan.write { "write" } else { "read" },
            plan.buffer,
            plan.depth,
            plan.offset,
            plan.step
        ));
        if plan.flush > 0 {
            say(&format!("Sending flush every {} requests\n", plan.flush));
        }
    }
    let seconds = go(&engine, &plan, pattern as u8)?;
    if !quiet {
        say(&format!("Run completed in {seconds:.3} seconds.\n"));
    }
    Ok(0)
}

fn go(engine: &Arc<Engine>, plan: &Plan, pattern: u8) -> Result<f64, Failure> {
    let failed =
        |error: &images::Error| Failure::new(format!("Failed request: {}", message(error)));
    let slots = plan.depth.min(plan.count).max(1);
    let mut memory = Vec::new();
    for _ in 0..slots {
        let mut buffer = AlignedBuf::new(plan.buffer as usize)?;
        buffer.fill(pattern);
        memory.push(buffer);
    }
    let mut queue = engine.queue(Arc::new(()))?;
    let mut free: Vec<u64> = (0..slots).collect();
    let (mut sent, mut answered, mut in_flight) = (0, 0, 0);
    let mut offset = plan.offset;
    // Writes since the last flush, and whether one is due.
    let (mut since, mut flushing) = (0, false);
    let mut done: Vec<Completion> = Vec::new();
    let begun = Instant::now();
    while answered < plan.count {
        while sent < plan.count && !flushing && !free.is_empty() {
            let Some(slot) = free.pop() else { break };
            if offset.saturating_add(plan.buffer) > plan.size {
                offset %= plan.size;
                if offset + plan.buffer > plan.size {
                    offset = 0;
                }
            }
            let len = plan.buffer.min(plan.size) as usize;
            queue.submit(Request {
                op: if plan.write { Op::Write } else { Op::Read },
                offset,
                len: 0,
                bufs: vec![memory[slot as usize].io(len)],
                token: slot,
            });
            sent += 1;
            in_flight += 1;
            since += 1;
            offset += plan.step;
            if plan.flush > 0 && since >= plan.flush {
                flushing = plan.drain;
                since = 0;
                if !plan.drain {
                    queue.submit(flush_request());
                    in_flight += 1;
                }
            }
        }
        if flushing && in_flight == 0 {
            queue.submit(flush_request());
            in_flight += 1;
        }
        queue.complete(&mut done);
        if done.is_empty() {
            let mut wait = libc::pollfd {
                fd: queue.fd().as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one descriptor, in a structure that outlives the call.
            if unsafe { libc::poll(&raw mut wait, 1, PATIENCE_MS) } == 0 {
                return Err(Failure::new("Failed request: no answer in a minute"));
            }
            continue;
        }
        for completion in done.drain(..) {
            completion.result.as_ref().map_err(failed)?;
            in_flight -= 1;
            if completion.token == FLUSH {
                flushing = false;
            } else {
                free.push(completion.token);
                answered += 1;
            }
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    drop(queue);
    Ok(seconds)
}

const FLUSH: u64 = u64::MAX;

fn flush_request() -> Request {
    Request {
        op: Op::Flush,
        offset: 0,
        len: 0,
        bufs: Vec::new(),
        token: FLUSH,
    }
}
