//! Commands that few need, or that most domains here have nothing for.

use rpc::args::*;
use rpc::procs;

use super::{ANY, affected, domain_xml, find_domain, params, read_definition};
use crate::command::{Args, Command, DOMAIN, data, flag, number, rest, text};
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::{keys, size};

/// `send-key`
pub const SEND_KEY: Command = Command {
    name: "send-key",
    summary: "Send keycodes to the guest",
    description: "Presses keys of the guest's keyboard.",
    options: &[
        DOMAIN,
        text("codeset", "what the numbers mean; linux").named_only(),
        number("holdtime", "milliseconds for which they are held").named_only(),
        rest("keycode", "the keys").required(),
    ],
    handler: send_key,
    connects: true,
};

/// `send-process-signal`
pub const SEND_PROCESS_SIGNAL: Command = Command {
    name: "send-process-signal",
    summary: "Send signals to processes",
    description: "Sends a signal to a process of the guest.",
    options: &[
        DOMAIN,
        data("pid", "the process"),
        data("signame", "the signal's name or number"),
    ],
    handler: send_process_signal,
    connects: true,
};

/// `dompmsuspend`
pub const DOMPMSUSPEND: Command = Command {
    name: "dompmsuspend",
    summary: "suspend a domain gracefully using power management functions",
    description: "Has the guest put itself to sleep, through its agent.",
    options: &[
        DOMAIN,
        data("target", "mem, disk or hybrid"),
        number("duration", "seconds"),
    ],
    handler: dompmsuspend,
    connects: true,
};

/// `dompmwakeup`
pub const DOMPMWAKEUP: Command = Command {
    name: "dompmwakeup",
    summary: "wakeup a domain from pmsuspended state",
    description: "Wakes a guest that sleeps.",
    options: &[DOMAIN],
    handler: dompmwakeup,
    connects: true,
};

/// `domxml-from-native`
pub const DOMXML_FROM_NATIVE: Command = Command {
    name: "domxml-from-native",
    summary: "Convert native config to domain XML",
    description: "Makes a definition from another format.",
    options: &[
        data("format", "the format"),
        data("config", "the file").values(crate::command::Values::Files),
    ],
    handler: domxml_from_native,
    connects: true,
};

/// `domxml-to-native`
pub const DOMXML_TO_NATIVE: Command = Command {
    name: "domxml-to-native",
    summary: "Convert domain XML to native config",
    description: "Writes a definition in another format.",
    options: &[
        data("format", "the format"),
        text("domain", "the domain")
            .values(crate::command::Values::Domains)
            .named_only(),
        text("xml", "or a file with a definition").values(crate::command::Values::Files),
    ],
    handler: domxml_to_native,
    connects: true,
};

/// `screenshot`
pub const SCREENSHOT: Command = Command {
    name: "screenshot",
    summary: "take a screenshot of a current domain console and store it into a file",
    description: "Takes a picture of the guest's screen.",
    options: &[
        DOMAIN,
        text("file", "the file to write"),
        number("screen", "the screen").named_only(),
    ],
    handler: screenshot,
    connects: true,
};

/// `vncdisplay`
pub const VNCDISPLAY: Command = Command {
    name: "vncdisplay",
    summary: "vnc display",
    description: "Shows where a domain's VNC display is.",
    options: &[DOMAIN],
    handler: vncdisplay,
    connects: true,
};

/// `domdisplay`
pub const DOMDISPLAY: Command = Command {
    name: "domdisplay",
    summary: "domain display connection URI",
    description: "Shows where a domain's display is.",
    options: &[
        DOMAIN,
        flag("include-password", "with its password"),
        text("type", "a display of this kind").named_only(),
        flag("all", "all of them"),
    ],
    handler: domdisplay,
    connects: true,
};

