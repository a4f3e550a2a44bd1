//! Texts that are continued, a token of each at a time.

use super::super::text::{checked, rotation};
use super::{LanguageMemory, LanguageModel};
use crate::device::Recording;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::add_rms_norm::add_rms_norm;
use crate::ops::decode_attention::{DecodeScratch, KeyCache, decode_attention, keep_keys};
use crate::ops::embedding::embedding;
use crate::ops::linear_few::{
    FewScratch, MOST_ROWS, RowNorm, linear_few, linear_few_add, linear_few_f32, linear_few_swiglu,
};
use crate::ops::rms_norm::rms_norm;
use crate::profile;
use crate::tensor::Tensor;

/// Tokens of prompts that are read together, padding included; a longer prompt is read by itself.
const READ_TOKENS: usize = 4096;

/// A token that a text is continued with, and how many stand before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feed {
    /// The token.
    pub token: u32,
    /// Its place in the text, from 0 on.
    pub position: usize,
}

/// Places for texts, with the keys and values of what was read of each. On CUDA a step is recorded when it is met for the second time
/// and replayed from then on, whatever the texts' lengths.
pub struct Decoding<'a> {
    model: &'a LanguageModel,
    /// Of every layer.
    caches: Vec<KeyCache>,
    scratch: Scratch,
    /// `[1, capacity, head_dim / 2, 2]`
    angles: Tensor,
    /// i32 `[slots, 1]`
    ids: Tensor,
    /// i32 `[slots]`
    positions: Tensor,
    /// f32 `[slots, 1, vocabulary]`
    logits: Tensor,
    recording: Recording,
    ran: bool,
}

impl<'a> Decoding<'a> {
    /// Places for `slots` texts of at most `capacity` tokens each.
    ///
    /// # Errors
    /// When there are more than [`MOST_ROWS`] places or none, or the device has no room or no kernels for the model's heads.
    pub fn new(model: &'a LanguageModel, slots: usize, capacity: usize) -> Result<Self> {
        if !(1..=MOST_ROWS).contains(&slots) || capacity == 0 {
            return Err(Error::invalid(format!(
                "{slots} texts of {capacity} tokens cannot be written at a time; 1 to {MOST_ROWS} of at least one can"
            )));
        }
        let (device, config) = (model.device(), model.config());
        LanguageMemory::of(config, &device, slots, capacity, capacity.max(READ_TOKENS)).ensure_room(&device, true)?;
        let first = &model.layers[0].norm_and_turn(config);
        let cache = || KeyCache::new(&device, slots, config.kv_heads, capacity, config.head_dim);
        Ok(Decoding {
            caches: (0..config.layers).map(|_| cache()).collect::<Result<_>>()?,
            scratch: Scratch {
                attention: DecodeScratch::new(&device, slots, first, capacity)?,
                products: FewScratch::new(&device)?,
            },
            angles: rotation(config, &device, capacity)?,
            ids: Tensor::zeros(&device, [slots, 1], DType::I32)?,
            positions: Tensor::zeros(&device, [slots], DType::I32)?,
            logits: Tensor::zeros(&device, [slots, 1, config.vocabulary], DType::F32)?,
            recording: Recording::new(&device),
            ran: false,
            model,
        })
    }

    /// Places.
    pub fn slots(&self) -> usize {
        self.ids.dim(0)
    }

    /// Tokens of a text that there is room for.
    pub fn capacity(&self) -> usize {
        self.angles.dim(1)
    }

    /// Reads texts into places, in place of what stood there: each text's keys and values at its positions from 0 on. What comes next
    /// is told by [`Decoding::step`] when it is fed the next token; so of a prompt all tokens but the last are read.
    ///
    /// # Errors
    /// When a text is empty or too long, a token is not in the vocabulary, there is no such place, or the device has no room.
    pub fn read(&mut self, texts: &[(usize, &[u32])]) -> Result<()> {
        let mut first = 0;
        while first < texts.len() {
            // As many as stay within the bound when all are padded to the longest.
            let mut longest = 0;
            let fits = |count: usize, longest: usize| count * longest <= READ_TOKENS;
            let together = texts[first..].iter().enumerate().take_while(|(index, (_, text))| {
                longest = longest.max(text.len());
                *index == 0 || fits(index + 1, longest)
            });
            let count = together.count();
            self.read_together(&texts[first..first + count])?;
            first += count;
        }
        Ok(())
    }

