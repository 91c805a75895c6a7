//! The statistics against scipy's.

#![allow(clippy::unwrap_used)]

use senmon_compare::statistics::{Interval, crossed, holm, paired, ratio};
use senmon_compare::student::{cdf, two_sided_quantile};
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/statistics.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn near(found: f64, wanted: &Value, what: &str) {
    let wanted = wanted.as_f64().unwrap();
    assert!((found - wanted).abs() <= 1e-9 * wanted.abs().max(1e-3), "{what}: {found} is not {wanted}");
}

fn same(found: Interval, wanted: &Value) {
    for (value, name) in [
        (found.estimate, "estimate"),
        (found.low, "low"),
        (found.high, "high"),
        (found.df, "df"),
        (found.p, "p"),
    ] {
        near(value, &wanted[name], name);
    }
}

#[test]
fn students_distribution_is_scipys() {
    let golden = golden();
    for case in golden["student"].as_array().unwrap() {
        near(cdf(case["t"].as_f64().unwrap(), case["df"].as_f64().unwrap()), &case["cdf"], &case.to_string());
    }
    for case in golden["quantiles"].as_array().unwrap() {
        let found = two_sided_quantile(case["alpha"].as_f64().unwrap(), case["df"].as_f64().unwrap());
        near(found, &case["t"], &case.to_string());
    }
}

#[test]
fn intervals_are_scipys() {
    let golden = golden();
    for case in golden["paired"].as_array().unwrap() {
        same(
            paired(&numbers(&case["differences"]), case["alpha"].as_f64().unwrap()).unwrap(),
            &case["interval"],
        );
    }
    for case in golden["ratios"].as_array().unwrap() {
        let (ratios, without) = (numbers(&case["ratios"]), numbers(&case["without"]));
        same(ratio(&ratios, &without, case["alpha"].as_f64().unwrap()).unwrap(), &case["interval"]);
    }
    for case in golden["crossed"].as_array().unwrap() {
        let rows: Vec<Vec<f64>> = case["differences"].as_array().unwrap().iter().map(numbers).collect();
        let found = crossed(&rows, &numbers(&case["weights"]), case["alpha"].as_f64().unwrap());
        same(found.unwrap(), &case["interval"]);
    }
}

#[test]
fn corrections_are_holms() {
    for case in golden()["holm"].as_array().unwrap() {
        for (found, wanted) in holm(&numbers(&case["p"])).iter().zip(case["holm"].as_array().unwrap()) {
            near(*found, wanted, "p");
        }
    }
}
