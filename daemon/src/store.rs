//! Persistent objects as files: `NAME.xml`, and links in `autostart/` beside them.
//!
//! What was acknowledged is on the disk. Damaged files are reported and left alone.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::files::{self, Durability};
use crate::journal::{Change, Content, Journal};
use crate::killpoint::killpoint;

/// So many files are read without another thread's help.
const ALONE: usize = 256;

/// A folder of definitions.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    autostart: PathBuf,
    journal: Journal,
}

/// A definition's text, as it is in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Text<'t> {
    /// The document, without what the store writes above it.
    pub xml: &'t str,
    /// It is to the byte what this store has written: nobody has changed it since.
    pub unchanged: bool,
}

/// What the store must know about a definition in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The name inside the document.
    pub name: String,
    /// The uuid inside the document.
    pub uuid: uuid::Uuid,
}

/// A definition that was loaded.
#[derive(Debug)]
pub struct Loaded<T> {
    /// The parsed document.
    pub object: T,
    /// It is started with the host.
    pub autostart: bool,
}

impl Store {
    /// Opens the store in `folder`, makes what is missing and removes unfinished writes. `boot` is this boot of the host.
    ///
    /// # Errors
    /// The system's.
    pub fn open(folder: PathBuf, boot: &str) -> io::Result<Self> {
        let autostart = folder.join("autostart");
        files::make_folder(&folder, 0o700)?;
        files::make_folder(&autostart, 0o700)?;
        files::remove_leftovers(&folder)?;
        files::remove_leftovers(&autostart)?;
        Ok(Self {
            journal: Journal::open(folder.clone(), boot)?,
            folder,
            autostart,
        })
    }

    /// Makes changes durable, and then makes them.
    fn change(&self, changes: &[Change], make: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let applying = self.journal.commit(changes)?;
        killpoint("store.promised");
        let made = make();
        if made.is_err()
            && let Err(error) = self.journal.take_back(changes)
        {
            log::error!(
                "{}: a change that failed may be made after a crash of the host: {error}",
                self.folder.display()
            );
        }
        drop(applying);
        made
    }

    fn file_change(name: &str, to: Content) -> Change {
        let path = format!("{name}.xml");
        Change { path, to }
    }

    fn link_change(name: &str, on: bool) -> Change {
        Change {
            path: format!("autostart/{name}.xml"),
            to: if on { Content::Link } else { Content::Gone },
        }
    }

