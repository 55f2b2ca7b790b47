// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hostile tenant and its neighbour: rewritten arguments, signal storms, SIGKILL during calls.
//! The daemon and the neighbour keep working, and nothing is left over.
//!
//! The attacks are in `driver`.

use std::process::Command;
use std::time::Duration;

use super::private_script::Inside;
use crate::daemon::{Daemon, Footprint};
use crate::driver;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, fail};
use crate::tools::{self, Running};

pub(super) fn cases() -> Vec<Case> {
    vec![case("private::hostile", Needs::Private, 900, hostile)]
}

/// Until a client has finished its calls.
const CLIENT: Duration = Duration::from_secs(600);
/// Until nothing is left of an ended client.
const GONE: Duration = Duration::from_secs(30);
/// Clients that are killed during calls.
const KILLED: u64 = 8;

fn hostile(ctx: &Ctx) -> Res {
    let calls = if ctx.host.full { 100_000 } else { 4_000 };
    let client = ctx.path("client");
    std::fs::copy(std::env::current_exe()?, &client).at("copy this program")?;
    let mut daemon = Daemon::start(ctx)?;
    let neighbour = Inside::new(ctx, &daemon).start(
        r#"
        image a 1M alpha; losetup /dev/loop0 a; cp a a.was
        pause ready
        same "bound as before" "$(bound)" "/dev/loop0 $PWD/a"
        works "the same bytes" cmp /dev/loop0 a.was
        printf ALPHA | dd of=/dev/loop0 conv=notrunc,fsync 2>/dev/null
        same "written" "$(head_of a)" ALPHA
        works "-d" losetup -d /dev/loop0; soon "unbound" "" losetup -a
        "#,
    )?;
    let neighbour = neighbour.wait("ready")?;
    let before = held(&daemon)?;

    let done = start(ctx, &daemon, &client, calls)?.finish(CLIENT)?.ok()?;
    ctx.note(format!("{calls} calls: {}", done.out.trim_end()));
    nothing_left(&daemon, &before).at("after all calls")?;
    for round in 0..KILLED {
        let running = start(ctx, &daemon, &client, u64::MAX)?;
        let started = ctx.dir.join("harm/started");
        if tools::until(Duration::from_secs(60), || started.exists().then_some(())).is_none() {
            fail!("the client did not start");
        }
        std::thread::sleep(Duration::from_millis(37 * round * round));
        // With SIGKILL, to its whole process group.
        drop(running);
        nothing_left(&daemon, &before).at(format!("after kill {round}"))?;
    }
    daemon.check_alive()?;
    neighbour.resume("ready")?;
    neighbour.finish()?;
    let log = daemon.log();
    ensure!(
        !log.contains("bug:") && !log.contains("panicked"),
        "the daemon's log: {}",
        tools::tail(&log, 10)
    );
    daemon.stop()
}

/// Starts a client that makes this number of calls.
fn start(ctx: &Ctx, daemon: &Daemon, client: &str, calls: u64) -> Res<Running> {
    let dir = ctx.dir.join("harm");
    // Left by the previous client.
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir(&dir)?;
    let mut command: Command = daemon.command_of(&ctx.host.program);
    // With a mounter, so that mount(2) is intercepted too; its FUSE driver never starts.
    command.args(["run", "--max", "6", "--fuse", "ext4=fuse2fs", "--", client, driver::ROLE]);
    command.arg(calls.to_string()).current_dir(&dir);
    Running::start(command)
}

type Held = (Vec<u32>, Footprint);

fn held(daemon: &Daemon) -> Res<Held> {
    Ok((daemon.ublk_ids(), daemon.footprint()?))
}

fn nothing_left(daemon: &Daemon, before: &Held) -> Res {
    let same = tools::until(GONE, || held(daemon).ok().filter(|now| now == before));
    match same {
        Some(_) => Ok(()),
        None => fail!("left over: {:?}, before: {before:?}", held(daemon)?),
    }
}
