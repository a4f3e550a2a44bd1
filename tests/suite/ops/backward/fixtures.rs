//! Against torch autograd: gradients of Σ output · upstream.

use l2p_engine::ops::VectorGradient;
use l2p_engine::ops::layer_norm::layer_norm_modulate_backward;
use l2p_engine::ops::linear::{
    InputActivation, LinearGradients, linear, linear_backward_input, linear_backward_weight, linear_vectors,
    linear_vectors_backward,
};
use l2p_engine::ops::patch_embed::patch_embed_backward;
use l2p_engine::ops::qk_norm_rope::{QkNormGradients, QkNormRope, Rotation, qk_norm_rope_backward};
use l2p_engine::ops::rms_norm::{
    GatedResidual, NormGradients, RmsNorm, gated_residual_backward, rms_norm_modulate_backward,
};
use l2p_engine::ops::swiglu::{swiglu, swiglu_backward};
use l2p_engine::ops::timestep::timestep_embedding;
use l2p_engine::ops::unpatchify::patchify;
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::fixtures::{Case, Group};
use l2p_tests::{Outcome, Suite};

use super::super::qk_norm_rope::axes_table;
use super::{EPSILON, gradients, vector};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::backward::norms_equal_torch", norms_equal_torch);
    suite.cpu("ops::backward::layer_norm_equals_torch", layer_norm_equals_torch);
    suite.cpu("ops::backward::feed_forward_equals_torch", feed_forward_equals_torch);
    suite.cpu("ops::backward::linear_equals_torch", linear_equals_torch);
    suite.cpu("ops::backward::qk_norm_rope_equals_torch", qk_norm_rope_equals_torch);
    suite.cpu(
        "ops::backward::timestep_embedder_equals_torch",
        timestep_embedder_equals_torch,
    );
    suite.cpu("ops::backward::patch_embed_equals_torch", patch_embed_equals_torch);
    suite.cpu("ops::backward::final_layer_equals_torch", final_layer_equals_torch);
}

const CPU: Device = Device::Cpu;

/// An input under another shape; `[]` keeps its own.
fn input(case: &Case<'_>, name: &str, shape: &[usize]) -> Result<Tensor> {
    let (values, own) = case.input(name);
    Tensor::from_slice(&CPU, &values, if shape.is_empty() { own.as_slice() } else { shape })
}

fn weight(case: &Case<'_>, name: &str) -> Result<Tensor> {
    let (shape, values) = &case.weights()[name];
    Tensor::from_slice(&CPU, values, shape.as_slice())
}

fn zeros(shape: &[usize]) -> Result<Tensor> {
    Tensor::zeros(&CPU, shape, DType::F32)
}

/// `[batch, tokens, dim]` from any shape.
fn tokens(shape: &[usize]) -> [usize; 3] {
    match *shape {
        [batch, tokens, dim] => [batch, tokens, dim],
        _ => [1, shape[..shape.len() - 1].iter().product(), shape[shape.len() - 1]],
    }
}

fn norms_equal_torch() -> Outcome {
    let group = Group::load("grads");
    for case in group
        .cases("op.")
        .into_iter()
        .filter(|case| case.name().contains("rms_norm"))
    {
        let residual = case.has_input("y");
        let shape = tokens(&case.input(if residual { "y" } else { "x" }).1);
        let [batch, _, dim] = shape;
        let x = input(&case, if residual { "y" } else { "x" }, &shape)?;
        let dy = input(&case, if residual { "grad.out" } else { "grad.y" }, &shape)?;
        let weight = weight(&case, "norm.weight")?;
        let kind = ["scale", "gate"].into_iter().find(|name| case.has_input(name));
        let table = kind.map(|kind| input(&case, kind, &[batch, 1, dim])).transpose()?;
        let vectors = table.as_ref().map(|table| vector(table, 0)).transpose()?.flatten();
        let (mut d_weight, mut d_vector) = (zeros(&[dim])?, gradients(&CPU, [batch, 1, dim])?);
        let wanted = NormGradients {
            weight: Some(&mut d_weight),
            vector: kind.map(|_| VectorGradient {
                table: &mut d_vector,
                index: 0,
            }),
        };
        let epsilon = if case.has_config(&["eps"]) {
            case.config(&["eps"]).as_f64().expect("a number") as f32
        } else {
            EPSILON
        };
        if residual {
            let spec = GatedResidual {
                weight: &weight,
                gate: vectors,
                epsilon,
            };
            let d_branch = gated_residual_backward(&dy, &x, &spec, wanted)?;
            case.check("grad.y", d_branch.as_slice()?)?;
            case.check("grad.x", dy.as_slice()?)?;
        } else {
            let spec = RmsNorm {
                weight: &weight,
                scale: vectors,
                epsilon,
            };
            let dx = rms_norm_modulate_backward(&dy, &x, &spec, None, wanted)?;
            case.check("grad.x", dx.as_slice()?)?;
        }
        case.check("grad.norm.weight", d_weight.as_slice()?)?;
        if let Some(kind) = kind {
            case.check(&format!("grad.{kind}"), d_vector.as_slice()?)?;
        }
    }
    Ok(())
}

