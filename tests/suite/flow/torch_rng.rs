use l2p_engine::flow::TorchNormal;
use l2p_tests::fixtures::Group;
use l2p_tests::{Outcome, Suite};

/// What equality in every bit leaves: the norm of a reference is stored to nine digits.
const EXACT: f64 = 1e-8;

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "flow::torch_rng::uniform_numbers_equal_torch",
        uniform_numbers_equal_torch,
    );
    suite.cpu(
        "flow::torch_rng::normal_numbers_equal_torch",
        normal_numbers_equal_torch,
    );
    suite.cpu(
        "flow::torch_rng::consecutive_draws_equal_torch",
        consecutive_draws_equal_torch,
    );
}

fn uniform_numbers_equal_torch() -> Outcome {
    for case in Group::load("rng").cases("rand.") {
        let found = TorchNormal::new(case.size(&["seed"]) as u64).sample_uniform(case.size(&["count"]));
        case.check_to("values", &found, Some(EXACT))?;
    }
    Ok(())
}

fn normal_numbers_equal_torch() -> Outcome {
    for case in Group::load("rng").cases("randn.") {
        let count = case.sizes(&["shape"]).into_iter().product::<usize>();
        let found = TorchNormal::new(case.size(&["seed"]) as u64).sample(count);
        // Short requests are drawn in f64.
        case.check_to("values", &found, (count < 16).then_some(EXACT))?;
    }
    Ok(())
}

fn consecutive_draws_equal_torch() -> Outcome {
    for case in Group::load("rng").cases("randn_sequence") {
        let mut generator = TorchNormal::new(case.size(&["seed"]) as u64);
        for (index, count) in case.sizes(&["counts"]).into_iter().enumerate() {
            case.check(&format!("values.{index}"), &generator.sample(count))?;
        }
    }
    Ok(())
}
