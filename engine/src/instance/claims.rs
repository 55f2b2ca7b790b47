//! Which images are in use: one writer, or any number of readers.
//!
//! Knows identities only. A claim is given back when it is dropped.

use std::collections::HashMap;
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
pub struct Claims(Arc<Mutex<HashMap<Identity, Use>>>);

/// One device's hold on its image.
#[derive(Debug)]
pub struct Claim {
    claims: Claims,
    identity: Identity,
}

impl Claims {
    /// Claims an image for reading, or for reading and writing.
    pub fn claim(&self, identity: Identity, read_only: bool, name: &str) -> Result<Claim> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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
        let mut table = self.claims.0.lock().unwrap_or_else(PoisonError::into_inner);
        match table.get_mut(&self.identity) {
            Some(Use::Read(users) | Use::Shared(users)) if *users > 1 => *users -= 1,
            _ => {
                table.remove(&self.identity);
            }
        }
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
    }
}
