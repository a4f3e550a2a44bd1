//! Answers of a language model with random weights, through the demo's tokenizer and its template.

use std::collections::BTreeMap;
use std::path::PathBuf;

use l2p_engine::checkpoint::{ModelPaths, PathOverrides};
use l2p_engine::layers::{MemoryParams, metas};
use l2p_engine::model::config::TextConfig;
use l2p_engine::model::language::LanguageModel;
use l2p_engine::pipeline::generator::{
    Completion, Finish, Generator, LanguageFiles, Progress, Question, SamplingOptions,
};
use l2p_engine::text::json::{JsonKind, JsonShape};
use l2p_engine::text::{Conversation, PromptTokenizer, Vocabulary};
use l2p_engine::{Device, Result};
use l2p_tests::fixtures::generated_weight;
use l2p_tests::{Outcome, Suite, models_folder};
use serde_json::Value;

pub fn register(suite: &mut Suite) {
    suite.cpu("generate::the_demo_is_no_language_model", the_demo_is_refused);
    suite.cpu("generate::the_template_has_a_system_and_no_thoughts", template);
    suite.cpu("generate::every_token_stands_for_bytes", tokens_stand_for_bytes);
    suite.cpu("generate::ids_without_end_are_refused", ids_without_end);
    suite.cpu(
        "generate::answers_have_their_shape_whatever_the_weights",
        answers_have_their_shape,
    );
    suite.cpu("generate::draws_follow_from_the_seed", draws_follow_from_the_seed);
    suite.cpu("generate::answers_end", answers_end);
    suite.cpu("generate::templates_that_make_nothing_are_named", nothing_to_answer);
    suite.cpu("generate::questions_take_places_in_turn", questions_take_places_in_turn);
    suite.cpu("generate::mistakes_are_named", mistakes_are_named);
    suite.cuda("generate::cuda_answers_have_their_shape", cuda_answers_have_their_shape);
    suite.cuda(
        "generate::cuda_draws_follow_from_the_seed",
        cuda_draws_follow_from_the_seed,
    );
}

fn source() -> PathBuf {
    models_folder().join("demo/source")
}

fn tokenizer() -> Result<PromptTokenizer> {
    PromptTokenizer::open(&source().join("tokenizer"))
}

/// Random weights, with logits that are `sharp` times as far apart as they come.
fn generator(device: &Device, seed: u64, sharp: f32) -> Result<Generator> {
    generator_of(device, seed, sharp, tokenizer()?)
}

/// The same, with another tokenizer.
fn generator_of(device: &Device, seed: u64, sharp: f32, tokenizer: PromptTokenizer) -> Result<Generator> {
    let config = TextConfig {
        vocabulary: 4096,
        dim: 64,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 128,
        ffn_hidden: 96,
        ..TextConfig::published()
    };
    let described = LanguageModel::describe(&config, "", true)?;
    let parts = metas(&described).into_iter().flat_map(|meta| meta.parts.clone());
    let params: BTreeMap<_, _> = parts
        .map(|part| {
            let scale = if part.name == "lm_head.weight" { sharp } else { 1.0 };
            let values = generated_weight(&part.name, &part.shape, seed).into_iter();
            let values: Vec<f32> = values
                .map(|value| half::bf16::from_f32(value * scale).to_f32())
                .collect();
            (part.name, (part.shape, values))
        })
        .collect();
    let params = MemoryParams(params.into_iter().collect());
    let model = LanguageModel::load(&params, device, &config, &mut |_, _| Ok(()))?;
    Generator::of(tokenizer, model)
}

/// A chat template that leaves nothing of a conversation.
fn nothing_to_answer() -> Outcome {
    let folder = tempfile::tempdir()?;
    let tokenizer = source().join("tokenizer");
    std::fs::copy(tokenizer.join("tokenizer.json"), folder.path().join("tokenizer.json"))?;
    let config = std::fs::read_to_string(tokenizer.join("tokenizer_config.json"))?;
    let mut config: Value = serde_json::from_str(&config)?;
    config["chat_template"] = Value::from("{# nothing #}");
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string())?;
    let generator = generator_of(&Device::Cpu, 3, 1.0, PromptTokenizer::open(folder.path())?)?;
    let message = generator.tokens(&ask("pizza")).unwrap_err().to_string();
    assert!(message.contains("make no token of the conversation"), "{message}");
    Ok(())
}

fn ask(user: &str) -> Conversation {
    Conversation {
        system: Some("Answer in one list.".into()),
        user: user.into(),
    }
}

fn quiet(_: Progress) -> Result<()> {
    Ok(())
}

