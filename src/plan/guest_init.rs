//! The variables in the spec's environment that the box runtime sets for its guest init (contract
//! §2.10, §7.2).
//!
//! If the image has this init, it runs as given, and mote's agent leaves all of these to the init. If
//! the spec names an init that the image lacks, the agent takes its place. A spec with a plain
//! entrypoint may use the variables for mounts too.

use std::path::PathBuf;

use mote_agent::instance::{Entrypoint, Mount, Security};

use super::init_files::{self, Boot, Exec, Host, SECRETS, StatusFile};
use super::security;
use super::variables::Variables;
use super::volumes;
use crate::spec::json::Report;
use crate::spec::{self, Spec};
use crate::sys;

/// Variables by which the runtime tells a guest init what to run: of 0.8.0; of 3.2, which names a file in the image; and
/// of 3.3, which names one on a share of its own. Any of them makes the entrypoint an init, which goes by the latest.
const PROGRAM: &str = "BOX_EXEC_EXEC";
const CONFIG_FILE: &str = "BOX_EXEC_CONFIG_FILE";
const BOOT_CONFIG: &str = "BOX_BOOT_CONFIG_FILE";

/// The part of a guest init's work that the agent does.
#[derive(Debug, Default)]
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
    /// What the box sees in place of the image's own.
    pub(super) host: Host,
    /// Names of sysctl(8) and their values.
    pub sysctls: Vec<(String, String)>,
    /// The file that gets the exit code.
    pub status: Option<StatusFile>,
    /// Whether the init's own shares are mote's to read and write, and not the box's.
    pub has_inits_shares: bool,
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
    /// Reads the variables, and the files that they name. `guests` are the directories that guests can write to.
    pub fn new(spec: &Spec, guests: &[PathBuf], report: &mut Report) -> Self {
        let vars = Variables::new(&spec.entrypoint);
        let is_init = names_init(&spec.entrypoint);
        // Without these it is not known whose the variables are, and whether one is missing.
        let is_known = ["rootfs_path", "entrypoint.executable", "entrypoint.env"]
            .iter()
            .all(|field| report.has_read(field));
        let of_image = of_image(&vars, report);
        let container_env = container_env(&vars, &of_image);
        if is_of_image(spec) || (is_init && !is_known) {
            return GuestInit { container_env, image_init: is_known, ..GuestInit::default() };
        }
        let mut init = GuestInit {
            mounts: volumes::plan(&vars, spec, report),
            read_only_root: vars.value("BOX_READONLY") == Some("1"),
            container_env,
            ..GuestInit::default()
        };
        if is_init {
            init.take_place(&vars, of_image, spec, guests, report);
        }
        init
    }

    /// Adds what the agent does only in an init's place. `of_image` are the image's variables, as far as they are
    /// among the spec's.
    fn take_place(
        &mut self,
        vars: &Variables<'_>,
        of_image: Vec<(String, String)>,
        spec: &Spec,
        guests: &[PathBuf],
        report: &mut Report,
    ) {
        let metadata = "BOX_PERSIST_ROOTFS_METADATA";
        if vars.value(metadata).is_some() {
            report.warn(
                "entrypoint.env",
                format!("{metadata} asks for a list of the root's files at the end, which mote's agent does not write: the stopped box cannot be committed"),
            );
        }
        for name in ["BOX_SIDECAR_IMAGE", "BOX_DEFERRED_MAIN"] {
            if vars.value(name).is_some() {
                vars.complain(name, "needs a guest init, which this image lacks", report);
            }
        }
        let security = security::plan(vars, report);
        self.sysctls = sysctls(vars, report);
        let told = if let Some(place) = vars.value(BOOT_CONFIG) {
            self.has_inits_shares = true;
            if !report.has_read("fs_mounts") {
                return;
            }
            self.status = StatusFile::of_share(spec, guests, report);
            let boot = init_files::read_boot(spec, place);
            boot.map_err(|problem| (BOOT_CONFIG, problem))
        } else {
            let place = vars.value(CONFIG_FILE);
            self.status = place.map(|_| StatusFile::of_image(spec, guests));
            let exec = place.map_or_else(
                || Ok(exec_of_variables(vars, report)),
                |place| {
                    init_files::read_exec(spec, place).map_err(|problem| (CONFIG_FILE, problem))
                },
            );
            exec.and_then(|exec| {
                let environment = with_file(of_image, vars, spec)?;
                Ok(Boot { exec, environment, host: Host::default() })
            })
        };
        let Boot { exec, environment, host } = match told {
            Ok(boot) => boot,
            Err((name, problem)) => return vars.complain(name, &problem, report),
        };
        if environment.iter().any(|(name, _)| name == SECRETS) {
            report.error(
                "entrypoint.env",
                format!("{SECRETS} is in the box's environment, and needs a guest init, which this image lacks"),
            );
        }
        self.host = Host {
            hostname: host.hostname.or_else(|| vars.value("BOX_HOSTNAME").map(str::to_owned)),
            ..host
        };
        self.container_env = container_env(vars, &environment);
        let Exec { executable, args, workdir, user, .. } = exec;
        let entrypoint = Entrypoint { executable, args, env: self.container_env.clone() };
        self.main = Some(MainProcess { entrypoint, workdir, user, security });
    }
}

