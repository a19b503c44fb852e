//! The life-cycle contract.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::testing::{Machine, Subject, conformance};

struct VsockSubject {
    folder: Folder,
    listener: UnixListener,
    guest: AtomicU32,
}

fn post(driver: &mut Driver, count: usize) {
    for _ in 0..count {
        driver.add(0, &[], &[HEADER as u32, 4096]);
    }
    driver.kick(0);
}

/// The next packet for a port of the guest's.
fn hear(driver: &mut Driver, guest: u32) -> (u16, Vec<u8>) {
    loop {
        let used = driver.wait(0);
        post(driver, 1);
        let (bytes, data) = used.data.split_first_chunk().unwrap();
        let header = Header::decode(bytes);
        if header.dst_port == guest {
            return (header.op, data[..header.len as usize].to_vec());
        }
    }
}

fn say(driver: &mut Driver, guest: u32, op: u16, data: &[u8]) {
    let mut header = header(1024, guest, op);
    header.len = data.len() as u32;
    driver.request(1, &[&header.encode(), data], &[]);
}

impl Subject for VsockSubject {
    fn new() -> Self {
        let folder = Folder::new();
        let listener = UnixListener::bind(folder.0.join("out_1024")).unwrap();
        Self {
            folder,
            listener,
            guest: AtomicU32::new(1),
        }
    }

    fn device(&self) -> Box<dyn Device> {
        Box::new(device(&self.folder.0))
    }

    fn exercise(&self, machine: &mut Machine, fresh: bool) {
        let driver = &mut machine.driver;
        if fresh {
            post(driver, 16);
            driver.add(2, &[], &[4]);
            driver.kick(2);
        }
        let guest = self.guest.fetch_add(1, Ordering::Relaxed);
        say(driver, guest, op::REQUEST, &[]);
        assert_eq!(hear(driver, guest).0, op::RESPONSE);
        say(driver, guest, op::RW, &guest.to_le_bytes());
        // Others may have been accepted for connections that are gone.
        let mut stream = loop {
            let (mut stream, _) = self.listener.accept().unwrap();
            let mut number = [0; 4];
            if stream.read_exact(&mut number).is_ok() && number == guest.to_le_bytes() {
                break stream;
            }
        };
        stream.write_all(b"pong").unwrap();
        assert_eq!(hear(driver, guest), (op::RW, b"pong".to_vec()));
        drop(stream);
        assert_eq!(hear(driver, guest).0, op::SHUTDOWN);
        say(driver, guest, op::RST, &[]);
    }

    fn begin(&self, machine: &mut Machine) {
        // Answers that have no buffer to go to.
        let driver = &mut machine.driver;
        while driver.has_room(0, 2) && driver.has_room(1, 1) && driver.in_flight(1) < 20 {
            let guest = self.guest.fetch_add(1, Ordering::Relaxed);
            let request = header(1, guest, op::REQUEST).encode();
            driver.add(1, &[&request], &[]);
        }
        driver.kick(1);
    }

    fn let_go(&self) {}

    fn finish(&self, machine: &mut Machine) {
        while machine.driver.in_flight(1) > 0 {
            machine.driver.wait(1);
        }
        // Answers are lost where the device is another by now; the guest is told that all is.
        while machine.driver.used(0).is_some() {
            post(&mut machine.driver, 1);
        }
    }

    fn hostile_queue(&self) -> usize {
        1
    }
}

conformance!(VsockSubject);