fn the_demo_is_refused() -> Outcome {
    let paths = ModelPaths::resolve(&source(), &PathOverrides::default())?;
    let message = LanguageFiles::open(&paths, &Device::Cpu).unwrap_err().to_string();
    assert!(
        message.contains("text_encoder")
            && message.contains("is no language model")
            && message.contains("name a source whose"),
        "{message}"
    );
    Ok(())
}

fn template() -> Outcome {
    let tokenizer = tokenizer()?;
    let ids = tokenizer.encode_conversation(&ask("pizza"))?;
    let ends = Vocabulary::of(&tokenizer)?.ends().to_vec();
    assert_eq!(ids.iter().filter(|id| ends.contains(id)).count(), 2, "{ids:?}");
    // What is no special token, put together again.
    let text = Vocabulary::of(&tokenizer)?.text(&ids);
    assert_eq!(
        text,
        "system\nAnswer in one list.\nuser\npizza\nassistant\n<think>\n\n</think>\n\n"
    );
    let short = Conversation {
        system: None,
        user: "pizza".into(),
    };
    assert!(tokenizer.encode_conversation(&short)?.len() < ids.len());
    let long = ask(&"x".repeat(1 << 17));
    let message = tokenizer.encode_conversation(&long).unwrap_err().to_string();
    assert!(message.contains("more than the 65536"), "{message}");
    // A prompt of a caption still thinks.
    assert!(!tokenizer.render("pizza")?.contains("</think>"));
    Ok(())
}

fn tokens_stand_for_bytes() -> Outcome {
    let tokenizer = tokenizer()?;
    let vocabulary = Vocabulary::of(&tokenizer)?;
    for text in ["a slice of pizza", "日本 🎈 é\n\t\"quoted\"", "<tag> & \\"] {
        let conversation = Conversation {
            system: None,
            user: text.into(),
        };
        let said = vocabulary.text(&tokenizer.encode_conversation(&conversation)?);
        assert_eq!(said, format!("user\n{text}\nassistant\n<think>\n\n</think>\n\n"));
    }
    assert_eq!(vocabulary.bytes(u32::MAX), None);
    assert!(vocabulary.ends().len() >= 2);
    Ok(())
}

/// An id costs no memory before it is known to be one.
fn ids_without_end() -> Outcome {
    let folder = tempfile::tempdir()?;
    let own = source().join("tokenizer");
    for entry in std::fs::read_dir(&own)? {
        let entry = entry?;
        std::fs::copy(entry.path(), folder.path().join(entry.file_name()))?;
    }
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().ok_or("no vocabulary")?;
    let last = vocabulary
        .iter()
        .max_by_key(|(_, id)| id.as_u64())
        .map(|(token, _)| token.clone());
    vocabulary.insert(last.ok_or("no token")?, serde_json::json!(u32::MAX - 1));
    std::fs::write(&path, tokenizer.to_string())?;
    let message = Vocabulary::of(&PromptTokenizer::open(folder.path())?)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("has the id 4294967294; ids lie below 4194304"),
        "{message}"
    );
    Ok(())
}

/// Whether a text is an answer of the shape, by another reader.
fn has_shape(shape: &JsonShape, text: &str) -> bool {
    let Ok(value) = serde_json::from_str::<Value>(text) else {
        return false;
    };
    let fits = |value: &Value, characters: &std::ops::RangeInclusive<u32>| {
        let text = value.as_str();
        text.is_some_and(|text| characters.contains(&(text.chars().count() as u32)))
    };
    match shape {
        JsonShape::Texts { count, characters } => value
            .as_array()
            .is_some_and(|list| count.contains(&(list.len() as u32)) && list.iter().all(|text| fits(text, characters))),
        JsonShape::Object(entries) => value.as_object().is_some_and(|object| {
            let each = entries.iter().all(|(key, kind)| match (kind, object.get(key)) {
                (JsonKind::Flag, Some(value)) => value.is_boolean(),
                (JsonKind::Text(characters), Some(value)) => fits(value, characters),
                _ => false,
            });
            each && object.len() == entries.len()
        }),
    }
}

fn shapes() -> Vec<JsonShape> {
    let texts = |count, characters| JsonShape::Texts { count, characters };
    let reason = ("reason".to_owned(), JsonKind::Text(0..=40));
    vec![
        texts(3..=3, 1..=20),
        texts(0..=2, 5..=5),
        texts(1..=4, 0..=200),
        JsonShape::Object(vec![("is_valid".into(), JsonKind::Flag), reason]),
    ]
}

