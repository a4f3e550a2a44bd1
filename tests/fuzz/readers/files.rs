//! Readers that read and draw nothing.

use clap::Parser;
use l2p_engine::Device;
use l2p_engine::checkpoint::{
    self, Checkpoint, ExportOptions, InitOptions, ModelPaths, PathOverrides, Transformer, inspect as inspected,
    read_values, write_file,
};
use l2p_engine::data::{FeatureStore, Metadata};
use l2p_engine::image_io::{Mask, read_header, read_image, read_settings};
use l2p_engine::model::language::LanguageModel;
use l2p_engine::model::vae::VaeDecoder;
use l2p_engine::pipeline::generator::{Generator, LanguageFiles, SamplingOptions};
use l2p_engine::pipeline::{Asked, ModelFiles};
use l2p_engine::text::json::JsonShape;
use l2p_engine::text::{Conversation, PromptTokenizer};
use l2p_engine::train::run::{KEYS, TrainConfig};

use super::{Ended, ended};
use crate::case::Case;
use crate::json::NUMBERS;

/// A file of tensors by itself.
pub fn tensors(case: &mut Case) -> Ended {
    let path = case.path(&case.changed[0]);
    let outcome = ended(read_values(&path));
    // As weights, whatever they are.
    let _ = Checkpoint::open_plain(&path);
    let _ = Checkpoint::open_transformer(&path).and_then(|checkpoint| Transformer::new(checkpoint, None));
    outcome
}

/// A transformer's folder with shards.
pub fn shards(case: &mut Case) -> Ended {
    let folder = case.path("latent/transformer");
    let paths = ModelPaths::resolve(&folder, &PathOverrides::default());
    ended(paths.and_then(|paths| paths.open_transformer().map(|transformer| transformer.audit())))
}

/// A text encoder that writes a few words, held to a shape.
pub fn language(case: &mut Case) -> Ended {
    let write = || -> l2p_engine::Result<()> {
        let paths = ModelPaths::resolve(&case.path("latent"), &PathOverrides::default())?;
        // As small as it is, it is refused after everything in its folder was read.
        let Err(refusal) = LanguageFiles::open(&paths, &Device::Cpu) else {
            return Ok(());
        };
        if !refusal.to_string().contains("is no language model") {
            return Err(refusal);
        }
        let (config, checkpoint) = checkpoint::open_text_encoder(paths.text_encoder()?)?;
        let tokenizer = PromptTokenizer::open(paths.tokenizer()?)?;
        let model = LanguageModel::load(&checkpoint, &Device::Cpu, &config, &mut |_, _| Ok(()))?;
        let generator = Generator::of(tokenizer, model)?;
        let question = Conversation {
            system: Some("Be brief.".into()),
            user: "a fox".into(),
        };
        let shape = JsonShape::Texts {
            count: 1..=1,
            characters: 0..=4,
        };
        for shape in [None, Some(shape)] {
            let options = SamplingOptions {
                max_tokens: 8,
                shape,
                ..SamplingOptions::default()
            };
            let answers = generator.generate(std::slice::from_ref(&question), &options, &mut |_| Ok(()))?;
            if options.shape.is_some() {
                serde_json::from_str::<Vec<String>>(&answers[0].text).expect("the answer has its shape");
            }
        }
        Ok(())
    };
    ended(write())
}

/// What `l2p-convert inspect` says.
pub fn inspect(case: &mut Case) -> Ended {
    let paths = ModelPaths::resolve(&case.path("latent"), &PathOverrides::default());
    let inspection = paths.and_then(|paths| inspected(&paths));
    ended(inspection.map(|inspection| serde_json::to_string(&inspection)))
}

/// What `l2p-convert inspect` and a program that draws read of a model of the second family, and of its single file.
pub fn second_family(case: &mut Case) -> Ended {
    let read = || -> l2p_engine::Result<()> {
        let paths = ModelPaths::resolve(&case.path("flux2"), &PathOverrides::default())?;
        inspected(&paths)?;
        let files = ModelFiles::open(paths, Device::Cpu)?;
        files.settings(&Asked::default())?;
        if let Some((config, checkpoint)) = files.vae_files() {
            VaeDecoder::load(checkpoint, &Device::Cpu, config)?;
        }
        Checkpoint::open_transformer(&case.path("flux2/single.safetensors"))?;
        let model = files.transformer();
        model
            .spec
            .load(&model.checkpoint, &Device::Cpu, &mut |_, _| Ok(()))
            .map(drop)
    };
    ended(read())
}

