//! What the tokens of a vocabulary stand for, for texts that are written token by token.
//!
//! Vocabularies of byte-level BPE spell bytes by characters: those of printable Latin-1 by themselves, the others by characters from
//! U+0100 on, in their order. Tokens that were added to a vocabulary are spelled as they are; special ones stand for no text. Source:
//! Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).

use std::collections::HashMap;

use super::PromptTokenizer;
use crate::error::{Error, Result};
use crate::limits;
use crate::printable::shown_name;

/// Names of tokens at which models of the Qwen family end what they say, whatever their files say.
const ENDS: [&str; 2] = ["<|im_end|>", "<|endoftext|>"];

/// What each token stands for.
#[derive(Debug)]
pub struct Vocabulary {
    /// By id; `None` for special tokens and ids that no token has.
    bytes: Vec<Option<Box<[u8]>>>,
    ends: Vec<u32>,
}

impl Vocabulary {
    /// Of a tokenizer.
    ///
    /// # Errors
    /// Naming the file and the token, where the tokenizer is not of byte-level BPE, a token has a larger id than a vocabulary can have, or
    /// none is known that ends a text.
    pub fn of(tokenizer: &PromptTokenizer) -> Result<Self> {
        let refused = |reason: String| Error::file(tokenizer.file(), reason);
        let bytes_of: HashMap<char, u8> = (0..=u8::MAX).map(|byte| (spelled(byte), byte)).collect();
        let library = tokenizer.library();
        let added = library.get_added_tokens_decoder();
        let mut bytes: Vec<Option<Box<[u8]>>> = Vec::new();
        for (token, id) in library.get_vocab(true) {
            if u64::from(id) >= limits::Vocabulary::MOST {
                return Err(refused(format!(
                    "the token {} has the id {id}; ids lie below {}",
                    shown_name(&token),
                    limits::Vocabulary::MOST
                )));
            }
            let stands_for = match added.get(&id) {
                Some(added) if added.special => None,
                Some(_) => Some(token.into_bytes().into_boxed_slice()),
                None => {
                    let spelled: Option<Box<[u8]>> = token.chars().map(|c| bytes_of.get(&c).copied()).collect();
                    let spelled = spelled.ok_or_else(|| {
                        refused(format!(
                            "the token {} is not of a byte-level vocabulary, the only kind that texts are written with",
                            shown_name(&token)
                        ))
                    })?;
                    Some(spelled)
                }
            };
            let index = id as usize;
            if bytes.len() <= index {
                bytes.resize(index + 1, None);
            }
            bytes[index] = stands_for;
        }
        let named = ENDS.iter().copied().chain(tokenizer.end_token());
        let mut ends: Vec<u32> = named.filter_map(|name| library.token_to_id(name)).collect();
        ends.sort_unstable();
        ends.dedup();
        match ends.is_empty() {
            true => Err(refused(format!(
                "knows none of the tokens that end a text: {} or the eos_token of tokenizer_config.json",
                ENDS.join(", ")
            ))),
            false => Ok(Vocabulary { bytes, ends }),
        }
    }

    /// Ids up to the last token.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What a token stands for; `None` for special tokens and ids that no token has.
    pub fn bytes(&self, token: u32) -> Option<&[u8]> {
        self.bytes.get(token as usize)?.as_deref()
    }

    /// Tokens at which a text ends.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// The text of these tokens; what is no UTF-8 is replaced.
    pub fn text(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens
            .iter()
            .filter_map(|&token| self.bytes(token))
            .flatten()
            .copied()
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// The character that spells a byte.
fn spelled(byte: u8) -> char {
    let is_itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match is_itself(byte) {
        true => char::from(byte),
        false => {
            let before = (0..byte).filter(|&other| !is_itself(other)).count() as u32;
            char::from_u32(0x100 + before).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_spelled_as_everywhere() {
        for (byte, character) in [
            (b' ', 'Ġ'),
            (b'\n', 'Ċ'),
            (b'a', 'a'),
            (0, 'Ā'),
            (0xad, 'Ń'),
            (0xff, 'ÿ'),
            (0x7f, 'ġ'),
        ] {
            assert_eq!(spelled(byte), character, "{byte:#x}");
        }
        let all: std::collections::HashSet<char> = (0..=u8::MAX).map(spelled).collect();
        assert_eq!(all.len(), 256);
    }
}
