//! Arguments that do not fit, each refused by name. Every table begins with arguments that fit.

use l2p_engine::ops::layer_norm::layer_norm_modulate_backward;
use l2p_engine::ops::linear::{InputActivation, LinearGradients, linear_backward_weight, linear_vectors_backward};
use l2p_engine::ops::rms_norm::{
    GatedResidual, NormGradients, ResidualNormGradients, RmsNorm, gated_residual_rms_norm_backward,
    rms_norm_modulate_backward,
};
use l2p_engine::ops::{Modulation, VectorGradient};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{Outcome, Suite};

use super::{EPSILON, vector};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::backward::mistakes_of_norms_are_named", norms);
    suite.cpu("ops::backward::mistakes_of_residual_norms_are_named", residual_norms);
    suite.cpu("ops::backward::mistakes_of_layer_norm_are_named", layer_norm);
    suite.cpu("ops::backward::mistakes_of_linear_are_named", linears);
}

fn zeros(shape: &[usize]) -> Result<Tensor> {
    Tensor::zeros(&Device::Cpu, shape, DType::F32)
}

/// Fails unless `run` is refused with each of the messages, and takes what fits.
fn expect_messages<T: Copy>(op: &str, fits: T, wrong: &[(T, &str)], run: impl Fn(T) -> Result<()>) -> Outcome {
    run(fits)?;
    for (asked, expected) in wrong {
        match run(*asked) {
            Ok(()) => return Err(format!("{op} is done where it should say: {expected}").into()),
            Err(error) => assert_eq!(error.to_string(), format!("{op}: {expected}")),
        }
    }
    Ok(())
}

/// The arguments of a normalisation's gradient of `[2, 3, 8]`, by shape.
#[derive(Clone, Copy)]
struct Norm {
    dy: &'static [usize],
    residual: &'static [usize],
    weight: &'static [usize],
    /// None without vectors.
    table: Option<[usize; 3]>,
    weight_gradient: &'static [usize],
    gradients: [usize; 3],
    /// Of the gradient in its table.
    index: usize,
}

const NORM: Norm = Norm {
    dy: &[2, 3, 8],
    residual: &[2, 3, 8],
    weight: &[8],
    table: Some([2, 4, 8]),
    weight_gradient: &[8],
    gradients: [2, 1, 8],
    index: 0,
};

/// What is wrong of a table of gradients, whichever operation writes it.
const GRADIENTS: [(Norm, &str); 3] = [
    (
        Norm {
            gradients: [2, 1, 4],
            ..NORM
        },
        "vector gradients has shape [2, 1, 4], expected [2, 1, 8]",
    ),
    (
        Norm {
            gradients: [1, 1, 8],
            ..NORM
        },
        "vector gradients has shape [1, 1, 8], expected [2, 1, 8]",
    ),
    (
        Norm { index: 1, ..NORM },
        "there is no vector 1 in a table of 1 gradients",
    ),
];

fn norms() -> Outcome {
    let x = zeros(&[2, 3, 8])?;
    let run = |asked: Norm| {
        let (dy, residual, weight) = (zeros(asked.dy)?, zeros(asked.residual)?, zeros(asked.weight)?);
        let table = asked.table.map(|shape| zeros(&shape)).transpose()?;
        let (mut weight_gradient, mut gradients) = (zeros(asked.weight_gradient)?, zeros(&asked.gradients)?);
        let spec = RmsNorm {
            weight: &weight,
            scale: table.as_ref().map(|table| Modulation::new(table, 0)).transpose()?,
            epsilon: EPSILON,
        };
        let wanted = NormGradients {
            weight: Some(&mut weight_gradient),
            vector: Some(VectorGradient {
                table: &mut gradients,
                index: asked.index,
            }),
        };
        rms_norm_modulate_backward(&dy, &x, &spec, Some(&residual), wanted).map(drop)
    };
    let wrong = [
        (
            Norm { dy: &[2, 3, 4], ..NORM },
            "dy has shape [2, 3, 4], expected [2, 3, 8]",
        ),
        (
            Norm {
                residual: &[1, 3, 8],
                ..NORM
            },
            "residual has shape [1, 3, 8], expected [2, 3, 8]",
        ),
        (Norm { weight: &[4], ..NORM }, "weight has shape [4], expected [8]"),
        (
            Norm {
                table: Some([3, 4, 8]),
                ..NORM
            },
            "vectors has shape [3, 4, 8], expected [2, 4, 8]",
        ),
        (
            Norm {
                weight_gradient: &[4],
                ..NORM
            },
            "weight gradient has shape [4], expected [8]",
        ),
        (
            Norm {
                table: Some([1, 4, 8]),
                ..NORM
            },
            "gradients of vectors are per item, but 1 vectors serve 2 items",
        ),
        (Norm { table: None, ..NORM }, "there are no vectors to differentiate"),
    ];
    let op = "rms_norm_modulate_backward";
    expect_messages(op, NORM, &wrong, run)?;
    expect_messages(op, NORM, &GRADIENTS, run)
}

