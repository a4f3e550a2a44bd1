//! The arguments of a launch, and whether they are those of the kernel.

use std::ffi::c_void;
use std::fmt;

use super::tensor_map::TensorMap;
use crate::error::{Error, Result};

/// What an image says of one parameter of a kernel, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parameter {
    /// From the start of the parameters.
    pub offset: usize,
    /// Its size.
    pub bytes: usize,
}

/// The arguments of one launch, in the order of the kernel's parameters.
#[derive(Default)]
pub struct Args {
    slots: Vec<Slot>,
    layout: u64,
}

enum Slot {
    Word(Kind, u64),
    Map(Box<TensorMap>),
}

/// What an argument is to the kernel.
#[derive(Clone, Copy)]
enum Kind {
    Address,
    Int,
    Unsigned,
    Float,
    Long,
    Map,
}

impl Kind {
    fn bytes(self) -> usize {
        match self {
            Kind::Int | Kind::Unsigned | Kind::Float => 4,
            Kind::Address | Kind::Long => 8,
            Kind::Map => 128,
        }
    }

    /// Of a word its size; a map is as aligned as it is large (`TensorMap` in `cuda/common/tma.cuh`).
    fn alignment(self) -> usize {
        self.bytes()
    }

    /// Two bits that stand for the size; never 0, so that a layout tells how many arguments there are.
    fn code(self) -> u64 {
        match self.bytes() {
            4 => 1,
            8 => 2,
            _ => 3,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Address => "an address",
            Kind::Int => "an int",
            Kind::Unsigned => "an unsigned",
            Kind::Float => "a float",
            Kind::Long => "a long",
            Kind::Map => "a tensor map",
        })
    }
}

impl Args {
    /// No arguments have this layout, nor do those of which there are too many for one.
    pub(super) const NO_LAYOUT: u64 = u64::MAX;

    /// The most arguments that a layout can describe.
    const MOST_OF_A_LAYOUT: usize = 31;

    /// No arguments yet.
    pub fn new() -> Self {
        Args {
            slots: Vec::with_capacity(24),
            layout: 0,
        }
    }

    /// An address in the GPU's memory, 0 for none.
    pub(crate) fn address(self, address: u64) -> Self {
        self.word(Kind::Address, address)
    }

    /// An `int` parameter.
    ///
    /// # Panics
    /// When the value does not fit; operations check their sizes before.
    pub fn int(self, value: usize) -> Self {
        let value = i32::try_from(value).expect("operations check that sizes fit 32 bits");
        self.word(Kind::Int, u64::from(value as u32))
    }

    /// A `long long` or `size_t` parameter.
    pub fn long(self, value: u64) -> Self {
        self.word(Kind::Long, value)
    }

    /// An `unsigned` parameter.
    pub fn unsigned(self, value: u32) -> Self {
        self.word(Kind::Unsigned, u64::from(value))
    }

    /// A `float` parameter.
    pub fn float(self, value: f32) -> Self {
        self.word(Kind::Float, u64::from(value.to_bits()))
    }

    /// A `const __grid_constant__ TensorMap` parameter.
    pub fn tensor_map(mut self, map: TensorMap) -> Self {
        self.push(Slot::Map(Box::new(map)));
        self
    }

    fn word(mut self, kind: Kind, value: u64) -> Self {
        self.push(Slot::Word(kind, value));
        self
    }

    fn push(&mut self, slot: Slot) {
        self.layout = match self.slots.len() < Self::MOST_OF_A_LAYOUT {
            true => self.layout << 2 | slot.kind().code(),
            false => Self::NO_LAYOUT,
        };
        self.slots.push(slot);
    }

    /// The sizes of all arguments in one number, which differs where one of them does.
    pub(super) fn layout(&self) -> u64 {
        self.layout
    }

    /// Compares the arguments with a kernel's parameters; see [`Kernel::check`](super::Kernel::check). A parameter begins where the
    /// one before it ends, but for what its alignment takes. Of a map that is not known: the parameters' own start, from which
    /// offsets count, is less aligned than a map is.
    pub(super) fn ensure_parameters(&self, kernel: &str, parameters: &[Parameter]) -> Result<()> {
        let mut end = 0;
        for (index, kind) in self.slots.iter().map(Slot::kind).enumerate() {
            let difference = match parameters.get(index) {
                Some(&Parameter { offset, bytes }) if bytes == kind.bytes() => {
                    let latest = match kind {
                        Kind::Map => end + kind.alignment() - 1,
                        _ => usize::next_multiple_of(end, kind.alignment()),
                    };
                    let first = if matches!(kind, Kind::Map) { end } else { latest };
                    end = offset + bytes;
                    if (first..=latest).contains(&offset) {
                        continue;
                    }
                    format!("begins at offset {first}, but the image's parameter begins at {offset}")
                }
                Some(Parameter { offset, bytes }) => {
                    let size = kind.bytes();
                    format!("has {size} bytes, but the image's parameter has {bytes}, from offset {offset} on")
                }
                None => format!("is one too many: the image's kernel takes {}", count(parameters.len())),
            };
            let number = index + 1;
            return Err(Error::invalid(format!(
                "kernel {kernel}: argument {number}, {kind}, {difference}"
            )));
        }
        match parameters.len() > self.slots.len() {
            false => Ok(()),
            true => Err(Error::invalid(format!(
                "kernel {kernel}: argument {} is missing: the image's kernel takes {}",
                self.slots.len() + 1,
                count(parameters.len())
            ))),
        }
    }