fn answers_have_their_shape() -> Outcome {
    shaped_on(&Device::Cpu, 3)
}

fn cuda_answers_have_their_shape(device: &Device) -> Outcome {
    shaped_on(device, 8)
}

fn shaped_on(device: &Device, seeds: u64) -> Outcome {
    let mut finished = 0;
    for seed in 0..seeds {
        let generator = generator(device, seed, [0.1, 1.0, 6.0][seed as usize % 3])?;
        let questions: Vec<Question> = shapes()
            .into_iter()
            .flat_map(|shape| {
                [(0.0, 400), (1.0, 400), (2.0, 30), (1.0, 29)]
                    .map(|(temperature, most)| (shape.clone(), temperature, most))
            })
            .enumerate()
            .map(|(stream, (shape, temperature, max_tokens))| Question {
                conversation: ask("pizza"),
                options: SamplingOptions {
                    temperature,
                    top_p: 1.0,
                    top_k: 0,
                    seed,
                    max_tokens,
                    shape: Some(shape),
                },
                stream: stream as u64,
            })
            .collect();
        let mut take = |index: usize, answer: Result<Completion>| {
            let (answer, options) = (answer?, &questions[index].options);
            let shape = options.shape.as_ref().expect("all have one");
            assert!(answer.tokens <= options.max_tokens);
            // The longest of the shortest answers, a verdict without a reason, has 29 bytes.
            assert_eq!(answer.finish, Finish::Stop, "{shape:?}: {}", answer.text);
            assert!(has_shape(shape, &answer.text), "{shape:?}: {}", answer.text);
            finished += 1;
            Ok(())
        };
        generator.answer(&questions, &mut take, &mut quiet)?;
    }
    assert_eq!(finished, seeds as usize * 16);
    // An answer that needs more than it may have is cut, and says so.
    let options = SamplingOptions {
        max_tokens: 6,
        shape: Some(shapes().swap_remove(0)),
        ..SamplingOptions::default()
    };
    let cut = generator(device, 0, 1.0)?.generate(&[ask("pizza")], &options, &mut quiet)?;
    assert_eq!((cut[0].finish, cut[0].tokens), (Finish::Length, 6));
    assert!(cut[0].text.starts_with("[\""), "{}", cut[0].text);
    Ok(())
}

fn draws_follow_from_the_seed() -> Outcome {
    let generator = generator(&Device::Cpu, 1, 3.0)?;
    let options = |seed| SamplingOptions {
        temperature: 1.0,
        top_p: 0.9,
        top_k: 200,
        seed,
        max_tokens: 12,
        shape: None,
    };
    let all = ["pizza", "a longer question than the others are", "tea", "x"].map(ask);
    let first = generator.generate(&all, &options(5), &mut quiet)?;
    assert_eq!(first, generator.generate(&all, &options(5), &mut quiet)?);
    assert_ne!(first, generator.generate(&all, &options(6), &mut quiet)?);
    // The same question again draws something else; by itself an answer is what it is among others.
    let twice = generator.generate(&[ask("pizza"), ask("pizza")], &options(5), &mut quiet)?;
    assert_ne!(twice[0], twice[1]);
    for (index, conversation) in all.iter().enumerate() {
        let question = Question {
            conversation: conversation.clone(),
            options: options(5),
            stream: index as u64,
        };
        let mut alone = None;
        let mut take = |_: usize, answer: Result<Completion>| {
            alone = Some(answer?);
            Ok(())
        };
        generator.answer(&[question], &mut take, &mut quiet)?;
        assert_eq!(alone.as_ref(), first.get(index));
    }
    let greedy = SamplingOptions {
        temperature: 0.0,
        ..options(5)
    };
    let other = SamplingOptions {
        seed: 9,
        ..greedy.clone()
    };
    assert_eq!(
        generator.generate(&all, &greedy, &mut quiet)?,
        generator.generate(&all, &other, &mut quiet)?
    );
    Ok(())
}

fn cuda_draws_follow_from_the_seed(device: &Device) -> Outcome {
    let generator = generator(device, 1, 3.0)?;
    let options = SamplingOptions {
        max_tokens: 40,
        ..SamplingOptions::default()
    };
    for texts in [3, 12, 40] {
        let all: Vec<Conversation> = (0..texts).map(|index| ask(&"pizza ".repeat(1 + index % 7))).collect();
        let first = generator.generate(&all, &options, &mut quiet)?;
        assert_eq!(first.len(), texts);
        assert_eq!(first, generator.generate(&all, &options, &mut quiet)?);
    }
    Ok(())
}

