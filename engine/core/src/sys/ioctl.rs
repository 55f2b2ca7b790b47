// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers of the ioctls of loop(4), and of those of block devices that programs use on loop devices.

#![expect(missing_docs, reason = "the kernel's headers name them so")]

// linux/loop.h.
pub const LOOP_SET_FD: u32 = 0x4c00;
pub const LOOP_CLR_FD: u32 = 0x4c01;
pub const LOOP_SET_STATUS: u32 = 0x4c02;
pub const LOOP_GET_STATUS: u32 = 0x4c03;
pub const LOOP_SET_STATUS64: u32 = 0x4c04;
pub const LOOP_GET_STATUS64: u32 = 0x4c05;
pub const LOOP_CHANGE_FD: u32 = 0x4c06;
pub const LOOP_SET_CAPACITY: u32 = 0x4c07;
pub const LOOP_SET_DIRECT_IO: u32 = 0x4c08;
pub const LOOP_SET_BLOCK_SIZE: u32 = 0x4c09;
pub const LOOP_CONFIGURE: u32 = 0x4c0a;
pub const LOOP_CTL_ADD: u32 = 0x4c80;
pub const LOOP_CTL_REMOVE: u32 = 0x4c81;
pub const LOOP_CTL_GET_FREE: u32 = 0x4c82;
// linux/fs.h and linux/blkpg.h.
pub const FS_IOC_FIEMAP: u32 = 0xc020_660b;
pub const BLKROSET: u32 = 0x125d;
pub const BLKROGET: u32 = 0x125e;
pub const BLKRRPART: u32 = 0x125f;
pub const BLKFLSBUF: u32 = 0x1261;
pub const BLKPG: u32 = 0x1269;
pub const BLKGETSIZE64: u32 = 0x8008_1272;
pub const BLKGETDISKSEQ: u32 = 0x8008_1280;
/// For callers of 64 and of 32 bits.
pub const BLKBSZSET: [u32; 2] = [0x4008_1271, 0x4004_1271];
