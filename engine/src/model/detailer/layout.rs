//! Which stages a head has and how wide they are: read off its parameters, or chosen for a new model; and its description.

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::{Detailer, Stage};
use crate::error::{Error, Result};
use crate::layers::{ConvLayer, Described, Group, ParamSource, metas};
use crate::limits::Width;
use crate::model::limits::{DeviceLimits, vectors};
use crate::ops::conv::Input;

/// Channels of the image.
const IMAGE_CHANNELS: usize = 3;

/// Encoder stages that a published head may have, from the image inwards, as they are named in checkpoints.
const STAGES: &[&str] = &["0", "0b", "1", "2", "3", "4"];

/// Full-resolution stages before these, which keep the image's channels.
const FULL_STAGES: [&str; 2] = ["_8k", "_10k_a"];

/// The published widths of these stages; a head of fewer has the first or the last of them.
const WIDTHS: &[usize] = &[16, 32, 64, 128, 256, 512];

/// One stage's place and channels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageLayout {
    /// What follows `enc`, `up` and `dec` in its parameters' names.
    pub name: String,
    /// Channels that the encoder reads.
    pub inputs: usize,
    /// Channels of the encoder's result, which is the skip.
    pub skip: usize,
    /// Channels that the decoder reads from below.
    pub below: usize,
    /// Channels after upsampling.
    pub upsampled: usize,
    /// Channels of the decoder's result.
    pub outputs: usize,
}

/// The stages and channels of a head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DetailerLayout {
    /// From the image inwards.
    pub stages: Vec<StageLayout>,
    /// Channels of the feature map.
    pub context: usize,
    /// Channels after the bottleneck.
    pub bottleneck: usize,
}

impl DetailerLayout {
    /// The head whose parameters are named `{prefix}.…`, as [`DetailerLayout::seen`], with the context that its bottleneck reads.
    ///
    /// # Errors
    /// When there is none.
    pub fn read(params: &dyn ParamSource, prefix: &str) -> Result<Self> {
        let mut head = Self::seen(params, prefix, 0).ok_or_else(|| {
            Error::invalid(format!(
                "there is no detailer head `{prefix}`: it has no stage `{prefix}.enc1.0.weight` or no `{prefix}.bottleneck.0.weight`"
            ))
        })?;
        let name = format!("{prefix}.bottleneck.0.weight");
        let reads = params.shape(&name).and_then(|shape| shape.get(1).copied()).unwrap_or(0);
        let above = head.stages.last().map_or(0, |stage| stage.skip);
        head.context = reads.checked_sub(above).filter(|&context| context > 0).ok_or_else(|| {
            Error::invalid(format!(
                "`{name}` reads {reads} channels, but the last encoder stage alone gives {above}"
            ))
        })?;
        Ok(head)
    }

