//! One character device's host side on the event loop.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::link::Input;
use super::{BACKLOG, CharError, Link, Port, os, pty, push_bounded, telnet};

/// While a guest writes, its output is collected this often instead of at every byte.
const COLLECT: Duration = Duration::from_millis(2);

const TOKEN_PORT: u64 = 0;
const TOKEN_INPUT: u64 = 1;
const TOKEN_COMING: u64 = 2;
const TOKEN_STDOUT: u64 = 3;
/// Tokens a channel takes from its first on, at most.
pub const TOKENS: u64 = 0x10;

/// Takes input for the guest; returns how many bytes it had room for.
pub trait Receiver: Send + Sync + std::fmt::Debug {
    /// Offers `bytes`.
    fn receive(&self, bytes: &[u8]) -> usize;

    /// A lossless port that refused output has room again.
    fn output_room(&self) {}

    /// Somebody is at the other end now, or no longer.
    fn peer(&self, _connected: bool) {}
}

impl Receiver for crate::devices::uart::Uart {
    fn receive(&self, bytes: &[u8]) -> usize {
        Self::receive(self, bytes)
    }
}

/// What the event loop must do for a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing.
    Nothing,
    /// The user typed the way out.
    Quit,
}

/// A device's host side.
#[derive(Debug)]
pub struct Channel {
    port: Arc<Port>,
    receiver: Option<Arc<dyn Receiver>>,
    link: Link,
    log: Option<File>,
    /// Output not yet taken by the other end.
    backlog: VecDeque<u8>,
    /// Input not yet taken by the device.
    pending: VecDeque<u8>,
    /// Somebody is there to talk to.
    connected: bool,
    input_ended: bool,
    /// The other end is gone, but what it sent last still waits for room in the device.
    draining: bool,
    /// Files can't be waited for: they are read whenever there is room.
    always_ready: bool,
    first_token: u64,
    /// What epoll currently watches the input descriptor for.
    watching: Option<EpollFlags>,
    /// What epoll currently watches standard output for.
    watching_stdout: bool,
    blocked: bool,
    collect_at: Option<Instant>,
    look_at: Option<Instant>,
    complained: bool,
    /// A lossless port's output waits until the backlog is shorter.
    held: bool,
}

