//! Tokenizer folders that mean harm or are broken: an error that names the file, soon, and nothing on the terminal but that.

use std::path::Path;
use std::time::{Duration, Instant};

use l2p_engine::text::PromptTokenizer;
use l2p_tests::cli::Finished;
use l2p_tests::{Outcome, Suite, cli, models_folder};
use serde_json::{Value, json};

/// Nothing here may take longer; all of it is refused by limits of a few seconds at most.
const SOON: Duration = Duration::from_secs(20);

pub fn register(suite: &mut Suite) {
    suite.cpu("text::hostile::deep_templates", deep_templates);
    suite.cpu("text::hostile::endless_templates", endless_templates);
    suite.cpu(
        "text::hostile::templates_that_hold_themselves",
        templates_that_hold_themselves,
    );
    suite.cpu(
        "text::hostile::large_templates_of_real_kinds",
        large_templates_of_real_kinds,
    );
    suite.cpu("text::hostile::broken_tokenizers", broken_tokenizers);
    suite.cpu("text::hostile::inflating_tokenizers", inflating_tokenizers);
    suite.cpu("text::hostile::random_tokens_are_refused", random_tokens_are_refused);
    suite.cpu("text::hostile::files_that_cut_or_pad", files_that_cut_or_pad);
    suite.cpu("text::hostile::encodings_are_named", encodings_are_named);
    suite.cpu("text::hostile::long_prompts_are_refused", long_prompts_are_refused);
    suite.cpu(
        "text::hostile::panics_stay_off_the_terminal",
        panics_stay_off_the_terminal,
    );
}

/// A folder whose tokenizer knows bytes and two words, changed by `change`, with this chat template.
fn folder(template: &str, change: impl FnOnce(&mut Value)) -> std::io::Result<tempfile::TempDir> {
    let mut tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<unknown>": 0, "cat": 1, "dog": 2}, "unk_token": "<unknown>"},
    });
    change(&mut tokenizer);
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string())?;
    let config = json!({ "chat_template": template });
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string())?;
    Ok(dir)
}

const PLAIN: &str = "{{ messages[0].content }}";

/// What goes wrong with the prompt "cat dog", within [`SOON`].
fn fault(dir: &Path) -> Result<String, String> {
    let begun = Instant::now();
    let outcome = PromptTokenizer::open(dir).and_then(|tokenizer| tokenizer.encode("cat dog"));
    let taken = begun.elapsed();
    if taken > SOON {
        return Err(format!("took {taken:?}"));
    }
    match outcome {
        Ok(tokens) => Err(format!("{} tokens were accepted", tokens.ids.len())),
        Err(error) => Ok(error.to_string()),
    }
}

fn expect_fault(dir: &Path, file: &str, words: &str) -> Outcome {
    let message = fault(dir)?;
    let path = dir.join(file).display().to_string();
    if message.starts_with(&path) && message.contains(words) && message.len() < path.len() + 400 {
        return Ok(());
    }
    Err(format!("expected {file} and \"{words}\", found: {message}").into())
}

fn deep_templates() -> Outcome {
    let many = 100_000;
    for source in [
        format!("{{{{ {}true }}}}", "not ".repeat(many)),
        format!("{{{{ {}1 }}}}", "-".repeat(many)),
        format!("{{{{ 'a'{} }}}}", "~'a'".repeat(many)),
        format!("{{{{ 1{} }}}}", "+1".repeat(many)),
        format!("{{{{ messages{} }}}}", "[0]".repeat(many)),
        format!("{{{{ messages{} }}}}", ".a".repeat(many)),
        format!("{{{{ 1{} }}}}", "|e".repeat(many)),
        format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(many)),
        // Tags that seem to end within a text do not.
        format!("{{{{ 'a'{} }}}}", "~'}} {{'".repeat(many)),
        format!("{{% if x %}}{}{{% endif %}}", "{% elif x %}".repeat(20_000)),
        format!("{}{}", "{% if x %}".repeat(10_000), "{% endif %}".repeat(10_000)),
        format!("{{{{ {}1{} }}}}", "(".repeat(many), ")".repeat(many)),
    ] {
        let dir = folder(&source, |_| {})?;
        expect_fault(dir.path(), "tokenizer_config.json", "the chat template cannot be used")?;
    }
    Ok(())
}

