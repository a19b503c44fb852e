//! What a PC/AT has beside the machine every kernel gets: for firmware, and for what it boots.

use std::sync::Arc;

use hypervisor::Vm;
use vmm_api::config::{FirmwareConfig, MachineConfig};

use super::MachineError;
use super::build::Builder;
use crate::acpi::Description;
use crate::devices::fw_cfg::{self, FwCfg, Items};
use crate::devices::i8042::{self, ControlA};
use crate::devices::ioapic::IoApic;
use crate::devices::pic::{self, Elcr, Output, Pic};
use crate::devices::pit::{self, Pit, Speaker};
use crate::devices::rtc::Rtc;
use crate::devices::{Interrupt, IsaLines, Line, Requests};
use crate::firmware;
use crate::memory::GuestMemory;
use crate::ram::Ram;

/// The interrupt controllers' output.
#[derive(Debug)]
struct ToProcessor(Arc<dyn Vm>);

impl Output for ToProcessor {
    fn set(&self, level: bool) {
        if let Err(error) = self.0.set_pic_output(level) {
            log::error!("the interrupt controllers' output: {error}");
        }
    }
}

/// The PC's parts.
#[derive(Debug)]
pub(super) struct Pc {
    pub(super) pic: Arc<Pic>,
    pub(super) pit: Arc<Pit>,
    pub(super) fw_cfg: Arc<FwCfg>,
    /// Where the other devices' interrupt lines go.
    pub(super) lines: Arc<dyn Interrupt>,
}

impl Pc {
    /// Builds them.
    pub(super) fn new(
        builder: &mut Builder,
        config: &MachineConfig,
        (firmware, description): (&FirmwareConfig, &Description),
        vm: &Arc<dyn Vm>,
        memory: &Arc<GuestMemory>,
        ioapic: &Arc<IoApic>,
        requests: &Arc<dyn Requests>,
    ) -> Result<Self, MachineError> {
        let pic = Arc::new(Pic::new(Box::new(ToProcessor(vm.clone()))));
        builder.buses.pic = Some(pic.clone());
        let lines: Arc<dyn Interrupt> = Arc::new(IsaLines {
            ioapic: ioapic.clone(),
            pic: pic.clone(),
        });
        for (chip, base) in pic::BASES.into_iter().enumerate() {
            let ports = pic::Ports {
                pic: pic.clone(),
                chip,
            };
            builder.port(base, pic::LEN, "interrupt controller", Arc::new(ports))?;
        }
        builder.port(
            pic::ELCR,
            2,
            "edge/level registers",
            Arc::new(Elcr(pic.clone())),
        )?;
        let pit = Arc::new(Pit::new(Line::new(lines.clone(), 0)));
        builder.port(pit::BASE, pit::LEN, "interval timer", pit.clone())?;
        builder.port(
            pit::SPEAKER,
            1,
            "speaker port",
            Arc::new(Speaker(pit.clone())),
        )?;
        let control = Arc::new(ControlA(requests.clone()));
        builder.port(i8042::CONTROL_A, 1, "control port A", control)?;
        let items = firmware::items(config, firmware, description, memory);
        let ram = Ram::new(memory.clone(), vm.clone());
        let fw_cfg = Arc::new(FwCfg::new(items, Box::new(ram)));
        builder.port(
            fw_cfg::BASE,
            fw_cfg::LEN,
            "firmware configuration",
            fw_cfg.clone(),
        )?;
        Ok(Self {
            pic,
            pit,
            fw_cfg,
            lines,
        })
    }

    /// Tells the clock's RAM how much memory there is.
    pub(super) fn describe(vcpus: u32, memory: &GuestMemory, rtc: &Rtc) {
        let high = memory.high();
        rtc.describe(memory.low().end, high.end - high.start, vcpus);
    }

    /// Power-on state; firmware is told these things of the machine.
    pub(super) fn reset(&self, items: Items) {
        self.pit.reset();
        self.pic.reset();
        self.fw_cfg.reset(items);
    }
}
