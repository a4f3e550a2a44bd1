//! Plain loops in f64: the references that share nothing with the engine's own code.

use l2p_engine::{Result, Tensor};
use l2p_tests::{F32_TOLERANCE, Outcome, expect_close};

/// A tensor's values.
pub fn exact(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_vec_f32()?.into_iter().map(f64::from).collect())
}

/// Fails unless `found` holds `expected`, but for what sums in f32 lose.
pub fn expect_exact(what: &str, found: &Tensor, expected: &[f64]) -> Outcome {
    let expected: Vec<f32> = expected.iter().map(|&value| value as f32).collect();
    expect_close(what, &found.to_vec_f32()?, &expected, found.shape(), F32_TOLERANCE)
}

/// `x · weightᵀ`, `x` `[.., inputs]` and weight `[outputs, inputs]`.
pub fn product(x: &[f64], weight: &[f64], inputs: usize) -> Vec<f64> {
    let dot = |row: &[f64], output: &[f64]| row.iter().zip(output).map(|(a, b)| a * b).sum();
    let rows = x.chunks(inputs);
    rows.flat_map(|row| weight.chunks(inputs).map(move |output| dot(row, output)))
        .collect()
}

/// A convolution, in f64.
pub struct Loops {
    /// Rows and columns of the kernel.
    pub kernel: usize,
    /// Batch, height and width of the result.
    pub grid: [usize; 3],
    /// Channels of the result.
    pub outputs: usize,
    /// Height, width and channels of each source.
    pub sources: Vec<[usize; 3]>,
}

impl Loops {
    /// The sums `[batch, height, width, outputs]`, from the sources' values, the weight and the bias.
    pub fn sums(&self, [sources @ .., weight, bias]: &[Vec<f64>; 4]) -> Vec<f64> {
        let [batch, height, width] = self.grid;
        let inputs: usize = self.sources.iter().map(|[_, _, channels]| channels).sum();
        let margin = self.kernel / 2;
        let mut sums = Vec::with_capacity(batch * height * width * self.outputs);
        for (item, y, x) in pixels(self.grid) {
            for (output, &bias) in bias.iter().enumerate() {
                let mut sum = bias;
                for tap in 0..self.kernel * self.kernel {
                    let (y, x) = (y + tap / self.kernel, x + tap % self.kernel);
                    if y < margin || x < margin || y - margin >= height || x - margin >= width {
                        continue;
                    }
                    let mut factor = (output * self.kernel * self.kernel + tap) * inputs;
                    for (values, &[rows, columns, channels]) in sources.iter().zip(&self.sources) {
                        let (row, column) = ((y - margin) * rows / height, (x - margin) * columns / width);
                        let pixel = ((item * rows + row) * columns + column) * channels;
                        for channel in 0..channels {
                            sum += weight[factor] * values[pixel + channel];
                            factor += 1;
                        }
                    }
                }
                sums.push(sum);
            }
        }
        sums
    }
}

/// All pixels of a batch of images: item, row and column.
pub fn pixels([batch, height, width]: [usize; 3]) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..batch * height * width).map(move |index| (index / (height * width), index / width % height, index % width))
}

/// `x · sigmoid(x)`
pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// The maxima of the whole 2×2 windows.
pub fn maxima([batch, height, width]: [usize; 3], channels: usize, full: &[f64]) -> Vec<f64> {
    let mut pooled = Vec::new();
    for (item, y, x) in pixels([batch, height / 2, width / 2]) {
        for channel in 0..channels {
            let at = |dy, dx| full[((item * height + 2 * y + dy) * width + 2 * x + dx) * channels + channel];
            pooled.push(at(0, 0).max(at(0, 1)).max(at(1, 0)).max(at(1, 1)));
        }
    }
    pooled
}
