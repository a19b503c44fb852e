//! Network cards.

use virtio::net::{self, Backend, Net, NetHandle, NetOptions, Stream, Tap};
use vmm_api::control::NetStats;
use vmm_api::devices::{Bandwidth, DeviceConfig, NetBackend, NetConfig};

use super::{Builder, failed};
use crate::machine::MachineError;
use crate::resource::{connect, open_device};

fn limit(limit: Bandwidth) -> net::Bandwidth {
    net::Bandwidth {
        average: limit.average,
        peak: limit.peak,
        burst: limit.burst,
    }
}

/// A tap for each pair of queues, or the one stream.
fn ends(device: &DeviceConfig, config: &NetConfig) -> Result<Vec<Box<dyn Backend>>, MachineError> {
    let mut ends: Vec<Box<dyn Backend>> = Vec::new();
    match &config.backend {
        NetBackend::Tap(taps) => {
            if taps.len() != usize::from(config.queue_pairs) {
                let (taps, pairs) = (taps.len(), config.queue_pairs);
                let what = format!("{taps} tap descriptors for {pairs} queue pairs");
                return Err(failed(device, what));
            }
            for tap in taps {
                let tap = Tap::new(open_device(tap)?).map_err(|error| failed(device, error))?;
                ends.push(Box::new(tap));
            }
        }
        NetBackend::Stream(socket) => {
            if config.queue_pairs != 1 {
                return Err(failed(device, "a stream socket serves one queue pair"));
            }
            let stream = Stream::new(connect(socket)?).map_err(|error| failed(device, error))?;
            ends.push(Box::new(stream));
        }
    }
    Ok(ends)
}

impl Builder {
    pub(super) fn net(
        &mut self,
        device: &DeviceConfig,
        config: &NetConfig,
    ) -> Result<(), MachineError> {
        let options = NetOptions {
            mac: config.mac,
            mtu: config.mtu,
            link_up: config.link_up,
            filter_source_mac: config.filter_source_mac,
            inbound: limit(config.inbound),
            outbound: limit(config.outbound),
        };
        let net = Net::new(options, ends(device, config)?).map_err(|e| failed(device, e))?;
        self.nets.push((device.id.clone(), net.handle()));
        self.virtio(device, Box::new(net))
    }
}

/// A card's counters.
pub fn stats(handle: &NetHandle) -> NetStats {
    let stats = handle.stats();
    NetStats {
        rx_bytes: stats.rx_bytes,
        rx_packets: stats.rx_packets,
        rx_errors: stats.rx_errors,
        rx_dropped: stats.rx_dropped,
        tx_bytes: stats.tx_bytes,
        tx_packets: stats.tx_packets,
        tx_errors: stats.tx_errors,
        tx_dropped: stats.tx_dropped,
        link_up: stats.link_up,
    }
}

/// Changes a card's limits.
pub fn set_bandwidth(handle: &NetHandle, inbound: Option<Bandwidth>, outbound: Option<Bandwidth>) {
    handle.set_bandwidth(inbound.map(limit), outbound.map(limit));
}
