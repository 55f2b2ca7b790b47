// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Partition tables: those of the machine's tools, compared with the tools and (if it supports
//! them) the kernel; and those of an attacker.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use loopengine_core::Kind;
use loopengine_core::image::Region;
use loopengine_core::image::partitions::{self, MAX, PartitionRange};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::support::*;

/// A disk in a file.
struct Disk {
    path: PathBuf,
    file: File,
    size: u64,
    block: u32,
    _directory: TempDir,
}

impl Disk {
    fn new(size: u64, block: u32) -> Disk {
        let directory = temporary();
        let path = directory.path().join("disk");
        image_file(&path, size);
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        Disk { path, file, size, block, _directory: directory }
    }

    fn sector(&self, number: u64, bytes: &[u8]) -> &Disk {
        self.write(number * u64::from(self.block), bytes)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> &Disk {
        self.file.write_all_at(bytes, at).unwrap();
        self
    }

    fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// The partitions that are read, with and without direct I/O, and inside of a larger file.
    fn parts(&self) -> Vec<PartitionRange> {
        let read = |file: &File, offset| {
            let mut region = Region::new(file.as_fd(), offset, self.size);
            partitions::read(&mut region, self.block).unwrap()
        };
        let parts = read(&self.file, 0);
        let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&self.path);
        if let Ok(direct) = direct {
            assert_eq!(read(&direct, 0), parts);
        }
        let mut numbers: Vec<u32> = parts.iter().map(|part| part.number).collect();
        for part in &parts {
            assert!((1..=MAX).contains(&part.number) && part.size > 0, "{part:?}");
            assert!(part.start.checked_add(part.size).is_some_and(|end| end <= self.size), "{part:?}");
        }
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), parts.len(), "no number twice");
        parts
    }

    /// The same, compared with the kernel, if it reads partitions.
    fn as_kernel(&self) -> Vec<PartitionRange> {
        let parts = self.parts();
        let mut ours = parts.clone();
        ours.sort_by_key(|part| part.number);
        if let Some(kernel) = kernel_reads().then(|| self.kernel(&ours)).flatten() {
            assert_eq!(ours, kernel, "left: ours, right: the kernel's");
        }
        parts
    }

    /// The kernel's partitions. It may read a table twice, so this waits briefly for `expected`.
    fn kernel(&self, expected: &[PartitionRange]) -> Option<Vec<PartitionRange>> {
        let image = self.path.display();
        let command = format!("losetup --find --show --partscan --sector-size {} {image}", self.block);
        let device = run(&command).ok()?;
        let name = device.trim_start_matches("/dev/");
        let deadline = Instant::now() + Duration::from_secs(3);
        let mut parts = shown(name);
        while parts != expected && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            parts = shown(name);
        }
        run(&format!("losetup --detach {device}")).unwrap();
        Some(parts)
    }

    /// A path with the real block size: most tools assume 512 bytes for a file.
    fn node(&self) -> Option<(PathBuf, Option<Loop>)> {
        if self.block == 512 {
            return Some((self.path.clone(), None));
        }
        let device = loop_device(&self.path, self.block)?;
        Some((device.path().to_owned(), Some(device)))
    }

    /// Partitions of a tool, which gets a script on its standard input.
    fn made(&self, command: &str, input: &str) -> bool {
        let Some(node) = self.node() else { return false };
        let mut words = command.split_whitespace();
        let child = Command::new(words.next().unwrap())
            .args(words)
            .arg(&node.0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            skipped(&format!("no {command}"));
            return false;
        };
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        true
    }

    /// The output of sfdisk, except for the size of extended partitions.
    fn sfdisk(&self) -> Vec<PartitionRange> {
        let block = u64::from(self.block);
        let (path, _device) = self.node().unwrap();
        let text = run(&format!("sfdisk --json {}", path.display())).unwrap();
        let table: serde_json::Value = serde_json::from_str(&text).unwrap();
        let shown = table["partitiontable"]["partitions"].as_array().cloned().unwrap_or_default();
        let part = |part: &serde_json::Value| {
            let node = part["node"].as_str().unwrap().strip_prefix(path.to_str().unwrap()).unwrap();
            let extended = ["5", "f", "85"].contains(&part["type"].as_str().unwrap());
            let size = part["size"].as_u64().unwrap() * block;
            PartitionRange {
                number: node.trim_start_matches('p').parse().unwrap(),
                start: part["start"].as_u64().unwrap() * block,
                size: if extended { block.max(1024) } else { size },
            }
        };
        let mut parts: Vec<PartitionRange> = shown.iter().map(part).collect();
        parts.sort_by_key(|part| part.number);
        parts
    }

    fn agrees_with_sfdisk(&self) -> Vec<PartitionRange> {
        let mut parts = self.as_kernel();
        parts.sort_by_key(|part| part.number);
        assert_eq!(parts, self.sfdisk(), "left: ours, right: sfdisk's");
        parts
    }
}

