//! The control socket of a machine without a daemon.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vmm_api::control::{Answer, Call, Event, Failure, FromVmm, Request, Stats};

/// The longest wait for anything.
const LIMIT: Duration = Duration::from_secs(60);

/// A connection.
#[derive(Debug)]
pub struct Control {
    stream: UnixStream,
    next: u64,
    events: Vec<Event>,
}

impl Control {
    /// Connects, as soon as the socket is there.
    pub fn connect(path: &Path) -> Self {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Ok(stream) = UnixStream::connect(path) {
                stream.set_read_timeout(Some(LIMIT)).unwrap();
                return Self {
                    stream,
                    next: 1,
                    events: Vec::new(),
                };
            }
            assert!(Instant::now() < deadline, "no control socket");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn frame(&mut self) -> FromVmm {
        let mut len = [0; 4];
        self.stream.read_exact(&mut len).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(len) as usize];
        self.stream.read_exact(&mut frame).unwrap();
        serde_json::from_slice(&frame).unwrap()
    }

    /// Calls, with descriptors passed along.
    ///
    /// # Errors
    /// What the machine says.
    pub fn ask(&mut self, call: Call, files: &[&File]) -> Result<Answer, Box<Failure>> {
        let id = self.next;
        self.next += 1;
        let descriptors = u32::try_from(files.len()).unwrap();
        let body = serde_json::to_vec(&Request {
            id,
            call,
            descriptors,
        })
        .unwrap();
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        let frame = [&length[..], &body].concat();
        let numbers: Vec<_> = files.iter().map(|file| file.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights = &rights[..usize::from(!files.is_empty())];
        let parts = [IoSlice::new(&frame)];
        let fd = self.stream.as_raw_fd();
        let sent = sendmsg::<()>(fd, &parts, rights, MsgFlags::empty(), None).unwrap();
        assert_eq!(sent, frame.len());
        loop {
            match self.frame() {
                FromVmm::Reply(reply) if reply.id == id => return reply.result.map_err(Box::new),
                FromVmm::Reply(_) => {}
                FromVmm::Event(event) => self.events.push(event),
            }
        }
    }

    /// Calls.
    ///
    /// # Errors
    /// What the machine says.
    pub fn call(&mut self, call: Call) -> Result<Answer, String> {
        self.ask(call, &[]).map_err(|failure| failure.message)
    }

    /// What all devices have counted.
    pub fn stats(&mut self) -> Stats {
        match self.call(Call::Stats).unwrap() {
            Answer::Stats(stats) => stats,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for an event that has come, or comes.
    pub fn event(&mut self, wanted: impl Fn(&Event) -> bool) -> Event {
        loop {
            if let Some(at) = self.events.iter().position(&wanted) {
                return self.events.remove(at);
            }
            if let FromVmm::Event(event) = self.frame() {
                self.events.push(event);
            }
        }
    }
}
