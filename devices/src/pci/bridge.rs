//! A PCI Express port: a type 1 bridge to a bus of its own, from the root complex or from a switch. It has no
//! access control services, so functions below it may reach each other.
//!
//! Configuration accesses are routed by the bus numbers that the guest programs. The windows are kept for the guest
//! to read back, and decide nothing: functions behind the port decode by their own BARs.
//!
//! Behind the port is a slot with native hot-plug (PCI Express 5.0, 6.7). Its card shows on the bus while the guest
//! has the power of the slot on. Plugging a card and requesting its unplug both press the attention button. The
//! guest turns power on for a new card. It releases a requested card by turning power off, and the card then
//! leaves.

use std::{
    ops::RangeInclusive,
    sync::{Arc, MutexGuard},
};

use thiserror::Error;

use crate::{hypervisor::MsiVector, sync::Mutex};

use super::{
    bar::BarKind,
    bus::{Bridge, PciBus, PciError},
    config::{
        COMMAND_BUS_MASTER, COMMAND_IO, COMMAND_MEMORY, Capability, ConfigSpace, Identity, reg,
    },
    function::{DevFn, PciFunction},
    msi::Msi,
};

/// PCI-to-PCI bridges.
const CLASS_BRIDGE: u32 = 0x06_0400;

const CAP_ID_PCI_EXPRESS: u8 = 0x10;
/// PCI Express Capabilities Register: version 2, and whether there is a slot (PCI Express 5.0, 7.5.3.2).
const EXPRESS_VERSION: u16 = 2;
const EXPRESS_SLOT: u16 = 1 << 8;
/// Position of Device/Port Type there.
const EXPRESS_TYPE_SHIFT: u16 = 4;
/// Link Capabilities and Status: 2.5 GT/s, one lane.
const LINK_SPEED_WIDTH: u16 = 1 | 1 << 4;
/// Link Capabilities: Link Status tells whether the link is up.
const LINK_ACTIVE_REPORTING: u32 = 1 << 20;

/// Registers of the PCI Express capability (PCI Express 5.0, 7.5.3).
const EXPRESS_FLAGS: usize = 0x02;
const LINK_CAPABILITIES: usize = 0x0c;
const LINK_STATUS: usize = 0x12;
const SLOT_CAPABILITIES: usize = 0x14;
const SLOT_CONTROL: usize = 0x18;
const SLOT_STATUS: usize = 0x1a;
const EXPRESS_SIZE: usize = 0x3c;

/// Link Status: Data Link Layer Link Active.
const LINK_ACTIVE: u16 = 1 << 13;

/// Slot Capabilities: attention button, power controller, attention and power indicators, surprise
/// removal, hot-plug.
const SLOT_FEATURES: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6;
/// Position of Physical Slot Number in Slot Capabilities.
const SLOT_NUMBER_SHIFT: u32 = 19;

/// Events of Slot Status, which a write of 1 clears.
const ATTENTION_BUTTON_PRESSED: u16 = 1 << 0;
const PRESENCE_DETECT_CHANGED: u16 = 1 << 3;
const COMMAND_COMPLETED: u16 = 1 << 4;
const LINK_STATE_CHANGED: u16 = 1 << 8;
const SLOT_EVENTS: u16 = 0b1_1111 | LINK_STATE_CHANGED;
/// Slot Status: Presence Detect State.
const PRESENCE: u16 = 1 << 6;

/// Slot Control: the enable bit of each event is at the place of the event in Slot Status, except for the last.
const LINK_STATE_CHANGED_ENABLE: u16 = 1 << 12;
const HOTPLUG_INTERRUPT_ENABLE: u16 = 1 << 5;
/// Slot Control: Power Indicator Control.
const POWER_INDICATOR: u16 = 0b11 << 8;
const POWER_INDICATOR_ON: u16 = 0b01 << 8;
const POWER_INDICATOR_BLINK: u16 = 0b10 << 8;
const POWER_INDICATOR_OFF: u16 = 0b11 << 8;
/// Slot Control: Attention Indicator Control, off.
const ATTENTION_INDICATOR_OFF: u16 = 0b11 << 6;
/// Slot Control: power is off.
const POWER_OFF: u16 = 1 << 10;
const SLOT_CONTROL_WRITABLE: u16 = 0x7ff | LINK_STATE_CHANGED_ENABLE;

