//! `<vcpu>` and `<vcpus>`: which vCPUs a domain can have, has, and can be without.

use std::collections::BTreeSet;

use super::{Domain, MAX_VCPUS, Vcpu};
use crate::dom::Element;
use crate::error::XmlError;

/// A vCPU that a domain can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VcpuState {
    /// The domain has it.
    pub online: bool,
    /// It can be taken from a running domain.
    pub hotpluggable: bool,
    /// The how manieth it was to come.
    pub order: Option<u32>,
}

impl Vcpu {
    /// How many vCPUs the domain has.
    pub fn online(&self) -> u32 {
        self.current.unwrap_or(self.max)
    }
}

impl Domain {
    /// All possible vCPUs, by number. Without a list of them the domain has the first ones for good, and the
    /// others can come and go.
    pub fn vcpus(&self) -> Vec<VcpuState> {
        let list = self.rest.iter().find(|e| e.name == "vcpus");
        let read = list.map(|list| read(list, self.vcpu.max));
        if let Some(Ok(states)) = read {
            return states;
        }
        let online = self.vcpu.online();
        let state = |number| VcpuState {
            online: number < online,
            hotpluggable: number >= online,
            order: None,
        };
        (0..self.vcpu.max.min(MAX_VCPUS)).map(state).collect()
    }

    /// Numbers of the vCPUs that the domain has.
    pub fn online_vcpus(&self) -> BTreeSet<u32> {
        let all = (0..).zip(self.vcpus());
        let online = all.filter(|(_, vcpu)| vcpu.online);
        online.map(|(number, _)| number).collect()
    }

    /// Whether there is a list of them.
    pub fn lists_vcpus(&self) -> bool {
        self.rest.iter().any(|e| e.name == "vcpus")
    }

    /// Lists them anew.
    pub fn list_vcpus(&mut self, states: &[VcpuState]) {
        let online = states.iter().filter(|vcpu| vcpu.online).count();
        let online = u32::try_from(online).unwrap_or(u32::MAX);
        self.vcpu.current = Some(online).filter(|online| *online < self.vcpu.max);
        let mut list = Element::new("vcpus");
        let yes = |yes| if yes { "yes" } else { "no" };
        for (number, state) in states.iter().enumerate() {
            let mut vcpu = Element::new("vcpu")
                .with_attr("id", number.to_string())
                .with_attr("enabled", yes(state.online))
                .with_attr("hotpluggable", yes(state.hotpluggable));
            vcpu.set_opt_attr("order", state.order.map(|order| order.to_string()));
            list.push(vcpu);
        }
        match self.rest.iter_mut().find(|e| e.name == "vcpus") {
            Some(old) => *old = list,
            None => self.rest.push(list),
        }
    }

    /// Has the domain have the first vCPUs, and no list of them.
    pub fn first_vcpus(&mut self, online: u32) {
        self.rest.retain(|e| e.name != "vcpus");
        self.vcpu.current = Some(online).filter(|online| *online < self.vcpu.max);
    }
}

/// What a list says.
fn read(list: &Element, max: u32) -> Result<Vec<VcpuState>, XmlError> {
    let mut states = vec![(false, None, None); max.min(MAX_VCPUS) as usize];
    for vcpu in list.elements().filter(|e| e.name == "vcpu") {
        let bad = |text: String| XmlError::xml(text).at(vcpu.line);
        let missing = |name| bad(format!("missing or invalid '{name}' of a <vcpu>"));
        let yes_no = |name| match vcpu.attr(name) {
            None => Ok(None),
            Some("yes") => Ok(Some(true)),
            Some("no") => Ok(Some(false)),
            Some(_) => Err(missing(name)),
        };
        let id = vcpu.attr("id").and_then(|id| id.parse::<u32>().ok());
        let id = id.ok_or_else(|| missing("id"))?;
        let online = yes_no("enabled")?.ok_or_else(|| missing("enabled"))?;
        let order = match vcpu.attr("order").map(str::parse::<u32>) {
            None => None,
            Some(Ok(order)) if order > 0 => Some(order),
            Some(_) => return Err(missing("order")),
        };
        let place = states.get_mut(id as usize);
        let place = place.ok_or_else(|| {
            bad(format!(
                "vcpu id '{id}' is out of range of maximum vcpu count"
            ))
        })?;
        *place = (online, yes_no("hotpluggable")?, order);
    }
    let state = |(online, hotpluggable, order): (bool, Option<bool>, Option<u32>)| VcpuState {
        online,
        hotpluggable: hotpluggable.unwrap_or(!online),
        order: order.filter(|_| online),
    };
    Ok(states.into_iter().map(state).collect())
}

/// Completes a list, which decides how many vCPUs the domain has.
///
/// # Errors
/// libvirt's for what can't be.
pub(super) fn fill(domain: &mut Domain) -> Result<(), XmlError> {
    let Some(list) = domain.rest.iter().find(|e| e.name == "vcpus") else {
        return Ok(());
    };
    let states = read(list, domain.vcpu.max)?;
    check(&states)?;
    domain.list_vcpus(&states);
    Ok(())
}

