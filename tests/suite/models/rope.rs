//! The table of rotations at the largest positions in use.

use l2p_engine::Device;
use l2p_engine::model::rope::{Position, RopeAxes};
use l2p_tests::fixtures::Group;
use l2p_tests::{Outcome, Suite};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "models::rope::far_positions_equal_diffusers",
        far_positions_equal_diffusers,
    );
}

/// The rotation itself is plain loops here: pairs are neighbours, (a, b) to (a·cos − b·sin, a·sin + b·cos).
fn far_positions_equal_diffusers() -> Outcome {
    let group = Group::load("ops");
    for case in group.cases("rope_interleaved_far.") {
        let ((ids, _), (x, shape)) = (case.input("ids"), case.input("x"));
        let positions: Vec<Position> = ids
            .chunks(3)
            .map(|id| [id[0] as usize, id[1] as usize, id[2] as usize])
            .collect();
        let axes = RopeAxes {
            theta: 256.0,
            dims: [32, 48, 48],
            rounded: true,
        };
        let table = axes.table(&Device::Cpu, &[positions])?;
        assert_eq!(table.shape().to_vec(), [1, shape[1], shape[3] / 2, 2]);
        let turned: Vec<f32> = x
            .chunks(2)
            .zip(table.as_slice::<f32>()?.chunks(2))
            .flat_map(|(pair, turn)| {
                let [a, b, cos, sin] = [pair[0], pair[1], turn[0], turn[1]].map(f64::from);
                [a * cos - b * sin, a * sin + b * cos].map(|value| value as f32)
            })
            .collect();
        case.check("y", &turned)?;
    }
    Ok(())
}
