//! The text encoder as a language model, against transformers' `generate`.

use l2p_engine::layers::MemoryParams;
use l2p_engine::model::config::TextConfig;
use l2p_engine::model::language::{Decoding, Feed, LanguageModel};
use l2p_engine::ops::sample_tokens::{TokenChoice, sample_tokens};
use l2p_engine::{Device, Result};
use l2p_tests::fixtures::{Case, Group};
use l2p_tests::{F32_TOLERANCE, Outcome, Suite, expect_like_cpu, relative_error};

use super::params;
use super::rounded;
use super::text::{config, read};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "models::language::cpu_writes_what_transformers_writes",
        cpu_equals_transformers,
    );
    suite.cpu(
        "models::language::texts_do_not_depend_on_their_neighbours",
        alone_as_together,
    );
    suite.cpu("models::language::steps_equal_a_whole_pass", steps_equal_a_whole_pass);
    suite.cpu("models::language::places_are_used_again", places_are_used_again);
    suite.cpu("models::language::mistakes_are_named", mistakes_are_named);
    suite.cuda("models::language::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda("models::language::cuda_replays_what_it_called", cuda_replays);
}

/// 1.4 times the tolerance of the encoder's features, which come out of a layer less.
const BF16_LOGITS_TOLERANCE: f64 = 1.5e-2;

/// The parameters of a case, with its scale of embeddings.
fn parameters(case: &Case<'_>) -> MemoryParams {
    let mut params = params(case);
    let scale = case.config(&["embedding_scale"]).as_f64().expect("a number") as f32;
    let table = params
        .0
        .get_mut("model.embed_tokens.weight")
        .expect("it has embeddings");
    table.1.iter_mut().for_each(|value| *value *= scale);
    params
}

fn model(case: &Case<'_>) -> Result<LanguageModel> {
    LanguageModel::load(&parameters(case), &Device::Cpu, &read(&config(case))?, &mut |_, _| {
        Ok(())
    })
}

fn prompts(case: &Case<'_>) -> Vec<Vec<u32>> {
    let ids = |index: usize| case.input(&format!("ids_{index}")).0;
    (0..5)
        .map(|index| ids(index).into_iter().map(|id| id as u32).collect())
        .collect()
}

/// Reads all of each prompt but its last token.
fn read_prompts(decoding: &mut Decoding<'_>, prompts: &[Vec<u32>]) -> Result<()> {
    let texts = prompts.iter().enumerate().filter(|(_, prompt)| prompt.len() > 1);
    let texts: Vec<(usize, &[u32])> = texts
        .map(|(slot, prompt)| (slot, &prompt[..prompt.len() - 1]))
        .collect();
    decoding.read(&texts)
}

/// What is written behind each prompt, all at a time, and the logits of each text's tokens.
fn written(model: &LanguageModel, prompts: &[Vec<u32>], count: usize) -> Result<Vec<(Vec<u32>, Vec<f32>)>> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let mut decoding = Decoding::new(model, prompts.len(), longest + count)?;
    read_prompts(&mut decoding, prompts)?;
    let mut texts = prompts.to_vec();
    let mut found = vec![(Vec::new(), Vec::new()); prompts.len()];
    for _ in 0..count {
        let feed = |text: &Vec<u32>| {
            let (token, position) = (*text.last()?, text.len() - 1);
            Some(Feed { token, position })
        };
        let feeds: Vec<Option<Feed>> = texts.iter().map(feed).collect();
        let logits = decoding.step(&feeds)?;
        let tokens = sample_tokens(&logits, &vec![TokenChoice::GREEDY; prompts.len()], None)?.to_vec::<i32>()?;
        for (slot, (text, found)) in texts.iter_mut().zip(&mut found).enumerate() {
            text.push(tokens[slot] as u32);
            found.0.push(tokens[slot] as u32);
            found.1.extend(logits.narrow(slot, 1)?.to_vec::<f32>()?);
        }
    }
    Ok(found)
}

