// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images are made under another name, and get theirs when they are whole.
//!
//! The record says "creating" and names the inode before there is content, so that a later call knows
//! which files are its own. A file that no record names is never replaced or deleted.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{CWD, FallocateFlags, RenameFlags, fallocate, renameat_with};
use tonic::Status;

use crate::record::{Record, State, Store, id_of};
use crate::{copy, failed};

/// What a new image contains.
pub struct Content<'a> {
    /// The image to copy; none: zeros.
    pub from: Option<&'a Path>,
    /// It may be written meanwhile, so blocks must be shared.
    pub in_use: bool,
}

/// Makes the image and record that `record` describes. A failure leaves nothing of them.
pub fn create(store: &Store, record: &mut Record, content: &Content<'_>) -> Result<(), Status> {
    let id = id_of(&record.name);
    let made = make(store, &id, record, content);
    if made.is_err() && record.state == State::Creating {
        let _ = delete(store, record.clone());
    }
    made
}

/// Refuses to take the place of a file that no record names.
pub fn check_place(store: &Store, id: &str) -> Result<(), Status> {
    let image = store.image(id);
    match fs::symlink_metadata(&image) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        _ => Err(Status::already_exists(format!("{} exists, and no record names it", image.display()))),
    }
}

fn make(store: &Store, id: &str, record: &mut Record, content: &Content<'_>) -> Result<(), Status> {
    let (path, image) = (store.unfinished(id), store.image(id));
    let cannot = |error: io::Error| failed(format_args!("cannot create {}", image.display()), &error);
    // Nothing else makes files with this ending: what is there is of a crash before the record.
    remove_if_there(&path).map_err(cannot)?;
    let file = File::options().read(true).write(true).create_new(true).open(&path).map_err(cannot)?;
    record.inode = file.metadata().map_err(cannot)?.ino();
    store.save(record).map_err(cannot)?;
    if let Some(from) = content.from {
        let from = File::open(from).map_err(cannot)?;
        if !copy::share(&from, &file).map_err(cannot)? {
            if content.in_use {
                return Err(Status::failed_precondition(format!(
                    "the volume is in use, and the file system of {} cannot share blocks, so a copy would \
                     be torn; stop the pods that use it, or keep volumes on XFS or btrfs",
                    store.directory().display()
                )));
            }
            copy::copy(&from, &file).map_err(cannot)?;
        }
    }
    resize(&file, record.size, record.parameters.preallocate).map_err(cannot)?;
    file.sync_all().map_err(cannot)?;
    renameat_with(CWD, &path, CWD, &image, RenameFlags::NOREPLACE).map_err(|error| cannot(error.into()))?;
    record.state = State::Ready;
    record.inode = 0;
    store.save(record).map_err(cannot)
}

/// Completes an image that only lacked its record. False: it is not whole.
pub fn complete(store: &Store, record: &mut Record) -> io::Result<bool> {
    let image = fs::symlink_metadata(store.image(&id_of(&record.name)));
    let whole = image.is_ok_and(|meta| record.inode != 0 && meta.ino() == record.inode);
    if record.state == State::Creating && whole {
        record.state = State::Ready;
        record.inode = 0;
        store.save(record)?;
    }
    Ok(record.state == State::Ready)
}

/// Sets the size of an image; with `preallocate`, all of it has blocks.
pub fn resize(file: &File, size: u64, preallocate: bool) -> io::Result<()> {
    if size > file.metadata()?.len() {
        file.set_len(size)?;
    }
    if preallocate {
        fallocate(file, FallocateFlags::empty(), 0, size)?;
    }
    Ok(())
}

/// Deletes image and record. The record says so first, so that a crash between leaves no doubt.
pub fn delete(store: &Store, mut record: Record) -> io::Result<()> {
    let id = id_of(&record.name);
    if record.state == State::Creating {
        remove_unfinished(store, &record)?;
    } else {
        record.state = State::Deleting;
        store.save(&record)?;
        remove_if_there(&store.image(&id))?;
        store.sync()?;
    }
    remove_if_there(&store.record(&id))?;
    store.sync()
}

/// Removes what a call that did not end has made.
fn remove_unfinished(store: &Store, record: &Record) -> io::Result<()> {
    let id = id_of(&record.name);
    remove_if_there(&store.unfinished(&id))?;
    let image = store.image(&id);
    match fs::symlink_metadata(&image) {
        Ok(meta) if record.inode != 0 && meta.ino() == record.inode => fs::remove_file(&image),
        _ => Ok(()),
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parameters::Parameters;
    use crate::record::Found;

    fn record(name: &str) -> Record {
        Record {
            version: 1,
            name: name.into(),
            state: State::Creating,
            inode: 0,
            size: 1 << 20,
            growing: None,
            source: None,
            given: Default::default(),
            parameters: Parameters::default(),
            content: None,
            formatting: None,
            ephemeral: false,
            created_ns: 0,
        }
    }

    const EMPTY: Content<'_> = Content { from: None, in_use: false };

    #[test]
    fn never_touches_a_file_without_record() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().into()).unwrap();
        fs::write(store.image("a"), "foreign").unwrap();
        let refused = check_place(&store, "a").unwrap_err();
        assert_eq!(refused.code(), tonic::Code::AlreadyExists);
        create(&store, &mut record("a"), &EMPTY).unwrap_err();
        delete(&store, record("a")).unwrap();
        assert_eq!(fs::read(store.image("a")).unwrap(), b"foreign");
        assert!(matches!(store.load("a"), Found::Nothing));
    }

    #[test]
    fn a_crash_at_any_point_leaves_nothing_that_a_retry_cannot_use() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().into()).unwrap();
        // Before the file, with the file, with the file renamed.
        for crash in 0..3 {
            let mut unfinished = record("a");
            if crash > 0 {
                let path = if crash == 1 { store.unfinished("a") } else { store.image("a") };
                let file = File::create(&path).unwrap();
                file.set_len(1 << 20).unwrap();
                unfinished.inode = file.metadata().unwrap().ino();
            }
            store.save(&unfinished).unwrap();
            assert_eq!(complete(&store, &mut unfinished).unwrap(), crash == 2);
            if crash < 2 {
                delete(&store, unfinished).unwrap();
                create(&store, &mut record("a"), &EMPTY).unwrap();
            }
            let Found::Record(made) = store.load("a") else { panic!("no record") };
            assert_eq!((made.state, store.fault(&made)), (State::Ready, None));
            delete(&store, *made).unwrap();
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        }
    }
}
