use std::sync::OnceLock;

use half::bf16;

use super::*;
use crate::{BF16_TOLERANCE, F32_TOLERANCE, random, random_bf16};

fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect()
}

fn passed(outcome: Outcome) {
    if let Err(failed) = outcome {
        panic!("{}", failed.message().expect("an error has a message"));
    }
}

/// What goes through: pure rounding, at the tolerance of one operation. Every part keeps a margin of two.
fn expect_margin(what: &str, expected: &[f32], shape: &[usize]) {
    let found = rounded(expected);
    passed(expect_close(what, &found, expected, shape, BF16_TOLERANCE));
    for part in worst_parts(&found, expected, shape, (0, 1), BF16_TOLERANCE) {
        assert!(part.share < 0.5, "{what}: {part}");
    }
}

/// The error that a fault is refused with; its error of the whole is below the tolerance, so that nothing but the parts show it.
fn refused(what: &str, found: &[f32], expected: &[f32], shape: &[usize]) -> String {
    assert!(
        relative_error(found, expected) < BF16_TOLERANCE,
        "{what} shows in the whole"
    );
    let outcome = expect_close(what, found, expected, shape, BF16_TOLERANCE);
    outcome
        .expect_err(what)
        .message()
        .expect("an error has a message")
        .to_owned()
}

const PICTURE: [usize; 4] = [1, 1024, 2048, 3];

/// A picture rounded to bf16, and the picture.
fn picture() -> (Vec<f32>, Vec<f32>) {
    static PICTURES: OnceLock<(Vec<f32>, Vec<f32>)> = OnceLock::new();
    let pictures = PICTURES.get_or_init(|| {
        let expected = random("picture", PICTURE.iter().product());
        (rounded(&expected), expected)
    });
    pictures.clone()
}

fn pixel(y: usize, x: usize) -> usize {
    (y * PICTURE[2] + x) * PICTURE[3]
}

#[test]
fn rounding_passes_with_a_margin_of_two() {
    expect_margin("picture", &random("picture", PICTURE.iter().product()), &PICTURE);
    expect_margin("tokens", &random("tokens", 3 * 700 * 1032), &[3, 700, 1032]);
    expect_margin("few", &random("few", 8), &[1, 1, 8]);
    expect_margin("one", &[1.003_906_2], &[1]);
    // Squares and cubes: many small values beside few large ones.
    for power in [2, 3] {
        let values: Vec<f32> = random("tails", 1 << 20)
            .into_iter()
            .map(|value| value.powi(power))
            .collect();
        expect_margin("tails", &values, &[1, 1024, 1024]);
    }
    // Rows of very different size, as the weights of queries that see few keys or many.
    let rows: Vec<f32> = random("rows", 1000 * 128)
        .into_iter()
        .enumerate()
        .map(|(index, value)| value / ((1 + index / 128) as f32).sqrt())
        .collect();
    expect_margin("rows", &rows, &[1, 1000, 128]);
}

/// Differences of two numbers of which one was rounded: the error is that of the larger.
#[test]
fn what_is_rounded_on_the_way_passes() {
    let (a, b) = (random("a", 1 << 20), random_bf16("b", 1 << 20));
    let difference = |a: &[f32]| -> Vec<f32> { a.iter().zip(&b).map(|(a, b)| a - b).collect() };
    let (expected, found) = (difference(&a), rounded(&difference(&rounded(&a))));
    let outcome = expect_close("difference", &found, &expected, [1, 1024, 1024], BF16_TOLERANCE);
    passed(outcome);
}

#[test]
fn a_wrong_corner_is_refused() {
    for (y, x) in [(0, 0), (1016, 2040), (512, 1000), (1021, 2043)] {
        let (mut found, expected) = picture();
        for row in y..(y + 8).min(1024) {
            for column in x..(x + 8).min(2048) {
                for channel in 0..3 {
                    found[pixel(row, column) + channel] *= 0.9;
                }
            }
        }
        let message = refused("corner", &found, &expected, &PICTURE);
        assert!(
            message.contains(&format!("tile at row {}, column {}", y / 8 * 8, x / 8 * 8)),
            "{message}"
        );
    }
}

/// A corner that is zero, as one that no kernel wrote.
#[test]
fn a_missing_corner_is_refused() {
    let shape = [1, 2048, 4096, 1];
    let expected = random("grey", shape.iter().product());
    let mut found = rounded(&expected);
    for row in 0..8 {
        found[row * 4096..][..8].fill(0.0);
    }
    let message = refused("corner", &found, &expected, &shape);
    assert!(message.contains("tile at row 0, column 0 of plane 0"), "{message}");
}

#[test]
fn one_wrong_element_is_refused() {
    let (rounded, expected) = picture();
    let at = pixel(700, 1234) + 1;
    for wrong in [-expected[at], 0.9 * expected[at], expected[at + 1]] {
        let mut found = rounded.clone();
        found[at] = wrong;
        let message = refused("element", &found, &expected, &PICTURE);
        assert!(message.contains("element [0, 700, 1234, 1]"), "{message}");
    }
}

