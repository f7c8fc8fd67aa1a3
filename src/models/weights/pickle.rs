//! State dicts in PyTorch's own files (`.pth`), read without running anything: a pickle is a program for a small stack
//! machine, and this one knows data only. What it would call is compared with the handful of names that stand for tensors;
//! anything else becomes a value that is not looked at.
//!
//! Two forms, both of `torch.save`: an archive (zip, since PyTorch 1.6) with `data.pkl` and a file per storage, and the older
//! one of several pickles, with the storages behind them.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use safetensors::Dtype as FileDtype;

use super::file::{Entry, MappedFile};
use crate::error::{Error, Result};

/// The most tensors of a file, and dicts inside each other: far more than any network has.
const MOST_TENSORS: usize = 1 << 16;
const MOST_LEVELS: usize = 8;

/// Does the file begin as one of PyTorch's does?
pub(super) fn is_pickle(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(LEGACY_MAGIC)
}

/// The tensors of a file by their keys; of dicts in dicts the keys are joined by dots (`params_ema.conv_first.weight`).
///
/// # Errors
/// [`Error::File`]: truncated or damaged, no dict of tensors, a tensor whose elements do not lie one after the other.
pub(super) fn entries(file: &Arc<MappedFile>) -> Result<BTreeMap<String, Entry>> {
    read(file).map_err(|reason| Error::file(&file.path, reason))
}

type Read<T> = std::result::Result<T, String>;

fn read(file: &Arc<MappedFile>) -> Read<BTreeMap<String, Entry>> {
    let bytes = file.as_bytes();
    let (machine, root, storages) = match bytes.starts_with(b"PK\x03\x04") {
        true => archive(bytes)?,
        false => legacy(bytes)?,
    };
    let mut found = Found { machine: &machine, storages, file, entries: BTreeMap::new() };
    found.collect("", root, 0)?;
    match found.entries.is_empty() {
        true => Err("holds no dict of tensors; a file with a network's weights (a state dict) is wanted".into()),
        false => Ok(found.entries),
    }
}

/// Where in the file the bytes of each storage are.
type Storages = HashMap<String, Range<usize>>;

fn archive(bytes: &[u8]) -> Read<(Machine, Value, Storages)> {
    let files = archived_files(bytes)?;
    let (name, data) = files
        .iter()
        .find(|(name, _)| name.ends_with("/data.pkl") || *name == "data.pkl")
        .ok_or("is a zip archive without data.pkl: not a file that torch.save wrote")?;
    let folder = name.strip_suffix("data.pkl").unwrap_or_default();
    let mut machine = Machine::default();
    let (root, _) = machine.run(&bytes[data.clone()])?;
    let prefix = format!("{folder}data/");
    let storages = files.iter().filter_map(|(name, range)| Some((name.strip_prefix(&prefix)?.into(), range.clone())));
    Ok((machine, root, storages.collect()))
}

/// The magic number of the older form, itself pickled.
const LEGACY_MAGIC: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";

fn legacy(bytes: &[u8]) -> Read<(Machine, Value, Storages)> {
    let mut at = LEGACY_MAGIC.len();
    let mut next = |machine: &mut Machine| -> Read<(Value, usize)> {
        let (value, length) = machine.run(&bytes[at..])?;
        at += length;
        Ok((value, at))
    };
    for _ in ["protocol", "byte order and sizes of the system"] {
        next(&mut Machine::default())?;
    }
    let mut machine = Machine::default();
    let (root, _) = next(&mut machine)?;
    let mut of_keys = Machine::default();
    let (keys, mut at) = next(&mut of_keys)?;
    let Value::List(keys) = keys else { return Err(damaged("no list of storages")) };
    let mut storages = Storages::new();
    for key in &of_keys.lists[keys] {
        let Value::Text(key) = key else { return Err(damaged("a storage without a name")) };
        let size = machine.element_sizes.get(&**key).ok_or_else(|| damaged("a storage that no tensor is in"))?;
        let count = bytes.get(at..at + 8).ok_or_else(|| truncated(at))?;
        let count = u64::from_le_bytes(count.try_into().unwrap_or_default());
        let start = at + 8;
        let end = usize::try_from(count).ok().and_then(|count| count.checked_mul(*size)?.checked_add(start));
        let end = end.filter(|&end| end <= bytes.len()).ok_or_else(|| truncated(bytes.len()))?;
        storages.insert(key.to_string(), start..end);
        at = end;
    }
    Ok((machine, root, storages))
}

