mod cuda;

use l2p_engine::ops::attention::{Attention, attention_backward, attention_with_lse};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::fixtures::{Case, Group};
use l2p_tests::{Outcome, Suite, expect_close, random_bf16};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::attention_backward::cpu_equals_torch", cpu_equals_torch);
    suite.cpu(
        "ops::attention_backward::cpu_equals_differences",
        cpu_equals_differences,
    );
    suite.cpu("ops::attention_backward::masked_keys_get_zeros", || {
        masked_keys_get_zeros(&Device::Cpu, 16)
    });
    suite.cpu("ops::attention_backward::nothing_gives_nothing", nothing_gives_nothing);
    suite.cpu(
        "ops::attention_backward::wrong_arguments_are_named",
        wrong_arguments_are_named,
    );
    cuda::register(suite);
}

/// One input: sizes, and the keys of each item (all where empty).
#[derive(Clone, Debug)]
struct Shape {
    batch: usize,
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    causal: bool,
    lengths: Vec<i32>,
    /// Factor of all of qkv: with more of it the weights are less even.
    sharpness: f32,
}

impl Shape {
    fn new(tokens: usize, heads: usize, head_dim: usize) -> Self {
        Shape {
            batch: 1,
            tokens,
            heads,
            kv_heads: heads,
            head_dim,
            causal: false,
            lengths: Vec::new(),
            sharpness: 1.0,
        }
    }

    fn lengths(mut self, lengths: &[i32]) -> Self {
        self.batch = lengths.len();
        self.lengths = lengths.to_vec();
        self
    }

    fn grouped(mut self, kv_heads: usize) -> Self {
        self.kv_heads = kv_heads;
        self
    }

    fn causal(mut self) -> Self {
        self.causal = true;
        self
    }

    fn spec(&self) -> Attention {
        Attention {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            causal: self.causal,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
        }
    }

    fn packed(&self) -> [usize; 3] {
        [
            self.batch,
            self.tokens,
            (self.heads + 2 * self.kv_heads) * self.head_dim,
        ]
    }

    fn result(&self) -> [usize; 3] {
        [self.batch, self.tokens, self.heads * self.head_dim]
    }

    fn key_lengths(&self, device: &Device) -> Result<Option<Tensor>> {
        let tensor = || Tensor::from_slice(device, &self.lengths, [self.batch]);
        (!self.lengths.is_empty()).then(tensor).transpose()
    }

    fn qkv(&self) -> Vec<f32> {
        let values = random_bf16("qkv", self.packed().iter().product());
        let sharper = values.into_iter().map(|value| value * self.sharpness);
        sharper.map(|value| half::bf16::from_f32(value).to_f32()).collect()
    }

    fn dy(&self) -> Vec<f32> {
        random_bf16("dy", self.result().iter().product())
    }
}

/// Σ dy · attention, and the log-sum-exp left aside, in f64.
fn loss(shape: &Shape, qkv: &[f64], dy: &[f32]) -> f64 {
    let [_, tokens, width] = shape.packed();
    let (heads, kv_heads, dim) = (shape.heads, shape.kv_heads, shape.head_dim);
    let scale = f64::from(shape.spec().scale);
    let mut loss = 0.0;
    for (item, rows) in qkv.chunks(tokens * width).enumerate() {
        let keys = shape.lengths.get(item).map_or(tokens, |&length| length as usize);
        let row = |row: usize, head: usize| &rows[row * width + head * dim..][..dim];
        for (head, query) in (0..heads).flat_map(|head| (0..tokens).map(move |query| (head, query))) {
            let key_head = heads + head / (heads / kv_heads);
            let seen = if shape.causal { keys.min(query + 1) } else { keys };
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let weights: Vec<f64> = (0..seen)
                .map(|key| (scale * dot(row(query, head), row(key, key_head))).exp())
                .collect();
            let sum: f64 = weights.iter().sum();
            let dy = &dy[((item * tokens + query) * heads + head) * dim..][..dim];
            let dy: Vec<f64> = dy.iter().copied().map(f64::from).collect();
            for (key, weight) in weights.iter().enumerate() {
                loss += weight / sum * dot(&dy, row(key, key_head + kv_heads));
            }
        }
    }
    loss
}

