//! `measure`: how large an image would become.

use images::chain::Format;
use images::measure::{self, Measure};
use images::tree::Opener;

use super::args::{Args, Spec, size, value};
use super::convert::snapshot_name;
use super::json::Value;
use super::open::{self, FORMAT, HELP, IMAGE_OPTS, Named, OBJECT, OUTPUT, SHARE, Secrets};
use super::options::{Given, format};
use super::{Done, Failure, say};

pub const SPECS: &[Spec] = &[
    HELP,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    SHARE,
    OUTPUT,
    value('O', &["target-format"]),
    value('o', &["options"]),
    value('s', &["size"]),
    value('l', &["snapshot"]),
];

pub fn run(args: Args) -> Done {
    let json = open::json(&args)?;
    let wanted = format(args.text("target-format").as_deref(), "")?;
    let secrets = Secrets::of(&args)?;
    let mut given = Given::new(wanted);
    for list in args.all("options") {
        given.add(&list.to_string_lossy(), "")?;
    }
    let neither = || Failure::new("Either --size N or one filename must be specified.");
    let layer = match (&args.free[..], args.text("size")) {
        ([], Some(_)) => None,
        ([_], Some(_)) => {
            return Err(Failure::new(
                "--size N cannot be used together with a filename.",
            ));
        }
        ([name], None) => {
            let named = Named::new(name, args.text("format").as_deref(), args.has("image-opts"))?;
            let snapshot = args
                .text("snapshot")
                .map(|text| snapshot_name(&text))
                .transpose()?;
            let opener = Opener {
                share: args.has("force-share"),
                metadata_only: true,
                snapshot: snapshot.as_deref(),
                ..Opener::default()
            };
            Some(open::first(named.open(&opener, &secrets)?)?)
        }
        _ => return Err(neither()),
    };
    let bytes = match (&layer, args.text("size")) {
        (Some(layer), _) => layer.image.size(),
        (None, Some(text)) => size(&text)
            .filter(|bytes| *bytes <= i64::MAX as u64)
            .ok_or_else(|| Failure::new(format!("Invalid image size specified: '{text}'.")))?,
        (None, None) => return Err(neither()),
    };
    let mut bitmaps = None;
    let found: Measure = match wanted {
        Format::Raw => measure::raw(bytes),
        Format::Luks => measure::encrypted(bytes, &given.luks().map_err(Failure::new)?)?,
        Format::Qcow2 => {
            let create = given.qcow2(bytes, None).map_err(Failure::new)?;
            if let Some(source) = layer.as_ref().and_then(|layer| layer.qcow2.as_ref()) {
                let header = source.header();
                if header.version >= 3 {
                    bitmaps = Some(measure::bitmaps(
                        &source.bitmaps()?,
                        bytes,
                        create.cluster_size,
                    ));
                }
            }
            measure::qcow2(&create, layer.as_ref().map(|layer| &*layer.image))?
        }
    };
    if json {
        let mut fields = vec![
            ("required", found.required.into()),
            ("fully-allocated", found.fully_allocated.into()),
        ];
        if let Some(bytes) = bitmaps {
            fields.push(("bitmaps", bytes.into()));
        }
        say(&Value::Object(fields).print());
    } else {
        say(&format!(
            "required size: {}\nfully allocated size: {}\n",
            found.required, found.fully_allocated
        ));
        if let Some(bytes) = bitmaps {
            say(&format!("bitmaps size: {bytes}\n"));
        }
    }
    Ok(0)
}
