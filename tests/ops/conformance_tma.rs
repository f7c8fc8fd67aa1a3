//! What TMA, clusters and hand-over between blocks do, by the kernels of kernels/sm90/conformance_tma.cu, against plain loops
//! from NVIDIA's description (PTX ISA: tensors, mbarrier, clusters). tests/hopper_launch.rs has boxes of two and four
//! dimensions and im2col.

use megafuse::runtime::cuda::{Arg, DevicePtr, Launch, Swizzle, TensorMap, TensorView};
use megafuse::runtime::{CudaDevice, DType, Device, Tensor};

use crate::common::hoppers;

/// Words of conformance_tma.cu's shared memory, its bytes with the mbarrier, and what no copy has written.
const WORDS: usize = 4096;
const SHARED_BYTES: usize = WORDS * 4 + 1024;
const UNTOUCHED: u32 = 0xeeee_eeee;
/// In global memory before a kernel runs.
const UNWRITTEN: f32 = -1.0;

fn filled(device: &Device, values: &[f32]) -> Tensor {
    Tensor::from_f32(device, &[values.len()], DType::F32, values).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect()
}

fn address(tensor: &Tensor) -> DevicePtr {
    DevicePtr::or_null(Some(tensor))
}

fn launch(card: &CudaDevice, entry: &str, launch: Launch, args: &[Arg]) {
    // SAFETY: the arguments are the entry's, as its comment has them, and the tensors as large as it says.
    unsafe { card.launch("sm90/conformance_tma", entry, launch, args).unwrap() };
}

/// A tensor of f32 and a box of it that begins at `at`; innermost dimension first.
struct Case {
    dims: Vec<usize>,
    /// In elements, of dimensions 1 and up.
    strides: Vec<usize>,
    boxes: Vec<usize>,
    swizzle: Swizzle,
    at: Vec<i32>,
}

impl Case {
    fn numel(&self) -> usize {
        self.strides.last().map_or(self.dims[0], |stride| stride * self.dims.last().unwrap())
    }

    fn map(&self, card: &CudaDevice, base: DevicePtr) -> TensorMap {
        let strides_bytes: Vec<usize> = self.strides.iter().map(|stride| stride * 4).collect();
        let tensor = TensorView { base, dtype: DType::F32, dims: &self.dims, strides_bytes: &strides_bytes };
        TensorMap::tiled(card, tensor, &self.boxes, self.swizzle).unwrap()
    }

    /// Of each element of the box: its word in shared memory, and its index in the tensor if it lies inside.
    ///
    /// Rows follow each other; with a swizzle each takes as many bytes as that exchanges. Of the 16-byte chunks of 128 bytes
    /// number c of line l goes to c XOR l modulo 2, 4 or 8.
    fn places(&self) -> Vec<(usize, Option<usize>)> {
        let (pitch, lines) = match self.swizzle {
            Swizzle::None => (self.boxes[0] * 4, 1),
            Swizzle::Bytes32 => (32, 2),
            Swizzle::Bytes64 => (64, 4),
            Swizzle::Bytes128 => (128, 8),
        };
        let count: usize = self.boxes.iter().product();
        let place = |element: usize| {
            let byte = element / self.boxes[0] * pitch + element % self.boxes[0] * 4;
            let (line, chunk) = (byte / 128, byte / 16 % 8);
            let word = (line * 128 + (chunk ^ (line % lines)) * 16 + byte % 16) / 4;
            let mut rest = element;
            let mut index = Some(0);
            for (d, &size) in self.boxes.iter().enumerate() {
                let i = i64::from(self.at[d]) + (rest % size) as i64;
                rest /= size;
                let stride = if d == 0 { 1 } else { self.strides[d - 1] };
                let inside = (0..self.dims[d] as i64).contains(&i);
                index = index.filter(|_| inside).map(|index| index + i as usize * stride);
            }
            (word, index)
        };
        (0..count).map(place).collect()
    }

    fn args<'a>(&'a self, rank: &'a i32) -> Vec<Arg<'a>> {
        const ZERO: i32 = 0;
        let coordinates = (0..5).map(|d| Arg::of(self.at.get(d).unwrap_or(&ZERO)));
        [Arg::of(rank)].into_iter().chain(coordinates).collect()
    }
}

/// Every rank that `ranks` names: inside, over edges, outside; rows as wide as each swizzle and narrower.
fn cases(ranks: &[usize]) -> Vec<Case> {
    let dims = [50, 6, 5, 4, 3];
    let mut all = Vec::new();
    for &rank in ranks {
        let strides: Vec<usize> = [52, 52 * 6 + 4, 320 * 5, 320 * 5 * 4][..rank - 1].to_vec();
        for (swizzle, width) in [
            (Swizzle::None, 20),
            (Swizzle::Bytes32, 8),
            (Swizzle::Bytes32, 4),
            (Swizzle::Bytes64, 16),
            (Swizzle::Bytes64, 12),
            (Swizzle::Bytes128, 32),
            (Swizzle::Bytes128, 20),
            (Swizzle::Bytes128, 4),
        ] {
            let boxes = [width, 5, 3, 2, 2][..rank].to_vec();
            for at in [[8, 1, 0, 1, 0], [-3, -2, -1, -1, -1], [44, 4, 4, 3, 2], [60, 0, 0, 0, 0]] {
                all.push(Case {
                    dims: dims[..rank].to_vec(),
                    strides: strides.clone(),
                    boxes: boxes.clone(),
                    swizzle,
                    at: at[..rank].to_vec(),
                });
            }
        }
    }
    all
}