fn cpu_equals_transformers() -> Outcome {
    let group = Group::load("language");
    for case in group.cases("") {
        let (model, count) = (model(&case)?, case.size(&["count"]));
        let found = written(&model, &prompts(&case), count)?;
        for (index, (tokens, logits)) in found.into_iter().enumerate() {
            let tokens: Vec<f32> = tokens.into_iter().map(|token| token as f32).collect();
            assert_eq!(
                tokens,
                case.stored(&format!("tokens_{index}")),
                "{}, prompt {index}",
                case.name()
            );
            case.check(&format!("logits_{index}"), &logits)?;
        }
    }
    Ok(())
}

fn alone_as_together() -> Outcome {
    let group = Group::load("language");
    let case = group.case("own_head");
    let (model, prompts) = (model(&case)?, prompts(&case));
    let together = written(&model, &prompts, 12)?;
    for (prompt, (tokens, logits)) in prompts.iter().zip(together) {
        let alone = written(&model, std::slice::from_ref(prompt), 12)?.remove(0);
        assert_eq!(alone.0, tokens);
        assert!(relative_error(&alone.1, &logits) < F32_TOLERANCE);
    }
    Ok(())
}

/// The logits behind a text that was fed token by token are those behind the same text read at once.
fn steps_equal_a_whole_pass() -> Outcome {
    let group = Group::load("language");
    let case = group.case("tied");
    let (model, text) = (model(&case)?, prompts(&case).swap_remove(3));
    let mut decoding = Decoding::new(&model, 2, text.len())?;
    decoding.read(&[(1, &text[..text.len() - 1])])?;
    let mut last = Vec::new();
    for (position, &token) in text.iter().enumerate() {
        let feed = Some(Feed { token, position });
        // The place that was read joins at the last token.
        let other = feed.filter(|_| position + 1 == text.len());
        last = decoding.step(&[feed, other])?.to_vec::<f32>()?;
    }
    let (fed, whole) = last.split_at(last.len() / 2);
    assert!(
        relative_error(fed, whole) < F32_TOLERANCE,
        "{:e}",
        relative_error(fed, whole)
    );
    Ok(())
}

fn places_are_used_again() -> Outcome {
    let group = Group::load("language");
    let case = group.case("own_head");
    let (model, prompts) = (model(&case)?, prompts(&case));
    let expected = written(&model, &prompts[1..2], 1)?.remove(0).1;
    let mut decoding = Decoding::new(&model, 1, 64)?;
    // A longer text stood there before.
    for prompt in [&prompts[3], &prompts[1]] {
        read_prompts(&mut decoding, std::slice::from_ref(prompt))?;
        let (token, position) = (prompt[prompt.len() - 1], prompt.len() - 1);
        let found = decoding.step(&[Some(Feed { token, position })])?.to_vec::<f32>()?;
        assert_eq!(relative_error(&found, &expected) < F32_TOLERANCE, prompt == &prompts[1]);
    }
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    let group = Group::load("language");
    for case in group.cases("") {
        let mut params = parameters(&case);
        params.0.values_mut().for_each(|(_, values)| *values = rounded(values));
        let (config, prompts) = (read(&config(&case))?, prompts(&case));
        // Every number of rows that has a kernel of its own, fed what transformers wrote.
        for slots in [1, 5, 11, 20] {
            let what = format!("{} with {slots} places", case.name());
            expect_like_cpu(&what, device, BF16_LOGITS_TOLERANCE, |device| {
                let model = LanguageModel::load(&params, device, &config, &mut |_, _| Ok(()))?;
                let mut decoding = Decoding::new(&model, slots, 64)?;
                let texts: Vec<Vec<u32>> = (0..slots).map(|slot| prompts[slot % 5].clone()).collect();
                read_prompts(&mut decoding, &texts)?;
                let mut found = Vec::new();
                for step in 0..6 {
                    let feed = |(slot, text): (usize, &Vec<u32>)| {
                        let said = case.stored(&format!("tokens_{}", slot % 5));
                        let position = text.len() - 1 + step;
                        let token = if step == 0 {
                            text[position]
                        } else {
                            said[step - 1] as u32
                        };
                        Some(Feed { token, position })
                    };
                    let feeds: Vec<Option<Feed>> = texts.iter().enumerate().map(feed).collect();
                    found.push(decoding.step(&feeds)?.into_unshared()?);
                }
                Ok(found)
            })?;
        }
    }
    Ok(())
}

