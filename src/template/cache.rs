//! The directory with a user's templates.
//!
//! A file there has its key's hash for a name: `.template` behind it when it is whole, `.new` while it is being made, under
//! a lock, and `.failed`, empty, if making it or starting from it has failed. `.checked` says of a template since when nobody has
//! changed it, if its pages had their checksum then; each start changes that file's time. A template gets its name when it is
//! complete, so a process that is killed leaves nothing that could be used, and the lock that it held is gone with it.
//!
//! Whoever can write here decides what runs in the user's boxes before their own programs do. So the directory must be
//! the user's own and nobody else's, and so must each file.

use std::fs::{DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};

use super::file::{STAMP_LEN, Template};
use super::key;
use crate::sys;
use crate::sys::confine::Identity;
use crate::sys::directory::Directory;

/// How much the templates of a user may have together, in bytes, and how many there may be.
pub const MOST_BYTES: u64 = 1 << 30;
/// See [`MOST_BYTES`].
pub const MOST_TEMPLATES: usize = 32;

/// How long a failure keeps others from trying again.
const FAILURE_LIFE: Duration = Duration::from_secs(3600);

const WHOLE: &str = "template";
const NEW: &str = "new";
const FAILED: &str = "failed";
const CHECKED: &str = "checked";

/// A user's templates.
#[derive(Debug)]
pub struct Cache {
    directory: Directory,
    path: PathBuf,
}

