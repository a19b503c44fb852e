//! passt: a user-mode network for one interface, without any rights.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use xml_schemas::dom::Element;

use crate::vmm_process::Identity;

/// Starts it; returns its process and our end of its connection. It ends with that connection.
///
/// # Errors
/// The system's; it is not installed, or ends at once.
pub fn start(interface: &Element, mtu: Option<u16>, log: &Path) -> io::Result<(Identity, OwnedFd)> {
    let (ours, its) = UnixStream::pair()?;
    let words = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(log)?;
    let number = its.as_raw_fd();
    let mut command = Command::new("passt");
    command
        .arg("--foreground")
        .arg("--quiet")
        .arg("--stderr")
        .args(["--fd", &number.to_string()])
        .args(arguments(interface, mtu))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(words.try_clone()?)
        .stderr(words);
    // SAFETY: between fork and exec: system calls with numbers only.
    unsafe {
        command.pre_exec(move || {
            if libc::setsid() < 0 || libc::fcntl(number, libc::F_SETFD, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    let identity = Identity::of(child.id());
    // Its end must be taken, or it stays as a zombie; it ends with its connection or by our kill.
    std::thread::Builder::new()
        .name("passt".to_owned())
        .spawn(move || {
            if let Err(error) = child.wait() {
                log::warn!("passt: {error}");
            }
        })?;
    let identity = identity.ok_or_else(|| io::Error::other("passt ended at once"))?;
    Ok((identity, ours.into()))
}

/// What the interface's definition says about addresses and forwarded ports.
fn arguments(interface: &Element, mtu: Option<u16>) -> Vec<String> {
    let mut arguments = Vec::new();
    let mut add = |name: &str, value: String| {
        arguments.push(name.to_owned());
        arguments.push(value);
    };
    if let Some(mtu) = mtu {
        add("--mtu", mtu.to_string());
    }
    if let Some(dev) = interface.child("source").and_then(|s| s.attr("dev")) {
        add("--interface", dev.to_owned());
    }
    for ip in interface.elements().filter(|e| e.name == "ip") {
        if let Some(address) = ip.attr("address") {
            add("--address", address.to_owned());
            if let Some(prefix) = ip.attr("prefix").filter(|_| !address.contains(':')) {
                add("--netmask", prefix.to_owned());
            }
        }
    }
    for forward in interface.elements().filter(|e| e.name == "portForward") {
        let ranges: Vec<String> = forward
            .elements()
            .filter(|e| e.name == "range")
            .filter_map(|range| {
                let start = range.attr("start")?;
                let mut text = String::new();
                if range.attr("exclude") == Some("yes") {
                    text.push('~');
                }
                text.push_str(start);
                if let Some(end) = range.attr("end") {
                    text.push_str(&format!("-{end}"));
                }
                if let Some(to) = range.attr("to") {
                    text.push_str(&format!(":{to}"));
                }
                Some(text)
            })
            .collect();
        let host = match (forward.attr("address"), forward.attr("dev")) {
            (None, None) => String::new(),
            (address, dev) => {
                let dev = dev.map(|dev| format!("%{dev}")).unwrap_or_default();
                format!("{}{dev}/", address.unwrap_or_default())
            }
        };
        let ports = if ranges.is_empty() {
            "all".to_owned()
        } else {
            ranges.join(",")
        };
        let option = match forward.attr("proto") {
            Some("udp") => "--udp-ports",
            _ => "--tcp-ports",
        };
        add(option, format!("{host}{ports}"));
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_ports_become_arguments() {
        let interface = Element::new("interface")
            .with_child(
                Element::new("ip")
                    .with_attr("address", "10.1.2.3")
                    .with_attr("prefix", "24"),
            )
            .with_child(
                Element::new("portForward")
                    .with_attr("proto", "tcp")
                    .with_attr("address", "127.0.0.1")
                    .with_child(
                        Element::new("range")
                            .with_attr("start", "2022")
                            .with_attr("to", "22"),
                    ),
            );
        assert_eq!(
            arguments(&interface, Some(1400)).join(" "),
            "--mtu 1400 --address 10.1.2.3 --netmask 24 --tcp-ports 127.0.0.1/2022:22"
        );
    }
}
