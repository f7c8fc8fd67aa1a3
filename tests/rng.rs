//! The generators against values that torch and Python drew: `torch.randn(n, generator=torch.Generator("cpu").manual_seed(seed))`,
//! torch 2.15 on a processor with AVX-512 (the same with ATEN_CPU_CAPABILITY=avx2).

use megafuse::rng::{CUDA_THREADS, PythonRandom, Rng, RngKind, TorchUniform};
use megafuse::{DType, Device};

/// FNV-1a over the bits, little endian.
fn fnv(values: &[f32]) -> u64 {
    fnv_bytes(values.iter().flat_map(|value| value.to_bits().to_le_bytes()))
}

fn cpu(seed: u64) -> Rng {
    Rng::new(RngKind::TorchCpu, seed)
}

/// Per seed: draws of 1..=40 values, each from a fresh generator, one after the other; of 100; 1000; 16384; and thirteen
/// draws of mixed sizes from one generator.
const HASHES: [(u64, [u64; 5]); 4] = [
    (
        0,
        [
            0x3477_ac5f_b4ac_9e0d,
            0x6b68_0134_d3d6_9e1b,
            0x31ae_6782_1ca5_077e,
            0xdf76_3936_577c_ac18,
            0x415b_7bef_83ee_8069,
        ],
    ),
    (
        42,
        [
            0xc991_089d_c03c_77cf,
            0x7ea0_2704_af7a_98a3,
            0x790c_9ebf_d525_92da,
            0xa6f5_89a0_8584_1b88,
            0xc26c_84e5_78e0_1f6c,
        ],
    ),
    (
        4294967301,
        [
            0x38a2_b66b_70f4_0675,
            0x8216_93f9_a621_b93a,
            0xcf44_413a_37cd_1ab4,
            0x17f0_8c8f_b967_5489,
            0xdb2a_de5d_35d2_3fb9,
        ],
    ),
    (
        18446744073709551613,
        [
            0xe765_1f3b_8e53_6645,
            0xf122_e580_7c34_767d,
            0x2fdd_5704_a96a_1bd2,
            0x70a9_02c8_3321_515f,
            0x7288_a196_4119_1d3d,
        ],
    ),
];
const MIXED: [usize; 13] = [3, 17, 4, 16, 1, 2, 100, 5, 33, 7, 15, 20, 6];

#[test]
fn torch_cpu_is_bit_identical() {
    for (seed, want) in HASHES {
        let small: Vec<f32> = (1..=40).flat_map(|count| cpu(seed).normal(count)).collect();
        let mut generator = cpu(seed);
        let mixed: Vec<f32> = MIXED.into_iter().flat_map(|count| generator.normal(count)).collect();
        let [a, b, c] = [100, 1000, 16384].map(|count| fnv(&cpu(seed).normal(count)));
        assert_eq!([fnv(&small), a, b, c, fnv(&mixed)], want, "seed {seed}");
    }
}

/// The values themselves, for whoever has to find out what broke: the f64 path, and a block with its tail drawn again.
#[test]
fn torch_cpu_first_values_of_seed_42() {
    let bits = |count| cpu(42).normal(count).iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
    assert_eq!(bits(5), [0x3eac_62ae, 0x3e03_e69d, 0x3e70_16e7, 0x3e6b_dc6c, 0xbf8f_b9c2]);
    let want = [
        0x3ff6_a529,
        0x3fbe_5f53,
        0xbefe_aae4,
        0x3ee1_11d8,
        0xbf42_14e2,
        0x3f8a_0650,
        0x3f4d_0144,
        0x3fd7_1e93,
        0x3eb6_3345,
        0xbf2f_c686,
        0x3f1c_4788,
        0x3faa_d8b0,
        0xbe6d_2eed,
        0x3d2b_0c00,
        0xbe80_ce7a,
        0x3f5c_1fb0,
        0xbe9e_9482,
        0xbeca_9a91,
    ];
    assert_eq!(bits(18), want);
}

#[test]
fn only_the_lower_half_of_a_seed_counts_on_the_cpu() {
    assert_eq!(cpu(5).normal(20), cpu((1 << 32) + 5).normal(20));
    assert_ne!(cpu(5).normal(20), cpu(6).normal(20));
}

/// `torch.randn(2, 3, 4, 5)` of seed 7, permuted to channels-last.
#[test]
fn normal_nhwc_draws_in_nchw_order() {
    let noise = cpu(7).normal_nhwc(&Device::cpu(), [2, 4, 5, 3]).unwrap();
    assert_eq!((noise.shape(), noise.dtype()), ([2, 4, 5, 3].as_slice(), DType::F32));
    assert_eq!(fnv(&noise.to_f32_vec().unwrap()), 0x3f2d_21e7_4052_b95b);
    let meta = cpu(7).normal_nhwc(&Device::meta(), [2, 4, 5, 3]).unwrap();
    assert_eq!(meta.shape(), [2, 4, 5, 3]);
    assert_eq!(cpu(7).normal_nhwc(&Device::cpu(), [0, 4, 5, 3]).unwrap().numel(), 0);
    assert!(cpu(7).normal_nhwc(&Device::cpu(), [usize::MAX, 4, 5, 3]).is_err());
}

