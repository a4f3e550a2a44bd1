//! The captions of a data set through the text encoder, once.

use std::collections::BTreeSet;

use rayon::prelude::*;

use super::features::FeatureStore;
use crate::device::Device;
use crate::dist::World;
use crate::error::{Error, Result};
use crate::pipeline::PromptFiles;
use crate::tensor::HostTensor as Features;

/// What [`encode_captions`] did.
#[derive(Clone, Debug, Default)]
pub struct CaptionReport {
    /// Captions that were in the store.
    pub found: usize,
    /// Captions that were encoded.
    pub encoded: usize,
    /// Captions that were longer than the text encoder reads, and are used without their ends.
    pub cut: usize,
    /// Captions that cannot be used, and why.
    pub refused: Vec<(String, String)>,
    /// Tokens of the longest caption.
    pub longest: usize,
}

/// Brings the features of all `texts` into `store`. The text encoder is loaded when some are missing, and freed before this
/// returns. `progress(done, missing)` is called after each caption that was encoded; an error from it ends the work, and what
/// was encoded so far stays.
///
/// # Errors
/// When the text encoder cannot be loaded, the disk does not take the features, or `progress` says so.
pub fn encode_captions(
    store: &FeatureStore,
    files: &PromptFiles<'_>,
    device: &Device,
    texts: &BTreeSet<&str>,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<CaptionReport> {
    let all: Vec<&str> = texts.iter().copied().collect();
    let known: Vec<Option<usize>> = all
        .par_iter()
        .map(|text| Some(tokens(&store.read(&store.key(&[text.as_bytes()]))?)))
        .collect();
    let pairs = all.into_iter().zip(&known);
    let missing: Vec<&str> = pairs
        .filter(|(_, known)| known.is_none())
        .map(|(text, _)| text)
        .collect();
    let mut report = CaptionReport {
        found: texts.len() - missing.len(),
        longest: known.into_iter().flatten().max().unwrap_or(0),
        ..CaptionReport::default()
    };
    if missing.is_empty() {
        return Ok(report);
    }
    let encoder = files.load(device)?;
    for (index, text) in missing.iter().enumerate() {
        match encoder.encode(text) {
            Ok(encoded) => {
                let features = Features::from_tensor(&encoded.features)?;
                store.write(&store.key(&[text.as_bytes()]), &features)?;
                report.longest = report.longest.max(tokens(&features));
                report.cut += usize::from(encoded.dropped_tokens > 0);
            }
            Err(Error::NotFinite { .. }) => report.refuse(text, "its features are not finite"),
            // The tokenizer's word for a text that it does not take; everything else ends the work.
            Err(Error::File { reason, .. }) => report.refuse(text, &reason),
            Err(error) => return Err(error),
        }
        progress(index + 1, missing.len())?;
    }
    report.encoded = missing.len() - report.refused.len();
    Ok(report)
}

/// As [`encode_captions`], by each rank a share. Then every rank sees to it that all are there: those of ranks that do not share the
/// folder are not, and are encoded once more. `progress` is told of this rank's work alone.
///
/// # Errors
/// On all ranks, when it happens on one.
pub fn encode_captions_among(
    world: &World,
    store: &FeatureStore,
    files: &PromptFiles<'_>,
    device: &Device,
    texts: &BTreeSet<&str>,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<CaptionReport> {
    let own = texts.iter().copied().skip(world.rank()).step_by(world.size());
    let own = encode_captions(store, files, device, &own.collect(), progress);
    let own = world.together("captions", own)?;
    if world.is_solo() {
        return Ok(own);
    }
    let shares = world.share("encoded captions", (own.encoded, own.cut))?;
    let all = encode_captions(store, files, device, texts, progress);
    let all = world.together("all captions", all)?;
    let encoded = shares.iter().map(|share| share.0).sum();
    Ok(CaptionReport {
        found: (all.found + all.encoded).saturating_sub(encoded),
        encoded,
        cut: shares.iter().map(|share| share.1).sum(),
        ..all
    })
}

/// Tokens of a caption with features `[1, tokens, width]`.
fn tokens(features: &Features) -> usize {
    features.shape().get(1).copied().unwrap_or(0)
}

impl CaptionReport {
    fn refuse(&mut self, text: &str, reason: &str) {
        self.refused.push((text.into(), reason.into()));
    }
}