/// `qemu-monitor-command`
pub const QEMU_MONITOR_COMMAND: Command = Command {
    name: "qemu-monitor-command",
    summary: "QEMU Monitor Command",
    description: "Runs a command of QEMU's monitor.",
    options: &[
        DOMAIN,
        flag("hmp", "a command for people"),
        flag("pretty", "the answer in several lines"),
        flag("return-value", "only what it returns"),
        text("pass-fds", "descriptors to pass along").named_only(),
        rest("cmd", "the command").required(),
    ],
    handler: qemu_monitor_command,
    connects: true,
};

/// `qemu-attach`
pub const QEMU_ATTACH: Command = Command {
    name: "qemu-attach",
    summary: "QEMU Attach",
    description: "Makes a domain of a QEMU that runs.",
    options: &[data("pid", "its process")],
    handler: qemu_attach,
    connects: true,
};

/// `lxc-enter-namespace`
pub const LXC_ENTER_NAMESPACE: Command = Command {
    name: "lxc-enter-namespace",
    summary: "LXC Guest Enter Namespace",
    description: "Runs a command in a container; there are none here.",
    options: &[
        DOMAIN,
        flag("noseclabel", "without changing the security label"),
        rest("cmd", "the command").required(),
    ],
    handler: lxc_enter_namespace,
    connects: true,
};

/// `domblkthreshold`
pub const DOMBLKTHRESHOLD: Command = Command {
    name: "domblkthreshold",
    summary: "set the threshold for block-threshold event for a given block device or it's backing chain element",
    description: "Asks to be told when a disk's file has grown so far.",
    options: &[
        DOMAIN,
        data("dev", "the disk"),
        number("threshold", "bytes").required(),
    ],
    handler: domblkthreshold,
    connects: true,
};

/// `domdirtyrate-calc`
pub const DOMDIRTYRATE_CALC: Command = Command {
    name: "domdirtyrate-calc",
    summary: "Calculate a vm's memory dirty rate",
    description: "Measures how fast a guest's memory changes.",
    options: &[
        DOMAIN,
        number("seconds", "for so long, 1 to 60").named_only(),
        text("mode", "page-sampling, dirty-bitmap or dirty-ring").named_only(),
    ],
    handler: domdirtyrate_calc,
    connects: true,
};

/// `dom-fd-associate`
pub const DOM_FD_ASSOCIATE: Command = Command {
    name: "dom-fd-associate",
    summary: "associate a FD with a domain",
    description: "Gives a domain descriptors that its disks can be made from.",
    options: &[
        DOMAIN,
        data("name", "what they are called by"),
        data("pass-fds", "the descriptors: 7,8"),
        flag("seclabel-writable", "labels that allow writing"),
        flag("seclabel-restore", "labels are put back afterwards"),
    ],
    handler: dom_fd_associate,
    connects: true,
};

/// `domlaunchsecinfo`
pub const DOMLAUNCHSECINFO: Command = Command {
    name: "domlaunchsecinfo",
    summary: "Get domain launch security info",
    description: "Shows how a domain's memory is protected.",
    options: &[DOMAIN],
    handler: domlaunchsecinfo,
    connects: true,
};

/// `domsetlaunchsecstate`
pub const DOMSETLAUNCHSECSTATE: Command = Command {
    name: "domsetlaunchsecstate",
    summary: "Set domain launch security state",
    description: "Puts a secret into a domain's protected memory.",
    options: &[
        DOMAIN,
        text("secrethdr", "file with its header"),
        text("secret", "file with the secret"),
        number("set-address", "where it goes"),
    ],
    handler: domsetlaunchsecstate,
    connects: true,
};

