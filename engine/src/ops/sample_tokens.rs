//! The next token of each row of logits.
//!
//! [`sample_tokens`] takes `logits` `[rows, vocabulary]` in f32 and, per row, a [`TokenChoice`]; the result is `[rows]` in i32. Without
//! temperature it is the token with the largest logit, the first of equals. Otherwise, with `d = (largest − logit) / temperature` in
//! powers of two, a token has the weight `2^−d` of the largest, in whole multiples of 2⁻²⁸; those that are 28 powers of two or more below
//! it have none. Tokens below the `top_k`-th largest weight are left out, of equals none; of the rest those are kept that are needed
//! to reach the share `top_p` of their weight, the largest first; and `random` of 2³² draws one of them in proportion to their weights,
//! which lie one after the other in the order of the vocabulary. Whole numbers are added in any order to the same sum, so the result does
//! not depend on who adds.
//!
//! `allowed` `[rows, ⌈vocabulary / 32⌉]` in i32 says by one bit for each token, the lowest first, which may be chosen at all; a row of
//! which none may be, or whose logits are NaN, gets −1. On CUDA a vocabulary has at most 2¹⁸ tokens. Sources: Fan et al., "Hierarchical
//! Neural Story Generation" (2018) for the number of tokens; Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020) for
//! the share.

use rayon::prelude::*;

use super::grid;
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

const OP: &str = "sample_tokens";

/// Bits behind the point of a distance.
const KEY_BITS: i32 = 26;

/// The largest weight is two to this power.
const WEIGHT_BITS: i32 = 28;

/// How a row's token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenChoice {
    /// What logits are divided by; 0 for the largest one.
    pub temperature: f32,
    /// The share of the weight that is kept; 1 for all.
    pub top_p: f32,
    /// How many tokens are kept; 0 for all.
    pub top_k: u32,
    /// Random bits.
    pub random: u32,
}

impl TokenChoice {
    /// The largest logit.
    pub const GREEDY: TokenChoice = TokenChoice {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        random: 0,
    };

    fn check(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(Error::invalid(format!(
                "{OP}: the temperature is {}, expected 0 or a positive number",
                self.temperature
            )));
        }
        match self.top_p > 0.0 && self.top_p <= 1.0 {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "{OP}: the share of the probability is {}, expected more than 0 and at most 1",
                self.top_p
            ))),
        }
    }
}

/// Words of 32 bits that say which tokens of a vocabulary are allowed.
pub fn mask_words(vocabulary: usize) -> usize {
    vocabulary.div_ceil(32)
}

/// The next tokens; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or a choice makes no sense.
pub fn sample_tokens(logits: &Tensor, choices: &[TokenChoice], allowed: Option<&Tensor>) -> Result<Tensor> {
    logits.ensure_rank(OP, "logits", 2, "[rows, vocabulary]")?;
    logits.ensure_dtype(OP, "logits", DType::F32)?;
    let (rows, vocabulary) = (logits.dim(0), logits.dim(1));
    if choices.len() != rows {
        return Err(Error::invalid(format!(
            "{OP}: {} choices for {rows} rows of logits",
            choices.len()
        )));
    }
    choices.iter().try_for_each(TokenChoice::check)?;
    if let Some(allowed) = allowed {
        allowed.ensure_shape(OP, "allowed", [rows, mask_words(vocabulary)])?;
        allowed.ensure_dtype(OP, "allowed", DType::I32)?;
        allowed.ensure_device(OP, "allowed", &logits.device())?;
    }
    let _op = crate::profile::op(OP, logits, 0, logits.bytes());
    match logits.cuda() {
        None => cpu_sample(logits, choices, allowed),
        Some(device) => cuda_sample(device, logits, choices, allowed),
    }
}

fn cpu_sample(logits: &Tensor, choices: &[TokenChoice], allowed: Option<&Tensor>) -> Result<Tensor> {
    let (rows, vocabulary) = (logits.dim(0), logits.dim(1));
    let words = mask_words(vocabulary);
    let values = logits.as_slice::<f32>()?;
    let masks = allowed.map(Tensor::as_slice::<i32>).transpose()?;
    let tokens: Vec<i32> = (0..rows)
        .into_par_iter()
        .map(|row| {
            let mask = masks.map(|masks| &masks[row * words..][..words]);
            let may = |token: usize| mask.is_none_or(|mask| mask[token / 32] >> (token % 32) & 1 != 0);
            choose(&values[row * vocabulary..][..vocabulary], choices[row], may)
        })
        .collect();
    Tensor::from_slice(&logits.device(), &tokens, [rows])
}

