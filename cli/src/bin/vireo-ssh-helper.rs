//! vireo-ssh-helper: what `+ssh` connections run on the far side; it is `vireo ssh-helper` under a name of its own, which
//! may also be called `virt-ssh-helper` where libvirt is not installed, so that stock clients find it.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.join("vireo")))
        .filter(|path| path.is_file());
    let program = beside.unwrap_or_else(|| "vireo".into());
    // libvirt's helper has the short form.
    let args = std::env::args_os().skip(1).map(|arg| {
        if arg == "-r" {
            "--readonly".into()
        } else {
            arg
        }
    });
    let error = Command::new(&program).arg("ssh-helper").args(args).exec();
    eprintln!(
        "vireo-ssh-helper: cannot run {}: {error}",
        program.display()
    );
    ExitCode::FAILURE
}
