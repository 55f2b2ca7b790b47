//! `loopengine losetup`: which pool is meant, and its devices over the daemon's socket.
//!
//! Knows the client of private pools, and where pools are mounted for the caller. What losetup does
//! with devices is in [`super::losetup`].

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::daemon;
use super::losetup::{self, Devices};
use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::loops::{Answer, Entry, Errno, LoopOp, LoopReply};
use crate::private::{Asked, LOOPFS, Operation, Outcome, PoolInfo};
use crate::sys::mntns::mounted;

/// The daemon takes so many bytes from one connection that these calls never reach the limit.
const CALLS_MAX: u32 = 64;

/// Names in a message at the most.
const NAMES_MAX: usize = 8;

/// Does what `args` ask for; the exit code.
pub(super) fn run(args: losetup::Args, run_dir: &Path) -> Result<u8> {
    let mut remote = Remote::open(args.pool(), run_dir)?;
    let done = losetup::run(args, &mut remote, &mut io::stdout().lock(), &mut io::stderr().lock());
    match remote.failure {
        Some(failure) => Err(failure),
        None => done.map_err(|error| Error::os(error, "cannot print")),
    }
}

/// A pool's devices, over the socket.
pub(super) struct Remote {
    runtime: tokio::runtime::Runtime,
    run_dir: PathBuf,
    client: PrivateClient,
    /// With this connection.
    calls: u32,
    pool: String,
    directory: String,
    /// Why the daemon could not be asked, the last time.
    failure: Option<Error>,
}

impl Remote {
    pub(super) fn open(pool: Option<&str>, run_dir: &Path) -> Result<Remote> {
        let runtime = daemon::runtime()?;
        let (client, pool) = runtime.block_on(async {
            let mut client = PrivateClient::connect(run_dir).await?;
            let pool = match pool {
                Some(pool) => pool.to_owned(),
                None => only(client.list().await?, rustix::process::geteuid().as_raw(), is_mounted)?,
            };
            // Fails if there is none of this name, before losetup says anything.
            client.operate(&pool, &Asked::of(Operation::List), None).await?;
            Ok::<_, Error>((client, pool))
        })?;
        let directory = directory(&pool);
        Ok(Remote { runtime, run_dir: run_dir.to_owned(), client, calls: 2, pool, directory, failure: None })
    }

    /// Why the daemon could not be asked, if that is why something failed.
    pub(super) fn failure(&mut self) -> Option<Error> {
        self.failure.take()
    }

    fn ask(&mut self, asked: &Asked, file: Option<OwnedFd>) -> Answer<Outcome> {
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

impl Devices for Remote {
    fn directory(&self) -> &str {
        &self.directory
    }

    fn entries(&mut self) -> Answer<Vec<Entry>> {
        self.ask(&Asked::of(Operation::List), None)?.devices.ok_or(Errno::PROTO)
    }

    fn execute(&mut self, op: LoopOp) -> Answer<LoopReply> {
        let (asked, file) = Asked::from_op(op)?;
        self.ask(&asked, file)?.try_into()
    }
}

/// The pool that is meant where none is named: the only one that is mounted where the caller is, or
/// else the caller's only one. Root sees those of others, and is not to change them unawares.
fn only(mut pools: Vec<PoolInfo>, uid: u32, is_mounted: impl Fn(&str) -> bool) -> Result<String> {
    pools.retain(|pool| !pool.ending);
    let (here, elsewhere): (Vec<_>, Vec<_>) = pools.into_iter().partition(|pool| is_mounted(&pool.name));
    let own = elsewhere.into_iter().filter(|pool| pool.uid == uid).collect();
    let meant: Vec<PoolInfo> = if here.is_empty() { own } else { here };
    match meant.as_slice() {
        [one] => Ok(one.name.clone()),
        [] => Err(Error::new(Kind::NotFound, "this user has no private pool of loop devices")
            .hint("make one with 'loopengine instance mount DIR', or name another's with --pool NAME")),
        several => {
            let names: Vec<&str> = several.iter().take(NAMES_MAX).map(|pool| pool.name.as_str()).collect();
            let more = if several.len() > NAMES_MAX { ", ..." } else { "" };
            let message = format!("there are {} private pools: {}{more}", several.len(), names.join(", "));
            Err(Error::new(Kind::Invalid, message)
                .hint("choose one with --pool NAME, or with LOOPENGINE_POOL in the environment"))
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
    // As 'loopengine run' has it: with links in /dev.
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
    fn which_pool_is_meant() {
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