    /// The head that `patch` was published with, with other widths if given, over a feature map of `dim` channels.
    ///
    /// # Errors
    /// When no head was published for the patch size, or the number of widths is wrong.
    pub fn for_patch(patch: usize, widths: Option<&[usize]>, bottleneck: Option<usize>, dim: usize) -> Result<Self> {
        let variant = HeadVariant::ALL
            .into_iter()
            .find(|variant| variant.patch == patch)
            .ok_or_else(|| Error::invalid(format!("no head is known for patch {patch}; use 16, 64, 128 or 160")))?;
        // The published widths for trunks of published sizes; a smaller trunk gets a head half as wide.
        let scale = if dim >= 3072 { 1 } else { 2 };
        let default: Vec<usize> = variant.widths.iter().map(|width| width / scale).collect();
        let widths = widths.unwrap_or(&default);
        let stages = variant.stages;
        if widths.len() != stages.len() || widths.contains(&0) {
            return Err(Error::invalid(format!(
                "head widths {widths:?} do not fit the {} head, which has {} stages, for example {default:?}",
                variant.name,
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
        let ratio = HeadVariant::BOTTLENECK / variant.widths[variant.widths.len() - 1];
        let bottleneck = bottleneck.filter(|width| *width > 0).unwrap_or(ratio * innermost);
        let names = variant.outer.into_iter().chain(stages.iter().copied());
        let widths = variant
            .outer
            .map(|_| IMAGE_CHANNELS)
            .into_iter()
            .chain(widths.iter().copied());
        Ok(Self::of_widths(names.zip(widths), bottleneck, dim))
    }

    /// The head of the published structure whose encoder stages, from the image inwards, have these names and widths: each stage's
    /// decoder gives what the stage before it takes.
    fn of_widths<'a>(stages: impl IntoIterator<Item = (&'a str, usize)>, bottleneck: usize, context: usize) -> Self {
        let mut inputs = IMAGE_CHANNELS;
        let mut stages: Vec<StageLayout> = stages
            .into_iter()
            .map(|(name, skip)| {
                let stage = StageLayout {
                    name: name.into(),
                    inputs,
                    skip,
                    below: 0,
                    upsampled: skip,
                    outputs: inputs,
                };
                inputs = skip;
                stage
            })
            .collect();
        let mut below = bottleneck;
        let outer = stages
            .first()
            .is_some_and(|stage| FULL_STAGES.contains(&stage.name.as_str()));
        for index in (0..stages.len()).rev() {
            let stage = &mut stages[index];
            stage.below = below;
            // The outermost stage gives what its decoder makes, and one that keeps the image's channels what it gets.
            if outer && index == 0 {
                (stage.upsampled, stage.outputs) = (below, below);
            } else if index == usize::from(outer) {
                stage.outputs = stage.skip;
            }
            below = stage.outputs;
        }
        DetailerLayout {
            stages,
            context,
            bottleneck,
        }
    }

    /// The head of which there are parameters named `{prefix}.…`, as far as they tell: every width is told by several, so that one
    /// that is missing or has a wrong shape can be named by a comparison with [`DetailerLayout::describe`]. `None` where no stage or
    /// no bottleneck is to be seen.
    pub fn seen(params: &dyn ParamSource, prefix: &str, context: usize) -> Option<Self> {
        let outputs = |name: &str| params.shape(&format!("{prefix}.{name}"))?.first().copied();
        // Any of a stage's tensors shows that it should be there.
        let width = |stage: &str| {
            let names = [
                format!("enc{stage}.0.weight"),
                format!("enc{stage}.0.bias"),
                format!("up{stage}.1.weight"),
            ];
            names.iter().find_map(|name| outputs(name))
        };
        let outer = FULL_STAGES.into_iter().find(|stage| width(stage).is_some());
        let outer = outer.map(|stage| (stage, IMAGE_CHANNELS));
        let inner: Vec<_> = STAGES.iter().filter_map(|name| Some((*name, width(name)?))).collect();
        let bottleneck = outputs("bottleneck.0.weight").or_else(|| outputs("bottleneck.0.bias"))?;
        (!inner.is_empty()).then(|| Self::of_widths(outer.into_iter().chain(inner), bottleneck, context))
    }

    /// Refuses widths beyond all heads, of which a file's tensors can tell without having a single element.
    ///
    /// # Errors
    /// Naming the width.
    pub fn check(&self) -> Result<()> {
        let stages = self.stages.iter().map(|stage| (stage.name.as_str(), stage.skip));
        for (name, width) in stages.chain([("of the bottleneck", self.bottleneck)]) {
            Width::checked(width as u64).map_err(|reason| {
                Error::invalid(format!("its head's stage {name} has a width of {width}: {reason}"))
            })?;
        }
        Ok(())
    }

    /// The published head with the same stages, if there is one.
    pub fn variant(&self) -> Option<HeadVariant> {
        let names: Vec<&str> = self.stages.iter().map(|stage| stage.name.as_str()).collect();
        let same = |variant: &HeadVariant| variant.outer.iter().chain(variant.stages).eq(names.iter());
        HeadVariant::ALL.into_iter().find(same)
    }

    /// Widths of all stages from the image inwards.
    pub fn widths(&self) -> Vec<usize> {
        self.stages.iter().map(|stage| stage.skip).collect()
    }

    /// Name and shape of every tensor of the head whose parameters are named `{prefix}.…`.
    pub fn tensors(&self, prefix: &str) -> Vec<(String, Vec<usize>)> {
        let described = self.describe(prefix);
        let parts = metas(&described).into_iter().flat_map(|meta| &meta.parts);
        parts.map(|part| (part.name.clone(), part.shape.clone())).collect()
    }

    /// Image pixels per pixel of the bottleneck, along each axis.
    pub fn reduction(&self) -> usize {
        1 << self.stages.len()
    }

    /// The head whose parameters are named `{prefix}.…`.
    pub fn describe(&self, prefix: &str) -> Detailer<Described> {
        let conv = |name: &str, kernel: usize, channels: &[usize], outputs: usize, arranged: Option<Input>| {
            ConvLayer::new(
                Group::Output,
                &format!("{prefix}.{name}"),
                kernel,
                channels,
                outputs,
                arranged,
            )
        };
        let (same, upsampled) = (Some(Input::Same), Some(Input::Upsampled));
        let stages = self.stages.iter().map(|stage| {
            let name = &stage.name;
            let joined = [stage.upsampled, stage.skip];
            Stage {
                encoder: conv(&format!("enc{name}.0"), 3, &[stage.inputs], stage.skip, same),
                up: conv(&format!("up{name}.1"), 3, &[stage.below], stage.upsampled, upsampled),
                decoder: conv(&format!("dec{name}.0"), 3, &joined, stage.outputs, same),
            }
        });
        let deepest = self.stages.last().map_or(IMAGE_CHANNELS, |stage| stage.skip);
        let last = self.stages.first().map_or(self.bottleneck, |stage| stage.outputs);
        Detailer {
            stages: stages.collect(),
            bottleneck: conv("bottleneck.0", 1, &[deepest, self.context], self.bottleneck, same),
            output: conv("out_conv", 1, &[last], IMAGE_CHANNELS, None),
            layout: self.clone(),
            outermost: None,
        }
    }
}

/// As reports show it: the stage that keeps the image's channels by itself, of the others the encoder's widths.
impl Serialize for DetailerLayout {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Stage<'a> {
            name: &'a str,
            width: usize,
        }
        let is_outer = |stage: &&StageLayout| FULL_STAGES.contains(&stage.name.as_str());
        let inner = self.stages.iter().filter(|stage| !is_outer(stage)).map(|stage| Stage {
            name: &stage.name,
            width: stage.skip,
        });
        let mut shown = serializer.serialize_struct("DetailerLayout", 5)?;
        shown.serialize_field("variant", &self.variant().map(|variant| variant.name))?;
        shown.serialize_field("outer", &self.stages.iter().find(is_outer).map(|stage| &stage.name))?;
        shown.serialize_field("stages", &inner.collect::<Vec<_>>())?;
        shown.serialize_field("bottleneck", &self.bottleneck)?;
        shown.serialize_field("context", &self.context)?;
        shown.end()
    }
}

