//! A network's addresses and names: dnsmasq, with a configuration file as libvirt writes it.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use xml_schemas::Network;
use xml_schemas::network::{DhcpHost, ForwardMode, Ip, Lease, mac_text};

use super::program::{self, Running};
use super::{cannot, error, unsupported};
use crate::error::{ErrorCode, Result};
use crate::files::{self, Durability};
use crate::vmm_process::{self, Identity};

/// How long it may take until it serves.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long it may take to end by itself.
const END_GRACE: Duration = Duration::from_secs(2);

/// Where one network's dnsmasq has its files.
#[derive(Debug, Clone)]
pub struct Place {
    /// Its configuration, hosts and process id: readable for dnsmasq when it is nobody.
    pub folder: PathBuf,
    /// Its leases, which outlive the network.
    pub leases: PathBuf,
}

impl Place {
    /// The configuration.
    fn config(&self) -> PathBuf {
        self.folder.join("dnsmasq.conf")
    }

    fn hosts(&self) -> PathBuf {
        self.folder.join("hostsfile")
    }

    fn names(&self) -> PathBuf {
        self.folder.join("addnhosts")
    }

    fn pid(&self) -> PathBuf {
        self.folder.join("dnsmasq.pid")
    }

    fn words(&self) -> PathBuf {
        self.folder.join("dnsmasq.err")
    }
}

/// Whether a network needs one.
pub fn needed(network: &Network) -> bool {
    let serves = network.dns.enable != Some(false)
        || network
            .ips
            .iter()
            .any(|ip| ip.has_dhcp() || ip.address.is_ipv6());
    network.forward.mode.has_own_bridge() && !network.ips.is_empty() && serves
}

/// Writes all files.
///
/// # Errors
/// The system's.
pub fn write(place: &Place, network: &Network) -> Result<()> {
    write_hosts(place, network)?;
    put(&place.config(), &config(place, network), 0o600)
}

/// Writes what a running dnsmasq reads again when it is told to.
fn write_hosts(place: &Place, network: &Network) -> Result<()> {
    put(&place.hosts(), &hosts(network), 0o644)?;
    put(&place.names(), &names(network), 0o644)
}

fn put(path: &Path, text: &str, mode: u32) -> Result<()> {
    files::write_atomically(path, text.as_bytes(), Durability::Process)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .map_err(|e| cannot(format!("cannot write {}", path.display()), &e))
}

/// Starts it, and waits until it serves.
///
/// # Errors
/// It is missing, says no, or does not come up in time.
pub fn start(place: &Place) -> Result<Identity> {
    let path = program::find("dnsmasq")?;
    let name = format!(
        "{} --conf-file={}",
        path.display(),
        place.config().display()
    );
    let failed = |e: &std::io::Error| cannot("cannot start dnsmasq", e);
    files::remove_if_there(&place.pid()).map_err(|e| failed(&e))?;
    // A file: the daemon it becomes may keep it open.
    let words = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(place.words())
        .map_err(|e| failed(&e))?;
    let mut command = Command::new(&path);
    command
        .arg(format!("--conf-file={}", place.config().display()))
        .current_dir("/")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(words);
    // SAFETY: between fork and exec: system calls with numbers and a structure on the stack.
    unsafe {
        command.pre_exec(|| {
            // Ours is as high as the host allows, and some programs close every number below it.
            let mut limit: libc::rlimit = std::mem::zeroed();
            if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
                limit.rlim_cur = limit.rlim_max.min(1024);
                libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
            }
            Ok(())
        });
    }
    // What we start ends when the daemon that it becomes serves, or cannot.
    let mut running = Running::start(&mut command).map_err(|e| failed(&e))?;
    let timely = running.ends_within(START_LIMIT);
    if !timely {
        if let Err(error) = running.child.kill() {
            log::error!("cannot kill dnsmasq: {error}");
        }
        // It may have forked already.
        stop_unknown(place);
    }
    let status = running.child.wait().map_err(|e| failed(&e))?;
    if !timely {
        return Err(error(
            ErrorCode::OPERATION_TIMEOUT,
            format!(
                "dnsmasq did not come up within {} seconds",
                START_LIMIT.as_secs()
            ),
        ));
    }
    if !status.success() {
        let words = fs::read_to_string(place.words()).unwrap_or_default();
        return Err(program::failed(&name, &status, &words));
    }
    noted(place).and_then(Identity::of).ok_or_else(|| {
        error(
            ErrorCode::INTERNAL_ERROR,
            "dnsmasq ended as soon as it had come up",
        )
    })
}