/// Shapes of y, of the gradients of sum and result, of both weights and both weights' gradients, and of the vectors.
type ResidualNorm = ([&'static [usize]; 7], [usize; 3]);

fn residual_norms() -> Outcome {
    const X: &[usize] = &[2, 3, 8];
    const FITS: [&[usize]; 7] = [X, X, X, &[8], &[8], &[8], &[8]];
    const TABLE: [usize; 3] = [2, 4, 8];
    let x = zeros(X)?;
    let run = |(shapes, table): ResidualNorm| {
        let [y, d_sum, d_normalised, weight, next_weight, d_weight, d_next] = shapes.map(zeros);
        let (weight, next_weight, table) = (weight?, next_weight?, zeros(&table)?);
        let (mut d_weight, mut d_next, mut d_vectors) = (d_weight?, d_next?, zeros(&TABLE)?);
        let residual = GatedResidual {
            weight: &weight,
            gate: vector(&table, 1)?,
            epsilon: EPSILON,
        };
        let next = RmsNorm {
            weight: &next_weight,
            scale: vector(&table, 2)?,
            epsilon: EPSILON,
        };
        let wanted = ResidualNormGradients {
            weight: Some(&mut d_weight),
            next_weight: Some(&mut d_next),
            vectors: Some((&mut d_vectors, [1, 2])),
        };
        gated_residual_rms_norm_backward(&d_sum?, &d_normalised?, [&x, &y?], &residual, &next, wanted).map(drop)
    };
    let with = |place: usize, shape: &'static [usize]| {
        let mut shapes = FITS;
        shapes[place] = shape;
        (shapes, TABLE)
    };
    let wrong = [
        (with(0, &[2, 4, 8]), "y has shape [2, 4, 8], expected [2, 3, 8]"),
        (with(1, &[2, 4, 8]), "d_sum has shape [2, 4, 8], expected [2, 3, 8]"),
        (
            with(2, &[2, 4, 8]),
            "d_normalised has shape [2, 4, 8], expected [2, 3, 8]",
        ),
        (with(3, &[4]), "weight has shape [4], expected [8]"),
        (with(4, &[4]), "weight has shape [4], expected [8]"),
        (with(5, &[4]), "weight gradient has shape [4], expected [8]"),
        (with(6, &[4]), "weight gradient has shape [4], expected [8]"),
        ((FITS, [3, 4, 8]), "vectors has shape [3, 4, 8], expected [2, 4, 8]"),
        (
            (FITS, [1, 4, 8]),
            "gradients of vectors are per item, but 1 vectors serve 2 items",
        ),
    ];
    expect_messages("gated_residual_rms_norm_backward", (FITS, TABLE), &wrong, run)
}

fn layer_norm() -> Outcome {
    let x = zeros(&[2, 3, 8])?;
    let run = |asked: Norm| {
        let (dy, mut gradients) = (zeros(asked.dy)?, zeros(&asked.gradients)?);
        let table = asked.table.map(|shape| zeros(&shape)).transpose()?;
        let scale = table.as_ref().map(|table| Modulation::new(table, 0)).transpose()?;
        let wanted = VectorGradient {
            table: &mut gradients,
            index: asked.index,
        };
        layer_norm_modulate_backward(&dy, &x, scale, EPSILON, Some(wanted)).map(drop)
    };
    let wrong = [
        (
            Norm { dy: &[2, 3, 4], ..NORM },
            "dy has shape [2, 3, 4], expected [2, 3, 8]",
        ),
        (
            Norm {
                table: Some([3, 4, 8]),
                ..NORM
            },
            "scale has shape [3, 4, 8], expected [2, 4, 8]",
        ),
        (
            Norm {
                table: Some([1, 4, 8]),
                ..NORM
            },
            "there is no scale per item to differentiate",
        ),
        (
            Norm { table: None, ..NORM },
            "there is no scale per item to differentiate",
        ),
    ];
    let op = "layer_norm_modulate_backward";
    expect_messages(op, NORM, &wrong, run)?;
    expect_messages(op, NORM, &GRADIENTS, run)
}

/// Shapes of dy and of the gradients of weight and bias, for a layer from eight inputs to four outputs.
type Linear = [&'static [usize]; 3];

fn linears() -> Outcome {
    const FITS: Linear = [&[3, 4], &[4, 8], &[4]];
    let (x, weight) = (zeros(&[3, 8])?, zeros(&[4, 8])?);
    let run = |[dy, d_weight, d_bias]: Linear, vectors: bool| {
        let (dy, mut d_weight, mut d_bias) = (zeros(dy)?, zeros(d_weight)?, zeros(d_bias)?);
        let wanted = LinearGradients {
            weight: Some(&mut d_weight),
            bias: Some(&mut d_bias),
        };
        match vectors {
            true => linear_vectors_backward(&dy, &x, InputActivation::Silu, &weight, wanted, None),
            false => linear_backward_weight(&dy, &x, wanted),
        }
    };
    let wrong: [(Linear, &str); 3] = [
        ([&[2, 4], &[4, 8], &[4]], "dy has shape [2, 4], expected [3, 4]"),
        (
            [&[3, 4], &[8, 4], &[4]],
            "weight gradient has shape [8, 4], expected [4, 8]",
        ),
        ([&[3, 4], &[4, 8], &[8]], "bias gradient has shape [8], expected [4]"),
    ];
    expect_messages("linear_backward_weight", FITS, &wrong, |asked| run(asked, false))?;
    expect_messages("linear_vectors_backward", FITS, &wrong, |asked| run(asked, true))
}
