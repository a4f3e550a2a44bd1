//! A model that is a formula, for walks that are compared with others' walks.

use crate::device::Device;
use crate::error::Result;
use crate::model::config::ModelKind;
use crate::model::denoiser::{Denoiser, Geometry, Modulations, Prepared};
use crate::ops::conv::Canvas;
use crate::ops::guidance::guided_euler_step;
use crate::tensor::Tensor;

/// Predicts `0.5 · x + 0.2 · time` for captions of one token, and `0.1 − 0.2 · x` for those of two.
pub(crate) struct Linear {
    /// Whether it adds to the picture itself.
    pub(crate) paints: bool,
}

impl Denoiser for Linear {
    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            kind: ModelKind::Pixel,
            patch: 1,
            channels: 1,
        }
    }

    fn prepare(&self, captions: &[&Tensor], _size: [usize; 2]) -> Result<Prepared> {
        Ok(Prepared::new(captions.len(), captions[0].dim(1), ()))
    }

    fn prepare_into(&self, _captions: &[&Tensor], _prepared: &mut Prepared) -> Result<()> {
        Ok(())
    }

    fn modulate(&self, times: &[f32], _pooled: Option<&Tensor>) -> Result<Modulations> {
        Ok(Modulations {
            table: Tensor::from_slice(&Device::Cpu, times, [times.len(), 1, 1])?,
        })
    }

    fn forward(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations) -> Result<Tensor> {
        let time = modulations.table.as_slice::<f32>()?[0];
        let predict = |x: &f32| match prepared.tokens() {
            1 => 0.5 * x + 0.2 * time,
            _ => 0.1 - 0.2 * x,
        };
        let predicted: Vec<f32> = image.as_slice::<f32>()?.iter().map(predict).collect();
        Tensor::from_slice(&Device::Cpu, &predicted, image.shape())
    }

    fn paints(&self) -> bool {
        self.paints
    }

    fn paint(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations, canvas: Canvas<'_>) -> Result<()> {
        let predicted = self.forward(image, prepared, modulations)?;
        let scaled: Vec<f32> = predicted
            .as_slice::<f32>()?
            .iter()
            .map(|value| value * canvas.scale)
            .collect();
        let scaled = Tensor::from_slice(&Device::Cpu, &scaled, image.shape())?;
        guided_euler_step(
            canvas.picture,
            &scaled,
            None,
            canvas.factors.expect("a step has factors"),
        )
    }
}
