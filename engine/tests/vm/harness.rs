// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A case: name, deadline, body; and the watchdog that ends it.
//!
//! Knows how to run and skip cases, and how to report failures. Knows nothing of what a case tests.
//! A body runs on a thread of its own: after its deadline, the watchdog prints the state of the
//! machine, kills the case's processes, and fails the case.

use std::fmt::Display;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use libtest_mimic::{Completion, Failed, Trial};

use crate::{disk, host, tools};

/// Why a case ended early.
#[derive(Clone, Debug)]
pub(crate) enum Stop {
    /// It failed.
    Fail(String),
    /// It cannot run here.
    Skip(String),
}

/// Result of a case and of its steps.
pub(crate) type Res<T = ()> = Result<T, Stop>;

impl<E: Display> From<E> for Stop {
    fn from(error: E) -> Self {
        Stop::Fail(error.to_string())
    }
}

/// Adds the failed operation to an error.
pub(crate) trait At<T> {
    /// Prefixes the error with `what`.
    fn at(self, what: impl Display) -> Res<T>;
}

impl<T, E: Into<Stop>> At<T> for Result<T, E> {
    fn at(self, what: impl Display) -> Res<T> {
        self.map_err(|error| match error.into() {
            Stop::Fail(text) => Stop::Fail(format!("{what}: {text}")),
            skip => skip,
        })
    }
}

/// Fails the case with a formatted message.
macro_rules! fail {
    ($($arg:tt)*) => { return Err($crate::harness::Stop::Fail(format!($($arg)*))) };
}

/// Fails the case with a formatted message unless the condition holds.
macro_rules! ensure {
    ($cond:expr, $($arg:tt)*) => { if !$cond { $crate::harness::fail!($($arg)*) } };
}

/// Skips the case with a formatted reason.
macro_rules! skip {
    ($($arg:tt)*) => { return Err($crate::harness::Stop::Skip(format!($($arg)*))) };
}
pub(crate) use {ensure, fail, skip};

