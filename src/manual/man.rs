//! The man pages, in the macros of man(7).

use super::{Flag, Verb, commands, flags, members};

/// The page `mote(1)`.
pub fn command() -> String {
    let mut page = Page::new("MOTE", "1", "mote", "run one sandbox as a virtual machine");
    page.section("SYNOPSIS");
    for verb in commands::VERBS {
        page.usage(verb);
    }
    page.section("DESCRIPTION");
    page.paragraph(commands::ABOUT);
    page.section("COMMANDS");
    for verb in commands::VERBS {
        page.item(&literal(&format!("mote {}", verb.synopsis)), verb.brief, verb.more);
    }
    page.section("OPTIONS");
    for (flag, verbs) in flags() {
        let more = format!("{} ({})", flag.more, verbs.join(", "));
        page.item(&option(flag), flag.brief, &more);
    }
    page.item(&option(commands::HELP), commands::HELP.brief, commands::HELP.more);
    page.paragraph(commands::REPORTS);
    page.section("RUNNING BOXES");
    page.paragraph(commands::SOCKETS);
    page.paragraph(commands::BYTES);
    page.paragraph(commands::COPY);
    page.section("SIGNALS");
    page.paragraph(commands::SIGNALS);
    page.section("ENVIRONMENT");
    page.paragraph(commands::ENVIRONMENT);
    page.section("EXIT STATUS");
    page.paragraph("The exit code of a run, and the kind of its end in the `--outcome` file:");
    for [code, meaning, kind] in commands::ENDS {
        let kind = if kind.is_empty() { String::new() } else { format!(": {kind}") };
        page.item(&literal(code), meaning, &kind);
    }
    page.paragraph("Of `exec`, `pty` and `cp`:");
    page.paragraph(commands::CLIENT_ENDS);
    page.section("EXAMPLES");
    page.verbatim(commands::EXAMPLE);
    page.section("SEE ALSO");
    page.paragraph("`mote-spec`(5), `passt`(1), `kvm`(4)");
    page.roff
}

/// The page `mote-spec(5)`.
pub fn spec() -> String {
    let mut page = Page::new("MOTE-SPEC", "5", "mote-spec", "the spec of a box");
    page.section("DESCRIPTION");
    page.paragraph("What `mote`(1) runs: one JSON object, the `InstanceSpec` of the box.");
    page.paragraph(members::FAULTS);
    page.section("MEMBERS");
    for member in members::MEMBERS {
        let need = match member.default {
            None => "required".to_owned(),
            Some(default) => format!("default: {default}"),
        };
        let heading =
            format!("{} ({}, {})", literal(member.path), escaped(member.kind), escaped(&need));
        page.item(&heading, member.words, "");
    }
    page.section("LIMITS");
    page.paragraph(members::CGROUP);
    page.section("RULES");
    page.paragraph(members::RULES);
    page.section("EXAMPLES");
    page.verbatim(members::EXAMPLE);
    page.section("SEE ALSO");
    page.paragraph("`mote`(1)");
    page.roff
}

struct Page {
    roff: String,
}

impl Page {
    fn new(title: &str, section: &str, name: &str, is: &str) -> Self {
        let version = env!("CARGO_PKG_VERSION");
        let mut page = Page { roff: format!(".TH {title} {section} \"\" \"mote {version}\"\n") };
        page.section("NAME");
        page.roff += &format!("{} \\- {}\n", escaped(name), escaped(is));
        page
    }

    fn section(&mut self, title: &str) {
        self.roff += &format!(".SH \"{title}\"\n");
    }

    fn usage(&mut self, verb: &Verb) {
        let options = if verb.flags.is_empty() { "" } else { " [OPTION...]" };
        let (name, operands) = verb.synopsis.split_at(verb.name.len());
        let separator = if name.is_empty() { "" } else { " " };
        let usage = format!("mote{separator}{name}");
        let operands = format!("{options} {}", operands.trim_start());
        self.roff += &format!("{}{}\n.br\n", literal(&usage), escaped(operands.trim_end()));
    }

    fn paragraph(&mut self, words: &str) {
        self.roff += &format!(".PP\n{}\n", marked(words));
    }

    fn item(&mut self, heading: &str, brief: &str, more: &str) {
        self.roff += &format!(".TP\n{heading}\n{}\n", marked(&format!("{brief}{more}")));
    }

    fn verbatim(&mut self, text: &str) {
        self.roff += &format!(".PP\n.nf\n{}\n.fi\n", escaped(text));
    }
}

fn option(flag: &Flag) -> String {
    let short = if flag.short.is_empty() { String::new() } else { literal(flag.short) + ", " };
    let value = flag.value.map(|(name, _)| format!(" \\fI{}\\fR", escaped(name)));
    short + &literal(flag.name) + &value.unwrap_or_default()
}

fn literal(text: &str) -> String {
    format!("\\fB{}\\fR", escaped(text))
}

/// Text with `` `literal` `` parts.
fn marked(words: &str) -> String {
    let mut roff = String::new();
    for (index, part) in words.split('`').enumerate() {
        roff += &if index % 2 == 1 { literal(part) } else { escaped(part) };
    }
    roff
}

/// Text as it is: no character of it is markup, whatever starts its lines, and all are ASCII.
fn escaped(text: &str) -> String {
    let mut roff = String::new();
    let mut at_start = true;
    for char in text.chars() {
        match char {
            '.' | '\'' if at_start => roff.extend(["\\&", if char == '.' { "." } else { "\\(aq" }]),
            '\\' => roff += "\\(rs",
            '-' => roff += "\\-",
            '\'' => roff += "\\(aq",
            '–' => roff += "\\(en",
            '…' => roff += "...",
            '≥' => roff += "\\(>=",
            _ => roff.push(char),
        }
        at_start = char == '\n';
    }
    roff
}
