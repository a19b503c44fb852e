mod contract;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::connection::BUFFER;
use super::packet::{HEADER, HOST_CID, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::*;
use crate::feature;
use crate::testing::{Driver, LIMIT, Random};

const CID: u64 = 7;
const ROOM: u32 = 64 << 10;

/// A folder that goes when the test does.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vireo-vsock-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

struct Rig {
    vsock: Vsock,
    driver: Driver,
    folder: Folder,
}

fn device(folder: &Path) -> Vsock {
    let path = folder.join("in");
    // A device before this one may have had it.
    let _ = std::fs::remove_file(&path);
    Vsock::new(VsockOptions {
        cid: CID as u32,
        listener: Some(UnixListener::bind(path).unwrap().into()),
        prefix: Some(folder.join("out")),
    })
    .unwrap()
}

fn rig() -> Rig {
    let folder = Folder::new();
    let mut vsock = device(&folder.0);
    let mut driver = Driver::new(&vsock.queue_sizes(), F_STREAM | feature::TRANSPORT);
    vsock.activate(driver.activation()).unwrap();
    let mut rig = Rig {
        vsock,
        driver,
        folder,
    };
    rig.post(32);
    rig
}

fn header(host: u32, guest: u32, op: u16) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        kind: TYPE_STREAM,
        op,
        buf_alloc: ROOM,
        ..Header::default()
    }
}

impl Rig {
    fn post(&mut self, count: usize) {
        for _ in 0..count {
            self.driver.add(0, &[], &[HEADER as u32, 4096]);
        }
        self.driver.kick(0);
    }

    /// The guest says something.
    fn say(&mut self, mut header: Header, data: &[u8]) {
        header.len = data.len() as u32;
        self.driver.request(1, &[&header.encode(), data], &[]);
    }

    /// What it hears next.
    fn hear(&mut self) -> (Header, Vec<u8>) {
        let used = self.driver.wait(0);
        self.post(1);
        let (bytes, data) = used.data.split_first_chunk::<HEADER>().unwrap();
        let header = Header::decode(bytes);
        assert_eq!(used.len, HEADER as u32 + header.len);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
        (header, data[..header.len as usize].to_vec())
    }

    fn hear_op(&mut self) -> u16 {
        self.hear().0.op
    }

    /// A program on the host that serves `port`.
    fn serve(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.0.join(format!("out_{port}"))).unwrap()
    }

    /// A host program that connects to the guest's port 99, up to the guest's answer.
    fn dial(&mut self) -> (UnixStream, u32) {
        let mut stream = UnixStream::connect(self.folder.0.join("in")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(b"CONNECT 99\n").unwrap();
        let (asked, _) = self.hear();
        assert_eq!((asked.op, asked.dst_port), (op::REQUEST, 99));
        assert_eq!(asked.buf_alloc, BUFFER);
        (stream, asked.src_port)
    }

    /// The same, accepted.
    fn connected(&mut self) -> (UnixStream, u32) {
        let (mut stream, port) = self.dial();
        self.say(header(port, 99, op::RESPONSE), &[]);
        let mut line = vec![0; format!("OK {port}\n").len()];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(line, format!("OK {port}\n").as_bytes());
        (stream, port)
    }

    /// A connection that the guest began.
    fn accepted(&mut self) -> UnixStream {
        let listener = self.serve(1024);
        self.say(header(1024, 50, op::REQUEST), &[]);
        assert_eq!(self.hear_op(), op::RESPONSE);
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    stream.read_exact(&mut data).unwrap();
    data
}

fn is_closed(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0) | Err(_))
}

