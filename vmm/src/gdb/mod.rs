//! A debugger at the machine: gdb's remote protocol (gdb manual, appendix E) on a UNIX or TCP
//! socket, one gdb at a time. vCPUs are its threads; while it looks, all of them stand still.
//!
//! Whoever reaches the socket owns the guest: a UNIX socket is its owner's alone, TCP belongs on
//! loopback.

pub mod memory;
mod packet;
mod registers;
mod session;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hypervisor::Vm;

use crate::memory::GuestMemory;
use crate::vcpu::Debugger;
use session::Session;

/// Where gdb is awaited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `PATH`: a UNIX socket.
    Unix(PathBuf),
    /// `tcp:HOST:PORT`.
    Tcp(SocketAddr),
}

impl std::str::FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("tcp:") {
            Some(address) => address
                .parse()
                .map(Self::Tcp)
                .map_err(|error| format!("{text}: {error} (tcp:127.0.0.1:1234, say)")),
            None if text.is_empty() => Err("an empty path".into()),
            None => Ok(Self::Unix(text.into())),
        }
    }
}

/// A connection.
trait Stream: Read + Write + AsFd + Send {}
impl<T: Read + Write + AsFd + Send> Stream for T {}

#[derive(Debug)]
enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn bind(at: &Address) -> std::io::Result<Self> {
        Ok(match at {
            Address::Tcp(address) => Self::Tcp(TcpListener::bind(address)?),
            Address::Unix(path) => {
                // What a machine before left behind: a socket that nobody listens at.
                let left = std::fs::symlink_metadata(path)
                    .is_ok_and(|found| found.file_type().is_socket());
                if left && UnixStream::connect(path).is_err() {
                    std::fs::remove_file(path)?;
                }
                let listener = UnixListener::bind(path)?;
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
                Self::Unix(listener)
            }
        })
    }

    /// The next gdb. What is sent to it must go within a time, or it is gone.
    fn accept(&self) -> std::io::Result<Box<dyn Stream>> {
        let limit = Some(Duration::from_secs(10));
        Ok(match self {
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_write_timeout(limit)?;
                Box::new(stream)
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_write_timeout(limit)?;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
        })
    }
}

/// Awaits debuggers at `address` from a thread of its own, as long as the process lives.
///
/// # Errors
/// The socket can't be had.
pub fn start(
    address: &Address,
    debugger: Debugger,
    vm: Arc<dyn Vm>,
    memory: Arc<GuestMemory>,
) -> std::io::Result<()> {
    let listener = Listener::bind(address)?;
    if let Listener::Tcp(listener) = &listener {
        log::info!("gdb: {:?}", listener.local_addr());
    }
    std::thread::Builder::new()
        .name("gdb".into())
        .spawn(move || {
            loop {
                let stream = match listener.accept() {
                    Ok(stream) => stream,
                    Err(error) => {
                        log::error!("gdb's socket: {error}");
                        std::thread::sleep(Duration::from_secs(1));
                        continue;
                    }
                };
                let mut session = Session::new(stream, &debugger, &*vm, &memory);
                if let Err(error) = session.run() {
                    log::info!("gdb: {error}");
                }
                session.detach();
            }
        })?;
    Ok(())
}

/// Waits until one of the descriptors is readable; which.
fn wait(first: BorrowedFd<'_>, second: BorrowedFd<'_>) -> std::io::Result<(bool, bool)> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [first, second].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    match poll(&mut fds, PollTimeout::from(60_000_u16)) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
    Ok((ready(&fds[0]), ready(&fds[1])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!("/run/x".parse(), Ok(Address::Unix("/run/x".into())));
        let tcp: Address = "tcp:127.0.0.1:1234".parse().unwrap();
        assert_eq!(tcp, Address::Tcp("127.0.0.1:1234".parse().unwrap()));
        assert!("tcp:nowhere".parse::<Address>().is_err());
        assert!("".parse::<Address>().is_err());
    }
}
