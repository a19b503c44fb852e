//! Volumes as the disks of guests, and what other programs do with them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use vireo_tests::{Rig, Run, left_out, tiny_guest, tiny_kernel, which};

use super::{missing, pool, program};

#[test]
fn a_volume_is_a_disk() {
    let (rig, folder) = pool();
    if missing(&["qemu-img"]) {
        return;
    }
    let image = |name: &str| folder.join(name).display().to_string();
    rig.vireo(&["vol-create-as", "p", "v", "4M", "--allocation", "0"])
        .ok();
    let guest = |pool: &str, volume: &str| {
        tiny_guest(&rig, "t", "qemu").replace(
            "</devices>",
            &format!(
                "<disk type='volume' device='disk'><driver name='qemu' type='raw'/>\
                 <source pool='{pool}' volume='{volume}'/><target dev='vda' bus='virtio'/></disk></devices>"
            ),
        )
    };
    for (pool, volume, words) in [
        ("nosuch", "v", "no storage pool with matching name 'nosuch'"),
        ("p", "nosuch", "no storage vol with matching name 'nosuch'"),
    ] {
        rig.define(&guest(pool, volume));
        let said = rig.vireo(&["start", "t"]).fails();
        assert!(said.contains(words), "{said}");
        rig.vireo(&["undefine", "t"]).ok();
    }
    rig.define(&guest("p", "v"));
    let info = rig.vireo(&["domblkinfo", "t", "vda"]).ok();
    assert!(info.contains("Capacity:       4194304"), "{info}");
    rig.vireo(&["start", "t"]).ok();
    let xml = rig.vireo(&["dumpxml", "t"]).ok();
    assert!(xml.contains("<source pool='p' volume='v'"), "{xml}");
    rig.vireo(&["destroy", "t"]).ok();

    // What a guest wrote into its raw disk is no reason to open another file for it.
    let precious = rig.write("precious", vec![7; 1 << 20]);
    program(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            &precious,
            "-F",
            "raw",
            &image("x"),
            "1M",
        ],
    );
    let forged = fs::read(image("x")).unwrap();
    let file = File::options().write(true).open(image("v")).unwrap();
    file.write_all_at(&forged, 0).unwrap();
    rig.vireo(&["pool-refresh", "p"]).ok();
    rig.vireo(&["start", "t"]).ok();
    let xml = rig.vireo(&["dumpxml", "t"]).ok();
    assert!(xml.contains("<backingStore/>"), "{xml}");
    assert!(!xml.contains("precious"), "{xml}");
    let vmm = rig.processes("vireo-vmm");
    for pid in vmm {
        for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
            let target = fs::read_link(fd.path()).unwrap_or_default();
            assert_ne!(target, Path::new(&precious));
        }
    }
    // Nor is it resized or wiped while the guest runs.
    assert!(
        rig.vireo(&["vol-wipe", "v", "p"])
            .fails()
            .contains("in use")
    );
    rig.vireo(&["destroy", "t"]).ok();
    rig.vireo(&["pool-destroy", "p"]).ok();
    let said = rig.vireo(&["start", "t"]).fails();
    assert!(
        said.contains("no storage pool with matching name 'p'"),
        "{said}"
    );
}

#[test]
fn a_domain_goes_with_its_volumes() {
    let (rig, folder) = pool();
    let image = |name: &str| folder.join(name).display().to_string();
    let outside = rig.write("outside.img", "x");
    let guest = || {
        for name in ["v", "w"] {
            rig.vireo(&["vol-create-as", "p", name, "1M"]).ok();
        }
        let disks = format!(
            "<disk type='volume' device='disk'><source pool='p' volume='v'/><target dev='vda' bus='virtio'/></disk>\
             <disk type='file' device='disk'><source file='{}'/><target dev='vdb' bus='virtio'/></disk>\
             <disk type='file' device='disk'><source file='{outside}'/><target dev='vdc' bus='virtio'/></disk></devices>",
            image("w")
        );
        rig.define(&tiny_guest(&rig, "t", "qemu").replace("</devices>", &disks));
    };
    guest();
    let said = rig.vireo(&["undefine", "t", "--storage", "vdz"]).fails();
    assert!(
        said.contains("'vdz' was not found in domain's definition"),
        "{said}"
    );
    let said = rig
        .vireo(&["undefine", "t", "--storage", &format!("vda,{}", image("w"))])
        .ok();
    assert!(
        said.contains(&format!("Volume 'vda'({}) removed.", image("v"))),
        "{said}"
    );
    assert!(
        said.contains(&format!("Volume 'vdb'({}) removed.", image("w"))),
        "{said}"
    );
    assert!(!folder.join("v").exists() && !folder.join("w").exists());
    guest();
    let run = rig.vireo(&["undefine", "t", "--remove-all-storage", "--wipe-storage"]);
    assert!(
        run.err
            .contains("is not managed by libvirt. Remove it manually."),
        "{}",
        run.err
    );
    assert!(!folder.join("v").exists() && !folder.join("w").exists());
    assert!(Path::new(&outside).exists());
    if which("virsh") {
        guest();
        rig.virsh(&["undefine", "t", "--remove-all-storage"]).ok();
        assert!(!folder.join("v").exists() && !folder.join("w").exists());
    }
}

