//! `change-media`: what is in a drive.

use super::*;

/// `change-media`
pub const CHANGE_MEDIA: Command = Command {
    name: "change-media",
    summary: "Change media of CD or floppy drive",
    description: "Changes what is in a drive.",
    options: &[
        DOMAIN,
        data("path", "the drive, or what is in it").values(Values::Disks),
        text("source", "what goes in"),
        flag("eject", "take out what is in"),
        flag("insert", "put something into an empty drive"),
        flag("update", "put something else in"),
        CURRENT,
        LIVE,
        CONFIG,
        flag("force", "even if the guest is in the way"),
        PRINT,
        flag("block", "the source is a block device"),
    ],
    handler: change_media,
    connects: true,
};

/// A disk's document without parts that were before its source or target: their lines are left, as virsh leaves them.
fn with_gaps(xml: &str, gone: usize) -> String {
    const INDENT: &str = "      ";
    let mut text = String::new();
    let mut left = gone;
    for line in xml.lines() {
        let here = line.trim_start();
        if here.starts_with("<source") || here.starts_with("<target") {
            text.push_str(&format!("{INDENT}\n").repeat(std::mem::take(&mut left)));
        }
        text.push_str(line);
        text.push('\n');
    }
    text.truncate(text.trim_end_matches('\n').len());
    text
}

fn change_media(shell: &mut Shell, args: &Args) -> Result {
    /// VIR_DOMAIN_DEVICE_MODIFY_FORCE
    const FORCE: u32 = 4;
    for (first, second) in [
        ("eject", "insert"),
        ("eject", "update"),
        ("insert", "update"),
        ("eject", "block"),
        ("current", "live"),
        ("current", "config"),
    ] {
        args.exclusive(first, second)?;
    }
    let source = args.text("source")?.map(str::to_owned);
    let path = args.required("path")?.to_owned();
    let stated = ["eject", "insert", "update"]
        .into_iter()
        .find(|name| args.has(name));
    let what = stated.unwrap_or("update");
    let dom = find_domain(shell, args, ANY)?;
    let mut disk = find_disk(shell, args, &dom, &path)?;
    if !matches!(disk.attr("device"), Some("cdrom" | "floppy")) {
        return Err(Failure::new(format!(
            "No disk found whose source path or target is {path}"
        )));
    }
    if (what == "insert" || stated.is_none()) && source.is_none() {
        return Err(Failure::new("New disk media source was not specified"));
    }
    let source = source.filter(|_| what != "eject");
    let before = disk.take_children("source");
    // What is left of one that was taken out has no place.
    let is_place = |source: &Element| SOURCES.iter().any(|at| source.attr(at).is_some());
    if source.is_none() && before.is_empty() {
        return Err(Failure::new(format!(
            "The disk device '{path}' doesn't have media"
        )));
    }
    if what == "insert" && before.iter().any(is_place) {
        return Err(Failure::new(format!(
            "The disk device '{path}' already has media"
        )));
    }
    let gone = before.len() + disk.take_children("backingStore").len();
    if let Some(source) = &source {
        let block = args.has("block");
        disk.set_attr("type", if block { "block" } else { "file" });
        let attribute = if block { "dev" } else { "file" };
        let mut from = Element::new("source").with_attr(attribute, source);
        let policy = before.first().and_then(|e| e.attr("startupPolicy"));
        from.set_opt_attr("startupPolicy", policy.map(str::to_owned));
        let mut parts = disk.take_elements();
        let at = parts.iter().position(|part| part.name == "target");
        parts.insert(at.unwrap_or(parts.len()), from);
        parts.into_iter().for_each(|part| disk.push(part));
    }
    let xml = with_gaps(&cut_out(&disk), gone);
    if args.has("print-xml") {
        shell.out.print(xml);
        return Ok(());
    }
    let mut flags = super::super::affected(args)?;
    if args.has("force") {
        flags |= FORCE;
    }
    let (doing, done) = match what {
        "eject" => ("eject", "Successfully ejected media."),
        "insert" => ("insert", "Successfully inserted media."),
        _ => ("update", "Successfully updated media."),
    };
    let asked = DomainUpdateDeviceFlagsArgs { dom, xml, flags };
    shell
        .call(procs::DOMAIN_UPDATE_DEVICE_FLAGS, &asked)
        .with_context(|| format!("Failed to complete action {doing} on media"))?;
    shell.out.print(done);
    Ok(())
}
