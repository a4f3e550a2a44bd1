//! An inspected model as text.

use std::fmt::Write;
use std::path::Path;

use l2p_engine::checkpoint::{Container, EightBit, Inspection, Layout, MemoryEstimate, NotFinite, PartReport};
use l2p_engine::device::format_bytes;
use l2p_engine::{printable, shown_name};

/// Names listed before the rest is only counted.
const NAMES_SHOWN: usize = 8;

/// Parts of a model that are listed; none of ours has as many.
const PARTS_SHOWN: usize = 16;

/// The report that `l2p-convert inspect` prints: one line a fact, empty facts left out.
pub fn inspection(found: &Inspection) -> String {
    let mut text = format!("{}\n", found.path.display());
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            let _ = writeln!(text, "  {name:<13}{value}");
        }
    };
    line("model", model(found));
    line("layout", layout(found));
    line("base", found.base.as_deref().map(show).unwrap_or_default());
    line("size", size(found));
    line("transformer", found.summary.clone());
    line("head", head(found));
    line("parameters", parameters(found));
    line("on disk", on_disk(found));
    line(
        "eight bits",
        found.eight_bit.as_ref().map(eight_bit).unwrap_or_default(),
    );
    line(
        "text encoder",
        found.text_encoder.as_ref().map(part).unwrap_or_default(),
    );
    line("tokenizer", found.tokenizer.as_deref().map(show).unwrap_or_default());
    line("vae", found.vae.as_ref().map(part).unwrap_or_default());
    line(
        "objective",
        found.objective.as_ref().map(ToString::to_string).unwrap_or_default(),
    );
    line("shift", found.shift.map(|shift| shift.to_string()).unwrap_or_default());
    found
        .notes
        .iter()
        .for_each(|note| line("note", printable(note).into_owned()));
    line(
        "problem",
        found.problem.as_deref().map(printable).unwrap_or_default().into(),
    );
    let parts = [&found.text_encoder, &found.vae].into_iter().flatten();
    let problems = parts.filter_map(|part| part.problem.as_deref());
    problems.for_each(|problem| line("problem", printable(problem).into_owned()));
    for bad in &found.not_finite {
        line("not finite", format!("{}: {bad}", show(&bad.path)));
    }
    line("missing", names(&found.audit.missing));
    let wrong = found.audit.wrong.iter();
    line(
        "wrong shape",
        names(
            &wrong
                .map(|w| format!("{} {:?} instead of {:?}", shown_name(&w.name), w.found, w.expected))
                .collect::<Vec<_>>(),
        ),
    );
    line("unexpected", names(&found.audit.unexpected));
    line("unused", names(&found.audit.unused));
    line("not part", names(&found.foreign));
    let unseen = "not looked at (--quick): whether all weights are finite";
    line("values", if found.values_checked { "" } else { unseen }.into());
    if let Some(memory) = &found.memory {
        line("sampling", sampling(memory));
        line("training", training(memory));
    }
    text
}

fn show(path: &Path) -> String {
    printable(&path.display().to_string()).into_owned()
}

fn model(found: &Inspection) -> String {
    let kind = found
        .kind
        .map_or("unknown kind".to_owned(), |kind| format!("{kind} model"));
    let patch = found.patch.map(|patch| format!(", patch {patch}")).unwrap_or_default();
    let own_files = |bad: &NotFinite| found.files.contains(&bad.path);
    let state = match (found.complete, found.delta, &found.base) {
        _ if found.quantised.is_some() => "QUANTISED, which is not read",
        _ if found.not_finite.iter().any(own_files) => "NOT usable: some of its weights are NaN or infinite",
        (true, true, _) => "complete with its base",
        (true, false, _) => "complete",
        (false, true, None) => "a delta: it needs the model that it was trained over, --base",
        _ => "NOT complete",
    };
    format!("{kind}{patch}, {state}")
}

fn layout(found: &Inspection) -> String {
    let container = match found.container {
        Container::Diffusers => "diffusers folder",
        Container::Manifest => "folder with l2p.json",
        Container::Folder => "transformer folder",
        Container::File => "file",
    };
    let layout = match found.layout {
        Layout::Plain => "plain names",
        Layout::Packed => "packed names",
    };
    let prefixes = match &found.prefixes[..] {
        [] => String::new(),
        prefixes => format!(", prefix {}", printable(&prefixes.join(" and "))),
    };
    let files = match found.files.len() {
        1 => String::new(),
        count => format!(", {count} safetensors files"),
    };
    format!("{container}, {layout}{prefixes}{files}")
}

