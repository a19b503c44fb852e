//! What the daemon does on the host for a domain's devices: secrets, sockets, bridges, taps,
//! a full disk, a watchdog, and a new daemon in the middle of it all.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vireo_tests::{Kernel, Rig, Run, Terminal, left_out, linux_guest, namespace, which};

/// A boot under load of the whole test run can take a while.
const BOOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(60);

fn run(program: &str, args: &[&str]) -> String {
    let mut output = Command::new(program).args(args).output().unwrap();
    for _ in 0..20 {
        // qemu-img times its own key derivation, and gives up where the host's clock of its CPU time is too coarse.
        if !String::from_utf8_lossy(&output.stderr).contains("accurate CPU usage") {
            break;
        }
        output = Command::new(program).args(args).output().unwrap();
    }
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn with(xml: &str, devices: &str) -> String {
    xml.replace("</devices>", &format!("{devices}</devices>"))
}

fn root() -> bool {
    // SAFETY: no memory effects.
    unsafe { libc::geteuid() == 0 }
}

/// One line of the guest's shell; what it printed.
fn shell(terminal: &mut Terminal, line: &str) -> String {
    terminal.send(&format!("{line}; echo DO''NE\r"));
    terminal.expect("DO''NE", SOON);
    terminal.expect("DONE\r\n", SOON)
}

/// Waits until a command's output is as wanted.
fn eventually(what: &str, mut look: impl FnMut() -> Option<String>) -> String {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A program that speaks to the host over vsock: connects to port 5000 and echoes one line in
/// capitals of the letter 'a' only.
const VSOCK: &str = r#"
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(void) {
    struct sockaddr_vm host = { .svm_family = AF_VSOCK, .svm_cid = 2, .svm_port = 5000 };
    char line[64];
    int s = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (s < 0 || connect(s, (void *)&host, sizeof host)) { perror("vsock"); return 1; }
    ssize_t n = read(s, line, sizeof line);
    for (ssize_t i = 0; i < n; i++) if (line[i] == 'a') line[i] = 'A';
    if (n <= 0 || write(s, line, n) != n) { perror("vsock"); return 1; }
    return 0;
}
"#;

#[test]
fn linux_keeps_its_devices_when_the_daemon_is_killed() {
    for program in ["qemu-img", "gcc"] {
        if !which(program) {
            return left_out(&format!("needs {program}"));
        }
    }
    let rig = Rig::new();
    let path = |name: &str| rig.path(name).display().to_string();
    let (luks, cd, channel) = (path("disk.luks"), path("cd.img"), path("channel.sock"));
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "luks",
            "--object",
            "secret,id=s,data=hush",
            "-o",
            "key-secret=s,iter-time=10",
            &luks,
            "8M",
        ],
    );
    let uuid = "22222222-2222-2222-2222-222222222221";
    let secret = rig.write(
        "secret.xml",
        format!("<secret private='yes'><uuid>{uuid}</uuid><usage type='volume'><volume>{luks}</volume></usage></secret>"),
    );
    rig.vireo(&["secret-define", &secret]).ok();
    let value = rig.write("value", "aHVzaA==");
    rig.vireo(&["secret-set-value", uuid, "--file", &value])
        .ok();
    // The guest's program comes on a CD-ROM.
    let source = rig.write("vsock.c", VSOCK);
    let program = path("vsock");
    run("gcc", &["-static", "-O1", "-o", &program, &source]);
    let mut content = std::fs::read(&program).unwrap();
    content.resize(content.len().next_multiple_of(2048), 0);
    std::fs::write(&cd, content).unwrap();
    rig.define(&with(
        &linux_guest("deb", Kernel::V6_1),
        &format!(
            "<disk type='file'><driver name='qemu' type='raw'/><source file='{luks}'>\
             <encryption format='luks'><secret type='passphrase' uuid='{uuid}'/></encryption></source>\
             <target dev='vda'/></disk>\
             <disk type='file'><driver name='qemu' type='raw'/><source file='{cd}'/>\
             <target dev='vdb' bus='virtio'/><readonly/></disk>\
             <channel type='unix'><source mode='bind' path='{channel}'/>\
             <target type='virtio' name='org.example.0'/></channel>\
             <vsock model='virtio'><cid auto='no' address='77'/></vsock>"
        ),
    ));
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", BOOT);
    assert!(shell(&mut terminal, "cat /sys/block/vdb/ro").contains("1\r\n"));
    let denied = shell(&mut terminal, "dd if=/dev/zero of=/dev/vdb count=1");
    assert!(!denied.contains("1+0 records out"), "{denied}");
    shell(
        &mut terminal,
        "yes vireo | dd of=/dev/vda bs=64k count=16 iflag=fullblock conv=fsync",
    );

    let pid = rig.processes("vireod");
    assert_eq!(pid.len(), 1);
    // SAFETY: kill has no memory effects; the pid carries this rig's mark.
    unsafe { libc::kill(pid[0], libc::SIGKILL) };
    // The console's client goes with it; the next command starts a daemon.
    terminal.wait(SOON);
    let stats = rig.vireo(&["domblkstat", "deb", "vda"]).ok();
    assert!(stats.contains("vda wr_bytes 1048576\n"), "{stats}");
    let list = rig.vireo(&["domblklist", "deb", "--details"]).ok();
    assert!(
        list.contains(&format!(" file   disk     vdb      {cd}\n")),
        "{list}"
    );
    let mut terminal = Terminal::start(rig.command("vireo").args(["console", "deb"]));
    terminal.expect("Escape character", SOON);
    // What is typed before the terminal is the guest's is lost.
    terminal.wait_raw(SOON);
    terminal.send("\r");
    terminal.expect("deb:/root# ", SOON);

    // The channel, both ways.
    let mut host = UnixStream::connect(&channel).unwrap();
    host.set_read_timeout(Some(SOON)).unwrap();
    terminal.send("read line </dev/virtio-ports/org.example.0; echo got=$line\r");
    host.write_all(b"hello guest\n").unwrap();
    terminal.expect("got=hello guest\r\n", SOON);
    shell(
        &mut terminal,
        "echo hello host >/dev/virtio-ports/org.example.0",
    );
    let mut line = [0; 11];
    host.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"hello host\n");

    // vsock: the guest reaches a program on the host.
    let folder = rig
        .path("run/vireo/domains")
        .join(rig.vireo(&["domuuid", "deb"]).ok().trim());
    let listener = UnixListener::bind(folder.join("vsock_5000")).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(b"banana\n").unwrap();
        let mut line = [0; 7];
        stream.read_exact(&mut line).unwrap();
        line
    });
    let said = shell(
        &mut terminal,
        "dd if=/dev/vdb of=/tmp/v bs=64k 2>/dev/null; chmod +x /tmp/v; /tmp/v && echo o''k",
    );
    assert!(said.contains("ok\r\n"), "{said}");
    assert_eq!(&server.join().unwrap(), b"bAnAnA\n");

    terminal.send("poweroff -f\r");
    rig.wait_state("deb", "shut off (shutdown)", SOON);
    let plain = path("plain.raw");
    run(
        "qemu-img",
        &[
            "convert",
            "--object",
            "secret,id=s,data=hush",
            "--image-opts",
            &format!("driver=luks,key-secret=s,file.filename={luks}"),
            "-O",
            "raw",
            &plain,
        ],
    );
    let plain = std::fs::read(&plain).unwrap();
    let expected: Vec<u8> = b"vireo\n".iter().copied().cycle().take(1 << 20).collect();
    assert!(plain[..1 << 20] == expected, "what the guest wrote");
    assert!(
        std::fs::read(&luks)
            .unwrap()
            .windows(12)
            .all(|w| w != b"vireo\nvireo\n")
    );
}

