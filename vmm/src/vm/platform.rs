//! Devices at fixed ports that every machine has: serial port, power events, clock, keyboard controller, pvpanic.

use std::{io, sync::Arc};

use fanlight_arch::layout;
use fanlight_devices::{
    hypervisor::Hypervisor,
    legacy::{
        RequestSink, i8042, i8042::I8042, output::Output, power, power::PowerDevice,
        pvpanic::PvPanic, rtc, rtc::Rtc, serial, serial::SerialPort,
    },
    memory::{AddressSpace, IoHandler},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::vm::{error::MachineError, guest_console::GuestConsole};

/// The devices that the host acts on.
pub struct Platform {
    power: Arc<PowerDevice>,
}

impl Platform {
    /// Maps the devices at their ports. The serial port writes to `output`; the console returned is for its input.
    pub fn new(
        hypervisor: &dyn Hypervisor,
        ports: &AddressSpace,
        output: Output,
        requests: RequestSink,
    ) -> Result<(Self, GuestConsole), MachineError> {
        let host = MachineError::host;
        let line = |gsi| {
            let line = hypervisor.irq_line(gsi);
            line.map_err(host("connect an interrupt line"))
        };
        let room = EventFd::new(EFD_NONBLOCK).map_err(host("make an event descriptor"))?;
        let signal = room.try_clone().map_err(host("duplicate a descriptor"))?;
        let serial = SerialPort::new(line(layout::COM1_IRQ)?, Box::new(output), signal);
        let serial = Arc::new(serial);
        let power = Arc::new(PowerDevice::new(line(layout::GED_IRQ)?, requests.clone()));
        let legacy: [(u16, u64, Arc<dyn IoHandler>); 5] = [
            (layout::COM1_PORT, serial::PORTS, serial.clone()),
            (layout::GED_PORT, power::PORTS, power.clone()),
            (layout::RTC_PORT, rtc::PORTS, Arc::new(Rtc::default())),
            (
                layout::I8042_PORT,
                i8042::PORTS,
                Arc::new(I8042::new(requests.clone())),
            ),
            (layout::PVPANIC_PORT, 1, Arc::new(PvPanic::new(requests))),
        ];
        for (port, count, device) in legacy {
            ports.insert_io(port.into(), count, device)?;
        }
        let console = GuestConsole {
            give: Box::new(move |bytes| serial.input(bytes)),
            resize: Box::new(|_, _| {}),
            room,
        };
        Ok((Self { power }, console))
    }

    /// Presses the power button. A guest that handles it shuts down.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.power.press_power_button()
    }
}
