//! Reading a JSON document so that every error has a position.
//!
//! serde's derived parsers stop at the first error and lose its position; a person fixing a spec
//! wants every error at once, each with its path. So the text becomes a [`Json`] tree that keeps
//! repeated keys, and [`Object`] reads the tree member by member and adds errors to a [`Report`].

use std::cell::RefCell;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// One error or warning about a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Where, as a path from the root (`fs_mounts[2].tag`); empty for the document itself.
    pub path: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.problem)
    }
}

/// Everything found while reading and checking one document, in the order it was found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report {
    /// What makes the document unusable.
    pub errors: Vec<Fault>,
    /// What is probably a mistake.
    pub warnings: Vec<Fault>,
}

impl Report {
    /// Adds an error.
    pub fn error(&mut self, path: impl Into<String>, problem: impl Into<String>) {
        self.errors.push(Fault { path: path.into(), problem: problem.into() });
    }

    /// Adds a warning.
    pub fn warn(&mut self, path: impl Into<String>, problem: impl Into<String>) {
        self.warnings.push(Fault { path: path.into(), problem: problem.into() });
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
    /// The root of a document.
    pub fn root(json: &'a Json, report: &'a RefCell<Report>) -> Self {
        Node { json, path: String::new(), report }
    }

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

    /// Whether this is `null`.
    pub fn is_null(&self) -> bool {
        *self.json == Json::Null
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

    /// Every item of an array, read by `item`; items that are wrong are reported and left out.
    pub fn array<T>(&self, item: impl Fn(&Node<'a>) -> Option<T>) -> Option<Vec<T>> {
        Some(self.items()?.iter().filter_map(item).collect())
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

    /// `null` as `None`, anything else as `read` reads it.
    pub fn nullable<T>(&self, read: impl Fn(&Node<'a>) -> Option<T>) -> Option<Option<T>> {
        if self.is_null() { Some(None) } else { read(self).map(Some) }
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
    /// A member that may be absent. A member that is given twice is an error (contract §1.1).
    pub fn optional(&mut self, name: &'static str) -> Option<Node<'a>> {
        self.known.push(name);
        let mut found = self.members.iter().filter(|(key, _)| key == name);
        let (_, json) = found.next()?;
        let node = self.child(name, json);
        if found.next().is_some() {
            node.error("is given twice; keep one");
        }
        Some(node)
    }

    /// A member that must be there.
    pub fn required(&mut self, name: &'static str, wanted: &str) -> Option<Node<'a>> {
        let node = self.optional(name);
        if node.is_none() {
            let path = self.path_of(name);
            self.node.report.borrow_mut().error(path, format!("is missing; give {wanted}"));
        }
        node
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

    fn path_of(&self, name: &str) -> String {
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
