//! Labelled pictures in rows and columns: a header, a label above every column and beside every row.

use megafuse::image::{from_bytes, to_bytes};
use megafuse::ops::{Upsampler, resize};
use megafuse::{DType, Device, Error, Result, Tensor};

use super::canvas::{BLACK, Canvas, Font, GREY, WHITE, wrapped};

/// What a sheet shows. Labels are paragraphs: each begins on a line of its own.
pub struct Sheet {
    pub header: Vec<String>,
    pub columns: Vec<Vec<String>>,
    /// As many as rows; no label in any of them leaves no room for one.
    pub rows: Vec<Vec<String>>,
    /// By rows, `columns.len()` in each; every side at most the cells' own.
    pub cells: Vec<Canvas>,
    /// Width and height of every cell, in pixels.
    pub cell: [usize; 2],
}

/// Letters in a line beside a row.
const ROW_LABEL_LETTERS: usize = 22;
const HEADER_LINES: usize = 6;
const COLUMN_LINES: usize = 4;
/// A header needs that many letters, however narrow the pictures are.
const NARROWEST_HEADER: usize = 40;
/// Cells up to this side are enlarged by default.
pub const SMALL_CELL: usize = 128;
/// What programs that show pictures can take; 800 MB of pixels.
const LARGEST_SIDE: usize = 32_767;
const LARGEST_AREA: usize = 1 << 28;

/// Where everything goes, in pixels.
struct Layout {
    font: Font,
    gap: usize,
    header: Vec<String>,
    columns: Vec<Vec<String>>,
    rows: Vec<Vec<String>>,
    /// Of the first cell.
    left: usize,
    top: usize,
    width: usize,
    height: usize,
}

impl Sheet {
    /// # Errors
    /// [`Error::Request`]: the picture would be too large.
    pub fn check(&self) -> Result<()> {
        let Layout { width, height, .. } = self.layout();
        if width.max(height) <= LARGEST_SIDE && width * height <= LARGEST_AREA {
            return Ok(());
        }
        let (columns, rows) = (self.columns.len(), self.rows.len());
        let reason = format!(
            "{columns} columns and {rows} rows of {}x{} would make {width}x{height} pixels, more than other programs \
             open; name a smaller --cell, or fewer prompts and seeds",
            self.cell[0], self.cell[1]
        );
        Err(Error::Request { field: "--cell", value: self.cell[0].max(self.cell[1]).to_string(), reason })
    }

    fn layout(&self) -> Layout {
        let [cell_width, cell_height] = self.cell;
        let font = Font::beside(cell_width.max(cell_height));
        let (letter, line, gap) = (font.width(), font.height(), font.height() / 2);
        let paragraphs = |label: &[String], letters, lines| -> Vec<String> {
            let mut all: Vec<String> = label.iter().flat_map(|text| wrapped(text, letters, lines)).collect();
            all.truncate(lines);
            all
        };
        let of_row = |label: &Vec<String>| paragraphs(label, ROW_LABEL_LETTERS, (cell_height / line).max(1));
        let rows: Vec<Vec<String>> = self.rows.iter().map(of_row).collect();
        let columns: Vec<Vec<String>> =
            self.columns.iter().map(|label| paragraphs(label, cell_width / letter, COLUMN_LINES)).collect();

        let row_letters = rows.iter().flatten().map(|text| text.chars().count()).max().unwrap_or(0);
        let left = gap + if row_letters > 0 { row_letters * letter + gap } else { 0 };
        let cells = columns.len() * (cell_width + gap);
        let width = (left + cells).max(NARROWEST_HEADER * letter + 2 * gap);
        let header = paragraphs(&self.header, (width - 2 * gap) / letter, HEADER_LINES);
        let column_lines = columns.iter().map(Vec::len).max().unwrap_or(0);
        let header_height = if header.is_empty() { 0 } else { header.len() * line + gap };
        let label_height = if column_lines > 0 { column_lines * line + gap / 2 } else { 0 };
        let top = gap + header_height + label_height;
        let height = top + rows.len() * (cell_height + gap);
        Layout { font, gap, header, columns, rows, left, top, width, height }
    }

