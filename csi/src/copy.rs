// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copies of images: shared blocks where the file system can, else all data, without the holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;

const CHUNK: usize = 1 << 20;

/// Makes `to` a copy of `from` at this moment, by sharing its blocks. The kernel keeps writers of `from`
/// out meanwhile. False: the file system cannot.
pub fn share(from: &File, to: &File) -> io::Result<bool> {
    match ioctl_ficlone(to, from) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::XDEV | Errno::INVAL | Errno::NOSYS) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Copies the data of `from`, which nobody may write meanwhile, to the empty file `to`.
pub fn copy(from: &File, to: &File) -> io::Result<()> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < length {
        at = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(from, SeekFrom::Hole(at))?.min(length);
        while at < end {
            let part = &mut buffer[..usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK)];
            from.read_exact_at(part, at)?;
            to.write_all_at(part, at)?;
            at += part.len() as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_copy_has_the_data_and_the_holes() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.set_len(64 << 20).unwrap();
        for at in [0, 5 << 20, (64 << 20) - 7] {
            from.write_all_at(b"content", at).unwrap();
        }
        copy(&from, &to).unwrap();
        assert_eq!(to.metadata().unwrap().len(), 64 << 20);
        assert!(to.metadata().unwrap().blocks() * 512 <= from.metadata().unwrap().blocks() * 512 + (1 << 20));
        for at in [0, 5 << 20, (64 << 20) - 7] {
            let mut found = [0; 7];
            to.read_exact_at(&mut found, at).unwrap();
            assert_eq!(&found, b"content");
        }
        copy(&tempfile::tempfile().unwrap(), &tempfile::tempfile().unwrap()).unwrap();
    }
}
