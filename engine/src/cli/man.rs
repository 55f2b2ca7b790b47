//! Manual pages: one for each subcommand, one for the JSON that they print.

use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};
use zlink::idl;
use zlink::introspect::CustomType;

use crate::error::{Error, Result};
use crate::instance::spec::*;
use crate::kernels;
use crate::private::Limit;
use crate::sys::processes::Process;

use super::create::ImageInfo;
use super::doctor::{Check, Verdict};
use super::list::{InstanceDevice, Listing, LoopDevice, Pool};
use super::{EXIT_CODES, RUN_EXIT_CODES, examples};

/// What the foot of every page says.
const SOURCE: &str = concat!("loopengine ", env!("CARGO_PKG_VERSION"));

/// Pages that are written by hand.
const WRITTEN: &[(&str, &str)] = &[
    ("loopengine-loopfs.7", include_str!("pages/loopengine-loopfs.7")),
    ("mount.loop.8", include_str!("pages/mount.loop.8")),
];

/// Names and texts of all pages.
pub(super) fn pages() -> Result<Vec<(String, Vec<u8>)>> {
    let mut command = super::command().disable_help_subcommand(true);
    command.build();
    let mut pages = Vec::new();
    collect(&command, "", &mut pages).map_err(|error| Error::os(error, "cannot write a manual page"))?;
    let mut json = Vec::new();
    json_page().to_writer(&mut json).map_err(|error| Error::os(error, "cannot write a manual page"))?;
    pages.push(("loopengine-json.7".to_owned(), json));
    for (name, text) in WRITTEN {
        pages.push(((*name).to_owned(), text.replace("@VERSION@", env!("CARGO_PKG_VERSION")).into_bytes()));
    }
    Ok(pages)
}

/// Every section that was written on its own defines the apostrophe anew; once is enough.
fn one_preamble(text: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(text);
    let defines = |line: &str| line.starts_with(".ie ") || line.starts_with(".el ");
    let lines = text.lines().enumerate();
    let kept = lines.filter(|(at, line)| *at < 2 || !defines(line));
    kept.flat_map(|(_, line)| [line.trim_end(), "\n"]).collect::<String>().into_bytes()
}

fn collect(command: &clap::Command, path: &str, pages: &mut Vec<(String, Vec<u8>)>) -> std::io::Result<()> {
    let name = match path {
        "" => "loopengine".to_owned(),
        path => format!("loopengine-{}", path.replace(' ', "-")),
    };
    // Examples have a section of their own.
    let shown = command.clone().after_long_help(None::<&str>).display_name(name.clone());
    let shown = shown.bin_name(format!("loopengine {path}").trim_end().to_owned());
    // Pages have no date: they would be stale every day. roff wants an empty argument in quotes.
    let man = Man::new(shown).title(name.to_uppercase()).date("\"\"");
    let man = man.source(SOURCE).manual("loopengine");
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    let subcommands = command.get_subcommands().filter(|sub| !sub.is_hide_set());
    let subcommands: Vec<&clap::Command> = subcommands.collect();
    if !subcommands.is_empty() {
        man.render_subcommands_section(&mut text)?;
    }
    own_sections(path).to_writer(&mut text)?;
    pages.push((format!("{name}.1"), one_preamble(&text)));
    for sub in subcommands {
        let path = format!("{path} {}", sub.get_name());
        collect(sub, path.trim_start(), pages)?;
    }
    Ok(())
}