/// Forward and backward on one device.
fn gradient(shape: &Shape, device: &Device) -> Result<Tensor> {
    let qkv = Tensor::from_f32(device, &shape.qkv(), shape.packed())?;
    let dy = Tensor::from_f32(device, &shape.dy(), shape.result())?;
    let lengths = shape.key_lengths(device)?;
    let (out, lse) = attention_with_lse(&qkv, &shape.spec(), lengths.as_ref())?;
    attention_backward(&dy, &qkv, &out, &lse, &shape.spec(), lengths.as_ref())
}

fn cpu_equals_differences() -> Outcome {
    const STEP: f64 = 1e-4;
    let shapes = [
        Shape::new(1, 1, 8),
        Shape::new(11, 2, 4),
        Shape::new(9, 4, 8).grouped(2).causal(),
        Shape::new(7, 2, 6).lengths(&[7, 1, 4]),
        Shape::new(9, 6, 4).grouped(2).causal().lengths(&[9, 5]),
        Shape::new(70, 1, 2),
        Shape::new(70, 2, 2).grouped(1).causal().lengths(&[66]),
    ];
    for shape in shapes {
        let dy = shape.dy();
        let mut qkv: Vec<f64> = shape.qkv().into_iter().map(f64::from).collect();
        let mut expected = Vec::with_capacity(qkv.len());
        for index in 0..qkv.len() {
            let value = qkv[index];
            let [above, below] = [value + STEP, value - STEP].map(|moved| {
                qkv[index] = moved;
                loss(&shape, &qkv, &dy)
            });
            qkv[index] = value;
            expected.push(((above - below) / (2.0 * STEP)) as f32);
        }
        let found = gradient(&shape, &Device::Cpu)?;
        expect_close(&format!("{shape:?}"), found.as_slice()?, &expected, found.shape(), 1e-5)?;
    }
    Ok(())
}

/// Runs a fixture on `device` and compares to within `tolerance`, or the fixture's own.
fn check_fixture(case: &Case<'_>, device: &Device, tolerance: Option<f64>) -> Outcome {
    let parts = ["q", "k", "v"].map(|name| case.input(name));
    let [batch, tokens, heads, head_dim] = parts[0].1[..] else {
        return Err(format!("{}: queries of shape {:?}", case.name(), parts[0].1).into());
    };
    let kv_heads = parts[1].1[2];
    let widths = [heads, kv_heads, kv_heads].map(|heads| heads * head_dim);
    let mut qkv = Vec::new();
    for row in 0..batch * tokens {
        for ((part, _), width) in parts.iter().zip(widths) {
            qkv.extend_from_slice(&part[row * width..][..width]);
        }
    }
    let lengths: Option<Vec<i32>> = case.has_config(&["lengths"]).then(|| {
        let lengths = case.sizes(&["lengths"]);
        lengths.into_iter().map(|length| length as i32).collect()
    });
    // The reference counts the gradients of queries past the item's length as zero.
    let (mut dy, _) = case.input("grad.out");
    for (item, length) in lengths.iter().flatten().enumerate() {
        dy[(item * tokens + *length as usize) * widths[0]..(item + 1) * tokens * widths[0]].fill(0.0);
    }
    let spec = Attention {
        heads,
        kv_heads,
        head_dim,
        causal: false,
        scale: 1.0 / (head_dim as f32).sqrt(),
    };
    let width: usize = widths.iter().sum();
    let qkv = Tensor::from_f32(device, &qkv, [batch, tokens, width])?;
    let dy = Tensor::from_f32(device, &dy, [batch, tokens, widths[0]])?;
    let lengths = lengths.map(|lengths| Tensor::from_slice(device, &lengths, [batch]));
    let lengths = lengths.transpose()?;
    let (out, lse) = attention_with_lse(&qkv, &spec, lengths.as_ref())?;
    let dqkv = attention_backward(&dy, &qkv, &out, &lse, &spec, lengths.as_ref())?.to_vec_f32()?;
    let mut first = 0;
    for (name, part) in ["grad.q", "grad.k", "grad.v"].into_iter().zip(widths) {
        let columns: Vec<f32> = dqkv
            .chunks(width)
            .flat_map(|row| &row[first..first + part])
            .copied()
            .collect();
        case.check_to(name, &columns, tolerance)?;
        first += part;
    }
    Ok(())
}

