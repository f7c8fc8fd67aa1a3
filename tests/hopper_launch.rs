//! What a launch hands to Hopper's kernels: tensor maps, clusters, dependence on the launch before. The kernels of
//! kernels/sm90/launch.cu write down what they got; here the same is computed by plain loops from NVIDIA's description (CUDA
//! driver API, tensor map object management; PTX ISA, tensors). On the emulated card, and on a real one where tests run there.

mod common;

use common::hoppers;
use megafuse::runtime::cuda::{Arg, DevicePtr, Im2col, Launch, Swizzle, TensorMap, TensorView};
use megafuse::runtime::{CudaDevice, DType, Device, Tensor};

/// A Box of launch.cu.
const BOX_BYTES: usize = 8192;

fn numbers(device: &Device, count: usize) -> Tensor {
    // Small whole numbers come and go as f32 whatever they are read as in between.
    Tensor::from_f32(device, &[count], DType::F32, &(1..=count).map(|i| i as f32).collect::<Vec<_>>()).unwrap()
}

fn address(tensor: &Tensor) -> DevicePtr {
    DevicePtr::or_null(Some(tensor))
}

/// What `entry` writes: `count` numbers, after `out` its other arguments.
fn written(device: &Device, card: &CudaDevice, entry: &str, launch: Launch, count: usize, args: &[Arg]) -> Vec<f32> {
    let out = Tensor::from_f32(device, &[count], DType::F32, &vec![-1.0; count]).unwrap();
    let to = address(&out);
    let args: Vec<Arg> = [Arg::of(&to)].into_iter().chain(args.iter().copied()).collect();
    // SAFETY: the arguments are the entry's, as its comment has them; it writes `count` numbers.
    unsafe { card.launch("sm90/launch", entry, launch, &args).unwrap() };
    out.to_f32_vec().unwrap()
}

fn one_box() -> Launch {
    Launch::grid([1, 1, 1]).block(128).shared(BOX_BYTES)
}

/// Where a byte of a box lies in shared memory: the 16-byte chunk's number within the span, exchanged by the row's.
fn swizzled(byte: usize, swizzle: Swizzle) -> usize {
    let rows = match swizzle {
        Swizzle::None => 1,
        Swizzle::Bytes32 => 2,
        Swizzle::Bytes64 => 4,
        Swizzle::Bytes128 => 8,
    };
    byte ^ ((byte >> 7) % rows) << 4
}

/// `rows` in the order that TMA goes over them, as they should lie in shared memory.
fn in_shared_memory(rows: &[f32], swizzle: Swizzle) -> Vec<f32> {
    let mut lie = vec![f32::NAN; rows.len()];
    for (i, &value) in rows.iter().enumerate() {
        lie[swizzled(i * 4, swizzle) / 4] = value;
    }
    lie
}

#[test]
fn boxes_of_a_matrix_in_every_swizzle() {
    for (device, card) in hoppers() {
        // Rows of 50 of 52 numbers, beginning at the fifth.
        let all = numbers(&device, 4 + 30 * 52);
        let base = DevicePtr(address(&all).0 + 16);
        let tensor = TensorView { base, dtype: DType::F32, dims: &[50, 30], strides_bytes: &[52 * 4] };
        for (swizzle, width) in [
            (Swizzle::None, 12),
            (Swizzle::None, 64),
            (Swizzle::Bytes32, 8),
            (Swizzle::Bytes64, 16),
            (Swizzle::Bytes128, 32),
        ] {
            let map = TensorMap::tiled(&card, tensor, &[width, 16], swizzle).unwrap();
            // Inside; over each edge; far outside.
            for [c0, c1] in [[8i32, 3i32], [-4, -7], [40, 20], [44, -1], [1000, 0]] {
                let at = |i: usize, j: usize| {
                    let (x, y) = (c0 + i as i32, c1 + j as i32);
                    let inside = (0..50).contains(&x) && (0..30).contains(&y);
                    if inside { (5 + y * 52 + x) as f32 } else { 0.0 }
                };
                let rows: Vec<f32> =
                    (0..16).flat_map(|j| (0..width).map(move |i| (i, j))).map(|(i, j)| at(i, j)).collect();
                let bytes = (rows.len() * 4) as i32;
                let args = [Arg::of(&map), Arg::of(&c0), Arg::of(&c1), Arg::of(&bytes)];
                let got = written(&device, &card, "conformance_box_2d", one_box(), rows.len(), &args);
                assert_eq!(got, in_shared_memory(&rows, swizzle), "{swizzle:?}, {width} wide at {c0}, {c1}");
            }
        }
    }
}