    pub fn draw(&self) -> Canvas {
        let at = self.layout();
        let ([cell_width, cell_height], line) = (self.cell, at.font.height());
        let mut canvas = Canvas::new(at.width, at.height, WHITE);
        for (row, text) in at.header.iter().enumerate() {
            canvas.text(at.gap, at.gap + row * line, text, at.font, GREY);
        }
        let x_of = |column: usize| at.left + column * (cell_width + at.gap);
        let y_of = |row: usize| at.top + row * (cell_height + at.gap);
        for (column, label) in at.columns.iter().enumerate() {
            // Towards the pictures they belong to.
            let y = at.top - at.gap / 2 - label.len() * line;
            for (row, text) in label.iter().enumerate() {
                canvas.text(x_of(column), y + row * line, text, at.font, BLACK);
            }
        }
        for (row, label) in at.rows.iter().enumerate() {
            let y = y_of(row) + cell_height.saturating_sub(label.len() * line) / 2;
            for (index, text) in label.iter().enumerate() {
                canvas.text(at.gap, y + index * line, text, at.font, BLACK);
            }
        }
        for (index, cell) in self.cells.iter().enumerate() {
            let (row, column) = (index / self.columns.len(), index % self.columns.len());
            let x = x_of(column) + (cell_width - cell.width) / 2;
            canvas.place(x, y_of(row) + (cell_height - cell.height) / 2, cell);
        }
        canvas
    }
}

/// The cell for pictures of these sizes: the largest, so that no picture is shrunk, and a multiple of it where that is
/// small; or with its largest side `side`.
pub fn common_cell(sizes: impl Iterator<Item = [usize; 2]>, side: Option<usize>) -> [usize; 2] {
    let [width, height] = sizes.fold([1, 1], |[w, h], [width, height]| [w.max(width), h.max(height)]);
    let largest = width.max(height);
    match side {
        Some(side) => fitted([width, height], [side, side]),
        None => [width, height].map(|n| n * SMALL_CELL.div_ceil(largest).max(1)),
    }
}

/// The largest size in the shape of `size` that is inside `cell`.
fn fitted(size: [usize; 2], cell: [usize; 2]) -> [usize; 2] {
    let [width, height] = size;
    // Whichever side reaches the cell's first.
    if cell[0] * height <= cell[1] * width {
        [cell[0], (cell[0] * height / width).max(1)]
    } else {
        [(cell[1] * width / height).max(1), cell[1]]
    }
}

