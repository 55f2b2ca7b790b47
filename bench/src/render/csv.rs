// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `result.csv`: one line per sample, for spreadsheets and R.
//!
//! Plain numbers in base units; unknown values are empty.

use crate::outcome::Outcome;

const HEAD: &str = "round,job,target,iops,bytes_per_s,p50_ns,p99_ns,\
    submitter_ns,engine_ns,system_ns,switches,punts";

pub(super) fn csv(outcome: &Outcome) -> String {
    let mut text = format!("{HEAD}\n");
    for sample in &outcome.samples {
        let cost = &sample.cost;
        let costs = [cost.submitter_ns, cost.engine_ns, cost.system_ns, cost.switches, cost.punts];
        let mut fields = vec![
            sample.round.to_string(),
            quoted(&sample.job),
            quoted(&sample.target),
            sample.iops.to_string(),
            sample.bytes_per_s.to_string(),
            sample.p50_ns.to_string(),
            sample.p99_ns.to_string(),
        ];
        fields.extend(costs.map(|cost| cost.map_or(String::new(), |value| value.to_string())));
        text.push_str(&fields.join(","));
        text.push('\n');
    }
    text
}

/// Quotes a field as in RFC 4180.
pub fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_only_where_necessary() {
        assert_eq!(quoted("kernel loop"), "kernel loop");
        assert_eq!(quoted("a,\"b\"\n"), "\"a,\"\"b\"\"\n\"");
    }
}
