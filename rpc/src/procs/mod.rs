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

    /// xorshift64*, from VIREO_SEED or the clock; tells where it begins.
    struct Random(u64);

    impl Random {
        fn new() -> Self {
            let given = std::env::var("VIREO_SEED").ok();
            let seed = given.and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
                let now = std::time::UNIX_EPOCH.elapsed();
                now.map_or(1, |now| now.as_nanos() as u64)
            }) | 1;
            println!("VIREO_SEED={seed}");
            Self(seed)
        }

        fn next(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }

        fn below(&mut self, limit: usize) -> usize {
            (self.next() % limit.max(1) as u64) as usize
        }

        /// Mostly words that mean something: small counts and marks, lengths beyond all limits, anything.
        fn word(&mut self) -> [u8; 4] {
            const ODD: [u32; 6] = [
                u32::MAX,
                i32::MAX as u32,
                16_385,
                4_194_305,
                0x6162_6300,
                0xff00_0000,
            ];
            let word = match self.below(4) {
                0 | 1 => self.below(5) as u32,
                2 => ODD[self.below(ODD.len())],
                _ => self.next() as u32,
            };
            word.to_be_bytes()
        }

        /// Changes, adds, doubles or takes away some words.
        fn mutate(&mut self, bytes: &mut Vec<u8>) {
            for _ in 0..=self.below(3) {
                let at = self.below(bytes.len() / 4 + 1) * 4;
                match self.below(5) {
                    0 if at + 4 <= bytes.len() => bytes[at..at + 4].copy_from_slice(&self.word()),
                    1 if at + 4 <= bytes.len() => drop(bytes.drain(at..at + 4)),
                    2 if at < bytes.len() => {
                        let end = (at + 4 * (1 + self.below(6))).min(bytes.len());
                        let part = bytes[at..end].to_vec();
                        bytes.splice(at..at, part);
                    }
                    3 if at + 4 <= bytes.len() => bytes[at + self.below(4)] = self.next() as u8,
                    _ => drop(bytes.splice(at..at, self.word())),
                }
            }
        }
    }

    /// What decodes encodes to something that decodes to the same. Whether it decoded.
    fn survives<T: Encode + Decode + fmt::Debug>(bytes: &[u8], name: &str) -> bool {
        let Ok(value) = from_bytes::<T>(bytes) else {
            return false;
        };
        let again = to_bytes(&value).unwrap_or_else(|e| panic!("{name}: {value:?}: {e}"));
        let twice = from_bytes::<T>(&again).unwrap_or_else(|e| panic!("{name}: {value:?}: {e}"));
        // Not the values: a number that is none is not even itself.
        assert_eq!(to_bytes(&twice).as_ref(), Ok(&again), "{name}: {value:?}");
        true
    }

    /// Nothing that comes may panic, whatever procedure it claims to be for.
    struct Garbage<'a>(&'a [u8]);

    impl Visitor for Garbage<'_> {
        fn visit<A, R>(&mut self, info: &'static ProcedureInfo)
        where
            A: Encode + Decode + Default + PartialEq + fmt::Debug,
            R: Encode + Decode + Default + PartialEq + fmt::Debug,
        {
            survives::<A>(self.0, info.name);
            survives::<R>(self.0, info.name);
        }
    }

    /// The same for what was right once and is changed a little, again and again.
    struct Mutated<'a> {
        random: &'a mut Random,
        taken: usize,
    }

    impl Mutated<'_> {
        fn work<T: Encode + Decode + Default + fmt::Debug>(&mut self, name: &str) {
            let mut good = to_bytes(&T::default()).unwrap();
            for _ in 0..12 {
                let mut bytes = good.clone();
                self.random.mutate(&mut bytes);
                if survives::<T>(&bytes, name) {
                    self.taken += 1;
                    good = bytes;
                }
            }
        }
    }

    impl Visitor for Mutated<'_> {
        fn visit<A, R>(&mut self, info: &'static ProcedureInfo)
        where
            A: Encode + Decode + Default + PartialEq + fmt::Debug,
            R: Encode + Decode + Default + PartialEq + fmt::Debug,
        {
            self.work::<A>(info.name);
            self.work::<R>(info.name);
        }
    }

    #[test]
    fn no_bytes_make_decoding_panic() {
        let mut random = Random::new();
        let mut taken = 0;
        for _ in 0..rounds(100) {
            let mut bytes = Vec::new();
            for _ in 0..random.below(24) {
                bytes.extend(random.word());
            }
            bytes.truncate(bytes.len().saturating_sub(random.below(4)));
            for_each_procedure(&mut Garbage(&bytes));
            let mut mutated = Mutated {
                random: &mut random,
                taken: 0,
            };
            for_each_procedure(&mut mutated);
            taken += mutated.taken;
        }
        assert!(taken > 1_000, "hardly anything decoded: {taken}");
    }

    /// Frames come together whatever their portions, and what is none ends the connection without more ado.
    #[test]
    fn no_bytes_make_taking_frames_apart_panic() {
        use crate::frame::{Frame, FrameDecoder, Header};
        let mut random = Random::new();
        let mut frames = 0;
        for _ in 0..rounds(3_000) {
            let mut bytes = Vec::new();
            for _ in 0..random.below(4) {
                let header = Header {
                    program: if random.below(4) == 0 {
                        random.next() as u32
                    } else {
                        REMOTE_PROGRAM
                    },
                    version: random.below(3) as u32,
                    procedure: random.below(500) as i32,
                    kind: (random.below(8) as i32).into(),
                    serial: random.next() as u32,
                    status: (random.below(5) as i32).into(),
                };
                let payload = (0..random.below(40)).map(|_| random.next() as u8);
                let frame = Frame::raw(header, payload.collect());
                bytes.extend(frame.to_wire().unwrap());
            }
            if random.below(2) == 0 {
                random.mutate(&mut bytes);
            }
            let mut taken = [Vec::new(), Vec::new()];
            for (way, out) in taken.iter_mut().enumerate() {
                let mut decoder = FrameDecoder::new();
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let wanted = decoder.wanted().min(rest.len());
                    let portion = if way == 0 {
                        wanted
                    } else {
                        1 + random.below(wanted)
                    };
                    let (now, later) = rest.split_at(portion.min(wanted));
                    rest = later;
                    match decoder.feed(now) {
                        Ok(Some(frame)) => out.push(format!("{frame:?}")),
                        Ok(None) => {}
                        Err(error) => {
                            out.push(error.to_string());
                            break;
                        }
                    }
                }
            }
            assert_eq!(taken[0], taken[1], "{bytes:?}");
            frames += taken[0].len();
        }
        assert!(frames > 1_000, "hardly any frame: {frames}");
    }

    /// Many more with `make soak`.
    fn rounds(usual: u32) -> u32 {
        match std::env::var_os("VIREO_SOAK") {
            Some(_) => usual * 200,
            None => usual,
        }
    }
}
