// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Malicious images: the daemon and a neighbour's device keep working, whatever an image contains.
//!
//! Knows how to create invalid partition tables. Does not know how the daemon parses them: checks
//! only that parsing ends, in little time and memory, and that the device can be used and unbound.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::MIB;
use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::model::Numbers;

/// The daemon's resident memory may grow by at most this.
const MORE_KIB: u64 = 16 << 10;
const SECTOR: usize = 512;
const SCRIPT: Duration = Duration::from_secs(400);

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private_images::truncated", Needs::Private, 120, truncated),
        case("private_images::sizes", Needs::Private, 120, sizes),
        case("private_images::tables", Needs::Private, 400, tables),
        case("private_images::garbage", Needs::Private, 450, garbage),
    ]
}

/// A neighbour that reads /dev/loop0 continuously; no read may fail.
const NEIGHBOUR: &str = r#"
image neighbour 1M neighbour; works "the neighbour" losetup /dev/loop0 neighbour
while [ ! -e over ]; do
    [ "$(head_of /dev/loop0)" = neighbour ] || { echo bad >> rounds; break; }
    dd if=/dev/loop0 of=/dev/null bs=64k iflag=direct 2>/dev/null || { echo bad >> rounds; break; }
    echo good >> rounds; sleep 0.05
done &
reader=$!
over() {
    : > over; wait $reader
    same "the neighbour" "$(grep -c bad rounds)" 0; [ "$(grep -c good rounds)" -gt 3 ] || wrong "too few reads"
}
"#;

/// Runs a script next to a neighbour, and checks the daemon's memory afterwards.
fn with_neighbour(ctx: &Ctx, script: &str) -> Res<String> {
    let mut daemon = Daemon::start(ctx)?;
    let before = daemon.resident_kib()?;
    let out = Inside::new(ctx, &daemon).run_for(SCRIPT, &format!("{NEIGHBOUR}\n{script}\nover"))?;
    let more = daemon.resident_kib()?.saturating_sub(before);
    daemon.check_alive()?;
    ensure!(more < MORE_KIB, "the daemon has grown by {more} KiB");
    ctx.note(format!("{more} KiB more"));
    ensure!(!daemon.log().contains("bug:"), "{}", daemon.log());
    daemon.stop()?;
    Ok(out)
}

/// A file is truncated and extended while it is bound.
fn truncated(ctx: &Ctx) -> Res {
    with_neighbour(
        ctx,
        r#"
        head -c 8M /dev/urandom > a; losetup /dev/loop1 a
        pids=
        for i in 1 2 3 4; do while [ ! -e enough ]; do
            dd if=/dev/loop1 of=/dev/null bs=32k iflag=direct 2>/dev/null
            dd if=/dev/zero of=/dev/loop1 bs=4k count=16 seek=1500 oflag=direct conv=notrunc 2>/dev/null
        done & pids="$pids $!"; done
        for size in 1M 0 3 5000000 8M 4096; do
            truncate -s $size a; sleep 0.3
        done
        : > enough; wait $pids
        truncate -s 1M a
        refused "past the end" "Input/output error" dd if=/dev/loop1 of=/dev/null bs=4k skip=1000 count=1 iflag=direct
        works "before it" dd if=/dev/loop1 of=/dev/null bs=4k skip=10 count=1 iflag=direct
        works "-c" losetup -c /dev/loop1; same "size" "$(size /dev/loop1)" "$(($(stat -c %s a) / 512 * 512))"
        works "-d" losetup -d /dev/loop1; soon "unbound" "/dev/loop0 $PWD/neighbour" bound
        "#,
    )?;
    Ok(())
}

/// An empty file, less than a sector, and the maximum size.
fn sizes(ctx: &Ctx) -> Res {
    with_neighbour(
        ctx,
        r#"
        : > none; printf x > one; truncate -s 511 less
        for file in none one less; do
            works "$file" losetup -P /dev/loop1 $file; same "$file" "$(size /dev/loop1)" 0
            same "$file: read" "$(dd if=/dev/loop1 bs=512 count=1 2>/dev/null | wc -c)" 0
            works "$file: -d" losetup -d /dev/loop1
        done
        all=9223372036854775807; truncate -s $all vast || wrong "no file of that size here"
        works "vast" losetup -P /dev/loop1 vast
        same "vast: size" "$(size /dev/loop1)" $((all / 512 * 512))
        last=$((all / 4096 - 1))
        works "vast: read the last" dd if=/dev/loop1 of=/dev/null bs=4096 skip=$last count=1 iflag=direct
        works "vast: write it" dd if=/etc/passwd of=/dev/loop1 bs=512 count=1 seek=$((all / 512 - 1)) oflag=direct
        works "vast: -d" losetup -d /dev/loop1
        works "at its end" losetup -P -o $((all - 1023)) /dev/loop1 vast; same "its end" "$(size /dev/loop1)" 512
        works "-d" losetup -d /dev/loop1
        refused "an offset past the end" "" losetup -o 9223372036854775808 /dev/loop1 vast
        "#,
    )?;
    Ok(())
}