/// Bridge Control: Secondary Bus Reset.
const BUS_RESET: u16 = 1 << 6;

/// Granularity of memory windows.
const MEMORY_UNIT: u64 = 1 << 20;
/// Low bits of the prefetchable window's registers: 64 bits.
const PREFETCHABLE_64: u16 = 1;

/// Called with the number of the slot when a requested card has left, on a vCPU thread. It must not block.
pub type EjectSink = Arc<dyn Fn(u8) + Send + Sync>;

/// Why a slot refuses a request.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SlotError {
    /// The slot has a card.
    #[error("slot {0} is in use: take its device out first, or use another")]
    Occupied(u8),
    /// The slot has no card.
    #[error("slot {0} is empty")]
    Empty(u8),
    /// The guest has not finished the previous request.
    #[error("the guest is still busy with slot {0}: try again in some seconds")]
    Busy(u8),
}

struct State {
    config: ConfigSpace,
    msi: Msi,
    /// Where the PCI Express capability is.
    express: usize,
    /// The card in the slot, whether power is on or off.
    card: Vec<Arc<dyn PciFunction>>,
    /// The guest was asked to release the card.
    removing: bool,
    /// The button was pressed, and the guest has not reacted. Linux clears the event first.
    pressed: bool,
    /// An event is set and enabled. The next interrupt is raised only after this was false in between.
    asserted: bool,
}

/// Which way a port leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// From the root complex down.
    Root,
    /// From a switch up.
    Upstream,
    /// From a switch down.
    Downstream,
}

impl PortKind {
    /// Device/Port Type (PCI Express 5.0, 7.5.3.2).
    fn express_type(self) -> u16 {
        match self {
            PortKind::Root => 4,
            PortKind::Upstream => 5,
            PortKind::Downstream => 6,
        }
    }

    /// Red Hat's id for a root port, and Texas Instruments' for the ports of their XIO3130 (QEMU
    /// `docs/specs/pci-ids`).
    fn identity(self) -> Identity {
        let (vendor, device) = match self {
            PortKind::Root => (0x1b36, 0x000c),
            PortKind::Upstream => (0x104c, 0x8232),
            PortKind::Downstream => (0x104c, 0x8233),
        };
        Identity {
            vendor,
            device,
            class: CLASS_BRIDGE,
            revision: 0,
            subsystem: (0, 0),
        }
    }
}

/// A port and the bus behind it.
pub struct Port {
    state: Mutex<State>,
    bus: Arc<PciBus>,
    /// Number of the slot behind it, or 0 if there is no slot: then nothing can be plugged or unplugged.
    slot: u8,
    ejected: EjectSink,
}

