//! Extents of tensors.

use std::fmt;

/// A tensor's extents, outermost first; at most [`Shape::MAX_RANK`] of them. Dereferences to a slice.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; Shape::MAX_RANK],
    rank: usize,
}

impl Shape {
    /// The largest number of extents.
    pub const MAX_RANK: usize = 5;

    /// The shape with the given extents.
    ///
    /// # Panics
    /// With more than [`Shape::MAX_RANK`] extents; shapes read from files are checked before.
    pub fn new(extents: &[usize]) -> Self {
        assert!(extents.len() <= Self::MAX_RANK, "a shape of {} extents", extents.len());
        let mut dims = [0; Self::MAX_RANK];
        dims[..extents.len()].copy_from_slice(extents);
        Shape {
            dims,
            rank: extents.len(),
        }
    }

    /// The number of elements; `usize::MAX` where there are more, which no tensor has.
    pub fn elements(&self) -> usize {
        product(self)
    }

    /// Bytes of so many elements of `size` bytes each; `None` where no buffer can hold them. Extents of 0 do not excuse the others,
    /// so that every product of some of the extents of a tensor's shape can be computed.
    pub fn checked_bytes(&self, size: usize) -> Option<usize> {
        let whole = self
            .iter()
            .try_fold(size, |bytes, &extent| bytes.checked_mul(extent.max(1)));
        whole.filter(|bytes| isize::try_from(*bytes).is_ok())?;
        Some(self.elements() * size)
    }

    /// The innermost extent, 1 for a scalar.
    pub fn last(&self) -> usize {
        self.as_ref().last().copied().unwrap_or(1)
    }

    /// The product of all extents but the innermost.
    pub fn rows(&self) -> usize {
        product(&self[..self.rank.saturating_sub(1)])
    }
}

fn product(extents: &[usize]) -> usize {
    extents
        .iter()
        .fold(1, |product: usize, extent| product.saturating_mul(*extent))
}

impl std::ops::Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.dims[..self.rank]
    }
}

impl AsRef<[usize]> for Shape {
    fn as_ref(&self) -> &[usize] {
        self
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(extents: [usize; N]) -> Self {
        Shape::new(&extents)
    }
}

impl From<&[usize]> for Shape {
    fn from(extents: &[usize]) -> Self {
        Shape::new(extents)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let extents: Vec<String> = self.iter().map(ToString::to_string).collect();
        write!(f, "[{}]", extents.join(", "))
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
