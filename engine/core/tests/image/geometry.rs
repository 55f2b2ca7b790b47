// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Geometry of arbitrary properties and of common images.

use loopengine_core::Kind;
use loopengine_core::image::{FileProperties, Geometry, ImageSpec};
use proptest::prelude::*;

/// Facts of a regular file on a common file system.
fn facts(size: u64) -> FileProperties {
    FileProperties {
        size,
        block_device: false,
        offset_align: 512,
        mem_align: 4,
        physical_block_size: 4096,
        discard_granularity: 4096,
        can_punch: true,
    }
}

fn power_of_two(most: u32) -> impl Strategy<Value = u32> {
    (0..=most).prop_map(|shift| 1 << shift)
}

/// Numbers of all magnitudes, mainly powers of two and their neighbours.
fn bytes() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..20_000u64,
        (0..64u32, 0..3u64).prop_map(|(shift, more)| (1u64 << shift).wrapping_sub(1) + more),
        (0..1u64 << 51).prop_map(|blocks| blocks * 4096),
        Just(u64::MAX),
        Just(i64::MAX as u64),
    ]
}

prop_compose! {
    fn any_facts()(
        size in bytes(),
        block_device: bool,
        offset_align in prop_oneof![9 => power_of_two(12), 1 => any::<u32>()],
        mem_align in prop_oneof![9 => power_of_two(12), 1 => any::<u32>()],
        physical_block_size in prop_oneof![power_of_two(31), any::<u32>()],
        discard_granularity in prop_oneof![power_of_two(31), any::<u32>()],
        can_punch: bool,
    ) -> FileProperties {
        FileProperties {
            size, block_device, offset_align, mem_align,
            physical_block_size, discard_granularity, can_punch,
        }
    }
}

prop_compose! {
    fn any_source()(
        offset in prop_oneof![Just(0), bytes()],
        size_limit in prop_oneof![Just(0), bytes()],
        block_size in prop_oneof![Just(0), power_of_two(13), any::<u32>()],
        read_only: bool,
        buffered: bool,
    ) -> ImageSpec {
        ImageSpec { offset, size_limit, block_size, read_only, buffered, loop_semantics: false, durable: false }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn yields_a_valid_geometry_or_an_error(facts in any_facts(), source in any_source()) {
        match Geometry::compute(&facts, &source, "IMAGE") {
            Ok(g) => {
                let block = u64::from(g.block_size);
                prop_assert!((512..=65536).contains(&block) && block.is_power_of_two());
                prop_assert!(g.block_size >= facts.offset_align);
                prop_assert!(source.block_size == 0 || g.block_size == source.block_size);
                prop_assert_eq!(g.offset, source.offset);
                prop_assert_eq!(g.offset % block, 0);
                prop_assert!(g.size > 0);
                prop_assert_eq!(g.size % block, 0);
                // The device ends within the file, and omits a partial block.
                let end = u128::from(g.offset) + u128::from(g.size);
                prop_assert!(end <= u128::from(facts.size));
                prop_assert!(source.size_limit == 0 || g.size <= source.size_limit);
                let more = u128::from(g.size) + u128::from(block);
                prop_assert!(
                    end + u128::from(block) > u128::from(facts.size)
                        || (source.size_limit != 0 && more > u128::from(source.size_limit))
                );
                prop_assert!(g.physical_block_size.is_power_of_two());
                prop_assert!(g.physical_block_size >= g.block_size);
                prop_assert_eq!(g.offset % u64::from(g.physical_block_size), 0);
                prop_assert!(g.dma_align.is_power_of_two());
                prop_assert!((512..=4096).contains(&g.dma_align) && g.dma_align >= facts.mem_align);
                prop_assert!(g.discard_granularity.is_power_of_two());
                prop_assert!(g.discard_granularity >= g.block_size);
                prop_assert!(!(g.read_only && (g.can_discard || g.can_write_zeroes)));
            }
            Err(error) => {
                prop_assert!(matches!(error.kind(), Kind::Invalid | Kind::Unsupported));
                prop_assert!(error.next_step().is_some(), "{error}: what next?");
                prop_assert!(!error.to_string().contains('\n'));
            }
        }
    }
}

#[test]
fn geometry_of_common_images() {
    let compute = |facts: &FileProperties, source: ImageSpec| Geometry::compute(facts, &source, "IMAGE");
    let plain = ImageSpec::default();

    let g = compute(&facts(1 << 30), plain).unwrap();
    assert_eq!((g.size, g.offset, g.block_size), (1 << 30, 0, 512));
    assert_eq!((g.physical_block_size, g.dma_align), (4096, 512));
    assert!(g.can_discard && g.can_write_zeroes && !g.read_only);

    // Odd sizes lose their last partial block.
    assert_eq!(compute(&facts(1_000_001), plain).unwrap().size, 999_936);
    // A partition's offset reduces the physical block size.
    let offset = ImageSpec { offset: 63 * 512, ..plain };
    let g = compute(&facts(1 << 20), offset).unwrap();
    assert_eq!((g.size, g.physical_block_size), ((1 << 20) - 63 * 512, 512));
    // The largest sparse file.
    let g = compute(&facts(i64::MAX as u64), plain).unwrap();
    assert_eq!(g.size, i64::MAX as u64 - 511);
    // A file system with 4K sectors.
    let large = FileProperties { offset_align: 4096, ..facts(1 << 20) };
    assert_eq!(compute(&large, plain).unwrap().block_size, 4096);
    // A block device zeroes, even if it cannot punch.
    let device = FileProperties { block_device: true, can_punch: false, ..facts(1 << 20) };
    let g = compute(&device, plain).unwrap();
    assert!(g.can_write_zeroes && !g.can_discard);
}

#[test]
fn geometry_errors_have_hints() {
    let plain = ImageSpec::default();
    let large = FileProperties { offset_align: 4096, ..facts(1 << 20) };
    let huge = FileProperties { offset_align: 65536, ..facts(1 << 20) };
    let cases = [
        (facts(0), plain, Kind::Invalid, "IMAGE is empty"),
        (facts(511), plain, Kind::Invalid, "511 bytes of IMAGE are less than one block"),
        (facts(4096), ImageSpec { offset: 4096, ..plain }, Kind::Invalid, "not within IMAGE"),
        (facts(4096), ImageSpec { offset: u64::MAX - 511, ..plain }, Kind::Invalid, "not within"),
        (facts(4096), ImageSpec { offset: u64::MAX, ..plain }, Kind::Invalid, "not a multiple"),
        (facts(4096), ImageSpec { offset: 100, ..plain }, Kind::Invalid, "not a multiple"),
        (facts(4096), ImageSpec { size_limit: 100, ..plain }, Kind::Invalid, "100 bytes of IMAGE"),
        (facts(4096), ImageSpec { block_size: 1000, ..plain }, Kind::Invalid, "block size 1000"),
        (facts(4096), ImageSpec { block_size: 256, ..plain }, Kind::Invalid, "block size 256"),
        (facts(8192), ImageSpec { block_size: 131_072, ..plain }, Kind::Invalid, "block size 131072"),
        (large, ImageSpec { block_size: 512, ..plain }, Kind::Invalid, "--block-size 4096 or"),
        (large, ImageSpec { offset: 512, ..plain }, Kind::Invalid, "--buffered"),
        (huge, plain, Kind::Unsupported, "attach with --buffered"),
    ];
    for (facts, source, kind, text) in cases {
        let error = Geometry::compute(&facts, &source, "IMAGE").unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "'{error}' lacks '{text}'");
        assert!(error.next_step().is_some(), "{error}");
    }
}
