//! All connections, and the host programs that come and go.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, accept4, connect, socket};

use super::connection::{Connection, Greeted, Greeting, Key, Over};
use super::packet::{HEADER, HOST_CID, Header, TYPE_STREAM, op};
use crate::queue::Chain;
use crate::worker::{Interest, Poll};

/// Connections, and greetings with them, at a time.
pub(super) const MOST_CONNECTIONS: usize = 512;
/// Resets that wait for the guest's buffers: more, and the guest isn't listened to.
pub(super) const MOST_RESETS: usize = 256;
/// Host ports of connections that a host program began.
const FIRST_PORT: u32 = 1 << 30;
/// How long nobody is let in after descriptors have run out.
const BREATHER: Duration = Duration::from_millis(200);

pub(super) const LISTENER: u64 = 1 << 33;
/// Connections and greetings are counted from here.
const FIRST_TOKEN: u64 = 1 << 34;

#[derive(Debug)]
pub(super) struct Muxer {
    cid: u64,
    listener: Option<UnixListener>,
    prefix: Option<PathBuf>,
    connections: HashMap<Key, Connection>,
    tokens: HashMap<u64, Key>,
    greetings: HashMap<u64, Greeting>,
    /// Those that have something for the guest.
    list: VecDeque<Key>,
    /// Packets that belong to no connection.
    resets: VecDeque<Header>,
    next_port: u32,
    next_token: u64,
    /// The poll waits for the listener.
    listening: bool,
    /// When it does again.
    listen_at: Option<Instant>,
    /// No deadline is before this.
    next_deadline: Option<Instant>,
}

impl Muxer {
    pub fn new(cid: u64, listener: Option<UnixListener>, prefix: Option<PathBuf>) -> Self {
        Self {
            cid,
            listener,
            prefix,
            connections: HashMap::new(),
            tokens: HashMap::new(),
            greetings: HashMap::new(),
            list: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
            next_token: FIRST_TOKEN,
            listening: false,
            listen_at: None,
            next_deadline: None,
        }
    }

    /// Ends everything at once, as a reset of the device does.
    pub fn clear(&mut self) {
        self.connections.clear();
        self.tokens.clear();
        self.greetings.clear();
        self.list.clear();
        self.resets.clear();
        self.next_deadline = None;
    }

    /// A new poll knows nothing yet.
    pub fn begin(&mut self, poll: &Poll) {
        self.listening = false;
        self.listen(poll);
        for (token, greeting) in &self.greetings {
            if let Err(error) = poll.add(&greeting.stream, *token, Interest::Read) {
                log::error!("vsock: {error}");
            }
        }
        let keys: Vec<Key> = self.connections.keys().copied().collect();
        for key in keys {
            if let Some(connection) = self.connections.get_mut(&key) {
                connection.interest = None;
            }
            self.settle(key, poll);
        }
    }

    /// There is room for one more.
    fn has_room(&self) -> bool {
        self.connections.len() + self.greetings.len() < MOST_CONNECTIONS
    }

    /// Lets host programs in, or no longer.
    fn listen(&mut self, poll: &Poll) {
        let Some(listener) = &self.listener else {
            return;
        };
        let wanted = self.has_room() && self.listen_at.is_none();
        if wanted == self.listening {
            return;
        }
        let result = if wanted {
            poll.add(listener, LISTENER, Interest::Read)
        } else {
            poll.remove(listener)
        };
        match result {
            Ok(()) => self.listening = wanted,
            Err(error) => log::error!("vsock: waiting for connections: {error}"),
        }
    }

    fn deadline_at(&mut self, at: Instant) {
        self.next_deadline = Some(self.next_deadline.map_or(at, |next| next.min(at)));
    }

    /// A descriptor is ready.
    pub fn ready(&mut self, token: u64, poll: &Poll) {
        if token == LISTENER {
            self.accept(poll);
        } else if let Some(key) = self.tokens.get(&token).copied() {
            let result = self.connections.get_mut(&key).map(Connection::ready);
            if let Some(Err(over)) = result {
                self.end(key, over, poll);
            } else {
                self.settle(key, poll);
            }
        } else if let Some(greeting) = self.greetings.get_mut(&token) {
            match greeting.read() {
                Greeted::Later => {}
                greeted => self.greeted(token, greeted, poll),
            }
        }
    }

