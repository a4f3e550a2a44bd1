//! Checking prompts: cheap rules first, then a language model as auditor. Verdicts are added, never taken away, and no prompt is deleted.

use std::collections::BTreeMap;
use std::path::PathBuf;

use l2p_engine::files::FolderLock;
use l2p_engine::{Error, shown_name};
use serde::Serialize;
use serde_json::json;

use super::answers;
use super::ask;
use super::dice::hash;
use super::folder::{self, Check, Journal, Manifest, Prompt};
use super::language::{LanguageModel, Request};
use super::rules::Rules;
use crate::progress::PhaseBar;
use crate::stop_requested;

/// Who judged where no language model did.
const RULES: &str = "rules";

/// Prompts whose verdicts are written together.
const CHUNK: usize = 64;

/// What is to be checked.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The folder.
    pub out: PathBuf,
    /// The cheap rules.
    pub rules: Rules,
    /// How often an auditor is asked whose answer is no verdict.
    pub attempts: usize,
    /// Whether what has a verdict gets another.
    pub again: bool,
    /// Of the auditor's draws.
    pub seed: u64,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// Who judged what the rules let pass.
    pub auditor: Option<String>,
    /// Prompts in the folder.
    pub prompts: usize,
    /// Those that this run judged.
    pub checked: usize,
    /// Those that may be used.
    pub valid: usize,
    /// Those that may not, by rule.
    pub rejects: BTreeMap<String, usize>,
    /// Tokens of the auditor's answers, where it counts them.
    pub tokens: usize,
}

/// Judges the prompts of a folder that have no verdict yet.
///
/// # Errors
/// When another run holds the folder, it holds no prompts, a file is damaged, or the auditor cannot be asked.
pub fn check(plan: &Plan, model: &mut dyn LanguageModel, bar: &mut PhaseBar) -> anyhow::Result<Outcome> {
    let _lock = FolderLock::acquire(&plan.out, "l2p-data")?;
    let prompts = folder::prompts(&plan.out)?;
    let path = plan.out.join(folder::CHECKS);
    let (mut journal, checks) = Journal::open::<Check>(&path)?;
    let mut verdicts = folder::by_prompt(&path, checks, prompts.len())?;
    let judges = model.judges();
    let is_open = |verdict: &Option<Check>| match verdict {
        None => true,
        // What the rules let pass is for the auditor, where there is one now.
        Some(check) => {
            plan.again || judges && check.is_valid && check.by == RULES || judges && check.rule == "undecided"
        }
    };
    let open: Vec<usize> = (0..prompts.len()).filter(|&id| is_open(&verdicts[id])).collect();
    let mut outcome = Outcome {
        auditor: judges.then(|| model.name()),
        prompts: prompts.len(),
        checked: open.len(),
        ..Outcome::default()
    };
    let (mut done, total) = (prompts.len() - open.len(), prompts.len());
    let mut judging = || -> anyhow::Result<()> {
        for chunk in open.chunks(CHUNK) {
            bar.show("checking prompts", done as u64, total as u64);
            let part: Vec<&Prompt> = chunk.iter().map(|&id| &prompts[id]).collect();
            let found = judge(plan, &part, model, bar, &mut outcome.tokens)?;
            journal.append(&found)?;
            for check in found {
                let id = check.id;
                verdicts[id] = Some(check);
            }
            done += chunk.len();
            bar.show("checking prompts", done as u64, total as u64);
        }
        Ok(())
    };
    let judged = judging();
    bar.clear();
    for check in verdicts.iter().flatten() {
        match check.is_valid {
            true => outcome.valid += 1,
            false => *outcome.rejects.entry(check.rule.clone()).or_default() += 1,
        }
    }
    let mut manifest = Manifest::open(&plan.out)?;
    let before = manifest.stage("check").and_then(|stage| stage["tokens"].as_u64());
    let mut results = serde_json::to_value(&outcome)?;
    // What is of this run alone says nothing about the folder.
    results.as_object_mut().map(|results| results.remove("checked"));
    results["tokens"] = json!(outcome.tokens as u64 + before.unwrap_or(0));
    results["unwanted_terms"] = json!(plan.rules.unwanted.len());
    manifest.finish("check", results)?;
    judged?;
    Ok(outcome)
}

/// Verdicts on some prompts, in their order.
fn judge(
    plan: &Plan,
    prompts: &[&Prompt],
    model: &mut dyn LanguageModel,
    bar: &PhaseBar,
    tokens: &mut usize,
) -> anyhow::Result<Vec<Check>> {
    if stop_requested() {
        return Err(Error::Interrupted.into());
    }
    let mut checks: Vec<Check> = prompts.iter().map(|prompt| by_rules(&plan.rules, prompt)).collect();
    if !model.judges() {
        return Ok(checks);
    }
    let mut open: Vec<usize> = (0..checks.len()).filter(|&index| checks[index].is_valid).collect();
    let name = model.name();
    for attempt in 0..plan.attempts.max(1) {
        let requests: Vec<Request> = open
            .iter()
            .map(|&index| {
                let prompt = prompts[index];
                let seed = hash(plan.seed, format!("verdict {} attempt {attempt}", prompt.id).as_bytes());
                ask::for_verdict(&prompt.prompt, prompt.language, prompt.renders_text, seed)
            })
            .collect();
        let (mut left, mut done) = (Vec::new(), 0);
        model.answer(&requests, &mut |number, answer| {
            let index = open[number];
            let verdict = answer.and_then(|answer| {
                *tokens += answer.tokens;
                answers::verdict(&answer.text)
                    .map_err(|reason| format!("the answer {reason}: {}", shown_name(&answer.text)))
            });
            let check = &mut checks[index];
            check.by = name.clone();
            match verdict {
                Ok(verdict) => {
                    check.is_valid = verdict.is_valid;
                    check.rule = if verdict.is_valid {
                        String::new()
                    } else {
                        "auditor".into()
                    };
                    check.reason = verdict.reason;
                }
                Err(reason) => {
                    check.is_valid = false;
                    check.rule = "undecided".into();
                    check.reason = format!("no verdict: {reason}");
                    left.push(index);
                }
            }
            done += 1;
            bar.detail(format!(", answer {done} of {}", requests.len()));
            match stop_requested() {
                true => Err(Error::Interrupted.into()),
                false => Ok(()),
            }
        })?;
        left.sort_unstable();
        open = left;
        if open.is_empty() {
            break;
        }
    }
    Ok(checks)
}

/// What the cheap rules say.
fn by_rules(rules: &Rules, prompt: &Prompt) -> Check {
    let fault = rules.fault(&prompt.prompt, prompt.language, prompt.renders_text);
    Check {
        id: prompt.id,
        is_valid: fault.is_none(),
        rule: fault.as_ref().map(|fault| fault.rule.to_owned()).unwrap_or_default(),
        reason: fault.map(|fault| fault.reason).unwrap_or_default(),
        by: RULES.into(),
    }
}
