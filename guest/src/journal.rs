//! What requests with an id were answered, so that a repeated one is carried out once (contract §4.7).
//!
//! Sessions are processes of their own, and what they share is a directory in memory that nothing else can
//! reach: a file for each id, locked while its request is carried out, which the kernel undoes if the session
//! is killed; and a file with all of them in order, locked while they are looked at.

use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::sys::{self, files};

/// Most requests that are remembered.
const MAX_ENTRIES: usize = 128;
/// Most bytes that their answers may take: two of the longest.
const MAX_BYTES: u64 = 20 << 20;
/// Longest id.
const MAX_ID: usize = 512;
/// How long a repeated request waits between its looks at whether the first one has been answered.
const LOOK: Duration = Duration::from_millis(20);
/// Where the order is written down.
const ORDER: &str = "order";
/// Bytes in front of an answer: what the request was, and whether it has been answered.
const HEAD: usize = 9;

/// The answers.
#[derive(Debug)]
pub struct Journal {
    directory: File,
    max_entries: usize,
}

/// A request that has an id.
#[derive(Debug, Clone, Copy)]
pub struct Key<'a> {
    /// What it is called in messages: `exec`, `file`, `filesystem`. Each has ids of its own.
    pub kind: &'static str,
    /// The id.
    pub id: &'a str,
    /// Stands for all of the request.
    pub content: u64,
}

impl<'a> Key<'a> {
    /// The key of a request.
    ///
    /// # Errors
    /// If the id is none.
    pub fn new(kind: &'static str, id: &'a str, request: &impl Hash) -> Result<Self, String> {
        if id.is_empty() || id.len() > MAX_ID || id.contains('\0') {
            return Err(format!("{kind} request ID is invalid"));
        }
        Ok(Key { kind, id, content: digest(request) })
    }

    fn number(&self) -> u64 {
        digest(&(self.kind, self.id))
    }
}

