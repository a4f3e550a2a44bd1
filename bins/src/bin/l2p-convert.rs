//! Looks at model files and makes new ones from them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, Parser, Subcommand, ValueEnum};
use l2p_bins::{ByteSize, WriteProgress, print, report, run};
use l2p_engine::checkpoint::{
    self, EightBitFormat, ExportOptions, Float, InitOptions, Layout, ModelPaths, PathOverrides, Prefix,
    QuantiseOptions, Transformer, WriteObserver, Written, ensure_found_again, ensure_free, is_whole, write_file,
    write_folder,
};
use l2p_engine::device::format_bytes;
use l2p_engine::limits::Width;
use l2p_engine::{patterns, shown_name};
use serde_json::{Value, json};

const ABOUT: &str = "Look at model files, and make new ones from them";

const LONG_ABOUT: &str = "\
Look at model files, and make new ones from them.

A model is named by its path: a diffusers folder (model_index.json, transformer/, text_encoder/, …), the transformer's own \
folder, one .safetensors file, an index of shards, or a folder with an l2p.json that names the parts. Layouts are told by \
content: plain (diffusers') names or packed ones (attention.qkv), with or without the prefixes model.diffusion_model., \
diffusion_model. and pipe.dit., whole or a delta that holds only what was trained.

Files are written beside their target and renamed into place when they are complete.";

const EXAMPLES: &str = "\
Examples:
  What is this, is it complete, and will it fit my GPU?
    l2p-convert inspect Z-Image-Turbo
  Start a 1K pixel model from a latent one:
    l2p-convert init --source Z-Image-Turbo --patch 16 --seed 0 --out pixel-1k-init.safetensors
  Start a 4K model from the trained 1K one:
    l2p-convert init --source pixel-1k.safetensors --patch 64 --seed 0 --out pixel-4k-init.safetensors
  Lay a trained delta over the file that training began from:
    l2p-convert merge --base pixel-1k-init.safetensors --delta delta.safetensors --out pixel-1k.safetensors
  Write a model for a program that wants packed names:
    l2p-convert export --in pixel-1k.safetensors --out packed.safetensors --layout packed --prefix model.diffusion_model.
  Write its blocks in eight bits:
    l2p-convert quantize pixel-1k.safetensors --to int8 --out pixel-1k-int8.safetensors";

#[derive(Parser)]
#[command(name = "l2p-convert", version, long_version = l2p_bins::long_version(), about = ABOUT, long_about = LONG_ABOUT, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

// Described by the documentation of what each holds.
#[derive(Subcommand)]
enum Command {
    Inspect(Inspect),
    Init(Init),
    Merge(Merge),
    Export(Export),
    Quantize(Quantize),
}

/// Say what a model is: layout, sizes, head, what is missing, memory needed.
///
/// Every weight is read and looked at for NaN and infinity, at the speed of the disk; --quick reads headers only. A model that is
/// merely incomplete, or quantised, is reported as such; a damaged file is an error.
#[derive(Args)]
struct Inspect {
    /// The model: a folder or a file
    path: PathBuf,
    /// The model that a delta lies over
    #[arg(long, value_name = "PATH")]
    base: Option<PathBuf>,
    /// Read headers only, whatever the weights are
    #[arg(long)]
    quick: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Make a pixel model from a latent one, or from a pixel model of another patch size.
///
/// Every tensor with the same name and shape is copied bit by bit. The input projection (all_x_embedder.{P}-1) and what the
/// source does not have of the Detailer Head (local_decoder) start random: uniform in ±1/√(inputs), weights and biases, as
/// PyTorch does, from the seed and the tensor's name.
#[derive(Args)]
#[command(
    after_help = "Example:\n  l2p-convert init --source Z-Image-Turbo --patch 16 --seed 0 --out pixel-1k-init.safetensors"
)]
struct Init {
    /// The source model
    #[arg(long, value_name = "PATH")]
    source: PathBuf,
    /// Side of a patch in pixels; a picture has size/patch tokens along a side
    #[arg(long, value_parser = ["16", "64", "128", "160"])]
    patch: String,
    /// Seed of the random numbers; the same seed gives the same file
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Widths of the head's stages from the image inwards, 4 for patch 16, 6 for 64 and 128, 5 for 160. By default the
    /// published ones (patch 16: 64,128,256,512) for the published width of 3840, half of these for smaller models
    #[arg(long, value_delimiter = ',', value_name = "N,N,…")]
    head_widths: Option<Vec<Width>>,
    /// Width of the head's bottleneck. By default that of the innermost stage, for patch 160 twice as much
    #[arg(long, value_name = "N")]
    head_bottleneck: Option<Width>,
    #[command(flatten)]
    output: Output,
}

