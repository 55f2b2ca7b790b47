# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_loopengine_global_optspecs
    string join \n run-dir= h/help V/version
end

function __fish_loopengine_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_loopengine_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_loopengine_using_subcommand
    set -l cmd (__fish_loopengine_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c loopengine -n "__fish_loopengine_needs_command" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_needs_command" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_needs_command" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "serve" -d 'Run the daemon in the foreground'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "instance" -d 'Create, list and remove instances'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "attach" -d 'Serve an image file or block device as a block device'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "create" -d 'Make an image file'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "detach" -d 'Take devices away'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "resize" -d 'Adapt a device to the present size of its image, or give both another size'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "recover" -d 'Recover a device that is stuck, with an image that you name'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "list" -d 'List devices'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "find" -d 'Find the devices of an image'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "stats" -d 'Show figures of devices'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "run" -d 'Run a command with loop devices of its own'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "mount" -d 'Mount the file system in an image'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "umount" -d 'Unmount what \'loopengine mount\' has mounted'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "losetup" -d 'Set up and control the loop devices of a private pool, with the options of losetup(8)'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "limit" -d 'Show or change how many private loop devices users may have'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "features" -d 'Show what this kernel grants'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "doctor" -d 'Check what the daemon needs of this machine, or what you need for a purpose'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "install" -d 'Install this program on this machine'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "oci" -d 'Configure container runtimes'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -l config -d 'Configuration file [default: /etc/loopengine.toml, if it exists]' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -l frontend -d 'What devices are: block devices (ublk), files (fuse), or block devices if the ublk driver is there and files otherwise (auto) [default: auto]' -r -f -a "auto\t'Block devices where the ublk driver is there, else files'
ublk\t'Block devices'
fuse\t'Files, through FUSE'"
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -l linked-commit -d 'Commit a request in one chain with its read or write, where that is possible' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -l poll-us -d 'Microseconds for which a worker looks for more after a lone request before it sleeps; less often where that is in vain. 0: never' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -l detach-all -d 'Detach all devices when the daemon is stopped, also those in use: their users get I/O errors'
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -l no-sandbox -d 'Keep all privileges, for debugging: otherwise the daemon gives up capabilities and system calls that it does not need'
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove mount open help" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove mount open help" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove mount open help" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove mount open help" -f -a "create" -d 'Create an instance'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove mount open help" -f -a "list" -d 'List instances'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove mount open help" -f -a "remove" -d 'Remove an instance'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove mount open help" -f -a "mount" -d 'Mount a private pool of loop devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove mount open help" -f -a "open" -d 'Give a command a private pool of loop devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove mount open help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from create" -l max -d 'Devices that it may have' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from create" -l workers -d 'Worker threads; 0: one for each CPU that it may use, two at least' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from create" -l cpus -d 'CPUs that its workers may run on, as in \'0-3,8\' [default: all]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from create" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from create" -l json -d 'Print the instance as JSON; loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from create" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from create" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from list" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from list" -l json -d 'Print JSON; loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from list" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from remove" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from remove" -s f -l force -d 'Also if it has devices. Whoever uses them gets input/output errors'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from remove" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from remove" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from mount" -l name -d 'Its name [default: one that is free]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from mount" -l max -d 'Devices that it may have [default: 8, or as many as the user may still have]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from mount" -l uid -d 'User whom the nodes belong to, and whose limit they count for; only root may name another [default: the caller]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from mount" -l gid -d 'Group of the nodes; only root may name another [default: the caller\'s]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from mount" -l mode -d 'Permission bits of the nodes, octal [default: 0660]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from mount" -l mount -d 'File systems that the kernel mounts when mount(2) is called in a container for one of the devices, also without the capability that it takes: some of ext2, ext3, ext4, xfs, squashfs, erofs and vfat. Always nosuid and nodev, and while it is mounted nobody can write to the device' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from mount" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from mount" -l container -d 'For containers, one after the other: all devices are there at once, their device numbers stay, and the pool does when a container has gone, with its devices unbound. Only for root'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from mount" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from mount" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from open" -l name -d 'Its name [default: one that is free]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from open" -l max -d 'Devices that it may have [default: 8, or as many as the user may still have]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from open" -l uid -d 'User whom the nodes belong to, and whose limit they count for; only root may name another [default: the caller]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from open" -l gid -d 'Group of the nodes; only root may name another [default: the caller\'s]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from open" -l mode -d 'Permission bits of the nodes, octal [default: 0660]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from open" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from open" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from open" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from help" -f -a "create" -d 'Create an instance'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from help" -f -a "list" -d 'List instances'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from help" -f -a "remove" -d 'Remove an instance'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from help" -f -a "mount" -d 'Mount a private pool of loop devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from help" -f -a "open" -d 'Give a command a private pool of loop devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -s i -l instance -d 'Instance that gets the device' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -l offset -d 'First byte of the image that the device shows, with a unit as in 1M or 1MiB' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -l size-limit -d 'Bytes that the device shows at the most; 0: up to the end of the image' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -l block-size -d 'Logical block size: 512, 1024, 2048 or 4096 [default: the smallest that the image allows]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -l queues -d 'Queues of the device [default: one for each worker of the instance]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -l depth -d 'Requests in flight in each queue [default: 128]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -l path -d 'Force one way of moving data [default: the best that the kernel grants]' -r -f -a "copy\t''
auto\t''
batch\t''
fuse\t''"
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -l number -d 'Number of the device in its instance [default: the lowest that is free]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -l run -d 'Run a command with the device. Takes the rest of the line: \'{}\' in it is replaced by the path of the device, which is the last argument if there is no \'{}\'. The path is also in the environment variable LOOPENGINE_DEVICE' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -s r -l read-only -d 'Refuse writes. The image need not be writable'
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -s f -l force -d 'Attach the image although somebody else uses it: another device, a pool, a mount, swap, a loop device of the kernel. Two who write an image, or one file system that is mounted twice, destroy its contents; the log says who shares it'
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -l buffered -d 'Go through the page cache. For file systems that have no direct I/O'
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -l json -d 'Print the device as JSON; loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand create" -l size -d 'Its size: bytes, or a number with a unit: K, M, G, T (or KiB, MiB, …) are powers of 1024, KB, MB, … of 1000' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand create" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand create" -l preallocate -d 'Reserve all space now. Writes then never fail for want of space, and are faster'
complete -c loopengine -n "__fish_loopengine_using_subcommand create" -l json -d 'Print the image as JSON; loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand create" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand create" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand detach" -s i -l instance -d 'With \'--all\': only the devices of this instance' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand detach" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand detach" -l all -d 'All devices, of the daemon or of one instance'
complete -c loopengine -n "__fish_loopengine_using_subcommand detach" -s f -l force -d 'Also if it is in use. Whoever uses it gets input/output errors'
complete -c loopengine -n "__fish_loopengine_using_subcommand detach" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand detach" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand resize" -l size -d 'Size of the device, with a unit as in 20G or 20GiB [default: what its image has now]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand resize" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand resize" -l shrink -d 'Also if the device becomes smaller. What lies behind its new end is lost'
complete -c loopengine -n "__fish_loopengine_using_subcommand resize" -s f -l force -d 'With \'--shrink\': also while the device is in use'
complete -c loopengine -n "__fish_loopengine_using_subcommand resize" -l json -d 'Print the device as JSON; loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand resize" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand resize" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand recover" -l image -d 'Image file or block device' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand recover" -l offset -d 'First byte of the image that the device shows [default: as it was attached, 0 if that is not known]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand recover" -l size-limit -d 'Bytes that the device shows at most if it is resized [default: as it was attached]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand recover" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand recover" -l buffered -d 'Go through the page cache [default: as it was attached]'
complete -c loopengine -n "__fish_loopengine_using_subcommand recover" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand recover" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand list" -s i -l instance -d 'Only those of this instance' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand list" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand list" -s a -l all -d 'Everything: devices of instances, private pools and their tenants'
complete -c loopengine -n "__fish_loopengine_using_subcommand list" -l json -d 'Print JSON; loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand list" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand list" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand find" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand find" -l json -d 'Print JSON; loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand find" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand find" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand stats" -s i -l instance -d 'Only the devices of this instance' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand stats" -l count -d 'With \'--watch\': stop after N times' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand stats" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand stats" -s w -l watch -d 'Show rates, every second, until interrupted'
complete -c loopengine -n "__fish_loopengine_using_subcommand stats" -l json -d 'Print JSON (with \'--watch\' one line each second, of counts); loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand stats" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand stats" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand run" -l max -d 'Loop devices at the most [default: 8, or what the user\'s limit leaves]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand run" -l name -d 'The pool\'s name, for lists [default: a number]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand run" -l mount -d 'File systems that the kernel mounts, instead of a program of FUSE, when mount(8) mounts one of the devices in a user namespace: always nosuid and nodev, and while it is mounted nobody can write to the device; a remount is refused. For those that the administrator allows (kernel_mounts in loopengine.toml); for root, ext2, ext3, ext4, xfs, squashfs, erofs and vfat' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand run" -l fuse -d 'File systems that a program of FUSE mounts when mount(8) mounts one of the devices, with the command\'s own rights [default in a user namespace, where installed: as with \'loopengine mount\', except ntfs; root of the machine without this option: the kernel mounts]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand run" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand run" -l user -d 'Use a user namespace, even as root'
complete -c loopengine -n "__fish_loopengine_using_subcommand run" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand run" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand mount" -s p -l partition -d 'Mount partition N of the image' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand mount" -l offset -d 'First byte of the image that counts, with a unit as in 1M or 1MiB' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand mount" -l size-limit -d 'Bytes that count at the most; 0: up to the end of the image' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand mount" -l fuse -d 'The program of FUSE for a file system [default, except for root: ext2, ext3 and ext4 by fuse2fs, squashfs by squashfuse, erofs by erofsfuse, iso9660 by fuseiso, vfat by fusefatfs or fusefat, ntfs by ntfs-3g, exfat by mount.exfat-fuse or fusefatfs, xfs by xfs-fuse or xfuse]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand mount" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand mount" -s r -l read-only -d 'Refuse writes. An image that cannot be written is mounted so in any case'
complete -c loopengine -n "__fish_loopengine_using_subcommand mount" -s a -l all -d 'Mount every partition that has a file system, partition N on DIR/N, which is made'
complete -c loopengine -n "__fish_loopengine_using_subcommand mount" -l replay-journal -d 'Replay the journal of an ext3 or ext4 that was not unmounted, with e2fsck. For root the kernel does so in any case'
complete -c loopengine -n "__fish_loopengine_using_subcommand mount" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand mount" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand umount" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand umount" -s a -l all -d 'Unmount DIR/1, DIR/2 and so on, and remove these directories: what \'mount --all\' has mounted'
complete -c loopengine -n "__fish_loopengine_using_subcommand umount" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand umount" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s j -l associated -d 'List all devices associated with FILE' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s o -l offset -d 'Start at offset NUM into the file' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -l sizelimit -d 'Limit the device to NUM bytes of the file' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s b -l sector-size -d 'Set the logical sector size' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -l direct-io -d 'Open the file with O_DIRECT' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -l loop-ref -d 'What the device is called in REF' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s O -l output -d 'Columns of the list' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -l pool -d 'The pool [default: the one that is mounted here, or the user\'s only one]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s a -l all -d 'List all used devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s d -l detach -d 'Detach one or more devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s D -l detach-all -d 'Detach all used devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s f -l find -d 'Find the first unused device'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s c -l set-capacity -d 'Have the device follow the size of its file'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s L -l nooverlap -d 'Avoid conflicts between devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -l remove -d 'Remove one or more devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s P -l partscan -d 'Show partitions of the device'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s r -l read-only -d 'Set up a read-only device'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -l show -d 'Print the device\'s name after setup (with -f)'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s v -l verbose -d 'Does nothing any more'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s J -l json -d 'Print the list as JSON'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s l -l list -d 'List all or the given device, as a table'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s n -l noheadings -d 'Print no headings'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -l output-all -d 'All columns'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -l raw -d 'Print the list for programs'
complete -c loopengine -n "__fish_loopengine_using_subcommand losetup" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand limit" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand limit" -l json -d 'Print JSON, with a user its own limit only; loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand limit" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand limit" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand features" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand features" -l json -d 'Print JSON; loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand features" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand features" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand doctor" -l for -d 'Check what this purpose needs, and nothing else. To see whether there can be a private pool, opens one' -r -f -a "run\t'\'loopengine run\': a command with loop devices of its own'
mount\t'\'loopengine mount\': the file system in an image'
podman\t'Containers of Podman with loop devices of their own'
kubernetes\t'Pods with loop devices of their own'"
complete -c loopengine -n "__fish_loopengine_using_subcommand doctor" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand doctor" -l json -d 'Print JSON; loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand doctor" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand doctor" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand install" -l prefix -d 'Where programs and manual pages go. With \'/usr\', settings go to /usr/lib instead of /etc' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand install" -l destdir -d 'Directory below which to place everything, for packagers' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand install" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand install" -l uninstall -d 'Take away what was placed, and nothing else'
complete -c loopengine -n "__fish_loopengine_using_subcommand install" -l dry-run -d 'Only print the paths'
complete -c loopengine -n "__fish_loopengine_using_subcommand install" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand install" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and not __fish_seen_subcommand_from print-config print-profile print-cdi hook help" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and not __fish_seen_subcommand_from print-config print-profile print-cdi hook help" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and not __fish_seen_subcommand_from print-config print-profile print-cdi hook help" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and not __fish_seen_subcommand_from print-config print-profile print-cdi hook help" -f -a "print-config" -d 'Print a config.json with private loop devices, for runc, crun and what uses them'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and not __fish_seen_subcommand_from print-config print-profile print-cdi hook help" -f -a "print-profile" -d 'Print a seccomp profile that has loop ioctls answered by loopengine'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and not __fish_seen_subcommand_from print-config print-profile print-cdi hook help" -f -a "print-cdi" -d 'Print a CDI specification, for /var/run/cdi'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and not __fish_seen_subcommand_from print-config print-profile print-cdi hook help" -f -a "hook" -d 'Give a container names for its loop devices: a hook for container runtimes'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and not __fish_seen_subcommand_from print-config print-profile print-cdi hook help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-config" -l pool -d 'The pool' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-config" -l listener -d 'Socket of the daemon for listeners [default: DIR/oci in the run directory]' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-config" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-config" -l wait-killable -d 'Ask that only fatal signals interrupt a call that is being answered (runc 1.2 or later)'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-config" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-config" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-profile" -l base -d 'Add to this profile: one of Docker, Podman or containerd, or a whole config.json' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-profile" -l listener -d 'Socket of the daemon for listeners [default: DIR/oci in the run directory]' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-profile" -l metadata -d 'What the runtime tells the daemon together with the listener' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-profile" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-profile" -l mount -d 'Have mount and umount2 answered, too: the kernel mounts for a container without the capability, of its pool, if that was made with \'instance mount --mount\''
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-profile" -l wait-killable -d 'Ask that only fatal signals interrupt a call that is being answered (runc 1.2 or later)'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-profile" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-profile" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-cdi" -s i -l instance -d 'The instance' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-cdi" -l pool -d 'A pool that was made with \'loopengine instance mount --container\', instead of an instance' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-cdi" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-cdi" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from print-cdi" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from hook" -l devices -d 'Devices of the pool' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from hook" -l nodes -d 'Nodes /dev/loopN that the runtime has made by itself, for their numbers: they make way' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from hook" -l reserved -d 'Numbers that no device of the pool has' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from hook" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from hook" -s h -l help -d 'Print help'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from hook" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from help" -f -a "print-config" -d 'Print a config.json with private loop devices, for runc, crun and what uses them'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from help" -f -a "print-profile" -d 'Print a seccomp profile that has loop ioctls answered by loopengine'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from help" -f -a "print-cdi" -d 'Print a CDI specification, for /var/run/cdi'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from help" -f -a "hook" -d 'Give a container names for its loop devices: a hook for container runtimes'
complete -c loopengine -n "__fish_loopengine_using_subcommand oci; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "serve" -d 'Run the daemon in the foreground'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "instance" -d 'Create, list and remove instances'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "attach" -d 'Serve an image file or block device as a block device'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "create" -d 'Make an image file'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "detach" -d 'Take devices away'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "resize" -d 'Adapt a device to the present size of its image, or give both another size'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "recover" -d 'Recover a device that is stuck, with an image that you name'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "list" -d 'List devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "find" -d 'Find the devices of an image'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "stats" -d 'Show figures of devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "run" -d 'Run a command with loop devices of its own'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "mount" -d 'Mount the file system in an image'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "umount" -d 'Unmount what \'loopengine mount\' has mounted'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "losetup" -d 'Set up and control the loop devices of a private pool, with the options of losetup(8)'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "limit" -d 'Show or change how many private loop devices users may have'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "features" -d 'Show what this kernel grants'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "doctor" -d 'Check what the daemon needs of this machine, or what you need for a purpose'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "install" -d 'Install this program on this machine'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "oci" -d 'Configure container runtimes'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize recover list find stats run mount umount losetup limit features doctor install oci help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and __fish_seen_subcommand_from instance" -f -a "create" -d 'Create an instance'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and __fish_seen_subcommand_from instance" -f -a "list" -d 'List instances'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and __fish_seen_subcommand_from instance" -f -a "remove" -d 'Remove an instance'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and __fish_seen_subcommand_from instance" -f -a "mount" -d 'Mount a private pool of loop devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and __fish_seen_subcommand_from instance" -f -a "open" -d 'Give a command a private pool of loop devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and __fish_seen_subcommand_from oci" -f -a "print-config" -d 'Print a config.json with private loop devices, for runc, crun and what uses them'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and __fish_seen_subcommand_from oci" -f -a "print-profile" -d 'Print a seccomp profile that has loop ioctls answered by loopengine'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and __fish_seen_subcommand_from oci" -f -a "print-cdi" -d 'Print a CDI specification, for /var/run/cdi'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and __fish_seen_subcommand_from oci" -f -a "hook" -d 'Give a container names for its loop devices: a hook for container runtimes'