fn check(states: &[VcpuState]) -> Result<(), XmlError> {
    let bad = |text: &str| Err(XmlError::unsupported(text));
    let online = states.iter().filter(|vcpu| vcpu.online);
    let (count, ordered) = (
        online.clone().count(),
        online.clone().filter(|vcpu| vcpu.order.is_some()).count(),
    );
    let neither = |vcpu: &VcpuState| !vcpu.online && !vcpu.hotpluggable;
    if let Some(first) = states.first() {
        if !first.online {
            return bad("vcpu 0 can't be offline");
        }
        if first.hotpluggable {
            return bad("vcpu0 can't be hotpluggable");
        }
    }
    if let Some(number) = states.iter().position(neither) {
        return bad(&format!(
            "vcpu '{number}' is both offline and not hotpluggable"
        ));
    }
    if ordered != 0 && ordered != count {
        return bad("all vcpus must have either set or unset order");
    }
    let mut seen = BTreeSet::new();
    for order in online.filter_map(|vcpu| vcpu.order) {
        if order as usize > count {
            return bad(&format!("vcpu order '{order}' exceeds vcpu count"));
        }
        if !seen.insert(order) {
            return bad(&format!("vcpus have the same order '{order}'"));
        }
    }
    if ordered != 0 && states.first().and_then(|first| first.order) != Some(1) {
        return bad("vcpu0 must be enabled first");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Validation;

    fn parse(vcpus: &str) -> Result<Domain, String> {
        let xml = format!(
            "<domain type='qemu'><name>a</name><memory>65536</memory>{vcpus}\
             <os><type>hvm</type></os></domain>"
        );
        let parsed = Domain::parse(&xml, Validation::Lenient);
        Ok(parsed.map_err(|error| error.to_string())?.domain)
    }

    fn domain(vcpus: &str) -> Domain {
        parse(vcpus).unwrap()
    }

    fn listed(max: u32, list: &str) -> Result<Domain, String> {
        let mut domain = parse(&format!("<vcpu>{max}</vcpu><vcpus>{list}</vcpus>"))?;
        fill(&mut domain).map_err(|error| error.to_string())?;
        Ok(domain)
    }

    #[test]
    fn the_first_ones_stay_without_a_list() {
        let some = domain("<vcpu current='2'>3</vcpu>");
        let states = some.vcpus();
        assert_eq!(states.len(), 3);
        assert!(states[1].online && !states[1].hotpluggable);
        assert!(!states[2].online && states[2].hotpluggable);
        assert_eq!(some.online_vcpus(), [0, 1].into());
    }

    #[test]
    fn a_list_decides_and_is_completed() {
        let some = listed(
            3,
            "<vcpu id='0' enabled='yes'/><vcpu id='2' enabled='yes' hotpluggable='yes'/>",
        );
        let mut some = some.unwrap();
        assert_eq!(some.vcpu.current, Some(2));
        assert_eq!(some.online_vcpus(), [0, 2].into());
        let text = some.format(super::super::View::Live);
        assert!(
            text.contains(
                "  <vcpus>\n    <vcpu id='0' enabled='yes' hotpluggable='no'/>\n    \
                 <vcpu id='1' enabled='no' hotpluggable='yes'/>\n    \
                 <vcpu id='2' enabled='yes' hotpluggable='yes'/>\n  </vcpus>\n"
            ),
            "{text}"
        );
        some.first_vcpus(3);
        assert!(!some.lists_vcpus());
        assert_eq!(some.vcpu.current, None);
    }

    #[test]
    fn what_can_not_be_is_refused() {
        let v = |id: u32, rest: &str| format!("<vcpu id='{id}' {rest}/>");
        let (on, off) = ("enabled='yes'", "enabled='no'");
        for (list, why) in [
            (v(0, off) + &v(1, on), "vcpu 0 can't be offline"),
            (
                v(0, "enabled='yes' hotpluggable='yes'"),
                "vcpu0 can't be hotpluggable",
            ),
            (
                v(0, on) + &v(1, "enabled='no' hotpluggable='no'"),
                "vcpu '1' is both offline and not hotpluggable",
            ),
            (
                v(0, on) + &v(1, "enabled='yes' order='1'"),
                "all vcpus must have either set or unset order",
            ),
            (
                v(0, "enabled='yes' order='2'") + &v(1, "enabled='yes' order='1'"),
                "vcpu0 must be enabled first",
            ),
            (
                v(0, "enabled='yes' order='1'") + &v(1, "enabled='yes' order='1'"),
                "same order",
            ),
            (
                v(0, "enabled='yes' order='1'") + &v(1, "enabled='yes' order='3'"),
                "exceeds vcpu count",
            ),
            (
                v(7, on),
                "vcpu id '7' is out of range of maximum vcpu count",
            ),
            ("<vcpu enabled='yes'/>".into(), "'id'"),
            (v(0, ""), "'enabled'"),
            (v(0, "enabled='yes' order='0'"), "'order'"),
        ] {
            let error = listed(2, &list).unwrap_err();
            assert!(error.contains(why), "{list}: {error}");
        }
    }
}