fn digest(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// What is to be done about a request.
#[derive(Debug)]
pub enum Claim {
    /// Carry it out, and hand the answer in.
    Ours(Entry),
    /// It has been answered with this.
    Answered(Vec<u8>),
    /// Nothing: nobody waits for the answer any more.
    Forgotten,
}

/// The place of an answer, for the session that carries the request out.
#[derive(Debug)]
pub struct Entry {
    file: File,
    number: u64,
}

impl Journal {
    /// An empty one.
    ///
    /// # Errors
    /// If the kernel has no tmpfs, or no memory.
    pub fn new() -> io::Result<Self> {
        // With an inode for the directory, one for the order, and some to spare.
        let directory = files::memory_directory(MAX_BYTES, MAX_ENTRIES as u64 + 8)?;
        Ok(Journal { directory, max_entries: MAX_ENTRIES })
    }

    /// Its descriptor, for a process that closes all others.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Takes a request on, unless that was done before: then waits for the answer, at most so long (`None`:
    /// no limit), and while it `is_wanted`.
    ///
    /// # Errors
    /// The text for the client: the id is another request's, there is no room, or it took too long.
    pub fn claim(
        &self,
        key: &Key<'_>,
        patience: Option<Duration>,
        is_wanted: impl Fn() -> bool,
    ) -> Result<Claim, String> {
        let deadline = patience.and_then(|patience| Instant::now().checked_add(patience));
        let Key { kind, id, .. } = key;
        loop {
            let looked = self.look(key);
            let looked = looked.map_err(|e| format!("keep the {kind} request ID {id:?}: {e}"))?;
            if let Some(claim) = looked? {
                return Ok(claim);
            }
            if !is_wanted() {
                return Ok(Claim::Forgotten);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                let text = format!("timed out waiting for {kind} request {id:?} to complete");
                return Err(text);
            }
            let _ = sys::poll(&[], Some(LOOK));
        }
    }

    /// `None` while another session carries the request out; the inner error is for the client.
    fn look(&self, key: &Key<'_>) -> io::Result<Result<Option<Claim>, String>> {
        let Key { kind, id, content } = key;
        let conflict =
            |with: &str| format!("{kind} request ID {id:?} conflicts with {with} content");
        let number = key.number();
        let mut order = Order::open(self)?;
        if let Some(at) = order.numbers.iter().position(|known| *known == number) {
            let file = self.open(number)?;
            let is_free = files::try_lock(&file)?;
            let (known, answer) = read(&file, is_free)?;
            let same = known.is_none_or(|known| known == *content);
            return Ok(match (is_free, answer) {
                (false, _) if same => Ok(None),
                (false, _) => Err(conflict("in-flight")),
                (true, Some(answer)) if same => {
                    order.numbers.remove(at);
                    order.numbers.push(number);
                    order.save()?;
                    Ok(Some(Claim::Answered(answer)))
                }
                (true, Some(_)) => Err(conflict("cached")),
                // Whoever had taken it on was killed.
                (true, None) => Ok(Some(Claim::Ours(self.begin(file, key, &mut order)?))),
            });
        }
        while order.numbers.len() >= self.max_entries {
            if !self.forget_oldest(&mut order)? {
                return Ok(Err(format!("{kind} replay cache is full of in-flight requests")));
            }
        }
        let file = self.open(number)?;
        files::lock(&file)?;
        order.numbers.push(number);
        order.save()?;
        Ok(Ok(Some(Claim::Ours(self.begin(file, key, &mut order)?))))
    }

    /// Writes down in a request's file that it is being carried out.
    fn begin(&self, file: File, key: &Key<'_>, order: &mut Order) -> io::Result<Entry> {
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(&key.content.to_ne_bytes());
        file.set_len(0)?;
        loop {
            match file.write_all_at(&head, 0) {
                Err(error)
                    if error.kind() == ErrorKind::StorageFull && self.forget_oldest(order)? => {}
                written => return written.map(|()| Entry { file, number: key.number() }),
            }
        }
    }

    /// Hands the answer in. Where there is no room for it, it is not remembered.
    ///
    /// # Errors
    /// If the kernel refuses what it always allows: the answer is then not remembered, either.
    pub fn answer(&self, entry: Entry, answer: &[u8]) -> io::Result<()> {
        loop {
            match entry.file.write_all_at(answer, HEAD as u64) {
                Ok(()) => return entry.file.write_all_at(&[1], HEAD as u64 - 1),
                Err(error) if error.kind() == ErrorKind::StorageFull => {}
                Err(error) => return Err(error),
            }
            // Not with the order in hand for longer than this: others wait for it.
            let mut order = Order::open(self)?;
            if !self.forget_oldest(&mut order)? {
                order.numbers.retain(|number| *number != entry.number);
                order.save()?;
                return files::remove_below(&self.directory, &name(entry.number));
            }
        }
    }

    /// Removes the request that has been answered for longest, `false` if there is none.
    fn forget_oldest(&self, order: &mut Order) -> io::Result<bool> {
        for (at, &number) in order.numbers.iter().enumerate() {
            if files::try_lock(&self.open(number)?)? {
                order.numbers.remove(at);
                order.save()?;
                files::remove_below(&self.directory, &name(number))?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn open(&self, number: u64) -> io::Result<File> {
        files::open_or_create_below(&self.directory, &name(number))
    }
}

fn name(number: u64) -> String {
    format!("{number:016x}")
}

/// What is written down of a request: what it was, and the answer, if there is one and it `is_free`.
fn read(mut file: &File, is_free: bool) -> io::Result<(Option<u64>, Option<Vec<u8>>)> {
    let mut head = [0; HEAD];
    if file.read_exact(&mut head).is_err() {
        return Ok((None, None));
    }
    let [content @ .., answered] = head;
    let mut answer = None;
    if is_free && answered == 1 {
        file.read_to_end(answer.insert(Vec::new()))?;
    }
    Ok((Some(u64::from_ne_bytes(content)), answer))
}

/// The requests that are remembered, the one that was last asked for at the end; locked.
#[derive(Debug)]
struct Order {
    file: File,
    numbers: Vec<u64>,
}

impl Order {
    fn open(journal: &Journal) -> io::Result<Self> {
        let mut file = files::open_or_create_below(&journal.directory, ORDER)?;
        files::lock(&file)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let (numbers, _) = bytes.as_chunks();
        let numbers = numbers.iter().map(|number| u64::from_ne_bytes(*number)).collect();
        Ok(Order { file, numbers })
    }

    fn save(&self) -> io::Result<()> {
        let bytes: Vec<u8> = self.numbers.iter().flat_map(|number| number.to_ne_bytes()).collect();
        self.file.write_all_at(&bytes, 0)?;
        self.file.set_len(bytes.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// In a directory of the test's own; the kernel's bounds are a boot test's.
    fn journal(name: &str, max_entries: usize) -> Journal {
        let path = std::env::temp_dir().join(format!("mote-journal-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).expect("directory");
        Journal { directory: File::open(path).expect("opens"), max_entries }
    }

    fn claim(
        journal: &Journal,
        kind: &'static str,
        id: &str,
        request: &str,
    ) -> Result<Claim, String> {
        let key = Key::new(kind, id, &request).expect("an id");
        journal.claim(&key, Some(Duration::ZERO), || true)
    }

    fn ours(journal: &Journal, id: &str) -> Entry {
        match claim(journal, "exec", id, "x") {
            Ok(Claim::Ours(entry)) => entry,
            other => panic!("{id}: {other:?}"),
        }
    }

    fn answered(journal: &Journal, id: &str) -> Option<Vec<u8>> {
        match claim(journal, "exec", id, "x") {
            Ok(Claim::Answered(answer)) => Some(answer),
            Ok(Claim::Ours(_)) => None,
            other => panic!("{id}: {other:?}"),
        }
    }

    #[test]
    fn an_id_has_one_answer() {
        let journal = journal("one", 8);
        let entry = ours(&journal, "a");
        let told = claim(&journal, "exec", "a", "x").expect_err("in flight");
        assert_eq!(told, r#"timed out waiting for exec request "a" to complete"#);
        let told = claim(&journal, "exec", "a", "y").expect_err("another request");
        assert_eq!(told, r#"exec request ID "a" conflicts with in-flight content"#);
        journal.answer(entry, b"answer").expect("kept");
        assert_eq!(answered(&journal, "a").as_deref(), Some(&b"answer"[..]));
        let told = claim(&journal, "exec", "a", "y").expect_err("another request");
        assert_eq!(told, r#"exec request ID "a" conflicts with cached content"#);
        // Another kind has ids of its own.
        assert!(matches!(claim(&journal, "file", "a", "y"), Ok(Claim::Ours(_))));
        let key = Key::new("exec", "b", &"x").expect("an id");
        let _entry = ours(&journal, "b");
        assert!(matches!(journal.claim(&key, None, || false), Ok(Claim::Forgotten)));
    }

    #[test]
    fn a_request_whose_session_was_killed_is_carried_out_again() {
        let journal = journal("again", 8);
        let entry = ours(&journal, "a");
        entry.file.write_all_at(b"half an ans", HEAD as u64).expect("writes");
        drop(entry);
        assert_eq!(answered(&journal, "a"), None);
        // By another request, too: nobody has an answer.
        assert!(matches!(claim(&journal, "exec", "a", "y"), Ok(Claim::Ours(_))));
    }

    #[test]
    fn the_oldest_answer_is_forgotten_first_and_no_request_that_runs() {
        let journal = journal("oldest", 3);
        let running = ours(&journal, "running");
        for id in ["a", "b"] {
            journal.answer(ours(&journal, id), id.as_bytes()).expect("kept");
        }
        // Asked for again, so no longer the oldest.
        assert_eq!(answered(&journal, "a").as_deref(), Some(&b"a"[..]));
        journal.answer(ours(&journal, "c"), b"c").expect("kept");
        assert_eq!(answered(&journal, "a").as_deref(), Some(&b"a"[..]));
        assert_eq!(answered(&journal, "c").as_deref(), Some(&b"c"[..]));
        let others = (ours(&journal, "b"), ours(&journal, "d"));
        let told = claim(&journal, "exec", "e", "x").expect_err("full");
        assert_eq!(told, "exec replay cache is full of in-flight requests");
        drop(others);
        journal.answer(running, b"late").expect("kept");
        assert_eq!(answered(&journal, "running").as_deref(), Some(&b"late"[..]));
    }

    #[test]
    fn what_is_no_id() {
        for id in ["", "a\0b", &"x".repeat(513)] {
            let told = Key::new("exec", id, &0).expect_err("no id");
            assert_eq!(told, "exec request ID is invalid");
        }
        assert!(Key::new("exec", &"x".repeat(512), &0).is_ok());
    }
}
