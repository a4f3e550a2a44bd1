//! Classes of products that share a choice of algorithm.
//!
//! The rows of activations (pictures times tokens) change with every size, batch and caption; what is fast for so many rows is
//! fast for a few more. So rows are counted in classes: multiples of 64 up to 1024, and from there on in steps of an eighth of
//! the power of two below, that is multiples of 128 up to 2048, of 256 up to 4096, of 512 up to 8192. A class is at most an
//! eighth larger than its smallest member, and a picture of 1024² has one class whatever its caption's length.

use super::Matmul;

/// Up to this many rows a class is [`STEP`] rows wide.
const FINE: usize = 1024;
const STEP: usize = 64;

/// The most rows of the class that `rows` belongs to.
pub fn class_rows(rows: usize) -> usize {
    let step = match rows {
        0..=FINE => STEP,
        // A power of two and what is above it, up to the next one, in eight steps.
        _ => 1 << ((rows - 1).ilog2() - 3),
    };
    rows.checked_next_multiple_of(step).unwrap_or(rows)
}

/// The largest product of the class of `product`: the rows of activations are `m`, or, in a product of two activations (the
/// gradient of a weight), the summed extent.
pub(super) fn class_of(product: Matmul) -> Matmul {
    match product.transpose_a {
        true => Matmul {
            k: class_rows(product.k),
            ..product
        },
        false => Matmul {
            m: class_rows(product.m),
            ..product
        },
    }
}

/// A class by name, for the file of choices.
pub(super) fn key(class: &Matmul) -> String {
    let Matmul {
        m,
        n,
        k,
        transpose_a,
        transpose_b,
        output,
        bias,
        accumulate,
    } = class;
    let flag = |set: bool, letter: &'static str| if set { letter } else { "" };
    format!(
        "{m}x{n}x{k}-{}{}-{output}{}{}",
        if *transpose_a { "T" } else { "N" },
        if *transpose_b { "T" } else { "N" },
        flag(*bias, "-bias"),
        flag(*accumulate, "-accumulate")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    const QKV: Matmul = Matmul {
        m: 4192,
        n: 11520,
        k: 3840,
        transpose_a: false,
        transpose_b: true,
        output: DType::Bf16,
        bias: false,
        accumulate: false,
    };

    #[test]
    fn rows_are_rounded_up_by_an_eighth_at_most() {
        for (rows, class) in [
            (0, 0),
            (1, 64),
            (64, 64),
            (65, 128),
            (1024, 1024),
            (1025, 1152),
            (2048, 2048),
            (2049, 2304),
            (4096, 4096),
            (4097, 4608),
            (16_385, 18_432),
            (usize::MAX, usize::MAX),
        ] {
            assert_eq!(class_rows(rows), class, "{rows} rows");
        }
        let mut before = 0;
        for rows in 1..100_000 {
            let class = class_rows(rows);
            assert!(
                class >= rows && class >= before,
                "{rows} rows are in the class of {class}"
            );
            assert!(
                class - rows < (rows / 8).max(STEP),
                "{rows} rows are in the class of {class}"
            );
            assert_eq!(class_rows(class), class, "a class belongs to itself");
            before = class;
        }
    }

    /// A picture of 1024² has 4096 tokens, its caption 32 to 512 more.
    #[test]
    fn captions_of_any_length_are_one_class() {
        for batch in [1, 2, 4, 8] {
            let classes = (32..=512)
                .step_by(32)
                .map(|caption| class_rows(batch * (4096 + caption)));
            let mut classes: Vec<usize> = classes.collect();
            classes.dedup();
            assert_eq!(classes.len(), 1, "batch {batch}: {classes:?}");
        }
    }

    #[test]
    fn only_the_rows_of_activations_are_in_classes() {
        assert_eq!(class_of(QKV), Matmul { m: 4608, ..QKV });
        // The gradient of a weight sums over the rows.
        let gradient = Matmul {
            m: 11_520,
            n: 3840,
            k: 4192,
            transpose_a: true,
            transpose_b: false,
            accumulate: true,
            ..QKV
        };
        assert_eq!(class_of(gradient), Matmul { k: 4608, ..gradient });
    }

    #[test]
    fn classes_have_names_of_their_own() {
        assert_eq!(key(&class_of(QKV)), "4608x11520x3840-NT-bf16");
        let other = Matmul {
            bias: true,
            transpose_a: true,
            output: DType::F32,
            accumulate: true,
            ..QKV
        };
        assert_eq!(key(&other), "4192x11520x3840-TT-f32-bias-accumulate");
    }
}
