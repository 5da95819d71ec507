//! Configuration space of a passed-through function: registers of the device, except those that the guest must not
//! see and those that are emulated.
//!
//! BARs, the ROM, MSI and MSI-X are emulated: the registers of the device hold addresses of the host. SR-IOV, ARI
//! and resizable BARs would change what the host assigned. They are hidden from the list of extended capabilities,
//! as is what needs an IOMMU in the guest.

use crate::pci::{
    COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE, COMMAND_IO, COMMAND_MEMORY, CONFIG_SPACE_SIZE,
    ConfigSpace, reg,
};

/// PCI Code and ID Assignment 1.11, 2: capability ids.
const CAP_ID_POWER_MANAGEMENT: u8 = 0x01;
const CAP_ID_MSI: u8 = 0x05;
const CAP_ID_PCI_EXPRESS: u8 = 0x10;
const CAP_ID_MSIX: u8 = 0x11;
const CAP_ID_ADVANCED_FEATURES: u8 = 0x13;

/// Extended capabilities that the guest does not see.
const HIDDEN: [(u16, &str); 7] = [
    (0x0e, "alternative routing-ID interpretation"),
    (0x0f, "address translation services"),
    (0x10, "single root I/O virtualization"),
    (0x13, "page request interface"),
    (0x15, "resizable BAR"),
    (0x1b, "process address space ID"),
    (0x24, "VF resizable BAR"),
];

/// Where extended capabilities start.
const EXTENDED_START: usize = 0x100;
const HEADER_MULTI_FUNCTION: u8 = 1 << 7;

/// Power Management Control/Status (PCI Power Management 1.2, 3.2.4) and its PowerState.
const PM_CONTROL: usize = 4;
const PM_STATE: u16 = 0b11;
/// Device Control of PCI Express (PCI Express 5.0, 7.5.3.4): Initiate Function Level Reset.
const EXPRESS_DEVICE_CONTROL: usize = 8;
const EXPRESS_FLR: u16 = 1 << 15;
/// AF Control (Advanced Capabilities ECN): Initiate FLR.
const AF_CONTROL: usize = 4;
const AF_FLR: u8 = 1;

/// MSI Message Control (PCI 3.0, 6.8.1.3).
const MSI_CONTROL: usize = 2;
const MSI_ENABLE: u16 = 1;
const MSI_CAPABLE: u16 = 0b111 << 1;
const MSI_ENABLED_COUNT: u16 = 0b111 << 4;
const MSI_64BIT: u16 = 1 << 7;
const MSI_MASKABLE: u16 = 1 << 8;
/// Room of the capability with 64-bit addresses and masks.
const MSI_MAX_SIZE: usize = 24;

/// MSI-X Message Control (PCI 3.0, 6.8.2.3).
const MSIX_CONTROL: usize = 2;
const MSIX_TABLE: usize = 4;
const MSIX_PBA: usize = 8;
const MSIX_SIZE: u16 = 0x7ff;
const MSIX_WRITABLE: u16 = 0b11 << 14;

/// The device's MSI-X capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixCapability {
    /// Where it is.
    pub at: usize,
    /// Number of vectors.
    pub count: u16,
    /// BAR and offset of the table.
    pub table: (u32, u64),
    /// BAR and offset of the pending bits.
    pub pba: (u32, u64),
}

/// The state of MSI that the guest has set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiSetting {
    /// How many vectors are on; none if MSI is off.
    pub vectors: u16,
    /// Message Address.
    pub address: u64,
    /// Message Data of the first vector.
    pub data: u16,
}

/// Effects of a write beyond the bytes themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Consequences {
    /// Bytes to forward to the device, with their offsets.
    pub forward: Vec<(usize, Vec<u8>)>,
    /// The write makes the device reset itself.
    pub resets: bool,
    /// MSI's registers may have changed.
    pub msi: bool,
    /// The new Message Control of MSI-X.
    pub msix: Option<u16>,
}

/// Configuration space as the guest sees it.
pub struct VirtualConfig {
    /// The emulated registers, and a copy of COMMAND, by which BARs are decoded.
    pub space: ConfigSpace,
    /// `space` before the guest changed it.
    kept: Option<ConfigSpace>,
    /// Which bytes are read from `space`.
    ours: Box<[bool; CONFIG_SPACE_SIZE]>,
    /// PowerState, as the guest set it; D0 is 0.
    power_state: u16,
    power: Option<usize>,
    express: Option<usize>,
    advanced: Option<usize>,
    msi: Option<usize>,
    /// The MSI-X capability, if there is one.
    pub msix: Option<MsixCapability>,
}

