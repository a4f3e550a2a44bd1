//! Blocks and Detailer Heads.

use l2p_engine::layers::{
    self, Gradients, Loaded, Loader, MakeSlots, MemoryParams, Module, NamedParameter, Slot, metas, slots,
};
use l2p_engine::model::config::ModelKind;
use l2p_engine::model::detailer::Detailer;
use l2p_engine::model::rope::{Position, RopeAxes};
use l2p_engine::model::work::Keep;
use l2p_engine::model::zimage::block::{Block, Condition, Saving, Sequence, Sinks, backward_blocks, run_blocks};
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::fixtures::{Case, Group};
use l2p_tests::{Outcome, Suite, Tolerance, expect_like_cpu};

use crate::models::{channels_first, input_image, params, rounded, small_config};

pub fn register(suite: &mut Suite) {
    suite.cpu("train::modules::blocks_equal_torch", blocks_equal_torch);
    suite.cpu("train::modules::heads_equal_torch", heads_equal_torch);
    suite.cpu("train::modules::frozen_parts_change_no_other_gradient", frozen_parts);
    suite.cuda("train::modules::cuda_blocks_equal_cpu", cuda_blocks_equal_cpu);
    suite.cuda("train::modules::cuda_heads_equal_cpu", cuda_heads_equal_cpu);
}

/// The gradients of a module of some fifteen operations in bf16.
const BF16_GRADIENT_TOLERANCE: Tolerance = Tolerance::of_gradients(2e-2);

/// Places for the gradients of those of a loaded module's parameters whose first tensor's name `trained` says so.
fn places<M: Module<Kind = Loaded>>(
    module: &M,
    metas: &[&NamedParameter],
    trained: impl Fn(&str) -> bool,
) -> Result<M::As<Gradients>> {
    let chosen = metas.iter().map(|meta| trained(meta.name()));
    module.transform(&mut MakeSlots(chosen))
}

/// Gradients by published name.
fn named(metas: &[&NamedParameter], slots: &[&Slot]) -> Result<Vec<(String, Vec<f32>)>> {
    let mut all = Vec::new();
    for (meta, slot) in metas.iter().zip(slots) {
        let Some(slot) = slot else { continue };
        let values = slot.to_vec_f32()?;
        for (index, part) in meta.parts.iter().enumerate() {
            let own = values[meta.range(index)].to_vec();
            all.push((part.name.clone(), meta.to_published(index, own)));
        }
    }
    Ok(all)
}

const BLOCK: &str = "block";

/// What a block's backward pass gives for a case: the gradients of x and c, and of every trained parameter.
struct BlockRun<'a> {
    case: &'a Case<'a>,
    params: MemoryParams,
    round: bool,
    keep: Keep,
}

impl<'a> BlockRun<'a> {
    fn new(case: &'a Case<'a>, round: bool, keep: Keep) -> Self {
        let named = case.weights().into_iter().map(|(name, (shape, values))| {
            let values = if round { rounded(&values) } else { values };
            (format!("{BLOCK}.{name}"), (shape, values))
        });
        BlockRun {
            case,
            params: MemoryParams(named.collect()),
            round,
            keep,
        }
    }

    fn values(&self, name: &str) -> (Vec<f32>, Vec<usize>) {
        let (values, shape) = self.case.input(name);
        (if self.round { rounded(&values) } else { values }, shape)
    }

    fn lengths(&self) -> Option<Vec<usize>> {
        let is_list = self.case.has_config(&["lengths"]);
        is_list.then(|| self.case.sizes(&["lengths"]))
    }

