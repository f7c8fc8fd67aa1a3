//! What a method draws besides noise: by the picture's seed, or as a file says; shown under the names that a file may have.

use std::collections::BTreeMap;
use std::path::Path;

use megafuse::methods::{
    GenerationMethod, Geometry, Method, MethodSpec, PLAIN, Plain, Prediction, Run, Sampling, Stage, from_options,
};
use megafuse::pipeline::{Choices, ModelSource, Observer, Pipeline, Request, Silent};
use megafuse::rng::{PythonRandom, TorchUniform};
use megafuse::{DType, Device, Result, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

/// Plain sampling that draws and does nothing with it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Drawing {}

static DRAWING: MethodSpec = MethodSpec {
    name: "drawing",
    summary: "draws",
    relays: false,
    choices: &["shifts", "jitter", "blur"],
    options: &[],
    parse: |given| from_options(Drawing::default(), given),
};

impl GenerationMethod for Drawing {
    fn stages(&self, geometry: &Geometry) -> Result<Vec<Stage>> {
        Plain {}.stages(geometry)
    }

    fn check(&self, run: &Run) -> Result<()> {
        Plain {}.check(run)
    }

    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        let (size, steps) = (sampling.run().stages()[0].size, sampling.run().stages()[0].steps);
        let shifts = |seed| {
            let mut rng = TorchUniform::new(seed);
            (0..2 * steps).map(|_| (4.0 * rng.rand()) as i64).collect()
        };
        sampling.choose("shifts", &[steps, 2], 0..=3, &mut { shifts })?;
        let jitter = |seed| vec![PythonRandom::new(seed).randint(-8, 8)];
        sampling.choose("jitter2", &[1], -8..=8, &mut { jitter })?;
        let blur = |seed| vec![TorchUniform::new(seed).uniform(0.1, 2.0)];
        sampling.choose_f32("blur", &[1], 0.1..=2.0, &mut { blur })?;
        sampling.prepare(vec![sampling.run().scheduler().clone()], |coefficients| coefficients)?;
        let x = sampling.initial_noise(size)?;
        Ok(sampling.stage(0, x, &|_| Prediction::default())?.0)
    }
}

/// What a run shows of each picture, as in the file of a dump.
#[derive(Default)]
struct Dump(BTreeMap<(usize, String), Kept>);

/// Element type, shape and bytes.
type Kept = (Dtype, Vec<usize>, Vec<u8>);

impl Observer for Dump {
    fn wants_tensors(&self, _: usize) -> bool {
        true
    }
    fn tensor(&mut self, index: usize, name: &str, shape: &[usize], values: Vec<f32>) -> Result<()> {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.0.insert((index, name.into()), (Dtype::F32, shape.to_vec(), bytes));
        Ok(())
    }
    fn integers(&mut self, index: usize, name: &str, shape: &[usize], values: Vec<i64>) -> Result<()> {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.0.insert((index, name.into()), (Dtype::I64, shape.to_vec(), bytes));
        Ok(())
    }
}

