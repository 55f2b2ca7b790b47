// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A campaign: a daemon, well-behaved clients, rounds of hostile clients, and the verdict.
//!
//! Knows the order of steps and the conditions, not what a client does.

use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use rustix::process::{Signal, kill_process};

use loopbench::daemon::Daemon;
use loopbench::sh;

use super::guest;
use super::health::{Footprint, kernel_warnings};
use super::honest::{Who, stop_file};
use super::host::DAEMON;
use super::kinds::{Kind, Place};
use super::ledger::Ledger;
use super::{plan, tenants};
use crate::vm;

/// User ids of hostile clients.
const HOSTILE: Range<u32> = 2000..2100;
/// Attempts to kill remaining processes: they may start others, or wait for a file system.
const GONE_AFTER: u32 = 40;
/// Time for the well-behaved clients alone, before the daemon's resources are measured.
const WARM_UP: Duration = Duration::from_secs(10);
/// Time for the daemon to free resources of clients that have ended.
const SETTLED: Duration = Duration::from_secs(60);
/// Time from SIGTERM to the daemon's end: tenants have five seconds, caches ten, each worker five.
const STOPPED: Duration = Duration::from_secs(45);
/// A call that is still pending this long after the hostile clients have ended is abandoned.
const FROZEN: Duration = Duration::from_secs(20);
const LIMIT: Duration = Duration::from_secs(30);

/// The ledger, which all threads write to.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Ledger>>);

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs the campaign; returns whether all conditions held.
pub(super) fn run(seed: u64, seconds: u64, only: Option<&str>) -> Result<bool> {
    let (rounds, length) = plan::rounds(seed, seconds, only);
    prepare()?;
    let config = guest::config().to_string_lossy().into_owned();
    let daemon = Daemon::start_with(&guest::run_dir(), &["--config", &config])?;
    let shared = Shared::default();
    let ledger = || shared.ledger();

    measure_machine(&shared);
    ledger().round("alone".into());
    let honest = Honest::start(&shared)?;
    sh::pause(WARM_UP)?;
    honest.stop(&shared)?;
    let before = settle(daemon.pid(), |_| true)?.0;
    println!("alone: {before}\n{}", ledger().report());

    let honest = Honest::start(&shared)?;
    let mut most = before;
    let mut frozen = false;
    for (number, round) in (1..).zip(&rounds) {
        let names: Vec<_> = round.0.iter().map(|(kind, _)| kind.name).collect();
        let name = format!("round {number} of {}: {}", rounds.len(), names.join(", "));
        println!("{name}");
        ledger().round(name);
        let hostile = Hostile::start(&round.0, &daemon, &shared)?;
        most = most.max(watch(&daemon, length)?);
        hostile.end();
        // Hung file systems are released; the next round starts once the daemon answers.
        let start = Instant::now();
        while !frozen && ledger().longest_wait().is_some_and(|(_, time)| time > super::ledger::CALL) {
            frozen = start.elapsed() > FROZEN;
            sh::pause(Duration::from_millis(100))?;
        }
        if frozen || Footprint::of(daemon.pid()).is_err() {
            let ended = Footprint::of(daemon.pid()).is_err();
            let what = if ended {
                "the daemon ended"
            } else {
                "the daemon does not answer after the end of these clients"
            };
            ledger().finding(what.into());
            break;
        }
    }
    if !most.bounded() {
        ledger().finding(format!("the daemon exceeded its bounds: {most}"));
    }
    ledger().round("after all rounds".into());
    honest.stop(&shared)?;
    if !frozen {
        let (after, back) = settle(daemon.pid(), |now| now.is_back_to(before))?;
        println!("maximum:     {most}\nafterwards:  {after}");
        if !back {
            ledger().finding(format!("the daemon had {before} before and has {after} afterwards"));
        }
    }
    end(daemon, rounds.last().map_or(&[], |round| &round.0), &shared)?;
    for warning in kernel_warnings()? {
        ledger().finding(format!("the kernel's log: {warning}"));
    }
    let ledger = ledger();
    println!("{}", ledger.report());
    let verdict = match (ledger.failures(), ledger.undecided()) {
        (0, 0) => "all conditions held".to_owned(),
        (0, late) => {
            format!("all conditions held; {late} late calls do not count: starting /bin/true was slow, too")
        }
        _ => "FAILED".to_owned(),
    };
    println!("hostile: seed {seed}: {verdict}");
    Ok(ledger.failures() == 0)
}