fn send_key(shell: &mut Shell, args: &Args) -> Result {
    /// VIR_DOMAIN_SEND_KEY_MAX_KEYS
    const MOST: usize = 16;
    let dom = find_domain(shell, args, ANY)?;
    let holdtime = args.number("holdtime")?.unwrap_or(0);
    let name = args.text("codeset")?.unwrap_or("linux");
    let codeset = keys::CODESETS.iter().position(|known| *known == name);
    let codeset = codeset.ok_or_else(|| Failure::new(format!("unknown codeset: '{name}'")))?;
    // The last one is an older name of the one before.
    let codeset = codeset.min(keys::CODESETS.len() - 2);
    let words = args.rest("keycode");
    if words.len() > MOST {
        return Err(Failure::new("too many keycodes"));
    }
    let key = |word: &&str| {
        keys::code(codeset, word).ok_or_else(|| Failure::new(format!("invalid keycode: '{word}'")))
    };
    let keycodes: Vec<u32> = words.iter().map(key).collect::<Result<_>>()?;
    let asked = DomainSendKeyArgs {
        dom,
        codeset: u32::try_from(codeset).unwrap_or(0),
        holdtime,
        keycodes: keycodes.into(),
        flags: 0,
    };
    shell.call(procs::DOMAIN_SEND_KEY, &asked)
}

/// virDomainProcessSignal up to the real-time ones.
const SIGNALS: [&str; 32] = [
    "nop", "hup", "int", "quit", "ill", "trap", "abrt", "bus", "fpe", "kill", "usr1", "segv",
    "usr2", "pipe", "alrm", "term", "stkflt", "chld", "cont", "stop", "tstp", "ttin", "ttou",
    "urg", "xcpu", "xfsz", "vtalrm", "prof", "winch", "poll", "pwr", "sys",
];

fn signal(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    let lower = name.to_ascii_lowercase();
    let known = |name: &str| {
        if let Some(number) = name.strip_prefix("rt") {
            let number: u32 = number.parse().ok()?;
            return (number <= 32).then_some(32 + number);
        }
        let at = SIGNALS.iter().position(|known| *known == name)?;
        u32::try_from(at).ok()
    };
    known(&lower)
        .or_else(|| known(lower.strip_prefix("sig_")?))
        .or_else(|| known(lower.strip_prefix("sig")?))
}

fn send_process_signal(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let pid = args.required("pid")?;
    let name = args.required("signame")?;
    let pid_value = pid.parse().map_err(|_| {
        Failure::new(format!(
            "Numeric value '{pid}' for <pid> option is malformed or out of range"
        ))
    })?;
    let signum =
        signal(name).ok_or_else(|| Failure::new(format!("malformed signal name: {name}")))?;
    let asked = DomainSendProcessSignalArgs {
        dom,
        pid_value,
        signum,
        flags: 0,
    };
    shell.call(procs::DOMAIN_SEND_PROCESS_SIGNAL, &asked)
}

fn dompmsuspend(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let name = dom.name.clone();
    let duration = args.number("duration")?.unwrap_or(0);
    let target = match args.required("target")? {
        "mem" => 0,
        "disk" => 1,
        "hybrid" => 2,
        _ => return Err(Failure::new("Invalid target")),
    };
    let asked = DomainPmSuspendForDurationArgs {
        dom,
        target,
        duration,
        flags: 0,
    };
    shell
        .call(procs::DOMAIN_PM_SUSPEND_FOR_DURATION, &asked)
        .context(format!("Domain '{name}' could not be suspended"))?;
    shell
        .out
        .print_extra(format!("Domain '{name}' successfully suspended"));
    Ok(())
}

fn dompmwakeup(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let name = dom.name.clone();
    let asked = DomainPmWakeupArgs { dom, flags: 0 };
    shell
        .call(procs::DOMAIN_PM_WAKEUP, &asked)
        .context(format!("Domain '{name}' could not be woken up"))?;
    shell
        .out
        .print_extra(format!("Domain '{name}' successfully woken up"));
    Ok(())
}

