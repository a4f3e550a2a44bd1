//! Which Detailer Head a pixel model has, read off its tensors or chosen for a new model.

use serde::Serialize;

use crate::error::{Error, Result};
use crate::layers::ParamSource;
use crate::limits::Width;

/// Channels of an image.
const CHANNELS: usize = 3;

/// Encoder stages that may exist, from the image inwards.
const STAGES: [&str; 6] = ["0", "0b", "1", "2", "3", "4"];

/// Outer full-resolution stages, which keep the image's channels.
const OUTER_STAGES: [&str; 2] = ["_8k", "_10k_a"];

/// The published heads; smaller ones have the same stages with other widths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum HeadVariant {
    /// Patch 16.
    #[serde(rename = "1k")]
    OneK,
    /// Patch 64.
    #[serde(rename = "4k")]
    FourK,
    /// Patch 128.
    #[serde(rename = "8k")]
    EightK,
    /// Patch 160.
    #[serde(rename = "10k")]
    TenK,
}

impl HeadVariant {
    /// All of them.
    pub const ALL: [HeadVariant; 4] = [
        HeadVariant::OneK,
        HeadVariant::FourK,
        HeadVariant::EightK,
        HeadVariant::TenK,
    ];

    /// The head published for a patch size.
    pub fn for_patch(patch: usize) -> Option<Self> {
        Self::ALL.into_iter().find(|variant| variant.patch() == patch)
    }

    /// The patch size it was published for.
    pub fn patch(self) -> usize {
        match self {
            HeadVariant::OneK => 16,
            HeadVariant::FourK => 64,
            HeadVariant::EightK => 128,
            HeadVariant::TenK => 160,
        }
    }

    /// The name used in reports.
    pub fn name(self) -> &'static str {
        match self {
            HeadVariant::OneK => "1k",
            HeadVariant::FourK => "4k",
            HeadVariant::EightK => "8k",
            HeadVariant::TenK => "10k",
        }
    }

    fn outer(self) -> Option<&'static str> {
        match self {
            HeadVariant::OneK | HeadVariant::FourK => None,
            HeadVariant::EightK => Some("_8k"),
            HeadVariant::TenK => Some("_10k_a"),
        }
    }

    fn stages(self) -> &'static [&'static str] {
        match self {
            HeadVariant::OneK => &STAGES[2..],
            HeadVariant::FourK | HeadVariant::EightK => &STAGES,
            HeadVariant::TenK => &STAGES[..5],
        }
    }

    /// The published widths of the stages, the outer one left out, and of the bottleneck.
    pub fn published_widths(self) -> (Vec<usize>, usize) {
        let innermost_first = [512, 256, 128, 64, 32, 16];
        let widths = &innermost_first[if self == HeadVariant::TenK {
            1..6
        } else {
            0..self.stages().len()
        }];
        (widths.iter().rev().copied().collect(), 512)
    }
}

/// One encoder stage with its decoder counterpart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HeadStage {
    /// As in the tensors' names: `1` for `enc1`, `up1` and `dec1`.
    pub name: String,
    /// Channels of the encoder's feature map, which the decoder gets as skip.
    pub width: usize,
}

/// The structure of a Detailer Head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HeadLayout {
    /// The published head with the same stages, if there is one.
    pub variant: Option<HeadVariant>,
    /// The full-resolution stage of the 8K and 10K heads.
    pub outer: Option<String>,
    /// The other stages, from the image inwards.
    pub stages: Vec<HeadStage>,
    /// Channels of the bottleneck.
    pub bottleneck: usize,
    /// Channels of the transformer's feature map, which joins at the bottleneck.
    pub context: usize,
}

impl HeadLayout {
    /// The head that `patch` was published with, with other widths if given.
    ///
    /// # Errors
    /// When no head was published for the patch size, or the number of widths is wrong.
    pub fn for_patch(patch: usize, widths: Option<&[usize]>, bottleneck: Option<usize>, dim: usize) -> Result<Self> {
        let variant = HeadVariant::for_patch(patch)
            .ok_or_else(|| Error::invalid(format!("no head is known for patch {patch}; use 16, 64, 128 or 160")))?;
        let (published, published_bottleneck) = variant.published_widths();
        // The published widths for the published trunk; a smaller trunk gets a head half as wide.
        let scale = if dim >= 3840 { 1 } else { 2 };
        let default: Vec<usize> = published.iter().map(|width| width / scale).collect();
        let widths = widths.unwrap_or(&default);
        let stages = variant.stages();
        if widths.len() != stages.len() || widths.contains(&0) {
            return Err(Error::invalid(format!(
                "head widths {widths:?} do not fit the {} head, which has {} stages, for example {default:?}",
                variant.name(),
                stages.len()
            )));
        }
        let all = widths.iter().copied().chain(bottleneck);
        if let Some(reason) = all
            .filter(|width| *width > 0)
            .find_map(|width| Width::checked(width as u64).err())
        {
            return Err(Error::invalid(format!("head widths: {reason}")));
        }
        let innermost = widths[widths.len() - 1];
        let ratio = published_bottleneck / published[published.len() - 1];
        Ok(HeadLayout {
            variant: Some(variant),
            outer: variant.outer().map(Into::into),
            stages: stages
                .iter()
                .zip(widths)
                .map(|(name, width)| HeadStage {
                    name: (*name).into(),
                    width: *width,
                })
                .collect(),
            bottleneck: bottleneck.filter(|width| *width > 0).unwrap_or(ratio * innermost),
            context: dim,
        })
    }

