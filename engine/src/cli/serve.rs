//! `loopengine serve`: the daemon, from the checks before it starts to its end.

use std::io::{self, IsTerminal};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use sd_notify::NotifyState;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::accounts;
use crate::config::{Choice, Config};
use crate::control::{self, EngineApi, rundir::RunDir, server};
use crate::error::{Error, Kind, Result};
use crate::frontend::{fuse, ublk};
use crate::instance::spec::FrontendKind;
use crate::instance::{Engine, Tuning};
use crate::kernel_mounts::KernelMounts;
use crate::kernels::{self, BLOCK_DEVICES};
use crate::loops::Pools;
use crate::private::{Registry, Served};
use crate::received;
use crate::sandbox;
use crate::sys::{self, mntns};

use super::configured::Devices;
use super::reload::Followers;
use super::{number, reload, watched};

/// Run the daemon in the foreground.
///
/// Serves devices until SIGTERM or SIGINT; a second one ends the daemon at once. Block devices survive
/// the end of the daemon, however it ends: mounted or not, they keep names and content, their I/O waits,
/// and the next daemon with the same run directory recovers them. So a restart upgrades the program under
/// mounted file systems. 'loopengine detach --all' before a stop detaches them; --detach-all has every stop
/// do so. Private pools end with the daemon.
///
/// SIGHUP rereads the configuration: new instances are created, limits changed, devices of '[[device]]'
/// attached that are not there; what else changed is logged, and done at the next start. Logs to standard
/// error; RUST_LOG sets what. Needs root, and the ublk driver or FUSE.
///
/// Without the ublk driver devices are files of the same names, of a FUSE file system: they can be
/// copied, partitioned, given to a virtual machine, or mounted with 'mount -o loop'. Their size is
/// fixed: to open one with O_TRUNC (cp, dd without conv=notrunc) overwrites it with zeroes. A write past
/// the end fails with ENOSPC: directly at once, through the page cache at fsync, close or a later write.
/// 'qemu-img convert' needs '-n' unless the new image has the file's size. They end with the daemon, and
/// cannot be recovered. The unit's hardening hides them from everybody but the daemon; with the drop-in
/// PREFIX/share/loopengine/fuse.conf in /etc/systemd/system/loopengine.service.d they are seen.
///
/// With the unit loopengine.socket enabled, systemd makes the sockets and starts the daemon when one is first
/// used. They stay over a restart: who connects meanwhile waits. Any service manager can pass them in
/// LISTEN_FDS; they must lie in the run directory, with the usual names.
///
/// '[[device]]' in the configuration names images that are attached at the start. The daemon is ready when
/// they are, and does not wait long for a file system that does not answer. An image that cannot be
/// attached is an error in the log; the others are attached.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// Configuration file [default: /etc/loopengine.toml, if it exists].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// What devices are: block devices (ublk), files (fuse), or block devices if the ublk driver is
    /// there and files otherwise (auto) [default: auto].
    #[arg(long, value_name = "auto|ublk|fuse", hide_possible_values = true)]
    frontend: Option<Choice>,

    /// Commit a request in one chain with its read or write, where that is possible.
    #[arg(long, value_name = "on|off", value_parser = parse_switch)]
    linked_commit: Option<bool>,

    /// Microseconds for which a worker looks for more after a lone request before it sleeps; less often
    /// where that is in vain. 0: never.
    #[arg(long, value_name = "N", value_parser = number::within(0..=1_000_000_u32))]
    poll_us: Option<u32>,

    /// Give devices names in /dev/loopengine as well, such as /dev/loopengine/default/loop0, for programs that
    /// look only below /dev.
    #[arg(long)]
    dev_links: bool,

    /// Detach all devices when the daemon is stopped, also those in use: their users get I/O errors.
    #[arg(long)]
    detach_all: bool,

    /// Keep all privileges, for debugging: otherwise the daemon gives up capabilities and system calls
    /// that it does not need.
    #[arg(long)]
    no_sandbox: bool,
}

