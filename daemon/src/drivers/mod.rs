//! One module for each libvirt driver that Vireo has.

pub mod domain;
pub mod network;
pub mod nodedev;
pub mod nodedev_watch;
pub mod secret;
pub mod storage;
