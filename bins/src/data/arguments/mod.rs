//! The command line of `l2p-data`.

mod drawing;
mod writing;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use l2p_engine::limits::Pictures;

pub use drawing::{DrawFlags, Format};
pub use writing::{CheckFlags, EncoderFlags, LanguageFlags, Opened, PromptFlags, Source};

use crate::launch::RANKS_HELP;
use crate::score::Score;

const ABOUT: &str = "\
Makes data sets for training without any real picture: prompts from a taxonomy, checked, then drawn by a model.

The stages work in one folder, each goes on where it was interrupted, and all of them in a row are `l2p-data all`.";

/// Makes data sets for training, and scores pictures.
#[derive(Parser, Clone, Debug)]
#[command(name = "l2p-data", version, long_version = crate::long_version(), long_about = ABOUT)]
pub struct Arguments {
    /// What to make.
    #[command(subcommand)]
    pub command: Command,
}

/// What `l2p-data` makes.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// All stages in a row: prompts, check, pictures, report
    All(Box<All>),
    /// Show what pictures can show, or have a language model extend it
    Taxonomy(Box<TaxonomyArguments>),
    /// Have prompts written, balanced over the taxonomy
    Prompts(Box<Prompts>),
    /// Judge the prompts of a folder
    Check(Box<Check>),
    /// Have a model draw many prompts, into a folder that l2p-train reads
    Synthesize(Box<Synthesize>),
    /// Make an HTML page of a folder: counts, rejects, pictures
    Report(Box<Report>),
    /// Score pictures: likeness, distances of features, tables of what other programs found
    Score(Box<Score>),
}

const ALL_EXAMPLES: &str = "\
Examples:
  l2p-data all --model models/demo/source --count 64 --out data/
  l2p-data all --model z-image --count 10000 --per-prompt 2 --out data/ --languages en,zh \\
    --llm-url http://localhost:8000 --llm-model qwen3-4b --gpus 8
  l2p-train --config models/demo/train.toml --data data/ --cache data/cache --out runs/first

Interrupted at any place, it goes on when the same command is given again.";

/// All stages in a row.
#[derive(Args, Clone, Debug)]
#[command(after_help = ALL_EXAMPLES, after_long_help = format!("{ALL_EXAMPLES}\n\n{RANKS_HELP}"))]
pub struct All {
    /// Prompts in the end
    #[arg(long, value_name = "N", default_value = "64", allow_negative_numbers = true)]
    pub count: Pictures,
    /// Pictures of each prompt, each with a seed of its own
    #[arg(long, value_name = "K", default_value = "1", allow_negative_numbers = true)]
    pub per_prompt: Pictures,
    /// The folder
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Seed of everything that is drawn: subjects, words, noise
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true, value_parser = crate::prompts::seed)]
    pub seed: u64,
    /// Print the results as one JSON object
    #[arg(long)]
    pub json: bool,
    /// How prompts are written.
    #[command(flatten)]
    pub prompts: PromptFlags,
    /// How they are checked.
    #[command(flatten)]
    pub check: CheckFlags,
    /// Who writes and judges.
    #[command(flatten)]
    pub language: LanguageFlags,
    /// How pictures are drawn.
    #[command(flatten)]
    pub draw: DrawFlags,
}

const TAXONOMY_EXAMPLES: &str = "\
Examples:
  l2p-data taxonomy                                  classes and sub-classes, with counts
  l2p-data taxonomy --format table | grep food       a category a line
  l2p-data taxonomy --format json > mine.json        to edit; then --taxonomy mine.json
  l2p-data taxonomy --expand 20 --llm-url http://localhost:8000 --llm-model qwen3-4b
  l2p-data taxonomy --expand 20 --llm-url … --llm-model … --write mine.json

--expand shows what it would add; only --write or --yes writes. Answers are kept, so that showing first and writing then costs
one round of questions.";

/// The taxonomy.
#[derive(Args, Clone, Debug)]
#[command(after_help = TAXONOMY_EXAMPLES)]
pub struct TaxonomyArguments {
    /// A taxonomy of your own, as --format json writes one [default: the program's]
    #[arg(long, value_name = "FILE")]
    pub taxonomy: Option<PathBuf>,
    /// How it is shown
    #[arg(long, value_enum, default_value_t = Shown::Summary)]
    pub format: Shown,
    /// Only these classes or sub-classes, such as people or nature/food
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Ask a language model for so many more categories of each sub-class
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub expand: Option<Pictures>,
    /// With --expand: write the taxonomy with what was added to this file
    #[arg(long, value_name = "FILE", requires = "expand")]
    pub write: Option<PathBuf>,
    /// With --expand: write it to the file of --taxonomy, in place
    #[arg(long, requires = "expand", requires = "taxonomy", conflicts_with = "write")]
    pub yes: bool,
    /// Of the model's draws
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true, value_parser = crate::prompts::seed)]
    pub seed: u64,
    /// Who is asked.
    #[command(flatten)]
    pub language: LanguageFlags,
    /// Whose text encoder it may be.
    #[command(flatten)]
    pub encoder: EncoderFlags,
}

