//! PCI Express: configuration space, BARs, buses, bridges, and the ways a guest reaches them.
//!
//! Register names are those of the PCI Local Bus Specification 3.0 and the PCI Express Base
//! Specification.

mod access;
mod bar;
mod bridge;
mod bus;
mod config;
mod function;
mod host_bridge;
mod msi;
mod msix;

pub use access::{ConfigMechanism1, Ecam, MECHANISM_1_PORTS};
pub use bar::{BarContent, BarHandler, BarKind, BarMemory, BarReport, Bars, ROM_INDEX};
pub use bridge::{EjectSink, Port, PortKind, SlotError};
pub use bus::{Bridge, PciBus, PciError, Windows};
pub use config::{
    COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE, COMMAND_IO, COMMAND_MEMORY, CONFIG_SPACE_SIZE,
    Capability, ConfigSpace, Identity, reg,
};
pub use function::{DevFn, FunctionContext, PciFunction};
pub use host_bridge::HostBridge;
pub use msi::Msi;
pub use msix::{Msix, MsixError, PBA_ENTRY, TABLE_ENTRY};