fn domxml_from_native(shell: &mut Shell, args: &Args) -> Result {
    let format = args.required("format")?.to_owned();
    let config = read_definition(args.required("config")?)?;
    let asked = ConnectDomainXmlFromNativeArgs {
        native_format: format,
        native_config: config,
        flags: 0,
    };
    let found = shell.call(procs::CONNECT_DOMAIN_XML_FROM_NATIVE, &asked)?;
    shell.out.print(found.domain_xml);
    Ok(())
}

fn domxml_to_native(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("domain", "xml")?;
    let format = args.required("format")?.to_owned();
    let xml = if args.has("domain") {
        let dom = find_domain(shell, args, ANY)?;
        domain_xml(shell, &dom, 0)?
    } else if let Some(file) = args.text("xml")? {
        read_definition(file)?
    } else {
        return Err(Failure::new("need either domain or domain XML"));
    };
    let asked = ConnectDomainXmlToNativeArgs {
        native_format: format,
        domain_xml: xml,
        flags: 0,
    };
    let found = shell.call(procs::CONNECT_DOMAIN_XML_TO_NATIVE, &asked)?;
    shell.out.print(found.native_config);
    Ok(())
}

fn screenshot(shell: &mut Shell, args: &Args) -> Result {
    let screen: u32 = args.number("screen")?.unwrap_or(0);
    let file = args.text("file")?.map(str::to_owned);
    let dom = find_domain(shell, args, ANY)?;
    let name = dom.name.clone();
    let asked = DomainScreenshotArgs {
        dom,
        screen,
        flags: 0,
    };
    let connection = shell.connection()?;
    connection.check_access(procs::DOMAIN_SCREENSHOT.number())?;
    let taken = connection.run(async |client| {
        let (ret, stream) = client
            .call_stream(procs::DOMAIN_SCREENSHOT, &asked)
            .await
            .map_err(crate::connection::failure)?;
        let mut reader = stream.reader;
        let mut bytes = Vec::new();
        while let Some(event) = reader
            .next()
            .await
            .map_err(|error| Failure::new(error.to_string()))?
        {
            if let rpc::stream::StreamEvent::Data(data) = event {
                bytes.extend_from_slice(&data);
            }
        }
        Ok::<_, Failure>((ret.mime, bytes))
    });
    let (mime, bytes) = taken.with_context(|| format!("could not take a screenshot of {name}"))?;
    let path = file.unwrap_or_else(|| format!("{name}-screenshot"));
    std::fs::write(&path, bytes).map_err(|e| {
        Failure::new(format!(
            "cannot create file {path}: {}",
            super::os_message(&e)
        ))
    })?;
    let mime = mime.unwrap_or_default();
    let text = format!("Screenshot saved to {path}, with type of {mime}");
    shell.out.print_extra(text);
    Ok(())
}

/// The displays of a running domain.
fn displays(shell: &mut Shell, args: &Args, flags: u32) -> Result<Vec<xml_schemas::dom::Element>> {
    let dom = find_domain(shell, args, ANY)?;
    let asked = DomainIsActiveArgs { dom: dom.clone() };
    if shell.call(procs::DOMAIN_IS_ACTIVE, &asked)?.active == 0 {
        return Err(Failure::new("Domain is not running"));
    }
    let xml = domain_xml(shell, &dom, flags)?;
    let tree = xml_schemas::dom::parse(&xml, "(domain)");
    let tree = tree.map_err(|error| Failure::new(error.to_string()))?;
    let all = tree.child("devices").into_iter().flat_map(|d| d.elements());
    Ok(all.filter(|e| e.name == "graphics").cloned().collect())
}

/// A display's port and address that can be reached; none without a port of its own.
fn place(display: &xml_schemas::dom::Element) -> Option<(u16, String)> {
    let port: u16 = display
        .attr("port")?
        .parse()
        .ok()
        .filter(|port| *port > 0)?;
    let listen = display.child("listen").and_then(|l| l.attr("address"));
    let address = display.attr("listen").or(listen).unwrap_or("");
    let any = matches!(address, "" | "0.0.0.0" | "::");
    Some((
        port,
        if any {
            String::new()
        } else {
            address.to_owned()
        },
    ))
}

