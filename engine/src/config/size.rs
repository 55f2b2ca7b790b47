// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Parses and formats sizes in bytes: `4096`, `1k`, `512M`, `10GiB`. Units are powers of 1024,
//! except those that end with B alone (`10GB`): they are powers of 1000, as in losetup(8) and
//! dd(1).

const UNITS: &str = "KMGTPE";

/// Parses a size. clap prints the error.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let wrong =
        || format!("'{text}' is not a size; give bytes, or a number with a unit, as in 512M, 10GiB or 10GB");
    let number: u64 = match number.parse() {
        Ok(number) => number,
        Err(_) if number.is_empty() => return Err(wrong()),
        Err(_) => return Err(format!("'{text}' is too large")),
    };
    let unit = unit.to_ascii_uppercase();
    let mut chars = unit.chars();
    let power = match chars.next() {
        None => 0,
        Some(letter) => 1 + UNITS.find(letter).ok_or_else(wrong)?,
    };
    let base: u64 = match chars.as_str() {
        "" | "IB" => 1024,
        "B" => 1000,
        _ => return Err(wrong()),
    };
    // The power is at most 6, so it fits.
    number
        .checked_mul((0..power).fold(1, |product, _| product * base))
        .filter(|&bytes| i64::try_from(bytes).is_ok())
        .ok_or_else(|| format!("'{text}' is too large"))
}

/// Parses a number of bytes per second.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    match parse(text)? {
        0 => Err("0 bytes per second would stop all I/O".to_owned()),
        bytes => Ok(bytes),
    }
}

/// Bytes per second in human-readable form; 0: no limit.
pub fn show_rate(bytes: u64) -> String {
    if bytes == 0 { "none".to_owned() } else { format!("{}/s", show(bytes)) }
}

/// Parses a logical block size.
pub fn parse_block(text: &str) -> Result<u32, String> {
    let bytes = parse(text)?;
    u32::try_from(bytes)
        .ok()
        .filter(|bytes| (512..=65536).contains(bytes) && bytes.is_power_of_two())
        .ok_or_else(|| format!("'{text}' is not a block size; give a power of two from 512 to 65536"))
}

/// A size in human-readable form: three digits and a unit, exact for whole units.
pub fn show(bytes: u64) -> String {
    show_f64(bytes as f64)
}

/// The same for a rate.
pub fn show_f64(bytes: f64) -> String {
    let mut value = bytes;
    let mut unit = 'B';
    for next in UNITS.chars() {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    match unit {
        'B' => format!("{value:.0}B"),
        _ if value.fract() == 0.0 || value >= 99.95 => format!("{value:.0}{unit}"),
        _ => format!("{value:.1}{unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parses_sizes() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("1k"), Ok(1024));
        assert_eq!(parse("512M"), Ok(512 << 20));
        assert_eq!(parse("10G"), Ok(10 << 30));
        assert_eq!(parse("2TiB"), Ok(2 << 40));
        assert_eq!(parse("0"), Ok(0));
        assert_eq!((parse("1MB"), parse("1mib"), parse("3kB")), (Ok(1_000_000), Ok(1 << 20), Ok(3000)));
        for bad in [
            "",
            "G",
            "-1",
            "1.5G",
            "1 G",
            "1B",
            "1GiBB",
            "1iB",
            "1kk",
            "1é",
            "99999999999999999999",
            "16E",
            "8E",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn parses_block_sizes() {
        assert_eq!(parse_block("4k"), Ok(4096));
        for bad in ["0", "256", "513", "128K", "1G", "-512"] {
            assert!(parse_block(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn parses_and_formats_rates() {
        assert_eq!((parse_rate("10M"), show_rate(10 << 20)), (Ok(10 << 20), "10M/s".to_owned()));
        assert_eq!((parse_rate("0").is_err(), show_rate(0)), (true, "none".to_owned()));
    }

    #[test]
    fn formats_sizes() {
        assert_eq!(show(0), "0B");
        assert_eq!(show(1023), "1023B");
        assert_eq!(show(10 << 30), "10G");
        assert_eq!(show(1536), "1.5K");
        assert_eq!(show(u64::MAX), "16E");
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "\\PC*") {
            let _ = parse(&text);
            let _ = parse_block(&text);
        }

        #[test]
        fn formatting_inverts_parsing(number in 0u64..1000, unit in 0usize..5) {
            let text = format!("{number}{}", &UNITS[unit..=unit]);
            let bytes = parse(&text).unwrap();
            prop_assert_eq!(bytes, number << (10 * (unit + 1)));
            if number > 0 {
                prop_assert_eq!(show(bytes), text);
            }
        }
    }
}
