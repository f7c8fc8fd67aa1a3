use megafuse::runtime::{CudaDevice, CudaOptions, DType, Device, Tensor};
use megafuse::{Error, ops};

use crate::common::cards;

fn cuda(device: &Device) -> &CudaDevice {
    match device {
        Device::Cuda(cuda) => cuda,
        other => panic!("{other} is no card"),
    }
}

#[test]
fn a_replay_reads_what_lies_there_now() {
    for device in cards() {
        let mut x = Tensor::from_f32(&device, &[3], DType::F32, &[1.0, 2.0, 3.0]).unwrap();
        let mut result = None;
        let graph = cuda(&device)
            .capture(0, || {
                let twice = ops::add(&x, &x)?;
                result = Some(ops::add(&twice, &x)?);
                Ok(())
            })
            .unwrap();
        assert_eq!(graph.kernels(), ["add_f32", "add_f32"]);
        let result = result.unwrap();
        for round in 1..4 {
            let values = [1.0, 2.0, 3.0].map(|value: f32| value * round as f32);
            x.write_f32(&values).unwrap();
            graph.replay().unwrap();
            // Memory that was free while the graph was recorded is not the graph's: it may be used between replays.
            let other = Tensor::from_f32(&device, &[3], DType::F32, &[9.0; 3]).unwrap();
            assert_eq!(ops::add(&other, &other).unwrap().to_f32_vec().unwrap(), [18.0; 3]);
            assert_eq!(result.to_f32_vec().unwrap(), values.map(|value| 3.0 * value), "round {round}");
        }
    }
}

#[test]
fn recording_launches_nothing() {
    for device in cards() {
        let a = Tensor::from_f32(&device, &[2], DType::F32, &[1.0, 2.0]).unwrap();
        let mut sum = None;
        let graph = cuda(&device)
            .capture(1 << 20, || {
                sum = Some(ops::add(&a, &a)?);
                Ok(())
            })
            .unwrap();
        let sum = sum.unwrap();
        assert_ne!(sum.to_f32_vec().unwrap(), [2.0, 4.0]);
        graph.replay().unwrap();
        assert_eq!(sum.to_f32_vec().unwrap(), [2.0, 4.0]);
    }
}

#[test]
fn what_cannot_be_recorded_is_an_error_and_the_device_goes_on() {
    for device in cards() {
        let mut a = Tensor::from_f32(&device, &[2], DType::F32, &[1.0, 2.0]).unwrap();
        let error = cuda(&device).capture(0, || a.to_f32_vec().map(drop)).unwrap_err().to_string();
        assert!(error.contains("copy to the host"), "{error}");
        let error = cuda(&device).capture(0, || a.write_f32(&[1.0, 2.0])).unwrap_err().to_string();
        assert!(error.contains("copy from the host"), "{error}");
        let inner = cuda(&device).clone();
        let error = cuda(&device).capture(0, || inner.capture(0, || Ok(())).map(drop)).unwrap_err().to_string();
        assert!(error.contains("another graph"), "{error}");
        let error = cuda(&device).capture(0, || Err(Error::Interrupted)).unwrap_err();
        assert!(matches!(error, Error::Interrupted));
        let shared = CudaDevice::open(CudaOptions::default()).unwrap();
        let total = shared.memory().unwrap().total_bytes;
        assert!(matches!(shared.capture(total * 2, || Ok(())), Err(Error::OutOfMemory { .. })));
        assert_eq!(ops::add(&a, &a).unwrap().to_f32_vec().unwrap(), [2.0, 4.0]);
        assert!(cuda(&device).capture(0, || Ok(())).unwrap().replay().is_ok(), "an empty graph");
    }
}