/// The picture as large as fits into `cell`: by repeating pixels where that comes out even, which shows them as they are,
/// else by PIL's bicubic filter, which also shrinks without aliasing.
///
/// # Errors
/// Those of [`resize`].
pub fn scaled(picture: Canvas, cell: [usize; 2]) -> Result<Canvas> {
    let (from, to) = ([picture.width, picture.height], fitted([picture.width, picture.height], cell));
    if from == to {
        return Ok(picture);
    }
    let [width, height] = to;
    if width % from[0] == 0 && height % from[1] == 0 && width / from[0] == height / from[1] {
        let factor = width / from[0];
        let pixel = |at: usize| {
            let (x, y) = (at % width / factor, at / width / factor);
            let first = (y * from[0] + x) * 3;
            [picture.rgb[first], picture.rgb[first + 1], picture.rgb[first + 2]]
        };
        return Ok(Canvas { width, height, rgb: (0..width * height).flat_map(pixel).collect() });
    }
    let x = Tensor::from_f32(&Device::cpu(), &[1, from[1], from[0], 3], DType::F32, &from_bytes(&picture.rgb))?;
    let y = resize(&x, [height, width], Upsampler::Bicubic, Some((-1.0, 1.0)), None)?;
    Ok(Canvas { width, height, rgb: to_bytes(&y.to_f32_vec()?)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(width: usize, height: usize, value: u8) -> Canvas {
        Canvas::new(width, height, [value; 3])
    }

    #[test]
    fn cells_have_a_common_size() {
        assert_eq!(common_cell([[64, 64], [256, 256]].into_iter(), None), [256, 256]);
        assert_eq!(common_cell([[48, 32]].into_iter(), None), [144, 96]);
        assert_eq!(common_cell([[512, 256]].into_iter(), Some(128)), [128, 64]);
        assert_eq!(fitted([100, 50], [64, 64]), [64, 32]);
        assert_eq!(fitted([50, 100], [64, 64]), [32, 64]);
        assert_eq!(fitted([1000, 1], [64, 64]), [64, 1]);
    }

    #[test]
    fn enlarging_evenly_repeats_pixels() {
        let picture = Canvas { width: 2, height: 1, rgb: vec![1, 2, 3, 4, 5, 6] };
        let large = scaled(picture.clone(), [4, 4]).unwrap();
        assert_eq!((large.width, large.height), (4, 2));
        assert_eq!(large.rgb, [1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6].repeat(2));
        assert_eq!(scaled(picture.clone(), [2, 9]).unwrap(), picture);
        let shrunk = scaled(flat(9, 6, 77), [3, 3]).unwrap();
        assert_eq!(shrunk, flat(3, 2, 77));
        assert_eq!(scaled(flat(5, 5, 77), [8, 8]).unwrap(), flat(8, 8, 77));
    }

    #[test]
    fn every_picture_is_whole_and_no_label_touches_one() {
        let label = |text: &str| vec![text.to_string()];
        let colours = [10, 20, 30, 40, 50, 60];
        let sheet = Sheet {
            header: vec!["pocket, 64x64, guidance 3 and so on ".repeat(5)],
            columns: vec![label("plain"), label("megafusion++ with a very long label"), label("c")],
            rows: vec![label("a red ball on the left of everything"), label("b")],
            cells: colours.map(|value| Canvas::new(128, if value == 60 { 64 } else { 128 }, [value, 0, 200])).to_vec(),
            cell: [128, 128],
        };
        sheet.check().unwrap();
        let drawn = sheet.draw();
        // Labels are grey, pictures are not; each has all its pixels, and nothing but them within its borders.
        for (value, height) in colours.iter().map(|&value| (value, if value == 60 { 64 } else { 128 })) {
            let is = |at: &usize| drawn.rgb[3 * at..3 * at + 3] == [value, 0, 200];
            let places: Vec<usize> = (0..drawn.width * drawn.height).filter(is).collect();
            let (xs, ys): (Vec<usize>, Vec<usize>) =
                places.iter().map(|at| (at % drawn.width, at / drawn.width)).unzip();
            let inside = |at: &&usize| {
                let (x, y) = (*at % drawn.width, *at / drawn.width);
                x >= xs[0] && x < xs[0] + 128 && y >= ys[0] && y < ys[0] + height
            };
            assert_eq!(places.iter().filter(inside).count(), 128 * height, "{value}");
        }
        assert!(drawn.width > 3 * 128 && drawn.height > 2 * 128);
        let plain = Sheet {
            header: vec![],
            columns: vec![vec![]],
            rows: vec![vec![]],
            cells: vec![flat(512, 512, 9)],
            cell: [512, 512],
        };
        let at = plain.layout();
        assert_eq!((at.left, at.top, at.width, at.height), (12, 12, 536, 536));
    }

    #[test]
    fn a_sheet_that_nobody_could_open_is_refused() {
        let rows = vec![vec![]; 300];
        let sheet = Sheet { header: vec![], columns: vec![vec![]], rows, cells: vec![], cell: [1024, 1024] };
        let message = sheet.check().unwrap_err().to_string();
        assert!(message.contains("--cell 1024") && message.contains("300 rows"), "{message}");
    }
}
