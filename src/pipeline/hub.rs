use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::families::{FamilySpec, OF_PIXELS, Part, SCHEDULERS};
use super::files::{CONFIGURATIONS, INDEX};
use super::{ModelFiles, ModelSource};
use crate::error::{Error, Result};
use crate::hub::{
    Client, Download, Failure, HubName, HubObserver, HubSettings, Listing, Presence, RemoteFile, Repository,
};
use crate::models::WeightFile;
use crate::runtime::DType;

/// What a run reads of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HubNeed {
    /// Configurations and tokenizers: a few megabytes.
    Configurations,
    /// The weights too. For f32 the plain ones; for 16 bits those saved in f16 (`.fp16.`), where there are such and the plain
    /// ones are not here already.
    Weights(DType),
}

/// The place of a model of the Hugging Face hub in its local cache, a directory or a single file for [`ModelSource::at`].
/// What `need` asks for and the cache does not have is fetched: of each part one form of its weights, safetensors where there
/// is one, else what `torch.save` wrote.
/// Downloads that were cut off go on where they ended; sizes, and the SHA-256 of large files, are checked before a file is
/// taken for whole. Without a network a model that is whole in the cache is used, with a warning.
///
/// # Errors
/// [`Error::Hub`], naming the model: not found, gated, not reachable and not whole in the cache, without weights, bytes
/// that are not those listed, several single files and none named; [`Error::File`]: a full or read-only disk, a lock that
/// another process keeps; as [`ModelFiles::open`] for a model of another kind, before its weights are fetched.
pub fn fetch_model(
    name: &HubName,
    need: HubNeed,
    settings: &HubSettings,
    observer: &mut dyn HubObserver,
) -> Result<PathBuf> {
    let repository = Repository::new(name, settings);
    let cached = Cached { name, need, repository: &repository };
    if settings.offline {
        return cached.find(false, observer).map_err(|error| cached.offline(error));
    }
    // A commit never changes: there is nothing to ask when all of it is here.
    if name.commit().is_some()
        && let Ok(place) = cached.find(true, &mut Unheard)
    {
        return Ok(place);
    }
    let client = Client::new(name, settings)?;
    let fetched = client.list().and_then(|listing| {
        Fetch { name, need, repository: &repository, client: &client, listing: &listing, observer }.run()
    });
    match fetched {
        Ok(place) => Ok(place),
        Err(Failure::Final(error)) => Err(error),
        Err(Failure::Unreachable(reason)) => match cached.find(false, observer) {
            Ok(place) => {
                observer.warning(&format!("{name}: {reason}; what is in the cache is used, it may have a successor"));
                Ok(place)
            }
            Err(missing) => {
                let missing = match &missing {
                    Error::Hub { reason, .. } => reason.clone(),
                    other => other.to_string(),
                };
                let reason = format!("no such path here, and as a model of the hub: {reason}; {missing}");
                Err(Error::Hub { name: name.to_string(), reason })
            }
        },
    }
}

/// For a look into the cache that may find nothing.
struct Unheard;

impl HubObserver for Unheard {
    fn begin(&mut self, _files: usize, _bytes: u64) {}
    fn position(&mut self, _name: &str, _done: u64) {}
    fn end(&mut self) {}
    fn warning(&mut self, _message: &str) {}
}

/// The cache alone.
struct Cached<'a> {
    name: &'a HubName,
    need: HubNeed,
    repository: &'a Repository,
}

