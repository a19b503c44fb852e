//! Live migration: libvirt's version-3 protocol with parameters, between two daemons.
//!
//! Begin (source) → Prepare (target) → Perform (source) → Finish (target) → Confirm (source), called
//! by a client in the middle, or by the source's own daemon (peer to peer). The guest itself goes
//! from VMM to VMM over sockets that the two daemons connect (`vmm_api::migrate`); those two
//! processes decide which of them runs it. So whatever dies, and whatever the calls come to, it runs
//! on one side.

mod abi;
mod arrival;
mod begun;
mod listener;
mod peer;
mod perform;
mod settle;
mod source;
mod ssh;
mod storage;
mod target;
mod telling;
pub mod tls;
mod uri;

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use rpc::types::{TypedParam, TypedValue};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub(super) use self::settle::{TargetNote, is_undecided_still, unknown};
use self::source::Outgoing;
use self::target::Arriving;
use self::telling::{Mover, Telling};
use crate::drivers::domain::Driver;
use crate::error::{Error, ErrorCode, Result};

/// virDomainMigrateFlags
pub mod flags {
    /// The guest runs meanwhile.
    pub const LIVE: u64 = 1 << 0;
    /// The source's daemon makes the calls on the target.
    pub const PEER2PEER: u64 = 1 << 1;
    /// It is defined on the target.
    pub const PERSIST_DEST: u64 = 1 << 3;
    /// It is undefined on the source.
    pub const UNDEFINE_SOURCE: u64 = 1 << 4;
    /// It stays paused on the target.
    pub const PAUSED: u64 = 1 << 5;
    /// The content of its disks goes along.
    pub const NON_SHARED_DISK: u64 = 1 << 6;
    /// The same, without what is behind its images.
    pub const NON_SHARED_INC: u64 = 1 << 7;
    /// Nobody may change it from Begin to Confirm.
    pub const CHANGE_PROTECTION: u64 = 1 << 8;
    /// What could harm it is not looked for.
    pub const UNSAFE: u64 = 1 << 9;
    /// Only its definition goes.
    pub const OFFLINE: u64 = 1 << 10;
    /// Memory is packed.
    pub const COMPRESSED: u64 = 1 << 11;
    /// A disk error ends the migration.
    pub const ABORT_ON_ERROR: u64 = 1 << 12;
    /// The guest is slowed down where it is too fast.
    pub const AUTO_CONVERGE: u64 = 1 << 13;
    /// Its memory goes through TLS.
    pub const TLS: u64 = 1 << 16;
    /// Several connections.
    pub const PARALLEL: u64 = 1 << 17;

    /// What there is.
    pub const KNOWN: u64 = LIVE
        | PEER2PEER
        | PERSIST_DEST
        | UNDEFINE_SOURCE
        | PAUSED
        | NON_SHARED_DISK
        | NON_SHARED_INC
        | CHANGE_PROTECTION
        | UNSAFE
        | OFFLINE
        | COMPRESSED
        | ABORT_ON_ERROR
        | AUTO_CONVERGE
        | TLS
        | PARALLEL;

    /// What libvirt has besides, by names.
    pub const OTHERS: [(u64, &str); 6] = [
        (1 << 2, "tunnelled migration"),
        (1 << 14, "pinning memory for RDMA"),
        (1 << 15, "post-copy migration"),
        (1 << 18, "copying disks with synchronous writes"),
        (1 << 19, "resuming a post-copy migration"),
        (1 << 20, "zero-copy"),
    ];
}

/// How long connecting may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// How long a guest may stand still unless told otherwise, milliseconds: as libvirt.
const DOWNTIME_MS: u64 = 300;
/// Connections with `--parallel` and no number: as QEMU.
const PARALLEL_DEFAULT: u32 = 2;

/// The parameters of a migration (VIR_MIGRATE_PARAM_*).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Params {
    /// Where the guest goes: `tcp:HOST[:PORT]`, `tcp://HOST[:PORT]`, `unix:///PATH`.
    pub uri: Option<String>,
    /// Its name there.
    pub dname: Option<String>,
    /// Its definition there.
    pub dxml: Option<String>,
    /// What is stored there.
    pub persistent_xml: Option<String>,
    /// MiB a second.
    pub bandwidth: Option<u64>,
    /// The address that the target listens at.
    pub listen: Option<String>,
    /// How memory is packed.
    pub compression: Vec<String>,
    /// zstd's level.
    pub zstd_level: Option<i32>,
    /// Percent.
    pub converge_initial: Option<i32>,
    /// Percent.
    pub converge_increment: Option<i32>,
    /// How many connections.
    pub connections: Option<i32>,
    /// The disks that go along, by target; none: all that need to.
    pub disks: Vec<String>,
    /// Whose certificate the target has to show, if not the URI's host's.
    pub tls_destination: Option<String>,
}

