//! Which program this is: ranks that run different ones would not compute the same.

use std::sync::OnceLock;

use sha2::{Digest, Sha256};

/// Name and version, and the beginning of the SHA-256 of the executable, where that can be read.
pub(super) fn identity() -> &'static str {
    static IDENTITY: OnceLock<String> = OnceLock::new();
    IDENTITY.get_or_init(|| {
        let version = concat!("l2p ", env!("CARGO_PKG_VERSION"));
        match hash() {
            Some(hash) => format!("{version} ({hash})"),
            None => version.to_owned(),
        }
    })
}

fn hash() -> Option<String> {
    // The name of a running program may be gone, or belong to a newer build; Linux keeps the file.
    let open = std::fs::File::open("/proc/self/exe").or_else(|_| std::fs::File::open(std::env::current_exe()?));
    let mut hash = Sha256::new();
    std::io::copy(&mut open.ok()?, &mut hash).ok()?;
    let bytes = hash.finalize();
    Some(bytes[..6].iter().map(|byte| format!("{byte:02x}")).collect())
}
