//! Compositors of the guests' display size, and guest pictures.

use std::fs::File;

use fanlight_api::{client::Client, display::Screenshot, methods::GpuScreenshot};
use fanlight_tests::{
    Context, Result, ensure,
    host_side::{
        compositor::{Compositor, read_png},
        guest::Assets,
    },
};

use super::view::{HEIGHT, WIDTH, one};

/// Weston, with an output of the guests' display size.
pub fn weston(assets: &Assets, renderer: &str) -> Result<Compositor> {
    Compositor::weston(&assets.compositors, renderer, (WIDTH, HEIGHT))
}

/// Sway, with an output of the guests' display size and with `config` added.
pub fn sway(assets: &Assets, config: &str) -> Result<Compositor> {
    Compositor::sway(&assets.compositors, config, (WIDTH, HEIGHT), None)
}

/// The guest's picture, by `gpu.screenshot`.
pub fn take_picture(client: &mut Client) -> Result<Vec<u8>> {
    let (taken, fds) = client
        .call_with::<GpuScreenshot>(&Screenshot::default(), &[])
        .context("gpu.screenshot")?;
    ensure(
        (taken.width, taken.height) == (WIDTH, HEIGHT),
        format!("{taken:?}"),
    )?;
    read_png(File::from(one(fds)?))
}