fn layer_norm_equals_torch() -> Outcome {
    let group = Group::load("grads");
    for case in group.cases("op.layer_norm_scale") {
        let (x, dy) = (input(&case, "x", &[])?, input(&case, "grad.y", &[])?);
        let shape = [x.dim(0), 1, x.dim(2)];
        let table = input(&case, "scale", &shape)?;
        let mut d_scale = gradients(&CPU, shape)?;
        let wanted = VectorGradient {
            table: &mut d_scale,
            index: 0,
        };
        let dx = layer_norm_modulate_backward(&dy, &x, vector(&table, 0)?, 1e-6, Some(wanted))?;
        case.check("grad.x", dx.as_slice()?)?;
        case.check("grad.scale", d_scale.as_slice()?)?;
    }
    Ok(())
}

/// Gate and up side by side, row by row.
fn packed(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let hidden = gate.shape().last();
    let rows = gate
        .as_slice::<f32>()?
        .chunks(hidden)
        .zip(up.as_slice::<f32>()?.chunks(hidden));
    let values: Vec<f32> = rows.flat_map(|(gate, up)| [gate, up].concat()).collect();
    Tensor::from_slice(&CPU, &values, [1, gate.shape().rows(), 2 * hidden])
}

fn halves(rows: &Tensor) -> Result<[Vec<f32>; 2]> {
    let width = rows.shape().last();
    let half = |first: usize| -> Result<Vec<f32>> {
        let rows = rows.as_slice::<f32>()?.chunks(width);
        Ok(rows.flat_map(|row| row[first..first + width / 2].to_vec()).collect())
    };
    Ok([half(0)?, half(width / 2)?])
}

fn weight_alone(weight: &mut Tensor) -> LinearGradients<'_> {
    LinearGradients {
        weight: Some(weight),
        bias: None,
    }
}

fn feed_forward_equals_torch() -> Outcome {
    let group = Group::load("grads");
    for case in group.cases("op.swiglu") {
        let x = packed(&input(&case, "gate", &[])?, &input(&case, "up", &[])?)?;
        let dy = input(&case, "grad.y", &[])?.into_shape([1, x.dim(1), x.dim(2) / 2])?;
        let expected = swiglu(&x)?;
        let (dx, again) = swiglu_backward(&dy, x, true)?;
        assert_eq!(
            again.expect("it was asked for").as_slice::<f32>()?,
            expected.as_slice::<f32>()?
        );
        let [d_gate, d_up] = halves(&dx)?;
        case.check("grad.gate", &d_gate)?;
        case.check("grad.up", &d_up)?;
    }
    let case = group.case("op.feed_forward.d256");
    let (x, dy) = (input(&case, "x", &[])?, input(&case, "grad.y", &[])?);
    let [w1, w3, w2] = ["w1.weight", "w3.weight", "w2.weight"].map(|name| weight(&case, name));
    let (w1, w3, w2) = (w1?, w3?, w2?);
    let gate_and_up =
        packed(&linear(&x, &w1, None)?, &linear(&x, &w3, None)?)?.into_shape([x.dim(0), 2 * w1.dim(0)])?;
    let (dx, hidden) = swiglu_backward(&linear_backward_input(&dy, &w2)?, gate_and_up, true)?;
    let mut d_w2 = zeros(&w2.shape())?;
    linear_backward_weight(&dy, &hidden.expect("it was asked for"), weight_alone(&mut d_w2))?;
    case.check("grad.w2.weight", d_w2.as_slice()?)?;
    let stacked = [w1.as_slice::<f32>()?, w3.as_slice()?].concat();
    let w13 = Tensor::from_slice(&CPU, &stacked, [2 * w1.dim(0), w1.dim(1)])?;
    let mut d_w13 = zeros(&w13.shape())?;
    linear_backward_weight(&dx, &x, weight_alone(&mut d_w13))?;
    let (d_w1, d_w3) = d_w13.as_slice::<f32>()?.split_at(w1.elements());
    case.check("grad.w1.weight", d_w1)?;
    case.check("grad.w3.weight", d_w3)?;
    case.check("grad.x", linear_backward_input(&dx, &w13)?.as_slice()?)
}

