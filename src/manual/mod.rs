//! What mote's commands, options, exit codes and the spec's members are called, and what they mean: one
//! source for the help text, the man pages and the completions. The README's tables have the same words,
//! and the parsers know the same names; the unit tests hold both against this.
//!
//! Texts are the README's Markdown as far as that goes: `` `literal` ``, and nothing else.

mod commands;
mod completions;
mod help;
mod man;
mod members;
#[cfg(test)]
mod tests;

/// What a word on the command line stands for: how shells complete it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// A file of this host.
    File,
    /// A socket of this host.
    Socket,
    /// A path of this host's or, after a `:`, the guest's.
    CopyPath,
    /// A command of the guest's, up to the end of the line.
    GuestCommand,
    /// What only the user knows.
    Text,
}

/// An option, such as `--user USER`.
#[derive(Debug, PartialEq, Eq)]
pub struct Flag {
    /// Its name, with the hyphens.
    pub name: &'static str,
    /// Its one-letter name; empty if it has none.
    pub short: &'static str,
    /// Name and kind of its value.
    pub value: Option<(&'static str, Kind)>,
    /// What it does, in a few words.
    pub brief: &'static str,
    /// How that sentence goes on where there is room.
    pub more: &'static str,
}

/// A command, such as `mote exec`.
#[derive(Debug, PartialEq, Eq)]
pub struct Verb {
    /// The word after `mote`; empty for a run.
    pub name: &'static str,
    /// What is to follow `mote`.
    pub synopsis: &'static str,
    /// Its options, but for `--help`, which all have.
    pub flags: &'static [&'static Flag],
    /// Its operands in order; the last one may be repeated.
    pub operands: &'static [Kind],
    /// What it does, in a few words.
    pub brief: &'static str,
    /// How that sentence goes on where there is room.
    pub more: &'static str,
}

/// A member of the spec, or of an object in it.
#[derive(Debug)]
pub struct Member {
    /// Its path from the root of the spec.
    pub path: &'static str,
    /// Its type.
    pub kind: &'static str,
    /// The value, as JSON, that its absence means; `None` if it is required.
    pub default: Option<&'static str>,
    /// What it means.
    pub words: &'static str,
}

/// A text for users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Document {
    /// `--help`.
    Help,
    /// The man page of the command.
    Command,
    /// The man page of the spec.
    Spec,
    /// Completions for bash.
    Bash,
    /// Completions for zsh.
    Zsh,
    /// Completions for fish.
    Fish,
}

impl Document {
    /// The document that a command of this name prints when it is given this operand.
    pub fn named(verb: &str, operand: &str) -> Option<Document> {
        let found = match (verb, operand) {
            ("man", "mote.1") => Document::Command,
            ("man", "mote-spec.5") => Document::Spec,
            ("completions", "bash") => Document::Bash,
            ("completions", "zsh") => Document::Zsh,
            ("completions", "fish") => Document::Fish,
            _ => return None,
        };
        Some(found)
    }

    /// The whole text.
    pub fn text(self) -> String {
        match self {
            Document::Help => help::text(),
            Document::Command => man::command(),
            Document::Spec => man::spec(),
            Document::Bash => completions::bash(),
            Document::Zsh => completions::zsh(),
            Document::Fish => completions::fish(),
        }
    }
}

/// All options, each with the names of the commands that have it (`run` for the one without a name).
fn flags() -> Vec<(&'static Flag, Vec<&'static str>)> {
    let mut flags: Vec<(&Flag, Vec<&str>)> = Vec::new();
    for verb in commands::VERBS {
        let name = if verb.name.is_empty() { "run" } else { verb.name };
        for flag in verb.flags {
            match flags.iter_mut().find(|(known, _)| known == flag) {
                Some((_, verbs)) => verbs.push(name),
                None => flags.push((flag, vec![name])),
            }
        }
    }
    flags
}
