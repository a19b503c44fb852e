//! Random user-mode instruction sequences on the software CPU and on this host's own CPU: the
//! same registers, flags, memory, floating-point state and faults must come out.
//!
//! `VIREO_SEED` (one number), `VIREO_DIFF_ITERATIONS` (cases), `VIREO_DIFF_FILTER` (part of an
//! encoding form's name) and `VIREO_DIFF_LENGTH` (most instructions in a case) change what is
//! run.
//!
//! Where AMD's and Intel's processors are known to differ, or something is undefined, nothing
//! is compared (`forms::comparable`, `compare::unspecified`). The list comes from runs on AMD's.

#![allow(missing_docs)]

mod case;
mod compare;
mod flow;
mod forms;
mod found;
mod generate;
mod initial;
mod mutate;
mod native;
mod random;
mod soft;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;

use case::{DATA_LEN, Input, Output, Shape};
use generate::{Case, Generator};
use native::{BATCH, Native};
use soft::Soft;

fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// A way to run a case on the software CPU.
type Way = fn(&mut Soft, &[u8; DATA_LEN], &Input) -> Result<Output, String>;

/// The two sides, and what was found.
struct Machines {
    native: Native,
    soft: Soft,
    found: Vec<String>,
    /// How often each set of encoding forms differed.
    seen: HashMap<String, usize>,
}

impl Machines {
    fn new() -> Self {
        Self {
            native: Native::new().expect("memory for the native child"),
            soft: Soft::new(),
            found: Vec::new(),
            seen: HashMap::new(),
        }
    }

    /// Runs up to `BATCH` cases on both.
    fn compare(&mut self, data: &[u8; DATA_LEN], batch: &[Case]) {
        let inputs: Vec<_> = batch.iter().map(|c| c.input).collect();
        let expected = match self.native.run(data, &inputs) {
            Ok(outputs) => outputs,
            Err(error) => return self.found.push(error),
        };
        for (case, expected) in batch.iter().zip(&expected) {
            let mut ways: Vec<(&str, Way)> = vec![("", Soft::run)];
            if case.input.shape.bits == 64 {
                ways.push(("translated: ", Soft::run_translated));
            }
            let text = ways.into_iter().find_map(|(way, run)| {
                let run = AssertUnwindSafe(|| run(&mut self.soft, data, &case.input));
                let result = std::panic::catch_unwind(run).unwrap_or_else(|_| {
                    self.soft = Soft::new();
                    Err("panicked".into())
                });
                let text = match result {
                    Ok(actual) => compare::difference(case, data, expected, &actual),
                    Err(error) => Some(format!("{error}\n{}", compare::listing(case))),
                };
                text.map(|text| format!("{way}{text}"))
            });
            if let Some(text) = text {
                let name = compare::forms(case);
                let count = self.seen.entry(name.clone()).or_default();
                *count += 1;
                if *count == 1 {
                    self.found.push(format!("{name}:\n{text}"));
                }
            }
        }
    }

    fn finish(self) -> Vec<String> {
        for (name, count) in &self.seen {
            if *count > 1 {
                println!("{count} times: {name}");
            }
        }
        self.found
    }
}

/// What to run.
#[derive(Clone, Copy)]
struct Plan {
    seed: u64,
    shape: Shape,
    cases: u64,
    /// Most instructions in a case.
    most: usize,
    /// Damage the instructions.
    mutate: bool,
}

/// Runs random cases; the differences found, at most one per set of encoding forms.
fn differences(plan: Plan, filter: Option<&str>) -> Vec<String> {
    let Plan {
        seed, shape, most, ..
    } = plan;
    let mut generator = Generator::new(seed, shape, filter);
    println!(
        "seed {seed:#x}: {} cases of up to {most} instructions of {} forms, {shape:?}",
        plan.cases,
        generator.forms()
    );
    let mut machines = Machines::new();
    let mut left = plan.cases;
    while left > 0 {
        let data = generator.data();
        let batch: Vec<_> = (0..left.min(BATCH as u64))
            .map(|_| {
                loop {
                    let case = generator.case(most);
                    if !plan.mutate {
                        break case;
                    }
                    if let Some(case) = generator.mutated(case) {
                        break case;
                    }
                }
            })
            .collect();
        left -= batch.len() as u64;
        machines.compare(&data, &batch);
    }
    machines.finish()
}

