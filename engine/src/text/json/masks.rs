//! Which tokens may come next in an answer.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Grammar, Guide, State};
use crate::error::{Error, Result};
use crate::text::Vocabulary;

/// Masks that are kept; each has a bit per token.
const KEPT: usize = 4096;

/// A vocabulary in the order of its bytes, so that what tokens begin with in common is looked at once.
#[derive(Debug)]
pub struct TokenTable {
    /// Tokens in that order, each with the number of bytes that it shares with the one before.
    tokens: Vec<(u32, Box<[u8]>, usize)>,
    /// Bits of a mask.
    vocabulary: usize,
    /// Bytes of the longest token, and the most quotation marks of any.
    longest: usize,
    quotes: usize,
}

/// Masks for answers, kept for places that are alike.
#[derive(Debug, Default)]
pub struct Masks {
    kept: HashMap<(usize, State), Arc<[i32]>>,
    /// The grammars of the masks that are kept, by which they are told apart.
    grammars: Vec<Arc<Grammar>>,
}

impl TokenTable {
    /// Of the tokens of `vocabulary` that a model with `entries` of them has; those that stand for no text are left out.
    ///
    /// # Errors
    /// When a byte that may come in an answer has no token of its own, so that an answer might not go on.
    pub fn new(vocabulary: &Vocabulary, entries: usize) -> Result<Self> {
        let bytes = |id: usize| vocabulary.bytes(id as u32).filter(|bytes| !bytes.is_empty());
        let tokens: Vec<(u32, Box<[u8]>, usize)> = (0..entries)
            .filter_map(|id| Some((id as u32, bytes(id)?.into(), 0)))
            .collect();
        let single = |byte: u8| tokens.iter().any(|(_, bytes, _)| **bytes == [byte]);
        let never = |byte: &u8| matches!(byte, 0..=0x1f | 0x7f | 0xc0 | 0xc1 | 0xf5..=0xff);
        if let Some(byte) = (0..=u8::MAX).find(|byte| !never(byte) && !single(*byte)) {
            return Err(Error::invalid(format!(
                "answers in JSON cannot be held to their shape: the byte {byte:#04x} has no token among the first {entries} of the \
                 tokenizer"
            )));
        }
        Ok(Self::of(tokens, entries))
    }

    fn of(mut tokens: Vec<(u32, Box<[u8]>, usize)>, vocabulary: usize) -> Self {
        tokens.sort_unstable_by(|a, b| a.1.cmp(&b.1));
        for index in 1..tokens.len() {
            let (before, after) = (&tokens[index - 1].1, &tokens[index].1);
            tokens[index].2 = before.iter().zip(after.iter()).take_while(|(a, b)| a == b).count();
        }
        let quotes = |bytes: &[u8]| bytes.iter().filter(|&&byte| byte == b'"').count();
        TokenTable {
            vocabulary,
            longest: tokens.iter().map(|(_, bytes, _)| bytes.len()).max().unwrap_or(0),
            quotes: tokens.iter().map(|(_, bytes, _)| quotes(bytes)).max().unwrap_or(0),
            tokens,
        }
    }

    /// Words of a mask.
    pub fn words(&self) -> usize {
        self.vocabulary.div_ceil(32)
    }

    /// A bit for each token behind which the answer needs no more than `left` bytes.
    fn mask(&self, grammar: &Grammar, start: State, left: usize) -> Arc<[i32]> {
        let mut mask = vec![0; self.words()];
        // The places behind the first bytes of the token before, as far as these may come.
        let mut places = vec![start];
        for (token, bytes, shared) in &self.tokens {
            places.truncate(shared + 1);
            if places.len() <= *shared {
                continue;
            }
            for &byte in &bytes[*shared..] {
                match grammar.step(places[places.len() - 1], byte) {
                    Some(place) => places.push(place),
                    None => break,
                }
            }
            let last = &places[places.len() - 1];
            if places.len() == bytes.len() + 1 && grammar.least_from(last) <= left {
                mask[*token as usize / 32] |= 1 << (token % 32);
            }
        }
        mask.into()
    }
}

