// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Examples and files of every subcommand, for `--help` and the manual pages.

/// The purpose of an example, and its command line.
pub type Example = (&'static str, &'static str);

/// The examples of a subcommand, by its words ("instance create"); the empty name is the program,
/// "json" is loopengine-json(7).
pub fn of(command: &str) -> &'static [Example] {
    match command {
        "" => &[
            ("Start the daemon.", "loopengine serve"),
            (
                "Create an image, attach it, make a file system and mount it.",
                "loopengine create disk.img --size 10G && dev=$(loopengine attach disk.img) && mkfs.ext4 $dev && mount $dev /mnt",
            ),
            ("Unmount the file system and detach the device.", "umount /mnt && loopengine detach $dev"),
            (
                "Run a command with private loop devices, as any user.",
                "loopengine run -- losetup -f --show disk.img",
            ),
        ],
        "serve" => &[
            ("Serve with the default configuration.", "loopengine serve"),
            (
                "Run a second, independent daemon.",
                "loopengine serve --run-dir /run/loopengine-test --config test.toml",
            ),
            ("Reload the configuration of the service.", "systemctl reload loopengine"),
            ("Upgrade under mounted devices, after replacing the program.", "systemctl restart loopengine"),
        ],
        "instance" => &[
            ("List the instances.", "loopengine instance list"),
            (
                "Create an instance and attach an image to it.",
                "loopengine instance create build && loopengine attach --instance build disk.img",
            ),
        ],
        "instance create" => &[
            (
                "Create an instance with at most 16 devices, on two CPUs.",
                "loopengine instance create build --max 16 --cpus 2-3",
            ),
            ("Create an instance with one worker thread.", "loopengine instance create backup --workers 1"),
        ],
        "instance list" => &[
            ("List the instances as a table.", "loopengine instance list"),
            ("Print the names of the instances.", "loopengine instance list --json | jq -r '.[].name'"),
        ],
        "instance remove" => &[
            ("Remove an instance that has no devices.", "loopengine instance remove build"),
            ("Remove an instance and detach its devices.", "loopengine instance remove --force build"),
        ],
        "instance mount" => &[
            ("Mount a pool of four devices.", "mkdir dev && loopengine instance mount --max 4 dev"),
            (
                "Mount a pool for containers.",
                "mkdir /srv/ci && loopengine instance mount --container --name ci --max 4 /srv/ci",
            ),
            ("Mount a pool with mount(8), after 'loopengine install'.", "mount -t loop loop dev -o max=4"),
            ("End a pool.", "umount dev"),
        ],
        "instance open" => &[
            (
                "List the directory of a new pool.",
                "loopengine instance open -- sh -c 'ls /proc/self/fd/$LOOPENGINE_POOL_FD/'",
            ),
            ("Open a pool of two devices for a shell.", "loopengine instance open --max 2 -- bash"),
        ],
        "podman-setup" => &[
            (
                "Run a container with four loop devices, from which it can mount ext4.",
                "podman run -it --rm $(loopengine podman-setup ci --max 4 --mount ext4) IMAGE",
            ),
            ("Remove the pool.", "loopengine podman-setup ci --remove"),
        ],
        "install" => &[
            ("Install and start the daemon.", "loopengine install && systemctl enable --now loopengine"),
            ("Stage the files of a package.", "DESTDIR=$PWD/root loopengine install --prefix /usr"),
            ("Remove the installed files.", "loopengine install --uninstall"),
        ],
        "attach" => &[
            ("Attach an image and print its device.", "loopengine attach disk.img"),
            (
                "Attach a partition that starts at 1 MiB, read-only.",
                "loopengine attach disk.img --read-only --offset 1M",
            ),
            (
                "Check a file system, and detach the device afterwards.",
                "loopengine attach disk.img --run fsck -n",
            ),
            (
                "Place the device path in the middle of a command.",
                "loopengine attach disk.img --run dd if={} of=copy.img bs=1M",
            ),
        ],
        "create" => &[
            ("Create a sparse image.", "loopengine create disk.img --size 10G"),
            (
                "Create an image with all blocks allocated.",
                "loopengine create disk.img --size 10G --preallocate",
            ),
        ],
        "detach" => &[
            ("Detach one device.", "loopengine detach /run/loopengine/default/loop0"),
            ("Detach the device of an image.", "loopengine detach disk.img"),
            ("Detach all devices of an instance.", "loopengine detach --all --instance build"),
        ],
        "resize" => &[
            (
                "Grow an image, its device and its file system.",
                "loopengine resize loop0 --size 20G && resize2fs /run/loopengine/default/loop0",
            ),
            (
                "Grow the device after the image has grown.",
                "truncate -s 20G disk.img && loopengine resize loop0",
            ),
            ("Shrink a device whose file system is smaller.", "loopengine resize loop0 --size 5G --shrink"),
        ],
        "recover" => &[
            (
                "Recover a device whose image was moved while the daemon did not run.",
                "loopengine recover loop0 --image /srv/images/disk.img",
            ),
            (
                "Recover a device whose recorded offset is unknown.",
                "loopengine recover build/loop3 --image disk.img --offset 1M",
            ),
        ],
        "list" => &[
            ("List the devices of instances.", "loopengine list"),
            ("Print the images of all devices.", "loopengine list --json | jq -r '.[].image'"),
            ("List all devices, pools and their users.", "loopengine list --all"),
        ],
        "find" => &[
            ("List devices, mount points and processes of an image.", "loopengine find disk.img"),
            ("Test whether an image has a device.", "loopengine find disk.img && echo attached"),
        ],
        "stats" => &[
            ("Print counts of all devices.", "loopengine stats"),
            ("Print rates of one device every second.", "loopengine stats loop0 --watch"),
            (
                "Print ten readings of an instance as JSON.",
                "loopengine stats --instance build --watch --count 10 --json",
            ),
        ],
        "top" => &[
            ("Show the I/O of all devices, the busiest first.", "loopengine top"),
            ("Show the devices of user anna that have I/O.", "loopengine top -i --filter anna"),
            (
                "Log three tables, one a minute, by latency.",
                "loopengine top -b -d 60 -n 3 -o avg_ms >> io.log",
            ),
            (
                "Print busy devices every five seconds.",
                "loopengine top --json -d 5 | jq -r '.devices[] | select(.rates.utilisationPercent > 80) | .name'",
            ),
        ],
        "metrics" => &[
            ("Print all metrics.", "loopengine metrics"),
            ("Serve them to a Prometheus on this machine.", "loopengine metrics --listen 127.0.0.1:9753"),
        ],
        "run" => &[
            ("Start a shell with private loop devices.", "loopengine run -- bash"),
            ("Build an image as a plain user.", "loopengine run --max 2 -- ./build-image.sh disk.img"),
            (
                "Let the kernel mount ext4, if the administrator allows it.",
                "loopengine run --mount ext4 -- sh -c 'mount -o loop disk.img mnt && ls mnt'",
            ),
        ],
        "mount" => &[
            (
                "Mount an image, list it and unmount it.",
                "loopengine mount disk.img mnt && ls mnt && loopengine umount mnt",
            ),
            (
                "Mount the second partition read-only.",
                "loopengine mount --partition 2 --read-only disk.img mnt",
            ),
            ("Mount all partitions below a directory.", "loopengine mount --all disk.img mnt"),
            ("Select the FUSE driver.", "loopengine mount --fuse erofs=erofsfuse system.img mnt"),
        ],
        "umount" => &[
            ("Unmount a directory.", "loopengine umount mnt"),
            ("Unmount an image, wherever it is mounted.", "loopengine umount disk.img"),
            ("Unmount all partitions that 'mount --all' mounted.", "loopengine umount --all mnt"),
        ],
        "losetup" => &[
            (
                "Create a pool and bind an image in it, with partitions.",
                "loopengine instance mount /mnt/loops && loopengine losetup -fP --show disk.img",
            ),
            ("List the bound devices of a pool.", "loopengine losetup --pool build --list"),
            ("Unbind a device.", "loopengine losetup --pool build --detach loop0"),
        ],
        "limit" => &[
            ("List limits and usage of all users.", "loopengine limit"),
            ("Limit user 1000 to 200 devices until the daemon ends.", "loopengine limit 1000 200"),
            ("Restore the limit in the configuration.", "loopengine limit 1000 default"),
            (
                "Slow a device down while it is in use.",
                "loopengine limit --device build/loop0 --bandwidth 50M",
            ),
        ],
        "csi" => &[
            (
                "Serve the kubelet of this node.",
                "loopengine csi --node $HOSTNAME --endpoint unix:///run/loopengine-csi.sock",
            ),
            ("List the options of the driver.", "loopengine csi -- --help"),
        ],
        "features" => &[
            ("Show what the kernel supports.", "loopengine features"),
            ("Print the supported I/O modes.", "loopengine features --json | jq -r '.ioModes[]'"),
        ],
        "doctor" => &[
            ("Check this machine, and a directory for images.", "loopengine doctor /var/lib/images"),
            ("Find out why 'loopengine run' fails.", "loopengine doctor --for run"),
        ],
        "oci" => &[
            (
                "Give a container four private loop devices.",
                "loopengine instance mount --container --name ci --max 4 /srv/ci && loopengine oci print-config --pool ci config.json",
            ),
            ("Describe the devices of an instance to CDI.", "loopengine oci print-cdi --instance build"),
        ],
        "oci print-config" => &[
            (
                "Give the bundle in this directory the devices of the pool ci.",
                "runc spec && loopengine oci print-config --pool ci config.json > new && mv new config.json",
            ),
            (
                "Protect intercepted calls from non-fatal signals.",
                "loopengine oci print-config --pool ci --wait-killable config.json",
            ),
        ],
        "oci print-profile" => &[
            (
                "Add loop devices to the profile of a runtime.",
                "loopengine oci print-profile --base default.json > loop.json",
            ),
            (
                "Let the kernel mount for the containers of a pool.",
                "loopengine oci print-profile --base default.json --metadata pool=ci --mount > loop.json",
            ),
        ],
        "oci print-cdi" => &[
            (
                "Describe all devices of an instance, for '--device loopengine.io/loop=build'.",
                "loopengine oci print-cdi -i build > /var/run/cdi/build.json",
            ),
            ("Describe a pool for containers.", "loopengine oci print-cdi --pool ci > /var/run/cdi/ci.json"),
        ],
        "oci hook" => &[
            (
                "Run the hook as a runtime does.",
                "echo '{\"bundle\":\"/srv/c1\"}' | loopengine oci hook --devices 4",
            ),
            (
                "Keep partition names of the pool ci in the /dev of the container.",
                "echo '{\"bundle\":\"/srv/c1\"}' | loopengine oci hook --devices 4 --pool ci",
            ),
        ],
        "json" => &[
            (
                "Print path and state of each device.",
                "loopengine list --json | jq -r '.[] | .path + \" \" + .state'",
            ),
            ("Print the names of all private pools.", "loopengine list --all --json | jq -r '.pools[].name'"),
            (
                "Print the bytes read per device.",
                "loopengine stats --json | jq -r '.[] | [.path, .readBytes] | @tsv'",
            ),
        ],
        _ => &[],
    }
}

