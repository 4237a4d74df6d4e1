//! The environment variables that mote uses, read once, in `main`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::spec::json::Report;

/// The environment variables that mote uses; read once, in `main`.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `MOTE_VIRTIOFSD`: a virtiofsd to run instead of the built-in one.
    pub virtiofsd: Option<PathBuf>,
    /// `MOTE_KERNEL`: a vmlinux to boot instead of the built-in one.
    pub kernel: Option<PathBuf>,
    /// `MOTE_INITRAMFS`: an archive to boot with instead of the built-in one.
    pub initramfs: Option<PathBuf>,
    /// `MOTE_TEMPLATES`: the directory of the templates, or `off`.
    pub templates: Option<PathBuf>,
    /// `XDG_CACHE_HOME`, or `.cache` in `HOME`: where the user's programs keep what they can make again (XDG Base
    /// Directory Specification).
    pub cache: Option<PathBuf>,
    /// `MOTE_OWN_TEXT`: no memory for the guest kernel's text that other boxes have as well.
    pub own_text: bool,
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
            virtiofsd: path("MOTE_VIRTIOFSD"),
            kernel: path("MOTE_KERNEL"),
            initramfs: path("MOTE_INITRAMFS"),
            templates: path("MOTE_TEMPLATES"),
            cache: path("XDG_CACHE_HOME")
                .or_else(|| path("HOME").map(|home| home.join(".cache")))
                .filter(|path| path.is_absolute()),
            own_text: path("MOTE_OWN_TEXT").is_some(),
            debug: path("MOTE_DEBUG").is_some(),
            no_sandbox: path("MOTE_NO_SANDBOX").is_some(),
            timeline: path("MOTE_TIMELINE"),
            term: std::env::var("TERM").ok().filter(|term| !term.is_empty()),
        }
    }
}

/// The virtiofsd that the environment names, if any, in place of mote's own.
pub fn virtiofsd(environment: &Environment, report: &mut Report) -> Option<PathBuf> {
    let path = environment.virtiofsd.clone()?;
    if !is_executable(&path) {
        report.error("MOTE_VIRTIOFSD", format!("{} is not an executable file", path.display()));
    }
    Some(path)
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
    fn a_virtiofsd_that_is_missing_is_named() {
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
