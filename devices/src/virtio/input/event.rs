//! Input events.

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InputEvent {
    /// `EV_KEY`, `EV_REL`, `EV_ABS`.
    pub type_: u16,
    /// Key, axis.
    pub code: u16,
    /// 1 and 0 for keys that are pressed and released, a distance or a position for axes.
    pub value: i32,
}