/// Makes a memory file system with a home per user, and lets the kernel report hung tasks early.
fn prepare() -> Result<()> {
    std::fs::create_dir_all(guest::BASE)?;
    let mount = ["-t", "tmpfs", "-o", "size=1G,mode=755", "hostile", guest::BASE];
    sh::capture(Command::new("mount").args(mount), LIMIT)?;
    std::fs::create_dir(Path::new(guest::BASE).join("users"))?;
    for uid in [Who::Root, Who::Tenant, Who::Caller].map(Who::uid).into_iter().chain(HOSTILE) {
        let home = guest::home(uid);
        std::fs::create_dir(&home)?;
        std::fs::set_permissions(&home, Permissions::from_mode(0o700))?;
        chown(&home, Some(uid), Some(uid))?;
    }
    std::fs::write(guest::config(), "[default]\nmax_devices = 16\n")?;
    // Kernels without these settings do not need them.
    let _ = std::fs::write("/proc/sys/kernel/hung_task_timeout_secs", "30");
    let _ = sh::capture(Command::new("ip").args(["link", "set", "lo", "up"]), LIMIT);
    let _ = sh::capture(Command::new("dmesg").arg("-C"), LIMIT);
    Ok(())
}

/// Records from now on how long starting a trivial program takes: if that is slow, a late call may
/// be the machine's fault.
fn measure_machine(shared: &Shared) {
    let shared = shared.clone();
    std::thread::spawn(move || {
        loop {
            let start = Instant::now();
            let _ = Command::new("true").status();
            shared.ledger().machine(start.elapsed());
            std::thread::sleep(Duration::from_millis(500));
        }
    });
}

/// Peak resources of the daemon over a time; it may have ended.
fn watch(daemon: &Daemon, time: Duration) -> Result<Footprint> {
    let (start, mut most) = (Instant::now(), Footprint::default());
    while start.elapsed() < time {
        most = most.max(Footprint::of(daemon.pid()).unwrap_or_default());
        sh::pause(Duration::from_millis(200))?;
    }
    Ok(most)
}

/// The daemon's resources once `enough` accepts them and they are stable for two seconds, or at the
/// time limit; and whether that was in time.
fn settle(pid: u32, enough: impl Fn(&Footprint) -> bool) -> Result<(Footprint, bool)> {
    let start = Instant::now();
    let mut last = Footprint::of(pid)?;
    loop {
        sh::pause(Duration::from_secs(2))?;
        let now = Footprint::of(pid)?;
        if enough(&now) && now == last {
            return Ok((now, true));
        }
        if start.elapsed() > SETTLED {
            return Ok((now, enough(&now)));
        }
        last = now;
    }
}

