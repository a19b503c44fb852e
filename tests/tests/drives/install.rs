//! Installations from a CD, as virt-install does them.

use super::*;
use vireo_tests::which;

/// Says `word` through the BIOS, and stands still.
pub fn boot_sector(word: &str) -> Vec<u8> {
    // xor ax,ax; mov ds,ax; mov si,0x7c18
    let mut sector = vec![0x31, 0xc0, 0x8e, 0xd8, 0xbe, 0x18, 0x7c];
    // 1: lodsb; test al,al; jz 2; mov ah,0x0e; mov bx,7; int 0x10; jmp 1
    sector.extend([
        0xac, 0x84, 0xc0, 0x74, 0x09, 0xb4, 0x0e, 0xbb, 7, 0, 0xcd, 0x10,
    ]);
    // 2: hlt; jmp 2
    sector.extend([0xeb, 0xf2, 0xf4, 0xeb, 0xfd]);
    sector.extend(word.as_bytes());
    sector.resize(2048, 0);
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    sector
}

pub fn bios() -> bool {
    let places = [
        "/usr/share/seabios/bios-256k.bin",
        "/usr/share/qemu/bios-256k.bin",
    ];
    places
        .iter()
        .any(|path| std::path::Path::new(path).exists())
}

#[test]
fn virt_install_boots_the_cd_it_is_given() {
    if !which("virt-install") || !bios() {
        return left_out("needs virt-install (virtinst) and seabios");
    }
    let rig = Rig::new();
    rig.vireo(&["list"]).ok();
    let files: [(&str, &[u8]); 1] = [("README", b"nothing to install\n")];
    let image = iso::image(
        "INSTALL",
        &files,
        Some(&boot_sector("the installer begins")),
    );
    let image = rig.write("install.iso", image);
    let place = rig.path("disk.img").display().to_string();
    let mut install = rig.stock("virt-install");
    install.arg("--connect").arg(rig.uri()).args([
        "--name",
        "fresh",
        "--memory",
        "64",
        "--vcpus",
        "1",
        "--virt-type",
        "qemu",
        "--osinfo",
        "detect=off,require=off",
        "--graphics",
        "none",
        "--network",
        "none",
        "--noautoconsole",
        "--wait",
        "0",
        "--cdrom",
        &image,
        "--disk",
    ]);
    let done = install.arg(format!("{place},size=0.01")).output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(
        said.contains("Domain is still running") || done.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let mut console = Terminal::start(rig.command("vireo").args(["console", "fresh"]));
    console.expect("the installer begins", BOOT);
    drop(console);
    // It runs with the CD first and in its drive; afterwards it has neither.
    let list = rig.vireo(&["domblklist", "fresh", "--details"]).ok();
    assert!(
        list.contains(&format!(" file   cdrom    sdb      {image}\n")),
        "{list}"
    );
    let live = rig.vireo(&["dumpxml", "fresh"]).ok();
    for part in [
        // As virt-install has it where QEMU is not an old one.
        "machine='pc-q35-",
        "<driver name='qemu' type='qcow2' discard='unmap'/>",
        "<boot dev='cdrom'/>",
        "<alias name='sata0-0-1'/>",
        "<controller type='sata' index='0'>\n      <alias name='ide'/>\n      \
         <address type='pci' domain='0x0000' bus='0x00' slot='0x1f' function='0x2'/>",
    ] {
        assert!(live.contains(part), "{part}: {live}");
    }
    let stored = rig.vireo(&["dumpxml", "fresh", "--inactive"]).ok();
    assert!(stored.contains("<boot dev='hd'/>"), "{stored}");
    assert!(!stored.contains("install.iso"), "{stored}");
    let stats = rig.vireo(&["domblkstat", "fresh", "sdb"]).ok();
    let read = stats
        .lines()
        .find_map(|line| line.strip_prefix("sdb rd_bytes "));
    assert!(read.unwrap().parse::<u64>().unwrap() >= 2048, "{stats}");
    rig.virsh(&["destroy", "fresh"]).ok();
    // With an empty drive and an empty disk there is nothing to boot from.
    let mut console = Terminal::start(rig.command("vireo").args(["start", "fresh", "--console"]));
    console.expect("No bootable device", BOOT);
    drop(console);
    rig.virsh(&["destroy", "fresh"]).ok();
    rig.virsh(&["undefine", "fresh", "--remove-all-storage"])
        .ok();
    assert!(!rig.path("disk.img").exists());
    assert!(std::path::Path::new(&image).exists());
}

/// The order of the definition is the firmware's, between CDs and disks, SATA, IDE and virtio.
#[test]
fn cds_and_disks_boot_in_the_order_of_the_definition() {
    if !bios() {
        return left_out("needs seabios");
    }
    let rig = Rig::new();
    let cd = iso::image("CD", &[], Some(&boot_sector("the CD")));
    let cd = rig.write("cd.iso", cd);
    let bare = rig.write("bare.iso", iso::image("BARE", &[], None));
    let mut disk = boot_sector("the disk");
    disk.resize(1 << 20, 0);
    let disk = rig.write("disk.img", disk);
    let boots = |machine: &str, os: &str, devices: &str, says: &str| {
        rig.define(&format!(
            "<domain type='qemu'><name>guest</name><uuid>06df9427-4b0f-4db9-830c-95aadc4a9064</uuid>\
             <memory unit='MiB'>64</memory><os><type arch='x86_64' machine='{machine}'>hvm</type>{os}</os>\
             <features><acpi/></features><devices>{devices}<console type='pty'/></devices></domain>"
        ));
        let mut terminal =
            Terminal::start(rig.command("vireo").args(["start", "guest", "--console"]));
        terminal.expect(says, BOOT);
        drop(terminal);
        rig.vireo(&["destroy", "guest"]).ok();
    };
    let drive = |device: &str, dev: &str, bus: &str, file: &str, rest: &str| {
        format!(
            "<disk type='file' device='{device}'><source file='{file}'/>\
             <target dev='{dev}' bus='{bus}'/>{rest}</disk>"
        )
    };
    let both = |first: &str, second: &str| {
        drive("cdrom", "sda", "sata", &cd, first) + &drive("disk", "sdb", "sata", &disk, second)
    };
    let order = |n: u32| format!("<boot order='{n}'/>");
    boots("q35", "<boot dev='cdrom'/>", &both("", ""), "the CD");
    boots("q35", "<boot dev='hd'/>", &both("", ""), "the disk");
    boots("q35", "", &both(&order(2), &order(1)), "the disk");
    boots("q35", "", &both(&order(1), &order(2)), "the CD");
    // A drive without anything to boot is passed over.
    let empty = cdrom("sda", "", "");
    let hd = drive("disk", "sdb", "sata", &disk, "");
    let os = "<boot dev='cdrom'/><boot dev='hd'/>";
    boots("q35", os, &(empty + &hd), "the disk");
    let nothing = drive("cdrom", "sda", "sata", &bare, "");
    boots("q35", os, &(nothing + &hd), "the disk");
    let virtio = drive("disk", "vda", "virtio", &disk, "");
    let os = "<boot dev='hd'/><boot dev='cdrom'/>";
    boots(
        "q35",
        os,
        &(virtio + &drive("cdrom", "sda", "sata", &cd, "")),
        "the disk",
    );
    // What a definition of an older machine calls IDE.
    let ide = drive("cdrom", "hdc", "ide", &cd, "") + &drive("disk", "hda", "ide", &disk, "");
    boots("pc", "<boot dev='cdrom'/>", &ide, "the CD");
    boots("pc", "<boot dev='hd'/>", &ide, "the disk");
}
