//! The environment variables that mote uses, read once, in `main`; and the search for virtiofsd.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::spec::json::Report;

/// The environment variables that mote uses; read once, in `main`.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `PATH`, to find virtiofsd.
    pub path: Option<OsString>,
    /// `MOTE_VIRTIOFSD`: the virtiofsd to run.
    pub virtiofsd: Option<PathBuf>,
    /// `MOTE_KERNEL`: a vmlinux to boot instead of the built-in one.
    pub kernel: Option<PathBuf>,
    /// `MOTE_INITRAMFS`: an archive to boot with instead of the built-in one.
    pub initramfs: Option<PathBuf>,
    /// `MOTE_DEBUG`: all kernel messages.
    pub debug: bool,
    /// `MOTE_NO_SANDBOX`: no confinement, for debugging mote.
    pub no_sandbox: bool,
    /// `MOTE_TIMELINE`: where to write the timeline.
    pub timeline: Option<PathBuf>,
    /// `TERM`: the type of the terminal that a box's terminal is shown on.
    pub term: Option<String>,
}

impl Environment {
    /// Reads the process environment.
    pub fn from_process() -> Self {
        let path = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        Environment {
            path: std::env::var_os("PATH"),
            virtiofsd: path("MOTE_VIRTIOFSD"),
            kernel: path("MOTE_KERNEL"),
            initramfs: path("MOTE_INITRAMFS"),
            debug: path("MOTE_DEBUG").is_some(),
            no_sandbox: path("MOTE_NO_SANDBOX").is_some(),
            timeline: path("MOTE_TIMELINE"),
            term: std::env::var("TERM").ok().filter(|term| !term.is_empty()),
        }
    }
}

/// Where distributions put virtiofsd outside `PATH`.
const VIRTIOFSD_PLACES: [&str; 3] =
    ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd/virtiofsd", "/usr/lib/virtiofsd"];

/// Finds the virtio-fs daemon.
pub fn find_virtiofsd(environment: &Environment, report: &mut Report) -> Option<PathBuf> {
    if let Some(path) = &environment.virtiofsd {
        if is_executable(path) {
            return Some(path.clone());
        }
        report.error("MOTE_VIRTIOFSD", format!("{} is not an executable file", path.display()));
        return None;
    }
    let path = environment.path.as_deref().unwrap_or(OsStr::new(""));
    let on_path = path
        .as_bytes()
        .split(|&byte| byte == b':')
        .filter(|dir| !dir.is_empty())
        .map(|dir| Path::new(OsStr::from_bytes(dir)).join("virtiofsd"));
    let found = on_path.chain(VIRTIOFSD_PLACES.map(PathBuf::from)).find(|file| is_executable(file));
    if found.is_none() {
        report.error(
            "virtiofsd",
            format!(
                "is not installed: it is in no directory of PATH and not at {}; run 'cargo install virtiofsd' or name it in MOTE_VIRTIOFSD",
                VIRTIOFSD_PLACES.join(", ")
            ),
        );
    }
    found
}

fn is_executable(path: &Path) -> bool {
    // Without opening it: that could fail for lack of descriptors.
    fs::metadata(path)
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;
    use crate::plan::testing::spec;

    #[test]
    fn a_missing_virtiofsd_says_how_to_get_it() {
        let mut report = Report::default();
        let environment =
            Environment { virtiofsd: Some("/no/virtiofsd".into()), ..Environment::default() };
        assert!(Plan::new(&spec(), &environment, &mut report).is_none());
        assert_eq!(
            report.errors[0].to_string(),
            "MOTE_VIRTIOFSD: /no/virtiofsd is not an executable file"
        );
    }
}
