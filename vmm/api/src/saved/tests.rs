//! Images written, read, edited, damaged in every way.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::*;

fn section(id: &str) -> Section {
    Section::new(id, "test", 3, &serde_json::json!({"a": [1, 2, 3]})).unwrap()
}

fn temp() -> File {
    // Nobody else sees it, and it goes by itself.
    let name = c"saved-test";
    // SAFETY: a name and flags; the descriptor is new and nobody else's.
    unsafe {
        use std::os::fd::FromRawFd;
        let fd = memfd(name);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    }
}

unsafe extern "C" {
    #[link_name = "memfd_create"]
    fn memfd_create(name: *const std::ffi::c_char, flags: u32) -> i32;
}

fn memfd(name: &std::ffi::CStr) -> i32 {
    // SAFETY: a valid string and no flags.
    unsafe { memfd_create(name.as_ptr(), 0) }
}

/// 3 MiB and a page of RAM, mostly zero.
fn image() -> File {
    let file = temp();
    let ram = (3 << 20) + PAGE;
    let sections = [section("one"), section("two")];
    let mut plan = Plan::begin(&file, [7; 16], "<domain/>", true, &sections, ram).unwrap();
    let mut page = vec![0; PAGE as usize];
    page[17] = 1;
    let at = plan.ram_offset() + CHUNK + 2 * PAGE;
    file.write_all_at(&page, at).unwrap();
    let mut sum = ChunkSum::default();
    sum.add(2, &page);
    plan.set_sum(1, sum);
    plan.finish(&file).unwrap();
    file
}

fn check(file: &File) -> Result<(), SavedError> {
    let image = Image::open(file)?;
    image.check()?;
    let sums = image.sums()?;
    let mut chunk = vec![0; CHUNK as usize];
    for (index, sum) in sums.iter().enumerate() {
        let at = index as u64 * CHUNK;
        let len = (image.header.ram_bytes - at).min(CHUNK) as usize;
        file.read_exact_at(&mut chunk[..len], image.header.ram_offset + at)?;
        verify_chunk(index, &chunk[..len], *sum)?;
    }
    Ok(())
}

#[test]
fn what_is_written_is_read() {
    let file = image();
    let image = Image::open(&file).unwrap();
    assert_eq!(image.header.id, [7; 16]);
    assert!(image.header.running);
    assert_eq!(image.xml().unwrap(), "<domain/>");
    assert_eq!(image.sections().unwrap(), [section("one"), section("two")]);
    assert_eq!(image.sums().unwrap().len(), 4);
    check(&file).unwrap();
}

#[test]
fn states_may_come_last() {
    let file = temp();
    let mut plan = Plan::reserve(&file, [7; 16], "<domain/>", 3 << 20).unwrap();
    let page = [1; PAGE as usize];
    file.write_all_at(&page, plan.ram_offset()).unwrap();
    let mut sum = ChunkSum::default();
    sum.add(0, &page);
    plan.set_sum(0, sum);
    let huge = Section::new("huge", "test", 3, &"x".repeat(65 << 20)).unwrap();
    let error = plan.set_states(&file, true, &[huge]).unwrap_err();
    assert!(matches!(error, SavedError::TooMuch { .. }), "{error}");
    let sections = [section("one"), section("two")];
    plan.set_states(&file, true, &sections).unwrap();
    plan.finish(&file).unwrap();
    let image = Image::open(&file).unwrap();
    assert!(image.header.running);
    assert_eq!(image.sections().unwrap(), sections);
    check(&file).unwrap();
}

#[test]
fn xml_is_replaced_in_place() {
    let file = image();
    for (round, text) in ["<a/>", "<b>longer than before</b>", ""].iter().enumerate() {
        let mut image = Image::open(&file).unwrap();
        image.set_xml(text, round % 2 == 1).unwrap();
        let image = Image::open(&file).unwrap();
        assert_eq!(image.xml().unwrap(), *text);
        assert_eq!(image.header.running, round % 2 == 1);
        check(&file).unwrap();
    }
    let long = "x".repeat(1 << 20);
    let mut image = Image::open(&file).unwrap();
    assert!(matches!(
        image.set_xml(&long, true),
        Err(SavedError::TooMuch { .. })
    ));
    check(&file).unwrap();
}

