//! Which vCPUs a domain has: of a running one they come and go, in its definition they are listed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use vmm_api::control::Call;
use xml_schemas::Domain as Definition;
use xml_schemas::cpuset;
use xml_schemas::domain::{VcpuState, View};

use super::lifecycle::ask;
use super::object::{Domain, Inner, Pinned};
use super::record::Folder;
use super::vcpus::{self, MOST, Threads};
use super::{Driver, blocking, limits};
use crate::error::{Error, ErrorCode, Result};
use crate::events::DomainEvent;

/// How long a guest may take to let go of a vCPU, as in libvirt.
const LET_GO: Duration = Duration::from_secs(5);
/// From one look at whether it has to the next.
const LOOK: Duration = Duration::from_millis(10);

fn invalid(text: impl Into<String>) -> Error {
    Error::new(ErrorCode::INVALID_ARG, text)
}

fn refused(text: impl Into<String>) -> Error {
    Error::new(ErrorCode::OPERATION_UNSUPPORTED, text)
}

/// vCPUs, and whether they are to come.
type Change = (Vec<u32>, bool);

/// Which vCPUs have to come, or to go, so that there are `count`: the first ones come, the last ones go.
fn select(definition: &Definition, count: u32) -> Result<Change> {
    let states = definition.vcpus();
    let online = definition.vcpu.online();
    let come = count > online;
    let numbered = (0..).zip(&states);
    let wanted: Vec<u32> = if come {
        let off = numbered.filter(|(_, vcpu)| !vcpu.online);
        off.map(|(number, _)| number).collect()
    } else {
        let mut on: Vec<u32> = numbered
            .filter(|(_, vcpu)| vcpu.online && vcpu.hotpluggable)
            .map(|(number, _)| number)
            .collect();
        on.reverse();
        on
    };
    let change = online.abs_diff(count) as usize;
    match wanted.get(..change) {
        Some(wanted) => Ok((wanted.to_vec(), come)),
        None => Err(Error::unsupported(
            "failed to find appropriate hotpluggable vcpus to reach the desired target vcpu count",
        )),
    }
}

/// The one vCPU of a list that is to come or to go.
fn single(definition: &Definition, wanted: &[u32], enable: bool) -> Result<u32> {
    let states = definition.vcpus();
    for number in wanted {
        let Some(vcpu) = states.get(*number as usize) else {
            return Err(invalid(format!(
                "vcpu {number} is not present in live config"
            )));
        };
        if vcpu.online == enable {
            return Err(invalid(format!(
                "vcpu '{number}' is already in requested state"
            )));
        }
        if !enable && !vcpu.hotpluggable {
            return Err(refused(format!("vcpu '{number}' can't be unplugged")));
        }
    }
    match wanted {
        [one] => Ok(*one),
        _ => Err(refused("only one hotpluggable entity can be selected")),
    }
}

/// In which order vCPUs came: those of which it is not said came in the order of their numbers, and last.
pub(super) fn put_in_order(states: &mut [VcpuState]) {
    let mut online: Vec<&mut VcpuState> = states.iter_mut().filter(|vcpu| vcpu.online).collect();
    online.sort_by_key(|vcpu| vcpu.order.unwrap_or(u32::MAX));
    for (order, vcpu) in (1..).zip(online) {
        vcpu.order = Some(order);
    }
    for vcpu in states.iter_mut().filter(|vcpu| !vcpu.online) {
        vcpu.order = None;
    }
}

/// What is so of a vCPU from now on.
fn note(definition: &mut Definition, number: u32, online: bool) {
    let mut states = definition.vcpus();
    put_in_order(&mut states);
    if let Some(vcpu) = states.get_mut(number as usize) {
        vcpu.online = online;
        vcpu.hotpluggable |= !online;
        vcpu.order = None;
    }
    put_in_order(&mut states);
    definition.list_vcpus(&states);
}