/// What is served where: `control`, and `private`.
struct Services {
    listeners: [StdListener; 3],
    backend: Arc<dyn EngineApi>,
    registry: Arc<Registry>,
    engine: Weak<Engine>,
}

/// How the daemon was asked to end.
enum End {
    /// By one signal.
    InOrder,
    /// By a second one.
    AtOnce,
}

fn parse_switch(word: &str) -> std::result::Result<bool, String> {
    match word {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("'{word}' is neither 'on' nor 'off'")),
    }
}

impl Args {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let config = self.load()?;
        log();
        check_root()?;
        let (frontend, line) = choose(config.frontend.unwrap_or_default())?;
        let mut run_dir = RunDir::take(run_dir)?;
        let sockets = sys::activation::take_sockets()
            .map_err(|error| Error::os(error, "cannot take the sockets of the service manager"))?;
        run_dir.adopt(sockets)?;
        tracing::info!("{line}");
        for note in fuse::clear_stale(run_dir.path()) {
            tracing::info!("{note}");
        }
        match frontend {
            // Before any thread is started, so that all are in it.
            FrontendKind::Ublk => own_mounts()?,
            FrontendKind::Fuse => note_mount_namespace(),
        }
        // While programs may still be started. Without it all else works.
        let kernel = match frontend {
            FrontendKind::Ublk => {
                let started = KernelMounts::start().map(Arc::new);
                started.inspect_err(|error| tracing::warn!("nothing is mounted by the kernel: {error}")).ok()
            }
            FrontendKind::Fuse => None,
        };
        if self.no_sandbox {
            tracing::warn!("the daemon keeps all its privileges (--no-sandbox)");
        } else {
            sandbox::enter();
        }
        let engine = Arc::new(Engine::start(config.engine(run_dir.path().to_owned(), frontend))?);
        let served = self.serve(&config, frontend, &run_dir, &engine, kernel);
        run_dir.unbind();
        let ended = match served {
            Ok(End::AtOnce) => Err(impatient()),
            Ok(End::InOrder) => stop(&engine, self.detach_all),
            Err(error) => stop(&engine, self.detach_all).and(Err(error)),
        };
        // Dropped, it would stop devices that wait for the next daemon.
        std::mem::forget(engine);
        ended
    }

    fn load(&self) -> Result<Config> {
        let mut config = Config::load(self.config.as_deref())?;
        config.frontend = self.frontend.or(config.frontend);
        config.dev_links |= self.dev_links;
        let tuning = &mut config.tuning;
        tuning.linked_commit = self.linked_commit.or(tuning.linked_commit);
        tuning.poll_us = self.poll_us.or(tuning.poll_us);
        Ok(config)
    }

    fn serve(
        &self,
        config: &Config,
        frontend: FrontendKind,
        run_dir: &RunDir,
        engine: &Arc<Engine>,
        kernel: Option<Arc<KernelMounts>>,
    ) -> Result<End> {
        for note in reload::create_all(config, &**engine)? {
            tracing::info!("{note}");
        }
        let listeners = [run_dir.bind()?, run_dir.bind_private()?, run_dir.bind_oci()?];
        let source = Served { pools: Pools::new(engine), kernel, for_all: config.kernel_mounts() };
        accounts::refresh();
        let registry = Arc::new(Registry::start(source, config.private())?);
        reload::limit_users(config, &registry);
        let runtime = control::runtime::make()?;
        let backend: Arc<dyn EngineApi> = Arc::clone(engine) as _;
        let Tuning { linked_commit, poll_us } = config.tuning();
        tracing::info!(linked_commit, poll_us, "serving {}", run_dir.path().display());
        let services = Services {
            listeners,
            backend,
            registry: Arc::clone(&registry),
            // Whoever counts those that use the engine still must not count this.
            engine: Arc::downgrade(engine),
        };
        let ended = runtime.block_on(self.until_stopped(services, config.clone(), frontend));
        // They end with the daemon, whatever instances do.
        registry.shutdown();
        drop(registry);
        received::end();
        if Arc::strong_count(engine) > 1 {
            // Calls are still being handled; the drop of the runtime would wait for them.
            std::mem::forget(runtime);
        }
        ended
    }

    /// Serves until a signal says stop, then lets calls end.
    async fn until_stopped(
        &self,
        services: Services,
        mut config: Config,
        frontend: FrontendKind,
    ) -> Result<End> {
        let cannot = |error: io::Error| Error::os(error, "cannot start the control service");
        let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
        let mut hangup = signal(SignalKind::hangup()).map_err(cannot)?;
        let Services { listeners: [control, private, oci], backend, registry, engine } = services;
        let control = UnixListener::from_std(control).map_err(cannot)?;
        let private = UnixListener::from_std(private).map_err(cannot)?;
        let oci = UnixListener::from_std(oci).map_err(cannot)?;
        let (stop, stopping) = watch::channel(false);
        let all = (
            server::serve(control, Arc::clone(&backend), stopping.clone()),
            server::serve_private(private, Arc::clone(&registry), stopping.clone()),
            server::serve_oci(oci, Arc::clone(&registry), stopping),
        );
        let devices = Devices::new(Arc::clone(&backend));
        let followers = Followers { backend, registry, devices };
        let mut served = tokio::task::spawn_local(async { tokio::join!(all.0, all.1, all.2) });
        let starting = reload::start(config.clone(), followers.clone());
        // A configuration is applied by one task at a time.
        let mut following = Some(tokio::task::spawn_local(starting));
        let followed = (frontend == FrontendKind::Ublk).then(|| {
            let partitions = tokio::task::spawn_local(watched::update_nodes(engine));
            [tokio::task::spawn_local(watched::leave_mounts()), partitions]
        });
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                ended = &mut served => {
                    let message = format!("the control service ended: {ended:?}");
                    return Err(Error::new(Kind::Internal, message));
                }
                _ = hangup.recv(), if following.is_none() => {
                    let args = self.clone();
                    let load = move || args.load();
                    let reload = reload::reload(load, config.clone(), followers.clone());
                    following = Some(tokio::task::spawn_local(reload));
                }
                Some(now) = async { Some(following.as_mut()?.await) } => {
                    following = None;
                    config = now.unwrap_or(config);
                }
            }
        }
        if let Some(following) = following {
            following.abort();
        }
        tracing::info!("stopping");
        tell(&[NotifyState::Stopping]);
        followed.iter().flatten().for_each(tokio::task::JoinHandle::abort);
        let _ = stop.send(true);
        tokio::select! {
            _ = &mut served => Ok(End::InOrder),
            () = again(&mut terminate, &mut interrupt) => Ok(End::AtOnce),
        }
    }
}

