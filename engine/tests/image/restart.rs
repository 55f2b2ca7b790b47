//! Images found again by path after a restart.

use std::fs;

use loopengine::Kind;
use loopengine::image::{Identity, Image};

use crate::support::*;

#[test]
fn an_image_is_found_again_only_if_it_is_the_same() {
    let directory = temporary();
    let (path, other) = (directory.path().join("image"), directory.path().join("other"));
    image_file(&path, MIB);
    image_file(&other, MIB);
    let identity = attach(&path, &PLAIN).unwrap().identity();
    let text = serde_json::to_string(&identity).unwrap();
    let identity: Identity = serde_json::from_str(&text).unwrap();

    assert_eq!(Image::reopen(&path, &PLAIN, &identity).unwrap().identity(), identity);
    refused(Image::reopen(&other, &PLAIN, &identity), Kind::NotFound, "is not the file");
    refused(Image::reopen(directory.path(), &PLAIN, &identity), Kind::NotFound, "is not the file");
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    Image::reopen(&link, &PLAIN, &identity).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(Image::reopen(&path, &PLAIN, &identity).unwrap_err().kind(), Kind::NotFound);

    // A new file often gets the inode number of the one that is gone.
    image_file(&path, MIB);
    let again = attach(&path, &PLAIN).unwrap().identity();
    assert!(!again.is_still(&identity), "{again:?} {identity:?}");
    refused(Image::reopen(&path, &PLAIN, &identity), Kind::NotFound, "is not the file");
    if again.ino != identity.ino {
        println!("(the inode number was not used again)");
    }
}
