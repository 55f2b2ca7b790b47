//! Operations on a pool's devices without a descriptor of one: as they are asked for over a socket, and
//! what they answer. The comments are part of the description that varlink clients get.
//!
//! Knows how words of the wire become operations of [`Pool`], and that a refusal is an errno here,
//! since callers print it as loop(4)'s. Does not know who may ask: that is the registry's.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, Type};

use crate::loops::{Answer, Caller, Configure, Entry, Errno, Info, NAME_BYTES, Pool, Status};

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
        self.attempt(pool, file).into()
    }

    fn attempt(&self, pool: &Pool, file: Option<OwnedFd>) -> Answer<Outcome> {
        let number = self.number.ok_or(Errno::INVAL);
        let signed = || i32::try_from(number?).map_err(|_| Errno::INVAL);
        let value = self.value.ok_or(Errno::INVAL);
        let info = || Info::try_from(self.info.as_ref().ok_or(Errno::INVAL)?);
        let caller = &Remote(Instant::now());
        let mut outcome = Outcome::default();
        match self.operation {
            Operation::List => outcome.devices = Some(pool.entries()),
            Operation::Status => outcome.status = Some(pool.status(number?)?.into()),
            Operation::Change => pool.set_status(number?, &info()?, caller)?,
            Operation::Free => outcome.number = Some(pool.get_free()?),
            Operation::Add => outcome.number = Some(pool.add(signed()?)?),
            Operation::Remove => outcome.number = Some(pool.remove(signed()?)?),
            Operation::Configure => {
                let block_size = u32::try_from(self.value.unwrap_or(0)).map_err(|_| Errno::INVAL)?;
                let with = Configure { file: file.ok_or(Errno::BADF)?, block_size, info: info()? };
                pool.configure(number?, with, caller)?;
            }
            Operation::Clear => pool.clear(number?, caller)?,
            Operation::Capacity => pool.set_capacity(number?, caller)?,
            Operation::Direct => pool.set_direct_io(number?, value? != 0, caller)?,
            Operation::Block => pool.set_block_size(number?, value?, caller)?,
        }
        Ok(outcome)
    }
}

/// Who asks over a socket: the pool's owner or root, without a descriptor of a device.
struct Remote(Instant);

impl Caller for Remote {
    fn writes(&self) -> bool {
        true
    }

    fn is_admin(&self) -> bool {
        true
    }

    fn waits(&self) -> bool {
        self.0.elapsed() < PATIENCE
    }

    fn replace(&self, _file: OwnedFd) -> Answer<()> {
        Err(Errno::OPNOTSUPP)
    }

    fn has_descriptor(&self) -> bool {
        false
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