/// Seed 0, the first 12 values, as stable-diffusion-webui's documentation prints them for its imitation of the card in
/// f64. The card and this generator round the angle to f32: up to 2 pi 2^-24, times a radius below 3.
#[test]
fn torch_cuda_matches_published_values() {
    let want = [
        -0.92466259,
        -0.42534415,
        -2.6438457,
        0.14518388,
        -0.12086647,
        -0.57972564,
        -0.62285122,
        -0.32838709,
        -1.07454231,
        -0.36314407,
        -1.67105067,
        2.26550497f64,
    ];
    let got = Rng::new(RngKind::TorchCuda, 0).normal(12);
    for (i, (&got, want)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(got) - want).abs() <= 1.2e-6, "{i}: {got}, not {want}");
    }
}

/// A draw beyond the grid goes on with each thread's next values; the next draw starts behind the quadruples used.
#[test]
fn torch_cuda_wraps_around_the_grid() {
    let threads = CUDA_THREADS as usize;
    let mut generator = Rng::new(RngKind::TorchCuda, 3);
    let large = generator.normal(4 * threads + 300);
    let next = generator.normal(300);
    // Thread 0's quadruple 0 fills elements 0, T, 2T, 3T; its quadruple 1 goes on at 4T; the next draw has quadruple 2.
    let mut again = Rng::new(RngKind::TorchCuda, 3);
    let rows: Vec<Vec<f32>> = (0..3).map(|_| again.normal(300)).collect();
    assert_eq!(large[..300], rows[0]);
    assert_eq!(large[4 * threads..], rows[1]);
    assert_eq!(next, rows[2]);
    assert!(large[threads..][..300] != rows[0] && large[2 * threads..][..300] != large[threads..][..300]);
    assert_eq!(Rng::new(RngKind::TorchCuda, 3).normal(0), [0.0f32; 0]);
}

#[test]
fn both_kinds_are_standard_normal() {
    const COUNT: usize = 1 << 18;
    for kind in [RngKind::TorchCpu, RngKind::TorchCuda] {
        let values = Rng::new(kind, 1).normal(COUNT);
        let moment = |k| values.iter().map(|&v| f64::from(v).powi(k)).sum::<f64>() / COUNT as f64;
        // Five standard deviations of each moment's estimate: sqrt(Var(z^k) / n) = sqrt({1, 2, 15, 96} / n).
        for (k, want, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0f64)] {
            let error = (moment(k) - want).abs();
            assert!(error < 5.0 * (variance / COUNT as f64).sqrt(), "{kind:?} moment {k} is off by {error}");
        }
    }
}

#[test]
fn kinds_parse() {
    assert_eq!("torch-cpu".parse::<RngKind>().unwrap(), RngKind::default());
    assert_eq!("torch-cuda".parse::<RngKind>().unwrap(), RngKind::TorchCuda);
    let error = "numpy".parse::<RngKind>().unwrap_err().to_string();
    assert!(error.contains("numpy") && error.contains("torch-cuda"), "{error}");
}

/// FNV-1a over the bytes, little endian.
fn fnv_bytes(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Per seed 700 draws of `torch.rand(1)` after `torch.manual_seed(seed)`, 700 of `torch.empty(1).uniform_(0.1, 2.0)` after
/// those, and 2000 of `random.Random(seed).randint` with the ends below in turn.
const CHOSEN: [(u64, [u64; 3]); 4] = [
    (0, [0x4a4d_8a01_f2e2_6b76, 0xce0a_4966_267f_f2cf, 0xb6d9_fdc3_4e4c_5f3b]),
    (42, [0xd10c_dc37_35b0_4ba1, 0x43a7_e400_c4c2_7c55, 0xfeb6_4d7b_5a88_d90a]),
    (4294967301, [0xb19b_0421_0707_5ae0, 0x273b_3de2_659a_b84a, 0x1704_24c3_a610_7ce7]),
    (18446744073709551613, [0x27f8_4fe7_fae6_70ed, 0xe47d_34be_9e1d_d81d, 0xfe35_a156_a9c1_6e5e]),
];
const ENDS: [(i64, i64); 8] =
    [(0, 7), (-3, 3), (0, 0), (5, 1_000_000), (-(1 << 62), 1 << 62), (-16, 15), (0, 1 << 32), (i64::MIN, i64::MAX)];

#[test]
fn choices_are_drawn_as_torch_and_python_draw_them() {
    for (seed, want) in CHOSEN {
        let mut torch = TorchUniform::new(seed);
        let rand: Vec<f32> = (0..700).map(|_| torch.rand()).collect();
        let uniform: Vec<f32> = (0..700).map(|_| torch.uniform(0.1, 2.0)).collect();
        let mut python = PythonRandom::new(seed);
        let whole = ENDS.iter().cycle().take(2000).flat_map(|&(low, high)| python.randint(low, high).to_le_bytes());
        assert_eq!([fnv(&rand), fnv(&uniform), fnv_bytes(whole)], want, "seed {seed}");
    }
    let mut torch = TorchUniform::new(0);
    assert_eq!([(); 4].map(|()| torch.rand()), [0.4962566, 0.7682218, 0.08847743, 0.13203049]);
    assert_eq!(PythonRandom::new(3).randint(5, 4), 5, "no values: the lower end");
}