impl Cached<'_> {
    /// The model's place when it is whole. `exact`: also in the form that would be fetched.
    ///
    /// # Errors
    /// [`Error::Hub`] naming what is missing.
    fn find(&self, exact: bool, observer: &mut dyn HubObserver) -> Result<PathBuf> {
        let commit = self.repository.cached_commit(self.name)?;
        let snapshot = self.repository.snapshot(&commit);
        let files = self.repository.files(&commit);
        let there = |path: &str| matches!(self.repository.presence(&commit, path), Presence::There(_));
        let missing = |path: &str| match self.repository.presence(&commit, path) {
            Presence::Dangling => {
                let place = snapshot.join(path);
                self.refused(format!("{} is a link to a file that is gone from the cache", place.display()))
            }
            _ => self.refused(format!("{path} is not in the cache ({})", snapshot.display())),
        };
        if let Some(file) = &self.name.file {
            return if there(file) { Ok(snapshot.join(file)) } else { Err(missing(file)) };
        }
        if !files.iter().any(|file| file == INDEX || file.starts_with("unet/") || file.starts_with("transformer/")) {
            let file = single_file(self.name, &files)?;
            return if there(file) { Ok(snapshot.join(file)) } else { Err(missing(file)) };
        }
        if files.iter().any(|file| file == INDEX) && !there(INDEX) {
            return Err(missing(INDEX));
        }
        let family = family(&snapshot, &files)?;
        for part in parts_of(family, &files) {
            let there = |file: &str| there(&format!("{}/{file}", part.folder));
            let wanted: &[&str] = match part.weights {
                Some(_) => &["config.json"],
                None if there("tokenizer.json") || there("spiece.model") => &[],
                None => &["vocab.json", "merges.txt"],
            };
            if let Some(file) = wanted.iter().find(|file| !there(file)) {
                return Err(missing(&format!("{}/{file}", part.folder)));
            }
        }
        let scheduler = "scheduler/scheduler_config.json";
        if !there(scheduler) {
            return Err(missing(scheduler));
        }
        // Links that lead nowhere: also of files that not every model has.
        if let Some(file) = files.iter().find(|file| is_configuration(family, file) && !there(file)) {
            return Err(missing(file));
        }
        let HubNeed::Weights(dtype) = self.need else { return Ok(snapshot) };
        for part in parts_of(family, &files) {
            let Some(stem) = part.weights else { continue };
            let forms = Form::of(part.folder, stem, dtype);
            let Some(form) = forms.iter().find(|form| form.is_whole(&snapshot, &there)) else {
                let begun = forms.iter().find(|form| files.contains(&form.path)).unwrap_or(&forms[0]);
                let shard = shards(&snapshot.join(&begun.path)).ok().and_then(|shards| {
                    let shards = shards.into_iter().map(|shard| format!("{}/{shard}", part.folder));
                    shards.into_iter().find(|shard| !there(shard))
                });
                return Err(missing(shard.as_ref().filter(|_| begun.is_index).unwrap_or(&begun.path)));
            };
            if dtype == DType::F32 && form.is_half {
                if exact {
                    return Err(missing(&forms[0].path));
                }
                observer.warning(&format!("{}: the cache has the {} in f16 alone", self.name, part.folder));
            }
        }
        Ok(snapshot)
    }

    fn refused(&self, reason: String) -> Error {
        Error::Hub { name: self.name.to_string(), reason }
    }

    /// The same error, with the way out of being offline.
    fn offline(&self, error: Error) -> Error {
        match error {
            Error::Hub { name, reason } => {
                let HubName { repository, .. } = self.name;
                let revision =
                    self.name.revision.as_ref().map(|name| format!(" --revision {name}")).unwrap_or_default();
                let file = self.name.file.as_ref().map(|file| format!(" {file}")).unwrap_or_default();
                let reason = format!(
                    "no such path here, and as a model of the hub: {reason}; nothing is fetched offline: the same command \
                     without --offline and HF_HUB_OFFLINE fetches it, as does hf download {repository}{file}{revision}"
                );
                Error::Hub { name, reason }
            }
            other => other,
        }
    }
}

/// A form in which a part's weights may be there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Form {
    /// The file, or the index of its shards.
    path: String,
    is_index: bool,
    /// Saved in f16.
    is_half: bool,
}

impl Form {
    /// The forms of a part, the one to be fetched first before the others.
    fn of(folder: &str, stem: &str, dtype: DType) -> Vec<Form> {
        let form = |name: String, is_index, is_half| Form { path: format!("{folder}/{name}"), is_index, is_half };
        let of_ending = |file: WeightFile| {
            let (stem, end) = (file.stem(stem), file.ending());
            let plain =
                [form(format!("{stem}.{end}"), false, false), form(format!("{stem}.{end}.index.json"), true, false)];
            // The other order of the index's name is in use too.
            let half = [
                form(format!("{stem}.fp16.{end}"), false, true),
                form(format!("{stem}.fp16.{end}.index.json"), true, true),
                form(format!("{stem}.{end}.index.fp16.json"), true, true),
            ];
            match dtype {
                DType::F32 => plain.into_iter().chain(half).collect::<Vec<Form>>(),
                _ => half.into_iter().chain(plain).collect(),
            }
        };
        WeightFile::ALL.into_iter().flat_map(of_ending).collect()
    }

