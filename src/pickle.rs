//! Files that `torch.save` wrote (`.ckpt`, `.pt`, `.pth`, `.bin`), read without running anything: a pickle is a program for a
//! small stack machine, and this one knows data only. What it would call is compared with the handful of names that stand for
//! tensors; what would run commands is an error, anything else becomes a value that is not looked at.
//!
//! Two forms: an archive (zip, since PyTorch 1.6) with `data.pkl` and a file per storage, and the older one of several pickles,
//! with the storages behind them.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::rc::Rc;

use safetensors::Dtype;

/// The most tensors of a file, items of dicts that are looked at, and dicts inside each other: far more than any network has.
const MOST_TENSORS: usize = 1 << 16;
const MOST_ITEMS: usize = 1 << 20;
const MOST_LEVELS: usize = 8;

/// Does the file begin as one of PyTorch's does?
pub fn is_pickle(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(LEGACY_MAGIC)
}

/// What a file holds.
#[derive(Debug, Default)]
pub struct Pickled {
    /// By their keys; of dicts in dicts the keys are joined by dots (`params_ema.conv_first.weight`). Of a training's
    /// checkpoint those of its `state_dict` alone.
    pub tensors: BTreeMap<String, PickledTensor>,
    /// The texts and whole numbers of the outermost dict (`global_step`).
    pub values: BTreeMap<String, String>,
}

/// A tensor and where its elements are in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PickledTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Elements from one index of a dimension to the next; `None`: the last dimension is dense, and each other one follows it.
    pub strides: Option<Vec<usize>>,
    /// From the first element to the last.
    pub bytes: Range<usize>,
}

impl PickledTensor {
    /// The elements in the order of the shape, from the bytes of the file that this tensor was read from.
    pub fn data<'a>(&self, file: &'a [u8]) -> Cow<'a, [u8]> {
        let bytes = &file[self.bytes.clone()];
        match &self.strides {
            None => Cow::Borrowed(bytes),
            Some(strides) => {
                let size = self.dtype.bitsize() / 8;
                let places = places(&self.shape, strides);
                Cow::Owned(places.flat_map(|place| &bytes[place * size..(place + 1) * size]).copied().collect())
            }
        }
    }
}

/// Where the elements of a strided tensor are, in the order of its shape.
pub fn places<'a>(shape: &'a [usize], strides: &'a [usize]) -> impl Iterator<Item = usize> + 'a {
    let count = shape.iter().product::<usize>();
    let mut index = vec![0; shape.len()];
    let mut next = 0;
    (0..count).map(move |_| {
        let place = next;
        for dimension in (0..shape.len()).rev() {
            index[dimension] += 1;
            next += strides[dimension];
            if index[dimension] < shape[dimension] {
                break;
            }
            next -= shape[dimension] * strides[dimension];
            index[dimension] = 0;
        }
        place
    })
}

/// Reads a file.
///
/// # Errors
/// What is wrong, and what to do: truncated or damaged, an archive whose files are compressed, a program that would run
/// commands, no dict of tensors, a tensor that is not within its storage.
pub fn read(bytes: &[u8]) -> Read<Pickled> {
    let (machine, root, storages) = match bytes.starts_with(b"PK\x03\x04") {
        true => archive(bytes)?,
        false => legacy(bytes)?,
    };
    let mut found = Found { machine: &machine, storages, tensors: BTreeMap::new(), items: 0 };
    let inner = machine.item(&root, "state_dict").filter(|inner| machine.holds_tensors(inner));
    found.collect("", inner.unwrap_or(root.clone()), 0)?;
    if found.tensors.is_empty() {
        return Err("holds no dict of tensors; a file with a network's weights (a state dict) is wanted".into());
    }
    let mut values = BTreeMap::new();
    if let Value::Dict(dict) = root {
        for (key, value) in &machine.dicts[dict] {
            let text = match value {
                Value::Int(number) => number.to_string(),
                Value::Text(text) => text.to_string(),
                _ => continue,
            };
            if let Value::Text(key) = key {
                values.insert(key.to_string(), text);
            }
        }
    }
    Ok(Pickled { tensors: found.tensors, values })
}

type Read<T> = std::result::Result<T, String>;

/// Where in the file the bytes of each storage are.
type Storages = HashMap<String, Range<usize>>;

fn archive(bytes: &[u8]) -> Read<(Machine, Value, Storages)> {
    let files = archived_files(bytes)?;
    let (name, data) = files
        .iter()
        .find(|(name, _)| name.ends_with("/data.pkl") || *name == "data.pkl")
        .ok_or("is a zip archive without data.pkl: not a file that torch.save wrote")?;
    let folder = name.strip_suffix("data.pkl").unwrap_or_default();
    let order = files.iter().find(|(name, _)| name.strip_prefix(folder) == Some("byteorder"));
    if order.is_some_and(|(_, order)| &bytes[order.clone()] == b"big") {
        return Err("was written on a big-endian system: load it with PyTorch and save it as safetensors".into());
    }
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
            return Err(format!(
                "is an archive whose {name} is compressed, which torch.save does not do: load it with PyTorch and save it as \
                 safetensors"
            ));
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
    dtype: Dtype,
}

