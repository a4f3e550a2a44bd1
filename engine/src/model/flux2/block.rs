//! The two kinds of blocks.
//!
//! ```text
//! double-stream, of each stream s, whose weights are its own:
//!     q, k, v = W · n(s),       n(s) = LN(s) · (1 + scale) + shift
//!     s = s + gate · W · attention(q, k, v of both streams)
//!     s = s + gate' · W · swiglu(W · n'(s))
//! single-stream, of both streams as one sequence x:
//!     [q, k, v, m] = W · n(x)
//!     x = x + gate · W · [attention(q, k, v), swiglu(m)]
//! ```
//!
//! Queries and keys are normalised and rotated. A single-stream block multiplies by the rows for q, k and v and by those for m one after the
//! other, so that the second product makes SwiGLU on its way; attention and SwiGLU are laid side by side for the last one, which is
//! a copy of both.

use super::vectors::{VectorGradients, Vectors};
use crate::device::MemoryTag;
use crate::error::Result;
use crate::layers::{Bare, Described, Gradients, Group, Linear, Norm, module};
use crate::ops::add_rms_norm::add;
use crate::ops::attention::{Attention, attention, attention_backward, attention_with_lse};
use crate::ops::qk_norm_rope::{
    QkNormGradients, QkNormRope, Rotation, qk_norm_rope, qk_norm_rope_backward, qk_norm_rope_from,
};
use crate::ops::swiglu::{swiglu, swiglu_backward};
use crate::ops::tokens::{concat_all, concat_tokens, narrow_tokens};
use crate::profile;
use crate::tensor::Tensor;

module! {
    /// The factors of queries and keys.
    pub struct QkNorm<K> {
        /// `[head_dim]`
        pub q: Norm<K>,
        /// `[head_dim]`
        pub k: Norm<K>,
        ;
        attention: Attention,
        epsilon: f32,
    }
}

module! {
    /// One of a double-stream block's streams.
    pub struct Stream<K> {
        /// `[3 · dim, dim]`
        pub qkv: Linear<K>,
        /// `[dim, dim]`
        pub out: Linear<K>,
        /// Of the stream's queries and keys.
        pub norm: QkNorm<K>,
        /// `[2 · ffn, dim]`: gate, then the other factor.
        pub w13: Linear<K>,
        /// `[dim, ffn]`
        pub w2: Linear<K>,
    }
}

module! {
    /// A block in which image and text have weights of their own and share attention.
    pub struct DoubleBlock<K> {
        /// The image's.
        pub image: Stream<K>,
        /// The text's.
        pub text: Stream<K>,
    }
}

module! {
    /// A block of one stream, attention beside the feed-forward network.
    pub struct SingleBlock<K> {
        /// `[3 · dim + 2 · ffn, dim]`: q, k, v, gate, the other factor.
        pub input: Linear<K>,
        /// `[dim, dim + ffn]`
        pub out: Linear<K>,
        /// Of queries and keys.
        pub norm: QkNorm<K>,
    }
}

/// Sizes that blocks are described by.
#[derive(Clone, Copy)]
pub(super) struct BlockSizes {
    pub dim: usize,
    pub ffn: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub epsilon: f32,
}

impl BlockSizes {
    fn norm(&self, group: Group, [q, k]: [String; 2]) -> QkNorm<Described> {
        QkNorm {
            q: Bare::norm(group, &q, self.head_dim),
            k: Bare::norm(group, &k, self.head_dim),
            attention: Attention {
                heads: self.heads,
                kv_heads: self.heads,
                head_dim: self.head_dim,
                causal: false,
                scale: 1.0 / (self.head_dim as f32).sqrt(),
            },
            epsilon: self.epsilon,
        }
    }

