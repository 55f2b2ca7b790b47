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
complete -c loopengine -n "__fish_loopengine_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_needs_command" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "serve" -d 'Run the daemon in the foreground'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "instance" -d 'Create, list and remove instances'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "attach" -d 'Serve an image file or block device as a block device'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "create" -d 'Make an image file'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "detach" -d 'Take devices away'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "resize" -d 'Adapt a device to the present size of its image'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "list" -d 'List devices'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "stats" -d 'Show figures of devices'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "features" -d 'Show what this kernel grants'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "doctor" -d 'Check what the daemon needs of this machine'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "generate" -d 'Write manual pages or shell completions. For packagers'
complete -c loopengine -n "__fish_loopengine_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -l config -d 'Configuration file [default: /etc/loopengine.toml, if it exists]' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -l frontend -d 'What devices are: block devices (ublk), files (fuse), or block devices if the ublk driver is there and files otherwise (auto) [default: auto]' -r -f -a "auto\t'Block devices where the ublk driver is there, else files'
ublk\t'Block devices'
fuse\t'Files, through FUSE'"
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -l linked-commit -d 'Commit a request in one chain with its read or write, where that is possible' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -l poll-us -d 'Microseconds for which a worker looks for more after a lone request before it sleeps; less often where that is in vain. 0: never' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand serve" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove help" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove help" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove help" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove help" -f -a "create" -d 'Create an instance'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove help" -f -a "list" -d 'List instances'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove help" -f -a "remove" -d 'Remove an instance'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and not __fish_seen_subcommand_from create list remove help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from create" -l max -d 'Devices that it may have' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from create" -l workers -d 'Worker threads; 0: one for each CPU that it may use, two at least' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from create" -l cpus -d 'CPUs that its workers may run on, as in \'0-3,8\' [default: all]' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from create" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from create" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from create" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from list" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from list" -l json -d 'Print JSON; loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from list" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from remove" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from remove" -s f -l force -d 'Also if it has devices. Whoever uses them gets input/output errors'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from remove" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from remove" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from help" -f -a "create" -d 'Create an instance'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from help" -f -a "list" -d 'List instances'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from help" -f -a "remove" -d 'Remove an instance'
complete -c loopengine -n "__fish_loopengine_using_subcommand instance; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -s i -l instance -d 'Instance that gets the device' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -l offset -d 'First byte of the image that the device shows: bytes, or a number and K, M, G or T' -r
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
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -l buffered -d 'Go through the page cache. For file systems that have no direct I/O'
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand attach" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand create" -l size -d 'Its size: bytes, or a number and K, M, G or T' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand create" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand create" -l preallocate -d 'Reserve all space now. Writes then never fail for want of space, and are faster'
complete -c loopengine -n "__fish_loopengine_using_subcommand create" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand create" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand detach" -s i -l instance -d 'With \'--all\': only the devices of this instance' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand detach" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand detach" -l all -d 'All devices, of the daemon or of one instance'
complete -c loopengine -n "__fish_loopengine_using_subcommand detach" -s f -l force -d 'Also if it is in use. Whoever uses it gets input/output errors'
complete -c loopengine -n "__fish_loopengine_using_subcommand detach" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand detach" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand resize" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand resize" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand resize" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand list" -s i -l instance -d 'Only those of this instance' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand list" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand list" -l json -d 'Print JSON; loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand list" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand list" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand stats" -s i -l instance -d 'Only the devices of this instance' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand stats" -l count -d 'With \'--watch\': stop after N times' -r
complete -c loopengine -n "__fish_loopengine_using_subcommand stats" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand stats" -s w -l watch -d 'Show rates, every second, until interrupted'
complete -c loopengine -n "__fish_loopengine_using_subcommand stats" -l json -d 'Print JSON (with \'--watch\' one line each second, of counts); loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand stats" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand stats" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand features" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand features" -l json -d 'Print JSON; loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand features" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand features" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand doctor" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand doctor" -l json -d 'Print JSON; loopengine-json(7) describes it'
complete -c loopengine -n "__fish_loopengine_using_subcommand doctor" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand doctor" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand generate" -l run-dir -d 'Directory with the daemon\'s socket and the names of its devices' -r -F
complete -c loopengine -n "__fish_loopengine_using_subcommand generate" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopengine -n "__fish_loopengine_using_subcommand generate" -s V -l version -d 'Print version'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize list stats features doctor generate help" -f -a "serve" -d 'Run the daemon in the foreground'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize list stats features doctor generate help" -f -a "instance" -d 'Create, list and remove instances'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize list stats features doctor generate help" -f -a "attach" -d 'Serve an image file or block device as a block device'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize list stats features doctor generate help" -f -a "create" -d 'Make an image file'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize list stats features doctor generate help" -f -a "detach" -d 'Take devices away'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize list stats features doctor generate help" -f -a "resize" -d 'Adapt a device to the present size of its image'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize list stats features doctor generate help" -f -a "list" -d 'List devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize list stats features doctor generate help" -f -a "stats" -d 'Show figures of devices'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize list stats features doctor generate help" -f -a "features" -d 'Show what this kernel grants'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize list stats features doctor generate help" -f -a "doctor" -d 'Check what the daemon needs of this machine'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize list stats features doctor generate help" -f -a "generate" -d 'Write manual pages or shell completions. For packagers'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and not __fish_seen_subcommand_from serve instance attach create detach resize list stats features doctor generate help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and __fish_seen_subcommand_from instance" -f -a "create" -d 'Create an instance'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and __fish_seen_subcommand_from instance" -f -a "list" -d 'List instances'
complete -c loopengine -n "__fish_loopengine_using_subcommand help; and __fish_seen_subcommand_from instance" -f -a "remove" -d 'Remove an instance'
