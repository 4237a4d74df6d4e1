//! Reading a JSON document so that every error has a position.
//!
//! serde's derived parsers stop at the first error and lose its position; a person fixing a spec
//! wants every error at once, each with its path. So the text becomes a [`Json`] tree that keeps
//! repeated keys, and [`Object`] reads the tree member by member and adds errors to a [`Report`].
//!
//! Reading goes on behind a value that is missing or of a wrong type: the caller puts a placeholder in its place, and the
//! report knows where those are. Whoever judges the values afterwards judges them all, and what it says of those is dropped.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// One error or warning about a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Where, as a path from the root (`fs_mounts[2].tag`).
    pub path: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.problem)
    }
}

/// Everything found while reading and checking one document, in the order it was found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report {
    /// What makes the document unusable.
    pub errors: Vec<Fault>,
    /// What is probably a mistake.
    pub warnings: Vec<Fault>,
    /// The paths of what could not be read, where placeholders stand.
    unread: BTreeSet<String>,
}

impl Report {
    /// Adds an error, unless it is about a placeholder, whose own error is there already.
    pub fn error(&mut self, path: impl Into<String>, problem: impl Into<String>) {
        let path = path.into();
        if !self.is_placeholder(&path) {
            self.errors.push(Fault { path, problem: problem.into() });
        }
    }

    /// Adds a warning, unless it is about a placeholder.
    pub fn warn(&mut self, path: impl Into<String>, problem: impl Into<String>) {
        let path = path.into();
        if !self.is_placeholder(&path) {
            self.warnings.push(Fault { path, problem: problem.into() });
        }
    }

    /// Whether the whole value at this path is as it was written: for a judgement about another field that
    /// depends on it.
    pub fn has_read(&self, path: &str) -> bool {
        let from_here = self.unread.range(path.to_owned()..);
        let mut rests = from_here.map_while(|unread| unread.strip_prefix(path));
        !self.is_placeholder(path) && !rests.any(|rest| rest.starts_with(['.', '[']))
    }

    /// Whether the path is that of a placeholder, or leads into one.
    fn is_placeholder(&self, path: &str) -> bool {
        let mut ends = path.match_indices(['.', '[']).map(|(end, _)| end).chain([path.len()]);
        !self.unread.is_empty() && ends.any(|end| self.unread.contains(&path[..end]))
    }
}

/// A JSON value; objects keep the order of their keys, and repeated keys.
#[derive(Debug, Clone, PartialEq)]
pub enum Json {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Integer(i128),
    /// Any other number.
    Float(f64),
    /// A string.
    String(String),
    /// An array.
    Array(Vec<Json>),
    /// An object's members as written.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Parses one JSON document.
    ///
    /// # Errors
    /// serde_json's description with line and column.
    pub fn parse(text: &str) -> Result<Json, serde_json::Error> {
        serde_json::from_str(text)
    }

    fn kind(&self) -> &'static str {
        match self {
            Json::Null => "null",
            Json::Bool(_) => "a boolean",
            Json::Integer(_) | Json::Float(_) => "a number",
            Json::String(_) => "a string",
            Json::Array(_) => "an array",
            Json::Object(_) => "an object",
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct JsonVisitor;
        impl<'de> Visitor<'de> for JsonVisitor {
            type Value = Json;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON value")
            }
            fn visit_unit<E>(self) -> Result<Json, E> {
                Ok(Json::Null)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
                Ok(Json::Bool(value))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
                Ok(Json::Integer(value.into()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
                Ok(Json::Integer(value.into()))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
                Ok(Json::Float(value))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Json, E> {
                Ok(Json::String(value.to_owned()))
            }
            fn visit_string<E>(self, value: String) -> Result<Json, E> {
                Ok(Json::String(value))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Json::Array(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Json::Object(members))
            }
        }
        deserializer.deserialize_any(JsonVisitor)
    }
}

/// A value, its path, and the report for errors about it.
#[derive(Debug, Clone)]
pub struct Node<'a> {
    json: &'a Json,
    path: String,
    report: &'a RefCell<Report>,
}

impl<'a> Node<'a> {
    /// This value's path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Records an error about this value.
    pub fn error(&self, problem: impl Into<String>) {
        self.report.borrow_mut().error(&self.path, problem);
    }

    /// Records a warning about this value.
    pub fn warn(&self, problem: impl Into<String>) {
        self.report.borrow_mut().warn(&self.path, problem);
    }

    fn wrong_kind<T>(&self, wanted: &str) -> Option<T> {
        self.error(format!("is {}, must be {wanted}", self.json.kind()));
        None
    }

