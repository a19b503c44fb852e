//! A guest's serial console: `console`, `ttyconsole`.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;

use rpc::args::DomainOpenConsoleArgs;
use rpc::client::{Client, ClientError};
use rpc::procs;
use rpc::stream::{Stream, StreamError, StreamEvent, StreamReader, StreamWriter};
use rpc::types::Domain;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::monitor::{self, State};
use super::{ANY, domain_xml, find_domain, os_message};
use crate::command::{Args, Command, DOMAIN, flag, text};
use crate::connection;
use crate::failure::{Context, Failure, Result};
use crate::shell::Shell;
use crate::terminal::RawTerminal;

/// `console`
pub const CONSOLE: Command = Command {
    name: "console",
    summary: "connect to the guest console",
    description: "Connects this terminal to the guest's serial console, until the escape key is pressed.",
    options: &[
        DOMAIN,
        text("devname", "alias of the device, if not the first console"),
        flag("force", "take the console from whoever is connected to it"),
        flag("safe", "only if nobody else can connect at the same time"),
    ],
    handler: console,
    connects: true,
};

/// `ttyconsole`
pub const TTYCONSOLE: Command = Command {
    name: "ttyconsole",
    summary: "tty console",
    description: "Prints the terminal device of the guest's console.",
    options: &[DOMAIN],
    handler: ttyconsole,
    connects: true,
};

/// `VIR_DOMAIN_CONSOLE_*`
const FORCE: u32 = 1 << 0;
const SAFE: u32 = 1 << 1;

fn console(shell: &mut Shell, args: &Args) -> Result {
    let device = args.text("devname")?.map(str::to_owned);
    let flags = super::domain::flags(args, &[("force", FORCE), ("safe", SAFE)]);
    let dom = find_domain(shell, args, ANY)?;
    run(shell, &dom, device, flags)
}

fn ttyconsole(shell: &mut Shell, args: &Args) -> Result {
    let dom = find_domain(shell, args, ANY)?;
    let xml = domain_xml(shell, &dom, 0)?;
    let tree = xml_schemas::dom::parse(&xml, "(domain_definition)")
        .map_err(|error| Failure::new(error.to_string()))?;
    let console = tree
        .child("devices")
        .and_then(|devices| devices.child("console"));
    match console
        .and_then(|console| console.attr("tty"))
        .filter(|tty| !tty.is_empty())
    {
        Some(tty) => shell.out.print(format!("{tty}\n")),
        None => return Err(Failure::silent()),
    }
    Ok(())
}

/// Connects the terminal to a domain's console until the user leaves or the console ends.
///
/// # Errors
///
/// The domain isn't running, there is no terminal, or the stream fails.
pub fn run(shell: &mut Shell, dom: &Domain, device: Option<String>, flags: u32) -> Result {
    let (state, _) = monitor::state(shell, dom).context("Unable to get domain status")?;
    if state == State::SHUT_OFF {
        return Err(Failure::new("The domain is not running"));
    }
    if !io::stdin().is_terminal() {
        return Err(Failure::new(
            "Cannot run interactive console without a controlling TTY",
        ));
    }
    let escape = shell.escape.clone();
    shell
        .out
        .print_extra(format!("Connected to domain '{}'\n", dom.name));
    shell
        .out
        .print_extra(format!("Escape character is {}\n", escape.describe()));
    shell.out.flush();
    let connection = shell.connection()?;
    connection.check_access(procs::DOMAIN_OPEN_CONSOLE.number())?;
    let args = DomainOpenConsoleArgs {
        dom: dom.clone(),
        dev_name: device,
        flags,
    };
    connection.run(async |client: Client| connect(&client, args, escape.byte()).await)
}

