// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients that mount: the source of a call becomes the name of a device, and mounts of devtmpfs
//! reach the handler. The kernel serves the other calls, and refuses these.

use libc::{EINVAL, ENODEV, ENOENT, ENOSYS, MS_BIND, MS_RDONLY, MS_REMOUNT};
use loopengine_private::intercept::filter;

use crate::raw;

const LONG: &[u8] = b"/dev/loopfs/loop3p1\0";
const SHORT: &[u8] = b"/dev/loop3p1\0";

/// Runs the client of this name.
pub fn run(role: &str) {
    let options = filter::FilterOptions { names: true, ..Default::default() };
    raw::install_and_send(&filter::program(options));
    match role {
        "names" => names(),
        _ => devtmpfs(),
    }
}

fn names() {
    let mount = |source: &[u8], flags| {
        let mut source = source.to_vec();
        assert_eq!(raw::mount(&mut source, c"/nowhere", c"ext4", flags), Err(ENOENT));
        source
    };
    for flags in [0, MS_RDONLY] {
        assert!(mount(LONG, flags).starts_with(SHORT), "mount");
    }
    assert_eq!(mount(LONG, MS_BIND), LONG, "a bind mount");
    for other in [&b"/dev/loop3\0"[..], b"/dev/loopfs/other\0", b"tmpfs\0"] {
        assert_eq!(mount(other, 0), other);
    }
    let configure = |key, value: &[u8]| {
        let mut value = value.to_vec();
        assert_eq!(raw::fsconfig(key, &mut value), Err(EINVAL));
        value
    };
    assert!(configure(c"source", LONG).starts_with(SHORT), "fsconfig");
    assert_eq!(configure(c"sources", LONG), LONG, "another parameter");
    assert_eq!(configure(c"sourc", LONG), LONG, "another parameter");
}

fn devtmpfs() {
    let mount = |source: &[u8], kind, flags| raw::mount(&mut source.to_vec(), c"/nowhere", kind, flags);
    assert_eq!(mount(b"udev\0", c"devtmpfs", MS_RDONLY), Ok(0));
    assert_eq!(raw::mount_without_source(c"/nowhere", c"devtmpfs"), Ok(0));
    for (kind, flags) in [(c"tmpfs", 0), (c"devtmpfs", MS_BIND), (c"devtmpfs", MS_REMOUNT)] {
        assert_eq!(mount(b"udev\0", kind, flags), Err(ENOENT), "{kind:?} {flags}");
    }
    assert_eq!(raw::fsopen(c"devtmpfs"), Err(ENOSYS));
    assert_eq!(raw::fsopen(c"devtmpfs2"), Err(ENODEV));
    assert!(raw::fsopen(c"tmpfs").is_ok());
}
