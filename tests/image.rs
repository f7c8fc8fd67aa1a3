//! Pictures in and out: bytes, text chunks, rounding, and files that cannot be read or written.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use megafuse::Error;
use megafuse::image::{PngText, encode_png, from_bytes, infotext, read_image, to_bytes, write_atomically, write_png};

const ASCII: PngText = PngText { parameters: "a cat\nSteps: 2", json: "{\"steps\":2}" };

/// Every byte value, no symmetry.
fn picture(width: usize, height: usize) -> Vec<u8> {
    (0..width * height * 3).map(|i| (i * 7 + i / 256) as u8).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn png_comes_back_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    for (width, height) in [(1, 1), (1, 7), (13, 1), (31, 17), (256, 3)] {
        let path = folder.path().join(format!("{width}x{height}.png"));
        let pixels = picture(width, height);
        write_png(&path, &pixels, width, height, ASCII).unwrap();
        assert_eq!(read_image(&path).unwrap(), (width, height, pixels.clone()));
        assert_eq!(fs::read(&path).unwrap(), encode_png(&pixels, width, height, ASCII).unwrap());
    }
    assert_eq!(names(folder.path()).len(), 5, "a temporary file is left: {:?}", names(folder.path()));
}

/// Chunks of a PNG: type and content.
fn chunks(png: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut at = 8;
    let mut chunks = Vec::new();
    while at < png.len() {
        let length = u32::from_be_bytes(png[at..at + 4].try_into().unwrap()) as usize;
        let kind = String::from_utf8(png[at + 4..at + 8].to_vec()).unwrap();
        chunks.push((kind, png[at + 8..at + 8 + length].to_vec()));
        at += 12 + length;
    }
    chunks
}

fn text_chunks(text: PngText) -> Vec<(String, Vec<u8>)> {
    let chunks = chunks(&encode_png(&picture(2, 2), 2, 2, text).unwrap());
    chunks.into_iter().filter(|(kind, _)| kind.ends_with("Xt")).collect()
}

#[test]
fn text_is_text_where_latin_1_holds_it_and_itxt_elsewhere() {
    let latin = PngText { parameters: "café\nSteps: 2", json: "{}" };
    let want = [("tEXt", &b"parameters\0caf\xe9\nSteps: 2"[..]), ("tEXt", b"megafuse\0{}")];
    assert_eq!(text_chunks(latin), want.map(|(kind, bytes)| (kind.to_string(), bytes.to_vec())));

    let wide = PngText { parameters: "猫 😀", json: "" };
    let want = [&b"parameters\0\0\0\0\0"[..], "猫 😀".as_bytes()].concat();
    assert_eq!(text_chunks(wide), [("iTXt".to_string(), want)]);

    let nul = PngText { parameters: "a\0b", json: "" };
    let want = [&b"parameters\0\0\0\0\0"[..], "a\u{fffd}b".as_bytes()].concat();
    assert_eq!(text_chunks(nul), [("iTXt".to_string(), want)]);
    assert!(text_chunks(PngText::default()).is_empty());
}

#[test]
fn parameters_are_what_stable_diffusion_webui_writes() {
    let fields = [
        ("Steps", "20".to_string()),
        ("Sampler", "DDIM".into()),
        ("CFG scale", "7".into()),
        ("Seed", "1".into()),
        ("Size", "512x512".into()),
        ("Model", "a: \"b\"".into()),
        ("Version", "megafuse 0.1".into()),
    ];
    let want = "a cat\nNegative prompt: blurry, dark\nSteps: 20, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 512x512, \
                Model: \"a: \\\"b\\\"\", Version: megafuse 0.1";
    assert_eq!(infotext("a cat", "blurry, dark", &fields), want);
    assert_eq!(infotext("", "", &fields[..1]), "Steps: 20");
}

/// What numpy's `(x * 255).round().astype("uint8")` makes of diffusers' `(x / 2 + 0.5).clamp(0, 1)`.
#[test]
fn bytes_round_to_nearest_even_and_clamp() {
    let values = [-1.0, 1.0, 0.0, -1.5, 7.0, -0.996, 0.5, -0.5, 1.0 / 255.0, -1.0 / 255.0, f32::MIN, f32::MAX, -0.0];
    assert_eq!(to_bytes(&values).unwrap(), [0, 255, 128, 0, 255, 1, 191, 64, 128, 127, 0, 255, 128]);
    // Ties, or what f32 makes of them: 127.5, 0.5, 1.5, 2.5, 254.5.
    let ties =
        [0.0_f64, -1.0 + 1.0 / 255.0, -1.0 + 3.0 / 255.0, -1.0 + 5.0 / 255.0, 1.0 - 1.0 / 255.0].map(|x| x as f32);
    assert_eq!(to_bytes(&ties).unwrap(), [128, 0, 1, 2, 254]);
    let all: Vec<u8> = (0..=255).collect();
    assert_eq!(to_bytes(&from_bytes(&all)).unwrap(), all);
    assert_eq!(from_bytes(&[0, 255]), [-1.0, 1.0]);
}

#[test]
fn a_value_that_is_not_finite_is_an_error_and_no_black_picture() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        match to_bytes(&[0.0, bad, 0.5, bad]) {
            Err(Error::NonFinite { count: 2, total: 4, .. }) => {}
            other => panic!("{bad}: {other:?}"),
        }
    }
}

#[test]
fn sizes_that_do_not_fit_are_named() {
    let path = Path::new("never.png");
    for (bytes, width, height, wanted) in [
        (11, 2, 2, "2 * 2 * 3"),
        (0, 0, 5, "width is 0"),
        (0, 5, 0, "height is 0"),
        (12, usize::MAX, 1, "width is 18446744073709551615"),
    ] {
        let error = write_png(path, &vec![0; bytes], width, height, ASCII).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error:?} lacks {wanted:?}");
    }
    assert!(!path.exists());
}

