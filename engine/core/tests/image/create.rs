// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Creation of images: complete, or without a file.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use loopengine_core::Kind;
use loopengine_core::image::create;

use crate::support::*;

#[test]
fn creates_images() {
    let directory = temporary();
    let path = directory.path().join("image");
    let mut reports = Vec::new();
    create(&path, 10 * MIB, false, |done, all| reports.push((done, all))).unwrap();
    assert_eq!(reports, [(0, 10 * MIB)], "that the file exists");
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((metadata.len(), metadata.blocks()), (10 * MIB, 0));
    refused(create(&path, MIB, true, |_, _| {}), Kind::Exists, "choose another name");
    assert_eq!(fs::metadata(&path).unwrap().len(), 10 * MIB, "it was there before us");

    let path = directory.path().join("full");
    let mut reports = Vec::new();
    create(&path, 10 * MIB, true, |done, all| reports.push((done, all))).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), 10 * MIB);
    assert!(metadata.blocks() * 512 >= 10 * MIB);
    assert_eq!(reports.first(), Some(&(0, 10 * MIB)));
    assert_eq!(reports.last(), Some(&(10 * MIB, 10 * MIB)));
    assert!(attach(&path, &PLAIN).is_ok());
}

#[test]
fn removes_the_file_after_a_failure() {
    let directory = temporary();
    let path = directory.path().join("image");
    let sparse = |path: &Path, size| create(path, size, false, |_, _| {});
    refused(sparse(&path, 0), Kind::Invalid, "empty image");
    refused(sparse(&path, 1000), Kind::Invalid, "multiple of 512");
    refused(sparse(&path, 1 << 63), Kind::Invalid, "8 EiB");
    refused(sparse(&path, u64::MAX), Kind::Invalid, "8 EiB");
    refused(sparse(Path::new("/"), MIB), Kind::Invalid, "file name");
    let nowhere = sparse(&directory.path().join("no/image"), MIB);
    assert_eq!(nowhere.unwrap_err().kind(), Kind::NotFound);

    // A full file system: more than ext4 can hold, and more than there is.
    if let Some(mounted) = Mounted::new("mkfs.ext4 -q", 512, "") {
        let path = mounted.path().join("image");
        refused(sparse(&path, 1 << 60), Kind::Invalid, "smaller size");
        refused(create(&path, 1 << 40, true, |_, _| {}), Kind::Quota, "free some space");
        assert!(!path.exists());
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn preallocates_by_writing() {
    // ext2's driver knows no fallocate; ext4's driver serving ext2 neither.
    let Some(mounted) = Mounted::new("mkfs.ext2 -q", 512, "") else {
        return;
    };
    let path = mounted.path().join("image");
    let mut reports = 0;
    create(&path, 3 * MIB + 512, true, |_, _| reports += 1).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), 3 * MIB + 512);
    assert!(metadata.blocks() * 512 >= 3 * MIB);
    assert!(reports > 3, "written in chunks");
}