/// The process id that it has written.
fn noted(place: &Place) -> Option<u32> {
    fs::read_to_string(place.pid()).ok()?.trim().parse().ok()
}

/// Whether it still runs.
pub fn runs(identity: Identity) -> bool {
    match vmm_process::find(identity) {
        Ok(Some(process)) => !process.has_ended(),
        Ok(None) => false,
        Err(error) => {
            log::error!("cannot look for process {}: {error}", identity.pid);
            false
        }
    }
}

/// Ends it.
///
/// # Errors
/// The system's; it does not end.
pub fn stop(identity: Identity) -> Result<()> {
    let ended = match vmm_process::find(identity) {
        Ok(Some(process)) => process.end(END_GRACE),
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    ended.map_err(|e| cannot(format!("cannot end dnsmasq (process {})", identity.pid), &e))
}

/// Ends one that was started but not noted: the process that its file names, if it is ours.
pub fn stop_unknown(place: &Place) {
    let Some(identity) = noted(place).and_then(Identity::of) else {
        return;
    };
    let wanted = format!("--conf-file={}", place.config().display());
    let is_ours = fs::read(format!("/proc/{}/cmdline", identity.pid)).is_ok_and(|line| {
        line.split(|&b| b == 0)
            .any(|word| word == wanted.as_bytes())
    });
    if is_ours && let Err(error) = stop(identity) {
        log::error!("{error}");
    }
}

/// Has a running one read its hosts and names again; starts one if it has ended meanwhile.
///
/// # Errors
/// The system's; as [`start`].
pub fn reload(place: &Place, network: &Network, identity: Identity) -> Result<Identity> {
    write(place, network)?;
    let told = match vmm_process::find(identity) {
        Ok(Some(process)) if !process.has_ended() => process.signal(libc::SIGHUP),
        Ok(_) => Err(std::io::Error::from_raw_os_error(libc::ESRCH)),
        Err(error) => Err(error),
    };
    match told {
        Ok(()) => Ok(identity),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
            log::warn!(
                "network '{}': its dnsmasq is gone, and started again",
                network.name
            );
            start(place)
        }
        Err(error) => Err(cannot(
            format!("cannot tell dnsmasq (process {})", identity.pid),
            &error,
        )),
    }
}

fn expiry(lease: Option<Lease>) -> String {
    match lease {
        None => String::new(),
        Some(lease) if lease.expiry == 0 => ",infinite".to_owned(),
        Some(lease) => format!(",{}", lease.seconds()),
    }
}

/// `dhcp-hostsfile`
fn hosts(network: &Network) -> String {
    let mut text = String::new();
    for ip in &network.ips {
        for host in &ip.hosts {
            text.push_str(&host_line(ip, host));
            text.push('\n');
        }
    }
    text
}

fn host_line(ip: &Ip, host: &DhcpHost) -> String {
    let mut words = Vec::new();
    words.extend(host.mac.map(mac_text));
    words.extend(host.id.as_ref().map(|id| format!("id:{id}")));
    if ip.address.is_ipv6() {
        words.extend(host.name.clone());
        words.extend(host.address.map(|address| format!("[{address}]")));
    } else if host.mac.is_none() && host.id.is_none() {
        words.extend(host.name.clone());
        words.extend(host.address.map(|address| address.to_string()));
    } else {
        words.extend(host.address.map(|address| address.to_string()));
        words.extend(host.name.clone());
    }
    words.join(",") + &expiry(host.lease)
}

/// `addn-hosts`
fn names(network: &Network) -> String {
    let mut text = String::new();
    for host in &network.dns.hosts {
        let Some(address) = host.address else {
            continue;
        };
        let _ = writeln!(text, "{address}\t{}\t", host.names.join("\t"));
    }
    text
}

