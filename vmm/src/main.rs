//! One domain: builds a machine from a config, boots it and runs it.

fn main() {}
