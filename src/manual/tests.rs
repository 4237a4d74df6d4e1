//! The README and the parsers agree with the one source.

use std::collections::BTreeSet;
use std::ffi::OsString;

use serde_json::{Map, Value};

use super::{Document, Flag, Kind, commands, flags, members};
use crate::cli;
use crate::spec::Spec;
use crate::spec::json::{Fault, Report};

const README: &str = include_str!("../../README.md");

/// Markdown without its links and line breaks: `[text](target)` is the text, and `([below](target))` nothing.
fn unlinked(markdown: &str) -> String {
    let mut text = String::new();
    let mut rest = markdown;
    while let Some((before, (word, after))) =
        rest.split_once('[').and_then(|(before, link)| Some((before, link.split_once("](")?)))
    {
        // A bracket that is no link, such as the one of "[a, b]".
        if word.contains([']', '[', '\n']) && word.contains(']') {
            text += &rest[..=before.len()];
            rest = &rest[before.len() + 1..];
            continue;
        }
        text += before;
        text += word;
        rest = after.split_once(')').expect("a link ends").1;
    }
    text += rest;
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").replace(" (below)", "")
}

/// The README's section of this title.
fn section(title: &str) -> &'static str {
    let (_, after) = README.split_once(&format!("\n## {title}\n")).expect(title);
    after.split_once("\n## ").map_or(after, |(section, _)| section)
}

/// The cells of all rows of its tables, without links.
fn rows(section: &str) -> Vec<Vec<String>> {
    let rows = section.lines().filter(|line| line.starts_with("| "));
    rows.map(|row| {
        let cells = row.trim_matches('|').split(" | ");
        cells.map(|cell| unlinked(cell).trim_matches(['|', ' ']).to_owned()).collect()
    })
    .collect()
}

#[test]
fn the_readme_has_the_commands_and_options() {
    let mut found = rows(section("Commands"));
    found.extend(rows(section("Working with a running box")));
    found.retain(|row| row[0].starts_with('`'));
    let mut expected = Vec::new();
    for verb in commands::VERBS {
        let words = format!("{}{}", verb.brief, verb.more);
        expected.push(vec![format!("`mote {}`", verb.synopsis), words]);
    }
    for (flag, _) in flags() {
        if flag.short.is_empty() {
            let (value, _) = flag.value.expect("a value");
            let words = format!("{}{}", flag.brief, flag.more);
            expected.push(vec![format!("`{} {value}`", flag.name), words]);
        }
    }
    assert_eq!(found, expected);
}

#[test]
fn the_readme_has_the_specs_members() {
    // What is in an object that has a row of its own is in that row.
    let in_a_row = |path: &str| {
        let (object, _) = path.split_once('.')?;
        let object = object.trim_end_matches("[]");
        members::MEMBERS.iter().find(|member| member.path == object)
    };
    let mut expected = vec![["field", "type", "meaning"].map(str::to_owned).to_vec()];
    for member in members::MEMBERS {
        match in_a_row(member.path) {
            None => {
                let mark = if member.default.is_none() { "*" } else { "" };
                let name = format!("`{}`{mark}", member.path);
                expected.push(vec![name, member.kind.into(), member.words.into()]);
            }
            Some(object) => {
                let name = member.path.rsplit('.').next().expect("a name");
                let named = object.words.contains(&format!("\"{name}\""));
                assert!(named || README.contains(&format!("`{name}`")), "{}", member.path);
            }
        }
    }
    assert_eq!(rows(section("The spec")), expected);
}

#[test]
fn the_readme_has_the_exit_codes() {
    let expected: Vec<Vec<String>> =
        commands::ENDS.iter().map(|row| row.map(str::to_owned).to_vec()).collect();
    assert_eq!(rows(section("Exit codes"))[1..], expected);
}