impl Params {
    /// Reads them.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG: an unknown one, or another type than it has.
    pub fn read(given: impl IntoIterator<Item = TypedParam>) -> Result<Self> {
        let mut params = Self::default();
        for TypedParam { field, value } in given {
            let unknown = || {
                let text = format!("migration parameter '{field}' is not supported");
                Error::new(ErrorCode::ARGUMENT_UNSUPPORTED, text)
            };
            match (field.as_str(), value) {
                ("migrate_uri", TypedValue::String(value)) => params.uri = Some(value),
                ("destination_name", TypedValue::String(value)) => params.dname = Some(value),
                ("destination_xml", TypedValue::String(value)) => params.dxml = Some(value),
                ("persistent_xml", TypedValue::String(value)) => {
                    params.persistent_xml = Some(value);
                }
                ("bandwidth", TypedValue::ULLong(value)) => {
                    check_speed(value)?;
                    params.bandwidth = Some(value);
                }
                ("listen_address", TypedValue::String(value)) => params.listen = Some(value),
                ("compression", TypedValue::String(value)) => params.compression.push(value),
                ("compression.zstd.level", TypedValue::Int(value)) => {
                    params.zstd_level = Some(value);
                }
                ("auto_converge.initial", TypedValue::Int(value)) => {
                    params.converge_initial = Some(value);
                }
                ("auto_converge.increment", TypedValue::Int(value)) => {
                    params.converge_increment = Some(value);
                }
                ("parallel.connections", TypedValue::Int(value)) => {
                    params.connections = Some(value);
                }
                ("migrate_disks", TypedValue::String(value)) => params.disks.push(value),
                ("tls.destination", TypedValue::String(value)) => {
                    params.tls_destination = Some(value);
                }
                // Disks go the way that memory goes: they need no place of their own.
                ("disks_uri", TypedValue::String(uri)) => {
                    uri::Place::parse(&uri)?;
                }
                ("disks_port", TypedValue::Int(port)) => {
                    u16::try_from(port).map_err(|_| {
                        let text = format!("disks port number {port} is no port");
                        Error::new(ErrorCode::INVALID_ARG, text)
                    })?;
                }
                // There is no graphics to be moved: a client that follows it finds none.
                ("graphics_uri", TypedValue::String(_)) => {}
                _ => return Err(unknown()),
            }
        }
        Ok(params)
    }

    /// As they go to another daemon.
    fn write(&self) -> Vec<TypedParam> {
        let text = |name: &str, value: &Option<String>| {
            let value = value.clone()?;
            Some(TypedParam::new(name, TypedValue::String(value)))
        };
        let mut all: Vec<TypedParam> = [
            text("migrate_uri", &self.uri),
            text("destination_name", &self.dname),
            text("destination_xml", &self.dxml),
            text("persistent_xml", &self.persistent_xml),
            text("listen_address", &self.listen),
        ]
        .into_iter()
        .flatten()
        .collect();
        for disk in &self.disks {
            all.push(TypedParam::new(
                "migrate_disks",
                TypedValue::String(disk.clone()),
            ));
        }
        if let Some(bandwidth) = self.bandwidth {
            all.push(TypedParam::new("bandwidth", TypedValue::ULLong(bandwidth)));
        }
        all
    }

    fn connections(&self, flags: u64) -> Result<u32> {
        let most = vmm_api::migrate::CONNECTIONS_MOST;
        match (flags & flags::PARALLEL != 0, self.connections) {
            (false, None) => Ok(1),
            (false, Some(_)) => Err(Error::new(
                ErrorCode::INVALID_ARG,
                "Turn parallel migration on to tune it",
            )),
            (true, None) => Ok(PARALLEL_DEFAULT),
            (true, Some(number)) => u32::try_from(number)
                .ok()
                .filter(|number| (1..=most).contains(number))
                .ok_or_else(|| {
                    let text = format!("between 1 and {most} parallel connections are possible");
                    Error::new(ErrorCode::INVALID_ARG, text)
                }),
        }
    }

    /// zstd's level, where memory is to be packed.
    fn packing(&self, flags: u64) -> Result<Option<i32>> {
        let refuse = |text: String| Err(Error::new(ErrorCode::ARGUMENT_UNSUPPORTED, text));
        for method in &self.compression {
            if method != "zstd" {
                return refuse(format!(
                    "compression method '{method}' is not supported: there is zstd"
                ));
            }
        }
        let wanted = flags & flags::COMPRESSED != 0;
        if !wanted && (!self.compression.is_empty() || self.zstd_level.is_some()) {
            let text = "Turn compression on to tune it";
            return Err(Error::new(ErrorCode::INVALID_ARG, text));
        }
        let level = self.zstd_level.unwrap_or(1);
        if !(1..=20).contains(&level) {
            return refuse(format!("zstd's level {level} is not between 1 and 20"));
        }
        Ok(wanted.then_some(level))
    }

    fn converge(&self, flags: u64) -> Result<Option<(u8, u8)>> {
        if flags & flags::AUTO_CONVERGE == 0 {
            if self.converge_initial.is_some() || self.converge_increment.is_some() {
                let text = "Turn auto convergence on to tune it";
                return Err(Error::new(ErrorCode::INVALID_ARG, text));
            }
            return Ok(None);
        }
        let percent = |value: Option<i32>, default| match value {
            None => Ok(default),
            Some(value) => u8::try_from(value)
                .ok()
                .filter(|value| (1..=99).contains(value))
                .ok_or_else(|| {
                    let text = format!("{value} percent is not between 1 and 99");
                    Error::new(ErrorCode::INVALID_ARG, text)
                }),
        };
        // As QEMU.
        let initial = percent(self.converge_initial, 20)?;
        Ok(Some((initial, percent(self.converge_increment, 10)?)))
    }
}

