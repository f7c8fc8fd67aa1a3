//! The cpu device's side of the ops.