    /// The file of the object called `name`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.xml"))
    }

    fn link(&self, name: &str) -> PathBuf {
        self.autostart.join(format!("{name}.xml"))
    }

    /// Reads every definition. A file that `parse` refuses, or that says again what another file
    /// says, is reported in the log and left out. A rename that was cut short is finished.
    ///
    /// # Errors
    /// The folders themselves cannot be read.
    pub fn load<T: Send>(
        &self,
        parse: impl Fn(Text<'_>) -> Result<(Identity, T), String> + Sync,
    ) -> io::Result<Vec<Loaded<T>>> {
        self.journal.settle(&[])?;
        let files = names(&self.folder, |kind, path| {
            kind.is_file() || (kind.is_symlink() && path.is_file())
        })?;
        let read = |stems: &[String]| {
            let mut found = Vec::with_capacity(stems.len());
            for stem in stems {
                let path = self.path(stem);
                match fs::read_to_string(&path)
                    .map_err(|e| e.to_string())
                    .and_then(|contents| parse(without_header(&contents)))
                {
                    Ok(parsed) => found.push((stem.clone(), parsed)),
                    Err(why) => log::error!("{}: left out: {why}", path.display()),
                }
            }
            found
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = files.len().div_ceil(threads).max(ALONE);
        let mut found = BTreeMap::new();
        std::thread::scope(|scope| {
            let mut shares = files.chunks(share);
            let own = shares.next().unwrap_or_default();
            let others: Vec<_> = shares.map(|share| scope.spawn(|| read(share))).collect();
            found.extend(read(own));
            for other in others {
                match other.join() {
                    Ok(more) => found.extend(more),
                    // What a panic is here: a definition that breaks the parser. It must not take all others along.
                    Err(_) => log::error!("some definitions could not be read: a fault inside"),
                }
            }
        });
        // Files named as their contents come first: they win over copies and unfinished renames.
        let (named, misnamed): (Vec<_>, Vec<_>) = found
            .into_iter()
            .partition(|(stem, (identity, _))| *stem == identity.name);
        let links = names(&self.autostart, |_, _| true)?;
        let links: HashSet<String> = links.into_iter().collect();
        let mut uuids: HashMap<uuid::Uuid, String> = HashMap::new();
        let mut loaded = Vec::with_capacity(named.len());
        for (stem, (identity, object)) in named.into_iter().chain(misnamed) {
            if let Some(other) = uuids.get(&identity.uuid) {
                log::error!(
                    "{}: left out: {other}.xml has the same uuid",
                    self.path(&stem).display()
                );
                continue;
            }
            if stem != identity.name && !self.finish_rename(&stem, &identity.name) {
                continue;
            }
            let autostart = links.contains(&identity.name);
            uuids.insert(identity.uuid, identity.name);
            loaded.push(Loaded { object, autostart });
        }
        Ok(loaded)
    }

    fn finish_rename(&self, from: &str, to: &str) -> bool {
        let (old, new) = (self.path(from), self.path(to));
        if new.exists() {
            log::error!(
                "{}: left out: it defines '{to}', which {} defines",
                old.display(),
                new.display()
            );
            return false;
        }
        match fs::rename(&old, &new).and_then(|()| files::sync_folder(&self.folder)) {
            Ok(()) => {
                log::info!("{} is now {}", old.display(), new.display());
                true
            }
            Err(error) => {
                log::error!("{}: left out: cannot rename it: {error}", old.display());
                false
            }
        }
    }

    /// Writes the definition of `name`, new or changed. It is durable then; its file is there some moments later.
    ///
    /// # Errors
    /// The system's; the old definition is there then.
    pub fn save(&self, name: &str, xml: &str) -> io::Result<()> {
        self.check_place(name)?;
        let change = Self::file_change(name, Content::Text(with_header(xml)));
        self.journal.promise(change)
    }

    /// Looks at what could keep a file from being written, as long as its writer can be told.
    fn check_place(&self, name: &str) -> io::Result<()> {
        /// In bytes, of one file (ext4, XFS, btrfs, tmpfs).
        const LONGEST_NAME: usize = 255;
        let error = |number| Err(io::Error::from_raw_os_error(number));
        if name.len() + ".xml".len() > LONGEST_NAME {
            return error(libc::ENAMETOOLONG);
        }
        match self.path(name).symlink_metadata() {
            Ok(there) if there.is_dir() => return error(libc::EISDIR),
            Ok(_) => {}
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => {}
            Err(other) => return Err(other),
        }
        let disk = files::file_system(&self.folder)?;
        if disk.f_flag & libc::ST_RDONLY != 0 {
            return error(libc::EROFS);
        }
        // Some file systems do not count inodes.
        if disk.f_bfree == 0 || (disk.f_files != 0 && disk.f_ffree == 0) {
            return error(libc::ENOSPC);
        }
        Ok(())
    }

    fn write(&self, name: &str, contents: &str) -> io::Result<()> {
        files::write_atomically(&self.path(name), contents.as_bytes(), Durability::Process)
    }

    /// Removes the definition of `name` and its autostart link.
    ///
    /// # Errors
    /// The system's.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        let changes = [
            Self::link_change(name, false),
            Self::file_change(name, Content::Gone),
        ];
        self.change(&changes, || {
            self.link_or_not(name, false)?;
            killpoint("store.link-removed");
            files::remove_if_there(&self.path(name))?;
            killpoint("store.removed");
            Ok(())
        })
    }

    /// Gives an object the name `to` and the definition `xml`, which says that name too.
    ///
    /// # Errors
    /// The system's.
    pub fn rename(&self, from: &str, to: &str, xml: &str) -> io::Result<()> {
        let autostart = self.link(from).symlink_metadata().is_ok();
        let contents = with_header(xml);
        let changes = [
            Self::link_change(to, autostart),
            Self::file_change(to, Content::Text(contents.clone())),
            Self::file_change(from, Content::Gone),
            Self::link_change(from, false),
        ];
        self.change(&changes, || {
            if autostart {
                // Dangling until the file has its new name; ignored if that never happens.
                self.link_or_not(to, true)?;
            }
            killpoint("store.rename-linked");
            self.write(from, &contents)?;
            killpoint("store.rename-saved");
            fs::rename(self.path(from), self.path(to))?;
            killpoint("store.renamed");
            self.link_or_not(from, false)
        })
    }

    /// Makes or removes the autostart link of `name`.
    ///
    /// # Errors
    /// The system's.
    pub fn set_autostart(&self, name: &str, on: bool) -> io::Result<()> {
        let change = Self::link_change(name, on);
        self.change(&[change], || self.link_or_not(name, on))
    }

    fn link_or_not(&self, name: &str, on: bool) -> io::Result<()> {
        let link = self.link(name);
        let there = link.symlink_metadata().is_ok();
        match (on, there) {
            (true, false) => symlink(Path::new("..").join(format!("{name}.xml")), &link),
            (false, true) => files::remove_if_there(&link),
            _ => Ok(()),
        }
    }
}