#[test]
fn linux_is_paused_by_a_full_host_and_by_its_watchdog() {
    if !root() {
        return left_out("needs root (a small file system)");
    }
    let rig = Rig::new();
    let small = rig.path("small");
    std::fs::create_dir(&small).unwrap();
    let small_path = small.display().to_string();
    if !Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs", &small_path])
        .status()
        .is_ok_and(|status| status.success())
    {
        return left_out("needs mount(2)");
    }
    struct Unmount(String);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = Command::new("umount").args(["-l", &self.0]).status();
        }
    }
    let _unmount = Unmount(small_path.clone());
    let image = small.join("disk.raw");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(8 << 20)
        .unwrap();
    rig.define(&with(
        &linux_guest("deb", Kernel::V6_1),
        &format!(
            "<disk type='file'><driver name='qemu' type='raw' error_policy='enospace'/>\
             <source file='{}'/><target dev='vda'/></disk>\
             <watchdog model='i6300esb' action='pause'/>",
            image.display()
        ),
    ));
    let mut events = Terminal::start(
        rig.command("vireo")
            .args(["event", "--domain", "deb", "--all", "--loop"]),
    );
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", BOOT);
    terminal.send(
        "dd if=/dev/zero of=/dev/vda bs=64k count=64 conv=fsync 2>/dev/null && echo written=$?\r",
    );
    rig.wait_state("deb", "paused (I/O error)", SOON);
    events.expect("event 'io-error' for domain 'deb'", SOON);
    let error = rig.vireo(&["domblkerror", "deb"]).ok();
    assert!(error.contains("vda: no space"), "{error}");
    run("mount", &["-o", "remount,size=16m", &small_path]);
    rig.vireo(&["resume", "deb"]).ok();
    terminal.expect("\r\nwritten=0\r\n", SOON);
    assert_eq!(rig.state("deb"), "running (unpaused)");
    assert!(
        rig.vireo(&["domblkerror", "deb"])
            .ok()
            .contains("No errors found")
    );

    let_the_watchdog_bark(&mut terminal);
    rig.wait_state("deb", "paused (watchdog)", SOON);
    events.expect("event 'watchdog' for domain 'deb': pause", SOON);
    rig.vireo(&["destroy", "deb"]).ok();
}

