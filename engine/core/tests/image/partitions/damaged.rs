// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Damaged and hostile tables, and images that change during a read.

use super::*;

#[test]
fn stops_at_endless_chains() {
    let disk = Disk::new(MIB, 512);
    // To itself; from the middle to its start; back and forth; without any partition.
    disk.sector(0, &mbr(&[(5, 100, 1000), (0x0f, 100, 1000), (0x85, 300, 100), (5, 0, 2048)]));
    disk.sector(100, &mbr(&[(0x83, 1, 8), (5, 0, 1000)]));
    assert_eq!(starts(&disk.parts()), [(1, 100, 2), (5, 101, 8), (2, 100, 2), (3, 300, 2), (4, 0, 2)]);
    disk.sector(100, &mbr(&[(0x83, 1, 8), (5, 50, 10)])).sector(150, &mbr(&[(0x83, 1, 8), (5, 0, 1000)]));
    disk.sector(0, &mbr(&[(5, 100, 1000)]));
    assert_eq!(starts(&disk.parts()), [(1, 100, 2), (5, 101, 8), (6, 151, 8)]);
    disk.sector(100, &mbr(&[(5, 50, 10)])).sector(150, &mbr(&[(5, 0, 10)]));
    assert_eq!(starts(&disk.as_kernel()), [(1, 100, 2)]);
    // Beyond the device.
    disk.sector(100, &mbr(&[(0x83, 1, 8), (5, u32::MAX, 10), (0x83, 2, u32::MAX), (0x83, 1, 3)]));
    assert_eq!(starts(&disk.as_kernel()), [(1, 100, 2), (5, 101, 8), (6, 101, 3)]);
}

