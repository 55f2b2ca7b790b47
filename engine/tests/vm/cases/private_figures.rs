// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The cost of private loop devices: calls, and `losetup`.
//!
//! The cases print their measurements, and compare them with loose bounds that only a regression
//! exceeds: time on a busy emulated machine is noisy. In a machine that counts instructions, one
//! nanosecond is one instruction, and the bounds are the goals. `engine/doc/figures.md` describes
//! that measurement.

use std::time::Duration;

use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, fail};
use crate::store::{Disk, Shape};
use crate::tools;

/// From a last close until the device is unbound: the goal, and a bound for noisy machines.
const CLOSED_MAX: Duration = Duration::from_millis(50);
const CLOSED_NOISE_MAX: Duration = Duration::from_secs(2);

/// Rounds of losetup; the first ones are warm-up.
const ROUNDS: usize = 25;
const WARM: usize = 5;
/// The median round, as a multiple of the kernel's; the goal is 2.
const SET_UP_TIMES_MAX: f64 = 8.0;

/// Extra cost of an intercepted call over the kernel's, and of any other call over one without the
/// filter. The goals are 20 µs, or 60K instructions, and 100 ns.
const CALL_NS_MAX: [f64; 2] = [5_000_000.0, 5_000.0];
/// The same where an instruction counts as a nanosecond; a real CPU executes three or more in one.
const CALL_INSTRUCTIONS_MAX: [f64; 2] = [60_000.0, 300.0];

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private::figures::set_up", Needs::Private, 240, set_up),
        case("private::figures::calls", Needs::Private, 240, calls),
        case("private::figures::last_close", Needs::Private, 240, last_close),
    ]
}

/// The kernel's driver, loaded until this is dropped. It stays if it serves the pools.
struct KernelLoop;

impl KernelLoop {
    fn load() -> Res<KernelLoop> {
        if crate::BACKEND != "loop" {
            tools::ok(&["modprobe", "loop"])?;
        }
        Ok(KernelLoop)
    }
}

impl Drop for KernelLoop {
    fn drop(&mut self) {
        if crate::BACKEND == "loop" {
            return;
        }
        // Failures were reported; unbind first.
        let _ = tools::run(&["losetup", "-D"]);
        let _ = tools::until(Duration::from_secs(10), || {
            tools::run(&["modprobe", "-r", "loop"]).is_ok_and(|done| done.code == 0).then_some(())
        });
    }
}

/// `losetup -f --show` and `-d`, `mount -o loop` and `umount`: alternately in a pool and on the
/// kernel's driver.
fn set_up(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let kernel = KernelLoop::load()?;
    tools::ok(&["mkfifo", &ctx.path("ours"), &ctx.path("theirs")])?;
    let script = |me: &str, other: &str| {
        format!(
            r#"
            image {me}.img 1M; truncate -s 8M {me}.fs; mkfs.ext2 -q {me}.fs; mkdir {me}.mnt; exec 3<>{me} 4<>{other}
            for i in {{1..{ROUNDS}}}; do
                read -t 60 -u 3 || wrong "no turn $i"
                from=${{EPOCHREALTIME/./}}; dev=$(losetup -f --show {me}.img); mid=${{EPOCHREALTIME/./}}
                losetup -d $dev || wrong "$dev, round $i"; to=${{EPOCHREALTIME/./}}
                bound=$((mid - from)) cleared=$((to - mid)); soon "unbound" "" losetup -j {me}.img; sleep 0.1
                from=${{EPOCHREALTIME/./}}; mount -o loop {me}.fs {me}.mnt || wrong "mount, round $i"; mid=${{EPOCHREALTIME/./}}
                umount {me}.mnt || wrong "umount, round $i"; to=${{EPOCHREALTIME/./}}
                echo $bound $cleared $((mid - from)) $((to - mid)); soon "unmounted" "" losetup -j {me}.fs; echo >&4
            done"#
        )
    };
    let theirs = Inside::new(ctx, &daemon).shell().start(&script("theirs", "ours"))?;
    let ours = Inside::new(ctx, &daemon).with(&["--mount", "ext2"]).start(&script("ours", "theirs"))?;
    std::fs::write(ctx.path("ours"), "\n").at("the first turn")?;
    let (ours, theirs) = (ours.finish()?, theirs.finish()?);
    drop(kernel);
    let rounds = |text: &str| -> Res<Vec<[f64; 4]>> {
        let line = |line: &str| -> Res<[f64; 4]> {
            let numbers = line.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>()?;
            numbers.try_into().map_err(|_| format!("a round's line is {line:?}").into())
        };
        text.lines().skip(WARM).map(line).collect()
    };
    let (ours, theirs) = (rounds(&ours)?, rounds(&theirs)?);
    ensure!(ours.len() == ROUNDS - WARM && theirs.len() == ours.len(), "{} rounds", ours.len());
    let steps = ["losetup -f --show", "losetup -d", "mount -o loop", "umount"];
    for (at, what) in steps.into_iter().enumerate() {
        let of = |rounds: &[[f64; 4]]| median(rounds.iter().map(|round| round[at]).collect());
        let times = median(ours.iter().zip(&theirs).map(|(our, their)| our[at] / their[at]).collect());
        ctx.note(format!(
            "{what}: {:.1} ms, the kernel's {:.1} ms; {times:.2} times in the median round",
            of(&ours) / 1e3,
            of(&theirs) / 1e3
        ));
        if times > SET_UP_TIMES_MAX {
            fail!("{what} takes {times:.2} times as long as with the kernel's");
        }
    }
    daemon.stop()
}

