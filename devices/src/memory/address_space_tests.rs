//! The address space: lookup, overlaps and resolution.

use crate::sync::Mutex;

use proptest::prelude::*;

use super::*;

#[derive(Default)]
struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

impl IoHandler for Recorder {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data[0] = offset as u8;
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().push((offset, data.to_vec()));
    }
}

fn ram(file: &Arc<File>, offset: u64) -> Backing {
    Backing {
        kind: BackingKind::Ram,
        file: file.clone(),
        offset,
    }
}

fn file() -> Arc<File> {
    Arc::new(tempfile::tempfile().unwrap())
}

#[test]
fn resolve_names_file_and_offset_and_merges_what_continues() {
    let (map, file) = (AddressSpace::new(), file());
    map.insert_backed(0, 0x1000, ram(&file, 0)).unwrap();
    map.insert_backed(0x1000, 0x1000, ram(&file, 0x1000))
        .unwrap();
    map.insert_backed(0x2000, 0x1000, ram(&file, 0x8000))
        .unwrap();
    let got: Vec<_> = map
        .resolve(0x800, 0x2000)
        .unwrap()
        .iter()
        .map(|s| (s.gpa, s.len, s.backing.offset))
        .collect();
    assert_eq!(got, [(0x800, 0x1800, 0x800), (0x2000, 0x800, 0x8000)]);
}

#[test]
fn ram_and_a_bar_are_told_apart() {
    let (map, file) = (AddressSpace::new(), file());
    let bar = Backing {
        kind: BackingKind::Bar {
            device: 1,
            region: 2,
            start: 0,
        },
        file: file.clone(),
        offset: 0x1000,
    };
    map.insert_backed(0, 0x1000, ram(&file, 0)).unwrap();
    map.insert_backed(0x1000, 0x1000, bar.clone()).unwrap();
    let kinds: Vec<_> = map
        .resolve(0, 0x2000)
        .unwrap()
        .iter()
        .map(|s| s.backing.kind)
        .collect();
    assert_eq!(kinds, [BackingKind::Ram, bar.kind]);
}

#[test]
fn resolve_says_where_memory_ends() {
    let (map, file) = (AddressSpace::new(), file());
    map.insert_backed(0, 0x1000, ram(&file, 0)).unwrap();
    map.insert_io(0x2000, 0x1000, Arc::new(Recorder::default()))
        .unwrap();
    assert_eq!(
        map.resolve(0xfff, 2).unwrap_err(),
        AddressSpaceError::Unmapped { gpa: 0x1000 }
    );
    assert_eq!(
        map.resolve(0x2000, 1).unwrap_err(),
        AddressSpaceError::NotMemory { gpa: 0x2000 }
    );
    assert!(matches!(
        map.resolve(u64::MAX, 2),
        Err(AddressSpaceError::BadRange { .. })
    ));
    assert!(matches!(
        map.resolve(0, 0),
        Err(AddressSpaceError::BadRange { .. })
    ));
}

#[derive(Debug, Default)]
struct Watcher(crate::sync::Mutex<Vec<(u64, bool)>>);

impl MapWatcher for Watcher {
    fn memory_changed(&self, map: &AddressSpace, gpa: u64, len: u64) {
        let there = map.resolve(gpa, len).is_ok();
        self.0.lock().push((gpa, there));
    }
}

#[test]
fn who_watches_hears_of_memory_that_comes_and_goes() {
    let map = AddressSpace::new();
    let watcher = Arc::new(Watcher::default());
    let weak: Weak<Watcher> = Arc::downgrade(&watcher);
    map.watch(weak);
    let file = file();
    map.insert_backed(0x1000, 0x1000, ram(&file, 0)).unwrap();
    map.insert_io(0x3000, 8, Arc::new(Recorder::default()))
        .unwrap();
    map.remove(0x3000, 8).unwrap();
    map.remove(0x1000, 0x1000).unwrap();
    assert_eq!(*watcher.0.lock(), [(0x1000, true), (0x1000, false)]);
    drop(watcher);
    map.insert_backed(0x1000, 0x1000, ram(&file, 0)).unwrap();
}

#[test]
fn accesses_reach_their_device_and_nothing_beyond_it() {
    let (map, device) = (AddressSpace::new(), Arc::new(Recorder::default()));
    map.insert_io(0x1000, 0x10, device.clone()).unwrap();
    map.write(0x1004, &[1, 2]);
    map.write(0x100f, &[3, 4]);
    map.write(0x1010, &[5]);
    assert_eq!(*device.0.lock(), [(4, vec![1, 2])]);
    let mut data = [0xaa; 2];
    map.read(0x1008, &mut data);
    assert_eq!(data, [8, 0]);
    map.read(0x2000, &mut data);
    assert_eq!(data, [0xff, 0xff]);
}

#[test]
fn overlaps_are_refused_and_removal_is_exact() {
    let (map, device) = (AddressSpace::new(), Arc::new(Recorder::default()));
    map.insert_io(0x1000, 0x1000, device.clone()).unwrap();
    for (gpa, len) in [(0x1000, 1), (0xfff, 2), (0x1fff, 1), (0, 0x10000)] {
        assert!(matches!(
            map.insert_io(gpa, len, device.clone()),
            Err(AddressSpaceError::Overlap { .. })
        ));
    }
    assert!(map.remove(0x1000, 0x800).is_err());
    map.remove(0x1000, 0x1000).unwrap();
    map.insert_io(0, 0x10000, device).unwrap();
}

proptest! {
    /// Against a model of one owner a byte.
    #[test]
    fn agrees_with_a_byte_map(ops in prop::collection::vec((0u64..64, 1u64..16, any::<bool>()), 1..40)) {
        let (map, file) = (AddressSpace::new(), file());
        let mut model: Vec<Option<u64>> = vec![None; 128];
        for (gpa, len, add) in ops {
            let range = gpa as usize..(gpa + len) as usize;
            if add {
                let free = model[range.clone()].iter().all(Option::is_none);
                let added = map.insert_backed(gpa, len, ram(&file, gpa)).is_ok();
                prop_assert_eq!(free, added);
                if added {
                    model[range].fill(Some(gpa));
                }
            } else if map.remove(gpa, len).is_ok() {
                prop_assert!(model[range.clone()].iter().all(|&o| o == Some(gpa)));
                model[range].fill(None);
            }
            for (at, owner) in model.iter().enumerate() {
                prop_assert_eq!(map.lookup(at as u64).map(|(start, ..)| start), *owner);
            }
        }
    }
}
