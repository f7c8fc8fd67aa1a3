use super::MmditConfig;
use crate::error::Result;
use crate::models::layers::Linear;
use crate::models::weights::Weights;
use crate::ops::{
    self, Activation, Attention, AttentionOptions, LayerNorm, Modulation, SecondSource, StepColumns, StepRows,
};
use crate::runtime::Tensor;

/// Of every norm, as published.
pub(super) const EPS: f32 = 1e-6;

/// Parts of the row by which a step modulates a stream of a block, C columns each, in the order of the published layer.
mod part {
    pub const SHIFT: usize = 0;
    pub const SCALE: usize = 1;
    pub const GATE: usize = 2;
    pub const FF_SHIFT: usize = 3;
    pub const FF_SCALE: usize = 4;
    pub const FF_GATE: usize = 5;
    // Of a second attention, where there is one.
    pub const SECOND_SHIFT: usize = 6;
    pub const SECOND_SCALE: usize = 7;
    pub const SECOND_GATE: usize = 8;
}

/// The layers that make those rows, in the order in which the blocks read them: all steps' are made before the first.
pub(super) type Modulations = Vec<Linear>; // [6 C, C], [9 C, C] with a second attention, [2 C, C] at an end

/// One stream's row of a step.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) rows: StepRows<'a>,
    /// C
    pub(super) width: usize,
}

impl<'a> Rows<'a> {
    fn gate(&self, part: usize) -> StepColumns<'a> {
        StepColumns { rows: self.rows, first: part * self.width }
    }

    /// `(1 + scale) layer_norm(x) + shift`, `[N, L, C]`.
    fn modulated(&self, x: &Tensor, scale: usize, shift: usize) -> Result<Tensor> {
        let modulation = Modulation { rows: self.rows, scale: scale * self.width, shift: shift * self.width };
        ops::layer_norm(LayerNorm { modulation: Some(modulation), ..LayerNorm::new(x, EPS) })
    }

    /// The same where a stream ends, whose rows are scale and shift alone.
    pub(super) fn modulated_at_end(&self, x: &Tensor) -> Result<Tensor> {
        self.modulated(x, 0, 1)
    }
}

/// The layer of a stream's end: `linear [2 C, C]`, scale, then shift. Files of other programs hold them apart.
pub(super) fn load_end(w: &Weights, width: usize) -> Result<Linear> {
    let w = w.at("linear");
    if w.contains("weight") {
        return Linear::load(&w, 2 * width, width);
    }
    Ok(Linear {
        weight: w.stacked(&["scale.weight", "shift.weight"], width, Some(width))?.into(),
        bias: Some(w.stacked(&["scale.bias", "shift.bias"], width, None)?),
    })
}

fn refs(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

/// q, k and v of one stream; k and v alone where nothing reads what its queries would find.
struct Projection {
    linear: Linear,      // [3 C, C] or [2 C, C]
    gammas: Vec<Tensor>, // [head_dim] of q and k, or of k; none without norms
    heads: usize,
}

impl Projection {
    /// `names`: of q, k and v. `norms`: of q and k.
    fn load(w: &Weights, config: &MmditConfig, names: [&str; 3], norms: [&str; 2], has_q: bool) -> Result<Projection> {
        let (c, head_dim) = (config.width(), config.attention_head_dim);
        let first = usize::from(!has_q);
        let of = |kind: &str| names.map(|name| format!("{name}.{kind}"));
        let (weights, biases) = (of("weight"), of("bias"));
        if !has_q {
            w.unread(&weights[0], &[c, c])?;
            w.unread(&biases[0], &[c])?;
        }
        let linear = Linear {
            weight: w.stacked_product(&refs(&weights[first..]), c, c)?,
            bias: Some(w.stacked(&refs(&biases[first..]), c, None)?),
        };
        let mut gammas = Vec::new();
        if config.has_qk_norm {
            let norms = norms.map(|norm| format!("{norm}.weight"));
            if !has_q {
                w.unread(&norms[0], &[head_dim])?;
            }
            gammas = norms[first..].iter().map(|norm| w.tensor(norm, &[head_dim])).collect::<Result<_>>()?;
        }
        Ok(Projection { linear, gammas, heads: config.num_attention_heads })
    }

    /// `[N, L, C]` to `[N, L, 3 or 2, heads, head_dim]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [n, l, c] = x.dims("mmdit", "x")?;
        let shape = [n, l, self.linear.weight.rows() / c, self.heads, c / self.heads];
        let mut y = self.linear.forward(x)?.reshape(&shape)?;
        if !self.gammas.is_empty() {
            ops::rms_norm_heads(&mut y, &self.gammas.iter().collect::<Vec<_>>(), EPS)?;
        }
        Ok(y)
    }
}

/// What the tokens of `qkv` find in their own stream and in `other`, `[N, L, C]`: one softmax over the keys of both, each where its
/// projection has left it.
fn attend(qkv: &Tensor, other: Option<&Tensor>) -> Result<Tensor> {
    let &[n, l, _, heads, head_dim] = qkv.shape() else { unreachable!("a projection has five dimensions") };
    let options =
        AttentionOptions { second: other.map(|kv| SecondSource { kv, weight: None }), ..AttentionOptions::default() };
    ops::attention_with(Attention::Packed { qkv, causal: false }, options)?.reshape(&[n, l, heads * head_dim])
}

