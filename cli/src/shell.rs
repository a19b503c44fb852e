//! Running commands: from the command line, from standard input, or typed at a prompt.

use std::cell::RefCell;
use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Instant;

use rpc::xdr::{Decode, Encode};

use crate::commands::GROUPS;
use crate::completion::Completion;
use crate::connection::{Connection, Keepalive, Manner};
use crate::failure::{Failure, Result};
use crate::options::{Escape, Options};
use crate::output::Output;
use crate::parser::{self, Parsed};
use crate::uri::{Surroundings, Target};
use rpc::procs::Procedure;

/// The state that commands share.
#[derive(Debug)]
pub struct Shell {
    /// Where commands print.
    pub out: Output,
    /// The key that leaves a console.
    pub escape: Escape,
    /// Commands are typed at a prompt, or come from standard input.
    pub interactive: bool,
    /// Only looking is allowed.
    pub readonly: bool,
    timing: bool,
    uri: Option<String>,
    keepalive: Keepalive,
    surroundings: Surroundings,
    connection: Option<Connection>,
    /// The one before was lost.
    lost: bool,
    leaving: bool,
    /// A daemon of ours that doesn't run is started.
    starts: bool,
}

impl Shell {
    /// A shell with these options, not connected yet.
    pub fn new(options: &Options) -> Self {
        let mut out = Output::new(options.quiet);
        if let Some(path) = &options.log
            && let Err(error) = out.log_to(path)
        {
            out.error(&format!(
                "failed to open the log file {}: {error}",
                path.display()
            ));
        }
        for warning in &options.warnings {
            out.error(warning);
        }
        Self {
            out,
            escape: options.escape.clone(),
            interactive: false,
            readonly: options.readonly,
            timing: options.timing,
            uri: options.uri.clone(),
            keepalive: Keepalive::new(options.keepalive_interval, options.keepalive_count),
            surroundings: Surroundings::of_process(options.root.clone()),
            connection: None,
            lost: false,
            leaving: false,
            starts: true,
        }
    }

    /// Connects to a daemon, or again to the one of before (`None`).
    ///
    /// # Errors
    ///
    /// There is no way to it, or it refuses.
    pub fn connect(&mut self, uri: Option<&str>, readonly: bool) -> Result {
        let wanted = uri.map(str::to_owned).or_else(|| self.uri.clone());
        let target = self
            .surroundings
            .resolve(wanted.as_deref(), readonly)
            .map_err(|failure| failure.context("failed to connect to the hypervisor"))?;
        let manner = Manner {
            readonly,
            keepalive: self.keepalive,
            background: self.interactive,
            starts: self.starts,
        };
        let connection = Connection::open(target, manner)
            .map_err(|failure| failure.context("failed to connect to the hypervisor"))?;
        self.connection = Some(connection);
        self.lost = false;
        self.uri = wanted;
        self.readonly = readonly;
        Ok(())
    }

    /// Where a URI leads.
    ///
    /// # Errors
    ///
    /// It makes no sense, or asks for something that is not there.
    pub fn resolve(&self, uri: &str, readonly: bool) -> Result<Target> {
        self.surroundings.resolve(Some(uri), readonly)
    }

    /// Another connection, beside the shell's own.
    ///
    /// # Errors
    ///
    /// There is no way to it, or it refuses.
    pub fn other(&self, uri: &str) -> Result<Connection> {
        let failed = |failure: Failure| failure.context("failed to connect to the hypervisor");
        let target = self
            .surroundings
            .resolve(Some(uri), false)
            .map_err(failed)?;
        let manner = Manner {
            readonly: false,
            keepalive: self.keepalive,
            // Nobody else serves it while the other one is waited for.
            background: true,
            starts: self.starts,
        };
        Connection::open(target, manner).map_err(failed)
    }

    /// The connection, made now if there is none.
    ///
    /// # Errors
    ///
    /// There is no way to the daemon, or it refuses.
    pub fn connection(&mut self) -> Result<&mut Connection> {
        // A daemon that went away while nobody typed has lost nothing that the next command needs.
        if self.connection.as_ref().is_none_or(Connection::is_closed) {
            self.lost |= self.connection.take().is_some();
            let lost = self.lost && self.interactive;
            self.connect(None, self.readonly).map_err(|mut failure| {
                if let Some(first) = failure.lines.first_mut().filter(|_| lost) {
                    *first = "Failed to reconnect to the hypervisor".into();
                }
                failure
            })?;
            if lost {
                self.out.error("Reconnected to the hypervisor");
            }
        }
        self.connection
            .as_mut()
            .ok_or_else(|| Failure::new("failed to connect to the hypervisor"))
    }

    /// Calls a procedure of the daemon.
    ///
    /// # Errors
    ///
    /// The connection is read-only and the call isn't; the daemon's; or the connection is lost.
    pub fn call<A: Encode, R: Decode>(
        &mut self,
        procedure: Procedure<A, R>,
        args: &A,
    ) -> Result<R> {
        self.connection()?.call(procedure, args)
    }

    /// Ends the shell after this command.
    pub fn leave(&mut self) {
        self.leaving = true;
    }

    /// Goes on with the daemon that these options name, if it runs: it is not started.
    pub fn retarget(&mut self, options: &Options) {
        self.connection = None;
        self.starts = false;
        if options.uri.is_some() {
            self.uri.clone_from(&options.uri);
        }
        if options.root.is_some() {
            self.surroundings = Surroundings::of_process(options.root.clone());
        }
        self.readonly |= options.readonly;
    }

