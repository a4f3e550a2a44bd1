//! Reads the assembler's resource report (`ptxas -v`).

use std::fmt;

/// What one kernel uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelReport {
    /// The kernel's (unmangled) entry name.
    pub name: String,
    /// Registers per thread.
    pub registers: u32,
    /// Statically allocated shared memory per block in bytes.
    pub shared_bytes: u32,
    /// Stack frame per thread in bytes.
    pub stack_bytes: u32,
    /// Bytes stored to local memory because registers ran out.
    pub spill_store_bytes: u32,
    /// Bytes loaded back.
    pub spill_load_bytes: u32,
}

impl KernelReport {
    /// Whether registers are spilled to local memory.
    pub fn spills(&self) -> bool {
        self.spill_store_bytes + self.spill_load_bytes > 0
    }
}

impl fmt::Display for KernelReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} registers, {} B static shared memory, {} B stack, {} B spill stores, {} B spill loads",
            self.name,
            self.registers,
            self.shared_bytes,
            self.stack_bytes,
            self.spill_store_bytes,
            self.spill_load_bytes
        )
    }
}

/// The reports of all entry functions in the assembler's output.
pub fn parse(output: &str) -> Vec<KernelReport> {
    let mut kernels: Vec<KernelReport> = Vec::new();
    for line in output.lines() {
        if line.contains("Compiling entry function") {
            let name = line.split('\'').nth(1).unwrap_or_default().to_string();
            kernels.push(KernelReport {
                name,
                ..Default::default()
            });
        } else if let Some(kernel) = kernels.last_mut() {
            if line.contains("bytes stack frame") {
                kernel.stack_bytes = number_before(line, " bytes stack frame");
                kernel.spill_store_bytes = number_before(line, " bytes spill stores");
                kernel.spill_load_bytes = number_before(line, " bytes spill loads");
            } else if line.contains("Used ") && line.contains(" registers") {
                kernel.registers = number_before(line, " registers");
                kernel.shared_bytes = number_before(line, " bytes smem");
            }
        }
    }
    kernels
}

fn number_before(line: &str, unit: &str) -> u32 {
    let Some(end) = line.find(unit) else { return 0 };
    let digits = line[..end]
        .rsplit(|c: char| !c.is_ascii_digit())
        .next()
        .unwrap_or_default();
    digits.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_and_spills_are_read() {
        let text = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'rms_norm' for 'sm_90a'
ptxas info    : Function properties for rms_norm
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 380 bytes cmem[0]
";
        let expected = KernelReport {
            name: "rms_norm".into(),
            registers: 40,
            shared_bytes: 1024,
            stack_bytes: 16,
            spill_store_bytes: 8,
            spill_load_bytes: 12,
        };
        assert_eq!(parse(text), vec![expected]);
        assert!(parse(text)[0].spills());
    }
}
