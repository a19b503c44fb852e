//! `send-key` to a Linux guest, by both clients.

use std::time::Duration;

use vireo_tests::{Kernel, Rig, Terminal, both_refuse, linux_guest, which};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(90);

#[test]
fn linux_is_typed_to_restarted_and_asked_for_help() {
    let rig = Rig::new();
    rig.define(&linux_guest("deb", Kernel::V6_1));
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", BOOT);
    terminal.send("stty cols 500; cat /proc/bus/input/devices\r");
    terminal.expect("AT Translated Set 2 keyboard", SOON);
    terminal.expect("deb:/root# ", SOON);
    let virsh = which("virsh");
    for (line, by_virsh) in [("vireo", false), ("VIRSH", virsh)] {
        // Typed at the first virtual terminal, which must be open for it. Where this host is slow the guest may
        // take keys for held, and repeat them.
        terminal.send(
            "exec 3</dev/tty1; echo op''en; read -r line <&3; echo \"typed=$(echo $line | tr -s A-Za-z)=\"\r",
        );
        terminal.expect("open", SOON);
        let press = |keys: &[&str]| {
            let args = [&["send-key", "deb", "--holdtime", "1"], keys].concat();
            let run = if by_virsh {
                rig.virsh(&args)
            } else {
                rig.vireo(&args)
            };
            run.ok();
        };
        let upper = line == "VIRSH";
        if upper {
            press(&["KEY_CAPSLOCK"]);
        }
        for letter in line.chars() {
            press(&[&format!("KEY_{}", letter.to_ascii_uppercase())]);
        }
        if upper {
            press(&["--codeset", "xt_kbd", "0x3a"]);
        }
        // Enter, by other numbers each time.
        if upper {
            press(&["--codeset", "atset3", "0x5a"]);
        } else {
            press(&["--codeset", "os_x", "Return"]);
        }
        terminal.expect(&format!("typed={line}="), SOON);
        terminal.expect("deb:/root# ", SOON);
    }
    if virsh {
        for (codeset, code) in [("os_x", "114"), ("linux", "500")] {
            both_refuse(&rig, &["send-key", "deb", "--codeset", codeset, code]);
        }
    }
    // The three keys: the kernel starts the machine again.
    let chord = ["KEY_LEFTCTRL", "KEY_LEFTALT", "KEY_DELETE"];
    rig.vireo(&[&["send-key", "deb"], &chord[..]].concat()).ok();
    terminal.expect("Vireo guest: Linux", BOOT);
    terminal.expect("deb:/root# ", BOOT);
    // No other keys after these: the guest would take them for requests, too, as long as they are held.
    let chord = ["KEY_LEFTALT", "KEY_SYSRQ", "KEY_H"];
    rig.vireo(&[&["send-key", "deb"], &chord[..]].concat()).ok();
    terminal.expect("sysrq: HELP :", SOON);
    rig.vireo(&["destroy", "deb"]).ok();
}
