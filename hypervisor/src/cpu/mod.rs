//! What kind of processor a guest sees: models and features by libvirt's names, and the CPUID
//! leaves made from them within what a backend offers.

pub mod features;
mod leaves;
pub mod models;
mod soft;

pub use soft::soft_leaves;

use crate::{Backend, CpuidEntry, Vm};
use features::{Place, Reg};
use leaves::Leaves;
use models::{Model, Vendor};

/// Why a CPU cannot be made as asked.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// No such model.
    #[error("unknown CPU model '{0}'")]
    UnknownModel(String),
    /// No such feature.
    #[error("unknown CPU feature '{0}'")]
    UnknownFeature(String),
    /// The backend lacks something the model or the request needs.
    #[error("the {backend} backend here lacks CPU features: {}", .names.join(", "))]
    Missing {
        /// Which backend, in words.
        backend: &'static str,
        /// libvirt's names.
        names: Vec<String>,
    },
    /// The topology does not add up.
    #[error("a topology of {0:?} is impossible")]
    Topology(Topology),
    /// The backend could not be asked.
    #[error(transparent)]
    Backend(#[from] crate::Error),
}

/// How a guest's vCPUs are arranged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Sockets.
    pub sockets: u32,
    /// Cores in a socket.
    pub cores: u32,
    /// Threads in a core.
    pub threads: u32,
}

impl Topology {
    /// One socket of `vcpus` cores.
    pub fn flat(vcpus: u32) -> Self {
        Self {
            sockets: 1,
            cores: vcpus.max(1),
            threads: 1,
        }
    }

    /// Whether a vCPU that was shown these leaves saw an arrangement with the same fields; where none of them says, it did.
    pub fn was_shown(self, leaves: &[CpuidEntry]) -> bool {
        let bits = [self.thread_bits(), self.package_bits()];
        leaves
            .iter()
            .filter(|leaf| leaf.function == 0xb)
            .all(|leaf| {
                let known = usize::try_from(leaf.index).ok();
                let bits = known.and_then(|index| bits.get(index));
                bits.is_none_or(|bits| leaf.eax & 0x1f == *bits)
            })
    }

    fn thread_bits(self) -> u32 {
        self.threads.next_power_of_two().trailing_zeros()
    }

    fn package_bits(self) -> u32 {
        self.thread_bits() + self.cores.next_power_of_two().trailing_zeros()
    }

    /// The APIC id of the vCPU with this index: fields for thread, core and socket. (Where
    /// cores and threads are powers of two, and in [`Topology::flat`], the index itself.)
    pub fn apic_id(self, index: u32) -> u32 {
        let thread = index % self.threads;
        let core = index / self.threads % self.cores;
        let socket = index / self.threads / self.cores;
        socket << self.package_bits() | core << self.thread_bits() | thread
    }
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct CpuRequest<'a> {
    /// A model's name; `None`: the backend's best (KVM: everything it has; the software CPU:
    /// everything that makes a guest quicker).
    pub model: Option<&'a str>,
    /// Features switched on or off beyond the model.
    pub features: &'a [(String, bool)],
    /// vCPUs' arrangement.
    pub topology: Topology,
}

/// The CPUID leaves of a guest, but for what differs between its vCPUs.
#[derive(Debug, Clone)]
pub struct CpuTemplate {
    leaves: Leaves,
    topology: Topology,
}

const HYPERVISOR: Place = Place {
    function: 1,
    index: 0,
    reg: Reg::Ecx,
    bit: 31,
};

/// KVM's own leaf of features.
const KVM_FEATURES: u32 = 0x4000_0001;

/// Features a named model gets besides its own, where the backend has them: they make a guest
/// cheaper to run and are no part of any model. All but the first need an APIC.
const ALWAYS: [&str; 5] = ["hypervisor", "x2apic", "tsc-deadline", "arat", "ht"];

