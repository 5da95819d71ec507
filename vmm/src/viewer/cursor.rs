//! The guest's cursor on the host's pointer.

use std::io;

use std::os::fd::AsFd;

use wayland_client::{
    QueueHandle,
    protocol::{wl_pointer::WlPointer, wl_shm, wl_shm::WlShm, wl_surface::WlSurface},
};

use super::{buffers::shared_memory, mapping::Mapping, picture::CursorPicture, window::State};

/// The longest side of a cursor; virtio-gpu's has 64.
const MAX_SIDE: u32 = 512;

/// A surface that follows the pointer.
pub struct CursorSurface {
    surface: WlSurface,
    shm: WlShm,
    picture: Option<CursorPicture>,
    /// The pointer that is in the window, and the serial of its entering.
    pointer: Option<(WlPointer, u32)>,
}

impl CursorSurface {
    /// A cursor that is hidden.
    pub fn new(surface: WlSurface, shm: WlShm) -> Self {
        Self {
            surface,
            shm,
            picture: None,
            pointer: None,
        }
    }

    /// Gives it another look.
    pub(super) fn set(
        &mut self,
        picture: Option<CursorPicture>,
        handle: &QueueHandle<State>,
    ) -> io::Result<()> {
        self.picture = picture.filter(is_sane);
        if let Some(picture) = &self.picture {
            let memory = shared_memory(picture.pixels.len())?;
            Mapping::new(&memory, picture.pixels.len(), true)?
                .write(0, &picture.pixels)
                .ok_or_else(|| io::Error::other("a cursor does not fit its memory"))?;
            let len = picture.pixels.len() as i32;
            let pool = self.shm.create_pool(memory.as_fd(), len, handle, ());
            let (width, height) = (picture.width as i32, picture.height as i32);
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
    pub fn entered(&mut self, pointer: &WlPointer, serial: u32) {
        self.pointer = Some((pointer.clone(), serial));
        self.apply();
    }

    /// The seat has no pointer any more.
    pub fn left(&mut self) {
        self.pointer = None;
    }

    fn apply(&self) {
        let Some((pointer, serial)) = &self.pointer else {
            return;
        };
        match &self.picture {
            Some(picture) => {
                let (x, y) = (picture.hot_x as i32, picture.hot_y as i32);
                pointer.set_cursor(*serial, Some(&self.surface), x, y);
            }
            None => pointer.set_cursor(*serial, None, 0, 0),
        }
    }
}

fn is_sane(picture: &CursorPicture) -> bool {
    let pixels = u64::from(picture.width) * u64::from(picture.height);
    (1..=MAX_SIDE).contains(&picture.width)
        && (1..=MAX_SIDE).contains(&picture.height)
        && picture.hot_x < picture.width
        && picture.hot_y < picture.height
        && picture.pixels.len() as u64 == pixels * 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_cursors_are_hidden() {
        let good = CursorPicture {
            width: 64,
            height: 64,
            hot_x: 3,
            hot_y: 4,
            pixels: vec![0; 64 * 64 * 4],
        };
        assert!(is_sane(&good));
        for bad in [
            CursorPicture {
                width: 63,
                ..good.clone()
            },
            CursorPicture {
                hot_x: 64,
                ..good.clone()
            },
            CursorPicture {
                height: 0,
                pixels: vec![],
                ..good.clone()
            },
            CursorPicture {
                width: u32::MAX,
                height: u32::MAX,
                ..good.clone()
            },
        ] {
            assert!(!is_sane(&bad), "{bad:?}");
        }
    }
}