async fn connect(client: &Client, args: DomainOpenConsoleArgs, escape: u8) -> Result {
    let ((), Stream { mut reader, writer }) = client
        .call_stream(procs::DOMAIN_OPEN_CONSOLE, &args)
        .await
        .map_err(connection::failure)?;
    let no_raw = |error: io::Error| {
        Failure::new(format!(
            "unable to make terminal raw: {}",
            os_message(&error)
        ))
    };
    let input = Keyboard::new().map_err(no_raw)?;
    let terminal = RawTerminal::new().map_err(no_raw)?;
    // Both ways at once: a guest that takes no input must still be read, and the other way round.
    let outcome = tokio::select! {
        outcome = show(&mut reader) => outcome,
        outcome = send(&input, &writer, escape) => outcome,
    };
    drop(terminal);
    let finished = match &outcome {
        Ok(_) => writer.finish().await,
        Err(_) => Ok(()),
    };
    match (outcome, finished) {
        (Err(failure), _) => Err(failure),
        // The guest's side had ended; that the daemon confirms this by an error changes nothing.
        (Ok(Ended::ByGuest), _) => Ok(()),
        (Ok(Ended::ByUser), finished) => finished.map_err(stream_failure),
    }
}

/// Who ended a console.
enum Ended {
    ByGuest,
    ByUser,
}

fn stream_failure(error: StreamError) -> Failure {
    connection::failure(ClientError::Stream(error))
}

/// Prints what comes from the guest until nothing comes any more.
async fn show(reader: &mut StreamReader) -> Result<Ended> {
    let mut screen = io::stdout();
    loop {
        match reader.next().await.map_err(stream_failure)? {
            Some(StreamEvent::Data(data)) => {
                screen
                    .write_all(&data)
                    .and_then(|()| screen.flush())
                    .map_err(|error| {
                        Failure::new(format!(
                            "cannot write to the terminal: {}",
                            os_message(&error)
                        ))
                    })?;
            }
            Some(StreamEvent::EndOfData | StreamEvent::Finish | StreamEvent::Hole(_)) | None => {
                return Ok(Ended::ByGuest);
            }
        }
    }
}

/// Sends what is typed until the escape key is pressed or the terminal is gone.
async fn send(keyboard: &Keyboard, writer: &StreamWriter, escape: u8) -> Result<Ended> {
    let mut buffer = [0; 4096];
    loop {
        let count = keyboard.read(&mut buffer).await.map_err(|error| {
            Failure::new(format!("cannot read the terminal: {}", os_message(&error)))
        })?;
        let typed = &buffer[..count];
        let end = typed.iter().position(|byte| *byte == escape);
        let wanted = &typed[..end.unwrap_or(count)];
        if !wanted.is_empty() && writer.write(wanted).await.is_err() {
            // The stream is over: the reading side shows what is still on its way, and knows the reason.
            return std::future::pending().await;
        }
        if end.is_some() || count == 0 {
            return Ok(Ended::ByUser);
        }
    }
}

/// Standard input, waited for rather than read ahead: what is typed after a console ends is the shell's.
#[derive(Debug)]
struct Keyboard {
    input: AsyncFd<File>,
}

impl Keyboard {
    fn new() -> io::Result<Self> {
        // A copy of the descriptor, because it is closed with this value. It stays in blocking mode: whether it
        // blocks is shared with other programs on the terminal.
        let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        // SAFETY: the descriptor is owned by the value and stays the same and open as long as it lives.
        let input = unsafe { AsyncFd::register_with_interest(input, Interest::READABLE)? };
        Ok(Self { input })
    }

    async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.input.readable().await?;
            // The event may be stale, and reading would then block.
            if !has_input(self.input.get_ref())? {
                ready.clear_ready();
                continue;
            }
            match self.input.get_ref().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

/// Whether a read would return at once.
fn has_input(file: &File) -> io::Result<bool> {
    use std::os::fd::AsRawFd;
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: the pointer is to one live element, as the count says; the timeout is zero.
    match unsafe { libc::poll(&mut poll, 1, 0) } {
        0 => Ok(false),
        1.. => Ok(true),
        _ => {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                Ok(false)
            } else {
                Err(error)
            }
        }
    }
}