fn linear_equals_torch() -> Outcome {
    let group = Group::load("grads");
    for case in group.cases("op.linear") {
        let (x, dy) = (input(&case, "x", &[])?, input(&case, "grad.y", &[])?);
        let weight = weight(&case, "linear.weight")?;
        // What is there already is added to.
        let mut d_weight = Tensor::from_slice(&CPU, &vec![1.0f32; weight.elements()], weight.shape())?;
        let mut d_bias = zeros(&[weight.dim(0)])?;
        let wanted = LinearGradients {
            weight: Some(&mut d_weight),
            bias: Some(&mut d_bias),
        };
        linear_backward_weight(&dy, &x, wanted)?;
        let added: Vec<f32> = d_weight.as_slice::<f32>()?.iter().map(|value| value - 1.0).collect();
        case.check("grad.linear.weight", &added)?;
        case.check("grad.linear.bias", d_bias.as_slice()?)?;
        case.check("grad.x", linear_backward_input(&dy, &weight)?.as_slice()?)?;
    }
    Ok(())
}

fn qk_norm_rope_equals_torch() -> Outcome {
    const HEAD_DIM: usize = 128;
    let group = Group::load("grads");
    for case in group.cases("op.qk_norm_rope_interleaved") {
        let (ids, ids_shape) = case.input("ids");
        let (q, shape) = case.input("q");
        let [batch, tokens, heads] = [shape[0], shape[1], shape[2]];
        let side_by_side = |q: &[f32], k: &[f32], v: f32| -> Result<Tensor> {
            let width = heads * HEAD_DIM;
            let rows = q.chunks(width).zip(k.chunks(width));
            let values: Vec<f32> = rows.flat_map(|(q, k)| [q, k, &vec![v; width]].concat()).collect();
            Tensor::from_slice(&CPU, &values, [batch, tokens, 3 * width])
        };
        let qkv = side_by_side(&q, &case.input("k").0, 0.5)?;
        let mut gradient = side_by_side(&case.input("grad.q_out").0, &case.input("grad.k_out").0, 0.25)?;
        let table = Tensor::from_slice(&CPU, &axes_table(&ids), [ids_shape[0], tokens, HEAD_DIM / 2, 2])?;
        let (q_weight, k_weight) = (weight(&case, "norm_q.weight")?, weight(&case, "norm_k.weight")?);
        let spec = QkNormRope {
            heads,
            kv_heads: heads,
            head_dim: HEAD_DIM,
            q_weight: &q_weight,
            k_weight: &k_weight,
            epsilon: EPSILON,
            rotation: Rotation::Interleaved,
        };
        let (mut d_q_weight, mut d_k_weight) = (zeros(&[HEAD_DIM])?, zeros(&[HEAD_DIM])?);
        let wanted = QkNormGradients {
            q: Some(&mut d_q_weight),
            k: Some(&mut d_k_weight),
        };
        qk_norm_rope_backward(&mut gradient, &qkv, &spec, &table, wanted)?;
        let width = heads * HEAD_DIM;
        let part = |index: usize| -> Result<Vec<f32>> {
            let rows = gradient.as_slice::<f32>()?.chunks(3 * width);
            Ok(rows
                .flat_map(|row| row[index * width..(index + 1) * width].to_vec())
                .collect())
        };
        case.check("grad.q", &part(0)?)?;
        case.check("grad.k", &part(1)?)?;
        assert!(
            part(2)?.iter().all(|value| *value == 0.25),
            "the gradient of v has changed"
        );
        case.check("grad.norm_q.weight", d_q_weight.as_slice()?)?;
        case.check("grad.norm_k.weight", d_k_weight.as_slice()?)?;
    }
    Ok(())
}

