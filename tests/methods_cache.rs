//! Step caches: when they change nothing, what they leave out and say of it, batches, plans, and what is refused. Their figures
//! are compared with the oracle's in tests/oracle.

use std::collections::BTreeMap;
use std::path::Path;

use megafuse::methods::{DemoFusion, MegaFusion, MultiDiffusion, Plain};
use megafuse::pipeline::{
    self, Computed, Event, HiresFix, Method, ModelSource, Observer, Pipeline, Request, Sampler, Silent, StepCache,
};
use megafuse::{DType, Device, Result};

fn source() -> ModelSource {
    ModelSource::Directory(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sd15"))
}

fn load() -> Pipeline {
    Pipeline::load(source(), Device::cpu(), DType::F32).unwrap()
}

fn cache(name: &str, options: &str) -> Option<StepCache> {
    Some(StepCache::new(name, options).unwrap())
}

fn request(method: impl Into<Method>, steps: usize, cache: Option<StepCache>) -> Request {
    let (method, size) = (method.into(), Some("12x16".parse().unwrap()));
    let prompt = "a photo of a cat".into();
    let scheduler = Some(Sampler::Ddim);
    Request { prompt, method, size, steps: Some(steps), scheduler, guidance: 2.0, seed: 3, cache, ..Request::default() }
}

/// Every tensor of a run, and how often the network was asked.
#[derive(Default)]
struct Seen(BTreeMap<String, Vec<f32>>, Option<Computed>);

impl Observer for Seen {
    fn event(&mut self, event: &Event) {
        if let Event::Cached(computed) = event {
            self.1 = Some(*computed);
        }
    }
    fn wants_tensors(&self, _: usize) -> bool {
        true
    }
    fn tensor(&mut self, _: usize, name: &str, _: &[usize], values: Vec<f32>) -> Result<()> {
        assert!(values.iter().all(|value| value.is_finite()) || name == "alpha_bar", "{name}");
        self.0.insert(name.into(), values);
        Ok(())
    }
}

fn seen(pipeline: &Pipeline, request: &Request) -> Seen {
    let mut seen = Seen::default();
    pipeline.generate(request, &mut seen).unwrap();
    seen
}

#[test]
fn a_cache_that_reuses_nothing_changes_no_bit() {
    let pipeline = load();
    for sampler in [Sampler::Ddim, Sampler::Dpm2M, Sampler::Heun] {
        let of = |cache| Request { scheduler: Some(sampler), ..request(Plain {}, 8, cache) };
        let without = seen(&pipeline, &of(None));
        assert_eq!(without.1, None);
        for (name, options) in [
            ("ucache", "threshold=0,start=0,end=1"),
            ("ucache", "threshold=0,relative=0,reset=0"),
            ("easycache", "threshold=0,start=0,end=1"),
            ("spectrum", "warmup=8,stop=0"),
        ] {
            let with = seen(&pipeline, &of(cache(name, options)));
            assert_eq!(with.0, without.0, "{sampler} {name} {options}");
            let Computed { computed, evaluations } = with.1.unwrap();
            assert_eq!(computed, evaluations, "{sampler} {name}");
        }
        // And what reuses something changes some.
        assert_ne!(seen(&pipeline, &of(cache("ucache", "threshold=9"))).0, without.0, "{sampler}");
    }
}

/// Second evaluations and the last step of every stage are the network's: CCCC.C.C.C of ten steps.
#[test]
fn what_is_never_left_out() {
    let pipeline = load();
    for (method, sampler, want) in [
        (Method::from(Plain {}), Sampler::Ddim, (7, 10)),
        (Plain {}.into(), Sampler::UniPc, (7, 10)),
        (Plain {}.into(), Sampler::Dpm2MSde, (7, 10)),
        // Nine second evaluations; the last step has none.
        (Plain {}.into(), Sampler::Heun, (16, 19)),
        // CCCC.CC in the second pass, whose steps are counted anew.
        (HiresFix { denoise: Some(0.7), ..HiresFix::default() }.into(), Sampler::Ddim, (13, 17)),
    ] {
        let request = Request { scheduler: Some(sampler), ..request(method, 10, cache("spectrum", "")) };
        let computed = seen(&pipeline, &request).1.unwrap();
        assert_eq!((computed.computed, computed.evaluations), want, "{} {sampler}", request.method);
    }
    // Everything that may be left out is: of ten steps the first two, which say how fast the output changes, and the last.
    let all = request(Plain {}, 10, cache("easycache", "threshold=1000000,start=0,end=1"));
    let computed = seen(&pipeline, &all).1.unwrap();
    assert_eq!((computed.computed, computed.evaluations), (3, 10));
}

#[test]
fn a_picture_has_the_same_bytes_at_every_batch_size() {
    let pipeline = load();
    for cache in [cache("ucache", "threshold=2"), cache("easycache", "threshold=0.8"), cache("spectrum", "")] {
        let of = |batch| Request { count: 3, batch, ..request(Plain {}, 10, cache.clone()) };
        let [alone, together] = [1, 3].map(|batch| pipeline.generate(&of(batch), &mut Silent).unwrap());
        assert!(alone == together, "{cache:?}");
        let requests = [5, 4, 3].map(|seed| Request { seed, count: 1, ..of(3) });
        let batch = pipeline.generate_batch(&requests, &mut Silent).unwrap();
        assert!(batch.iter().rev().eq(&alone), "{cache:?}");
    }
}

#[test]
fn a_picture_says_how_often_the_network_was_asked() {
    let pipeline = load();
    let picture = &pipeline.generate(&request(Plain {}, 10, cache("spectrum", "m=2")), &mut Silent).unwrap()[0];
    let options = "w=0.4,m=2,lam=1,window=2,flex=0.5,warmup=4,stop=0.9,center=0";
    let json = &picture.parameters.json;
    assert_eq!(json["cache"], "spectrum");
    assert_eq!(json["cache_options"], options);
    assert_eq!(json["cache_computed"], "7 of 10");
    let text = &picture.parameters.text;
    assert!(text.ends_with(", Cache computed: 7 of 10"), "{text}");
    assert!(text.contains(&format!("Cache: spectrum, Cache options: \"{options}\"")), "{text}");
}

/// Of spectrum a plan knows which steps are left out; of the others it counts all.
#[test]
fn a_plan_counts_what_may_be_computed() {
    let plan = |cache| pipeline::plan(&source(), DType::F32, &request(Plain {}, 10, cache)).unwrap();
    let steps = |cache| -> Vec<(usize, bool)> {
        let phases = plan(cache).phases.into_iter().filter(|phase| phase.name == "denoise");
        phases.map(|phase| (phase.repeats, phase.once.launches > 50)).collect()
    };
    assert_eq!(steps(None), [(10, true)]);
    // Three predictions, from four, five and six clean samples.
    assert_eq!(steps(cache("spectrum", "")), [(7, true), (1, false), (1, false), (1, false)]);
    // The first step and the last one keep nothing; the second has nothing to compare with.
    assert_eq!(steps(cache("ucache", "")), [(2, true), (1, true), (7, true)]);
    let [without, with] = [None, cache("ucache", "")].map(|cache| plan(cache).total);
    // What is kept is two launches; |.| of what is compared three, a difference one, two means side by side one.
    let (first, others) = (2 + 3, 2 + (1 + 3) + (1 + 3 + 3 + 1));
    assert_eq!((with.macs, with.launches), (without.macs, without.launches + first + 7 * others));
}

#[test]
fn what_a_cache_does_not_go_with_is_refused() {
    let pipeline = load();
    let views = "whose steps go over views of the map";
    for (method, name, wanted) in [
        (Method::from(MultiDiffusion::default()), "ucache", views),
        (DemoFusion::default().into(), "spectrum", views),
        (MegaFusion { reference_compat: true, ..MegaFusion::default() }.into(), "spectrum", "reference_compat"),
    ] {
        let error = pipeline.resolve(&Request { size: None, ..request(method, 4, cache(name, "")) }).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(&format!("cache {name}")) && error.contains(wanted), "{error}");
    }
}
