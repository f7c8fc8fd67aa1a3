//! What a compiler read, from the make rule that `-MD` writes.

/// The prerequisites of the rule in `text`. Of make's quoting, compilers use a backslash before a space or `#` and `$$`.
pub fn parse(text: &str) -> Result<Vec<String>, String> {
    let text = text.replace("\\\r\n", " ").replace("\\\n", " ");
    let rule = text.lines().find(|line| !line.trim().is_empty()).ok_or("an empty rule")?;
    // A colon that ends the target; "C:\..." is followed by no space.
    let (_, prerequisites) = rule.split_once(": ").ok_or_else(|| format!("no \"target: \" in {rule:?}"))?;
    let mut paths = Vec::new();
    let mut path = String::new();
    let mut chars = prerequisites.chars().peekable();
    while let Some(char) = chars.next() {
        match (char, chars.peek()) {
            ('\\', Some(&quoted @ (' ' | '#'))) | ('$', Some(&quoted @ '$')) => {
                path.push(quoted);
                chars.next();
            }
            (' ' | '\t', _) => {
                if !path.is_empty() {
                    paths.push(std::mem::take(&mut path));
                }
            }
            _ => path.push(char),
        }
    }
    if !path.is_empty() {
        paths.push(path);
    }
    Ok(paths)
}
