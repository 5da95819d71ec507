//! Commands of any kind in any order.

use proptest::prelude::*;

use super::{super::stream_check::check, *};

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
        2 => Just(0x40_0000u32),
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

/// Of every request the queue, where it is cut, and its length, before it.
fn stream(commands: &[(Vec<u8>, u8)]) -> Vec<u8> {
    let requests = commands.iter();
    requests
        .flat_map(|(command, how)| [&[*how, command.len() as u8], &command[..]].concat())
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..Default::default() })]

    #[test]
    fn any_commands_are_answered_as_they_must_be(
        commands in prop::collection::vec((any_command(), 0u8..64), 1..60),
    ) {
        check(&stream(&commands));
    }
}

/// What the fuzzer starts from: a session of each kind.
#[test]
fn recorded_streams_are_answered_as_they_must_be() {
    let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/seeds/gpu_commands");
    let mut count = 0;
    for seed in std::fs::read_dir(seeds).unwrap() {
        check(&std::fs::read(seed.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 8, "{count} streams");
}