/// Whether what a network asks of its dnsmasq can be said to one.
///
/// # Errors
/// VIR_ERR_CONFIG_UNSUPPORTED: the zone of a subnet's addresses whose prefix ends within a label.
pub fn check(network: &Network) -> Result<()> {
    let mut asked = network.ips.iter().filter(|ip| ip.local_ptr == Some(true));
    match asked.find(|ip| reverse_zone(ip).is_none()) {
        None => Ok(()),
        Some(ip) => Err(unsupported(format!(
            "PTR domain for {} network with prefix {} cannot be automatically created",
            if ip.address.is_ipv6() { "IPv6" } else { "IPv4" },
            ip.subnet().map_or(0, |subnet| subnet.prefix)
        ))),
    }
}

/// `192.168.122.0/24` backwards, as names of addresses are.
fn reverse_zone(ip: &Ip) -> Option<String> {
    let subnet = ip.subnet()?;
    match (subnet.network(), subnet.prefix) {
        (IpAddr::V4(a), 8 | 16 | 24) => {
            let bytes = a.octets();
            let count = usize::from(subnet.prefix / 8);
            let labels: Vec<String> = bytes[..count].iter().rev().map(u8::to_string).collect();
            Some(format!("{}.in-addr.arpa", labels.join(".")))
        }
        (IpAddr::V6(a), prefix) if prefix > 0 && prefix % 4 == 0 => {
            let digits = format!("{:032x}", a.to_bits());
            let labels: Vec<String> = digits[..usize::from(prefix / 4)]
                .chars()
                .rev()
                .map(String::from)
                .collect();
            Some(format!("{}.ip6.arpa", labels.join(".")))
        }
        _ => None,
    }
}

/// Lines of a configuration.
struct Lines(String);

impl Lines {
    fn add(&mut self, line: impl std::fmt::Display) {
        let _ = writeln!(self.0, "{line}");
    }
}

fn config(place: &Place, network: &Network) -> String {
    let mut lines = Lines(format!(
        "##WARNING:  THIS IS AN AUTO-GENERATED FILE. CHANGES TO IT ARE LIKELY TO BE\n\
         ##OVERWRITTEN AND LOST.  Changes to this configuration should be made using:\n\
         ##    vireo net-edit {}\n\
         ## or other application using the libvirt API.\n##\n\
         ## dnsmasq conf file created by vireo\n",
        network.name
    ));
    lines.add("strict-order");
    dns(&mut lines, network);
    lines.add(format_args!("pid-file={}", place.pid().display()));
    lines.add("except-interface=lo");
    lines.add("bind-dynamic");
    lines.add(format_args!(
        "interface={}",
        network.bridge.as_deref().unwrap_or_default()
    ));
    if network.forward.mode == ForwardMode::None {
        // No way out: no router, and nobody to ask.
        lines.add("dhcp-option=3");
        lines.add("no-resolv");
        lines.add("ra-param=*,0,0");
    }
    for (name, value) in &network.dns.txts {
        lines.add(format_args!("txt-record={name},{value}"));
    }
    for srv in &network.dns.srvs {
        let mut line = format!("srv-host=_{}._{}", srv.service, srv.protocol);
        if let Some(domain) = &srv.domain {
            let _ = write!(line, ".{domain}");
        }
        if let Some(target) = &srv.target {
            let _ = write!(line, ",{target}");
            let numbers = [srv.port, srv.priority, srv.weight];
            let stated = numbers
                .iter()
                .rposition(Option::is_some)
                .map_or(0, |at| at + 1);
            for (at, number) in numbers[..stated].iter().enumerate() {
                // dnsmasq's own default for a port that is left out is 1.
                let number = number.unwrap_or(if at == 0 { 1 } else { 0 });
                let _ = write!(line, ",{number}");
            }
        }
        lines.add(line);
    }
    dhcp(&mut lines, place, network);
    for option in &network.dnsmasq_options {
        lines.add(option);
    }
    lines.0
}

