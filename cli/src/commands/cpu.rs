//! CPU models, and CPUs held against each other.

use rpc::args::*;
use rpc::procs;
use xml_schemas::dom::{self, Element};

use super::read_definition;
use crate::command::{Args, Command, Opt, Values, data, flag, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;

const FILE: Opt = data("file", "a file with CPUs, in XML").values(Values::Files);
const VIRTTYPE: Opt = text("virttype", "the kind of domain (/domain/@type)").named_only();
const EMULATOR: Opt = text("emulator", "its program (/domain/devices/emulator)").named_only();
const ARCH: Opt = text("arch", "its processor (/domain/os/type/@arch)").named_only();
const MACHINE: Opt = text("machine", "its machine (/domain/os/type/@machine)").named_only();
const ERROR: Opt = flag("error", "an incompatible CPU is an error");
const VALIDATE: Opt = flag("validate", "hold the file against the schema");
const FEATURES: Opt = flag("features", "show what the model has, too");
const MIGRATABLE: Opt = flag("migratable", "without what keeps guests from moving");

/// `cpu-models`
pub const CPU_MODELS: Command = Command {
    name: "cpu-models",
    summary: "CPU models",
    description: "Shows the CPU models of an architecture.",
    options: &[data("arch", "the architecture")],
    handler: cpu_models,
    connects: true,
};

/// `cpu-compare`
pub const CPU_COMPARE: Command = Command {
    name: "cpu-compare",
    summary: "compare host CPU with a CPU described by an XML file",
    description: "Says whether this host's CPU is what a file describes.",
    options: &[FILE, ERROR, VALIDATE],
    handler: cpu_compare,
    connects: true,
};

/// `cpu-baseline`
pub const CPU_BASELINE: Command = Command {
    name: "cpu-baseline",
    summary: "compute baseline CPU",
    description: "Shows what all CPUs of a file have.",
    options: &[FILE, FEATURES, MIGRATABLE],
    handler: cpu_baseline,
    connects: true,
};

/// `hypervisor-cpu-compare`
pub const HYPERVISOR_CPU_COMPARE: Command = Command {
    name: "hypervisor-cpu-compare",
    summary: "compare a CPU with the CPU created by a hypervisor on the host",
    description: "Says whether guests can have the CPU that a file describes.",
    options: &[FILE, VIRTTYPE, EMULATOR, ARCH, MACHINE, ERROR, VALIDATE],
    handler: hypervisor_cpu_compare,
    connects: true,
};

/// `hypervisor-cpu-baseline`
pub const HYPERVISOR_CPU_BASELINE: Command = Command {
    name: "hypervisor-cpu-baseline",
    summary: "compute baseline CPU usable by a specific hypervisor",
    description: "Shows what all CPUs of a file have, and guests here can have.",
    options: &[
        text("file", "a file with CPUs, in XML").values(Values::Files),
        VIRTTYPE,
        EMULATOR,
        ARCH,
        MACHINE,
        FEATURES,
        MIGRATABLE,
        text("model", "one model instead of a file").named_only(),
    ],
    handler: hypervisor_cpu_baseline,
    connects: true,
};

fn cpu_models(shell: &mut Shell, args: &Args) -> Result {
    let asked = ConnectGetCpuModelNamesArgs {
        arch: args.required("arch")?.to_owned(),
        need_results: 1,
        flags: 0,
    };
    let found = shell
        .call(procs::CONNECT_GET_CPU_MODEL_NAMES, &asked)
        .context("failed to get CPU model names")?;
    if found.models.is_empty() {
        shell.out.print("all CPU models are accepted\n");
    }
    for model in found.models.0 {
        shell.out.print(model + "\n");
    }
    Ok(())
}

/// The CPUs of a file: alone, or in domains and capabilities.
fn cpus(path: &str) -> Result<Vec<String>> {
    let text = read_definition(path)?;
    // Several documents in one file are fine; only the first may begin with a declaration.
    let body = match text.trim_start().strip_prefix("<?xml") {
        Some(rest) => rest.split_once("?>").map_or("", |(_, rest)| rest),
        None => &text,
    };
    let tree = dom::parse(&format!("<container>{body}</container>"), path)
        .map_err(|error| Failure::new(error.to_string()))?;
    let mut found: Vec<Element> = Vec::new();
    for element in tree.elements() {
        let inside = match element.name.as_str() {
            "cpu" => Some(element),
            "domain" => element.child("cpu"),
            "capabilities" => element.child("host").and_then(|host| host.child("cpu")),
            "domainCapabilities" => element.child("cpu").and_then(|cpu| {
                let mut modes = cpu.elements();
                modes.find(|mode| {
                    mode.attr("name") == Some("host-model") && mode.attr("supported") == Some("yes")
                })
            }),
            _ => None,
        };
        let Some(mut cpu) = inside.cloned() else {
            continue;
        };
        if cpu.name == "mode" {
            cpu.name = "cpu".into();
            cpu.attributes.clear();
        }
        found.push(cpu);
    }
    if found.is_empty() {
        return Err(Failure::new(format!(
            "File '{path}' does not contain any <cpu> element or valid domain XML, host \
             capabilities XML, or domain capabilities XML"
        )));
    }
    let format = |cpu: &Element| {
        let mut text = String::new();
        dom::format_element(&mut text, cpu, 0);
        text
    };
    Ok(found.iter().map(format).collect())
}

fn compare_flags(args: &Args) -> u32 {
    u32::from(args.has("error")) | u32::from(args.has("validate")) << 1
}

fn baseline_flags(args: &Args) -> u32 {
    u32::from(args.has("features")) | u32::from(args.has("migratable")) << 1
}

/// Tells what came of a comparison. An incompatible CPU makes the command fail, without an error.
fn told(shell: &mut Shell, result: i32, words: [String; 3]) -> Result {
    let at = usize::try_from(result).unwrap_or(0).min(2);
    shell.out.print(format!("{}\n", words[at]));
    if at == 0 {
        Err(Failure::silent())
    } else {
        Ok(())
    }
}

fn cpu_compare(shell: &mut Shell, args: &Args) -> Result {
    let file = args.required("file")?.to_owned();
    let xml = cpus(&file)?.swap_remove(0);
    let asked = ConnectCompareCpuArgs {
        xml,
        flags: compare_flags(args),
    };
    let result = shell
        .call(procs::CONNECT_COMPARE_CPU, &asked)
        .context(format!("Failed to compare host CPU with {file}"))?
        .result;
    let words = [
        format!("CPU described in {file} is incompatible with host CPU"),
        format!("CPU described in {file} is identical to host CPU"),
        format!("Host CPU is a superset of CPU described in {file}"),
    ];
    told(shell, result, words)
}

fn cpu_baseline(shell: &mut Shell, args: &Args) -> Result {
    let asked = ConnectBaselineCpuArgs {
        xml_cpus: cpus(args.required("file")?)?.into(),
        flags: baseline_flags(args),
    };
    let found = shell.call(procs::CONNECT_BASELINE_CPU, &asked)?;
    shell.out.print(found.cpu);
    Ok(())
}

fn option(args: &Args, name: &str) -> Result<Option<String>> {
    Ok(args.text(name)?.map(str::to_owned))
}

fn hypervisor_cpu_compare(shell: &mut Shell, args: &Args) -> Result {
    let file = args.required("file")?.to_owned();
    let xml_cpu = cpus(&file)?.swap_remove(0);
    let asked = ConnectCompareHypervisorCpuArgs {
        emulator: option(args, "emulator")?,
        arch: option(args, "arch")?,
        machine: option(args, "machine")?,
        virttype: option(args, "virttype")?,
        xml_cpu,
        flags: compare_flags(args),
    };
    let result = shell
        .call(procs::CONNECT_COMPARE_HYPERVISOR_CPU, &asked)
        .context(format!("Failed to compare hypervisor CPU with {file}"))?
        .result;
    let by = "the CPU provided by hypervisor on the host";
    let words = [
        format!("CPU described in {file} is incompatible with {by}"),
        format!("CPU described in {file} is identical to {by}"),
        format!(
            "The CPU provided by hypervisor on the host is a superset of CPU described in {file}"
        ),
    ];
    told(shell, result, words)
}

fn hypervisor_cpu_baseline(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("file", "model")?;
    let xml_cpus = match (args.text("file")?, args.text("model")?) {
        (Some(file), _) => cpus(file)?,
        (None, Some(model)) => {
            let model = dom::escape_text(model);
            vec![format!("<cpu><model>{model}</model></cpu>")]
        }
        (None, None) => {
            return Err(Failure::new("Either --file or --model must be provided"));
        }
    };
    let asked = ConnectBaselineHypervisorCpuArgs {
        emulator: option(args, "emulator")?,
        arch: option(args, "arch")?,
        machine: option(args, "machine")?,
        virttype: option(args, "virttype")?,
        xml_cpus: xml_cpus.into(),
        flags: baseline_flags(args),
    };
    let found = shell.call(procs::CONNECT_BASELINE_HYPERVISOR_CPU, &asked)?;
    shell.out.print(found.cpu);
    Ok(())
}