    /// Reads texts as one batch. Shorter ones are padded behind their end, where no token of theirs looks; what the pads leave in the
    /// cache is overwritten before a text comes to that position.
    fn read_together(&mut self, texts: &[(usize, &[u32])]) -> Result<()> {
        let _range = profile::range(c"prompts");
        let (model, config) = (self.model, self.model.config());
        let device = model.device();
        let tokens = texts.iter().map(|(_, text)| text.len()).max().unwrap_or(0);
        if tokens > self.capacity() {
            return Err(Error::invalid(format!(
                "a prompt of {tokens} tokens does not fit the {} that there is room for",
                self.capacity()
            )));
        }
        let mut ids = vec![0; texts.len() * tokens];
        for ((slot, text), row) in texts.iter().zip(ids.chunks_mut(tokens.max(1))) {
            if *slot >= self.slots() {
                return Err(Error::invalid(format!(
                    "there is no place {slot} among {}",
                    self.slots()
                )));
            }
            row[..text.len()].copy_from_slice(&checked(text, config.vocabulary)?);
        }
        let ids = Tensor::from_slice(&device, &ids, [texts.len(), tokens])?;
        let pairs = config.head_dim / 2;
        let angles = self.angles.reshape([self.capacity(), pairs, 2])?.narrow(0, tokens)?;
        let angles = angles.into_shape([1, tokens, pairs, 2])?;
        let epsilon = config.norm_eps;
        let mut stream = embedding(model.embeddings.tensor(), &ids)?;
        let mut input = rms_norm(&stream, model.layers[0].input_norm.tensor(), epsilon)?;
        for (index, (layer, cache)) in model.layers.iter().zip(&mut self.caches).enumerate() {
            let qkv = layer.turned(&input, config, &angles)?;
            for (item, (slot, _)) in texts.iter().enumerate() {
                keep_keys(&qkv.narrow(item, 1)?, &layer.norm_and_turn(config), cache, *slot)?;
            }
            // What follows the last layer's keys serves the next token alone.
            let Some(next) = model.layers.get(index + 1) else { break };
            let attended = layer.attended(&qkv, config)?;
            let (sum, normalised) = add_rms_norm(&stream, &attended, layer.post_attention_norm.tensor(), epsilon)?;
            let opened = layer.gate_up.forward_swiglu(&normalised, None)?.into_values();
            let forwarded = layer.down.forward(&opened)?;
            (stream, input) = add_rms_norm(&sum, &forwarded, next.input_norm.tensor(), epsilon)?;
        }
        Ok(())
    }

    /// Feeds every place its next token, or none, and gives the logits `[slots, vocabulary]` of those that follow, in f32; what stands in
    /// the row of a place without a token means nothing. The result has to be dropped before the next step, which overwrites it.
    ///
    /// # Errors
    /// When there are not as many feeds as places, a token is not in the vocabulary, or a text has reached the capacity.
    pub fn step(&mut self, feeds: &[Option<Feed>]) -> Result<Tensor> {
        let _range = profile::range(c"token");
        let (vocabulary, capacity) = (self.model.config().vocabulary, self.capacity());
        if feeds.len() != self.slots() {
            return Err(Error::invalid(format!(
                "{} tokens for {} places",
                feeds.len(),
                self.slots()
            )));
        }
        if let Some(feed) = feeds.iter().flatten().find(|feed| feed.position >= capacity) {
            return Err(Error::invalid(format!(
                "a text's token {} does not fit the {capacity} that there is room for",
                feed.position + 1
            )));
        }
        let tokens: Vec<u32> = feeds.iter().map(|feed| feed.map_or(0, |feed| feed.token)).collect();
        let position = |feed: &Option<Feed>| feed.map_or(-1, |feed| feed.position as i32);
        self.ids.copy_from_slice(&checked(&tokens, vocabulary)?)?;
        self.positions
            .copy_from_slice(&feeds.iter().map(position).collect::<Vec<i32>>())?;
        self.again()?;
        self.ran = true;
        self.logits.reshape([self.slots(), vocabulary])
    }

    /// Submits the last step again, with the same tokens: what a step takes, for benchmarks.
    ///
    /// # Errors
    /// As [`Decoding::step`].
    pub fn again(&mut self) -> Result<()> {
        let ran = self.ran;
        self.with_recording(|recording, step| recording.run(ran, step))
    }

    /// The same call by call, so that its operations can be told apart.
    ///
    /// # Errors
    /// As [`Decoding::step`].
    pub fn called(&mut self) -> Result<()> {
        self.with_recording(|_, step| step())
    }

    /// Submits a step of what stands in the inputs in a way that `submit` chooses.
    fn with_recording(
        &mut self,
        submit: impl FnOnce(&mut Recording, &mut dyn FnMut() -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let inputs = StepInputs {
            angles: &self.angles,
            ids: &self.ids,
            positions: &self.positions,
        };
        let (model, caches, scratch, logits) = (self.model, &mut self.caches, &mut self.scratch, &mut self.logits);
        submit(&mut self.recording, &mut || {
            model.step(&inputs, caches, scratch, logits)
        })
    }
}

/// What the blocks of a launch leave for each other, in every operation of a step.
struct Scratch {
    attention: DecodeScratch,
    products: FewScratch,
}

/// What a step reads, at addresses that stay.
struct StepInputs<'a> {
    angles: &'a Tensor,
    ids: &'a Tensor,
    positions: &'a Tensor,
}

impl LanguageModel {
    fn step(
        &self,
        inputs: &StepInputs<'_>,
        caches: &mut [KeyCache],
        scratch: &mut Scratch,
        logits: &mut Tensor,
    ) -> Result<()> {
        let config = &self.config;
        let norm = |weight| {
            Some(RowNorm {
                weight,
                epsilon: config.norm_eps,
            })
        };
        let Scratch { attention, products } = scratch;
        let mut stream = embedding(self.embeddings.tensor(), inputs.ids)?;
        for (layer, cache) in self.layers.iter().zip(caches) {
            let weight = layer.qkv.dense_weight()?;
            let qkv = linear_few(&stream, norm(layer.input_norm.tensor()), &weight, products)?;
            let turn = layer.norm_and_turn(config);
            let attended = decode_attention(&qkv, &turn, inputs.angles, inputs.positions, cache, attention)?;
            linear_few_add(&attended, &layer.out.dense_weight()?, &mut stream, products)?;
            let gate_up = layer.gate_up.dense_weight()?;
            let opened = linear_few_swiglu(&stream, norm(layer.post_attention_norm.tensor()), &gate_up, products)?;
            linear_few_add(&opened, &layer.down.dense_weight()?, &mut stream, products)?;
        }
        linear_few_f32(
            &stream,
            norm(self.norm.tensor()),
            self.logits_weight(),
            logits,
            products,
        )
    }
}
