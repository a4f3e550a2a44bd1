//! Puts all mutants of a file into it at once, each behind a switch.
//!
//! An expression with mutants becomes `(if on(1) { mutant 1 } else if on(2) { mutant 2 } else { expression })`; a function that is
//! to return a value at once begins with `if on(3) { return value; }`; match arms and their guards get a condition. Only one
//! mutant is on at a time, so a mutated branch holds the source as it was written, with its one change.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::Context;
use proc_macro2::TokenStream;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use crate::list::{Genre, Lines, Mutant};

/// A mutant's number: its place in the list, from 1.
pub type Number = u32;

/// A file with its mutants.
pub struct Woven {
    /// The text.
    pub text: String,
    /// The mutants that are in it.
    pub woven: Vec<Number>,
    /// Where each mutant's own text stands.
    branches: Vec<(Range<usize>, Number)>,
    /// Where each changed expression stands, with all its mutants.
    wholes: Vec<(Range<usize>, Vec<Number>)>,
}

impl Woven {
    /// The mutants that the compiler may mean by an error here: the one in whose own text it is, or else all of the innermost
    /// expression around it.
    pub fn blamed(&self, error: &Range<usize>) -> Vec<Number> {
        let holds = |range: &Range<usize>| range.start <= error.start && error.end <= range.end;
        let innermost = |a: &Range<usize>| a.len();
        let branch = self.branches.iter().filter(|(range, _)| holds(range));
        if let Some((_, number)) = branch.min_by_key(|(range, _)| innermost(range)) {
            return vec![*number];
        }
        let whole = self.wholes.iter().filter(|(range, _)| holds(range));
        whole
            .min_by_key(|(range, _)| innermost(range))
            .map_or(Vec::new(), |(_, numbers)| numbers.clone())
    }
}

/// Puts the mutants into the file's text. Those that no place was found for are left out.
///
/// # Errors
/// When the text is no Rust.
pub fn weave(source: &str, mutants: &[(Number, &Mutant)]) -> anyhow::Result<Woven> {
    let tokens: TokenStream = source.parse().map_err(|error| anyhow::anyhow!("{error}"))?;
    let file: syn::File = syn::parse2(tokens).context("the file cannot be read")?;
    let lines = Lines::of(source);
    let mut by_start: HashMap<usize, Vec<Placed<'_>>> = HashMap::new();
    for (number, mutant) in mutants {
        let range = lines.range(mutant.span);
        by_start.entry(range.start).or_default().push(Placed {
            number: *number,
            mutant,
            range,
        });
    }
    let mut weaver = Weaver {
        source,
        by_start,
        changes: Vec::new(),
    };
    weaver.visit_file(&file);
    Ok(render(source, weaver.changes))
}

/// Something put before and after a part of the source.
struct Change {
    range: Range<usize>,
    before: Vec<(String, Option<Number>)>,
    after: &'static str,
    numbers: Vec<Number>,
}

/// A mutant and the bytes that it replaces.
struct Placed<'a> {
    number: Number,
    mutant: &'a Mutant,
    range: Range<usize>,
}

struct Weaver<'a> {
    source: &'a str,
    by_start: HashMap<usize, Vec<Placed<'a>>>,
    changes: Vec<Change>,
}

fn on(number: Number) -> String {
    format!("crate::woven::on({number})")
}

impl Weaver<'_> {
    /// The mutants of some genre that start at this byte.
    fn at(&self, start: usize, genre: Genre) -> Vec<(Number, String, Range<usize>)> {
        let there = self.by_start.get(&start).into_iter().flatten();
        there
            .filter(|placed| placed.mutant.genre == genre)
            .map(|placed| (placed.number, placed.mutant.replacement.clone(), placed.range.clone()))
            .collect()
    }

    /// Chooses between an expression and its mutants, which replace `range` within it.
    fn choose(&mut self, expression: Range<usize>, mutants: Vec<(Number, String, Range<usize>)>) {
        if mutants.is_empty() {
            return;
        }
        let mut before = vec![("(".to_owned(), None)];
        for (number, replacement, range) in &mutants {
            let head = &self.source[expression.start..range.start];
            let tail = &self.source[range.end..expression.end];
            before.push((format!("if {} {{ ", on(*number)), None));
            before.push((format!("{head}{replacement}{tail}"), Some(*number)));
            before.push((" } else ".to_owned(), None));
        }
        before.push(("{ ".to_owned(), None));
        self.changes.push(Change {
            range: expression,
            before,
            after: " })",
            numbers: mutants.into_iter().map(|(number, ..)| number).collect(),
        });
    }

    fn body(&mut self, block: &syn::Block) {
        let Some(first) = block.stmts.first() else {
            return;
        };
        let start = first.span().byte_range().start;
        for (number, value, range) in self.at(start, Genre::FnValue) {
            self.changes.push(Change {
                // Before everything else that begins here.
                range: range.start..self.source.len(),
                before: vec![
                    (format!("if {} {{ return ", on(number)), None),
                    (value, Some(number)),
                    ("; } ".to_owned(), None),
                ],
                after: "",
                numbers: vec![number],
            });
        }
    }
}

