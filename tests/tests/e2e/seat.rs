//! The seat of the viewer's window: the user's input, and the guest's cursor.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use fanlight_tests::{
    Result, ensure,
    host_side::{
        compositor::{Compositor, Viewer},
        guest::{Assets, Guest},
        test_case::TestCase,
    },
};
use wayland_client::protocol::wl_pointer::Axis;

use super::{
    compositor,
    test_compositor::{Finger, TestCompositor},
    view::{HEIGHT, PATIENCE, WIDTH},
    virtual_input::VirtualInput,
    window::painting,
};

pub const TESTS: &[TestCase] = &[
    TestCase::new("view::keys_wheel_grab_and_fingers", input),
    TestCase::new("view::a_cursor_with_its_hot_spot", cursor),
];

/// Linux `input-event-codes.h`.
const KEY_LEFTCTRL: u32 = 29;
const KEY_G: u32 = 34;
const KEY_X: u32 = 45;
const KEY_LEFTALT: u32 = 56;
const KEY_LEFTMETA: u32 = 125;
const BTN_LEFT: u32 = 0x110;
/// Sway has this shortcut, and shows its effect in its list of marks.
const SHORTCUT: [u32; 2] = [KEY_LEFTMETA, KEY_X];
const SWAY: &str = "bindsym Mod4+x mark --toggle taken";

