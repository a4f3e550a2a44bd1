//! Which benchmark measures what, and with which arguments.

/// The sizes that the table is about: those published, or small ones to try the program.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Lengths of attention.
    pub tokens: [usize; 3],
    /// Small models.
    pub tiny: bool,
}

impl Sizes {
    /// The table's.
    pub fn published() -> Self {
        Sizes {
            tokens: [4192, 16640, 65632],
            tiny: false,
        }
    }

    /// For a CPU.
    pub fn tiny() -> Self {
        Sizes {
            tokens: [64, 96, 130],
            tiny: true,
        }
    }
}

/// One benchmark's part in the table, measured in a process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// For `--only`.
    pub name: &'static str,
    /// The program.
    pub program: &'static str,
    /// What it is for.
    pub about: &'static str,
}

/// All parts, in the order in which they are measured: first what must be alone on the GPU.
pub const PARTS: [Part; 13] = [
    Part {
        name: "sample",
        program: "bench-sample",
        about: "8 steps of 4K from prompt to PNG: time, and memory with nothing else on the GPU",
    },
    Part {
        name: "attention",
        program: "bench-attention",
        about: "attention forward at the three lengths",
    },
    Part {
        name: "elementwise",
        program: "bench-elementwise",
        about: "what moves memory in a block, as a share of a copy",
    },
    Part {
        name: "products",
        program: "bench-gemm",
        about: "the matrix products",
    },
    Part {
        name: "head",
        program: "bench-head",
        about: "the Detailer Heads for 1K and 4K",
    },
    Part {
        name: "step-4k",
        program: "bench-step",
        about: "the whole 4K step",
    },
    Part {
        name: "eight-bit",
        program: "bench-step",
        about: "the 4K step with weights in bf16, int8 and fp8, beside PyTorch's fp8 products and attention",
    },
    Part {
        name: "streamed",
        program: "bench-step",
        about: "the 4K step with all main blocks in host memory, in int8",
    },
    Part {
        name: "sample-8gb",
        program: "bench-sample",
        about: "8 steps of 4K with 8 GB: int8, twelve blocks in host memory",
    },
    Part {
        name: "sample-4gb",
        program: "bench-sample",
        about: "8 steps of 4K with 4 GB: int8, all blocks in host memory, the text encoder's too",
    },
    Part {
        name: "sample-8k",
        program: "bench-sample",
        about: "8 steps of 8K in int8",
    },
    Part {
        name: "step-1k",
        program: "bench-step",
        about: "the whole 1K step",
    },
    Part {
        name: "latent-4k",
        program: "bench-step",
        about: "the latent 4K step and the VAE's decoding, the baseline of speed-up and memory",
    },
];

impl Part {
    /// The part of this name.
    pub fn named(name: &str) -> Option<Self> {
        PARTS.into_iter().find(|part| part.name == name)
    }

    /// The program's arguments; `repeats` in place of its own number of samples.
    pub fn arguments(self, sizes: &Sizes, peers: bool, repeats: Option<u32>) -> Vec<String> {
        let tokens = sizes.tokens.map(|tokens| tokens.to_string()).join(",");
        let (mut arguments, small, samples) = match self.name {
            "sample" => (
                vec!["--sizes=4k".to_owned(), "--steps=8".into()],
                vec!["--tiny", "--steps=2"],
                7,
            ),
            "attention" => (
                vec![format!("--tokens={tokens}"), "--kernels=auto".into()],
                vec!["--heads=2"],
                10,
            ),
            "elementwise" => (
                vec!["--ops=qk_norm_rope,rms_norm_modulate,gated_residual_rms_norm,swiglu".into()],
                vec!["--tokens=64", "--heads=2", "--ffn=512", "--image=64"],
                20,
            ),
            "products" => (Vec::new(), vec!["--shape=qkv=64x48x32", "--shape=out=64x48x32"], 15),
            "head" => (vec!["--heads=1k,4k".into()], vec!["--tiny"], 10),
            "eight-bit" => (
                vec!["--model=pixel-4k".to_owned(), "--trunk=bf16,int8,fp8".into()],
                vec!["--tiny"],
                15,
            ),
            "streamed" => (
                vec![
                    "--model=pixel-4k".to_owned(),
                    "--trunk=int8".into(),
                    "--stream=30".into(),
                ],
                vec!["--tiny", "--stream=2"],
                10,
            ),
            "sample-8gb" => (
                sample("4k", &["--stream=12"]),
                vec!["--tiny", "--steps=2", "--stream=1"],
                7,
            ),
            "sample-4gb" => (
                sample("4k", &["--stream=30", "--stream-text=35"]),
                vec!["--tiny", "--steps=2", "--stream=2", "--stream-text=1"],
                5,
            ),
            "sample-8k" => (sample("8k", &[]), vec!["--tiny", "--steps=2"], 5),
            "latent-4k" => (vec!["--model=latent-4k".into()], vec!["--tiny"], 3),
            step => (
                vec![format!("--model={}", step.replace("step", "pixel"))],
                vec!["--tiny"],
                10,
            ),
        };
        if sizes.tiny {
            // Later arguments would be refused as repeated.
            let replaced = |argument: &String| small.iter().any(|small| same_flag(argument, small));
            arguments.retain(|argument| !replaced(argument));
            arguments.extend(small.iter().map(|argument| (*argument).to_owned()));
        }
        arguments.push(format!("--repeats={}", repeats.unwrap_or(samples)));
        let compiled = match self.name {
            "head" | "step-4k" | "step-1k" => "default",
            // What the table compares with runs eagerly, and to compile it would take minutes.
            _ => "none",
        };
        // Elementwise work is compared with the copy, and whole pictures with nothing.
        if peers
            && !matches!(
                self.name,
                "sample" | "elementwise" | "streamed" | "sample-8gb" | "sample-4gb" | "sample-8k"
            )
        {
            arguments.extend(["--peer".to_owned(), format!("--peer-compile={compiled}")]);
        }
        arguments
    }
}

/// Arguments of `bench-sample` for pictures with weights in int8.
fn sample(size: &str, more: &[&str]) -> Vec<String> {
    let own = ["--steps=8", "--trunk=int8", "--text-weights=int8"];
    let size = format!("--sizes={size}");
    [size]
        .into_iter()
        .chain(own.iter().chain(more).map(|text| (*text).to_owned()))
        .collect()
}

fn same_flag(a: &str, b: &str) -> bool {
    let flag = |text: &str| text.split('=').next().map(str::to_owned);
    flag(a) == flag(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_say_what_to_run() {
        let step = Part::named("step-4k")
            .unwrap()
            .arguments(&Sizes::published(), true, None);
        assert_eq!(
            step,
            ["--model=pixel-4k", "--repeats=10", "--peer", "--peer-compile=default"]
        );
        let sample = Part::named("sample").unwrap().arguments(&Sizes::tiny(), true, Some(2));
        assert_eq!(sample, ["--sizes=4k", "--tiny", "--steps=2", "--repeats=2"]);
        assert!(Part::named("nothing").is_none());
    }
}
