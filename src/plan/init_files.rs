//! The files by which the runtimes of 3.2 and 3.3 tell a guest init what to run, and hear how it ended (contract
//! §2.12), for boxes in which mote's agent takes the init's place.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::output_file::OutputFile;
use crate::spec::json::Report;
use crate::spec::{FsMount, Spec};
use crate::sys;

/// The share with the boot config: its tag, and the file's name.
const BOOT: (&str, &str) = ("a3s-boot", "config.json");
/// Where an init has that file.
const BOOT_PATH: &str = "/run/a3s-box/boot/config.json";
/// The share for the exit code.
const TERMINAL: (&str, &str) = ("a3s-terminal", "status.json");
/// The file for the exit code in the image, where there is no such share.
const EXIT_CODE: &str = ".a3s_exit_code";

const BOOT_SCHEMA: &str = "a3s.box.guest-boot.v1";
const EXEC_SCHEMA: &str = "a3s.box.guest-exec.v1";
const TERMINAL_SCHEMA: &str = "a3s.box.guest-terminal.v1";

/// Most bytes of a boot config. The runtime has no limit for a file of variables, which is as long.
const MAX_BOOT_BYTES: u64 = 4 << 20;
/// Most bytes of the file with the main process alone.
const MAX_EXEC_BYTES: u64 = 1 << 20;

/// A variable that stands for others, whose values an init reads from files in the box.
pub(super) const SECRETS: &str = "A3S_BOX_SECRET_ENV_V1";

/// What to do about a file that is not as the runtime writes it.
const REMEDY: &str = "have the runtime write it again";

/// The main process. `stdin_null` says whether its input is `/dev/null`, which it is in any case.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Exec {
    /// Program.
    pub executable: String,
    /// Arguments after `argv[0]`.
    pub args: Vec<String>,
    /// Directory it starts in.
    pub workdir: String,
    /// User to run it as.
    pub user: Option<String>,
    #[serde(rename = "stdin_null")]
    pub _stdin_null: bool,
}

/// A boot config.
#[derive(Debug, Default)]
pub(super) struct Boot {
    /// The main process.
    pub exec: Exec,
    /// Its environment, in order.
    pub environment: Vec<(String, String)>,
    /// What the box sees in place of the image's own.
    pub host: Host,
}

/// A boot config as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenBoot {
    /// What the init is to do; left out for a box.
    mode: Option<String>,
    exec: Value,
    environment: Vec<(String, String)>,
    #[serde(default)]
    host: Host,
}

/// What a box sees in place of the image's own; `None` leaves that as it is.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Host {
    /// Host name, and the text of `/etc/hostname`.
    pub hostname: Option<String>,
    /// Text of `/etc/resolv.conf`.
    pub resolv_conf: Option<String>,
    /// Text of `/etc/hosts`.
    pub hosts: Option<String>,
}

/// Whether a share is meant for the init alone.
pub(super) fn is_inits_share(tag: &str) -> bool {
    [BOOT.0, TERMINAL.0].contains(&tag)
}

/// Reads the boot config. `place` is where an init has it.
///
/// # Errors
/// What is wrong with which file, and what to change.
pub(super) fn read_boot(spec: &Spec, place: &str) -> Result<Boot, String> {
    if place != BOOT_PATH {
        return Err(format!("is \"{place}\", must be {BOOT_PATH}"));
    }
    let (tag, name) = BOOT;
    let share = share(spec, tag).ok_or_else(|| {
        format!("needs the share '{tag}' with the file {name}; add it to fs_mounts")
    })?;
    read(&share.host_path, Path::new(name), MAX_BOOT_BYTES, |text| {
        let WrittenBoot { mode, exec, environment, host } = with_schema(json(text)?, BOOT_SCHEMA)?;
        if let Some(mode) = mode.filter(|mode| mode != "workload") {
            return Err(format!("has the mode \"{mode}\", which needs a guest init in the image"));
        }
        Ok(Boot { exec: exec_of(exec)?, environment: checked(environment)?, host })
    })
}

/// Reads the file in the image that names the main process.
///
/// # Errors
/// What is wrong with which file, and what to change.
pub(super) fn read_exec(spec: &Spec, place: &str) -> Result<Exec, String> {
    read(&spec.rootfs_path, Path::new(place), MAX_EXEC_BYTES, |text| exec_of(json(text)?))
}

