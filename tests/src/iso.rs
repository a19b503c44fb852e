//! ISO 9660 images, as small as they can be: a few files in one folder, and an El Torito boot sector.

const SECTOR: usize = 2048;
/// Where the volume's descriptors begin (ECMA-119, 6.2.1).
const DESCRIPTORS: usize = 16;

fn both16(value: u16) -> Vec<u8> {
    [value.to_le_bytes(), value.to_be_bytes()].concat()
}

fn both32(value: u32) -> Vec<u8> {
    [value.to_le_bytes(), value.to_be_bytes()].concat()
}

/// A directory record (ECMA-119, 9.1).
fn record(name: &[u8], at: u32, size: u32, folder: bool) -> Vec<u8> {
    let mut record = vec![0, 0];
    record.extend(both32(at));
    record.extend(both32(size));
    record.extend([126, 1, 1, 0, 0, 0, 0]);
    record.extend([u8::from(folder) * 2, 0, 0]);
    record.extend(both16(1));
    record.push(u8::try_from(name.len()).unwrap());
    record.extend(name);
    if record.len() % 2 == 1 {
        record.push(0);
    }
    record[0] = u8::try_from(record.len()).unwrap();
    record
}

/// An image with that label and those files, which boots from a sector of code that is loaded to 0x7c00.
pub fn image(label: &str, files: &[(&str, &[u8])], boot: Option<&[u8]>) -> Vec<u8> {
    // Descriptors, boot catalog, boot code, path tables, the folder, and the files.
    let (catalog, code, table) = (DESCRIPTORS + 3, DESCRIPTORS + 4, DESCRIPTORS + 5);
    let root = table + 2;
    let mut next = root + 1;
    let place = |at: usize| u32::try_from(at).unwrap();
    let root_size = place(SECTOR);
    let mut folder = record(&[0], place(root), root_size, true);
    folder.extend(record(&[1], place(root), root_size, true));
    let mut contents = Vec::new();
    for (name, content) in files {
        let name = format!("{};1", name.to_ascii_uppercase());
        folder.extend(record(
            name.as_bytes(),
            place(next),
            place(content.len()),
            false,
        ));
        contents.push((next, content));
        next += content.len().div_ceil(SECTOR).max(1);
    }
    let mut image = vec![0; next * SECTOR];
    let mut put =
        |at: usize, bytes: &[u8]| image[at * SECTOR..][..bytes.len()].copy_from_slice(bytes);

    let padded = |text: &str, to: usize| format!("{text:to$}").into_bytes();
    let mut primary = vec![1];
    primary.extend(b"CD001\x01\0");
    primary.extend(padded("", 32));
    primary.extend(padded(label, 32));
    primary.extend([0; 8]);
    primary.extend(both32(place(next)));
    primary.extend([0; 32]);
    for number in [1, 1, 2048] {
        primary.extend(both16(number));
    }
    primary.extend(both32(10));
    primary.extend(place(table).to_le_bytes());
    primary.extend([0; 4]);
    primary.extend(place(table + 1).to_be_bytes());
    primary.extend([0; 4]);
    primary.extend(record(&[0], place(root), root_size, true));
    primary.resize(881, b' ');
    primary.push(1);
    put(DESCRIPTORS, &primary);

    put(DESCRIPTORS + 1, b"\0CD001\x01EL TORITO SPECIFICATION");
    let mut last = DESCRIPTORS + 1;
    if let Some(boot) = boot {
        // El Torito 1.0, 2.0 to 2.2: where the catalog is, its validation entry, the default entry.
        let mut pointer = b"\0CD001\x01EL TORITO SPECIFICATION".to_vec();
        pointer.resize(0x47, 0);
        pointer.extend(place(catalog).to_le_bytes());
        put(DESCRIPTORS + 1, &pointer);
        let mut entries = vec![0u8; 64];
        entries[0] = 1;
        entries[30..32].copy_from_slice(&[0x55, 0xaa]);
        let words = entries[..32]
            .chunks(2)
            .map(|word| u16::from_le_bytes([word[0], word[1]]));
        let sum = words.fold(0u16, u16::wrapping_add);
        entries[28..30].copy_from_slice(&sum.wrapping_neg().to_le_bytes());
        entries[32] = 0x88;
        entries[38] = 4;
        entries[40..44].copy_from_slice(&place(code).to_le_bytes());
        put(catalog, &entries);
        assert!(boot.len() <= SECTOR);
        put(code, boot);
        last += 1;
    }
    put(last, b"\xffCD001\x01");

    let entry = |number: [u8; 4]| [&[1, 0][..], &number, &[0, 0, 0, 0]].concat();
    let mut little = entry(place(root).to_le_bytes());
    little[6] = 1;
    let mut big = entry(place(root).to_be_bytes());
    big[7] = 1;
    put(table, &little);
    put(table + 1, &big);
    put(root, &folder);
    for (at, content) in contents {
        put(at, content);
    }
    image
}

/// A program for 32-bit Linux that opens `path` and calls ioctl with that number; its exit status is the error's number.
pub fn ioctl_program(path: &str, number: u32) -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    let code = |path: u32| {
        // mov eax,5 (open); mov ebx,path; mov ecx,O_NONBLOCK; int 0x80
        let mut code = vec![0xb8, 5, 0, 0, 0, 0xbb];
        code.extend(path.to_le_bytes());
        code.extend([0xb9, 0, 8, 0, 0, 0xcd, 0x80]);
        // mov ebx,eax; mov eax,54 (ioctl); mov ecx,number; xor edx,edx; int 0x80
        code.extend([0x89, 0xc3, 0xb8, 54, 0, 0, 0, 0xb9]);
        code.extend(number.to_le_bytes());
        code.extend([0x31, 0xd2, 0xcd, 0x80]);
        // mov ebx,eax; neg ebx; mov eax,1 (exit); int 0x80
        code.extend([0x89, 0xc3, 0xf7, 0xdb, 0xb8, 1, 0, 0, 0, 0xcd, 0x80]);
        code
    };
    let length = u32::try_from(code(0).len()).unwrap();
    let mut all = code(BASE + HEADERS + length);
    all.extend(path.as_bytes());
    all.push(0);
    let size = HEADERS + u32::try_from(all.len()).unwrap();
    let mut elf = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2, 0, 3, 0]);
    for word in [1, BASE + HEADERS, 52, 0, 0] {
        elf.extend(word.to_le_bytes());
    }
    for half in [52u16, 32, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    for word in [1, 0, BASE, BASE, size, size, 5, 4096] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(all);
    elf
}