/// Features by which the software CPU tells a guest that it need not defend itself against
/// the flaws of the processor it is named after.
const IMMUNE: [&str; 2] = ["arch-capabilities", "spec-ctrl"];

/// Bits that other modules name.
pub(crate) mod bits {
    /// CPUID.1:ECX, TSC-deadline mode of the local APIC's timer.
    pub(crate) const TSC_DEADLINE: u32 = 1 << 24;
}

/// libvirt's names of all features the backend of `vm` offers.
///
/// # Errors
/// Where the backend cannot be asked.
pub fn supported_features(vm: &dyn Vm) -> crate::Result<Vec<&'static str>> {
    let leaves = Leaves::new(vm.supported_cpuid()?);
    Ok(features::all()
        .filter(|(_, place)| leaves.feature(*place))
        .map(|(name, _)| name)
        .collect())
}

/// Makes the leaves for a request.
///
/// # Errors
/// An unknown name; features the backend lacks (all of them are named).
pub fn template(vm: &dyn Vm, request: &CpuRequest<'_>) -> Result<CpuTemplate, CpuError> {
    let topology = request.topology;
    let counts = [topology.sockets, topology.cores, topology.threads];
    if counts.iter().any(|&n| n == 0 || n > 1 << 16) || topology.package_bits() > 16 {
        return Err(CpuError::Topology(topology));
    }
    let offered = Leaves::new(vm.supported_cpuid()?);
    let model = match request.model {
        Some(name) => {
            Some(models::find(name).ok_or_else(|| CpuError::UnknownModel(name.to_owned()))?)
        }
        None => None,
    };
    let mut wanted = WantedFeatures::default();
    match model {
        Some(model) => {
            for name in model.features() {
                wanted.need(name, request)?;
            }
            let has = |name| wanted.has(name);
            let (apic, modern) = (has("apic"), has("lm"));
            for name in ALWAYS.iter().take(if apic { ALWAYS.len() } else { 1 }) {
                wanted.like(name, &offered, request)?;
            }
            if vm.backend() == Backend::Soft && model.vendor == Vendor::Intel && modern {
                for name in IMMUNE {
                    wanted.like(name, &offered, request)?;
                }
            }
        }
        None => {
            for (name, place) in features::all() {
                let part = vm.backend() != Backend::Soft || soft::by_default(name);
                if part && offered.feature(place) {
                    wanted.need(name, request)?;
                }
            }
        }
    }
    for (name, on) in request.features {
        if *on {
            wanted.need(name, request)?;
        } else {
            features::find(name).ok_or_else(|| CpuError::UnknownFeature(name.clone()))?;
        }
    }
    // HTT only says that there are several threads, which any backend can have.
    let ht = |place: Place| place.function == 1 && place.reg == Reg::Edx && place.bit == 28;
    let missing: Vec<String> = wanted
        .0
        .iter()
        .filter(|(_, place)| !offered.feature(*place) && !ht(*place))
        .map(|(name, _)| name.clone())
        .collect();
    if !missing.is_empty() {
        let backend = backend_name(vm);
        return Err(CpuError::Missing {
            backend,
            names: missing,
        });
    }
    let leaves = match (vm.backend(), model) {
        (Backend::Kvm, None) => host_leaves(offered, &wanted),
        (backend, model) => model_leaves(backend, &offered, model, &wanted, topology),
    };
    Ok(CpuTemplate { leaves, topology })
}