#[test]
fn an_image_cut_short_is_refused_with_the_reason() {
    let file = image();
    let len = file.metadata().unwrap().len();
    for (cut, words) in [
        (len - 1, "truncated"),
        (len / 2, "truncated"),
        (PAGE, "truncated"),
        (100, "truncated"),
        (4, "not a saved image"),
        (0, "not a saved image"),
        (len + 1, "truncated"),
    ] {
        let file = image();
        file.set_len(cut).unwrap();
        let error = check(&file).unwrap_err().to_string();
        assert!(error.contains(words), "{cut}: {error}");
    }
}

#[test]
fn foreign_and_unfinished_files_are_told_apart() {
    let file = temp();
    file.set_len(1 << 20).unwrap();
    assert!(matches!(Image::open(&file), Err(SavedError::Unfinished)));
    file.write_all_at(b"LibvirtQemudSave", 0).unwrap();
    assert!(matches!(Image::open(&file), Err(SavedError::Foreign)));
    let file = image();
    file.write_all_at(&9_u32.to_le_bytes(), 8).unwrap();
    assert!(matches!(Image::open(&file), Err(SavedError::Version(9))));
}

/// Every byte that means something is covered by a checksum.
#[test]
fn no_changed_bit_goes_unnoticed() {
    let seed = std::env::var("VIREO_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(std::process::id() as u64);
    println!("VIREO_SEED={seed}");
    let mut random = seed | 1;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let pristine = image();
    let header = Image::open(&pristine).unwrap().header;
    let ranges = [
        (0, header::LEN as u64),
        (header.xml_at(0), u64::from(header.xml_len)),
        (header.state_offset, header.state_len),
        (header.table_offset, header.chunks() * 4),
        (header.ram_offset, header.ram_bytes),
    ];
    for (start, len) in ranges {
        for _ in 0..60 {
            let at = start + next(len);
            let bit = 1 << next(8);
            let mut byte = [0];
            pristine.read_exact_at(&mut byte, at).unwrap();
            pristine.write_all_at(&[byte[0] ^ bit], at).unwrap();
            assert!(check(&pristine).is_err(), "bit {bit:#x} of byte {at}");
            pristine.write_all_at(&byte, at).unwrap();
        }
    }
    check(&pristine).unwrap();
}

/// Headers with right checksums and wrong content: refused, or read within bounds.
#[test]
fn forged_headers_do_no_harm() {
    let pristine = image();
    let mut bytes = [0; header::LEN];
    pristine.read_exact_at(&mut bytes, 0).unwrap();
    for at in (12..120).step_by(4) {
        for value in [0, 1, 7, 0x7fff_ffff, u32::MAX, 1 << 31, 4096] {
            let mut forged = bytes;
            forged[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
            let sum = crc32c::crc32c(&forged[..header::LEN - 4]);
            forged[header::LEN - 4..].copy_from_slice(&sum.to_le_bytes());
            pristine.write_all_at(&forged, 0).unwrap();
            if let Ok(image) = Image::open(&pristine) {
                let _ = image.check();
            }
        }
    }
}

#[test]
fn sections_go_over_a_stream() {
    let mut stream = Vec::new();
    write_section(&mut stream, &section("a")).unwrap();
    write_section(&mut stream, &section("b")).unwrap();
    write_end(&mut stream).unwrap();
    stream.extend(b"what follows");
    let mut rest = &stream[..];
    assert_eq!(read_section(&mut rest).unwrap(), Some(section("a")));
    assert_eq!(read_section(&mut rest).unwrap(), Some(section("b")));
    assert_eq!(read_section(&mut rest).unwrap(), None);
    assert_eq!(rest, b"what follows");
    for cut in 0..stream.len() - 20 {
        let mut rest = &stream[..cut];
        while let Ok(Some(_)) = read_section(&mut rest) {}
        assert!(read_section(&mut &stream[..cut.min(7)]).is_err());
    }
    let huge = [0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0];
    assert!(read_section(&mut &huge[..]).is_err());
}