/// What a case needs of the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Needs {
    /// ublk, nothing more.
    Ublk,
    /// This I/O mode.
    IoMode(&'static str),
    /// Devices that can be resized.
    Resize,
    /// Devices that outlive their daemon, in this I/O mode.
    Recovery(&'static str),
    /// Pools of private loop devices.
    Private,
}

/// The environment of a running case.
pub(crate) struct Ctx {
    /// The case's name.
    pub(crate) name: String,
    /// A directory of its own, on a memory file system.
    pub(crate) dir: PathBuf,
    /// The features of the machine.
    pub(crate) host: &'static host::Host,
}

impl Ctx {
    /// A path in the case's directory, as text.
    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// Prints a remark that belongs to the case's result.
    pub(crate) fn note(&self, text: impl Display) {
        eprintln!("  {}: {text}", self.name);
    }
}

type Body = Box<dyn FnOnce(&Ctx) -> Res + Send>;

/// One test.
pub(crate) struct Case {
    name: String,
    needs: Needs,
    deadline: Duration,
    variant: bool,
    body: Body,
}

/// A case that may take `seconds` on the slow CPU of an emulated machine.
pub(crate) fn case(
    name: impl Into<String>,
    needs: Needs,
    seconds: u64,
    body: impl FnOnce(&Ctx) -> Res + Send + 'static,
) -> Case {
    let deadline = Duration::from_secs(seconds);
    Case { name: name.into(), needs, deadline, variant: false, body: Box::new(body) }
}

/// Time for the body to clean up once its processes are killed.
const GRACE: Duration = Duration::from_secs(45);
/// Set when a case could not be ended: later cases would only repeat its failure, slowly.
static WEDGED: OnceLock<String> = OnceLock::new();
/// Set while the watchdog ends a case: only cleanup may start processes.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Whether the running case is past its deadline.
pub(crate) fn ending() -> bool {
    ENDING.load(Ordering::Relaxed)
}

impl Case {
    /// `theme::case`.
    #[allow(dead_code)]
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Makes the case a variant, if `when`: others test the same with other I/O modes, file systems
    /// or kernels. Only full runs include variants.
    pub(crate) fn variant_if(self, when: bool) -> Case {
        Case { variant: when, ..self }
    }

    /// Skips the case outside the lab's VM, which has what it needs.
    #[allow(dead_code)]
    pub(crate) fn in_vm(self, why: &'static str) -> Case {
        match host::is_virtual() {
            true => self,
            false => Case { body: Box::new(move |_| skip!("{why}; the lab's VM has it")), ..self },
        }
    }

    /// The case as a trial of libtest-mimic.
    pub(crate) fn into_trial(self) -> Trial {
        Trial::ignorable_test(self.name.clone(), move || self.run())
    }

    fn run(self) -> Result<Completion, Failed> {
        if let Some(culprit) = WEDGED.get() {
            return Err(format!("not run: {culprit} could not be ended").into());
        }
        let started = Instant::now();
        let name = self.name.clone();
        let result = self.supervise();
        match result {
            Ok(()) => {
                eprintln!("  {name}: {:.1} s", started.elapsed().as_secs_f64());
                Ok(Completion::Completed)
            }
            Err(Stop::Skip(why)) => {
                eprintln!("skipped: {name}: {why}");
                Ok(Completion::ignored_with(why))
            }
            Err(Stop::Fail(what)) => {
                // Print it now: the run may not reach its end.
                eprintln!("  {name}: failed: {what}");
                Err(what.into())
            }
        }
    }

    fn supervise(self) -> Res {
        let host = host::Host::get()?;
        host.meets(self.needs)?;
        if self.variant && !host.full {
            skip!("a variant of others; --full runs it");
        }
        let dir = Path::new(host::SCRATCH).join(self.name.replace("::", "-"));
        std::fs::create_dir_all(&dir).at("scratch directory")?;
        let ctx = Ctx { name: self.name.clone(), dir: dir.clone(), host };
        let before = host::ublk_ids();
        host::mark_kernel_log(&self.name);

        let (sender, ended) = mpsc::channel();
        let body = self.body;
        std::thread::spawn(move || {
            let result = std::panic::catch_unwind(AssertUnwindSafe(|| body(&ctx)))
                .unwrap_or_else(|_| Err(Stop::Fail("panicked, see above".into())));
            // The receiver is dropped only when the whole run ends.
            let _ = sender.send(result);
        });
        let mut result = match ended.recv_timeout(self.deadline) {
            Ok(result) => result,
            Err(_) => end_overdue(&self.name, self.deadline, &ended),
        };

        if result.is_ok() {
            result = check_leftovers(&before, &self.name);
        }
        result = result.and(disk::check_ended_buffers());
        if let Err(Stop::Fail(_)) = &result {
            host::print_logs(&dir);
            host::print_kernel_log(&self.name, 40);
        }
        let _ = std::fs::remove_dir_all(&dir);
        result
    }
}

/// Ends a case after its deadline: prints the state of the machine, kills the case's processes, and
/// waits a little.
fn end_overdue(name: &str, deadline: Duration, ended: &mpsc::Receiver<Res>) -> Res {
    eprintln!("  {name}: deadline of {deadline:?} passed; state of the machine:");
    host::print_stuck();
    ENDING.store(true, Ordering::Relaxed);
    tools::kill_all();
    let text = match ended.recv_timeout(GRACE) {
        Ok(Err(Stop::Fail(text))) => format!("; it ended with: {text}"),
        Ok(_) => String::new(),
        Err(_) => {
            let _ = WEDGED.set(name.to_string());
            "; and it could not be ended".into()
        }
    };
    ENDING.store(false, Ordering::Relaxed);
    Err(Stop::Fail(format!("deadline of {deadline:?} passed{text}")))
}

/// Fails a passed case that has left devices or kernel warnings.
fn check_leftovers(before: &[u32], name: &str) -> Res {
    let left: Vec<u32> = tools::until(Duration::from_secs(10), || {
        let left: Vec<u32> = host::ublk_ids();
        left.iter().all(|id| before.contains(id)).then_some(vec![])
    })
    .unwrap_or_else(host::ublk_ids);
    ensure!(left.is_empty(), "left ublk devices behind: {left:?}");
    let complaints = host::kernel_complaints(name);
    ensure!(complaints.is_empty(), "the kernel complained: {}", complaints.join(" | "));
    Ok(())
}
