//! What PTX says of its kernels.

use std::collections::BTreeMap;

/// How many parameters each kernel has:
///
/// ```text
/// .visible .entry add_bf16(
///     .param .u64 .ptr .align 1 add_bf16_param_0,
///     .param .align 4 .b8 add_bf16_param_1[16]
/// )
/// ```
pub fn parameters(text: &str) -> Result<BTreeMap<String, usize>, String> {
    let mut found = BTreeMap::new();
    for rest in text.split(".entry ").skip(1) {
        let (name, rest) = rest.split_once('(').ok_or("a kernel without a list of parameters")?;
        let (list, _) = rest.split_once(')').ok_or_else(|| format!("{name}: the list of parameters does not end"))?;
        found.insert(name.trim().to_owned(), list.matches(".param ").count());
    }
    Ok(found)
}
