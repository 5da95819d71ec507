//! The grab of the compositor's shortcuts, and the chord that releases it.

use wayland_client::{
    Dispatch, QueueHandle,
    protocol::{wl_seat::WlSeat, wl_surface::WlSurface},
};
use wayland_protocols::wp::keyboard_shortcuts_inhibit::zv1::client::{
    zwp_keyboard_shortcuts_inhibit_manager_v1::ZwpKeyboardShortcutsInhibitManagerV1,
    zwp_keyboard_shortcuts_inhibitor_v1::ZwpKeyboardShortcutsInhibitorV1,
};

/// The object that keeps the compositor from its own shortcuts.
pub type Inhibitor = ZwpKeyboardShortcutsInhibitorV1;

/// Linux `input-event-codes.h`.
const KEY_LEFTCTRL: u32 = 29;
const KEY_RIGHTCTRL: u32 = 97;
const KEY_LEFTALT: u32 = 56;
const KEY_RIGHTALT: u32 = 100;
const KEY_G: u32 = 34;

/// The grab of the compositor's own shortcuts. Ctrl-Alt-G takes and releases it.
pub struct Grab {
    manager: Option<ZwpKeyboardShortcutsInhibitManagerV1>,
    inhibitor: Option<Inhibitor>,
    /// Keys that are down.
    down: Vec<u32>,
}

impl Grab {
    /// No grab yet. Without a manager, the compositor keeps its shortcuts.
    pub fn new(manager: Option<ZwpKeyboardShortcutsInhibitManagerV1>) -> Self {
        Self {
            manager,
            inhibitor: None,
            down: Vec::new(),
        }
    }

    /// Whether shortcuts reach the guest.
    pub fn is_held(&self) -> bool {
        self.inhibitor.is_some()
    }

    /// Takes the grab for the window `surface`, or releases it.
    pub fn set<D: Dispatch<Inhibitor, ()> + 'static>(
        &mut self,
        held: bool,
        surface: &WlSurface,
        seat: &WlSeat,
        handle: &QueueHandle<D>,
    ) {
        if let Some(inhibitor) = self.inhibitor.take() {
            inhibitor.destroy();
        }
        if let (true, Some(manager)) = (held, &self.manager) {
            self.inhibitor = Some(manager.inhibit_shortcuts(surface, seat, handle, ()));
        }
    }

    /// Notes a key. Returns whether it completes Ctrl-Alt-G.
    pub fn key(&mut self, code: u32, pressed: bool) -> bool {
        self.down.retain(|&down| down != code);
        let any = |codes: [u32; 2]| codes.iter().any(|code| self.down.contains(code));
        let chord = pressed
            && code == KEY_G
            && any([KEY_LEFTCTRL, KEY_RIGHTCTRL])
            && any([KEY_LEFTALT, KEY_RIGHTALT]);
        if pressed {
            self.down.push(code);
        }
        chord
    }

    /// All keys are up.
    pub fn forget(&mut self) {
        self.down.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_control_alt_g_is_the_chord() {
        let mut grab = Grab::new(None);
        assert!(!grab.key(KEY_G, true));
        assert!(!grab.key(KEY_G, false));
        assert!(!grab.key(KEY_LEFTCTRL, true));
        assert!(!grab.key(KEY_G, true));
        assert!(!grab.key(KEY_RIGHTALT, true));
        assert!(grab.key(KEY_G, true));
        grab.forget();
        assert!(!grab.key(KEY_G, true));
    }
}