    /// Is it in the snapshot with all of its shards?
    fn is_whole(&self, snapshot: &Path, there: &dyn Fn(&str) -> bool) -> bool {
        let folder = self.path.split('/').next().unwrap_or_default();
        there(&self.path)
            && (!self.is_index
                || shards(&snapshot.join(&self.path))
                    .is_ok_and(|shards| shards.iter().all(|shard| there(&format!("{folder}/{shard}")))))
    }
}

/// The names of the files that an index of shards lists.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let bytes = std::fs::read(index).map_err(|error| Error::io(index, error))?;
    let json: Value =
        serde_json::from_slice(&bytes).map_err(|error| Error::file(index, format!("no index of shards: {error}")))?;
    let names = json["weight_map"].as_object().into_iter().flatten().filter_map(|(_, name)| name.as_str());
    let names: BTreeSet<String> = names.map(String::from).collect();
    match names.iter().find(|name| name.contains(['/', '\\'])) {
        Some(name) => Err(Error::file(index, format!("weight_map names the file {name:?}, expected a plain name"))),
        None if names.is_empty() => Err(Error::file(index, "no index of shards: it has no weight_map")),
        None => Ok(names),
    }
}

/// The family of a model in the layout of diffusers, by what its index lists; without an index by its folders.
fn family(snapshot: &Path, files: &[String]) -> Result<&'static FamilySpec> {
    let path = snapshot.join(INDEX);
    let index: Option<Value> = match std::fs::read(&path) {
        Ok(bytes) => {
            Some(serde_json::from_slice(&bytes).map_err(|error| Error::file(&path, format!("not JSON: {error}")))?)
        }
        Err(_) => None,
    };
    let class = index.as_ref().and_then(|index| index["_class_name"].as_str()).unwrap_or_default();
    if OF_PIXELS.pipelines.contains(&class) {
        return Ok(OF_PIXELS); // its parts are also those of others
    }
    Ok(FamilySpec::of(|folder| match &index {
        Some(index) => index.get(folder).is_some_and(|entry| !entry[1].is_null()),
        None => files.iter().any(|file| file.starts_with(&format!("{folder}/"))),
    }))
}

/// The family's parts that a model with these files has.
fn parts_of<'a>(family: &'static FamilySpec, files: &'a [String]) -> impl Iterator<Item = &'static Part> + 'a {
    let has = |part: &&Part| files.iter().any(|file| file.starts_with(&format!("{}/", part.folder)));
    family.parts.iter().filter(move |part| !part.is_optional || has(part))
}

/// Is this one of the small files that a model of the family is read from?
fn is_configuration(family: &FamilySpec, path: &str) -> bool {
    let folders = family.parts.iter().map(|part| part.folder).chain(SCHEDULERS);
    path == INDEX
        || path.split_once('/').is_some_and(|(folder, file)| {
            folders.into_iter().any(|known| known == folder) && CONFIGURATIONS.contains(&file)
        })
}

/// The checkpoint of a repository without the folders of a model.
///
/// # Errors
/// [`Error::Hub`]: none, or several to choose from.
fn single_file<'a>(name: &HubName, files: &'a [String]) -> Result<&'a String> {
    let at_root = |ends: &[&str]| -> Vec<&'a String> {
        let is_one =
            |file: &&String| !file.contains('/') && ends.iter().any(|end| file.to_ascii_lowercase().ends_with(end));
        files.iter().filter(is_one).collect()
    };
    let refuse = |reason: String| Err(Error::Hub { name: name.to_string(), reason });
    let several = |files: &[&String]| {
        let HubName { repository, .. } = name;
        let names: Vec<String> = files.iter().map(|file| format!("{repository}/{file}")).collect();
        refuse(format!("holds {} checkpoints; name one of them: {}", files.len(), names.join(", ")))
    };
    match (&at_root(&[".safetensors"])[..], &at_root(&PICKLES)[..]) {
        ([only], _) | ([], [only]) => Ok(only),
        ([], []) => {
            refuse(format!("holds neither {INDEX} nor a safetensors or .ckpt file: it is no model that is read here"))
        }
        ([], files) | (files, _) => several(files),
    }
}

