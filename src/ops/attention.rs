use super::Tensor;
use crate::error::Result;

/// Arguments of [`attention`]; heads are as the projections leave them, so nothing is transposed or copied.
#[derive(Clone, Copy, Debug)]
pub enum Attention<'a> {
    /// Self-attention on the fused projection `[N, L, 3, heads, head_dim]` (q, k, v).
    Packed { qkv: &'a Tensor, causal: bool },
    /// Cross-attention: q `[N, L_q, heads, head_dim]`, kv `[N, L_k, 2, heads, head_dim]`.
    Cross { q: &'a Tensor, kv: &'a Tensor },
}

/// `softmax(q k^T / sqrt(head_dim)) v` per head: `[N, L_q, heads, head_dim]`, without the score matrix in memory. The
/// softmax is f32 whatever the dtype (so `upcast_attention` has nothing left to ask for). `causal`: query i sees keys
/// `0..=i`. Dao et al. 2022, arXiv:2205.14135.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device):
/// which argument; [`Error::Argument`](crate::Error::Argument): no keys.
pub fn attention(_args: Attention) -> Result<Tensor> {
    unimplemented!()
}
