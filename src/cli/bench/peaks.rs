//! What a device does at most, measured with the best instruction it has.

use std::cell::RefCell;
use std::hint::black_box;

use megafuse::ops::cases::{Call, Inputs, random};
use megafuse::ops::peaks;
use megafuse::runtime::CudaDevice;
use megafuse::runtime::cuda::Isa;
use megafuse::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::clock::Clock;

/// A second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    pub flops: f64,
    /// Read plus written by a copy.
    pub bytes: f64,
    /// What the flops were measured with.
    pub with: &'static str,
}

/// f32 values that a copy reads and writes: 512 MiB.
const COPIED: usize = 128 << 20;

impl Peaks {
    pub fn measure(clock: &Clock, dtype: DType) -> Result<Peaks> {
        let Device::Cuda(card) = clock.device else { return Peaks::of_cpu(clock) };
        let best = Products::all(card, dtype).pop().expect("f32's at least");
        let (flops, call) = best.call(clock.device, card.multiprocessors(), dtype, 1 << 14)?;
        let bytes = (2 * COPIED * size_of::<f32>()) as f64;
        Ok(Peaks {
            flops: flops / least(clock, call)?,
            bytes: bytes / least(clock, copy(clock.device, COPIED)?)?,
            with: best.name(),
        })
    }

    /// Bare fused multiply-adds on all threads at once; a copy by all of them.
    fn of_cpu(clock: &Clock) -> Result<Peaks> {
        const ROUNDS: usize = 1 << 20;
        const COUNT: usize = 32 << 20;
        let threads = rayon::current_num_threads();
        let nothing = || Tensor::zeros(&Device::cpu(), &[0], DType::F32);
        let products: Call = Box::new(move || {
            (0..threads).into_par_iter().for_each(|_| {
                black_box(peaks::cpu_sums(black_box(ROUNDS)));
            });
            nothing()
        });
        let (from, to) = (random(COUNT, 3), RefCell::new(vec![0.0f32; COUNT]));
        let copy: Call = Box::new(move || {
            let mut to = to.borrow_mut();
            to.par_chunks_mut(1 << 16).zip(from.par_chunks(1 << 16)).for_each(|(to, from)| to.copy_from_slice(from));
            nothing()
        });
        Ok(Peaks {
            flops: peaks::cpu_sums_flops(ROUNDS) * threads as f64 / least(clock, products)?,
            bytes: (2 * COUNT * size_of::<f32>()) as f64 / least(clock, copy)?,
            with: "fused multiply-add, f32",
        })
    }
}

/// Runs every measurement of a peak once, small.
pub fn run_once(clock: &Clock, card: &CudaDevice, dtype: DType) -> Result<Vec<&'static str>> {
    let mut ran = Vec::new();
    for dtype in [DType::F32, dtype] {
        for products in Products::all(card, dtype) {
            if !ran.contains(&products.name()) {
                least(clock, products.call(clock.device, 1, dtype, 2)?.1)?;
                ran.push(products.name());
            }
        }
    }
    least(clock, copy(clock.device, 1 << 12)?)?;
    ran.push("copy");
    Ok(ran)
}

/// The shortest of the call's samples: nothing can be faster than what a card can do.
fn least(clock: &Clock, call: Call) -> Result<f64> {
    let mut timed: Vec<_> = clock.ready("", vec![call])?.into_iter().collect();
    clock.sample(&mut timed)?;
    Ok(timed.first().map_or(f64::NAN, |timed| timed.single().least()))
}

fn copy(device: &Device, count: usize) -> Result<Call> {
    let x = Inputs::new(device, DType::F32, 0).tensor(&[count])?;
    Ok(Box::new(move || peaks::copy(&x)))
}

/// How a card multiplies.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Products {
    Sums,
    Mma,
    Wgmma,
}

impl Products {
    /// Those that there are for the dtype, the best last.
    fn all(card: &CudaDevice, dtype: DType) -> Vec<Products> {
        match dtype {
            DType::F32 => vec![Products::Sums],
            _ if card.has(Isa::Sm90a) => vec![Products::Mma, Products::Wgmma],
            _ => vec![Products::Mma],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Products::Sums => "fused multiply-add, f32",
            Products::Mma => "mma.sync m16n8k16",
            Products::Wgmma => "wgmma m64n256k16",
        }
    }

    /// Flops of a call, and the call: a few milliseconds on a large card for 2^14 rounds.
    fn call(self, device: &Device, multiprocessors: usize, dtype: DType, rounds: usize) -> Result<(f64, Call)> {
        let inputs = Inputs::new(device, dtype, 0);
        let two_each = 2 * multiprocessors;
        Ok(match self {
            Products::Sums => {
                let x = inputs.f32(&[peaks::THREADS])?;
                let rounds = 4 * rounds;
                let call: Call = Box::new(move || peaks::sums(&x, 0.999, 0.001, two_each, rounds));
                (peaks::sums_flops(two_each, rounds), call)
            }
            Products::Mma => {
                let (a, b) = (inputs.tensor(&[peaks::A, 16, 16])?, inputs.tensor(&[peaks::B, 8, 16])?);
                let call: Call = Box::new(move || peaks::products(&a, &b, two_each, rounds));
                (peaks::products_flops(two_each, rounds), call)
            }
            Products::Wgmma => {
                let [m, n, k] = peaks::WGMMA;
                let (a, b) = (inputs.tensor(&[m, k])?, inputs.tensor(&[n, k])?);
                // A round is eight times one of mma.sync's block.
                let rounds = rounds.div_ceil(8);
                let call: Call = Box::new(move || peaks::warpgroup_products(&a, &b, multiprocessors, rounds));
                (peaks::warpgroup_products_flops(multiprocessors, rounds), call)
            }
        })
    }
}