/// Starts the guest's watchdog and does not feed it. Debian's kernel for clouds has no driver for it.
fn let_the_watchdog_bark(terminal: &mut Terminal) {
    for line in [
        "d=$(dirname $(grep -l 0x25ab /sys/bus/pci/devices/*/device)); echo 1 >$d/enable",
        "bar=$(cut -d' ' -f1 $d/resource | head -n 1)",
        "u() { devmem $((bar+12)) 16 0x80; devmem $((bar+12)) 16 0x86; }",
        "u; devmem $bar 32 512; u; devmem $((bar+4)) 32 512",
    ] {
        shell(terminal, line);
    }
    terminal.send("printf '\\002' | dd of=$d/config bs=1 seek=104 conv=notrunc 2>/dev/null\r");
}

/// A daemon in a network namespace of its own, with a bridge and a pair of veth in it.
struct Net<'a>(&'a Rig);

impl Net<'_> {
    fn vireo(&self, args: &[&str]) -> Run {
        self.0.vireo(args)
    }

    /// A command in the namespace: the daemon's.
    fn inside(&self, args: &[&str]) -> std::process::Output {
        let daemon = self.0.processes("vireod")[0].to_string();
        Command::new("nsenter")
            .args(["-t", &daemon, "-n", "--"])
            .args(args)
            .output()
            .unwrap()
    }
}