async fn again(terminate: &mut tokio::signal::unix::Signal, interrupt: &mut tokio::signal::unix::Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

fn impatient() -> Error {
    Error::new(Kind::Io, "ended by a second signal").hint("start the daemon again to recover its devices")
}

/// Leaves all devices to the next daemon, or detaches them; a signal ends the wait for that.
fn stop(engine: &Arc<Engine>, detach_all: bool) -> Result<()> {
    if Arc::strong_count(engine) > 1 {
        tracing::warn!("calls are still being handled, and end with the daemon");
    }
    let engine = Arc::clone(engine);
    let runtime = super::daemon::runtime()?;
    let stopped = runtime.block_on(async {
        let cannot = |error| Error::os(error, "cannot handle signals");
        let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
        tokio::select! {
            done = tokio::task::spawn_blocking(move || engine.shutdown(detach_all)) => {
                done.map_err(|error| Error::new(Kind::Internal, format!("the stop failed: {error}")))
            }
            () = again(&mut terminate, &mut interrupt) => Err(impatient()),
        }
    });
    // Does not wait for a shutdown that a second signal has given up.
    runtime.shutdown_background();
    if stopped.is_ok() {
        tracing::info!("stopped");
    }
    stopped
}

fn check_root() -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::new(Kind::Denied, "only root can serve block devices")
        .hint("run it with sudo, or as the systemd service loopengine"))
}