#[test]
fn boxes_of_four_dimensions() {
    for (device, card) in hoppers() {
        let [n, h, w, c] = [2usize, 5, 6, 40];
        let all = numbers(&device, n * h * w * c);
        let strides = [c * 4, w * c * 4, h * w * c * 4];
        let tensor =
            TensorView { base: address(&all), dtype: DType::F32, dims: &[c, w, h, n], strides_bytes: &strides };
        let map = TensorMap::tiled(&card, tensor, &[32, 4, 3, 1], Swizzle::Bytes128).unwrap();
        for [c0, x0, y0, n0] in [[0i32, 0i32, 0i32, 0i32], [16, -1, -2, 1], [8, 4, 3, 1], [0, 0, 0, 2]] {
            let at = |[i, x, y]: [usize; 3]| {
                let [i, x, y, n0] = [c0 + i as i32, x0 + x as i32, y0 + y as i32, n0].map(|v| v as isize);
                let sizes = [c, w, h, n].map(|v| v as isize);
                let inside = [i, x, y, n0].iter().zip(sizes).all(|(&at, size)| (0..size).contains(&at));
                if inside { (1 + ((n0 * sizes[2] + y) * sizes[1] + x) * sizes[0] + i) as f32 } else { 0.0 }
            };
            let places = (0..3).flat_map(|y| (0..4).flat_map(move |x| (0..32).map(move |i| [i, x, y])));
            let rows: Vec<f32> = places.map(at).collect();
            let bytes = (rows.len() * 4) as i32;
            let args = [Arg::of(&map), Arg::of(&c0), Arg::of(&x0), Arg::of(&y0), Arg::of(&n0), Arg::of(&bytes)];
            let got = written(&device, &card, "conformance_box_4d", one_box(), rows.len(), &args);
            assert_eq!(got, in_shared_memory(&rows, Swizzle::Bytes128), "at {c0}, {x0}, {y0}, {n0}");
        }
    }
}

/// Every tap of a 3x3 filter with padding 1, of strides 1 and 2, over the end of a row and of an image.
#[test]
fn pixels_under_a_filters_taps() {
    for (device, card) in hoppers() {
        let [n, h, w, c] = [2usize, 7, 6, 40];
        let all = numbers(&device, n * h * w * c);
        let strides = [c * 4, w * c * 4, h * w * c * 4];
        let tensor =
            TensorView { base: address(&all), dtype: DType::F32, dims: &[c, w, h, n], strides_bytes: &strides };
        for step in [1usize, 2] {
            // The filter's corner goes from -1 to the size - 2, in steps.
            let places = |size: usize| (0..size).step_by(step).map(|at| at as i32 - 1).collect::<Vec<_>>();
            let (columns, lines) = (places(w), places(h));
            let filter = Im2col {
                lower_corner: &[-1, -1],
                upper_corner: &[-1, -1],
                channels: 32,
                pixels: 12,
                strides: &[step, step],
            };
            let map = TensorMap::im2col(&card, tensor, filter, Swizzle::Bytes128).unwrap();
            let corners: Vec<[i32; 3]> = (0..n as i32)
                .flat_map(|n| lines.iter().flat_map(|&y| columns.iter().map(move |&x| [x, y, n])).collect::<Vec<_>>())
                .collect();
            for first in [0, columns.len() - 1, corners.len() / 2 - 2] {
                for tap in 0..9i32 {
                    let (right, down, c0) = (tap % 3, tap / 3, 8i32);
                    let pixel = |&[x, y, n]: &[i32; 3]| {
                        let (x, y) = (x + right, y + down);
                        let inside = (0..w as i32).contains(&x) && (0..h as i32).contains(&y);
                        let start = ((n * h as i32 + y) * w as i32 + x) * c as i32 + c0;
                        (0..32).map(move |i| if inside { (1 + start + i) as f32 } else { 0.0 })
                    };
                    // Past the last image everything is outside.
                    let inside = corners[first..].iter().take(12).flat_map(pixel);
                    let rows: Vec<f32> = inside.chain(std::iter::repeat(0.0)).take(12 * 32).collect();
                    let [x0, y0, n0] = corners[first];
                    let bytes = (rows.len() * 4) as i32;
                    let scalars = [c0, x0, y0, n0, right, down, bytes];
                    let args: Vec<Arg> = [Arg::of(&map)].into_iter().chain(scalars.iter().map(Arg::of)).collect();
                    let got = written(&device, &card, "conformance_box_im2col", one_box(), rows.len(), &args);
                    assert_eq!(got, in_shared_memory(&rows, Swizzle::Bytes128), "step {step}, from {first}, tap {tap}");
                }
            }
        }
    }
}