/// Sends SIGTERM while hostile clients of the last round run again.
fn end(daemon: Daemon, kinds: &[(&'static Kind, u64)], shared: &Shared) -> Result<()> {
    shared.ledger().round("SIGTERM".into());
    let hostile = Hostile::start(kinds, &daemon, shared)?;
    sh::pause(Duration::from_secs(3))?;
    let start = Instant::now();
    let stopper = std::thread::spawn(move || daemon.stop());
    let in_time = sh::wait_for("the daemon's end", STOPPED, || Ok(stopper.is_finished().then_some(())));
    if let Err(error) = in_time {
        shared.ledger().finding(format!("{error:#}"));
    }
    hostile.end();
    match stopper.join() {
        Ok(Ok(())) => println!("SIGTERM: ended after {:.1} s", start.elapsed().as_secs_f32()),
        Ok(Err(error)) => shared.ledger().finding(format!("SIGTERM: {error:#}")),
        Err(_) => shared.ledger().finding("SIGTERM: the thread that sent it panicked".into()),
    }
    Ok(())
}

/// The well-behaved clients.
struct Honest(Vec<(Who, JoinHandle<Result<()>>)>);

impl Honest {
    fn start(shared: &Shared) -> Result<Honest> {
        // The file may not exist.
        let _ = std::fs::remove_file(stop_file());
        let start = |who: &Who| {
            let (who, shared) = (*who, shared.clone());
            (who, std::thread::spawn(move || play(who, &shared)))
        };
        Ok(Honest(Who::value_variants().iter().map(start).collect()))
    }

    /// Tells them to stop and waits; clients with a pending call are left behind.
    fn stop(self, shared: &Shared) -> Result<()> {
        File::create(stop_file())?;
        let start = Instant::now();
        while start.elapsed() < LIMIT && !self.0.iter().all(|(_, thread)| thread.is_finished()) {
            sh::pause(Duration::from_millis(50))?;
        }
        for (who, thread) in self.0 {
            if !thread.is_finished() {
                shared.ledger().ended(who.name());
                continue;
            }
            let outcome = thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            outcome.with_context(|| who.name())?;
        }
        Ok(())
    }
}

/// Runs a client, a tenant repeatedly, and records its output.
fn play(who: Who, shared: &Shared) -> Result<()> {
    while !stop_file().exists() {
        let mut command = Command::new(if who == Who::Tenant { "loopengine" } else { "lab" });
        if who == Who::Tenant {
            command.args(["run", "--max", "2", "--", "lab"]).env("LOOPENGINE_RUN_DIR", guest::run_dir());
            shared.ledger().line(who.name(), "~ loopengine run");
        }
        let start = Instant::now();
        let mut waits = who == Who::Tenant;
        command.args(["hostile-guest", "honest", who.name()]).current_dir(guest::home(who.uid()));
        command.uid(who.uid()).gid(who.uid()).stdin(Stdio::null());
        let log = File::options().create(true).append(true).open(log_of(who.name()))?;
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn()?;
        for line in BufReader::new(child.stdout.take().context("no output")?).lines() {
            if std::mem::take(&mut waits) {
                shared.ledger().line(who.name(), &format!("< {}", start.elapsed().as_micros()));
            }
            shared.ledger().line(who.name(), &line?);
        }
        let status = child.wait()?;
        // Told to stop while it started: it ran, and had nothing to say.
        if waits && status.success() {
            shared.ledger().line(who.name(), &format!("< {}", start.elapsed().as_micros()));
        }
        shared.ledger().ended(who.name());
        if !status.success() {
            let said = sh::last_line(Path::new(&log_of(who.name())));
            shared.ledger().finding(format!("{}: {status}: {said}", who.name()));
            std::thread::sleep(Duration::from_secs(1));
        }
    }
    Ok(())
}

fn log_of(name: &str) -> String {
    format!("{}/{name}.log", guest::BASE)
}

/// The hostile clients of a round; dropping them kills them.
struct Hostile(Vec<Child>);

impl Hostile {
    fn start(kinds: &[(&'static Kind, u64)], daemon: &Daemon, shared: &Shared) -> Result<Hostile> {
        let mut clients = Hostile(Vec::new());
        let mut uid = HOSTILE.start;
        for (kind, seed) in kinds {
            for number in 0..kind.users {
                let client = start_client(kind, seed.wrapping_add(u64::from(number)), uid, daemon, shared);
                clients.0.push(client.with_context(|| format!("cannot start {}", kind.name))?);
                uid += 1;
            }
        }
        Ok(clients)
    }

    fn end(self) {}
}

impl Drop for Hostile {
    fn drop(&mut self) {
        // All at once: a client may wait for another.
        for client in &mut self.0 {
            tenants::signal(client, Signal::KILL);
        }
        self.0.iter_mut().for_each(vm::kill);
        // Tenants with their own process groups have survived.
        for _ in 0..GONE_AFTER {
            let left = tenants::processes(|uid| HOSTILE.contains(&uid));
            if left.is_empty() {
                return;
            }
            for pid in left {
                let _ = kill_process(pid, Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Starts a client of `kind` that leads a process group. It has a low CPU priority: the campaign
/// tests the daemon, not the sharing of two CPUs.
fn start_client(kind: &Kind, seed: u64, uid: u32, daemon: &Daemon, shared: &Shared) -> Result<Child> {
    let place: &[&str] = match kind.place {
        Place::Plain => &[],
        Place::Namespace => &["unshare", "--user", "--map-root-user", "--mount"],
        Place::Run => &["loopengine", "run", "--max", "12", "--"],
        Place::Root => &["unshare", "--mount"],
    };
    let mut command = Command::new("nice");
    command.args(["-n", "19"]).args(place).args(["lab", "hostile-guest", "client", kind.name]);
    command.args(["--seed", &seed.to_string(), "--uid", &uid.to_string()]);
    command.env("LOOPENGINE_RUN_DIR", guest::run_dir()).env(DAEMON, daemon.pid().to_string());
    if kind.place != Place::Root {
        command.uid(uid).gid(uid);
    }
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    ensure!(child.stdout.is_some() && child.stderr.is_some(), "no output");
    let name = format!("{} {uid}", kind.name);
    listen(child.stdout.take(), name.clone(), shared);
    listen(child.stderr.take(), name, shared);
    Ok(child)
}

/// Records the output of a hostile client.
fn listen(pipe: Option<impl std::io::Read + Send + 'static>, name: String, shared: &Shared) {
    let shared = shared.clone();
    std::thread::spawn(move || {
        for line in pipe.into_iter().flat_map(|pipe| BufReader::new(pipe).lines()).map_while(Result::ok) {
            shared.ledger().action(&name, &line);
        }
    });
}
