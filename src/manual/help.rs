//! The help text: everything on one screen or two.

use super::{Flag, commands, flags};

/// The column that descriptions start in.
const INDENT: usize = 29;
/// The last column of a line.
const WIDTH: usize = 80;

/// The text of `--help`.
pub fn text() -> String {
    let mut text = String::from("mote: run one sandbox as a virtual machine\n\nusage:\n");
    for verb in commands::VERBS {
        entry(&mut text, &format!("mote {}", verb.synopsis), verb.brief, verb.more);
    }
    text += "\noptions, after the command's name:\n";
    for (flag, verbs) in flags() {
        let more = format!("{} ({})", flag.more, verbs.join(", "));
        entry(&mut text, &usage(flag), flag.brief, &more);
    }
    let help = commands::HELP;
    entry(&mut text, &usage(help), help.brief, help.more);
    for paragraph in [commands::SOCKETS, commands::ENVIRONMENT] {
        text.push('\n');
        wrap(&mut text, &plain(paragraph), 0, 0);
    }
    text
}

/// An option with its short name and its value, such as `-h, --help` and `--user USER`.
fn usage(flag: &Flag) -> String {
    let short = if flag.short.is_empty() { "" } else { ", " };
    let value = flag.value.map(|(name, _)| format!(" {name}")).unwrap_or_default();
    format!("{}{short}{}{value}", flag.short, flag.name)
}

fn entry(text: &mut String, usage: &str, brief: &str, more: &str) {
    *text += "  ";
    *text += usage;
    let mut column = 2 + usage.len();
    if column + 2 > INDENT {
        text.push('\n');
        column = 0;
    }
    *text += &" ".repeat(INDENT - column);
    wrap(text, &plain(&format!("{brief}{more}")), INDENT, INDENT);
}

/// Appends words in lines, which start in column `indent`; the first goes on in column `column`.
fn wrap(text: &mut String, words: &str, indent: usize, mut column: usize) {
    let mut at_start = true;
    for word in words.split(' ') {
        let len = word.chars().count();
        if !at_start && column + 1 + len > WIDTH {
            *text += &format!("\n{}", " ".repeat(indent));
            column = indent;
        } else if !at_start {
            text.push(' ');
            column += 1;
        }
        *text += word;
        column += len;
        at_start = false;
    }
    text.push('\n');
}

fn plain(words: &str) -> String {
    words.replace('`', "")
}
