// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Claims a file or a block device as an image that others may use: rejects it, or logs a warning.
//!
//! Knows the rules; `claims` knows the users in this daemon, `holders` those outside.
//!
//! | claimed by | an instance uses it | a pool writes it | a pool reads it | others use it |
//! |---|---|---|---|---|
//! | an instance, read-write | refused | refused | | refused |
//! | an instance, read-only | refused, unless that only reads | WARN | | WARN, if they write |
//! | with `--force`, or after a restart | WARN | WARN | | WARN |
//! | a pool, read-write | WARN | WARN | | WARN |
//! | a pool, read-only | WARN, if that writes | WARN | | WARN, if they write |
//!
//! A reader does not block writers, as with loop(4). Sharing within one pool is not logged.

use std::collections::{HashSet, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::holders::{self, ExternalUse};
use super::{Claim, Claims, Holder, ImageUse, check_file_system, locks, warnings};
use crate::error::{Error, Kind, Result};
use crate::failures::Failures;
use crate::image::{Identity, Image};
use crate::instance::spec::AttachSpec;
use crate::sys::processes::{self, Process};

/// How long an attach waits for the file systems of the kernel's loop devices.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of pool bindings with a pending check for other users.
const BACKLOG: usize = 256;

/// The hint for writing to an image in use.
const NEXT_STEP: &str = "end that use, or attach with --read-only or --force";

/// What to do with an image in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Reject it where sharing is harmful.
    Refuse,
    /// Use it and log a warning.
    Warn,
}

/// A claimed image.
#[derive(Debug)]
pub struct Hold {
    claim: Claim,
    /// A block device that is written is opened with O_EXCL, which blocks mounts and other
    /// exclusive users.
    _exclusive: Option<OwnedFd>,
}

impl Hold {
    /// The other users of the image in this daemon.
    pub fn others(&self) -> Vec<String> {
        self.claim.others()
    }
}

/// Claims an image for device loopN of an instance, and counts its failures. The device, known by
/// its owner cookie, may use the image already.
pub fn claim_image(
    claims: &Claims,
    image: Image,
    spec: &AttachSpec,
    number: u32,
    owner_cookie: u64,
    sharing: Sharing,
) -> Result<(Image, Hold)> {
    let holder = Holder::Device { instance: spec.instance.clone(), number };
    let failures = Failures::of(holder.to_string(), image.name().to_owned());
    let hold =
        attach(claims, &image, &ImageUse { holder, read_only: spec.read_only }, owner_cookie, sharing)?;
    Ok((image.with_failure_counter(failures), hold))
}

fn attach(
    claims: &Claims,
    image: &Image,
    by: &ImageUse,
    owner_cookie: u64,
    sharing: Sharing,
) -> Result<Hold> {
    let (identity, name) = (image.identity(), image.name());
    let (mut claim, mut uses) = claim(claims, image, by, sharing)?;
    if let Some(file) = holders::below(image.fd(), identity.rdev) {
        let of_file = claims.uses(file);
        refuse(by, &of_file, sharing, &format!("the file under {name}"))?;
        uses.extend(of_file);
    }
    let own = claim.set_owner(owner_cookie);
    warn(by, &uses, identity, name);
    let (exclusive, claimed) = match image.is_block_device() {
        true => open_exclusively(image),
        false => (None, false),
    };
    let mut external = find_external_users(identity, name, own);
    let is_ours = uses.iter().any(|one| matches!(one.holder, Holder::Device { .. }));
    if claimed && external.is_empty() && !is_ours {
        let open = processes::open_devices(|name| name.starts_with("/dev"));
        let users = open.iter().filter(|open| open.rdev == Some(identity.rdev));
        // Not the client that has opened it to attach it.
        let mut users = users.filter_map(|open| Process::of(open.pid));
        let holder = users.find(|user| user.command != "loopengine");
        let who = holder.map_or("another program".to_owned(), |holder| holder.to_string());
        external.push(ExternalUse { who, writes: true, range: (0, 0) });
    }
    if let (Sharing::Refuse, false, Some(user)) = (sharing, by.read_only, external.first()) {
        return Err(Error::new(Kind::Busy, format!("{name} is in use by {}", user.who)).hint(NEXT_STEP));
    }
    warn_external(by, &external, identity, name);
    Ok(Hold { claim, _exclusive: exclusive.filter(|_| !by.read_only) })
}

/// Claims an image for a loop device of a pool, whoever else uses it, as loop(4) does.
pub fn claim_for_pool(claims: &Claims, image: &Image, number: u32, read_only: bool) -> Result<Hold> {
    let by = ImageUse { holder: claims.pool_device(number), read_only };
    let (claim, uses) = claim(claims, image, &by, Sharing::Warn)?;
    if !warn(&by, &uses, image.identity(), image.name()) {
        find_external_users_later(DeferredCheck {
            by,
            identity: image.identity(),
            name: image.name().to_owned(),
        });
    }
    Ok(Hold { claim, _exclusive: None })
}