fn cpu_equals_torch() -> Outcome {
    let group = Group::load("grads");
    for case in group.cases("op.attention.") {
        check_fixture(&case, &Device::Cpu, None)?;
    }
    Ok(())
}

/// Keys and values past the length get zeros, whatever stands there; an item without keys gets nothing else.
fn masked_keys_get_zeros(device: &Device, head_dim: usize) -> Outcome {
    let shape = Shape::new(70, 2, head_dim).lengths(&[0, 33, 70]);
    let dqkv = gradient(&shape, device)?.to_vec_f32()?;
    let (width, queries) = (shape.packed()[2], 2 * head_dim);
    for (row, values) in dqkv.chunks(width).enumerate() {
        let keys = shape.lengths[row / 70] as usize;
        let (dq, dkv) = values.split_at(queries);
        assert!(values.iter().all(|value| value.is_finite()));
        assert_eq!(dq.iter().all(|value| *value == 0.0), keys == 0, "queries of row {row}");
        assert_eq!(
            dkv.iter().all(|value| *value == 0.0),
            row % 70 >= keys,
            "keys of row {row}"
        );
    }
    Ok(())
}

/// Without items or tokens there is a gradient, of no elements.
fn nothing_gives_nothing() -> Outcome {
    let spec = Shape::new(1, 2, 16).spec();
    for [batch, tokens] in [[2, 0], [0, 5], [0, 0]] {
        let zeros = |shape| Tensor::zeros(&Device::Cpu, shape, DType::F32);
        let (qkv, dy, lse) = (
            zeros([batch, tokens, 96])?,
            zeros([batch, tokens, 32])?,
            zeros([batch, 2, tokens])?,
        );
        let gradient = attention_backward(&dy, &qkv, &dy, &lse, &spec, None)?;
        assert_eq!(gradient.shape(), qkv.shape());
    }
    Ok(())
}

fn wrong_arguments_are_named() -> Outcome {
    let device = Device::Cpu;
    let shape = Shape::new(5, 4, 16).grouped(2);
    let qkv = Tensor::from_f32(&device, &shape.qkv(), shape.packed())?;
    let (out, lse) = attention_with_lse(&qkv, &shape.spec(), None)?;
    let message = |dy: &Tensor, out: &Tensor, lse: &Tensor| {
        let outcome = attention_backward(dy, &qkv, out, lse, &shape.spec(), None);
        outcome.unwrap_err().to_string()
    };
    let short = Tensor::zeros(&device, [1, 4, 64], DType::F32)?;
    assert_eq!(
        message(&short, &out, &lse),
        "attention_backward: dy has shape [1, 4, 64], expected [1, 5, 64]"
    );
    assert_eq!(
        message(&out, &short, &lse),
        "attention_backward: out has shape [1, 4, 64], expected [1, 5, 64]"
    );
    let of_keys = Tensor::zeros(&device, [1, 2, 5], DType::F32)?;
    assert_eq!(
        message(&out, &out, &of_keys),
        "attention_backward: lse has shape [1, 2, 5], expected [1, 4, 5]"
    );
    let whole = Tensor::zeros(&device, [1, 4, 5], DType::I32)?;
    assert_eq!(
        message(&out, &out, &whole),
        "attention_backward: lse holds i32, expected f32"
    );
    Ok(())
}
