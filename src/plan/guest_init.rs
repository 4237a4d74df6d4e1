//! The variables in the spec's environment that the box runtime sets for its guest init (contract
//! §2.10, §7.2).
//!
//! If the image has this init, it runs as given, and mote's agent leaves all of these to the init. If
//! the spec names an init that the image lacks, the agent takes its place. A spec with a plain
//! entrypoint may use the variables for mounts too.

use mote_agent::instance::{Entrypoint, Mount, Security};

use crate::spec::json::Report;
use crate::spec::{self, Spec};
use crate::sys;

/// Variables by which the runtime tells a guest init what to run: of 0.8.0; of 3.2, which names a file; and of 3.3,
/// which names one on a share of its own. Any of them makes the entrypoint an init.
const PROGRAM: &str = "BOX_EXEC_EXEC";
const CONFIG_FILES: [&str; 2] = ["BOX_EXEC_CONFIG_FILE", "BOX_BOOT_CONFIG_FILE"];

/// Tag and path of the share that is always mounted, if the spec has it.
const WORKSPACE: (&str, &str) = ("workspace", "/workspace");

/// Capabilities by number, without `CAP_` (linux/capability.h).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The part of a guest init's work that the agent does.
#[derive(Debug)]
pub struct GuestInit {
    /// What the agent mounts, in order.
    pub mounts: Vec<Mount>,
    /// Whether the agent makes the root read-only.
    pub read_only_root: bool,
    /// The program that the agent starts in place of the spec's entrypoint.
    pub main: Option<MainProcess>,
    /// Whether the image's own init runs, which needs root and switches to the box's user itself.
    pub image_init: bool,
    /// The environment of what runs in the box, without the variables meant for an init.
    pub container_env: Vec<(String, String)>,
}

/// The main process of a box whose init is mote's agent.
#[derive(Debug)]
pub struct MainProcess {
    /// Program, arguments, environment.
    pub entrypoint: Entrypoint,
    /// Directory it starts in.
    pub workdir: String,
    /// User to run it as.
    pub user: Option<String>,
    /// What it must give up before it runs.
    pub security: Security,
}

impl GuestInit {
    /// Reads the variables.
    pub fn new(spec: &Spec, report: &mut Report) -> Self {
        let vars = Variables { entrypoint: &spec.entrypoint, encoded: false };
        let encoded = vars.value("BOX_EXEC_B64") == Some("1");
        let vars = Variables { encoded, ..vars };
        let is_init = names_init(&spec.entrypoint);
        let container_env = vars.container_env(report);
        // Without these it is not known whose the variables are, and whether one is missing.
        let is_known = ["rootfs_path", "entrypoint.executable", "entrypoint.env"]
            .iter()
            .all(|field| report.has_read(field));
        if is_of_image(spec) || (is_init && !is_known) {
            return GuestInit {
                mounts: Vec::new(),
                read_only_root: false,
                main: None,
                image_init: is_known,
                container_env,
            };
        }
        if is_init && vars.value("A3S_TEE_SIMULATE").is_some() {
            report.warn(
                "entrypoint.env",
                "A3S_TEE_SIMULATE asks for an attestation server, which mote's agent does not have: connections to attest_socket_path are closed",
            );
        }
        let main = is_init.then(|| {
            for name in ["BOX_SIDECAR_IMAGE", "BOX_EXEC_ENV_FILE", "BOX_DEFERRED_MAIN"]
                .into_iter()
                .chain(CONFIG_FILES)
            {
                if let Some(index) = vars.index(name) {
                    report.error(
                        format!("entrypoint.env[{index}]"),
                        format!("{name} needs a guest init, which this image lacks"),
                    );
                }
            }
            vars.main(container_env.clone(), report)
        });
        GuestInit {
            mounts: vars.mounts(spec, report),
            read_only_root: vars.value("BOX_READONLY") == Some("1"),
            main,
            image_init: false,
            container_env,
        }
    }
}

/// Whether the box's main program is a guest init that the image has.
pub(super) fn is_of_image(spec: &Spec) -> bool {
    names_init(&spec.entrypoint) && is_in_image(spec)
}

/// Whether the environment is a guest init's.
fn names_init(entrypoint: &spec::Entrypoint) -> bool {
    [PROGRAM].iter().chain(&CONFIG_FILES).any(|name| entrypoint.variable(name).is_some())
}

/// Whether the image has the spec's executable. A bare name, which only the guest can look up, counts as
/// there.
fn is_in_image(spec: &Spec) -> bool {
    let executable = &spec.entrypoint.executable;
    !executable.contains('/') || sys::exists_in_root(&spec.rootfs_path, executable)
}

/// The spec's environment, read by name.
#[derive(Clone, Copy)]
struct Variables<'a> {
    entrypoint: &'a spec::Entrypoint,
    /// Whether values of `BOX_EXEC_*` are in base64 (later contract versions).
    encoded: bool,
}