#[derive(Debug)]
struct View {
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
    tensors: Vec<View>,
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

    /// Of a value that is kept: a byte, four, or a line of digits.
    fn key(&mut self, code: u8, short: u8, long: u8) -> Read<u64> {
        match code {
            _ if code == short => self.number(1),
            _ if code == long => self.number(4),
            _ => self.line()?.trim().parse().map_err(|_| damaged("a value kept under no number")),
        }
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
                b'X' | b'T' | 0x8d => {
                    // BINUNICODE, BINSTRING, BINUNICODE8
                    let count = from.number(if code == 0x8d { 8 } else { 4 })?;
                    self.stack.push(Value::Text(from.text(count)?.into()));
                }
                b'V' | b'S' => {
                    // UNICODE, STRING
                    let line = from.line()?;
                    self.stack.push(Value::Text(line.trim_matches(['\'', '"']).into()));
                }
                0x8c | b'U' => {
                    // SHORT_BINUNICODE, SHORT_BINSTRING
                    let count = from.number(1)?;
                    self.stack.push(Value::Text(from.text(count)?.into()));
                }
                b'C' | b'B' | 0x8e | 0x96 => {
                    // SHORT_BINBYTES, BINBYTES, BINBYTES8, BYTEARRAY8
                    let size = match code {
                        b'C' => 1,
                        b'B' => 4,
                        _ => 8,
                    };
                    let count = usize::try_from(from.number(size)?).unwrap_or(usize::MAX);
                    self.other(&mut from, count)?;
                }
                0x8b => {
                    // LONG4
                    let count = from.number(4)? as usize;
                    self.other(&mut from, count)?;
                }
                0x8f => self.stack.push(Value::Other), // EMPTY_SET
                0x90 => drop(self.marked()?),          // ADDITEMS
                0x91 => {
                    // FROZENSET
                    self.marked()?;
                    self.stack.push(Value::Other);
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
                b'q' | b'r' | b'p' => {
                    // BINPUT, LONG_BINPUT, PUT
                    let key = from.key(code, b'q', b'r')?;
                    let top = self.top()?.clone();
                    self.memo.insert(key, top);
                }
                0x94 => {
                    // MEMOIZE
                    let top = self.top()?.clone();
                    self.memo.insert(self.memo.len() as u64, top);
                }
                b'h' | b'j' | b'g' => {
                    // BINGET, LONG_BINGET, GET
                    let key = from.key(code, b'h', b'j')?;
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
                0x92 => {
                    // NEWOBJ_EX: arguments by position and by name
                    self.pop()?;
                    let (arguments, callable) = (self.pop()?, self.pop()?);
                    let made = self.made_by(&callable, &arguments)?;
                    self.stack.push(made);
                }
                b'i' => {
                    // INST
                    let callable = Value::Global(format!("{}.{}", from.line()?, from.line()?).into());
                    let arguments = self.marked()?;
                    self.list(arguments);
                    let arguments = self.pop()?;
                    let made = self.made_by(&callable, &arguments)?;
                    self.stack.push(made);
                }
                b'o' => {
                    // OBJ
                    let mut arguments = self.marked()?;
                    if arguments.is_empty() {
                        return Err(damaged("an object of no class"));
                    }
                    let callable = arguments.remove(0);
                    self.list(arguments);
                    let arguments = self.pop()?;
                    let made = self.made_by(&callable, &arguments)?;
                    self.stack.push(made);
                }
                b'b' => {
                    // BUILD: attributes of an object, of which those matter that a dict of parameters is made of
                    let attributes = self.pop()?;
                    let parameters = self.item(&attributes, "_parameters");
                    if let (&Value::Dict(object), Some(Value::Dict(parameters))) = (self.top()?, parameters) {
                        let items = self.dicts[parameters].clone();
                        if self.dicts[object].len() + items.len() > MOST_ITEMS {
                            return Err(damaged("a dict that grows without end"));
                        }
                        self.dicts[object].extend(items);
                    }
                }
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
        let Value::Global(name) = callable else { return Ok(Value::Other) };
        if runs_code(name) {
            return Err(format!(
                "is a program that would call {name} where PyTorch loads it without weights_only: it was not run; do not use \
                 this file"
            ));
        }
        let &Value::List(arguments) = arguments else { return Ok(Value::Other) };
        let arguments = &self.lists[arguments];
        match &**name {
            "collections.OrderedDict" | "torch.nn.modules.container.ParameterDict" => {
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
                self.tensors.push(View { storage, offset, shape, strides });
                Ok(Value::Tensor(self.tensors.len() - 1))
            }
            _ => Ok(Value::Other),
        }
    }

    /// What a dict has under a text.
    fn item(&self, dict: &Value, key: &str) -> Option<Value> {
        let &Value::Dict(dict) = dict else { return None };
        let is_it = |name: &Value| matches!(name, Value::Text(name) if &**name == key);
        self.dicts[dict].iter().rev().find_map(|(name, value)| is_it(name).then(|| value.clone()))
    }

    fn holds_tensors(&self, dict: &Value) -> bool {
        let &Value::Dict(dict) = dict else { return false };
        self.dicts[dict].iter().any(|(_, value)| matches!(value, Value::Tensor(_)))
    }

    /// `("storage", torch.FloatStorage, key, location, elements, ...)`
    fn storage(&mut self, id: &Value) -> Read<Value> {
        let &Value::List(id) = id else { return Err(damaged("a storage of another form")) };
        let [Value::Text(kind), Value::Global(class), Value::Text(key), ..] = &self.lists[id][..] else {
            return Err(damaged("a storage of another form"));
        };
        let dtype = match &**class {
            "torch.DoubleStorage" => Dtype::F64,
            "torch.FloatStorage" => Dtype::F32,
            "torch.HalfStorage" => Dtype::F16,
            "torch.BFloat16Storage" => Dtype::BF16,
            "torch.LongStorage" => Dtype::I64,
            "torch.IntStorage" => Dtype::I32,
            "torch.ShortStorage" => Dtype::I16,
            "torch.CharStorage" => Dtype::I8,
            "torch.ByteStorage" => Dtype::U8,
            "torch.BoolStorage" => Dtype::BOOL,
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

/// Does a call of this run what its arguments say? Nothing is called in any case: the file is one to warn of.
fn runs_code(name: &str) -> bool {
    const MODULES: [&str; 17] = [
        "asyncio",
        "code",
        "ctypes",
        "importlib",
        "nt",
        "os",
        "pdb",
        "posix",
        "pty",
        "requests",
        "runpy",
        "shutil",
        "socket",
        "subprocess",
        "sys",
        "urllib",
        "webbrowser",
    ];
    const BUILT_IN: [&str; 12] = [
        "__import__",
        "apply",
        "breakpoint",
        "compile",
        "delattr",
        "eval",
        "exec",
        "execfile",
        "getattr",
        "input",
        "open",
        "setattr",
    ];
    let (module, function) = name.split_once('.').unwrap_or((name, ""));
    match module {
        "builtins" | "__builtin__" => BUILT_IN.contains(&function),
        _ => MODULES.contains(&module),
    }
}

fn pairs(items: Vec<Value>) -> Vec<(Value, Value)> {
    let mut items = items.into_iter();
    std::iter::from_fn(|| Some((items.next()?, items.next()?))).collect()
}

struct Found<'a> {
    machine: &'a Machine,
    storages: Storages,
    tensors: BTreeMap<String, PickledTensor>,
    /// Looked at so far: dicts may be in each other in many places.
    items: usize,
}

impl Found<'_> {
    fn collect(&mut self, key: &str, value: Value, level: usize) -> Read<()> {
        match value {
            Value::Tensor(tensor) => {
                let tensor = self.tensor(key, &self.machine.tensors[tensor])?;
                self.tensors.insert(key.to_string(), tensor);
                if self.tensors.len() > MOST_TENSORS {
                    return Err(format!("holds more than {MOST_TENSORS} tensors: no network of these"));
                }
                Ok(())
            }
            Value::Dict(dict) if level < MOST_LEVELS => {
                let machine = self.machine;
                self.items += machine.dicts[dict].len();
                if self.items > MOST_ITEMS {
                    return Err(damaged("dicts in dicts without end"));
                }
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

    fn tensor(&self, key: &str, view: &View) -> Read<PickledTensor> {
        let View { storage, offset, shape, strides } = view;
        let Storage { key: storage, dtype } = &self.machine.storages[*storage];
        let place = self.storages.get(storage).ok_or_else(|| damaged(&format!("{key} is in no storage")))?;
        let odd = || damaged(&format!("{key} has shape {shape:?} and strides {strides:?}"));
        if shape.len() != strides.len() {
            return Err(odd());
        }
        let count = shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size)).ok_or_else(odd)?;
        let mut step = 1;
        let mut is_dense = true;
        // Elements from the first to the last.
        let mut span = usize::from(count > 0);
        for (&size, &stride) in shape.iter().zip(strides).rev().filter(|(size, _)| **size > 1 && count > 0) {
            is_dense &= stride == step;
            step *= size;
            span = (size - 1).checked_mul(stride).and_then(|more| span.checked_add(more)).ok_or_else(odd)?;
        }
        if count > span {
            return Err(damaged(&format!("{key} of shape {shape:?} repeats its elements, strides {strides:?}")));
        }
        let size = dtype.bitsize() / 8;
        let within = || -> Option<Range<usize>> {
            let start = place.start.checked_add(offset.checked_mul(size)?)?;
            let end = start.checked_add(span.checked_mul(size)?)?;
            (end <= place.end).then_some(start..end)
        };
        let bytes = within().ok_or_else(|| damaged(&format!("{key} is longer than its storage")))?;
        let strides = (!is_dense).then(|| strides.clone());
        Ok(PickledTensor { dtype: *dtype, shape: shape.clone(), strides, bytes })
    }
}