/// What `l2p-convert init`, `merge` and `export` do.
pub fn convert(case: &mut Case) -> Ended {
    let open = |name: &str| ModelPaths::resolve(&case.path(name), &PathOverrides::default());
    let convert = || -> l2p_engine::Result<()> {
        let (latent, pixel) = (open("latent")?, open("pixel")?);
        let source = latent.open_transformer()?;
        let options = InitOptions {
            patch: 16,
            seed: 1,
            head_widths: Some(vec![2, 2, 4, 4]),
            head_bottleneck: Some(4),
        };
        let made = checkpoint::init(&source, &options)?;
        write_file(&case.path("init.safetensors"), &made.output, true, &mut ())?;
        let whole = pixel.open_tensors()?;
        let exported = checkpoint::export(&whole, &ExportOptions::default())?;
        write_file(&case.path("out.safetensors"), &exported, true, &mut ())?;
        let over = pixel.open_tensors()?.over(latent.open_tensors()?)?;
        Transformer::new(over, pixel.transformer_config()?.as_ref()).map(drop)
    };
    ended(convert())
}

/// A tokenizer's folder: it gives the same tokens each time, and few enough.
pub fn tokenizer(case: &mut Case) -> Ended {
    let changed = case.changed[0].clone();
    let folder = case.path(changed.rsplit_once('/').map_or("", |(folder, _)| folder));
    let prompts = [
        "a fox",
        "",
        "The <|im_end|> café, 💥 ﷺ ßİ  x\n\t",
        "aaaa-bbbb 1234567890 fofofofoxfox",
    ];
    let encode = || -> l2p_engine::Result<Vec<Vec<u32>>> {
        let tokenizer = PromptTokenizer::open(&folder)?;
        prompts.iter().map(|prompt| Ok(tokenizer.encode(prompt)?.ids)).collect()
    };
    let first = match encode() {
        Ok(first) => first,
        Err(error) => return Ended::Refused(error.to_string()),
    };
    if first.iter().any(|ids| ids.len() > PromptTokenizer::DEFAULT_MAX_TOKENS) {
        return Ended::Wrong(
            "too many tokens",
            format!("{:?}", first.iter().map(Vec::len).collect::<Vec<_>>()),
        );
    }
    match encode() {
        Ok(second) if second == first => Ended::Accepted,
        Ok(second) => Ended::Wrong("other tokens the second time", format!("{first:?} {second:?}")),
        Err(error) => Ended::Wrong("refused the second time", error.to_string()),
    }
}

/// A chat template beside a tokenizer.
pub fn template(case: &mut Case) -> Ended {
    let template = case.path(&case.changed[0]);
    let folder = case.path("tokenizers/bytes");
    if let Err(error) = std::fs::copy(template, folder.join("chat_template.jinja")) {
        return Ended::Refused(error.to_string());
    }
    let tokenizer = PromptTokenizer::open(&folder);
    ended(tokenizer.and_then(|tokenizer| tokenizer.encode("a fox")))
}

/// A training run's configuration.
pub fn training_configuration(case: &mut Case) -> Ended {
    let config = TrainConfig::read(Some(&case.path("train.toml")), &[]);
    ended(config.and_then(|config| {
        let _ = config.pictures_per_step();
        let _ = config.train_options();
        config.ensure_named(true)
    }))
}

/// Values of flags, of all programs.
pub fn flags(case: &mut Case) -> Ended {
    let random = &mut case.random;
    let words = [
        "",
        "-",
        "a",
        "64x64",
        "1x",
        "0x0",
        "9999999999x1",
        "all",
        "paper:1",
        "paper:-1",
        "layers.*",
        "true",
        "1,2",
        "é",
        "\0",
    ];
    let mut value = || match random.one_in(2) {
        true => random.pick(&NUMBERS).to_owned(),
        false => random.pick(&words).to_owned(),
    };
    let (first, second) = (value(), value());
    let key = random.pick(KEYS).name;
    let flags =
        [("model", "m"), ("data", "d"), (key, &first)].map(|(name, value)| (name.to_owned(), vec![value.to_owned()]));
    let read = TrainConfig::read(None, &flags);
    let sample = random.pick(&[
        "cfg", "steps", "shift", "seed", "count", "batch", "width", "height", "rng", "quality", "device",
    ]);
    let arguments = ["l2p-sample".to_owned(), format!("--{sample}={second}")];
    let _ = l2p_bins::sample::Arguments::try_parse_from(arguments);
    let data = random.pick(&[
        "cfg", "steps", "shift", "seed", "count", "batch", "width", "height", "rng", "limit", "format",
    ]);
    let arguments = ["l2p-data", "synthesize", "--model", "m", "--prompts", "p", "--out", "o"].map(str::to_owned);
    let _ = l2p_bins::data::Arguments::try_parse_from(arguments.into_iter().chain([format!("--{data}={second}")]));
    let arguments = ["l2p-train".to_owned(), format!("--{}={second}", key.replace('_', "-"))];
    if let Ok(arguments) = l2p_bins::train::Arguments::try_parse_from(arguments) {
        let _ = arguments.run.source.read();
    }
    ended(read)
}

/// Metadata of a data set.
pub fn metadata(case: &mut Case) -> Ended {
    ended(Metadata::read(&case.path(&case.changed[0])))
}

