//! The operations of a profile as a table and as JSON.

use std::fmt::Write;

use l2p_engine::ceilings::Ceilings;
use l2p_engine::profile::{ClassTime, Profile};
use serde_json::{Value, json};

/// One line per kind of operation: calls, time, share of the whole, rate, and share of the ceiling.
pub fn table(profile: &Profile, ceilings: &Ceilings) -> String {
    let mut text = format!(
        "{:<26}{:>6}{:>12}{:>9}{:>16}{:>10}\n",
        "operation", "calls", "time", "share", "rate", "ceiling"
    );
    let classes = profile.classes();
    for class in &classes {
        let share = class.milliseconds / profile.milliseconds.max(f64::MIN_POSITIVE);
        // Writing to a string succeeds.
        let _ = writeln!(
            text,
            "{:<26}{:>6}{:>9.3} ms{:>7.1} %{:>16}{:>8.1} %",
            class.name,
            class.calls,
            class.milliseconds,
            100.0 * share,
            rate(class, ceilings),
            100.0 * ceilings.share(class.work, class.milliseconds)
        );
    }
    let between = profile.milliseconds - classes.iter().map(|class| class.milliseconds).sum::<f64>();
    let _ = writeln!(
        text,
        "{:<26}{:>6}{:>9.3} ms{:>7.1} %",
        "between operations",
        "",
        between,
        100.0 * between / profile.milliseconds.max(f64::MIN_POSITIVE)
    );
    let _ = write!(
        text,
        "{:<26}{:>6}{:>9.3} ms, copies run at {:.2} TB/s, products at {:.1} TFLOP/s",
        "whole",
        profile.ops.len(),
        profile.milliseconds,
        ceilings.bytes_per_second / 1e12,
        ceilings.flops_per_second / 1e12
    );
    text
}

/// The rate that counts for the class: of products or of bytes, whichever is nearer to its ceiling.
fn rate(class: &ClassTime, ceilings: &Ceilings) -> String {
    let seconds = class.milliseconds.max(f64::MIN_POSITIVE) / 1e3;
    match ceilings.bound_by_products(class.work) {
        true => format!("{:.1} TFLOP/s", class.work.flops as f64 / seconds / 1e12),
        false => format!("{:.3} TB/s", class.work.bytes as f64 / seconds / 1e12),
    }
}

/// The same as JSON.
pub fn json(profile: &Profile, ceilings: &Ceilings) -> Value {
    let classes = profile.classes();
    let classes = classes.iter().map(|class| {
        let seconds = class.milliseconds.max(f64::MIN_POSITIVE) / 1e3;
        json!({
            "name": class.name,
            "calls": class.calls,
            "milliseconds": class.milliseconds,
            "share": class.milliseconds / profile.milliseconds.max(f64::MIN_POSITIVE),
            "tflops": class.work.flops as f64 / seconds / 1e12,
            "terabytes_per_second": class.work.bytes as f64 / seconds / 1e12,
            "share_of_ceiling": ceilings.share(class.work, class.milliseconds),
        })
    });
    json!({
        "milliseconds": profile.milliseconds,
        "operations": classes.collect::<Vec<_>>(),
        "ceilings": ceilings,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use l2p_engine::profile::{OpTime, Work};

    fn profile() -> (Profile, Ceilings) {
        let op = |name, milliseconds, flops, bytes| OpTime {
            name,
            shape: [1].into(),
            work: Work { flops, bytes },
            milliseconds,
        };
        let ops = vec![
            op("linear", 1.0, 400_000_000_000, 1000),
            op("swiglu", 0.5, 0, 1_000_000_000),
            op("linear", 1.0, 400_000_000_000, 1000),
        ];
        let ceilings = Ceilings {
            bytes_per_second: 4e12,
            flops_per_second: 800e12,
            copy_bytes: 1,
            product_size: 1,
        };
        let profile = Profile { ops, milliseconds: 4.0 };
        (profile, ceilings)
    }

    #[test]
    fn classes_are_lines_with_rate_and_share() {
        let (profile, ceilings) = profile();
        let text = table(&profile, &ceilings);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            lines[1],
            [
                "linear", "2", "2.000", "ms", "50.0", "%", "400.0", "TFLOP/s", "50.0", "%"
            ]
        );
        assert_eq!(
            lines[2],
            ["swiglu", "1", "0.500", "ms", "12.5", "%", "2.000", "TB/s", "50.0", "%"]
        );
        assert_eq!(lines[3], ["between", "operations", "1.500", "ms", "37.5", "%"]);
    }

    #[test]
    fn json_says_the_same() {
        let (profile, ceilings) = profile();
        let found = json(&profile, &ceilings);
        assert_eq!(found["operations"][0]["share"], 0.5);
        assert_eq!(found["operations"][1]["share_of_ceiling"], 0.5);
    }
}
