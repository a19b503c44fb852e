//! The side that a machine comes to.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use hypervisor::{CpuidEntry, Vm};
use images::Image;
use images::iovec::AlignedBuf;
use vmm_api::config::{MachineConfig, Resource};
use vmm_api::migrate::{self, Code, Header, Hello, Kind, LAST_ROUND, StreamError, Verdict};
use vmm_api::saved::{PAGE, STATE_MOST, Section, read_section};

use super::ahead::Ahead;
use super::disks::{self, Coming};
use super::inbox::Inbox;
use super::link::Link;
use super::moment;
use crate::killpoint::killpoint;
use crate::leisurely::Leisurely;
use crate::memory::{GuestMemory, Scratch};
use crate::num::to_usize;
use crate::resource;
use crate::state::dirty::DENSE_MOST;

/// So many bytes of memory side by side with content are worth a huge page.
const DENSE: u64 = vmm_api::saved::CHUNK;

/// A machine that is coming, before its memory has.
#[derive(Debug)]
pub struct Incoming {
    links: Vec<Link>,
    disks: Vec<Coming>,
    /// Where memory will hold much, says the source.
    content: Vec<(u64, u64)>,
}

/// Opens the image of the disk with this id, or says why not.
pub type OpenDisk<'a> = &'a dyn Fn(&str) -> Result<Arc<dyn Image>, String>;

/// The right to run it, which the source still has.
#[derive(Debug)]
pub struct Permit {
    link: Link,
}

impl Incoming {
    /// Over these connections; the first one leads.
    ///
    /// # Errors
    /// A descriptor that was not handed over.
    pub fn open(connections: &[Resource]) -> Result<Self, crate::machine::MachineError> {
        let mut links = Vec::new();
        for at in connections {
            let link = Link::new(resource::connect(at)?);
            links.push(link.map_err(|source| crate::machine::MachineError::Os {
                call: "a migration's connection",
                source,
            })?);
        }
        Ok(Self {
            links,
            disks: Vec::new(),
            content: Vec::new(),
        })
    }

    fn main(&self) -> Result<&Link, StreamError> {
        let none = || StreamError::Protocol("no connection".to_owned());
        self.links.first().ok_or_else(none)
    }

    /// Hears what the machine is, and says whether it fits: before anything else is sent. What its guest was shown of its
    /// first CPU.
    ///
    /// # Errors
    /// It does not; the connection's.
    pub fn greet(
        &mut self,
        vm: &dyn Vm,
        config: &MachineConfig,
        open: OpenDisk<'_>,
    ) -> Result<Vec<CpuidEntry>, StreamError> {
        let mut link = self.main()?;
        let hello: Hello = migrate::expect_json(&mut link, Kind::Hello)?;
        let come = |disk| Coming::new(disk, open(&disk.id)?);
        let fits = fits(&hello, vm, config)
            .and_then(|()| hello.disks.iter().map(come).collect::<Result<Vec<_>, _>>());
        let verdict = match &fits {
            Ok(_) => Verdict {
                takes: Ahead::takes(vm),
                ..Verdict::well()
            },
            Err(why) => Verdict::refused(why),
        };
        let frame = migrate::json_frame(Kind::Verdict, &verdict)?;
        io::Write::write_all(&mut link, &frame)?;
        self.disks = fits.map_err(StreamError::Refused)?;
        killpoint("vmm.incoming-greeted");
        let leaves = shown(&hello);
        self.content = hello.content;
        self.content.truncate(DENSE_MOST);
        Ok(leaves)
    }

    /// Receives disks and guest memory, then the states; what is left is the right to run. vCPUs get ready meanwhile.
    ///
    /// # Errors
    /// The connection's; a disk's; what the source should not have sent. The source is told.
    pub fn receive(
        mut self,
        memory: &GuestMemory,
        ahead: &Ahead,
    ) -> Result<(BTreeMap<String, Section>, Permit), StreamError> {
        let disks = std::mem::take(&mut self.disks);
        let received = self.row(memory, disks, ahead);
        let sections = received.inspect_err(|error| self.refuse(&error.to_string()))?;
        moment("the states are here");
        killpoint("vmm.incoming-received");
        let none = StreamError::Protocol("no connection".to_owned());
        let link = self.links.into_iter().next().ok_or(none)?;
        Ok((sections, Permit { link }))
    }

