//! Secrets that clients give the box (contract §6.5): files in memory, in a directory that is mounted at the first of
//! them, and variables of commands. The agent makes the two directories, so that what is in them outlives this program.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use mote_agent::attestation::{MAX_VARIABLES_LEN, SECRETS, VARIABLES, variables};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MoveMountFlags;
use serde::{Deserialize, Serialize};

/// Longest name in bytes.
const MAX_NAME: usize = 256;
/// Most bytes of a variable with its name: Linux executes nothing with a longer one (`MAX_ARG_STRLEN`, with a NUL).
const MAX_VARIABLE_LEN: usize = 128 * 1024 - 1;
/// Most errors that the answer has.
const MAX_ERRORS: usize = 100;
/// Most of a client's own words that are in the message of an error.
const QUOTED: usize = 300;
/// Name of a file that is being written: no secret's.
const UNFINISHED: &str = ".unfinished";

/// A request to keep secrets.
#[derive(Debug, Deserialize)]
pub struct Request<'a> {
    #[serde(borrow)]
    secrets: Vec<Secret<'a>>,
}

#[derive(Debug, Deserialize)]
struct Secret<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    value: Cow<'a, str>,
    #[serde(default = "yes")]
    set_env: bool,
}

fn yes() -> bool {
    true
}

/// What became of them.
#[derive(Debug, Serialize)]
pub struct Injected {
    injected: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<String>,
}

/// The box's secrets.
#[derive(Debug)]
pub struct Secrets {
    files: OwnedFd,
    variables: OwnedFd,
    /// All of `variables`, each as `NAME=VALUE`; whoever has it writes to the directories.
    known: Mutex<Vec<Vec<u8>>>,
}

impl Secrets {
    /// Those in these two directories.
    ///
    /// # Errors
    /// If what is there cannot be read.
    pub fn new(files: OwnedFd, variables_directory: OwnedFd) -> io::Result<Self> {
        let mut known = Vec::new();
        match open(&variables_directory, VARIABLES, OFlags::RDONLY) {
            Ok(mut file) => {
                let mut text = Vec::new();
                file.read_to_end(&mut text)?;
                known.extend(variables(&text).map(|(name, value)| [name, b"=", value].concat()));
            }
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Secrets { files, variables: variables_directory, known: Mutex::new(known) })
    }

    /// Keeps secrets. One that cannot be kept keeps no other.
    ///
    /// # Errors
    /// A text for the client: none could be, because there is no place for them.
    pub fn inject(&self, request: &Request<'_>) -> Result<Injected, String> {
        // Nothing panics while it has the lock.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        self.show().map_err(|reason| format!("Failed to create secrets dir: {reason}"))?;
        let (mut injected, mut errors) = (0, Vec::new());
        let mut next = known.clone();
        for Secret { name, value, set_env } in &request.secrets {
            let quoted: String = name.chars().take(QUOTED).collect();
            if !is_valid(name) {
                errors.push(format!("Invalid secret name: {quoted}"));
                continue;
            }
            if let Err(error) = replace(&self.files, name, value.as_bytes()) {
                errors.push(format!("Failed to write {quoted}: {error}"));
                continue;
            }
            injected += 1;
            if *set_env && let Err(reason) = set(&mut next, name, value) {
                errors.push(format!("Failed to set {quoted} for commands: {reason}"));
            }
        }
        if errors.len() > MAX_ERRORS {
            let more = errors.len() - MAX_ERRORS;
            errors.truncate(MAX_ERRORS);
            errors.push(format!("{more} more errors"));
        }
        if next != *known {
            let text: Vec<u8> =
                next.iter().flat_map(|entry| [entry, &b"\0"[..]].concat()).collect();
            match replace(&self.variables, VARIABLES, &text) {
                Ok(()) => *known = next,
                Err(error) => errors.push(format!("Failed to set variables for commands: {error}")),
            }
        }
        Ok(Injected { injected, errors })
    }

    /// Mounts the directory, unless it is there.
    fn show(&self) -> Result<(), String> {
        const PLACE: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::DIRECTORY);
        let mut place = rustix::fs::open("/", PLACE, Mode::empty()).map_err(|e| e.to_string())?;
        for name in SECRETS.split('/').filter(|name| !name.is_empty()) {
            let failed = |doing: &str, e: Errno| format!("{doing} '{name}' of {SECRETS}: {e}");
            match rustix::fs::mkdirat(&place, name, Mode::from(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                // A read-only file system may have it all the same.
                Err(Errno::ROFS) => {}
                Err(error) => return Err(failed("create", error)),
            }
            place = match open(&place, name, PLACE) {
                Ok(directory) => OwnedFd::from(directory),
                // A link may lead to a share, and a secret is never put there.
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    return Err(format!(
                        "'{name}' of {SECRETS} is no directory (links are not followed)"
                    ));
                }
                Err(error) => return Err(failed("open", error)),
            };
        }
        let device = |of: &OwnedFd| rustix::fs::fstat(of).map(|stat| stat.st_dev);
        let is_there = device(&place).and_then(|there| Ok(there == device(&self.files)?));
        if !is_there.map_err(|e| format!("look at {SECRETS}: {e}"))? {
            let flags =
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            rustix::mount::move_mount(&self.files, "", &place, "", flags)
                .map_err(|e| format!("mount a tmpfs on {SECRETS}: {e}"))?;
        }
        Ok(())
    }
}