impl<'a> Variables<'a> {
    fn index(&self, name: &str) -> Option<usize> {
        self.entrypoint.variable(name)
    }

    fn value(&self, name: &str) -> Option<&'a str> {
        self.index(name).map(|index| self.entrypoint.env[index].1.as_str())
    }

    /// The values of `NAME_0`, `NAME_1`, … up to the first gap, with their indexes in the environment.
    fn numbered(&self, name: &str) -> impl Iterator<Item = (usize, &'a str)> {
        (0..).map_while(move |n| {
            let index = self.index(&format!("{name}_{n}"))?;
            Some((index, self.entrypoint.env[index].1.as_str()))
        })
    }

    /// The value of the variable at this index, decoded.
    fn decoded(&self, index: usize, report: &mut Report) -> String {
        let (name, value) = &self.entrypoint.env[index];
        if !self.encoded {
            return value.clone();
        }
        let text = mote_agent::exec::from_base64url(value).filter(|text| !text.contains('\0'));
        text.unwrap_or_else(|| {
            report.error(
                format!("entrypoint.env[{index}]"),
                format!("{name} is not text without NUL in base64url, as BOX_EXEC_B64=1 says"),
            );
            String::new()
        })
    }

    /// The image's variables, then those of the caller, which count when both set one.
    fn container_env(&self, report: &mut Report) -> Vec<(String, String)> {
        let named = |index: usize| self.entrypoint.env[index].0.as_str();
        let of_image = (0..self.entrypoint.env.len()).filter_map(|index| {
            let name =
                named(index).strip_prefix("BOX_EXEC_ENV_").filter(|n| !["FILE", ""].contains(n))?;
            Some((name.to_owned(), self.decoded(index, report)))
        });
        let of_image: Vec<(String, String)> = of_image.collect();
        let meant_for_init =
            |name: &str| ["BOX_", "KRUN_", "A3S_"].iter().any(|prefix| name.starts_with(prefix));
        let own = self.entrypoint.env.iter().filter(|(name, _)| !meant_for_init(name)).cloned();
        of_image.into_iter().chain(own).collect()
    }

    fn main(&self, env: Vec<(String, String)>, report: &mut Report) -> MainProcess {
        let mut text = |name: &str| self.index(name).map(|index| self.decoded(index, report));
        let executable = text("BOX_EXEC_EXEC").unwrap_or_default();
        let workdir = text("BOX_EXEC_WORKDIR").unwrap_or_else(|| "/".into());
        let user = text("BOX_EXEC_USER");
        let args: Vec<String> = (0..).map_while(|n| text(&format!("BOX_EXEC_ARG_{n}"))).collect();
        let count = self.value("BOX_EXEC_ARGC").unwrap_or("0");
        let mut require = |holds: bool, name: &str, problem: String| {
            if !holds {
                let place = self.index(name).map_or(String::new(), |index| format!("[{index}]"));
                report.error(format!("entrypoint.env{place}"), format!("{name} {problem}"));
            }
        };
        require(!executable.is_empty(), "BOX_EXEC_EXEC", "is empty; name a program".into());
        require(
            workdir.starts_with('/'),
            "BOX_EXEC_WORKDIR",
            format!("is \"{workdir}\", must be an absolute path"),
        );
        require(
            count.parse() == Ok(args.len()),
            "BOX_EXEC_ARGC",
            format!("is \"{count}\", but there are {} BOX_EXEC_ARG_n", args.len()),
        );
        let entrypoint = Entrypoint { executable, args, env };
        MainProcess { entrypoint, workdir, user, security: self.security(report) }
    }

    /// Reads `A3S_SEC_*`. A capability that is both dropped and added is kept; the reference's init
    /// ignores what is added.
    fn security(&self, report: &mut Report) -> Security {
        if self.value("A3S_SEC_PRIVILEGED") == Some("1") {
            return Security::default();
        }
        let mut complain = |name: &str, problem: String| {
            if let Some(index) = self.index(name) {
                report.error(format!("entrypoint.env[{index}]"), problem);
            }
        };
        let seccomp = match self.value("A3S_SEC_SECCOMP") {
            Some("default") => true,
            None | Some("" | "unconfined") => false,
            Some(other) => {
                complain(
                    "A3S_SEC_SECCOMP",
                    format!("A3S_SEC_SECCOMP is \"{other}\", must be default or unconfined"),
                );
                false
            }
        };
        let mut capabilities = |name: &str| {
            let mut numbers = Vec::new();
            let words = self.value(name).unwrap_or("").split(',').map(str::trim);
            for word in words.filter(|word| !word.is_empty()) {
                let word = word.to_ascii_uppercase();
                match CAPABILITIES.iter().position(|known| *known == word) {
                    Some(number) => numbers.push(number as u32),
                    None if word == "ALL" => numbers.extend(0..CAPABILITIES.len() as u32),
                    None => {
                        complain(name, format!("{name} has \"{word}\", which is no capability"))
                    }
                }
            }
            numbers
        };
        let added = capabilities("A3S_SEC_CAP_ADD");
        let mut drop_capabilities = capabilities("A3S_SEC_CAP_DROP");
        drop_capabilities.retain(|number| !added.contains(number));
        let no_new_privs = self.value("A3S_SEC_NO_NEW_PRIVS") != Some("0");
        Security { no_new_privs, seccomp, drop_capabilities }
    }

    fn mounts(&self, spec: &Spec, report: &mut Report) -> Vec<Mount> {
        let share = |tag: &str| spec.fs_mounts.iter().find(|share| share.tag == tag);
        let (tag, path) = WORKSPACE;
        let workspace = share(tag).map(|share| Mount::Share {
            tag: tag.into(),
            path: path.into(),
            read_only: share.read_only,
        });
        let mut mounts: Vec<Mount> = workspace.into_iter().collect();
        for (index, text) in self.numbered("BOX_VOL") {
            let wanted = match text.split(':').collect::<Vec<_>>()[..] {
                [tag, path] => Some((tag, path, false)),
                [tag, path, "ro"] => Some((tag, path, true)),
                [tag, path, "rw"] => Some((tag, path, false)),
                _ => None,
            };
            let path_ok = |path: &str| path.starts_with('/') && path != "/";
            match wanted.map(|(tag, path, read_only)| (share(tag), tag, path, read_only)) {
                Some((Some(share), _, path, read_only)) if path_ok(path) => {
                    mounts.push(Mount::Share {
                        tag: share.tag.clone(),
                        path: path.into(),
                        read_only: read_only || share.read_only,
                    });
                }
                Some((None, tag, path, _)) if path_ok(path) => {
                    if report.has_read("fs_mounts") {
                        report.error(
                            format!("entrypoint.env[{index}]"),
                            format!("mounts '{tag}', which is no tag of fs_mounts"),
                        );
                    }
                }
                _ => report.error(
                    format!("entrypoint.env[{index}]"),
                    format!(
                        "is \"{text}\", must be TAG:PATH or TAG:PATH:ro, with an absolute path"
                    ),
                ),
            }
        }
        for (index, text) in self.numbered("BOX_TMPFS") {
            let (path, options) = text.split_once(':').unwrap_or((text, ""));
            if path.starts_with('/') && path != "/" {
                mounts.push(Mount::Tmpfs { path: path.into(), options: options.into() });
            } else {
                report.error(
                    format!("entrypoint.env[{index}]"),
                    format!("is \"{text}\", must be PATH or PATH:OPTIONS, with an absolute path"),
                );
            }
        }
        mounts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::FsMount;

    fn read(executable: &str, env: &[(&str, &str)]) -> (GuestInit, Vec<String>) {
        let text = r#"{"box_id":"b","vcpus":1,"memory_mib":256,"rootfs_path":"/",
            "exec_socket_path":"","fs_mounts":[],"workdir":"/",
            "entrypoint":{"executable":"","args":[],"env":[]}}"#;
        let mut report = Report::default();
        let mut spec = Spec::parse(text, &mut report).expect("a spec");
        spec.entrypoint.executable = executable.into();
        spec.entrypoint.env = env.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect();
        spec.fs_mounts = [("workspace", false), ("vol0", true)]
            .map(|(tag, read_only)| FsMount { tag: tag.into(), host_path: "/".into(), read_only })
            .to_vec();
        let init = GuestInit::new(&spec, &mut report);
        (init, report.errors.iter().map(ToString::to_string).collect())
    }

    fn share(tag: &str, path: &str, read_only: bool) -> Mount {
        Mount::Share { tag: tag.into(), path: path.into(), read_only }
    }

    #[test]
    fn a_missing_init_is_replaced() {
        let (init, errors) = read(
            "/no/such/init",
            &[
                ("BOX_EXEC_EXEC", "sleep"),
                ("BOX_EXEC_ARGC", "2"),
                ("BOX_EXEC_ARG_0", "60"),
                ("BOX_EXEC_ARG_1", "a b"),
                ("BOX_EXEC_WORKDIR", "/srv"),
                ("BOX_EXEC_ENV_PATH", "/bin"),
                ("BOX_EXEC_ENV_MODE", "image"),
                ("BOX_VOL_0", "vol0:/data:ro"),
                ("BOX_TMPFS_0", "/dev/shm:size=1m,noexec"),
                ("BOX_READONLY", "1"),
                ("A3S_SEC_SECCOMP", "default"),
                ("A3S_SEC_CAP_DROP", "net_raw,MKNOD,CHOWN"),
                ("A3S_SEC_CAP_ADD", "CHOWN"),
                ("MODE", "caller"),
            ],
        );
        assert_eq!(errors, Vec::<String>::new());
        let main = init.main.expect("takes over");
        assert_eq!(main.entrypoint.executable, "sleep");
        assert_eq!(main.entrypoint.args, ["60", "a b"]);
        assert_eq!(main.workdir, "/srv");
        let env = [("PATH", "/bin"), ("MODE", "image"), ("MODE", "caller")];
        assert_eq!(main.entrypoint.env, env.map(|(n, v)| (n.to_owned(), v.to_owned())));
        let security =
            Security { no_new_privs: true, seccomp: true, drop_capabilities: vec![13, 27] };
        assert_eq!(main.security, security);
        assert!(init.read_only_root);
        let tmpfs = Mount::Tmpfs { path: "/dev/shm".into(), options: "size=1m,noexec".into() };
        let shares = [share("workspace", "/workspace", false), share("vol0", "/data", true)];
        assert_eq!(init.mounts, [shares.to_vec(), vec![tmpfs]].concat());
    }

    #[test]
    fn an_init_of_the_image_does_its_own_work() {
        for name in ["BOX_EXEC_EXEC", "BOX_EXEC_CONFIG_FILE", "BOX_BOOT_CONFIG_FILE"] {
            let volume = ("BOX_VOL_0", "vol0:/data:ro:file");
            let env = [(name, "sleep"), volume, ("BOX_READONLY", "1"), ("A", "1")];
            let (init, errors) = read("/bin/sh", &env);
            assert!(errors.is_empty() && init.main.is_none() && init.mounts.is_empty());
            assert!(init.image_init && !init.read_only_root);
            assert_eq!(init.container_env, [("A".to_owned(), "1".to_owned())]);
        }
    }

    #[test]
    fn encoded_values_are_decoded() {
        let env = [("BOX_EXEC_B64", "1"), ("BOX_EXEC_EXEC", "c2xlZXA"), ("BOX_EXEC_ENV_A", "YiBj")];
        let (init, errors) = read("/no/such/init", &env);
        assert!(errors.is_empty(), "{errors:?}");
        let entrypoint = init.main.expect("takes over").entrypoint;
        assert_eq!(entrypoint.executable, "sleep");
        assert_eq!(entrypoint.env, [("A".to_owned(), "b c".to_owned())]);
        let (_, errors) = read("/no/such/init", &[("BOX_EXEC_B64", "1"), ("BOX_EXEC_EXEC", "%")]);
        assert!(errors[0].starts_with("entrypoint.env[1]: BOX_EXEC_EXEC is not text"));
    }

    #[test]
    fn a_bad_main_process_is_named() {
        let (_, errors) = read(
            "/no/such/init",
            &[
                ("BOX_EXEC_EXEC", ""),
                ("BOX_EXEC_WORKDIR", "srv"),
                ("BOX_EXEC_ARGC", "2"),
                ("BOX_EXEC_ARG_0", "x"),
            ],
        );
        let expected = [
            "entrypoint.env[0]: BOX_EXEC_EXEC is empty; name a program",
            "entrypoint.env[1]: BOX_EXEC_WORKDIR is \"srv\", must be an absolute path",
            "entrypoint.env[2]: BOX_EXEC_ARGC is \"2\", but there are 1 BOX_EXEC_ARG_n",
        ];
        assert_eq!(errors, expected);
    }

    #[test]
    fn bad_security_is_named() {
        let (init, errors) = read(
            "/no/such/init",
            &[
                ("BOX_EXEC_EXEC", "sleep"),
                ("A3S_SEC_SECCOMP", "custom:/x"),
                ("A3S_SEC_CAP_DROP", "ALL,NONSENSE"),
            ],
        );
        assert!(errors[0].contains("[1]: A3S_SEC_SECCOMP is \"custom:/x\""), "{errors:?}");
        assert!(errors[1].contains("[2]: A3S_SEC_CAP_DROP has \"NONSENSE\""), "{errors:?}");
        assert_eq!(init.main.expect("takes over").security.drop_capabilities.len(), 41);
    }

    #[test]
    fn bad_mounts_are_named() {
        let (_, errors) = read(
            "/bin/sh",
            &[("BOX_VOL_0", "nothing:/x"), ("BOX_VOL_1", "vol0"), ("BOX_TMPFS_0", "relative")],
        );
        assert!(errors[0].starts_with("entrypoint.env[0]: mounts 'nothing'"), "{errors:?}");
        assert!(errors[1].starts_with("entrypoint.env[1]: is \"vol0\""), "{errors:?}");
        assert!(errors[2].starts_with("entrypoint.env[2]: is \"relative\""), "{errors:?}");
    }
}
