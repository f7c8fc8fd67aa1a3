//! What a method is to the rest of the program: a name, options that are defined once, and the run that they make.

use std::fmt::{self, Debug};
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::parts::{part_of, readers};
use super::{
    ControlUse, Geometry, METHODS, Run, Sampling, Size, Stage, StageParts, base_size, check_size, consecutive,
};
use crate::error::{Error, Result};
use crate::names::one_of;
use crate::runtime::Tensor;
use crate::schedulers::{Sampler, Scheduler, SchedulerConfig};

/// A way to make a picture, usually larger than those that the model was trained with. The implementation is a struct of
/// the method's options; serde gives them their names in JSON, [`MethodSpec::options`] their help.
pub trait GenerationMethod: Debug + Send + Sync {
    /// The sampler of a request that names none.
    fn sampler(&self, config: &SchedulerConfig) -> Sampler {
        config.sampler()
    }

    /// DDIM's share of fresh noise of a request that names none.
    fn eta(&self) -> f64 {
        0.0
    }

    /// The final size of a request that names none, for a model trained at `native`.
    fn default_size(&self, native: Size) -> Size {
        native
    }

    /// The stages of a request that names only its final size. Default: one, with every step.
    ///
    /// # Errors
    /// [`Error::Request`]: the size is not made of whole cells.
    fn stages(&self, geometry: &Geometry) -> Result<Vec<Stage>> {
        let &Geometry { size, sides, steps, .. } = geometry;
        check_size("size", size, sides.multiple())?;
        Ok(vec![Stage::new(size, steps)])
    }

    /// The stages of a run that enlarges a picture, whose size in whole cells is `picture`. Default: those of
    /// [`stages`](GenerationMethod::stages) for a model trained at the picture's size; at its own where that is larger and the
    /// network makes the first stage.
    ///
    /// # Errors
    /// As [`stages`](GenerationMethod::stages).
    fn stages_from_picture(&self, geometry: &Geometry, picture: Size) -> Result<Vec<Stage>> {
        let made = self.in_place_of_first_stage().is_none() && geometry.native.area() > picture.area();
        self.stages(&Geometry { native: if made { geometry.native } else { picture }, ..*geometry })
    }

    /// Which steps of the run's schedule each stage takes; the schedule has as many as the last of them asks for. Default:
    /// the stages share it, one after the other, as those of a relay do.
    fn ranges(&self, stages: &[Stage]) -> Vec<Range<usize>> {
        consecutive(stages)
    }

    /// Does it begin from a picture where the run has one? Most methods do by [`Sampling::first_samples`]: their stages take
    /// consecutive steps, and those before [`Run::first_stage`] are not run.
    fn begins_from_pictures(&self) -> bool {
        true
    }

