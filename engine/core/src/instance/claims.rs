// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The images in use by this daemon, their users, and the file systems excluded from use.
//!
//! Knows identities and their holders; `sharing` decides what may be shared. A claim ends when it
//! is dropped.

pub mod holders;
pub mod locks;
pub mod sharing;
mod warnings;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Kind, Result};
use crate::image::Identity;

/// The user of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A device of an instance.
    Device {
        /// The instance.
        instance: String,
        /// N of loopN.
        number: u32,
    },
    /// A loop device of a pool.
    Pooled {
        /// The pool.
        pool: Arc<PoolLabel>,
        /// N of loopN.
        number: u32,
    },
}

/// A pool's name and user, for messages.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PoolLabel {
    /// Its name.
    pub name: String,
    /// The user whose quota its devices count against.
    pub uid: u32,
}

/// A holder and its access to the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageUse {
    /// The holder.
    pub holder: Holder,
    /// It never writes.
    pub read_only: bool,
}

/// The claims of one engine, as seen by its instances or by one pool.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    table: Arc<Mutex<ClaimTable>>,
    /// Device numbers of excluded file systems.
    excluded: Arc<Mutex<HashSet<u64>>>,
    /// The pool that claims through this.
    pool: Arc<PoolLabel>,
}

#[derive(Debug, Default)]
struct ClaimTable {
    uses: HashMap<Identity, Vec<(u64, ImageUse)>>,
    /// The next claim's number.
    next: u64,
    /// Owner cookies of the disks that hold claims.
    cookies: HashSet<u64>,
}

/// One device's claim on its image.
#[derive(Debug)]
pub struct Claim {
    claims: Claims,
    identity: Identity,
    id: u64,
    /// Of the disk that holds it, if it belongs to an instance.
    owner_cookie: Option<u64>,
}

/// Excludes a file system's regular files as images while it lives.
#[derive(Debug)]
pub struct ExcludedFileSystem {
    claims: Claims,
    dev: u64,
}

impl Claims {
    /// The same claims, for a pool.
    #[must_use]
    pub fn of_pool(&self, name: &str, uid: u32) -> Claims {
        Claims { pool: Arc::new(PoolLabel { name: name.to_owned(), uid }), ..self.clone() }
    }

    /// Device loopN of this pool.
    pub fn pool_device(&self, number: u32) -> Holder {
        Holder::Pooled { pool: Arc::clone(&self.pool), number }
    }

    /// Excludes the regular files of the file system with this device number: one of the daemon's
    /// own, which a device on such a file would keep busy. (The targets of its nodes are not
    /// affected.)
    pub fn exclude_file_system(&self, dev: u64) -> ExcludedFileSystem {
        self.excluded.lock().unwrap_or_else(PoisonError::into_inner).insert(dev);
        ExcludedFileSystem { claims: self.clone(), dev }
    }

    /// Whether regular files of this file system can be images.
    pub fn allows_images_on(&self, dev: u64) -> bool {
        !self.excluded.lock().unwrap_or_else(PoisonError::into_inner).contains(&dev)
    }

    /// Claims an image if `check` accepts its present users.
    fn claim(
        &self,
        identity: Identity,
        by: &ImageUse,
        check: impl FnOnce(&[(u64, ImageUse)]) -> Result<()>,
    ) -> Result<Claim> {
        let mut table = self.table();
        // Checks and enters under one lock, so that only one of two concurrent claims succeeds.
        check(table.uses.get(&identity).map_or(&[][..], Vec::as_slice))?;
        let id = table.next;
        table.next += 1;
        table.uses.entry(identity).or_default().push((id, by.clone()));
        Ok(Claim { claims: self.clone(), identity, id, owner_cookie: None })
    }

    /// The users of an image.
    fn uses(&self, identity: Identity) -> Vec<ImageUse> {
        let table = self.table();
        let uses = table.uses.get(&identity).into_iter().flatten();
        uses.map(|(_, one)| one.clone()).collect()
    }

    fn table(&self) -> MutexGuard<'_, ClaimTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim {
    /// Names the disk that holds it. Returns the owner cookies of all disks that hold claims.
    fn set_owner(&mut self, cookie: u64) -> HashSet<u64> {
        self.owner_cookie = Some(cookie);
        let mut table = self.claims.table();
        table.cookies.insert(cookie);
        table.cookies.clone()
    }

    /// The other users of the image.
    pub fn others(&self) -> Vec<String> {
        let table = self.claims.table();
        let uses = table.uses.get(&self.identity).into_iter().flatten();
        uses.filter(|(id, _)| *id != self.id).map(|(_, one)| one.to_string()).collect()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut table = self.claims.table();
        if let Some(cookie) = self.owner_cookie {
            table.cookies.remove(&cookie);
        }
        let Some(uses) = table.uses.get_mut(&self.identity) else { return };
        uses.retain(|(id, _)| *id != self.id);
        if uses.is_empty() {
            table.uses.remove(&self.identity);
        }
    }
}

impl Drop for ExcludedFileSystem {
    fn drop(&mut self) {
        self.claims.excluded.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.dev);
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Device { instance, number } => write!(f, "{instance}/loop{number}"),
            Holder::Pooled { pool, number } => {
                write!(f, "loop{number} of pool {} of user {}", pool.name, pool.uid)
            }
        }
    }
}

impl fmt::Display for ImageUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = if self.read_only { "read-only" } else { "read-write" };
        write!(f, "{} ({mode})", self.holder)
    }
}

/// Rejects a regular file of an excluded file system.
fn check_file_system(claims: &Claims, identity: &Identity, name: &str) -> Result<()> {
    if claims.allows_images_on(identity.dev) {
        return Ok(());
    }
    Err(Error::new(Kind::Invalid, format!("{name} is part of a private pool, not an image")))
}