    fn stream(&self, group: Group, name: &dyn Fn(&str) -> String, own: [&str; 7]) -> Stream<Described> {
        let [q, k, v, out, norm_q, norm_k, feed_forward] = own;
        let stacked: Vec<String> = [q, k, v].iter().map(|part| name(&format!("attn.{part}"))).collect();
        let stacked: Vec<&str> = stacked.iter().map(String::as_str).collect();
        let linear = |suffix: &str, outputs, inputs| Linear::new(group, &name(suffix), outputs, inputs);
        Stream {
            qkv: Linear::stacked(group, &stacked, self.dim, self.dim),
            out: linear(&format!("attn.{out}"), self.dim, self.dim),
            norm: self.norm(group, [norm_q, norm_k].map(|part| name(&format!("attn.{part}")))),
            w13: linear(&format!("{feed_forward}.linear_in"), 2 * self.ffn, self.dim),
            w2: linear(&format!("{feed_forward}.linear_out"), self.dim, self.ffn),
        }
    }

    /// Double-stream block `index`.
    pub fn double(&self, group: Group, index: usize) -> DoubleBlock<Described> {
        let name = |suffix: &str| format!("transformer_blocks.{index}.{suffix}");
        let image = ["to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k", "ff"];
        let text = [
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_add_out",
            "norm_added_q",
            "norm_added_k",
            "ff_context",
        ];
        DoubleBlock {
            image: self.stream(group, &name, image),
            text: self.stream(group, &name, text),
        }
    }

    /// Single-stream block `index`.
    pub fn single(&self, group: Group, index: usize) -> SingleBlock<Described> {
        let name = |suffix: &str| format!("single_transformer_blocks.{index}.attn.{suffix}");
        let (dim, ffn) = (self.dim, self.ffn);
        SingleBlock {
            input: Linear::new(group, &name("to_qkv_mlp_proj"), 3 * dim + 2 * ffn, dim),
            out: Linear::new(group, &name("to_out"), dim, dim + ffn),
            norm: self.norm(group, ["norm_q", "norm_k"].map(name)),
        }
    }
}

/// What the tokens of a batch share through all blocks; image tokens come before the text's.
#[derive(Clone, Copy)]
pub(super) struct Sequence<'a> {
    /// Rotary tables of the image, of the text, and of both.
    pub image_rope: &'a Tensor,
    pub text_rope: &'a Tensor,
    pub rope: &'a Tensor,
    /// Valid tokens per item where captions differ in length, i32 `[batch]`.
    pub keys: Option<&'a Tensor>,
}

/// What attention of a block keeps: queries, keys and values before they are normalised, its result and its log-sum-exp.
struct SavedAttention {
    qkv: Vec<Tensor>,
    attended: Tensor,
    lse: Tensor,
}

/// What a stream keeps beside attention: the projected attention, the stream after it, the feed-forward network's halves and its result.
struct SavedStream {
    projected: Tensor,
    middle: Tensor,
    gate_and_up: Tensor,
    fed: Tensor,
}

/// What a double-stream block keeps beside its input.
pub(super) struct SavedDouble {
    attention: SavedAttention,
    image: SavedStream,
    text: SavedStream,
}

/// What a single-stream block keeps beside its input.
pub(super) struct SavedSingle {
    attention: SavedAttention,
    gate_and_up: Tensor,
    projected: Tensor,
}

impl QkNorm {
    fn op(&self) -> QkNormRope<'_> {
        QkNormRope {
            heads: self.attention.heads,
            kv_heads: self.attention.kv_heads,
            head_dim: self.attention.head_dim,
            q_weight: self.q.tensor(),
            k_weight: self.k.tensor(),
            epsilon: self.epsilon,
            rotation: Rotation::Interleaved,
        }
    }

    /// Turns the gradient of rotated queries and keys into that of `qkv`.
    fn backward(
        &self,
        gradient: Tensor,
        qkv: &Tensor,
        rope: &Tensor,
        places: &mut QkNorm<Gradients>,
    ) -> Result<Tensor> {
        let mut gradient = gradient.into_unshared()?;
        let places = QkNormGradients {
            q: places.q.0.as_mut(),
            k: places.k.0.as_mut(),
        };
        qk_norm_rope_backward(&mut gradient, qkv, &self.op(), rope, places)?;
        Ok(gradient)
    }
}

