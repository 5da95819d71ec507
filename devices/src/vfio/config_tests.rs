//! Configuration space of passed-through functions: shadow, masks and consequences.

use proptest::prelude::*;

use super::*;

/// A function with power management at 0x40, MSI at 0x50, PCI Express at 0x70, MSI-X at 0xb0, and
/// extended capabilities AER, ARI, SR-IOV, LTR.
fn device() -> Box<[u8; CONFIG_SPACE_SIZE]> {
    let mut bytes = Box::new([0; CONFIG_SPACE_SIZE]);
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &[0x86, 0x80, 0xca, 0x10]);
    put(reg::STATUS, &[0x10]);
    put(reg::HEADER_TYPE, &[0x80]);
    put(reg::BASE_ADDRESS_0, &[0x0c, 0, 0xf0, 0xfe]);
    put(reg::CAPABILITIES_POINTER, &[0x40]);
    put(reg::INTERRUPT_LINE, &[11, 1]);
    put(0x40, &[1, 0x50]);
    put(0x50, &[5, 0x70, 0x84, 0x01, 0xef]);
    put(0x70, &[0x10, 0xb0]);
    put(0xb0, &[0x11, 0, 2, 0, 3, 0, 0, 0, 3, 0x20, 0, 0]);
    put(0x100, &0x1501_0001u32.to_le_bytes());
    put(0x150, &0x1601_000eu32.to_le_bytes());
    put(0x160, &0x1a01_0010u32.to_le_bytes());
    put(0x1a0, &0x0001_0018u32.to_le_bytes());
    bytes
}

fn config() -> VirtualConfig {
    VirtualConfig::new(device(), false)
}

fn read(config: &VirtualConfig, at: usize, len: usize) -> Vec<u8> {
    let mut data = device()[at..at + len].to_vec();
    config.overlay(at, &mut data);
    data
}

#[test]
fn extended_capabilities_of_the_hosts_are_not_in_the_list() {
    let config = config();
    let ids: Vec<_> = extended_capabilities(&config.space)
        .into_iter()
        .map(|at| config.space.u16(at))
        .collect();
    assert_eq!(ids, [0x01, 0x18]);
    assert_eq!(read(&config, 0x100, 4), 0x1a01_0001u32.to_le_bytes());
}

#[test]
fn a_hidden_first_capability_leads_on() {
    let mut bytes = device();
    bytes[0x100..0x104].copy_from_slice(&0x1501_0010u32.to_le_bytes());
    let config = VirtualConfig::new(bytes, false);
    assert_eq!(config.space.u32(0x100), 0x1a00_0000);
}

#[test]
fn the_hosts_addresses_and_interrupts_are_not_the_guests() {
    let config = config();
    assert_eq!(read(&config, reg::BASE_ADDRESS_0, 4), [0; 4]);
    assert_eq!(read(&config, reg::INTERRUPT_LINE, 2), [0, 0]);
    let with_pin = VirtualConfig::new(device(), true);
    assert_eq!(with_pin.interrupt_pin(), Some(0));
    assert_eq!(read(&with_pin, reg::INTERRUPT_LINE, 2), [0, 1]);
    assert_eq!(read(&config, reg::HEADER_TYPE, 1), [0]);
    assert_eq!(read(&config, 0x50, 8), [5, 0x70, 0x84, 0, 0, 0, 0, 0]);
    assert_eq!(read(&config, 0, 4), [0x86, 0x80, 0xca, 0x10]);
}

#[test]
fn what_is_ours_is_not_forwarded() {
    let mut config = config();
    let consequences = config.write(reg::INTERRUPT_LINE, &[7, 9, 1, 2]);
    assert_eq!(consequences.forward, [(0x3e, vec![1, 2])]);
    assert_eq!(read(&config, reg::INTERRUPT_LINE, 2), [7, 0]);
    let consequences = config.write(reg::COMMAND, &[6, 4]);
    assert_eq!(consequences.forward, [(reg::COMMAND, vec![6, 4])]);
    assert_eq!(config.space.command(), 0x0406);
    assert!(
        config
            .write(reg::BASE_ADDRESS_0, &[0xff; 4])
            .forward
            .is_empty()
    );
}

#[test]
fn resets_and_sleep_are_noticed() {
    let mut config = config();
    assert!(config.write(0x78, &[0, 0x80]).resets);
    assert!(config.write(0x76, &[0, 0, 0, 0x80]).resets);
    assert!(!config.write(0x78, &[0xff, 0x7f]).resets);
    assert!(!config.write(0x44, &[3, 0]).resets);
    assert!(config.asleep());
    config.write(0x44, &[0, 0]);
    assert!(!config.asleep());
}

#[test]
fn msi_and_msix_follow_their_registers() {
    let mut config = config();
    assert_eq!(config.msix.unwrap().count, 3);
    assert_eq!(config.msix.unwrap().pba, (3, 0x2000));
    assert_eq!(config.write(0xb2, &[0, 0xc0]).msix, Some(0xc002));
    assert_eq!(config.msi().unwrap().vectors, 0);
    config.write(0x54, &[0x00, 0x10, 0xe0, 0xfe, 1, 0, 0, 0]);
    config.write(0x5c, &[0x41, 0]);
    // The guest asks for 32 vectors of a device with 4.
    assert!(config.write(0x52, &[0x51, 0]).msi);
    let setting = MsiSetting {
        vectors: 4,
        address: 0x1_fee0_1000,
        data: 0x41,
    };
    assert_eq!(config.msi(), Some(setting));
}

#[test]
fn a_reset_brings_back_what_was_kept() {
    let mut config = config();
    config.keep();
    config.write(reg::COMMAND, &[6, 0]);
    config.write(0xb2, &[0, 0xc0]);
    config.write(0x44, &[3]);
    config.reset();
    assert_eq!(config.space.command(), 0);
    assert_eq!(config.space.u16(0xb2), 2);
    assert!(!config.asleep());
}

proptest! {
    #[test]
    fn any_device_and_any_write_are_survived(
        seed in prop::collection::vec(any::<u8>(), 64..256),
        writes in prop::collection::vec((0usize..4100, prop::collection::vec(any::<u8>(), 1..5)), 0..16),
    ) {
        let mut bytes = Box::new([0; CONFIG_SPACE_SIZE]);
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = seed[at % seed.len()];
        }
        let mut config = VirtualConfig::new(bytes, true);
        for (at, data) in writes {
            let consequences = config.write(at, &data);
            let forwarded: usize = consequences.forward.iter().map(|(_, bytes)| bytes.len()).sum();
            prop_assert!(forwarded <= data.len());
            config.msi();
            let mut back = data.clone();
            config.overlay(at, &mut back);
        }
    }
}