/// Enters an image in the table. Returns its other users, and those of block devices that share its
/// bytes.
fn claim(claims: &Claims, image: &Image, by: &ImageUse, sharing: Sharing) -> Result<(Claim, Vec<ImageUse>)> {
    let (identity, name) = (image.identity(), image.name());
    check_file_system(claims, &identity, name)?;
    let related = holders::related(identity.rdev).into_iter();
    let mut seen: Vec<ImageUse> =
        related.flat_map(|rdev| claims.uses(Identity { rdev, ..identity })).collect();
    let claim = claims.claim(identity, by, |uses| {
        seen.extend(uses.iter().map(|(_, one)| one.clone()));
        refuse(by, &seen, sharing, name)
    })?;
    Ok((claim, seen))
}

/// Rejects what a device of an instance may not share.
fn refuse(by: &ImageUse, uses: &[ImageUse], sharing: Sharing, name: &str) -> Result<()> {
    if sharing == Sharing::Warn {
        return Ok(());
    }
    let device = |one: &&ImageUse| matches!(one.holder, Holder::Device { .. });
    if let Some(one) = uses.iter().filter(device).find(|one| !(one.read_only && by.read_only)) {
        return Err(Error::new(Kind::Exists, format!("{name} is attached already, as {one}"))
            .hint("attach all devices of this image with --read-only, or use --force"));
    }
    match uses.iter().find(|one| !one.read_only && !by.read_only) {
        None => Ok(()),
        Some(one) => Err(Error::new(Kind::Busy, format!("{name} is in use by {one}")).hint(NEXT_STEP)),
    }
}

/// Logs the users in this daemon that share an image, in one line; false: there are none.
fn warn(by: &ImageUse, uses: &[ImageUse], identity: Identity, name: &str) -> bool {
    let pool = |holder: &Holder| match holder {
        Holder::Pooled { pool, .. } => Some(pool.clone()),
        Holder::Device { .. } => None,
    };
    let own = pool(&by.holder);
    let matters = |one: &&ImageUse| match pool(&one.holder) {
        // Sharing within a pool, and readers.
        Some(pool) if own.as_ref() == Some(&pool) || one.read_only => false,
        _ => !(one.read_only && by.read_only),
    };
    let others: Vec<String> = uses.iter().filter(matters).map(ImageUse::to_string).collect();
    log_sharing(by, identity, name, &others)
}

fn warn_external(by: &ImageUse, external: &[ExternalUse], identity: Identity, name: &str) {
    let others = external.iter().filter(|user| user.writes || !by.read_only);
    let others: Vec<String> = others.map(|user| user.who.clone()).collect();
    log_sharing(by, identity, name, &others);
}

/// Logs who shares an image; false: nobody does. Warnings about pools are limited.
fn log_sharing(by: &ImageUse, identity: Identity, name: &str, others: &[String]) -> bool {
    let may = match &by.holder {
        Holder::Pooled { pool, .. } => !others.is_empty() && warnings::may_warn(pool, identity),
        Holder::Device { .. } => !others.is_empty(),
    };
    if may {
        tracing::warn!("{by} shares {name} with {}", others.join(", "));
    }
    !others.is_empty()
}

/// Opens a block device exclusively; true: another program has claimed it. Opens for reading, so
/// that udev does not probe it again on close.
fn open_exclusively(image: &Image) -> (Option<OwnedFd>, bool) {
    let link = format!("/proc/self/fd/{}", image.fd().as_raw_fd());
    match rustix::fs::open(link, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => (Some(file), false),
        Err(Errno::BUSY) => (None, true),
        Err(error) => {
            tracing::warn!(
                "cannot open {} with O_EXCL: {error}; other programs can use it too",
                image.name()
            );
            (None, false)
        }
    }
}

/// Finds the users of an image outside this daemon, with a deadline.
fn find_external_users(identity: Identity, name: &str, own: HashSet<u64>) -> Vec<ExternalUse> {
    let (found, is_found) = std::sync::mpsc::channel();
    let started = std::thread::Builder::new().name("holders".into()).spawn(move || {
        let mut users = holders::find(&identity, &own, |_| true);
        users.extend(locks::find(&identity));
        let _ = found.send(users);
    });
    let found = started.ok().and_then(|_| is_found.recv_timeout(LOOKUP_TIMEOUT).ok());
    found.unwrap_or_else(|| {
        tracing::warn!("could not determine within {} s who else uses {name}", LOOKUP_TIMEOUT.as_secs());
        Vec::new()
    })
}