/// Adds a variable, or gives it another value.
fn set(known: &mut Vec<Vec<u8>>, name: &str, value: &str) -> Result<(), String> {
    if value.contains('\0') {
        return Err("its value has a NUL character, which no variable can have".into());
    }
    let entry = [name.as_bytes(), b"=", value.as_bytes()].concat();
    if entry.len() > MAX_VARIABLE_LEN {
        return Err(format!("a variable has at most {MAX_VARIABLE_LEN} bytes"));
    }
    let start = &entry[..=name.len()];
    let at = known.iter().position(|other| other.starts_with(start));
    let others = known.iter().enumerate().filter(|(index, _)| Some(*index) != at);
    let len: usize = others.map(|(_, other)| other.len() + 1).sum();
    if (len + entry.len()) as u64 >= MAX_VARIABLES_LEN {
        return Err(format!("all variables together have at most {MAX_VARIABLES_LEN} bytes"));
    }
    match at {
        Some(at) => known[at] = entry,
        None => known.push(entry),
    }
    Ok(())
}

fn is_valid(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    (1..=MAX_NAME).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(is_allowed)
}

fn open(directory: &impl AsFd, name: &str, flags: OFlags) -> Result<File, Errno> {
    rustix::fs::openat(directory, name, flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
}

/// Writes a file that its owner alone can read. Whoever reads it finds all of the old one or all of the new one.
fn replace(directory: &OwnedFd, name: &str, contents: &[u8]) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    // One that an earlier program has left.
    let _ = rustix::fs::unlinkat(directory, UNFINISHED, rustix::fs::AtFlags::empty());
    let file = rustix::fs::openat(directory, UNFINISHED, flags, Mode::RUSR)?;
    let written = File::from(file)
        .write_all(contents)
        .and_then(|()| Ok(rustix::fs::renameat(directory, UNFINISHED, directory, name)?));
    if written.is_err() {
        let _ = rustix::fs::unlinkat(directory, UNFINISHED, rustix::fs::AtFlags::empty());
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn names_are_those_of_plain_files() {
        let long = "a".repeat(256);
        for name in ["A", "a-b_c.9", "a..b", &long] {
            assert!(is_valid(name), "{name}");
        }
        let too_long = "a".repeat(257);
        for name in ["", ".", "..", ".hidden", "a/b", "/a", "a\0b", "a b", "é", "a\n", &too_long] {
            assert!(!is_valid(name), "{name:?}");
        }
    }

    #[test]
    fn variables_have_one_value_and_a_bound() {
        let mut known = Vec::new();
        for (name, value) in [("A", "1"), ("AB", "2"), ("A", "3")] {
            set(&mut known, name, value).expect("set");
        }
        assert_eq!(known, [b"A=3".to_vec(), b"AB=2".to_vec()]);
        assert!(set(&mut known, "N", "a\0b").is_err_and(|reason| reason.contains("NUL")));
        let most = MAX_VARIABLE_LEN - "C=".len();
        assert!(set(&mut known, "C", &"c".repeat(most + 1)).is_err());
        set(&mut known, "C", &"c".repeat(most)).expect("set");
        let others = "A=3.AB=2.".len() + MAX_VARIABLE_LEN + 1;
        let room = MAX_VARIABLES_LEN as usize - others - "D=.".len();
        assert!(set(&mut known, "D", &"d".repeat(room + 1)).is_err());
        set(&mut known, "D", &"d".repeat(room)).expect("set");
        // A new value takes the old one's place.
        set(&mut known, "D", &"e".repeat(room)).expect("set");
        assert!(set(&mut known, "E", "").is_err());
    }

    #[test]
    fn a_file_is_replaced_whole_and_what_was_set_is_found_again() {
        let directory = std::env::temp_dir().join(format!("mote-secrets-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("directory");
        let opened = || OwnedFd::from(File::open(&directory).expect("opened"));
        fs::write(directory.join(UNFINISHED), "left").expect("written");
        replace(&opened(), "a", b"1").expect("written");
        replace(&opened(), "a", b"2").expect("replaced");
        assert_eq!(fs::read(directory.join("a")).expect("read"), b"2");
        let mode = fs::metadata(directory.join("a")).expect("there").permissions().mode();
        assert_eq!(mode & 0o7777, 0o400);
        replace(&opened(), VARIABLES, b"A=1\0B=\0").expect("written");
        let secrets = Secrets::new(opened(), opened()).expect("read");
        assert_eq!(*secrets.known.lock().expect("free"), [b"A=1".to_vec(), b"B=".to_vec()]);
        assert_eq!(fs::read_dir(&directory).expect("directory").count(), 2);
        fs::remove_dir_all(directory).expect("removed");
    }
}
