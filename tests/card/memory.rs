use megafuse::runtime::{CudaDevice, CudaOptions, DType, Device, Tensor};
use megafuse::{Error, ops};

use crate::common::{Random, cards};

/// Larger than the pinned ring's slots, and no multiple of anything.
const LARGE: usize = (9 << 20) / 4 + 3;

fn cuda(device: &Device) -> &CudaDevice {
    match device {
        Device::Cuda(cuda) => cuda,
        other => panic!("{other} is no card"),
    }
}

/// A second device on the same driver, with tensors in shared regions as a run has them.
fn shared_regions() -> CudaDevice {
    cards(); // the driver is chosen
    CudaDevice::open(CudaOptions::default()).unwrap()
}

#[test]
fn copies_come_back_as_they_went() {
    for device in cards() {
        for (count, dtype) in [(0, DType::F32), (1, DType::BF16), (LARGE, DType::F32), (LARGE, DType::F16)] {
            let host = Random::new(7).tensor(&Device::cpu(), &[count], dtype, 0.0, 3.0);
            let card = host.to_device(&device).unwrap();
            assert_eq!(card.to_f32_vec().unwrap(), host.to_f32_vec().unwrap(), "{device} {count} {dtype}");
            let again = Tensor::from_f32(&device, &[count], dtype, &host.to_f32_vec().unwrap()).unwrap();
            assert_eq!(again.to_f32_vec().unwrap(), host.to_f32_vec().unwrap(), "{device} {count} {dtype}");
        }
        let ids = [3, 0, u32::MAX];
        let ids = Tensor::from_u32(&device, &[3], &ids).unwrap().to_device(&Device::cpu()).unwrap();
        assert_eq!(ids.to_f32_vec().unwrap(), [3.0, 0.0, u32::MAX as f32]);
        let rows = Random::new(8).randn(&device, &[5, 7], DType::BF16);
        let all = rows.to_f32_vec().unwrap();
        assert_eq!(rows.rows(2..4).unwrap().to_f32_vec().unwrap(), all[14..28], "a view begins inside its storage");
        assert_eq!(Tensor::zeros(&device, &[33], DType::F16).unwrap().to_f32_vec().unwrap(), [0.0; 33]);
    }
}

#[test]
fn overwriting_keeps_the_address_and_the_order() {
    for device in cards() {
        let mut x = Tensor::from_f32(&device, &[3], DType::F32, &[1.0, 2.0, 3.0]).unwrap();
        let before = ops::add(&x, &x).unwrap();
        x.write_f32(&[10.0, 20.0, 30.0]).unwrap();
        let after = ops::add(&x, &x).unwrap();
        assert_eq!(before.to_f32_vec().unwrap(), [2.0, 4.0, 6.0], "launched before the copy");
        assert_eq!(after.to_f32_vec().unwrap(), [20.0, 40.0, 60.0]);
        assert!(x.write_f32(&[1.0]).is_err());
    }
}

#[test]
fn memory_is_counted_reused_and_given_back() {
    let cuda = shared_regions();
    let device = Device::Cuda(cuda.clone());
    let free = cuda.memory().unwrap().free_bytes;
    cuda.reserve(100 << 20).unwrap();
    let reserved = cuda.memory().unwrap().reserved_bytes;
    assert!(reserved >= 100 << 20);
    for _ in 0..50 {
        let tensors: Vec<Tensor> =
            (1..9).map(|i| Tensor::uninit(&device, &[i * 1_000_003], DType::F16).unwrap()).collect();
        let in_use: u64 = tensors.iter().map(Tensor::bytes).sum();
        assert_eq!(cuda.memory().unwrap().in_use_bytes, in_use);
    }
    let memory = cuda.memory().unwrap();
    assert_eq!((memory.in_use_bytes, memory.reserved_bytes), (0, reserved), "nothing more was asked of the driver");
    assert!(memory.peak_bytes > 70_000_000);
    drop((device, cuda));
    // Other tests have a few small tensors meanwhile.
    let after = shared_regions().memory().unwrap().free_bytes;
    assert!(free.abs_diff(after) < 50 << 20, "a closed device gives its 100 MiB back: {free} bytes free, then {after}");
}

#[test]
fn out_of_memory_is_a_value_with_figures() {
    for device in cards() {
        let total = cuda(&device).memory().unwrap().total_bytes;
        let keep = Tensor::zeros(&device, &[1000], DType::F32).unwrap();
        let error = Tensor::uninit(&device, &[total as usize], DType::F32).unwrap_err();
        match &error {
            Error::OutOfMemory { requested_bytes, in_use_bytes, .. } => {
                assert_eq!((*requested_bytes, *in_use_bytes), (4 * total, 4000));
            }
            other => panic!("{other}"),
        }
        let text = error.to_string();
        assert!(text.contains(&device.to_string()) && text.contains(&total.to_string()), "{text}");
        assert_eq!(keep.to_f32_vec().unwrap(), [0.0; 1000], "the device goes on");
        assert!(Tensor::uninit(&device, &[1 << 40, 1 << 40], DType::F32).is_err());
    }
}

#[test]
fn tensors_of_two_devices_do_not_mix() {
    for device in cards() {
        let other = Device::Cuda(shared_regions());
        let [a, b] = [&device, &other].map(|device| Tensor::zeros(device, &[4], DType::F32).unwrap());
        let error = ops::add(&a, &b).unwrap_err().to_string();
        assert!(error.contains("add: b is on"), "{error}");
        let moved = b.to_device(&device).unwrap();
        assert!(ops::add(&a, &moved).is_ok());
    }
}
