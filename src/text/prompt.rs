//! What stands in a prompt beside words: weights, `BREAK`, tags of extra networks, as AUTOMATIC1111's webui reads them.

use crate::names::named;

/// How a prompt is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Syntax {
    /// Every character is text.
    #[default]
    Plain,
    /// `(word)`, `(word:1.2)`, `[word]`, `\(`, `BREAK`, `<lora:...>` have webui's meaning.
    A1111,
}

named!(Syntax, [Plain => "plain", A1111 => "a1111"]);

/// A stretch of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// Text whose tokens all have one weight; 1 is neutral.
    Text { text: String, weight: f32 },
    /// `BREAK`: the next part begins a chunk.
    Break,
}

/// A prompt, read.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    pub parts: Vec<Part>,
    pub syntax: Syntax,
    /// What was found and has no effect here, one sentence per finding.
    pub warnings: Vec<String>,
}

impl Prompt {
    /// Reads `text`. Nothing is refused: brackets without a partner are closed at the end or are text, as webui has it.
    ///
    /// In [`Syntax::A1111`], `(x)` multiplies the weight by 1.1, `(x:w)` by w, `[x]` by 1/1.1, and brackets nest; `\`
    /// before a bracket or another `\` makes it text. Tags `<name:arguments>` (`<lora:x:0.8>`) are taken out of the text,
    /// as webui does, and have no effect: a warning names them. `[a|b]`, `[a:b:n]` and `AND` are read as words, with a
    /// warning. Other than in webui, a `BREAK` inside brackets breaks too (there it becomes a word of negative weight).
    pub fn parse(text: &str, syntax: Syntax) -> Prompt {
        if syntax == Syntax::Plain {
            let parts = vec![Part::Text { text: text.to_string(), weight: 1.0 }];
            return Prompt { parts, syntax, warnings: Vec::new() };
        }
        let mut warnings = Vec::new();
        let text = without_tags(text, &mut warnings);
        warn_of_schedules(&text, &mut warnings);
        let parts = attention(&text, &mut warnings);
        Prompt { parts, syntax, warnings }
    }

    /// Has any part a weight other than 1?
    pub fn is_weighted(&self) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::Text { weight, .. } if *weight != 1.0))
    }
}

/// The first piece of webui's syntax in `text`, such as `(red:1.4)`, `BREAK` or `<lora:x:0.8>`: worth a hint when the
/// prompt is read as [`Syntax::Plain`], where it is words. Round brackets without a weight are common in plain prose and
/// do not count, unless doubled.
pub fn syntax_hint(text: &str) -> Option<String> {
    if let Some((start, end)) = next_tag(text, 0) {
        return Some(text[start..end].to_string());
    }
    for (start, _) in text.char_indices().filter(|(_, c)| *c == '(') {
        if text[start + 1..].starts_with('(') {
            return Some("((".into());
        }
        let inside = &text[start + 1..];
        if let Some(colon) = inside.find(['(', ')', ':']).filter(|at| inside[*at..].starts_with(':'))
            && let Some((_, length)) = weight_and_bracket(&inside[colon..])
        {
            return Some(text[start..start + 1 + colon + length].to_string());
        }
    }
    words(text, "BREAK").next().map(|_| "BREAK".to_string())
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where `word` stands in `text` between characters that no word has.
fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    text.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| !text[..at].ends_with(is_word) && !text[at + word.len()..].starts_with(is_word))
}

/// The byte range of the first `<name:arguments>` at or after `from`.
fn next_tag(text: &str, from: usize) -> Option<(usize, usize)> {
    text[from..].match_indices('<').find_map(|(at, _)| {
        let start = from + at;
        let inside = &text[start + 1..];
        let name = inside.find(|c| !is_word(c))?;
        let end = inside.find('>')?;
        (name > 0 && inside[name..].starts_with(':') && end > name + 1).then_some((start, start + 1 + end + 1))
    })
}

fn without_tags(text: &str, warnings: &mut Vec<String>) -> String {
    let (mut kept, mut from) = (String::new(), 0);
    while let Some((start, end)) = next_tag(text, from) {
        kept.push_str(&text[from..start]);
        let tag = &text[start..end];
        warnings.push(format!("{tag} was taken out of the prompt and has no effect: extra networks are not supported"));
        from = end;
    }
    kept.push_str(&text[from..]);
    kept
}