impl VirtualConfig {
    /// Takes the registers of the device as they are after a reset. `pin` says whether its INTx can be used.
    pub fn new(device: Box<[u8; CONFIG_SPACE_SIZE]>, pin: bool) -> Self {
        let capabilities = capabilities(&device[..]);
        let find = |id| {
            let found = capabilities.iter().find(|(other, _)| *other == id);
            found.map(|&(_, at)| at)
        };
        let mut config = Self {
            power: find(CAP_ID_POWER_MANAGEMENT),
            express: find(CAP_ID_PCI_EXPRESS),
            advanced: find(CAP_ID_ADVANCED_FEATURES),
            msi: find(CAP_ID_MSI),
            msix: find(CAP_ID_MSIX).and_then(|at| msix_capability(&device[..], at)),
            space: ConfigSpace::from_bytes(device),
            kept: None,
            ours: Box::new([false; CONFIG_SPACE_SIZE]),
            power_state: 0,
        };
        config.set_up_header(pin);
        config.set_up_msi();
        if let Some(msix) = config.msix {
            config.own(msix.at + MSIX_CONTROL, 2);
            let control = (msix.count - 1).to_le_bytes();
            config.space.set(msix.at + MSIX_CONTROL, &control);
            let writable = MSIX_WRITABLE.to_le_bytes();
            config.space.set_writable(msix.at + MSIX_CONTROL, &writable);
        }
        config.hide_extended();
        config
    }

    /// Remembers the registers as they are now, for [`VirtualConfig::reset`].
    pub fn keep(&mut self) {
        self.kept = Some(self.space.clone());
    }

    /// Restores the registers of [`VirtualConfig::keep`].
    pub fn reset(&mut self) {
        if let Some(kept) = &self.kept {
            self.space = kept.clone();
        }
        self.power_state = 0;
    }

    fn own(&mut self, offset: usize, len: usize) {
        for byte in self.ours.iter_mut().skip(offset).take(len) {
            *byte = true;
        }
    }

    fn set_up_header(&mut self, pin: bool) {
        let command = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        self.space.set(reg::COMMAND, &[0; 2]);
        self.space
            .set_writable(reg::COMMAND, &command.to_le_bytes());
        // Other functions of the device are not passed through with it.
        let kind = self.space.u16(reg::HEADER_TYPE) as u8 & !HEADER_MULTI_FUNCTION;
        self.space.set(reg::HEADER_TYPE, &[kind]);
        self.own(reg::HEADER_TYPE, 1);
        // BARs are added by the caller, who knows their sizes.
        self.space.set(reg::BASE_ADDRESS_0, &[0; 24]);
        self.own(reg::BASE_ADDRESS_0, 24);
        self.space.set(reg::EXPANSION_ROM, &[0; 4]);
        self.own(reg::EXPANSION_ROM, 4);
        self.space.set(reg::INTERRUPT_LINE, &[0]);
        self.space.set_writable(reg::INTERRUPT_LINE, &[0xff]);
        self.own(reg::INTERRUPT_LINE, 2);
        if !pin || self.interrupt_pin().is_none() {
            self.remove_pin();
        }
    }

    /// The pin of INTx, 0 for INTA.
    pub fn interrupt_pin(&self) -> Option<u8> {
        let [_, pin] = self.space.u16(reg::INTERRUPT_LINE).to_le_bytes();
        pin.checked_sub(1).filter(|pin| *pin < 4)
    }

    /// Removes the pin.
    pub fn remove_pin(&mut self) {
        self.space.set(reg::INTERRUPT_PIN, &[0]);
    }

    /// MSI without per-vector masking, which is optional and which drivers do without.
    fn set_up_msi(&mut self) {
        let Some(at) = self.msi else { return };
        let control = self.space.u16(at + MSI_CONTROL) & (MSI_CAPABLE | MSI_64BIT);
        let wide = control & MSI_64BIT != 0;
        let real = self.space.u16(at + MSI_CONTROL);
        let size = 10 + if wide { 4 } else { 0 } + if real & MSI_MASKABLE != 0 { 10 } else { 0 };
        let size = size.min(MSI_MAX_SIZE);
        self.own(at + MSI_CONTROL, size - MSI_CONTROL);
        self.space.set(at + MSI_CONTROL, &control.to_le_bytes());
        self.space.set(at + 4, &vec![0; size - 4]);
        let writable = MSI_ENABLE | MSI_ENABLED_COUNT;
        self.space
            .set_writable(at + MSI_CONTROL, &writable.to_le_bytes());
        self.space.set_writable(at + 4, &[0xfc, 0xff, 0xff, 0xff]);
        if wide {
            self.space.set_writable(at + 8, &[0xff; 6]);
        } else {
            self.space.set_writable(at + 8, &[0xff; 2]);
        }
    }

    /// Removes [`HIDDEN`] from the list of extended capabilities.
    fn hide_extended(&mut self) {
        let mut shown: Option<usize> = None;
        for at in extended_capabilities(&self.space) {
            let header = self.space.u32(at);
            if HIDDEN
                .iter()
                .any(|&(id, _)| u32::from(id) == header & 0xffff)
            {
                match shown {
                    Some(previous) => {
                        let kept = self.space.u32(previous) & 0x000f_ffff;
                        let next = header & 0xfff0_0000;
                        self.space.set(previous, &(kept | next).to_le_bytes());
                    }
                    // The first must stay, so that the others are found: it gets the id of no capability.
                    None => {
                        self.space.set(at, &(header & 0xfff0_0000).to_le_bytes());
                        shown = Some(at);
                    }
                }
            } else {
                shown = Some(at);
            }
            self.own(at, 4);
        }
    }

