//! Operations on a pool's devices without a descriptor of one: as they are asked for over a socket, and
//! what they answer. The comments are part of the description that varlink clients get.
//!
//! Knows how words of the wire become a [`LoopOp`], and back, and that a refusal is an errno here,
//! since callers print it as loop(4)'s. Does not know who may ask: that is the registry's.

use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, Type};

use crate::loops::{
    Answer, Configure, Entry, Errno, Info, LoopOp, LoopReply, NAME_BYTES, Owner, Pool, Status,
};

/// For so long an operation may begin to change something. Clients wait as long.
const PATIENCE: Duration = Duration::from_secs(60);

/// What loop(4) can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "lowercase")]
#[zlink(rename_all = "lowercase")]
pub enum Operation {
    /// All devices.
    List,
    /// LOOP_GET_STATUS64.
    Status,
    /// LOOP_SET_STATUS64, of `info`.
    Change,
    /// LOOP_CTL_GET_FREE.
    Free,
    /// LOOP_CTL_ADD.
    Add,
    /// LOOP_CTL_REMOVE.
    Remove,
    /// LOOP_CONFIGURE: `info`, with `value` as block size. The file comes with the call.
    Configure,
    /// LOOP_CLR_FD.
    Clear,
    /// LOOP_SET_CAPACITY.
    Capacity,
    /// LOOP_SET_DIRECT_IO, if `value` is not 0.
    Direct,
    /// LOOP_SET_BLOCK_SIZE, to `value`.
    Block,
}

/// An operation with its arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
pub struct Asked {
    /// Which.
    pub operation: Operation,
    /// N of loopN.
    pub number: Option<u32>,
    /// Block size in bytes, or whether.
    pub value: Option<u64>,
    /// What a device is to be.
    pub info: Option<DeviceInfo>,
}

/// Of `struct loop_info64`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct DeviceInfo {
    /// First byte of the file that the device shows.
    #[serde(rename = "offsetBytes")]
    #[zlink(rename = "offsetBytes")]
    pub offset: u64,
    /// Bytes at the most; 0: to the end of the file.
    #[serde(rename = "sizeLimitBytes")]
    #[zlink(rename = "sizeLimitBytes")]
    pub size_limit: u64,
    /// LO_FLAGS_*.
    pub flags: u32,
    /// What the caller calls the file: bytes, at most 64.
    pub file_name: Vec<u8>,
}

/// What LOOP_GET_STATUS64 answers.
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
    /// The rest.
    pub info: DeviceInfo,
}

/// What an operation answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct Outcome {
    /// It failed, as loop(4) would have.
    pub errno: Option<i32>,
    /// N of the loopN that was found, made or removed.
    pub number: Option<u32>,
    /// What was asked for.
    pub status: Option<DeviceStatus>,
    /// What was asked for.
    pub devices: Option<Vec<Entry>>,
}

impl From<&Info> for DeviceInfo {
    fn from(info: &Info) -> DeviceInfo {
        let end = info.file_name.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        let file_name = info.file_name.iter().take(end).copied().collect();
        DeviceInfo { offset: info.offset, size_limit: info.size_limit, flags: info.flags, file_name }
    }
}

impl TryFrom<&DeviceInfo> for Info {
    type Error = Errno;

    fn try_from(info: &DeviceInfo) -> Answer<Info> {
        let mut file_name = [0; NAME_BYTES];
        let room = file_name.get_mut(..info.file_name.len()).ok_or(Errno::INVAL)?;
        room.copy_from_slice(&info.file_name);
        let DeviceInfo { offset, size_limit, flags, .. } = *info;
        Ok(Info { offset, size_limit, flags, file_name, ..Info::default() })
    }
}

impl From<Status> for DeviceStatus {
    fn from(status: Status) -> DeviceStatus {
        let Status { number, device, inode, rdevice, info } = status;
        DeviceStatus { number, device, inode, rdevice, info: (&info).into() }
    }
}

impl TryFrom<DeviceStatus> for Status {
    type Error = Errno;

    fn try_from(status: DeviceStatus) -> Answer<Status> {
        let DeviceStatus { number, device, inode, rdevice, info } = status;
        Ok(Status { number, device, inode, rdevice, info: (&info).try_into()? })
    }
}

impl Outcome {
    /// The refusal, if it is one.
    pub fn answer(self) -> Answer<Outcome> {
        match self.errno {
            None => Ok(self),
            Some(errno) => Err(Errno::from_raw_os_error(errno)),
        }
    }
}

impl From<Answer<Outcome>> for Outcome {
    fn from(answer: Answer<Outcome>) -> Outcome {
        let failed = |errno: Errno| Outcome { errno: Some(errno.raw_os_error()), ..Outcome::default() };
        answer.unwrap_or_else(failed)
    }
}

impl Asked {
    /// An operation without arguments.
    pub fn of(operation: Operation) -> Asked {
        Asked { operation, number: None, value: None, info: None }
    }

    /// Does it. `file` came with the call.
    pub fn run(&self, pool: &Pool, file: Option<OwnedFd>) -> Outcome {
        if self.operation == Operation::List {
            return Outcome { devices: Some(pool.entries()), ..Outcome::default() };
        }
        let reply = self.op(file).and_then(|op| pool.execute(op, &Owner::waiting(PATIENCE)));
        reply.map(Outcome::from).into()
    }

