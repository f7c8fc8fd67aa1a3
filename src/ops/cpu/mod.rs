//! The cpu device's side of the ops: vector math and the matrix product that linear and conv2d share.

pub mod math;