#[test]
fn configuration() {
    let rig = rig();
    let mut config = [0xff; 10];
    rig.vsock.read_config(0, &mut config);
    assert_eq!(config, [7, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for cid in [0, 1, 2, u32::MAX] {
        let options = VsockOptions {
            cid,
            listener: None,
            prefix: None,
        };
        assert!(Vsock::new(options).is_err());
    }
}

#[test]
fn a_host_program_talks_to_the_guest() {
    let mut rig = rig();
    let (mut stream, port) = rig.connected();
    stream.write_all(b"hello").unwrap();
    let (data, bytes) = rig.hear();
    assert_eq!((data.op, &bytes[..]), (op::RW, &b"hello"[..]));
    assert_eq!((data.src_port, data.dst_port), (port, 99));
    rig.say(header(port, 99, op::RW), b"hello yourself");
    assert_eq!(read(&mut stream, 14), b"hello yourself");
    drop(stream);
    let (shutdown, _) = rig.hear();
    assert_eq!(shutdown.op, op::SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    rig.say(header(port, 99, op::RST), &[]);
    // It knows nothing of it any more.
    rig.say(header(port, 99, op::RW), b"late");
    assert_eq!(rig.hear_op(), op::RST);
    rig.vsock.pause();
    assert_eq!(rig.driver.ram.unreported(), [0; 0]);
}

#[test]
fn the_guest_talks_to_a_host_program() {
    let mut rig = rig();
    let mut stream = rig.accepted();
    rig.say(header(1024, 50, op::RW), b"ping");
    assert_eq!(read(&mut stream, 4), b"ping");
    stream.write_all(b"pong").unwrap();
    assert_eq!(rig.hear().1, b"pong");
    // The guest ends its direction; the answer still comes.
    let mut end = header(1024, 50, op::SHUTDOWN);
    end.flags = SHUTDOWN_SEND;
    rig.say(end, &[]);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    stream.write_all(b"bye").unwrap();
    assert_eq!(rig.hear().1, b"bye");
    end.flags = SHUTDOWN_RECEIVE;
    rig.say(end, &[]);
    assert_eq!(rig.hear_op(), op::RST);
}

#[test]
fn nobody_there_is_a_reset() {
    let mut rig = rig();
    rig.say(header(9, 50, op::REQUEST), &[]);
    let (reset, _) = rig.hear();
    assert_eq!((reset.op, reset.src_port, reset.dst_port), (op::RST, 9, 50));
    // Another kind of socket, and another machine.
    for (kind, cid) in [(2, HOST_CID), (TYPE_STREAM, 0)] {
        let mut request = header(9, 50, op::REQUEST);
        (request.kind, request.dst_cid) = (kind, cid);
        rig.driver.request(1, &[&request.encode()], &[]);
        let used = rig.driver.wait(0);
        let reset = Header::decode(used.data.first_chunk().unwrap());
        assert_eq!((reset.op, reset.kind, reset.src_cid), (op::RST, kind, cid));
    }
    // A reset is not answered, nor one who calls itself another.
    rig.say(header(9, 50, op::RST), &[]);
    let mut forged = header(9, 50, op::REQUEST);
    forged.src_cid = 8;
    rig.say(forged, &[]);
    rig.say(header(9, 51, op::REQUEST), &[]);
    assert_eq!(rig.hear().0.dst_port, 51);
}

#[test]
fn the_guest_refuses() {
    let mut rig = rig();
    let (mut stream, port) = rig.dial();
    rig.say(header(port, 99, op::RST), &[]);
    assert!(is_closed(&mut stream));
    for nonsense in [
        &b"HELLO\n"[..],
        b"CONNECT x\n",
        b"CONNECT 99999999999\n",
        &[7; 100],
    ] {
        let mut stream = UnixStream::connect(rig.folder.0.join("in")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(nonsense).unwrap();
        assert!(is_closed(&mut stream));
    }
}

#[test]
fn the_host_ends_one_direction() {
    let mut rig = rig();
    let mut stream = rig.accepted();
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rig.hear().1, b"question");
    let (end, _) = rig.hear();
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, SHUTDOWN_SEND));
    rig.say(header(1024, 50, op::RW), b"answer");
    assert_eq!(read(&mut stream, 6), b"answer");
    drop(stream);
    let (end, _) = rig.hear();
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, 3));
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut rig = rig();
    let mut stream = rig.accepted();
    let bytes: Vec<u8> = (0..3 * ROOM).map(|i| (i % 251) as u8).collect();
    let all = bytes.clone();
    let writer = std::thread::spawn(move || {
        stream.write_all(&all).unwrap();
        stream
    });
    let mut got = Vec::new();
    for round in 1..=3 {
        while got.len() < (round * ROOM) as usize {
            let (data, bytes) = rig.hear();
            assert_eq!(data.op, op::RW);
            got.extend(bytes);
        }
        assert_eq!(got.len(), (round * ROOM) as usize);
        assert_eq!(rig.hear_op(), op::CREDIT_REQUEST);
        std::thread::sleep(Duration::from_millis(10));
        assert!(rig.driver.used(0).is_none());
        let mut update = header(1024, 50, op::CREDIT_UPDATE);
        update.fwd_cnt = round * ROOM;
        rig.say(update, &[]);
    }
    assert!(got == bytes);
    writer.join().unwrap();
}

