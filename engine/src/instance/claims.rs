//! Which images are in use: one writer, or any number of readers; and which file systems have none.
//!
//! Knows identities only. A claim is given back when it is dropped.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Kind, Result};
use crate::image::Identity;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Written,
    Read(usize),
    /// By devices that share it as loop(4) does, written or not.
    Shared(usize),
}

/// All claims of one engine.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    table: Arc<Mutex<HashMap<Identity, Use>>>,
    /// Device numbers of file systems.
    none_here: Arc<Mutex<HashSet<u64>>>,
}

/// One device's hold on its image.
#[derive(Debug)]
pub struct Claim {
    claims: Claims,
    identity: Identity,
}

/// While it lives no regular file of a file system is an image.
#[derive(Debug)]
pub struct NoImages {
    claims: Claims,
    dev: u64,
}

impl Claims {
    /// Has no regular file be an image that lies on the file system with this device number: one of the
    /// daemon's own, which a device on a file there would keep. (What its nodes lead to is another matter.)
    pub fn none_on(&self, dev: u64) -> NoImages {
        self.none_here.lock().unwrap_or_else(PoisonError::into_inner).insert(dev);
        NoImages { claims: self.clone(), dev }
    }

    /// May regular files of the file system with this device number be images?
    pub fn may_be_on(&self, dev: u64) -> bool {
        !self.none_here.lock().unwrap_or_else(PoisonError::into_inner).contains(&dev)
    }

    /// Claims an image for reading, or for reading and writing.
    pub fn claim(&self, identity: Identity, read_only: bool, name: &str) -> Result<Claim> {
        if !self.may_be_on(identity.dev) {
            return Err(Error::new(Kind::Invalid, format!("{name} is part of a private pool, not an image")));
        }
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = match (table.get(&identity), read_only) {
            (None, true) => Use::Read(1),
            (None, false) => Use::Written,
            (Some(Use::Read(readers)), true) => Use::Read(readers + 1),
            (Some(_), _) => {
                return Err(Error::new(Kind::Exists, format!("{name} is attached already"))
                    .hint("several devices may share an image only if all are attached with --read-only"));
            }
        };
        table.insert(identity, wanted);
        Ok(Claim { claims: self.clone(), identity })
    }
}

impl Claims {
    /// Claims an image among any number of devices, written or not, that share it knowingly.
    pub fn share(&self, identity: Identity, name: &str) -> Result<Claim> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = match table.get(&identity) {
            None => Use::Shared(1),
            Some(Use::Shared(users)) => Use::Shared(users + 1),
            Some(_) => return Err(Error::new(Kind::Exists, format!("{name} is attached already"))),
        };
        table.insert(identity, wanted);
        Ok(Claim { claims: self.clone(), identity })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut table = self.claims.table.lock().unwrap_or_else(PoisonError::into_inner);
        match table.get_mut(&self.identity) {
            Some(Use::Read(users) | Use::Shared(users)) if *users > 1 => *users -= 1,
            _ => {
                table.remove(&self.identity);
            }
        }
    }
}

impl Drop for NoImages {
    fn drop(&mut self) {
        self.claims.none_here.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.dev);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writer_or_many_readers() {
        let claims = Claims::default();
        let image = Identity { dev: 1, ino: 1, rdev: 0, born_ns: 0 };
        let first = claims.claim(image, true, "a").unwrap();
        let second = claims.claim(image, true, "a").unwrap();
        assert_eq!(claims.claim(image, false, "a").unwrap_err().kind(), Kind::Exists);
        drop(first);
        assert!(claims.claim(image, false, "a").is_err());
        drop(second);
        let writer = claims.claim(image, false, "a").unwrap();
        assert!(claims.claim(image, true, "a").is_err());
        drop(writer);
        assert!(claims.claim(image, false, "a").is_ok());
        let none = claims.none_on(1);
        assert_eq!(claims.claim(image, true, "a").unwrap_err().kind(), Kind::Invalid);
        assert!(!claims.may_be_on(1) && claims.may_be_on(2));
        drop(none);
        assert!(claims.claim(image, true, "a").is_ok());
    }
}
