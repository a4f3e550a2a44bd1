//! What the tokens of a batch are: how many, padded how far, at which positions.

use std::collections::VecDeque;

use super::TOKEN_MULTIPLE;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::rope::{Position, RopeAxes, caption_positions, image_positions};
use crate::model::zimage::DitConfig;
use crate::ops::tokens::concat_all;
use crate::tensor::Tensor;

/// The sequences of a batch of captions and images.
pub(super) struct Layout {
    /// Rows and columns of image tokens.
    pub grid: [usize; 2],
    /// Caption tokens, pads included.
    pub caption_tokens: usize,
    /// Image tokens, pads included.
    pub image_tokens: usize,
    /// Rotary tables of the caption tokens, of the image tokens, and of the whole sequence.
    pub caption_rope: Tensor,
    pub image_rope: Tensor,
    pub rope: Tensor,
    /// Real caption tokens per item.
    lengths: Vec<usize>,
    /// The same on the device, i32 `[batch]`.
    pub caption_lengths: Tensor,
    /// Caption tokens per item up to its own padding, i32 `[batch]`, where they differ.
    pub caption_key_lengths: Option<Tensor>,
    /// The same of the whole sequence.
    pub key_lengths: Option<Tensor>,
    /// Image tokens per item, i32 `[batch]`, when they have to be padded.
    pub image_lengths: Option<Tensor>,
}

impl Layout {
    /// The sequences for captions of these lengths and images of `height × width`.
    ///
    /// # Errors
    /// When the size is not a multiple of the patch, there is no caption or an empty one, or the device has no room.
    pub fn new(
        config: &DitConfig,
        device: &Device,
        lengths: &[usize],
        [height, width]: [usize; 2],
        tables: &mut RopeTables,
    ) -> Result<Self> {
        let patch = config.patch;
        if height == 0 || width == 0 || height % patch != 0 || width % patch != 0 {
            return Err(Error::invalid(format!(
                "an image of {width}x{height} cannot be cut into patches of {patch}"
            )));
        }
        let grid = [height / patch, width / patch];
        let tokens = grid[0] * grid[1];
        let image_tokens = tokens.next_multiple_of(TOKEN_MULTIPLE);
        let padded: Vec<usize> = lengths
            .iter()
            .map(|length| length.next_multiple_of(TOKEN_MULTIPLE))
            .collect();
        let longest = padded.iter().copied().max().unwrap_or(0);
        if lengths.contains(&0) || longest == 0 {
            return Err(Error::invalid("a caption has no tokens"));
        }
        let unequal = padded.iter().any(|&length| length != longest);
        let on_device = |lengths: &mut dyn Iterator<Item = usize>| {
            let lengths: Vec<i32> = lengths.map(|length| length as i32).collect();
            Tensor::from_slice(device, &lengths, [lengths.len()])
        };
        let key_lengths = |base: usize| {
            let mut lengths = padded.iter().map(|length| base + length);
            unequal.then(|| on_device(&mut lengths)).transpose()
        };
        // Equal items share one table.
        let items = if unequal { padded.as_slice() } else { &padded[..1] };
        let mut stack = |of: &dyn Fn(usize) -> ItemPositions| {
            let items: Vec<Tensor> = items.iter().map(|&own| tables.get(of(own))).collect::<Result<_>>()?;
            batch_of(&items)
        };
        let image = |own: usize| ItemPositions {
            caption: own,
            grid,
            image_tokens,
            caption_tokens: 0,
        };
        Ok(Layout {
            lengths: lengths.to_vec(),
            grid,
            caption_tokens: longest,
            image_tokens,
            caption_rope: stack(&|_| ItemPositions {
                caption: 0,
                grid: [0, 0],
                image_tokens: 0,
                caption_tokens: longest,
            })?,
            image_rope: stack(&image)?,
            rope: stack(&|own| ItemPositions {
                caption_tokens: longest,
                ..image(own)
            })?,
            caption_lengths: on_device(&mut lengths.iter().copied())?,
            caption_key_lengths: key_lengths(0)?,
            key_lengths: key_lengths(image_tokens)?,
            image_lengths: match image_tokens == tokens {
                true => None,
                false => Some(on_device(&mut lengths.iter().map(|_| tokens))?),
            },
        })
    }

    /// Refuses captions that have other numbers of tokens than those that this was made for.
    ///
    /// # Errors
    /// Naming the item.
    pub fn ensure_lengths(&self, captions: &[&Tensor]) -> Result<()> {
        let found: Vec<usize> = captions.iter().map(|caption| caption.dim(1)).collect();
        match found == self.lengths {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "captions of {found:?} tokens cannot take the place of captions of {:?}",
                self.lengths
            ))),
        }
    }

    /// The number of items.
    pub fn batch(&self) -> usize {
        self.caption_lengths.dim(0)
    }
}

/// Tables of one item each, `[1, tokens, pairs, 2]`, as one of all items; one alone serves any number.
fn batch_of(items: &[Tensor]) -> Result<Tensor> {
    let [first, ..] = items else {
        return Err(Error::invalid("a batch needs at least one item"));
    };
    if items.len() == 1 {
        return Ok(first.clone());
    }
    let (tokens, pairs) = (first.dim(1), first.dim(2));
    let rows: Vec<Tensor> = items
        .iter()
        .map(|item| item.reshape([1, tokens, 2 * pairs]))
        .collect::<Result<_>>()?;
    concat_all(&rows.iter().collect::<Vec<_>>())?.into_shape([items.len(), tokens, pairs, 2])
}

/// The positions of one item: of `image_tokens` image tokens, pads included, on a grid that follows `caption` caption tokens, and
/// after them of `caption_tokens` caption tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ItemPositions {
    caption: usize,
    grid: [usize; 2],
    image_tokens: usize,
    caption_tokens: usize,
}

impl ItemPositions {
    fn positions(&self) -> Vec<Position> {
        let image = image_positions(self.caption, self.grid, self.image_tokens);
        image.chain(caption_positions(self.caption_tokens)).collect()
    }
}

/// Rotary tables of single items, the latest ones kept: training meets the same few sequences over and over, and making a table
/// takes the host longer than a step can hide.
pub(super) struct RopeTables {
    axes: RopeAxes,
    device: Device,
    most_bytes: usize,
    /// The latest first.
    known: VecDeque<(ItemPositions, Tensor)>,
}

impl RopeTables {
    /// No tables yet; up to `most_bytes` of them are kept.
    pub fn new(config: &DitConfig, device: &Device, most_bytes: usize) -> Self {
        RopeTables {
            axes: RopeAxes {
                theta: config.rope_theta,
                dims: config.axes_dims,
                rounded: true,
            },
            device: device.clone(),
            most_bytes,
            known: VecDeque::new(),
        }
    }

    fn get(&mut self, sequence: ItemPositions) -> Result<Tensor> {
        if let Some(at) = self.known.iter().position(|(known, _)| *known == sequence) {
            let found = self.known.remove(at).expect("it was just found");
            self.known.push_front(found);
        } else {
            let table = self.axes.table(&self.device, &[sequence.positions()])?;
            self.known.push_front((sequence, table));
            let bytes =
                |known: &VecDeque<(ItemPositions, Tensor)>| known.iter().map(|(_, table)| table.bytes()).sum::<usize>();
            while self.known.len() > 1 && bytes(&self.known) > self.most_bytes {
                self.known.pop_back();
            }
        }
        Ok(self.known[0].1.clone())
    }
}
