//! Rows of made-up measurements.

use super::*;
use crate::environment::Environment;
use crate::record::Timing;
use l2p_engine::ceilings::Ceilings;
use l2p_engine::profile::Work;
use serde_json::{Value, json};

fn record(rows: Vec<Row>) -> Record {
    Record {
        bench: "b".into(),
        environment: Environment {
            gpu: "NVIDIA H200".into(),
            driver: "1".into(),
            commit: "c".into(),
            date: "2026-01-01T00:00:00Z".into(),
        },
        torch: Some("2".into()),
        ceilings: ceilings(),
        rows,
    }
}

fn ceilings() -> Ceilings {
    Ceilings {
        bytes_per_second: 4e12,
        flops_per_second: 800e12,
        copy_bytes: 1,
        product_size: 1,
    }
}

fn row(name: &str, ms: f64, work: Work, peers: &[(&str, f64, u64)]) -> Row {
    let inputs = json!({"m": 1, "n": 2, "k": 3, "steps": 8});
    let mut row = Row::new(name, inputs, Timing::of(vec![ms]), work, &ceilings()).checked(0.0, 1.0);
    row.peers = peers
        .iter()
        .map(|&(name, ms, bytes)| PeerTime {
            name: name.into(),
            timing: Timing::of(vec![ms]),
            ratio: None,
            peak_bytes: Some(bytes),
            activation_bytes: Some(bytes),
            driver_bytes: None,
            failure: None,
        })
        .collect();
    row
}

fn flops(flops: u64) -> Work {
    Work { flops, bytes: 0 }
}

fn found<'a>(rows: &'a [TargetRow], name: &str) -> &'a TargetRow {
    let row = rows.iter().find(|row| row.name.starts_with(name));
    row.unwrap_or_else(|| panic!("no row {name}: {rows:#?}"))
}

fn everything() -> Measurements {
    let nothing = Work::default();
    let mut step = row(
        "pixel-4k",
        93.0,
        nothing,
        &[("eager, cudnn", 180.0, 0), ("compiled, cudnn", 110.0, 0)],
    );
    step.details.insert("host_ms".into(), json!(0.25));
    step.details.insert("idle".into(), json!(0.02));
    let op = json!({"operations": [{"name": "linear"}, {"name": "rms_norm"}]});
    step.details.insert("operations".into(), op);
    let mut sample = row("sample-pixel-4k", 1050.0, nothing, &[]);
    sample.peak_bytes = 13_900_000_000;
    sample
        .details
        .insert("driver_bytes".into(), Value::from(14_200_000_000u64));
    sample
        .details
        .insert("accounted_bytes".into(), Value::from(13_900_000_000u64));
    let moving = Work {
        flops: 0,
        bytes: 3_000_000_000,
    };
    let mut decode = row(
        "latent-4k-decode",
        2000.0,
        nothing,
        &[("eager", 2900.0, 53_000_000_000)],
    );
    decode.activation_bytes = 30_000_000_000;
    let parts = [
        (
            "attention",
            vec![row(
                "attention-4192-auto",
                1.0,
                flops(700_000_000_000),
                &[("cudnn", 1.25, 0), ("flash", 2.0, 0)],
            )],
        ),
        (
            "elementwise",
            vec![row("swiglu", 1.0, moving, &[]), row("rms_norm", 1.0, moving, &[])],
        ),
        (
            "products",
            vec![row(
                "gemm-qkv",
                1.0,
                flops(700_000_000_000),
                &[("linear", 0.99, 0), ("mm", 0.97, 0)],
            )],
        ),
        (
            "head",
            vec![
                row("head-1k", 1.4, nothing, &[("eager", 1.0, 0), ("compiled", 3.0, 0)]),
                row("head-4k", 3.5, nothing, &[("compiled", 15.0, 5_000_000_000)]),
            ],
        ),
        ("step-4k", vec![step]),
        ("step-1k", vec![row("pixel-1k", 90.0, nothing, &[])]),
        (
            "latent-4k",
            vec![
                row(
                    "latent-4k",
                    5000.0,
                    nothing,
                    &[("eager, cudnn", 5600.0, 21_000_000_000)],
                ),
                decode,
            ],
        ),
        ("sample", vec![sample]),
    ];
    parts
        .into_iter()
        .map(|(name, rows)| (name.to_owned(), record(rows)))
        .collect()
}