/// Two tensors `[batch, tokens, ..]` as one `[batch, tokens, both widths]`: rows of the widths' common unit, put together.
fn side_by_side(first: &Tensor, second: &Tensor) -> Result<Tensor> {
    let [batch, tokens, one, other] = [first.dim(0), first.dim(1), first.dim(2), second.dim(2)];
    let unit = common_unit(one, other);
    let units = |x: &Tensor| x.reshape([batch * tokens, x.dim(2) / unit, unit]);
    concat_all(&[&units(first)?, &units(second)?])?.into_shape([batch, tokens, one + other])
}

/// The parts of [`side_by_side`], of which the first is `width` wide.
fn taken_apart(both: &Tensor, width: usize) -> Result<[Tensor; 2]> {
    let [batch, tokens, all] = [both.dim(0), both.dim(1), both.dim(2)];
    let unit = common_unit(width, all - width);
    let units = both.reshape([batch * tokens, all / unit, unit])?;
    let part = |start: usize, width: usize| {
        narrow_tokens(&units, start / unit, width / unit)?.into_shape([batch, tokens, width])
    };
    Ok([part(0, width)?, part(width, all - width)?])
}

/// The greatest common divisor.
fn common_unit(mut a: usize, mut b: usize) -> usize {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a.max(1)
}

impl Stream {
    fn qkv(&self, x: &Tensor, vectors: Vectors<'_>) -> Result<Tensor> {
        self.qkv.forward(&vectors.normalise(x)?)
    }

    /// The stream after attention's part of it.
    fn after_attention(&self, x: &Tensor, attended: &Tensor, vectors: Vectors<'_>) -> Result<[Tensor; 2]> {
        let projected = self.out.forward(attended)?;
        Ok([vectors.add(x, &projected)?, projected])
    }

    fn finish(&self, x: &Tensor, attended: &Tensor, vectors: Vectors<'_>) -> Result<Tensor> {
        let [middle, _] = self.after_attention(x, attended, vectors)?;
        let vectors = vectors.next();
        let hidden = self
            .w13
            .forward_swiglu(&vectors.normalise(&middle)?, self.w2.coding())?;
        vectors.add(&middle, &self.w2.forward(&hidden)?)
    }

    fn finish_saving(&self, x: &Tensor, attended: &Tensor, vectors: Vectors<'_>) -> Result<(Tensor, SavedStream)> {
        let [middle, projected] = self.after_attention(x, attended, vectors)?;
        let vectors = vectors.next();
        let gate_and_up = self.w13.forward(&vectors.normalise(&middle)?)?;
        let fed = self.w2.forward(&swiglu(&gate_and_up)?)?;
        let y = vectors.add(&middle, &fed)?;
        let saved = SavedStream {
            projected,
            middle,
            gate_and_up,
            fed,
        };
        Ok((y, saved))
    }

    /// The gradients of the stream, as far as it goes past attention's input, and of the attended tokens.
    fn finish_backward(
        &self,
        dy: &Tensor,
        attended: &Tensor,
        saved: SavedStream,
        vectors: Vectors<'_>,
        (own, places): (&mut Stream<Gradients>, &mut VectorGradients),
    ) -> Result<[Tensor; 2]> {
        let SavedStream {
            projected,
            middle,
            gate_and_up,
            fed,
        } = saved;
        let second = vectors.next();
        let d_fed = second.add_backward(dy, &fed, places, 1)?;
        drop(fed);
        let d_hidden = self.w2.backward_input(&d_fed)?;
        let (d_gate_and_up, hidden) = swiglu_backward(&d_hidden, gate_and_up, own.w2.wants_weight())?;
        if let Some(hidden) = hidden {
            own.w2.add(&d_fed, &hidden)?;
        }
        if own.w13.wants_weight() {
            own.w13.add(&d_gate_and_up, &second.normalise(&middle)?)?;
        }
        let d_normalised = self.w13.backward_input(&d_gate_and_up)?;
        drop(d_gate_and_up);
        let d_middle = add(dy, &second.normalise_backward(&d_normalised, &middle, places, 1)?)?;
        let d_projected = vectors.add_backward(&d_middle, &projected, places, 0)?;
        own.out.add(&d_projected, attended)?;
        Ok([d_middle, self.out.backward_input(&d_projected)?])
    }