#[test]
fn stock_programs_make_and_clone_guests() {
    if missing(&["virt-install", "virt-clone", "virsh", "qemu-img"]) {
        return;
    }
    let rig = Rig::new();
    // Clients of others do not start it.
    rig.vireo(&["list"]).ok();
    let kernel = rig.write("kernel", tiny_kernel());
    let uri = rig.uri();
    let install = |name: &str, disk: &str| -> Run {
        rig.stock("virt-install")
            .args([
                "--connect",
                &uri,
                "--name",
                name,
                "--memory",
                "64",
                "--import",
            ])
            .args([
                "--virt-type",
                "qemu",
                "--network",
                "none",
                "--graphics",
                "none",
            ])
            .args(["--noautoconsole", "--osinfo", "generic", "--disk", disk])
            .args(["--boot", &format!("kernel={kernel}")])
            .output()
            .unwrap()
            .into()
    };
    let images = rig.path("images");
    fs::create_dir(&images).unwrap();
    let path = images.join("one.qcow2").display().to_string();
    install(
        "one",
        &format!("path={path},size=0.01,format=qcow2,bus=virtio"),
    )
    .ok();
    program("qemu-img", &["check", "-q", "-U", &path]);
    let pools = rig.vireo(&["pool-list", "--all", "--name"]).ok();
    assert!(pools.contains("images"), "{pools}");
    let disks = rig.vireo(&["domblklist", "one"]).ok();
    assert!(disks.contains(&path), "{disks}");
    install("two", "pool=images,size=0.01,bus=virtio").ok();
    let existing = images.join("three.img").display().to_string();
    File::create(&existing).unwrap().set_len(1 << 20).unwrap();
    install("three", &format!("path={existing},bus=virtio")).ok();
    for name in ["one", "two", "three"] {
        rig.vireo(&["destroy", name]).ok();
    }
    program("qemu-io", &["-c", "write -P 9 0 64k", &path]);
    let clone: Run = rig
        .stock("virt-clone")
        .args([
            "--connect",
            &uri,
            "--original",
            "one",
            "--name",
            "four",
            "--auto-clone",
        ])
        .output()
        .unwrap()
        .into();
    clone.ok();
    let disks = rig.vireo(&["domblklist", "four"]).ok();
    let copy = images.join("four.qcow2").display().to_string();
    assert!(disks.contains(&copy), "{disks}");
    program("qemu-img", &["compare", "-q", &path, &copy]);
}

#[test]
fn libvirts_python_module_handles_storage() {
    if missing(&["python3"]) {
        return;
    }
    let has = Command::new("/usr/bin/python3")
        .args(["-c", "import libvirt"])
        .output();
    if !has.is_ok_and(|out| out.status.success()) {
        return left_out("needs python3-libvirt");
    }
    let (rig, folder) = pool();
    let code = r#"
import libvirt, sys
conn = libvirt.open(sys.argv[1])
pool = conn.storagePoolLookupByName("p")
assert pool.info()[0] == libvirt.VIR_STORAGE_POOL_RUNNING
vol = pool.createXML("<volume><name>v</name><capacity unit='MiB'>4</capacity><allocation>0</allocation></volume>", 0)
assert pool.listVolumes() == ["v"] and pool.numOfVolumes() == 1
assert conn.storageVolLookupByPath(vol.path()).name() == "v"
assert vol.storagePoolLookupByVolume().name() == "p"
stream = conn.newStream(0)
vol.upload(stream, 0, 0, 0)
data = bytes(range(256)) * 4096
stream.sendAll(lambda st, n, left: left.pop(0) if left else b"", [data[i:i + 65536] for i in range(0, len(data), 65536)])
stream.finish()
stream = conn.newStream(0)
vol.download(stream, 0, len(data), 0)
got = []
stream.recvAll(lambda st, chunk, got: got.append(chunk), got)
stream.finish()
assert b"".join(got) == data
stream = conn.newStream(0)
vol.download(stream, 0, 0, libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM)
parts = []
stream.sparseRecvAll(lambda st, chunk, p: p.append(len(chunk)), lambda st, n, p: p.append(-n), parts)
stream.finish()
assert sum(abs(n) for n in parts) == 4 << 20 and any(n < 0 for n in parts), parts
vol.resize(8 << 20, 0)
assert vol.info()[1] == 8 << 20
vol.wipe(0)
try:
    pool.createXML("<volume><name>v</name><capacity>1</capacity></volume>", 0)
    raise SystemExit("made twice")
except libvirt.libvirtError as e:
    assert e.get_error_code() == libvirt.VIR_ERR_STORAGE_VOL_EXIST, e
    assert e.get_error_domain() == libvirt.VIR_FROM_STORAGE
try:
    conn.storagePoolLookupByName("nosuch")
    raise SystemExit("found")
except libvirt.libvirtError as e:
    assert e.get_error_code() == libvirt.VIR_ERR_NO_STORAGE_POOL
vol.delete(0)
try:
    conn.storageVolLookupByPath(sys.argv[2])
    raise SystemExit("found")
except libvirt.libvirtError as e:
    assert e.get_error_code() == libvirt.VIR_ERR_NO_STORAGE_VOL
print("all is well")
"#;
    let run: Run = rig
        .stock("/usr/bin/python3")
        .args(["-c", code, &rig.uri(), folder.join("v").to_str().unwrap()])
        .output()
        .unwrap()
        .into();
    assert_eq!(run.clone().ok(), "all is well\n", "{}", run.err);
}
