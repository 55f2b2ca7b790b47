// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Manual pages: one per subcommand. `json` has the one for the JSON output.
//!
//! The program only embeds the pages in `share/man`; the tests in `fresh` generate and compare them.

use std::io;

use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

use super::json;
use crate::cli::examples::{self, Example};
use crate::cli::top::KEYS;
use crate::cli::{COMMAND_NOT_FOUND, NOT_EXECUTABLE, RUN_FAILED, command};
use crate::{broken_kernels, kernels};

/// The footer of every page.
pub(super) const SOURCE: &str = concat!("loopengine ", env!("CARGO_PKG_VERSION"));

/// Hand-written pages.
const WRITTEN: &[(&str, &str)] = &[
    ("loopengine-loopfs.7", include_str!("loopengine-loopfs.7")),
    ("mount.loop.8", include_str!("mount.loop.8")),
];

/// All exit codes.
pub(in crate::cli) const EXIT_CODES: &[(u8, &str)] = &[
    (0, "Success."),
    (1, "Input or output failed, or an internal error occurred."),
    (2, "The command line or an input is invalid."),
    (3, "The image, instance or device does not exist."),
    (4, "The object already exists or is in use."),
    (5, "A limit is reached: devices, disk space or memory."),
    (6, "The user lacks the permission."),
    (7, "The kernel, file system or device does not support the operation."),
    (8, "The daemon, the ublk driver or FUSE is not available."),
    (9, "No answer arrived before the deadline. The state of the device is unknown."),
];

/// The exit codes of commands that run another program, as with env(1).
pub(in crate::cli) const RUN_EXIT_CODES: &[(u8, &str)] = &[
    (RUN_FAILED, "loopengine failed: it did not run the program, or could not detach its device."),
    (NOT_EXECUTABLE, "The program cannot be executed."),
    (COMMAND_NOT_FOUND, "The program was not found."),
];

/// File names and contents of all pages.
pub fn generate() -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut command = command().disable_help_subcommand(true);
    command.build();
    let mut all = Vec::new();
    collect(&command, "", &mut all)?;
    let mut json = Vec::new();
    json::page().to_writer(&mut json)?;
    all.push(("loopengine-json.7".to_owned(), json));
    for (name, text) in WRITTEN {
        all.push(((*name).to_owned(), text.replace("@VERSION@", env!("CARGO_PKG_VERSION")).into_bytes()));
    }
    Ok(all)
}

/// Each section that clap_mangen renders defines the apostrophe again; keeps the first definition.
/// Removes the angle brackets around value names.
fn clean_up(text: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(text);
    let defines = |line: &str| line.starts_with(".ie ") || line.starts_with(".el ");
    let lines = text.lines().enumerate();
    let kept = lines.filter(|(at, line)| *at < 2 || !defines(line));
    let mut text = kept.flat_map(|(_, line)| [line.trim_end(), "\n"]).collect::<String>();
    for (from, to) in
        [("\\fI<", "\\fI"), (">\\fR", "\\fR"), (">...\\fR", "\\fR..."), ("<\\fI", "\\fI"), ("\\fR>", "\\fR")]
    {
        text = text.replace(from, to);
    }
    text.into_bytes()
}