    #[allow(clippy::type_complexity)]
    fn run(
        &self,
        device: &Device,
        trained: impl Fn(&str) -> bool,
    ) -> Result<(Tensor, Option<Tensor>, Vec<(String, Vec<f32>)>)> {
        let modulated = self.case.has_input("c");
        let config = small_config(ModelKind::Latent, self.case.size(&["dim"]), 2);
        let described = Block::describe(&config, layers::Group::Refiner, BLOCK, modulated);
        let blocks = [Loader::load(&described, &self.params, device, &mut |_, _| Ok(()))?];
        let (x, shape) = self.values("x");
        let x = Tensor::from_f32(device, &x, shape.as_slice())?;
        let ids: Vec<Position> = self
            .case
            .input("ids")
            .0
            .chunks(3)
            .map(|id| [id[0] as usize, id[1] as usize, id[2] as usize])
            .collect();
        let axes = RopeAxes {
            theta: config.rope_theta,
            dims: config.axes_dims,
            rounded: true,
        };
        let rope = axes.table(device, &ids.chunks(shape[1]).map(<[_]>::to_vec).collect::<Vec<_>>())?;
        let lengths = self
            .lengths()
            .map(|lengths| lengths.into_iter().map(|length| length as i32).collect::<Vec<_>>());
        let lengths = lengths
            .map(|lengths| Tensor::from_slice(device, &lengths, [lengths.len()]))
            .transpose()?;
        let sequence = Sequence {
            rope: &rope,
            key_lengths: lengths.as_ref(),
        };
        let c = match modulated {
            true => {
                let (c, shape) = self.values("c");
                Some(Tensor::from_slice(device, &c, shape.as_slice())?)
            }
            false => None,
        };
        let table = c.as_ref().map(|c| blocks[0].modulation_table(c)).transpose()?.flatten();
        let condition = c
            .as_ref()
            .zip(table.as_ref())
            .map(|(c, table)| Condition { table, first: 0, c });
        let mut kept = Vec::new();
        let saving = Saving {
            keeps: &[self.keep],
            kept: &mut kept,
        };
        let vectors = condition.map(|condition| (condition.table, condition.first));
        run_blocks(&blocks, vectors, x, &sequence, Some(saving))?;

        let (mut dy, _) = self.values("grad.y");
        if let Some(lengths) = self.lengths() {
            // Rows past an item's length count for nothing.
            for (item, length) in dy.chunks_mut(shape[1] * shape[2]).zip(lengths) {
                item[length * shape[2]..].fill(0.0);
            }
        }
        let dy = Tensor::from_f32(device, &dy, shape.as_slice())?;
        let metas = metas(&described);
        let mut gradients = [places(&blocks[0], &metas, trained)?];
        let mut dc = c
            .as_ref()
            .map(|c| Tensor::zeros(device, c.shape(), DType::F32))
            .transpose()?;
        let sinks = Sinks {
            gradients: &mut gradients,
            dc: dc.as_mut(),
            finished: &mut |_, _| Ok(()),
        };
        let dx = backward_blocks(&blocks, condition, dy, &sequence, kept, sinks)?;
        let dx = dx.expect("the block was reached");
        Ok((dx, dc, named(&metas, &slots(&gradients[0]))?))
    }
}

fn blocks_equal_torch() -> Outcome {
    let group = Group::load("grads");
    for case in group.cases("block.") {
        for keep in [Keep::Everything, Keep::Input] {
            let (dx, dc, gradients) = BlockRun::new(&case, false, keep).run(&Device::Cpu, |_| true)?;
            case.check("grad.x", dx.as_slice()?)?;
            if let Some(dc) = dc {
                case.check("grad.c", dc.as_slice()?)?;
            }
            let expected = case.expected().len() - 1 - usize::from(case.has_input("c"));
            assert_eq!(gradients.len(), expected, "{}", case.name());
            for (name, values) in gradients {
                let name = name.trim_start_matches("block.");
                case.check(&format!("grad.{name}"), &values)?;
            }
        }
    }
    Ok(())
}

/// With some parameters frozen the gradients of the others are the same bits, and there are no further ones.
fn frozen_parts() -> Outcome {
    let group = Group::load("grads");
    let case = group.case("block.modulated.unequal");
    let run = BlockRun::new(&case, false, Keep::Everything);
    let (dx, dc, all) = run.run(&Device::Cpu, |_| true)?;
    let whole = dx.to_vec_f32()?;
    for frozen in [
        "",
        "attention.to_q",
        "attention_norm2",
        "feed_forward.w1",
        "feed_forward.w2",
        "adaLN",
        "norm",
    ] {
        let trained = |name: &str| !name.contains(frozen);
        let (dx, other_dc, gradients) = run.run(&Device::Cpu, trained)?;
        assert_eq!(dx.to_vec_f32()?, whole, "without {frozen}");
        assert_eq!(
            other_dc.expect("modulated").to_vec_f32()?,
            dc.as_ref().expect("modulated").to_vec_f32()?,
            "without {frozen}"
        );
        // Stacked projections go together, by the name of the first.
        let stack = |name: &str| name.replace("to_k", "to_q").replace("to_v", "to_q").replace("w3", "w1");
        let expected: Vec<_> = all.iter().filter(|(name, _)| trained(&stack(name))).collect();
        assert_eq!(expected.is_empty(), frozen.is_empty(), "without {frozen}");
        assert!(expected.len() < all.len(), "`{frozen}` freezes nothing");
        assert_eq!(gradients.iter().collect::<Vec<_>>(), expected, "without {frozen}");
    }
    Ok(())
}

