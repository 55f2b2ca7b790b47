// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Unmodified losetup(8) with private loop devices: find, query, sizes, read-only, block sizes.

use serde_json::Value;

use super::geometry::kernel_has_large_blocks;
use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::host;
use crate::store::Store;
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private::find", Needs::Private, 120, find),
        case("private::query", Needs::Private, 150, query),
        case("private::sizes", Needs::Private, 150, sizes),
        case("private::capacity", Needs::Private, 120, capacity),
        case("private::read_only", Needs::Private, 120, read_only),
        case("private::block_size", Needs::Private, 120, block_size),
        case("private::direct_io", Needs::Private, 120, direct_io),
    ]
}

/// `-f` finds the lowest unbound device, explicit numbers work, and each device has a node.
fn find(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run(
        r#"
        image a 1M alpha; image b 1M beta
        same "nothing bound" "$(losetup -a)" ""
        same "first -f" "$(losetup -f)" /dev/loop0
        same "second -f" "$(losetup -f)" /dev/loop0
        same "kind of node" "$(stat -Lc %F /dev/loop0)" "block special file"
        same "size, unbound" "$(size /dev/loop0)" 0
        refused "status of an unbound device" "" losetup /dev/loop0
        same "-f --show" "$(losetup -f --show a)" /dev/loop0
        works "-f img" losetup -f b
        same "bound by -f" "$(bound)" "/dev/loop0 $PWD/a
/dev/loop1 $PWD/b"
        same "bytes 0" "$(head_of /dev/loop0)" alpha
        same "bytes 1" "$(head_of /dev/loop1)" beta
        same "next -f" "$(losetup -f)" /dev/loop2
        works "explicit" losetup /dev/loop5 a
        same "explicit bytes" "$(head_of /dev/loop5)" alpha
        same "-f skips 5" "$(losetup -f)" /dev/loop2
        refused "bound" "Device or resource busy" losetup /dev/loop5 b
        works "-d of two" losetup -d /dev/loop0 /dev/loop5
        same "lowest again" "$(losetup -f --show b)" /dev/loop0
        refused "no file" "No such file" losetup -f --show nothing
        refused "a directory" "" losetup -f --show .
        refused "a character device" "" losetup -f --show /dev/null
        same "refusals bind nothing" "$(bound)" "/dev/loop0 $PWD/b
/dev/loop1 $PWD/b"
        "#,
    )?;
    daemon.stop()
}

/// Every query, with offset and limit.
fn query(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let out = Inside::new(ctx, &daemon).run(
        r#"
        image "a b" 8M; image c 1M
        works "bind" losetup -f -o 1M --sizelimit 2M "a b"
        works "bind" losetup -f -r c
        dev=$(stat -c %d c); ab=$(stat -c %i "a b"); c=$(stat -c %i c)
        line0="/dev/loop0: [$(printf %04d "$dev")]:$ab ($PWD/a b), offset 1048576, sizelimit 2097152"
        line1="/dev/loop1: [$(printf %04d "$dev")]:$c ($PWD/c)"
        same "-a" "$(losetup -a | sort)" "$line0
$line1"
        same "-j" "$(losetup -j "a b")" "$line0"
        same "-j -o, its own" "$(losetup -j "a b" -o 1M)" "$line0"
        same "-j -o, another" "$(losetup -j "a b" -o 2M)" ""
        same "-j of another file" "$(losetup -j /etc/passwd)" ""
        same "one device" "$(losetup /dev/loop1)" "$line1"
        same "-l lists both" "$(losetup -l -n | wc -l)" 2
        holds "-l" "$(losetup -l)" "BACK-FILE"
        same "-n leaves the heading out" "$(losetup -l | wc -l)" 3
        same "--raw" "$(losetup --raw -n -O NAME,BACK-FILE | sort)" "/dev/loop0 $PWD/a\\x20b
/dev/loop1 $PWD/c"
        works "every column" losetup -l --output-all
        for n in 0 1; do
            works "node $n" test -b /dev/loop$n
            same "sys $n" "$(cat /sys/block/loop$n/dev)" "$(stat -Lc %Hr:%Lr /dev/loop$n)"
            same "offset $n" "$(cat /sys/block/loop$n/loop/offset)" "$(losetup -n -O OFFSET /dev/loop$n | tr -d ' ')"
        done
        # sysfs changes with the next call only; the kernel's driver looks at each read.
        rm c; works "a change" losetup -c /dev/loop1
        same "a deleted file" "$(losetup -n -O BACK-FILE /dev/loop1)" "$PWD/c (deleted)"
        columns=NAME,AUTOCLEAR,BACK-FILE,BACK-INO,BACK-MAJ:MIN,MAJ:MIN,OFFSET,PARTSCAN,RO,SIZELIMIT,DIO,LOG-SEC
        echo "$ab $(stat -c %Hd:%Ld "a b")"
        losetup -J -O $columns
        "#,
    )?;
    let (numbers, json) = out.split_once('\n').ok_or("no output")?;
    let numbers: Vec<&str> = numbers.split(' ').collect();
    let json: Value = serde_json::from_str(json).at("losetup -J")?;
    let mut devices = json["loopdevices"].as_array().cloned().ok_or("no loopdevices")?;
    devices.sort_by_key(|device| device["name"].to_string());
    ensure!(devices.len() == 2, "-J: {json}");
    for (name, wanted) in [
        ("name", Value::from("/dev/loop0")),
        ("autoclear", false.into()),
        ("back-file", ctx.path("a b").into()),
        ("back-ino", numbers[0].parse::<u64>()?.into()),
        ("back-maj:min", numbers[1].into()),
        ("offset", (1 << 20).into()),
        ("partscan", false.into()),
        ("ro", false.into()),
        ("sizelimit", (2 << 20).into()),
        ("log-sec", 512.into()),
    ] {
        // Older versions print every column as text and pad it.
        let text = |value: &Value| value.as_str().map_or(value.to_string(), |text| text.trim().to_owned());
        ensure!(text(&devices[0][name]) == text(&wanted), "-J: {name} is not {wanted}: {json}");
    }
    // losetup shows it for major 7 only.
    let number = devices[0]["maj:min"].as_str().map(str::trim);
    let of_loop = number.is_some_and(|number| number.starts_with("7:"));
    ensure!(of_loop == (crate::BACKEND == "loop") && (of_loop || number.is_none()), "-J: {json}");
    ensure!(devices[1]["ro"] == true, "-J: loop1 is not read-only: {json}");
    daemon.stop()
}