fn damaged(what: &str) -> String {
    format!("is no readable PyTorch file ({what}): download it again")
}

fn truncated(at: usize) -> String {
    damaged(&format!("it ends at byte {at}, in the middle"))
}

/// Names and places of the files in a zip archive, which torch.save stores as they are.
fn archived_files(bytes: &[u8]) -> Read<Vec<(String, Range<usize>)>> {
    let short = |at: usize| bytes.get(at..at.checked_add(2)?).map(|b| u64::from(b[0]) | u64::from(b[1]) << 8);
    let number = |at: usize| Some(short(at)? | short(at + 2)? << 16);
    let long = |at: usize| Some(number(at)? | number(at + 4)? << 32);
    let directory = || -> Option<(u64, u64)> {
        // The end record is the last one: 22 bytes, and a comment of up to 64 KiB.
        let from = bytes.len().saturating_sub(22 + (1 << 16));
        let end = from + bytes[from..].windows(4).rposition(|window| window == b"PK\x05\x06")?;
        let (count, start) = (short(end + 10)?, number(end + 16)?);
        if count < 0xffff && start < 0xffff_ffff {
            return Some((count, start));
        }
        // Zip64: 20 bytes before the end record say where the larger one is.
        let large = usize::try_from(long(end.checked_sub(20)? + 8)?).ok()?;
        bytes.get(large..)?.starts_with(b"PK\x06\x06").then(|| Some((long(large + 32)?, long(large + 48)?)))?
    };
    let (count, start) = directory().ok_or_else(|| damaged("no directory of a zip archive at its end"))?;
    let mut files = Vec::new();
    let mut at = usize::try_from(start).unwrap_or(usize::MAX);
    for _ in 0..count {
        let file = || -> Option<(String, u64, u64, u64, u64, usize)> {
            if !bytes.get(at..)?.starts_with(b"PK\x01\x02") {
                return None;
            }
            let (method, stored, size) = (short(at + 10)?, number(at + 20)?, number(at + 24)?);
            let [name, extra, comment] = [28, 30, 32].map(|field| short(at + field).map(|length| length as usize));
            let (name, extra, comment) = (name?, extra?, comment?);
            let mut values = [size, stored, number(at + 42)?];
            // The fields that are too small for their values stand in the record 1 of the extra field, in this order.
            let mut field = at + 46 + name;
            while field + 4 <= at + 46 + name + extra {
                let (kind, length) = (short(field)?, short(field + 2)? as usize);
                let mut from = field + 4;
                for value in values.iter_mut().filter(|value| kind == 1 && **value == 0xffff_ffff) {
                    *value = long(from)?;
                    from += 8;
                }
                field += 4 + length;
            }
            let text = String::from_utf8_lossy(bytes.get(at + 46..at + 46 + name)?).into_owned();
            Some((text, method, values[1], values[0], values[2], at + 46 + name + extra + comment))
        };
        let (name, method, stored, size, header, next) = file().ok_or_else(|| truncated(at))?;
        if method != 0 || stored != size {
            return Err(format!("is an archive whose {name} is compressed: not a file that torch.save wrote"));
        }
        let place = || -> Option<Range<usize>> {
            let header = usize::try_from(header).ok()?;
            bytes.get(header..)?.starts_with(b"PK\x03\x04").then_some(())?;
            let start = header + 30 + short(header + 26)? as usize + short(header + 28)? as usize;
            let end = start.checked_add(usize::try_from(size).ok()?)?;
            (end <= bytes.len()).then_some(start..end)
        };
        files.push((name, place().ok_or_else(|| truncated(bytes.len()))?));
        at = next;
    }
    Ok(files)
}

/// What is on the machine's stack. Lists, tuples and dicts live in the machine, so that a value is small to copy and a deep
/// nest of them costs nothing to drop.
#[derive(Clone, Debug)]
enum Value {
    None,
    Int(i64),
    Text(Rc<str>),
    /// Module and name of what a program would call or look up.
    Global(Rc<str>),
    List(usize),
    Dict(usize),
    Storage(usize),
    Tensor(usize),
    /// A number, bytes, or the result of a call that was not made.
    Other,
}

#[derive(Debug)]
struct Storage {
    key: String,
    dtype: FileDtype,
}