fn dns(lines: &mut Lines, network: &Network) {
    let dns = &network.dns;
    if dns.forwarders.iter().any(|f| f.domain.is_none()) {
        lines.add("no-resolv");
    }
    for forwarder in &dns.forwarders {
        let domain = forwarder
            .domain
            .as_ref()
            .map_or_else(String::new, |d| format!("/{d}/"));
        let server = forwarder
            .address
            .map_or_else(|| "#".to_owned(), |a| a.to_string());
        lines.add(format_args!("server={domain}{server}"));
    }
    let domain = network.domain.as_ref();
    if let Some(name) = domain.and_then(|d| d.name.as_ref()) {
        if domain.is_some_and(|d| d.local_only == Some(true)) {
            lines.add(format_args!("local=/{name}/"));
        }
        lines.add(format_args!("domain={name}"));
        lines.add("expand-hosts");
    }
    for ip in network.ips.iter().filter(|ip| ip.local_ptr == Some(true)) {
        // Checked before the start.
        if let Some(zone) = reverse_zone(ip) {
            lines.add(format_args!("local=/{zone}/"));
        }
    }
    if dns.forward_plain_names == Some(false) {
        lines.add("domain-needed");
        lines.add("local=//");
    }
    if dns.enable == Some(false) {
        lines.add("port=0");
    }
}

fn dhcp(lines: &mut Lines, place: &Place, network: &Network) {
    let dns = network.dns.enable != Some(false);
    let with_dhcp = |v6: bool| {
        let found = network
            .ips
            .iter()
            .find(|ip| ip.address.is_ipv6() == v6 && ip.has_dhcp());
        found.or_else(|| {
            network
                .ips
                .iter()
                .find(|ip| ip.address.is_ipv6() == v6 && ip.bootp.is_some())
        })
    };
    let mut leases: u64 = 0;
    let v4 = with_dhcp(false);
    let v6 = with_dhcp(true);
    for ip in [v4, v6].into_iter().flatten() {
        let Some(subnet) = ip.subnet() else { continue };
        let size = if ip.address.is_ipv6() {
            subnet.prefix.to_string()
        } else {
            subnet.netmask().to_string()
        };
        for range in &ip.ranges {
            lines.add(format_args!(
                "dhcp-range={},{},{size}{}",
                range.start,
                range.end,
                expiry(range.lease)
            ));
            leases = leases.saturating_add(u64::from(range.size()));
        }
        if ip.ranges.is_empty() && !ip.hosts.is_empty() {
            lines.add(format_args!(
                "dhcp-range={},static{}",
                ip.address,
                if ip.address.is_ipv6() { ",64" } else { "" }
            ));
        }
        if ip.address.is_ipv4() {
            lines.add("dhcp-no-override");
            lines.add("dhcp-authoritative");
        }
    }
    for ip in &network.ips {
        if let Some(root) = &ip.tftp_root {
            lines.add("enable-tftp");
            lines.add(format_args!("tftp-root={root}"));
        }
    }
    if let Some((file, server)) = v4.and_then(|ip| ip.bootp.as_ref()) {
        match server {
            Some(server) => lines.add(format_args!("dhcp-boot={file},,{server}")),
            None => lines.add(format_args!("dhcp-boot={file}")),
        }
    }
    if v4.is_some() || v6.is_some() {
        if leases > 0 {
            lines.add(format_args!("dhcp-lease-max={}", leases.min(1 << 30)));
        }
        lines.add(format_args!("dhcp-hostsfile={}", place.hosts().display()));
        lines.add(format_args!("dhcp-leasefile={}", place.leases.display()));
        if let Some(mtu) = network.mtu.filter(|_| v4.is_some()) {
            lines.add(format_args!("dhcp-option=option:mtu,{mtu}"));
        }
    }
    // Without DNS there is nothing that names are for.
    if dns {
        lines.add(format_args!("addn-hosts={}", place.names().display()));
    }
    if v6.is_some() {
        lines.add("enable-ra");
    } else {
        for ip in network.ips.iter().filter(|ip| ip.address.is_ipv6()) {
            lines.add(format_args!("dhcp-range={},ra-only", ip.address));
        }
    }
}

