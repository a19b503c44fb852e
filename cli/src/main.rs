//! vireo, the command: virsh commands over the libvirt wire protocol.

fn main() {}
