//! `info`: what an image says of itself.

use std::os::unix::fs::MetadataExt;

use images::chain::Format;
use images::luks::{Hash, Mode, STRIPES, Vector};
use images::qcow2::{Compression, Snapshot};
use images::tree::{Layer, Opener};
use images::{Image, luks};

use super::args::{Args, Spec, flag, human};
use super::json::Value;
use super::open::{self, FORMAT, HELP, IMAGE_OPTS, OBJECT, OUTPUT, SHARE, Secrets};
use super::{Done, Failure, say};

pub const SPECS: &[Spec] = &[
    HELP,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    SHARE,
    OUTPUT,
    flag('b', &["backing-chain"]),
];

pub fn run(args: Args) -> Done {
    let json = open::json(&args)?;
    let named = open::one_file(&args, "info", "Expecting one image file name")?;
    let secrets = Secrets::of(&args)?;
    let chain = args.has("backing-chain");
    let layers = named.open(
        &Opener {
            share: args.has("force-share"),
            no_backing: !chain,
            metadata_only: true,
            ..Opener::default()
        },
        &secrets,
    )?;
    let mut names = vec![named.name.to_string_lossy().into_owned()];
    names.extend(
        layers
            .iter()
            .skip(1)
            .map(|layer| layer.path.display().to_string()),
    );
    let mut all = Vec::new();
    for (layer, name) in layers.iter().zip(&names) {
        all.push((describe(layer, name)?, layer, name));
    }
    if !json {
        for (n, (value, layer, name)) in all.iter().enumerate() {
            say(if n == 0 { "" } else { "\n" });
            say(&text(value, layer, name)?);
        }
    } else if chain {
        say(&Value::List(all.into_iter().map(|(value, ..)| value).collect()).print());
    } else if let Some((value, ..)) = all.first() {
        say(&value.print());
    }
    Ok(0)
}

struct OnDisk {
    length: u64,
    allocated: u64,
}

fn on_disk(layer: &Layer) -> Result<OnDisk, Failure> {
    let meta = std::fs::metadata(&layer.path).map_err(|error| {
        Failure::new(format!(
            "{}: {}",
            layer.path.display(),
            open::system(&error)
        ))
    })?;
    Ok(OnDisk {
        // A block device's own size is not in its inode.
        length: match (meta.len(), &layer.raw) {
            (0, Some(raw)) => raw.size(),
            (length, _) => length,
        },
        allocated: meta.blocks() * 512,
    })
}

fn describe(layer: &Layer, name: &str) -> Result<Value, Failure> {
    let disk = on_disk(layer)?;
    let file = Value::Object(vec![
        ("children", Value::List(Vec::new())),
        ("virtual-size", disk.length.into()),
        ("filename", name.into()),
        ("format", "file".into()),
        ("actual-size", disk.allocated.into()),
        (
            "format-specific",
            Value::Object(vec![
                ("type", "file".into()),
                ("data", Value::Object(Vec::new())),
            ]),
        ),
        ("dirty-flag", false.into()),
    ]);
    let mut fields = vec![
        (
            "children",
            Value::List(vec![Value::Object(vec![
                ("name", "file".into()),
                ("info", file),
            ])]),
        ),
        ("virtual-size", layer.image.size().into()),
        ("filename", name.into()),
        ("format", layer.format.name().into()),
        ("actual-size", disk.allocated.into()),
    ];
    let mut dirty = false;
    if let Some(qcow2) = &layer.qcow2 {
        let header = qcow2.header();
        dirty = header.is_dirty();
        fields.push(("cluster-size", (1_u64 << header.cluster_bits).into()));
        if let Some(backing) = &header.backing {
            fields.push((
                "backing-filename",
                backing.to_string_lossy().into_owned().into(),
            ));
            if let Some(path) = &layer.backing {
                fields.push(("full-backing-filename", path.display().to_string().into()));
            }
        }
        if let Some(format) = &header.backing_format {
            fields.push(("backing-filename-format", format.clone().into()));
        }
        let snapshots = qcow2.snapshots()?;
        if !snapshots.is_empty() {
            let all = snapshots.iter().map(snapshot).collect();
            fields.push(("snapshots", Value::List(all)));
        }
    }
    if layer.luks.is_some() {
        fields.push(("encrypted", true.into()));
    }
    if let Some(data) = specific(layer)? {
        fields.push((
            "format-specific",
            Value::Object(vec![("type", layer.format.name().into()), ("data", data)]),
        ));
    }
    fields.push(("dirty-flag", dirty.into()));
    Ok(Value::Object(fields))
}

fn snapshot(one: &Snapshot) -> Value {
    let mut fields = vec![
        ("id", one.id.as_str().into()),
        ("name", one.name.as_str().into()),
        ("vm-state-size", one.state_size.into()),
        ("date-sec", one.date.0.into()),
        ("date-nsec", one.date.1.into()),
        ("vm-clock-sec", (one.clock / 1_000_000_000).into()),
        ("vm-clock-nsec", (one.clock % 1_000_000_000).into()),
    ];
    if let Some(count) = one.icount {
        fields.push(("icount", count.into()));
    }
    Value::Object(fields)
}

