// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client that mounts: the source of its calls becomes the name of a device. The kernel serves
//! the calls, and refuses these.

use libc::{EINVAL, ENOENT, MS_BIND, MS_RDONLY};
use loopengine_private::intercept::filter;

use crate::raw;

const LONG: &[u8] = b"/dev/loopfs/loop3p1\0";
const SHORT: &[u8] = b"/dev/loop3p1\0";

/// Runs the client.
pub fn run() {
    let options = filter::FilterOptions { names: true, ..Default::default() };
    raw::install_and_send(&filter::program(options));
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
