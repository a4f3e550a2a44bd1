//! What comes of an operation of the control plane, once every rank has entered it.

use super::meeting::numbers;
use super::wire::{Entry, Kind, Member};
use crate::printable::printable;

/// Characters of a line that are shown where ranks differ.
const SHOWN: usize = 60;

/// What ranks have brought to one operation.
pub struct Round {
    pub entries: Vec<Option<Entry>>,
}

impl Round {
    pub fn new(world: usize) -> Self {
        Round {
            entries: vec![None; world],
        }
    }

    pub fn is_complete(&self) -> bool {
        self.entries.iter().all(Option::is_some)
    }

    /// Whether every rank leaves.
    pub fn leaves(&self) -> bool {
        self.entries.iter().flatten().all(|entry| entry.kind == Kind::Leave)
    }
}

/// What each rank is told.
pub enum Conclusion {
    /// The same to all.
    All(Result<Vec<u8>, String>),
    /// Something to rank 0, nothing to the others.
    First(Vec<u8>),
}

impl Conclusion {
    pub fn of(&self, rank: usize) -> Result<Vec<u8>, String> {
        match self {
            Conclusion::All(answer) => answer.clone(),
            Conclusion::First(answer) if rank == 0 => Ok(answer.clone()),
            Conclusion::First(_) => Ok(Vec::new()),
        }
    }
}

/// Draws the conclusion of a complete round.
pub fn conclude(round: &Round, members: &[Member]) -> Conclusion {
    let entries: Vec<&Entry> = round.entries.iter().flatten().collect();
    let first = entries[0];
    let elsewhere = entries
        .iter()
        .position(|entry| (entry.kind, &entry.what) != (first.kind, &first.what));
    if let Some(rank) = elsewhere {
        return Conclusion::All(Err(format!(
            "the ranks have come apart: rank {rank} is at the {} where rank 0 is at the {}",
            printable(&entries[rank].name()),
            printable(&first.name())
        )));
    }
    match first.kind {
        Kind::Agree => Conclusion::All(agree(&entries, members)),
        Kind::Decide => Conclusion::All(Ok(first.payload.clone())),
        Kind::Gather => {
            let payloads: Vec<&[u8]> = entries.iter().map(|entry| entry.payload.as_slice()).collect();
            match postcard::to_stdvec(&payloads) {
                Ok(bytes) => Conclusion::First(bytes),
                Err(error) => Conclusion::All(Err(error.to_string())),
            }
        }
        Kind::Barrier | Kind::Leave => Conclusion::All(Ok(Vec::new())),
    }
}

fn agree(entries: &[&Entry], members: &[Member]) -> Result<Vec<u8>, String> {
    let first = entries[0];
    let different: Vec<usize> = (1..entries.len())
        .filter(|&rank| entries[rank].payload != first.payload)
        .collect();
    let Some(&rank) = different.first() else {
        return Ok(Vec::new());
    };
    let (who, verb) = match different.as_slice() {
        [one] => (format!("rank {one}"), "differs"),
        several => (format!("ranks {}", numbers(several)), "differ"),
    };
    Err(format!(
        "the {} of {who} {verb} from that of rank 0: {}; start all ranks with the same",
        printable(&first.what),
        difference(
            &first.payload,
            &entries[rank].payload,
            &format!("rank {rank} on {}", printable(&members[rank].host))
        )
    ))
}

/// The first line in which two texts differ; for what is no text, how long both are.
fn difference(first: &[u8], other: &[u8], whose: &str) -> String {
    let (Ok(first_text), Ok(other_text)) = (std::str::from_utf8(first), std::str::from_utf8(other)) else {
        return match first.len() == other.len() {
            true => format!("the {} bytes of {whose} are others", first.len()),
            false => format!("{whose} has {} bytes, rank 0 {}", other.len(), first.len()),
        };
    };
    let (mut first_lines, mut other_lines) = (first_text.lines(), other_text.lines());
    let mut number = 0;
    loop {
        number += 1;
        match (first_lines.next(), other_lines.next()) {
            (None, None) => return format!("{whose} has other ends of lines"),
            (first, other) if first == other => {}
            (first, other) => {
                let place = match number {
                    1 if first_lines.next().is_none() && other_lines.next().is_none() => String::new(),
                    _ => format!("line {number}: "),
                };
                return format!("{place}{whose} has {}, rank 0 {}", line(other), line(first));
            }
        }
    }
}

