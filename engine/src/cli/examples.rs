//! Examples and files of every subcommand: for `--help` and for the manual pages.

/// What an example does, and the line to type.
pub(super) type Example = (&'static str, &'static str);

/// The examples of a subcommand, by its words ("instance create"); the empty name is the program.
pub(super) fn of(command: &str) -> &'static [Example] {
    match command {
        "" => &[
            ("Start the daemon.", "loopengine serve"),
            (
                "Make an image, serve it, make a file system, mount it.",
                "loopengine create disk.img --size 10G && dev=$(loopengine attach disk.img) && mkfs.ext4 $dev && mount $dev /mnt",
            ),
            ("End it all.", "umount /mnt && loopengine detach $dev"),
        ],
        "serve" => &[
            ("Serve, with the default configuration.", "loopengine serve"),
            (
                "Serve privately, apart from another daemon.",
                "loopengine serve --run-dir /run/private --config private.toml",
            ),
            ("Reread the configuration of the service.", "systemctl reload loopengine"),
            ("Upgrade under mounted devices, once the program is replaced.", "systemctl restart loopengine"),
        ],
        "instance" => &[("See which instances there are.", "loopengine instance list")],
        "instance create" => &[(
            "An instance with at most 16 devices, on two CPUs.",
            "loopengine instance create build --max 16 --cpus 2-3",
        )],
        "instance list" => &[("For programs.", "loopengine instance list --json")],
        "instance remove" => {
            &[("Remove an instance that has no devices any more.", "loopengine instance remove build")]
        }
        "instance mount" => &[
            ("A pool of four devices.", "mkdir dev && loopengine instance mount --max 4 dev"),
            (
                "One for a container.",
                "mkdir /srv/ci && loopengine instance mount --container --name ci --max 4 /srv/ci",
            ),
            (
                "The same as the first by mount(8), after 'loopengine install'.",
                "mount -t loop loop dev -o max=4",
            ),
        ],
        "instance open" => &[(
            "What is in the directory of a new pool.",
            "loopengine instance open -- sh -c 'ls /proc/self/fd/$LOOPENGINE_POOL_FD/'",
        )],
        "podman-setup" => &[
            (
                "A container with four loop devices, from which it may mount ext4.",
                "podman run -it --rm $(loopengine podman-setup ci --max 4 --mount ext4) IMAGE",
            ),
            ("Take the pool away again.", "loopengine podman-setup ci --remove"),
        ],
        "install" => &[
            ("Install, and start the daemon.", "loopengine install && systemctl enable --now loopengine"),
            ("For a package.", "DESTDIR=$PWD/root loopengine install --prefix /usr"),
            ("Take it all away again.", "loopengine install --uninstall"),
        ],
        "attach" => &[
            ("Serve an image; the device path is printed.", "loopengine attach disk.img"),
            (
                "The second partition of an image that starts at 1 MiB, read-only.",
                "loopengine attach disk.img --read-only --offset 1M",
            ),
            ("Check a file system, and leave nothing behind.", "loopengine attach disk.img --run fsck -n"),
            (
                "Where the device is not the last word.",
                "loopengine attach disk.img --run dd if={} of=copy.img bs=1M",
            ),
        ],
        "create" => &[
            ("A sparse image.", "loopengine create disk.img --size 10G"),
            ("With all its space reserved.", "loopengine create disk.img --size 10G --preallocate"),
        ],
        "detach" => &[
            ("One device.", "loopengine detach /run/loopengine/default/loop0"),
            ("By its image.", "loopengine detach disk.img"),
            ("Every device of an instance.", "loopengine detach --all --instance build"),
        ],
        "resize" => &[
            (
                "Grow an image, its device and its file system.",
                "loopengine resize loop0 --size 20G && resize2fs /run/loopengine/default/loop0",
            ),
            ("The image was enlarged already.", "truncate -s 20G disk.img && loopengine resize loop0"),
        ],
        "recover" => &[(
            "The image was moved while the daemon was not running.",
            "loopengine recover loop0 --image /srv/images/disk.img",
        )],
        "list" => &[
            ("All devices.", "loopengine list"),
            ("Their images, for a program.", "loopengine list --json | jq -r '.[].image'"),
            ("Everything, with its users.", "loopengine list --all"),
        ],
        "find" => &[("Where an image is attached, mounted and open.", "loopengine find disk.img")],
        "stats" => &[
            ("Counts of all devices.", "loopengine stats"),
            ("Rates of one, every second.", "loopengine stats loop0 --watch"),
        ],
        "run" => &[
            ("A shell in which losetup and mount have loop devices of their own.", "loopengine run -- bash"),
            ("Build an image without being root.", "loopengine run --max 2 -- ./build-image.sh disk.img"),
        ],
        "mount" => &[
            (
                "See what is in an image, and unmount it.",
                "loopengine mount disk.img mnt && ls mnt && loopengine umount mnt",
            ),
            (
                "Its second partition, without writing to it.",
                "loopengine mount --partition 2 --read-only disk.img mnt",
            ),
            ("With another program of FUSE.", "loopengine mount --fuse erofs=erofsfuse system.img mnt"),
        ],
        "umount" => &[
            ("By the directory.", "loopengine umount mnt"),
            ("By the image, wherever it is mounted.", "loopengine umount disk.img"),
        ],
        "losetup" => &[
            (
                "A pool, and a device with partitions in it.",
                "loopengine instance mount /mnt/loops && loopengine losetup -fP --show disk.img",
            ),
            ("What a pool's devices are bound to.", "loopengine losetup --pool build --list"),
        ],
        "limit" => &[
            ("What users may have, and have.", "loopengine limit"),
            ("The user ann may have 200 devices, until the daemon ends.", "loopengine limit ann 200"),
            ("As the configuration has it again.", "loopengine limit ann default"),
        ],
        "features" => &[("What this kernel can do.", "loopengine features")],
        "doctor" => &[
            ("Check this machine, and a directory for images.", "loopengine doctor /var/lib/images"),
            ("Why 'loopengine run' does not work.", "loopengine doctor --for run"),
        ],
        "oci" => &[(
            "A container with four loop devices of its own.",
            "loopengine instance mount --container --name ci --max 4 /srv/ci && loopengine oci print-config --pool ci config.json",
        )],
        "oci print-config" => &[(
            "The bundle in this directory gets the devices of the pool ci.",
            "runc spec && loopengine oci print-config --pool ci config.json > new && mv new config.json",
        )],
        "oci print-profile" => &[(
            "A runtime's own profile, with loop devices.",
            "loopengine oci print-profile --base default.json > loop.json",
        )],
        "oci print-cdi" => &[(
            "All devices of an instance, for '--device loopengine.io/loop=build'.",
            "loopengine oci print-cdi -i build > /var/run/cdi/build.json",
        )],
        "oci hook" => &[(
            "By hand, as a runtime would.",
            "echo '{\"bundle\":\"/srv/c1\"}' | loopengine oci hook --devices 4",
        )],
        _ => &[],
    }
}