/// Lay a delta over the model that it was trained from, and write the whole.
///
/// The delta's tensors win, the base gives the rest, all bit by bit. The latent model itself may be the base of a pixel delta
/// that holds input projection and head: its own input and output layers are left out.
#[derive(Args)]
#[command(
    after_help = "Example:\n  l2p-convert merge --base init.safetensors --delta delta.safetensors --out merged.safetensors"
)]
struct Merge {
    /// The whole model below
    #[arg(long, value_name = "PATH")]
    base: PathBuf,
    /// The trained tensors
    #[arg(long, value_name = "PATH")]
    delta: PathBuf,
    #[command(flatten)]
    output: Output,
}

/// Write a model in another layout, with a prefix, in another type, or in shards.
///
/// Without --dtype every tensor is copied bit by bit, so that plain → packed → plain gives the same tensors. To an --out that
/// ends in .safetensors goes one file; any other name becomes a folder as diffusers has it, with config.json and, above
/// --max-shard-size, shards and their index.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  l2p-convert export --in merged.safetensors --out packed.safetensors --layout packed --prefix model.diffusion_model.\n  \
                  l2p-convert export --in packed.safetensors --out transformer --layout plain --dtype bf16 --max-shard-size 4GB"
)]
struct Export {
    /// The model
    #[arg(long = "in", value_name = "PATH")]
    input: PathBuf,
    /// The model that a delta lies over; without it a delta is exported as a delta
    #[arg(long, value_name = "PATH")]
    base: Option<PathBuf>,
    /// Names and stacking
    #[arg(long)]
    layout: LayoutChoice,
    /// Put before every name, for example model.diffusion_model.; one under which transformers are found
    #[arg(long, default_value = "")]
    prefix: Prefix,
    /// Element type of all tensors; by default each keeps its own
    #[arg(long)]
    dtype: Option<FloatChoice>,
    /// Largest shard of a folder, 4GB by default
    #[arg(long, value_name = "SIZE")]
    max_shard_size: Option<ByteSize>,
    #[command(flatten)]
    output: Output,
}

/// Write a model with weights of eight bits, and say what rounding did to each.
///
/// The matrices of the main blocks' attention and feed-forward networks are rounded; modulation, embedders, refiners, norms, pad
/// tokens and the head or final layer stay in the source's type, and so do the matrices that --keep names. int8 has a scale for each
/// row, and rows of whole groups of 256 inputs are rotated (ConvRot); fp8 is e4m3 with a scale for each tensor. Both are written as
/// NAME.weight_scale and NAME.comfy_quant beside NAME.weight.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  l2p-convert quantize merged.safetensors --to int8 --out merged-int8.safetensors\n  \
                  l2p-convert quantize merged.safetensors --to fp8 --keep 'layers.0.*,layers.29.*' --layout packed --out fp8.safetensors"
)]
struct Quantize {
    /// The model
    source: PathBuf,
    /// The model that a delta lies over
    #[arg(long, value_name = "PATH")]
    base: Option<PathBuf>,
    /// The type of the rounded weights
    #[arg(long)]
    to: EightBitChoice,
    /// Names of matrices that stay as they are, separated by commas: `*` stands for any characters, `?` for any one. Of
    /// projections that the packed layout stacks, all stay if one does
    #[arg(long, default_value = "", value_name = "PATTERNS", hide_default_value = true)]
    keep: String,
    /// Names and stacking; by default the source's
    #[arg(long)]
    layout: Option<LayoutChoice>,
    /// Put before every name, for example model.diffusion_model.; one under which transformers are found
    #[arg(long, default_value = "")]
    prefix: Prefix,
    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, ValueEnum)]
enum EightBitChoice {
    /// Integers, a scale for each row
    Int8,
    /// Floats (e4m3), a scale for each tensor
    Fp8,
}

