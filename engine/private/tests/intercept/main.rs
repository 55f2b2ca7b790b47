// SPDX-License-Identifier: Apache-2.0 OR MIT
//! ioctls of clients with the real filter and the real supervisor, on a fake pool. Needs root and
//! seccomp notifications, but neither ublk nor mounts.
//!
//! A client is this program again (`client ROLE`): it installs the filter, sends the listener and
//! checks the results of its calls.

mod bed;
mod client;
mod fake;
mod names;
mod raw;

use std::process::ExitCode;
use std::time::Duration;

use bed::Bed;
use libtest_mimic::{Failed, Trial};
use loopengine_private::intercept::{
    Administrators, CALLS_AT_ONCE, Namespace, Supervisor, SupervisorOptions,
};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    if let [_, client, role] = &words[..]
        && client == "client"
    {
        client::run(role);
        return ExitCode::SUCCESS;
    }
    let args = libtest_mimic::Arguments::from_args();
    let mut trials = vec![];
    for role in [
        "names", "values", "i386", "nobody", "others", "nodes", "rewriter", "swapper", "replaced", "threads",
        "cost",
    ] {
        trials.push(case(role, move || _ = Bed::new(role).finish()));
    }
    trials.extend([
        case("devtmpfs_reaches_the_handler", devtmpfs),
        case("signals", signals),
        case("killed", killed),
        case("killed_before_it_was_received", killed_before_it_was_received),
        case("overdue", overdue),
        case("panics", panics),
        case("children", children),
        case("stopped", stopped),
        case("crowd", crowd),
        case("one_listener_does_not_wait_for_another", others_do_not_wait),
        case("no_listener", no_listener),
    ]);
    libtest_mimic::run(&args, trials).exit_code()
}

fn case(name: &str, body: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return Ok(());
        }
        body();
        Ok::<(), Failed>(())
    })
}

fn devtmpfs() {
    let mut bed = Bed::new("devtmpfs");
    bed.finish();
    let log = bed.fake.log.lock().unwrap().clone();
    assert_eq!(log, ["mount of devtmpfs with 1: udev", "mount of devtmpfs with 0: devtmpfs"]);
}

/// No call is served twice, and none is lost.
fn signals() {
    let mut bed = Bed::new("signals");
    bed.finish();
    assert_eq!(bed.fake.count("capacity set"), 20_000);
    assert_eq!(bed.fake.count("nobody waits"), 0);
}

/// An operation detects that its caller is gone. The supervisor notices the end while it still
/// hangs.
fn killed() {
    for _ in 0..20 {
        let mut bed = Bed::shut("blocked", Duration::from_secs(30));
        bed.fake.wait_for("asked for capacity", 1);
        bed.client.kill().unwrap();
        bed.client.wait().unwrap();
        bed.ended.recv_timeout(Duration::from_secs(10)).expect("the end was noticed");
        bed.fake.shut(false);
        assert!(bed.stop(Duration::from_secs(10)));
        assert_eq!((bed.fake.count("nobody waits"), bed.fake.count("capacity set")), (1, 0));
    }
}

/// At any moment, also before the call is received.
fn killed_before_it_was_received() {
    for round in 0..100_u64 {
        let mut bed = Bed::new("signals");
        std::thread::sleep(Duration::from_micros(round * 37));
        bed.client.kill().unwrap();
        bed.client.wait().unwrap();
        bed.ended.recv_timeout(Duration::from_secs(10)).expect("the end was noticed");
        assert!(bed.stop(Duration::from_secs(10)));
    }
}

fn overdue() {
    let mut bed = Bed::shut("overdue", Duration::from_millis(300));
    bed.fake.wait_for("clear", 1);
    bed.fake.shut(false);
    let counts = bed.finish();
    assert_eq!(bed.fake.count("nobody waits"), 1);
    assert_eq!((counts.calls, counts.overdue, counts.failed), (2, 1, 2));
}

fn panics() {
    let mut bed = Bed::new("panic");
    let counts = bed.finish();
    assert_eq!((counts.calls, counts.panicked, counts.failed), (20, 10, 10));
}

fn children() {
    let mut bed = Bed::new("children");
    let status = bed.client.wait().unwrap();
    assert!(status.success());
    assert!(bed.ended.try_recv().is_err(), "one is left");
    bed.ended.recv_timeout(Duration::from_secs(10)).expect("the end was noticed");
    assert_eq!(bed.fake.count("clear"), 1);
}

fn stopped() {
    let mut bed = Bed::new("stopped");
    bed.fake.wait_for("capacity set", 1);
    assert!(bed.stop(Duration::from_secs(10)));
    assert!(bed.wait().success());
    assert!(bed.ended.recv().is_err(), "nobody is told after a stop");
}

/// Serves at most as many concurrent calls as allowed, and all in the end.
fn crowd() {
    let mut bed = Bed::shut("crowd", Duration::from_secs(30));
    bed.fake.wait_for("asked for capacity", CALLS_AT_ONCE);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(bed.fake.count("asked for capacity"), CALLS_AT_ONCE);
    bed.fake.shut(false);
    bed.finish();
    assert_eq!(bed.fake.count("capacity set"), 32 * 50);
}

/// All threads of one supervisor serve calls that hang.
fn others_do_not_wait() {
    let hung = Bed::shut("crowd", Duration::from_secs(30));
    hung.fake.wait_for("asked for capacity", CALLS_AT_ONCE);
    let mut other = Bed::new("values");
    other.finish();
}

fn no_listener() {
    let (pipe, _end) = std::io::pipe().unwrap();
    let started = Supervisor::start(
        pipe.into(),
        fake::Pretend(std::sync::Arc::default()),
        SupervisorOptions {
            name: "none".to_owned(),
            is_control: Box::new(|_, _, _| false),
            administrators: Administrators::capable(Namespace::of(rustix::process::getpid()).unwrap()),
            device_limit: None,
            mounts: None,
            refuse_foreign_nodes: true,
            concurrency: CALLS_AT_ONCE,
            deadline: Duration::from_secs(1),
            on_end: Box::new(|| panic!("never began")),
        },
    );
    assert_eq!(started.map(drop).unwrap_err().kind(), loopengine_core::Kind::Invalid);
}