    /// Little-endian words: the address of a word is also that of its low 32 bits.
    pub(super) fn pointers(&mut self) -> Vec<*mut c_void> {
        self.slots
            .iter_mut()
            .map(|slot| match slot {
                Slot::Word(_, word) => std::ptr::from_mut(word).cast(),
                Slot::Map(map) => map.as_argument(),
            })
            .collect()
    }
}

impl Slot {
    fn kind(&self) -> Kind {
        match self {
            Slot::Word(kind, _) => *kind,
            Slot::Map(_) => Kind::Map,
        }
    }
}

fn count(parameters: usize) -> String {
    match parameters {
        1 => "1 argument".into(),
        _ => format!("{parameters} arguments"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Args {
        /// Arguments of which only the kinds matter.
        fn of(kinds: &[Kind]) -> Self {
            kinds.iter().fold(Args::new(), |args, kind| match kind {
                Kind::Map => args.tensor_map(TensorMap::empty()),
                kind => args.word(*kind, 0),
            })
        }
    }

    fn parameters(places: &[(usize, usize)]) -> Vec<Parameter> {
        places
            .iter()
            .map(|&(offset, bytes)| Parameter { offset, bytes })
            .collect()
    }

    /// As the compiler places `(const bf16*, int, int, float, size_t)`: the long starts at a multiple of eight.
    fn five() -> (Args, Vec<Parameter>) {
        let args = Args::new().word(Kind::Address, 0).int(1).int(2).float(3.0).long(4);
        (args, parameters(&[(0, 8), (8, 4), (12, 4), (16, 4), (24, 8)]))
    }

    #[test]
    fn arguments_that_are_the_kernels_pass() {
        let (args, image) = five();
        args.ensure_parameters("k", &image).unwrap();
        Args::new().ensure_parameters("k", &[]).unwrap();
    }

    /// Offsets as the assembler gives them on Hopper, where parameters start 112 bytes before a multiple of 128.
    #[test]
    fn maps_stand_at_multiples_of_their_size_wherever_parameters_start() {
        let two = Args::of(&[Kind::Map, Kind::Map, Kind::Address, Kind::Int]);
        two.ensure_parameters("k", &parameters(&[(112, 128), (240, 128), (368, 8), (376, 4)]))
            .unwrap();
        let behind = Args::of(&[Kind::Address, Kind::Map, Kind::Float]);
        behind
            .ensure_parameters("k", &parameters(&[(0, 8), (112, 128), (240, 4)]))
            .unwrap();
        behind
            .ensure_parameters("k", &parameters(&[(0, 8), (128, 128), (256, 4)]))
            .unwrap();
        let message = behind
            .ensure_parameters("k", &parameters(&[(0, 8), (240, 128), (368, 4)]))
            .unwrap_err();
        assert_eq!(
            message.to_string(),
            "kernel k: argument 2, a tensor map, begins at offset 8, but the image's parameter begins at 240"
        );
    }

    #[test]
    fn what_differs_is_named() {
        let (args, image) = five();
        let message = |image: &[Parameter]| args.ensure_parameters("k", image).unwrap_err().to_string();
        assert_eq!(
            message(&parameters(&[(0, 8), (8, 4), (16, 8), (24, 4), (32, 8)])),
            "kernel k: argument 3, an int, has 4 bytes, but the image's parameter has 8, from offset 16 on"
        );
        assert_eq!(
            message(&parameters(&[(0, 8), (8, 4), (16, 4), (20, 4), (24, 8)])),
            "kernel k: argument 3, an int, begins at offset 12, but the image's parameter begins at 16"
        );
        assert_eq!(
            message(&image[..4]),
            "kernel k: argument 5, a long, is one too many: the image's kernel takes 4 arguments"
        );
        let longer: Vec<Parameter> = image.iter().copied().chain(parameters(&[(32, 4)])).collect();
        assert_eq!(
            message(&longer),
            "kernel k: argument 6 is missing: the image's kernel takes 6 arguments"
        );
    }

    #[test]
    fn layouts_differ_where_sizes_or_numbers_do() {
        let layouts = [
            Args::new(),
            Args::new().int(1),
            Args::new().long(1),
            Args::new().int(1).int(1),
            Args::new().int(1).long(1),
            Args::new().long(1).int(1),
        ]
        .map(|args| args.layout());
        for (index, layout) in layouts.iter().enumerate() {
            assert!(!layouts[..index].contains(layout), "{index}");
            assert_ne!(*layout, Args::NO_LAYOUT);
        }
        // Values and kinds of one size do not matter.
        assert_eq!(Args::new().int(7).layout(), Args::new().float(1.0).layout());
        let many = (0..40).fold(Args::new(), |args, _| args.int(0));
        assert_eq!(many.layout(), Args::NO_LAYOUT);
        let most = (0..31).fold(Args::new(), |args, _| args.long(0));
        assert_ne!(most.layout(), Args::NO_LAYOUT);
    }
}
