// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A varlink client of the daemon's control socket, which passes file descriptors.
//!
//! On an emulated CPU, starting a program takes longer than attaching a device.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
/// Longest reply; one that describes a device is much shorter.
const REPLY_BYTES_MAX: usize = 1 << 20;

/// A connection to the daemon.
pub struct Client(UnixStream);

impl Client {
    /// Connects to `socket`.
    pub fn new(socket: &Path) -> Result<Client> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("no daemon at {}", socket.display()))?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        Ok(Client(stream))
    }

    /// Attaches `image` to `instance` and returns the device's path.
    pub fn attach(&mut self, instance: &str, image: &Path) -> Result<String> {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(image)?;
        let spec = json!({
            "instance": instance, "path": image, "number": null, "readOnly": false, "offset": 0,
            "sizeLimit": 0, "blockSize": 0, "buffered": false, "queues": 0, "depth": 0, "ioMode": null,
        });
        let reply = self.call("io.loopengine.Attach", &json!({ "spec": spec }), Some(file.as_fd()))?;
        let path = reply["device"]["path"].as_str().context("the daemon named no device")?;
        Ok(path.to_owned())
    }

    /// Detaches `device`.
    pub fn detach(&mut self, device: &str) -> Result<()> {
        self.call("io.loopengine.Detach", &json!({ "device": device }), None).map(drop)
    }

    /// Statistics of all devices.
    pub fn stats(&mut self) -> Result<Vec<Value>> {
        let mut reply = self.call("io.loopengine.GetStats", &json!({}), None)?;
        match reply["stats"].take() {
            Value::Array(devices) => Ok(devices),
            _ => bail!("the daemon sent no statistics"),
        }
    }

    fn call(&mut self, method: &str, parameters: &Value, fd: Option<BorrowedFd<'_>>) -> Result<Value> {
        let mut message = serde_json::to_vec(&json!({ "method": method, "parameters": parameters }))?;
        message.push(0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = fd.map(|fd| [fd]);
        if let Some(fds) = &fds {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let sent = sendmsg(&self.0, &[IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL)?;
        if sent != message.len() {
            bail!("{method}: the daemon read only a part of the call");
        }
        let mut reply: Value = serde_json::from_slice(&self.reply()?).context("the reply is not JSON")?;
        if let Some(error) = reply["error"].as_str() {
            bail!("{method}: {error}: {}", reply["parameters"]);
        }
        Ok(reply["parameters"].take())
    }

    /// Reads up to the zero byte that ends a message.
    fn reply(&mut self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut piece = [0; 4096];
        while bytes.last() != Some(&0) {
            let length = self.0.read(&mut piece).context("the daemon did not answer")?;
            if length == 0 || bytes.len() > REPLY_BYTES_MAX {
                bail!("the daemon's reply has no end");
            }
            bytes.extend_from_slice(&piece[..length]);
        }
        bytes.pop();
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn parses_replies_and_errors() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut client = Client(ours);
        theirs.write_all(b"{\"parameters\":{\"device\":{\"path\":\"/x\"}}}\0").unwrap();
        let reply = client.call("a.B", &json!({}), None).unwrap();
        assert_eq!(reply["device"]["path"], "/x");
        theirs.write_all(b"{\"error\":\"a.Busy\",\"parameters\":{\"message\":\"why\"}}\0").unwrap();
        let error = client.call("a.B", &json!({}), None).unwrap_err().to_string();
        assert!(error.contains("a.Busy") && error.contains("why"), "{error}");
        drop(theirs);
        assert!(client.call("a.B", &json!({}), None).is_err());
    }
}