#[test]
fn maps_that_cannot_be_are_named() {
    for (device, card) in hoppers() {
        let all = numbers(&device, 4096);
        let base = address(&all);
        let good = TensorView { base, dtype: DType::BF16, dims: &[64, 6, 4, 2], strides_bytes: &[128, 768, 3072] };
        let tiled = |tensor, boxes: &[usize], swizzle| TensorMap::tiled(&card, tensor, boxes, swizzle);
        tiled(good, &[64, 2, 2, 1], Swizzle::Bytes128).unwrap();
        let of_tensor: [(TensorView, &str); 10] = [
            (TensorView { base: DevicePtr(base.0 + 8), ..good }, "expected an address aligned to 16"),
            (TensorView { base: DevicePtr::NULL, ..good }, "base is 0x0"),
            (TensorView { dims: &[64, 6, 4, 0], ..good }, "dims is 0 in place 3, expected 1 to 4294967296"),
            (TensorView { dims: &[1 << 33, 6, 4, 2], ..good }, "dims is 8589934592 in place 0"),
            (TensorView { dims: &[64; 6], ..good }, "dims is 6 dimensions, expected"),
            (TensorView { dims: &[], ..good }, "dims is 0 dimensions, expected"),
            (TensorView { strides_bytes: &[128, 768], ..good }, "strides_bytes is 2 values, expected 3"),
            (TensorView { strides_bytes: &[128; 4], ..good }, "strides_bytes is 4 values, expected 3"),
            (
                TensorView { strides_bytes: &[120, 768, 3072], ..good },
                "strides_bytes is 120 in place 0, expected a multiple of 16",
            ),
            (TensorView { strides_bytes: &[128, 1 << 40, 16], ..good }, "strides_bytes is 1099511627776 in place 1"),
        ];
        let filter =
            Im2col { lower_corner: &[-1, -1], upper_corner: &[-1, -1], channels: 64, pixels: 128, strides: &[1, 1] };
        let im2col = |tensor, filter, swizzle| TensorMap::im2col(&card, tensor, filter, swizzle);
        im2col(good, filter, Swizzle::Bytes128).unwrap();
        for (tensor, words) in of_tensor {
            let boxes = [64, 2, 2, 1];
            for result in [tiled(tensor, &boxes, Swizzle::Bytes128), im2col(tensor, filter, Swizzle::Bytes128)] {
                let error = result.unwrap_err().to_string();
                assert!(error.starts_with("TensorMap::") && error.contains(words), "{words:?} is not in: {error}");
            }
        }
        for (boxes, swizzle, words) in [
            (&[64, 2, 2][..], Swizzle::Bytes128, "boxes is 3 values, expected 4"),
            (&[64, 2, 2, 0], Swizzle::Bytes128, "boxes is 0 in place 3, expected 1 to 256"),
            (&[64, 257, 2, 1], Swizzle::Bytes128, "boxes is 257 in place 1"),
            (&[60, 2, 2, 1], Swizzle::Bytes128, "boxes[0] is 60 of bf16, 120 bytes, expected a multiple of 16 bytes"),
            (&[72, 2, 2, 1], Swizzle::Bytes128, "expected at most 128 bytes, the swizzle's span"),
            (&[40, 2, 2, 1], Swizzle::Bytes64, "expected at most 64 bytes"),
            (&[24, 2, 2, 1], Swizzle::Bytes32, "expected at most 32 bytes"),
        ] {
            let error = tiled(good, boxes, swizzle).unwrap_err().to_string();
            assert!(error.contains(words), "{words:?} is not in: {error}");
        }
        for (filter, swizzle, words) in [
            (Im2col { lower_corner: &[-1], ..filter }, Swizzle::Bytes128, "lower_corner is 1 values, expected 2"),
            (
                Im2col { lower_corner: &[-1, -129], ..filter },
                Swizzle::Bytes128,
                "-129 in place 1, expected -128 to 127",
            ),
            (Im2col { upper_corner: &[128, 0], ..filter }, Swizzle::Bytes128, "upper_corner is 128 in place 0"),
            (
                Im2col { upper_corner: &[-7, 0], ..filter },
                Swizzle::Bytes128,
                "-7 in dimension 0, expected more than -7 with 6",
            ),
            (Im2col { strides: &[1, 9], ..filter }, Swizzle::Bytes128, "strides is 9 in place 1, expected 1 to 8"),
            (Im2col { strides: &[1, 0], ..filter }, Swizzle::Bytes128, "strides is 0 in place 1"),
            (Im2col { channels: 0, ..filter }, Swizzle::Bytes128, "channels is 0, expected 1 to 256"),
            (Im2col { channels: 264, ..filter }, Swizzle::None, "channels is 264"),
            (Im2col { channels: 64, ..filter }, Swizzle::Bytes64, "expected at most 64 bytes"),
            (Im2col { pixels: 1025, ..filter }, Swizzle::Bytes128, "pixels is 1025, expected 1 to 1024"),
        ] {
            let error = im2col(good, filter, swizzle).unwrap_err().to_string();
            assert!(error.contains(words), "{words:?} is not in: {error}");
        }
    }
}

