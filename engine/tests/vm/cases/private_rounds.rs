// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One device bound again and again, and many bound at once.
//!
//! Test suites do this. The kernel's driver never fails a round, and neither may a pool. The rounds
//! are in `driver`.

use std::process::Command;
use std::time::Duration;

use super::private_driver::Driver;
use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::driver::{self, rounds::WORD};
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::tools::{self, Running};

pub(super) fn cases() -> Vec<Case> {
    let rounds = |name: &str, plan: Plan| {
        case(format!("private::rounds::{name}"), Needs::Private, FULL_SECS + 200, move |ctx| {
            rounds(ctx, plan)
        })
    };
    let usual = Plan { threads: 1, pace_ms: 0, late_ms: 0, how: "configure", busy_loops: 0, everyday: 100 };
    vec![
        rounds("configure", usual),
        rounds("set_fd", Plan { how: "set", ..usual }),
        rounds("under_load", Plan { busy_loops: 4, ..usual }),
        rounds("eight_devices", Plan { threads: 8, ..usual }),
        rounds("paced", Plan { pace_ms: 50, ..usual }),
        // Like a client that is not scheduled for a while: devices bound again meanwhile do not
        // disturb it.
        rounds("late_close", Plan { late_ms: 1300, everyday: 5, ..usual }),
        case("private::rounds::losetup", Needs::Private, 600, of_losetup),
        case("private::rounds::concurrent_binds", Needs::Private, 600, at_once),
    ]
}

#[derive(Clone, Copy)]
struct Plan {
    threads: u64,
    pace_ms: u64,
    late_ms: u64,
    how: &'static str,
    /// Concurrent busy loops with low priority.
    busy_loops: usize,
    /// Rounds of an everyday run, and on the kernel's driver, which must not fail any either.
    everyday: u64,
}

/// Factor for the number of rounds with `--full`.
const FULL: u64 = 100;
/// Deadlines for all rounds, also on a busy host.
const EVERYDAY_SECS: u64 = 200;
const FULL_SECS: u64 = 6000;

fn rounds(ctx: &Ctx, plan: Plan) -> Res {
    let client = ctx.path("client");
    std::fs::copy(std::env::current_exe()?, &client).at("copy this program")?;
    // If the kernel's driver can be loaded.
    if let Ok(driver) = Driver::load() {
        let kernel = client_of(ctx, Command::new(&client), plan, plan.everyday, EVERYDAY_SECS)?;
        driver.unload()?;
        ensure!(kernel.1.is_empty(), "the kernel's driver: {}", kernel.1);
    }
    let daemon = Daemon::start(ctx)?;
    let mut command = daemon.command_of(&ctx.host.program);
    command.args(["run", "--max", "32", "--", &client]);
    let (count, secs) = match ctx.host.full {
        true => (FULL * plan.everyday, FULL_SECS),
        false => (plan.everyday, EVERYDAY_SECS),
    };
    let busy_loops: Vec<Running> = (0..plan.busy_loops)
        .map(|_| {
            let mut busy = Command::new("nice");
            busy.args(["-n", "19", "sh", "-c", "while :; do :; done"]);
            Running::start(busy)
        })
        .collect::<Res<_>>()?;
    let (done, misses) = client_of(ctx, command, plan, count, secs)?;
    drop(busy_loops);
    ctx.note(format!("{done} rounds"));
    ensure!(misses.is_empty(), "of {done} rounds: {misses}");
    ensure!(done >= count - plan.threads, "only {done} of {count} rounds in {secs} s");
    daemon.stop()
}

/// Runs the client; returns the number of its rounds, and those that failed.
fn client_of(ctx: &Ctx, mut command: Command, plan: Plan, count: u64, secs: u64) -> Res<(u64, String)> {
    let Plan { threads, pace_ms, late_ms, how, .. } = plan;
    let each = count / threads;
    let what = format!("{WORD},{threads},{each},{secs},{pace_ms},{late_ms},{how}");
    command.args([driver::ROLE, &what]).current_dir(&ctx.dir);
    let out = Running::start(command)?.finish(Duration::from_secs(secs + 60))?.ok()?.out;
    let done = out.lines().find_map(|line| line.strip_prefix("rounds: ")?.parse().ok());
    let misses: Vec<_> = out.lines().filter(|line| line.starts_with("miss: ")).collect();
    Ok((done.ok_or("the client did not end its rounds")?, misses.join("; ")))
}

/// `losetup -f --show` and `losetup -d` in a row, as scripts do.
fn of_losetup(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let rounds = if ctx.host.full { 500 } else { 50 };
    let script = r#"
        image a 1M alpha; image b 1M beta
        for ((i = 0; i < ROUNDS; i++)); do
            [ $((i % 2)) = 0 ] && file=a text=alpha || file=b text=beta
            dev=$(losetup -f --show $file 2>&1) || { wrong "round $i: $dev"; break; }
            same "round $i, device" "$dev" /dev/loop0
            same "round $i, bytes" "$(head_of $dev)" $text
            works "round $i, -d" losetup -d $dev
            [ $bad = 0 ] || break
        done
        same "all are unbound" "$(losetup -a)" ""
        "#;
    let script = script.replace("ROUNDS", &rounds.to_string());
    Inside::new(ctx, &daemon).run_for(Duration::from_secs(400), &script)?;
    daemon.stop()
}

/// Many concurrent `losetup -f --show`, as on a build farm: each gets a device.
fn at_once(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let script = r#"
        for i in {1..24}; do image f$i 1M "file $i"; done
        for round in ROUNDS; do
            for i in {1..24}; do
                { losetup -f --show f$i > out$i 2> err$i || echo "$i: $(cat err$i)" >> failed; } &
            done
            wait
            same "round $round, failed" "$(cat failed 2>/dev/null)" ""
            same "round $round, devices" "$(cat out* | sort -u | wc -l)" 24
            for i in {1..24}; do same "round $round, bytes of $i" "$(head_of "$(cat out$i)")" "file $i"; done
            losetup -D
            soon "round $round, unbound" "" losetup -a
            # The second round creates all devices again.
            [ $round = 1 ] && for i in {0..23}; do rm /dev/loopfs/loop$i; done
            rm -f failed
        done
        "#;
    let script = script.replace("ROUNDS", if ctx.host.full { "1 2 3 4 5" } else { "1 2" });
    tools::ok(&["chown", "-R", "1000:1000", &ctx.dir.display().to_string()])?;
    let root = Inside::new(ctx, &daemon).with(&["--max", "32"]);
    root.run_for(Duration::from_secs(250), &script)?;
    tools::sh(format!("cd {}; rm -f f* out* err* failed", ctx.dir.display()))?;
    let user = Inside::new(ctx, &daemon).user(1000).with(&["--max", "32"]);
    user.run_for(Duration::from_secs(250), &script)?;
    daemon.stop()
}