impl Port {
    /// The port of physical slot `slot`, with nothing behind it. With slot 0 it has no slot. It interrupts by
    /// `vector`.
    pub fn new(kind: PortKind, slot: u8, vector: Arc<dyn MsiVector>, ejected: EjectSink) -> Self {
        let mut config = ConfigSpace::new(1, kind.identity());
        config.set_writable(reg::PRIMARY_BUS, &[0xff; 3]);
        config.set_writable(reg::IO_BASE, &[0xf0, 0xf0]);
        config.set_writable(reg::MEMORY_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        config.set(reg::PREFETCHABLE_BASE, &PREFETCHABLE_64.to_le_bytes());
        config.set(reg::PREFETCHABLE_LIMIT, &PREFETCHABLE_64.to_le_bytes());
        config.set_writable(reg::PREFETCHABLE_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        config.set_writable(reg::PREFETCHABLE_BASE_UPPER, &[0xff; 8]);
        // SERR and VGA bits mean nothing here, but software may set them.
        config.set_writable(reg::BRIDGE_CONTROL, &[0x4f, 0]);
        let express = config.add_capability(&express(kind, slot));
        let msi = Msi::new(&mut config, vector);
        let port = Self {
            state: Mutex::new(State {
                config,
                msi,
                express,
                card: Vec::new(),
                removing: false,
                pressed: false,
                asserted: false,
            }),
            bus: Arc::default(),
            slot,
            ejected,
        };
        port.set_windows(None, None);
        port
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Puts a function behind the port before the guest runs: it is there from the start, with power on.
    pub fn insert(&self, function: Arc<dyn PciFunction>) -> Result<DevFn, PciError> {
        let state = &mut *self.lock();
        let place = self.bus.add(function.clone())?;
        state.card.push(function);
        state.set_register(LINK_STATUS, LINK_SPEED_WIDTH | LINK_ACTIVE);
        if self.slot != 0 {
            state.set_status(PRESENCE, 0);
            let control =
                state.slot_control() & !(POWER_OFF | POWER_INDICATOR) | POWER_INDICATOR_ON;
            state.set_register(SLOT_CONTROL, control);
        }
        Ok(place)
    }

    /// Whether the slot is empty.
    pub fn is_empty(&self) -> bool {
        self.lock().card.is_empty()
    }

    /// Whether the guest was asked to release the card.
    pub fn is_removing(&self) -> bool {
        self.lock().removing
    }

    /// Puts a function into the slot and signals the guest.
    pub fn plug(&self, function: Arc<dyn PciFunction>) -> Result<(), SlotError> {
        let state = &mut *self.lock();
        if !state.card.is_empty() {
            return Err(SlotError::Occupied(self.slot));
        }
        state.card.push(function);
        // The button is pressed with the card: the guest need not wait for a person to press it.
        state.set_status(
            PRESENCE | PRESENCE_DETECT_CHANGED | ATTENTION_BUTTON_PRESSED,
            0,
        );
        if state.slot_control() & POWER_OFF == 0 {
            self.power_on(state);
        }
        state.interrupt();
        Ok(())
    }

    /// Asks the guest to release the card.
    pub fn request_unplug(&self) -> Result<(), SlotError> {
        let state = &mut *self.lock();
        if state.card.is_empty() {
            return Err(SlotError::Empty(self.slot));
        }
        if state.slot_control() & POWER_OFF != 0 {
            // The guest does not use it.
            state.removing = true;
            self.eject(state);
            state.interrupt();
            return Ok(());
        }
        // A second press would cancel the first one.
        let blinks = state.slot_control() & POWER_INDICATOR == POWER_INDICATOR_BLINK;
        if state.pressed || blinks {
            return Err(SlotError::Busy(self.slot));
        }
        state.removing = true;
        state.pressed = true;
        state.set_status(ATTENTION_BUTTON_PRESSED, 0);
        state.interrupt();
        Ok(())
    }

    /// Removes the card without asking: the guest finds it gone (PCI Express 5.0, 6.7.1, surprise removal).
    pub fn force_remove(&self) {
        let state = &mut *self.lock();
        if state.card.is_empty() {
            return;
        }
        self.bus.clear();
        state.card.clear();
        state.removing = false;
        state.pressed = false;
        state.set_register(LINK_STATUS, LINK_SPEED_WIDTH);
        if self.slot == 0 {
            return;
        }
        state.set_status(PRESENCE_DETECT_CHANGED | LINK_STATE_CHANGED, PRESENCE);
        state.interrupt();
    }

    /// Writes to the registers that every bridge has.
    fn write_plain(&self, state: &mut State, offset: usize, data: &[u8]) {
        let in_reset = |state: &State| state.config.u16(reg::BRIDGE_CONTROL) & BUS_RESET != 0;
        let was_in_reset = in_reset(state);
        state.config.write(offset, data);
        if in_reset(state) && !was_in_reset {
            self.bus.reset();
        }
        if state.msi.touched(offset, data.len()) {
            state.msi.update(&state.config);
        }
    }

    fn power_on(&self, state: &mut State) {
        for function in &state.card {
            if let Err(error) = self.bus.add(function.clone()) {
                tracing::error!(%error, slot = self.slot, "a card has too many functions");
            }
        }
        if !state.card.is_empty() {
            state.set_register(LINK_STATUS, LINK_SPEED_WIDTH | LINK_ACTIVE);
            state.set_status(LINK_STATE_CHANGED, 0);
        }
    }

    fn power_off(&self, state: &mut State) {
        self.bus.clear();
        for function in &state.card {
            function.reset();
        }
        if !state.card.is_empty() {
            state.set_register(LINK_STATUS, LINK_SPEED_WIDTH);
            state.set_status(LINK_STATE_CHANGED, 0);
        }
        self.eject(state);
    }

    /// Removes the card, if it was asked for.
    fn eject(&self, state: &mut State) {
        if std::mem::take(&mut state.removing) {
            state.card.clear();
            state.set_status(PRESENCE_DETECT_CHANGED, PRESENCE);
            (self.ejected)(self.slot);
        }
    }
}

impl State {
    fn register(&self, offset: usize) -> u16 {
        self.config.u16(self.express + offset)
    }

    fn set_register(&mut self, offset: usize, value: u16) {
        self.config.set(self.express + offset, &value.to_le_bytes());
    }

    fn slot_control(&self) -> u16 {
        self.register(SLOT_CONTROL)
    }

    fn slot_status(&self) -> u16 {
        self.register(SLOT_STATUS)
    }

    fn set_status(&mut self, set: u16, clear: u16) {
        let status = self.slot_status() & !clear | set;
        self.set_register(SLOT_STATUS, status);
    }

    /// Raises the interrupt when the first event comes (PCI Express 5.0, 6.7.3.4).
    fn interrupt(&mut self) {
        let control = self.slot_control();
        let mut enabled = control & SLOT_EVENTS & !LINK_STATE_CHANGED;
        if control & LINK_STATE_CHANGED_ENABLE != 0 {
            enabled |= LINK_STATE_CHANGED;
        }
        let asserted = control & HOTPLUG_INTERRUPT_ENABLE != 0 && self.slot_status() & enabled != 0;
        if asserted && !self.asserted {
            self.msi.raise();
        }
        self.asserted = asserted;
    }
}

/// The PCI Express capability of a port with an empty slot, or none.
fn express(kind: PortKind, slot: u8) -> Capability {
    let mut body = vec![0; EXPRESS_SIZE - 2];
    let mut put = |offset: usize, bytes: &[u8]| {
        body[offset - 2..offset - 2 + bytes.len()].copy_from_slice(bytes);
    };
    let flags = EXPRESS_VERSION | kind.express_type() << EXPRESS_TYPE_SHIFT;
    if slot == 0 {
        put(EXPRESS_FLAGS, &flags.to_le_bytes());
        let link = u32::from(LINK_SPEED_WIDTH);
        put(LINK_CAPABILITIES, &link.to_le_bytes());
        put(LINK_STATUS, &LINK_SPEED_WIDTH.to_le_bytes());
        return Capability {
            id: CAP_ID_PCI_EXPRESS,
            body,
            writable: Vec::new(),
        };
    }
    put(EXPRESS_FLAGS, &(flags | EXPRESS_SLOT).to_le_bytes());
    let link = u32::from(LINK_SPEED_WIDTH) | LINK_ACTIVE_REPORTING | u32::from(slot) << 24;
    put(LINK_CAPABILITIES, &link.to_le_bytes());
    put(LINK_STATUS, &LINK_SPEED_WIDTH.to_le_bytes());
    let capabilities = SLOT_FEATURES | u32::from(slot) << SLOT_NUMBER_SHIFT;
    put(SLOT_CAPABILITIES, &capabilities.to_le_bytes());
    let control = POWER_OFF | POWER_INDICATOR_OFF | ATTENTION_INDICATOR_OFF;
    put(SLOT_CONTROL, &control.to_le_bytes());
    let [low, high] = SLOT_CONTROL_WRITABLE.to_le_bytes();
    Capability {
        id: CAP_ID_PCI_EXPRESS,
        body,
        writable: vec![(SLOT_CONTROL - 2, low), (SLOT_CONTROL - 1, high)],
    }
}

impl Bridge for Port {
    fn bus(&self) -> &PciBus {
        &self.bus
    }

    fn forwarded_buses(&self) -> RangeInclusive<u8> {
        let state = self.lock();
        let [secondary, subordinate] = state.config.u16(reg::SECONDARY_BUS).to_le_bytes();
        secondary..=subordinate
    }

    fn set_buses(&self, primary: u8, secondary: u8, subordinate: u8) {
        self.lock()
            .config
            .set(reg::PRIMARY_BUS, &[primary, secondary, subordinate]);
    }

    fn set_windows(&self, memory: Option<(u64, u64)>, prefetchable: Option<(u64, u64)>) {
        /// A window whose limit is below its base is closed.
        const CLOSED: (u64, u64) = (MEMORY_UNIT, MEMORY_UNIT);
        let field = |address: u64| ((address >> 16) as u16 & 0xfff0).to_le_bytes();
        let config = &mut self.lock().config;
        let (base, end) = memory.unwrap_or(CLOSED);
        config.write(reg::MEMORY_BASE, &field(base));
        config.write(reg::MEMORY_LIMIT, &field(end - MEMORY_UNIT));
        let (base, end) = prefetchable.unwrap_or(CLOSED);
        let last = end - MEMORY_UNIT;
        config.write(reg::PREFETCHABLE_BASE, &field(base));
        config.write(reg::PREFETCHABLE_LIMIT, &field(last));
        config.write(
            reg::PREFETCHABLE_BASE_UPPER,
            &((base >> 32) as u32).to_le_bytes(),
        );
        config.write(
            reg::PREFETCHABLE_LIMIT_UPPER,
            &((last >> 32) as u32).to_le_bytes(),
        );
        config.write(reg::IO_BASE, &[0xf0, 0x00]);
        let command = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER;
        config.write(reg::COMMAND, &command.to_le_bytes());
    }
}

impl PciFunction for Port {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.lock().config.read(offset.into(), data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let state = &mut *self.lock();
        let offset = usize::from(offset);
        if self.slot == 0 {
            return self.write_plain(state, offset, data);
        }
        let powered = state.slot_control() & POWER_OFF == 0;
        self.write_plain(state, offset, data);
        let control = state.express + SLOT_CONTROL;
        let written = offset..offset + data.len();
        // A write of 1 clears an event.
        for (at, byte) in written.clone().zip(data) {
            let clear = match at.checked_sub(control + 2) {
                Some(0) => u16::from(*byte),
                Some(1) => u16::from(*byte) << 8,
                _ => continue,
            };
            state.set_status(0, clear & SLOT_EVENTS);
        }
        if written.contains(&control) || written.contains(&(control + 1)) {
            state.pressed = false;
            match (powered, state.slot_control() & POWER_OFF == 0) {
                (false, true) => self.power_on(state),
                (true, false) => self.power_off(state),
                _ => {}
            }
            state.set_status(COMMAND_COMPLETED, 0);
        }
        state.interrupt();
    }

    fn bars(&self) -> Vec<(usize, BarKind, u64)> {
        Vec::new()
    }

    fn place_bar(&self, _index: usize, _address: u64) {}

    /// A reset of the primary bus resets the secondary bus too.
    fn reset(&self) {
        self.bus.reset();
    }
}

#[cfg(test)]
#[path = "bridge_tests.rs"]
mod tests;
