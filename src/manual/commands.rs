//! The commands, their options, and how they end.

use super::{Flag, Kind, Verb};

const CONFIG: &Flag = &Flag {
    name: "--config",
    short: "",
    value: Some(("JSON", Kind::Text)),
    brief: "the spec",
    more: "",
};
const CONFIG_FILE: &Flag = &Flag {
    name: "--config-file",
    short: "",
    value: Some(("FILE", Kind::File)),
    brief: "the spec from a file, `-` for standard input",
    more: ": better for secrets, since other users see `--config JSON` (`ps`) until mote has read and overwritten it",
};
const OUTCOME: &Flag = &Flag {
    name: "--outcome",
    short: "",
    value: Some(("FILE", Kind::File)),
    brief: "write how the box ended, as one JSON object",
    more: "",
};
const TIMELINE: &Flag = &Flag {
    name: "--timeline",
    short: "",
    value: Some(("FILE", Kind::File)),
    brief: "write when what happened, in microseconds since mote started",
    more: " (also `MOTE_TIMELINE`)",
};
const LOG: &Flag = &Flag {
    name: "--log",
    short: "",
    value: Some(("FILE", Kind::File)),
    brief: "write mote's messages and the kernel's errors there",
    more: ", in place of stderr, which is the entrypoint's alone then",
};
const CGROUP: &Flag = &Flag {
    name: "--cgroup",
    short: "",
    value: Some(("DIR", Kind::File)),
    brief: "run in this cgroup (v2), which is there already",
    more: ", with all that serves the guest; mote's janitor and whoever makes a template stay outside",
};
const ENV: &Flag = &Flag {
    name: "--env",
    short: "",
    value: Some(("NAME=VALUE", Kind::Text)),
    brief: "set a variable, over those of the box",
    more: "; may be repeated",
};
const USER: &Flag = &Flag {
    name: "--user",
    short: "",
    value: Some(("USER", Kind::Text)),
    brief: "run as `uid`, `uid:gid`, `name` or `name:group`",
    more: ", as in the spec",
};
const WORKDIR: &Flag = &Flag {
    name: "--workdir",
    short: "",
    value: Some(("DIR", Kind::Text)),
    brief: "start in this directory of the guest",
    more: "",
};
const TIMEOUT: &Flag = &Flag {
    name: "--timeout",
    short: "",
    value: Some(("DURATION", Kind::Text)),
    brief: "kill the command after this: `30`, `1.5s`, `500ms`, `2m`, `1h`",
    more: "; without it there is no limit",
};
const WAIT: &Flag = &Flag {
    name: "--wait",
    short: "",
    value: Some(("DURATION", Kind::Text)),
    brief: "how long a box may take to have its socket, and to answer there",
    more: ". Without it the socket must be there, and the answer may take 10 s. A command is sent once, and only to a guest that has answered",
};
/// What every command has.
pub const HELP: &Flag =
    &Flag { name: "--help", short: "-h", value: None, brief: "print the help text", more: "" };
const VERSION: &Flag =
    &Flag { name: "--version", short: "-V", value: None, brief: "print the version", more: "" };

/// The commands.
pub const VERBS: &[Verb] = &[
    Verb {
        name: "",
        synopsis: "--config JSON",
        flags: &[CONFIG, CONFIG_FILE, OUTCOME, TIMELINE, LOG, CGROUP, VERSION],
        operands: &[],
        brief: "run the box that the spec describes",
        more: "",
    },
    Verb {
        name: "check",
        synopsis: "check --config JSON",
        flags: &[CONFIG, CONFIG_FILE],
        operands: &[],
        brief: "print the plan, or every error in the spec with its path",
        more: "; exit code 2 if there are any",
    },
    Verb {
        name: "template",
        synopsis: "template --config JSON",
        flags: &[CONFIG, CONFIG_FILE],
        operands: &[],
        brief: "make the template that boxes like this start from, and say where it is",
        more: "; the first start of such a box does that, too, in the background. Exit code 1 if it cannot be made",
    },
    Verb {
        name: "probe",
        synopsis: "probe",
        flags: &[],
        operands: &[],
        brief: "say whether this host can run boxes",
        more: " and, if not, what to change",
    },
    Verb {
        name: "exec",
        synopsis: "exec SOCKET -- CMD [ARG...]",
        flags: &[ENV, USER, WORKDIR, TIMEOUT, WAIT],
        operands: &[Kind::Socket, Kind::GuestCommand],
        brief: "run a command in a running box",
        more: ", on mote's standard input, output and error",
    },
    Verb {
        name: "pty",
        synopsis: "pty SOCKET -- CMD [ARG...]",
        flags: &[ENV, USER, WORKDIR, WAIT],
        operands: &[Kind::Socket, Kind::GuestCommand],
        brief: "run a command in a running box on a terminal",
        more: " of its own, shown on yours",
    },
    Verb {
        name: "cp",
        synopsis: "cp SOCKET SRC DST",
        flags: &[WAIT],
        operands: &[Kind::Socket, Kind::CopyPath],
        brief: "copy a file into a running box or out of it",
        more: ": `:PATH` is the guest's, with `/` at the end a directory; `-` is standard input or output",
    },
    Verb {
        name: "man",
        synopsis: "man PAGE",
        flags: &[],
        operands: &[Kind::OneOf(&["mote.1", "mote-spec.5"])],
        brief: "print a man page",
        more: ", `mote.1` or `mote-spec.5`",
    },
    Verb {
        name: "completions",
        synopsis: "completions SHELL",
        flags: &[],
        operands: &[Kind::OneOf(&["bash", "zsh", "fish"])],
        brief: "print the completions for a shell",
        more: ": `bash`, `zsh` or `fish`",
    },
];