#[test]
fn linux_talks_over_a_bridge_and_a_macvtap_in_a_namespace() {
    for program in ["ip", "unshare", "nsenter", "ping"] {
        if !which(program) {
            return left_out(&format!("needs {program}"));
        }
    }
    if !root() {
        return left_out("needs root (network namespaces)");
    }
    let rig = Rig::new();
    // The first command starts the daemon, which stays in this command's namespace.
    let ours = rig.command("vireo");
    let mut first = Command::new("unshare");
    first.args(["--net", "--mount", "--", "sh", "-ec"]);
    first.arg(
        // /sys shows the namespace of who mounted it.
        "mount -t sysfs sysfs /sys; ip link set lo up; ip link add br0 type bridge; ip link set br0 up; \
         ip addr add 10.77.1.1/24 dev br0; ip link add v0 type veth peer name v1; \
         ip link set v0 up; ip link set v1 up; ip addr add 10.77.2.1/24 dev v1; \
         ip tuntap add mode tap multi_queue name mq0; ip addr add 10.77.3.1/24 dev mq0; ip link set mq0 up; exec \"$@\"",
    );
    first.arg("sh").arg(ours.get_program()).arg("list");
    for (key, value) in ours.get_envs() {
        match value {
            Some(value) => first.env(key, value),
            None => first.env_remove(key),
        };
    }
    let output = first.output().unwrap();
    if !output.status.success() {
        return left_out(&format!(
            "needs bridges and veth: {}",
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    let net = Net(&rig);
    rig.define(&with(
        &linux_guest("deb", Kernel::V6_1).replace("<vcpu>1<", "<vcpu>2<"),
        "<interface type='bridge'><mac address='52:54:00:77:01:02'/><source bridge='br0'/><mtu size='1400'/>\
         <model type='virtio'/><driver queues='2'/><filterref filter='no-mac-spoofing'/></interface>\
         <interface type='direct'><mac address='52:54:00:77:02:02'/><source dev='v0' mode='bridge'/></interface>\
         <interface type='ethernet'><mac address='52:54:00:77:03:02'/><target dev='mq0' managed='no'/></interface>\
         <watchdog model='i6300esb' action='dump'/>",
    ));
    let mut terminal = Terminal::start(rig.command("vireo").args(["start", "deb", "--console"]));
    terminal.expect("deb:/root# ", BOOT);
    for line in [
        "ip addr add 10.77.1.2/24 dev eth0; ip link set eth0 up",
        "ip addr add 10.77.2.2/24 dev eth1; ip link set eth1 up",
        "ip addr add 10.77.3.2/24 dev eth2; ip link set eth2 up",
    ] {
        shell(&mut terminal, line);
    }
    let links = shell(&mut terminal, "cat /sys/class/net/eth0/mtu");
    assert!(links.contains("1400\r\n"), "{links}");
    let queues = shell(&mut terminal, "ls /sys/class/net/eth0/queues | wc -l");
    assert!(queues.contains("4\r\n"), "{queues}");
    for host in ["10.77.1.1", "10.77.2.1", "10.77.3.1"] {
        let pings = shell(&mut terminal, &format!("ping -c 3 -W 20 {host}"));
        assert!(pings.contains(" 0% packet loss"), "{pings}");
    }
    for guest in ["10.77.1.2", "10.77.2.2", "10.77.3.2"] {
        let pings = net.inside(&["ping", "-c", "2", "-W", "20", guest]);
        assert!(pings.status.success(), "{pings:?}");
    }
    // Under an address that is not the card's it is not heard.
    let pings = shell(
        &mut terminal,
        "ip link set eth0 address 52:54:00:77:ff:ff; ping -c 2 -W 3 10.77.1.1",
    );
    assert!(pings.contains(" 100% packet loss"), "{pings}");
    let pings = shell(
        &mut terminal,
        "ip link set eth0 address 52:54:00:77:01:02; ping -c 3 -W 20 10.77.1.1",
    );
    assert!(pings.contains(" 0% packet loss"), "{pings}");
    let interfaces = net.vireo(&["domiflist", "deb"]).ok();
    let words: Vec<&str> = interfaces.split_whitespace().collect();
    let card = ["bridge", "br0", "virtio", "52:54:00:77:01:02"];
    assert!(words.windows(4).any(|part| part == card), "{interfaces}");
    let tap = interfaces
        .lines()
        .find_map(|line| {
            line.contains("br0")
                .then(|| line.split_whitespace().next())?
        })
        .unwrap()
        .to_owned();
    let stats = net.vireo(&["domifstat", "deb", &tap]).ok();
    assert!(stats.contains(&format!("{tap} rx_bytes ")), "{stats}");
    let addresses = net.vireo(&["domifaddr", "deb", "--source", "arp"]).ok();
    assert!(addresses.contains("10.77.1.2"), "{addresses}");

    // The guest is dumped, and goes on.
    let_the_watchdog_bark(&mut terminal);
    let dump = eventually("the watchdog's dump", || {
        std::fs::read_dir(rig.path("var/lib/vireo/dump"))
            .ok()?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .find(|name| name.starts_with("deb-"))
    });
    rig.wait_state("deb", "running (unpaused)", SOON);
    let dump = std::fs::read(rig.path("var/lib/vireo/dump").join(dump)).unwrap();
    assert_eq!(&dump[..4], b"\x7fELF");

    terminal.send("\rpoweroff -f\r");
    rig.wait_state("deb", "shut off (shutdown)", SOON);
    // Nothing of it stays: the bridge has no port, the veth no macvtap.
    eventually("the tap and the macvtap are taken away", || {
        let links = net.inside(&["ip", "-o", "link"]);
        let links = String::from_utf8_lossy(&links.stdout).into_owned();
        assert!(links.contains("br0"), "{links}");
        (!links.contains(&format!("{tap}:")) && !links.contains("macvtap")).then_some(links)
    });
}

/// Devices of the host that come and go are told of, to whoever listens by then.
#[test]
fn devices_of_the_host_are_told_of() {
    if let Err(needs) = namespace::enter() {
        return left_out(&needs);
    }
    let rig = Rig::new();
    rig.vireo(&["list"]).ok();
    let clients = [
        Some(rig.command("vireo")),
        which("virsh").then(|| rig.virsh_command()),
    ];
    for mut client in clients.into_iter().flatten() {
        let mut events =
            Terminal::start(client.args(["nodedev-event", "--event", "lifecycle", "--loop"]));
        // When it is registered is not to be seen: a device comes and goes until it was.
        let heard = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // A new thread is in the same namespace.
                let deadline = Instant::now() + SOON;
                while !heard.load(Ordering::Relaxed) && Instant::now() < deadline {
                    namespace::ip("link add vrevents type bridge");
                    std::thread::sleep(Duration::from_millis(300));
                    namespace::ip("link del vrevents");
                    std::thread::sleep(Duration::from_millis(300));
                }
            });
            events.expect("event 'lifecycle' for node device net_vrevents_", SOON);
            events.expect("Created", SOON);
            events.expect("event 'lifecycle' for node device net_vrevents_", SOON);
            events.expect("Deleted", SOON);
            heard.store(true, Ordering::Relaxed);
        });
    }
}