    /// Runs commands one after the other; tells whether the last one succeeded.
    pub fn run(&mut self, commands: Vec<Parsed>) -> bool {
        let mut succeeded = true;
        for Parsed { command, args } in commands {
            let before = Instant::now();
            let connected = if command.connects {
                self.connection().map(|_| ())
            } else {
                Ok(())
            };
            let result = connected.and_then(|()| (command.handler)(self, &args));
            let took = before.elapsed();
            succeeded = result.is_ok();
            if let Err(failure) = result {
                self.report(&failure);
            }
            if self.leaving {
                break;
            }
            if self.timing {
                self.out.print(format!(
                    "\n(Time: {:.3} ms)\n\n",
                    took.as_secs_f64() * 1000.0
                ));
            } else {
                self.out.print_extra("\n");
            }
            self.out.flush();
        }
        succeeded
    }

    fn report(&mut self, failure: &Failure) {
        for line in &failure.lines {
            self.out.error(line);
        }
        if failure.disconnected {
            // The next command connects again.
            self.connection = None;
            self.lost = true;
        }
    }

    /// Runs the command line; the exit status is 0 when it did what was asked.
    pub fn run_words(&mut self, words: &[String]) -> bool {
        // A URI on the command line must work, whatever the command; a default is connected to when needed.
        if self.uri.is_some()
            && let Err(failure) = self.connect(None, self.readonly)
        {
            self.report(&failure);
            return false;
        }
        let parsed = match words {
            [] => return true,
            [line] if line.is_empty() => return false,
            [line] => parser::parse_line(GROUPS, line),
            words => parser::parse_words(GROUPS, words),
        };
        match parsed {
            Ok(commands) => self.run(commands),
            Err(error) => {
                self.out.error(&error);
                false
            }
        }
    }

    fn prompt(&self) -> &'static str {
        if self.readonly {
            "vireo > "
        } else {
            "vireo # "
        }
    }

    fn run_line(&mut self, line: &str) {
        match parser::parse_line(GROUPS, line) {
            Ok(commands) => {
                self.run(commands);
            }
            Err(error) => self.out.error(&error),
        }
        self.out.flush();
    }
}

/// The interactive shell: typed lines with history and completion, or lines of standard input.
pub fn interact(mut shell: Shell) -> bool {
    shell.interactive = true;
    if shell.uri.is_some()
        && let Err(failure) = shell.connect(None, shell.readonly)
    {
        shell.report(&failure);
        return false;
    }
    shell.out.print_extra(
        "Welcome to vireo, the virtualization interactive terminal.\n\n\
         Type:  'help' for help with commands\n       'quit' to quit\n\n",
    );
    shell.out.flush();
    if io::stdin().is_terminal() {
        typed(shell)
    } else {
        piped(shell)
    }
}

/// Lines from a pipe or file, shown after the prompt as if they were typed.
fn piped(mut shell: Shell) -> bool {
    let mut input = io::stdin().lock();
    let mut line = Vec::new();
    while !shell.leaving {
        shell.out.print(shell.prompt());
        shell.out.flush();
        line.clear();
        match input.read_until(b'\n', &mut line) {
            Ok(0) => break,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                let text = text.strip_suffix('\n').unwrap_or(&text);
                shell.out.print(format!("{text}\n"));
                shell.run_line(text);
            }
            Err(error) => {
                shell
                    .out
                    .error(&format!("cannot read standard input: {error}"));
                return false;
            }
        }
    }
    if !shell.leaving {
        shell.out.print("\n");
    }
    true
}

/// How many lines of history are kept.
const HISTORY_LINES: usize = 500;

fn typed(shell: Shell) -> bool {
    let shell = Rc::new(RefCell::new(shell));
    let config = rustyline::Config::builder()
        .completion_type(rustyline::CompletionType::List)
        .auto_add_history(false)
        .max_history_size(HISTORY_LINES)
        .map(rustyline::config::Builder::build);
    let editor = config.and_then(|config| {
        rustyline::Editor::<Completion, rustyline::history::FileHistory>::with_config(config)
    });
    let mut editor = match editor {
        Ok(editor) => editor,
        Err(error) => {
            shell
                .borrow_mut()
                .out
                .error(&format!("cannot use the terminal: {error}"));
            return false;
        }
    };
    editor.set_helper(Some(Completion::new(Rc::clone(&shell))));
    let history = history_file();
    if let Some(path) = &history
        && path.exists()
        && let Err(error) = editor.load_history(path)
    {
        shell
            .borrow_mut()
            .out
            .error(&format!("cannot read {}: {error}", path.display()));
    }
    loop {
        let prompt = shell.borrow().prompt();
        match editor.readline(prompt) {
            Ok(line) => {
                if !line.is_empty() {
                    // Not adding a line that equals the one before is no failure.
                    let _ = editor.add_history_entry(&line);
                }
                shell.borrow_mut().run_line(&line);
                if shell.borrow().leaving {
                    break;
                }
            }
            // Ctrl-C drops the line.
            Err(rustyline::error::ReadlineError::Interrupted) => {}
            Err(rustyline::error::ReadlineError::Eof) => {
                shell.borrow_mut().out.print("\n");
                break;
            }
            Err(error) => {
                shell
                    .borrow_mut()
                    .out
                    .error(&format!("cannot read the terminal: {error}"));
                break;
            }
        }
    }
    if let Some(path) = &history {
        let saved = match path.parent() {
            Some(folder) => std::fs::create_dir_all(folder).map_err(Into::into),
            None => Ok(()),
        };
        if let Err(error) = saved.and_then(|()| editor.save_history(path)) {
            shell
                .borrow_mut()
                .out
                .error(&format!("Failed to create '{}': {error}", path.display()));
        }
    }
    true
}

/// Where the history is kept between runs.
fn history_file() -> Option<PathBuf> {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?;
    Some(cache.join("vireo/history"))
}