#[test]
fn the_readme_has_the_paragraphs() {
    let readme = unlinked(README);
    for paragraph in [
        commands::ABOUT,
        commands::ENVIRONMENT,
        commands::REPORTS,
        commands::SIGNALS,
        commands::SOCKETS,
        commands::CLIENT_ENDS,
        commands::BYTES,
        commands::COPY,
        members::FAULTS,
        members::CGROUP,
        members::RULES,
    ] {
        assert!(readme.contains(paragraph), "the README lacks: {paragraph}");
    }
    for line in commands::EXAMPLE.lines().chain(members::EXAMPLE.lines()) {
        assert!(README.contains(line.trim_end_matches('}')), "the README lacks: {line}");
    }
}

#[test]
fn the_readme_and_the_man_page_name_every_variable() {
    let source = include_str!("../plan/environment.rs").split("impl Environment").nth(1);
    let source = source.expect("the constructor");
    let page = Document::Command.text();
    let is_name = |text: &&str| {
        text.starts_with("MOTE_") && text.chars().all(|c| c.is_ascii_uppercase() || c == '_')
    };
    let names: BTreeSet<&str> = source.split('"').filter(is_name).collect();
    assert!(names.len() > 3, "{names:?}");
    for name in names {
        assert!(README.contains(&format!("`{name}")), "{name}");
        assert!(page.contains(name), "{name}");
    }
}

#[test]
fn the_parser_takes_the_options_of_each_command_and_no_others() {
    let operand = |kind: &Kind| match kind {
        Kind::OneOf(words) => vec![words[0]],
        Kind::Socket => vec!["socket"],
        Kind::CopyPath => vec![":/from", "to"],
        _ => vec!["--", "command"],
    };
    let value = |flag: &Flag| match (flag.name, flag.value) {
        ("--env", _) => Some("A=1"),
        ("--wait" | "--timeout", _) => Some("2s"),
        (_, Some(_)) => Some("{}"),
        _ => None,
    };
    for verb in commands::VERBS {
        for (flag, _) in flags().into_iter().filter(|(flag, _)| flag.name != "--version") {
            let mut words: Vec<&str> = verb.name.split_terminator(' ').collect();
            words.push(flag.name);
            words.extend(value(flag));
            let takes_spec = verb.flags.iter().any(|flag| flag.name == "--config");
            if takes_spec && !flag.name.starts_with("--config") {
                words.extend(["--config", "{}"]);
            }
            words.extend(verb.operands.iter().flat_map(operand));
            let parsed = cli::parse(words.iter().map(OsString::from));
            assert_eq!(parsed.is_ok(), verb.flags.contains(&flag), "{words:?}: {parsed:?}");
        }
    }
}

/// A spec that has every member, as the tables say.
fn whole_spec() -> Value {
    serde_json::json!({
        "box_id": "b", "vcpus": 1, "memory_mib": 64, "rootfs_path": "/r", "exec_socket_path": "/e",
        "pty_socket_path": "", "attest_socket_path": "", "port_forward_socket_path": "",
        "fs_mounts": [{"tag": "t", "host_path": "/t", "read_only": true}],
        "entrypoint": {
            "executable": "/bin/sh", "args": [], "env": [],
            "stdin": false, "terminal": false, "start": "at-once", "pid1": false
        },
        "console_output": null, "console_limit_bytes": null,
        "log_config": {"driver": "none", "options": {
            "max-size": null, "max-file": null, "syslog-address": null, "syslog-facility": null, "tag": null
        }},
        "workdir": "/", "user": null,
        "resource_limits": {
            "ulimits": [], "pids_limit": null, "cpuset_cpus": null, "cpu_shares": null,
            "cpu_quota": null, "cpu_period": null, "memory_reservation": null, "memory_swap": null
        },
        "port_map": [],
        "network": {
            "passt_socket_path": "/p", "ip_address": "10.0.0.2", "gateway": "10.0.0.1",
            "prefix_len": 24, "mac_address": [2, 0, 0, 0, 0, 1], "dns_servers": [],
            "net_socket_fd": null, "net_proxy_fd": null, "bridge_socket_dir": null,
            "joinable": false
        },
        "disable_tsi": false, "guest_agent": "mote", "egress": null, "tee_config": null,
        "process": {
            "uid": 1, "gid": 1, "additional_gids": [], "umask": null, "no_new_privileges": false,
            "capabilities": {
                "bounding": [], "effective": [], "inheritable": [], "permitted": [], "ambient": []
            }
        },
        "hostname": null, "domainname": null, "sysctls": [],
        "guest_mounts": [
            {"type": "tmpfs", "source": null, "destination": "/t", "options": []}
        ],
        "devices": null, "masked_paths": [], "readonly_paths": [], "read_only_root": false, "signals": "stop",
        "publish": "listed", "loopback": "own"
    })
}