    /// Replaces the emulated bytes of `data`, which the device returned for `offset`.
    pub fn overlay(&self, offset: usize, data: &mut [u8]) {
        let mut own = vec![0xff; data.len()];
        self.space.read(offset, &mut own);
        let ours = self.ours.iter().skip(offset);
        for ((byte, own), ours) in data.iter_mut().zip(own).zip(ours) {
            if *ours {
                *byte = own;
            }
        }
    }

    /// A write by the guest: changes the emulated registers, and returns the further effects.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Consequences {
        self.space.write(offset, data);
        let mut consequences = Consequences::default();
        for (at, &byte) in (offset..CONFIG_SPACE_SIZE).zip(data) {
            if self.ours[at] {
                continue;
            }
            match consequences.forward.last_mut() {
                Some((start, bytes)) if *start + bytes.len() == at => bytes.push(byte),
                _ => consequences.forward.push((at, vec![byte])),
            }
        }
        let written = |register: usize| {
            let value = data.get(register.checked_sub(offset)?)?;
            Some(*value)
        };
        if let Some(state) = self.power.and_then(|at| written(at + PM_CONTROL)) {
            self.power_state = u16::from(state) & PM_STATE;
        }
        let high = self
            .express
            .and_then(|at| written(at + EXPRESS_DEVICE_CONTROL + 1));
        let flr = high.is_some_and(|byte| u16::from(byte) << 8 & EXPRESS_FLR != 0);
        let advanced = self.advanced.and_then(|at| written(at + AF_CONTROL));
        consequences.resets = flr || advanced.is_some_and(|byte| byte & AF_FLR != 0);
        let touches =
            |start: usize, len: usize| offset < start + len && start < offset + data.len();
        consequences.msi = self.msi.is_some_and(|at| touches(at, MSI_MAX_SIZE));
        if let Some(msix) = self.msix
            && touches(msix.at + MSIX_CONTROL, 2)
        {
            consequences.msix = Some(self.space.u16(msix.at + MSIX_CONTROL));
        }
        consequences
    }

    /// Whether the guest has put the function into a low-power state, in which it decodes nothing.
    pub fn asleep(&self) -> bool {
        self.power_state != 0
    }

    /// The state of MSI now. `None` without the capability.
    pub fn msi(&self) -> Option<MsiSetting> {
        let at = self.msi?;
        let control = self.space.u16(at + MSI_CONTROL);
        let wide = control & MSI_64BIT != 0;
        let capable = (control & MSI_CAPABLE) >> 1;
        let asked = (control & MSI_ENABLED_COUNT) >> 4;
        let (high, data) = if wide {
            (self.space.u32(at + 8), self.space.u16(at + 12))
        } else {
            (0, self.space.u16(at + 8))
        };
        Some(MsiSetting {
            vectors: if control & MSI_ENABLE != 0 {
                // 6 and 7 are reserved.
                1 << asked.min(capable).min(5)
            } else {
                0
            },
            address: u64::from(self.space.u32(at + 4)) | u64::from(high) << 32,
            data,
        })
    }
}

/// The list of capabilities: ids and offsets. A broken list ends.
fn capabilities(bytes: &[u8]) -> Vec<(u8, usize)> {
    const STATUS_CAPABILITIES: u8 = 1 << 4;
    let mut found = Vec::new();
    if bytes[reg::STATUS] & STATUS_CAPABILITIES == 0 {
        return found;
    }
    let mut at = usize::from(bytes[reg::CAPABILITIES_POINTER] & !3);
    while (0x40..EXTENDED_START).contains(&at) && !found.iter().any(|&(_, other)| other == at) {
        found.push((bytes[at], at));
        at = usize::from(bytes[at + 1] & !3);
    }
    found
}

/// Offsets of the extended capabilities, in their order. A broken list ends.
fn extended_capabilities(space: &ConfigSpace) -> Vec<usize> {
    let mut found = Vec::new();
    let mut at = EXTENDED_START;
    while (EXTENDED_START..=CONFIG_SPACE_SIZE - 4).contains(&at) && !found.contains(&at) {
        let header = space.u32(at);
        // A device without extended space reads as zeroes or ones.
        if header == 0 || header == u32::MAX {
            break;
        }
        found.push(at);
        at = (header >> 20) as usize & !3;
    }
    found
}

fn msix_capability(bytes: &[u8], at: usize) -> Option<MsixCapability> {
    let word = |at: usize| {
        let bytes = bytes.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes))
    };
    let control = (word(at)? >> 16) as u16;
    let place = |register: u32| (register & 7, u64::from(register & !7));
    let capability = MsixCapability {
        at,
        count: (control & MSIX_SIZE) + 1,
        table: place(word(at + MSIX_TABLE)?),
        pba: place(word(at + MSIX_PBA)?),
    };
    (capability.table.0 < 6 && capability.pba.0 < 6).then_some(capability)
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