/// Has a definition say which vCPUs are there; whether it said otherwise. What a VMM says of others than the machine
/// can have is nothing.
pub(super) fn are(definition: &mut Definition, there: &[u32]) -> bool {
    let most = definition.vcpu.max;
    let there: BTreeSet<u32> = there.iter().copied().filter(|n| *n < most).collect();
    let known = definition.online_vcpus();
    if known == there {
        return false;
    }
    for number in &known {
        if !there.contains(number) {
            note(definition, *number, false);
        }
    }
    for number in &there {
        if !known.contains(number) {
            note(definition, *number, true);
        }
    }
    true
}

/// Has a definition have so many vCPUs from its next start on.
fn set_count(definition: &mut Definition, count: u32, hotpluggable: bool) {
    let mut listed = definition.lists_vcpus();
    let mut states = definition.vcpus();
    let mut online = definition.vcpu.online();
    states.iter_mut().for_each(|vcpu| vcpu.order = None);
    for vcpu in states.iter_mut().filter(|vcpu| !vcpu.online) {
        if online >= count {
            break;
        }
        vcpu.online = true;
        vcpu.hotpluggable = hotpluggable;
        listed |= hotpluggable;
        online += 1;
    }
    for vcpu in states.iter_mut().rev().filter(|vcpu| vcpu.online) {
        if online <= count {
            break;
        }
        vcpu.online = false;
        vcpu.hotpluggable = true;
        online -= 1;
    }
    if listed {
        definition.list_vcpus(&states);
    } else {
        definition.first_vcpus(count);
    }
}

impl Driver {
    /// How many vCPUs a domain has.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG for a number out of range; VIR_ERR_CONFIG_UNSUPPORTED if too few can go;
    /// VIR_ERR_OPERATION_TIMEOUT if the guest does not let one go.
    pub async fn set_vcpus(
        self: &Arc<Self>,
        domain: Pinned,
        count: u32,
        hotpluggable: bool,
        flags: u32,
    ) -> Result<()> {
        if count == 0 || count > MOST {
            return Err(invalid(format!(
                "argument out of range: {count}: a domain has 1 to {MOST} vCPUs"
            )));
        }
        let too_many = |definition: &Definition, which: &str| match definition.vcpu.max {
            most if count > most => Err(invalid(format!(
                "requested vcpus is greater than max allowable vcpus for the {which} domain: {count} > {most}"
            ))),
            _ => Ok(()),
        };
        let live = async |running: &Definition| {
            let change = select(running, count)?;
            self.change_vcpus(&domain, change).await
        };
        let change = |definition: &mut Definition, view| match view {
            View::Inactive => {
                too_many(definition, "persistent")?;
                set_count(definition, count, hotpluggable);
                Ok(())
            }
            // Kept one by one.
            _ => too_many(definition, "live"),
        };
        self.modify_each(&domain, flags, live, change).await
    }

    /// Which vCPUs a domain has.
    ///
    /// # Errors
    /// VIR_ERR_INVALID_ARG for a vCPU that is not there; VIR_ERR_OPERATION_UNSUPPORTED for one that stays, or
    /// several of a running domain; VIR_ERR_OPERATION_TIMEOUT if the guest does not let it go.
    pub async fn enable_vcpus(
        self: &Arc<Self>,
        domain: Pinned,
        list: &str,
        enable: bool,
        flags: u32,
    ) -> Result<()> {
        let wanted = cpuset::parse(list)
            .ok_or_else(|| invalid(format!("Failed to parse bitmap '{list}'")))?;
        let Some(&last) = wanted.last() else {
            return Err(invalid("no vcpus selected for modification"));
        };
        let numbers: Vec<u32> = wanted.iter().copied().collect();
        let live = async |running: &Definition| {
            let one = single(running, &numbers, enable)?;
            self.change_vcpus(&domain, (vec![one], enable)).await
        };
        let change = |definition: &mut Definition, view| {
            if !matches!(view, View::Inactive) {
                return Ok(());
            }
            if last >= definition.vcpu.max {
                return Err(invalid(format!(
                    "vcpu {last} is not present in persistent config"
                )));
            }
            if wanted.contains(&0) {
                return Err(invalid("vCPU '0' can't be modified"));
            }
            let mut states = definition.vcpus();
            // libvirt's rule: what can't be plugged comes first.
            let pinned = (0u32..).zip(&states);
            let pinned = pinned.filter(|(number, vcpu)| {
                vcpu.online && !vcpu.hotpluggable && !wanted.contains(number)
            });
            let first = wanted.first().copied().unwrap_or_default();
            if pinned.last().is_some_and(|(number, _)| number > first) {
                return Err(invalid(format!(
                    "vcpu '{first}' can't be modified as it is followed by non-hotpluggable online vcpus"
                )));
            }
            for (number, vcpu) in (0..).zip(&mut states) {
                vcpu.order = None;
                if wanted.contains(&number) {
                    vcpu.online = enable;
                    vcpu.hotpluggable = true;
                }
            }
            definition.list_vcpus(&states);
            Ok(())
        };
        self.modify_each(&domain, flags, live, change).await
    }