fn exec_of(value: Value) -> Result<Exec, String> {
    let exec: Exec = with_schema(value, EXEC_SCHEMA)?;
    let Exec { executable, args, workdir, user, .. } = &exec;
    if executable.is_empty() {
        return Err("has an empty executable; name a program".into());
    }
    if !workdir.starts_with('/') {
        return Err(format!("has the workdir \"{workdir}\", must be an absolute path"));
    }
    if [executable, workdir].into_iter().chain(args).chain(user).any(|text| text.contains('\0')) {
        return Err("has a NUL character, which no program can receive".into());
    }
    Ok(exec)
}

/// Reads the file in the image with the main process's variables, a line for each, of whose values `decode` gives the
/// text, or what is wrong with it.
///
/// # Errors
/// What is wrong with which file, and what to change.
pub(super) fn read_environment(
    spec: &Spec,
    place: &str,
    decode: impl Fn(&str) -> Option<String>,
) -> Result<Vec<(String, String)>, String> {
    read(&spec.rootfs_path, Path::new(place), MAX_BOOT_BYTES, |text| {
        let lines = text.lines().enumerate().map(|(index, line)| {
            let variable = line.split_once('=').and_then(|(name, value)| {
                Some((name.to_owned(), decode(value)?))
            });
            let number = index + 1;
            variable.ok_or_else(|| {
                format!("has no variable NAME=VALUE in line {number}, encoded as BOX_EXEC_B64 says; {REMEDY}")
            })
        });
        checked(lines.collect::<Result<_, _>>()?)
    })
}

/// The variables, if a program can receive them.
fn checked(variables: Vec<(String, String)>) -> Result<Vec<(String, String)>, String> {
    let is_wrong = |(name, value): &&(String, String)| {
        name.is_empty() || name.contains(['=', '\0']) || value.contains('\0')
    };
    match variables.iter().find(is_wrong) {
        None => Ok(variables),
        Some((name, _)) => Err(format!(
            "has the variable \"{}\": a name must not be empty or contain =, and nothing NUL",
            name.escape_debug()
        )),
    }
}

/// Reads one file below a directory of the host that a guest may have written to.
fn read<T>(
    directory: &Path,
    path: &Path,
    limit: u64,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<T, String> {
    let parsed = match sys::read_below(directory, path, limit + 1) {
        Ok(bytes) if bytes.len() as u64 > limit => {
            Err(format!("has more than {limit} bytes; shorten the command or its environment"))
        }
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => parse(&text),
            Err(_) => Err(format!("is not UTF-8; {REMEDY}")),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Err(format!("is not there; {REMEDY}")),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            Err(format!("is no regular file; {REMEDY}"))
        }
        Err(error) => Err(format!("cannot be read: {error}")),
    };
    let shown = directory.join(path.strip_prefix("/").unwrap_or(path));
    parsed.map_err(|problem| format!("names {}, which {problem}", shown.display()))
}

fn json(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|error| format!("is not JSON: {error}; {REMEDY}"))
}

/// Takes an object of this schema apart.
fn with_schema<T: DeserializeOwned>(mut value: Value, schema: &str) -> Result<T, String> {
    let found = value.as_object_mut().and_then(|object| object.remove("schema"));
    match found.as_ref().and_then(Value::as_str) {
        Some(found) if found == schema => serde_json::from_value(value)
            .map_err(|error| format!("is no {schema}: {error}; {REMEDY}")),
        Some(found) => Err(format!(
            "has the schema \"{found}\", and mote knows {schema}; use an image with its guest init, or an earlier runtime"
        )),
        None => Err(format!("has no schema, must be {schema}; {REMEDY}")),
    }
}

fn share<'a>(spec: &'a Spec, tag: &str) -> Option<&'a FsMount> {
    spec.fs_mounts.iter().find(|share| share.tag == tag)
}

/// Where the runtime looks for the exit code of a box.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusFile {
    /// The file.
    pub file: OutputFile,
    /// Whether its text is JSON.
    is_json: bool,
}