fn specific(layer: &Layer) -> Result<Option<Value>, Failure> {
    if layer.format == Format::Luks {
        return Ok(layer
            .luks
            .as_ref()
            .map(|header| Value::Object(encryption(header))));
    }
    let Some(qcow2) = &layer.qcow2 else {
        return Ok(None);
    };
    let header = qcow2.header();
    let bits = Value::from(1_u64 << header.refcount_order);
    let compression = match header.compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    };
    let mut fields = vec![
        (
            "compat",
            if header.version < 3 { "0.10" } else { "1.1" }.into(),
        ),
        ("compression-type", compression.into()),
        ("refcount-bits", bits),
    ];
    if header.version >= 3 {
        fields.push(("lazy-refcounts", header.has_lazy_refcounts().into()));
        fields.push(("corrupt", header.is_corrupt().into()));
        fields.push(("extended-l2", header.has_extended_l2().into()));
        if header.has_data_file() {
            if let Some(name) = &header.data_file {
                fields.push(("data-file", name.to_string_lossy().into_owned().into()));
            }
            fields.push(("data-file-raw", header.has_raw_data_file().into()));
        }
        let bitmaps = qcow2.bitmaps()?;
        if !bitmaps.is_empty() {
            let each = bitmaps.into_iter().map(|one| {
                let mut flags: Vec<Value> = Vec::new();
                if one.in_use {
                    flags.push("in-use".into());
                }
                if one.auto {
                    flags.push("auto".into());
                }
                Value::Object(vec![
                    ("flags", Value::List(flags)),
                    ("name", one.name.into()),
                    ("granularity", one.granularity.into()),
                ])
            });
            fields.push(("bitmaps", Value::List(each.collect())));
        }
    }
    if let Some(luks) = &layer.luks {
        let mut encrypt = encryption(luks);
        encrypt.push(("format", "luks".into()));
        fields.push(("encrypt", Value::Object(encrypt)));
    }
    Ok(Some(Value::Object(fields)))
}

fn encryption(header: &luks::Header) -> Vec<(&'static str, Value)> {
    let spec = header.spec;
    let (mode, key) = match spec.mode {
        Mode::Xts => ("xts", spec.key_bytes / 2),
        Mode::Cbc => ("cbc", spec.key_bytes),
    };
    let hash = match spec.hash {
        Hash::Sha1 => "sha1",
        Hash::Sha256 => "sha256",
        Hash::Sha512 => "sha512",
    };
    let uuid = String::from_utf8_lossy(&header.uuid);
    let slots = header.slots.iter().map(|slot| {
        let mut fields = vec![
            ("active", slot.enabled.into()),
            ("key-offset", slot.offset.into()),
        ];
        if slot.enabled {
            fields.push(("iters", slot.rounds.into()));
            fields.push(("stripes", STRIPES.into()));
        }
        Value::Object(fields)
    });
    let mut fields = vec![
        ("cipher-alg", format!("aes-{}", key * 8).into()),
        ("cipher-mode", mode.into()),
        (
            "ivgen-alg",
            match spec.vector {
                Vector::Plain => "plain",
                Vector::Plain64 => "plain64",
                Vector::EssivSha256 => "essiv",
            }
            .into(),
        ),
        ("hash-alg", hash.into()),
        ("detached-header", false.into()),
        ("payload-offset", header.payload.into()),
        ("master-key-iters", header.digest_rounds.into()),
        ("uuid", uuid.trim_end_matches('\0').to_owned().into()),
        ("slots", Value::List(slots.collect())),
    ];
    if spec.vector == Vector::EssivSha256 {
        fields.push(("ivgen-hash-alg", "sha256".into()));
    }
    fields
}

fn text(value: &Value, layer: &Layer, name: &str) -> Result<String, Failure> {
    let disk = on_disk(layer)?;
    let size = layer.image.size();
    let mut out = format!(
        "image: {name}\nfile format: {}\nvirtual size: {} ({size} bytes)\ndisk size: {}\n",
        layer.format.name(),
        human(size),
        human(disk.allocated)
    );
    if layer.luks.is_some() {
        out.push_str("encrypted: yes\n");
    }
    if let Some(qcow2) = &layer.qcow2 {
        let header = qcow2.header();
        out.push_str(&format!("cluster_size: {}\n", 1_u64 << header.cluster_bits));
        if header.is_dirty() {
            out.push_str("cleanly shut down: no\n");
        }
        if let Some(backing) = &header.backing {
            out.push_str(&format!("backing file: {}", backing.to_string_lossy()));
            if let Some(path) = &layer.backing
                && path.as_os_str() != backing.as_os_str()
            {
                out.push_str(&format!(" (actual path: {})", path.display()));
            }
            out.push('\n');
        }
        if let Some(format) = &header.backing_format {
            out.push_str(&format!("backing file format: {format}\n"));
        }
        let snapshots = qcow2.snapshots()?;
        if !snapshots.is_empty() {
            out.push_str(&super::snapshot::list(&snapshots));
        }
    }
    let specific = value
        .members()
        .into_iter()
        .find(|(name, _)| *name == "format-specific")
        .and_then(|(_, value)| {
            value
                .members()
                .into_iter()
                .find(|(name, _)| *name == "data")
        });
    if let Some((_, data)) = specific {
        out.push_str("Format specific information:\n");
        data.describe(1, &mut out);
    }
    out.push_str(&format!(
        "Child node '/file':\n    filename: {name}\n    protocol type: file\n    file length: {} \
         ({} bytes)\n    disk size: {}\n",
        human(disk.length),
        disk.length,
        human(disk.allocated)
    ));
    Ok(out)
}
