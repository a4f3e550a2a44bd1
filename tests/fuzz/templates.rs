//! Changes to chat templates: pieces of Jinja put together, and repeated.

use crate::bytes;
use crate::random::Random;

/// Expressions.
const VALUES: [&str; 40] = [
    "x",
    "ns",
    "messages",
    "messages[0]",
    "messages[0].content",
    "loop",
    "loop.previtem",
    "namespace(a=1)",
    "[ns]",
    "{'a': ns}",
    "'a'",
    "''",
    "1",
    "-1",
    "0.0",
    "2**63",
    "10**30",
    "9223372036854775807",
    "1e308",
    "range(90000)",
    "range(10)",
    "none",
    "true",
    "undefined",
    "[1, 2]",
    "{'a': 1}",
    "(1, 2)",
    "'a' * 1000000",
    "[0] * 1000000",
    "ns.a",
    "ns.a ~ ns.a",
    "ns.a + ns.a",
    "'%s' % x",
    "raise_exception('no')",
    "strftime_now('%Y')",
    "messages[::-1]",
    "messages[1:]",
    "dict(a=1)",
    "self",
    "caller()",
];

/// Filters, tests and methods.
const TAILS: [&str; 46] = [
    "|tojson",
    "|tojson(indent=2)",
    "|tojson(indent=1099511627776)",
    "|string",
    "|list",
    "|length",
    "|join(',')",
    "|trim",
    "|upper",
    "|safe",
    "|replace('a', 'aaaaaaaa')",
    "|replace('', 'aa')",
    "|batch(1)",
    "|batch(0)",
    "|slice(3)",
    "|groupby('role')",
    "|map('upper')",
    "|map(attribute='a')",
    "|select('odd')",
    "|sort",
    "|unique",
    "|first",
    "|last",
    "|sum",
    "|items",
    "|dictsort",
    "|format(1)",
    "|pprint",
    "|urlencode",
    "|indent(1000000)",
    "|round(400)",
    "|int",
    "|float",
    "|default(1)",
    " is defined",
    " is odd",
    " is sameas ns",
    ".items()",
    ".split(',')",
    ".strip()",
    ".startswith('a')",
    ".replace('a', 'aa')",
    "[0]",
    "[::-1]",
    ".a.b",
    "()",
];

/// What stands before or between values.
const OPERATORS: [&str; 18] = [
    "not ",
    "-",
    "~",
    "+",
    "-",
    "*",
    "/",
    "//",
    "%",
    "**",
    " and ",
    " or ",
    " in ",
    "==",
    "<",
    " if x else ",
    " is ",
    "|",
];

/// Statements without a body; `@` stands for an expression.
const SINGLE: [&str; 16] = [
    "{{ @ }}",
    "{{- @ -}}",
    "{{ @ }}text",
    "{% set ns = namespace(a=@) %}",
    "{% set ns.a = @ %}",
    "{% set ns.a.b = @ %}",
    "{% set x = @ %}",
    "{% set x, y = @ %}",
    "{% set x, ns.a = @, @ %}",
    "{# @ #}",
    "{% include @ %}",
    "{% extends @ %}",
    "{% break %}",
    "{% continue %}",
    "{% do @ %}",
    "{% elif @ %}",
];

/// Statements with one.
const AROUND: [(&str, &str); 18] = [
    ("{% if @ %}", "{% endif %}"),
    ("{% if @ %}a{% elif @ %}", "{% else %}b{% endif %}"),
    ("{%- if @ -%}", "{%- endif -%}"),
    ("{% for x in @ %}", "{% endfor %}"),
    ("{% for x in @ recursive %}{{ loop(@) }}", "{% endfor %}"),
    ("{% for a, b in @ %}", "{% else %}{% endfor %}"),
    ("{% for x in @ if @ %}", "{% endfor %}"),
    ("{% for i in range(90000) %}", "{% endfor %}"),
    ("{% set ns.a %}", "{% endset %}"),
    ("{% set ns.a|upper %}", "{% endset %}"),
    ("{% set x %}", "{% endset %}"),
    ("{% macro m(x, y=@) %}", "{% endmacro %}{{ m(@) }}"),
    ("{% macro m(x) %}{{ m(@) }}", "{% endmacro %}{{ m(1) }}"),
    ("{% call m(@) %}", "{% endcall %}"),
    ("{% filter upper %}", "{% endfilter %}"),
    ("{% raw %}", "{% endraw %}"),
    ("{% with x = @ %}", "{% endwith %}"),
    ("{% block a %}", "{% endblock %}"),
];

/// Changes a template; `other` is one to take pieces from.
pub fn mutate(file: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    if random.one_in(6) {
        return bytes::mutate(file, other, random);
    }
    let mut text = match random.one_in(2) {
        true => "{% set x = 1 %}{% set ns = namespace(a=1) %}{% macro m(x) %}{{ x }}{% endmacro %}".to_owned(),
        false => String::from_utf8_lossy(file).into_owned(),
    };
    for _ in 0..1 + random.length(8) {
        let piece = statement(random, 4);
        let piece = match random.one_in(30) {
            true => piece.repeat(1 + random.length(20_000)),
            false => piece,
        };
        // Mostly between statements, sometimes within one; not within a character.
        let place = match random.one_in(10) {
            true => (0..=random.below(text.len() + 1))
                .rev()
                .find(|&place| text.is_char_boundary(place)),
            false => Some(text.len()),
        };
        text.insert_str(place.unwrap_or(0), &piece);
        if text.len() > 300_000 {
            break;
        }
    }
    if random.one_in(2) {
        text.push_str("{{ messages[0].content }}");
    }
    *file = text.into_bytes();
}

/// Statements within statements, most of them closed.
fn statement(random: &mut Random, depth: usize) -> String {
    if depth == 0 || random.one_in(2) {
        return filled(random.pick(&SINGLE), random);
    }
    let (open, close) = random.pick(&AROUND);
    let mut text = filled(open, random);
    for _ in 0..random.length(3) {
        text += &statement(random, depth - 1);
    }
    match random.one_in(20) {
        true => text,
        false => text + &filled(close, random),
    }
}

/// A statement with expressions in their places.
fn filled(statement: &str, random: &mut Random) -> String {
    let mut parts = statement.split('@');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        text += &expression(random);
        text += part;
    }
    text
}

fn expression(random: &mut Random) -> String {
    let mut text = random.pick(&VALUES).to_owned();
    for _ in 0..random.length(4) {
        match random.below(4) {
            0 => text.push_str(random.pick(&TAILS)),
            1 => text = format!("{text}{}{}", random.pick(&OPERATORS), random.pick(&VALUES)),
            2 => text = format!("({text})"),
            _ if random.one_in(20) => {
                let times = random.length(5000);
                match random.one_in(2) {
                    true => text = random.pick(&OPERATORS).repeat(times) + &text,
                    false => text += &format!("{}{}", random.pick(&OPERATORS), random.pick(&VALUES)).repeat(times),
                }
            }
            _ => text = format!("[{text}]"),
        }
    }
    text
}
