//! Completions: commands, options, files and sockets, and nothing of the guest's.

use super::{Flag, Kind, Verb, commands, flags};

/// For bash.
pub fn bash() -> String {
    let valued = flags().into_iter().filter(|(flag, _)| flag.value.is_some());
    let valued: Vec<&str> = valued.map(|(flag, _)| flag.name).collect();
    let verbs = named().map(|verb| verb.name).collect::<Vec<_>>().join(" ");
    let mut options = String::new();
    let mut operands = String::new();
    for verb in commands::VERBS {
        options += &format!("        '{}') options='{}' ;;\n", verb.name, names(verb));
        for (index, kind) in verb.operands.iter().enumerate() {
            let last = index + 1 == verb.operands.len();
            let action = match kind {
                Kind::OneOf(words) => format!("_mote_words '{}'", words.join(" ")),
                Kind::File | Kind::CopyPath => "_mote_files".to_owned(),
                Kind::Socket => "_mote_sockets".to_owned(),
                Kind::GuestCommand | Kind::Text => continue,
            };
            let repeated = last && *kind == Kind::CopyPath;
            let pattern = if repeated { "[1-9]".to_owned() } else { index.to_string() };
            operands += &format!("        {}:{pattern}) {action} ;;\n", verb.name);
        }
    }
    let files = flags().into_iter().filter(|(flag, _)| matches!(flag.value, Some((_, Kind::File))));
    let files = files.map(|(flag, _)| flag.name).collect::<Vec<_>>().join("|");
    fill(
        include_str!("completions.bash"),
        &[
            ("VERBS", &verbs),
            ("VALUED", &valued.join("|")),
            ("FILES", &files),
            ("OPTIONS", options.trim()),
            ("OPERANDS", operands.trim()),
        ],
    )
}

/// For zsh.
pub fn zsh() -> String {
    let mut verbs = String::new();
    let mut cases = String::new();
    let mut run = String::new();
    for verb in commands::VERBS {
        let flags = verb.flags.iter().copied().chain([commands::HELP]).map(zsh_flag);
        let operands = verb.operands.iter().enumerate().map(|(index, kind)| {
            let action = match kind {
                Kind::OneOf(words) => format!("word:({})", words.join(" ")),
                Kind::File | Kind::CopyPath => "file:_files".to_owned(),
                Kind::Socket => "socket:_files -g \"*(=)\"".to_owned(),
                Kind::GuestCommand | Kind::Text => "command of the guest: ".to_owned(),
            };
            // The last one may be repeated.
            if index > 0 { format!("'*:{action}'") } else { format!("'1:{action}'") }
        });
        let arguments = flags.chain(operands).collect::<Vec<_>>().join(" ");
        if verb.name.is_empty() {
            run = arguments;
        } else {
            verbs += &format!("        '{}:{}'\n", verb.name, zsh_words(verb.brief));
            cases += &format!("        {}) arguments=({arguments}) ;;\n", verb.name);
        }
    }
    let texts = [("VERBS", verbs.trim()), ("CASES", cases.trim()), ("RUN", &run)];
    fill(include_str!("completions.zsh"), &texts)
}

fn zsh_flag(flag: &Flag) -> String {
    let words = zsh_words(flag.brief);
    match flag.value {
        Some((name, kind)) => {
            let action = if kind == Kind::File { "_files" } else { " " };
            format!("'{}=[{words}]:{name}:{action}'", flag.name)
        }
        None => format!("'(- *)'{{{},{}}}'[{words}]'", flag.short, flag.name),
    }
}

/// In single quotes, in brackets, before a colon.
fn zsh_words(words: &str) -> String {
    plain(words).replace(':', "\\:").replace('\'', "'\\''")
}

/// For fish.
pub fn fish() -> String {
    let mut lines = String::new();
    for verb in named() {
        lines += &format!(
            "complete -c mote -n '__mote_at run 0' -a {} -d '{}'\n",
            verb.name,
            fish_words(verb.brief)
        );
    }
    for verb in commands::VERBS {
        let name = if verb.name.is_empty() { "run" } else { verb.name };
        for flag in verb.flags.iter().chain([&commands::HELP]) {
            let long = flag.name.trim_start_matches('-');
            let short = flag.short.trim_start_matches('-');
            let short = if short.is_empty() { String::new() } else { format!(" -s {short}") };
            let value = match flag.value {
                Some((_, Kind::File)) => " -r -F",
                Some(_) => " -x",
                None => "",
            };
            lines += &format!(
                "complete -c mote -n '__mote_at {name}' -l {long}{short}{value} -d '{}'\n",
                fish_words(flag.brief)
            );
        }
        for (index, kind) in verb.operands.iter().enumerate() {
            let what = match kind {
                Kind::OneOf(words) => format!("-a '{}'", words.join(" ")),
                Kind::File | Kind::CopyPath => "-F".to_owned(),
                Kind::Socket => "-a '(__mote_sockets)'".to_owned(),
                Kind::GuestCommand | Kind::Text => continue,
            };
            let place = if *kind == Kind::CopyPath {
                format!("{index} {}", index + 1)
            } else {
                index.to_string()
            };
            lines += &format!("complete -c mote -n '__mote_at {name} {place}' {what}\n");
        }
    }
    let valued = flags().into_iter().filter(|(flag, _)| flag.value.is_some());
    let valued: Vec<&str> = valued.map(|(flag, _)| flag.name).collect();
    let verbs: Vec<&str> = named().map(|verb| verb.name).collect();
    fill(
        include_str!("completions.fish"),
        &[("VERBS", &verbs.join(" ")), ("VALUED", &valued.join(" ")), ("LINES", lines.trim())],
    )
}

fn fish_words(words: &str) -> String {
    plain(words).replace('\'', "\\'")
}

fn named() -> impl Iterator<Item = &'static Verb> {
    commands::VERBS.iter().filter(|verb| !verb.name.is_empty())
}

/// All that can follow as an option.
fn names(verb: &Verb) -> String {
    let flags = verb.flags.iter().copied().chain([commands::HELP]);
    let names = flags.flat_map(|flag| [flag.short, flag.name]).filter(|name| !name.is_empty());
    names.collect::<Vec<_>>().join(" ")
}

fn plain(words: &str) -> String {
    words.replace('`', "")
}

/// Puts texts in the places `@NAME@` of a template.
fn fill(template: &str, texts: &[(&str, &str)]) -> String {
    texts
        .iter()
        .fold(template.to_owned(), |text, (name, value)| text.replace(&format!("@{name}@"), value))
}