    /// The operation on one device or on loop-control.
    fn op(&self, file: Option<OwnedFd>) -> Answer<LoopOp> {
        let number = self.number.ok_or(Errno::INVAL);
        let signed = || i32::try_from(number?).map_err(|_| Errno::INVAL);
        let value = self.value.ok_or(Errno::INVAL);
        let info = || Info::try_from(self.info.as_ref().ok_or(Errno::INVAL)?);
        Ok(match self.operation {
            Operation::List => return Err(Errno::INVAL),
            Operation::Status => LoopOp::Status(number?),
            Operation::Change => LoopOp::SetStatus(number?, info()?),
            Operation::Free => LoopOp::GetFree,
            Operation::Add => LoopOp::Add(signed()?),
            Operation::Remove => LoopOp::Remove(signed()?),
            Operation::Configure => {
                let block_size = u32::try_from(self.value.unwrap_or(0)).map_err(|_| Errno::INVAL)?;
                let file = file.ok_or(Errno::BADF)?;
                LoopOp::Configure(number?, Configure { file, block_size, info: info()? })
            }
            Operation::Clear => LoopOp::Clear(number?),
            Operation::Capacity => LoopOp::SetCapacity(number?),
            Operation::Direct => LoopOp::SetDirectIo(number?, value? != 0),
            Operation::Block => LoopOp::SetBlockSize(number?, value?),
        })
    }

    /// An operation as it is sent, with the file that goes with it. EOPNOTSUPP: it cannot be sent.
    pub fn from_op(op: LoopOp) -> Answer<(Asked, Option<OwnedFd>)> {
        let unsigned = |number: i32| u32::try_from(number).map_err(|_| Errno::INVAL);
        let on = |operation, number| Asked { number: Some(number), ..Asked::of(operation) };
        let with = |operation, number, value| Asked { value: Some(value), ..on(operation, number) };
        let asked = match op {
            LoopOp::GetFree => Asked::of(Operation::Free),
            LoopOp::Add(number) => on(Operation::Add, unsigned(number)?),
            LoopOp::Remove(number) => on(Operation::Remove, unsigned(number)?),
            LoopOp::Status(number) => on(Operation::Status, number),
            LoopOp::SetStatus(number, info) => {
                Asked { info: Some(DeviceInfo::from(&info)), ..on(Operation::Change, number) }
            }
            LoopOp::Configure(number, Configure { file, block_size, info }) => {
                let info = Some(DeviceInfo::from(&info));
                let asked = Asked { info, ..with(Operation::Configure, number, block_size.into()) };
                return Ok((asked, Some(file)));
            }
            LoopOp::Clear(number) => on(Operation::Clear, number),
            LoopOp::SetCapacity(number) => on(Operation::Capacity, number),
            LoopOp::SetDirectIo(number, is_on) => with(Operation::Direct, number, is_on.into()),
            LoopOp::SetBlockSize(number, bytes) => with(Operation::Block, number, bytes),
            LoopOp::ChangeFd(..) | LoopOp::RereadPartitions(_) | LoopOp::ChangePartition(..) => {
                return Err(Errno::OPNOTSUPP);
            }
        };
        Ok((asked, None))
    }
}

impl From<LoopReply> for Outcome {
    fn from(reply: LoopReply) -> Outcome {
        match reply {
            LoopReply::Done => Outcome::default(),
            LoopReply::Number(number) => Outcome { number: Some(number), ..Outcome::default() },
            LoopReply::Status(status) => Outcome { status: Some(status.into()), ..Outcome::default() },
        }
    }
}

impl TryFrom<Outcome> for LoopReply {
    type Error = Errno;

    fn try_from(outcome: Outcome) -> Answer<LoopReply> {
        Ok(match outcome.answer()? {
            Outcome { status: Some(status), .. } => LoopReply::Status(status.try_into()?),
            Outcome { number: Some(number), .. } => LoopReply::Number(number),
            _ => LoopReply::Done,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_wire_and_longer_ones_are_refused() {
        let mut info = Info { offset: 1 << 62, size_limit: 512, flags: 4, ..Info::default() };
        for length in [0, 1, 63, 64] {
            info.file_name = [0; NAME_BYTES];
            info.file_name[..length].fill(0xff);
            let text = serde_json::to_string(&DeviceInfo::from(&info)).unwrap();
            let back: DeviceInfo = serde_json::from_str(&text).unwrap();
            assert_eq!(Info::try_from(&back), Ok(info), "{text}");
        }
        let long = DeviceInfo { file_name: vec![0; 65], ..DeviceInfo::from(&info) };
        assert_eq!(Info::try_from(&long), Err(Errno::INVAL));
    }

    #[test]
    fn a_refusal_is_an_errno() {
        let refused = Outcome::from(Err(Errno::BUSY));
        let text = serde_json::to_string(&refused).unwrap();
        let back: Outcome = serde_json::from_str(&text).unwrap();
        assert_eq!(back.answer(), Err(Errno::BUSY));
        let found = Outcome { number: Some(3), ..Outcome::default() };
        assert_eq!(Outcome::from(Ok(found.clone())).answer(), Ok(found));
    }
}