fn vncdisplay(shell: &mut Shell, args: &Args) -> Result {
    let all = displays(shell, args, 0)?;
    let vnc = all.iter().find(|e| e.attr("type") == Some("vnc"));
    let (port, address) = vnc
        .and_then(place)
        .ok_or_else(|| Failure::new("Failed to get VNC port. Is this domain using VNC?"))?;
    let number = i32::from(port) - 5900;
    shell.out.print(format!("{address}:{number}\n"));
    Ok(())
}

fn domdisplay(shell: &mut Shell, args: &Args) -> Result {
    /// VIR_DOMAIN_XML_SECURE
    const SECURE: u32 = 1;
    let secret = args.has("include-password");
    let all = displays(shell, args, if secret { SECURE } else { 0 })?;
    let kind = args.text("type")?;
    let mut found = false;
    for wanted in ["vnc", "spice", "rdp"] {
        if kind.is_some_and(|kind| kind != wanted) || (found && !args.has("all")) {
            continue;
        }
        let display = all.iter().find(|e| e.attr("type") == Some(wanted));
        let Some((port, address)) = display.and_then(place) else {
            continue;
        };
        let host = if address.is_empty() {
            "localhost"
        } else {
            &address
        };
        let password = display.and_then(|d| d.attr("passwd")).filter(|_| secret);
        let number = if wanted == "vnc" {
            i32::from(port) - 5900
        } else {
            port.into()
        };
        let mut uri = format!("{wanted}://");
        if let Some(password) = password.filter(|_| wanted == "vnc") {
            uri.push_str(&format!(":{password}@"));
        }
        uri.push_str(&format!("{host}:{number}"));
        if let Some(password) = password.filter(|_| wanted == "spice") {
            uri.push_str(&format!("?password={password}"));
        }
        shell.out.print(uri + "\n");
        found = true;
    }
    if found {
        return Ok(());
    }
    Err(Failure::new(match kind {
        Some(kind) => format!("No graphical display with type '{kind}' found"),
        None => "No graphical display found".to_owned(),
    }))
}

fn qemu_monitor_command(shell: &mut Shell, args: &Args) -> Result {
    args.exclusive("hmp", "pretty")?;
    args.exclusive("hmp", "return-value")?;
    let dom = find_domain(shell, args, ANY)?;
    let asked = QemuDomainMonitorCommandArgs {
        dom,
        cmd: args.rest("cmd").join(" "),
        flags: u32::from(args.has("hmp")),
    };
    if args.has("pass-fds") {
        return Err(Failure::new(
            "descriptors cannot be passed to a monitor here",
        ));
    }
    let found = shell.call(procs::DOMAIN_QEMU_MONITOR_COMMAND, &asked)?;
    shell.out.print(format!("{}\n", found.result));
    Ok(())
}

fn qemu_attach(shell: &mut Shell, args: &Args) -> Result {
    let pid: u32 = args.number("pid")?.unwrap_or(0);
    let asked = QemuDomainAttachArgs {
        pid_value: pid,
        flags: 0,
    };
    let found = shell
        .call(procs::DOMAIN_QEMU_ATTACH, &asked)
        .context(format!("Failed to attach to pid {pid}"))?;
    let text = format!("Domain '{}' attached to pid {pid}\n", found.dom.name);
    shell.out.print_extra(text);
    Ok(())
}

fn lxc_enter_namespace(shell: &mut Shell, args: &Args) -> Result {
    find_domain(shell, args, ANY)?;
    // The LXC driver's program, which this daemon does not have.
    Err(Failure::new(
        "this function is not supported by the connection driver: virDomainLxcOpenNamespace",
    ))
}

