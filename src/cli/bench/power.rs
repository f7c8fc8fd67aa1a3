//! Clock, power and energy of a card, through NVIDIA's management library (NVML), which is loaded when it is there.

use megafuse::runtime::CudaDevice;
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::Clock;

/// What a stretch of work took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// Mean clock of the multiprocessors.
    pub sm_mhz: f64,
    pub watts: f64,
    /// One call.
    pub joules: f64,
}

pub struct Meter {
    nvml: Nvml,
    bus_id: String,
}

impl Meter {
    /// # Errors
    /// In words, why there is none: no library, another card.
    pub fn open(card: &CudaDevice) -> Result<Meter, String> {
        let bus_id = card.pci_bus_id().map_err(|error| error.to_string())?;
        let nvml = Nvml::init().map_err(|error| error.to_string())?;
        let meter = Meter { nvml, bus_id };
        match (meter.sm_mhz(), meter.joules()) {
            (Some(_), Some(_)) => Ok(meter),
            _ => Err(format!("NVML says neither clock nor energy of the card at {}", meter.bus_id)),
        }
    }

    pub fn sm_mhz(&self) -> Option<f64> {
        let device = self.nvml.device_by_pci_bus_id(self.bus_id.as_str()).ok()?;
        device.clock_info(Clock::SM).ok().map(f64::from)
    }

    /// Since the driver was loaded.
    pub fn joules(&self) -> Option<f64> {
        let device = self.nvml.device_by_pci_bus_id(self.bus_id.as_str()).ok()?;
        device.total_energy_consumption().ok().map(|millijoules| millijoules as f64 / 1e3)
    }
}
