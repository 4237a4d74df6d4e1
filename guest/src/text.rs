//! Words, variables and paths of the guest, which are bytes on Linux, not text.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::ops::Deref;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};

/// A string of Linux. In JSON it is a string, as the contract has it; one that is not UTF-8 is an array of
/// bytes, which is mote's own: an agent that does not know it refuses the request, and never runs another
/// command than was meant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Text(OsString);

impl<T: Into<OsString>> From<T> for Text {
    fn from(text: T) -> Self {
        Text(text.into())
    }
}

impl Deref for Text {
    type Target = OsStr;

    fn deref(&self) -> &OsStr {
        &self.0
    }
}

impl PartialEq<&str> for Text {
    fn eq(&self, other: &&str) -> bool {
        self.0 == *other
    }
}

/// For messages: what is not UTF-8 is replaced.
impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Path::new(&self.0).display().fmt(f)
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.to_str() {
            Some(text) => serializer.serialize_str(text),
            None => serializer.collect_seq(self.0.as_bytes()),
        }
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Text, E> {
                Ok(text.into())
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Text, A::Error> {
                let mut bytes = Vec::new();
                while let Some(byte) = seq.next_element()? {
                    bytes.push(byte);
                }
                Ok(OsString::from_vec(bytes).into())
            }
        }
        deserializer.deserialize_any(TextVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_a_string_and_other_bytes_are_an_array() {
        for (bytes, json) in [
            (&b""[..], r#""""#),
            (b"a \"b\"", r#""a \"b\"""#),
            ("\u{e9}".as_bytes(), "\"\u{e9}\""),
            (b"a\xff", "[97,255]"),
        ] {
            let text = Text::from(OsStr::from_bytes(bytes));
            assert_eq!(serde_json::to_string(&text).expect("serialises"), json);
            assert_eq!(serde_json::from_str::<Text>(json).expect("parses"), text);
        }
        // Whoever writes all of them as bytes is understood, too.
        assert_eq!(serde_json::from_str::<Text>("[97]").expect("parses"), "a");
        for json in ["5", "[256]", "[\"a\"]", "null", "{}"] {
            assert!(serde_json::from_str::<Text>(json).is_err(), "{json}");
        }
    }
}