fn line(line: Option<&str>) -> String {
    match line.map(str::trim) {
        None => "nothing there".into(),
        Some(line) => match line.char_indices().nth(SHOWN) {
            None => format!("`{}`", printable(line)),
            Some((end, _)) => format!("`{}…`", printable(&line[..end])),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(count: usize) -> Vec<Member> {
        let member = |rank| Member {
            host: format!("node{rank}"),
            pid: 1,
            device: "cpu".into(),
            data_port: 0,
        };
        (0..count).map(member).collect()
    }

    fn concluded(kind: Kind, payloads: &[&[u8]]) -> Conclusion {
        let entry = |payload: &&[u8]| {
            Some(Entry {
                kind,
                what: "configuration".into(),
                payload: payload.to_vec(),
            })
        };
        let round = Round {
            entries: payloads.iter().map(entry).collect(),
        };
        assert!(round.is_complete());
        conclude(&round, &members(payloads.len()))
    }

    #[test]
    fn what_differs_is_named_with_its_line() {
        let agree = |payloads: &[&[u8]]| concluded(Kind::Agree, payloads).of(0);
        assert_eq!(agree(&[b"a", b"a", b"a"]), Ok(Vec::new()));
        assert_eq!(
            agree(&[
                b"steps = 3\nseed = 1\n",
                b"steps = 3\nseed = 1\n",
                b"steps = 3\nseed = 2\n"
            ])
            .unwrap_err(),
            "the configuration of rank 2 differs from that of rank 0: line 2: rank 2 on node2 has `seed = 2`, rank 0 `seed = 1`; \
             start all ranks with the same"
        );
        assert_eq!(
            agree(&[b"12ab", b"12ac", b"13"]).unwrap_err(),
            "the configuration of ranks 1 and 2 differ from that of rank 0: rank 1 on node1 has `12ac`, rank 0 `12ab`; start all \
             ranks with the same"
        );
        assert!(
            agree(&[b"a\n", b"a\nb"])
                .unwrap_err()
                .contains("has `b`, rank 0 nothing there")
        );
        assert!(agree(&[b"a\n", b"a\r\n"]).unwrap_err().contains("other ends of lines"));
        assert!(
            agree(&[&[0xff, 1], &[0xff, 2]])
                .unwrap_err()
                .contains("the 2 bytes of rank 1 on node1 are others")
        );
        assert!(
            agree(&[&[0xff], &[0xff, 2]])
                .unwrap_err()
                .contains("has 2 bytes, rank 0 1")
        );
        let forged = agree(&[b"a", "\u{1b}[2J".as_bytes()]).unwrap_err();
        assert!(!forged.contains('\u{1b}'), "{forged}");
    }

    #[test]
    fn rank_0_decides_and_gathers() {
        let decision = concluded(Kind::Decide, &[b"stop", b"", b"other"]);
        assert!((0..3).all(|rank| decision.of(rank) == Ok(b"stop".to_vec())));
        let gathered = concluded(Kind::Gather, &[b"a", b"", b"ccc"]);
        let payloads: Vec<Vec<u8>> = postcard::from_bytes(&gathered.of(0).unwrap()).unwrap();
        assert_eq!(payloads, [b"a".to_vec(), Vec::new(), b"ccc".to_vec()]);
        assert_eq!(gathered.of(1), Ok(Vec::new()));
    }

    #[test]
    fn ranks_at_different_operations_have_come_apart() {
        let entry = |kind, what: &str| {
            Some(Entry {
                kind,
                what: what.into(),
                payload: Vec::new(),
            })
        };
        let round = Round {
            entries: vec![
                entry(Kind::Barrier, ""),
                entry(Kind::Barrier, ""),
                entry(Kind::Decide, "stop"),
            ],
        };
        let message = conclude(&round, &members(3)).of(1).unwrap_err();
        assert_eq!(
            message,
            "the ranks have come apart: rank 2 is at the decision on stop where rank 0 is at the barrier"
        );
    }
}
