//! vireod, the daemon: libvirt drivers over files and vireo-vmm processes.

fn main() {}
