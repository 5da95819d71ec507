//! The port's windows, and its slot as a guest's driver works it.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::hypervisor::{Hypervisor, test_util::FakeHypervisor};

impl Port {
    /// A port without interrupts.
    pub fn for_tests(slot: u8) -> Arc<Self> {
        let vector = FakeHypervisor::default().msi_vector().unwrap();
        Arc::new(Self::new(PortKind::Root, slot, vector, Arc::new(|_| ())))
    }
}

/// A function that counts its resets.
#[derive(Default)]
struct Card(AtomicU32);

impl PciFunction for Card {
    fn read_config(&self, _: u16, data: &mut [u8]) {
        data.fill(0x42);
    }
    fn write_config(&self, _: u16, _: &[u8]) {}
    fn bars(&self) -> Vec<(usize, BarKind, u64)> {
        Vec::new()
    }
    fn place_bar(&self, _: usize, _: u64) {}
    fn reset(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Slot {
    port: Port,
    vector: Arc<dyn MsiVector>,
    ejected: Arc<AtomicU32>,
    card: Arc<Card>,
}

fn slot() -> Slot {
    let vector = FakeHypervisor::default().msi_vector().unwrap();
    let ejected = Arc::new(AtomicU32::new(0));
    let sink = ejected.clone();
    let port = Port::new(
        PortKind::Root,
        7,
        vector.clone(),
        Arc::new(move |slot| sink.store(slot.into(), Ordering::Relaxed)),
    );
    Slot {
        port,
        vector,
        ejected,
        card: Arc::default(),
    }
}

impl Slot {
    fn read(&self, register: usize) -> u16 {
        let at = self.port.lock().express + register;
        let mut data = [0; 2];
        self.port.read_config(at as u16, &mut data);
        u16::from_le_bytes(data)
    }

    fn write(&self, register: usize, value: u16) {
        let at = self.port.lock().express + register;
        self.port.write_config(at as u16, &value.to_le_bytes());
    }

    fn interrupts(&self) -> u64 {
        self.vector.event().read().unwrap_or(0)
    }

    /// Takes all events, as an interrupt handler does.
    fn take_events(&self) -> u16 {
        let events = self.read(SLOT_STATUS) & SLOT_EVENTS;
        self.write(SLOT_STATUS, events);
        events
    }

    fn on_bus(&self) -> bool {
        let mut byte = [0];
        self.port
            .bus()
            .read_config(0, super::super::DevFn(0), 0, &mut byte);
        byte[0] == 0x42
    }

    /// What a driver enables.
    fn enable(&self) {
        let enable = ATTENTION_BUTTON_PRESSED
            | COMMAND_COMPLETED
            | HOTPLUG_INTERRUPT_ENABLE
            | LINK_STATE_CHANGED_ENABLE;
        let power = self.read(SLOT_CONTROL) & (POWER_OFF | POWER_INDICATOR);
        self.write(SLOT_CONTROL, enable | power);
        assert_eq!(self.interrupts(), 1);
        assert_eq!(self.take_events(), COMMAND_COMPLETED);
    }

    fn power(&self, on: bool) {
        let control = self.read(SLOT_CONTROL) & !(POWER_OFF | POWER_INDICATOR);
        let power = if on {
            POWER_INDICATOR_ON
        } else {
            POWER_OFF | POWER_INDICATOR_OFF
        };
        self.write(SLOT_CONTROL, control | power);
    }
}

#[test]
fn windows_read_back_as_programmed() {
    let port = Port::for_tests(1);
    port.set_windows(
        Some((0xc010_0000, 0xc030_0000)),
        Some((0x80_0000_0000, 0x81_0000_0000)),
    );
    let config = &port.lock().config;
    assert_eq!(config.u32(reg::MEMORY_BASE), 0xc020_c010);
    assert_eq!(config.u32(reg::PREFETCHABLE_BASE), 0xfff1_0001);
    assert_eq!(config.u32(reg::PREFETCHABLE_BASE_UPPER), 0x80);
    assert_eq!(config.u32(reg::PREFETCHABLE_LIMIT_UPPER), 0x80);
}

#[test]
fn a_new_port_forwards_nothing() {
    let port = Port::for_tests(1);
    let config = &port.lock().config;
    assert!(config.u16(reg::MEMORY_BASE) > config.u16(reg::MEMORY_LIMIT));
    assert!(config.u16(reg::PREFETCHABLE_BASE) > config.u16(reg::PREFETCHABLE_LIMIT));
}

#[test]
fn a_card_comes_when_the_guest_turns_power_on() {
    let slot = slot();
    slot.enable();
    slot.port.plug(slot.card.clone()).unwrap();
    assert_eq!(slot.interrupts(), 1);
    let events = slot.take_events();
    assert_eq!(events, ATTENTION_BUTTON_PRESSED | PRESENCE_DETECT_CHANGED);
    assert!(slot.read(SLOT_STATUS) & PRESENCE != 0 && !slot.on_bus());
    slot.power(true);
    assert!(slot.on_bus() && slot.read(LINK_STATUS) & LINK_ACTIVE != 0);
    assert_eq!(slot.take_events(), COMMAND_COMPLETED | LINK_STATE_CHANGED);
    assert_eq!(
        slot.port.plug(slot.card.clone()),
        Err(SlotError::Occupied(7))
    );
}

#[test]
fn a_card_goes_when_the_guest_was_asked_and_turns_power_off() {
    let slot = slot();
    slot.port.insert(slot.card.clone()).unwrap();
    slot.enable();
    slot.power(true);
    slot.take_events();
    slot.interrupts();
    slot.port.request_unplug().unwrap();
    assert_eq!(slot.interrupts(), 1);
    assert_eq!(slot.port.request_unplug(), Err(SlotError::Busy(7)));
    assert_eq!(slot.take_events(), ATTENTION_BUTTON_PRESSED);
    // Linux has yet to look at what it cleared.
    assert_eq!(slot.port.request_unplug(), Err(SlotError::Busy(7)));
    let blink = slot.read(SLOT_CONTROL) & !POWER_INDICATOR | POWER_INDICATOR_BLINK;
    slot.write(SLOT_CONTROL, blink);
    assert_eq!(slot.port.request_unplug(), Err(SlotError::Busy(7)));
    let resets = slot.card.0.load(Ordering::Relaxed);
    slot.power(false);
    assert!(!slot.on_bus() && slot.port.is_empty());
    assert_eq!(slot.card.0.load(Ordering::Relaxed), resets + 1);
    assert_eq!(slot.ejected.load(Ordering::Relaxed), 7);
    assert_eq!(slot.read(SLOT_STATUS) & PRESENCE, 0);
    assert_eq!(slot.port.request_unplug(), Err(SlotError::Empty(7)));
}

#[test]
fn power_alone_does_not_take_a_card_out() {
    let slot = slot();
    slot.port.insert(slot.card.clone()).unwrap();
    slot.power(false);
    assert!(!slot.on_bus() && !slot.port.is_empty());
    slot.power(true);
    assert!(slot.on_bus());
    slot.power(false);
    // The guest does not use the card, so the unplug needs no consent.
    slot.port.request_unplug().unwrap();
    assert!(slot.port.is_empty());
    assert_eq!(slot.ejected.load(Ordering::Relaxed), 7);
}

#[test]
fn an_interrupt_comes_only_after_all_events_were_taken() {
    let slot = slot();
    slot.enable();
    slot.power(true);
    assert_eq!(slot.interrupts(), 1);
    slot.power(true);
    assert_eq!(slot.interrupts(), 0);
    slot.take_events();
    slot.power(true);
    assert_eq!(slot.interrupts(), 1);
}

proptest::proptest! {
    #[test]
    fn any_write_is_survived(
        writes in proptest::collection::vec((0u16..0x100, proptest::num::u32::ANY), 0..40),
    ) {
        let slot = slot();
        slot.port.insert(slot.card.clone()).unwrap();
        for (at, value) in writes {
            slot.port.write_config(at & !3, &value.to_le_bytes());
            let _ = slot.port.request_unplug();
            let _ = slot.port.plug(slot.card.clone());
        }
    }
}

#[test]
fn what_is_taken_away_is_gone_without_asking() {
    let slot = slot();
    slot.port.insert(slot.card.clone()).unwrap();
    assert_eq!(slot.read(SLOT_STATUS) & PRESENCE, PRESENCE);
    slot.port.force_remove();
    let status = slot.read(SLOT_STATUS);
    assert_eq!(status & PRESENCE, 0);
    assert_eq!(status & PRESENCE_DETECT_CHANGED, PRESENCE_DETECT_CHANGED);
    assert_eq!(slot.read(LINK_STATUS) & LINK_ACTIVE, 0);
    assert!(slot.port.is_empty());
    assert_eq!(Arc::strong_count(&slot.card), 1);
    assert_eq!(slot.ejected.load(Ordering::Relaxed), 0);
    slot.port.force_remove();
    slot.port.plug(slot.card.clone()).unwrap();
    assert_eq!(slot.read(LINK_STATUS) & LINK_ACTIVE, LINK_ACTIVE);
}

#[test]
fn the_reset_bit_resets_what_is_behind_the_port_once() {
    let slot = slot();
    slot.port.insert(slot.card.clone()).unwrap();
    let resets = || slot.card.0.load(Ordering::Relaxed);
    let control = reg::BRIDGE_CONTROL as u16;
    slot.port.write_config(control, &[0x03]);
    assert_eq!(resets(), 0);
    slot.port.write_config(control, &[0x43]);
    slot.port.write_config(control, &[0x43]);
    assert_eq!(resets(), 1);
    slot.port.write_config(control, &[0]);
    assert_eq!(resets(), 1);
    slot.port.write_config(control, &[0x40]);
    assert_eq!(resets(), 2);
}
