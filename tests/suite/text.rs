//! Prompts to token ids, against what Hugging Face's libraries give with the real tokenizer of Qwen3.

mod hostile;

use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use l2p_engine::text::PromptTokenizer;
use l2p_tests::{Outcome, Suite, fixtures};
use serde_json::{Value, json};

pub fn register(suite: &mut Suite) {
    suite.cpu("text::ids_equal_hugging_face", ids_equal_hugging_face);
    suite.cpu(
        "text::template_beside_takes_precedence",
        template_beside_takes_precedence,
    );
    suite.cpu("text::wrong_files_are_named", wrong_files_are_named);
    hostile::register(suite);
}

fn unpack(path: &Path) -> Result<Vec<u8>, std::io::Error> {
    let mut bytes = Vec::new();
    GzDecoder::new(std::fs::File::open(path)?).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A folder with the tokenizer of Qwen3.
fn qwen3() -> Result<tempfile::TempDir, std::io::Error> {
    let packed = fixtures::folder().join("tokenizer-qwen3");
    let dir = tempfile::tempdir()?;
    std::fs::write(
        dir.path().join("tokenizer.json"),
        unpack(&packed.join("tokenizer.json.gz"))?,
    )?;
    std::fs::copy(
        packed.join("tokenizer_config.json"),
        dir.path().join("tokenizer_config.json"),
    )?;
    Ok(dir)
}

fn ids_equal_hugging_face() -> Outcome {
    let dir = qwen3()?;
    let mut tokenizer = PromptTokenizer::open(dir.path())?;
    let expected: Value = serde_json::from_slice(&unpack(&fixtures::folder().join("data/tokenizer.json.gz"))?)?;
    for case in expected["rendered"].as_array().expect("the file lists texts") {
        let prompt = case["prompt"].as_str().expect("prompts are strings");
        assert_eq!(Some(tokenizer.render(prompt)?.as_str()), case["text"].as_str());
    }
    let cases = expected["prompts"].as_array().expect("the file lists prompts");
    assert!(cases.len() > 300);
    for case in cases {
        let prompt = case["prompt"].as_str().expect("prompts are strings");
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone())?;
        let found = tokenizer.encode(prompt)?;
        if found.ids != ids {
            return Err(format!("{prompt:?}: ids {:?}, expected {ids:?}", found.ids).into());
        }
        let whole = case["untruncated_length"].as_u64().expect("lengths are numbers") as usize;
        assert_eq!(found.ids.len() + found.dropped, whole, "{prompt:?}");
    }
    tokenizer.set_max_tokens(4)?;
    let short = tokenizer.encode("slice of pizza")?;
    assert_eq!((short.ids.len(), short.dropped), (4, 7));
    let message = tokenizer.set_max_tokens(0).unwrap_err().to_string();
    assert_eq!(message, "a prompt cannot be cut to 0 tokens; it needs at least 1");
    Ok(())
}

/// A tokenizer of three words.
fn write_small(dir: &Path, config: &Value) -> Outcome {
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [{"id": 2, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"<unknown>": 0, "cat": 1, "<end>": 2}, "unk_token": "<unknown>"},
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string())?;
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string())?;
    Ok(())
}

fn template_beside_takes_precedence() -> Outcome {
    let dir = tempfile::tempdir()?;
    let named = json!({"eos_token": {"content": "<end>"}, "chat_template": [
        {"name": "tool_use", "template": "unused"},
        {"name": "default", "template": "{{ messages[0].content }} {{ eos_token }}"},
    ]});
    write_small(dir.path(), &named)?;
    assert_eq!(
        PromptTokenizer::open(dir.path())?.encode("cat dog cat")?.ids,
        [1, 0, 1, 2]
    );
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages[0].content }}\n")?;
    assert_eq!(PromptTokenizer::open(dir.path())?.encode("cat dog cat")?.ids, [1, 0, 1]);
    Ok(())
}

fn wrong_files_are_named() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name).display().to_string();
    let message = || PromptTokenizer::open(dir.path()).map(|_| ()).unwrap_err().to_string();
    let expect = |file: &str, reason: &str| {
        let message = message();
        assert!(
            message.starts_with(&path(file)) && message.contains(reason),
            "{message}"
        );
    };
    expect("tokenizer.json", "no such file; a tokenizer folder holds");
    write_small(dir.path(), &json!({}))?;
    expect("tokenizer_config.json", "has no chat_template");
    write_small(dir.path(), &json!({"chat_template": "{% if %}"}))?;
    expect(
        "tokenizer_config.json",
        "the chat template cannot be used: syntax error",
    );
    write_small(
        dir.path(),
        &json!({"chat_template": "", "added_tokens_decoder": {"7": {"content": "<end>"}}}),
    )?;
    expect(
        "tokenizer_config.json",
        "lists the token <end> as id 7, but tokenizer.json gives it id 2",
    );
    std::fs::write(dir.path().join("tokenizer_config.json"), "{")?;
    expect("tokenizer_config.json", "not valid JSON");
    std::fs::remove_file(dir.path().join("tokenizer_config.json"))?;
    expect("tokenizer_config.json", "no such file");
    std::fs::write(dir.path().join("tokenizer.json"), "{\"model\": 1}")?;
    expect("tokenizer.json", "not a tokenizer that can be used");
    write_small(
        dir.path(),
        &json!({"chat_template": "{{ raise_exception('no prompt') }}"}),
    )?;
    let refusal = PromptTokenizer::open(dir.path())?
        .encode("cat")
        .unwrap_err()
        .to_string();
    assert!(
        refusal.contains("the chat template failed") && refusal.contains("no prompt"),
        "{refusal}"
    );
    Ok(())
}