fn size(found: &Inspection) -> String {
    let Some(size) = found.resolution else {
        return String::new();
    };
    let source = if size.stated {
        "its default"
    } else {
        "of the published model with this patch"
    };
    format!("{}×{} pixels, {source}", size.width, size.height)
}

fn head(found: &Inspection) -> String {
    let Some(head) = &found.head else {
        return String::new();
    };
    let variant = head.variant().map_or("stages of no published head".into(), |v| {
        format!("stages of the {} head", v.name)
    });
    let widths: Vec<_> = head.widths().iter().map(ToString::to_string).collect();
    format!("{variant}, widths {}, bottleneck {}", widths.join("/"), head.bottleneck)
}

fn parameters(found: &Inspection) -> String {
    let mut parts: Vec<_> = found.parameters_by_part.iter().collect();
    parts.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let parts: Vec<_> = parts
        .into_iter()
        .take(PARTS_SHOWN)
        .map(|(part, count)| format!("{} {}", shown_name(part), short(*count)))
        .collect();
    let more = match found.parameters_by_part.len().saturating_sub(PARTS_SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more parts"),
    };
    format!("{} ({}{more})", short(found.parameters), parts.join(", "))
}

fn on_disk(found: &Inspection) -> String {
    let types = found.dtypes.iter();
    let types: Vec<_> = types
        .map(|(name, count)| format!("{name} {}", format_bytes(count.bytes)))
        .collect();
    format!(
        "{} in {} tensors ({})",
        format_bytes(found.bytes),
        found.tensors,
        types.join(", ")
    )
}

/// Kinds of weights of eight bits, each with its scales, and what marks them.
fn eight_bit(found: &EightBit) -> String {
    let kinds = found.kinds.iter().map(|kind| {
        let scales = match (kind.scale, kind.by_row) {
            (None, _) => "no scales".to_owned(),
            (Some(name), false) => format!("{} by tensor", name.end()),
            (Some(name), true) => format!("{} by row", name.end()),
        };
        let rotation = kind.rotation.map(|group| format!(", rotated by groups of {group}"));
        format!(
            "{} {} in {} tensors ({scales}{})",
            kind.dtype,
            format_bytes(kind.bytes),
            kind.tensors,
            rotation.unwrap_or_default()
        )
    });
    let inputs = found.input_scales.iter();
    let inputs = inputs.map(|(name, count)| format!("{count} {name}, not needed to read"));
    let marks = found.marks.iter().map(|mark| format!("marked by {mark}"));
    kinds.chain(inputs).chain(marks).collect::<Vec<_>>().join("; ")
}

fn part(part: &PartReport) -> String {
    let eight_bit = part.eight_bit.as_ref().map(|found| format!("; {}", eight_bit(found)));
    format!(
        "{} ({} parameters, {}{})",
        show(&part.path),
        short(part.parameters),
        format_bytes(part.bytes),
        eight_bit.unwrap_or_default()
    )
}

fn sampling(memory: &MemoryEstimate) -> String {
    let found = memory.sampling;
    let text = match found.text_encoder {
        0 => String::new(),
        bytes => format!(", before it text encoder {}", format_bytes(bytes)),
    };
    format!(
        "about {} of GPU memory at {}×{} (weights {}, activations {}{text})",
        format_bytes(found.peak),
        memory.width,
        memory.height,
        format_bytes(found.weights),
        format_bytes(found.activations),
    )
}

fn training(memory: &MemoryEstimate) -> String {
    let found = memory.training;
    format!(
        "about {} of GPU memory, batch 1 (weights {}, gradients {}, optimizer {}, activations {}; {} parameters trained)",
        format_bytes(found.peak),
        format_bytes(found.weights),
        format_bytes(found.gradients),
        format_bytes(found.optimizer),
        format_bytes(found.activations),
        short(found.trained_parameters)
    )
}

fn names(names: &[String]) -> String {
    let shown = names.iter().take(NAMES_SHOWN).map(|name| shown_name(name));
    let shown = shown.collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(NAMES_SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// A count with three digits: `6.16 G`.
fn short(count: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1_000_000_000, "G"), (1_000_000, "M"), (1000, "k")];
    match UNITS.into_iter().find(|(unit, _)| count >= *unit) {
        None => count.to_string(),
        Some((unit, name)) => {
            let value = count as f64 / unit as f64;
            let digits = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
            format!("{value:.digits$} {name}")
        }
    }
}