/// The object that a member is in, and its name there.
fn place<'a>(spec: &'a mut Value, path: &str) -> (&'a mut Map<String, Value>, String) {
    let (objects, name) = path.rsplit_once('.').unwrap_or(("", path));
    let mut object = spec;
    for part in objects.split_terminator('.') {
        object = match part.strip_suffix("[]") {
            None => &mut object[part],
            Some(array) => &mut object[array][0],
        };
    }
    (object.as_object_mut().expect("an object"), name.to_owned())
}

fn parsed(spec: &Value) -> (Option<Spec>, Report) {
    let mut report = Report::default();
    let spec = Spec::parse(&spec.to_string(), &mut report).ok();
    (spec.filter(|_| report.errors.is_empty()), report)
}

#[test]
fn the_parser_has_the_specs_members_with_these_defaults() {
    let mut spec = whole_spec();
    let (whole, report) = parsed(&spec);
    assert!(whole.is_some(), "{:?}", report.errors);
    assert_eq!(report.warnings, []);
    for member in members::MEMBERS {
        let (object, name) = place(&mut spec, member.path);
        let value = object.remove(&name).expect(member.path);
        let (without, report) = parsed(&spec);
        if let Some(default) = member.default {
            let (object, name) = place(&mut spec, member.path);
            object.insert(name, serde_json::from_str(default).expect("the default is JSON"));
            assert!(without.is_some(), "{} is required", member.path);
            assert_eq!(without, parsed(&spec).0, "{}", member.path);
        } else {
            let missing = |fault: &Fault| fault.problem.starts_with("is missing");
            assert!(report.errors.iter().any(missing), "{} is optional", member.path);
        }
        let (object, name) = place(&mut spec, member.path);
        object.insert(name, value);
    }
}

#[test]
fn the_source_has_all_members_that_the_parser_reads() {
    // Later names of others, and what is there to be refused.
    const OTHERS: [&str; 13] = [
        "rootfs",
        "networks_json",
        "network_name",
        "ksm",
        "kind",
        "path",
        "net_socket_path",
        "net_stats_path",
        "sandbox_memory_limit_bytes",
        "config_path",
        "tee_type",
        "resource_limits",
        "name",
    ];
    let source = concat!(
        include_str!("../spec/mod.rs"),
        include_str!("../spec/network.rs"),
        include_str!("../spec/process.rs")
    );
    let asked = [".required(\"", ".optional(\"", ".nullable(\"", ".member(\"", ".refuse(\""]
        .into_iter()
        .flat_map(|call| source.split(call).skip(1));
    let asked: BTreeSet<&str> = asked.filter_map(|after| after.split('"').next()).collect();
    assert!(asked.len() > members::MEMBERS.len(), "{asked:?}");
    let documented = |name: &str| {
        members::MEMBERS.iter().any(|member| member.path.rsplit('.').next() == Some(name))
    };
    for name in asked {
        assert!(documented(name) || OTHERS.contains(&name), "src/manual/members.rs lacks {name}");
    }
}

#[test]
fn man_pages_are_ascii_and_their_lines_are_text_or_known_requests() {
    for document in [Document::Command, Document::Spec] {
        let page = document.text();
        assert!(page.is_ascii());
        for line in page.lines().filter(|line| line.starts_with(['.', '\''])) {
            let request = line.split(' ').next().expect("a word");
            assert!([".TH", ".SH", ".PP", ".TP", ".br", ".nf", ".fi"].contains(&request), "{line}");
        }
    }
}

#[test]
fn help_fits_a_terminal() {
    for line in Document::Help.text().lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
}