/// Files that a subcommand uses.
#[cfg(test)]
pub fn files(command: &str) -> &'static [(&'static str, &'static str)] {
    const SOCKET: (&str, &str) = (
        "/run/loopengine/control",
        "The control socket of the daemon (varlink interface io.loopengine). Only for root.",
    );
    const NAMES: (&str, &str) = (
        "/run/loopengine/NAME/loopN",
        "Device N of the instance NAME: a link to /dev/ublkbM or /dev/loopM, or a file (FUSE).",
    );
    const PRIVATE: (&str, &str) = (
        "/run/loopengine/private",
        "The socket for private pools (varlink interface io.loopengine.Private). For all users.",
    );
    match command {
        "" | "serve" => &[
            ("/etc/loopengine.toml", "The configuration; see loopengine-serve(1)."),
            SOCKET,
            PRIVATE,
            NAMES,
            ("/run/loopengine/lock", "The daemon that owns the directory locks this file."),
        ],
        "create" | "features" | "oci" | "oci hook" => &[],
        "oci print-profile" | "oci print-config" => {
            &[("/run/loopengine/oci", "The socket for seccomp listeners of container runtimes.")]
        }
        "instance mount" | "instance open" | "run" | "mount" | "umount" | "losetup" | "limit" => &[PRIVATE],
        "install" => &[
            ("PREFIX/share/loopengine/installed", "The record of installed files and their checksums."),
            (
                "PREFIX/share/loopengine/fuse.conf",
                "A drop-in for the unit that makes the files of 'serve --backend fuse' visible.",
            ),
            (
                "PREFIX/share/loopengine/apparmor",
                "An AppArmor profile that lets plain users use pools on Ubuntu. Active on AppArmor 4 and later.",
            ),
            ("PREFIX/share/loopengine/varlink", "The varlink interfaces of the daemon."),
        ],
        "csi" => &[SOCKET, ("/var/lib/loopengine/csi", "Images of volumes, and their records.")],
        "doctor" => &[SOCKET, PRIVATE],
        "list" | "find" | "top" => &[SOCKET, PRIVATE, NAMES],
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The calls of this program in an example.
    fn calls(line: &str) -> Vec<Vec<&str>> {
        let parts = line.split("&&").flat_map(|part| part.split('|')).map(str::trim);
        let own = parts.filter(|part| part.starts_with("loopengine "));
        own.map(|part| part.split('>').next().unwrap_or_default().split_whitespace().collect()).collect()
    }

    fn check(command: &clap::Command, path: &str) {
        let examples = of(path);
        assert!((2..=4).contains(&examples.len()), "{path}: {} examples", examples.len());
        for (_, line) in examples {
            for words in calls(line) {
                let parsed = crate::cli::command().try_get_matches_from(&words);
                assert!(parsed.is_ok(), "{line}: {parsed:?}");
            }
        }
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
            check(sub, format!("{path} {}", sub.get_name()).trim_start());
        }
    }

    #[test]
    fn every_command_has_valid_examples() {
        check(&crate::cli::command(), "");
    }
}