fn cuda_blocks_equal_cpu(device: &Device) -> Outcome {
    let group = Group::load("grads");
    let case = group.case("block.modulated.d384");
    for keep in [Keep::Everything, Keep::Input] {
        let run = BlockRun::new(&case, true, keep);
        expect_like_cpu(&format!("{keep:?}"), device, BF16_GRADIENT_TOLERANCE, |device| {
            let (dx, dc, gradients) = run.run(device, |_| true)?;
            let gradients = gradients
                .into_iter()
                .map(|(_, values)| Tensor::from_slice(&Device::Cpu, &values, [values.len()]));
            [Ok(dx), Ok(dc.expect("modulated"))]
                .into_iter()
                .chain(gradients)
                .collect()
        })?;
    }
    Ok(())
}

const HEAD: &str = "local_decoder";

#[allow(clippy::type_complexity)]
fn run_head(
    case: &Case<'_>,
    params: &MemoryParams,
    device: &Device,
    keep_sums: bool,
    trained: impl Fn(&str) -> bool,
) -> Result<(Option<Tensor>, Vec<(String, Vec<f32>)>)> {
    let head = Detailer::load(params, device, HEAD)?;
    let image = |name: &str| -> Result<Tensor> {
        let image = input_image(case, name)?;
        Tensor::from_f32(device, &rounded(image.as_slice()?), image.shape())
    };
    let exact = |name: &str| input_image(case, name);
    let on_cpu = matches!(device, Device::Cpu);
    let (x, c, dv) = match on_cpu {
        true => (exact("x")?, exact("c")?, exact("grad.v")?),
        false => (image("x")?, image("c")?, image("grad.v")?),
    };
    let (_, kept) = head.forward_saving(&x, c, keep_sums)?;
    let described = head.layout().describe(HEAD);
    let metas = metas(&described);
    let mut gradients = places(&head, &metas, trained)?;
    let dc = head.backward(&dv, kept, &mut gradients, true)?;
    Ok((dc, named(&metas, &slots(&gradients))?))
}

fn heads_equal_torch() -> Outcome {
    let group = Group::load("grads");
    for case in group.cases("head.") {
        for keep_sums in [true, false] {
            let (dc, gradients) = run_head(&case, &params(&case), &Device::Cpu, keep_sums, |_| true)?;
            case.check("grad.c", &channels_first(&dc.expect("it was wanted"))?)?;
            for (name, values) in &gradients {
                case.check(&format!("grad.{name}"), values)?;
            }
            // All but those of the two inputs.
            assert_eq!(gradients.len(), case.expected().len() - 2, "{}", case.name());
        }
        let (_, all) = run_head(&case, &params(&case), &Device::Cpu, true, |_| true)?;
        for part in ["dec", "enc2", "bottleneck.0.weight", "out_conv"] {
            let (_, some) = run_head(&case, &params(&case), &Device::Cpu, true, |name| name.contains(part))?;
            let expected: Vec<_> = all.iter().filter(|(name, _)| name.contains(part)).collect();
            assert_eq!(some.iter().collect::<Vec<_>>(), expected, "{part} of {}", case.name());
        }
    }
    Ok(())
}

fn cuda_heads_equal_cpu(device: &Device) -> Outcome {
    let group = Group::load("grads");
    for case in group.cases("head.") {
        let params = crate::models::rounded_params(&case);
        for keep_sums in [true, false] {
            expect_like_cpu(case.name(), device, Tolerance::of_gradients(5e-2), |device| {
                let (dc, gradients) = run_head(&case, &params, device, keep_sums, |_| true)?;
                let gradients = gradients
                    .into_iter()
                    .map(|(_, values)| Tensor::from_slice(&Device::Cpu, &values, [values.len()]));
                dc.map(Ok).into_iter().chain(gradients).collect()
            })?;
        }
    }
    Ok(())
}