    fn accept(&mut self, poll: &Poll) {
        while self.has_room() {
            let Some(listener) = &self.listener else {
                return;
            };
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let stream = match accept4(listener.as_raw_fd(), flags) {
                // SAFETY: accept4 returned a new descriptor that nobody else owns.
                Ok(fd) => UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) }),
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                Err(error) => {
                    log::error!("vsock: accepting a connection: {error}");
                    let at = Instant::now() + BREATHER;
                    self.listen_at = Some(at);
                    self.deadline_at(at);
                    break;
                }
            };
            let token = self.token();
            if let Err(error) = poll.add(&stream, token, Interest::Read) {
                log::error!("vsock: {error}");
                continue;
            }
            let greeting = Greeting::new(stream);
            self.deadline_at(greeting.deadline);
            self.greetings.insert(token, greeting);
        }
        self.listen(poll);
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// A host program has said where it wants to go.
    fn greeted(&mut self, token: u64, greeted: Greeted, poll: &Poll) {
        let Some(greeting) = self.greetings.remove(&token) else {
            return;
        };
        if let Err(error) = poll.remove(&greeting.stream) {
            log::error!("vsock: {error}");
        }
        if let Greeted::Port(guest) = greeted {
            let host = self.port(guest);
            let key = Key { host, guest };
            let connection = Connection::to_guest(key, token, greeting.stream);
            self.insert(connection, poll);
        }
        self.listen(poll);
    }

    /// A host port that is not in use with `guest`.
    fn port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            // Connections are far fewer than these ports.
            self.next_port = FIRST_PORT | (host.wrapping_add(1) & (FIRST_PORT - 1));
            if !self.connections.contains_key(&Key { host, guest }) {
                return host;
            }
        }
    }

    fn insert(&mut self, connection: Connection, poll: &Poll) {
        let key = connection.key;
        self.tokens.insert(connection.token, key);
        self.connections.insert(key, connection);
        self.settle(key, poll);
    }

    /// Waits for what a connection needs now, and lists it if it has something for the guest.
    fn settle(&mut self, key: Key, poll: &Poll) {
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        let wanted = connection.wanted();
        if wanted != connection.interest {
            let (fd, token) = (connection.fd(), connection.token);
            let result = match (connection.interest, wanted) {
                (None, Some(interest)) => poll.add(fd, token, interest),
                (_, Some(interest)) => poll.modify(fd, token, interest),
                (_, None) => poll.remove(fd),
            };
            match result {
                Ok(()) => connection.interest = wanted,
                Err(error) => log::error!("vsock: {error}"),
            }
        }
        if connection.has_packet() && !std::mem::replace(&mut connection.listed, true) {
            self.list.push_back(key);
        }
        if let Some(at) = connection.deadline {
            self.deadline_at(at);
        }
    }

    /// A connection is over.
    fn end(&mut self, key: Key, over: Over, poll: &Poll) {
        let Some(connection) = self.connections.remove(&key) else {
            return;
        };
        self.tokens.remove(&connection.token);
        if connection.listed {
            self.list.retain(|listed| *listed != key);
        }
        if over == Over::Reset {
            self.resets.push_back(Header {
                src_cid: HOST_CID,
                dst_cid: self.cid,
                src_port: key.host,
                dst_port: key.guest,
                kind: TYPE_STREAM,
                op: op::RST,
                ..Header::default()
            });
        }
        // Its descriptor, and what the poll knows of it, goes with it.
        drop(connection);
        self.listen(poll);
    }

    /// The guest may say more: what it may be answered has room.
    pub fn listens(&self) -> bool {
        self.resets.len() < MOST_RESETS
    }

    /// A packet from the guest.
    pub fn hear(&mut self, chain: &Chain, poll: &Poll) {
        let Some(bytes) = chain.read_array::<HEADER>(0) else {
            log::debug!("vsock: a packet without a header");
            return;
        };
        let header = Header::decode(&bytes);
        if header.src_cid != self.cid {
            log::debug!("vsock: a packet from {}", header.src_cid);
            return;
        }
        let there = chain.readable().len() - HEADER as u32;
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM || header.len > there {
            self.refuse(&header);
            return;
        }
        let key = Key {
            host: header.dst_port,
            guest: header.src_port,
        };
        let Some(connection) = self.connections.get_mut(&key) else {
            if header.op == op::REQUEST
                && let Some(stream) = self.dial(header.dst_port)
            {
                let token = self.token();
                self.insert(Connection::from_guest(key, token, stream, &header), poll);
            } else {
                self.refuse(&header);
            }
            return;
        };
        match connection.hear(&header, chain) {
            Ok(()) => self.settle(key, poll),
            Err(over) => self.end(key, over, poll),
        }
    }

    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.resets.push_back(header.reset());
        }
    }

    /// Connects to the host program that serves `port`.
    fn dial(&self, port: u32) -> Option<UnixStream> {
        let prefix = self.prefix.as_ref().filter(|_| self.has_room())?;
        let mut path = prefix.clone().into_os_string();
        path.push(format!("_{port}"));
        connect_to(Path::new(&path))
            .inspect_err(|error| log::debug!("vsock: {}: {error}", path.display()))
            .ok()
    }

    /// There is something for the guest.
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.list.is_empty()
    }

    /// Writes the next packet for the guest into `chain`; its length. `None`: there is none after
    /// all, and the chain is as it was.
    pub fn packet(&mut self, chain: &Chain, poll: &Poll) -> Option<u32> {
        if let Some(header) = self.resets.pop_front() {
            chain.write_at(0, &header.encode());
            return Some(HEADER as u32);
        }
        while let Some(key) = self.list.pop_front() {
            let cid = self.cid;
            let Some(connection) = self.connections.get_mut(&key) else {
                continue;
            };
            connection.listed = false;
            let result = connection.packet(cid, chain);
            match result {
                Ok(packet) => {
                    // It goes to the list's end if it has more: all have their turn.
                    self.settle(key, poll);
                    if let Some(header) = packet {
                        chain.write_at(0, &header.encode());
                        return Some(HEADER as u32 + header.len);
                    }
                }
                Err(over) => self.end(key, over, poll),
            }
        }
        None
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.next_deadline
    }

    /// The clock passed [`Self::deadline`].
    pub fn timer(&mut self, poll: &Poll) {
        let now = Instant::now();
        let passed = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if passed(self.listen_at) {
            self.listen_at = None;
        }
        self.greetings.retain(|_, greeting| greeting.deadline > now);
        let late: Vec<Key> = self
            .connections
            .values()
            .filter(|connection| passed(connection.deadline))
            .map(|connection| connection.key)
            .collect();
        for key in late {
            self.end(key, Over::Reset, poll);
        }
        self.listen(poll);
        let connections = self.connections.values().filter_map(|c| c.deadline);
        let greetings = self.greetings.values().map(|g| g.deadline);
        self.next_deadline = connections.chain(greetings).chain(self.listen_at).min();
    }

    /// Connections there are.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.connections.len() + self.greetings.len()
    }
}

/// Connects without ever waiting: a program that doesn't accept is as good as none.
fn connect_to(path: &Path) -> io::Result<UnixStream> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    connect(fd.as_fd().as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd.into())
}