fn run(mut plan: Plan) {
    if !std::arch::is_x86_feature_detected!("avx") {
        println!("left out: needs a host with AVX");
        return;
    }
    plan.seed = from_environment("VIREO_SEED").unwrap_or(plan.seed);
    plan.cases = from_environment("VIREO_DIFF_ITERATIONS").unwrap_or(plan.cases);
    plan.most = from_environment("VIREO_DIFF_LENGTH").map_or(plan.most, |l| l as usize);
    let filter = std::env::var("VIREO_DIFF_FILTER").ok();
    report(&differences(plan, filter.as_deref()), plan.seed);
}

fn report(found: &[String], seed: u64) {
    for text in found.iter().take(60) {
        println!("{text}");
    }
    assert!(
        found.is_empty(),
        "{} kinds of differences, seed {:#x}",
        found.len(),
        seed
    );
}

#[test]
fn what_once_differed_does_not_any_more() {
    if !std::arch::is_x86_feature_detected!("avx") {
        println!("left out: needs a host with AVX");
        return;
    }
    let seed = from_environment("VIREO_SEED").unwrap_or(0x5eed_0006);
    let mut machines = Machines::new();
    for (what, bits, bytes) in found::FOUND {
        println!("{what}, seed {seed:#x}");
        let mut generator = Generator::new(seed, Shape::flat(bits), None);
        let data = generator.data();
        let batch: Vec<_> = (0..BATCH)
            .filter_map(|_| generator.with_code(bytes))
            .collect();
        machines.compare(&data, &batch);
    }
    report(&machines.finish(), seed);
}

#[test]
fn single_instructions_do_what_the_host_does() {
    run(Plan {
        seed: 0x5eed_0001,
        shape: Shape::LONG,
        cases: 10_000,
        most: 1,
        mutate: false,
    });
}

#[test]
fn sequences_do_what_the_host_does() {
    run(Plan {
        seed: 0x5eed_0002,
        shape: Shape::LONG,
        cases: 6_000,
        most: 12,
        mutate: false,
    });
}

#[test]
fn instructions_of_32_bits_do_what_the_host_does() {
    run(Plan {
        seed: 0x5eed_0003,
        shape: Shape::flat(32),
        cases: 8_000,
        most: 4,
        mutate: false,
    });
}

#[test]
fn damaged_instructions_do_what_the_host_does() {
    run(Plan {
        seed: 0x5eed_0004,
        shape: Shape::LONG,
        cases: 8_000,
        most: 2,
        mutate: true,
    });
}

#[test]
fn damaged_instructions_of_32_bits_do_what_the_host_does() {
    run(Plan {
        seed: 0x5eed_0005,
        shape: Shape::flat(32),
        cases: 6_000,
        most: 2,
        mutate: true,
    });
}

/// 16-bit code has to be run by the host's own CPU, which its kernel may not allow.
fn needs_segments() -> bool {
    let there = native::has_segments();
    if !there {
        println!("left out: needs modify_ldt");
    }
    there
}

#[test]
fn instructions_of_16_bits_do_what_the_host_does() {
    if !needs_segments() {
        return;
    }
    for stack in [16, 32] {
        run(Plan {
            seed: 0x5eed_0007 + u64::from(stack),
            shape: Shape::segmented(16, stack),
            cases: 5_000,
            most: 4,
            mutate: false,
        });
    }
}

#[test]
fn segmented_instructions_of_32_bits_do_what_the_host_does() {
    if !needs_segments() {
        return;
    }
    for stack in [16, 32] {
        run(Plan {
            seed: 0x5eed_0008 + u64::from(stack),
            shape: Shape::segmented(32, stack),
            cases: 4_000,
            most: 4,
            mutate: false,
        });
    }
}

#[test]
fn damaged_instructions_of_16_bits_do_what_the_host_does() {
    if !needs_segments() {
        return;
    }
    run(Plan {
        seed: 0x5eed_0009,
        shape: Shape::segmented(16, 16),
        cases: 5_000,
        most: 2,
        mutate: true,
    });
}