/// Takes what this machine has. The line for the log says what that is.
fn choose(choice: Choice) -> Result<(FrontendKind, String)> {
    let ublk = Path::new(ublk::CONTROL_NODE).exists();
    match choice {
        Choice::Auto if !ublk && fuse::check().is_ok() => {
            let (missing, hint) = (ublk::CONTROL_NODE, driver_hint());
            let line =
                format!("devices are files (FUSE), for {missing} is missing; to have block devices, {hint}");
            Ok((FrontendKind::Fuse, line))
        }
        Choice::Auto | Choice::Ublk if !ublk => {
            let message = format!("the ublk driver is not there ({} is missing)", ublk::CONTROL_NODE);
            Err(Error::new(Kind::Unavailable, message).hint(driver_hint()))
        }
        Choice::Auto | Choice::Ublk => {
            Ok((FrontendKind::Ublk, "devices are block devices (ublk)".to_owned()))
        }
        Choice::Fuse => {
            fuse::check()?;
            Ok((FrontendKind::Fuse, "devices are files (FUSE)".to_owned()))
        }
    }
}

/// Files are seen in the mount namespace of the daemon only, and in those that get its mounts.
fn note_mount_namespace() {
    let of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    if let (Some(own), Some(first)) = (of("self"), of("1"))
        && own != first
    {
        tracing::warn!(
            "this process has a mount namespace of its own, so others may not see its files; under systemd, \
             {}",
            SYSTEMD_HINT
        );
    }
}

/// What keeps a service's mounts from the rest of the system: what share/systemd/fuse.conf sets.
const SYSTEMD_HINT: &str = "copy PREFIX/share/loopengine/fuse.conf to /etc/systemd/system/loopengine.service.d, \
     or set PrivateMounts=, ProtectHostname=, ProtectKernelModules=, ProtectKernelLogs= and \
     ProtectControlGroups= to no with 'systemctl edit loopengine'";

/// What to do when the driver is missing.
pub(super) fn driver_hint() -> String {
    let release = kernels::release();
    let other = format!("use Linux {} or newer with CONFIG_BLK_DEV_UBLK", BLOCK_DEVICES.version());
    match module_exists(&release) {
        Some(true) => "run 'modprobe ublk_drv'".to_owned(),
        Some(false) => format!("kernel {release} has no module ublk_drv: {other}"),
        None => format!("run 'modprobe ublk_drv'; if kernel {release} has no such module, {other}"),
    }
}

/// Is the module among those installed for this kernel? None: which these are is not known here.
fn module_exists(release: &str) -> Option<bool> {
    let known = std::fs::read_to_string(format!("/lib/modules/{release}/modules.dep")).ok()?;
    Some(known.lines().any(|line| {
        let path = line.split(':').next().unwrap_or_default();
        path.rsplit('/').next().unwrap_or_default().starts_with("ublk_drv.ko")
    }))
}

fn own_mounts() -> Result<()> {
    mntns::enter_own().map_err(|error| {
        Error::os(error, "cannot enter a mount namespace of its own")
            .hint("run the daemon with CAP_SYS_ADMIN, and not in a chroot")
    })?;
    watched::leave_own_disks();
    Ok(())
}

/// Tells the service manager, if there is one.
pub(super) fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        tracing::warn!("cannot notify the service manager: {error}");
    }
}

fn log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,fuser=error"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false);
    // The journal has its own clock.
    let set = if std::env::var_os("JOURNAL_STREAM").is_some() {
        log.without_time().try_init()
    } else {
        log.try_init()
    };
    drop(set);
}
