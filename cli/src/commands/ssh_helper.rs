//! The far side of `+ssh`.

use crate::command::{Args, Command, data, flag};
use crate::connection;
use crate::failure::Result;
use crate::shell::Shell;

/// `ssh-helper`, which `+ssh` URIs run on the far side.
pub const SSH_HELPER: Command = Command {
    name: "ssh-helper",
    summary: "internal command for +ssh connections",
    description: "Passes standard input and output on to the daemon that a URI names, which is started if need be.",
    options: &[
        flag("readonly", "look, but change nothing"),
        data("uri", "its connection URI"),
    ],
    handler: help,
    connects: false,
};

fn help(shell: &mut Shell, args: &Args) -> Result {
    let readonly = args.has("readonly");
    let target = shell.resolve(args.required("uri")?, readonly)?;
    shell.out.quiet = true;
    connection::pass(&target)
}
