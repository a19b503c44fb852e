//! Config and control protocol of `vireo-vmm`: the types its callers share with it.

pub mod config;
pub mod control;
pub mod devices;
pub mod migrate;
pub mod saved;