fn endless_templates() -> Outcome {
    for source in [
        "{{ [1] | tojson(indent=1099511627776) }}",
        "{% set x = namespace(a='aaaaaaaa') %}{% for i in range(64) %}{% set x.a = x.a ~ x.a %}{% endfor %}{{ x.a }}",
        "{% set x = namespace(a=[1, 2]) %}{% for i in range(64) %}{% set x.a = x.a + x.a %}{% endfor %}{{ x.a }}",
        "{% for i in range(90000) %}{% for i in range(90000) %}{% for i in range(90000) %}{% endfor %}{% endfor %}{% endfor %}",
        "{{ 'a' * 1000000 * 1000000 }}",
        "{{ messages[0].content.replace('', 'a' * 100000) | replace('', 'a' * 100000) }}",
        "{{ '%999999999d' | format(1) }}",
        "{% macro a(x) %}{{ a([x]) }}{% endmacro %}{{ a(1) }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% for i in range(90000) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
    ] {
        let dir = folder(source, |_| {})?;
        expect_fault(dir.path(), "tokenizer_config.json", "the chat template failed")?;
    }
    Ok(())
}

fn templates_that_hold_themselves() -> Outcome {
    for source in [
        "{% set n = namespace(a=1) %}{% set n.a = n %}{{ n }}",
        "{% set n = namespace(a=1) %}{% set n.a = [{'b': n}] %}{{ n | tojson }}",
        "{% set n = namespace() %}{% set m = namespace() %}{% set n.a, m.a = m, n %}{{ [n] == [m] }}",
        "{% set n = namespace() %}{% for p, q in [[n, n]] %}{% set p.a = q %}{% endfor %}{{ n ~ '' }}",
        "{% set n = namespace() %}{% for q in [1, n] %}{% if loop.first %}{% set n.a = loop %}{% else %}{{ n }}{% endif %}{% endfor %}{{ [1, n] | string }}{{ n.a.nextitem.x.y }}",
        "{% set n = namespace() %}{% set n.a | default(n, true) %}{% endset %}{{ n }}",
        "{% set n = namespace() %}{%- set\n n . a=(n)-%}{{ n }}",
    ] {
        let dir = folder(source, |_| {})?;
        expect_fault(dir.path(), "tokenizer_config.json", "the chat template failed")?;
    }
    // What real templates keep in a namespace stays as it was.
    let source = "{% set n = namespace(last=-1, seen=false, list=[], text='', m={}) %}\
                  {% for m in messages[::-1] %}{% set n.last = loop.index0 %}{% set n.seen = true %}\
                  {% set n.list = n.list + [m.content] %}{% set n.m = m %}{% set n.text | upper %}a{% endset %}{% endfor %}\
                  {{ n.list[0] }} {{ n.last }} {{ n.seen }} {{ n.m.role }} {{ n.text }} {{ n.m | tojson }}";
    let dir = folder(source, |_| {})?;
    let text = PromptTokenizer::open(dir.path())?.render("cat dog")?;
    assert_eq!(
        text,
        "cat dog 0 True user A {\"role\": \"user\", \"content\": \"cat dog\"}"
    );
    Ok(())
}

/// The limits leave room for what templates do.
fn large_templates_of_real_kinds() -> Outcome {
    let long = "word ".repeat(4000);
    let branches: String = (0..200)
        .map(|n| format!("{{% elif messages[0].role == 'role{n}' %}}{n}\n"))
        .collect();
    let tests: Vec<String> = (0..80).map(|n| format!("messages[0].role != 'role{n}'")).collect();
    let source = format!(
        "{{% set system = '{long}' %}}{{% if messages[0].role == 'x' %}}x{branches}{{% else %}}{{{{ system }}}}{{% endif %}}\
         {{% if {} %}}{{{{ messages[0].content }}}}{{% endif %}}{{% for i in range(2000) %}}{{{{ '' }}}}{{% endfor %}}",
        tests.join(" and ")
    );
    let dir = folder(&source, |_| {})?;
    let text = PromptTokenizer::open(dir.path())?.render("cat")?;
    assert_eq!(text, format!("{long}cat"));
    Ok(())
}