    /// All of the content, then the states.
    fn row(
        &self,
        memory: &GuestMemory,
        disks: Vec<Coming>,
        ahead: &Ahead,
    ) -> Result<BTreeMap<String, Section>, StreamError> {
        let mut inbox = Inbox::new(self.main()?).map_err(io::Error::other)?;
        let place = Place {
            memory,
            disks: &disks,
            ahead,
            is_expected: self.expect(memory),
        };
        {
            // The guest still runs on the other side, perhaps on these processors.
            let _slices = Leisurely::begin();
            self.content(&mut inbox, place)?;
        }
        ahead.enough();
        moment("the last pages are here");
        for disk in disks {
            disk.close()?;
        }
        let sections = states(&mut inbox)?;
        if !inbox.is_empty() {
            // It has changed its mind.
            let verdict: Verdict = migrate::expect_json(&mut inbox, Kind::Verdict)?;
            verdict.into_result()?;
        }
        Ok(sections)
    }

    /// Has memory expect what the source says will come; whether it has said anything.
    fn expect(&self, memory: &GuestMemory) -> bool {
        for (start, len) in &self.content {
            if let Some(end) = start.checked_add(*len) {
                memory.expect(*start..end);
            }
        }
        !self.content.is_empty()
    }

    fn content(&self, first: &mut Inbox<'_>, place: Place<'_>) -> Result<(), StreamError> {
        std::thread::scope(|scope| -> Result<(), StreamError> {
            let mut others = Vec::new();
            for link in &self.links[1..] {
                let thread = std::thread::Builder::new()
                    .name("incoming".into())
                    .spawn_scoped(scope, || {
                        let inbox = Inbox::new(link).map_err(io::Error::other);
                        let content = |mut inbox| content(&mut inbox, place, None);
                        self.or_refuse(inbox.map_err(Into::into).and_then(content))
                    })?;
                others.push(thread);
            }
            let leads = self.links.first();
            let own = self.or_refuse(content(first, place, leads));
            for thread in others {
                let ended = |_| StreamError::Protocol("a receiving thread panicked".to_owned());
                thread.join().map_err(ended)??;
            }
            own
        })
    }

    /// What one connection can't go on for, the source hears at once: the others hear it from there.
    fn or_refuse(&self, result: Result<(), StreamError>) -> Result<(), StreamError> {
        result.inspect_err(|error| self.refuse(&error.to_string()))
    }

    /// Tells the source why nothing comes of it.
    pub fn refuse(&self, why: &str) {
        if let Ok(link) = self.main() {
            refuse(link, why);
        }
    }
}

fn refuse(mut link: &Link, why: &str) {
    let frame = migrate::json_frame(Kind::Verdict, &Verdict::refused(why));
    // Who does not hear it sees the connection end.
    if let Ok(frame) = frame
        && let Err(error) = io::Write::write_all(&mut link, &frame)
    {
        log::debug!("{error}");
    }
}

impl Permit {
    /// The machine is built, and stands still.
    ///
    /// # Errors
    /// The connection's.
    pub fn ready(&self) -> Result<(), StreamError> {
        let frame = migrate::json_frame(Kind::Verdict, &Verdict::well())?;
        io::Write::write_all(&mut &self.link, &frame)?;
        moment("the machine is built");
        killpoint("vmm.incoming-ready");
        Ok(())
    }

    /// It could not be built.
    pub fn refuse(&self, why: &str) {
        refuse(&self.link, why);
    }

    /// Asks the source for the right to run. From its `Ok` on the source never runs again.
    ///
    /// # Errors
    /// The source says no, or is not there: then this machine must not run.
    pub fn ask(&self) -> Result<(), StreamError> {
        let mut link = &self.link;
        moment("it is to run");
        killpoint("vmm.incoming-asking");
        migrate::send(&mut link, Kind::Ask, &[])?;
        killpoint("vmm.incoming-asked");
        migrate::expect(&mut link, Kind::Grant)?;
        moment("it may run");
        killpoint("vmm.incoming-granted");
        if let Err(error) = migrate::send(&mut link, Kind::Running, &[]) {
            // The machine is this side's all the same.
            log::warn!("the source of the migration has gone: {error}");
        }
        Ok(())
    }

