//! `check`: whether an image's structure is sound, and repairing it.

use images::chain::Format;
use images::lock::{self, Usage};
use images::qcow2::{self, Fix, Report};
use images::tree;

use super::args::{Args, Spec, value};
use super::json::Value;
use super::open::{self, FORMAT, HELP, IMAGE_OPTS, OBJECT, OUTPUT, QUIET, SHARE, cannot_open};
use super::{Done, Failure, say};

pub const SPECS: &[Spec] = &[
    HELP,
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    SHARE,
    OUTPUT,
    value('T', &["cache"]),
    value('r', &["repair"]),
];

/// Exit codes.
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
const UNSUPPORTED: u8 = 63;

pub fn run(args: Args) -> Done {
    let json = open::json(&args)?;
    let fix = match args.text("repair").as_deref() {
        None => Fix::None,
        Some("leaks") => Fix::Leaks,
        Some("all") => Fix::All,
        Some(other) => {
            let what = format!("--repair (-r) expects 'leaks' or 'all' not '{other}'");
            return Err(Failure::usage("check", what));
        }
    };
    let named = open::one_file(&args, "check", "Expecting one image file name")?;
    let share = args.has("force-share");
    if share && fix != Fix::None {
        return Err(Failure::new(
            "--force-share/-U conflicts with image options",
        ));
    }
    let (direct, stable) = open::cache(args.text("cache").as_deref(), "source cache")?;
    let failed = |error: images::Error| cannot_open(&named.name, &error);
    let path = tree::local_path(&named.name).map_err(failed)?;
    let file = tree::open_file(&path, fix != Fix::None, direct, stable).map_err(failed)?;
    let format = match named.format {
        Some(format) => format,
        None => tree::probe(&file).map_err(failed)?,
    };
    if format != Format::Qcow2 {
        let what = "This image format does not support checks";
        return Err(Failure::new(what).code(UNSUPPORTED));
    }
    if !share {
        let usage = if fix == Fix::None {
            Usage::READ
        } else {
            Usage::WRITE
        };
        lock::change(file.fd(), file.name(), Usage::NONE, usage).map_err(failed)?;
    }
    let check = |fix| {
        qcow2::check(&file, fix)
            .map_err(|error| Failure::new(format!("Check failed: {}", open::message(&error))))
    };
    let quiet = args.has("quiet");
    let tell = |report: &Report| {
        for line in report.messages.iter().filter(|_| !quiet) {
            eprintln!("{line}");
        }
    };
    let mut report = check(fix)?;
    tell(&report);
    if report.leaks_fixed + report.corruptions_fixed > 0 {
        let (leaks, corruptions) = (report.leaks_fixed, report.corruptions_fixed);
        if !json && !quiet {
            say(&format!(
                "The following inconsistencies were found and repaired:\n\n    {leaks} leaked \
                 clusters\n    {corruptions} corruptions\n\nDouble checking the fixed image \
                 now...\n"
            ));
        }
        report = check(Fix::None)?;
        tell(&report);
        (report.leaks_fixed, report.corruptions_fixed) = (leaks, corruptions);
    }
    let name = named.name.to_string_lossy();
    if json {
        say(&as_json(&report, &name).print());
    } else if !quiet {
        say(&as_text(&report));
    }
    Ok(if report.corruptions > 0 {
        CORRUPT
    } else if report.leaks > 0 {
        LEAKS
    } else {
        0
    })
}

fn as_json(report: &Report, name: &str) -> Value {
    let mut fields = vec![
        ("filename", name.into()),
        ("format", "qcow2".into()),
        ("check-errors", 0_u64.into()),
    ];
    for (name, value) in [
        ("image-end-offset", report.image_end_offset),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ] {
        if value > 0 {
            fields.push((name, value.into()));
        }
    }
    Value::Object(fields)
}

fn as_text(report: &Report) -> String {
    let mut out = String::new();
    if report.corruptions + report.leaks == 0 {
        out.push_str("No errors were found on the image.\n");
    }
    if report.corruptions > 0 {
        out.push_str(&format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the \
             image may corrupt it.\n",
            report.corruptions
        ));
    }
    if report.leaks > 0 {
        out.push_str(&format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no \
             harm to data.\n",
            report.leaks
        ));
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let percent = |part: u64, of: u64| part as f64 * 100.0 / of as f64;
        out.push_str(&format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters)
        ));
    }
    if report.image_end_offset > 0 {
        out.push_str(&format!("Image end offset: {}\n", report.image_end_offset));
    }
    out
}
