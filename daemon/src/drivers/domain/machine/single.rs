//! What a running machine gets: a device, the image that a disk is copied to, a medium.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use vmm_api::control::Call;
use vmm_api::devices::ImageConfig;
use xml_schemas::Domain;
use xml_schemas::dom::Element;
use xml_schemas::domain::device::{BackingImage, SecretUse};

use super::{Builder, Made, Names};
use crate::drivers::domain::devices::Surroundings;
use crate::error::Result;

/// One device for a machine that runs.
#[derive(Debug)]
pub struct Device {
    /// Its id.
    pub id: String,
    /// For the VMM; its descriptors count `descriptors`.
    pub call: Call,
    /// What it is made from.
    pub descriptors: Vec<OwnedFd>,
    /// What people call the descriptors, by number.
    pub names: Names,
    /// What was made on the file system.
    pub made: Made,
}

/// Opens everything for the device at `at` of a running definition, which gets what is chosen here. Undoes what it
/// made if it fails.
///
/// # Errors
/// What cannot be opened, or is not offered.
pub fn build_device(live: &mut Domain, at: usize, around: Surroundings) -> Result<Device> {
    let mut builder = Builder::new(around);
    match builder.one(live, at) {
        Ok((id, call, names)) => Ok(Device {
            id,
            call,
            descriptors: builder.descriptors,
            names,
            made: builder.made,
        }),
        Err(error) => {
            builder.made.undo();
            Err(error)
        }
    }
}

/// What a running disk is copied to.
#[derive(Debug)]
pub struct CopyWish {
    /// The disk's target, for messages.
    pub target: String,
    /// The image.
    pub path: PathBuf,
    /// Its format.
    pub format: String,
    /// What opens it.
    pub secret: Option<SecretUse>,
    /// What is behind it; none: what its header says.
    pub backing: Option<BackingImage>,
    /// Past the page cache.
    pub direct: bool,
}

/// The same, opened.
#[derive(Debug)]
pub struct CopyImage {
    /// For the VMM; its descriptors count `descriptors`.
    pub config: ImageConfig,
    /// What it is made from.
    pub descriptors: Vec<OwnedFd>,
    /// What people call the descriptors, by number.
    pub names: Names,
}

/// Opens it.
///
/// # Errors
/// What cannot be opened, or is not offered.
pub fn build_copy(wish: CopyWish, around: Surroundings) -> Result<CopyImage> {
    let mut builder = Builder::new(around);
    let mut config = builder.copy(wish)?;
    let names = builder.count(config.resources_mut())?;
    Ok(CopyImage {
        config,
        descriptors: builder.descriptors,
        names,
    })
}

/// What is put into a drive.
#[derive(Debug)]
pub struct Medium {
    /// For the VMM; its descriptors count `descriptors`. `None`: nothing.
    pub image: Option<ImageConfig>,
    /// What it is made from.
    pub descriptors: Vec<OwnedFd>,
    /// What people call the descriptors, by number.
    pub names: Names,
}

/// Opens what the element of a drive names, which gets what is behind it.
///
/// # Errors
/// What cannot be opened, or is not offered.
pub fn build_medium(drive: &mut Element, around: Surroundings) -> Result<Medium> {
    let mut builder = Builder::new(around);
    let mut image = builder.medium(drive)?;
    let names = match &mut image {
        Some(image) => builder.count(image.resources_mut())?,
        None => Names::default(),
    };
    Ok(Medium {
        image,
        descriptors: builder.descriptors,
        names,
    })
}