fn domblkthreshold(shell: &mut Shell, args: &Args) -> Result {
    let dev = args.required("dev")?.to_owned();
    let text = args.required("threshold")?.to_owned();
    let threshold = size::parse(&text, 1).map_err(|_| {
        Failure::new(format!(
            "Scaled numeric value '{text}' for <threshold> option is malformed or out of range"
        ))
    })?;
    let dom = find_domain(shell, args, ANY)?;
    let asked = DomainSetBlockThresholdArgs {
        dom,
        dev,
        threshold,
        flags: 0,
    };
    shell.call(procs::DOMAIN_SET_BLOCK_THRESHOLD, &asked)
}

fn domdirtyrate_calc(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let seconds = args.number("seconds")?.unwrap_or(1);
    let flags = match args.text("mode")? {
        None | Some("page-sampling") => 0,
        Some("dirty-bitmap") => 1,
        Some("dirty-ring") => 2,
        Some(other) => {
            return Err(Failure::new(format!("Unknown calculation mode '{other}'")));
        }
    };
    let asked = DomainStartDirtyRateCalcArgs {
        dom,
        seconds,
        flags,
    };
    shell.call(procs::DOMAIN_START_DIRTY_RATE_CALC, &asked)?;
    // virsh has a line for a name there, which it leaves empty.
    shell
        .out
        .print_extra("Start to calculate domain's memory dirty rate successfully.\n");
    Ok(())
}

fn dom_fd_associate(shell: &mut Shell, args: &Args) -> Result {
    use std::os::fd::{AsFd, BorrowedFd};
    /// VIR_DRV_FEATURE_FD_PASSING
    const FD_PASSING: i32 = 8;
    /// virDomainFDAssociateFlags
    const RESTORE: u32 = 1;
    const WRITABLE: u32 = 2;
    let dom = find_domain(shell, args, ANY)?;
    let name = args.required("name")?.to_owned();
    let list = args.required("pass-fds")?.to_owned();
    let asked = ConnectSupportsFeatureArgs {
        feature: FD_PASSING,
    };
    if shell
        .call(procs::CONNECT_SUPPORTS_FEATURE, &asked)?
        .supported
        == 0
    {
        return Err(Failure::new(
            "argument unsupported: fd passing is not supported by this connection",
        ));
    }
    let mut fds = Vec::new();
    for word in list.split(',') {
        let bad = || Failure::new(format!("Unable to parse FD number '{word}'"));
        let number: i32 = word.parse().map_err(|_| bad())?;
        // SAFETY: fcntl(2) takes any number and says whether it is an open descriptor.
        if number < 0 || unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
            return Err(bad());
        }
        // SAFETY: it is open, as was just seen, and only its duplicate is kept.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let own = fd.as_fd().try_clone_to_owned();
        fds.push(own.map_err(|_| bad())?);
    }
    let mut flags = 0;
    for (option, bit) in [
        ("seclabel-restore", RESTORE),
        ("seclabel-writable", WRITABLE),
    ] {
        if args.has(option) {
            flags |= bit;
        }
    }
    let asked = DomainFdAssociateArgs { dom, name, flags };
    let connection = shell.connection()?;
    connection.check_access(procs::DOMAIN_FD_ASSOCIATE.number())?;
    connection.run(async |client| {
        let call = client.call_with_fds(procs::DOMAIN_FD_ASSOCIATE, &asked, fds);
        call.await
            .map(|((), _)| ())
            .map_err(crate::connection::failure)
    })
}

fn domlaunchsecinfo(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let asked = DomainGetLaunchSecurityInfoArgs { dom, flags: 0 };
    let found = shell
        .call(procs::DOMAIN_GET_LAUNCH_SECURITY_INFO, &asked)
        .context("Unable to get launch security parameters")?;
    for param in &found.params.0 {
        let value = params::text(&param.value);
        shell
            .out
            .print_extra(format!("{:<15}: {value}\n", param.field));
    }
    Ok(())
}

