//! What a configuration must not say.

use super::TrainConfig;
use crate::data::PictureSize;
use crate::error::{Error, Result};
use crate::limits::Side;

/// The largest shift of noise levels that is no slip: with it the last of a thousand levels is still half noise.
const LARGEST_SHIFT: f64 = 1000.0;

impl TrainConfig {
    /// Refuses values that make no sense, alone or together.
    pub(super) fn check(&self) -> Result<()> {
        let refuse = |reason: String| Err(Error::invalid(reason));
        let sizings = [self.max_pixels.is_some(), self.size.is_some(), !self.buckets.is_empty()];
        if sizings.iter().filter(|given| **given).count() > 1 {
            return refuse("max_pixels, size and buckets exclude each other: give one of them".into());
        }
        if self.validation.is_some() && self.held_out > 0 {
            return refuse("validation and held_out exclude each other: give one of them".into());
        }
        if self.sample_every > 0 && self.sample_prompts.is_empty() {
            return refuse("sample_every asks for samples, but sample_prompts names none".into());
        }
        let mut sizes = self.size.iter().chain(&self.buckets);
        let too_long = |size: &&PictureSize| Side::checked(size.width).is_err() || Side::checked(size.height).is_err();
        if let Some(size) = sizes.find(too_long) {
            let most = Side::checked(size.width.max(size.height)).err().unwrap_or_default();
            return refuse(format!("a size of {size}: {most}"));
        }
        let shares = [
            ("caption_dropout", self.caption_dropout, 1.0),
            ("max_damaged", self.max_damaged, 1.0),
            ("beta1", f64::from(self.beta1), 0.999_999_9),
            ("beta2", f64::from(self.beta2), 0.999_999_9),
            ("ema", f64::from(self.ema.unwrap_or(0.5)), 0.999_999_9),
        ];
        if let Some((name, value, most)) = shares
            .into_iter()
            .find(|(_, value, most)| !(0.0..=*most).contains(value))
        {
            return refuse(format!(
                "{name} = {value}: must be from 0 to {}",
                if most < 1.0 { "just below 1" } else { "1" }
            ));
        }
        let most = f64::from(f32::MAX);
        let positive = [
            ("lr", self.lr, most),
            ("epsilon", f64::from(self.epsilon), most),
            ("shift", self.shift, LARGEST_SHIFT),
            ("clip_norm", f64::from(self.clip_norm.unwrap_or(1.0)), most),
            ("max_minutes", self.max_minutes.unwrap_or(1.0), most),
        ];
        if let Some((name, value, most)) = positive
            .into_iter()
            .find(|(_, value, most)| !(*value > 0.0 && value <= most))
        {
            return refuse(format!(
                "{name} = {value}: must be a positive number, at most {most:.1e}"
            ));
        }
        let others = [
            ("lr_end", self.lr_end, 0.0),
            ("weight_decay", f64::from(self.weight_decay), 0.0),
            ("spike_factor", self.spike_factor, 1.0),
            ("host_cache_gb", self.host_cache_gb.unwrap_or(0.0), 0.0),
            ("sample_cfg", f64::from(self.sample_cfg.unwrap_or(1.0)), 0.0),
        ];
        match others
            .into_iter()
            .find(|(_, value, least)| !(value >= least && *value <= most))
        {
            Some((name, value, least)) => refuse(format!(
                "{name} = {value}: must be at least {least}, at most {most:.1e}"
            )),
            None => Ok(()),
        }
    }
}
