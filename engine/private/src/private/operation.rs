// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Operations on a pool's devices over the socket: requests and results. The comments are part of
//! the varlink interface description.
//!
//! Knows how a message becomes a [`LoopOp`], and back. A refusal is an errno, which callers print
//! as that of loop(4). Does not know who may ask: the registry does.

use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, Type};

use crate::loops::{
    Answer, DeviceEntry, Errno, LoopConfig, LoopInfo, LoopOp, LoopReply, LoopStatus, NAME_BYTES, OwnerCaller,
    Pool,
};

/// How long after its arrival an operation may start a change. Clients wait as long.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(60);

/// An operation of loop(4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub enum Operation {
    /// Lists all devices.
    List,
    /// LOOP_GET_STATUS64.
    Status,
    /// LOOP_SET_STATUS64, with `info`.
    SetStatus,
    /// LOOP_CTL_GET_FREE.
    GetFree,
    /// LOOP_CTL_ADD.
    Add,
    /// LOOP_CTL_REMOVE.
    Remove,
    /// LOOP_CONFIGURE, with `info`, and `value` as block size. The file comes with the call.
    Configure,
    /// LOOP_CLR_FD.
    Clear,
    /// LOOP_SET_CAPACITY.
    SetCapacity,
    /// LOOP_SET_DIRECT_IO: on, if `value` is not 0.
    SetDirectIo,
    /// LOOP_SET_BLOCK_SIZE, to `value`.
    SetBlockSize,
}

/// An operation with its arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
pub struct OperationRequest {
    /// The operation.
    pub operation: Operation,
    /// N of loopN.
    pub number: Option<u32>,
    /// A block size in bytes, or a flag.
    pub value: Option<u64>,
    /// New properties of a device.
    pub info: Option<LoopInfo64>,
}

/// Fields of `struct loop_info64`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct LoopInfo64 {
    /// First byte of the file that is part of the device.
    #[serde(rename = "offsetBytes")]
    #[zlink(rename = "offsetBytes")]
    pub offset: u64,
    /// Maximum size in bytes; 0: to the end of the file.
    #[serde(rename = "sizeLimitBytes")]
    #[zlink(rename = "sizeLimitBytes")]
    pub size_limit: u64,
    /// LO_FLAGS_*.
    pub flags: u32,
    /// The caller's name of the file: at most 64 bytes.
    pub file_name: Vec<u8>,
}

/// The result of LOOP_GET_STATUS64.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct DeviceStatus {
    /// N of loopN.
    pub number: u32,
    /// Device number of the file system of the backing file.
    pub device: u64,
    /// Its inode number.
    pub inode: u64,
    /// Device number of the backing file, if it is a device.
    pub rdevice: u64,
    /// The other fields.
    pub info: LoopInfo64,
}

/// The result of an operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct OperationResult {
    /// The errno of loop(4), if it failed.
    pub errno: Option<i32>,
    /// N of the loopN that was found, added or removed.
    pub number: Option<u32>,
    /// The status of the device.
    pub status: Option<DeviceStatus>,
    /// The devices.
    pub devices: Option<Vec<DeviceEntry>>,
}

impl From<&LoopInfo> for LoopInfo64 {
    fn from(info: &LoopInfo) -> LoopInfo64 {
        let end = info.file_name.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        let file_name = info.file_name.iter().take(end).copied().collect();
        LoopInfo64 { offset: info.offset, size_limit: info.size_limit, flags: info.flags, file_name }
    }
}

impl TryFrom<&LoopInfo64> for LoopInfo {
    type Error = Errno;

    fn try_from(info: &LoopInfo64) -> Answer<LoopInfo> {
        let mut file_name = [0; NAME_BYTES];
        let bytes = file_name.get_mut(..info.file_name.len()).ok_or(Errno::INVAL)?;
        bytes.copy_from_slice(&info.file_name);
        let LoopInfo64 { offset, size_limit, flags, .. } = *info;
        Ok(LoopInfo { offset, size_limit, flags, file_name, ..LoopInfo::default() })
    }
}

impl From<LoopStatus> for DeviceStatus {
    fn from(status: LoopStatus) -> DeviceStatus {
        let LoopStatus { number, device, inode, rdevice, info } = status;
        DeviceStatus { number, device, inode, rdevice, info: (&info).into() }
    }
}

impl TryFrom<DeviceStatus> for LoopStatus {
    type Error = Errno;

    fn try_from(status: DeviceStatus) -> Answer<LoopStatus> {
        let DeviceStatus { number, device, inode, rdevice, info } = status;
        Ok(LoopStatus { number, device, inode, rdevice, info: (&info).try_into()? })
    }
}

impl OperationResult {
    /// Its errno as an error.
    pub fn answer(self) -> Answer<OperationResult> {
        match self.errno {
            None => Ok(self),
            Some(errno) => Err(Errno::from_raw_os_error(errno)),
        }
    }
}

impl From<Answer<OperationResult>> for OperationResult {
    fn from(answer: Answer<OperationResult>) -> OperationResult {
        let failed = |errno: Errno| OperationResult {
            errno: Some(errno.raw_os_error()),
            ..OperationResult::default()
        };
        answer.unwrap_or_else(failed)
    }
}

impl OperationRequest {
    /// An operation without arguments.
    pub fn of(operation: Operation) -> OperationRequest {
        OperationRequest { operation, number: None, value: None, info: None }
    }

    /// Runs it. `file` comes with the call.
    pub fn run(&self, pool: &Pool, file: Option<OwnedFd>) -> OperationResult {
        if self.operation == Operation::List {
            return OperationResult { devices: Some(pool.entries()), ..OperationResult::default() };
        }
        let reply =
            self.op(file).and_then(|op| pool.execute(op, &OwnerCaller::with_timeout(OPERATION_TIMEOUT)));
        reply.map(OperationResult::from).into()
    }