/// Prints the medians of an intercepted call and of one that the filter lets through, in ns.
const MEASURE: &str = r#"
use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC);
open(my $dev, "<", $ARGV[0]) or die "$ARGV[0]: $!";
my $info = "\0" x 232;
sub median { my ($times, $call) = @_; my @took;
    for (1..101) {
        my $from = clock_gettime(CLOCK_MONOTONIC);
        $call->() for 1..$times;
        push @took, (clock_gettime(CLOCK_MONOTONIC) - $from) * 1e9 / $times;
    }
    (sort { $a <=> $b } @took)[50];
}
printf "%.0f %.1f\n", median(10, sub { ioctl($dev, 0x4c05, $info) or die "LOOP_GET_STATUS64: $!" }),
    median(1000, sub { getppid });
"#;

/// LOOP_GET_STATUS64 and getppid(2), in a pool and on the kernel's driver.
fn calls(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    std::fs::write(ctx.path("measure.pl"), MEASURE)?;
    let script = "image a 1M; dev=$(losetup -f --show a); perl measure.pl $dev; losetup -d $dev";
    let ours = Inside::new(ctx, &daemon).run(script)?;
    let kernel = KernelLoop::load()?;
    let theirs = Inside::new(ctx, &daemon).shell().run(script)?;
    drop(kernel);
    let numbers = |text: &str| -> Res<[f64; 2]> {
        match text.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>()?[..] {
            [call, other] => Ok([call, other]),
            _ => fail!("measured {text:?}"),
        }
    };
    let ([our_call, our_other], [their_call, their_other]) = (numbers(&ours)?, numbers(&theirs)?);
    ctx.note(format!(
        "LOOP_GET_STATUS64: {our_call:.0} ns, the kernel's {their_call:.0} ns; getppid: {our_other:.1} ns under the filter, {their_other:.1} ns without"
    ));
    let (call, other) = (our_call - their_call, our_other - their_other);
    let [call_max, other_max] = if counted() { CALL_INSTRUCTIONS_MAX } else { CALL_NS_MAX };
    if call > call_max || other > other_max {
        fail!("an intercepted call takes {call:.0} ns more (at most {call_max:.0}), any other {other:.1}");
    }
    daemon.stop()
}

/// Prints each last close and the ms until the device is unbound, by /sys and no call of loop(4).
const LAST_CLOSE: &str = r#"
use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC sleep);
sub lag { my ($what, $name, $close) = @_;
    $close->(); my $from = clock_gettime(CLOCK_MONOTONIC); my $size;
    do { sleep 0.001;
        open(my $file, "<", "/sys/class/block/$name/size") or die "$name: $!"; chomp($size = <$file>);
    } until $size == 0 or clock_gettime(CLOCK_MONOTONIC) - $from > 10;
    printf "%s %.1f\n", $what, (clock_gettime(CLOCK_MONOTONIC) - $from) * 1e3;
}
sub device { my $dev = `losetup -f --show raw`; chomp $dev; $dev =~ /loop\d+$/ or die "no device: '$dev'"; $dev }
sub held { my ($what, $pause) = @_;
    sleep 2; my $dev = device(); open(my $file, "<", $dev) or die "$dev: $!";
    system("losetup", "-d", $dev) == 0 or die "losetup -d"; sleep $pause;
    lag($what, $dev =~ s/.*\///r, sub { close $file });
}
my $mnt = "mnt";
for (1..5) {
    system(qw(mount -o loop fs mnt)) == 0 or die "mount"; sleep 2;
    lag("umount", "loop0", sub { syscall(166, $mnt, 0) == 0 or die "umount2: $!" });
    held("close", 0); held("late", 5);
}
"#;

/// The last close unbinds: after an unmount, right after LOOP_CLR_FD, and long after it.
fn last_close(ctx: &Ctx) -> Res {
    // Keep another disk: the removal of a machine's last disk also frees data of the block layer
    // that all disks share, which doubles the kernel's time.
    let _disk = Disk::new(&Shape { size_mib: 1, ..Shape::default() })?;
    let daemon = Daemon::start(ctx)?;
    std::fs::write(ctx.path("last_close.pl"), LAST_CLOSE)?;
    let script = "image raw 1M; truncate -s 8M fs; mkfs.ext2 -q fs; mkdir mnt; said=$(perl last_close.pl 2>&1) || wrong \"$said\"; echo \"$said\"";
    // The kernel mounts: a FUSE driver closes the device when its writeback ends, some time after
    // the unmount.
    let said = Inside::new(ctx, &daemon).with(&["--mount", "ext2"]).run(script)?;
    let max = if counted() { CLOSED_MAX } else { CLOSED_NOISE_MAX }.as_millis();
    let mut late = Vec::new();
    for what in ["umount", "close", "late"] {
        let lines = said.lines().filter_map(|line| line.strip_prefix(what)?.trim().parse().ok());
        let lags: Vec<f64> = lines.collect();
        ensure!(lags.len() == 5, "{} lines of {what}: {said}", lags.len());
        let most = lags.iter().copied().fold(0.0, f64::max);
        ctx.note(format!("{what}: unbound after {:.1} ms, at most {most:.1} ms", median(lags)));
        if most > max as f64 {
            late.push(format!("{what}: {most} ms"));
        }
    }
    ensure!(late.is_empty(), "{}; at most {max} ms are allowed", late.join(", "));
    daemon.stop()
}

/// Whether this machine counts instructions.
fn counted() -> bool {
    std::env::var("LAB_MODE").is_ok_and(|mode| mode == "icount")
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}