fn domsetlaunchsecstate(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let mut values = Vec::new();
    for (option, field) in [("secrethdr", "sev-secret-header"), ("secret", "sev-secret")] {
        let Some(file) = args.text(option)? else {
            let text = "Both secret and the secret header are required";
            return Err(Failure::new(text));
        };
        values.push(rpc::types::TypedParam::new(field, read_definition(file)?));
    }
    if let Some(address) = args.number::<u64>("set-address")? {
        values.push(rpc::types::TypedParam::new(
            "sev-secret-set-address",
            address,
        ));
    }
    let params = values.into();
    let asked = DomainSetLaunchSecurityStateArgs {
        dom,
        params,
        flags: 0,
    };
    shell
        .call(procs::DOMAIN_SET_LAUNCH_SECURITY_STATE, &asked)
        .context("Unable to set launch security state")
}

/// `update-memory-device`
pub const UPDATE_MEMORY_DEVICE: Command = Command {
    name: "update-memory-device",
    summary: "update memory device of a domain",
    description: "Changes a memory device of a domain.",
    options: &[
        DOMAIN,
        flag("config", "from the next boot on"),
        flag("live", "for the running domain"),
        flag("current", "for the domain as it is now"),
        flag("print-xml", "only show the device as it would be"),
        text("alias", "the device").named_only(),
        number("node", "the device of this NUMA node").named_only(),
        number("requested-size", "how much of it is to be used").named_only(),
    ],
    handler: update_memory_device,
    connects: true,
};

fn update_memory_device(shell: &mut Shell, args: &Args) -> Result {
    let flags = affected(args)?;
    args.exclusive("node", "alias")?;
    let dom = find_domain(shell, args, ANY)?;
    let inactive = if flags & super::AFFECT_CONFIG != 0 {
        2
    } else {
        0
    };
    let xml = domain_xml(shell, &dom, inactive)?;
    let tree = xml_schemas::dom::parse(&xml, "(domain)");
    let tree = tree.map_err(|error| Failure::new(error.to_string()))?;
    let (alias, node) = (args.text("alias")?, args.text("node")?);
    let matches = |e: &&xml_schemas::dom::Element| {
        let name = e.child("alias").and_then(|a| a.attr("name"));
        let place = e.child("target").and_then(|t| t.child_text("node"));
        e.name == "memory"
            && alias.is_none_or(|alias| name == Some(alias))
            && node.is_none_or(|node| place.as_deref().map(str::trim) == Some(node))
    };
    let all = tree.child("devices").into_iter().flat_map(|d| d.elements());
    let found: Vec<_> = all.filter(matches).cloned().collect();
    let mut device = match found.len() {
        0 => return Err(Failure::new("no memory device found")),
        1 => found.into_iter().next().unwrap_or_default(),
        _ => {
            return Err(Failure::new(
                "multiple memory devices found, use --alias or --node to select one",
            ));
        }
    };
    if let Some(text) = args.text("requested-size")? {
        let bytes = size::parse(text, 1024).map_err(|_| {
            Failure::new(format!(
                "Scaled numeric value '{text}' for <requested-size> option is malformed or out of range"
            ))
        })?;
        let kib = bytes.div_ceil(1024).to_string();
        let target = device.elements_mut().find(|e| e.name == "target");
        let requested = target.and_then(|t| t.elements_mut().find(|e| e.name == "requested"));
        let requested =
            requested.ok_or_else(|| Failure::new("virtio-mem device is missing <requested/>"))?;
        requested.children.clear();
        requested.set_attr("unit", "KiB");
        requested.push_text(kib);
    }
    let mut xml = String::new();
    xml_schemas::dom::format_element(&mut xml, &device, 0);
    if args.has("print-xml") {
        shell.out.print(xml);
        return Ok(());
    }
    let asked = DomainUpdateDeviceFlagsArgs { dom, xml, flags };
    shell.call(procs::DOMAIN_UPDATE_DEVICE_FLAGS, &asked)
}