    /// The gradient of the stream before the block, for that of its rotated queries, keys and values and that past attention.
    fn start_backward(
        &self,
        [d_rotated, d_middle]: [Tensor; 2],
        [x, qkv, rope]: [&Tensor; 3],
        vectors: Vectors<'_>,
        (own, places): (&mut Stream<Gradients>, &mut VectorGradients),
    ) -> Result<Tensor> {
        let d_qkv = self.norm.backward(d_rotated, qkv, rope, &mut own.norm)?;
        if own.qkv.wants_weight() {
            own.qkv.add(&d_qkv, &vectors.normalise(x)?)?;
        }
        let d_normalised = self.qkv.backward_input(&d_qkv)?;
        add(&d_middle, &vectors.normalise_backward(&d_normalised, x, places, 0)?)
    }
}

impl DoubleBlock {
    fn attention(&self) -> &Attention {
        &self.image.norm.attention
    }

    /// The streams after the block; `vectors` are the image's and the text's.
    pub(super) fn forward(
        &self,
        [image, text]: [&Tensor; 2],
        vectors: [Vectors<'_>; 2],
        sequence: &Sequence<'_>,
    ) -> Result<[Tensor; 2]> {
        let _range = profile::range(c"double block");
        let mut own = self.image.qkv(image, vectors[0])?;
        qk_norm_rope(&mut own, &self.image.norm.op(), sequence.image_rope)?;
        let mut other = self.text.qkv(text, vectors[1])?;
        qk_norm_rope(&mut other, &self.text.norm.op(), sequence.text_rope)?;
        let rotated = concat_tokens(&own, &other)?;
        drop((own, other));
        let attended = attention(&rotated, self.attention(), sequence.keys)?;
        drop(rotated);
        let [own, other] = split(&attended, image.dim(1))?;
        Ok([
            self.image.finish(image, &own, vectors[0])?,
            self.text.finish(text, &other, vectors[1])?,
        ])
    }

    /// Queries and keys of both streams, normalised and rotated, with their values, of what the streams' projections gave.
    fn rotated(&self, qkv: &[Tensor], sequence: &Sequence<'_>) -> Result<Tensor> {
        let image = qk_norm_rope_from(&qkv[0], &self.image.norm.op(), sequence.image_rope)?;
        let text = qk_norm_rope_from(&qkv[1], &self.text.norm.op(), sequence.text_rope)?;
        concat_tokens(&image, &text)
    }

    /// As [`DoubleBlock::forward`], with what backward needs.
    pub(super) fn forward_saving(
        &self,
        [image, text]: [&Tensor; 2],
        vectors: [Vectors<'_>; 2],
        sequence: &Sequence<'_>,
    ) -> Result<([Tensor; 2], SavedDouble)> {
        let _range = profile::range(c"double block");
        let _tag = MemoryTag::Saved.scope();
        let qkv = vec![self.image.qkv(image, vectors[0])?, self.text.qkv(text, vectors[1])?];
        let rotated = self.rotated(&qkv, sequence)?;
        let (attended, lse) = attention_with_lse(&rotated, self.attention(), sequence.keys)?;
        drop(rotated);
        let [own, other] = split(&attended, image.dim(1))?;
        let (image, saved_image) = self.image.finish_saving(image, &own, vectors[0])?;
        let (text, saved_text) = self.text.finish_saving(text, &other, vectors[1])?;
        let saved = SavedDouble {
            attention: SavedAttention { qkv, attended, lse },
            image: saved_image,
            text: saved_text,
        };
        Ok(([image, text], saved))
    }

    /// The gradients of both streams before the block for those after it.
    pub(super) fn backward(
        &self,
        [d_image, d_text]: [&Tensor; 2],
        [image, text]: [&Tensor; 2],
        saved: SavedDouble,
        (vectors, sequence): ([Vectors<'_>; 2], &Sequence<'_>),
        (own, [image_places, text_places]): (&mut DoubleBlock<Gradients>, [&mut VectorGradients; 2]),
    ) -> Result<[Tensor; 2]> {
        let SavedAttention { qkv, attended, lse } = saved.attention;
        let count = image.dim(1);
        let [image_attended, text_attended] = split(&attended, count)?;
        let sink = (&mut own.image, &mut *image_places);
        let [d_image, da_image] =
            self.image
                .finish_backward(d_image, &image_attended, saved.image, vectors[0], sink)?;
        let sink = (&mut own.text, &mut *text_places);
        let [d_text, da_text] = self
            .text
            .finish_backward(d_text, &text_attended, saved.text, vectors[1], sink)?;
        let d_attended = concat_tokens(&da_image, &da_text)?;
        drop((da_image, da_text, image_attended, text_attended));
        let rotated = self.rotated(&qkv, sequence)?;
        let keys = sequence.keys;
        let d_rotated = attention_backward(&d_attended, &rotated, &attended, &lse, self.attention(), keys)?;
        drop((rotated, d_attended));
        let [image_rotated, text_rotated] = split(&d_rotated, count)?;
        Ok([
            self.image.start_backward(
                [image_rotated, d_image],
                [image, &qkv[0], sequence.image_rope],
                vectors[0],
                (&mut own.image, image_places),
            )?,
            self.text.start_backward(
                [text_rotated, d_text],
                [text, &qkv[1], sequence.text_rope],
                vectors[1],
                (&mut own.text, text_places),
            )?,
        ])
    }
}

/// The image's tokens, which are the first `count`, and the text's.
pub(super) fn split(x: &Tensor, count: usize) -> Result<[Tensor; 2]> {
    Ok([narrow_tokens(x, 0, count)?, narrow_tokens(x, count, x.dim(1) - count)?])
}

impl SingleBlock {
    /// The layer's rows for queries, keys and values, and those for the feed-forward network.
    fn inputs(&self) -> Result<[Linear; 2]> {
        let Attention { heads, head_dim, .. } = self.norm.attention;
        let (projections, all) = (3 * heads * head_dim, self.input.extents()[0]);
        Ok([
            self.input.outputs(0, projections)?,
            self.input.outputs(projections, all - projections)?,
        ])
    }

    /// The stream after the block.
    pub(super) fn forward(&self, x: &Tensor, vectors: Vectors<'_>, sequence: &Sequence<'_>) -> Result<Tensor> {
        let _range = profile::range(c"single block");
        let normalised = vectors.normalise(x)?;
        let [qkv, w13] = self.inputs()?;
        let mut qkv = qkv.forward(&normalised)?;
        qk_norm_rope(&mut qkv, &self.norm.op(), sequence.rope)?;
        let attended = attention(&qkv, &self.norm.attention, sequence.keys)?;
        drop(qkv);
        let hidden = w13.forward_swiglu(&normalised, None)?.into_values();
        drop(normalised);
        let both = side_by_side(&attended, &hidden)?;
        drop((attended, hidden));
        vectors.add(x, &self.out.forward(&both)?)
    }

    /// As [`SingleBlock::forward`], with what backward needs.
    pub(super) fn forward_saving(
        &self,
        x: &Tensor,
        vectors: Vectors<'_>,
        sequence: &Sequence<'_>,
    ) -> Result<(Tensor, SavedSingle)> {
        let _range = profile::range(c"single block");
        let _tag = MemoryTag::Saved.scope();
        let normalised = vectors.normalise(x)?;
        let [qkv, w13] = self.inputs()?;
        let (qkv, gate_and_up) = (qkv.forward(&normalised)?, w13.forward(&normalised)?);
        drop(normalised);
        let rotated = qk_norm_rope_from(&qkv, &self.norm.op(), sequence.rope)?;
        let (attended, lse) = attention_with_lse(&rotated, &self.norm.attention, sequence.keys)?;
        drop(rotated);
        let projected = self.out.forward(&side_by_side(&attended, &swiglu(&gate_and_up)?)?)?;
        let y = vectors.add(x, &projected)?;
        let qkv = vec![qkv];
        let saved = SavedSingle {
            attention: SavedAttention { qkv, attended, lse },
            gate_and_up,
            projected,
        };
        Ok((y, saved))
    }

    /// The gradient of the stream before the block for that after it.
    pub(super) fn backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        saved: SavedSingle,
        (vectors, sequence): (Vectors<'_>, &Sequence<'_>),
        (own, places): (&mut SingleBlock<Gradients>, &mut VectorGradients),
    ) -> Result<Tensor> {
        let SavedSingle {
            attention: SavedAttention { qkv, attended, lse },
            gate_and_up,
            projected,
        } = saved;
        let d_projected = vectors.add_backward(dy, &projected, places, 0)?;
        drop(projected);
        let [d_attended, d_hidden] = taken_apart(&self.out.backward_input(&d_projected)?, attended.dim(2))?;
        let (d_gate_and_up, hidden) = swiglu_backward(&d_hidden, gate_and_up, own.out.wants_weight())?;
        if let Some(hidden) = hidden {
            own.out.add(&d_projected, &side_by_side(&attended, &hidden)?)?;
        }
        drop((d_projected, d_hidden));
        let (qkv, heads) = (&qkv[0], &self.norm.attention);
        let rotated = qk_norm_rope_from(qkv, &self.norm.op(), sequence.rope)?;
        let d_rotated = attention_backward(&d_attended, &rotated, &attended, &lse, heads, sequence.keys)?;
        drop((rotated, d_attended));
        let d_qkv = self.norm.backward(d_rotated, qkv, sequence.rope, &mut own.norm)?;
        let d_input = side_by_side(&d_qkv, &d_gate_and_up)?;
        drop((d_qkv, d_gate_and_up));
        if own.input.wants_weight() {
            own.input.add(&d_input, &vectors.normalise(x)?)?;
        }
        let d_normalised = self.input.backward_input(&d_input)?;
        add(dy, &vectors.normalise_backward(&d_normalised, x, places, 0)?)
    }
}

/// Sublayers that have vectors of their own: a stream's, and a single-stream block's.
pub(super) const SUBLAYERS: [usize; 2] = [2, 1];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    #[test]
    fn rows_are_put_together_and_taken_apart() {
        let of = |start: usize, width: usize| {
            let values: Vec<f32> = (0..2 * width).map(|value| (start + value) as f32).collect();
            Tensor::from_slice(&Device::Cpu, &values, [1, 2, width]).unwrap()
        };
        let (first, second) = (of(0, 4), of(100, 6));
        let both = side_by_side(&first, &second).unwrap();
        assert_eq!(*both.shape(), [1, 2, 10]);
        let values = both.to_vec::<f32>().unwrap();
        assert_eq!(values[..6], [0.0, 1.0, 2.0, 3.0, 100.0, 101.0]);
        assert_eq!(values[10..16], [4.0, 5.0, 6.0, 7.0, 106.0, 107.0]);
        let [one, other] = taken_apart(&both, 4).unwrap();
        assert_eq!(one.to_vec::<f32>().unwrap(), first.to_vec::<f32>().unwrap());
        assert_eq!(other.to_vec::<f32>().unwrap(), second.to_vec::<f32>().unwrap());
    }
}
