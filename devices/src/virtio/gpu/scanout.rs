//! What the driver set an output to show.

use super::geometry::{Area, Layout};

/// What an output was told to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scanout {
    /// Resource with the pixels.
    pub resource: u32,
    /// How they lie in it.
    pub layout: Layout,
    /// Which of them are shown.
    pub area: Area,
}

impl Scanout {
    /// The part of a flushed rectangle that the output shows, in coordinates of the output.
    pub fn damage(&self, flushed: &Area) -> Option<Area> {
        let visible = flushed.intersection(&self.area)?;
        Some(visible.relative_to(&self.area))
    }
}

/// Where pixels live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// In guest RAM: writes of the guest are visible at once.
    GuestRam,
    /// In memory of a passed-through device, which may draw there too.
    Device,
    /// In memory of this process, as of the last transfer, or in memory of its renderer.
    Host,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::gpu::format::Format;

    fn area(x: u32, y: u32, width: u32, height: u32) -> Area {
        Area {
            x,
            y,
            width,
            height,
        }
    }

    #[test]
    fn damage_is_what_the_output_shows_of_it() {
        let scanout = Scanout {
            resource: 1,
            layout: Layout {
                format: Format::CURSOR,
                width: 200,
                height: 100,
                stride: 800,
                offset: 0,
            },
            area: area(100, 10, 100, 50),
        };
        assert_eq!(scanout.damage(&area(0, 0, 100, 100)), None);
        assert_eq!(
            scanout.damage(&area(90, 0, 20, 100)),
            Some(area(0, 0, 10, 50))
        );
        assert_eq!(area(0, 0, 1, 1).union(&area(5, 6, 2, 2)), area(0, 0, 7, 8));
    }
}
