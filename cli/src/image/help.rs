//! `--help`.

use super::args::Spec;

/// What there is, in a line each.
const ABOUT: &[(&str, &str)] = &[
    ("amend", "Update format-specific options of the image"),
    ("bench", "Run simple image benchmark"),
    (
        "bitmap",
        "Perform modifications of the persistent bitmap in the image",
    ),
    ("check", "Check basic image integrity"),
    ("commit", "Commit image to its backing file"),
    ("compare", "Check if two images have the same contents"),
    (
        "convert",
        "Copy one image to another with optional format conversion",
    ),
    ("create", "Create and format new image file"),
    ("dd", "Copy input to output with optional format conversion"),
    ("info", "Display information about image"),
    ("map", "Dump image metadata"),
    ("measure", "Calculate file size required for a new image"),
    ("rebase", "Change backing file of the image"),
    ("resize", "Resize the image to the new size"),
    ("snapshot", "List or manipulate snapshots within image"),
];

/// What options mean that do not speak for themselves.
const MEANINGS: &[(&str, &str)] = &[
    ("help", "print this help and exit"),
    ("quiet", "quiet operation"),
    ("progress", "show progress"),
    (
        "format",
        "image format; guessed from the content where it is not given",
    ),
    (
        "image-opts",
        "the names are options: driver=FORMAT,file.filename=NAME,...",
    ),
    (
        "object",
        "secret,id=ID,data=TEXT|file=NAME[,format=raw|base64]",
    ),
    ("force-share", "do not lock: others may be writing"),
    ("output", "human or json"),
    ("options", "options of the format; 'help' lists them"),
    (
        "target-options",
        "options of the new image; 'help' lists them",
    ),
    ("backing", "backing file (\"\" for none)"),
    ("backing-format", "its format"),
    ("backing-unsafe", "do not look at the backing file"),
    ("backing-chain", "all images behind it, too"),
    ("repair", "leaks or all"),
    ("compress", "write compressed clusters"),
    ("no-create", "the target is there already"),
    ("target-is-zero", "and reads as zeroes"),
    (
        "sparse-size",
        "zeroes that are not stored, bytes; 0 stores everything",
    ),
    ("salvage", "what can't be read is zeroes"),
    ("bitmaps", "copy the persistent bitmaps"),
    ("rate", "bytes a second"),
    ("shrink", "allow a smaller size"),
    ("preallocation", "off, metadata, falloc or full"),
    ("strict", "sizes and allocation have to be the same, too"),
    (
        "drop",
        "leave the image as it is when it has been committed",
    ),
    ("base", "the image to commit to (implies --drop)"),
];

/// Of the tool.
pub fn all() -> String {
    let mut out = String::from(
        "vireo image: creates, converts and looks after raw, qcow2 and LUKS disk images, as \
         qemu-img does.\nUsage: vireo image COMMAND [options] (COMMAND --help says more)\n\n",
    );
    for (name, about) in ABOUT {
        out.push_str(&format!("  {name:<10} {about}\n"));
    }
    out
}

/// Of a sub-command.
pub fn of(command: &str, specs: &[Spec]) -> String {
    let about = ABOUT
        .iter()
        .find(|(name, _)| *name == command)
        .map_or("", |(_, about)| about);
    let operands = match command {
        "create" => "FILENAME [SIZE]",
        "convert" => "SOURCE... TARGET",
        "compare" => "FILENAME1 FILENAME2",
        "resize" => "FILENAME [+-]SIZE",
        "bitmap" => "FILENAME BITMAP",
        "dd" => "[bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
        "measure" => "(--size SIZE | FILENAME)",
        _ => "FILENAME",
    };
    let mut out = format!("{about}.\nUsage: vireo image {command} [options] {operands}\n\n");
    for spec in specs {
        let short = if spec.short == '\0' {
            "    ".to_owned()
        } else {
            format!("-{}, ", spec.short)
        };
        let long = format!(
            "--{}{}",
            spec.long[0],
            if spec.value { " VALUE" } else { "" }
        );
        let meaning = MEANINGS
            .iter()
            .find(|(name, _)| *name == spec.long[0])
            .map_or("", |(_, meaning)| meaning);
        out.push_str(format!("  {short}{long:<28} {meaning}").trim_end());
        out.push('\n');
    }
    out
}
