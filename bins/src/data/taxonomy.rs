//! The taxonomy: classes, their sub-classes, and fine categories of these, each with a name in English and one in Chinese.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::path::Path;

use anyhow::{Context, bail};
use l2p_engine::limits::Budget;
use l2p_engine::{files, shown_name};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

use super::rules;

/// The one that comes with the program.
const OWN: &str = include_str!("lists/taxonomy.json");

/// A file of one.
const FILE: Budget = Budget::new("taxonomy", 16 << 20);

/// Characters of a category's name, and its words.
const LONGEST_NAME: usize = 60;
const MOST_WORDS: usize = 10;

/// Sub-classes, and categories of all of them.
const MOST_SUB_CLASSES: usize = 512;
const MOST_CATEGORIES: usize = 200_000;

/// A taxonomy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Taxonomy {
    /// Of its content; counted up with each change.
    pub version: u32,
    /// The classes.
    pub classes: Vec<Class>,
}

/// A class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Class {
    /// Its name.
    pub name: String,
    /// Its parts.
    pub sub_classes: Vec<SubClass>,
}

/// A sub-class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubClass {
    /// Its name.
    pub name: String,
    /// Whether its pictures show text.
    #[serde(default)]
    pub renders_text: bool,
    /// What it holds.
    pub categories: Categories,
}

/// Fine categories in their order: in a file an object of English names, each with its Chinese one or `null`, or a list of English names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Categories(pub Vec<Category>);

/// A fine category.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Category {
    /// In English.
    pub name: String,
    /// In Chinese.
    pub zh: Option<String>,
}

impl<'de> Deserialize<'de> for Categories {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Categories;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of names in English and Chinese, or a list of names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Categories, A::Error> {
                let mut found = Vec::new();
                while let Some((name, zh)) = map.next_entry()? {
                    found.push(Category { name, zh });
                }
                Ok(Categories(found))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Categories, A::Error> {
                let mut found = Vec::new();
                while let Some(name) = list.next_element()? {
                    found.push(Category { name, zh: None });
                }
                Ok(Categories(found))
            }
        }
        deserializer.deserialize_any(Entries)
    }
}

impl Serialize for Categories {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for category in &self.0 {
            map.serialize_entry(&category.name, &category.zh)?;
        }
        map.end()
    }
}

impl Taxonomy {
    /// The one that comes with the program.
    ///
    /// # Errors
    /// Never, which a test sees to.
    pub fn own() -> anyhow::Result<Self> {
        Self::parse(OWN.as_bytes()).context("the taxonomy of the program")
    }

    /// That of a file, or the program's own.
    ///
    /// # Errors
    /// Naming the entry at fault.
    pub fn read(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else {
            return Self::own();
        };
        let bytes = files::read(path, FILE)?;
        Self::parse(&bytes).with_context(|| path.display().to_string())
    }

    /// A taxonomy from JSON.
    ///
    /// # Errors
    /// Naming the entry at fault.
    pub fn parse(bytes: &[u8]) -> anyhow::Result<Self> {
        let taxonomy: Taxonomy = match files::from_json(bytes) {
            Ok(taxonomy) => taxonomy,
            Err(reason) => bail!("{reason}"),
        };
        taxonomy.ensure_sound()?;
        Ok(taxonomy)
    }

    /// All sub-classes, each with its class.
    pub fn sub_classes(&self) -> impl Iterator<Item = (&Class, &SubClass)> {
        self.classes
            .iter()
            .flat_map(|class| class.sub_classes.iter().map(move |sub| (class, sub)))
    }

    /// All sub-classes by their paths, as `nature/food`.
    pub fn by_path(&self) -> BTreeMap<String, &SubClass> {
        self.sub_classes().map(|(class, sub)| (path(class, sub), sub)).collect()
    }

    /// How many fine categories there are.
    pub fn categories(&self) -> usize {
        self.sub_classes().map(|(_, sub)| sub.categories.0.len()).sum()
    }

    /// What tells it apart from any other: a hash of all that it says.
    ///
    /// # Errors
    /// Never; it can be written.
    pub fn identity(&self) -> anyhow::Result<String> {
        let hash = Sha256::digest(serde_json::to_vec(self)?);
        Ok(hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect())
    }

    /// Its file.
    ///
    /// # Errors
    /// Never; it can be written.
    pub fn to_text(&self) -> anyhow::Result<String> {
        let mut text = Vec::new();
        let mut writer =
            serde_json::Serializer::with_formatter(&mut text, serde_json::ser::PrettyFormatter::with_indent(b" "));
        self.serialize(&mut writer)?;
        text.push(b'\n');
        Ok(String::from_utf8(text)?)
    }

    /// One line a class, a sub-class and, where asked for, a category.
    pub fn tree(&self, with_categories: bool) -> String {
        let mut text = format!(
            "version {}: {} classes, {} sub-classes, {} categories\n",
            self.version,
            self.classes.len(),
            self.sub_classes().count(),
            self.categories()
        );
        for class in &self.classes {
            let count: usize = class.sub_classes.iter().map(|sub| sub.categories.0.len()).sum();
            let _ = writeln!(text, "{} ({count})", class.name);
            for sub in &class.sub_classes {
                let shows = if sub.renders_text { ", shows text" } else { "" };
                let _ = writeln!(text, "  {} ({}{shows})", sub.name, sub.categories.0.len());
                for category in sub.categories.0.iter().filter(|_| with_categories) {
                    let zh = category.zh.as_deref().map(|zh| format!("  {zh}")).unwrap_or_default();
                    let _ = writeln!(text, "    {}{zh}", category.name);
                }
            }
        }
        text
    }

