//! The card's runtime, on the emulated card or (MEGAFUSE_TEST_DEVICES=cuda) a real one: memory, copies, graphs, errors.

#[path = "../common/mod.rs"]
mod common;

mod graph;
mod memory;
mod runs;