fn answers_end() -> Outcome {
    // Nothing is likelier than anything else: the first token each time.
    let mut generator = generator(&Device::Cpu, 1, 0.0)?;
    let options = SamplingOptions {
        temperature: 0.0,
        max_tokens: 7,
        ..SamplingOptions::default()
    };
    let answer = generator.generate(&[ask("pizza")], &options, &mut quiet)?.remove(0);
    assert_eq!((answer.tokens, answer.finish), (7, Finish::Length));
    assert_eq!(answer.text.chars().count(), 7);
    generator.end_at(&[0])?;
    let answer = generator.generate(&[ask("pizza")], &options, &mut quiet)?.remove(0);
    assert_eq!(
        (answer.tokens, answer.finish, answer.text.as_str()),
        (0, Finish::Stop, "")
    );
    let message = generator.end_at(&[4096]).unwrap_err().to_string();
    assert!(message.contains("token 4096, which is not in"), "{message}");
    Ok(())
}

/// More questions than places, of unequal lengths and with answers that end at different times.
fn questions_take_places_in_turn() -> Outcome {
    let generator = generator(&Device::Cpu, 2, 3.0)?;
    let questions: Vec<Question> = (0..45)
        .map(|index| Question {
            conversation: ask(&"tea ".repeat(1 + index % 9)),
            options: SamplingOptions {
                max_tokens: 1 + index % 5,
                seed: 3,
                ..SamplingOptions::default()
            },
            stream: index as u64,
        })
        .collect();
    let mut answers: Vec<Option<Completion>> = vec![None; questions.len()];
    let mut order = Vec::new();
    let mut take = |index: usize, answer: Result<Completion>| {
        assert!(answers[index].is_none(), "question {index} was answered twice");
        answers[index] = Some(answer?);
        order.push(index);
        Ok(())
    };
    let mut seen = Progress {
        finished: 0,
        of: 0,
        tokens: 0,
    };
    let mut progress = |progress: Progress| {
        assert!(progress.finished >= seen.finished && progress.tokens > seen.tokens && progress.of == 45);
        seen = progress;
        Ok(())
    };
    generator.answer(&questions, &mut take, &mut progress)?;
    assert_eq!(seen.finished, 45);
    assert!(
        order.iter().zip(order.iter().skip(1)).any(|(a, b)| a > b),
        "they ended in their order"
    );
    for (question, answer) in questions.iter().zip(&answers) {
        let answer = answer.as_ref().expect("it was answered");
        assert!(answer.tokens <= question.options.max_tokens);
    }
    // An error of whoever listens ends the work.
    let mut stop = |_: Progress| Err(l2p_engine::Error::Interrupted);
    let outcome = generator.answer(&questions, &mut |_, _| Ok(()), &mut stop);
    assert!(matches!(outcome, Err(l2p_engine::Error::Interrupted)));
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let generator = generator(&Device::Cpu, 2, 1.0)?;
    let message = |options: SamplingOptions| {
        let outcome = generator.generate(&[ask("pizza")], &options, &mut quiet);
        outcome.unwrap_err().to_string()
    };
    let usual = SamplingOptions::default();
    for (options, expected) in [
        (
            SamplingOptions {
                temperature: f32::NAN,
                ..usual.clone()
            },
            "a temperature of NaN makes no sense",
        ),
        (
            SamplingOptions {
                top_p: 0.0,
                ..usual.clone()
            },
            "(top-p) of 0 makes no sense",
        ),
        (
            SamplingOptions {
                max_tokens: 0,
                ..usual.clone()
            },
            "an answer of no tokens",
        ),
        (
            SamplingOptions {
                max_tokens: 40_000,
                ..usual.clone()
            },
            "are longer than the 32768",
        ),
    ] {
        let message = message(options);
        assert!(message.contains(expected), "{message}");
    }
    // A question that cannot be asked fails by itself.
    let questions: Vec<Question> = [ask(&"x".repeat(1 << 17)), ask("tea")]
        .into_iter()
        .map(|conversation| Question {
            conversation,
            options: SamplingOptions {
                max_tokens: 2,
                ..usual.clone()
            },
            stream: 0,
        })
        .collect();
    let mut outcomes = vec![None, None];
    let mut take = |index: usize, answer: Result<Completion>| {
        outcomes[index] = Some(answer.is_ok());
        Ok(())
    };
    generator.answer(&questions, &mut take, &mut quiet)?;
    assert_eq!(outcomes, [Some(false), Some(true)]);
    assert!(generator.generate(&[], &usual, &mut quiet)?.is_empty());
    Ok(())
}
