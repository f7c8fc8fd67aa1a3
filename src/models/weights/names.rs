//! Names of tensors: prefixes that wrappers put before all of them, and names that look alike.

use std::collections::BTreeMap;

use super::Entry;

/// Without the prefixes that compiled (`_orig_mod.`), distributed (`module.`) or wrapped (`model.`) networks put before
/// every key, also one inside the other.
pub(in crate::models) fn unwrapped_names(mut entries: BTreeMap<String, Entry>) -> BTreeMap<String, Entry> {
    const PREFIXES: [&str; 3] = ["_orig_mod.", "module.", "model."];
    // The keys of a whole checkpoint begin so by themselves.
    let whole = |entries: &BTreeMap<String, Entry>| entries.keys().any(|key| key.starts_with("model.diffusion_model."));
    while let Some(prefix) = PREFIXES
        .into_iter()
        .find(|prefix| {
            !entries.is_empty() && entries.keys().all(|key| key.len() > prefix.len() && key.starts_with(prefix))
        })
        .filter(|&prefix| prefix != "model." || !whole(&entries))
    {
        entries = entries.into_iter().map(|(key, entry)| (key[prefix.len()..].to_string(), entry)).collect();
    }
    entries
}

/// Of `extra`, the tensor that seems to be `key` (of this shape) under another name: one name ends as the other does, or
/// they have the same shape and differ in their last word or in a few letters.
pub(super) fn alike<'a>(
    key: &str,
    shape: &[usize],
    extra: impl Iterator<Item = (&'a String, &'a Entry)>,
) -> Option<(&'a String, &'a Entry)> {
    let module = |key: &str| key.rsplit_once('.').map(|(module, _)| module.to_string());
    let distance = |(other, entry): &(&String, &Entry)| -> Option<usize> {
        let longer = |long: &str, short: &str| long.ends_with(&format!(".{short}"));
        if longer(other, key) || longer(key, other) {
            return Some(0);
        }
        let count = |shape: &[usize]| shape.iter().product::<usize>();
        if count(&entry.shape) != count(shape) {
            return None;
        }
        let edits = edits(key, other);
        let near = edits <= 2.max(key.len() / 8) || (module(key).is_some() && module(key) == module(other));
        near.then_some(edits)
    };
    extra.filter_map(|found| Some((distance(&found)?, found))).min_by_key(|(edits, _)| *edits).map(|(_, found)| found)
}

/// Letters to insert, delete or exchange between two names (Levenshtein 1966).
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in b.iter().enumerate() {
            let exchanged = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = exchanged.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::edits;

    #[test]
    fn edits_between_names() {
        for (a, b, count) in
            [("", "", 0), ("conv", "conv", 0), ("kitten", "sitting", 3), ("to_q", "to_k", 1), ("", "ab", 2)]
        {
            assert_eq!((edits(a, b), edits(b, a)), (count, count), "{a} {b}");
        }
    }
}