fn collect(command: &clap::Command, path: &str, all: &mut Vec<(String, Vec<u8>)>) -> io::Result<()> {
    let name = match path {
        "" => "loopengine".to_owned(),
        path => format!("loopengine-{}", path.replace(' ', "-")),
    };
    // Examples have their own section.
    let shown = command.clone().after_long_help(None::<&str>).display_name(name.clone());
    let shown = shown.bin_name(format!("loopengine {path}").trim_end().to_owned());
    // No date: it would change on every build. roff needs an empty argument in quotes.
    let man = Man::new(shown).title(name.to_uppercase()).date("\"\"");
    let man = man.source(SOURCE).manual("loopengine");
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    synopsis(command, path).to_writer(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    let subcommands = command.get_subcommands().filter(|sub| !sub.is_hide_set());
    let subcommands: Vec<&clap::Command> = subcommands.collect();
    if !subcommands.is_empty() {
        man.render_subcommands_section(&mut text)?;
    }
    more_sections(path).to_writer(&mut text)?;
    all.push((format!("{name}.1"), clean_up(&text)));
    for sub in subcommands {
        let path = format!("{path} {}", sub.get_name());
        collect(sub, path.trim_start(), all)?;
    }
    Ok(())
}

fn more_sections(path: &str) -> Roff {
    let mut roff = Roff::new();
    if path == "serve" {
        configuration(&mut roff);
    }
    if path == "top" {
        roff.control("SH", ["KEYS"]);
        KEYS.iter().for_each(|(key, does)| tagged(&mut roff, key, does));
    }
    exit_status(&mut roff, path);
    if ["", "doctor"].contains(&path) {
        roff.control("SH", ["KERNELS"]);
        for feature in &kernels::ALL {
            tagged(
                &mut roff,
                feature.name,
                &format!("Linux {} or newer: {}.", feature.version(), feature.by),
            );
        }
        for broken in &broken_kernels::ALL {
            let means = format!(
                "Broken: {}. loopengine serve refuses block devices there without --force. Good from {}.",
                broken.fault, broken.good_from
            );
            tagged(&mut roff, broken.name, &means);
        }
    }
    let files = examples::files(path);
    if !files.is_empty() {
        roff.control("SH", ["FILES"]);
        for (file, means) in files {
            tagged(&mut roff, file, means);
        }
    }
    section_examples(&mut roff, examples::of(path));
    roff.control("SH", ["SEE ALSO"]);
    let also = match path {
        "" => {
            "loopengine-serve(1), loopengine-attach(1), loopengine-run(1), loopengine-mount(1), \
             loopengine-doctor(1), loopengine-loopfs(7), loopengine-json(7)"
        }
        "instance mount" | "instance open" => "loopengine(1), loopengine-loopfs(7), mount.loop(8)",
        "top" => "loopengine(1), loopengine-stats(1), loopengine-metrics(1), loopengine-json(7), iostat(1)",
        "run" => "loopengine(1), loopengine-mount(1), loopengine-loopfs(7), losetup(8)",
        "losetup" => "loopengine(1), loopengine-loopfs(7), losetup(8)",
        "mount" => "loopengine(1), loopengine-umount(1), loopengine-run(1)",
        "umount" => "loopengine(1), loopengine-mount(1)",
        "podman-setup" => "loopengine(1), loopengine-oci(1), podman-run(1)",
        _ if path.starts_with("oci") => "loopengine(1), loopengine-oci(1), loopengine-podman-setup(1)",
        _ => "loopengine(1), loopengine-json(7)",
    };
    roff.text([roman(also)]);
    roff
}

/// The command line as clap prints it in its usage line, with value names in italics.
fn synopsis(command: &clap::Command, path: &str) -> Roff {
    let name = format!("loopengine {path}").trim_end().to_owned();
    let usage = command.clone().bin_name(&name).render_usage().to_string();
    let words = usage.trim_start_matches("Usage: ").strip_prefix(&name).unwrap_or_default().to_owned();
    let mut line = vec![bold(name)];
    for word in words.split_whitespace() {
        line.push(roman(" "));
        let (open, rest) = word.strip_prefix('[').map_or(("", word), |rest| ("[", rest));
        let inner = rest.trim_start_matches('<');
        let end = inner.find(['>', ']']).unwrap_or(inner.len());
        let (value, after) = inner.split_at(end);
        match word.starts_with('-') {
            true => line.push(bold(word)),
            false => line.extend([roman(open), italic(value), roman(after.trim_start_matches('>'))]),
        }
    }
    let mut roff = Roff::new();
    roff.control("SH", ["SYNOPSIS"]);
    roff.text(line);
    roff
}

/// loopengine(1) explains the exit codes; other pages refer to it.
fn exit_status(roff: &mut Roff, path: &str) {
    roff.control("SH", ["EXIT STATUS"]);
    let text = match path {
        "" => {
            for (code, means) in EXIT_CODES {
                tagged(roff, &code.to_string(), means);
            }
            roff.control("PP", []);
            roff.text([roman(
                "'run', 'instance open' and 'attach --run' exit with the status of the command that they run. \
                 On failure they exit with:",
            )]);
            for (code, means) in RUN_EXIT_CODES {
                tagged(roff, &code.to_string(), means);
            }
            return;
        }
        "attach" => {
            "0 on success. loopengine(1) explains the other codes. With --run, the exit status of the command, \
             or 128 plus the number of the signal that ended it; 125 to 127 as in loopengine(1)."
        }
        "run" | "instance open" => {
            "The exit status of the command. If the command does not start: 125 to 127, as in loopengine(1)."
        }
        "doctor" => {
            "0 if no check finds a problem, 1 if a check does. loopengine(1) explains the other codes."
        }
        "find" => "0 if the image has a device, 3 if it has none. loopengine(1) explains the other codes.",
        "losetup" => {
            "0 on success, 1 on failure, as losetup(8). If the call to the daemon fails, the codes of \
             loopengine(1)."
        }
        _ => "0 on success. loopengine(1) explains the other codes.",
    };
    roff.text([roman(text)]);
}

pub(super) fn section_examples(roff: &mut Roff, examples: &[Example]) {
    if examples.is_empty() {
        return;
    }
    roff.control("SH", ["EXAMPLES"]);
    for (index, (does, line)) in examples.iter().enumerate() {
        if index > 0 {
            roff.control("PP", []);
        }
        roff.text([roman(*does)]);
        roff.control("RS", ["4"]);
        roff.control("nf", []);
        roff.text([bold(*line)]);
        roff.control("fi", []);
        roff.control("RE", []);
    }
}

/// A tag in bold, and its indented description.
pub(super) fn tagged(roff: &mut Roff, tag: &str, means: &str) {
    roff.control("TP", []);
    roff.text([bold(tag)]);
    roff.text([roman(means)]);
}

fn configuration(roff: &mut Roff) {
    const KEYS: &[(&str, &[(&str, &str)])] = &[
        (
            "Before all tables",
            &[
                ("backend = \"auto|ublk|loop|fuse\"", "As --backend: the default of all instances."),
                (
                    "first_loop_number = N",
                    "Lowest number of the devices of the kernel's loop driver [half of the driver's numbers: \
                     524288]. 'losetup -f' of the host takes the lowest free number: choose one that it does \
                     not reach.",
                ),
                ("dev_links = true|false", "As --dev-links [false]."),
            ],
        ),
        (
            "[default]",
            &[
                ("max_devices = N", "Maximum number of devices of the instance 'default'."),
                ("workers = N", "Number of its worker threads; 0: one per usable CPU, at least two."),
                ("cpus = \"LIST\"", "CPUs for its workers, for example \"0-3,8\" [all]."),
            ],
        ),
        ("[tuning]", &[("linked_commit = true|false", "As --linked-commit.")]),
        (
            "[private]",
            &[
                (
                    "max_per_user = N",
                    "Maximum number of devices in all private pools of one user [64]. Root has no limit.",
                ),
                ("max_pools_per_user = N", "Maximum number of private pools per user [16]."),
                (
                    "kernel_mounts = [\"FS\", …]",
                    "File systems that 'loopengine run --mount' can have the kernel mount for users [none]: ext2, \
                     ext3, ext4, xfs, squashfs, erofs, vfat. The kernel then parses images that users control.",
                ),
                (
                    "backend = \"ublk|loop\"",
                    "What serves the devices of pools that ask for no backend [ublk from Linux 7.0 on, if the \
                     default backend is ublk; otherwise loop].",
                ),
            ],
        ),
        (
            "[[private.user]]",
            &[
                (
                    "user = \"NAME\" or N",
                    "A user with own limits: a name in /etc/passwd, or a number. One table per user. 'loopengine \
                     limit' overrides max_devices until the daemon ends, or until a reload changes it.",
                ),
                (
                    "max_devices = N",
                    "Maximum number of devices in all private pools of the user [max_per_user].",
                ),
                ("max_pools = N", "Maximum number of private pools of the user [max_pools_per_user]."),
            ],
        ),
        (
            "[[instance]]",
            &[
                ("name = \"NAME\"", "An instance that the daemon creates at start. One table per instance."),
                ("max_devices, workers, cpus", "As in [default]."),
                ("backend = \"ublk|loop|fuse\"", "As 'loopengine instance create --backend'."),
            ],
        ),
        (
            "[[device]]",
            &[
                (
                    "image = \"PATH\"",
                    "The absolute path of an image file or block device that the daemon attaches at start. One \
                     table per device. The daemon skips a device that it recovered. If it cannot attach an image, \
                     it logs an error and continues. A reload attaches missing devices and detaches none. An \
                     instance can have only one entry per image and offset.",
                ),
                ("instance = \"NAME\"", "Instance of the device ['default']."),
                ("number = N", "N of loopN [the lowest free number]."),
                (
                    "read_only, force, buffered, durable, partscan = true|false",
                    "As the options of loopengine-attach(1) [false].",
                ),
                (
                    "offset, size_limit, block_size, bandwidth = N or \"SIZE\"",
                    "As the options of loopengine-attach(1): in bytes, or with a unit as in \"1M\".",
                ),
                ("queues, depth, iops = N", "As the options of loopengine-attach(1)."),
                ("io_mode = \"batch|auto|copy\"", "As --io-mode of loopengine-attach(1)."),
            ],
        ),
    ];
    roff.control("SH", ["CONFIGURATION"]);
    roff.text([roman(
        "The configuration is a TOML file. Options of the command line override it. An unknown key is an error.",
    )]);
    for (table, keys) in KEYS {
        roff.control("SS", [*table]);
        for (key, means) in *keys {
            tagged(roff, key, means);
        }
    }
}