/// What mote is.
pub const ABOUT: &str = "mote runs one sandbox as one KVM virtual machine. It is one static binary: give it an `InstanceSpec` (JSON), and it boots its own Linux kernel on a directory of yours, runs the entrypoint, passes its output on, and exits with its exit code.";

/// What mote finds outside the spec.
pub const ENVIRONMENT: &str = "mote needs `/dev/kvm` (being in group `kvm` is enough) and nothing else: the guest's kernel and agent, and virtiofsd, which serves its file systems, are in its one file. `MOTE_DEBUG=1` shows all kernel messages; `MOTE_KERNEL`, `MOTE_INITRAMFS` and `MOTE_VIRTIOFSD` (1.13 or newer) name others to use instead; `MOTE_TEMPLATES` names the directory of the templates that boxes start from (`~/.cache/mote/templates`), or `off`; `MOTE_OWN_TEXT=1` gives a box memory of its own for all of its kernel's text; `MOTE_NO_SANDBOX=1` leaves mote unconfined, for debugging it.";

/// What is to be known of the files that a run writes.
pub const REPORTS: &str = "`--outcome` and `--timeline` files are created at the start, mode 0600: an outcome that stays empty says that mote was killed. A FIFO must have a reader within 5 s.";

/// What signals do.
pub const SIGNALS: &str = "SIGTERM, SIGINT, SIGHUP and SIGQUIT go to every process of the box; what has not ended after 5 s is killed, and mote exits with the entrypoint's code. A second signal, or 8 s without an end, stops the box hard; the same signal within a second is one request. Before the guest runs, the first ends mote at once. Messages of mote's own are lines on stderr that start with `mote:`.";

/// What SOCKET is.
pub const SOCKETS: &str =
    "SOCKET is the spec's `exec_socket_path`; for `pty`, its `pty_socket_path`.";

/// How the commands end that work with a running box.
pub const CLIENT_ENDS: &str = "The exit code is the command's own: 128+n if signal n killed it. Otherwise there is one line on stderr, and it is 127: the guest has no such command; 126: it cannot be executed; 137: its time limit; 125: no such user or directory in the guest, there is no box, or it ended first; 2: wrong command line; for `cp`, 1: the guest or this host refused. Without a line, 141: nobody reads the output; for `pty` and downloads, 128+n: signal n ended mote itself.";

/// What may stand in a command.
pub const BYTES: &str =
    "Commands, variables and the guest's paths need not be UTF-8, unless the agent is not mote's.";

/// `cp`'s limits.
pub const COPY: &str = "`cp` copies one regular file and its permission bits, into a directory that is there. A download has its name only when it is whole. For directories: `tar -c -C DIR . | mote exec SOCKET -- tar -x -C GUEST_DIR`.";

/// Commands to copy.
pub const EXAMPLE: &str = r#"mote exec --user www-data --workdir /srv "$box/exec.sock" -- tar -c . > srv.tar
mote pty "$box/pty.sock" -- bash
mote cp "$box/exec.sock" app.conf :/etc/"#;

/// How a run ends: exit code, meaning, and the kind in the outcome file.
pub const ENDS: &[[&str; 3]] = &[
    ["0–255", "the entrypoint's own", "`exited`"],
    ["128+n", "signal n killed the entrypoint, or stopped mote before the guest ran", "`signaled`"],
    [
        "127, 126, 125",
        "the entrypoint was not found; is not executable; the guest could not set it up",
        "`entrypoint-not-started`",
    ],
    [
        "125",
        "mote could not start the box: spec, host, a back-end that did not come up (10 s, and up to 2 min while it is at work) or died before the box had its file systems",
        "`not-started`",
    ],
    [
        "125",
        "the box is to be a confidential VM (`tee_config`), which mote does not run",
        "`tee-unavailable`",
    ],
    ["124", "a back-end (virtiofsd) died after that", "`backend-died`"],
    ["123", "the guest kernel panicked or crashed", "`guest-crashed`"],
    ["122", "the guest ended without an exit status", "`no-status`"],
    ["121", "stopped hard", "`stopped`"],
    [
        "120",
        "mote itself is broken, or broken into: it tried a system call that it never makes, or came upon a fault of its own or of the host's; or the host took guest memory away",
        "`refused`, `internal-error`, `memory-gone`",
    ],
    ["2", "wrong command line, or `mote check` found errors", ""],
];
