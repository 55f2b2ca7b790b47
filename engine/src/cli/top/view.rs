// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table of an interval: its columns, which devices, and in what order.

use std::cmp::Ordering;

use clap::ValueEnum;

use super::rates::{DeviceRates, Interval, Rates};
use crate::cli::table::Table;
use crate::instance::spec::DeviceState;
use crate::sys::printable;

/// A column, in the order of the table. Its name on the command line is its heading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Column {
    #[value(name = "device")]
    Device,
    #[value(name = "user")]
    User,
    #[value(name = "io/s")]
    Operations,
    #[value(name = "r/s")]
    Reads,
    #[value(name = "w/s")]
    Writes,
    #[value(name = "rkib/s")]
    ReadBytes,
    #[value(name = "wkib/s")]
    WriteBytes,
    #[value(name = "avg_ms")]
    Average,
    #[value(name = "p99_ms")]
    P99,
    #[value(name = "util%")]
    Utilisation,
    #[value(name = "inflight")]
    InFlight,
    #[value(name = "errors")]
    Errors,
    #[value(name = "state")]
    State,
    #[value(name = "aqu-sz")]
    QueueDepth,
    #[value(name = "f/s")]
    Flushes,
    #[value(name = "d/s")]
    Discards,
}

const HEADS: [&str; 16] = [
    "DEVICE", "USER", "IO/S", "R/S", "W/S", "RKIB/S", "WKIB/S", "AVG_MS", "P99_MS", "UTIL%", "INFLIGHT",
    "ERRORS", "STATE", "AQU-SZ", "F/S", "D/S",
];
const RIGHT: &[bool] =
    &[false, false, true, true, true, true, true, true, true, true, true, true, false, true, true, true];

impl Column {
    /// The column `by` places to the right, up to the last.
    pub(super) fn moved(self, by: isize) -> Column {
        let all = Column::value_variants();
        let at = all.iter().position(|column| *column == self).unwrap_or(0);
        all[at.saturating_add_signed(by).min(all.len() - 1)]
    }

    /// The heading.
    pub(super) fn head(self) -> &'static str {
        HEADS[self as usize]
    }

    /// What numbers are sorted by, and how many decimals are shown; none: the column is text.
    fn number(self, rates: &Rates) -> Option<(Option<f64>, usize)> {
        let ms = |ns: Option<u64>| ns.map(|ns| ns as f64 / 1e6);
        Some(match self {
            Column::Device | Column::User | Column::State => return None,
            Column::Operations => (Some(rates.operations()), 1),
            Column::Reads => (Some(rates.reads_per_second), 1),
            Column::Writes => (Some(rates.writes_per_second), 1),
            Column::ReadBytes => (Some(rates.read_bytes_per_second / 1024.0), 1),
            Column::WriteBytes => (Some(rates.write_bytes_per_second / 1024.0), 1),
            Column::Average => (ms(rates.average_ns), 3),
            Column::P99 => (ms(rates.p99_ns), 3),
            Column::Utilisation => (rates.utilisation_percent, 1),
            Column::InFlight => (Some(rates.in_flight as f64), 0),
            Column::Errors => (rates.errors.map(|errors| errors as f64), 0),
            Column::QueueDepth => (rates.queue_depth, 2),
            Column::Flushes => (Some(rates.flushes_per_second), 1),
            Column::Discards => (Some(rates.discards_per_second), 1),
        })
    }

    fn cell(self, device: &DeviceRates) -> String {
        match self {
            Column::Device => device.name.clone(),
            Column::User => device.user.clone(),
            Column::State => state(device).to_owned(),
            column => match device.rates.as_ref().and_then(|rates| column.number(rates)) {
                Some((Some(number), decimals)) => format!("{number:.decimals$}"),
                _ => "-".to_owned(),
            },
        }
    }

    /// The busiest first, text by alphabet. Devices without a value are always last.
    fn compare(self, one: &DeviceRates, other: &DeviceRates, reverse: bool) -> Ordering {
        let turned = |order: Ordering| if reverse { order.reverse() } else { order };
        let number = |device: &DeviceRates| self.number(device.rates.as_ref()?)?.0;
        let order = match (self, number(one), number(other)) {
            (Column::Device, ..) => turned(by_name(one, other)),
            (Column::User, ..) => turned(one.user.cmp(&other.user)),
            (Column::State, ..) => turned(state(one).cmp(state(other))),
            (_, Some(one), Some(other)) => turned(other.total_cmp(&one)),
            (_, one, other) => other.is_some().cmp(&one.is_some()),
        };
        order.then_with(|| by_name(one, other))
    }
}