    /// Does a picture stand in place of what the first stage makes, whose steps are then not run? The method begins with
    /// `Sampling::first_stage`, and has no strength: this names what says how much of the enlarged picture is made anew.
    fn in_place_of_first_stage(&self) -> Option<&'static str> {
        None
    }

    /// Do its steps go over views of the map, so that no step has one output of the network to keep
    /// ([`StepCache`](super::StepCache))?
    fn steps_over_views(&self) -> bool {
        false
    }

    /// Does it make pictures by models over pixels (DeepFloyd IF), whose networks give more than a sample's channels?
    fn takes_pixels(&self) -> bool {
        false
    }

    /// Are its steps guided on the whole map, so that guidance can have a scale per band of frequencies
    /// ([`FrequencySplit`](super::FrequencySplit))?
    fn splits_guidance(&self) -> bool {
        !self.steps_over_views()
    }

    /// The scale of guidance's high band of a run that is not told it; `None`: guidance is not split.
    fn guidance_high(&self, _run: &Run) -> Option<f32> {
        None
    }

    /// Height and width in cells of what guidance's low band fits in a stage, where guidance is split; `None`: not in this stage.
    /// Default: the map of the stage before, in a first stage the trained one's; stages up to the trained area are not split.
    fn guidance_grid(&self, run: &Run, stage: usize) -> Option<[usize; 2]> {
        let size = run.stages()[stage].size;
        if run.native().is_some_and(|native| size.area() <= native.area()) {
            return None;
        }
        let before = match stage.checked_sub(1) {
            Some(before) => run.stages()[before].size,
            None => base_size(size, run.native()?, run.sides().multiple()),
        };
        (before.area() < size.area()).then(|| run.cells(before))
    }

    /// The schedule of a run: `scheduler` has as many steps as the stages ask for. Default: as it is.
    ///
    /// # Errors
    /// [`Error::Request`], naming the option.
    fn schedule(&self, scheduler: Scheduler, _run: &Run) -> Result<Scheduler> {
        Ok(scheduler)
    }

    /// How much of the schedule a run from a picture makes where nothing is said of it, with a mask or without.
    fn default_strength(&self, repaints: bool) -> f64 {
        if repaints { 1.0 } else { 0.8 }
    }

    /// The same of a run that enlarges a picture: of a relay the last steps at the large size, and some before them at the
    /// picture's own.
    fn enlarging_strength(&self) -> f64 {
        0.35
    }

    /// Values of options that are unset in a run that enlarges a picture.
    fn enlarging_options(&self, _geometry: &Geometry) -> Vec<(&'static str, Value)> {
        Vec::new()
    }

    /// What its stages may do beside its own ([`StageParts`]).
    fn parts(&self) -> StageParts {
        StageParts::NONE
    }

    /// The size that the network is told of, where it reads sizes: the stage's own.
    fn told_size(&self, run: &Run, stage: usize) -> Size {
        run.stages()[stage].size
    }

    /// What SDXL is told of the original picture's size where ControlNets take part and the request does not say it. `None`: what it is
    /// told without them.
    fn original_beside_controls(&self, _run: &Run) -> Option<Size> {
        None
    }

    /// How ControlNets are asked in a step of a stage, at this share of the steps, 0 to 1.
    fn control_use(&self, _run: &Run, _stage: usize, _share: f64) -> ControlUse {
        ControlUse::Whole
    }

    /// What the samples after a step are called in a dump: `stage` from 0, `step` in it from 1, `run_step` over all stages.
    fn step_name(&self, _stage: usize, _step: usize, run_step: usize) -> String {
        format!("step{run_step}")
    }

    /// The pictures of the samples that [`sample`](GenerationMethod::sample) gives, `[1, H, W, 3]` each.
    ///
    /// # Errors
    /// Those of the model.
    fn decode(&self, sampling: &mut Sampling, samples: &Tensor) -> Result<Vec<Tensor>> {
        sampling.decode(samples)
    }

    /// Can a run be made as the options and `run` say? What every method asks (stages with steps, sizes of whole cells)
    /// has been checked. Asked a second time once the model is known ([`Run::model`]).
    ///
    /// # Errors
    /// [`Error::Request`], naming the option.
    fn check(&self, run: &Run) -> Result<()>;

    /// All phases of a run: the samples to decode, `[N, h, w, C]`, f32.
    ///
    /// # Errors
    /// [`Error::Interrupted`]; [`Error::NonFinite`], naming the phase; those of the model.
    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor>;
}

/// A method as it is listed: its name, its help, its options and their defaults.
#[derive(Debug)]
pub struct MethodSpec {
    pub name: &'static str,
    /// What it does, in half a sentence, and its paper.
    pub summary: &'static str,
    /// Can a run have several sizes (`stages`)?
    pub relays: bool,
    /// What it draws besides noise, by name ([`Choices`](super::Choices)); `jitter` stands for `jitter2`, `jitter3` and so on.
    pub choices: &'static [&'static str],
    /// The options that it reads, in the order of the struct's fields.
    pub options: &'static [OptionSpec],
    /// From options as JSON, the rest being the defaults; made by [`from_options`].
    pub parse: fn(&Map<String, Value>) -> serde_json::Result<Parsed>,
}

