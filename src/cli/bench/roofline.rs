//! The roofline of a device and where the ops lie below it, as a picture: Williams, Waterman & Patterson 2009,
//! doi:10.1145/1498765.1498785. Both axes are logarithmic.

use std::fmt::Write as _;

use super::peaks::Peaks;

pub struct Roofline {
    title: String,
    peak: Peaks,
    pub points: Vec<Point>,
}

/// One kernel at one shape.
pub struct Point {
    pub op: String,
    pub name: String,
    pub flops: f64,
    pub bytes: f64,
    pub seconds: f64,
}

impl Point {
    /// Flops a byte.
    fn intensity(&self) -> f64 {
        self.flops / self.bytes
    }

    fn tflops(&self) -> f64 {
        self.flops / self.seconds / 1e12
    }
}

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 600.0;
/// Left, right, top and bottom of the plot.
const PLOT: [f64; 4] = [80.0, 760.0, 50.0, 540.0];
/// Told apart also by people who see no red or no green: Okabe & Ito's colours, without yellow on white.
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];

/// A decade that a value begins in, and the one after it.
fn decades(values: impl Iterator<Item = f64>) -> [f64; 2] {
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
    if low > high { [0.0, 1.0] } else { [low.log10().floor(), (high.log10().floor() + 1.0)] }
}

impl Roofline {
    pub fn new(title: String, peak: Peaks) -> Roofline {
        Roofline { title, peak, points: Vec::new() }
    }

    /// Only what multiplies or adds has a place on it.
    fn drawn(&self) -> Vec<&Point> {
        let can = |point: &&Point| point.flops > 0.0 && point.bytes > 0.0 && point.seconds > 0.0;
        self.points.iter().filter(can).collect()
    }

    pub fn svg(&self) -> String {
        let points = self.drawn();
        let ridge = self.peak.flops / self.peak.bytes;
        let roof = |intensity: f64| (intensity * self.peak.bytes).min(self.peak.flops) / 1e12;
        let x_range = decades(points.iter().map(|point| point.intensity()).chain([ridge]));
        let tflops = points.iter().map(|point| point.tflops());
        let y_range = decades(tflops.chain([roof(ridge), roof(10f64.powf(x_range[0]))]));
        let [left, right, top, bottom] = PLOT;
        let x = |value: f64| left + (value.log10() - x_range[0]) / (x_range[1] - x_range[0]) * (right - left);
        let y = |value: f64| bottom - (value.log10() - y_range[0]) / (y_range[1] - y_range[0]) * (bottom - top);

        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n"
        );
        text(&mut svg, [left, 26.0], "start", &format!("Roofline: {}", self.title));
        let [mut lines, mut labels] = [String::new(), String::new()];
        for decade in x_range[0] as i32..=x_range[1] as i32 {
            let at = x(10f64.powi(decade));
            line(&mut lines, [at, top], [at, bottom], "#dddddd");
            text(&mut labels, [at, bottom + 20.0], "middle", &number(decade));
        }
        for decade in y_range[0] as i32..=y_range[1] as i32 {
            let at = y(10f64.powi(decade));
            line(&mut lines, [left, at], [right, at], "#dddddd");
            text(&mut labels, [left - 8.0, at + 4.0], "end", &number(decade));
        }
        svg += &lines;
        svg += &labels;
        text(&mut svg, [(left + right) / 2.0, bottom + 42.0], "middle", "flops per byte of memory");
        let (at, middle) = (22.0, (top + bottom) / 2.0);
        let _ = writeln!(
            svg,
            "<text x=\"{at}\" y=\"{middle}\" text-anchor=\"middle\" transform=\"rotate(-90 {at} {middle})\">TFLOP/s</text>"
        );
        let corners = [10f64.powf(x_range[0]), ridge, 10f64.powf(x_range[1])];
        let corners: Vec<String> = corners.iter().map(|&at| format!("{:.1},{:.1}", x(at), y(roof(at)))).collect();
        let _ = writeln!(
            svg,
            "<polyline class=\"roof\" points=\"{}\" fill=\"none\" stroke=\"#333333\" stroke-width=\"2\"/>",
            corners.join(" ")
        );
        let peak =
            format!("{:.3} TFLOP/s ({}), {:.1} GB/s", self.peak.flops / 1e12, self.peak.with, self.peak.bytes / 1e9);
        text(&mut svg, [right, top - 8.0], "end", &peak);