/// loop10 comes after loop9.
fn by_name(one: &DeviceRates, other: &DeviceRates) -> Ordering {
    let key = |device: &DeviceRates| {
        (device.name.rsplit_once('/').map_or(0, |(owner, _)| owner.len()), device.number)
    };
    let ((one_end, one_number), (other_end, other_number)) = (key(one), key(other));
    one.name[..one_end].cmp(&other.name[..other_end]).then(one_number.cmp(&other_number))
}

fn state(device: &DeviceRates) -> &'static str {
    match device.state {
        Some(DeviceState::Live) => "live",
        Some(DeviceState::Degraded) => "degraded",
        Some(DeviceState::Stuck) => "stuck",
        None => "-",
    }
}

/// Which devices are shown, and in what order.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) sort: Column,
    pub(super) reverse: bool,
    /// Text in the name, user, image or state of the devices, in any case.
    pub(super) filter: String,
    pub(super) hide_idle: bool,
}

impl View {
    /// The interval with the selected devices in order, and their sum.
    pub(super) fn select(&self, interval: &Interval) -> Interval {
        let filter = self.filter.to_lowercase();
        let has = |text: &str| text.to_lowercase().contains(&filter);
        let mut selected = interval.clone();
        selected.devices.retain(|device| {
            let found = has(&device.name) || has(&device.user) || has(&device.image) || has(state(device));
            found && !(self.hide_idle && device.is_idle())
        });
        selected.devices.sort_by(|one, other| self.sort.compare(one, other, self.reverse));
        selected.sum_up();
        selected
    }

    /// Two lines on the whole of an interval, from which `shown` is selected.
    pub(super) fn summary(&self, all: &Interval, shown: &Interval) -> [String; 2] {
        let seconds = all.at_unix_ms / 1000 % 86_400;
        let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        let length = all.seconds.map_or("measuring".to_owned(), |seconds| format!("{seconds:.1} s"));
        let mut first = format!("loopengine top - {hours:02}:{minutes:02}:{seconds:02} UTC, {length}, ");
        if let Some(problem) = &all.problem {
            return [first + "no answer from the daemon", printable(problem)];
        }
        let (devices, hidden) = (all.devices.len(), all.devices.len() - shown.devices.len());
        first += &format!("{devices} device{}, {hidden} hidden", if devices == 1 { "" } else { "s" });
        for unhealthy in ["degraded", "stuck"] {
            let count = all.devices.iter().filter(|device| state(device) == unhealthy).count();
            if count > 0 {
                first += &format!(", {count} {unhealthy}");
            }
        }
        first += &format!(", by {}{}", self.sort.head(), if self.reverse { " reversed" } else { "" });
        if !self.filter.is_empty() {
            first += &format!(", filter {:?}", self.filter);
        }
        let mut total = "total:".to_owned();
        for column in Column::value_variants() {
            // Sums only.
            if let Some((Some(sum), decimals)) = column.number(&shown.total) {
                total += &format!(" {} {sum:.decimals$}", column.head());
            }
        }
        [first, total]
    }