impl StatusFile {
    /// The file on a share of its own, beside a boot config.
    pub(super) fn of_share(
        spec: &Spec,
        guests: &[PathBuf],
        report: &mut Report,
    ) -> Option<StatusFile> {
        let (tag, name) = TERMINAL;
        let problem = match share(spec, tag) {
            Some(share) if share.read_only => "which is read-only; make it writable",
            Some(share) => {
                let file = OutputFile::new(&share.host_path.join(name), Some(guests));
                return Some(StatusFile { file, is_json: true });
            }
            None => "which is missing; add it",
        };
        report.error(
            "fs_mounts",
            format!("BOX_BOOT_CONFIG_FILE needs the share '{tag}' for the exit code, {problem}"),
        );
        None
    }

    /// The file in the image.
    pub(super) fn of_image(spec: &Spec, guests: &[PathBuf]) -> StatusFile {
        let file = OutputFile::new(&spec.rootfs_path.join(EXIT_CODE), Some(guests));
        StatusFile { file, is_json: false }
    }

    /// The file's text.
    pub fn text(&self, exit_code: u8) -> String {
        if !self.is_json {
            return exit_code.to_string();
        }
        // In the order in which the runtime's own init has them.
        format!(
            r#"{{"schema":"{TERMINAL_SCHEMA}","exit_code":{exit_code},"rootfs_quiesced":false}}"#
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;
    use crate::plan::testing::{self, errors, plan};
    use mote_agent::instance::ResolvConf;
    use std::fs;

    const EXEC: &str = r#"{"schema":"a3s.box.guest-exec.v1","executable":"sleep","args":["60"],"workdir":"/srv",
        "user":"1000:1000","stdin_null":true}"#;

    fn boot_config(exec: &str, rest: &str) -> String {
        format!(r#"{{"schema":"a3s.box.guest-boot.v1","exec":{exec},"environment":[]{rest}}}"#)
    }

    /// Directories for the image and the init's shares.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let dir = fs::canonicalize(std::env::temp_dir()).expect("a directory");
            let dir = dir.join(format!("mote-init-{name}-{}", std::process::id()));
            for sub in ["root", "boot", "terminal"] {
                fs::create_dir_all(dir.join(sub)).expect("directory");
            }
            Scratch(dir)
        }

        fn write(&self, path: &str, text: impl AsRef<[u8]>) {
            fs::write(self.0.join(path), text).expect("file");
        }

        /// A change of a spec to one of 3.3, unless it has variables of an earlier one.
        fn spec<'a>(&'a self, env: &'a [(&str, &str)]) -> impl FnOnce(&mut Spec) + 'a {
            move |spec| {
                spec.rootfs_path = self.0.join("root");
                spec.entrypoint.executable = "/sbin/init".into();
                spec.entrypoint.env =
                    env.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect();
                if !env.iter().any(|(name, _)| name.starts_with("BOX_EXEC_")) {
                    spec.entrypoint
                        .env
                        .insert(0, ("BOX_BOOT_CONFIG_FILE".into(), BOOT_PATH.into()));
                    for (tag, directory) in [(BOOT.0, "boot"), (TERMINAL.0, "terminal")] {
                        let (host_path, read_only) = (self.0.join(directory), tag == BOOT.0);
                        spec.fs_mounts.push(FsMount { tag: tag.into(), host_path, read_only });
                    }
                }
            }
        }

        /// The one error, with this directory as DIR.
        fn error(&self, change: impl FnOnce(&mut Spec)) -> String {
            let errors = errors(change);
            assert_eq!(errors.len(), 1, "{errors:?}");
            errors[0].replace(&self.0.display().to_string(), "DIR")
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn main_process(plan: &Plan) -> (String, Vec<String>, String, Option<String>) {
        let instance = &plan.instance;
        let run = instance.entrypoint.clone();
        (run.executable, run.args, instance.workdir.clone(), instance.user.clone())
    }

    fn expected() -> (String, Vec<String>, String, Option<String>) {
        ("sleep".into(), vec!["60".into()], "/srv".into(), Some("1000:1000".into()))
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    #[test]
    fn a_boot_config_says_what_to_run_and_what_the_box_sees() {
        let scratch = Scratch::new("boot");
        let text = boot_config(
            EXEC,
            r#","host":{"hostname":"web","resolv_conf":"nameserver 192.0.2.1\n","hosts":"127.0.0.1 localhost web\n"}"#,
        );
        let environment = r#""environment":[["A","1"],["PATH","/bin"]]"#;
        scratch.write("boot/config.json", text.replace(r#""environment":[]"#, environment));
        let env =
            [("BOX_SYSCTL_0", "net.ipv4.ip_forward=1"), ("B", "2"), ("BOX_CRI_PORT_FWD", "1")];
        let plan = plan(scratch.spec(&env)).expect("a plan");
        assert_eq!(main_process(&plan), expected());
        let instance = &plan.instance;
        let environment = pairs(&[("A", "1"), ("PATH", "/bin"), ("B", "2")]);
        assert_eq!((&instance.entrypoint.env, &instance.exec_env), (&environment, &environment));
        assert_eq!(instance.hostname, "web");
        assert_eq!(instance.resolv_conf, ResolvConf::Always("nameserver 192.0.2.1\n".into()));
        let etc = [("hostname", "web\n"), ("hosts", "127.0.0.1 localhost web\n")];
        assert_eq!(instance.etc, pairs(&etc));
        assert_eq!(instance.sysctls, pairs(&[("net.ipv4.ip_forward", "1")]));
        assert!(instance.make_workdir);
        // The init's shares are not the box's.
        assert_eq!(plan.shares.len(), 1);
        let status = plan.status_file.expect("a file for the exit code");
        assert_eq!(status.file.path, scratch.0.join("terminal/status.json"));
        assert_eq!(
            status.text(42),
            r#"{"schema":"a3s.box.guest-terminal.v1","exit_code":42,"rootfs_quiesced":false}"#
        );
    }

    #[test]
    fn files_in_the_image_say_what_to_run() {
        let scratch = Scratch::new("exec");
        scratch.write("root/.a3s-box-exec.json", EXEC);
        scratch.write("root/.a3s-box-env", "A=MQ\nEMPTY=\n");
        let files = [
            ("BOX_EXEC_B64", "1"),
            ("BOX_EXEC_CONFIG_FILE", "/.a3s-box-exec.json"),
            ("BOX_EXEC_ENV_FILE", "/.a3s-box-env"),
        ];
        let more = [("BOX_EXEC_ENV_I", "Mg"), ("BOX_HOSTNAME", "web")];
        let plan = plan(scratch.spec(&[&files[..], &more].concat())).expect("a plan");
        assert_eq!(main_process(&plan), expected());
        let environment = pairs(&[("I", "2"), ("A", "1"), ("EMPTY", "")]);
        assert_eq!(plan.instance.entrypoint.env, environment);
        assert_eq!(plan.instance.hostname, "web");
        let status = plan.status_file.expect("a file for the exit code");
        assert_eq!(status.file.path, scratch.0.join("root/.a3s_exit_code"));
        assert_eq!(status.text(42), "42");

        scratch.write("root/.a3s-box-exec.json", format!("{EXEC}{}", " ".repeat(1 << 20)));
        let error = scratch.error(scratch.spec(&files));
        let expected = "entrypoint.env[1]: BOX_EXEC_CONFIG_FILE names DIR/root/.a3s-box-exec.json, which has more than 1048576 bytes; shorten";
        assert!(error.starts_with(expected), "{error}");
        scratch.write("root/.a3s-box-exec.json", EXEC);

        // Its variables may be in a file although the main process is not.
        let mixed = [files[0], ("BOX_EXEC_EXEC", "c2xlZXA"), files[2]];
        let mixed = testing::plan(scratch.spec(&mixed)).expect("a plan");
        assert_eq!(mixed.instance.entrypoint.env, pairs(&[("A", "1"), ("EMPTY", "")]));
        assert_eq!(mixed.status_file, None);

        scratch.write("root/.a3s-box-env", "A=MQ\nB=M\n");
        let error = scratch.error(scratch.spec(&files));
        let expected = "entrypoint.env[2]: BOX_EXEC_ENV_FILE names DIR/root/.a3s-box-env, which has no variable NAME=VALUE in line 2";
        assert!(error.starts_with(expected), "{error}");
        // What the image's own links lead to is the image's.
        fs::remove_file(scratch.0.join("root/.a3s-box-env")).expect("removed");
        std::os::unix::fs::symlink("/etc/passwd", scratch.0.join("root/.a3s-box-env"))
            .expect("link");
        let error = scratch.error(scratch.spec(&files));
        assert!(error.contains("/root/.a3s-box-env, which is not there; have the"), "{error}");
    }

    #[test]
    fn a_boot_config_that_is_not_as_it_should_be_is_named() {
        let scratch = Scratch::new("refused");
        let whole = boot_config(EXEC, "");
        let cut = &whole[..whole.len() / 2];
        let huge = format!("{whole}{}", " ".repeat(4 << 20));
        for (text, problem) in [
            (cut, "is not JSON: EOF while parsing"),
            (&huge, "has more than 4194304 bytes; shorten the command"),
            ("[]", "has no schema, must be a3s.box.guest-boot.v1; have the runtime write it again"),
            (
                &whole.replace("boot.v1", "boot.v2"),
                "has the schema \"a3s.box.guest-boot.v2\", and mote knows a3s.box.guest-boot.v1; use",
            ),
            (&whole.replace("exec.v1", "exec.v7"), "has the schema \"a3s.box.guest-exec.v7\", and"),
            (
                &boot_config(EXEC, r#","more":1"#),
                "is no a3s.box.guest-boot.v1: unknown field `more`",
            ),
            (
                &boot_config(EXEC, r#","mode":"rootfs-maintenance""#),
                "has the mode \"rootfs-maintenance\", which needs a guest init",
            ),
            (&whole.replace("sleep", ""), "has an empty executable; name a program"),
            (&whole.replace("/srv", "srv"), "has the workdir \"srv\", must be an absolute path"),
            (&whole.replace("60", "\\u0000"), "has a NUL character"),
            (
                &whole.replace("[]", r#"[["A=B","1"]]"#),
                "has the variable \"A=B\": a name must not be empty",
            ),
        ] {
            scratch.write("boot/config.json", text);
            let error = scratch.error(scratch.spec(&[]));
            let expected =
                "entrypoint.env[0]: BOX_BOOT_CONFIG_FILE names DIR/boot/config.json, which ";
            assert!(error.starts_with(&format!("{expected}{problem}")), "{error}");
        }
        let secret = whole.replace("[]", r#"[["A3S_BOX_SECRET_ENV_V1","[]"]]"#);
        scratch.write("boot/config.json", secret);
        let error = scratch.error(scratch.spec(&[]));
        assert!(error.contains("A3S_BOX_SECRET_ENV_V1 is in the box's environment"), "{error}");
    }

    #[test]
    fn an_inits_shares_must_be_there() {
        let scratch = Scratch::new("shares");
        scratch.write("boot/config.json", boot_config(EXEC, ""));
        let error = |change: fn(&mut Spec)| {
            let make = scratch.spec(&[]);
            scratch.error(|spec| {
                make(spec);
                change(spec);
            })
        };
        let of_terminal = "fs_mounts: BOX_BOOT_CONFIG_FILE needs the share 'a3s-terminal' for the exit code, which is";
        let said = error(|spec| spec.fs_mounts[1].read_only = true);
        assert_eq!(said, format!("{of_terminal} read-only; make it writable"));
        let said = error(|spec| drop(spec.fs_mounts.remove(1)));
        assert_eq!(said, format!("{of_terminal} missing; add it"));
        let of_boot = "entrypoint.env[0]: BOX_BOOT_CONFIG_FILE";
        let said = error(|spec| drop(spec.fs_mounts.remove(0)));
        assert!(said.starts_with(&format!("{of_boot} needs the share 'a3s-boot' with")), "{said}");
        let said = error(|spec| spec.entrypoint.env[0].1 = "/config.json".into());
        assert_eq!(said, format!("{of_boot} is \"/config.json\", must be {BOOT_PATH}"));
        fs::remove_file(scratch.0.join("boot/config.json")).expect("removed");
        let said = error(|_| ());
        assert!(
            said.ends_with("/config.json, which is not there; have the runtime write it again")
        );
    }
}
