//! CPUID of the guest's vCPUs: what KVM supports, with a topology of one package whose cores are the
//! vCPUs.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use thiserror::Error;

/// Why there is no CPUID for a vCPU.
#[derive(Debug, Error)]
#[error("KVM supports more CPUID leaves than it takes back")]
pub struct CpuidError;

/// Leaf 1 ECX.
const MONITOR: u32 = 1 << 3;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: logical processor count in EBX is valid.
const HTT: u32 = 1 << 28;

/// Levels of the topology leaves (Intel SDM 2A, CPUID 1FH).
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Bits of an APIC id that tell the cores of a package apart.
fn core_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

/// CPUID of vCPU `cpu` of `cpus`. `supported` is KVM's own list; `tsc_deadline` is whether KVM emulates
/// that timer mode, which the list does not say.
pub fn guest_cpuid(
    supported: &CpuId,
    cpu: u32,
    cpus: u32,
    tsc_deadline: bool,
) -> Result<CpuId, CpuidError> {
    let topology_leaves = [0xb, 0x1f];
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !topology_leaves.contains(&entry.function))
        .copied()
        .collect();
    let max_leaf = entries
        .iter()
        .find(|entry| entry.function == 0)
        .map_or(0, |entry| entry.eax);
    for leaf in topology_leaves.into_iter().filter(|&leaf| leaf <= max_leaf) {
        entries.extend(topology(leaf, cpu, cpus));
    }
    for entry in &mut entries {
        patch(entry, cpu, cpus, tsc_deadline);
    }
    CpuId::from_entries(&entries).map_err(|_| CpuidError)
}

fn topology(leaf: u32, cpu: u32, cpus: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index, kind, shift, count| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        edx: cpu,
        ..Default::default()
    };
    [
        level(0, LEVEL_THREAD, 0, 1),
        level(1, LEVEL_CORE, core_bits(cpus), cpus),
        level(2, 0, 0, 0),
    ]
}

fn patch(entry: &mut kvm_cpuid_entry2, cpu: u32, cpus: u32, tsc_deadline: bool) {
    match entry.function {
        0x1 => {
            entry.ebx = entry.ebx & 0xffff | cpus.min(255) << 16 | cpu << 24;
            entry.ecx = entry.ecx & !(MONITOR | TSC_DEADLINE)
                | X2APIC
                | HYPERVISOR
                | if tsc_deadline { TSC_DEADLINE } else { 0 };
            entry.edx = entry.edx & !HTT | if cpus > 1 { HTT } else { 0 };
        }
        // Deterministic cache parameters (Intel, AMD): cores in the package, sharers of a cache.
        0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let shared = (entry.eax >> 5) & 7 >= 3;
            let sharers = if shared {
                (1 << core_bits(cpus)) - 1
            } else {
                0
            };
            entry.eax = entry.eax & !(0xfff << 14) | sharers << 14;
            if entry.function == 0x4 {
                let cores = ((1u32 << core_bits(cpus)) - 1).min(0x3f);
                entry.eax = entry.eax & !(0x3f << 26) | cores << 26;
            }
        }
        // Performance monitoring: the machine has none, whatever the host's counters are.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // AMD: NC, the cores of the package, and ApicIdCoreIdSize.
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | (cpus - 1) & 0xff | core_bits(cpus) << 12,
        // AMD: extended APIC id, core id with one thread a core, one node.
        0x8000_001e => {
            entry.eax = cpu;
            entry.ebx = cpu & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// Width of guest-physical addresses in bits: what the host's processor has, or less where nested paging
/// reaches less far (AMD APM 3, CPUID Fn8000_0008_EAX\[23:16\]).
pub fn physical_address_bits(supported: &CpuId) -> u8 {
    /// What a processor without the leaf has.
    const DEFAULT: u8 = 36;
    supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == 0x8000_0008)
        .map_or(DEFAULT, |entry| {
            let [host, _, guest, _] = entry.eax.to_le_bytes();
            if guest == 0 { host } else { guest.min(host) }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(0, 0x1f),
            leaf(1, 0),
            leaf(0xa, 5),
            leaf(0xb, 0),
            leaf(0x8000_0008, 0x28_3030),
            leaf(0x8000_001e, 0),
        ])
        .unwrap()
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn every_place_tells_the_same_apic_id() {
        let cpuid = guest_cpuid(&supported(), 5, 8, true).unwrap();
        assert_eq!(find(&cpuid, 1, 0).ebx >> 24, 5);
        assert_eq!(find(&cpuid, 0xb, 1).edx, 5);
        assert_eq!(find(&cpuid, 0x1f, 0).edx, 5);
        assert_eq!(find(&cpuid, 0x8000_001e, 0).eax, 5);
        assert_eq!(find(&cpuid, 0xb, 1).eax, 3);
        assert_eq!(find(&cpuid, 0xb, 1).ebx, 8);
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx & 0xff, 7);
        for (cpu, cpus, bits) in [(9, 16, 4), (253, 254, 8)] {
            let cpuid = guest_cpuid(&supported(), cpu, cpus, true).unwrap();
            assert_eq!(find(&cpuid, 1, 0).ebx >> 24, cpu);
            assert_eq!(find(&cpuid, 0xb, 0).edx, cpu);
            assert_eq!(find(&cpuid, 0xb, 1).edx, cpu);
            assert_eq!(find(&cpuid, 0x1f, 1).edx, cpu);
            assert_eq!(find(&cpuid, 0xb, 1).eax, bits);
            assert_eq!(find(&cpuid, 0xb, 1).ebx, cpus);
        }
    }

    #[test]
    fn one_cpu_has_no_siblings() {
        let cpuid = guest_cpuid(&supported(), 0, 1, false).unwrap();
        let leaf = find(&cpuid, 1, 0);
        assert_eq!(leaf.edx & HTT, 0);
        assert_eq!(leaf.ecx & (MONITOR | TSC_DEADLINE), 0);
        assert_eq!(leaf.ecx & (X2APIC | HYPERVISOR), X2APIC | HYPERVISOR);
        assert_eq!(find(&cpuid, 0xa, 0).eax, 0);
    }

    #[test]
    fn nested_paging_limits_the_address_width() {
        assert_eq!(physical_address_bits(&supported()), 0x28);
        assert_eq!(physical_address_bits(&CpuId::new(0).unwrap()), 36);
    }
}