fn timestep_embedder_equals_torch() -> Outcome {
    let group = Group::load("grads");
    let case = group.case("op.timestep_embedder.ends");
    let times = case.input("t").0;
    let features = timestep_embedding(&times, 256, 10_000.0);
    let features = Tensor::from_slice(&CPU, &features, [times.len(), 256])?;
    let names = ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"];
    let weights: Vec<Tensor> = names.iter().map(|name| weight(&case, name)).collect::<Result<_>>()?;
    let mut found: Vec<Tensor> = weights
        .iter()
        .map(|weight| zeros(&weight.shape()))
        .collect::<Result<_>>()?;
    let hidden = linear_vectors(&features, InputActivation::None, &weights[0], Some(&weights[1]))?;
    let dy = input(&case, "grad.y", &[])?;
    let [d_weight, d_bias, d_second_weight, d_second_bias] = &mut found[..] else {
        unreachable!("there are four");
    };
    let wanted = |weight, bias| LinearGradients {
        weight: Some(weight),
        bias: Some(bias),
    };
    let mut d_hidden = zeros(&hidden.shape())?;
    let second = wanted(d_second_weight, d_second_bias);
    linear_vectors_backward(
        &dy,
        &hidden,
        InputActivation::Silu,
        &weights[2],
        second,
        Some(&mut d_hidden),
    )?;
    let first = wanted(d_weight, d_bias);
    linear_vectors_backward(&d_hidden, &features, InputActivation::None, &weights[0], first, None)?;
    for (name, found) in names.iter().zip(&found) {
        case.check(&format!("grad.{name}"), found.as_slice()?)?;
    }
    Ok(())
}

fn patch_embed_equals_torch() -> Outcome {
    let group = Group::load("grads");
    for case in group.cases("op.patch_embed") {
        let (image, dy) = (input(&case, "image", &[])?, input(&case, "grad.y", &[])?);
        let weight = weight(&case, "embed.weight")?;
        let (mut d_weight, mut d_bias) = (zeros(&weight.shape())?, zeros(&[weight.dim(0)])?);
        let wanted = LinearGradients {
            weight: Some(&mut d_weight),
            bias: Some(&mut d_bias),
        };
        patch_embed_backward(&dy, &image, case.size(&["patch"]), wanted)?;
        case.check("grad.embed.weight", d_weight.as_slice()?)?;
        case.check("grad.embed.bias", d_bias.as_slice()?)?;
    }
    Ok(())
}

/// The latent model's last layer, put together from its operations; pads follow the patches.
fn final_layer_equals_torch() -> Outcome {
    let group = Group::load("grads");
    let case = group.case("op.final_layer.p2");
    let (x, c, dy) = (
        input(&case, "x", &[])?,
        input(&case, "c", &[])?,
        input(&case, "grad.y", &[])?,
    );
    let names = [
        "adaLN_modulation.1.weight",
        "adaLN_modulation.1.bias",
        "linear.weight",
        "linear.bias",
    ];
    let weights: Vec<Tensor> = names.iter().map(|name| weight(&case, name)).collect::<Result<_>>()?;
    let mut found: Vec<Tensor> = weights
        .iter()
        .map(|weight| zeros(&weight.shape()))
        .collect::<Result<_>>()?;
    let [d_modulation, d_modulation_bias, d_weight, d_bias] = &mut found[..] else {
        unreachable!("there are four");
    };
    let (batch, dim) = (x.dim(0), x.dim(2));
    let table =
        linear_vectors(&c, InputActivation::Silu, &weights[0], Some(&weights[1]))?.into_shape([batch, 1, dim])?;
    let scale = vector(&table, 0)?;
    let d_patches = patchify(&dy, case.size(&["patch"]), x.dim(1), 1.0)?;
    let normalised = l2p_engine::ops::layer_norm::layer_norm_modulate(&x, scale, 1e-6)?;
    let wanted = LinearGradients {
        weight: Some(d_weight),
        bias: Some(d_bias),
    };
    linear_backward_weight(&d_patches, &normalised, wanted)?;
    let mut d_scale = gradients(&CPU, [batch, 1, dim])?;
    let vectors = VectorGradient {
        table: &mut d_scale,
        index: 0,
    };
    let d_normalised = linear_backward_input(&d_patches, &weights[2])?;
    let dx = layer_norm_modulate_backward(&d_normalised, &x, scale, 1e-6, Some(vectors))?;
    case.check("grad.x", dx.as_slice()?)?;
    let wanted = LinearGradients {
        weight: Some(d_modulation),
        bias: Some(d_modulation_bias),
    };
    let mut dc = zeros(&c.shape())?;
    let d_scale = d_scale.into_shape([batch, dim])?;
    linear_vectors_backward(&d_scale, &c, InputActivation::Silu, &weights[0], wanted, Some(&mut dc))?;
    case.check("grad.c", dc.as_slice()?)?;
    for (name, found) in names.iter().zip(&found) {
        case.check(&format!("grad.{name}"), found.as_slice()?)?;
    }
    Ok(())
}
