//! The loss on held-out pictures: always the same pictures, noise and noise levels, so that its values can be compared over
//! time and between runs.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::feeder::Feeder;
use crate::data::{DamageLog, DataSet, Item, ItemSource, PictureSize, damage_of};
use crate::dist::World;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use crate::train::TrainableModel;

/// Held-out pictures and how to load them.
pub struct Validation {
    set: DataSet,
    source: ItemSource,
    /// Pictures of one size each, as many as a training batch has at most.
    batches: Vec<Vec<usize>>,
    /// All of them.
    pictures: usize,
}

impl Validation {
    /// Held-out pictures in batches of at most `batch`. Every one is loaded once: those that cannot be are noted as damaged and
    /// left out.
    ///
    /// # Errors
    /// When too many are, or none is left.
    pub fn new(set: DataSet, source: ItemSource, batch: usize) -> Result<Self> {
        let sound = |picture: &usize| {
            let record = &set.records()[*picture];
            let outcome = source.load(&set, *picture, &record.caption);
            outcome
                .map_err(|error| set.damages().note(damage_of(record, &error)))
                .is_ok()
        };
        let sound: Vec<usize> = (0..set.records().len()).into_par_iter().filter(sound).collect();
        set.damages().check()?;
        if sound.is_empty() {
            return Err(Error::invalid("no picture for the validation loss can be used"));
        }
        let mut by_size: BTreeMap<PictureSize, Vec<usize>> = BTreeMap::new();
        for &picture in &sound {
            by_size.entry(set.sizes()[picture]).or_default().push(picture);
        }
        let batches = by_size
            .values()
            .flat_map(|pictures| pictures.chunks(batch.max(1)).map(<[usize]>::to_vec));
        Ok(Validation {
            batches: batches.collect(),
            pictures: sound.len(),
            set,
            source,
        })
    }

    /// The number of pictures.
    pub fn pictures(&self) -> usize {
        self.pictures
    }

    /// The pictures that cannot be used.
    pub fn damages(&self) -> &DamageLog {
        self.set.damages()
    }

    /// The mean loss; ranks take batches in turn, and all know it afterwards. `go_on` is asked between batches; an error from it ends
    /// the work.
    ///
    /// # Errors
    /// When a picture is damaged, the device has no room, or `go_on` says so.
    pub fn loss(
        &self,
        model: &TrainableModel,
        feeder: &mut Feeder<'_>,
        world: &World,
        go_on: &mut dyn FnMut() -> Result<()>,
    ) -> Result<f64> {
        let own = world.together("validation", self.own_losses(model, feeder, world, go_on))?;
        let ranks = world.share("validation losses", own)?;
        let mut losses = ranks.iter().map(|losses| losses.iter()).collect::<Vec<_>>();
        let mut sum = 0.0;
        for (number, pictures) in self.batches.iter().enumerate() {
            let loss = losses[number % world.size()].next();
            let loss = loss.ok_or_else(|| Error::invalid("a rank has computed too few validation losses"))?;
            sum += f64::from(*loss) * pictures.len() as f64;
        }
        Ok(sum / self.pictures.max(1) as f64)
    }

    /// The losses of this rank's batches.
    fn own_losses(
        &self,
        model: &TrainableModel,
        feeder: &mut Feeder<'_>,
        world: &World,
        go_on: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<f32>> {
        let total = self.pictures;
        let mut losses: Vec<Tensor> = Vec::with_capacity(self.batches.len());
        let mut first = 0;
        for (number, pictures) in self.batches.iter().enumerate() {
            go_on()?;
            if number % world.size() != world.rank() {
                first += pictures.len();
                continue;
            }
            let load = |&picture: &usize| {
                let record = &self.set.records()[picture];
                let item = self.source.load(&self.set, picture, &record.caption);
                item.map_err(|error| Error::invalid(format!("a picture for validation, {}: {error}", record.name)))
            };
            let items: Vec<Item> = pictures.par_iter().map(load).collect::<Result<_>>()?;
            let batch = feeder.validation(&items, first, total)?;
            losses.push(batch.with(|batch| model.evaluate(batch))?);
            first += items.len();
        }
        losses.iter().map(|loss| Ok(loss.to_vec::<f32>()?[0])).collect()
    }
}