/// What `torch.save` wrote.
const PICKLES: [&str; 4] = [".ckpt", ".bin", ".pt", ".pth"];

/// Fetches from a listing.
struct Fetch<'a> {
    name: &'a HubName,
    need: HubNeed,
    repository: &'a Repository,
    client: &'a Client,
    listing: &'a Listing,
    observer: &'a mut dyn HubObserver,
}

impl<'a> Fetch<'a> {
    fn run(&mut self) -> std::result::Result<PathBuf, Failure> {
        let listing = self.listing;
        let snapshot = self.repository.snapshot(&listing.commit);
        let paths: Vec<String> = listing.files.iter().map(|file| file.path.clone()).collect();
        if self.name.file.is_some()
            || ![INDEX, "unet/config.json", "transformer/config.json"].into_iter().any(|file| listing.has(file))
        {
            let path = match &self.name.file {
                None => single_file(self.name, &paths)?.clone(),
                Some(file) if listing.has(file) => file.clone(),
                Some(file) => {
                    let others: Vec<&str> = paths
                        .iter()
                        .filter(|path| path.ends_with(".safetensors"))
                        .map(String::as_str)
                        .take(10)
                        .collect();
                    let others = if others.is_empty() { "none".into() } else { others.join(", ") };
                    return Err(self.refused(format!("holds no file {file}; its safetensors files: {others}")).into());
                }
            };
            if self.need == HubNeed::Configurations && !self.is_there(&path) {
                let reason = format!(
                    "{path} is a single file, which is planned from its own header and is not here; generate fetches it"
                );
                return Err(self.refused(reason).into());
            }
            self.fetch(&[&path], &[])?;
            self.remember()?;
            return Ok(snapshot.join(path));
        }
        if listing.has(INDEX) {
            self.fetch(&[INDEX], &[])?;
        }
        let family = family(&snapshot, &paths)?;
        let small: Vec<&str> = paths.iter().filter(|path| is_configuration(family, path)).map(String::as_str).collect();
        self.fetch(&small, &[])?;
        // A model of another kind is refused now, not after gigabytes.
        ModelFiles::open(&ModelSource::Directory(snapshot.clone()))?;
        if let HubNeed::Weights(dtype) = self.need {
            let (mut files, mut indices) = (Vec::new(), Vec::new());
            for part in parts_of(family, &paths) {
                let Some(stem) = part.weights else { continue };
                let form = self.form(&snapshot, part.folder, stem, dtype)?;
                match form.is_index {
                    false => files.push(form.path),
                    true => {
                        files.extend(self.shards(part.folder, &form.path)?);
                        indices.push(form.path);
                    }
                }
            }
            let files: Vec<&str> = files.iter().map(String::as_str).collect();
            let indices: Vec<&str> = indices.iter().map(String::as_str).collect();
            self.fetch(&files, &indices)?;
        }
        self.remember()?;
        Ok(snapshot)
    }

    /// In which form a part's weights are taken.
    fn form(&self, snapshot: &Path, folder: &str, stem: &str, dtype: DType) -> Result<Form> {
        let forms = Form::of(folder, stem, dtype);
        let there = |path: &str| self.is_there(path);
        // A larger form that is here need not be fetched again in a smaller one.
        let enough = |form: &&Form| (dtype != DType::F32 || !form.is_half) && form.is_whole(snapshot, &there);
        let listed = || forms.iter().find(|form| self.listing.has(&form.path));
        if let Some(form) = forms.iter().find(enough).or_else(listed) {
            return Ok(form.clone());
        }
        let inside = |ends: &[&str]| {
            let paths = self.listing.files.iter().filter_map(|file| file.path.strip_prefix(folder)?.strip_prefix('/'));
            paths.into_iter().find(|path| ends.iter().any(|end| path.ends_with(end))).map(String::from)
        };
        Err(self.refused(match inside(&[".safetensors"]).or_else(|| inside(&PICKLES)) {
            Some(other) => format!("{folder} has no {stem}.safetensors; it holds {other}, which is not known here"),
            None => format!("{folder} has no weights that are read here"),
        }))
    }

