use l2p_engine::ops::sample_tokens::{TokenChoice, mask_words, sample_tokens};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{Outcome, Suite, random};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::sample_tokens::the_largest_is_taken", the_largest_is_taken);
    suite.cpu(
        "ops::sample_tokens::draws_have_their_probability",
        draws_have_their_probability,
    );
    suite.cpu(
        "ops::sample_tokens::bounds_leave_out_the_rest",
        bounds_leave_out_the_rest,
    );
    suite.cpu("ops::sample_tokens::mistakes_are_named", mistakes_are_named);
    suite.cuda("ops::sample_tokens::cuda_takes_the_largest", the_largest_on);
    suite.cuda(
        "ops::sample_tokens::cuda_draws_have_their_probability",
        probabilities_on,
    );
    suite.cuda("ops::sample_tokens::cuda_bounds_leave_out_the_rest", bounds_on);
    suite.cuda("ops::sample_tokens::cuda_equals_cpu", cuda_equals_cpu);
}

/// Draws evenly spread over all random numbers.
const DRAWS: u32 = 4096;

fn the_largest_is_taken() -> Outcome {
    the_largest_on(&Device::Cpu)
}

fn the_largest_on(device: &Device) -> Outcome {
    let nan = f32::NAN;
    let rows = [
        [0.0, 3.0, -1.0, 3.0, 2.0],
        [-5.0, -4.0, -4.5, -9.0, f32::NEG_INFINITY],
        [nan, 1.0, nan, 2.0, nan],
        [nan; 5],
        [1.0, 2.0, 3.0, 4.0, 5.0],
        [1.0, 2.0, 3.0, 4.0, 5.0],
    ];
    // The fifth row may have tokens 1 and 3, the sixth none.
    let allowed = [31, 31, 31, 31, 0b01010, 0];
    let logits = Tensor::from_slice(device, &rows.concat(), [6, 5])?;
    let allowed = Tensor::from_slice(device, &allowed, [6, 1])?;
    let found = sample_tokens(&logits, &[TokenChoice::GREEDY; 6], Some(&allowed))?;
    assert_eq!(found.to_vec::<i32>()?, [1, 1, 3, -1, 3, -1]);
    let found = sample_tokens(&logits, &[TokenChoice::GREEDY; 6], None)?;
    assert_eq!(found.to_vec::<i32>()?, [1, 1, 3, -1, 4, 4]);
    Ok(())
}

/// How often each token is drawn.
fn counts(device: &Device, logits: &[f32], choice: TokenChoice, allowed: Option<&[i32]>) -> Result<Vec<usize>> {
    let vocabulary = logits.len();
    let mut counts = vec![0; vocabulary];
    for first in (0..DRAWS).step_by(512) {
        let choices: Vec<TokenChoice> = (first..first + 512)
            .map(|draw| TokenChoice {
                random: draw << 20,
                ..choice
            })
            .collect();
        let rows = Tensor::from_slice(device, &logits.repeat(512), [512, vocabulary])?;
        let allowed = allowed.map(|mask| Tensor::from_slice(device, &mask.repeat(512), [512, mask_words(vocabulary)]));
        let found = sample_tokens(&rows, &choices, allowed.transpose()?.as_ref())?;
        for token in found.to_vec::<i32>()? {
            counts[token as usize] += 1;
        }
    }
    Ok(counts)
}

fn draws_have_their_probability() -> Outcome {
    probabilities_on(&Device::Cpu)
}

fn probabilities_on(device: &Device) -> Outcome {
    let logits: Vec<f32> = random("logits", 77);
    for temperature in [0.5, 1.0, 3.0] {
        let choice = TokenChoice {
            temperature,
            ..TokenChoice::GREEDY
        };
        let weights: Vec<f64> = logits
            .iter()
            .map(|logit| f64::from(logit / temperature).exp())
            .collect();
        let all: f64 = weights.iter().sum();
        let found = counts(device, &logits, choice, None)?;
        for (token, (&count, weight)) in found.iter().zip(&weights).enumerate() {
            let expected = weight / all * f64::from(DRAWS);
            assert!(
                (count as f64 - expected).abs() <= 1.5,
                "token {token} at {temperature}: {count} draws, expected {expected:.2}"
            );
        }
    }
    Ok(())
}

fn bounds_leave_out_the_rest() -> Outcome {
    bounds_on(&Device::Cpu)
}

