//! libvirt's procedures: program `0x20008086`, version 1, numbers 1 to 453 (libvirt 11.3). Numbers are never reused.
//!
//! One row a procedure makes a typed constant ([`Procedure`]), which client and server use alike, and an entry of
//! [`PROCEDURES`], from which a server decides what a read-only connection may do, and tables are made.
//!
//! ```
//! use rpc::procs;
//!
//! assert_eq!(procs::DOMAIN_GET_STATE.number(), 212);
//! assert_eq!(procs::info(212).map(|info| info.name), Some("DOMAIN_GET_STATE"));
//! ```
//!
//! libvirt also has priorities for procedures, for its pool of worker threads; calls here run side by side anyhow.

mod qemu;
mod table;

use std::fmt;
use std::marker::PhantomData;

pub use self::qemu::*;
pub use self::table::*;
use crate::error::ErrorDomain;

/// The program of hypervisor, network, storage ... management.
pub const REMOTE_PROGRAM: u32 = 0x2000_8086;
/// The version of [`REMOTE_PROGRAM`].
pub const REMOTE_VERSION: u32 = 1;
/// The program of what only QEMU's driver has.
pub const QEMU_PROGRAM: u32 = 0x2000_8087;
/// The version of [`QEMU_PROGRAM`].
pub const QEMU_VERSION: u32 = 1;
/// What is added to the numbers of [`QEMU_PROGRAM`]'s procedures where those of both programs stand side by side.
pub const QEMU_BASE: i32 = 1 << 20;
/// The program that tells whether the peer is alive.
pub const KEEPALIVE_PROGRAM: u32 = 0x6b65_6570;
/// The version of [`KEEPALIVE_PROGRAM`].
pub const KEEPALIVE_VERSION: u32 = 1;
/// The keepalive question.
pub const KEEPALIVE_PING: i32 = 1;
/// The keepalive answer.
pub const KEEPALIVE_PONG: i32 = 2;

/// A procedure with its number and the types of its arguments and its answer. Events are procedures whose arguments
/// are the message and which have no answer.
pub struct Procedure<A, R> {
    number: i32,
    types: PhantomData<fn(A) -> R>,
}

impl<A, R> Procedure<A, R> {
    pub(crate) const fn new(number: i32) -> Self {
        Procedure {
            number,
            types: PhantomData,
        }
    }

    /// The number on the wire; for the QEMU program's with [`QEMU_BASE`] added.
    pub const fn number(self) -> i32 {
        self.number
    }
}

impl<A, R> Clone for Procedure<A, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A, R> Copy for Procedure<A, R> {}

impl<A, R> fmt::Debug for Procedure<A, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}({})",
            info(self.number).map_or("?", |info| info.name),
            self.number
        )
    }
}

/// What a read-only connection may do with a procedure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Call it.
    Read,
    /// Call it unless the word that is `back` bytes before the end of the arguments has one of the bits of `mask`.
    ReadUnless {
        /// Bytes from the end: 4 is the last word, which is where flags are.
        back: usize,
        /// The bits that need a connection with full rights, as for secrets in a definition.
        mask: u32,
    },
    /// Not call it.
    Write,
}

/// The raw data that follow a successful call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamKind {
    /// From the client to the server.
    Upload,
    /// From the server to the client.
    Download,
    /// Both ways.
    Duplex,
}

/// What is known of a procedure without its types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcedureInfo {
    /// The number on the wire.
    pub number: i32,
    /// The name without `REMOTE_PROC_`.
    pub name: &'static str,
    /// What a read-only connection may do.
    pub access: Access,
    /// The raw data that follow.
    pub stream: Option<StreamKind>,
    /// It is sent by the server unasked; nobody calls it.
    pub event: bool,
}

/// Looks a procedure up by its number.
pub fn info(number: i32) -> Option<&'static ProcedureInfo> {
    if number > QEMU_BASE {
        return QEMU_PROCEDURES.iter().find(|info| info.number == number);
    }
    let index = usize::try_from(number).ok()?.checked_sub(1)?;
    // The numbers have no gap, so the table is its own index; a test holds it to that.
    PROCEDURES.get(index)
}

