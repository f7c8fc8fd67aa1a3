//! JSON as Python's json module writes it: configuration files hold `Infinity`, `-Infinity` and `NaN`, which JSON itself
//! does not have.

use serde_json::Value;

/// The words of Python's json for numbers that JSON cannot say.
const WORDS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Parses `text`; a number that JSON cannot say becomes the string of its word (`"-Infinity"`), for [`number`] to read.
///
/// # Errors
/// serde_json's, with line, column and cause of the first syntax error.
pub fn parse(text: &str) -> Result<Value, serde_json::Error> {
    // A byte order mark is no part of the value, though some editors write it.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    match serde_json::from_str(text) {
        Ok(value) => Ok(value),
        Err(error) => match quoted(text) {
            Some(quoted) => serde_json::from_str(&quoted),
            None => Err(error),
        },
    }
}

/// A number, also one that stands as Python's word for it.
pub fn number(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some("Infinity") => Some(f64::INFINITY),
        Some("-Infinity") => Some(f64::NEG_INFINITY),
        Some("NaN") => Some(f64::NAN),
        Some(_) => None,
        None => value.as_f64(),
    }
}

/// `text` with the words outside strings in quotes; `None` when there are none.
fn quoted(text: &str) -> Option<String> {
    let (mut out, mut rest) = (String::with_capacity(text.len() + 16), text);
    let (mut in_string, mut found) = (false, false);
    while let Some(c) = rest.chars().next() {
        let mut length = c.len_utf8();
        if in_string {
            if c == '\\' {
                length += rest[length..].chars().next().map_or(0, char::len_utf8);
            }
            in_string = c != '"';
        } else if c == '"' {
            in_string = true;
        } else if let Some(word) = WORDS.into_iter().find(|word| rest.starts_with(word)) {
            found = true;
            out.extend(["\"", word, "\""]);
            rest = &rest[word.len()..];
            continue;
        }
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    found.then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_json_cannot_say_are_read() {
        let value = parse(r#"{"a": -Infinity, "b": [Infinity, NaN, 1], "Infinity": "NaN \" Infinity"}"#).unwrap();
        assert_eq!(number(&value["a"]), Some(f64::NEG_INFINITY));
        assert_eq!(number(&value["b"][0]), Some(f64::INFINITY));
        assert!(number(&value["b"][1]).unwrap().is_nan());
        assert_eq!(number(&value["b"][2]), Some(1.0));
        assert_eq!(value["Infinity"], "NaN \" Infinity");
        assert_eq!(number(&value["Infinity"]), None);
    }

    #[test]
    fn syntax_errors_name_the_place() {
        for (text, place) in [("{\"a\": 1,\n \"b\" 2}", "line 2 column 6"), ("{\"a\": Infinit}", "line 1 column 7")] {
            assert!(parse(text).unwrap_err().to_string().contains(place), "{}", parse(text).unwrap_err());
        }
        assert_eq!(parse("\u{feff}{}").unwrap(), serde_json::json!({}));
    }
}