    /// Has vCPUs of a running domain come or go, one after the other.
    async fn change_vcpus(&self, domain: &Pinned, (wanted, come): Change) -> Result<()> {
        if !wanted.is_empty() && !domain.lock().live()?.vcpus_change {
            return Err(refused(
                "the vCPUs of this running domain are fixed: it began with a vireo-vmm of before they could change",
            ));
        }
        for number in wanted {
            if come {
                self.plug_vcpu(domain, number).await?;
            } else {
                self.unplug_vcpu(domain, number).await?;
            }
        }
        Ok(())
    }

    async fn plug_vcpu(&self, domain: &Pinned, number: u32) -> Result<()> {
        let vcpus = vec![number];
        ask(domain, Call::PlugVcpus { vcpus }).await?;
        let (definition, groups, pid) = {
            let mut inner = domain.lock();
            let live = inner.live_mut()?;
            note(Arc::make_mut(&mut live.definition), number, true);
            write(&live.definition, &Folder(live.folder.clone()));
            (
                Arc::clone(&live.definition),
                live.made.groups.clone(),
                live.process.identity().pid,
            )
        };
        if groups.is_empty() && !vcpus::is_placed(&definition) {
            return Ok(());
        }
        blocking(move || {
            let own = Threads::Vcpu(number);
            limits::place_one(&groups, &definition, pid, own)?;
            vcpus::place_one(&definition, pid, own)
        })
        .await?
    }

