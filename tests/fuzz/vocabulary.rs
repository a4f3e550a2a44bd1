//! Small tokenizers of each kind, and chat templates like those of published models.

use std::path::Path;

use serde_json::{Value, json};

/// The tokens of [`write_byte_pairs`].
pub const TOKENS: usize = 261;

/// As short as a template of the Qwen family gets without losing its kinds of statements.
pub const TEMPLATE: &str = r#"{%- if tools %}
    {{- '<|im_start|>system\n' }}{{- tools | tojson }}{{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- message.content.split('</think>')[-1].lstrip('\n') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"#;

/// A template with macros, loops and text of its own.
pub const BRANCHES: &str = r#"{% macro turn(role, text='') %}[{{ role|upper }}] {{ text | trim }}{{ eos_token }}
{% endmacro %}{# a comment #}
{% set x = {'a': [1, 2, {'b': none}], 'c': 'd'} %}
{% for message in messages %}{% if loop.first %}{{ turn('system', x | tojson(indent=2)) }}{% endif %}
{{ turn(message['role'], message['content']) }}{% else %}{{ raise_exception('no messages') }}{% endfor %}
{% raw %}{{ not a tag }}{% endraw %}"#;

/// A folder with the tokenizer of a byte-level vocabulary.
pub fn write_byte_pairs(folder: &Path) -> anyhow::Result<()> {
    write_folder(folder, &byte_pairs(), &config())
}

/// A folder for each kind of tokenizer.
pub fn write_tokenizers(folder: &Path) -> anyhow::Result<()> {
    for (name, tokenizer) in [
        ("bytes", byte_pairs()),
        ("pieces", word_pieces()),
        ("unigram", unigram()),
        ("words", words()),
    ] {
        let config = match name {
            "bytes" => config(),
            _ => json!({"chat_template": "{{ messages[0].content }}", "bos_token": "<s>"}),
        };
        write_folder(&folder.join(name), &tokenizer, &config)?;
    }
    Ok(())
}

fn write_folder(folder: &Path, tokenizer: &Value, config: &Value) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string())?;
    Ok(std::fs::write(
        folder.join("tokenizer_config.json"),
        format!("{config:#}"),
    )?)
}

fn config() -> Value {
    json!({
        "added_tokens_decoder": {
            "259": {"content": "<|im_start|>", "special": true},
            "260": {"content": "<|im_end|>", "special": true},
        },
        "chat_template": TEMPLATE,
        "eos_token": "<|im_end|>",
        "truncation_side": "right",
        "model_max_length": 512,
    })
}

fn added(id: usize, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
}

/// The character that byte-level vocabularies write for a byte: itself where it is printable, and one from 256 on otherwise.
fn byte_character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match printable(byte) {
        true => char::from(byte),
        false => {
            let before = (0..byte).filter(|&byte| !printable(byte)).count() as u32;
            char::from_u32(256 + before).expect("there are few of them")
        }
    }
}

fn byte_pairs() -> Value {
    let mut vocabulary = serde_json::Map::new();
    for byte in 0..=255u8 {
        vocabulary.insert(byte_character(byte).to_string(), byte.into());
    }
    for (id, token) in [(256, "fo"), (257, "fox"), (258, "Ġa")] {
        vocabulary.insert(token.into(), id.into());
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(259, "<|im_start|>"), added(260, "<|im_end|>")],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|\\s+(?!\\S)|\\s+"},
             "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        ]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocabulary,
                  "merges": [["f", "o"], ["fo", "x"], ["Ġ", "a"]]},
    })
}

fn template_processor() -> Value {
    let token = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    json!({
        "type": "TemplateProcessing", "single": [token, text("A")], "pair": [token, text("A"), text("B")],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    })
}

fn word_pieces() -> Value {
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0,
                    "pad_token": "<s>"},
        "added_tokens": [added(0, "<s>")],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
                       "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": template_processor(),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "<u>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
                  "vocab": {"<s>": 0, "<u>": 1, "a": 2, "fox": 3, "fo": 4, "##x": 5, "##o": 6, "the": 7}},
    })
}

fn unigram() -> Value {
    // A trie that knows no character: its size, its units, and the texts behind it.
    let map = format!("AAQA{}AABhYgA=", "AAAA".repeat(341));
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added(0, "<s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": map}, {"type": "NFKC"},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}, {"type": "Strip", "strip_left": false, "strip_right": true},
            {"type": "Prepend", "prepend": "▁"},
        ]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "post_processor": {"type": "Sequence", "processors": [template_processor()]},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "model": {"type": "Unigram", "unk_id": 1, "byte_fallback": false,
                  "vocab": [["<s>", 0.0], ["<u>", 0.0], ["▁", -2.0], ["▁a", -2.5], ["f", -3.0], ["o", -3.0], ["fox", -4.0], ["x", -3.5]]},
    })
}

fn words() -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added(0, "<s>")],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Whitespace"}, {"type": "Punctuation", "behavior": "Isolated"}, {"type": "Digits", "individual_digits": true},
            {"type": "FixedLength", "length": 5}, {"type": "CharDelimiterSplit", "delimiter": "-"}, {"type": "UnicodeScripts"},
        ]},
        "post_processor": {"type": "RobertaProcessing", "sep": ["<s>", 0], "cls": ["<s>", 0], "trim_offsets": true, "add_prefix_space": true},
        "decoder": null,
        "model": {"type": "WordLevel", "unk_token": "<u>", "vocab": {"<s>": 0, "<u>": 1, "a": 2, "fox": 3}},
    })
}