fn own_sections(path: &str) -> Roff {
    let mut roff = Roff::new();
    if path == "serve" {
        configuration(&mut roff);
    }
    roff.control("SH", ["EXIT STATUS"]);
    // A command that is run has exit codes of its own, and ours step aside.
    let own = if matches!(path, "run" | "instance open") { &[][..] } else { EXIT_CODES };
    for (code, means) in own {
        tagged(&mut roff, &code.to_string(), means);
    }
    let runs = match path {
        "attach" => Some(
            "With --run, the exit status of the command, 128 and the number of the signal that ended it, or:",
        ),
        "run" | "instance open" => Some("Once the command has started, its own exit status. Otherwise:"),
        _ => None,
    };
    if let Some(runs) = runs {
        roff.control("PP", []);
        roff.text([roman(runs)]);
        for (code, means) in RUN_EXIT_CODES {
            tagged(&mut roff, &code.to_string(), means);
        }
    }
    if ["", "doctor"].contains(&path) {
        roff.control("SH", ["KERNELS"]);
        for feature in &kernels::ALL {
            tagged(
                &mut roff,
                feature.name,
                &format!("Linux {} or newer: {}.", feature.version(), feature.by),
            );
        }
    }
    let files = examples::files(path);
    if !files.is_empty() {
        roff.control("SH", ["FILES"]);
        for (file, means) in files {
            tagged(&mut roff, file, means);
        }
    }
    let examples = examples::of(path);
    if !examples.is_empty() {
        roff.control("SH", ["EXAMPLES"]);
        for (does, line) in examples {
            roff.control("PP", []);
            roff.text([roman(*does)]);
            roff.control("RS", ["4"]);
            roff.control("nf", []);
            roff.text([bold(*line)]);
            roff.control("fi", []);
            roff.control("RE", []);
        }
    }
    roff.control("SH", ["SEE ALSO"]);
    let also = match path {
        "" => {
            "loopengine-serve(1), loopengine-attach(1), loopengine-doctor(1), loopengine-loopfs(7), loopengine-json(7)"
        }
        "instance mount" | "instance open" => "loopengine(1), loopengine-loopfs(7), mount.loop(8)",
        _ => "loopengine(1), loopengine-json(7)",
    };
    roff.text([roman(also)]);
    roff
}

/// A tag in bold, what it means indented below.
fn tagged(roff: &mut Roff, tag: &str, means: &str) {
    roff.control("TP", []);
    roff.text([bold(tag)]);
    roff.text([roman(means)]);
}

fn configuration(roff: &mut Roff) {
    const KEYS: &[(&str, &[(&str, &str)])] = &[
        ("Before all tables", &[("frontend = \"auto|ublk|fuse\"", "As --frontend.")]),
        (
            "[default]",
            &[
                ("max_devices = N", "Devices that the instance 'default' may have."),
                ("workers = N", "Its worker threads; 0: one for each CPU that it may use, two at least."),
                ("cpus = \"LIST\"", "CPUs that its workers may run on, as in \"0-3,8\"; left out: all."),
            ],
        ),
        (
            "[tuning]",
            &[("linked_commit = true|false", "As --linked-commit."), ("poll_us = N", "As --poll-us.")],
        ),
        (
            "[private]",
            &[
                (
                    "max_per_user = N",
                    "Devices that all private pools of one user may have together [64]. Root may have any number.",
                ),
                ("max_pools_per_user = N", "Private pools of one user [16]."),
                (
                    "kernel_mounts = [\"FS\", …]",
                    "File systems that users may have the kernel mount from devices of private pools, with \
                     'loopengine run --mount' [none]; of ext2, ext3, ext4, xfs, squashfs, erofs and vfat. Whoever may \
                     have one puts an image of his own before the kernel's parser of that file system.",
                ),
            ],
        ),
        (
            "[[private.user]]",
            &[
                (
                    "user = \"NAME\" or N",
                    "A user with limits of its own: a name in /etc/passwd, or a number. As many of these tables as \
                     there are such users. 'loopengine limit' changes the first limit until the daemon ends. One that \
                     is changed here holds after a reload.",
                ),
                (
                    "max_devices = N",
                    "Devices that all its private pools may have together; left out: as everybody.",
                ),
                ("max_pools = N", "Its private pools; left out: as everybody."),
            ],
        ),
        (
            "[[instance]]",
            &[
                (
                    "name = \"NAME\"",
                    "An instance to create at start. As many of these tables as there are instances.",
                ),
                ("max_devices, workers, cpus", "As in [default]."),
            ],
        ),
        (
            "[[device]]",
            &[
                (
                    "image = \"PATH\"",
                    "An image file or block device to attach when the daemon starts, by its absolute path. As many of \
                     these tables as there are devices. One that is there already, since a daemon before this one \
                     attached it, is not attached again. An image that cannot be attached is an error in the log, and \
                     the others are attached. A reload attaches those that are not there, and detaches none. An \
                     image, from one offset on, can appear once in an instance.",
                ),
                ("instance = \"NAME\"", "Instance that gets the device; left out: 'default'."),
                ("number = N", "N of loopN; left out: the lowest that is free."),
                (
                    "read_only, force, buffered = true|false",
                    "As the options of loopengine-attach(1) of these names [false].",
                ),
                (
                    "offset, size_limit, block_size = N or \"SIZE\"",
                    "As the options of loopengine-attach(1) of these names, with a unit as in \"1M\" or in bytes.",
                ),
                ("queues, depth = N", "As the options of loopengine-attach(1) of these names."),
                ("io_mode = \"batch|auto|copy\"", "As --io-mode of loopengine-attach(1)."),
            ],
        ),
    ];
    roff.control("SH", ["CONFIGURATION"]);
    roff.text([roman(
        "A TOML file. Options of the command line win. A key that is not listed here is an error.",
    )]);
    for (table, keys) in KEYS {
        roff.control("SS", [*table]);
        for (key, means) in *keys {
            tagged(roff, key, means);
        }
    }
}