/// Faults that end in panics inside the tokenizers library, or in none.
fn broken_tokenizers() -> Outcome {
    let expect =
        |words: &str, change: fn(&mut Value)| expect_fault(folder(PLAIN, change)?.path(), "tokenizer.json", words);
    expect("", |t| t["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0}))?;
    expect("", |t| {
        t["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="})
    })?;
    expect("", |t| {
        t["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "?"})
    })?;
    // A trie of one unit, which leads out of it.
    expect("", |t| {
        t["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="})
    })?;
    expect("continuing_subword_prefix", |t| {
        t["model"] = json!({"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "é": 3}, "merges": [["a", "b"]],
                            "continuing_subword_prefix": "####"});
    })?;
    expect("continuing_subword_prefix", |t| {
        t["model"] = json!({"type": "BPE", "vocab": {"a": 0, "é": 1, "aé": 2}, "merges": ["a é"],
                            "continuing_subword_prefix": "#"});
    })?;
    let template = |single: Value| {
        json!({"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {
        "<end>": {"id": "<end>", "ids": [2, 2], "tokens": ["dog", "dog"]}}})
    };
    let text = || json!({"Sequence": {"id": "A", "type_id": 0}});
    let token = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    for (single, words) in [
        (vec![text(), token("<begin>")], "`<begin>`"),
        (vec![text(), text()], "more than once"),
        (vec![json!({"Sequence": {"id": "B", "type_id": 0}})], "second text"),
        (vec![token("<end>"); 400], "tokens to every text"),
    ] {
        let dir = folder(PLAIN, |t| t["post_processor"] = template(json!(single)))?;
        expect_fault(dir.path(), "tokenizer.json", words)?;
    }
    let dir = folder(PLAIN, |t| {
        t["post_processor"] = template(json!([text(), token("<end>")]))
    })?;
    assert_eq!(PromptTokenizer::open(dir.path())?.encode("cat")?.ids, [1, 2, 2]);
    // The id that a file lists is the one that the token has.
    let added = |id: u32| {
        json!([{"id": id, "content": "<x>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true}])
    };
    let dir = folder(PLAIN, |t| t["added_tokens"] = added(7))?;
    expect_fault(dir.path(), "tokenizer.json", "lists the added token <x> as id 7")?;
    let dir = folder(PLAIN, |t| t["added_tokens"] = added(3))?;
    assert_eq!(PromptTokenizer::open(dir.path())?.encode("cat <x>")?.ids, [1, 3]);
    Ok(())
}

fn inflating_tokenizers() -> Outcome {
    let doubling = || {
        let step = |pattern: Value| json!({"type": "Replace", "pattern": pattern, "content": "aa"});
        vec![step(json!({"Regex": "."})), step(json!({"String": "a"}))]
    };
    let repeated =
        |steps: Vec<Value>, times: usize| json!({"type": "Sequence", "normalizers": vec![steps; times].concat()});
    for normalizer in [
        repeated(doubling(), 40),
        repeated(vec![json!({"type": "ByteLevel"})], 60),
        json!({"type": "Replace", "pattern": {"String": ""}, "content": "a".repeat(10_000_000)}),
        json!({"type": "Prepend", "prepend": "a".repeat(10_000_000)}),
    ] {
        expect_fault(
            folder(PLAIN, |t| t["normalizer"] = normalizer)?.path(),
            "tokenizer.json",
            "",
        )?;
    }
    let levels =
        vec![json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": false}); 60];
    let sequence = json!({"type": "Sequence", "pretokenizers": levels});
    expect_fault(
        folder("é{{ messages[0].content }}", |t| t["pre_tokenizer"] = sequence)?.path(),
        "tokenizer.json",
        "",
    )?;
    // A token that the normaliser inflates when the file is loaded.
    let dir = folder(PLAIN, |t| {
        t["normalizer"] = repeated(doubling(), 40);
        t["added_tokens"] = json!([{"id": 3, "content": "a", "single_word": false, "lstrip": false, "rstrip": false,
                                    "normalized": true, "special": false}]);
    })?;
    expect_fault(dir.path(), "tokenizer.json", "")?;
    // What published tokenizers do is within the bounds: SentencePiece's space, Unicode's forms, a prefix.
    let dir = folder(PLAIN, |t| {
        t["normalizer"] = json!({"type": "Sequence", "normalizers": [
            {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
        t["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true});
        t["model"]["vocab"] = json!({"<unknown>": 0, "▁cat": 1, "▁dog": 2});
    })?;
    assert_eq!(PromptTokenizer::open(dir.path())?.encode("Cat   dog")?.ids, [1, 2]);
    Ok(())
}

fn random_tokens_are_refused() -> Outcome {
    let with_dropout = |dropout: Value| {
        folder(PLAIN, |t| {
            t["model"] = json!({"type": "BPE", "dropout": dropout, "vocab": {"c": 0, "a": 1, "t": 2, "ca": 3, "cat": 4},
                                "merges": [["c", "a"], ["ca", "t"]]});
        })
    };
    let dir = with_dropout(json!(0.5))?;
    expect_fault(
        dir.path(),
        "tokenizer.json",
        "dropout = 0.5, which draws tokens at random",
    )?;
    for nothing in [json!(null), json!(0), json!(0.0)] {
        assert_eq!(
            PromptTokenizer::open(with_dropout(nothing)?.path())?.encode("cat")?.ids,
            [4]
        );
    }
    Ok(())
}

/// What is cut is decided by the text encoder's limit, and nothing is padded, whatever the file asks for.
fn files_that_cut_or_pad() -> Outcome {
    let dir = folder(PLAIN, |t| {
        t["truncation"] = json!({"direction": "Left", "max_length": 1, "strategy": "LongestFirst", "stride": 0});
        t["padding"] = json!({"strategy": {"Fixed": 100_000_000}, "direction": "Left", "pad_to_multiple_of": null,
                              "pad_id": 0, "pad_type_id": 0, "pad_token": "<unknown>"});
    })?;
    let tokens = PromptTokenizer::open(dir.path())?.encode("cat dog")?;
    assert_eq!((tokens.ids.as_slice(), tokens.dropped), ([1, 2].as_slice(), 0));
    Ok(())
}

fn encodings_are_named() -> Outcome {
    let dir = folder(PLAIN, |_| {})?;
    let template = dir.path().join("chat_template.jinja");
    std::fs::write(&template, b"{# caf\xe9 #}\n{{ messages[0].content }}")?;
    expect_fault(dir.path(), "chat_template.jinja", "line 1 has the byte 0xe9")?;
    let utf16: Vec<u8> = PLAIN.encode_utf16().flat_map(u16::to_le_bytes).collect();
    std::fs::write(&template, [b"\xff\xfe", &utf16[..]].concat())?;
    expect_fault(dir.path(), "chat_template.jinja", "UTF-16")?;
    std::fs::write(&template, format!("\u{feff}{PLAIN}"))?;
    assert_eq!(PromptTokenizer::open(dir.path())?.encode("cat")?.ids, [1]);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let path = dir.path().join(name);
        let text = std::fs::read_to_string(&path)?;
        std::fs::write(&path, format!("\u{feff}{text}"))?;
        assert_eq!(PromptTokenizer::open(dir.path())?.encode("cat")?.ids, [1]);
        std::fs::write(&path, [b"\n\xe9".as_slice(), text.as_bytes()].concat())?;
        expect_fault(dir.path(), name, "line 2 has the byte 0xe9")?;
        std::fs::remove_file(&path)?;
        let made = std::process::Command::new("mkfifo").arg(&path).status()?;
        assert!(made.success());
        expect_fault(dir.path(), name, "pipe or device")?;
        std::fs::remove_file(&path)?;
        std::fs::write(&path, text)?;
    }
    Ok(())
}

fn long_prompts_are_refused() -> Outcome {
    let dir = folder(PLAIN, |_| {})?;
    let tokenizer = PromptTokenizer::open(dir.path())?;
    let tokens = tokenizer.encode(&"cat ".repeat(10_000))?;
    assert_eq!((tokens.ids.len(), tokens.dropped), (512, 9488));
    let message = tokenizer.encode(&"cat ".repeat(1_000_000)).unwrap_err().to_string();
    assert!(
        message.contains("the prompt has 4000000 bytes, more than the 65536"),
        "{message}"
    );
    Ok(())
}

/// A panic inside the library is one error of the program.
fn panics_stay_off_the_terminal() -> Outcome {
    let broken = folder(PLAIN, |t| {
        t["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0})
    })?;
    let out = broken.path().join("out.png");
    let model = models_folder().join("demo/source");
    let mut command = std::process::Command::new(cli::program("l2p-sample")?);
    command.args([
        "--device", "cpu", "--steps", "1", "--width", "64", "--height", "64", "--prompt", "cat",
    ]);
    command
        .arg("--model")
        .arg(model)
        .arg("--tokenizer")
        .arg(broken.path())
        .arg("--out")
        .arg(&out);
    let finished = Finished::from(&mut command)?;
    let named = broken.path().join("tokenizer.json").display().to_string();
    let last = finished.stderr.lines().last().unwrap_or_default();
    let quiet = !finished.stderr.contains("panicked") && finished.stderr.lines().count() <= 2;
    match finished.code == 1 && quiet && last.starts_with(&format!("error: {named}: ")) {
        true => Ok(()),
        false => Err(format!("exit code {}, printed: {}", finished.code, finished.stderr).into()),
    }
}
