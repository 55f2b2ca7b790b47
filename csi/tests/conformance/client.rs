// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A gRPC client: one connection per call.

use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use loopengine_csi::messages::*;
use prost::Message;
use tonic::Code;

/// A call's deadline.
const LIMIT: Duration = Duration::from_secs(60);

/// Code and message of a failed call.
pub type Answer<T> = Result<T, (Code, String)>;

pub fn call<R: Message + Default>(socket: &Path, method: &str, request: &impl Message) -> Answer<R> {
    let unreachable = |error: String| (Code::Unknown, format!("{method}: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| unreachable(error.to_string()))?;
    let exchange = exchange(socket, method, request.encode_to_vec());
    let exchanged = runtime.block_on(async { tokio::time::timeout(LIMIT, exchange).await });
    let exchanged = exchanged.map_err(|_| unreachable("no answer in time".into()))?;
    let (code, message, body) = exchanged.map_err(|error| unreachable(error.to_string()))?;
    match code {
        Code::Ok => {
            R::decode(body.get(5..).unwrap_or_default()).map_err(|error| unreachable(error.to_string()))
        }
        code => Err((code, message)),
    }
}

async fn exchange(
    socket: &Path,
    method: &str,
    message: Vec<u8>,
) -> Result<(Code, String, Bytes), Box<dyn std::error::Error>> {
    let stream = tokio::net::UnixStream::connect(socket).await?;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let mut framed = vec![0];
    framed.extend(u32::try_from(message.len())?.to_be_bytes());
    framed.extend(message);
    let request = http::Request::post(format!("http://csi/csi.v1.{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from(framed)))?;
    let (parts, body) = sender.send_request(request).await?.into_parts();
    let body = body.collect().await?;
    let headers = body.trailers().cloned().unwrap_or_default();
    let value = |key: &str| {
        let value = headers.get(key).or(parts.headers.get(key));
        value.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let code = value("grpc-status").ok_or("no grpc-status")?.parse::<i32>()?;
    let message = value("grpc-message").unwrap_or_default().replace("%20", " ");
    connection.abort();
    Ok((Code::from_i32(code), message, body.to_bytes()))
}

/// The capability of a file system, or of a block device.
pub fn capability(fs_type: Option<&str>, mode: Mode) -> Option<VolumeCapability> {
    let mount = fs_type.map(|name| MountVolume { fs_type: name.into(), ..MountVolume::default() });
    Some(VolumeCapability {
        block: mount.is_none().then_some(Empty {}),
        mount,
        access_mode: Some(AccessMode { mode: mode.into() }),
    })
}

pub fn create(name: &str, mib: i64, capability: Option<VolumeCapability>) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.into(),
        capacity_range: Some(CapacityRange { required_bytes: mib << 20, limit_bytes: 0 }),
        volume_capabilities: capability.into_iter().collect(),
        ..CreateVolumeRequest::default()
    }
}

pub fn ext4() -> Option<VolumeCapability> {
    capability(Some("ext4"), Mode::SingleNodeMultiWriter)
}

pub fn block() -> Option<VolumeCapability> {
    capability(None, Mode::SingleNodeWriter)
}