/// The partitions of a loop device in sysfs, by number.
fn shown(name: &str) -> Vec<PartitionRange> {
    let mut parts = Vec::new();
    for entry in fs::read_dir(format!("/sys/block/{name}")).unwrap().flatten() {
        let number =
            |what: &str| fs::read_to_string(entry.path().join(what)).ok()?.trim().parse::<u64>().ok();
        if let (Some(partition), Some(start), Some(size)) =
            (number("partition"), number("start"), number("size"))
        {
            parts.push(PartitionRange { number: partition as u32, start: start * 512, size: size * 512 });
        }
    }
    parts.sort_by_key(|part| part.number);
    parts
}

/// This kernel reads MBRs of loop devices.
fn kernel_reads() -> bool {
    static READS: OnceLock<bool> = OnceLock::new();
    *READS.get_or_init(|| {
        let disk = Disk::new(MIB, 512);
        disk.write(0, &mbr(&[(0x83, 8, 8)]));
        let expected = [PartitionRange { number: 1, start: 4096, size: 4096 }];
        let reads = disk.kernel(&expected).is_some_and(|parts| parts == expected);
        if !reads {
            skipped("this kernel reads no partitions of loop devices: it is not asked");
        }
        reads
    })
}

/// A sector with these entries: type, start, size.
fn mbr(entries: &[(u8, u32, u32)]) -> [u8; 512] {
    let mut sector = [0; 512];
    for (index, &(kind, start, size)) in entries.iter().enumerate() {
        let at = 446 + 16 * index;
        sector[at + 4] = kind;
        sector[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        sector[at + 12..at + 16].copy_from_slice(&size.to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

fn crc(bytes: &[u8]) -> u32 {
    let bit = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), bit))
}

/// A header of a GPT, before its checksum is computed.
#[derive(Clone, Copy, Debug)]
struct Header {
    size: u32,
    lba: u64,
    first: u64,
    last: u64,
    entries: u64,
    count: u32,
    entry_size: u32,
}

impl Header {
    fn of(disk: &Disk) -> Header {
        let last = disk.size / u64::from(disk.block) - 34;
        Header { size: 92, lba: 1, first: 34, last, entries: 2, count: 128, entry_size: 128 }
    }

    fn bytes(&self, block: u32, table: &[u8]) -> Vec<u8> {
        let mut header = vec![0; block as usize];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..12].copy_from_slice(&0x1_0000u32.to_le_bytes());
        header[12..16].copy_from_slice(&self.size.to_le_bytes());
        for (at, value) in [(24, self.lba), (40, self.first), (48, self.last), (72, self.entries)] {
            header[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        header[80..84].copy_from_slice(&self.count.to_le_bytes());
        header[84..88].copy_from_slice(&self.entry_size.to_le_bytes());
        header[88..92].copy_from_slice(&crc(table).to_le_bytes());
        let sum = crc(&header[..(self.size as usize).min(header.len())]);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        header
    }
}

/// Entries of a GPT from first and last blocks, `count` of them.
fn entries(count: usize, used: &[(u64, u64)]) -> Vec<u8> {
    let mut table = vec![0; count * 128];
    for (entry, (first, last)) in table.chunks_exact_mut(128).zip(used) {
        entry[0] = 1;
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
    }
    table
}

/// A disk with a GPT of these entries, changed by `change` before its checksums are computed.
fn gpt(used: &[(u64, u64)], change: impl Fn(&mut Header)) -> Disk {
    let disk = Disk::new(8 * MIB, 512);
    let mut header = Header::of(&disk);
    change(&mut header);
    let table = entries(128, used);
    disk.sector(0, &mbr(&[(0xee, 1, u32::MAX)])).sector(2, &table);
    disk.sector(header.lba.min(100), &header.bytes(512, &table));
    disk
}

fn starts(parts: &[PartitionRange]) -> Vec<(u32, u64, u64)> {
    parts.iter().map(|part| (part.number, part.start / 512, part.size / 512)).collect()
}

#[test]
fn reads_tables_of_sfdisk() {
    let tables = [
        "label: dos\n,5M\n,5M,,*\n",
        "label: dos\n,5M\n,5M\n,,E\n,3M\n,4M\n,2M\n",
        "label: dos\nstart=1M, size=6M, type=5\nstart=3M, size=2M\n",
        "label: dos\n4: start=20M, size=5M\n2: start=1M, size=1M\n",
        "label: dos\n,40M,f\n,3M\n,4M\n,2M\n,2M\n,2M\n,2M\n,2M\n,2M\n,5M\n",
        "label: dos\n",
        "label: gpt\n,5M\n,5M\n,,L\n",
        "label: gpt\n9: start=20M, size=5M\n2: start=4M, size=1M\n",
        "label: gpt\ntable-length: 255\n200: start=20M, size=5M\n",
        "label: gpt\n",
    ];
    for block in [512, 1024, 2048, 4096] {
        for table in tables {
            let disk = Disk::new(64 * MIB, block);
            if !disk.made("sfdisk --quiet --no-reread --no-tell-kernel", table) {
                break;
            }
            let parts = disk.agrees_with_sfdisk();
            assert_eq!(parts.is_empty(), table.lines().count() == 1, "{block} {table}");
        }
    }
}

#[test]
fn reads_tables_of_sgdisk_and_parted() {
    let disk = Disk::new(64 * MIB, 512);
    if disk.made("sgdisk -n 1:2048:4095 -n 3:8192:+3M -n 100:0:0", "") {
        assert_eq!(disk.agrees_with_sfdisk().len(), 3);
        // A hybrid MBR: the GPT counts.
        assert!(disk.made("sgdisk -h 1:3", ""));
        assert_eq!(disk.as_kernel().len(), 3);
    }
    for label in ["msdos", "gpt"] {
        let disk = Disk::new(64 * MIB, 512);
        if run("parted --version").is_err() {
            return skipped("no parted");
        }
        let words = format!("mklabel {label} mkpart primary 1MiB 5MiB mkpart primary 6MiB 100%");
        run(&format!("parted --script {} {words}", disk.path.display())).unwrap();
        assert_eq!(disk.agrees_with_sfdisk().len(), 2);
    }
}

#[test]
fn accepts_every_number() {
    let disk = Disk::new(64 * MIB, 512);
    let used: Vec<(u64, u64)> = (0..300).map(|index| (2048 + index, 2048 + index)).collect();
    let table = entries(300, &used);
    let header = Header { count: 300, ..Header::of(&disk) };
    disk.sector(0, &mbr(&[(0xee, 1, 1)])).sector(1, &header.bytes(512, &table)).sector(2, &table);
    let parts = disk.as_kernel();
    assert_eq!(parts.len(), 255);
    assert_eq!(starts(&parts)[254], (255, 2048 + 254, 1));
    // A chain of 600 links.
    disk.sector(0, &mbr(&[(5, 1000, 100_000)]));
    for link in 0..600 {
        disk.sector(1000 + 4 * link, &mbr(&[(0x83, 1, 2), (5, 4 * (link as u32 + 1), 4)]));
    }
    let parts = disk.as_kernel();
    assert_eq!((parts.len(), parts.last().unwrap().number), (252, 255));
}

#[test]
fn uses_the_backup_of_a_damaged_table() {
    let disk = Disk::new(64 * MIB, 512);
    if !disk.made("sfdisk --quiet --no-reread --no-tell-kernel", "label: gpt\n,5M\n,6M\n") {
        return;
    }
    let whole = disk.agrees_with_sfdisk();
    let header: [u8; 512] = disk.bytes(512);
    for damage in [0, 8, 16, 24, 32, 56, 72, 80, 88] {
        disk.write(512 + damage, &[!header[damage as usize]]);
        assert_eq!(disk.parts(), whole, "byte {damage} of the header");
        disk.write(512, &header);
    }
    let entry: [u8; 1] = disk.bytes(1024 + 33);
    disk.write(1024 + 33, &[!entry[0]]);
    assert_eq!(disk.parts(), whole);
    // Without both, and without a protective MBR, there is no table.
    disk.write(disk.size - 512 + 16, &[0; 4]);
    assert_eq!(disk.as_kernel(), []);
    disk.write(1024 + 33, &entry);
    assert_eq!(disk.as_kernel(), whole);
    disk.sector(0, &[0; 512]);
    assert_eq!(disk.as_kernel(), []);
}

#[test]
fn finds_no_table() {
    for size in [0, 1, 511, 512, 1024, 4096, MIB] {
        assert_eq!(Disk::new(size, 512).parts(), []);
    }
    // A boot sector of a file system: code where the entries would be.
    let disk = Disk::new(MIB, 512);
    let mut sector = mbr(&[(0x83, 8, 8)]);
    sector[446] = 0x41;
    assert_eq!(disk.sector(0, &sector).as_kernel(), []);
    let mut region = Region::new(disk.file.as_fd(), 0, disk.size);
    for block in [0, 1, 256, 513, 131_072, u32::MAX] {
        assert_eq!(partitions::read(&mut region, block).unwrap_err().kind(), Kind::Invalid);
    }
}

#[test]
fn clipped_left_out_and_overlapping() {
    let disk = Disk::new(MIB, 512);
    disk.sector(0, &mbr(&[(0x83, 2000, 48), (0x83, 2000, 49), (0x83, 2048, 1), (0x83, 1, u32::MAX)]));
    assert_eq!(starts(&disk.as_kernel()), [(1, 2000, 48), (2, 2000, 48), (4, 1, 2047)]);
    disk.sector(0, &mbr(&[(0x83, 0, 10), (0, 5, 10), (0x83, 7, 0), (0x83, u32::MAX, u32::MAX)]));
    assert_eq!(starts(&disk.as_kernel()), [(1, 0, 10), (2, 5, 10)]);
    let disk = gpt(&[(100, 200), (150, 150), (16383, 16383), (16384, 16384), (100, 16384), (0, 5)], |_| ());
    assert_eq!(starts(&disk.as_kernel()), [(1, 100, 101), (2, 150, 1), (3, 16383, 1), (6, 0, 6)]);
    for end in [0, 98, 99, u64::MAX, u64::MAX - 1] {
        assert_eq!(gpt(&[(100, end)], |_| ()).parts(), []);
    }
    // With a partial last block.
    let mut disk = Disk::new(MIB + 2048, 4096);
    disk.sector(0, &mbr(&[(0x83, 1, 256)]));
    disk.size = MIB + 2048;
    assert_eq!(disk.parts(), [PartitionRange { number: 1, start: 4096, size: MIB - 4096 }]);
}

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
