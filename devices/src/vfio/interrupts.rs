//! Interrupts of a passed-through function. The device signals an event descriptor that KVM turns into the
//! interrupt of the guest, without an exit and without a thread in between.
//!
//! Host vectors are allocated when the guest unmasks them, so that a device with many vectors costs only those in
//! use.

use std::{io, sync::Arc};

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};

use super::{config::MsiSetting, host_device::HostDevice};
use crate::{
    hypervisor::{Hypervisor, LevelIrq, MsiMessage, MsiVector},
    pci::{Msix, MsixError},
    sys::vfio as ioctls,
};

/// The most vectors of MSI (PCI 3.0, 6.8.1.3).
const MSI_MAX: u32 = 32;

/// The interrupts of one function.
pub struct Interrupts {
    device: Arc<HostDevice>,
    /// The table, if the device has MSI-X.
    pub msix: Option<Msix>,
    /// Which vectors of MSI-X the device signals; empty while MSI-X is off.
    connected: Vec<bool>,
    /// Whether vectors can be added while others are on.
    dynamic: bool,
    msi: Vec<Arc<dyn MsiVector>>,
    /// How many vectors of MSI are on.
    msi_on: u16,
    /// The line that INTx raises, while neither MSI nor MSI-X is on.
    intx: Option<LevelIrq>,
}

impl Interrupts {
    /// All interrupts off. `msix` is the number of vectors in the capability, if there is one.
    pub fn new(
        device: Arc<HostDevice>,
        hypervisor: &dyn Hypervisor,
        msix: Option<u16>,
    ) -> Result<Self, MsixError> {
        let (_, dynamic) = device.interrupts(VFIO_PCI_MSIX_IRQ_INDEX);
        let (msi, _) = device.interrupts(VFIO_PCI_MSI_IRQ_INDEX);
        let msi = (0..msi.min(MSI_MAX) as u16)
            .map(|index| {
                let vector = hypervisor.msi_vector();
                vector.map_err(|source| MsixError::Vector { index, source })
            })
            .collect::<Result<_, _>>()?;
        let msix = msix.map(|count| Msix::new(hypervisor, count)).transpose()?;
        Ok(Self {
            device,
            msix,
            connected: Vec::new(),
            dynamic,
            msi,
            msi_on: 0,
            intx: None,
        })
    }

    /// Connects INTx to `line`. The kernel and KVM mask and unmask it. Drivers may use it until they switch to
    /// messages.
    pub fn connect_intx(&mut self, line: LevelIrq) -> io::Result<()> {
        self.start_intx(&line)?;
        self.intx = Some(line);
        Ok(())
    }

    fn start_intx(&self, line: &LevelIrq) -> io::Result<()> {
        let device = &*self.device;
        ioctls::trigger_events(device, VFIO_PCI_INTX_IRQ_INDEX, 0, &[Some(&line.trigger)])?;
        ioctls::unmask_event(device, VFIO_PCI_INTX_IRQ_INDEX, &line.resample)
    }

    /// VFIO has one kind of interrupt on at a time: INTx is switched off for messages.
    fn stop_intx(&self) {
        if self.intx.is_some() && self.connected.is_empty() && self.msi_on == 0 {
            self.disable(VFIO_PCI_INTX_IRQ_INDEX);
        }
    }

    fn resume_intx(&self) {
        if let Some(line) = &self.intx
            && self.connected.is_empty()
            && self.msi_on == 0
            && let Err(error) = self.start_intx(line)
        {
            tracing::warn!(%error, device = %self.device.address, "cannot switch INTx on");
        }
    }

    /// The guest wrote MSI-X Message Control or the table: makes the device match.
    pub fn update_msix(&mut self) {
        let Some(msix) = &self.msix else { return };
        match (msix.is_enabled(), self.connected.is_empty()) {
            (false, true) => return,
            (false, false) => {
                self.connected.clear();
                self.disable(VFIO_PCI_MSIX_IRQ_INDEX);
                return self.resume_intx();
            }
            (true, true) => {
                self.stop_intx();
                // Switches MSI-X on in the device; nothing is signalled yet.
                let count = usize::from(msix.count());
                let silent = vec![None; if self.dynamic { 1 } else { count }];
                let result =
                    ioctls::trigger_events(&*self.device, VFIO_PCI_MSIX_IRQ_INDEX, 0, &silent);
                if let Err(error) = result {
                    tracing::warn!(%error, device = %self.device.address, "cannot switch MSI-X on");
                    return self.resume_intx();
                }
                self.connected = vec![false; count];
            }
            (true, false) => {}
        }
        for index in msix.unmasked() {
            let Some(connected) = self.connected.get_mut(usize::from(index)) else {
                continue;
            };
            let (false, Some(vector)) = (*connected, msix.vector(index)) else {
                continue;
            };
            let result = ioctls::trigger_events(
                &*self.device,
                VFIO_PCI_MSIX_IRQ_INDEX,
                index.into(),
                &[Some(vector.event())],
            );
            match result {
                Ok(()) => *connected = true,
                Err(error) => {
                    tracing::warn!(%error, index, device = %self.device.address, "the host has no vector");
                }
            }
        }
    }

    /// The guest wrote MSI registers: makes the vectors and the device match.
    pub fn update_msi(&mut self, setting: MsiSetting) {
        let wanted = setting.vectors.min(self.msi.len() as u16);
        for (index, vector) in (0..wanted).zip(&self.msi) {
            // The device puts the vector's number into the low bits (PCI 3.0, 6.8.1.6).
            let message = MsiMessage {
                address: setting.address,
                data: u32::from(setting.data & !(setting.vectors - 1) | index),
            };
            if let Err(error) = vector.unmask(message) {
                tracing::warn!(%error, ?message, "cannot route an interrupt");
            }
        }
        if wanted == self.msi_on {
            return;
        }
        if self.msi_on != 0 {
            self.disable(VFIO_PCI_MSI_IRQ_INDEX);
        } else {
            self.stop_intx();
        }
        for vector in self.msi.iter().skip(wanted.into()) {
            if let Err(error) = vector.mask() {
                tracing::warn!(%error, "cannot detach an interrupt");
            }
        }
        self.msi_on = 0;
        if wanted != 0 {
            let vectors = self.msi.iter().take(wanted.into());
            let events: Vec<_> = vectors.map(|vector| Some(vector.event())).collect();
            match ioctls::trigger_events(&*self.device, VFIO_PCI_MSI_IRQ_INDEX, 0, &events) {
                Ok(()) => self.msi_on = wanted,
                Err(error) => {
                    tracing::warn!(%error, device = %self.device.address, "cannot switch MSI on");
                }
            }
        }
        self.resume_intx();
    }

    /// Reset: all interrupts off.
    pub fn reset(&mut self) {
        if let Some(msix) = &mut self.msix {
            msix.reset();
        }
        self.update_msix();
        self.update_msi(MsiSetting {
            vectors: 0,
            address: 0,
            data: 0,
        });
    }

    fn disable(&self, index: u32) {
        if let Err(error) = ioctls::disable_irqs(&*self.device, index) {
            tracing::warn!(%error, index, device = %self.device.address, "cannot switch interrupts off");
        }
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        if !self.connected.is_empty() {
            self.disable(VFIO_PCI_MSIX_IRQ_INDEX);
        }
        if self.msi_on != 0 {
            self.disable(VFIO_PCI_MSI_IRQ_INDEX);
        }
        self.stop_intx();
    }
}