impl<'ast> Visit<'ast> for Weaver<'_> {
    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.body(&function.block);
        visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.body(&function.block);
        visit::visit_impl_item_fn(self, function);
    }

    fn visit_expr_binary(&mut self, expression: &'ast syn::ExprBinary) {
        let operator = expression.op.span().byte_range().start;
        // A condition with a pattern cannot stand in an expression of its own.
        if !holds_pattern(&expression.left) && !holds_pattern(&expression.right) {
            let mutants = self.at(operator, Genre::BinaryOperator);
            self.choose(expression.span().byte_range(), mutants);
        }
        visit::visit_expr_binary(self, expression);
    }

    fn visit_expr_unary(&mut self, expression: &'ast syn::ExprUnary) {
        let operator = expression.op.span().byte_range().start;
        let mutants = self.at(operator, Genre::UnaryOperator);
        self.choose(expression.span().byte_range(), mutants);
        visit::visit_expr_unary(self, expression);
    }

    fn visit_arm(&mut self, arm: &'ast syn::Arm) {
        if let Some((_, guard)) = &arm.guard {
            let range = guard.span().byte_range();
            if !holds_pattern(guard) {
                let mutants = self.at(range.start, Genre::MatchArmGuard);
                self.choose(range, mutants);
            }
        }
        let start = arm.pat.span().byte_range().start;
        for (number, ..) in self.at(start, Genre::MatchArm) {
            let (range, before, after) = match &arm.guard {
                Some((_, guard)) => (guard.span().byte_range(), format!("!{} && (", on(number)), ")"),
                None => {
                    let end = arm.pat.span().byte_range().end;
                    (end..end, format!(" if !{}", on(number)), "")
                }
            };
            self.changes.push(Change {
                range,
                before: vec![(before, Some(number))],
                after,
                numbers: vec![number],
            });
        }
        visit::visit_arm(self, arm);
    }

    fn visit_expr_struct(&mut self, expression: &'ast syn::ExprStruct) {
        let mut mutants = Vec::new();
        for field in &expression.fields {
            let start = field.span().byte_range().start;
            for (number, replacement, mut range) in self.at(start, Genre::StructField) {
                // With its comma.
                let rest = &self.source[range.end..];
                let blank = rest.len() - rest.trim_start().len();
                if rest[blank..].starts_with(',') {
                    range.end += blank + 1;
                }
                mutants.push((number, replacement, range));
            }
        }
        self.choose(expression.span().byte_range(), mutants);
        visit::visit_expr_struct(self, expression);
    }
}

/// Whether a condition is, or is made of, a `let`.
fn holds_pattern(expression: &syn::Expr) -> bool {
    match expression {
        syn::Expr::Let(_) => true,
        syn::Expr::Binary(binary) => holds_pattern(&binary.left) || holds_pattern(&binary.right),
        _ => false,
    }
}

/// What is put at one place, in the order of the text.
struct Insertion<'a> {
    at: usize,
    /// Ends come before beginnings; of ends the inner ones first, of beginnings the outer ones.
    order: (u8, usize, usize),
    change: usize,
    pieces: Vec<(&'a str, Option<Number>)>,
}