/// libvirt's name for "no limit", MiB a second.
pub const SPEED_MOST: u64 = (i64::MAX as u64) >> 20;

/// Whether so many MiB a second can be said in bytes.
///
/// # Errors
/// VIR_ERR_OVERFLOW: they can't.
pub fn check_speed(mib: u64) -> Result<()> {
    match mib <= SPEED_MOST {
        true => Ok(()),
        false => {
            let text = format!("bandwidth must be less than {}", SPEED_MOST + 1);
            Err(Error::new(ErrorCode::OVERFLOW, text))
        }
    }
}

/// Refuses what there is not, by name.
fn check(flags: u64) -> Result<()> {
    let refuse = |what: &str| {
        let text = format!("{what} is not supported");
        Err(Error::new(ErrorCode::ARGUMENT_UNSUPPORTED, text))
    };
    for (bit, name) in flags::OTHERS {
        if flags & bit != 0 {
            return refuse(name);
        }
    }
    match flags & !flags::KNOWN {
        0 => storage::check(flags),
        unknown => refuse(&format!("migration flag 0x{unknown:x}")),
    }
}

/// What a domain's migrations keep to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes a second, 0: no limit.
    pub bandwidth: u64,
    /// Milliseconds that the guest may stand still.
    pub downtime_ms: u64,
}

impl Limits {
    /// The domain has begun to run: how long it may stand still is as usual again, as in QEMU, whose process knows it;
    /// how fast it may be sent stays.
    pub fn is_new(&mut self) {
        self.downtime_ms = DOWNTIME_MS;
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bandwidth: 0,
            downtime_ms: DOWNTIME_MS,
        }
    }
}

/// What goes on.
#[derive(Debug, Default)]
pub struct Migrations {
    outgoing: Mutex<HashMap<Uuid, Outgoing>>,
    arriving: Mutex<HashMap<String, Arriving>>,
    /// Those whose sources may still ask what became of them.
    told: Mutex<Vec<Telling>>,
    movers: Mutex<Vec<Weak<Mover>>>,
    /// Jobs of clients that have begun, under protection, and have not gone on yet.
    begun: Mutex<HashMap<Uuid, begun::Begun>>,
    /// Domains that nobody is to change, with the connections that want that.
    protected: Mutex<HashMap<Uuid, u64>>,
    /// This daemon, as its cookies name it.
    own: OnceLock<Uuid>,
    certificates: OnceLock<tls::Certificates>,
}

impl Driver {
    /// Where the certificates for `--tls` are; said once.
    pub fn use_migration_certificates(&self, certificates: tls::Certificates) {
        if self.migrations.certificates.set(certificates).is_err() {
            log::warn!("the certificates for migration were said already");
        }
    }
}

impl Migrations {
    /// What no other daemon calls itself.
    fn own(&self) -> Uuid {
        *self.own.get_or_init(Uuid::new_v4)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &str, value: &str) -> TypedParam {
        TypedParam::new(name, TypedValue::String(value.to_owned()))
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        assert!(check(flags::LIVE | flags::PEER2PEER).is_ok());
        let error = check(flags::LIVE | 1 << 15).unwrap_err();
        assert!(error.message.contains("post-copy"), "{error}");
        let error = Params::read([text("tls.source", "x")]).unwrap_err();
        assert!(error.message.contains("tls.source"), "{error}");
        let both = flags::NON_SHARED_DISK | flags::NON_SHARED_INC;
        let error = check(flags::LIVE | both).unwrap_err();
        assert!(error.message.contains("exclusive"), "{error}");
        let error = check(flags::OFFLINE | flags::NON_SHARED_DISK).unwrap_err();
        assert!(error.message.contains("offline"), "{error}");
        let params = Params::read([text("compression", "xbzrle")]).unwrap();
        let error = params.packing(flags::COMPRESSED).unwrap_err();
        assert!(error.message.contains("'xbzrle'"), "{error}");
        let fast = TypedParam::new("bandwidth", TypedValue::ULLong(SPEED_MOST + 1));
        let error = Params::read([fast]).unwrap_err();
        assert!(
            error.message.contains("must be less than 8796093022208"),
            "{error}"
        );
    }

    #[test]
    fn parameters_need_their_flags() {
        let params =
            Params::read([TypedParam::new("parallel.connections", TypedValue::Int(4))]).unwrap();
        assert!(params.connections(0).is_err());
        assert_eq!(params.connections(flags::PARALLEL).unwrap(), 4);
        assert_eq!(Params::default().connections(0).unwrap(), 1);
        let converge = Params::default().converge(flags::AUTO_CONVERGE).unwrap();
        assert_eq!(converge, Some((20, 10)));
        assert_eq!(
            Params::default().packing(flags::COMPRESSED).unwrap(),
            Some(1)
        );
    }
}