    /// Converts it to an operation on a device or on loop-control.
    fn op(&self, file: Option<OwnedFd>) -> Answer<LoopOp> {
        let number = self.number.ok_or(Errno::INVAL);
        let signed = || i32::try_from(number?).map_err(|_| Errno::INVAL);
        let value = self.value.ok_or(Errno::INVAL);
        let info = || LoopInfo::try_from(self.info.as_ref().ok_or(Errno::INVAL)?);
        Ok(match self.operation {
            Operation::List => return Err(Errno::INVAL),
            Operation::Status => LoopOp::Status(number?),
            Operation::SetStatus => LoopOp::SetStatus(number?, info()?),
            Operation::GetFree => LoopOp::GetFree,
            Operation::Add => LoopOp::Add(signed()?),
            Operation::Remove => LoopOp::Remove(signed()?),
            Operation::Configure => {
                let block_size = u32::try_from(self.value.unwrap_or(0)).map_err(|_| Errno::INVAL)?;
                let file = file.ok_or(Errno::BADF)?;
                LoopOp::Configure(number?, LoopConfig { file, block_size, info: info()? })
            }
            Operation::Clear => LoopOp::Clear(number?),
            Operation::SetCapacity => LoopOp::SetCapacity(number?),
            Operation::SetDirectIo => LoopOp::SetDirectIo(number?, value? != 0),
            Operation::SetBlockSize => LoopOp::SetBlockSize(number?, value?),
        })
    }

    /// Converts an operation to a message, with its file. EOPNOTSUPP: it has no message.
    pub fn from_op(op: LoopOp) -> Answer<(OperationRequest, Option<OwnedFd>)> {
        let unsigned = |number: i32| u32::try_from(number).map_err(|_| Errno::INVAL);
        let on =
            |operation, number| OperationRequest { number: Some(number), ..OperationRequest::of(operation) };
        let with =
            |operation, number, value| OperationRequest { value: Some(value), ..on(operation, number) };
        let request = match op {
            LoopOp::GetFree => OperationRequest::of(Operation::GetFree),
            LoopOp::Add(number) => on(Operation::Add, unsigned(number)?),
            LoopOp::Remove(number) => on(Operation::Remove, unsigned(number)?),
            LoopOp::Status(number) => on(Operation::Status, number),
            LoopOp::SetStatus(number, info) => {
                OperationRequest { info: Some(LoopInfo64::from(&info)), ..on(Operation::SetStatus, number) }
            }
            LoopOp::Configure(number, LoopConfig { file, block_size, info }) => {
                let info = Some(LoopInfo64::from(&info));
                let request =
                    OperationRequest { info, ..with(Operation::Configure, number, block_size.into()) };
                return Ok((request, Some(file)));
            }
            LoopOp::Clear(number) => on(Operation::Clear, number),
            LoopOp::SetCapacity(number) => on(Operation::SetCapacity, number),
            LoopOp::SetDirectIo(number, is_on) => with(Operation::SetDirectIo, number, is_on.into()),
            LoopOp::SetBlockSize(number, bytes) => with(Operation::SetBlockSize, number, bytes),
            LoopOp::ChangeFd(..) | LoopOp::RereadPartitions(_) | LoopOp::ChangePartition(..) => {
                return Err(Errno::OPNOTSUPP);
            }
        };
        Ok((request, None))
    }
}

impl From<LoopReply> for OperationResult {
    fn from(reply: LoopReply) -> OperationResult {
        match reply {
            LoopReply::Done => OperationResult::default(),
            LoopReply::Number(number) => {
                OperationResult { number: Some(number), ..OperationResult::default() }
            }
            LoopReply::Status(status) => {
                OperationResult { status: Some(status.into()), ..OperationResult::default() }
            }
        }
    }
}

impl TryFrom<OperationResult> for LoopReply {
    type Error = Errno;

    fn try_from(outcome: OperationResult) -> Answer<LoopReply> {
        Ok(match outcome.answer()? {
            OperationResult { status: Some(status), .. } => LoopReply::Status(status.try_into()?),
            OperationResult { number: Some(number), .. } => LoopReply::Number(number),
            _ => LoopReply::Done,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_names_and_refuses_longer_ones() {
        let mut info = LoopInfo { offset: 1 << 62, size_limit: 512, flags: 4, ..LoopInfo::default() };
        for length in [0, 1, 63, 64] {
            info.file_name = [0; NAME_BYTES];
            info.file_name[..length].fill(0xff);
            let text = serde_json::to_string(&LoopInfo64::from(&info)).unwrap();
            let back: LoopInfo64 = serde_json::from_str(&text).unwrap();
            assert_eq!(LoopInfo::try_from(&back), Ok(info), "{text}");
        }
        let long = LoopInfo64 { file_name: vec![0; 65], ..LoopInfo64::from(&info) };
        assert_eq!(LoopInfo::try_from(&long), Err(Errno::INVAL));
    }

    #[test]
    fn returns_a_refusal_as_an_errno() {
        let refused = OperationResult::from(Err(Errno::BUSY));
        let text = serde_json::to_string(&refused).unwrap();
        let back: OperationResult = serde_json::from_str(&text).unwrap();
        assert_eq!(back.answer(), Err(Errno::BUSY));
        let found = OperationResult { number: Some(3), ..OperationResult::default() };
        assert_eq!(OperationResult::from(Ok(found.clone())).answer(), Ok(found));
    }
}
