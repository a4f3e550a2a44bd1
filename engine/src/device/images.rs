//! Where kernel images come from: the build, or first a folder that `L2P_KERNEL_IMAGES` names, for those who work on kernels.
//!
//! Such a folder holds `<image>.sm_90a.fatbin` or `<image>.compute_80.fatbin`, made by nvcc; an image that it does not hold is the
//! build's. That foreign images are in use is never left unsaid: a warning is traced for each, [`CudaDevice::foreign_images`]
//! (super::CudaDevice::foreign_images) lists them, and `l2p-sample devices` shows the folder.

use std::path::{Path, PathBuf};

use super::driver::NATIVE_CAPABILITY;
use crate::error::{Error, Result};
use crate::files;
use crate::limits::Budget;

/// Of one image; the largest of the build's are below 1 MB.
const BUDGET: Budget = Budget::new("kernel image", 256 << 20);

/// What a fat binary begins with: this number, a version and its header's size in two bytes each, and the size of what follows.
const MAGIC: u32 = 0xba55_ed50;
const HEADER_BYTES: usize = 16;

/// What images are compiled for; see `ptx-build`.
pub(super) fn target(portable: bool) -> &'static str {
    match portable {
        true => "compute_80",
        false => "sm_90a",
    }
}

/// The file of an image in a folder of foreign ones, if it is there.
pub(super) fn foreign_file(folder: &Path, image: &str, target: &str) -> Option<PathBuf> {
    let file = folder.join(format!("{image}.{target}.fatbin"));
    file.exists().then_some(file)
}

/// The names of the build's images in whose place the folder holds one for some GPU.
pub(super) fn foreign_names(folder: &Path) -> Vec<&'static str> {
    let held = |image: &&l2p_kernels::Image| {
        [true, false]
            .into_iter()
            .any(|portable| foreign_file(folder, image.name, target(portable)).is_some())
    };
    l2p_kernels::IMAGES
        .iter()
        .filter(held)
        .map(|image| image.name)
        .collect()
}

/// A foreign image in place of the build's, or `None` where the folder has none.
///
/// # Errors
/// When the folder is not there, or its file cannot be read or is no whole fat binary.
pub(super) fn foreign_image(folder: &Path, image: &str, target: &str) -> Result<Option<Vec<u8>>> {
    if !folder.is_dir() {
        return Err(Error::file(folder, "is no folder, but L2P_KERNEL_IMAGES names it"));
    }
    let Some(file) = foreign_file(folder, image, target) else {
        return Ok(None);
    };
    let bytes = files::read(&file, BUDGET)?;
    match is_whole(&bytes) {
        true => Ok(Some(bytes)),
        false => Err(Error::file(file, "is no whole fat binary (nvcc -fatbin makes one)")),
    }
}

/// The driver takes no size: it believes what the image says of itself.
fn is_whole(bytes: &[u8]) -> bool {
    let field = |from: usize, count: usize| {
        let bytes = bytes.get(from..from + count)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0u64, |value, &byte| value << 8 | u64::from(byte)),
        )
    };
    let (Some(magic), Some(header), Some(size)) = (field(0, 4), field(6, 2), field(8, 8)) else {
        return false;
    };
    magic == u64::from(MAGIC) && header as usize == HEADER_BYTES && size == (bytes.len() - HEADER_BYTES) as u64
}

/// Which kernels run on a GPU of this capability, in words.
pub(super) fn description(capability: (i32, i32), portable_forced: bool) -> &'static str {
    match capability {
        NATIVE_CAPABILITY if !portable_forced => "sm_90a machine code",
        _ => "compute_80 PTX, compiled by the driver",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The build's own images are taken for what they are; one that was cut, or is none, is not handed to the driver.
    #[test]
    fn whole_images_are_told_from_others() {
        for image in l2p_kernels::IMAGES {
            for bytes in [image.sm_90a, image.compute_80] {
                assert!(is_whole(bytes), "{}", image.name);
                assert!(!is_whole(&bytes[..bytes.len() - 1]), "{}", image.name);
            }
        }
        let mut smallest = [MAGIC.to_le_bytes(), [1, 0, 16, 0], [0; 4], [0; 4]].concat();
        assert!(is_whole(&smallest));
        smallest[0] ^= 1;
        assert!(!is_whole(&smallest) && !is_whole(&[]) && !is_whole(b".version 9.0\n.target sm_80\n"));
    }

    #[test]
    fn a_folders_images_come_before_the_builds() {
        let folder = tempfile::tempdir().unwrap();
        let whole = [MAGIC.to_le_bytes(), [1, 0, 16, 0], [3, 0, 0, 0], [0; 4], *b"abc\0"].concat();
        let whole = &whole[..HEADER_BYTES + 3];
        std::fs::write(folder.path().join("cast.sm_90a.fatbin"), whole).unwrap();
        std::fs::write(folder.path().join("conv.sm_90a.fatbin"), &whole[..18]).unwrap();
        let image = |image, target| foreign_image(folder.path(), image, target);
        assert_eq!(image("cast", "sm_90a").unwrap().as_deref(), Some(whole));
        assert_eq!(image("cast", "compute_80").unwrap(), None);
        assert_eq!(image("noise", "sm_90a").unwrap(), None);
        let cut = image("conv", "sm_90a").unwrap_err().to_string();
        assert!(
            cut.contains("conv.sm_90a.fatbin") && cut.contains("no whole fat binary"),
            "{cut}"
        );
        let missing = foreign_image(&folder.path().join("x"), "cast", "sm_90a").unwrap_err();
        assert!(missing.to_string().contains("L2P_KERNEL_IMAGES"), "{missing}");
    }
}