/// What stands above a definition, up to the sum of its bytes, and behind the sum.
const ABOVE: &str = "\
<!-- Written by vireod, which reads it only when it starts.
     Change it with: vireo edit, vireo define
     Checksum, of no meaning after a change by hand: ";
const BELOW: &str = " -->\n\n";

fn with_header(xml: &str) -> String {
    format!("{ABOVE}{:08x}{BELOW}{xml}", crc32c::crc32c(xml.as_bytes()))
}

fn without_header(contents: &str) -> Text<'_> {
    let parts = || {
        let (sum, rest) = contents.strip_prefix(ABOVE)?.split_at_checked(8)?;
        let sum = u32::from_str_radix(sum, 16).ok()?;
        Some((sum, rest.strip_prefix(BELOW)?))
    };
    match parts() {
        Some((sum, xml)) => Text {
            xml,
            unchanged: sum == crc32c::crc32c(xml.as_bytes()),
        },
        None => Text {
            xml: contents,
            unchanged: false,
        },
    }
}

/// The names, without `.xml`, of what there is in a folder.
fn names(folder: &Path, which: impl Fn(fs::FileType, &Path) -> bool) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if Path::new(&name).extension().is_none_or(|e| e != "xml")
            || !which(entry.file_type()?, &entry.path())
        {
            continue;
        }
        match Path::new(&name).file_stem().and_then(|stem| stem.to_str()) {
            Some(stem) => names.push(stem.to_owned()),
            None => log::error!(
                "{}: left out: its name is not UTF-8",
                entry.path().display()
            ),
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::TempFolder;

    /// `NAME UUID-DIGIT TEXT`
    fn parse(text: Text<'_>) -> Result<(Identity, String), String> {
        let body = text.xml.trim();
        let mut words = body.split(' ');
        let (Some(name), Some(digit)) = (words.next(), words.next()) else {
            return Err("damaged".to_owned());
        };
        let digit: u128 = digit.parse().map_err(|_| "damaged uuid".to_owned())?;
        let identity = Identity {
            name: name.to_owned(),
            uuid: uuid::Uuid::from_u128(digit),
        };
        Ok((identity, body.to_owned()))
    }

    fn names(store: &Store) -> Vec<(String, bool)> {
        let loaded = store.load(parse).unwrap();
        loaded
            .into_iter()
            .map(|l| (l.object, l.autostart))
            .collect()
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let folder = TempFolder::new();
        let store = Store::open(folder.0.clone(), "").unwrap();
        store.save("a", "a 1").unwrap();
        store.save("b", "b 2").unwrap();
        store.set_autostart("b", true).unwrap();
        store.save("a", "a 1 more").unwrap();
        assert_eq!(
            names(&store),
            [("a 1 more".to_owned(), false), ("b 2".to_owned(), true)]
        );
        store.remove("b").unwrap();
        assert_eq!(names(&store).len(), 1);
        assert!(!folder.0.join("autostart/b.xml").exists());
    }

    /// What a power cut may leave: any of the files as they were before, or empty, or not at all.
    fn lose(folder: &Path, names: &[&str]) {
        for name in names {
            let _ = fs::remove_file(folder.join(name));
        }
    }

    #[test]
    fn what_was_acknowledged_survives_a_power_cut() {
        const BEFORE: &str = "11111111-1111-1111-1111-111111111111";
        const AFTER: &str = "22222222-2222-2222-2222-222222222222";
        let folder = TempFolder::new();
        let store = Store::open(folder.0.clone(), BEFORE).unwrap();
        store.save("a", "a 1").unwrap();
        store.save("b", "b 2").unwrap();
        store.save("gone", "gone 3").unwrap();
        store.save("old", "old 4").unwrap();
        store.set_autostart("old", true).unwrap();
        store.rename("old", "new", "new 4").unwrap();
        store.save("a", "a 1 changed").unwrap();
        store.remove("gone").unwrap();
        // The journal as it is on the disk when everything was acknowledged, and nothing synced yet.
        let journal = folder.0.join(".journal/0");
        let on_disk = fs::read(&journal).unwrap();
        drop(store);
        fs::write(&journal, &on_disk).unwrap();
        fs::write(folder.0.join("a.xml"), "").unwrap();
        lose(&folder.0, &["b.xml", "new.xml", "autostart/new.xml"]);
        fs::write(folder.0.join("gone.xml"), "gone 3").unwrap();
        fs::write(folder.0.join("old.xml"), "old 4").unwrap();
        let wanted = [
            ("a 1 changed".to_owned(), false),
            ("b 2".to_owned(), false),
            ("new 4".to_owned(), true),
        ];
        let store = Store::open(folder.0.clone(), AFTER).unwrap();
        assert_eq!(names(&store), wanted);
        assert!(!folder.0.join("old.xml").exists());
        drop(store);
        // What was brought back is not brought back again.
        fs::remove_file(folder.0.join("b.xml")).unwrap();
        let store = Store::open(folder.0.clone(), BEFORE).unwrap();
        assert_eq!(names(&store).len(), 2);
    }

    #[test]
    fn a_change_by_hand_after_a_kill_stays() {
        const BOOT: &str = "11111111-1111-1111-1111-111111111111";
        let folder = TempFolder::new();
        let store = Store::open(folder.0.clone(), BOOT).unwrap();
        store.save("a", "a 1").unwrap();
        let journal = folder.0.join(".journal/0");
        let on_disk = fs::read(&journal).unwrap();
        drop(store);
        fs::write(&journal, &on_disk).unwrap();
        fs::write(folder.0.join("a.xml"), "a 1 by hand").unwrap();
        let store = Store::open(folder.0.clone(), BOOT).unwrap();
        assert_eq!(names(&store), [("a 1 by hand".to_owned(), false)]);
    }

    #[test]
    fn a_change_that_fails_is_taken_back() {
        let folder = TempFolder::new();
        let store = Store::open(folder.0.clone(), "").unwrap();
        store.save("a", "a 1").unwrap();
        // A folder is in the place.
        fs::create_dir(folder.0.join("b.xml")).unwrap();
        assert!(store.save("b", "b 2").is_err());
        let on_disk = fs::read(folder.0.join(".journal/0")).unwrap();
        drop(store);
        fs::write(folder.0.join(".journal/0"), &on_disk).unwrap();
        let store = Store::open(folder.0.clone(), "").unwrap();
        assert_eq!(names(&store), [("a 1".to_owned(), false)]);
    }

    #[test]
    fn damaged_files_are_left_out_and_left_alone() {
        let folder = TempFolder::new();
        let store = Store::open(folder.0.clone(), "").unwrap();
        fs::write(folder.0.join("bad.xml"), "x").unwrap();
        fs::write(folder.0.join("notes.txt"), "hello").unwrap();
        fs::write(folder.0.join("utf.xml"), [0xff, 0xfe]).unwrap();
        store.save("a", "a 1").unwrap();
        assert_eq!(names(&store).len(), 1);
        assert!(folder.0.join("bad.xml").exists());
        assert!(folder.0.join("utf.xml").exists());
    }

    #[test]
    fn whoever_reads_hears_whether_somebody_has_changed_a_file() {
        let folder = TempFolder::new();
        let store = Store::open(folder.0.clone(), "").unwrap();
        store.save("a", "a 1").unwrap();
        store.journal.settle(&[]).unwrap();
        let look = |name: &str| {
            let file = fs::read_to_string(folder.0.join(name)).unwrap();
            let text = without_header(&file);
            (text.xml.to_owned(), text.unchanged)
        };
        assert_eq!(look("a.xml"), ("a 1".to_owned(), true));
        let whole = fs::read_to_string(folder.0.join("a.xml")).unwrap();
        for (changed, xml) in [
            (whole.replace("a 1", "a 2"), "a 2"),
            (format!("{whole} "), "a 1 "),
            ("a 1".to_owned(), "a 1"),
            (String::new(), ""),
        ] {
            fs::write(folder.0.join("b.xml"), changed).unwrap();
            assert_eq!(look("b.xml"), (xml.to_owned(), false));
        }
    }

    #[test]
    fn copies_are_left_out() {
        let folder = TempFolder::new();
        let store = Store::open(folder.0.clone(), "").unwrap();
        store.save("b", "b 2").unwrap();
        store.save("a", "b 2").unwrap();
        assert_eq!(names(&store), [("b 2".to_owned(), false)]);
        assert!(folder.0.join("a.xml").exists());
    }

    #[test]
    fn a_rename_cut_short_is_finished() {
        let folder = TempFolder::new();
        let store = Store::open(folder.0.clone(), "").unwrap();
        store.save("old", "old 1").unwrap();
        store.set_autostart("old", true).unwrap();
        // As after a kill at store.rename-saved.
        store.set_autostart("new", true).unwrap();
        store.save("old", "new 1").unwrap();
        assert_eq!(names(&store), [("new 1".to_owned(), true)]);
        assert!(folder.0.join("new.xml").exists());
        assert!(!folder.0.join("old.xml").exists());
    }

    #[test]
    fn renames() {
        let folder = TempFolder::new();
        let store = Store::open(folder.0.clone(), "").unwrap();
        store.save("old", "old 1").unwrap();
        store.set_autostart("old", true).unwrap();
        store.rename("old", "new", "new 1").unwrap();
        assert_eq!(names(&store), [("new 1".to_owned(), true)]);
        assert_eq!(fs::read_dir(folder.0.join("autostart")).unwrap().count(), 1);
    }
}
