use super::*;
use crate::soft::SoftVm;

fn request<'a>(model: Option<&'a str>, features: &'a [(String, bool)]) -> CpuRequest<'a> {
    CpuRequest {
        model,
        features,
        topology: Topology::flat(4),
    }
}

fn leaf(leaves: &[CpuidEntry], function: u32, index: u32) -> [u32; 4] {
    let entry = leaves
        .iter()
        .find(|e| e.function == function && (!e.index_significant || e.index == index))
        .unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"));
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

#[test]
fn unknown_names_and_missing_features_are_refused_by_name() {
    let vm = SoftVm::new();
    let error = template(&vm, &request(Some("Pentium9"), &[])).unwrap_err();
    assert_eq!(error.to_string(), "unknown CPU model 'Pentium9'");
    for on in [true, false] {
        let features = [("warp".to_owned(), on)];
        let error = template(&vm, &request(None, &features)).unwrap_err();
        assert_eq!(error.to_string(), "unknown CPU feature 'warp'");
    }
    let features = [("avx512f".to_owned(), true), ("vmx".to_owned(), true)];
    let error = template(&vm, &request(None, &features)).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("avx512f, vmx"), "{text}");
    let error = template(&vm, &request(Some("Opteron_G5"), &[])).unwrap_err();
    assert!(matches!(&error, CpuError::Missing { names, .. } if !names.is_empty()));
    assert!(error.to_string().contains("xop"), "{error}");
}

#[test]
fn a_missing_feature_that_is_switched_off_is_not_missed() {
    let vm = SoftVm::new();
    let lacks = template(&vm, &request(Some("Skylake-Client"), &[])).unwrap_err();
    let CpuError::Missing { names, .. } = lacks else {
        panic!("{lacks}");
    };
    let off: Vec<_> = names.into_iter().map(|name| (name, false)).collect();
    let made = template(&vm, &request(Some("Skylake-Client"), &off));
    assert!(made.is_ok(), "{made:?}");
}

#[test]
fn the_default_is_everything_the_backend_has() {
    let vm = SoftVm::new();
    let made = template(&vm, &request(None, &[])).unwrap().for_vcpu(2);
    let [_, ebx, ecx, edx] = leaf(&made, 1, 0);
    assert_eq!(ebx >> 24, 2);
    assert_eq!(ebx >> 16 & 0xff, 4);
    assert_ne!(ecx >> 31, 0, "hypervisor");
    assert_ne!(ecx >> 21 & 1, 0, "x2apic");
    assert_ne!(edx >> 28 & 1, 0, "ht");
    assert_eq!(leaf(&made, 0xb, 1), [2, 4, 0x201, 2]);
    let [max, a, b, c] = leaf(&made, 0x4000_0000, 0);
    assert_eq!(max, 0x4000_0010);
    let text: Vec<u8> = [a, b, c].iter().flat_map(|w| w.to_le_bytes()).collect();
    assert_eq!(text, b"KVMKVMKVM\0\0\0");
    let made = Leaves::new(made);
    for name in supported_features(&vm).unwrap() {
        let place = features::find(name).unwrap();
        assert_eq!(made.feature(place), soft::by_default(name), "{name}");
    }
}

#[test]
fn switching_a_feature_off_takes_it_away() {
    let vm = SoftVm::new();
    let off = [("rdrand".to_owned(), false)];
    let made = template(&vm, &request(None, &off)).unwrap().for_vcpu(0);
    assert_eq!(leaf(&made, 1, 0)[2] >> 30 & 1, 0);
}

#[test]
fn signatures_are_what_the_processors_have() {
    assert_eq!(signature_word((6, 26, 3)), 0x106a3);
    assert_eq!(signature_word((15, 107, 1)), 0x60fb1);
    assert_eq!(signature_word((23, 1, 2)), 0x80_0f12);
    assert_eq!(signature_word((6, 0x1c, 10)), 0x106ca);
}

#[test]
fn apic_ids_have_a_field_for_each_level() {
    assert_eq!(Topology::flat(3).apic_id(2), 2);
    let topology = Topology {
        sockets: 2,
        cores: 3,
        threads: 2,
    };
    let ids: Vec<u32> = (0..12).map(|i| topology.apic_id(i)).collect();
    assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
    let vm = SoftVm::new();
    let mut bad = request(None, &[]);
    // Who was shown one saw no other.
    for (shown, other) in [
        (topology, Topology::flat(12)),
        (Topology::flat(12), topology),
    ] {
        let mut asked = request(None, &[]);
        asked.topology = shown;
        let leaves = template(&vm, &asked).unwrap().for_vcpu(0);
        assert!(shown.was_shown(&leaves) && !other.was_shown(&leaves));
    }
    assert!(topology.was_shown(&[]));
    bad.topology.cores = 0;
    assert!(matches!(template(&vm, &bad), Err(CpuError::Topology(_))));
}

#[test]
fn a_model_is_refused_only_for_what_no_interpreter_of_today_offers() {
    const REFUSED: [&str; 16] = [
        "3dnow",
        "3dnowext",
        "cldemote",
        "core-capability",
        "fma4",
        "gfni",
        "hle",
        "ibrs-all",
        "movdir64b",
        "movdiri",
        "mpx",
        "pku",
        "rtm",
        "split-lock-detect",
        "tbm",
        "xop",
    ];
    let vm = SoftVm::new();
    let host = softcpu::simd::host_fp_features();
    let complete = host.avx2() && host.fma() && host.aes() && host.pclmulqdq();
    if !complete {
        println!(
            "left out: a_model_is_refused_only_for_what_no_interpreter_of_today_offers needs a host with AVX2"
        );
        return;
    }
    let mut refused = Vec::new();
    for name in models::names() {
        match template(&vm, &request(Some(name), &[])) {
            Ok(_) => {}
            Err(CpuError::Missing { names, .. }) => {
                let amd_only =
                    |n: &str| n == "sse4a" && !host.sse4a() || n == "sha-ni" && !host.sha();
                let by_register = |n: &str| {
                    n.starts_with("avx512")
                        || n.ends_with("-no")
                        || n.starts_with("va")
                        || n.starts_with("vp")
                        || n == "skip-l1dfl-vmentry"
                };
                for missing in &names {
                    assert!(
                        REFUSED.contains(&missing.as_str())
                            || amd_only(missing)
                            || by_register(missing),
                        "{name} for {missing}"
                    );
                }
                refused.push(name);
            }
            Err(error) => panic!("{name}: {error}"),
        }
    }
    // Those that fit below x86-64-v3, with today's replacements of the ones that don't.
    for name in [
        "486",
        "pentium",
        "pentium3",
        "qemu32",
        "coreduo",
        "core2duo",
        "n270",
        "kvm64",
        "qemu64",
        "x86-64-v1",
        "x86-64-v2",
        "x86-64-v3",
        "Conroe",
        "Penryn",
        "Nehalem-IBRS",
        "Westmere",
        "SandyBridge-IBRS",
        "IvyBridge",
        "Haswell-noTSX",
        "Broadwell-noTSX-IBRS",
        "Skylake-Client-noTSX-IBRS",
        "Opteron_G2",
    ] {
        assert!(!refused.contains(&name), "{name}");
    }
    for name in [
        "Haswell",
        "Opteron_G4",
        "Opteron_G5",
        "athlon",
        "phenom",
        "Icelake-Server",
    ] {
        assert!(refused.contains(&name), "{name}");
    }
}