/// Where a result goes.
#[derive(Args)]
struct Output {
    /// The file to write
    #[arg(long, visible_alias = "output", value_name = "PATH")]
    out: PathBuf,
    /// Replace what is there
    #[arg(long)]
    force: bool,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum LayoutChoice {
    /// diffusers' names
    Plain,
    /// attention.qkv, x_embedder, final_layer
    Packed,
}

impl From<LayoutChoice> for Layout {
    fn from(choice: LayoutChoice) -> Self {
        match choice {
            LayoutChoice::Plain => Layout::Plain,
            LayoutChoice::Packed => Layout::Packed,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum FloatChoice {
    Bf16,
    F16,
    F32,
}

/// Bytes of a shard where the user does not say.
const DEFAULT_SHARD: u64 = 4_000_000_000;

fn main() -> ExitCode {
    let cli: Cli = match l2p_bins::arguments() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    run(|| match cli.command {
        Command::Inspect(command) => inspect(&command),
        Command::Init(command) => init(&command),
        Command::Merge(command) => merge(&command),
        Command::Export(command) => export(&command),
        Command::Quantize(command) => quantize(&command),
    })
}

fn resolve(path: &Path, base: Option<&PathBuf>) -> anyhow::Result<ModelPaths> {
    let overrides = PathOverrides {
        base: base.cloned(),
        ..PathOverrides::default()
    };
    Ok(ModelPaths::resolve(path, &overrides)?)
}

fn inspect(command: &Inspect) -> anyhow::Result<()> {
    let paths = resolve(&command.path, command.base.as_ref())?;
    let mut found = checkpoint::inspect(&paths)?;
    if !command.quick {
        found.check_values(&paths, &mut WriteProgress::new("checking"))?;
    }
    if command.json {
        return print(&format!("{:#}\n", serde_json::to_value(&found)?));
    }
    print(&report::inspection(&found))
}

fn init(command: &Init) -> anyhow::Result<()> {
    let source = resolve(&command.source, None)?.open_transformer()?;
    let options = InitOptions {
        patch: command.patch.parse()?,
        seed: command.seed,
        head_widths: command
            .head_widths
            .as_ref()
            .map(|widths| widths.iter().map(|width| width.get()).collect()),
        head_bottleneck: command.head_bottleneck.map(Width::get),
    };
    let plan = checkpoint::init(&source, &options)?;
    let what = format!(
        "{} tensors copied, {} random (seed {})",
        plan.copied,
        plan.random.len(),
        options.seed
    );
    let details = json!({
        "copied": plan.copied,
        "random": plan.random,
        "seed": options.seed,
        "patch": options.patch,
        "head": plan.spec.head(),
    });
    command
        .output
        .write(&plan.output, &plan.output.shapes(), &what, details)
}

fn merge(command: &Merge) -> anyhow::Result<()> {
    let paths = resolve(&command.delta, Some(&command.base))?;
    let delta = paths.open_own_tensors()?;
    if is_whole(&delta) {
        bail!(
            "{}: is a whole model, there is nothing to merge it with",
            command.delta.display()
        );
    }
    let from_delta = delta.tensors().len();
    let merged = Transformer::new(paths.open_tensors()?, paths.transformer_config()?.as_ref())?.checkpoint;
    let from_base = merged.tensors().len() - from_delta;
    let output = checkpoint::export(&merged, &ExportOptions::default())?;
    let what = format!("{from_delta} tensors of the delta, {from_base} of the base");
    command.output.write(
        &output,
        &merged.shapes(),
        &what,
        json!({ "from_delta": from_delta, "from_base": from_base }),
    )
}

fn export(command: &Export) -> anyhow::Result<()> {
    let paths = resolve(&command.input, command.base.as_ref())?;
    let mut tensors = paths.open_tensors()?;
    let mut config = None;
    let mut left_out = tensors.foreign().to_vec();
    if is_whole(&tensors) {
        let transformer = Transformer::new(tensors, paths.transformer_config()?.as_ref())?;
        config = Some(transformer.spec.config_json());
        left_out.extend(transformer.audit().unused);
        tensors = transformer.without_unused();
    }
    let options = ExportOptions {
        layout: command.layout.into(),
        prefix: command.prefix.clone(),
        float: command.dtype.map(|dtype| match dtype {
            FloatChoice::Bf16 => Float::Bf16,
            FloatChoice::F16 => Float::F16,
            FloatChoice::F32 => Float::F32,
        }),
    };
    let output = checkpoint::export(&tensors, &options)?;
    let what = match left_out.len() {
        0 => "everything is in it".to_owned(),
        count => format!("left out {count} that are no part of the model"),
    };
    let details = json!({ "left_out": left_out });
    let out = &command.output.out;
    if out.extension().is_some_and(|extension| extension == "safetensors") {
        let bytes = output.data_bytes();
        if command.max_shard_size.is_some_and(|most| bytes > most.0) {
            bail!(
                "{}: one file would be {}, above --max-shard-size; name a folder instead",
                out.display(),
                format_bytes(bytes)
            );
        }
        return command.output.write(&output, &tensors.shapes(), &what, details);
    }
    let shards = output.split(command.max_shard_size.map_or(DEFAULT_SHARD, |most| most.0));
    let expected = tensors.shapes();
    let mut progress = Checked::new(&expected);
    let written = write_folder(out, &shards, config.as_ref(), command.output.force, &mut progress)?;
    command.output.tell(&written, &what, &progress, details)
}

fn quantize(command: &Quantize) -> anyhow::Result<()> {
    let paths = resolve(&command.source, command.base.as_ref())?;
    let transformer = paths.open_transformer()?;
    let out = &command.output.out;
    // Before the source is read, which takes its time.
    ensure_free(out, command.output.force)?;
    let out_file = out.canonicalize().ok();
    if transformer
        .checkpoint
        .files()
        .iter()
        .any(|file| file.path().canonicalize().ok() == out_file && out_file.is_some())
    {
        bail!(
            "{}: is the model that is to be read; choose another name",
            out.display()
        );
    }
    let options = QuantiseOptions {
        format: match command.to {
            EightBitChoice::Int8 => EightBitFormat::Int8,
            EightBitChoice::Fp8 => EightBitFormat::Fp8,
        },
        keep: patterns::split(&command.keep),
        layout: ExportOptions {
            layout: command.layout.map_or(transformer.checkpoint.layout(), Layout::from),
            prefix: command.prefix.clone(),
            float: None,
        },
    };
    let plan = checkpoint::quantise(&transformer, &options, &mut WriteProgress::new("measuring"))?;
    let shapes = transformer.checkpoint.shapes();
    let mut progress = Checked::new(&shapes);
    let written = write_file(out, &plan.output, command.output.force, &mut progress)?;
    let errors = plan.errors();
    if !command.output.json {
        print(&error_table(&errors))?;
    }
    let what = format!("{} weights of eight bits, {} matrices kept", errors.len(), plan.kept);
    let details = json!({ "layers": errors, "kept": plan.kept });
    command.output.tell(&written, &what, &progress, details)
}

/// What rounding did to each weight, in lines.
fn error_table(errors: &[checkpoint::LayerError]) -> String {
    let width = errors.iter().map(|error| error.name.len()).max().unwrap_or(0);
    let mut text = format!("{:<width$}  {:>15}  rotated  |W - W8| / |W|\n", "weight", "shape");
    for error in errors {
        let shape: Vec<_> = error.shape.iter().map(ToString::to_string).collect();
        let rotated = error.rotation.map_or("no".into(), |group| format!("by {group}"));
        text += &format!(
            "{:<width$}  {:>15}  {rotated:<7}  {:>14.4} %\n",
            shown_name(&error.name),
            shape.join(" x "),
            100.0 * error.error
        );
    }
    text
}

/// Tensors' shapes by canonical name.
type Shapes = BTreeMap<String, Vec<usize>>;

/// Shows how much is written, and has the loader find everything again before it takes its place.
struct Checked<'a> {
    progress: WriteProgress,
    expected: &'a Shapes,
}

impl<'a> Checked<'a> {
    fn new(expected: &'a Shapes) -> Self {
        let progress = WriteProgress::new("writing");
        Checked { progress, expected }
    }
}

impl WriteObserver for Checked<'_> {
    fn begin(&mut self, bytes: u64) {
        self.progress.begin(bytes);
    }

    fn advance(&mut self, bytes: u64) -> l2p_engine::Result<()> {
        self.progress.advance(bytes)
    }

    fn written(&mut self, path: &Path) -> l2p_engine::Result<()> {
        ensure_found_again(path, self.expected)
    }
}

impl Output {
    fn write(
        &self,
        output: &checkpoint::OutputFile<'_>,
        expected: &Shapes,
        what: &str,
        details: Value,
    ) -> anyhow::Result<()> {
        let mut progress = Checked::new(expected);
        let written = write_file(&self.out, output, self.force, &mut progress)?;
        self.tell(&written, what, &progress, details)
    }

    /// Says what was written.
    fn tell(&self, written: &Written, what: &str, progress: &Checked<'_>, details: Value) -> anyhow::Result<()> {
        let seconds = progress.progress.elapsed().as_secs_f64();
        if self.json {
            let mut result = serde_json::to_value(written)?;
            result["seconds"] = json!(seconds);
            if let (Some(result), Value::Object(details)) = (result.as_object_mut(), details) {
                result.extend(details);
            }
            return print(&format!("{result:#}\n"));
        }
        let files = match written.files {
            1 => String::new(),
            count => format!(" in {count} files"),
        };
        print(&format!(
            "wrote {}: {} tensors, {}{files} in {seconds:.1} s; {what}\n",
            written.path.display(),
            written.tensors,
            format_bytes(written.bytes)
        ))
    }
}
