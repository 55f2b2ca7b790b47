// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The services on a Unix socket.
//!
//! A call runs on its own thread from start to end: it waits for files, programs and the
//! engine. If its client goes, it continues, and holds its volume.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tonic::body::Body;
use tonic::server::{Grpc, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use crate::Driver;

/// A call's method of the driver.
struct Call<Q, R> {
    driver: Arc<Driver>,
    name: &'static str,
    method: fn(&Driver, Q) -> Result<R, Status>,
}

impl<Q: Send + 'static, R: Send + 'static> UnaryService<Q> for Call<Q, R> {
    type Response = R;
    type Future = Pin<Box<dyn Future<Output = Result<Response<R>, Status>> + Send>>;

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let Call { driver, name, method } = self;
        let (driver, name, method) = (Arc::clone(driver), *name, *method);
        Box::pin(async move {
            let call = move || method(&driver, request.into_inner());
            let done = tokio::task::spawn_blocking(call).await;
            let done = done.unwrap_or_else(|_| Err(Status::internal("the driver failed; see its log")));
            match &done {
                Ok(_) => tracing::debug!("{name}: done"),
                Err(status) => tracing::warn!("{name}: {:?}: {}", status.code(), status.message()),
            }
            done.map(Response::new)
        })
    }
}

macro_rules! route {
    ($driver:ident, $request:ident, $($service:literal { $($name:literal => $method:ident,)* })*) => {
        match $request.uri().path() {
            $($(concat!("/csi.v1.", $service, "/", $name) => {
                let call = Call { driver: $driver, name: $name, method: Driver::$method };
                Grpc::new(ProstCodec::default()).unary(call, $request).await
            })*)*
            _ => Status::unimplemented("the driver has no such call").into_http(),
        }
    };
}

async fn answer(driver: Arc<Driver>, request: http::Request<Incoming>) -> http::Response<Body> {
    route!(driver, request,
        "Identity" {
            "GetPluginInfo" => plugin_info,
            "GetPluginCapabilities" => plugin_capabilities,
            "Probe" => probe,
        }
        "Controller" {
            "CreateVolume" => create_volume,
            "DeleteVolume" => delete_volume,
            "ValidateVolumeCapabilities" => validate_capabilities,
            "ListVolumes" => list_volumes,
            "GetCapacity" => capacity,
            "ControllerGetCapabilities" => controller_capabilities,
            "CreateSnapshot" => create_snapshot,
            "DeleteSnapshot" => delete_snapshot,
            "ListSnapshots" => list_snapshots,
            "ControllerExpandVolume" => expand_volume,
            "ControllerGetVolume" => get_volume,
        }
        "Node" {
            "NodeStageVolume" => stage_volume,
            "NodeUnstageVolume" => unstage_volume,
            "NodePublishVolume" => publish_volume,
            "NodeUnpublishVolume" => unpublish_volume,
            "NodeGetVolumeStats" => volume_stats,
            "NodeExpandVolume" => node_expand_volume,
            "NodeGetCapabilities" => node_capabilities,
            "NodeGetInfo" => node_info,
        }
    )
}

/// Answers calls on `listener` until the process ends.
pub async fn serve(driver: Arc<Driver>, listener: UnixListener) -> std::io::Result<Infallible> {
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(serve_connection(Arc::clone(&driver), stream));
    }
}

async fn serve_connection(driver: Arc<Driver>, stream: UnixStream) {
    let service = service_fn(move |request| {
        let driver = Arc::clone(&driver);
        async move { Ok::<_, Infallible>(answer(driver, request).await) }
    });
    let mut builder = http2::Builder::new(TokioExecutor::new());
    let connection = builder.timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!("a connection failed: {error}");
    }
}
