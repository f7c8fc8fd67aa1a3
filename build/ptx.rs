//! What PTX says of its kernels.

use std::collections::BTreeMap;

/// What PTX says of one kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub parameters: usize,
    /// It waits for the launch before it.
    pub waits: bool,
}

/// The kernels by name:
///
/// ```text
/// .visible .entry add_bf16(
///     .param .u64 .ptr .align 1 add_bf16_param_0,
///     .param .align 4 .b8 add_bf16_param_1[16]
/// )
/// {
///     griddepcontrol.wait;
/// ```
pub fn entries(text: &str) -> Result<BTreeMap<String, Entry>, String> {
    let mut found = BTreeMap::new();
    for rest in text.split(".entry ").skip(1) {
        let (name, rest) = rest.split_once('(').ok_or("a kernel without a list of parameters")?;
        let (list, body) =
            rest.split_once(')').ok_or_else(|| format!("{name}: the list of parameters does not end"))?;
        let (parameters, waits) = (list.matches(".param ").count(), body.contains("griddepcontrol.wait"));
        found.insert(name.trim().to_owned(), Entry { parameters, waits });
    }
    Ok(found)
}