    async fn unplug_vcpu(&self, domain: &Pinned, number: u32) -> Result<()> {
        domain.lock().live_mut()?.vcpu_kept = None;
        ask(domain, Call::UnplugVcpu { vcpu: number }).await?;
        let gone = async {
            loop {
                {
                    let inner = domain.lock();
                    let live = inner.live()?;
                    if !live.definition.online_vcpus().contains(&number) {
                        return Ok(());
                    }
                    if live.vcpu_kept == Some(number) {
                        return Err(Error::failed("unplug of device was rejected by the guest"));
                    }
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        let late = |_| {
            Error::new(
                ErrorCode::OPERATION_TIMEOUT,
                "vcpu unplug request timed out. Unplug result must be manually inspected in the domain",
            )
        };
        tokio::time::timeout(LET_GO, gone).await.map_err(late)?
    }

    /// The guest has let go of a vCPU.
    pub(super) fn vcpu_removed(&self, inner: &mut Inner, number: u32) {
        if let Some(live) = inner.live.as_mut() {
            note(Arc::make_mut(&mut live.definition), number, false);
            write(&live.definition, &Folder(live.folder.clone()));
        }
    }

    /// The guest says that it will not let go of a vCPU.
    pub(super) fn vcpu_kept(&self, domain: &Domain, inner: &mut Inner, number: u32) {
        if let Some(live) = inner.live.as_mut() {
            live.vcpu_kept = Some(number);
        }
        let alias = format!("vcpu{number}");
        let name = domain.name_in(inner);
        self.emit(&name, &DomainEvent::DeviceRemovalFailed(alias));
    }

    /// vCPUs may have gone while no daemon watched.
    pub(super) fn vcpus_are(&self, inner: &mut Inner, there: Option<&[u32]>) {
        let Some(live) = inner.live.as_mut() else {
            return;
        };
        live.vcpus_change = there.is_some();
        if let Some(there) = there
            && are(Arc::make_mut(&mut live.definition), there)
        {
            write(&live.definition, &Folder(live.folder.clone()));
        }
    }
}

fn write(definition: &Definition, folder: &Folder) {
    if let Err(error) = folder.write_definition(definition) {
        log::error!(
            "domain '{}': cannot write its definition: {error}",
            definition.name
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xml_schemas::Validation;

    fn domain(vcpu: &str) -> Definition {
        let xml = format!(
            "<domain type='qemu'><name>a</name><memory>65536</memory>{vcpu}\
             <os><type>hvm</type></os></domain>"
        );
        Definition::parse(&xml, Validation::Lenient).unwrap().domain
    }

    fn orders(definition: &Definition) -> Vec<Option<u32>> {
        definition.vcpus().iter().map(|vcpu| vcpu.order).collect()
    }

    #[test]
    fn the_first_come_and_the_last_go() {
        let mut some = domain("<vcpu current='1'>4</vcpu>");
        assert_eq!(select(&some, 3).unwrap(), (vec![1, 2], true));
        assert_eq!(select(&some, 1).unwrap(), (vec![], false));
        for number in [3, 1] {
            note(&mut some, number, true);
        }
        assert_eq!(orders(&some), [Some(1), Some(3), None, Some(2)]);
        assert_eq!(select(&some, 1).unwrap(), (vec![3, 1], false));
        note(&mut some, 3, false);
        assert_eq!(orders(&some), [Some(1), Some(2), None, None]);
        assert_eq!(some.vcpu.current, Some(2));
        assert!(select(&domain("<vcpu>2</vcpu>"), 1).is_err());
    }

    #[test]
    fn one_at_a_time_by_its_number() {
        let some = domain("<vcpu current='2'>4</vcpu>");
        let words = |wanted: &[u32], enable| single(&some, wanted, enable).unwrap_err().to_string();
        assert_eq!(single(&some, &[3], true).unwrap(), 3);
        assert!(words(&[2, 3], true).contains("only one"));
        assert!(words(&[1, 3], true).contains("'1' is already"));
        assert!(words(&[1], false).contains("can't be unplugged"));
        assert!(words(&[4], true).contains("not present in live"));
    }

    #[test]
    fn a_definition_follows_the_machine() {
        let mut some = domain("<vcpu current='2'>4</vcpu>");
        assert!(!are(&mut some, &[0, 1]));
        assert!(!some.lists_vcpus());
        assert!(!are(&mut some, &[1, 4, 0, u32::MAX, 1]));
        assert!(are(&mut some, &[0, 2, 3]));
        assert_eq!(some.online_vcpus(), [0, 2, 3].into());
        assert_eq!(orders(&some), [Some(1), None, Some(2), Some(3)]);
    }

    #[test]
    fn a_list_stays_a_list() {
        let mut some = domain("<vcpu current='1'>4</vcpu>");
        set_count(&mut some, 3, false);
        assert!(!some.lists_vcpus());
        set_count(&mut some, 4, true);
        assert!(some.lists_vcpus());
        let of = |some: &Definition| {
            let all = some.vcpus().into_iter();
            all.map(|v| (v.online, v.hotpluggable)).collect::<Vec<_>>()
        };
        assert_eq!(of(&some)[2..], [(true, false), (true, true)]);
        set_count(&mut some, 2, false);
        assert_eq!(
            of(&some)[1..],
            [(true, false), (false, true), (false, true)]
        );
        assert_eq!(some.vcpu.current, Some(2));
    }
}