/// Whether the backend of `vm` can go on with a guest that has been shown `leaves` elsewhere.
///
/// # Errors
/// The features in the way, all of them.
pub fn check_shown(vm: &dyn Vm, leaves: &[CpuidEntry]) -> Result<(), CpuError> {
    /// What OSXSAVE (leaf 1, ECX) shows is CR4's, HTT's and the hypervisor bit's meaning no
    /// processor's.
    const NOT_FEATURES: [(Reg, u32); 3] = [(Reg::Ecx, 27), (Reg::Ecx, 31), (Reg::Edx, 28)];
    let shown = Leaves::new(leaves.to_vec());
    let offered = Leaves::new(vm.supported_cpuid()?);
    let counts = |place: Place| {
        place.function != 1
            || !NOT_FEATURES
                .iter()
                .any(|(reg, bit)| place.reg == *reg && place.bit == *bit)
    };
    let mut names: Vec<String> = features::all()
        .filter(|(_, place)| counts(*place) && shown.feature(*place) && !offered.feature(*place))
        .map(|(name, _)| name.to_owned())
        .collect();
    // KVM's own features, and the state components that XSAVE knows.
    let word = |leaves: &Leaves, function| leaves.get(function, 0).map_or(0, |e| e.eax);
    for (function, what) in [(KVM_FEATURES, "kvm-feature"), (0xd, "xsave-component")] {
        let missing = word(&shown, function) & !word(&offered, function);
        let bits = (0..32).filter(|bit| missing >> bit & 1 != 0);
        names.extend(bits.map(|bit| format!("{what}-{bit}")));
    }
    if names.is_empty() {
        return Ok(());
    }
    let backend = backend_name(vm);
    Err(CpuError::Missing { backend, names })
}

fn backend_name(vm: &dyn Vm) -> &'static str {
    match vm.backend() {
        Backend::Kvm => "KVM",
        Backend::Soft => "software CPU",
    }
}

#[derive(Debug, Default)]
struct WantedFeatures(Vec<(String, Place)>);

impl WantedFeatures {
    /// Adds a feature that must be there, unless the request switches it off.
    fn need(&mut self, name: &str, request: &CpuRequest<'_>) -> Result<(), CpuError> {
        let place =
            features::find(name).ok_or_else(|| CpuError::UnknownFeature(name.to_owned()))?;
        let off = request
            .features
            .iter()
            .any(|(other, on)| !on && features::find(other) == Some(place));
        if !off && !self.0.iter().any(|(_, p)| *p == place) {
            self.0.push((name.to_owned(), place));
        }
        Ok(())
    }

    /// Adds a feature if the backend has it.
    fn like(
        &mut self,
        name: &str,
        offered: &Leaves,
        request: &CpuRequest<'_>,
    ) -> Result<(), CpuError> {
        match features::find(name) {
            Some(place) if offered.feature(place) => self.need(name, request),
            _ => Ok(()),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(known, _)| known == name)
    }
}

/// KVM's own set, for a guest that gets all of this host's processor.
fn host_leaves(offered: Leaves, wanted: &WantedFeatures) -> Leaves {
    let mut leaves = offered;
    for (_, place) in features::all() {
        if leaves.feature(place) && !wanted.0.iter().any(|(_, p)| *p == place) {
            leaves.set_feature(place, false);
        }
    }
    leaves.set_feature(HYPERVISOR, true);
    // Performance counters, cache and memory allocation, SGX, processor trace: the host's.
    leaves.remove(|function| matches!(function, 0xa | 0xf | 0x10 | 0x12 | 0x14 | 0x1b));
    leaves
}

