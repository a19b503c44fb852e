//! One domain: builds a machine from a config, boots it and runs it.

fn main() {
    std::process::exit(vmm::program::main(std::env::args().skip(1)));
}
