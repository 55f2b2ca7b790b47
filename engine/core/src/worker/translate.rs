// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Translates a request into the operation on the image.
//!
//! Pure: builds submission entries without submitting them.

use io_uring::{opcode, squeue, types};

use super::transport::Data;
use crate::request::Op;

/// Bytes per write of zeroes, where the file system cannot zero a range.
pub const ZEROES_LEN: u32 = 128 * 1024;

#[repr(align(4096))]
struct Zeroes([u8; ZEROES_LEN as usize]);
static ZEROES: Zeroes = Zeroes([0; ZEROES_LEN as usize]);

/// The transfer of bytes `done..len` of a read or write; `file_offset` is that of byte 0.
pub fn transfer(
    op: Op,
    image: types::Fixed,
    data: Data,
    file_offset: u64,
    done: u32,
    len: u32,
) -> squeue::Entry {
    let (offset, remaining) = (file_offset + u64::from(done), len - done);
    let flags = match op {
        Op::Write { fua: true } => libc::RWF_DSYNC,
        _ => 0,
    };
    let write = matches!(op, Op::Write { .. });
    match data {
        // Addresses in a registered buffer of the driver start at 0.
        Data::Registered(index) if write => {
            opcode::WriteFixed::new(image, done as usize as *const u8, remaining, index)
                .offset(offset)
                .rw_flags(flags)
                .build()
        }
        Data::Registered(index) => {
            opcode::ReadFixed::new(image, done as usize as *mut u8, remaining, index).offset(offset).build()
        }
        Data::Memory(address) if write => {
            let start = (address + done as usize) as *const u8;
            opcode::Write::new(image, start, remaining).offset(offset).rw_flags(flags).build()
        }
        Data::Memory(address) => {
            let start = (address + done as usize) as *mut u8;
            opcode::Read::new(image, start, remaining).offset(offset).build()
        }
    }
}

/// Makes everything written to the image durable.
pub fn sync(image: types::Fixed) -> squeue::Entry {
    opcode::Fsync::new(image).flags(types::FsyncFlags::DATASYNC).build()
}

/// Frees the blocks of a range; they read as zeroes.
pub fn punch(image: types::Fixed, file_offset: u64, len: u64) -> squeue::Entry {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    opcode::Fallocate::new(image, len).offset(file_offset).mode(mode).build()
}

/// Zeroes a range exactly, freeing its blocks or keeping them; or allocates blocks for it.
pub fn allocate(op: Op, image: types::Fixed, file_offset: u64, len: u64) -> squeue::Entry {
    let mode = match op {
        Op::WriteZeroes { unmap: true, .. } => return punch(image, file_offset, len),
        Op::Reserve => libc::FALLOC_FL_KEEP_SIZE,
        _ => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
    };
    opcode::Fallocate::new(image, len).offset(file_offset).mode(mode).build()
}

/// Writes zeroes to the start of the remaining range.
pub fn write_zeroes(image: types::Fixed, file_offset: u64, left: u32) -> squeue::Entry {
    opcode::Write::new(image, ZEROES.0.as_ptr(), left.min(ZEROES_LEN)).offset(file_offset).build()
}
