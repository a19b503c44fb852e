//! Texts that are changed in the user's editor.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Command;

use crate::commands::os_message;
use crate::failure::{Failure, Result};
use crate::shell::Shell;

/// A text in a temporary file, which is removed with this value.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
}

impl Draft {
    /// A file with this text that only the user can read.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn new(text: &str) -> Result<Self> {
        let folder = std::env::temp_dir();
        for attempt in 0..100 {
            let path = folder.join(format!("vireo{}-{attempt}.xml", std::process::id()));
            // create_new follows no link that somebody put there.
            match OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
            {
                Ok(mut file) => {
                    let draft = Self { path };
                    file.write_all(text.as_bytes())
                        .map_err(|error| draft.failure("write", &error))?;
                    return Ok(draft);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    let (path, why) = (path.display(), os_message(&error));
                    return Err(Failure::new(format!(
                        "failed to create temporary file {path}: {why}"
                    )));
                }
            }
        }
        Err(Failure::new(format!(
            "failed to create a temporary file in {}: too many are there",
            folder.display()
        )))
    }

    fn failure(&self, what: &str, error: &io::Error) -> Failure {
        let why = os_message(error);
        Failure::new(format!(
            "{what}: {}: failed to {what} temporary file: {why}",
            self.path.display()
        ))
    }

    /// Opens the file in `$VISUAL`, `$EDITOR`, or Debian's choice, and waits for the editor to end.
    ///
    /// # Errors
    ///
    /// The editor cannot be started, or fails.
    pub fn edit(&mut self) -> Result {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let editor = variable("VISUAL")
            .or_else(|| variable("EDITOR"))
            .unwrap_or_else(|| "sensible-editor".into());
        // The variable may hold arguments and what only a shell understands; the path goes in as a parameter.
        let status = Command::new("/bin/sh")
            .arg("-c")
            .arg(format!("{editor} \"$1\""))
            .arg("sh")
            .arg(&self.path)
            .status()
            .map_err(|error| {
                Failure::new(format!(
                    "cannot run the editor '{editor}': {}",
                    os_message(&error)
                ))
            })?;
        if status.success() {
            return Ok(());
        }
        let how = match status.code() {
            Some(code) => format!("exit status {code}"),
            None => status.to_string(),
        };
        Err(Failure::new(format!(
            "internal error: Child process ({editor} {}) unexpected {how}",
            self.path.display()
        )))
    }

    /// The text that is in the file now.
    ///
    /// # Errors
    ///
    /// It cannot be read, or is not text.
    pub fn read(&self) -> Result<String> {
        let mut text = String::new();
        File::open(&self.path)
            .and_then(|mut file| file.read_to_string(&mut text))
            .map_err(|error| self.failure("read", &error))?;
        Ok(text)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // The editor may have removed it already, and nothing better could be done about any other failure.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What to do after a text was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Open the editor again.
    Again,
    /// Try the same text again, without validation.
    WithoutValidation,
    /// Throw the changes away.
    GiveUp,
}

/// Shows why a text was refused, and asks what to do; without a terminal to ask on, gives up.
///
/// # Errors
///
/// Standard input cannot be read.
pub fn ask_retry(shell: &mut Shell, failure: &Failure, validated: bool) -> Result<Answer> {
    for line in &failure.lines {
        shell.out.error(line);
    }
    if !io::stdin().is_terminal() {
        return Ok(Answer::GiveUp);
    }
    let choices = if validated { "[y,n,i,?]" } else { "[y,n,?]" };
    loop {
        shell.out.print(format!("Failed. Try again? {choices}: "));
        shell.out.flush();
        let mut line = String::new();
        let read = io::stdin().lock().read_line(&mut line);
        if read.map_err(|error| Failure::new(format!("cannot read standard input: {error}")))? == 0
        {
            return Ok(Answer::GiveUp);
        }
        match line.trim() {
            "y" => return Ok(Answer::Again),
            "n" => return Ok(Answer::GiveUp),
            "i" if validated => return Ok(Answer::WithoutValidation),
            _ => {
                let ignore = if validated {
                    "i - skip the validation from now on\n"
                } else {
                    ""
                };
                shell.out.print(format!(
                    "y - yes, start the editor again\nn - no, drop my changes\n{ignore}"
                ));
            }
        }
    }
}

/// Lets the user change the document of what `title` names (`Network default`) until it is taken, or given up.
///
/// # Errors
///
/// The document can't be had, the editor fails, or the user gives up.
pub fn edit_document(
    shell: &mut Shell,
    title: &str,
    mut validate: Option<bool>,
    current: impl Fn(&mut Shell) -> Result<String>,
    store: impl Fn(&mut Shell, String, bool) -> Result<()>,
) -> Result {
    let original = current(shell)?;
    let mut draft = Draft::new(&original)?;
    loop {
        draft.edit()?;
        let text = draft.read()?;
        if text == original {
            shell
                .out
                .print_extra(format!("{title} XML configuration not changed.\n"));
            return Ok(());
        }
        let stored = if current(shell)? == original {
            store(shell, text, validate == Some(true))
        } else {
            Err(Failure::new(
                "ERROR: the XML configuration was changed by another user",
            ))
        };
        let Err(failure) = stored else {
            shell
                .out
                .print_extra(format!("{title} XML configuration edited.\n"));
            return Ok(());
        };
        match ask_retry(shell, &failure, validate == Some(true))? {
            Answer::Again => {}
            Answer::WithoutValidation => validate = Some(false),
            Answer::GiveUp => return Err(Failure::silent()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draft_is_private_and_goes_away() {
        use std::os::unix::fs::PermissionsExt;
        let draft = Draft::new("text").unwrap();
        let path = draft.path.clone();
        assert_eq!(draft.read().unwrap(), "text");
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        drop(draft);
        assert!(!path.exists());
    }
}