/// Leaves of a named model, or of the software CPU's default.
fn model_leaves(
    backend: Backend,
    offered: &Leaves,
    model: Option<&'static Model>,
    wanted: &WantedFeatures,
    topology: Topology,
) -> Leaves {
    let (vendor, signature, name) = match model {
        Some(model) => (model.vendor, model.signature, model.name),
        None => (Vendor::Intel, soft::SIGNATURE, "software"),
    };
    let mut leaves = Leaves::default();
    let vendor_text = vendor.text();
    let amd = vendor != Vendor::Intel;
    let word = |i: usize| {
        u32::from_le_bytes([
            vendor_text[i],
            vendor_text[i + 1],
            vendor_text[i + 2],
            vendor_text[i + 3],
        ])
    };
    let [ebx, edx, ecx] = [word(0), word(4), word(8)];
    let (sig, cores) = (signature_word(signature), topology.cores);
    leaves.put(0, None, [0xd, ebx, ecx, edx]);
    // CLFLUSH line of 64 bytes; the rest is filled in for each vCPU.
    leaves.put(1, None, [sig, 8 << 8, 0, 0]);
    if vendor == Vendor::Intel {
        // "See leaf 4".
        leaves.put(2, None, [0x00fe_ff01, 0, 0, 0]);
        caches(&mut leaves, topology);
    }
    leaves.put(5, None, [0; 4]);
    leaves.put(6, None, [0; 4]);
    let highest_7 = u32::from(
        wanted
            .0
            .iter()
            .any(|(_, p)| p.function == 7 && p.index == 1),
    );
    leaves.put(7, Some(0), [highest_7, 0, 0, 0]);
    leaves.put(0x8000_0000, None, [0x8000_0008, 0, 0, 0]);
    if amd {
        leaves.put(0x8000_0000, None, [0x8000_0008, ebx, ecx, edx]);
    }
    leaves.put(0x8000_0001, None, [if amd { sig } else { 0 }, 0, 0, 0]);
    let mut brand = [0u8; 48];
    let text = format!("Vireo virtual CPU ({name})");
    let len = text.len().min(47);
    brand[..len].copy_from_slice(&text.as_bytes()[..len]);
    for (function, part) in (0x8000_0002..).zip(brand.as_chunks::<16>().0) {
        let (words, _) = part.as_chunks::<4>();
        let mut regs = [0; 4];
        for (reg, word) in regs.iter_mut().zip(words) {
            *reg = u32::from_le_bytes(*word);
        }
        leaves.put(function, None, regs);
    }
    // L2: 1 MiB, 16 ways, 64-byte lines (AMD's encoding, which Intel's processors share).
    leaves.put(0x8000_0006, None, [0, 0, 1024 << 16 | 8 << 12 | 64, 0]);
    leaves.put(0x8000_0007, None, [0; 4]);
    let bits = offered
        .get(0x8000_0008, 0)
        .map_or(48 << 8 | 40, |e| e.eax & 0xffff);
    let nc = if amd && cores * topology.threads > 1 {
        topology.package_bits() << 12 | (cores * topology.threads - 1)
    } else {
        0
    };
    leaves.put(0x8000_0008, None, [bits, 0, nc, 0]);
    if wanted.has("xsave") {
        xsave(&mut leaves, offered, wanted);
    }
    for (_, place) in &wanted.0 {
        leaves.set_feature(*place, true);
    }
    if amd {
        // AMD repeats leaf 1's old features (bits 0..10, 12..18, 23, 24).
        let shared = leaves.get(1, 0).map_or(0, |e| e.edx) & 0x0183_f3ff;
        leaves.entry(0x8000_0001, None).edx |= shared;
    }
    // The hypervisor's own leaves are the backend's.
    for function in [0x4000_0000, KVM_FEATURES, 0x4000_0010] {
        if let Some(e) = offered.get(function, 0) {
            leaves.put(function, None, [e.eax, e.ebx, e.ecx, e.edx]);
        }
    }
    if backend == Backend::Kvm && offered.get(0x4000_0000, 0).is_some() {
        leaves.set_feature(HYPERVISOR, true);
    }
    if model.is_some() {
        // A named model is the same on every backend, so that its guest can move between them.
        let common = Leaves::new(soft_leaves());
        let common = common.get(KVM_FEATURES, 0).map_or(0, |e| e.eax);
        leaves.entry(KVM_FEATURES, None).eax &= common;
    }
    leaves
}

fn signature_word((family, model, stepping): (u32, u32, u32)) -> u32 {
    let (base, extended) = if family > 15 {
        (15, family - 15)
    } else {
        (family, 0)
    };
    stepping & 15 | (model & 15) << 4 | base << 8 | (model >> 4) << 16 | extended << 20
}

