//! The life-cycle contract.

use std::io::ErrorKind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::testing::{Machine, Subject, conformance};

/// The other end of the newest device's stream, and what came from it.
struct Peer {
    stream: UnixStream,
    bytes: Vec<u8>,
}

impl Peer {
    /// Takes what is there; whole frames are given out.
    fn frames(&mut self) -> Vec<Vec<u8>> {
        let mut chunk = vec![0; 1 << 16];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => panic!("the device has hung up"),
                Ok(read) => self.bytes.extend(&chunk[..read]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        let mut frames = Vec::new();
        while let Some((length, rest)) = self.bytes.split_first_chunk() {
            let length = u32::from_be_bytes(*length) as usize;
            if rest.len() < length {
                break;
            }
            frames.push(rest[..length].to_vec());
            self.bytes.drain(..4 + length);
        }
        frames
    }
}

struct NetSubject {
    peer: Mutex<Option<Peer>>,
    count: AtomicU32,
}

const HELD: usize = 12;

impl NetSubject {
    fn frames(&self) -> Vec<Vec<u8>> {
        self.peer.lock().unwrap().as_mut().unwrap().frames()
    }
}

impl Subject for NetSubject {
    fn new() -> Self {
        Self {
            peer: Mutex::default(),
            count: AtomicU32::new(0),
        }
    }

    fn device(&self) -> Box<dyn Device> {
        let (stream, backend) = stream();
        stream.set_nonblocking(true).unwrap();
        *self.peer.lock().unwrap() = Some(Peer {
            stream,
            bytes: Vec::new(),
        });
        Box::new(Net::new(options(), vec![backend]).unwrap())
    }

    fn exercise(&self, machine: &mut Machine, fresh: bool) {
        let driver = &mut machine.driver;
        let mut sent = frame(OTHER, MAC, 100);
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        sent[50..54].copy_from_slice(&number.to_le_bytes());
        driver.add(1, &[&[0; HEADER], &sent], &[]);
        driver.kick(1);
        let (mut came, mut used) = (false, false);
        until("a frame from the guest", || {
            came |= self.frames().contains(&sent);
            used |= driver.used(1).is_some();
            came && used
        });
        if fresh {
            for _ in 0..32 {
                driver.add(0, &[], &[2048]);
            }
            driver.kick(0);
        }
        let whole = [&(sent.len() as u32).to_be_bytes()[..], &sent].concat();
        let mut peer = self.peer.lock().unwrap();
        peer.as_mut().unwrap().stream.write_all(&whole).unwrap();
        drop(peer);
        loop {
            let used = driver.wait(0);
            driver.add(0, &[], &[2048]);
            driver.kick(0);
            if used.data[HEADER..used.len as usize] == sent {
                break;
            }
        }
        let answer = driver.request(CONTROL, &[&[0, 1, 1]], &[1]);
        assert_eq!(answer.data, [0]);
    }

    fn begin(&self, machine: &mut Machine) {
        for _ in 0..HELD {
            let frame = frame(OTHER, MAC, 60_000);
            machine.driver.add(1, &[&[0; HEADER], &frame], &[]);
        }
        machine.driver.kick(1);
    }

    fn let_go(&self) {
        self.frames();
    }

    fn finish(&self, machine: &mut Machine) {
        let mut used = 0;
        until("the frames held back", || {
            self.frames();
            used += usize::from(machine.driver.used(1).is_some());
            used == HELD
        });
    }

    fn hostile_queue(&self) -> usize {
        1
    }
}

conformance!(NetSubject);