/// A method's implementation and all of its options by name, defaults included.
pub type Parsed = (Arc<dyn GenerationMethod>, Map<String, Value>);

/// An option of a method. Its name is that of the struct's field, so that of JSON.
#[derive(Clone, Copy, Debug)]
pub struct OptionSpec {
    /// `relay_clamp`
    pub name: &'static str,
    /// The help's heading: the method's name for people.
    pub heading: &'static str,
    /// Stands for the value in the help.
    pub value_name: &'static str,
    /// Line 1 is the summary; further lines are the long help, where another option stands as `request.relay_clamp`.
    pub help: &'static str,
    pub kind: OptionKind,
}

/// Which values an option takes.
#[derive(Clone, Copy, Debug)]
pub enum OptionKind {
    /// Given or not.
    Switch,
    Bool,
    /// From 0 to 1, both ends included.
    Share,
    Choice(&'static [&'static str]),
    Integer {
        least: i64,
        most: i64,
        /// What the error says.
        expected: &'static str,
    },
    /// Above `above`, at most `most`.
    Number {
        above: f64,
        most: f64,
        expected: &'static str,
    },
    /// As many numbers with commas between them, each from `least` to `most`.
    Numbers {
        count: usize,
        least: f64,
        most: f64,
        expected: &'static str,
    },
    /// What `check` accepts; else it says what is expected.
    Text {
        check: fn(&str) -> std::result::Result<(), String>,
    },
}

impl OptionKind {
    /// The JSON value of a text on the command line.
    ///
    /// # Errors
    /// What is expected, in words.
    pub fn parse(self, text: &str) -> std::result::Result<Value, String> {
        match self {
            OptionKind::Switch => Ok(Value::Bool(true)),
            OptionKind::Bool => text.parse().map(Value::Bool).map_err(|_| "expected true or false".into()),
            OptionKind::Share => match text.parse::<f64>() {
                Ok(x) if (0.0..=1.0).contains(&x) => Ok(x.into()),
                _ => Err("expected a number from 0 to 1".into()),
            },
            OptionKind::Choice(names) => match names.contains(&text) {
                true => Ok(text.into()),
                false => Err(format!("expected {}", one_of(names))),
            },
            OptionKind::Integer { least, most, expected } => match text.parse::<i64>() {
                Ok(n) if (least..=most).contains(&n) => Ok(n.into()),
                _ => Err(expected.into()),
            },
            OptionKind::Number { above, most, expected } => match text.parse::<f64>() {
                Ok(x) if x > above && x <= most => Ok(x.into()),
                _ => Err(expected.into()),
            },
            OptionKind::Numbers { count, least, most, expected } => {
                let numbers: Vec<f64> = text.split(',').map_while(|number| number.trim().parse().ok()).collect();
                let fit = numbers.iter().all(|number| (least..=most).contains(number));
                match fit && numbers.len() == count && text.split(',').count() == count {
                    true => Ok(numbers.into()),
                    false => Err(expected.into()),
                }
            }
            OptionKind::Text { check } => check(text).map(|()| text.into()),
        }
    }
}

/// A method with its options, decided. Clones share it.
#[derive(Clone, Debug)]
pub struct Method {
    spec: &'static MethodSpec,
    implementation: Arc<dyn GenerationMethod>,
    /// Every option, defaults included.
    options: Map<String, Value>,
    /// The options that were given.
    given: Map<String, Value>,
}

/// [`MethodSpec::parse`] of a struct with serde: the default, with the given options in its place.
///
/// # Errors
/// An option that is unknown or whose value does not fit.
pub fn from_options<M>(default: M, given: &Map<String, Value>) -> serde_json::Result<Parsed>
where
    M: GenerationMethod + Serialize + DeserializeOwned + 'static,
{
    let mut all = to_map(&default)?;
    all.extend(given.clone());
    let method: M = serde_json::from_value(Value::Object(all))?;
    let options = to_map(&method)?;
    Ok((Arc::new(method), options))
}