/// A pool binding to check for other users.
struct DeferredCheck {
    by: ImageUse,
    identity: Identity,
    name: String,
}

/// Bindings to check, and whether a thread runs.
static DEFERRED: Mutex<(VecDeque<DeferredCheck>, bool)> = Mutex::new((VecDeque::new(), false));

/// Checks a binding for users outside on another thread: the tenant does not wait. One thread
/// serves all checks; beyond the limit they are skipped.
fn find_external_users_later(binding: DeferredCheck) {
    let waiting = || DEFERRED.lock().unwrap_or_else(PoisonError::into_inner);
    let mut state = waiting();
    if state.0.len() >= BACKLOG {
        return;
    }
    state.0.push_back(binding);
    if std::mem::replace(&mut state.1, true) {
        return;
    }
    drop(state);
    let started = std::thread::Builder::new().name("holders".into()).spawn(move || {
        loop {
            let mut state = waiting();
            let Some(next) = state.0.pop_front() else {
                state.1 = false;
                return;
            };
            drop(state);
            warn_external(
                &next.by,
                &holders::find(&next.identity, &HashSet::new(), |_| true),
                next.identity,
                &next.name,
            );
        }
    });
    if started.is_err() {
        waiting().1 = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageSpec;

    fn open(path: &std::path::Path, read_only: bool) -> Image {
        let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
        let image_spec = ImageSpec { buffered: true, read_only, ..ImageSpec::default() };
        Image::open(file.into(), &image_spec, path.to_str().unwrap()).unwrap()
    }

    fn device(number: u32, read_only: bool) -> ImageUse {
        ImageUse { holder: Holder::Device { instance: "default".into(), number }, read_only }
    }

    #[test]
    fn instances_have_one_writer_or_many_readers_and_pools_any_number() {
        let dir = tempfile::tempdir().unwrap();
        let (path, hard) = (dir.path().join("image"), dir.path().join("hard"));
        std::fs::write(&path, [0; 4096]).unwrap();
        std::fs::hard_link(&path, &hard).unwrap();
        let (writable, readable) = (open(&path, false), open(&hard, true));
        let claims = Claims::default();
        let claim_image = |number, read_only, how| {
            let image = if read_only { &readable } else { &writable };
            attach(&claims, image, &device(number, read_only), u64::from(number), how)
        };
        let kind = |exists: Result<Hold>| exists.unwrap_err().kind();

        let (first, second) =
            (claim_image(0, true, Sharing::Refuse).unwrap(), claim_image(1, true, Sharing::Refuse).unwrap());
        assert_eq!(first.others(), ["default/loop1 (read-only)"]);
        let refused = claim_image(2, false, Sharing::Refuse).unwrap_err();
        assert_eq!(refused.kind(), Kind::Exists);
        assert!(refused.message().contains("attached already, as default/loop0 (read-only)"), "{refused}");
        drop(first);
        assert_eq!(kind(claim_image(2, false, Sharing::Refuse)), Kind::Exists);
        drop(second);
        let writer = claim_image(0, false, Sharing::Refuse).unwrap();
        assert_eq!(kind(claim_image(1, true, Sharing::Refuse)), Kind::Exists);
        let forced = claim_image(1, false, Sharing::Warn).unwrap();
        drop((writer, forced));

        // A pool's reader conflicts with nobody, its writer with writers.
        let pool = claims.of_pool("p", 1000);
        let reader = claim_for_pool(&pool, &readable, 3, true).unwrap();
        let writer = claim_image(0, false, Sharing::Refuse).unwrap();
        assert_eq!(writer.others(), ["loop3 of pool p of user 1000 (read-only)"]);
        let bound = claim_for_pool(&pool, &writable, 4, false).unwrap();
        drop(writer);
        let refused = claim_image(0, false, Sharing::Refuse).unwrap_err();
        assert_eq!(refused.kind(), Kind::Busy);
        assert!(refused.message().contains("loop4 of pool p of user 1000 (read-write)"), "{refused}");
        drop(claim_image(0, true, Sharing::Refuse).unwrap());
        drop(claim_image(0, false, Sharing::Warn).unwrap());
        drop((reader, bound));

        let none = claims.exclude_file_system(writable.identity().dev);
        assert_eq!(kind(claim_image(0, true, Sharing::Warn)), Kind::Invalid);
        assert!(claim_for_pool(&pool, &readable, 3, true).is_err());
        drop(none);
        drop(claim_image(0, false, Sharing::Refuse).unwrap());
        assert!(claims.table().uses.is_empty());
    }
}