    /// Readable when the source says something unasked, or goes.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.link.fd()
    }

    /// Whether the source has gone.
    pub fn is_void(&self) -> bool {
        self.link.is_closed()
    }
}

/// Whether this process can go on with that machine.
fn fits(hello: &Hello, vm: &dyn Vm, config: &MachineConfig) -> Result<(), String> {
    let (own, its) = (config.memory_bytes, hello.ram_bytes);
    if own != its {
        return Err(format!(
            "the guest has {its} bytes of memory there, {own} here"
        ));
    }
    let (own, its) = (config.vcpus, hello.vcpus);
    // A build before vCPUs could come and go counts only those that its machine began with.
    let absent = config.vcpu_hotplug.as_ref().map_or(0, |h| h.absent.len());
    let there = to_usize(own.into()).saturating_sub(absent);
    if own != its && there != to_usize(its.into()) {
        return Err(format!("the guest has {its} vCPUs there, {own} here"));
    }
    hypervisor::cpu::check_shown(vm, &shown(hello)).map_err(|error| error.to_string())
}

/// What the guest was shown of its first CPU.
fn shown(hello: &Hello) -> Vec<CpuidEntry> {
    let leaf =
        |(function, index, [eax, ebx, ecx, edx]): &(u32, Option<u32>, [u32; 4])| CpuidEntry {
            function: *function,
            index: index.unwrap_or(0),
            index_significant: index.is_some(),
            eax: *eax,
            ebx: *ebx,
            ecx: *ecx,
            edx: *edx,
        };
    hello.cpuid.iter().map(leaf).collect()
}

/// Whether these are whole pages of guest memory.
fn check(memory: &GuestMemory, start: u64, len: u64) -> Result<(), StreamError> {
    let end = start.checked_add(len);
    let good = start.is_multiple_of(PAGE)
        && len.is_multiple_of(PAGE)
        && len > 0
        && end.is_some_and(|end| end <= memory.size());
    if !good {
        let text = format!("{len} bytes of guest memory at {start:#x}");
        return Err(StreamError::Protocol(text));
    }
    Ok(())
}

fn words(inbox: &mut Inbox<'_>, count: usize) -> Result<[u64; 2], StreamError> {
    let mut bytes = [0; 16];
    let part = bytes.get_mut(..count * 8).unwrap_or(&mut []);
    io::Read::read_exact(inbox, part)?;
    let (words, _) = bytes.as_chunks::<8>();
    Ok([0, 1].map(|n| words.get(n).map_or(0, |w| u64::from_le_bytes(*w))))
}

/// Where content goes.
#[derive(Debug, Clone, Copy)]
struct Place<'a> {
    memory: &'a GuestMemory,
    disks: &'a [Coming],
    ahead: &'a Ahead,
    /// The memory knows where much will come.
    is_expected: bool,
}

