//! Random user-mode instruction sequences on the software CPU and on this host's own CPU: the
//! same registers, flags, memory, floating-point state and faults must come out.
//!
//! `VIREO_SEED` (one number), `VIREO_DIFF_ITERATIONS` (cases), `VIREO_DIFF_FILTER` (part of an
//! encoding form's name) and `VIREO_DIFF_LENGTH` (most instructions in a case) change what is
//! run.

#![allow(missing_docs)]

mod case;
mod compare;
mod forms;
mod generate;
mod native;
mod random;
mod soft;

use std::panic::AssertUnwindSafe;

use generate::Generator;
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

/// Runs `cases` cases; the differences found, at most one per set of encoding forms.
fn differences(seed: u64, bits: u32, cases: u64, most: usize, filter: Option<&str>) -> Vec<String> {
    let mut generator = Generator::new(seed, bits, filter);
    println!(
        "seed {seed:#x}: {cases} cases of up to {most} instructions of {} forms, {bits} bits",
        generator.forms()
    );
    let mut native = Native::new().expect("memory for the native child");
    let mut soft = Soft::new();
    let mut found = Vec::new();
    let mut seen = std::collections::HashMap::<String, usize>::new();
    let mut left = cases;
    while left > 0 {
        let data = generator.data();
        let batch: Vec<_> = (0..left.min(BATCH as u64))
            .map(|_| generator.case(most))
            .collect();
        left -= batch.len() as u64;
        let inputs: Vec<_> = batch.iter().map(|c| c.input).collect();
        let expected = match native.run(&data, &inputs) {
            Ok(outputs) => outputs,
            Err(error) => {
                found.push(error);
                continue;
            }
        };
        for (case, expected) in batch.iter().zip(&expected) {
            let run = AssertUnwindSafe(|| soft.run(&data, &case.input));
            let result = std::panic::catch_unwind(run).unwrap_or_else(|_| {
                soft = Soft::new();
                Err("panicked".into())
            });
            let text = match result {
                Ok(actual) => compare::difference(case, &data, expected, &actual),
                Err(error) => Some(format!("{error}\n{}", compare::listing(case))),
            };
            if let Some(text) = text {
                let name = compare::culprit(case, expected);
                let count = seen.entry(name.clone()).or_default();
                *count += 1;
                if *count == 1 {
                    found.push(format!("{name}:\n{text}"));
                }
            }
        }
    }
    for (name, count) in &seen {
        if *count > 1 {
            println!("{count} times: {name}");
        }
    }
    found
}

fn run(seed: u64, bits: u32, cases: u64, most: usize) {
    if !std::arch::is_x86_feature_detected!("avx") {
        println!("left out: needs a host with AVX");
        return;
    }
    let seed = from_environment("VIREO_SEED").unwrap_or(seed);
    let cases = from_environment("VIREO_DIFF_ITERATIONS").unwrap_or(cases);
    let most = from_environment("VIREO_DIFF_LENGTH").map_or(most, |l| l as usize);
    let filter = std::env::var("VIREO_DIFF_FILTER").ok();
    let found = differences(seed, bits, cases, most, filter.as_deref());
    for text in found.iter().take(60) {
        println!("{text}");
    }
    assert!(
        found.is_empty(),
        "{} kinds of differences, seed {seed:#x}",
        found.len()
    );
}

#[test]
fn single_instructions_do_what_the_host_does() {
    run(0x5eed_0001, 64, 5_000, 1);
}

#[test]
fn sequences_do_what_the_host_does() {
    run(0x5eed_0002, 64, 3_000, 12);
}

#[test]
fn instructions_of_32_bits_do_what_the_host_does() {
    run(0x5eed_0003, 32, 4_000, 4);
}