/// What follows the joint attention in a stream.
struct Tail {
    to_out: Linear, // [C, C]
    ff_in: Linear,  // [4 C, C]
    ff_out: Linear, // [C, 4 C]
}

impl Tail {
    fn load(w: &Weights, c: usize, [to_out, ff]: [&str; 2]) -> Result<Tail> {
        let net = w.at(ff).at("net");
        Ok(Tail {
            to_out: Linear::load_product(&w.at("attn").at(to_out), c, c)?,
            ff_in: Linear::load_product(&net.at("0.proj"), 4 * c, c)?,
            ff_out: Linear::load_product(&net.at("2"), c, 4 * c)?,
        })
    }

    fn feed_forward(&self, x: &Tensor, rows: Rows) -> Result<Tensor> {
        let y = rows.modulated(x, part::FF_SCALE, part::FF_SHIFT)?;
        let y = self.ff_in.fused(&y, Activation::GeluTanh, None)?; // [N, L, 4 C]
        self.ff_out.forward_gated(&y, rows.gate(part::FF_GATE), x)
    }
}

/// Attention of the picture to itself, beside the joint one.
struct SecondAttention {
    to_qkv: Projection,
    to_out: Linear, // [C, C]
}

/// JointTransformerBlock: two streams with weights of their own, which meet in one attention. Esser et al. 2024, arXiv:2403.03206,
/// sec. 4 and fig. 2b.
pub(super) struct JointBlock {
    to_qkv: Projection,
    tail: Tail,
    second: Option<SecondAttention>,
    /// q, k and v of the text; k and v in the last block.
    add_qkv: Projection,
    /// Of the text; none in the last block, after which nothing reads it.
    text_tail: Option<Tail>,
    /// Of the picture's rows among the [`Modulations`]; the text's are the next.
    pub(super) rows: usize,
}

impl JointBlock {
    pub(super) fn load(
        w: &Weights,
        config: &MmditConfig,
        number: usize,
        modulations: &mut Modulations,
    ) -> Result<JointBlock> {
        let (c, attention) = (config.width(), w.at("attn"));
        let (is_dual, is_last) = (config.has_dual_attention[number], number + 1 == config.num_layers);
        let rows = modulations.len();
        modulations.push(Linear::load(&w.at("norm1.linear"), if is_dual { 9 * c } else { 6 * c }, c)?);
        modulations.push(match is_last {
            true => load_end(&w.at("norm1_context"), c)?,
            false => Linear::load(&w.at("norm1_context.linear"), 6 * c, c)?,
        });
        let (q_k_v, norms) = (["to_q", "to_k", "to_v"], ["norm_q", "norm_k"]);
        let (added, added_norms) = (["add_q_proj", "add_k_proj", "add_v_proj"], ["norm_added_q", "norm_added_k"]);
        Ok(JointBlock {
            to_qkv: Projection::load(&attention, config, q_k_v, norms, true)?,
            tail: Tail::load(w, c, ["to_out.0", "ff"])?,
            second: match is_dual {
                false => None,
                true => Some(SecondAttention {
                    to_qkv: Projection::load(&w.at("attn2"), config, q_k_v, norms, true)?,
                    to_out: Linear::load_product(&w.at("attn2.to_out.0"), c, c)?,
                }),
            },
            add_qkv: Projection::load(&attention, config, added, added_norms, !is_last)?,
            text_tail: if is_last { None } else { Some(Tail::load(w, c, ["to_add_out", "ff_context"])?) },
            rows,
        })
    }

    /// `x: [N, L, C]`, `text: [N, L_text, C]` to the same; the text as it was where nothing reads it any more. `rows`: of both.
    pub(super) fn forward(&self, x: Tensor, text: Tensor, [rows, text_rows]: [Rows; 2]) -> Result<(Tensor, Tensor)> {
        let qkv = self.to_qkv.forward(&rows.modulated(&x, part::SCALE, part::SHIFT)?)?;
        let text_normed = match &self.text_tail {
            Some(_) => text_rows.modulated(&text, part::SCALE, part::SHIFT)?,
            None => text_rows.modulated_at_end(&text)?,
        };
        let text_qkv = self.add_qkv.forward(&text_normed)?;
        drop(text_normed);
        let found = attend(&qkv, Some(&text_qkv))?;
        let text_found = self.text_tail.is_some().then(|| attend(&text_qkv, Some(&qkv))).transpose()?;
        drop((qkv, text_qkv));

        let mut y = self.tail.to_out.forward_gated(&found, rows.gate(part::GATE), &x)?;
        drop(found);
        if let Some(second) = &self.second {
            // Of the block's input, as the first.
            let qkv = second.to_qkv.forward(&rows.modulated(&x, part::SECOND_SCALE, part::SECOND_SHIFT)?)?;
            let found = attend(&qkv, None)?;
            drop(qkv);
            y = second.to_out.forward_gated(&found, rows.gate(part::SECOND_GATE), &y)?;
        }
        drop(x);
        let y = self.tail.feed_forward(&y, rows)?;
        let text = match (&self.text_tail, text_found) {
            (Some(tail), Some(found)) => {
                let text = tail.to_out.forward_gated(&found, text_rows.gate(part::GATE), &text)?;
                tail.feed_forward(&text, text_rows)?
            }
            _ => text,
        };
        Ok((y, text))
    }
}