/// Whether the box's main program is a guest init that the image has.
pub(super) fn is_of_image(spec: &Spec) -> bool {
    names_init(&spec.entrypoint) && is_in_image(spec)
}

/// Whether the environment is a guest init's.
fn names_init(entrypoint: &spec::Entrypoint) -> bool {
    [PROGRAM, CONFIG_FILE, BOOT_CONFIG].iter().any(|name| entrypoint.variable(name).is_some())
}

/// Whether the image has the spec's executable. A bare name, which only the guest can look up, counts as
/// there.
fn is_in_image(spec: &Spec) -> bool {
    let executable = &spec.entrypoint.executable;
    !executable.contains('/') || sys::exists_in_root(&spec.rootfs_path, executable)
}

/// The image's variables among the spec's.
fn of_image(vars: &Variables<'_>, report: &mut Report) -> Vec<(String, String)> {
    let named = vars.all().iter().enumerate().filter_map(|(index, (name, _))| {
        let name = name.strip_prefix("BOX_EXEC_ENV_").filter(|n| !["FILE", ""].contains(n))?;
        Some((index, name))
    });
    named.map(|(index, name)| (name.to_owned(), vars.decoded(index, report))).collect()
}

/// The image's variables, then those of the caller, which count when both set one.
fn container_env(vars: &Variables<'_>, of_image: &[(String, String)]) -> Vec<(String, String)> {
    let meant_for_init =
        |name: &str| ["BOX_", "KRUN_", "A3S_"].iter().any(|prefix| name.starts_with(prefix));
    let own = vars.all().iter().filter(|(name, _)| !meant_for_init(name));
    of_image.iter().chain(own).cloned().collect()
}

/// The image's variables, and behind them those of the file in the image. An error has the variable that it is about.
fn with_file(
    mut of_image: Vec<(String, String)>,
    vars: &Variables<'_>,
    spec: &Spec,
) -> Result<Vec<(String, String)>, (&'static str, String)> {
    const ENVIRONMENT: &str = "BOX_EXEC_ENV_FILE";
    if let Some(place) = vars.value(ENVIRONMENT) {
        let of_file = init_files::read_environment(spec, place, |value| vars.text_of(value));
        of_image.extend(of_file.map_err(|problem| (ENVIRONMENT, problem))?);
    }
    Ok(of_image)
}

