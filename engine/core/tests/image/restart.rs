// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Recovery of images by path after a restart.

use std::fs;

use loopengine_core::Kind;
use loopengine_core::image::{Identity, Image};

use crate::support::*;

#[test]
fn recognises_only_the_same_image() {
    let directory = temporary();
    let (path, other) = (directory.path().join("image"), directory.path().join("other"));
    image_file(&path, MIB);
    image_file(&other, MIB);
    let image = attach(&path, &PLAIN).unwrap();
    let (identity, shape) = (image.identity(), image.geometry());
    let text = serde_json::to_string(&identity).unwrap();
    let identity: Identity = serde_json::from_str(&text).unwrap();

    assert_eq!(Image::reopen(&path, &PLAIN, &identity, &shape).unwrap().identity(), identity);
    refused(Image::reopen(&other, &PLAIN, &identity, &shape), Kind::NotFound, "is not the file");
    refused(Image::reopen(directory.path(), &PLAIN, &identity, &shape), Kind::NotFound, "is not the file");
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    Image::reopen(&link, &PLAIN, &identity, &shape).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(Image::reopen(&path, &PLAIN, &identity, &shape).unwrap_err().kind(), Kind::NotFound);

    // A new file often gets the inode number of the deleted one.
    image_file(&path, MIB);
    let again = attach(&path, &PLAIN).unwrap().identity();
    assert!(!again.is_same_file(&identity), "{again:?} {identity:?}");
    refused(Image::reopen(&path, &PLAIN, &identity, &shape), Kind::NotFound, "is not the file");
    if again.ino != identity.ino {
        println!("(the inode number was not used again)");
    }
}

/// The device has users: it keeps its geometry, whatever the file is now.
#[test]
fn keeps_the_geometry_over_a_restart() {
    let directory = temporary();
    let path = directory.path().join("image");
    image_file(&path, MIB);
    let image = attach(&path, &PLAIN).unwrap();
    let (identity, shape) = (image.identity(), image.geometry());
    for size in [MIB / 2, 0, 3 * MIB] {
        fs::File::options().write(true).open(&path).unwrap().set_len(size).unwrap();
        assert_eq!(Image::reopen(&path, &PLAIN, &identity, &shape).unwrap().geometry(), shape);
    }
    // Direct I/O needs a larger block size than the device has.
    let shape = loopengine_core::image::Geometry { offset: 100, ..shape };
    let image = Image::reopen(&path, &PLAIN, &identity, &shape).unwrap();
    assert!(image.is_buffered() && image.buffered_reason().unwrap().contains("alignment"));
    assert_eq!(image.geometry(), shape);
}