/// A published head; smaller ones have the same stages with other widths.
#[derive(Debug, PartialEq, Eq)]
pub struct HeadVariant {
    /// The patch size it was published for.
    pub patch: usize,
    /// The name used in reports.
    pub name: &'static str,
    /// Its full-resolution stage.
    outer: Option<&'static str>,
    /// Its other stages from the image inwards, and their widths.
    stages: &'static [&'static str],
    widths: &'static [usize],
}

impl HeadVariant {
    /// Width of every bottleneck.
    const BOTTLENECK: usize = 512;

    /// All of them.
    pub const ALL: [HeadVariant; 4] = [
        Self::new(16, "1k", None, STAGES.split_at(2).1, WIDTHS.split_at(2).1),
        Self::new(64, "4k", None, STAGES, WIDTHS),
        Self::new(128, "8k", Some(FULL_STAGES[0]), STAGES, WIDTHS),
        Self::new(
            160,
            "10k",
            Some(FULL_STAGES[1]),
            STAGES.split_at(5).0,
            WIDTHS.split_at(5).0,
        ),
    ];

    const fn new(
        patch: usize,
        name: &'static str,
        outer: Option<&'static str>,
        stages: &'static [&'static str],
        widths: &'static [usize],
    ) -> Self {
        HeadVariant {
            patch,
            name,
            outer,
            stages,
            widths,
        }
    }
}

impl DeviceLimits for DetailerLayout {
    const PART: &'static str = "detailer head";

    fn cuda_obstacle(&self) -> Option<String> {
        let mut widths = vec![("bottleneck", self.bottleneck), ("feature map", self.context)];
        for (index, stage) in self.stages.iter().enumerate() {
            // An encoder that keeps the image's channels hands them on as an image.
            if index > 0 || stage.skip != stage.inputs {
                widths.push(("encoder width", stage.skip));
            }
            widths.extend([("upsampled width", stage.upsampled), ("decoder width", stage.outputs)]);
        }
        vectors(&widths)
    }
}