#[test]
fn a_map_where_the_kernel_declares_bytes_is_refused() {
    for (device, card) in hoppers() {
        let all = numbers(&device, 64);
        let tensor = TensorView { base: address(&all), dtype: DType::F32, dims: &[64], strides_bytes: &[] };
        let map = TensorMap::tiled(&card, tensor, &[32], Swizzle::Bytes128).unwrap();
        let args = [Arg::of(&tensor.base), Arg::of(&map)];
        // SAFETY: refused before it runs.
        let result =
            unsafe { card.launch("sm90/launch", "conformance_misplaced_map", Launch::grid([1; 3]).block(32), &args) };
        let error = result.unwrap_err().to_string();
        assert!(
            error.contains("parameter 1 lies at byte 8, where its argument's type wants a multiple of 64"),
            "{error}"
        );
    }
}

#[test]
fn blocks_know_their_cluster() {
    for (device, card) in hoppers() {
        for (grid, cluster) in
            [([6usize, 4, 2], [1usize, 1, 1]), ([6, 4, 2], [2, 2, 2]), ([8, 1, 1], [8, 1, 1]), ([3, 4, 1], [1, 4, 1])]
        {
            let launch = Launch::grid(grid).block(32).cluster(cluster).carveout(100);
            let blocks: usize = grid.iter().product();
            let got = written(&device, &card, "conformance_cluster", launch, blocks * 2, &[]);
            let size: usize = cluster.iter().product();
            let mut want = Vec::new();
            for (z, y, x) in
                (0..grid[2]).flat_map(|z| (0..grid[1]).flat_map(move |y| (0..grid[0]).map(move |x| (z, y, x))))
            {
                let rank = ((z % cluster[2]) * cluster[1] + y % cluster[1]) * cluster[0] + x % cluster[0];
                want.extend([rank as u32, size as u32].map(f32::from_bits));
            }
            assert_eq!(got, want, "{grid:?} in clusters of {cluster:?}");
        }
        let launch = Launch::grid([6, 1, 1]).block(32).cluster([4, 1, 1]);
        // SAFETY: refused before it runs.
        let error = unsafe { card.launch("sm90/launch", "conformance_cluster", launch, &[]) }.unwrap_err().to_string();
        assert!(error.starts_with("kernel conformance_cluster: a grid of 6 x 1 x 1 blocks"), "{error}");
    }
}

/// A chain of launches that may overlap, by themselves and as a graph, gives what it gives one after the other.
#[test]
fn dependent_launches_wait_for_each_other() {
    for (device, card) in hoppers() {
        let count = 1000i32;
        let of = |value: u32| Tensor::from_f32(&device, &[1000], DType::F32, &[f32::from_bits(value); 1000]).unwrap();
        let (x, y) = (of(3), of(0));
        let (from, to) = (address(&x), address(&y));
        let launch = Launch::grid([8, 1, 1]).block(128);
        let chain = || {
            for (to, from) in [(to, from), (from, to), (to, from)] {
                // SAFETY: the arguments are the entry's; both tensors have `count` numbers.
                unsafe {
                    let args = [Arg::of(&to), Arg::of(&from), Arg::of(&count)];
                    card.launch("sm90/launch", "conformance_dependent", launch, &args)?;
                }
            }
            Ok(())
        };
        let numbers =
            |tensor: &Tensor| -> Vec<u32> { tensor.to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect() };
        chain().unwrap();
        // 3 -> 7 -> 15 -> 31; then from what x has, 15.
        assert_eq!((numbers(&x), numbers(&y)), (vec![15; 1000], vec![31; 1000]));
        let graph = card.capture(0, chain).unwrap();
        assert_eq!((numbers(&x), numbers(&y)), (vec![15; 1000], vec![31; 1000]), "recorded, not run");
        graph.replay().unwrap();
        assert_eq!((numbers(&x), numbers(&y)), (vec![63; 1000], vec![127; 1000]));
    }
}