impl ProcedureInfo {
    /// The name of libvirt's function that makes this call, as its messages print it: `virDomainCreateXML`.
    pub fn function(&self) -> String {
        let mut name = String::from("vir");
        for word in self.name.split('_') {
            match word {
                "XML" | "NMI" | "PM" | "FD" | "SEV" | "CPU" | "DHCP" | "SSH" | "WWN" => {
                    name.push_str(word)
                }
                "UUID" | "ID" | "URI" => name.push_str(word),
                "OS" => name.push_str("OS"),
                "IOTHREAD" => name.push_str("IOThread"),
                "FSTRIM" | "FSFREEZE" | "FSTHAW" | "FSINFO" => {
                    name.push_str("FS");
                    push_capitalised(&mut name, &word[2..]);
                }
                "NWFILTER" => name.push_str("NWFilter"),
                "NWFILTERS" => name.push_str("NWFilters"),
                _ => push_capitalised(&mut name, word),
            }
        }
        name
    }
}

impl ProcedureInfo {
    /// The domain of errors that libvirt's own function for this call meets.
    pub fn error_domain(&self) -> ErrorDomain {
        let prefixes = [
            ("DOMAIN_SNAPSHOT_", ErrorDomain::DOMAIN_SNAPSHOT),
            ("DOMAIN_CHECKPOINT_", ErrorDomain::DOMAIN_CHECKPOINT),
            ("DOMAIN_", ErrorDomain::DOMAIN),
            ("NETWORK_", ErrorDomain::NETWORK),
            ("STORAGE_", ErrorDomain::STORAGE),
            ("INTERFACE_", ErrorDomain::INTERFACE),
            ("NODE_DEVICE_", ErrorDomain::NODEDEV),
            ("SECRET_", ErrorDomain::SECRET),
            ("NWFILTER_", ErrorDomain::NWFILTER),
        ];
        prefixes
            .iter()
            .find(|(prefix, _)| self.name.starts_with(prefix))
            .map_or(ErrorDomain::NONE, |(_, domain)| *domain)
    }
}