    /// The table of selected devices: the heading and one line per device.
    pub(super) fn table(&self, shown: &Interval) -> Vec<String> {
        let mut table = Table::new(&HEADS, RIGHT);
        for device in &shown.devices {
            table.row(Column::value_variants().iter().map(|column| column.cell(device)).collect());
        }
        table.render().lines().map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, number: u32, reads: Option<f64>) -> DeviceRates {
        let rates = reads.map(|reads| Rates { reads_per_second: reads, ..Rates::default() });
        DeviceRates { name: name.into(), number, user: "root".into(), rates, ..DeviceRates::default() }
    }

    fn interval() -> Interval {
        let devices = vec![
            device("b/loop10", 10, Some(5.0)),
            device("b/loop9", 9, Some(0.0)),
            DeviceRates {
                user: "anna".into(),
                image: "/srv/anna/\u{1b}[31mA.img".into(),
                state: Some(DeviceState::Stuck),
                ..device("a\u{1b}/loop0", 0, None)
            },
            device("c/loop1", 1, Some(7.0)),
        ];
        Interval { seconds: Some(2.0), devices, ..Interval::default() }
    }

    fn view(sort: Column) -> View {
        View { sort, reverse: false, filter: String::new(), hide_idle: false }
    }

    fn names(view: &View) -> Vec<String> {
        view.select(&interval()).devices.into_iter().map(|device| device.name).collect()
    }

    #[test]
    fn sorts_numbers_down_and_names_up() {
        let reads = view(Column::Reads);
        assert_eq!(names(&reads), ["c/loop1", "b/loop10", "b/loop9", "a\u{1b}/loop0"]);
        let reversed = View { reverse: true, ..reads };
        assert_eq!(names(&reversed), ["b/loop9", "b/loop10", "c/loop1", "a\u{1b}/loop0"], "none is last");
        let device = view(Column::Device);
        assert_eq!(names(&device), ["a\u{1b}/loop0", "b/loop9", "b/loop10", "c/loop1"]);
        assert_eq!(names(&View { reverse: true, ..device })[0], "c/loop1");
        assert_eq!(names(&view(Column::User))[0], "a\u{1b}/loop0");
    }

    #[test]
    fn filters_by_name_user_image_and_state() {
        for (filter, found) in [("LOOP1", 2), ("Anna", 1), ("a.IMG", 1), ("stuck", 1), ("nobody", 0), ("", 4)]
        {
            let view = View { filter: filter.into(), ..view(Column::Device) };
            assert_eq!(names(&view).len(), found, "{filter}");
        }
    }

    #[test]
    fn hides_idle_devices_only() {
        let view = View { hide_idle: true, ..view(Column::Reads) };
        assert_eq!(names(&view), ["c/loop1", "b/loop10", "a\u{1b}/loop0"], "a stuck one is not idle");
        let shown = view.select(&interval());
        assert_eq!(shown.total.reads_per_second, 12.0);
        let [first, total] = view.summary(&interval(), &shown);
        assert!(first.ends_with("4 devices, 1 hidden, 1 stuck, by R/S"), "{first}");
        assert!(total.starts_with("total: IO/S 12.0 R/S 12.0 W/S 0.0") && !total.contains("UTIL"), "{total}");
    }

    #[test]
    fn shows_names_without_control_characters() {
        let view = view(Column::Device);
        let table = view.table(&view.select(&interval()));
        assert!(table[0].starts_with("DEVICE") && table[1].starts_with("a?/loop0"), "{table:?}");
        let problem = Interval { problem: Some("a\u{1b}b".into()), ..Interval::default() };
        assert_eq!(view.summary(&problem, &problem)[1], "a?b");
    }

    #[test]
    fn names_of_columns_are_their_headings() {
        assert_eq!(Column::value_variants().len(), HEADS.len());
        assert_eq!(RIGHT.len(), HEADS.len());
        for column in Column::value_variants() {
            let name = column.to_possible_value().unwrap().get_name().to_owned();
            assert_eq!(name.to_uppercase(), column.head());
        }
        assert_eq!(Column::Device.moved(-1), Column::Device);
        assert_eq!(Column::Device.moved(1), Column::User);
        assert_eq!(Column::Discards.moved(1), Column::Discards);
    }
}