fn to_map<M: Serialize>(method: &M) -> serde_json::Result<Map<String, Value>> {
    match serde_json::to_value(method)? {
        Value::Object(map) => Ok(map),
        _ => Ok(Map::new()),
    }
}

impl Method {
    /// A method with its default options.
    ///
    /// # Errors
    /// [`Error::Request`]: no method has this name.
    pub fn named(name: &str) -> Result<Method> {
        Method::with_options(MethodSpec::find(name)?, Map::new())
    }

    /// # Errors
    /// [`Error::Request`]: an option that the method does not have, and which methods have it; a value that does not fit.
    pub fn with_options(spec: &'static MethodSpec, given: Map<String, Value>) -> Result<Method> {
        for name in given.keys() {
            if spec.option(name).is_none() {
                return Err(without_effect(name, &given[name], &[spec]));
            }
        }
        match (spec.parse)(&given) {
            Ok((implementation, options)) => Ok(Method { spec, implementation, options, given }),
            Err(error) => {
                // Which of them?
                let alone = |(name, value): (&String, &Value)| Map::from_iter([(name.clone(), value.clone())]);
                let wrong = given.iter().find(|option| (spec.parse)(&alone(*option)).is_err());
                let (name, value) = wrong.map_or(("options", Value::Null), |(name, value)| (name, value.clone()));
                let field = spec.option(name).map_or("method", |option| option.name);
                Err(Error::Request { field, value: text_of(&value), reason: error.to_string() })
            }
        }
    }

    /// The method `spec` with these options, all of them taken as given.
    pub fn of<M: GenerationMethod + Serialize + 'static>(spec: &'static MethodSpec, options: M) -> Method {
        let all = to_map(&options).expect("a method's options are a JSON object");
        Method { spec, implementation: Arc::new(options), given: all.clone(), options: all }
    }

    /// `self` with a further option, or another value of one.
    ///
    /// # Errors
    /// As [`with_options`](Method::with_options).
    pub fn with(&self, name: &str, value: impl Into<Value>) -> Result<Method> {
        let mut given = self.given.clone();
        given.insert(name.into(), value.into());
        Method::with_options(self.spec, given)
    }

    /// Another method, with those of the options given here that it has.
    ///
    /// # Errors
    /// [`Error::Request`]: a value that does not fit.
    pub fn replaced_by(&self, spec: &'static MethodSpec) -> Result<Method> {
        // An option of its own is none of a stage's part.
        let kept = |name: &str| spec.part_of(name).is_none() || self.spec.part_of(name).is_some();
        let known = self.given.iter().filter(|(name, _)| spec.option(name).is_some() && kept(name));
        Method::with_options(spec, known.map(|(name, value)| (name.clone(), value.clone())).collect())
    }

    pub fn name(&self) -> &'static str {
        self.spec.name
    }

    pub fn spec(&self) -> &'static MethodSpec {
        self.spec
    }

    /// Every option by its name, defaults included; those that are unset and have no default are left out.
    pub fn options(&self) -> &Map<String, Value> {
        &self.options
    }

    /// `option`, if the method has it and it is set.
    pub fn option(&self, name: &str) -> Option<&Value> {
        self.options.get(name)
    }

    /// Steps of the schedule of a run with these stages.
    pub fn scheduled_steps(&self, stages: &[Stage]) -> usize {
        self.implementation.ranges(stages).iter().map(|range| range.end).max().unwrap_or(0)
    }

    /// What says how much of an enlarged picture is made anew, of a method that has no strength: a picture that the run begins
    /// from stands in place of its first stage's.
    pub fn in_place_of_first_stage(&self) -> Option<&'static str> {
        self.implementation.in_place_of_first_stage()
    }

    /// How much of the schedule a run makes that enlarges a picture, where nothing is said of it. `None`: the method has no
    /// strength.
    pub fn enlarging_strength(&self) -> Option<f64> {
        self.in_place_of_first_stage().is_none().then(|| self.implementation.enlarging_strength())
    }

    /// Can a run by it begin from a picture?
    pub fn begins_from_pictures(&self) -> bool {
        self.implementation.begins_from_pictures()
    }

    /// Can a run by it keep what a mask keeps of a picture?
    pub fn takes_masks(&self) -> bool {
        let views = self.implementation.steps_over_views();
        self.begins_from_pictures() && self.in_place_of_first_stage().is_none() && !views
    }

    pub(crate) fn implementation(&self) -> &dyn GenerationMethod {
        &*self.implementation
    }
}

