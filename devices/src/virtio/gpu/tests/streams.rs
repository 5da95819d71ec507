//! Commands of any kind in any order.

use proptest::prelude::*;

use super::*;

/// A command of any kind, most of them with numbers that make sense.
fn any_command() -> impl Strategy<Value = Vec<u8>> {
    let small = || prop_oneof![8 => 0u32..6, 4 => 0u32..70, 1 => any::<u32>()];
    let types = prop_oneof![
        9 => 0x100u32..0x10e,
        1 => Just(0x300u32),
        1 => any::<u32>(),
    ];
    let word = prop_oneof![
        6 => small(),
        2 => Just(PIXELS as u32),
        2 => Just(0x1000u32),
        1 => Just(XRGB),
    ];
    (types, any::<bool>(), prop::collection::vec(word, 0..24)).prop_map(|(type_, fence, words)| {
        let mut bytes = header(type_, fence.then_some(1)).as_bytes().to_vec();
        for word in words {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..Default::default() })]

    /// Whatever is sent is answered, and what the guest holds stays within its bound.
    #[test]
    fn any_commands_are_survived(commands in prop::collection::vec((any_command(), 0u16..2), 1..60)) {
        let mut machine = machine();
        for (command, queue) in commands {
            machine.driver.write(REQUEST, &command);
            let chain = [(REQUEST, command.len() as u32, 0), (RESPONSE, 4096, WRITE)];
            let written = machine.driver.request(queue.into(), &chain);
            let (answer, _) = machine.response(written);
            prop_assert!((0x1100..0x1206).contains(&answer.type_.get()));
            for output in 0..OUTPUTS {
                let _ = machine.display.read_scanout(output);
            }
            prop_assert!(machine.display.statistics().resource_memory <= BUDGET);
        }
        prop_assert!(!machine.driver.status.needs_reset());
        machine.gpu.reset();
        prop_assert_eq!(machine.display.statistics().resource_memory, 0);
    }
}