    /// Reads the head off its tensors; `None` where there is none.
    pub fn read(params: &dyn ParamSource, dim: usize) -> Option<Self> {
        let outputs = |name: &str| params.shape(&format!("local_decoder.{name}"))?.first().copied();
        // Any of a stage's tensors shows that it should be there.
        let width = |stage: &str| {
            let names = [
                format!("enc{stage}.0.weight"),
                format!("enc{stage}.0.bias"),
                format!("up{stage}.1.weight"),
            ];
            names.iter().find_map(|name| outputs(name))
        };
        let stages: Vec<_> = STAGES
            .iter()
            .filter_map(|name| {
                width(name).map(|width| HeadStage {
                    name: (*name).into(),
                    width,
                })
            })
            .collect();
        let outer = OUTER_STAGES.into_iter().find(|stage| width(stage).is_some());
        let names: Vec<&str> = stages.iter().map(|stage| stage.name.as_str()).collect();
        let same = |variant: &HeadVariant| variant.stages() == names && variant.outer() == outer;
        Some(HeadLayout {
            variant: HeadVariant::ALL.into_iter().find(same),
            bottleneck: outputs("bottleneck.0.weight").or_else(|| outputs("bottleneck.0.bias"))?,
            outer: outer.map(Into::into),
            context: dim,
            stages: (!stages.is_empty()).then_some(stages)?,
        })
    }

    /// Refuses widths beyond all heads, of which a file's tensors can tell without having a single element.
    ///
    /// # Errors
    /// Naming the width.
    pub fn check(&self) -> Result<()> {
        let stages = self.stages.iter().map(|stage| (stage.name.as_str(), stage.width));
        for (name, width) in stages.chain([("of the bottleneck", self.bottleneck)]) {
            Width::checked(width as u64).map_err(|reason| {
                Error::invalid(format!("its head's stage {name} has a width of {width}: {reason}"))
            })?;
        }
        Ok(())
    }

    /// Names and shapes of its tensors.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = Vec::new();
        let mut conv = |name: String, outputs: usize, inputs: usize, side: usize| {
            tensors.push((weight(&name), vec![outputs, inputs, side, side]));
            tensors.push((format!("local_decoder.{name}.bias"), vec![outputs]));
        };
        if let Some(outer) = &self.outer {
            conv(format!("enc{outer}.0"), CHANNELS, CHANNELS, 3);
        }
        let mut inputs = CHANNELS;
        for stage in &self.stages {
            conv(format!("enc{}.0", stage.name), stage.width, inputs, 3);
            inputs = stage.width;
        }
        conv("bottleneck.0".into(), self.bottleneck, inputs + self.context, 1);
        let mut current = self.bottleneck;
        for (index, stage) in self.stages.iter().enumerate().rev() {
            let narrower = self.stages[index.saturating_sub(1)].width;
            conv(format!("up{}.1", stage.name), stage.width, current, 3);
            conv(format!("dec{}.0", stage.name), narrower, 2 * stage.width, 3);
            current = narrower;
        }
        if let Some(outer) = &self.outer {
            conv(format!("up{outer}.1"), current, current, 3);
            conv(format!("dec{outer}.0"), current, current + CHANNELS, 3);
        }
        conv("out_conv".into(), CHANNELS, current, 1);
        tensors
    }

    /// Image pixels along a side of one pixel of the bottleneck.
    pub fn downsampling(&self) -> usize {
        1 << (self.stages.len() + usize::from(self.outer.is_some()))
    }

    /// Widths of all stages from the image inwards, the outer one included.
    pub fn widths(&self) -> Vec<usize> {
        let outer = self.outer.iter().map(|_| CHANNELS);
        outer.chain(self.stages.iter().map(|stage| stage.width)).collect()
    }
}

fn weight(name: &str) -> String {
    format!("local_decoder.{name}.weight")
}