/// Waits until something is so.
fn until(viewer: &Viewer, what: &str, is_so: impl Fn() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !is_so()? {
        let said = viewer.said();
        ensure(
            start.elapsed() < PATIENCE,
            format!("{what} never happens; the viewer reports: {said}"),
        )?;
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn input(assets: &Assets) -> Result<()> {
    let guest = assets
        .guest("exec guest-agent listen")
        .modules(&["virtio_gpu", "virtio_input"])?
        .option("--gpu", "outputs=800x600");
    let socket = guest.path("api");
    let mut guest = guest.option("--api-socket", &socket).start()?;
    guest.wait_for("agent: listens to 3 devices.")?;
    let sway = compositor::sway(assets, SWAY)?;
    let viewer = sway.viewer(&assets.fanlight, &socket)?;
    let titled = |title: &str| -> Result<bool> {
        let tree = sway.swaymsg(&["-t", "get_tree"])?;
        Ok(tree.contains(&format!("\"name\": \"{title}\"")))
    };
    until(&viewer, "a window", || titled("Fanlight"))?;
    let mut input = VirtualInput::plug_in(&sway.socket())?;
    let heard = |guest: &mut Guest, event: &str| guest.wait_for(&format!("heard: {event}."));

    // The middle of the window at any size: half of 32767.
    input.move_to(1, 1, WIDTH, HEIGHT)?;
    input.move_to(WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT)?;
    heard(&mut guest, "pointer 3 0 16383")?;
    heard(&mut guest, "pointer 3 1 16383")?;
    input.wheel(Axis::VerticalScroll, 1)?;
    heard(&mut guest, "pointer 2 11 -120")?;
    heard(&mut guest, "pointer 2 8 -1")?;
    input.wheel(Axis::HorizontalScroll, -2)?;
    heard(&mut guest, "pointer 2 12 -240")?;
    heard(&mut guest, "pointer 2 6 -2")?;
    input.scroll(5.0)?;
    heard(&mut guest, "pointer 2 11 -60")?;

    // Before a click, the compositor handles its shortcuts.
    let taken = || Ok(sway.swaymsg(&["-t", "get_marks"])?.contains("taken"));
    input.chord(&SHORTCUT)?;
    until(&viewer, "the compositor's shortcut", taken)?;
    input.button(BTN_LEFT, true)?;
    input.button(BTN_LEFT, false)?;
    heard(&mut guest, "pointer 1 272 1")?;
    heard(&mut guest, "pointer 1 272 0")?;
    until(&viewer, "the grab", || {
        titled("Fanlight: Ctrl-Alt-G releases the keyboard")
    })?;
    let x = format!("keyboard 1 {KEY_X} 1");
    let said = guest.transcript();
    ensure(
        !said.contains(&x),
        format!("a shortcut reached the guest:\n{said}"),
    )?;
    input.chord(&SHORTCUT)?;
    heard(&mut guest, &x)?;
    heard(&mut guest, &format!("keyboard 1 {KEY_X} 0"))?;
    ensure(
        taken()?,
        "the compositor took a shortcut that the viewer had",
    )?;
    // Once, though the seat got two devices in turn.
    let said = guest.transcript();
    ensure(said.matches(&format!("heard: {x}.")).count() == 1, said)?;

    input.chord(&[KEY_LEFTCTRL, KEY_LEFTALT, KEY_G])?;
    until(&viewer, "the grab's end", || titled("Fanlight"))?;
    input.chord(&SHORTCUT)?;
    until(&viewer, "the compositor's shortcut again", || {
        taken().map(|taken| !taken)
    })?;

    unfocused(&mut guest, &sway, &mut input)?;
    // The driving viewer disconnects, and no key stays pressed.
    input.key(KEY_G, true)?;
    guest.wait_for_times(&format!("heard: keyboard 1 {KEY_G} 1."), 3)?;
    drop(viewer);
    guest.wait_for_times(&format!("heard: keyboard 1 {KEY_G} 0."), 3)?;
    touch(assets, &mut guest, &socket)
}

/// The window loses the keyboard focus, and no key stays pressed. Each key is heard for the second time.
fn unfocused(guest: &mut Guest, sway: &Compositor, input: &mut VirtualInput) -> Result<()> {
    let heard = |key: u32, pressed: u32| format!("heard: keyboard 1 {key} {pressed}.");
    input.key(KEY_G, true)?;
    guest.wait_for_times(&heard(KEY_G, 1), 2)?;
    sway.swaymsg(&["workspace", "other"])?;
    // No window gets this event.
    input.key(KEY_G, false)?;
    sway.swaymsg(&["[app_id=\"fanlight\"]", "focus"])?;
    input.chord(&[KEY_X])?;
    guest.wait_for_times(&heard(KEY_X, 1), 2)?;
    // Keys are heard in order.
    let said = guest.transcript();
    ensure(said.matches(&heard(KEY_G, 0)).count() == 2, said)
}

/// A viewer with a window of this size in a test compositor.
fn in_test_compositor(
    assets: &Assets,
    socket: &Path,
    (width, height): (u32, u32),
) -> Result<(TestCompositor, Viewer)> {
    let compositor = TestCompositor::start(width, height)?;
    let viewer = compositor.viewer(&assets.fanlight, socket)?;
    until(&viewer, "a window", || Ok(compositor.is_ready()))?;
    Ok((compositor, viewer))
}

/// Two fingers, one of which the compositor cancels.
fn touch(assets: &Assets, guest: &mut Guest, socket: &Path) -> Result<()> {
    let (width, height) = (800, 600);
    let (screen, viewer) = in_test_compositor(assets, socket, (width, height))?;
    let heard =
        |guest: &mut Guest, event: &str| guest.wait_for(&format!("heard: touch-screen {event}."));
    let (right, bottom) = (f64::from(width), f64::from(height));
    screen.touch(&[Finger::Down(7, right / 4.0, bottom / 2.0)]);
    heard(guest, "3 57 0")?;
    heard(guest, "3 53 8191")?;
    heard(guest, "3 54 16383")?;
    heard(guest, "1 330 1")?;
    screen.touch(&[
        Finger::Down(9, right, bottom),
        Finger::Moves(7, right / 2.0, bottom / 2.0),
    ]);
    heard(guest, "3 47 1")?;
    heard(guest, "3 57 1")?;
    heard(guest, "3 53 32767")?;
    heard(guest, "3 53 16383")?;
    screen.touch(&[Finger::Up(7)]);
    heard(guest, "3 57 -1")?;
    screen.touch(&[Finger::Cancelled]);
    guest.wait_for_times("heard: touch-screen 3 57 -1.", 2)?;
    heard(guest, "1 330 0")?;
    drop(viewer);
    screen.stop()
}

/// The guest's cursor is on the host's pointer, and points where the guest wants.
fn cursor(assets: &Assets) -> Result<()> {
    let (mut drawing, _, socket) = painting(assets)?;
    let (compositor, viewer) = in_test_compositor(assets, &socket, (WIDTH, HEIGHT))?;
    ensure(compositor.cursor().is_none(), "a cursor before the guest's")?;
    drawing.ask("cursor 3 4")?;
    until(&viewer, "a cursor", || Ok(compositor.cursor().is_some()))?;
    let hot_spot = compositor.cursor();
    ensure(
        hot_spot == Some((3, 4)),
        format!("the hot spot is {hot_spot:?}"),
    )?;
    drop(viewer);
    compositor.stop()
}
