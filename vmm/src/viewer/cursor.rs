//! The guest's cursor on the host's pointer.

use std::{io, os::fd::AsFd};

use wayland_client::{
    Dispatch, QueueHandle,
    protocol::{
        wl_buffer::WlBuffer, wl_pointer::WlPointer, wl_shm, wl_shm::WlShm, wl_shm_pool::WlShmPool,
        wl_surface::WlSurface,
    },
};

use super::{buffers::shared_memory, frame::CursorImage, mapping::Mapping};

/// The longest side of a cursor in pixels. Cursors of virtio-gpu have 64.
const MAX_SIDE: u32 = 512;

/// A surface that follows the pointer.
pub struct CursorSurface {
    surface: WlSurface,
    shm: WlShm,
    image: Option<CursorImage>,
    /// The pointer in the window, and the serial of its `enter` event.
    pointer: Option<(WlPointer, u32)>,
}

impl CursorSurface {
    /// A hidden cursor.
    pub fn new(surface: WlSurface, shm: WlShm) -> Self {
        Self {
            surface,
            shm,
            image: None,
            pointer: None,
        }
    }

    /// Sets another image, or hides the cursor. An image that contradicts itself hides it too.
    pub fn set<D>(&mut self, image: Option<CursorImage>, handle: &QueueHandle<D>) -> io::Result<()>
    where
        D: Dispatch<WlShmPool, ()> + Dispatch<WlBuffer, ()> + 'static,
    {
        self.image = image.filter(is_sane);
        if let Some(image) = &self.image {
            let memory = shared_memory(image.pixels.len())?;
            Mapping::new(&memory, image.pixels.len(), true)?
                .write(0, &image.pixels)
                .ok_or_else(|| io::Error::other("a cursor does not fit its memory"))?;
            let len = image.pixels.len() as i32;
            let pool = self.shm.create_pool(memory.as_fd(), len, handle, ());
            let (width, height) = (image.width as i32, image.height as i32);
            let format = wl_shm::Format::Argb8888;
            let buffer = pool.create_buffer(0, width, height, width * 4, format, handle, ());
            self.surface.attach(Some(&buffer), 0, 0);
            self.surface.damage_buffer(0, 0, width, height);
            self.surface.commit();
            pool.destroy();
        }
        self.apply();
        Ok(())
    }

    /// The pointer came into the window.
    pub fn enter(&mut self, pointer: &WlPointer, serial: u32) {
        self.pointer = Some((pointer.clone(), serial));
        self.apply();
    }

    /// The seat has no pointer any more.
    pub fn leave(&mut self) {
        self.pointer = None;
    }

    fn apply(&self) {
        let Some((pointer, serial)) = &self.pointer else {
            return;
        };
        match &self.image {
            Some(image) => {
                let (x, y) = (image.hot_x as i32, image.hot_y as i32);
                pointer.set_cursor(*serial, Some(&self.surface), x, y);
            }
            None => pointer.set_cursor(*serial, None, 0, 0),
        }
    }
}

fn is_sane(image: &CursorImage) -> bool {
    let pixels = u64::from(image.width) * u64::from(image.height);
    (1..=MAX_SIDE).contains(&image.width)
        && (1..=MAX_SIDE).contains(&image.height)
        && image.hot_x < image.width
        && image.hot_y < image.height
        && image.pixels.len() as u64 == pixels * 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_cursors_are_hidden() {
        let good = CursorImage {
            width: 64,
            height: 64,
            hot_x: 3,
            hot_y: 4,
            pixels: vec![0; 64 * 64 * 4],
        };
        assert!(is_sane(&good));
        for bad in [
            CursorImage {
                width: 63,
                ..good.clone()
            },
            CursorImage {
                hot_x: 64,
                ..good.clone()
            },
            CursorImage {
                height: 0,
                pixels: vec![],
                ..good.clone()
            },
            CursorImage {
                width: u32::MAX,
                height: u32::MAX,
                ..good.clone()
            },
        ] {
            assert!(!is_sane(&bad), "{bad:?}");
        }
    }
}