/// The size is that of the file after the offset, or the limit, in whole sectors.
fn sizes(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run(
        r#"
        sized() { # WHAT WANTED OPTIONS...
            local what=$1 wanted=$2; shift 2
            local dev; dev=$(losetup -f --show "$@" 2>/dev/null) || { wrong "$what: refused"; return; }
            same "$what" "$(size $dev)" "$wanted"
            losetup -d $dev; soon "$what: unbound" "" losetup -a
        }
        image odd 1000123; image tiny 100; image empty 0; image whole 1M
        sized "an odd file" 999936 odd
        sized "a file below a sector" 0 tiny
        sized "an empty file" 0 empty
        sized "offset" 1047552 -o 1024 whole
        sized "offset of a byte" 1048064 -o 1 whole
        sized "odd offset, odd file" 999424 -o 513 odd
        sized "limit" 4096 --sizelimit 4096 whole
        sized "odd limit" 4096 --sizelimit 4500 whole
        sized "limit above the file" 1048576 --sizelimit 2M whole
        sized "offset at the end" 0 -o 1M whole
        sized "offset past the end" 0 -o 2M whole
        sized "both" 524288 -o 512K --sizelimit 1M whole
        refused "an offset above 2^63" "" losetup -f --show -o 9223372036854775808 whole
        # Data is at the right offset, also unaligned.
        printf 'x%0511d' 7 | dd of=whole bs=1 seek=3 conv=notrunc 2>/dev/null
        dev=$(losetup -f --show -o 3 whole)
        same "bytes after an odd offset" "$(head_of $dev 1)" x
        printf YY | dd of=$dev conv=notrunc 2>/dev/null; sync -d $dev 2>/dev/null || sync
        losetup -d $dev
        same "bytes written there" "$(dd if=whole bs=1 skip=2 count=4 2>/dev/null | tr -d '\0')" YY0
        "#,
    )?;
    daemon.stop()
}

/// `-c` while a descriptor is open.
fn capacity(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run(
        r#"
        image a 1M; dev=$(losetup -f --show a)
        exec 7<>$dev
        truncate -s 3M a; printf end | dd of=a bs=1M seek=2 conv=notrunc 2>/dev/null
        same "before -c" "$(size $dev)" 1048576
        works "-c, grown" losetup -c $dev
        same "grown" "$(size $dev)" 3145728
        same "grown, on the open descriptor" "$(dd bs=1M skip=2 count=1 <&7 2>/dev/null | tr -d '\0')" end
        same "grown, in sysfs" "$(cat /sys/block/loop0/size)" 6144
        truncate -s 1000000 a
        works "-c, shrunk" losetup -c $dev
        same "shrunk" "$(size $dev)" 999936
        exec 7<&-; exec 7<$dev
        works "-c with the device open for reading" losetup -c $dev
        exec 7<&-
        losetup -d $dev
        works "bind with a limit" losetup -f --sizelimit 512K a; truncate -s 4M a
        works "-c with a limit" losetup -c $dev
        same "the limit stays" "$(size $dev)" 524288
        losetup -d $dev; refused "-c of an unbound device" "No such device" losetup -c $dev
        "#,
    )?;
    daemon.stop()
}