/// How a taxonomy is shown.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// Classes and sub-classes with counts
    Summary,
    /// All categories below their sub-classes
    Tree,
    /// A category a line, columns parted by tabs
    Table,
    /// The file's own format
    Json,
}

const PROMPTS_EXAMPLES: &str = "\
Examples:
  l2p-data prompts --count 1000 --out data/          by grammar, without a language model
  l2p-data prompts --count 10000 --out data/ --model z-image       by the text encoder of a source
  l2p-data prompts --count 10000 --out data/ --languages en,zh \\
    --llm-url http://localhost:8000 --llm-model qwen3-4b

Given again it goes on; with a larger --count the same folder grows. Nothing that was paid for is asked twice: answers are kept
in the folder.";

/// Writing prompts.
#[derive(Args, Clone, Debug)]
#[command(after_help = PROMPTS_EXAMPLES)]
pub struct Prompts {
    /// Prompts in the end
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub count: Pictures,
    /// The folder
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Of the subjects and the model's draws
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true, value_parser = crate::prompts::seed)]
    pub seed: u64,
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
    /// How prompts are written.
    #[command(flatten)]
    pub prompts: PromptFlags,
    /// Who writes.
    #[command(flatten)]
    pub language: LanguageFlags,
    /// Whose text encoder it may be.
    #[command(flatten)]
    pub encoder: EncoderFlags,
}

/// Checking prompts.
#[derive(Args, Clone, Debug)]
pub struct Check {
    /// The folder
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Judge all prompts again; the last verdict counts
    #[arg(long)]
    pub again: bool,
    /// Of the auditor's draws
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true, value_parser = crate::prompts::seed)]
    pub seed: u64,
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
    /// How prompts are checked.
    #[command(flatten)]
    pub check: CheckFlags,
    /// Who judges.
    #[command(flatten)]
    pub language: LanguageFlags,
    /// Whose text encoder it may be.
    #[command(flatten)]
    pub encoder: EncoderFlags,
}

/// The page of a folder.
#[derive(Args, Clone, Debug)]
pub struct Report {
    /// The folder
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Where the page goes [default: report.html in the folder]
    #[arg(long, value_name = "FILE")]
    pub write: Option<PathBuf>,
    /// Pictures on the contact sheet, spread evenly over the set
    #[arg(long, value_name = "N", default_value = "600", allow_negative_numbers = true)]
    pub pictures: Pictures,
    /// Print the numbers of the page as one JSON object
    #[arg(long)]
    pub json: bool,
}

const LONG_ABOUT: &str = "\
Has a model draw many prompts, into a folder that l2p-train reads: pictures, and metadata.jsonl and metadata.csv with the \
name, prompt and seed of each. The features of the prompts go to a cache, so that training does not encode them again.

A run that was interrupted goes on where it stopped when the same command is given again. Given a larger --count, the \
same folder grows. Pictures that are damaged or gone by then are drawn again. One run at a time writes into a folder.";

const EXAMPLES: &str = "\
Examples:
  l2p-data synthesize --model models/demo/source --prompts prompts.jsonl --count 2 --out synthetic
  l2p-data synthesize --model z-image --prompts prompts.jsonl --out synthetic --gpus 8    GPUs draw in turn
  l2p-data synthesize --model z-image --per-prompt 2 --out data    the prompts that l2p-data check let pass
  l2p-train --config models/demo/train.toml --data synthetic --cache synthetic/cache --out runs/first

A line of --prompts is a JSON object: {\"prompt\": \"...\", \"seed\": 1}, the seed optional; other keys are ignored.";

/// Drawing a data set.
#[derive(Args, Clone, Debug)]
#[command(long_about = LONG_ABOUT, after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{RANKS_HELP}"))]
pub struct Synthesize {
    /// A file with one JSON object per line [default: the checked prompts of --out]
    #[arg(long, value_name = "FILE.jsonl")]
    pub prompts: Option<PathBuf>,
    /// Pictures per prompt, each with a seed of its own
    #[arg(
        long,
        visible_alias = "per-prompt",
        value_name = "N",
        default_value = "1",
        allow_negative_numbers = true
    )]
    pub count: Pictures,
    /// Use only the first so many prompts
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub limit: Option<Pictures>,
    /// The folder
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Seed of the first picture's noise; each further picture takes the next
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true, value_parser = crate::prompts::seed)]
    pub seed: u64,
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
    /// How pictures are drawn.
    #[command(flatten)]
    pub draw: DrawFlags,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