/// The main process as the variables have it.
fn exec_of_variables(vars: &Variables<'_>, report: &mut Report) -> Exec {
    let mut text = |name: &str| vars.index(name).map(|index| vars.decoded(index, report));
    let exec = Exec {
        executable: text(PROGRAM).unwrap_or_default(),
        workdir: text("BOX_EXEC_WORKDIR").unwrap_or_else(|| "/".into()),
        user: text("BOX_EXEC_USER"),
        args: (0..).map_while(|n| text(&format!("BOX_EXEC_ARG_{n}"))).collect(),
        ..Exec::default()
    };
    let Exec { executable, args, workdir, .. } = &exec;
    let count = vars.value("BOX_EXEC_ARGC").unwrap_or("0");
    let mut require = |holds: bool, name: &str, problem: &str| {
        if !holds {
            vars.complain(name, problem, report);
        }
    };
    require(!executable.is_empty(), PROGRAM, "is empty; name a program");
    require(
        workdir.starts_with('/'),
        "BOX_EXEC_WORKDIR",
        &format!("is \"{workdir}\", must be an absolute path"),
    );
    require(
        count.parse() == Ok(args.len()),
        "BOX_EXEC_ARGC",
        &format!("is \"{count}\", but there are {} BOX_EXEC_ARG_n", args.len()),
    );
    exec
}

/// `BOX_SYSCTL_n`: `NAME=VALUE`.
fn sysctls(vars: &Variables<'_>, report: &mut Report) -> Vec<(String, String)> {
    let mut sysctls = Vec::new();
    for (index, text) in vars.numbered("BOX_SYSCTL") {
        match text.split_once('=').filter(|(name, _)| !name.trim().is_empty()) {
            Some((name, value)) => sysctls.push((name.trim().to_owned(), value.to_owned())),
            None => report.error(
                format!("entrypoint.env[{index}]"),
                format!("is \"{text}\", must be NAME=VALUE"),
            ),
        }
    }
    sysctls
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
        let init = GuestInit::new(&spec, &[], &mut report);
        (init, report.errors.iter().map(ToString::to_string).collect())
    }

    fn share(tag: &str, path: &str, read_only: bool) -> Mount {
        Mount::Share { tag: tag.into(), path: path.into(), read_only, copy_up: false }
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
        let tmpfs = Mount::Tmpfs {
            path: "/dev/shm".into(),
            options: "size=1m,noexec".into(),
            copy_up: false,
        };
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
    fn volumes_may_be_files_or_start_with_what_the_image_has() {
        let volumes = ["vol0:/a/passwd:ro:file", "workspace:/b:copy", "vol0:/c:copy:rw"];
        let env: Vec<(String, &str)> = (0..).map(|n| format!("BOX_VOL_{n}")).zip(volumes).collect();
        let env: Vec<(&str, &str)> =
            env.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        let (init, errors) = read("/bin/sh", &env);
        // Of the host's root directory.
        assert_eq!(
            errors,
            ["entrypoint.env[0]: mounts a file 'passwd', which / (share 'vol0') lacks"]
        );
        // The host lets nobody write to the second.
        let copied = |tag: &str, path: &str, read_only| Mount::Share {
            tag: tag.into(),
            path: path.into(),
            read_only,
            copy_up: !read_only,
        };
        let file = Mount::File { tag: "vol0".into(), path: "/a/passwd".into(), read_only: true };
        let expected = [file, copied("workspace", "/b", false), copied("vol0", "/c", true)];
        assert_eq!(init.mounts[1..], expected);
        let (init, errors) = read("/bin/sh", &[("BOX_VOL_0", "vol0:/x/etc:file")]);
        assert!(errors.is_empty() && init.mounts.len() == 2, "{errors:?}");
    }

    #[test]
    fn bad_mounts_are_named() {
        let (_, errors) = read(
            "/bin/sh",
            &[
                ("BOX_VOL_0", "nothing:/x"),
                ("BOX_VOL_1", "vol0"),
                ("BOX_TMPFS_0", "relative"),
                ("BOX_VOL_2", "vol0:/x:fiel"),
                ("BOX_VOL_3", "vol0:/x/..:file"),
            ],
        );
        assert!(errors[0].starts_with("entrypoint.env[0]: mounts 'nothing'"), "{errors:?}");
        assert!(errors[1].starts_with("entrypoint.env[1]: is \"vol0\""), "{errors:?}");
        assert!(errors[2].starts_with("entrypoint.env[3]: is \"vol0:/x:fiel\""), "{errors:?}");
        assert!(errors[3].starts_with("entrypoint.env[4]: is \"vol0:/x/..:file\""), "{errors:?}");
        assert!(errors[4].starts_with("entrypoint.env[2]: is \"relative\""), "{errors:?}");
    }
}