#[test]
fn rows_compare_with_the_peers_that_the_targets_name() {
    let rows = rows(&everything(), &Sizes::published());
    for (name, ratio, pass) in [
        ("attention forward, L = 4192", Some(1.25), true),
        ("swiglu", Some(0.75), true),
        ("rms_norm", Some(0.75), false),
        ("product qkv, 1 x 2 x 3", Some(0.97), false),
        ("Detailer Head 4K", Some(3.5 / 15.0), true),
        ("Detailer Head 1K", Some(1.4 / 3.0), true),
        ("whole 4K step", Some(93.0 / 110.0), true),
        ("whole 4K step, speed-up", Some(5600.0 / 93.0), true),
        ("whole 1K step", None, false),
        ("4K step, host time", None, true),
        ("4K step, GPU idle", None, false),
        ("4K sampling, peak as the driver", None, true),
        ("4K sampling, peak against", Some(14.2 / 53.0), true),
        ("4K sampling, driver's count less", None, true),
        ("latent 4K step", Some(5.0 / 5.6), true),
        ("VAE decode 4096²", Some(20.0 / 29.0), true),
        ("VAE decode 4096², activations", Some(30.0 / 53.0), false),
        ("8 steps of 4K", None, true),
    ] {
        let row = found(&rows, name);
        match (row.ratio, ratio) {
            (Some(a), Some(b)) => assert!((a - b).abs() < 1e-9, "{row:#?}"),
            (a, b) => assert_eq!(a, b, "{row:#?}"),
        }
        assert_eq!(row.pass, pass, "{row:#?}");
    }
    let activations = found(&rows, "Detailer Head 4K, activations");
    assert!(activations.pass && activations.target == "≤ 0.8 GB", "{activations:#?}");
}

#[test]
fn what_was_not_measured_makes_no_row() {
    assert!(rows(&Measurements::new(), &Sizes::published()).is_empty());
    let mut measured = everything();
    measured.remove("latent-4k");
    let rows = rows(&measured, &Sizes::published());
    assert!(rows.iter().all(|row| !row.name.contains("latent")), "{rows:#?}");
}

/// Against the same in bf16, against PyTorch's sequence, and against the longer of copying and computing.
#[test]
fn eight_bits_and_host_memory_are_judged() {
    let nothing = Work::default();
    let with = |mut row: Row, details: &[(&str, Value)]| {
        let details = details.iter().cloned();
        row.details
            .extend(details.map(|(name, value)| (name.to_owned(), value)));
        row
    };
    let driver = |bytes: u64| ("driver_bytes", Value::from(bytes));
    let sequence = [("fp8 products and attention", 60.0, 0)];
    let steps = vec![
        with(row("pixel-4k", 90.0, nothing, &[]), &[driver(14_000_000_000)]),
        with(row("pixel-4k-int8", 54.0, nothing, &sequence), &[driver(9_000_000_000)]),
        with(row("pixel-4k-fp8", 60.0, nothing, &sequence), &[driver(7_000_000_000)]),
    ];
    let streamed = row("pixel-4k-int8-streamed", 103.0, nothing, &[]);
    let streamed = with(streamed, &[driver(3_900_000_000), ("copy_ms", json!(95.0))]);
    let picture = with(
        row("sample-pixel-8k-int8", 1000.0, nothing, &[]),
        &[driver(15_000_000_000)],
    );
    let measured: Measurements = [
        ("eight-bit", steps),
        ("streamed", vec![streamed]),
        ("sample-8k", vec![picture]),
    ]
    .into_iter()
    .map(|(name, rows)| (name.to_owned(), record(rows)))
    .collect();
    let rows = rows(&measured, &Sizes::published());
    for (name, ratio, pass) in [
        ("4K step, int8 trunk", Some(0.6), true),
        ("4K step, int8 trunk, against fp8", Some(0.9), true),
        ("4K step, int8 trunk, memory", Some(9.0 / 14.0), false),
        ("4K step, fp8 trunk", Some(60.0 / 90.0), false),
        ("4K step, fp8 trunk, against fp8", Some(1.0), false),
        ("4K step, fp8 trunk, memory", Some(0.5), true),
        ("4K step, int8 trunk in host memory", Some(103.0 / 95.0), true),
        ("4K step, int8 trunk in host memory, memory", None, true),
        ("8K sampling in int8", None, true),
    ] {
        let exact = rows.iter().find(|row| row.name == name);
        let row = exact.unwrap_or_else(|| found(&rows, name));
        match (row.ratio, ratio) {
            (Some(a), Some(b)) => assert!((a - b).abs() < 1e-9, "{row:#?}"),
            (a, b) => assert_eq!(a, b, "{row:#?}"),
        }
        assert_eq!(row.pass, pass, "{row:#?}");
    }
}
