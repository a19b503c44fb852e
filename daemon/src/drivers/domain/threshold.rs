//! Telling when a disk's image is written beyond an offset in its file (virDomainSetBlockThreshold).

use vmm_api::control::Call;

use super::Driver;
use super::block_jobs::chain;
use super::lifecycle::ask;
use super::object::{Domain, Inner, Pinned};
use super::tuning::{find_disk, id};
use crate::error::{Error, ErrorCode, Result, check_flags};
use crate::events::DomainEvent;

/// `vda[2]`: the disk, and what its image is called.
fn image_of(dev: &str) -> (&str, Option<u32>) {
    let parts = dev.strip_suffix(']').and_then(|dev| dev.split_once('['));
    let parts = parts.and_then(|(target, index)| Some((target, index.parse().ok()?)));
    parts.map_or((dev, None), |(target, index)| (target, Some(index)))
}

impl Driver {
    /// Has the first write to the file of an image of the disk `dev` that ends beyond `threshold` told; 0: none.
    ///
    /// # Errors
    /// VIR_ERR_OPERATION_INVALID if the domain is off, VIR_ERR_INVALID_ARG where it has no such image.
    pub async fn set_block_threshold(
        &self,
        domain: Pinned,
        dev: &str,
        threshold: u64,
        flags: u32,
    ) -> Result<()> {
        check_flags(flags, 0, "qemuDomainSetBlockThreshold")?;
        let _job = domain.job().await?;
        let words = format!("failed to find disk '{dev}'");
        let (disk, image) = {
            let inner = domain.lock();
            let definition = &inner.live()?.definition;
            if dev.contains('[') && image_of(dev).1.is_none() {
                let text = format!("failed to parse block device '{dev}'");
                return Err(Error::new(ErrorCode::INVALID_ARG, text));
            }
            let (target, index) = image_of(dev);
            let disk = find_disk(definition, target, &words)?;
            let at = match index {
                None => Some(0),
                Some(_) => chain::links(definition, target)
                    .iter()
                    .position(|link| link.index == index),
            };
            let at = at.and_then(|at| u32::try_from(at).ok());
            let at = at.ok_or_else(|| Error::new(ErrorCode::INVALID_ARG, words))?;
            (id(disk.alias.as_ref())?, at)
        };
        let call = Call::SetBlockThreshold {
            disk,
            image,
            bytes: threshold,
        };
        ask(&domain, call).await.map(drop)
    }

    /// A write went beyond it.
    pub(super) fn threshold_passed(
        &self,
        domain: &Domain,
        inner: &Inner,
        (id, image): (&str, u32),
        (threshold, excess): (u64, u64),
    ) {
        let Some(live) = &inner.live else { return };
        let Some(target) = chain::target_of(&live.definition, id) else {
            return;
        };
        let links = chain::links(&live.definition, &target);
        let link = usize::try_from(image).ok().and_then(|at| links.get(at));
        let Some(link) = link else { return };
        let name = domain.name_in(inner);
        let whole = (image == 0).then(|| target.clone());
        let named = link.index.map(|index| format!("{target}[{index}]"));
        for dev in whole.into_iter().chain(named) {
            let event = DomainEvent::BlockThreshold {
                dev,
                path: link.path.clone(),
                threshold,
                excess,
            };
            self.hub.emit(&name, &event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::image_of;

    #[test]
    fn images_are_named_by_disk_and_index() {
        assert_eq!(image_of("vda"), ("vda", None));
        assert_eq!(image_of("vda[2]"), ("vda", Some(2)));
        // No disk is called so.
        for odd in ["vda[x]", "vda[2", "vda[-1]", "[", "]"] {
            assert_eq!(image_of(odd), (odd, None));
        }
    }
}