#[cfg(test)]
mod tests {
    use xml_schemas::Validation;

    use super::*;

    fn place() -> Place {
        Place {
            folder: "/f".into(),
            leases: "/l".into(),
        }
    }

    fn of(inside: &str) -> String {
        let text = format!("<network><name>n</name><bridge name='br9'/>{inside}</network>");
        let network = Network::parse(&text, Validation::Lenient).unwrap();
        let all = config(&place(), &network);
        let lines: Vec<&str> = all.lines().filter(|l| !l.starts_with("##")).collect();
        format!(
            "{}\n{}{}",
            lines.join("\n"),
            hosts(&network),
            names(&network)
        )
    }

    /// Held against what libvirt 9.0 writes for the same networks.
    #[test]
    fn the_configuration_is_libvirts() {
        let isolated = of("<ip address='192.168.60.1' netmask='255.255.255.0'><dhcp>\
                           <range start='192.168.60.10' end='192.168.60.20'/></dhcp></ip>");
        assert_eq!(
            isolated,
            "strict-order\npid-file=/f/dnsmasq.pid\nexcept-interface=lo\nbind-dynamic\ninterface=br9\n\
             dhcp-option=3\nno-resolv\nra-param=*,0,0\ndhcp-range=192.168.60.10,192.168.60.20,255.255.255.0\n\
             dhcp-no-override\ndhcp-authoritative\ndhcp-lease-max=11\ndhcp-hostsfile=/f/hostsfile\n\
             dhcp-leasefile=/l\naddn-hosts=/f/addnhosts\n"
        );
        let named = of("<forward/><domain name='lab' localOnly='yes'/>\
             <dns forwardPlainNames='no'><forwarder addr='8.8.8.8'/><forwarder domain='x.org' addr='9.9.9.9'/>\
             <forwarder domain='y.org'/><txt name='t' value='a b'/>\
             <srv service='ldap' protocol='tcp' domain='d' target='t' port='389'/>\
             <host ip='192.168.63.5'><hostname>stat</hostname><hostname>s2</hostname></host></dns>\
             <ip address='192.168.63.1' prefix='24' localPtr='yes'><dhcp>\
             <host mac='52:54:00:00:00:01' name='foo' ip='192.168.63.9'><lease expiry='0'/></host>\
             <host name='only' ip='192.168.63.8'/><bootp file='pxe.0' server='192.168.63.2'/></dhcp></ip>");
        for line in [
            "no-resolv\nserver=8.8.8.8\nserver=/x.org/9.9.9.9\nserver=/y.org/#\nlocal=/lab/\ndomain=lab\nexpand-hosts\n\
             local=/63.168.192.in-addr.arpa/\ndomain-needed\n",
            "\ntxt-record=t,a b\nsrv-host=_ldap._tcp.d,t,389\n",
            "\ndhcp-range=192.168.63.1,static\n",
            "\ndhcp-boot=pxe.0,,192.168.63.2\n",
            "\n52:54:00:00:00:01,192.168.63.9,foo,infinite\nonly,192.168.63.8\n192.168.63.5\tstat\ts2\t\n",
        ] {
            assert!(named.contains(line), "no {line:?} in {named}");
        }
        let v6 = of(
            "<forward mode='route'/><ip family='ipv6' address='fd00:abce::1' prefix='64'><dhcp>\
             <range start='fd00:abce::10' end='fd00:abce::20'/>\
             <host id='0:4:7e' name='p' ip='fd00:abce::30'/></dhcp></ip>",
        );
        for line in [
            "\ndhcp-range=fd00:abce::10,fd00:abce::20,64\ndhcp-lease-max=17\n",
            "\nenable-ra\n",
            "id:0:4:7e,p,[fd00:abce::30]\n",
        ] {
            assert!(v6.contains(line), "no {line:?} in {v6}");
        }
        let ra = of("<forward mode='route'/><ip family='ipv6' address='fd00::1' prefix='64'/>");
        assert!(ra.contains("\ndhcp-range=fd00::1,ra-only\n"), "{ra}");
        assert!(!ra.contains("enable-ra"));
    }
}