/// Files that a subcommand uses.
pub(super) fn files(command: &str) -> &'static [(&'static str, &'static str)] {
    const SOCKET: (&str, &str) = (
        "/run/loopengine/control",
        "The daemon's control socket (varlink, interface io.loopengine). Root only.",
    );
    const NAMES: (&str, &str) = (
        "/run/loopengine/NAME/loopN",
        "Device number N of the instance NAME: a link to /dev/ublkbM, or a file (FUSE).",
    );
    const PRIVATE: (&str, &str) = (
        "/run/loopengine/private",
        "The daemon's socket for private pools (varlink, interface io.loopengine.Private). For everybody.",
    );
    match command {
        "" | "serve" => &[
            ("/etc/loopengine.toml", "Configuration; see loopengine-serve(1)."),
            SOCKET,
            PRIVATE,
            NAMES,
            ("/run/loopengine/lock", "Held by the daemon that owns the directory."),
        ],
        "create" | "features" | "oci" | "oci hook" => &[],
        "oci print-profile" | "oci print-config" => {
            &[("/run/loopengine/oci", "Where runtimes send listeners.")]
        }
        "instance mount" | "instance open" | "run" | "mount" | "umount" | "losetup" | "limit" => &[PRIVATE],
        "install" => &[
            ("PREFIX/share/loopengine/installed", "What was placed, and what it was."),
            (
                "PREFIX/share/loopengine/fuse.conf",
                "A drop-in for the unit, so that everybody sees the files of 'serve --frontend fuse'.",
            ),
        ],
        "doctor" => &[SOCKET, PRIVATE],
        "list" | "find" => &[SOCKET, PRIVATE, NAMES],
        _ => &[SOCKET, NAMES],
    }
}

/// Adds the examples to the help of every subcommand.
pub(super) fn add(command: clap::Command) -> clap::Command {
    add_at(command, "")
}

fn add_at(mut command: clap::Command, path: &str) -> clap::Command {
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    for name in names {
        let path = format!("{path} {name}").trim().to_owned();
        command = command.mut_subcommand(&name, |sub| add_at(sub, &path));
    }
    let examples = of(path);
    if examples.is_empty() {
        return command;
    }
    let lines = examples.iter().map(|(does, line)| format!("  {does}\n      {line}"));
    let text = format!("Examples:\n{}", lines.collect::<Vec<_>>().join("\n"));
    command.after_long_help(text)
}
