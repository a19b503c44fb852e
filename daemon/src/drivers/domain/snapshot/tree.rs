//! A domain's snapshots as files: `NAME.xml` each, and `current`, which names one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use xml_schemas::snapshot::Snapshot;

use crate::files::{self, Durability};
use crate::killpoint::killpoint;

/// All snapshots of one domain.
#[derive(Debug)]
pub struct Tree {
    folder: PathBuf,
    all: BTreeMap<String, Snapshot>,
    current: Option<String>,
}

impl Tree {
    /// Reads them. A damaged file is reported in the log, left out and left alone.
    ///
    /// # Errors
    /// The folder's; that there is none is fine.
    pub fn load(folder: PathBuf) -> io::Result<Self> {
        let mut all = BTreeMap::new();
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => Some(entries),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        for entry in entries.into_iter().flatten() {
            let path = entry?.path();
            if path.extension().is_none_or(|e| e != "xml") {
                continue;
            }
            match read(&path) {
                Ok((name, snapshot)) => drop(all.insert(name, snapshot)),
                Err(why) => log::error!("{}: left out: {why}", path.display()),
            }
        }
        let current = fs::read_to_string(folder.join("current"))
            .ok()
            .filter(|name| all.contains_key(name));
        Ok(Self {
            folder,
            all,
            current,
        })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// The one of that name.
    pub fn get(&self, name: &str) -> Option<&Snapshot> {
        self.all.get(name)
    }

    /// The one the domain goes on from.
    pub fn current(&self) -> Option<&str> {
        self.current.as_deref()
    }

    /// The one before, as far as it is there.
    pub fn parent(&self, name: &str) -> Option<&str> {
        let parent = self.all.get(name)?.parent.as_deref()?;
        self.all.contains_key(parent).then_some(parent)
    }

    /// Those right after it; of none: those that come after no other.
    pub fn children(&self, of: Option<&str>) -> Vec<&str> {
        let names = self.all.keys().map(String::as_str);
        names.filter(|name| self.parent(name) == of).collect()
    }

    /// Everything after it, parents before children.
    pub fn descendants(&self, of: Option<&str>) -> Vec<&str> {
        let mut seen = BTreeSet::new();
        let mut list = self.children(of);
        let mut at = 0;
        while let Some(&name) = list.get(at) {
            at += 1;
            // A circle made by hand has an end.
            if seen.insert(name) {
                list.extend(self.children(Some(name)));
            }
        }
        list.retain(|name| seen.remove(name));
        list
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.xml"))
    }

    /// Where the memory of a snapshot is whose disks are inside their images.
    pub fn memory(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.memory"))
    }

    fn unfinished_path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.unfinished"))
    }

    /// Notes that one is being made, so that what is left of it can be found if that is cut short.
    ///
    /// # Errors
    /// The system's.
    pub fn begin(&self, name: &str, snapshot: &Snapshot) -> io::Result<()> {
        files::make_folder(&self.folder, 0o700)?;
        let text = snapshot.format(true);
        files::write_atomically(
            &self.unfinished_path(name),
            text.as_bytes(),
            Durability::Disk,
        )
    }

    /// It is made, or undone.
    ///
    /// # Errors
    /// The system's.
    pub fn ended(&self, name: &str) -> io::Result<()> {
        files::remove_if_there(&self.unfinished_path(name))
    }