/// Leaf 4: L1 of 32 KiB each way, L2 of 1 MiB, L3 of 16 MiB shared by the socket.
fn caches(leaves: &mut Leaves, topology: Topology) {
    let threads = (1 << topology.thread_bits()) - 1;
    let package = (1 << topology.package_bits()) - 1;
    let cores = (1u32 << (topology.package_bits() - topology.thread_bits())) - 1;
    let describe = |kind: u32, level: u32, sharing: u32, ways: u32, sets: u32| {
        [
            kind | level << 5 | 1 << 8 | (sharing & 0xfff) << 14 | (cores & 0x3f) << 26,
            63 | (ways - 1) << 22,
            sets - 1,
            0,
        ]
    };
    leaves.put(4, Some(0), describe(1, 1, threads, 8, 64));
    leaves.put(4, Some(1), describe(2, 1, threads, 8, 64));
    leaves.put(4, Some(2), describe(3, 2, threads, 16, 1024));
    leaves.put(4, Some(3), describe(3, 3, package, 16, 16384));
    leaves.put(4, Some(4), [0; 4]);
}

/// Leaf 0xd: x87 and SSE, and AVX where it is wanted; sizes as the backend has them.
fn xsave(leaves: &mut Leaves, offered: &Leaves, wanted: &WantedFeatures) {
    let avx = wanted.has("avx");
    let (mask, size) = if avx { (7, 832) } else { (3, 576) };
    leaves.put(0xd, Some(0), [mask, size, size, 0]);
    leaves.put(0xd, Some(1), [0; 4]);
    if avx && let Some(e) = offered.get(0xd, 2) {
        leaves.put(0xd, Some(2), [e.eax, e.ebx, e.ecx, e.edx]);
    }
}

impl CpuTemplate {
    /// From what one vCPU of a guest has been shown, for others of the same guest.
    pub fn shown(leaves: &[CpuidEntry], topology: Topology) -> Self {
        Self {
            leaves: Leaves::new(leaves.to_vec()),
            topology,
        }
    }

    /// The leaves of the vCPU with this APIC id.
    pub fn for_vcpu(&self, apic_id: u32) -> Vec<CpuidEntry> {
        let topology = self.topology;
        let in_package = 1u32 << topology.package_bits();
        let mut leaves = self.leaves.clone();
        let leaf = leaves.entry(1, None);
        leaf.ebx = leaf.ebx & 0xffff | in_package.min(255) << 16 | apic_id << 24;
        if in_package > 1 {
            leaf.edx |= 1 << 28;
        } else {
            leaf.edx &= !(1 << 28);
        }
        // Both topology leaves, where the model has the second: KVM's default may.
        let levels = [
            [topology.thread_bits(), topology.threads, 1 << 8, apic_id],
            [
                topology.package_bits(),
                topology.threads * topology.cores,
                1 | 2 << 8,
                apic_id,
            ],
            [0, 0, 2, apic_id],
        ];
        let has_1f = leaves.get(0x1f, 0).is_some();
        leaves.remove(|function| matches!(function, 0xb | 0x1f));
        for function in [0xb, 0x1f] {
            if function == 0x1f && !has_1f {
                continue;
            }
            for (index, regs) in (0..).zip(levels) {
                leaves.put(function, Some(index), regs);
            }
        }
        // AMD's APM 3, E.4.7: threads of a package, and the bits of an APIC id that tell them apart.
        let package = topology.threads * topology.cores;
        if let Some(sizes) = leaves.get(0x8000_0008, 0).copied() {
            let count = (package - 1).min(0xff) | topology.package_bits() << 12;
            let ecx = if package > 1 { count } else { 0 };
            leaves.put(0x8000_0008, None, [sizes.eax, sizes.ebx, ecx, sizes.edx]);
        }
        if leaves.get(0x8000_001e, 0).is_some() {
            let core = apic_id >> topology.thread_bits();
            let threads = topology.threads - 1;
            leaves.put(
                0x8000_001e,
                None,
                [apic_id, core & 0xff | threads << 8, 0, 0],
            );
        }
        leaves.into_entries()
    }
}

#[cfg(test)]
mod tests;