    /// A string.
    pub fn string(&self) -> Option<String> {
        match self.json {
            Json::String(text) => Some(text.clone()),
            _ => self.wrong_kind("a string"),
        }
    }

    /// `true` or `false`.
    pub fn boolean(&self) -> Option<bool> {
        match self.json {
            Json::Bool(value) => Some(*value),
            _ => self.wrong_kind("true or false"),
        }
    }

    /// A whole number in the range of `T`.
    pub fn integer<T: TryFrom<i128> + Bounded>(&self) -> Option<T> {
        match self.json {
            Json::Integer(value) => T::try_from(*value).ok().or_else(|| {
                self.error(format!("is {value}, must be from {} to {}", T::MIN, T::MAX));
                None
            }),
            Json::Float(value) => {
                self.error(format!(
                    "is {value}, must be a whole number without a fraction or exponent"
                ));
                None
            }
            _ => self.wrong_kind("a whole number"),
        }
    }

    /// Every item of an array, read by `item`, with placeholders for those that are wrong.
    pub fn array<T>(
        &self,
        item: impl Fn(&Node<'a>) -> Option<T>,
        placeholder: impl Fn() -> T,
    ) -> Option<Vec<T>> {
        let read = |node: &Node<'a>| node.read(&item).unwrap_or_else(&placeholder);
        Some(self.items()?.iter().map(read).collect())
    }

    /// This value as `read` reads it. If it cannot be read, the report notes that.
    pub fn read<T>(&self, read: impl Fn(&Node<'a>) -> Option<T>) -> Option<T> {
        let value = read(self);
        if value.is_none() {
            self.report.borrow_mut().unread.insert(self.path.clone());
        }
        value
    }

    /// The items of an array.
    pub fn items(&self) -> Option<Vec<Node<'a>>> {
        match self.json {
            Json::Array(items) => Some(
                items
                    .iter()
                    .enumerate()
                    .map(|(index, json)| Node {
                        json,
                        path: format!("{}[{index}]", self.path),
                        report: self.report,
                    })
                    .collect(),
            ),
            _ => self.wrong_kind("an array"),
        }
    }

    /// An object, whose members the caller reads before it calls [`Object::finish`].
    pub fn object(&self) -> Option<Object<'a>> {
        let Json::Object(members) = self.json else {
            return self.wrong_kind("an object");
        };
        Some(Object { node: self.clone(), members: members.iter().collect(), known: Vec::new() })
    }

    /// An array of strings.
    pub fn strings(&self) -> Option<Vec<String>> {
        self.array(Node::string, String::new)
    }

    /// An array of a name and a value, both strings.
    pub fn pair(&self) -> Option<(String, String)> {
        match self.items()?.as_slice() {
            [name, value] => {
                let (name, value) = (name.string(), value.string());
                Some((name?, value?))
            }
            other => {
                self.error(format!("has {} items, must be [name, value]", other.len()));
                None
            }
        }
    }

    /// The string, or `None` for any other kind of value, which is no error.
    pub fn as_str(&self) -> Option<&'a str> {
        match self.json {
            Json::String(text) => Some(text),
            _ => None,
        }
    }

    /// Whether this is an empty array, object or string, `false` or `null`: a value that asks for nothing.
    pub fn is_vacant(&self) -> bool {
        match self.json {
            Json::Null | Json::Bool(false) => true,
            Json::String(text) => text.is_empty(),
            Json::Array(items) => items.is_empty(),
            Json::Object(members) => members.is_empty(),
            _ => false,
        }
    }
}

/// The range of an integer type, for messages.
pub trait Bounded: fmt::Display {
    /// Smallest value.
    const MIN: Self;
    /// Largest value.
    const MAX: Self;
}

macro_rules! bounded {
    ($($t:ty),*) => { $(impl Bounded for $t {
        const MIN: Self = <$t>::MIN;
        const MAX: Self = <$t>::MAX;
    })* };
}
bounded!(u8, u32, u64, i32, i64);

/// An object being read: each member is asked for by name, and [`Object::finish`] warns about members
/// that were never asked for.
#[derive(Debug)]
pub struct Object<'a> {
    node: Node<'a>,
    members: Vec<&'a (String, Json)>,
    known: Vec<&'static str>,
}

impl<'a> Object<'a> {
    /// The object that a document is.
    ///
    /// # Errors
    /// It is something else; the message goes on behind the document's name.
    pub fn root(json: &'a Json, report: &'a RefCell<Report>) -> Result<Self, String> {
        let Json::Object(members) = json else {
            return Err(format!("is {}, must be an object", json.kind()));
        };
        let node = Node { json, path: String::new(), report };
        Ok(Object { node, members: members.iter().collect(), known: Vec::new() })
    }