/// `-r`, and read-only files.
fn read_only(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run(
        r#"
        image a 1M alpha; mkdir d; cp a d/a; mount --bind d d; mount -o remount,bind,ro d
        for file in "-r a" d/a; do
            dev=$(losetup -f --show $file)
            same "$file: RO" "$(losetup -n -O RO $dev | tr -d ' ')" 1
            same "$file: getro" "$(blockdev --getro $dev)" 1
            same "$file: sysfs" "$(cat /sys/block/loop0/ro)" 1
            same "$file: bytes" "$(head_of $dev)" alpha
            refused "$file: write" "Operation not permitted" dd if=/dev/zero of=$dev bs=512 count=1
            refused "$file: discard" "" blkdiscard $dev
            losetup -d $dev; soon "$file: unbound" "" losetup -a
        done
        same "the file is unchanged" "$(head_of a)" alpha
        # The next binding of the device is writable.
        same "the same device" "$(losetup -f --show a)" "$dev"
        same "writable again" "$(blockdev --getro $dev)" 0
        works "write" dd if=/dev/zero of=$dev bs=512 count=1 conv=fsync
        same "written" "$(head_of a)" ""
        umount d
        "#,
    )?;
    daemon.stop()
}

/// `-b`: a power of two, up to a page; on the kernel's loop driver as far as the kernel goes. On the
/// caller's own descriptor.
fn block_size(ctx: &Ctx) -> Res {
    let large = crate::BACKEND == "loop" && kernel_has_large_blocks(&Store::ext4(ctx)?)?;
    let sizes = if large { "right='8192 65536' wrong=131072" } else { "right= wrong='8192 65536'" };
    let daemon = Daemon::start(ctx)?;
    let script = format!(
        "{sizes}\n{}",
        r#"
        image a 1M alpha
        for b in 1024 4096 $right 512; do
            dev=$(losetup -f --show -b $b a)
            same "-b $b" "$(blockdev --getss $dev)" $b
            same "LOG-SEC $b" "$(losetup -n -O LOG-SEC $dev | tr -d ' ')" $b
            same "sysfs $b" "$(cat /sys/block/loop0/queue/logical_block_size)" $b
            same "bytes $b" "$(head_of $dev)" alpha
            losetup -d $dev; soon "-b $b: unbound" "" losetup -a
        done
        for b in 1000 256 $wrong; do
            refused "-b $b" "" losetup -f --show -b $b a
            soon "-b $b binds nothing" "" losetup -a
        done
        # The block size of a bound device changes: the caller's descriptor gets the new disk.
        dev=$(losetup -f --show a)
        works "-b of a bound one" losetup -b 4096 $dev
        same "changed" "$(blockdev --getss $dev)" 4096
        same "bytes after the change" "$(head_of $dev)" alpha
        image odd 1000123; losetup -d $dev
        dev=$(losetup -f --show -b 4096 odd 2>/dev/null)
        echo "a device of 4096-byte blocks of 1000123 bytes: $(size $dev)" >&2
        "#
    );
    Inside::new(ctx, &daemon).run(&script)?;
    daemon.stop()
}

/// `--direct-io`, on a file system that supports it.
fn direct_io(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 4 << 20)?;
    let daemon = Daemon::start(ctx)?;
    let script = format!(
        "img={image}\n{}",
        r#"
        dio() { losetup -n -O DIO "$1" | tr -d ' '; }
        dev=$(losetup -f --show $img)
        same "default" "$(dio $dev)" 0
        works "on" losetup --direct-io=on $dev; same "on" "$(dio $dev)" 1
        works "off" losetup --direct-io=off $dev; same "off" "$(dio $dev)" 0
        losetup -d $dev; soon "unbound" "" losetup -a
        dev=$(losetup -f --show --direct-io=on $img); same "from the start" "$(dio $dev)" 1
        printf direct | dd of=$dev conv=notrunc,fsync 2>/dev/null
        same "written" "$(head_of $img)" direct
        losetup -d $dev; soon "unbound" "" losetup -a
        # Direct I/O needs an offset that is a multiple of the block size.
        dev=$(losetup -f --show -o 3 $img); same "unaligned" "$(dio $dev)" 0
        refused "on, unaligned" "Invalid argument" losetup --direct-io=on $dev
        "#
    );
    Inside::new(ctx, &daemon).run(&script)?;
    daemon.stop()?;
    let left = host::kernel_log_since(&ctx.name);
    ensure!(!left.contains("I/O error, dev ublkb"), "an I/O error: {}", tools::tail(&left, 5));
    Ok(())
}