impl Cache {
    /// Opens the directory; `None` if there is none.
    ///
    /// # Errors
    /// Others than this user could have written to it, or it cannot be opened.
    pub fn open(path: &Path) -> Result<Option<Cache>> {
        let directory = match Directory::open_listed(path) {
            Ok(directory) => directory,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                let place = path.display();
                let what = || format!("open {place}, which must be a directory and no link to one");
                return Err(error).with_context(what);
            }
        };
        let metadata = directory.metadata().context("look at the cache's directory")?;
        let place = path.display();
        ensure!(Identity::own().user() == metadata.uid(), "{place} belongs to another user");
        let mode = metadata.mode() & 0o7777;
        ensure!(
            mode & 0o077 == 0,
            "{place} has mode {mode:o}, and must be its owner's alone (700)"
        );
        Ok(Some(Cache { directory, path: path.into() }))
    }

    /// Opens the directory, which is made, with those above it, if it is missing.
    ///
    /// # Errors
    /// As for [`Cache::open`], or it cannot be made.
    pub fn create(path: &Path) -> Result<Cache> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.with_context(|| format!("make {}", path.display()))?;
        Cache::open(path)?.with_context(|| format!("{} has vanished", path.display()))
    }

    /// Looks for a template with this key; `None` if there is none, and it may be made.
    ///
    /// # Errors
    /// There is one that cannot be used, which is removed if it is damaged; or making it is of no use now.
    pub fn find(&self, key: &[u8], memory_bytes: u64) -> Result<Option<Template>> {
        let name = key::name(key);
        let file = match self.directory.read(&format!("{name}.{WHOLE}")) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                ensure!(
                    !self.has_failed(&name),
                    "making it or starting from it has failed within the last hour; `mote template` says why"
                );
                return Ok(None);
            }
            Err(error) => bail!("open {name}.{WHOLE}: {error}"),
        };
        let usable = is_own(&file).and_then(|()| Template::read(file, memory_bytes));
        let mut template = usable.map_err(|error| {
            let _ = self.directory.remove(&format!("{name}.{WHOLE}"));
            error.context(format!("{name}.{WHOLE} was removed"))
        })?;
        ensure!(template.key() == key, "{name}.{WHOLE} is for another key");
        if self.is_checked(&name, &template) {
            template.believe();
        }
        Ok(Some(template))
    }

    /// Where the template with this key is, and how long, if there is one that can be used.
    pub fn whole(&self, key: &[u8], memory_bytes: u64) -> Option<(PathBuf, u64)> {
        let template = self.find(key, memory_bytes).ok()??;
        Some((self.path.join(format!("{}.{WHOLE}", key::name(key))), template.file_len()))
    }

    /// Whether a template's pages were whole when it was as it is. Notes that it is used now.
    fn is_checked(&self, name: &str, template: &Template) -> bool {
        let look = || {
            let mut noted = [0; STAMP_LEN];
            let file = self.directory.write_there(&format!("{name}.{CHECKED}"))?;
            file.read_exact_at(&mut noted, 0)?;
            file.set_modified(SystemTime::now())?;
            Ok::<_, io::Error>(template.stamp()?.is_some_and(|stamp| noted == stamp))
        };
        look().unwrap_or(false)
    }

    /// Notes that the pages of the template with this key are whole. If that cannot be, they are checked again.
    pub fn checked(&self, key: &[u8], template: &Template) {
        let note = |stamp| {
            let file = self.directory.write(&format!("{}.{CHECKED}", key::name(key)))?;
            file.write_all_at(stamp, 0)
        };
        if let Ok(Some(stamp)) = template.stamp() {
            let _ = note(&stamp);
        }
    }

    fn has_failed(&self, name: &str) -> bool {
        let marker = self.directory.read(&format!("{name}.{FAILED}"));
        let made = marker.and_then(|marker| marker.metadata()?.modified());
        made.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < FAILURE_LIFE))
    }

    /// Notes that this template could not be made, or started from: after the second time, it is removed.
    pub fn failed(&self, key: &[u8]) {
        let name = key::name(key);
        // Whatever fails here: the next start finds what this one has found.
        if self.has_failed(&name) {
            let _ = self.directory.remove(&format!("{name}.{WHOLE}"));
        }
        if let Ok(marker) = self.directory.write(&format!("{name}.{FAILED}")) {
            let _ = marker.set_modified(SystemTime::now());
        }
    }

    /// A file to write the template with this key to; `None` if another process is at it, or has been.
    ///
    /// # Errors
    /// The directory takes no file.
    pub fn begin(&self, key: &[u8]) -> Result<Option<Begun<'_>>> {
        let name = key::name(key);
        let new = format!("{name}.{NEW}");
        let file = self.directory.write(&new);
        let file = file.with_context(|| format!("make {}", self.path.join(&new).display()))?;
        is_own(&file)?;
        if !sys::lock(&file, Duration::ZERO).context("lock the new template")? {
            return Ok(None);
        }
        // Whoever had the lock before may have given the file its name.
        if !self.is(&new, &file) {
            return Ok(None);
        }
        file.set_len(0).context("empty the new template")?;
        Ok(Some(Begun { cache: self, name, file }))
    }

    /// Whether this name leads to this file.
    fn is(&self, name: &str, file: &File) -> bool {
        let inode = |file: &File| file.metadata().map(|metadata| metadata.ino());
        let there = self.directory.read(name).and_then(|there| inode(&there));
        there.is_ok_and(|there| inode(file).is_ok_and(|own| own == there))
    }

    /// The templates, from the one that was used last on, with the time of that and their length.
    fn templates(&self) -> Vec<(SystemTime, u64, String)> {
        let names = self.directory.names().unwrap_or_default();
        let whole = names.into_iter().filter(|name| name.ends_with(&format!(".{WHOLE}")));
        let look = |name: &str| self.directory.read(name)?.metadata();
        let looked = whole.filter_map(|name| {
            let metadata = look(&name).ok()?;
            let used = look(&with_suffix(&name, CHECKED)).and_then(|note| note.modified());
            let made = metadata.modified().ok()?;
            Some((used.map_or(made, |used| used.max(made)), metadata.len(), name))
        });
        let mut templates: Vec<_> = looked.collect();
        templates.sort();
        templates.reverse();
        templates
    }

    /// Removes what was not used for longest, until the rest is within the bounds, and what nobody is making any more.
    fn sweep(&self) {
        let mut bytes = 0;
        for (count, (_, len, name)) in self.templates().into_iter().enumerate() {
            bytes += len;
            if count >= MOST_TEMPLATES || bytes > MOST_BYTES {
                let _ = self.directory.remove(&name);
            }
        }
        for name in self.directory.names().unwrap_or_default() {
            // It stays locked until it is removed, or somebody could begin to write to it.
            let mut locked = None;
            let is_left_over = if name.ends_with(&format!(".{NEW}")) {
                let file = self.directory.write_there(&name).ok();
                locked = file.filter(|file| file.try_lock().is_ok() && self.is(&name, file));
                locked.is_some()
            } else if name.ends_with(&format!(".{CHECKED}")) {
                self.directory.read(&with_suffix(&name, WHOLE)).is_err()
            } else {
                name.strip_suffix(&format!(".{FAILED}")).is_some_and(|name| !self.has_failed(name))
            };
            if is_left_over {
                let _ = self.directory.remove(&name);
            }
            drop(locked);
        }
    }
}

/// Finds out whether templates can be put into this directory, or into the one that is made here.
///
/// # Errors
/// This user may not write there, or the file system is read-only.
pub fn takes_templates(path: &Path) -> Result<()> {
    for place in path.ancestors() {
        match sys::may_write(place) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            may => {
                let why = || format!("templates cannot be written to {}", path.display());
                return may.with_context(why);
            }
        }
    }
    Ok(())
}

/// A template that is being made.
#[derive(Debug)]
pub struct Begun<'a> {
    cache: &'a Cache,
    name: String,
    file: File,
}

impl Begun<'_> {
    /// The file to write to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file, which is complete, its name, and makes room for it. Returns where it is.
    ///
    /// # Errors
    /// The directory does not let it, or somebody has removed the file.
    pub fn publish(self) -> Result<PathBuf> {
        let Begun { cache, name, file } = self;
        let (new, whole) = (format!("{name}.{NEW}"), format!("{name}.{WHOLE}"));
        // Else what is there now is another process's, and not complete.
        ensure!(cache.is(&new, &file), "{new} was removed while it was being written");
        cache.directory.rename(&new, &whole).context("name the template")?;
        let _ = cache.directory.remove(&format!("{name}.{FAILED}"));
        // Still locked: nobody begins another meanwhile.
        cache.sweep();
        drop(file);
        Ok(cache.path.join(whole))
    }

    /// Removes what there is of it.
    pub fn abandon(self) {
        let new = format!("{}.{NEW}", self.name);
        if self.cache.is(&new, &self.file) {
            let _ = self.cache.directory.remove(&new);
        }
    }
}

