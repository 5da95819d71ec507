//! Wheels and touchpads: from lengths and notches of the compositor to 120ths of a notch.

use wayland_client::protocol::wl_pointer;

/// `axis` of a notch, from a wheel without `axis_value120`: compositors send 10.
const UNITS_A_NOTCH: f64 = 10.0;
/// `axis_value120` of a notch.
const NOTCH: f64 = 120.0;

/// Scrolling since the last `wl_pointer.frame`: right, down.
#[derive(Debug, Default)]
pub struct Scroll {
    /// `axis_value120`, in 120ths of a notch: from wheels only, and newer compositors.
    pub exact: [i32; 2],
    /// `axis`, in units of the compositor.
    pub lengths: [f64; 2],
}

impl Scroll {
    /// The turn of both wheels in 120ths of a notch. Shorter lengths stay for the next frame.
    pub fn take(&mut self) -> [i32; 2] {
        let exact = std::mem::take(&mut self.exact);
        let mut turned = [0; 2];
        for axis in 0..2 {
            let length = &mut self.lengths[axis];
            if exact[axis] != 0 {
                turned[axis] = exact[axis];
                *length = 0.0;
            } else {
                let parts = (*length / UNITS_A_NOTCH * NOTCH).trunc();
                turned[axis] = parts as i32;
                *length -= parts / NOTCH * UNITS_A_NOTCH;
            }
        }
        turned
    }
}

/// The index of an axis in a [`Scroll`].
pub fn index(axis: wl_pointer::Axis) -> usize {
    match axis {
        wl_pointer::Axis::HorizontalScroll => 0,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wheel_with_notches_counts_once() {
        let mut scroll = Scroll::default();
        (scroll.exact[1], scroll.lengths[1]) = (-120, -15.0);
        assert_eq!(scroll.take(), [0, -120]);
        assert_eq!(scroll.take(), [0, 0]);
        // A touchpad sends only lengths, and short ones.
        for length in [10.0, 0.05, 0.05] {
            scroll.lengths[0] += length;
        }
        assert_eq!(scroll.take(), [121, 0]);
        scroll.lengths[0] += 0.05;
        assert_eq!(scroll.take(), [0, 0]);
        scroll.lengths[0] += 0.05;
        assert_eq!(scroll.take(), [1, 0]);
    }
}
