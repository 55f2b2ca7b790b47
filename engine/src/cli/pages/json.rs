// SPDX-License-Identifier: Apache-2.0 OR MIT
//! loopengine-json(7): the JSON output of all subcommands, from the types that they print.

use clap_mangen::roff::{Roff, bold, italic, roman};
use zlink::idl;
use zlink::introspect::CustomType;

use super::man::{SOURCE, section_examples, tagged};
use crate::cli::create::ImageInfo;
use crate::cli::doctor::{Check, Verdict};
use crate::cli::examples;
use crate::cli::list::{InstanceDevice, ListedPool, Listing, LoopDevice};
use crate::cli::top::{DeviceRates, Interval, Rates};
use crate::instance::spec::*;
use crate::private::Limit;
use crate::sys::processes::Process;

/// All types in the output of `--json`, with their descriptions.
const JSON_TYPES: &[&idl::CustomType<'static>] = &[
    InstanceInfo::CUSTOM_TYPE,
    Listing::CUSTOM_TYPE,
    InstanceDevice::CUSTOM_TYPE,
    ListedPool::CUSTOM_TYPE,
    LoopDevice::CUSTOM_TYPE,
    Process::CUSTOM_TYPE,
    DeviceInfo::CUSTOM_TYPE,
    ImageInfo::CUSTOM_TYPE,
    IoMode::CUSTOM_TYPE,
    BackendKind::CUSTOM_TYPE,
    DeviceState::CUSTOM_TYPE,
    DeviceStats::CUSTOM_TYPE,
    LatencySummary::CUSTOM_TYPE,
    LatencyBucket::CUSTOM_TYPE,
    Interval::CUSTOM_TYPE,
    DeviceRates::CUSTOM_TYPE,
    Rates::CUSTOM_TYPE,
    Limit::CUSTOM_TYPE,
    Features::CUSTOM_TYPE,
    Check::CUSTOM_TYPE,
    Verdict::CUSTOM_TYPE,
];

/// The page.
pub(super) fn page() -> Roff {
    const PRINTED: &[(&str, &str)] = &[
        ("loopengine attach", "One DeviceInfo."),
        ("loopengine create", "One ImageInfo."),
        ("loopengine instance create", "One InstanceInfo."),
        ("loopengine instance list", "An array of InstanceInfo."),
        ("loopengine list", "An array of DeviceInfo. With --all, or for a plain user: one Listing."),
        ("loopengine find", "One Listing, with devices of that image only."),
        ("loopengine stats", "An array of DeviceStats. With --watch: one such array per line."),
        ("loopengine top", "One Interval per line."),
        ("loopengine resize", "One DeviceInfo."),
        ("loopengine limit", "An array of Limit. With USER: only the limit of that user."),
        ("loopengine features", "One Features."),
        ("loopengine doctor", "An array of Check."),
    ];
    let mut roff = Roff::new();
    roff.control("TH", ["LOOPENGINE-JSON", "7", "\"\"", SOURCE, "loopengine"]);
    roff.control("SH", ["NAME"]);
    roff.text([roman("loopengine-json - JSON output of the loopengine commands")]);
    roff.control("SH", ["SYNOPSIS"]);
    roff.text([bold("loopengine"), roman(" "), italic("COMMAND"), roman(" "), bold("--json")]);
    roff.control("SH", ["DESCRIPTION"]);
    roff.text([roman("With --json, these commands print JSON to standard output:")]);
    for (command, prints) in PRINTED {
        tagged(&mut roff, command, prints);
    }
    roff.control("PP", []);
    roff.text([roman("Later versions may add fields. They do not rename, remove or redefine fields. An optional field is null or absent if it has no value. The control socket uses the same types.")]);
    roff.control("SH", ["TYPES"]);
    for described in JSON_TYPES {
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
    section_examples(&mut roff, examples::of("json"));
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman("loopengine(1), loopengine-list(1), loopengine-stats(1), loopengine-top(1), jq(1)")]);
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
