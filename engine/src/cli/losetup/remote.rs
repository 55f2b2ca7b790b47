// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine losetup`: selects the pool, and accesses its devices through the socket of the
//! daemon.
//!
//! Knows the client of private pools, and where the caller sees pools mounted. The parent module
//! implements losetup itself.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::LoopDevices;
use crate::cli::daemon;
use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::loops::{Answer, DeviceEntry, Errno, LoopOp, LoopReply};
use crate::private::{LOOPFS, Operation, OperationRequest, OperationResult, PoolInfo};
use crate::sys::mntns::mounted;

/// Reconnect after this many calls, before the connection reaches the daemon's byte limit.
const CALLS_MAX: u32 = 64;

/// Maximum number of names in a message.
const NAMES_MAX: usize = 8;

/// Executes `args`. Returns the exit code.
pub(in crate::cli) fn run(args: super::LosetupArgs, run_dir: &Path) -> Result<u8> {
    let mut remote = Remote::open(args.pool(), run_dir)?;
    let done = super::run(args, &mut remote, &mut io::stdout().lock(), &mut io::stderr().lock());
    match remote.failure {
        Some(failure) => Err(failure),
        None => done.map_err(|error| Error::os(error, "cannot write to standard output")),
    }
}

/// The devices of a pool, accessed through the socket.
pub(in crate::cli) struct Remote {
    runtime: tokio::runtime::Runtime,
    run_dir: PathBuf,
    client: PrivateClient,
    /// Calls on this connection.
    calls: u32,
    pool: String,
    directory: String,
    /// The last failed call to the daemon.
    failure: Option<Error>,
}

impl Remote {
    pub(in crate::cli) fn open(pool: Option<&str>, run_dir: &Path) -> Result<Remote> {
        let runtime = daemon::runtime()?;
        let (client, pool) = runtime.block_on(async {
            let mut client = PrivateClient::connect(run_dir).await?;
            let pool = match pool {
                Some(pool) => pool.to_owned(),
                None => only(client.list().await?, rustix::process::geteuid().as_raw(), is_mounted)?,
            };
            // Fail on an unknown name before losetup prints anything.
            client.operate(&pool, &OperationRequest::of(Operation::List), None).await?;
            Ok::<_, Error>((client, pool))
        })?;
        let directory = directory(&pool);
        Ok(Remote { runtime, run_dir: run_dir.to_owned(), client, calls: 2, pool, directory, failure: None })
    }

    /// The failed call to the daemon, if that caused an error.
    pub(in crate::cli) fn failure(&mut self) -> Option<Error> {
        self.failure.take()
    }

    fn ask(&mut self, asked: &OperationRequest, file: Option<OwnedFd>) -> Answer<OperationResult> {
        let outcome = self.runtime.block_on(async {
            if self.calls >= CALLS_MAX {
                self.client = PrivateClient::connect(&self.run_dir).await?;
                self.calls = 0;
            }
            self.calls += 1;
            self.client.operate(&self.pool, asked, file).await
        });
        match outcome {
            Ok(outcome) => outcome.answer(),
            Err(error) => {
                self.failure = Some(error);
                Err(Errno::IO)
            }
        }
    }
}

impl LoopDevices for Remote {
    fn directory(&self) -> &str {
        &self.directory
    }

    fn entries(&mut self) -> Answer<Vec<DeviceEntry>> {
        self.ask(&OperationRequest::of(Operation::List), None)?.devices.ok_or(Errno::PROTO)
    }

    fn execute(&mut self, op: LoopOp) -> Answer<LoopReply> {
        let (asked, file) = OperationRequest::from_op(op)?;
        self.ask(&asked, file)?.try_into()
    }
}

/// The pool to use if none is named: the only one mounted in this namespace, or else the only one
/// of the caller. Root sees pools of others, and must not change them by mistake.
fn only(mut pools: Vec<PoolInfo>, uid: u32, is_mounted: impl Fn(&str) -> bool) -> Result<String> {
    pools.retain(|pool| !pool.ending);
    let (here, elsewhere): (Vec<_>, Vec<_>) = pools.into_iter().partition(|pool| is_mounted(&pool.name));
    let own = elsewhere.into_iter().filter(|pool| pool.uid == uid).collect();
    let meant: Vec<PoolInfo> = if here.is_empty() { own } else { here };
    match meant.as_slice() {
        [one] => Ok(one.name.clone()),
        [] => Err(Error::new(Kind::NotFound, "this user has no private pool").hint(match uid {
            0 => "create one with 'loopengine instance mount DIR', or give --pool NAME",
            _ => "start a command in one with 'loopengine run -- CMD'",
        })),
        several => {
            let names: Vec<&str> = several.iter().take(NAMES_MAX).map(|pool| pool.name.as_str()).collect();
            let more = if several.len() > NAMES_MAX { ", ..." } else { "" };
            let message = format!("there are {} private pools: {}{more}", several.len(), names.join(", "));
            Err(Error::new(Kind::Invalid, message)
                .hint("select one with --pool NAME or the environment variable LOOPENGINE_POOL"))
        }
    }
}

fn is_mounted(pool: &str) -> bool {
    !mounted("fuse.loop", pool).is_empty()
}

/// Where the caller sees the devices; the pool's name if it does not see them.
fn directory(pool: &str) -> String {
    let Some(at) = mounted("fuse.loop", pool).into_iter().find_map(|at| at.to_str().map(str::to_owned))
    else {
        return pool.to_owned();
    };
    // 'loopengine run' makes links in /dev.
    let links =
        || std::fs::read_link("/dev/loop-control").is_ok_and(|to| to.parent() == Some(Path::new(LOOPFS)));
    if at == format!("/dev/{LOOPFS}") && links() { "/dev".to_owned() } else { at }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(name: &str, uid: u32) -> PoolInfo {
        PoolInfo { name: name.to_owned(), uid, max: 8, ..PoolInfo::default() }
    }

    #[test]
    fn selects_the_pool() {
        let all = || vec![pool("a", 0), pool("1000.b", 1000), pool("1000.c", 1000)];
        let nowhere = |_: &str| false;
        assert_eq!(only(all(), 0, nowhere).unwrap(), "a", "not another's");
        let several = only(all(), 1000, nowhere).unwrap_err();
        assert_eq!(several.message(), "there are 2 private pools: 1000.b, 1000.c");
        assert_eq!(only(all(), 7, nowhere).unwrap_err().kind(), Kind::NotFound);
        assert_eq!(only(all(), 0, |name| name == "1000.c").unwrap(), "1000.c", "seen here");
        let ending = PoolInfo { ending: true, ..pool("1000.b", 1000) };
        assert_eq!(only(vec![ending, pool("1000.c", 1000)], 1000, nowhere).unwrap(), "1000.c");
        let many = (0..100).map(|n| pool(&n.to_string(), 0)).collect();
        assert!(only(many, 0, nowhere).unwrap_err().message().ends_with("6, 7, ..."));
    }
}