/// The body of a request to the server, in the dialect that its file is named after.
pub fn requests(case: &mut Case) -> Ended {
    let path = case.path(&case.changed[0]);
    let dialect = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    match std::fs::read(&path) {
        Err(error) => Ended::Refused(error.to_string()),
        Ok(body) => match l2p_bins::serve::understand(&dialect, &body) {
            Ok(()) => Ended::Accepted,
            Err(line) => Ended::Refused(line),
        },
    }
}

/// A picture, and what its header says; as a mask it has the same size.
pub fn pictures(case: &mut Case) -> Ended {
    let path = case.path(&case.changed[0]);
    let size = read_header(&path).map(|header| (header.width, header.height));
    let image = match read_image(&path) {
        Ok(image) => image,
        Err(error) => return Ended::Refused(error.to_string()),
    };
    let found = (image.width(), image.height());
    match Mask::read(&path) {
        Ok(mask) if (mask.width(), mask.height()) == found => {}
        Ok(mask) => return Ended::Wrong("another size as a mask", format!("{}x{}", mask.width(), mask.height())),
        Err(error) => return Ended::Wrong("refused as a mask alone", error.to_string()),
    }
    match size {
        Ok(size) if size == found => Ended::Accepted,
        Ok(size) => Ended::Wrong("another size than its header says", format!("{size:?}, {found:?}")),
        Err(error) => Ended::Wrong("its size is refused", error.to_string()),
    }
}

/// The settings that a picture carries.
pub fn like(case: &mut Case) -> Ended {
    ended(read_settings(&case.path("inputs/like.png")))
}

/// Features in a cache: damaged ones count as missing.
pub fn stores(case: &mut Case) -> Ended {
    let path = case.path(&case.changed[0]);
    let Some(folder) = path.parent().and_then(|folder| folder.parent()) else {
        return Ended::Refused("no store".into());
    };
    let store = match FeatureStore::open(folder, b"fuzz") {
        Ok(store) => store,
        Err(error) => return Ended::Refused(error.to_string()),
    };
    // Under the name by which it is looked for.
    let key = store.key(&[b"x"]);
    let _ = store.write(&key, &l2p_engine::data::Features::from_f32(&[1.0], &[1]));
    let bytes = std::fs::read(&path).unwrap_or_default();
    for entry in walk(folder) {
        let _ = std::fs::write(entry, &bytes);
    }
    match store.read(&key) {
        None => Ended::Refused("damaged".into()),
        Some(features) => {
            let size: usize = features.shape().iter().product();
            match size * 4 == features.bytes().len() || size * 2 == features.bytes().len() {
                true => Ended::Accepted,
                false => Ended::Wrong("a shape that its bytes do not have", format!("{:?}", features.shape())),
            }
        }
    }
}

/// The files below a folder.
fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = folder
        .read_dir()
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    entries
        .flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] })
        .collect()
}

/// Records of benchmarks, to the README's tables.
pub fn bench_records(case: &mut Case) -> Ended {
    let root = case.path("tree").display().to_string();
    let arguments = l2p_bench::report::Arguments::try_parse_from(["bench-report", "--root", &root]);
    match arguments {
        Ok(arguments) => ended(l2p_bench::report::run(&arguments)),
        Err(error) => Ended::Wrong("the arguments do not fit", error.to_string()),
    }
}

/// What `l2p-data score` says of these files.
fn scored(case: &Case, arguments: &[&str]) -> Ended {
    let paths = arguments.iter().map(|argument| match argument.starts_with("scores/") {
        true => case.path(argument).display().to_string(),
        false => (*argument).to_owned(),
    });
    let all = ["l2p-data", "score"].map(str::to_owned).into_iter().chain(paths);
    match l2p_bins::data::Arguments::try_parse_from(all) {
        Ok(arguments) => ended(l2p_bins::data::data(arguments).map_err(|error| format!("{error:#}"))),
        Err(error) => Ended::Wrong("the arguments do not fit", error.to_string()),
    }
}

/// Files of features, whatever they are taken for.
pub fn features(case: &mut Case) -> Ended {
    let changed = case.changed[0].clone();
    let small = ["--subsets", "2", "--subset-size", "20", "--json"];
    match case.random.below(3) {
        0 => scored(case, &["inception", &changed, "--json"]),
        1 => scored(case, &["clip", &changed, "--captions", &changed]),
        _ => scored(
            case,
            &[&["features", &changed, "--against", "scores/first.npy"][..], &small].concat(),
        ),
    }
}

/// What the programs of GenEval and DPG-Bench wrote.
pub fn results(case: &mut Case) -> Ended {
    let which = if case.changed[0].contains("dpg") {
        "dpg"
    } else {
        "geneval"
    };
    let changed = case.changed[0].clone();
    scored(case, &[which, &changed, "--json"])
}