/// The name of the file that is beside this one with another suffix.
fn with_suffix(name: &str, suffix: &str) -> String {
    format!("{}.{suffix}", name.rsplit_once('.').map_or(name, |(name, _)| name))
}

fn is_own(file: &File) -> Result<()> {
    let metadata = file.metadata().context("look at the file")?;
    ensure!(metadata.is_file(), "it is no regular file");
    ensure!(Identity::own().user() == metadata.uid(), "it belongs to another user");
    let mode = metadata.mode() & 0o7777;
    ensure!(mode & 0o077 == 0, "it has mode {mode:o}, and must be its owner's alone (600)");
    Ok(())
}

/// What is in a user's cache, for `mote probe`.
pub fn describe(path: &Path) -> String {
    match Cache::open(path) {
        Ok(None) => match takes_templates(path) {
            Ok(()) => format!("none yet in {}", path.display()),
            Err(error) => format!("none are used: {error:#}"),
        },
        Ok(Some(cache)) => {
            let templates = cache.templates();
            let bytes: u64 = templates.iter().map(|(_, len, _)| len).sum();
            format!("{} in {}, {} MiB", templates.len(), path.display(), bytes >> 20)
        }
        Err(error) => format!("none are used: {error:#}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Place {
            let path = std::env::temp_dir().join(format!("mote-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            Place(path)
        }

        fn names(&self) -> Vec<String> {
            let mut names: Vec<_> = fs::read_dir(&self.0)
                .expect("directory")
                .map(|entry| entry.expect("entry").file_name().into_string().expect("text"))
                .collect();
            names.sort();
            names
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_directory_that_others_write_to_is_not_used() {
        let place = Place::new("cache-mode");
        assert!(Cache::open(&place.0).expect("no error").is_none());
        Cache::create(&place.0).expect("made");
        fs::set_permissions(&place.0, fs::Permissions::from_mode(0o770)).expect("mode");
        let error = Cache::open(&place.0).expect_err("refused").to_string();
        assert!(error.contains("has mode 770"), "{error}");
        let link = Place::new("cache-link");
        std::os::unix::fs::symlink(&place.0, &link.0).expect("link");
        assert!(Cache::open(&link.0).is_err());
        fs::remove_file(&link.0).expect("removed");
    }

    #[test]
    fn a_template_appears_whole_and_is_made_once() {
        let place = Place::new("cache-new");
        let cache = Cache::create(&place.0).expect("made");
        let begun = cache.begin(b"key").expect("no error").expect("nobody is at it");
        assert!(cache.begin(b"key").expect("no error").is_none());
        assert!(cache.find(b"key", 0).expect("no error").is_none());
        begun.publish().expect("named");
        let [name] = &place.names()[..] else { panic!("{:?}", place.names()) };
        assert!(name.ends_with(".template"));
        // It is empty, which is no template.
        assert!(cache.find(b"key", 0).is_err());
        assert_eq!(place.names(), [""; 0]);
    }

    #[test]
    fn what_another_has_begun_is_not_published() {
        let place = Place::new("cache-replaced");
        let cache = Cache::create(&place.0).expect("made");
        let begun = || cache.begin(b"key").expect("no error").expect("nobody is at it");
        let first = begun();
        let [new] = &place.names()[..] else { panic!("{:?}", place.names()) };
        fs::remove_file(place.0.join(new)).expect("removed");
        let second = begun();
        let error = first.publish().expect_err("it is gone").to_string();
        assert!(error.contains("was removed while it was being written"), "{error}");
        assert_eq!(place.names(), [new.as_str()]);
        second.publish().expect("named");
        assert!(place.names()[0].ends_with(".template"));
    }

    #[test]
    fn leftovers_and_what_exceeds_the_bounds_are_swept() {
        let place = Place::new("cache-sweep");
        let cache = Cache::create(&place.0).expect("made");
        // As a process leaves it that is killed.
        drop(cache.begin(b"killed").expect("no error"));
        for number in 0..=MOST_TEMPLATES as u64 {
            let file = cache.directory.write(&format!("{number:02}.template")).expect("file");
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(number)).expect("time");
        }
        cache.begin(b"last").expect("no error").expect("begun").publish().expect("named");
        let names = place.names();
        assert_eq!(names.len(), MOST_TEMPLATES);
        assert!(!names.contains(&"00.template".into()) && !names.contains(&"01.template".into()));
        assert!(names.iter().all(|name| name.ends_with(".template")), "{names:?}");
    }

    #[test]
    fn what_fails_twice_is_removed() {
        let place = Place::new("cache-failed");
        let cache = Cache::create(&place.0).expect("made");
        cache.begin(b"key").expect("no error").expect("begun").publish().expect("named");
        cache.failed(b"key");
        assert_eq!(place.names().len(), 2);
        cache.failed(b"key");
        assert_eq!(place.names().len(), 1);
        assert!(cache.find(b"key", 0).is_err());
    }
}
