//! `dd`: copies a part of an image into a new one.

use std::sync::Arc;

use images::chain::Format;
use images::convert::{Options, Target, convert};
use images::tree::{Opener, Stable};
use images::{Image, Job};

use super::args::{Args, Spec, size, value};
use super::open::{self, FORMAT, HELP, IMAGE_OPTS, Named, OBJECT, SHARE, Secrets};
use super::options::{Given, format};
use super::{Done, Failure, error};

pub const SPECS: &[Spec] = &[
    HELP,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    SHARE,
    value('O', &["output-format"]),
];

/// A part of an image, to be read.
#[derive(Debug)]
struct Part {
    image: Arc<dyn Image>,
    start: u64,
    size: u64,
}

fn read_only() -> images::Error {
    images::Error::Invalid("a part of an image is only read".into())
}

impl Image for Part {
    fn size(&self) -> u64 {
        self.size
    }
    fn read(&self, offset: u64, bufs: &[images::IoBuf]) -> Result<(), images::Error> {
        self.image.read(self.start + offset, bufs)
    }
    fn write(&self, _: u64, _: &[images::IoBuf]) -> Result<(), images::Error> {
        Err(read_only())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), images::Error> {
        Err(read_only())
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), images::Error> {
        Err(read_only())
    }
    fn flush(&self) -> Result<(), images::Error> {
        Ok(())
    }
    fn extent(&self, offset: u64, len: u64) -> Result<images::Extent, images::Error> {
        let extent = self.image.extent(self.start + offset, len)?;
        Ok(images::Extent {
            start: offset,
            ..extent
        })
    }
    fn info(&self) -> Result<images::ImageInfo, images::Error> {
        self.image.info()
    }
    fn resize(&self, _: u64) -> Result<(), images::Error> {
        Err(read_only())
    }
}

pub fn run(args: Args) -> Done {
    let (mut from, mut to, mut block, mut count, mut skip) = (None, None, 512, None, 0);
    for word in &args.free {
        let word = word.to_string_lossy();
        let Some((name, given)) = word.split_once('=') else {
            return Err(Failure::new(format!("unrecognized operand {word}")));
        };
        let number =
            || size(given).ok_or_else(|| Failure::new(format!("invalid number: '{given}'")));
        match name {
            "if" => from = Some(given.to_owned()),
            "of" => to = Some(given.to_owned()),
            "bs" => {
                block = number()?;
                if !(1..=i32::MAX as u64).contains(&block) {
                    return Err(Failure::new(format!(
                        "Invalid bs specified. Must be between 1 and {}.",
                        i32::MAX
                    )));
                }
            }
            "count" => count = Some(number()?),
            "skip" => skip = number()?,
            _ => return Err(Failure::new(format!("unrecognized operand {name}"))),
        }
    }
    let (Some(from), Some(to)) = (from, to) else {
        return Err(Failure::new("Must specify both input and output files"));
    };
    let wanted = format(args.text("output-format").as_deref(), "")?;
    let secrets = Secrets::of(&args)?;
    let named = Named::new(
        from.as_ref(),
        args.text("format").as_deref(),
        args.has("image-opts"),
    )?;
    let opener = Opener {
        share: args.has("force-share"),
        ..Opener::default()
    };
    let source = open::first(named.open(&opener, &secrets)?)?.image;
    let all = source.size();
    let end = match count {
        // As qemu-img: what is skipped counts.
        Some(count) => count.saturating_mul(block).min(all),
        None => all,
    };
    let start = skip.saturating_mul(block);
    let bytes = end.saturating_sub(start.min(end));
    if start > all {
        error(&format!("{from}: cannot skip to specified offset"));
    }
    let mut given = Given::new(wanted);
    given.set("size", bytes.to_string());
    given
        .create(to.as_ref(), &secrets, Stable::default())
        .map_err(|what| {
            Failure::new(format!(
                "{to}: error while creating output image of format '{}': {what}",
                wanted.name()
            ))
        })?;
    let out = Named {
        name: (&to).into(),
        format: Some(wanted),
        secret: None,
    };
    let target = open::first(out.open(
        &Opener {
            writable: true,
            ..Opener::default()
        },
        &secrets,
    )?)?;
    let part: Arc<dyn Image> = Arc::new(Part {
        image: source,
        start: start.min(all),
        size: bytes,
    });
    let aim = Target {
        image: target.image.clone(),
        qcow2: target.qcow2.clone(),
        zeroed: wanted != Format::Luks,
    };
    convert(&part, &aim, &Options::default(), &Job::new())?;
    Ok(0)
}