/// A token with weight.
#[derive(Clone, Copy)]
struct Weighed {
    token: usize,
    /// How far below the largest, in powers of two with [`KEY_BITS`] behind the point.
    key: u32,
    weight: u64,
}

/// The token of one row, −1 without any.
fn choose(logits: &[f32], choice: TokenChoice, may: impl Fn(usize) -> bool) -> i32 {
    let mut top: Option<(usize, f32)> = None;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > top.map_or(f32::NEG_INFINITY, |(_, top)| top) && may(token) {
            top = Some((token, logit));
        }
    }
    let Some((token, top)) = top else { return -1 };
    if choice.temperature == 0.0 {
        return token as i32;
    }
    let inverse = std::f32::consts::LOG2_E / choice.temperature;
    let weigh = |(token, &logit): (usize, &f32)| {
        let distance = (top - logit) * inverse;
        (distance < WEIGHT_BITS as f32 && may(token)).then(|| {
            let key = (distance * (KEY_BITS as f32).exp2()) as u32;
            let power = (key as f32 * -(-KEY_BITS as f32).exp2()).exp2();
            let weight = (power * (WEIGHT_BITS as f32).exp2()) as u64;
            Weighed { token, key, weight }
        })
    };
    let mut kept: Vec<Weighed> = logits.iter().enumerate().filter_map(weigh).collect();
    let in_order = |kept: &[Weighed]| {
        let mut order = kept.to_vec();
        order.sort_unstable_by_key(|token| token.key);
        order
    };
    if choice.top_k > 0 && kept.len() > choice.top_k as usize {
        let last = in_order(&kept)[choice.top_k as usize - 1].key;
        kept.retain(|token| token.key <= last);
    }
    if choice.top_p < 1.0 {
        let all: u64 = kept.iter().map(|token| token.weight).sum();
        let wanted = ((f64::from(choice.top_p) * all as f64) as u64).max(1);
        let mut reached = 0;
        let last = in_order(&kept).into_iter().find(|token| {
            reached += token.weight;
            reached >= wanted
        });
        if let Some(last) = last {
            kept.retain(|token| token.key <= last.key);
        }
    }
    let all: u64 = kept.iter().map(|token| token.weight).sum();
    let mut left = ((u128::from(all) * u128::from(choice.random)) >> 32) as u64;
    let drawn = kept.iter().find(|token| match left < token.weight {
        true => true,
        false => {
            left -= token.weight;
            false
        }
    });
    drawn.map_or(-1, |drawn| drawn.token as i32)
}

fn cuda_sample(
    device: &CudaDevice,
    logits: &Tensor,
    choices: &[TokenChoice],
    allowed: Option<&Tensor>,
) -> Result<Tensor> {
    /// The most tokens whose weights' lower and upper halves add up in 32 bits.
    const MOST_TOKENS: usize = 1 << 18;
    let (rows, vocabulary) = (logits.dim(0), logits.dim(1));
    if vocabulary > MOST_TOKENS {
        return Err(Error::invalid(format!(
            "{OP}: a vocabulary of {vocabulary} is larger than the CUDA kernel's {MOST_TOKENS}; use --device cpu"
        )));
    }
    let words = choices.iter().flat_map(|choice| {
        [
            choice.temperature.to_bits() as i32,
            choice.top_p.to_bits() as i32,
            i32::try_from(choice.top_k).unwrap_or(i32::MAX),
            choice.random as i32,
        ]
    });
    let words: Vec<i32> = words.collect();
    let words = Tensor::from_slice(&logits.device(), &words, [rows, 4])?;
    let mut tokens = Tensor::empty(&logits.device(), [rows], DType::I32)?;
    let kernel = device.kernel(OP, OP)?;
    let args = Args::new()
        .input(logits)?
        .input(&words)?
        .optional(allowed)?
        .output(&mut tokens)?
        .int(vocabulary);
    // SAFETY: the arguments are those of `sample_tokens`, of the shapes and types checked at the door; one block per row.
    unsafe { kernel.launch(device, [grid(OP, rows)?, 1, 1], args)? };
    Ok(tokens)
}
