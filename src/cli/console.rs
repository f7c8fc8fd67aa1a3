//! Standard output and standard error. Words on standard error accompany the work: where they cannot be written they are
//! lost, and the work goes on. What is printed on standard output is the result: if it is lost, the program has failed.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use megafuse::{Error, Result};

/// Standard output carries a file, so nothing else may be written there.
static CARRIES_A_FILE: AtomicBool = AtomicBool::new(false);
/// Why a line on standard output was lost, the first time.
static LOST: Mutex<Option<io::Error>> = Mutex::new(None);

/// One line on standard error, formatted as by `format!`. Nothing else in the program writes there.
macro_rules! say {
    ($($text:tt)*) => { $crate::cli::console::say_line(format_args!($($text)*)) };
}
pub(crate) use say;

pub fn say_line(line: fmt::Arguments) {
    // In one piece, so that lines of several programs do not mix. A closed pipe or a full disk must not end the work.
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// A line on standard output; on standard error while standard output carries a file.
pub fn print_line(line: impl fmt::Display) {
    if CARRIES_A_FILE.load(Ordering::Relaxed) {
        return say!("{line}");
    }
    let mut stdout = io::stdout().lock();
    if let Err(error) = stdout.write_all(format!("{line}\n").as_bytes()).and_then(|()| stdout.flush()) {
        lose(error);
    }
}

/// A reader that closes the pipe has read what it wanted (`megafuse plan ... | head -1`); anything else is a loss.
pub fn lose(error: io::Error) {
    if error.kind() != ErrorKind::BrokenPipe {
        LOST.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(error);
    }
}

/// # Errors
/// [`Error::Io`]: a line on standard output was lost.
pub fn check_lost() -> Result<()> {
    match LOST.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take() {
        Some(error) => Err(Error::io(Path::new("standard output"), error)),
        None => Ok(()),
    }
}

/// From now on standard output is kept for a file's bytes.
pub fn keep_for_a_file() {
    CARRIES_A_FILE.store(true, Ordering::Relaxed);
}

/// A file's bytes on standard output. Here a closed pipe is a loss too: the file did not arrive.
///
/// # Errors
/// [`Error::Io`]
pub fn write_file(bytes: &[u8]) -> Result<()> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
    written.map_err(|error| Error::io(Path::new("standard output"), error))
}