#[test]
fn a_swapped_pair_is_refused() {
    let (mut found, expected) = picture();
    found.swap(pixel(3, 5), pixel(3, 6));
    refused("pair", &found, &expected, &PICTURE);
}

/// A row, a column, a head or a channel that is off by a few percent: no element of it is far off.
#[test]
fn a_slightly_wrong_slice_is_refused() {
    let (rounded, expected) = picture();
    let slices: [(&str, &dyn Fn(usize) -> bool); 2] = [
        ("1023 of dimension 1", &|index| index / 3 / 2048 == 1023),
        ("17 of dimension 2", &|index| index / 3 % 2048 == 17),
    ];
    for (place, within) in slices {
        let mut found = rounded.clone();
        let wrong = found.iter_mut().enumerate().filter(|(index, _)| within(*index));
        wrong.for_each(|(_, value)| *value *= 1.015);
        let message = refused("slice", &found, &expected, &PICTURE);
        assert!(message.contains(place), "{message}");
    }
    let shape = [1, 500, 30 * 128];
    let expected = random("tokens", shape.iter().product());
    let mut found = self::rounded(&expected);
    // One head of one token.
    found[123 * 3840 + 5 * 128..][..128]
        .iter_mut()
        .for_each(|value| *value *= 1.025);
    let message = refused("head", &found, &expected, &shape);
    assert!(message.contains("run from [0, 123, 6"), "{message}");
    // One channel of all tokens.
    let mut found = self::rounded(&expected);
    found
        .iter_mut()
        .skip(77)
        .step_by(3840)
        .for_each(|value| *value *= 1.015);
    let message = refused("channel", &found, &expected, &shape);
    assert!(message.contains("slice 77 of dimension 2"), "{message}");
}

/// Two rows exchanged whose elements are alike in size.
#[test]
fn exchanged_rows_are_refused() {
    let shape = [4, 1000, 64];
    let expected: Vec<f32> = random("rows", shape.iter().product())
        .into_iter()
        .map(|value| 1.0 + 0.05 * value)
        .collect();
    let mut found = rounded(&expected);
    let (a, b) = (321 * 64, 322 * 64);
    (0..64).for_each(|column| found.swap(a + column, b + column));
    refused("rows", &found, &expected, &shape);
}

/// In a sample of a tensor the parts are those of the whole tensor.
#[test]
fn samples_are_compared_where_they_stand() {
    let (rounded, expected) = picture();
    let of = |values: &[f32]| -> Vec<f32> { values.iter().skip(1).step_by(7).copied().collect() };
    let check =
        |found: &[f32]| expect_sample_close("sample", &of(found), &of(&expected), &PICTURE, (1, 7), BF16_TOLERANCE);
    passed(check(&rounded));
    let mut found = rounded.clone();
    for row in 80..88 {
        found[pixel(row, 16)..pixel(row, 24)]
            .iter_mut()
            .for_each(|value| *value *= 0.93);
    }
    let failed = check(&found).expect_err("a tile is wrong");
    let message = failed.message().expect("an error has a message");
    assert!(message.contains("tile at row 80, column 16 of plane 0"), "{message}");
}

#[test]
fn pictures_with_channels_first_have_tiles_too() {
    let shape = [2, 3, 256, 256];
    let expected = random("planes", shape.iter().product());
    let mut found = rounded(&expected);
    let first = 4 * 65536 + 8 * 256 + 16;
    for row in 0..8 {
        found[first + row * 256..][..8]
            .iter_mut()
            .for_each(|value| *value *= 0.965);
    }
    let message = refused("plane", &found, &expected, &shape);
    assert!(message.contains("tile at row 8, column 16 of plane 4"), "{message}");
}

#[test]
fn a_tolerance_of_zero_asks_for_equality() {
    let values = random("values", 100);
    passed(expect_close("equal", &values, &values, [100], 0.0));
    let mut other = values.clone();
    other[99] = f32::from_bits(other[99].to_bits() ^ 1);
    assert!(expect_close("unequal", &other, &values, [100], 0.0).is_err());
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let values = random("values", 100);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut other = values.clone();
        other[50] = bad;
        assert!(expect_close("not finite", &other, &values, [100], 1.0).is_err());
        assert!(expect_close("not finite", &other, &other, [100], 1.0).is_err());
    }
    assert!(expect_close("short", &values[1..], &values, [100], 1.0).is_err());
    assert!(expect_close("another shape", &values, &values, [99], 1.0).is_err());
    // Zeros are expected to be zeros, whatever the tolerance.
    passed(expect_close("zeros", &[0.0; 4], &[0.0; 4], [4], F32_TOLERANCE));
    assert!(expect_close("not zeros", &[0.0, 0.0, 1e-20, 0.0], &[0.0; 4], [4], F32_TOLERANCE).is_err());
}