impl Channel {
    /// Puts a channel onto the event loop. It uses [`TOKENS`] tokens from `first_token` on.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn new(
        epoll: &Epoll,
        first_token: u64,
        port: Arc<Port>,
        receiver: Option<Arc<dyn Receiver>>,
        link: Link,
        log: Option<File>,
    ) -> Result<Self, CharError> {
        let event = |token| EpollEvent::new(EpollFlags::EPOLLIN, first_token + token);
        epoll
            .add(port.fd(), event(TOKEN_PORT))
            .map_err(os("epoll"))?;
        let mut look_at = None;
        match &link {
            Link::Pty(pty) => match pty.opens() {
                Some(fd) => epoll.add(fd, event(TOKEN_COMING)).map_err(os("epoll"))?,
                None => look_at = Some(Instant::now()),
            },
            Link::Socket {
                listener: Some(listener),
                ..
            } => {
                epoll
                    .add(listener, event(TOKEN_COMING))
                    .map_err(os("epoll"))?;
            }
            _ => {}
        }
        let connected = match &link {
            Link::Pty(pty) => pty.is_open(),
            Link::Socket { peer, .. } => peer.is_some(),
            _ => true,
        };
        let mut channel = Self {
            port,
            receiver,
            link,
            log,
            backlog: VecDeque::new(),
            pending: VecDeque::new(),
            connected,
            input_ended: false,
            draining: false,
            always_ready: false,
            first_token,
            watching: None,
            watching_stdout: false,
            blocked: false,
            collect_at: None,
            look_at,
            complained: false,
            held: false,
        };
        if let Some(receiver) = &channel.receiver {
            receiver.peer(connected);
        }
        channel.watch(epoll);
        Ok(channel)
    }

    /// The pseudo-terminal's path, if it is one.
    #[must_use]
    pub fn pty_path(&self) -> Option<&str> {
        match &self.link {
            Link::Pty(pty) => Some(pty.path()),
            _ => None,
        }
    }

    /// A peer is there.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// When [`Channel::tick`] must be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        [self.collect_at, self.look_at].into_iter().flatten().min()
    }

    /// The clock passed [`Channel::deadline`].
    pub fn tick(&mut self, epoll: &Epoll, now: Instant) {
        if self.collect_at.is_some_and(|at| at <= now) {
            self.collect(epoll);
        }
        if self.look_at.is_some_and(|at| at <= now) {
            self.look_at = Some(now + pty::POLL_INTERVAL);
            self.look(epoll);
        }
    }

    /// One of this channel's tokens fired.
    pub fn ready(&mut self, epoll: &Epoll, token: u64, events: EpollFlags) -> Outcome {
        match token - self.first_token {
            TOKEN_PORT => {
                self.port.acknowledge();
                if self.port.input_wanted() {
                    let outcome = self.pump_input(epoll);
                    if outcome != Outcome::Nothing {
                        return outcome;
                    }
                }
                if self.collect_at.is_none() {
                    self.collect(epoll);
                }
                Outcome::Nothing
            }
            TOKEN_INPUT => self.link_ready(epoll, events),
            TOKEN_COMING => {
                self.coming(epoll);
                Outcome::Nothing
            }
            _ => {
                self.blocked = false;
                self.flush(epoll);
                Outcome::Nothing
            }
        }
    }

    fn link_ready(&mut self, epoll: &Epoll, events: EpollFlags) -> Outcome {
        if events.contains(EpollFlags::EPOLLOUT) {
            self.blocked = false;
            self.flush(epoll);
        }
        if events.contains(EpollFlags::EPOLLIN) {
            return self.pump_input(epoll);
        }
        if events.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            if self.pending.is_empty() {
                self.disconnect(epoll);
            } else {
                self.draining = true;
                self.watch(epoll);
            }
        }
        Outcome::Nothing
    }

    /// Somebody knocks: a listener or a pseudo-terminal's other side.
    fn coming(&mut self, epoll: &Epoll) {
        if let Link::Pty(pty) = &self.link {
            pty.acknowledge();
            self.look(epoll);
            if !self.connected {
                // Opened and closed again already, as `echo x > /dev/pts/N` does: what it wrote
                // counts all the same; the end of it is the hang-up.
                self.set_connected(true);
                self.draining = true;
                self.pump_input(epoll);
            }
        } else if let Some(greeting) = self.link.accept() {
            self.set_connected(true);
            self.input_ended = false;
            self.blocked = false;
            for byte in greeting.into_iter().rev() {
                self.backlog.push_front(byte);
            }
            // The next peer waits in the listener's queue.
            self.watch_listener(epoll, false);
            self.flush(epoll);
        }
    }

    /// Is the pseudo-terminal open now?
    fn look(&mut self, epoll: &Epoll) {
        if let Link::Pty(pty) = &self.link
            && pty.is_open()
            && (!self.connected || self.draining)
        {
            self.set_connected(true);
            self.draining = false;
            self.blocked = false;
            self.flush(epoll);
        }
    }

    fn watch_listener(&self, epoll: &Epoll, on: bool) {
        if let Link::Socket {
            listener: Some(listener),
            ..
        } = &self.link
        {
            let flags = if on {
                EpollFlags::EPOLLIN
            } else {
                EpollFlags::empty()
            };
            let mut event = EpollEvent::new(flags, self.first_token + TOKEN_COMING);
            if let Err(error) = epoll.modify(listener, &mut event) {
                log::error!("epoll: {error}");
            }
        }
    }

    fn set_connected(&mut self, connected: bool) {
        if std::mem::replace(&mut self.connected, connected) != connected
            && let Some(receiver) = &self.receiver
        {
            receiver.peer(connected);
        }
    }

    fn disconnect(&mut self, epoll: &Epoll) {
        if matches!(self.link, Link::Stdio(_)) {
            self.input_ended = true;
            self.watch(epoll);
            return;
        }
        self.set_connected(false);
        self.draining = false;
        self.blocked = false;
        self.pending.clear();
        if self.port.is_lossless() {
            // Half a message is no use to the next one who comes.
            self.backlog.clear();
            if std::mem::take(&mut self.held) {
                self.collect_at = Some(Instant::now());
            }
        }
        self.watch(epoll);
        self.link.hang_up();
        self.watch_listener(epoll, true);
    }

    /// The device stands still: what it has said is handed on now, as far as goes without
    /// waiting, so that nobody who goes on elsewhere speaks before it. A lossless port's output
    /// stays: room in it is something that its device would see.
    pub fn hand_on(&mut self, epoll: &Epoll) {
        if !self.port.is_lossless() {
            self.collect(epoll);
        }
    }

    /// Moves output from the device to the log and the other end.
    fn collect(&mut self, epoll: &Epoll) {
        if self.port.is_lossless() && self.backlog.len() >= BACKLOG {
            // The other end does not read: the device has to wait. `flush` comes back here.
            self.collect_at = None;
            self.held = true;
            return;
        }
        let output = self.port.take_output();
        if self.port.was_refused()
            && let Some(receiver) = &self.receiver
        {
            receiver.output_room();
        }
        if output.is_empty() {
            // Quiet for one interval: the device wakes us again.
            let stopped = self.port.stop_watching();
            self.collect_at = (!stopped).then(|| Instant::now() + COLLECT);
            return;
        }
        if let Some(log) = &mut self.log
            && let Err(error) = log.write_all(&output)
            && !std::mem::replace(&mut self.complained, true)
        {
            log::error!("serial log: {error}; output is lost there");
        }
        let nobody = self.port.is_lossless() && !self.connected;
        if !matches!(self.link, Link::Null) && !nobody {
            if self.link.is_telnet() {
                push_bounded(&mut self.backlog, &telnet::encode(&output));
            } else if self.port.is_lossless() {
                // At most twice the bound: the port's own is added to less than one.
                self.backlog.extend(output);
            } else {
                push_bounded(&mut self.backlog, &output);
            }
            self.flush(epoll);
        }
        self.collect_at = Some(Instant::now() + COLLECT);
    }

    /// Writes as much of the backlog as goes.
    fn flush(&mut self, epoll: &Epoll) {
        while self.connected && !self.draining && !self.blocked && !self.backlog.is_empty() {
            let (first, _) = self.backlog.as_slices();
            match self.link.write(first) {
                Ok(0) => self.blocked = true,
                Ok(written) => {
                    self.backlog.drain(..written);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.blocked = true,
                Err(error) => {
                    self.failed(epoll, error);
                    return;
                }
            }
        }
        if self.held && self.backlog.len() < BACKLOG {
            self.held = false;
            self.collect_at = Some(Instant::now());
        }
        self.watch(epoll);
    }

    /// Writing failed: the peer is gone, or a file is full.
    fn failed(&mut self, epoll: &Epoll, error: Errno) {
        match self.link {
            Link::Pty(_) | Link::Socket { .. } => self.disconnect(epoll),
            _ => {
                self.backlog.clear();
                if !std::mem::replace(&mut self.complained, true) {
                    log::error!("serial output: {error}; it is lost");
                }
                self.watch(epoll);
            }
        }
    }

    /// Moves input to the device as long as both sides go on.
    fn pump_input(&mut self, epoll: &Epoll) -> Outcome {
        let Some(receiver) = self.receiver.clone() else {
            return Outcome::Nothing;
        };
        loop {
            if !self.pending.is_empty() {
                let taken = receiver.receive(self.pending.make_contiguous());
                self.pending.drain(..taken);
                if !self.pending.is_empty() {
                    break;
                }
            }
            if !self.connected || self.input_ended {
                break;
            }
            let mut reply = Vec::new();
            match self.link.read(&mut reply) {
                Input::Data(data) => self.pending.extend(data),
                Input::Later => break,
                Input::Quit => return Outcome::Quit,
                Input::End => {
                    self.disconnect(epoll);
                    break;
                }
            }
            if !reply.is_empty() {
                push_bounded(&mut self.backlog, &reply);
                self.flush(epoll);
            }
        }
        self.watch(epoll);
        Outcome::Nothing
    }

    /// Makes epoll watch for just what can be dealt with now.
    fn watch(&mut self, epoll: &Epoll) {
        let is_stdio = matches!(self.link, Link::Stdio(_));
        let here = self.connected && !self.input_ended && !self.draining && !self.always_ready;
        // With no interest at all a hang-up is still told, as it should be.
        let wanted = here.then(|| {
            let mut flags = EpollFlags::empty();
            flags.set(
                EpollFlags::EPOLLIN,
                self.pending.is_empty() && self.receiver.is_some(),
            );
            flags.set(EpollFlags::EPOLLOUT, self.blocked && !is_stdio);
            flags
        });
        if wanted != self.watching
            && let Some(fd) = self.link.input()
        {
            let token = self.first_token + TOKEN_INPUT;
            let event = |flags| EpollEvent::new(flags, token);
            let result = match (self.watching, wanted) {
                (None, Some(flags)) => epoll.add(fd, event(flags)),
                (Some(_), None) => epoll.delete(fd),
                (_, flags) => epoll.modify(fd, &mut event(flags.unwrap_or(EpollFlags::empty()))),
            };
            match result {
                Ok(()) => self.watching = wanted,
                Err(Errno::EPERM) => {
                    self.always_ready = true;
                    self.port.want_room();
                    self.port.has_room();
                }
                Err(error) => log::error!("epoll: {error}"),
            }
        }
        if let Link::Stdio(stdio) = &self.link
            && self.blocked != self.watching_stdout
        {
            let event = EpollEvent::new(EpollFlags::EPOLLOUT, self.first_token + TOKEN_STDOUT);
            let fd = stdio.output();
            let result = if self.blocked {
                epoll.add(fd, event)
            } else {
                epoll.delete(fd)
            };
            match result {
                Ok(()) => self.watching_stdout = self.blocked,
                Err(error) => log::error!("epoll: {error}"),
            }
        }
    }

    /// Its port is gone: what it said is handed on as far as goes without waiting.
    pub fn close(mut self, epoll: &Epoll) {
        self.collect(epoll);
        // The device may keep the port, which would wake the event loop for nobody.
        if let Err(error) = epoll.delete(self.port.fd()) {
            log::error!("epoll: {error}");
        }
    }

    /// Writes what is left, until `deadline` at the latest: the process ends.
    pub fn finish(&mut self, epoll: &Epoll, deadline: Instant) {
        self.collect(epoll);
        while self.connected
            && !self.draining
            && !self.backlog.is_empty()
            && Instant::now() < deadline
        {
            self.blocked = false;
            self.flush(epoll);
            if self.blocked {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}