/// Well-formed tables with invalid values.
fn tables(ctx: &Ctx) -> Res {
    let names = test_tables();
    for (name, bytes) in &names {
        write(ctx, name, bytes)?;
    }
    let list: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
    let out = with_neighbour(
        ctx,
        &format!(
            "for file in {}; do{}",
            list.join(" "),
            r#"
            from=${EPOCHREALTIME/./}
            works "$file" losetup -P /dev/loop1 $file
            took=$(( (${EPOCHREALTIME/./} - from) / 1000 )); [ $took -lt 40000 ] || wrong "$file: $took ms"
            count=$(ls -d /dev/loop1p* 2>/dev/null | wc -l); [ $count -le 128 ] || wrong "$file: $count partitions"
            for part in /dev/loop1p1 /dev/loop1p5; do
                [ -e $part ] || continue
                [ "$(size $part)" -le "$(size /dev/loop1)" ] || wrong "$part is larger than its disk"
                dd if=$part of=/dev/null bs=4k count=4 2>/dev/null
            done
            echo "$file $count"
            works "$file: -d" losetup -d /dev/loop1
            soon "$file: unbound" "/dev/loop0 $PWD/neighbour" bound
        done"#
        ),
    )?;
    ctx.note(format!("partitions: {}", out.replace('\n', ", ")));
    ensure!(out.contains("honest 2"), "a valid table has no partitions: {out}");
    Ok(())
}

/// Random data with table signatures, and valid tables with a few flipped bits.
fn garbage(ctx: &Ctx) -> Res {
    let rounds: u64 = if ctx.host.full { 400 } else { 30 };
    let size = 256 << 10;
    let file = File::create(ctx.path("noise")).at("noise")?;
    for seed in 0..rounds {
        let mut numbers = Numbers::new(seed);
        let mut bytes =
            if seed % 2 == 0 { gpt(&[(64, 100), (120, 400)], 128, 128) } else { noise(&mut numbers) };
        bytes.resize(size, 0);
        if seed % 2 == 0 {
            for _ in 0..1 + seed % 7 {
                let at = (numbers.next() % (34 * SECTOR as u64)) as usize;
                bytes[at] ^= 1 << (numbers.next() % 8);
            }
            seal(&mut bytes);
        }
        file.write_all_at(&bytes, seed * size as u64)?;
    }
    with_neighbour(
        ctx,
        &format!(
            "rounds={rounds}; size={size}\n{}",
            r#"
        for ((i = 0; i < rounds; i++)); do
            losetup -P -o $((i * size)) --sizelimit $size /dev/loop1 noise || wrong "seed $i"
            losetup -d /dev/loop1 || wrong "seed $i: -d"
        done
        soon "unbound" "/dev/loop0 $PWD/neighbour" bound
        "#
        ),
    )?;
    Ok(())
}

fn write(ctx: &Ctx, name: &str, bytes: &[u8]) -> Res {
    let path = ctx.path(name);
    std::fs::write(&path, bytes).at(&path)?;
    let size = (2 * MIB).max(bytes.len() as u64);
    File::options().write(true).open(&path).and_then(|file| file.set_len(size)).at(&path)
}

