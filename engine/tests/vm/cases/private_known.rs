// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Differences between the kernel's loop driver and private loop devices, line by line, with
//! reasons. These are the deviations of loopengine-loopfs(7). There are no others, and each must
//! occur.

/// Lines that differ for one reason.
pub(super) struct Known {
    /// The reason, as in the manual page.
    pub(super) why: &'static str,
    /// Only for programs of 64 bits.
    pub(super) only_64: bool,
    /// Only on disks of ublk: on the kernel's loop driver, the driver itself answers.
    pub(super) only_ublk: bool,
    /// The step, the result of the kernel's driver, and that of a pool. Lines whose names continue
    /// such a name after a comma may be missing: a refused step prints no details.
    pub(super) lines: &'static [(&'static str, &'static str, &'static str)],
}

pub(super) const KNOWN: &[Known] = &[
    Known {
        why: "a name of a removed device opens nothing; the kernel's driver creates the device again",
        only_64: false,
        only_ublk: false,
        lines: &[("remove: opened through what named it once", "opened", "ESTALE")],
    },
    Known {
        why: "unknown commands are not intercepted: the block layer and FUSE refuse them",
        only_64: true,
        only_ublk: true,
        lines: &[
            ("unknown: 5401 of a device", "EINVAL", "ENOTTY"),
            ("unknown: 4bff of a device", "EINVAL", "ENOTTY"),
            ("unknown: 4d00 of a device", "EINVAL", "ENOTTY"),
        ],
    },
    Known {
        why: "unknown commands are not intercepted: the block layer and FUSE refuse them",
        only_64: false,
        only_ublk: false,
        lines: &[
            ("unknown: 5401 of loop-control, not of loop(4)", "ENOSYS", "ENOTTY"),
            ("unknown: 4bff of loop-control, not of loop(4)", "ENOSYS", "ENOTTY"),
            ("unknown: 4d00 of loop-control, not of loop(4)", "ENOSYS", "ENOTTY"),
        ],
    },
    Known {
        why: "loop-control has the number of /dev/null, whose driver reads and writes",
        only_64: false,
        only_ublk: false,
        lines: &[("loop-control: read", "EINVAL", "0"), ("loop-control: write", "EINVAL", "16")],
    },
    Known {
        why: "a device gives no access to its file beyond that of the caller's descriptor",
        only_64: false,
        only_ublk: false,
        lines: &[
            ("files: SET_FD, a file to write", "0", "EPERM"),
            ("files: SET_FD, a file to write, size", BOUND, UNBOUND),
            ("files: CONFIGURE, a file to write", "0", "EPERM"),
            ("files: SET_FD, a file to append", "0", "EPERM"),
            ("files: SET_FD, a file to append, size", BOUND, UNBOUND),
            ("files: CONFIGURE, a file to append", "0", "EPERM"),
        ],
    },
    Known {
        why: "files of proc, sysfs and similar file systems cannot be backing files",
        only_64: false,
        only_ublk: false,
        lines: &[
            ("files: SET_FD, a file of /proc", "0", "EINVAL"),
            ("files: CONFIGURE, a file of /proc", "0", "EINVAL"),
            (
                "files: SET_FD, a file of /proc, size",
                "0 bytes, end at 0, blocks of 512, read-only 1",
                "0 bytes, end at 0, blocks of 512, read-only 0",
            ),
        ],
    },
    Known {
        why: "the block size is at most a page",
        only_64: false,
        only_ublk: true,
        lines: &[
            ("values: CONFIGURE, block size 8192", "0", "EINVAL"),
            ("values: CONFIGURE, block size 32768", "0", "EINVAL"),
            ("values: CONFIGURE, block size 65536", "0", "EINVAL"),
            ("block size: 8192", "0", "EINVAL"),
            ("block size: 32768", "0", "EINVAL"),
            ("block size: 65536", "0", "EINVAL"),
        ],
    },
    Known {
        why: "the daemon does not know who has a device open, and whether with O_EXCL",
        only_64: false,
        only_ublk: false,
        lines: &[
            ("block size: while another has it alone, the same", "EBUSY", "0"),
            ("alone: bind, another has it alone", "EBUSY", "0"),
        ],
    },
    Known {
        why: "LOOP_CHANGE_FD needs a file of the device's size; the kernel's driver, of the old file's present size",
        only_64: false,
        only_ublk: false,
        lines: &[
            ("change: plain, 1049088 bytes", "0", "EINVAL"),
            ("change: with flags, 1049088 bytes", "0", "EINVAL"),
        ],
    },
    Known {
        why: "an unbound device is writable, even if it was read-only before",
        only_64: false,
        only_ublk: false,
        lines: &[
            ("read-only: flag, unbound, size", WAS_READ_ONLY, UNBOUND),
            ("read-only: flag, unbound, sysfs", SYSFS_WAS_READ_ONLY, SYSFS_UNBOUND),
            ("read-only: file, unbound, size", WAS_READ_ONLY, UNBOUND),
            ("read-only: file, unbound, sysfs", SYSFS_WAS_READ_ONLY, SYSFS_UNBOUND),
            ("read-only: device, unbound, size", WAS_READ_ONLY, UNBOUND),
            ("read-only: device, unbound, sysfs", SYSFS_WAS_READ_ONLY, SYSFS_UNBOUND),
        ],
    },
    Known {
        why: "after LOOP_CLR_FD, the device serves until its last close, and can be bound again at once",
        only_64: false,
        only_ublk: false,
        lines: &[
            ("clear: the only opener, another file", "EBUSY", "0"),
            ("clear: the only opener, opened anew", "ENXIO", "opened"),
            ("clear: the only opener, bytes", "EIO", ""),
        ],
    },
    Known {
        why: "a device that is open after LOOP_CLR_FD appears as unbound for a second",
        only_64: false,
        only_ublk: false,
        lines: &[("clear: one of two, at once", "4", "ENXIO")],
    },
    Known {
        why: "nodes are in /dev/loopfs; /dev/loopN is a link to one",
        only_64: false,
        only_ublk: true,
        lines: &[(
            "stack: on another, sysfs",
            "size 2048, ro 0, block 512, loop offset 0, sizelimit 0, autoclear 0, partscan 0, dio 0, \
             backing_file /dev/loop0",
            "size 2048, ro 0, block 512, loop offset 0, sizelimit 0, autoclear 0, partscan 0, dio 0, \
             backing_file /dev/loopfs/loop0",
        )],
    },
];

const BOUND: &str = "1048576 bytes, end at 1048576, blocks of 512, read-only 0";
const UNBOUND: &str = "0 bytes, end at 0, blocks of 512, read-only 0";
const WAS_READ_ONLY: &str = "0 bytes, end at 0, blocks of 512, read-only 1";
const SYSFS_WAS_READ_ONLY: &str = "size 0, ro 1, block 512, loop offset ENOENT, sizelimit ENOENT, autoclear \
                                   ENOENT, partscan ENOENT, dio ENOENT, backing_file ENOENT";
const SYSFS_UNBOUND: &str = "size 0, ro 0, block 512, loop offset ENOENT, sizelimit ENOENT, autoclear ENOENT, \
                             partscan ENOENT, dio ENOENT, backing_file ENOENT";