    /// The shards of an index, which is itself fetched and not linked: a snapshot's index has all of its shards.
    fn shards(&mut self, folder: &str, index: &str) -> std::result::Result<Vec<String>, Failure> {
        let listing = self.listing;
        let file = self.listed(index)?;
        self.download().blob(file, 0, &mut Unheard)?;
        let names = shards(&self.repository.blob(&file.id))?;
        let paths: Vec<String> = names.iter().map(|name| format!("{folder}/{name}")).collect();
        match paths.iter().find(|path| !listing.has(path)) {
            Some(path) => Err(self.refused(format!("{index} names {path}, which the model does not have")).into()),
            None => Ok(paths),
        }
    }

    /// Has these files in the snapshot, and then `last` ones.
    fn fetch(&mut self, paths: &[&str], last: &[&str]) -> std::result::Result<(), Failure> {
        let mut wanted: Vec<&'a RemoteFile> = Vec::new();
        for path in paths.iter().chain(last) {
            let file = self.listed(path)?;
            if !self.is_there(path) {
                wanted.push(file);
            }
        }
        if wanted.is_empty() {
            return Ok(());
        }
        self.observer.begin(wanted.len(), wanted.iter().map(|file| file.size).sum());
        let mut done = 0;
        let mut result = Ok(());
        for file in wanted {
            self.observer.position(&file.path, done);
            result = self.download().blob(file, done, self.observer);
            if result.is_ok() {
                result = self.repository.link(&self.listing.commit, &file.path, &file.id).map_err(Failure::Final);
            }
            if result.is_err() {
                break;
            }
            done += file.size;
            self.observer.position(&file.path, done);
        }
        self.observer.end();
        result
    }

    fn download(&self) -> Download<'a> {
        Download { client: self.client, repository: self.repository, commit: &self.listing.commit }
    }

    fn listed(&self, path: &str) -> Result<&'a RemoteFile> {
        self.listing.file(path).ok_or_else(|| self.refused(format!("holds no file {path}")))
    }

    /// Is it in the snapshot, with the size that the hub lists?
    fn is_there(&self, path: &str) -> bool {
        let size = self.listing.file(path).map(|file| file.size);
        match self.repository.presence(&self.listing.commit, path) {
            Presence::There(found) => Some(found) == size,
            Presence::Dangling | Presence::Missing => false,
        }
    }

    /// The revision is at this commit. A plan does not move it: the weights that are here may be those of the one before.
    fn remember(&self) -> Result<()> {
        let revision = self.name.revision();
        match self.need == HubNeed::Configurations && self.repository.has_ref(revision) {
            true => Ok(()),
            false => self.repository.set_ref(revision, &self.listing.commit),
        }
    }

    fn refused(&self, reason: String) -> Error {
        Error::Hub { name: self.name.to_string(), reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_to_fetch_first_is_that_of_the_run() {
        let first = |dtype| Form::of("unet", "m", dtype).remove(0).path;
        assert_eq!(first(DType::F32), "unet/m.safetensors");
        assert_eq!(first(DType::F16), "unet/m.fp16.safetensors");
        assert_eq!(first(DType::BF16), "unet/m.fp16.safetensors");
        let of_text = Form::of("text_encoder", "model", DType::F16).split_off(5);
        assert_eq!(of_text[0].path, "text_encoder/pytorch_model.fp16.bin");
    }

    #[test]
    fn a_repository_of_single_files_names_them() {
        let name: HubName = "acme/tiny".parse().unwrap();
        let of = |files: &[&str]| {
            let files: Vec<String> = files.iter().map(|file| file.to_string()).collect();
            single_file(&name, &files).cloned().map_err(|error| error.to_string())
        };
        assert_eq!(of(&["README.md", "a.safetensors", "sub/b.safetensors"]).unwrap(), "a.safetensors");
        let several = of(&["a.safetensors", "b.safetensors"]).unwrap_err();
        assert!(several.contains("acme/tiny/a.safetensors, acme/tiny/b.safetensors"), "{several}");
        assert_eq!(of(&["a.safetensors", "a.ckpt", "b.ckpt"]).unwrap(), "a.safetensors");
        assert_eq!(of(&["README.md", "a.ckpt"]).unwrap(), "a.ckpt");
        assert!(of(&["a.ckpt", "b.pt"]).unwrap_err().contains("acme/tiny/a.ckpt, acme/tiny/b.pt"));
        assert!(of(&["README.md"]).unwrap_err().contains("no model that is read here"));
    }
}