impl Default for Method {
    /// MegaFusion with its default options.
    fn default() -> Method {
        Method::with_options(&super::MEGAFUSION, Map::new()).expect("a method has valid defaults")
    }
}

impl PartialEq for Method {
    fn eq(&self, other: &Method) -> bool {
        self.name() == other.name() && self.options == other.options
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = Error;
    fn from_str(name: &str) -> Result<Method> {
        Method::named(name)
    }
}

impl MethodSpec {
    /// Names of the methods, with their default options, of which `is` holds.
    pub fn names(is: impl Fn(&Method) -> bool) -> Vec<&'static str> {
        let methods = METHODS.iter().filter_map(|spec| Method::with_options(spec, Map::new()).ok());
        methods.filter(is).map(|method| method.name()).collect()
    }

    /// # Errors
    /// [`Error::Request`]: no method has this name.
    pub fn find(name: &str) -> Result<&'static MethodSpec> {
        METHODS.iter().copied().find(|spec| spec.name == name).ok_or_else(|| {
            let names: Vec<&str> = METHODS.iter().map(|spec| spec.name).collect();
            Error::Request { field: "method", value: name.into(), reason: format!("expected {}", one_of(&names)) }
        })
    }

    pub fn option(&self, name: &str) -> Option<&'static OptionSpec> {
        self.options.iter().find(|option| option.name == name)
    }

    /// Does a run with these stages read the option? That of a stage's part is read where a stage has the part.
    pub fn reads(&self, name: &str, stages: &[Stage]) -> bool {
        let read = |parts| stages.iter().any(|stage| stage.parts.intersects(parts));
        self.option(name).is_some() && self.part_of(name).is_none_or(read)
    }

    /// The parts of stages that read the option, where the method itself does not.
    pub fn part_of(&self, name: &str) -> Option<StageParts> {
        let composes = || Method::named(self.name).is_ok_and(|method| !method.implementation.parts().is_empty());
        part_of(name).filter(|_| composes())
    }
}

impl fmt::Display for MethodSpec {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// The error for an option that none of `methods` reads: it names the methods that do.
pub fn without_effect(name: &str, value: &Value, methods: &[&'static MethodSpec]) -> Error {
    let has = |spec: &&&MethodSpec| spec.option(name).is_some() && spec.part_of(name).is_none();
    let with: Vec<&str> = METHODS.iter().filter(has).map(|spec| spec.name).collect();
    let field = METHODS.iter().find_map(|spec| spec.option(name)).map_or("method", |option| option.name);
    let chosen: Vec<&str> = methods.iter().map(|spec| spec.name).collect();
    let reason = match with.is_empty() {
        true => format!("{name} is no option of any method"),
        false => {
            let by_part = part_of(name).map(readers).unwrap_or_default();
            format!("has no effect with request.method {}; {} has it{by_part}", one_of(&chosen), one_of(&with))
        }
    };
    Error::Request { field, value: text_of(value), reason }
}

/// An option's value as it is written on the command line.
pub fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(text_of).collect::<Vec<_>>().join(","),
        value => value.to_string(),
    }
}
