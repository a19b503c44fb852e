//! A card on a tap device in a network namespace of the test's own.

use std::ffi::c_short;
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::*;

nix::ioctl_write_ptr_bad!(set_interface, 0x4004_54ca, libc::ifreq);
nix::ioctl_readwrite_bad!(get_index, libc::SIOCGIFINDEX, libc::ifreq);
nix::ioctl_write_ptr_bad!(set_flags, libc::SIOCSIFFLAGS, libc::ifreq);

const NAME: &[u8] = b"tap0";

fn request() -> libc::ifreq {
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME) {
        *to = from.cast_signed();
    }
    request
}

/// `count` queues of a new tap, and a packet socket on it. In the calling thread's namespace.
fn tap(count: usize) -> std::io::Result<(Vec<OwnedFd>, OwnedFd)> {
    // SAFETY: changes only this thread's network namespace.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let mut queues = Vec::new();
    for _ in 0..count {
        let fd = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        let mut request = request();
        let multi = if count > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi) as c_short;
        // SAFETY: an open descriptor and a whole ifreq.
        unsafe { set_interface(fd.as_raw_fd(), &raw const request) }?;
        queues.push(fd.into());
    }
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: makes a new socket that nobody else owns.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(protocol));
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let mut request = request();
    // SAFETY: an open descriptor and a whole ifreq.
    unsafe { get_index(socket.as_raw_fd(), &raw mut request) }?;
    // SAFETY: the kernel has filled it in; all zeroes is a valid address.
    let address = unsafe {
        libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: protocol,
            sll_ifindex: request.ifr_ifru.ifru_ifindex,
            ..std::mem::zeroed()
        }
    };
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as c_short;
    // SAFETY: an open descriptor and a whole ifreq.
    unsafe { set_flags(socket.as_raw_fd(), &raw const request) }?;
    // SAFETY: the address is whole and its size is right.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as u32,
        )
    };
    if bound != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let limit = libc::timeval {
        tv_sec: 20,
        tv_usec: 0,
    };
    // SAFETY: an open descriptor and a whole timeval.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const limit).cast(),
            size_of_val(&limit) as u32,
        )
    };
    Ok((queues, socket))
}

/// Runs a test in a thread with a namespace of its own, if that can be had.
fn with_tap(count: usize, test: impl FnOnce(Vec<OwnedFd>, OwnedFd) + Send + 'static) {
    let thread = std::thread::spawn(move || match tap(count) {
        Ok((queues, socket)) => test(queues, socket),
        Err(error) => {
            println!("left out: a network card on a tap needs root and /dev/net/tun ({error})");
        }
    });
    thread.join().unwrap();
}

/// The next frame of ours on the wire: the kernel sends some of its own.
fn next(socket: &OwnedFd) -> Vec<u8> {
    let mut buffer = vec![0; 70_000];
    loop {
        let len = nix::unistd::read(socket, &mut buffer).unwrap();
        if buffer[6..12] == MAC {
            buffer.truncate(len);
            return buffer;
        }
    }
}

fn card(queues: Vec<OwnedFd>) -> (Net, Driver) {
    let backends = queues
        .into_iter()
        .map(|fd| Box::new(Tap::new(fd).unwrap()) as Box<dyn Backend>)
        .collect();
    let mut net = Net::new(options(), backends).unwrap();
    let features = net.features() | feature::TRANSPORT;
    let mut driver = Driver::new(&net.queue_sizes(), features);
    net.activate(driver.activation()).unwrap();
    (net, driver)
}

/// A TCP segment with its checksum left to the card.
fn segment(payload: usize) -> Vec<u8> {
    let mut frame = frame(OTHER, MAC, 14);
    let total = (40 + payload) as u16;
    let mut ip = vec![
        0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ];
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    let sum: u32 = ip
        .chunks(2)
        .map(|c| u32::from(u16::from_be_bytes([c[0], c[1]])))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(ip);
    frame.extend([
        0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
    ]);
    frame.extend((0..payload).map(|i| i as u8));
    frame
}

#[test]
fn frames_go_both_ways_through_a_tap() {
    with_tap(1, |queues, socket| {
        let (mut net, mut driver) = card(queues);
        assert_eq!(net.features() & f::OFFLOADS, f::OFFLOADS);
        let sent = frame(OTHER, MAC, 1514);
        driver.request(1, &[&[0; HEADER], &sent], &[]);
        assert_eq!(next(&socket), sent);

        for _ in 0..64 {
            driver.add(0, &[], &[1530]);
        }
        driver.kick(0);
        let wanted = frame(MAC, MAC, 1000);
        nix::unistd::write(&socket, &wanted).unwrap();
        loop {
            let used = driver.wait(0);
            let got = &used.data[HEADER..used.len as usize];
            if got == wanted {
                assert_eq!(used.data[10..12], [1, 0], "num_buffers");
                break;
            }
        }
        net.pause();
        assert_eq!(driver.ram.unreported(), [0; 0]);
    });
}

#[test]
fn a_large_segment_goes_out_whole() {
    with_tap(1, |queues, socket| {
        let (net, mut driver) = card(queues);
        let sent = segment(20_000);
        let mut header = [0; HEADER];
        // Checksum needed, TCP/IPv4, headers 54, segments of 1000; checksum at 34 + 16.
        header[..10].copy_from_slice(&[1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0]);
        driver.request(1, &[&header, &sent], &[]);
        assert_eq!(next(&socket).len(), sent.len());
        // A header that makes no sense is the kernel's to refuse.
        header[8] = 0xff;
        header[9] = 0xff;
        driver.request(1, &[&header, &sent], &[]);
        assert_eq!(net.handle().stats().tx_errors, 1);
    });
}

#[test]
fn unused_queues_of_a_tap_are_detached() {
    with_tap(2, |queues, socket| {
        let (mut net, mut driver) = card(queues);
        for queue in [0, 2] {
            for _ in 0..200 {
                driver.add(queue, &[], &[1530]);
            }
            driver.kick(queue);
        }
        let wanted = |i: u8| {
            let mut frame = frame(MAC, MAC, 100);
            frame[26..34].fill(i);
            frame
        };
        // One pair: everything must come there, whatever flow it belongs to.
        for i in 0..50 {
            nix::unistd::write(&socket, &wanted(i)).unwrap();
        }
        let mut seen = 0;
        while seen < 50 {
            let used = driver.wait(0);
            seen += usize::from(used.data[HEADER + 6..HEADER + 12] == MAC);
        }
        assert!(driver.used(2).is_none());
        // Two pairs, then one again, then a reset and two again: no refusal of the kernel's.
        for pairs in [2, 1, 2] {
            assert_eq!(driver.request(4, &[&[4, 0, pairs, 0]], &[1]).data, [0]);
        }
        net.reset();
        driver.reset();
        net.activate(driver.activation()).unwrap();
        assert_eq!(driver.request(4, &[&[4, 0, 2, 0]], &[1]).data, [0]);
    });
}

#[test]
fn a_tap_without_headers_is_refused() {
    let (fd, _other) = nix::unistd::pipe().unwrap();
    assert!(Tap::new(fd).is_err());
}
