use super::*;
use crate::files::testing::TempFolder;

const BOOT: &str = "11111111-1111-1111-1111-111111111111";
const NEXT_BOOT: &str = "22222222-2222-2222-2222-222222222222";

fn text(path: &str, text: &str) -> Change {
    Change {
        path: path.to_owned(),
        to: Content::Text(text.to_owned()),
    }
}

fn make(folder: &Path, change: &Change) {
    if let Content::Text(text) = &change.to {
        fs::write(folder.join(&change.path), text).unwrap();
    }
}

#[test]
fn a_journal_cut_anywhere_gives_back_a_prefix() {
    let folder = TempFolder::new();
    let journal = Journal::open(folder.0.clone(), BOOT).unwrap();
    for number in 0..5 {
        drop(journal.commit(&[text(&number.to_string(), "x")]).unwrap());
    }
    let bytes = fs::read(folder.0.join(".journal/0")).unwrap();
    drop(journal);
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let mut seen = BTreeSet::new();
    for cut in 0..=end {
        let records = read_records(&bytes[..cut]);
        for (number, record) in records.iter().enumerate() {
            assert_eq!(record.changes, [text(&number.to_string(), "x")]);
        }
        seen.insert(records.len());
        // A damaged byte too ends it, and nothing else.
        let mut damaged = bytes[..end].to_vec();
        if let Some(byte) = damaged.get_mut(cut) {
            *byte ^= 0x55;
        }
        let records = read_records(&damaged);
        for (number, record) in records.iter().enumerate() {
            assert_eq!(record.changes, [text(&number.to_string(), "x")]);
        }
    }
    assert_eq!(seen, (0..=5).collect());
}

#[test]
fn what_is_left_of_an_earlier_use_is_not_read() {
    let folder = TempFolder::new();
    let path = folder.0.join(".journal/0");
    let journal = Journal::open(folder.0.clone(), BOOT).unwrap();
    for name in ["a", "b", "c"] {
        drop(journal.commit(&[text(name, "1")]).unwrap());
    }
    drop(journal);
    // Closed: void.
    assert!(read_records(&fs::read(&path).unwrap()).is_empty());
    let journal = Journal::open(folder.0.clone(), BOOT).unwrap();
    drop(journal.commit(&[text("z", "2")]).unwrap());
    let records = read_records(&fs::read(&path).unwrap());
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].changes, [text("z", "2")]);
}

#[test]
fn it_leads_nowhere_else() {
    for path in ["../x", "/x", "", "a/../../x", "."] {
        assert!(!is_below(path), "{path}");
    }
    assert!(is_below("autostart/a.xml"));
}

#[test]
fn segments_take_turns_while_many_write() {
    let folder = TempFolder::new();
    let journal = Journal::open(folder.0.clone(), BOOT).unwrap();
    let padding = "x".repeat(60_000);
    std::thread::scope(|scope| {
        for writer in 0..8 {
            let (journal, padding, folder) = (&journal, &padding, &folder.0);
            scope.spawn(move || {
                for number in 0..30 {
                    let change = text(&format!("{writer}"), &format!("{number}{padding}"));
                    let applying = journal.commit(std::slice::from_ref(&change)).unwrap();
                    make(folder, &change);
                    drop(applying);
                }
            });
        }
    });
    // 14 MiB went through 4.
    for index in 0..2 {
        let path = folder.0.join(format!(".journal/{index}"));
        assert!(fs::metadata(path).unwrap().len() <= FULL + STEP);
    }
    drop(journal);
    for writer in 0..8 {
        let text = fs::read_to_string(folder.0.join(format!("{writer}"))).unwrap();
        assert!(text.starts_with("29x"));
    }
    for index in 0..2 {
        let path = folder.0.join(format!(".journal/{index}"));
        assert!(read_records(&fs::read(path).unwrap()).is_empty());
    }
}

/// Two changes are to be written together when no segment has room: none of them is promised before it is written.
#[test]
fn a_change_that_another_writer_has_taken_along_waits_for_it() {
    let folder = TempFolder::new();
    let journal = Journal::open(folder.0.clone(), BOOT).unwrap();
    let half = "x".repeat(FULL as usize / 2 - 1000);
    let mut applying = Vec::new();
    // What they are for is not done yet: both segments stay as full as they are.
    for number in 0..4 {
        let change = text(&format!("full{number}"), &half);
        applying.push(journal.commit(std::slice::from_ref(&change)).unwrap());
    }
    assert!(journal.shared.segments().all.iter().all(|s| s.used > 0));
    std::thread::scope(|scope| {
        let held = journal.shared.segments();
        for name in ["one", "two"] {
            let (journal, folder) = (&journal, &folder.0);
            scope.spawn(move || {
                let change = text(name, &"y".repeat(10_000));
                let applying = journal.commit(std::slice::from_ref(&change)).unwrap();
                let written = (0..2).any(|index| {
                    let path = folder.join(format!(".journal/{index}"));
                    let records = read_records(&fs::read(path).unwrap());
                    records.iter().any(|record| record.changes[0] == change)
                });
                assert!(written, "{name} is promised, and not in the journal");
                drop(applying);
            });
        }
        while lock(&journal.shared.queue).waiting.len() < 2 {
            std::thread::yield_now();
        }
        drop(held);
        while !lock(&journal.shared.queue).waiting.is_empty() {
            std::thread::yield_now();
        }
        drop(applying);
    });
    let segments = journal.shared.segments();
    assert!(
        segments
            .all
            .iter()
            .all(|segment| segment.unapplied.0.load(Ordering::Acquire) == 0)
    );
    assert!(lock(&journal.shared.queue).done.is_empty());
}

#[test]
fn files_that_are_not_written_yet_keep_the_journal() {
    let folder = TempFolder::new();
    let journal = Journal::open(folder.0.clone(), BOOT).unwrap();
    let change = text("a", "1");
    let applying = journal.commit(std::slice::from_ref(&change)).unwrap();
    drop(journal);
    let records = read_records(&fs::read(folder.0.join(".journal/0")).unwrap());
    assert_eq!(records.len(), 1);
    drop(applying);
    let journal = Journal::open(folder.0.clone(), NEXT_BOOT).unwrap();
    assert_eq!(fs::read_to_string(folder.0.join("a")).unwrap(), "1");
    drop(journal);
    assert!(read_records(&fs::read(folder.0.join(".journal/0")).unwrap()).is_empty());
}