#[test]
fn loads() {
    for (device, card) in hoppers() {
        for case in cases(&[1, 2, 3, 5]) {
            let values: Vec<f32> = (0..case.numel()).map(|i| i as f32 + 1.0).collect();
            let tensor = filled(&device, &values);
            let map = case.map(&card, address(&tensor));
            let mut want = vec![UNTOUCHED; WORDS];
            for (word, index) in case.places() {
                want[word] = index.map_or(0.0, |i| values[i]).to_bits();
            }
            want.push(1);
            let out = filled(&device, &vec![UNWRITTEN; WORDS + 1]);
            let (to, rank) = (address(&out), case.dims.len() as i32);
            let bytes = (case.boxes.iter().product::<usize>() * 4) as i32;
            let mut args = vec![Arg::of(&to), Arg::of(&map)];
            args.extend(case.args(&rank));
            args.push(Arg::of(&bytes));
            launch(&card, "conformance_tma_load", Launch::grid([1, 1, 1]).block(128).shared(SHARED_BYTES), &args);
            let got = bits(&out);
            let wrong = got.iter().zip(&want).position(|(got, want)| got != want);
            assert_eq!(wrong, None, "{device}: word of box {:?}, {:?}, at {:?}", case.boxes, case.swizzle, case.at);
        }
    }
}

#[test]
fn stores() {
    for (device, card) in hoppers() {
        for case in cases(&[2, 3, 4, 5]) {
            let tensor = filled(&device, &vec![UNWRITTEN; case.numel()]);
            let map = case.map(&card, address(&tensor));
            let mut want = vec![UNWRITTEN.to_bits(); case.numel()];
            for (word, index) in case.places() {
                if let Some(index) = index {
                    want[index] = word as u32;
                }
            }
            let rank = case.dims.len() as i32;
            let mut args = vec![Arg::of(&map)];
            args.extend(case.args(&rank));
            launch(&card, "conformance_tma_store", Launch::grid([1, 1, 1]).block(128).shared(SHARED_BYTES), &args);
            let got = bits(&tensor);
            let wrong = got.iter().zip(&want).position(|(got, want)| got != want);
            assert_eq!(wrong, None, "{device}: element, box {:?}, {:?}, at {:?}", case.boxes, case.swizzle, case.at);
        }
    }
}

#[test]
fn blocks_of_a_cluster_exchange() {
    let mut want = Vec::new();
    for rank in 0..4u32 {
        let (next, previous) = ((rank + 1) % 4, (rank + 3) % 4);
        want.extend((0..128).map(|i| (i as f32 + 1.0).to_bits()));
        want.extend((0..32).map(|i| next * 100 + i));
        want.extend((0..32).map(|i| 1000 + previous * 100 + i));
        want.extend((0..32).map(|i| 2000 + i / 8 * 100 + rank * 10 + i % 8));
    }
    for (device, card) in hoppers() {
        let rows = filled(&device, &(0..128).map(|i| i as f32 + 1.0).collect::<Vec<_>>());
        let tensor = TensorView { base: address(&rows), dtype: DType::F32, dims: &[32, 4], strides_bytes: &[128] };
        let map = TensorMap::tiled(&card, tensor, &[32, 1], Swizzle::None).unwrap();
        let out = filled(&device, &vec![UNWRITTEN; want.len()]);
        let to = address(&out);
        let shape = Launch::grid([4, 1, 1]).block(32).cluster([4, 1, 1]);
        launch(&card, "conformance_exchange", shape, &[Arg::of(&to), Arg::of(&map)]);
        assert_eq!(bits(&out), want, "{device}");
    }
}

#[test]
fn phases_of_an_mbarrier() {
    for (device, card) in hoppers() {
        let row = filled(&device, &[1.0; 32]);
        let tensor = TensorView { base: address(&row), dtype: DType::F32, dims: &[32, 1], strides_bytes: &[128] };
        let map = TensorMap::tiled(&card, tensor, &[32, 1], Swizzle::None).unwrap();
        let out = filled(&device, &[UNWRITTEN; 6]);
        let to = address(&out);
        launch(&card, "conformance_mbarrier", Launch::grid([1, 1, 1]).block(1), &[Arg::of(&to), Arg::of(&map)]);
        assert_eq!(bits(&out), [0, 0, 1, 0, 1, 0], "{device}");
    }
}

#[test]
fn the_last_block_adds_up() {
    let blocks = 300u32;
    let want: Vec<u32> = (0..64).map(|i| (0..blocks).map(|block| block * i).sum()).collect();
    for (device, card) in hoppers() {
        let (out, sums) = (filled(&device, &[UNWRITTEN; 64]), filled(&device, &vec![UNWRITTEN; blocks as usize * 64]));
        let count = filled(&device, &[0.0]);
        let pointers = [&out, &sums, &count].map(address);
        for _ in 0..3 {
            let shape = Launch::grid([blocks as usize, 1, 1]).block(64);
            launch(&card, "conformance_last_block", shape, &pointers.each_ref().map(Arg::of));
            assert_eq!(bits(&out), want, "{device}");
            assert_eq!(bits(&count), [0], "{device}");
        }
    }
}