impl Dump {
    fn write(&self, index: usize, path: &Path) {
        let of = self.0.iter().filter(|((of, _), _)| *of == index);
        let views =
            of.map(|((_, name), (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        safetensors::serialize_to_file(views, None, path).unwrap();
    }

    fn of(&self, index: usize, name: &str) -> &Kept {
        &self.0[&(index, name.to_string())]
    }
}

const NAMES: [&str; 3] = ["shifts", "jitter2", "blur"];

fn request(seed: u64, choices: Choices) -> Request {
    let method = Method::with_options(&DRAWING, Default::default()).unwrap();
    let stages = vec!["16x16:3".parse().unwrap()];
    Request { prompt: "a".into(), method, stages, seed, choices, ..Request::default() }
}

fn model() -> Pipeline {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sd15");
    Pipeline::load(ModelSource::Directory(folder), Device::cpu(), DType::F32).unwrap()
}

#[test]
fn the_dump_of_one_run_is_the_choices_of_another() {
    let (pipeline, folder) = (model(), tempfile::tempdir().unwrap());
    let (mut three, path) = (Dump::default(), folder.path().join("dump.safetensors"));
    let drawn = Choices::default();
    pipeline.generate(&Request { count: 3, batch: 3, ..request(5, drawn.clone()) }, &mut three).unwrap();
    for index in 0..3 {
        let mut alone = Dump::default();
        pipeline.generate(&request(5 + index as u64, drawn.clone()), &mut alone).unwrap();
        for name in NAMES {
            assert_eq!(three.of(index, name), alone.of(0, name), "{name} of picture {index}");
        }
    }
    assert_ne!(three.of(0, "shifts"), three.of(1, "shifts"));
    assert_eq!(three.of(0, "shifts").1, [3, 2]);

    three.write(1, &path);
    let given = Choices::read(&path, &DRAWING).unwrap();
    let mut again = Dump::default();
    pipeline.generate(&Request { count: 2, ..request(70, given.clone()) }, &mut again).unwrap();
    for (index, name) in [0, 1].into_iter().flat_map(|index| NAMES.map(|name| (index, name))) {
        assert_eq!(again.of(index, name), three.of(1, name), "{name} of picture {index}");
    }
    let json = pipeline.parameters(&request(70, given)).unwrap().json;
    assert_eq!(json["choices"], "dump.safetensors");
    assert_eq!(pipeline.parameters(&request(70, drawn)).unwrap().json.get("choices"), None);
}

#[test]
fn choices_that_do_not_fit_are_refused_by_name() {
    let (pipeline, folder) = (model(), tempfile::tempdir().unwrap());
    let fits = || {
        let choices = Choices::default().with("shifts", &[3, 2], vec![0, 1, 2, 3, 0, 1]);
        choices.with("jitter2", &[1], vec![8]).with_f32("blur", &[1], vec![0.1])
    };
    pipeline.generate(&request(0, fits()), &mut Silent).unwrap();
    for (choices, part) in [
        (fits().with("shifts", &[2, 3], vec![0; 6]), "choices shifts: has shape [2, 3], this run draws [3, 2]"),
        (fits().with("shifts", &[3, 2], vec![0, 0, 4, 0, 0, 0]), "choices shifts: value 2 is 4, expected 0 to 3"),
        (fits().with("shifts", &[3, 2], vec![-1; 6]), "choices shifts: value 0 is -1, expected 0 to 3"),
        (fits().with("blur", &[1], vec![1]), "choices blur: is I64, expected F32"),
        (fits().with_f32("blur", &[1], vec![f32::NAN]), "choices blur: value 0 is NaN, expected 0.1 to 2"),
        (Choices::default().with("shifts", &[3, 2], vec![0; 6]), "choices jitter2: is missing; the choices are shifts"),
    ] {
        let error = pipeline.generate(&request(0, choices), &mut Silent).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }

    let path = folder.path().join("c.safetensors");
    std::fs::write(&path, "none").unwrap();
    let error = Choices::read(&path, &DRAWING).unwrap_err().to_string();
    assert!(error.contains("c.safetensors: is not a safetensors file"), "{error}");
    let data = [0u8; 8];
    let views = [("jitters", TensorView::new(Dtype::F64, vec![1], &data).unwrap())];
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    let error = pipeline.generate(&request(0, Choices::read(&path, &DRAWING).unwrap()), &mut Silent).unwrap_err();
    let want = format!("choices shifts in {}: is missing; the choices are none of this method", path.display());
    assert_eq!(error.to_string(), want);
    assert!(SafeTensors::deserialize(&std::fs::read(&path).unwrap()).is_ok());

    let plain = Request { method: Plain {}.into(), ..request(0, fits()) };
    for error in [pipeline.resolve(&plain).unwrap_err(), Choices::read(&path, &PLAIN).unwrap_err()] {
        let error = error.to_string();
        assert!(error.contains("has no effect with request.method plain, which draws nothing but noise"), "{error}");
    }
}