#[test]
fn the_host_keeps_no_more_than_it_said() {
    let mut rig = rig();
    let mut stream = rig.accepted();
    let piece = vec![5; 32 << 10];
    let mut sent = 0_usize;
    // Nobody reads: the socket takes some, the device the rest it has promised.
    let mut forwarded = 0;
    while sent - forwarded as usize + piece.len() <= BUFFER as usize {
        rig.say(header(1024, 50, op::RW), &piece);
        sent += piece.len();
        while let Some(used) = rig.driver.used(0) {
            let update = Header::decode(used.data.first_chunk().unwrap());
            assert_eq!(update.op, op::CREDIT_UPDATE);
            forwarded = update.fwd_cnt;
        }
    }
    let mut ask = header(1024, 50, op::CREDIT_REQUEST);
    ask.fwd_cnt = 0;
    rig.say(ask, &[]);
    while rig.hear().0.op != op::CREDIT_UPDATE {}
    let all = read(&mut stream, sent);
    assert!(all.iter().all(|b| *b == 5));
    let start = Instant::now();
    loop {
        rig.say(ask, &[]);
        let (update, _) = rig.hear();
        if update.fwd_cnt as usize == sent {
            break;
        }
        assert!(start.elapsed() < LIMIT);
    }
    // More than was promised ends the connection.
    for _ in 0..200 {
        rig.say(header(1024, 50, op::RW), &piece);
        if let Some(used) = rig.driver.used(0)
            && Header::decode(used.data.first_chunk().unwrap()).op == op::RST
        {
            return;
        }
    }
    panic!("the device takes everything");
}

#[test]
fn connections_survive_a_pause_but_not_a_move() {
    let mut rig = rig();
    let mut stream = rig.accepted();
    rig.vsock.pause();
    rig.vsock.save().unwrap();
    stream.write_all(b"meanwhile").unwrap();
    rig.vsock.resume();
    assert_eq!(rig.hear().1, b"meanwhile");
    rig.vsock.pause();
    let saved = rig.vsock.save().unwrap();
    let setups: Vec<_> = rig.driver.queues.iter().map(|q| Some(q.setup)).collect();
    rig.vsock = device(&rig.folder.0);
    let activation = rig.driver.reactivation(&setups);
    rig.vsock.load(&saved, Some(activation)).unwrap();
    assert_eq!(rig.vsock.save().unwrap(), saved);
    rig.vsock.resume();
    assert!(is_closed(&mut stream));
    let event = rig.driver.request(2, &[], &[4]);
    assert_eq!((event.len, event.data), (4, vec![0; 4]));
    rig.say(header(1024, 50, op::RW), b"lost");
    assert_eq!(rig.hear_op(), op::RST);
    rig.connected();
}

#[test]
fn after_a_reset_nothing_is_left() {
    let mut rig = rig();
    let mut stream = rig.accepted();
    rig.vsock.reset();
    assert!(is_closed(&mut stream));
    assert_eq!(rig.vsock.muxer.as_ref().unwrap().count(), 0);
    rig.driver.reset();
    rig.vsock.activate(rig.driver.activation()).unwrap();
    rig.post(8);
    rig.connected();
}

#[test]
fn a_guest_that_never_listens_to_answers_is_not_listened_to() {
    let mut rig = rig();
    rig.vsock.reset_queue(0);
    rig.driver.reset_queue(0);
    let request = header(9, 50, op::REQUEST).encode();
    let most = muxer::MOST_RESETS;
    for _ in 0..250 {
        rig.driver.add(1, &[&request], &[]);
    }
    rig.driver.kick(1);
    for _ in 0..250 {
        rig.driver.wait(1);
    }
    for _ in 0..100 {
        rig.driver.add(1, &[&request], &[]);
    }
    rig.driver.kick(1);
    for _ in 0..most - 250 {
        rig.driver.wait(1);
    }
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.driver.used(1).is_none());
    rig.vsock
        .enable_queue(0, rig.driver.queues[0].setup)
        .unwrap();
    rig.post(32);
    for _ in 0..350 {
        assert_eq!(rig.hear_op(), op::RST);
    }
    assert_eq!(rig.driver.in_flight(1), 100 - (most - 250));
}