/// All types that `--json` prints, as they describe themselves.
const TYPES: &[&idl::CustomType<'static>] = &[
    InstanceInfo::CUSTOM_TYPE,
    Listing::CUSTOM_TYPE,
    InstanceDevice::CUSTOM_TYPE,
    Pool::CUSTOM_TYPE,
    LoopDevice::CUSTOM_TYPE,
    Process::CUSTOM_TYPE,
    DeviceInfo::CUSTOM_TYPE,
    ImageInfo::CUSTOM_TYPE,
    IoMode::CUSTOM_TYPE,
    FrontendKind::CUSTOM_TYPE,
    DeviceState::CUSTOM_TYPE,
    DeviceStats::CUSTOM_TYPE,
    LatencySummary::CUSTOM_TYPE,
    Limit::CUSTOM_TYPE,
    Features::CUSTOM_TYPE,
    Check::CUSTOM_TYPE,
    Verdict::CUSTOM_TYPE,
];

fn json_page() -> Roff {
    const PRINTED: &[(&str, &str)] = &[
        ("loopengine attach", "One DeviceInfo."),
        ("loopengine create", "One ImageInfo."),
        ("loopengine instance create", "One InstanceInfo."),
        ("loopengine instance list", "An array of InstanceInfo."),
        ("loopengine list", "An array of DeviceInfo; with --all, or as a plain user, one Listing."),
        ("loopengine find", "One Listing, of devices of that image only."),
        ("loopengine stats", "An array of DeviceStats; with --watch, one such array a line."),
        ("loopengine resize", "One DeviceInfo."),
        ("loopengine limit", "An array of Limit; with a user, of its own only."),
        ("loopengine features", "One Features."),
        ("loopengine doctor", "An array of Check."),
    ];
    let mut roff = Roff::new();
    roff.control("TH", ["LOOPENGINE-JSON", "7", "\"\"", SOURCE, "loopengine"]);
    roff.control("SH", ["NAME"]);
    roff.text([roman("loopengine-json - what the commands of loopengine print with --json")]);
    roff.control("SH", ["DESCRIPTION"]);
    for (command, prints) in PRINTED {
        tagged(&mut roff, command, prints);
    }
    roff.control("PP", []);
    roff.text([roman("Later versions may add fields. They do not rename or remove any, or change what one means. A field marked optional is null or left out when there is nothing to say. The control socket uses the same types.")]);
    roff.control("SH", ["TYPES"]);
    for described in TYPES {
        roff.control("SS", [described.name().as_str()]);
        match described {
            idl::CustomType::Object(object) => {
                roff.text([roman(words(object.comments()))]);
                for field in object.fields() {
                    roff.control("TP", []);
                    roff.text([bold(field.name().as_str()), roman(" "), italic(type_name(field.ty()))]);
                    roff.text([roman(words(field.comments()))]);
                }
            }
            idl::CustomType::Enum(choice) => {
                roff.text([roman(words(choice.comments()))]);
                for variant in choice.variants() {
                    let word = format!("\"{}\"", variant.name().as_str());
                    tagged(&mut roff, &word, &words(variant.comments()));
                }
            }
        }
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman("loopengine(1)")]);
    roff
}

fn words<'a>(comments: impl Iterator<Item = &'a idl::Comment<'a>>) -> String {
    let lines: Vec<&str> = comments.map(|comment| comment.text().trim()).collect();
    lines.join(" ").replace('`', "")
}

fn type_name(described: &idl::Type<'_>) -> String {
    match described {
        idl::Type::Bool => "boolean".to_owned(),
        idl::Type::Int => "integer".to_owned(),
        idl::Type::Float => "number".to_owned(),
        idl::Type::String => "string".to_owned(),
        idl::Type::Custom(name) => name.to_string(),
        idl::Type::Optional(inner) => format!("{}, optional", type_name(inner.inner())),
        idl::Type::Array(inner) => format!("array of {}", type_name(inner.inner())),
        other => other.to_string(),
    }
}
