// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Partition tables: those of the machine's tools, compared with the tools and (if it supports
//! them) the kernel; and those of an attacker.

mod damaged;

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
