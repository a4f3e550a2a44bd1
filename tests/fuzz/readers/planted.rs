//! A reader with a fault of every kind that is looked for, so that looking is known to find them.

use super::Ended;
use crate::case::Case;
use crate::memory::MOST;

/// The faults come once in some hundred cases; the one that takes long, less often.
pub fn read(case: &mut Case) -> Ended {
    match case.random.below(1500) {
        0..8 => panic!("planted"),
        8..16 => {
            // Not caught by whoever runs the thread, but a panic all the same.
            let _ = std::thread::spawn(|| panic!("planted in a thread")).join();
            Ended::Accepted
        }
        16..24 => std::process::abort(),
        24..32 => overflow(std::hint::black_box(1)),
        32..40 => {
            std::hint::black_box(vec![1u8; MOST + 1]);
            Ended::Accepted
        }
        40..48 => Ended::Wrong("a picture that is not finite", "planted".into()),
        48..56 => Ended::Refused("planted ".repeat(1000)),
        56 => loop {
            std::hint::black_box(0);
        },
        _ => Ended::Accepted,
    }
}

fn overflow(depth: u64) -> Ended {
    if depth == u64::MAX {
        return Ended::Accepted;
    }
    let frame = std::hint::black_box([depth; 64]);
    match overflow(frame[7] + 1) {
        Ended::Accepted if frame[0] == 0 => Ended::Drawn,
        ended => ended,
    }
}