fn push_capitalised(name: &mut String, word: &str) {
    name.push_str(&word[..1]);
    name.push_str(&word[1..].to_ascii_lowercase());
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::xdr::{Decode, Encode, from_bytes, to_bytes};

    /// Is shown the types of every procedure.
    pub(crate) trait Visitor {
        fn visit<A, R>(&mut self, info: &'static ProcedureInfo)
        where
            A: Encode + Decode + Default + PartialEq + fmt::Debug,
            R: Encode + Decode + Default + PartialEq + fmt::Debug;
    }

    struct RoundTrip(usize);

    impl Visitor for RoundTrip {
        fn visit<A, R>(&mut self, info: &'static ProcedureInfo)
        where
            A: Encode + Decode + Default + PartialEq + fmt::Debug,
            R: Encode + Decode + Default + PartialEq + fmt::Debug,
        {
            let args = to_bytes(&A::default()).unwrap();
            assert_eq!(args.len() % 4, 0, "{}", info.name);
            assert_eq!(
                from_bytes::<A>(&args).unwrap(),
                A::default(),
                "{}",
                info.name
            );
            let ret = to_bytes(&R::default()).unwrap();
            assert_eq!(
                from_bytes::<R>(&ret).unwrap(),
                R::default(),
                "{}",
                info.name
            );
            self.0 += 1;
        }
    }

    #[test]
    fn every_procedure_has_its_number_and_types_that_survive_the_wire() {
        for (index, info) in PROCEDURES.iter().enumerate() {
            assert_eq!(usize::try_from(info.number), Ok(index + 1), "{}", info.name);
        }
        let mut visitor = RoundTrip(0);
        for_each_procedure(&mut visitor);
        assert_eq!(visitor.0, 453);
        assert!(info(0).is_none() && info(-1).is_none() && info(454).is_none());
        assert!(info(i32::MIN).is_none() && info(i32::MAX).is_none());
    }

    /// Numbers that were taken from the wire of stock clients.
    #[test]
    fn procedures_have_the_numbers_that_clients_send() {
        let seen = [
            (66, "AUTH_LIST"),
            (60, "CONNECT_SUPPORTS_FEATURE"),
            (273, "CONNECT_LIST_ALL_DOMAINS"),
            (212, "DOMAIN_GET_STATE"),
            (231, "DOMAIN_UNDEFINE_FLAGS"),
            (201, "DOMAIN_OPEN_CONSOLE"),
            (316, "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY"),
            (318, "DOMAIN_EVENT_CALLBACK_LIFECYCLE"),
            (426, "DOMAIN_GET_MESSAGES"),
            (443, "DOMAIN_FD_ASSOCIATE"),
            (453, "DOMAIN_EVENT_NIC_MAC_CHANGE"),
        ];
        for (number, name) in seen {
            assert_eq!(info(number).map(|info| info.name), Some(name));
        }
        assert_eq!(PROCEDURES.iter().filter(|info| info.event).count(), 53);
        assert_eq!(
            PROCEDURES
                .iter()
                .filter(|info| info.stream.is_some())
                .count(),
            8
        );
    }

    #[test]
    fn messages_name_libvirts_functions() {
        let name = |number| info(number).unwrap().function();
        assert_eq!(name(10), "virDomainCreateXML");
        assert_eq!(name(24), "virDomainLookupByUUID");
        assert_eq!(name(104), "virDomainMemoryPeek");
        assert_eq!(name(286), "virConnectListAllNWFilters");
        assert_eq!(name(342), "virConnectGetDomainCapabilities");
        assert_eq!(info(40).unwrap().error_domain(), ErrorDomain::NETWORK);
        assert_eq!(info(10).unwrap().error_domain(), ErrorDomain::DOMAIN);
    }

    /// Nothing that comes may panic, whatever procedure it claims to be for; and what decodes encodes to the same.
    struct Garbage<'a>(&'a [u8]);

    impl Visitor for Garbage<'_> {
        fn visit<A, R>(&mut self, info: &'static ProcedureInfo)
        where
            A: Encode + Decode + Default + PartialEq + fmt::Debug,
            R: Encode + Decode + Default + PartialEq + fmt::Debug,
        {
            if let Ok(args) = from_bytes::<A>(self.0) {
                assert!(to_bytes(&args).is_ok(), "{}: {args:?}", info.name);
            }
            if let Ok(ret) = from_bytes::<R>(self.0) {
                assert!(to_bytes(&ret).is_ok(), "{}: {ret:?}", info.name);
            }
        }
    }

    #[test]
    fn no_bytes_make_decoding_panic() {
        let seed = std::time::UNIX_EPOCH
            .elapsed()
            .map_or(1, |now| now.as_nanos() as u64)
            | 1;
        println!("seed {seed}");
        let mut state = seed;
        let mut next = move || {
            // xorshift64*
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            state.wrapping_mul(0x2545_f491_4f6c_dd1d)
        };
        for _ in 0..300 {
            let words = next() % 24;
            let mut bytes = Vec::new();
            for _ in 0..words {
                // Mostly words that mean something: small counts and marks, lengths beyond all limits, anything.
                let word = match next() % 4 {
                    0 | 1 => (next() % 5) as u32,
                    2 => [u32::MAX, i32::MAX as u32, 16_385, 4_194_305, 0x6162_6300]
                        [(next() % 5) as usize],
                    _ => next() as u32,
                };
                bytes.extend_from_slice(&word.to_be_bytes());
            }
            bytes.truncate(bytes.len() - (next() % 4) as usize * usize::from(!bytes.is_empty()));
            for_each_procedure(&mut Garbage(&bytes));
        }
    }
}