fn test_tables() -> Vec<(&'static str, Vec<u8>)> {
    let some: Vec<(u64, u64)> = (0..128).map(|n| (64 + n, 64 + n)).collect();
    vec![
        ("honest", gpt(&[(64, 100), (120, 400)], 128, 128)),
        ("overlapping", gpt(&[(64, 400), (100, 300), (64, 400), (0, 4095)], 128, 128)),
        ("backwards", gpt(&[(400, 64), (u64::MAX, 0), (64, u64::MAX), (1, 1)], 128, 128)),
        ("outside", gpt(&[(1 << 40, 1 << 41), (u64::MAX - 1, u64::MAX)], 128, 128)),
        ("many", gpt(&some, 128, 128)),
        ("entries-4294967295", gpt(&[(64, 100)], u32::MAX, 128)),
        ("entry-of-4294967295", gpt(&[(64, 100)], 128, u32::MAX)),
        ("entry-of-0", gpt(&[(64, 100)], u32::MAX, 0)),
        ("entry-of-1", gpt(&[(64, 100)], u32::MAX, 1)),
        ("table-is-header", gpt_at(&[(64, 100)], 128, 128, 1)),
        ("table-outside", gpt_at(&[(64, 100)], 128, 128, u64::MAX)),
        ("chain-to-itself", chain(&[(16, Some(0))])),
        ("chain-back", chain(&[(16, Some(32)), (48, Some(64)), (80, Some(0))])),
        ("chain-outside", chain(&[(16, Some(u32::MAX - 16))])),
        ("chain-long", chain(&(0..500).map(|n| (16 + 4 * n, Some(4 * (n + 1)))).collect::<Vec<_>>())),
        (
            "mbr-overlapping",
            mbr(&[(0x83, 0, u32::MAX), (0x83, 1, 4000), (0x83, 1, 4000), (0x83, u32::MAX, 1)]),
        ),
        ("mbr-only-extended", mbr(&[(5, 0, u32::MAX), (0xf, 0, 1), (0x85, 1, 1), (5, 2, 2)])),
    ]
}

fn noise(numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..64 * SECTOR / 8).flat_map(|_| numbers.next().to_le_bytes()).collect();
    for sector in bytes.chunks_mut(SECTOR) {
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
    }
    bytes
}

/// One sector with four partitions: type, first sector, number of them.
fn mbr(parts: &[(u8, u32, u32)]) -> Vec<u8> {
    let mut sector = vec![0; SECTOR];
    for (entry, (kind, first, count)) in sector[446..510].chunks_mut(16).zip(parts) {
        entry[4] = *kind;
        entry[8..12].copy_from_slice(&first.to_le_bytes());
        entry[12..16].copy_from_slice(&count.to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// An extended partition at sector 16, and its chain: the sector of each link, and the sector that
/// it names as the next.
fn chain(links: &[(u32, Option<u32>)]) -> Vec<u8> {
    let mut bytes = mbr(&[(5, 16, 4000)]);
    bytes.resize(2 * MIB as usize, 0);
    for (at, next) in links {
        let mut parts = vec![(0x83, 1, 1)];
        parts.extend(next.map(|next| (5, next, 4)));
        let at = *at as usize * SECTOR;
        bytes[at..at + SECTOR].copy_from_slice(&mbr(&parts));
    }
    bytes
}

fn gpt(parts: &[(u64, u64)], count: u32, entry: u32) -> Vec<u8> {
    gpt_at(parts, count, entry, 2)
}

/// A GPT with these first and last sectors, and these header fields.
fn gpt_at(parts: &[(u64, u64)], count: u32, entry: u32, table: u64) -> Vec<u8> {
    let mut bytes = mbr(&[(0xee, 1, u32::MAX)]);
    bytes.resize(34 * SECTOR, 0);
    for (n, (first, last)) in parts.iter().enumerate() {
        let at = 2 * SECTOR + n * 128;
        bytes[at..at + 32].fill(n as u8 + 1);
        bytes[at + 32..at + 40].copy_from_slice(&first.to_le_bytes());
        bytes[at + 40..at + 48].copy_from_slice(&last.to_le_bytes());
    }
    let header = &mut bytes[SECTOR..SECTOR + 92];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..16].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
    let numbers = [(24, 1), (32, 4095), (40, 34), (48, 4062), (72, table)];
    for (at, value) in numbers {
        header[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
    }
    header[80..84].copy_from_slice(&count.to_le_bytes());
    header[84..88].copy_from_slice(&entry.to_le_bytes());
    seal(&mut bytes);
    bytes
}

/// Recomputes the checksums, so that the parser accepts them.
fn seal(bytes: &mut [u8]) {
    let table = crc32(&bytes[2 * SECTOR..34 * SECTOR]);
    let header = &mut bytes[SECTOR..SECTOR + 92];
    header[88..92].copy_from_slice(&table.to_le_bytes());
    header[16..20].fill(0);
    let own = crc32(header);
    header[16..20].copy_from_slice(&own.to_le_bytes());
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}