#[test]
fn only_so_many_connections_at_a_time() {
    let mut rig = rig();
    let listener = rig.serve(1024);
    let mut streams = Vec::new();
    let mut refused = 0;
    for guest in 0..muxer::MOST_CONNECTIONS as u32 + 5 {
        rig.say(header(1024, guest, op::REQUEST), &[]);
        match rig.hear_op() {
            op::RESPONSE => streams.push(listener.accept().unwrap()),
            op::RST => refused += 1,
            other => panic!("{other}"),
        }
    }
    assert_eq!((streams.len(), refused), (muxer::MOST_CONNECTIONS, 5));
    // One from the host waits till there is room.
    let mut stream = UnixStream::connect(rig.folder.0.join("in")).unwrap();
    stream.write_all(b"CONNECT 99\n").unwrap();
    rig.say(header(1024, 0, op::RST), &[]);
    assert_eq!(rig.hear_op(), op::REQUEST);
}

#[test]
fn buffers_and_packets_of_odd_shapes() {
    let mut rig = rig();
    let mut stream = rig.accepted();
    rig.driver.request(1, &[&[1, 2, 3]], &[]);
    rig.driver.request(1, &[], &[100]);
    // Says more data than there is.
    let mut short = header(1024, 50, op::RW);
    short.len = 100;
    rig.driver.request(1, &[&short.encode(), &[0; 99]], &[]);
    assert_eq!(rig.hear_op(), op::RST);
    // Data in more pieces than a system call takes.
    let bytes: Vec<u8> = (0..1020).map(|i| (i % 251) as u8).collect();
    let mut long = header(1024, 50, op::RW);
    long.len = 1020;
    let head = long.encode();
    let mut pieces: Vec<&[u8]> = vec![&head[..20], &head[20..]];
    pieces.extend(bytes.chunks(1));
    rig.driver.add_indirect(1, &pieces, &[]);
    rig.driver.kick(1);
    rig.driver.wait(1);
    assert_eq!(read(&mut stream, 1020), bytes);
    // An operation nobody knows ends the connection.
    rig.say(header(1024, 50, 99), &[]);
    assert_eq!(rig.hear_op(), op::RST);
    assert!(is_closed(&mut stream));
}

#[test]
fn queues_with_anything_in_them() {
    let mut random = Random::new("vsock queues");
    for _ in 0..40 {
        let mut rig = rig();
        let _listener = rig.serve(3);
        for _ in 0..40 {
            if random.once_in(2) {
                let queue = random.below(3) as usize;
                rig.driver.scramble(queue, &mut random);
                continue;
            }
            // A header that is nearly right.
            let mut header = header(random.below(5) as u32, random.below(3) as u32, 0);
            header.op = random.below(9) as u16;
            header.flags = random.below(5) as u32;
            header.len = random.pick(&[0, 1, 10, 4096, u32::MAX]);
            header.buf_alloc = random.pick(&[0, 1, ROOM, u32::MAX]);
            header.fwd_cnt = random.next() as u32;
            let at = rig.driver.alloc(256);
            rig.driver.ram.write(at, &header.encode());
            rig.driver.write_descriptor(1, 0, at, 256, 0, 0);
            rig.driver.offer(1, 0);
            rig.driver.ring(1);
            if random.once_in(4) {
                let mut stream = UnixStream::connect(rig.folder.0.join("in")).unwrap();
                let line = format!("CONNECT {}\ndata", random.below(3));
                stream.write_all(line.as_bytes()).unwrap();
            }
        }
        rig.vsock.pause();
        rig.vsock.save().unwrap();
        rig.vsock.resume();
        rig.vsock.reset();
        rig.driver.reset();
        rig.vsock.activate(rig.driver.activation()).unwrap();
        rig.post(1);
        rig.say(self::header(9, 50, op::REQUEST), &[]);
        while rig.hear_op() != op::RST {}
    }
}