#[test]
fn files_that_are_no_picture_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let png = encode_png(&picture(40, 30), 40, 30, ASCII).unwrap();
    let mut huge = png.clone();
    huge[16..20].copy_from_slice(&0x7fff_ffff_u32.to_be_bytes()); // the width
    let mut huge_with_crc = huge.clone();
    let crc = crc32(&huge_with_crc[12..29]);
    huge_with_crc[29..33].copy_from_slice(&crc.to_be_bytes());
    let mut flipped = png.clone();
    let middle = png.len() / 2;
    flipped[middle] ^= 0x55;
    let cases: [(&str, &[u8], &[&str]); 8] = [
        ("empty.png", b"", &["empty"]),
        ("text.png", b"this is no picture at all", &["not a PNG, JPEG or WebP"]),
        ("truncated.png", &png[..png.len() / 2], &["truncated"]),
        ("header.png", &png[..20], &["truncated"]),
        ("truncated.jpg", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", &["truncated.jpg"]),
        ("huge.png", &huge_with_crc, &["too large", "32768"]),
        ("crc.png", &huge, &["crc.png"]),
        ("flipped.png", &flipped, &["damaged"]),
    ];
    for (name, bytes, wanted) in cases {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let error = read_image(&path).err().unwrap_or_else(|| panic!("{name} was read")).to_string();
        for part in wanted.iter().chain(&[name]) {
            assert!(error.contains(part), "{name}: {error:?} lacks {part:?}");
        }
    }
    let error = read_image(&folder.path().join("no.png")).unwrap_err().to_string();
    assert!(error.contains("no.png") && error.contains("no such file"), "{error}");
    let error = read_image(folder.path()).unwrap_err().to_string();
    assert!(error.contains("is a folder"), "{error}");
}

/// The CRC of PNG's chunks (ISO 3309), bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { 0xedb8_8320 ^ (c >> 1) } else { c >> 1 })
    })
}

#[test]
fn jpeg_grey_and_transparent_pictures_become_rgb() {
    let folder = tempfile::tempdir().unwrap();
    let jpeg = folder.path().join("photo.jpg");
    image::RgbImage::from_pixel(9, 5, image::Rgb([200, 30, 60])).save(&jpeg).unwrap();
    let (width, height, pixels) = read_image(&jpeg).unwrap();
    assert_eq!((width, height, pixels.len()), (9, 5, 9 * 5 * 3));
    assert!(pixels.chunks(3).all(|p| p[0].abs_diff(200) < 4 && p[1].abs_diff(30) < 4 && p[2].abs_diff(60) < 4));

    let named_wrongly = folder.path().join("photo.png");
    fs::copy(&jpeg, &named_wrongly).unwrap();
    assert_eq!(read_image(&named_wrongly).unwrap().2, pixels);

    let grey = folder.path().join("grey.png");
    image::GrayImage::from_pixel(3, 2, image::Luma([77])).save(&grey).unwrap();
    assert_eq!(read_image(&grey).unwrap(), (3, 2, vec![77; 18]));

    let transparent = folder.path().join("transparent.png");
    image::RgbaImage::from_pixel(1, 1, image::Rgba([1, 2, 3, 0])).save(&transparent).unwrap();
    assert_eq!(read_image(&transparent).unwrap(), (1, 1, vec![1, 2, 3]));
}

#[test]
fn a_write_that_fails_leaves_the_old_file_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.png");
    fs::write(&path, b"old").unwrap();
    let full = |file: &mut dyn Write| -> io::Result<()> {
        file.write_all(&[0; 100_000])?;
        Err(io::Error::from(ErrorKind::StorageFull))
    };
    let error = write_atomically(&path, full).unwrap_err().to_string();
    assert!(error.contains("out.png") && error.contains("no space left"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(folder.path()), ["out.png"]);

    write_atomically(&path, |file| file.write_all(b"new")).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(names(folder.path()), ["out.png"]);
}

#[test]
fn places_that_cannot_be_written_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, b"").unwrap();
    let cases = [
        (folder.path().join("missing/out.png"), "does not exist"),
        (file.join("out.png"), "is not a folder"),
        (folder.path().to_path_buf(), "is a folder"),
    ];
    for (path, wanted) in cases {
        let error = write_png(&path, &picture(2, 2), 2, 2, ASCII).unwrap_err().to_string();
        assert!(error.contains(wanted), "{}: {error:?} lacks {wanted:?}", path.display());
        assert!(error.contains(&path.display().to_string()), "{error}");
    }
    assert_eq!(names(folder.path()), ["file"]);
}

/// A new file has the permissions of any other new file, not those of a temporary one.
#[cfg(unix)]
#[test]
fn a_written_file_has_ordinary_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (plain, png) = (folder.path().join("plain"), folder.path().join("out.png"));
    fs::write(&plain, b"").unwrap();
    write_png(&png, &picture(2, 2), 2, 2, ASCII).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&png), mode(&plain));
}

/// The folder of a bare file name is the current one.
#[test]
fn a_bare_name_is_written_into_the_current_folder() {
    let name = format!("megafuse-bare-name-{}.png", std::process::id());
    let path = Path::new(&name);
    write_png(path, &picture(2, 2), 2, 2, ASCII).unwrap();
    let read = read_image(path);
    fs::remove_file(path).unwrap();
    assert_eq!(read.unwrap().2, picture(2, 2));
}