    /// A member's value, if it is there. A member that is given twice is an error (contract §1.1).
    pub fn member(&mut self, name: &'static str) -> Option<Node<'a>> {
        self.known.push(name);
        let mut found = self.members.iter().filter(|(key, _)| key == name);
        let (_, json) = found.next()?;
        let node = self.child(name, json);
        if found.next().is_some() {
            node.error("is given twice; keep one");
        }
        Some(node)
    }

    /// A member that must be there, as `read` reads it. `None` is reported: a placeholder takes its place.
    pub fn required<T>(
        &mut self,
        name: &'static str,
        wanted: &str,
        read: impl Fn(&Node<'a>) -> Option<T>,
    ) -> Option<T> {
        match self.member(name) {
            Some(node) => node.read(read),
            None => {
                let path = self.path_of(name);
                self.node.report.borrow_mut().error(path, format!("is missing; give {wanted}"));
                self.unread(name)
            }
        }
    }

    /// A member that has a default, which is also its placeholder. `null` is an error like any other wrong
    /// type (contract §1.1).
    pub fn optional<T: Default>(
        &mut self,
        name: &'static str,
        read: impl Fn(&Node<'a>) -> Option<T>,
    ) -> T {
        self.member(name).and_then(|node| node.read(read)).unwrap_or_default()
    }

    /// A member that may be absent or `null`, which are both `None`, as is its placeholder.
    pub fn nullable<T>(
        &mut self,
        name: &'static str,
        read: impl Fn(&Node<'a>) -> Option<T>,
    ) -> Option<T> {
        self.member(name).filter(|node| *node.json != Json::Null).and_then(|node| node.read(read))
    }

    /// Refuses a member of this name, unless its value asks for nothing.
    pub fn refuse(&mut self, name: &'static str) {
        if let Some(node) = self.member(name).filter(|node| !node.is_vacant()) {
            node.error("asks for something mote cannot do; leave it out");
        }
    }

    /// Notes that a placeholder takes the place of the member of this name.
    pub fn unread<T>(&self, name: &str) -> Option<T> {
        let path = self.path_of(name);
        self.node.report.borrow_mut().unread.insert(path);
        None
    }

    /// Warns about the members that were never asked for.
    pub fn finish(self) {
        for (key, _) in &self.members {
            if !self.known.contains(&key.as_str()) {
                let mut problem = String::from("is not a field of the spec and is ignored");
                if let Some(near) = self.known.iter().find(|name| is_near(name, key)) {
                    problem += &format!("; did you mean {near}?");
                }
                self.node.report.borrow_mut().warn(self.path_of(key), problem);
            }
        }
    }

    /// All members, of an object whose names are the writer's own. One that is given twice is an error.
    pub fn members(&self) -> Vec<(String, Node<'a>)> {
        let mut seen = BTreeSet::new();
        let members = self.members.iter().map(|(key, json)| {
            let node = self.child(key, json);
            if !seen.insert(key) {
                node.error("is given twice; keep one");
            }
            (key.clone(), node)
        });
        members.collect()
    }

    /// An error for each of the members that were never asked for.
    pub fn refuse_others(self, problem: &str) {
        for (key, _) in self.members.iter().filter(|(key, _)| !self.known.contains(&key.as_str())) {
            self.node.report.borrow_mut().error(self.path_of(key), problem);
        }
    }

    fn path_of(&self, name: &str) -> String {
        let name = if name.is_empty() { "\"\"" } else { name };
        if self.node.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.node.path)
        }
    }

    fn child(&self, name: &str, json: &'a Json) -> Node<'a> {
        Node { json, path: self.path_of(name), report: self.node.report }
    }
}

/// Whether two names differ by at most two single-character edits (Levenshtein distance).
fn is_near(a: &str, b: &str) -> bool {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.len().abs_diff(b.len()) > 2 {
        return false;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()] <= 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_a_placeholder_is_dropped() {
        let unread = ["a", "b.c", "d[1]"].map(str::to_owned).into();
        let mut report = Report { unread, ..Report::default() };
        for (path, is_told, is_read) in [
            ("a", false, false),
            ("a.x", false, false),
            ("a[0]", false, false),
            ("a_b", true, true),
            ("b", true, false),
            ("b.c.x", false, false),
            ("b.d", true, true),
            ("d", true, false),
            ("d[1].x", false, false),
            ("d[10]", true, true),
        ] {
            report.error(path, "");
            let told = report.errors.pop().is_some();
            assert_eq!((told, report.has_read(path)), (is_told, is_read), "{path}");
        }
    }
}