/// Receives memory and disks until no more comes on this connection, which leads or not.
fn content(
    inbox: &mut Inbox<'_>,
    place: Place<'_>,
    leads: Option<&Link>,
) -> Result<(), StreamError> {
    let Place {
        memory,
        disks,
        ahead,
        is_expected,
    } = place;
    let mut unpack: Option<(Scratch, zstd_safe::DCtx<'_>)> = None;
    let mut buffer: Option<AlignedBuf> = None;
    // A round is over.
    let mut again = false;
    loop {
        let header = Header::read(inbox)?;
        let len = u64::from(header.len);
        match header.kind {
            Kind::Pages if len > 8 => {
                let [start, _] = words(inbox, 1)?;
                let new = !again && !is_expected;
                pages(inbox, memory, start, len - 8, (again, new))?;
                ahead.wrote(memory, start, len - 8);
            }
            Kind::Zero if len == 16 => {
                let [start, len] = words(inbox, 2)?;
                check(memory, start, len)?;
                memory.zero_bytes(start, len).map_err(io::Error::other)?;
                ahead.wrote(memory, start, len);
            }
            Kind::Packed if len > 12 => {
                let body = header.body(inbox)?;
                let (start, len) = packed(&body, memory, &mut unpack)?;
                ahead.wrote(memory, start, len);
            }
            Kind::Round if len == 4 => {
                let body = header.body(inbox)?;
                if body == LAST_ROUND.to_le_bytes() {
                    return Ok(());
                }
                again = true;
                // So that little is left to be written while the guest stands still.
                disks.iter().try_for_each(Coming::flush)?;
            }
            Kind::Disk | Kind::DiskZero => disks::receive(disks, inbox, header, &mut buffer)?,
            Kind::Alive => {}
            Kind::Code if let Some(link) = leads => {
                ahead.begin(Code::decode(&header.body(inbox)?)?, link)?;
            }
            Kind::Verdict => {
                let verdict: Verdict = migrate::parse(&header.body(inbox)?)?;
                verdict.into_result()?;
            }
            kind => {
                let text = format!("{kind:?} of {len} bytes in place of guest memory");
                return Err(StreamError::Protocol(text));
            }
        }
    }
}

/// Receives whole pages. `again`: not for the first time; `new`: where nobody has expected them.
fn pages(
    inbox: &mut Inbox<'_>,
    memory: &GuestMemory,
    start: u64,
    len: u64,
    (again, new): (bool, bool),
) -> Result<(), StreamError> {
    check(memory, start, len)?;
    if again || !memory.is_file() {
        if new && len >= DENSE {
            memory.expect(start..start + len);
        }
        // What the guest has just used it uses again: mapped, as it is then.
        let to = memory.bytes().0.wrapping_add(to_usize(start));
        // SAFETY: guest memory, as was just checked, which no Rust reference ever points at, and which lives as long as
        // `memory`.
        unsafe { inbox.read_to(to, to_usize(len))? };
        return Ok(());
    }
    let end = start + len;
    let mut at = start;
    while at < end {
        let part = inbox.part(to_usize(end - at))?;
        memory.fill(at, part).map_err(io::Error::other)?;
        at += part.len() as u64;
    }
    Ok(())
}

/// Unpacks pages; which.
fn packed(
    body: &[u8],
    memory: &GuestMemory,
    state: &mut Option<(Scratch, zstd_safe::DCtx<'_>)>,
) -> Result<(u64, u64), StreamError> {
    let bad = || StreamError::Protocol("packed guest memory that can't be unpacked".to_owned());
    let (start, rest) = body.split_first_chunk::<8>().ok_or_else(bad)?;
    let (len, data) = rest.split_first_chunk::<4>().ok_or_else(bad)?;
    let (start, len) = (u64::from_le_bytes(*start), u32::from_le_bytes(*len));
    check(memory, start, len.into())?;
    if u64::from(len) > vmm_api::saved::CHUNK {
        return Err(bad());
    }
    if state.is_none() {
        let scratch = Scratch::new(to_usize(vmm_api::saved::CHUNK)).map_err(io::Error::other)?;
        *state = Some((scratch, zstd_safe::DCtx::create()));
    }
    let (scratch, context) = state.as_mut().ok_or_else(bad)?;
    let out = scratch.get_mut(..to_usize(len.into())).ok_or_else(bad)?;
    let got = context.decompress(out, data).map_err(|_| bad())?;
    if got != out.len() {
        return Err(bad());
    }
    if u64::from(len) >= DENSE {
        memory.expect(start..start + u64::from(len));
    }
    memory.fill(start, out).map_err(io::Error::other)?;
    Ok((start, len.into()))
}

/// The row of sections.
fn states(inbox: &mut Inbox<'_>) -> Result<BTreeMap<String, Section>, StreamError> {
    let mut row = Vec::new();
    loop {
        let body = migrate::expect(inbox, Kind::State)?;
        if body.is_empty() {
            break;
        }
        if (row.len() + body.len()) as u64 > STATE_MOST {
            return Err(StreamError::Protocol("too much state".to_owned()));
        }
        row.extend(body);
    }
    let mut rest = &row[..];
    let mut sections = BTreeMap::new();
    let bad = |error: vmm_api::saved::SavedError| StreamError::Protocol(error.to_string());
    while let Some(section) = read_section(&mut rest).map_err(bad)? {
        let id = section.id.clone();
        if sections.insert(id.clone(), section).is_some() {
            return Err(StreamError::Protocol(format!("two states of {id}")));
        }
    }
    Ok(sections)
}