/// Finds `[a|b]`, `[a:b:n]`, `[a:n]` and `AND`, which change the prompt during sampling or combine two.
fn warn_of_schedules(text: &str, warnings: &mut Vec<String>) {
    /// Start of a `[`, and the top-level `|` and the last top-level `:` seen inside it.
    struct Open {
        start: usize,
        bar: bool,
        colon: Option<usize>,
    }
    let mut open: Vec<Open> = Vec::new();
    let mut round = 0_usize; // inside round brackets a colon belongs to a weight
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        if std::mem::take(&mut escaped) {
            continue;
        }
        match c {
            '\\' => escaped = true,
            '(' => round += 1,
            ')' => round = round.saturating_sub(1),
            '[' => open.push(Open { start: at, bar: false, colon: None }),
            '|' => open.iter_mut().for_each(|open| open.bar = true),
            ':' if round == 0 => open.iter_mut().for_each(|open| open.colon = Some(at)),
            ']' => {
                let Some(Open { start, bar, colon }) = open.pop() else { continue };
                let piece = &text[start..=at];
                let scheduled = colon.is_some_and(|colon| text[colon + 1..at].trim().parse::<f64>().is_ok());
                if bar {
                    warnings.push(format!("{piece}: alternation is not supported; it is read as words"));
                } else if scheduled {
                    warnings.push(format!("{piece}: prompt editing is not supported; it is read as words"));
                }
            }
            _ => {}
        }
    }
    if words(text, "AND").next().is_some() {
        warnings.push("AND: composing several prompts is not supported; it is read as a word".into());
    }
}

/// `:1.2)` at the start of `text`: the number's text and the length in bytes.
fn weight_and_bracket(text: &str) -> Option<(&str, usize)> {
    let rest = text.strip_prefix(':')?;
    let number = rest.trim_start();
    let sign = usize::from(number.starts_with(['+', '-']));
    let length = sign + number[sign..].find(|c: char| c != '.' && !c.is_ascii_digit())?;
    let after = number[length..].trim_start();
    (length > sign && after.starts_with(')')).then(|| (&number[..length], text.len() - after.len() + 1))
}

/// Text with its weight; in f64, as Python multiplies.
enum Piece {
    Text(String, f64),
    Break,
}

fn attention(text: &str, warnings: &mut Vec<String>) -> Vec<Part> {
    fn scale(pieces: &mut [Piece], factor: f64) {
        for piece in pieces {
            if let Piece::Text(_, weight) = piece {
                *weight *= factor;
            }
        }
    }
    const ROUND: f64 = 1.1;
    const SQUARE: f64 = 1.0 / 1.1;
    let mut pieces: Vec<Piece> = Vec::new();
    let (mut round, mut square): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let weight = weight_and_bracket(rest);
        let mut length = first.len_utf8();
        match first {
            '\\' => {
                // Alone before another character it vanishes.
                let literal = rest[1..].chars().next().filter(|c| "()[]\\".contains(*c));
                length += literal.map_or(0, char::len_utf8);
                pieces.push(Piece::Text(literal.map(String::from).unwrap_or_default(), 1.0));
            }
            '(' => round.push(pieces.len()),
            '[' => square.push(pieces.len()),
            ':' if weight.is_some() && !round.is_empty() => {
                let (number, whole) = weight.unwrap_or_default();
                let start = round.pop().unwrap_or_default();
                match number.parse::<f64>().ok().filter(|weight| weight.is_finite() && weight.abs() <= 1e6) {
                    Some(weight) => scale(&mut pieces[start..], weight),
                    None => warnings.push(format!("{number} is not a weight (a number such as 1.2); it is taken as 1")),
                }
                length = whole;
            }
            ')' if !round.is_empty() => scale(&mut pieces[round.pop().unwrap_or_default()..], ROUND),
            ']' if !square.is_empty() => scale(&mut pieces[square.pop().unwrap_or_default()..], SQUARE),
            ':' | ')' | ']' => {
                length = weight.map_or(1, |(_, whole)| whole);
                pieces.push(Piece::Text(rest[..length].to_string(), 1.0));
            }
            _ => {
                length = rest.find(['\\', '(', ')', '[', ']', ':']).unwrap_or(rest.len());
                push_text(&rest[..length], &mut pieces);
            }
        }
        rest = &rest[length..];
    }
    for start in round {
        scale(&mut pieces[start..], ROUND);
    }
    for start in square {
        scale(&mut pieces[start..], SQUARE);
    }
    merged(pieces)
}

fn push_text(text: &str, pieces: &mut Vec<Piece>) {
    const BREAK: &str = "BREAK";
    let mut from = 0;
    for at in words(text, BREAK) {
        let before = &text[from..at];
        pieces.push(Piece::Text(before.trim_end().to_string(), 1.0));
        pieces.push(Piece::Break);
        let after = &text[at + BREAK.len()..];
        from = text.len() - after.trim_start().len();
    }
    pieces.push(Piece::Text(text[from..].to_string(), 1.0));
}

/// Neighbours of equal weight become one text: words that only a bracket parted are tokenized together.
fn merged(pieces: Vec<Piece>) -> Vec<Part> {
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        match (joined.last_mut(), piece) {
            (Some(Piece::Text(text, weight)), Piece::Text(more, other)) if *weight == other => text.push_str(&more),
            (_, piece) => joined.push(piece),
        }
    }
    if joined.is_empty() {
        joined.push(Piece::Text(String::new(), 1.0));
    }
    let part = |piece| match piece {
        Piece::Text(text, weight) => Part::Text { text, weight: weight as f32 },
        Piece::Break => Part::Break,
    };
    joined.into_iter().map(part).collect()
}
