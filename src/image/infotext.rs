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