        let mut ops: Vec<&str> = Vec::new();
        for point in &points {
            let index = ops.iter().position(|op| *op == point.op).unwrap_or_else(|| {
                ops.push(&point.op);
                ops.len() - 1
            });
            let share = 100.0 * point.tflops() / roof(point.intensity());
            let _ = writeln!(
                svg,
                "<circle class=\"case\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"5\" fill=\"{}\" fill-opacity=\"0.75\"><title>{}: \
                 {:.1} us, {share:.0} % of its floor</title></circle>",
                x(point.intensity()),
                y(point.tflops()),
                COLOURS[index % COLOURS.len()],
                escaped(&point.name),
                point.seconds * 1e6,
            );
        }
        for (index, op) in ops.iter().enumerate() {
            let at = top + 20.0 * index as f64 + 10.0;
            let colour = COLOURS[index % COLOURS.len()];
            let _ = writeln!(svg, "<circle cx=\"{}\" cy=\"{at}\" r=\"5\" fill=\"{colour}\"/>", right + 20.0);
            text(&mut svg, [right + 32.0, at + 4.0], "start", op);
        }
        svg + "</svg>\n"
    }
}

fn text(svg: &mut String, [x, y]: [f64; 2], anchor: &str, words: &str) {
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escaped(words));
}

fn line(svg: &mut String, from: [f64; 2], to: [f64; 2], colour: &str) {
    let ([x1, y1], [x2, y2]) = (from, to);
    let _ = writeln!(svg, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>");
}

/// A power of ten.
fn number(decade: i32) -> String {
    match decade {
        0.. => format!("{}", 10f64.powi(decade)),
        _ => format!("{:.*}", decade.unsigned_abs() as usize, 10f64.powi(decade)),
    }
}

fn escaped(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roofline() -> Roofline {
        let mut roofline =
            Roofline::new("a <card> & more".into(), Peaks { flops: 100e12, bytes: 1e12, with: "products" });
        let point = |op: &str, flops, bytes, seconds| Point {
            op: op.into(),
            name: format!("{op} -> x"),
            flops,
            bytes,
            seconds,
        };
        roofline.points = vec![
            point("linear", 1e12, 1e9, 0.02),    // half of the peak
            point("layer_norm", 1e9, 1e9, 1e-3), // on the roof
            point("linear", 1e10, 1e8, 2e-4),    // on the ridge, at half
            point("embedding", 0.0, 1e9, 1e-3),  // no place
        ];
        roofline
    }

    #[test]
    fn points_lie_below_the_roof_where_they_belong() {
        let svg = roofline().svg();
        let document = roxmltree::Document::parse(&svg).expect("XML");
        let cases: Vec<_> = document.descendants().filter(|node| node.attribute("class") == Some("case")).collect();
        assert_eq!(cases.len(), 3, "{svg}");
        let roof = document.descendants().find(|node| node.attribute("class") == Some("roof")).expect("a roof");
        let corners: Vec<[f64; 2]> = roof
            .attribute("points")
            .expect("points")
            .split(' ')
            .map(|corner| {
                let (x, y) = corner.split_once(',').expect("a pair");
                [x.parse().expect("a number"), y.parse().expect("a number")]
            })
            .collect();
        let at = |case: usize| ["cx", "cy"].map(|name| cases[case].attribute(name).unwrap().parse::<f64>().unwrap());
        let [[x0, y0], [ridge, flat], [_, end]] = corners[..] else { panic!("{corners:?}") };
        assert_eq!(flat, end);
        // The slope is the bandwidth's: a tenth of the flops at a tenth of the intensity.
        let [norm_x, norm_y] = at(1);
        assert!(
            (norm_y - (y0 + (norm_x - x0) / (ridge - x0) * (flat - y0))).abs() < 0.2,
            "{corners:?} {norm_x} {norm_y}"
        );
        // Half of the peak lies log10(2) decades below it.
        let decade = (y0 - flat) / (ridge - x0) * (PLOT[1] - PLOT[0]) / 4.0;
        let [x, y] = at(2);
        assert!((x - ridge).abs() < 0.2 && (y - flat - decade * 2f64.log10()).abs() < 0.3, "{y} {flat} {decade}");
        assert!(at(0)[0] > ridge && (at(0)[1] - y).abs() < 0.2);
        let texts = document.descendants().filter(|node| node.is_text());
        let words: Vec<&str> = texts.filter_map(|node| node.text()).collect();
        assert!(words.contains(&"Roofline: a <card> & more"), "{words:?}");
        for op in ["linear", "layer_norm"] {
            assert_eq!(words.iter().filter(|word| **word == op).count(), 1, "{words:?}");
        }
        assert!(!words.contains(&"embedding"));
    }

    #[test]
    fn a_roofline_without_points_is_a_picture_too() {
        let roofline = Roofline::new("x".into(), Peaks { flops: 1e12, bytes: 1e11, with: "products" });
        roxmltree::Document::parse(&roofline.svg()).expect("XML");
    }
}