    /// A category a line: class, sub-class, English and Chinese name, parted by tabs.
    pub fn table(&self) -> String {
        let mut text = "class\tsub_class\tcategory\tchinese\n".to_owned();
        for (class, sub) in self.sub_classes() {
            for category in &sub.categories.0 {
                let zh = category.zh.as_deref().unwrap_or_default();
                let _ = writeln!(text, "{}\t{}\t{}\t{zh}", class.name, sub.name, category.name);
            }
        }
        text
    }

    fn ensure_sound(&self) -> anyhow::Result<()> {
        if self.classes.is_empty() {
            bail!("holds no classes");
        }
        let (mut paths, mut names) = (BTreeSet::new(), BTreeMap::<String, String>::new());
        for class in &self.classes {
            ensure_label("class", &class.name)?;
            if class.sub_classes.is_empty() {
                bail!("class `{}` holds no sub-classes", class.name);
            }
            for sub in &class.sub_classes {
                ensure_label("sub-class", &sub.name)?;
                let path = path(class, sub);
                if sub.categories.0.is_empty() {
                    bail!("`{path}` holds no categories");
                }
                for category in &sub.categories.0 {
                    ensure_name(&category.name).with_context(|| format!("`{path}`"))?;
                    if let Some(zh) = &category.zh {
                        ensure_name(zh).with_context(|| format!("`{path}`, category `{}`", category.name))?;
                    }
                    if let Some(other) = names.insert(normal(&category.name), format!("{path}/{}", category.name)) {
                        bail!(
                            "category `{}` of `{path}` is there twice: it is `{other}` too",
                            category.name
                        );
                    }
                }
                if !paths.insert(path.clone()) {
                    bail!("`{path}` is there twice");
                }
            }
        }
        if paths.len() > MOST_SUB_CLASSES || names.len() > MOST_CATEGORIES {
            bail!(
                "holds {} sub-classes and {} categories, more than {MOST_SUB_CLASSES} and {MOST_CATEGORIES}",
                paths.len(),
                names.len()
            );
        }
        Ok(())
    }
}

/// The path of a sub-class.
pub(super) fn path(class: &Class, sub: &SubClass) -> String {
    format!("{}/{}", class.name, sub.name)
}

fn ensure_label(what: &str, name: &str) -> anyhow::Result<()> {
    let plain =
        |character: char| character.is_ascii_lowercase() || character.is_ascii_digit() || "_-".contains(character);
    match (1..=40).contains(&name.len()) && name.chars().all(plain) {
        true => Ok(()),
        false => bail!(
            "{what} `{}`: expected up to 40 small letters, digits, `-` and `_`",
            shown_name(name)
        ),
    }
}

/// Refuses what is no name of a thing: names end up in requests to language models and in files.
pub(super) fn ensure_name(name: &str) -> anyhow::Result<()> {
    let shown = shown_name(name);
    let plain = |character: char| character.is_alphanumeric() || " '’-&,·".contains(character);
    if name.is_empty()
        || name.trim() != name
        || name.chars().count() > LONGEST_NAME
        || name.split(' ').count() > MOST_WORDS
    {
        bail!(
            "category `{shown}`: expected up to {MOST_WORDS} words and {LONGEST_NAME} characters, without spaces at the ends"
        );
    }
    if let Some(odd) = name.chars().find(|character| !plain(*character)) {
        bail!(
            "category `{shown}`: holds the character `{}`, which is none of a name",
            odd.escape_debug()
        );
    }
    if rules::speaks_to_a_model(name) {
        bail!("category `{shown}`: speaks to a language model and names no thing");
    }
    Ok(())
}

/// A name without what does not tell things apart: case, articles, and plurals.
pub(super) fn normal(name: &str) -> String {
    let lower = name.to_lowercase();
    let words = lower
        .split([' ', '-'])
        .filter(|word| !matches!(*word, "" | "a" | "an" | "the"));
    words.map(singular).collect::<Vec<_>>().join(" ")
}

/// An English word without the ending of a plural, by the usual rules; what it makes of other words is the same for the same word.
fn singular(word: &str) -> String {
    let long = word.chars().count() > 3;
    if let Some(stem) = word.strip_suffix("ies").filter(|_| word.len() > 4) {
        return format!("{stem}y");
    }
    for end in ["ches", "shes", "sses", "xes", "zes", "oes"] {
        if word.ends_with(end) && long {
            return word[..word.len() - 2].into();
        }
    }
    match word.strip_suffix('s') {
        Some(stem) if long && !stem.ends_with(['s', 'u', 'i']) => stem.into(),
        _ => word.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plurals_are_known() {
        for (many, one) in [
            ("The Red Foxes", "red fox"),
            ("berries", "berry"),
            ("churches", "church"),
            ("tomatoes", "tomato"),
            ("glass", "glass"),
            ("cactus", "cactus"),
            ("tennis-players", "tennis player"),
            ("bus", "bus"),
        ] {
            assert_eq!(normal(many), normal(one), "{many}");
        }
    }
}
