use l2p_engine::ops::embedding::embedding;
use l2p_engine::{DType, Device, Tensor};
use l2p_tests::fixtures::Group;
use l2p_tests::{Outcome, Suite, expect_like_cpu, random_bf16};

pub fn register(suite: &mut Suite) {
    suite.cpu("ops::embedding::cpu_equals_reference", cpu_equals_reference);
    suite.cpu("ops::embedding::wrong_ids_are_named", wrong_ids_are_named);
    suite.cuda("ops::embedding::cuda_equals_cpu", cuda_equals_cpu);
    suite.cuda("ops::embedding::cuda_marks_wrong_ids", cuda_marks_wrong_ids);
}

fn cpu_equals_reference() -> Outcome {
    let group = Group::load("ops");
    let case = group.case("embedding.qwen");
    let (rows, dim) = (case.size(&["rows"]), case.size(&["dim"]));
    let table = Tensor::from_slice(&Device::Cpu, &case.weight("embed_tokens.weight"), [rows, dim])?;
    let ids: Vec<i32> = case.sizes(&["ids"]).into_iter().map(|id| id as i32).collect();
    let output = embedding(&table, &Tensor::from_slice(&Device::Cpu, &ids, [1, ids.len()])?)?;
    case.check("y", output.as_slice()?)
}

fn wrong_ids_are_named() -> Outcome {
    let table = Tensor::zeros(&Device::Cpu, [10, 4], DType::F32)?;
    for bad in [10, -1, i32::MIN, i32::MAX] {
        let ids = Tensor::from_slice(&Device::Cpu, &[0, bad, 9], [1, 3])?;
        let message = embedding(&table, &ids).unwrap_err().to_string();
        assert_eq!(message, format!("embedding: id {bad} lies outside a table of 10 rows"));
    }
    let ids = Tensor::zeros(&Device::Cpu, [1, 3], DType::F32)?;
    let message = embedding(&table, &ids).unwrap_err().to_string();
    assert_eq!(message, "embedding: ids holds f32, expected i32");
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    for (rows, dim, batch, tokens) in [(3, 8, 1, 1), (300, 64, 2, 7), (1000, 2560, 1, 77), (5, 1032, 3, 5)] {
        expect_like_cpu(&format!("{rows}x{dim} at {batch}x{tokens}"), device, 0.0, |device| {
            let table = Tensor::from_f32(device, &random_bf16("table", rows * dim), [rows, dim])?;
            let ids: Vec<i32> = (0..batch * tokens)
                .map(|index| ((index * 7919 + rows - 1) % rows) as i32)
                .collect();
            Ok(vec![embedding(
                &table,
                &Tensor::from_slice(device, &ids, [batch, tokens])?,
            )?])
        })?;
    }
    Ok(())
}

fn cuda_marks_wrong_ids(device: &Device) -> Outcome {
    let table = Tensor::zeros(device, [10, 264], DType::Bf16)?;
    let ids = Tensor::from_slice(device, &[0, 10, 9, -1], [2, 2])?;
    let output = embedding(&table, &ids)?.to_vec_f32()?;
    for (row, values) in output.chunks(264).enumerate() {
        let wrong = row % 2 == 1;
        assert!(values.iter().all(|value| value.is_nan() == wrong), "row {row}");
    }
    Ok(())
}