/// The first step runs call by call, the second is recorded, the third replayed: of one feed all give the same bits. Then steps that
/// are replayed with other feeds are those that a new recording gives.
fn cuda_replays(device: &Device) -> Outcome {
    let group = Group::load("language");
    let case = group.case("tied");
    let model = LanguageModel::load(&parameters(&case), device, &read(&config(&case))?, &mut |_, _| Ok(()))?;
    let text = prompts(&case).swap_remove(3);
    let mut first = Decoding::new(&model, 2, 64)?;
    let feed = |decoding: &mut Decoding<'_>, position: usize| -> Result<Vec<u32>> {
        let token = text[position];
        let logits = decoding.step(&[Some(Feed { token, position }), None])?.narrow(0, 1)?;
        Ok(logits.to_vec::<f32>()?.into_iter().map(f32::to_bits).collect())
    };
    let called = feed(&mut first, 0)?;
    for _ in 0..3 {
        assert!(feed(&mut first, 0)? == called);
    }
    let replayed: Vec<Vec<u32>> = (1..30)
        .map(|position| feed(&mut first, position))
        .collect::<Result<_>>()?;
    let mut second = Decoding::new(&model, 2, 64)?;
    let again: Vec<Vec<u32>> = (0..30)
        .map(|position| feed(&mut second, position))
        .collect::<Result<_>>()?;
    assert!(again[0] == called && again[1..] == replayed);
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let group = Group::load("language");
    let case = group.case("tied");
    let (config, model) = (read(&config(&case))?, model(&case)?);
    for (slots, capacity) in [(0, 8), (33, 8), (1, 0)] {
        let message = Decoding::new(&model, slots, capacity)
            .err()
            .map(|error| error.to_string());
        let message = message.unwrap_or_default();
        assert!(message.contains("1 to 32 of at least one can"), "{message}");
    }
    let mut decoding = Decoding::new(&model, 2, 3)?;
    let message = decoding.read(&[(0, &[1, 2, 3, 4])]).unwrap_err().to_string();
    assert_eq!(
        message,
        "a prompt of 4 tokens does not fit the 3 that there is room for"
    );
    let message = decoding.read(&[(2, &[1])]).unwrap_err().to_string();
    assert_eq!(message, "there is no place 2 among 2");
    let message = decoding.read(&[(0, &[1, 300])]).unwrap_err().to_string();
    assert!(message.contains("token 300 is not in a vocabulary of 300"), "{message}");
    let feed = |token, position| Some(Feed { token, position });
    let mut step = |feeds: &[Option<Feed>]| {
        decoding
            .step(feeds)
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    };
    assert_eq!(step(&[None]), "1 tokens for 2 places");
    assert_eq!(
        step(&[None, feed(1, 3)]),
        "a text's token 4 does not fit the 3 that there is room for"
    );
    assert!(step(&[feed(300, 0), None]).contains("token 300 is not in a vocabulary of 300"));
    assert_eq!(step(&[None, feed(1, 2)]), "");

    let load = |params: &MemoryParams, config: &TextConfig| {
        let outcome = LanguageModel::load(params, &Device::Cpu, config, &mut |_, _| Ok(()));
        outcome.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let mut cut = parameters(&case);
    cut.0.remove("model.norm.weight");
    let message = load(&cut, &config);
    assert!(
        message.contains("has no `model.norm.weight`") && message.contains("name a source"),
        "{message}"
    );
    let none = TextConfig {
        layers: 0,
        ..config.clone()
    };
    assert!(load(&parameters(&case), &none).contains("without layers"));
    Ok(())
}