#[test]
fn refuses_invalid_headers() {
    let used = [(100, 200)];
    assert_eq!(starts(&gpt(&used, |_| ()).as_kernel()), [(1, 100, 101)]);
    type Lie = (&'static str, fn(&mut Header));
    let lies: &[Lie] = &[
        ("entries of no size", |header| header.entry_size = 0),
        ("entries of other sizes", |header| header.entry_size = 256),
        ("huge entries", |header| header.entry_size = u32::MAX),
        ("more entries than there is memory", |header| header.count = u32::MAX),
        ("as many as can be", |header| header.count = 32769),
        ("more than there are", |header| header.count = 32768),
        ("none", |header| header.count = 0),
        ("entries nowhere", |header| header.entries = u64::MAX),
        ("entries behind the end", |header| header.entries = 1 << 40),
        ("entries where bytes overflow", |header| header.entries = u64::MAX / 512),
        ("another block", |header| header.lba = 2),
        ("a small header", |header| header.size = 91),
        ("a large header", |header| header.size = 513),
        ("a huge header", |header| header.size = u32::MAX),
        ("backwards", |header| header.last = header.first - 1),
        ("behind the end", |header| header.last = 1 << 14),
    ];
    for (what, lie) in lies {
        let disk = gpt(&used, lie);
        if *what == "another block" {
            let header: [u8; 512] = disk.bytes(1024);
            disk.sector(1, &header);
        }
        assert_eq!(disk.as_kernel(), [], "{what}");
    }
}

#[test]
fn supports_eight_exbibytes() {
    let mut disk = Disk::new(0, 512);
    disk.size = [(1 << 63) - 1, 1 << 43, 1 << 40]
        .into_iter()
        .find(|&size| disk.file.set_len(size).is_ok())
        .expect("a large sparse file");
    let last = disk.size / 512 - 1;
    let table = entries(128, &[(34, last), (last, last)]);
    let header = Header::of(&disk);
    disk.sector(0, &mbr(&[(0xee, 1, 1)])).sector(1, &header.bytes(512, &table)).sector(2, &table);
    let began = Instant::now();
    assert_eq!(starts(&disk.parts()), [(1, 34, last - 33), (2, last, 1)]);
    disk.sector(1, &[0; 512]).sector(0, &mbr(&[(0x83, 8, u32::MAX), (5, u32::MAX, u32::MAX)]));
    assert_eq!(starts(&disk.parts()), [(1, 8, u64::from(u32::MAX)), (2, u64::from(u32::MAX), 2)]);
    assert!(began.elapsed() < Duration::from_secs(5));
    // Regions beyond the file.
    for (offset, size) in [(u64::MAX, u64::MAX), (1 << 63, 512), (0, u64::MAX), (u64::MAX - 4095, 4095)] {
        let mut region = Region::new(disk.file.as_fd(), offset, size);
        partitions::read(&mut region, 512).unwrap();
    }
}

#[test]
fn survives_truncation_during_a_read() {
    let disk = gpt(&[(100, 200)], |_| ());
    for length in (0..34 * 4).rev().map(|part: u64| 128 * part) {
        disk.file.set_len(length).unwrap();
        assert_eq!(disk.parts(), [], "{length}");
    }
}

#[test]
fn reads_regions_at_any_offset() {
    let disk = gpt(&[(100, 200)], |_| ());
    let bytes = fs::read(&disk.path).unwrap();
    for shift in [1, 511, 512, 4095, 4097, 65537] {
        let file = tempfile::tempfile_in(disk.path.parent().unwrap()).unwrap();
        file.write_all_at(&bytes, shift).unwrap();
        let mut region = Region::new(file.as_fd(), shift, disk.size);
        assert_eq!(partitions::read(&mut region, 512).unwrap(), disk.parts());
        let mut part = vec![0; 100_000];
        assert!(region.read(300, &mut part).unwrap());
        assert_eq!(part, bytes[300..100_300]);
        assert!(!region.read(disk.size, &mut [0]).unwrap() && !region.read(u64::MAX, &mut [0]).unwrap());
    }
}

/// Changes to a valid disk: its kind, and bytes at offsets.
fn changes() -> impl Strategy<Value = (bool, Vec<(u16, u8)>)> {
    (any::<bool>(), proptest::collection::vec((0u16..2048, any::<u8>()), 0..20))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn never_panics_nor_leaves_the_disk(
        (is_gpt, changes) in changes(),
        valid in any::<bool>(),
        size in prop_oneof![Just(2 * MIB), 0..2 * MIB],
    ) {
        thread_local!(static DISKS: [Disk; 2] = [Disk::new(2 * MIB, 512), Disk::new(2 * MIB, 4096)]);
        DISKS.with(|disks| {
            let disk = &disks[usize::from(size % 3 == 0)];
            let mut bytes = vec![0; 2 << 12];
            if is_gpt {
                let table = entries(8, &[(34, 50), (40, u64::from(u8::MAX))]);
                let header = Header { count: 8, last: 100, ..Header::of(disk) };
                bytes[..512].copy_from_slice(&mbr(&[(0xee, 1, 1)]));
                bytes[512..1024].copy_from_slice(&header.bytes(512, &table));
                bytes[1024..2048].copy_from_slice(&table);
            } else {
                bytes[..512].copy_from_slice(&mbr(&[(0x83, 9, 9), (5, 1, 7)]));
                for link in 1..4 {
                    let sector = mbr(&[(0x83, 1, 2), (5, link as u32, 2)]);
                    bytes[512 * link..512 * link + 512].copy_from_slice(&sector);
                }
            }
            for &(at, value) in &changes {
                bytes[usize::from(at)] = value;
            }
            if valid {
                // Recomputes the checksums, so that the parser gets beyond them.
                let sum = crc(&bytes[1024..2048]);
                bytes[512 + 88..512 + 92].copy_from_slice(&sum.to_le_bytes());
                bytes[512 + 16..512 + 20].fill(0);
                let sum = crc(&bytes[512..512 + 92]);
                bytes[512 + 16..512 + 20].copy_from_slice(&sum.to_le_bytes());
            }
            disk.write(0, &bytes);
            let mut region = Region::new(disk.file.as_fd(), 0, size);
            for part in partitions::read(&mut region, disk.block).unwrap() {
                assert!(part.size > 0 && part.start + part.size <= size, "{part:?}");
            }
        });
    }
}
