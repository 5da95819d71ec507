//! Input events.

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InputEvent {
    /// `EV_KEY`, `EV_REL`, `EV_ABS`.
    pub type_: u16,
    /// Key, axis.
    pub code: u16,
    /// 1 or 0 for a key press or release, a distance or position for axes.
    pub value: i32,
}