fn bounds_on(device: &Device) -> Outcome {
    // Probabilities of 1/2, 1/4, 1/8 ..., in no order; the fourth and fifth are equal.
    let shares = [0.0625f32, 0.5, 0.125, 0.0625, 0.25];
    let logits = shares.map(f32::ln);
    let drawn = |top_k, top_p, mask: Option<&[i32]>| -> Result<Vec<usize>> {
        let choice = TokenChoice {
            temperature: 1.0,
            top_k,
            top_p,
            random: 0,
        };
        let counts = counts(device, &logits, choice, mask)?;
        Ok((0..logits.len()).filter(|&token| counts[token] > 0).collect())
    };
    assert_eq!(drawn(0, 1.0, None)?, [0, 1, 2, 3, 4]);
    assert_eq!(drawn(1, 1.0, None)?, [1]);
    assert_eq!(drawn(3, 1.0, None)?, [1, 2, 4]);
    assert_eq!(drawn(4, 1.0, None)?, [0, 1, 2, 3, 4]);
    assert_eq!(drawn(0, 1e-6, None)?, [1]);
    assert_eq!(drawn(0, 0.49, None)?, [1]);
    assert_eq!(drawn(0, 0.6, None)?, [1, 4]);
    assert_eq!(drawn(0, 0.8, None)?, [1, 2, 4]);
    // Of the three largest the first two have 6/7.
    assert_eq!(drawn(3, 0.85, None)?, [1, 4]);
    assert_eq!(drawn(3, 0.9, None)?, [1, 2, 4]);
    assert_eq!(drawn(2, 1.0, Some(&[0b10101]))?, [2, 4]);
    Ok(())
}

/// The last bits of exponentials differ, so a draw may fall to a neighbour now and then.
fn cuda_equals_cpu(device: &Device) -> Outcome {
    for vocabulary in [1, 31, 1000, 4099, 151_936] {
        const ROWS: usize = 48;
        let logits: Vec<f32> = random("logits", ROWS * vocabulary)
            .iter()
            .map(|value| 4.0 * value)
            .collect();
        let masks: Vec<i32> = random("masks", ROWS * mask_words(vocabulary))
            .iter()
            .map(|value| (value * 1e9) as i32 | 1)
            .collect();
        let randoms = random("random", ROWS);
        let choices: Vec<TokenChoice> = (0..ROWS)
            .map(|row| TokenChoice {
                temperature: [0.0, 0.7, 1.0, 2.0][row % 4],
                top_p: [1.0, 0.9, 0.3][row % 3],
                top_k: [0, 1, 20, 50, 100_000][row % 5],
                random: ((randoms[row] + 2.0) * 1e9) as u32,
            })
            .collect();
        for masked in [false, true] {
            let run = |device: &Device| -> Result<Vec<i32>> {
                let logits = Tensor::from_slice(device, &logits, [ROWS, vocabulary])?;
                let masks = Tensor::from_slice(device, &masks, [ROWS, mask_words(vocabulary)])?;
                sample_tokens(&logits, &choices, masked.then_some(&masks))?.to_vec()
            };
            let (found, expected) = (run(device)?, run(&Device::Cpu)?);
            let differ: Vec<usize> = (0..ROWS).filter(|&row| found[row] != expected[row]).collect();
            assert!(
                differ.len() <= 2,
                "{vocabulary} tokens, rows {differ:?}: {found:?}, expected {expected:?}"
            );
            assert!(differ.iter().all(|row| choices[*row].temperature > 0.0));
        }
    }
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let logits = Tensor::zeros(&Device::Cpu, [1, 40], DType::F32)?;
    let message = |choices: &[TokenChoice], allowed: Option<&Tensor>| {
        sample_tokens(&logits, choices, allowed).unwrap_err().to_string()
    };
    assert_eq!(message(&[], None), "sample_tokens: 0 choices for 1 rows of logits");
    let choice = TokenChoice::GREEDY;
    for temperature in [-1.0, f32::NAN, f32::INFINITY] {
        let message = message(&[TokenChoice { temperature, ..choice }], None);
        assert!(message.contains("expected 0 or a positive number"), "{message}");
    }
    for top_p in [0.0, 1.5, f32::NAN] {
        let message = message(&[TokenChoice { top_p, ..choice }], None);
        assert!(message.contains("more than 0 and at most 1"), "{message}");
    }
    let short = Tensor::zeros(&Device::Cpu, [1, 1], DType::I32)?;
    assert_eq!(
        message(&[choice], Some(&short)),
        "sample_tokens: allowed has shape [1, 1], expected [1, 2]"
    );
    Ok(())
}