    /// Those whose making was cut short.
    ///
    /// # Errors
    /// The system's.
    pub fn unfinished(&self) -> io::Result<Vec<Snapshot>> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut all = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "unfinished") {
                match read(&path) {
                    Ok((_, snapshot)) => all.push(snapshot),
                    Err(why) => log::error!("{}: left alone: {why}", path.display()),
                }
            }
        }
        Ok(all)
    }

    /// Removes memories and notes whose descriptions are gone, and the folder.
    ///
    /// # Errors
    /// The system's.
    pub fn clear_away(&self) -> io::Result<()> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let path = entry?.path();
            if path
                .extension()
                .is_some_and(|e| e == "memory" || e == "unfinished")
            {
                files::remove_if_there(&path)?;
            }
        }
        if let Err(error) = fs::remove_dir(&self.folder) {
            log::info!("{} stays: {error}", self.folder.display());
        }
        Ok(())
    }

    /// Adds one, or replaces it.
    ///
    /// # Errors
    /// The system's; nothing has changed then.
    pub fn save(&mut self, name: &str, snapshot: Snapshot) -> io::Result<()> {
        files::make_folder(&self.folder, 0o700)?;
        let text = snapshot.format(true);
        files::write_atomically(&self.path(name), text.as_bytes(), Durability::Disk)?;
        self.all.insert(name.to_owned(), snapshot);
        killpoint("snapshot.saved");
        Ok(())
    }

    /// Says which is the current one.
    ///
    /// # Errors
    /// The system's.
    pub fn set_current(&mut self, name: Option<&str>) -> io::Result<()> {
        let file = self.folder.join("current");
        match name {
            Some(name) => files::write_atomically(&file, name.as_bytes(), Durability::Disk)?,
            None => files::remove_if_there(&file)?,
        }
        self.current = name.map(str::to_owned);
        Ok(())
    }

    /// Forgets one; its children come after its parent from now on, and so does the domain.
    ///
    /// # Errors
    /// The system's.
    pub fn remove(&mut self, name: &str) -> io::Result<()> {
        let parent = self.parent(name).map(str::to_owned);
        let children: Vec<String> = self
            .children(Some(name))
            .into_iter()
            .map(str::to_owned)
            .collect();
        for child in children {
            if let Some(mut snapshot) = self.all.get(&child).cloned() {
                snapshot.parent.clone_from(&parent);
                self.save(&child, snapshot)?;
            }
        }
        if self.current.as_deref() == Some(name) {
            self.set_current(parent.as_deref())?;
        }
        killpoint("snapshot.unlinked");
        files::remove_if_there(&self.path(name))?;
        self.all.remove(name);
        files::sync_folder(&self.folder)?;
        // Not with the memory of a snapshot that may be described again.
        if self.all.is_empty()
            && let Err(error) = fs::remove_dir(&self.folder)
        {
            log::info!("{} stays: {error}", self.folder.display());
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<(String, Snapshot), String> {
    let text = fs::read_to_string(path).map_err(|e| e.to_string())?;
    let snapshot = Snapshot::parse(&text, true).map_err(|e| e.to_string())?;
    let name = snapshot.name.clone().ok_or("it has no name")?;
    if path.file_stem().and_then(|stem| stem.to_str()) != Some(&name) {
        return Err(format!("it describes '{name}'"));
    }
    Ok((name, snapshot))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::TempFolder;

    fn snapshot(name: &str, parent: Option<&str>) -> Snapshot {
        let parent = parent.map_or(String::new(), |p| {
            format!("<parent><name>{p}</name></parent>")
        });
        let text = format!(
            "<domainsnapshot><name>{name}</name><state>shutoff</state>{parent}\
             <creationTime>1</creationTime></domainsnapshot>"
        );
        Snapshot::parse(&text, true).unwrap()
    }

    #[test]
    fn a_tree_is_read_as_it_was_written() {
        let temp = TempFolder::new();
        let folder = temp.0.join("d");
        let mut tree = Tree::load(folder.clone()).unwrap();
        assert_eq!(tree.len(), 0);
        for (name, parent) in [
            ("a", None),
            ("b", Some("a")),
            ("c", Some("b")),
            ("d", Some("a")),
        ] {
            tree.save(name, snapshot(name, parent)).unwrap();
        }
        tree.set_current(Some("c")).unwrap();
        fs::write(folder.join("bad.xml"), "x").unwrap();
        let mut tree = Tree::load(folder.clone()).unwrap();
        assert_eq!(tree.current(), Some("c"));
        assert_eq!(tree.children(None), ["a"]);
        assert_eq!(tree.descendants(Some("a")), ["b", "d", "c"]);
        tree.remove("b").unwrap();
        tree.remove("c").unwrap();
        let tree = Tree::load(folder.clone()).unwrap();
        assert_eq!(tree.descendants(None), ["a", "d"]);
        assert_eq!(tree.current(), Some("a"));
        assert!(folder.join("bad.xml").exists());
    }

    #[test]
    fn a_circle_has_an_end() {
        let temp = TempFolder::new();
        let mut tree = Tree::load(temp.0.join("d")).unwrap();
        tree.save("a", snapshot("a", Some("b"))).unwrap();
        tree.save("b", snapshot("b", Some("a"))).unwrap();
        assert_eq!(tree.descendants(Some("a")).len(), 2);
        assert!(tree.descendants(None).is_empty());
    }
}