impl Masks {
    /// The tokens that may come where `guide` stands, when `left` tokens may follow in all, this one included: a bit each, the lowest
    /// first. There is one as long as `left` is no less than [`Guide::least_bytes`] and the answer is not complete.
    pub fn allowed(&mut self, table: &TokenTable, guide: &Guide, left: usize) -> Arc<[i32]> {
        let Guide { grammar, state } = guide;
        let after = left.saturating_sub(1);
        let far = grammar.least_from(state) + grammar.growth(table.quotes) + table.longest;
        if after < far {
            return table.mask(grammar, *state, after);
        }
        let index = match self.grammars.iter().position(|other| other == grammar) {
            Some(index) => index,
            None => {
                self.grammars.push(grammar.clone());
                self.grammars.len() - 1
            }
        };
        let alike = grammar.alike(*state, table.longest, table.quotes);
        if let Some(mask) = self.kept.get(&(index, alike)) {
            return mask.clone();
        }
        if self.kept.len() >= KEPT {
            self.kept.clear();
        }
        let mask = table.mask(grammar, alike, usize::MAX);
        self.kept.insert((index, alike), mask.clone());
        mask
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::{JsonKind, JsonShape};
    use super::*;

    /// A vocabulary of all bytes and of tokens that end, begin and join texts.
    fn table() -> TokenTable {
        let joined = [
            "ab",
            "abc",
            "\"]",
            "\",\"",
            "\", \"",
            "a\"",
            "[\"",
            "\",\"\",\"",
            "\\u",
            "\\n",
            "é",
            "日本",
            "true",
            "\":",
        ];
        let single = (0..=u8::MAX).map(|byte| vec![byte]);
        let all = single.chain(joined.iter().map(|token| token.as_bytes().to_vec()));
        TokenTable::of(
            all.enumerate()
                .map(|(id, bytes)| (id as u32, bytes.into(), 0))
                .collect(),
            300,
        )
    }

    /// All places that tokens lead to.
    fn places(table: &TokenTable, grammar: &Grammar) -> HashSet<State> {
        let mut seen = HashSet::from([Grammar::START]);
        let mut open = vec![Grammar::START];
        while let Some(state) = open.pop() {
            for (_, bytes, _) in &table.tokens {
                let next = bytes.iter().try_fold(state, |state, &byte| grammar.step(state, byte));
                if let Some(next) = next.filter(|next| seen.insert(*next)) {
                    open.push(next);
                }
            }
        }
        seen
    }

    fn shapes() -> Vec<JsonShape> {
        let texts = |count, characters| JsonShape::Texts { count, characters };
        let reason = ("reason".to_owned(), JsonKind::Text(0..=30));
        vec![
            texts(0..=12, 0..=3),
            texts(9..=9, 20..=40),
            texts(2..=30, 1..=2),
            texts(1..=1, 0..=60),
            JsonShape::Object(vec![("ok".into(), JsonKind::Flag), reason]),
        ]
    }

    #[test]
    fn places_that_count_as_alike_allow_the_same_tokens() {
        let table = table();
        for shape in shapes() {
            let guide = Guide::new(&shape).unwrap();
            let places = places(&table, &guide.grammar);
            let mut classes = HashSet::new();
            for &state in &places {
                let alike = guide.grammar.alike(state, table.longest, table.quotes);
                classes.insert(alike);
                let [own, shared] = [state, alike].map(|state| table.mask(&guide.grammar, state, usize::MAX));
                assert_eq!(own, shared, "{shape:?}: {state:?} as {alike:?}");
            }
            assert!(classes.len() < places.len(), "{shape:?}");
        }
    }

    /// Where an answer may have as many tokens as it has bytes at least, there is always one that leaves it so; and far from its end
    /// nothing is held back that a mask without end lets through.
    #[test]
    fn there_is_always_a_token_in_time() {
        let table = table();
        for shape in shapes() {
            let guide = Guide::new(&shape).unwrap();
            let mut masks = Masks::default();
            for state in places(&table, &guide.grammar) {
                let guide = Guide { state, ..guide.clone() };
                if guide.is_done() {
                    continue;
                }
                let least = guide.least_bytes();
                let tight = masks.allowed(&table, &guide, least);
                assert!(
                    tight.iter().any(|&word| word != 0),
                    "{shape:?}: {state:?} with {least} left"
                );
                for (token, bytes, _) in &table.tokens {
                    if tight[*token as usize / 32] >> (token % 32) & 1 == 0 {
                        continue;
                    }
                    let mut next = guide.clone();
                    assert!(next.advance(bytes) && next.least_bytes() < least);
                }
                let far = masks.allowed(&table, &guide, 1 << 20);
                assert_eq!(
                    far,
                    table.mask(&guide.grammar, state, usize::MAX),
                    "{shape:?}: {state:?}"
                );
            }
        }
    }
}