#[derive(Debug)]
struct PickledTensor {
    storage: usize,
    /// In elements.
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

#[derive(Debug, Default)]
struct Machine {
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u64, Value>,
    /// Tuples too.
    lists: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    storages: Vec<Storage>,
    /// Of each storage by its key, in bytes.
    element_sizes: HashMap<String, usize>,
    tensors: Vec<PickledTensor>,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Read<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| truncated(self.bytes.len()))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// A little-endian number of so many bytes.
    fn number(&mut self, count: usize) -> Read<u64> {
        Ok(self.take(count)?.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn text(&mut self, count: u64) -> Read<String> {
        let bytes = self.take(usize::try_from(count).unwrap_or(usize::MAX))?;
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    fn line(&mut self) -> Read<String> {
        let length = self.bytes[self.at..].iter().position(|&byte| byte == b'\n');
        let line = self.text(length.ok_or_else(|| truncated(self.bytes.len()))? as u64)?;
        self.at += 1;
        Ok(line)
    }
}

impl Machine {
    /// The value that a pickle leaves, and how many bytes it has.
    fn run(&mut self, bytes: &[u8]) -> Read<(Value, usize)> {
        let mut from = Reader { bytes, at: 0 };
        loop {
            let code = from.take(1)?[0];
            match code {
                b'.' => return Ok((self.pop()?, from.at)),
                0x80 => drop(from.take(1)?),                                // PROTO
                0x95 => drop(from.take(8)?),                                // FRAME
                b'(' => self.marks.push(self.stack.len()),                  // MARK
                b'N' => self.stack.push(Value::None),                       // NONE
                0x88 | 0x89 => self.stack.push(Value::Other),               // NEWTRUE, NEWFALSE
                b'G' => self.other(&mut from, 8)?,                          // BINFLOAT
                b'J' => self.int(i64::from(from.number(4)? as u32 as i32)), // BININT
                b'K' => self.int(from.number(1)? as i64),                   // BININT1
                b'M' => self.int(from.number(2)? as i64),                   // BININT2
                0x8a => {
                    // LONG1: two's complement
                    let count = from.number(1)? as usize;
                    match count {
                        0 => self.int(0),
                        1..=8 => {
                            let unused = 64 - 8 * count as u32;
                            self.int((from.number(count)? << unused) as i64 >> unused);
                        }
                        _ => self.other(&mut from, count)?,
                    }
                }
                b'I' | b'L' => {
                    // INT, LONG
                    let value = from.line()?.trim_end_matches('L').parse().map_or(Value::Other, Value::Int);
                    self.stack.push(value);
                }
                b'F' => {
                    // FLOAT
                    from.line()?;
                    self.stack.push(Value::Other);
                }
                b'X' | b'T' => {
                    // BINUNICODE, BINSTRING
                    let count = from.number(4)?;
                    self.stack.push(Value::Text(from.text(count)?.into()));
                }
                0x8c | b'U' => {
                    // SHORT_BINUNICODE, SHORT_BINSTRING
                    let count = from.number(1)?;
                    self.stack.push(Value::Text(from.text(count)?.into()));
                }
                b'C' | b'B' => {
                    // SHORT_BINBYTES, BINBYTES
                    let count = from.number(if code == b'C' { 1 } else { 4 })?;
                    self.other(&mut from, count as usize)?;
                }
                b')' => self.list(Vec::new()), // EMPTY_TUPLE
                b']' => self.list(Vec::new()), // EMPTY_LIST
                b'}' => self.dict(Vec::new()), // EMPTY_DICT
                0x85..=0x87 => {
                    // TUPLE1, TUPLE2, TUPLE3
                    let first = self.stack.len().checked_sub(usize::from(code - 0x84));
                    let items = self.stack.split_off(first.ok_or_else(|| damaged("an empty stack"))?);
                    self.list(items);
                }
                b't' | b'l' => {
                    // TUPLE, LIST
                    let items = self.marked()?;
                    self.list(items);
                }
                b'd' => {
                    // DICT
                    let items = pairs(self.marked()?);
                    self.dict(items);
                }
                b'a' => {
                    // APPEND
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    // APPENDS
                    let items = self.marked()?;
                    self.append(items)?;
                }
                b's' => {
                    // SETITEM
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(vec![(key, value)])?;
                }
                b'u' => {
                    // SETITEMS
                    let items = pairs(self.marked()?);
                    self.set(items)?;
                }
                b'0' => drop(self.pop()?),    // POP
                b'1' => drop(self.marked()?), // POP_MARK
                b'2' => {
                    // DUP
                    let top = self.top()?.clone();
                    self.stack.push(top);
                }
                b'q' | b'r' => {
                    // BINPUT, LONG_BINPUT
                    let key = from.number(if code == b'q' { 1 } else { 4 })?;
                    let top = self.top()?.clone();
                    self.memo.insert(key, top);
                }
                0x94 => {
                    // MEMOIZE
                    let top = self.top()?.clone();
                    self.memo.insert(self.memo.len() as u64, top);
                }
                b'h' | b'j' => {
                    // BINGET, LONG_BINGET
                    let key = from.number(if code == b'h' { 1 } else { 4 })?;
                    let value = self.memo.get(&key).ok_or_else(|| damaged("a value that was not kept"))?;
                    self.stack.push(value.clone());
                }
                b'c' => {
                    // GLOBAL
                    let (module, name) = (from.line()?, from.line()?);
                    self.stack.push(Value::Global(format!("{module}.{name}").into()));
                }
                0x93 => {
                    // STACK_GLOBAL
                    let (Value::Text(name), Value::Text(module)) = (self.pop()?, self.pop()?) else {
                        return Err(damaged("a name that is no text"));
                    };
                    self.stack.push(Value::Global(format!("{module}.{name}").into()));
                }
                b'R' | 0x81 => {
                    // REDUCE, NEWOBJ
                    let (arguments, callable) = (self.pop()?, self.pop()?);
                    let made = self.made_by(&callable, &arguments)?;
                    self.stack.push(made);
                }
                b'b' => drop(self.pop()?), // BUILD: attributes of an object, of which none matters here
                b'Q' => {
                    // BINPERSID
                    let id = self.pop()?;
                    let storage = self.storage(&id)?;
                    self.stack.push(storage);
                }
                other => return Err(damaged(&format!("its pickle has the unknown instruction {other:#04x}"))),
            }
        }
    }

    fn int(&mut self, value: i64) {
        self.stack.push(Value::Int(value));
    }

    fn other(&mut self, from: &mut Reader, count: usize) -> Read<()> {
        from.take(count)?;
        self.stack.push(Value::Other);
        Ok(())
    }

    fn list(&mut self, items: Vec<Value>) {
        self.lists.push(items);
        self.stack.push(Value::List(self.lists.len() - 1));
    }

    fn dict(&mut self, items: Vec<(Value, Value)>) {
        self.dicts.push(items);
        self.stack.push(Value::Dict(self.dicts.len() - 1));
    }

    fn pop(&mut self) -> Read<Value> {
        self.stack.pop().ok_or_else(|| damaged("an empty stack"))
    }

    fn top(&self) -> Read<&Value> {
        self.stack.last().ok_or_else(|| damaged("an empty stack"))
    }

    /// What lies above the last mark.
    fn marked(&mut self) -> Read<Vec<Value>> {
        let mark = self.marks.pop().filter(|&mark| mark <= self.stack.len());
        Ok(self.stack.split_off(mark.ok_or_else(|| damaged("a mark that is missing"))?))
    }

    fn append(&mut self, items: Vec<Value>) -> Read<()> {
        if let &Value::List(list) = self.top()? {
            self.lists[list].extend(items);
        }
        Ok(())
    }

    fn set(&mut self, items: Vec<(Value, Value)>) -> Read<()> {
        if let &Value::Dict(dict) = self.top()? {
            self.dicts[dict].extend(items);
        }
        Ok(())
    }

    /// What a call would have made: nothing is called.
    fn made_by(&mut self, callable: &Value, arguments: &Value) -> Read<Value> {
        let (Value::Global(name), &Value::List(arguments)) = (callable, arguments) else { return Ok(Value::Other) };
        let arguments = &self.lists[arguments];
        match &**name {
            "collections.OrderedDict" => {
                self.dicts.push(Vec::new());
                Ok(Value::Dict(self.dicts.len() - 1))
            }
            "torch._utils._rebuild_parameter" => Ok(arguments.first().cloned().unwrap_or(Value::Other)),
            "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor" => {
                let [Value::Storage(storage), Value::Int(offset), Value::List(shape), Value::List(strides), ..] =
                    arguments[..]
                else {
                    return Err(damaged("a tensor of another form"));
                };
                let sizes = |list: usize| -> Option<Vec<usize>> {
                    let size = |value: &Value| match value {
                        Value::Int(size) => usize::try_from(*size).ok(),
                        _ => None,
                    };
                    self.lists[list].iter().map(size).collect()
                };
                let (Ok(offset), Some(shape), Some(strides)) = (usize::try_from(offset), sizes(shape), sizes(strides))
                else {
                    return Err(damaged("a tensor of another form"));
                };
                self.tensors.push(PickledTensor { storage, offset, shape, strides });
                Ok(Value::Tensor(self.tensors.len() - 1))
            }
            _ => Ok(Value::Other),
        }
    }

    /// `("storage", torch.FloatStorage, key, location, elements, ...)`
    fn storage(&mut self, id: &Value) -> Read<Value> {
        let &Value::List(id) = id else { return Err(damaged("a storage of another form")) };
        let [Value::Text(kind), Value::Global(class), Value::Text(key), ..] = &self.lists[id][..] else {
            return Err(damaged("a storage of another form"));
        };
        let dtype = match &**class {
            "torch.DoubleStorage" => FileDtype::F64,
            "torch.FloatStorage" => FileDtype::F32,
            "torch.HalfStorage" => FileDtype::F16,
            "torch.BFloat16Storage" => FileDtype::BF16,
            "torch.LongStorage" => FileDtype::I64,
            "torch.IntStorage" => FileDtype::I32,
            "torch.ShortStorage" => FileDtype::I16,
            "torch.CharStorage" => FileDtype::I8,
            "torch.ByteStorage" => FileDtype::U8,
            "torch.BoolStorage" => FileDtype::BOOL,
            other => return Err(format!("holds a tensor in {other}; f32, f16, bf16 or f64 are wanted")),
        };
        if &**kind != "storage" {
            return Err(damaged("a storage of another form"));
        }
        let key = key.to_string();
        self.element_sizes.insert(key.clone(), dtype.bitsize() / 8);
        self.storages.push(Storage { key, dtype });
        Ok(Value::Storage(self.storages.len() - 1))
    }
}

fn pairs(items: Vec<Value>) -> Vec<(Value, Value)> {
    let mut items = items.into_iter();
    std::iter::from_fn(|| Some((items.next()?, items.next()?))).collect()
}

struct Found<'a> {
    machine: &'a Machine,
    storages: Storages,
    file: &'a Arc<MappedFile>,
    entries: BTreeMap<String, Entry>,
}

impl Found<'_> {
    fn collect(&mut self, key: &str, value: Value, level: usize) -> Read<()> {
        match value {
            Value::Tensor(tensor) => {
                let entry = self.entry(key, &self.machine.tensors[tensor])?;
                self.entries.insert(key.to_string(), entry);
                if self.entries.len() > MOST_TENSORS {
                    return Err(format!("holds more than {MOST_TENSORS} tensors: no network of these"));
                }
                Ok(())
            }
            Value::Dict(dict) if level < MOST_LEVELS => {
                let machine = self.machine;
                for (name, value) in &machine.dicts[dict] {
                    let name = match name {
                        Value::Text(name) => name.to_string(),
                        Value::Int(number) => number.to_string(),
                        _ => continue,
                    };
                    let key = if key.is_empty() { name } else { format!("{key}.{name}") };
                    self.collect(&key, value.clone(), level + 1)?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn entry(&self, key: &str, tensor: &PickledTensor) -> Read<Entry> {
        let PickledTensor { storage, offset, shape, strides } = tensor;
        let Storage { key: storage, dtype } = &self.machine.storages[*storage];
        let place = self.storages.get(storage).ok_or_else(|| damaged(&format!("{key} is in no storage")))?;
        let mut step = 1usize;
        for (&size, &stride) in shape.iter().zip(strides).rev() {
            if size > 1 && stride != step {
                return Err(format!(
                    "{key} does not lie in the file in order (strides {strides:?}): save it contiguous"
                ));
            }
            step = step.checked_mul(size).ok_or_else(|| damaged(&format!("{key} has shape {shape:?}")))?;
        }
        let size = dtype.bitsize() / 8;
        let within = || -> Option<(usize, usize)> {
            let (start, len) = (offset.checked_mul(size)?, step.checked_mul(size)?);
            let start = place.start.checked_add(start)?;
            (start.checked_add(len)? <= place.end && shape.len() == strides.len()).then_some((start, len))
        };
        let (start, len) = within().ok_or_else(|| damaged(&format!("{key} is longer than its storage")))?;
        Ok(Entry::new(self.file.clone(), *dtype, shape.clone(), start..start + len))
    }
}