fn render(source: &str, changes: Vec<Change>) -> Woven {
    let mut insertions = Vec::new();
    for (index, change) in changes.iter().enumerate() {
        let length = change.range.len();
        insertions.push(Insertion {
            at: change.range.start,
            order: (1, usize::MAX - length, index),
            change: index,
            pieces: change
                .before
                .iter()
                .map(|(text, number)| (text.as_str(), *number))
                .collect(),
        });
        if !change.after.is_empty() {
            insertions.push(Insertion {
                at: change.range.end,
                order: (0, length, usize::MAX - index),
                change: index,
                pieces: vec![(change.after, None)],
            });
        }
    }
    insertions.sort_by_key(|insertion| (insertion.at, insertion.order));
    let (mut text, mut done) = (String::new(), 0);
    let (mut branches, mut starts) = (Vec::new(), vec![0; changes.len()]);
    let mut wholes = Vec::new();
    for insertion in insertions {
        text.push_str(&source[done..insertion.at]);
        done = insertion.at;
        let start = text.len();
        for (piece, number) in insertion.pieces {
            let from = text.len();
            text.push_str(piece);
            branches.extend(number.map(|number| (from..text.len(), number)));
        }
        let change = &changes[insertion.change];
        if insertion.order.0 == 1 {
            starts[insertion.change] = start;
        }
        if insertion.order.0 == 0 || change.after.is_empty() {
            wholes.push((starts[insertion.change]..text.len(), change.numbers.clone()));
        }
    }
    text.push_str(&source[done..]);
    let woven = changes.into_iter().flat_map(|change| change.numbers).collect();
    Woven {
        text,
        woven,
        branches,
        wholes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::list::{Place, Span};

    /// A mutant that replaces the given text, which stands once in the source.
    fn mutant(source: &str, genre: Genre, text: &str, replacement: &str) -> Mutant {
        let at = source.find(text).expect("it is there");
        let place = |byte: usize| Place {
            line: source[..byte].matches('\n').count() + 1,
            column: source[..byte].chars().rev().take_while(|c| *c != '\n').count() + 1,
        };
        Mutant {
            name: String::new(),
            file: "file.rs".into(),
            genre,
            span: Span {
                start: place(at),
                end: place(at + text.len()),
            },
            replacement: replacement.into(),
        }
    }

    fn woven(source: &str, mutants: &[Mutant]) -> String {
        let numbered: Vec<(Number, &Mutant)> = (1..).zip(mutants).collect();
        let woven = weave(source, &numbered).unwrap();
        syn::parse_file(&woven.text).unwrap_or_else(|error| panic!("{error}: {}", woven.text));
        woven.text.replace("crate::woven::on", "on")
    }

    #[test]
    fn operators_are_chosen_from() {
        let source = "fn f() -> i32 { a * b + c }";
        let mutants = [
            mutant(source, Genre::BinaryOperator, "+", "-"),
            mutant(source, Genre::BinaryOperator, "+", "*"),
            mutant(source, Genre::BinaryOperator, "*", "/"),
        ];
        assert_eq!(
            woven(source, &mutants),
            "fn f() -> i32 { (if on(1) { a * b - c } else if on(2) { a * b * c } else { (if on(3) { a / b } else { a * b }) \
             + c }) }"
        );
        let source = "fn f() { if !done { x[i + 1] += 2; } }";
        let mutants = [
            mutant(source, Genre::UnaryOperator, "!", ""),
            mutant(source, Genre::BinaryOperator, "+=", "-="),
        ];
        assert_eq!(
            woven(source, &mutants),
            "fn f() { if (if on(1) { done } else { !done }) { (if on(2) { x[i + 1] -= 2 } else { x[i + 1] += 2 }); } }"
        );
    }

    #[test]
    fn functions_return_at_once() {
        let source = "impl S {\n    fn größe(&self) -> u8 {\n        self.x + 1\n    }\n}";
        let mutants = [
            mutant(source, Genre::FnValue, "self.x + 1", "0"),
            mutant(source, Genre::BinaryOperator, "+", "-"),
        ];
        assert_eq!(
            woven(source, &mutants),
            "impl S {\n    fn größe(&self) -> u8 {\n        if on(1) { return 0; } (if on(2) { self.x - 1 } else { self.x + 1 \
             })\n    }\n}"
        );
    }

    #[test]
    fn arms_and_guards_have_conditions() {
        let source = "fn f() { match x { A => 1, B if y > 2 => 2, _ => 3 } }";
        let mutants = [
            mutant(source, Genre::MatchArm, "A => 1,", ""),
            mutant(source, Genre::MatchArmGuard, "y > 2", "true"),
            mutant(source, Genre::MatchArm, "B if y > 2 => 2,", ""),
        ];
        assert_eq!(
            woven(source, &mutants),
            "fn f() { match x { A if !on(1) => 1, B if (if on(2) { true } else { !on(3) && (y > 2) }) => 2, _ => 3 } }"
        );
    }

    #[test]
    fn fields_are_left_to_the_base() {
        let source = "fn f() { S { a: 1, b, ..s } }";
        let mutants = [mutant(source, Genre::StructField, "a: 1", "")];
        assert_eq!(
            woven(source, &mutants),
            "fn f() { (if on(1) { S {  b, ..s } } else { S { a: 1, b, ..s } }) }"
        );
    }

    #[test]
    fn conditions_with_patterns_are_left_out() {
        let source = "fn f() { if let Some(x) = y && x > 1 { g() } }";
        let mutants = [
            mutant(source, Genre::BinaryOperator, "&&", "||"),
            mutant(source, Genre::BinaryOperator, ">", "<"),
        ];
        assert_eq!(
            woven(source, &mutants),
            "fn f() { if let Some(x) = y && (if on(2) { x < 1 } else { x > 1 }) { g() } }"
        );
    }

    #[test]
    fn errors_are_blamed_on_the_innermost() {
        let source = "fn f() { a * b + c }";
        let mutants = [
            mutant(source, Genre::BinaryOperator, "+", "-"),
            mutant(source, Genre::BinaryOperator, "*", "/"),
        ];
        let numbered: Vec<(Number, &Mutant)> = (1..).zip(&mutants).collect();
        let woven = weave(source, &numbered).unwrap();
        let at = |text: &str| {
            let start = woven.text.find(text).expect("it is there");
            woven.blamed(&(start..start + text.len()))
        };
        assert_eq!(at("a * b - c"), [1]);
        assert_eq!(at("a / b"), [2]);
        assert_eq!(at("a * b })"), [2]);
        assert_eq!(at("+ c }"), [1]);
        assert!(at("fn f").is_empty());
    }
}
