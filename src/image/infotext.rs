/// The text that stable-diffusion-webui stores as `parameters` and that galleries read back:
///
/// ```text
/// a cat
/// Negative prompt: blurry
/// Steps: 20, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 512x512, Model: name
/// ```
///
/// The second line only when there is a negative prompt. A value with a comma, colon or line break is quoted as JSON.
///
/// ```
/// let fields = [("Steps", "20".to_string()), ("Stages", "64x64, 128x128".to_string())];
/// let text = megafuse::image::infotext("a cat", "", &fields);
/// assert_eq!(text, "a cat\nSteps: 20, Stages: \"64x64, 128x128\"");
/// ```
pub fn infotext(prompt: &str, negative: &str, fields: &[(&str, String)]) -> String {
    let negative = if negative.is_empty() { String::new() } else { format!("\nNegative prompt: {negative}") };
    let fields: Vec<String> = fields.iter().map(|(key, value)| format!("{key}: {}", quoted(value))).collect();
    format!("{prompt}{negative}\n{}", fields.join(", ")).trim().to_string()
}

fn quoted(value: &str) -> String {
    if value.contains([',', ':', '\n']) { serde_json::Value::from(value).to_string() } else { value.to_string() }
}

/// What stands in a text of [`infotext`]'s form, whoever wrote it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Infotext {
    pub prompt: String,
    pub negative: String,
    /// Names and values of the last line, in its order.
    pub fields: Vec<(String, String)>,
}

/// A last line with fewer fields is the prompt's, as stable-diffusion-webui takes it.
const FEWEST_FIELDS: usize = 3;

impl Infotext {
    /// `None`: there is no line of fields.
    ///
    /// ```
    /// let text = "a cat,\nasleep\nNegative prompt: blurry\nSteps: 20, Sampler: DDIM, Stages: \"64x64, 128x128\"";
    /// let read = megafuse::image::Infotext::parse(text).unwrap();
    /// assert_eq!((read.prompt.as_str(), read.negative.as_str()), ("a cat,\nasleep", "blurry"));
    /// assert_eq!((read.field("Steps"), read.field("Stages")), (Some("20"), Some("64x64, 128x128")));
    /// ```
    pub fn parse(text: &str) -> Option<Infotext> {
        let text = text.trim();
        let (words, last) = text.rsplit_once('\n').unwrap_or(("", text));
        let fields = fields(last);
        if fields.len() < FEWEST_FIELDS {
            return None;
        }
        let (mut prompt, mut negative, mut in_negative) = (Vec::new(), Vec::new(), false);
        for line in words.lines().map(str::trim_end) {
            match line.strip_prefix("Negative prompt:") {
                Some(rest) => {
                    in_negative = true;
                    negative.push(rest.trim_start());
                }
                None if in_negative => negative.push(line),
                None => prompt.push(line),
            }
        }
        Some(Infotext { prompt: prompt.join("\n"), negative: negative.join("\n"), fields })
    }

    /// The first field of this name.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// `Key: value, Key: "value, as JSON"`; what is not of this form is passed over.
fn fields(line: &str) -> Vec<(String, String)> {
    let (mut fields, mut rest) = (Vec::new(), line);
    while let Some((key, after)) = rest.split_once(':') {
        // What stands before a comma belongs to no key.
        let key = key.rsplit(',').next().unwrap_or(key).trim();
        let after = after.trim_start();
        let quoted = after.starts_with('"').then(|| {
            let mut values = serde_json::Deserializer::from_str(after).into_iter::<String>();
            let value = values.next()?.ok()?;
            Some((value, &after[values.byte_offset()..]))
        });
        let (value, next) = match quoted.flatten() {
            Some(read) => read,
            None => {
                let end = after.find(',').unwrap_or(after.len());
                (after[..end].trim().to_string(), &after[end..])
            }
        };
        if !key.is_empty() {
            fields.push((key.to_string(), value));
        }
        rest = next.trim_start().strip_prefix(',').unwrap_or(next);
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As stable-diffusion-webui 1.10 writes it.
    #[test]
    fn other_programs_texts() {
        let text = "a (cat:1.2), <lora:style:0.8>\nsecond line: of it\nNegative prompt: blurry,\nlow\nSteps: 20, Sampler: \
                    DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 4294967295, Size: 512x768, Model hash: \
                    6ce0161689, Model: v1-5, Lora hashes: \"style: 1a2b, other: 3c4d\", Version: v1.10.1";
        let read = Infotext::parse(text).unwrap();
        assert_eq!(read.prompt, "a (cat:1.2), <lora:style:0.8>\nsecond line: of it");
        assert_eq!(read.negative, "blurry,\nlow");
        assert_eq!(read.field("Sampler"), Some("DPM++ 2M"));
        assert_eq!(read.field("Lora hashes"), Some("style: 1a2b, other: 3c4d"));
        assert_eq!(read.field("Version"), Some("v1.10.1"));
        assert_eq!(read.fields.len(), 10);
        // A value that is not closed, keys without values, and a last line of words.
        assert_eq!(Infotext::parse("Steps: 1, A: \"x, B: , C:").unwrap().field("A"), Some("\"x"));
        assert_eq!(Infotext::parse("a cat: in a hat"), None);
        assert_eq!(Infotext::parse(""), None);
    }

    #[test]
    fn what_is_written_is_read() {
        let fields = [("A", "1".to_string()), ("B b", "x, \"y\": z".to_string()), ("C", "".to_string())];
        let text = infotext("two\nlines", "not: this", &fields);
        let read = Infotext::parse(&text).unwrap();
        assert_eq!((read.prompt.as_str(), read.negative.as_str()), ("two\nlines", "not: this"));
        assert_eq!(read.fields, fields.map(|(key, value)| (key.to_string(), value)));
    }
}
