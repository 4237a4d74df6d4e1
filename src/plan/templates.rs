//! Where the templates are that boxes start from ([`crate::template`]).

use std::fs;
use std::path::{Path, PathBuf};

use super::environment::Environment;
use crate::spec::json::Report;

/// A box's templates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Templates {
    /// It starts from none, and this is why.
    Off(String),
    /// They are in this directory.
    In(PathBuf),
}

const VARIABLE: &str = "MOTE_TEMPLATES";

/// The directory that the environment says. `guests` are the directories that the guest can write to.
pub fn plan(environment: &Environment, guests: &[PathBuf], report: &mut Report) -> Templates {
    let directory = match &environment.templates {
        Some(value) if value.as_os_str() == "off" => {
            return Templates::Off(format!("{VARIABLE} is off"));
        }
        Some(path) if path.is_absolute() => path.clone(),
        Some(path) => {
            report.error(
                VARIABLE,
                format!("is \"{}\", must be an absolute path, or off", path.display()),
            );
            return Templates::Off(String::new());
        }
        None => match &environment.cache {
            Some(cache) => cache.join("mote/templates"),
            None => return Templates::Off("neither XDG_CACHE_HOME nor HOME says where".into()),
        },
    };
    if environment.kernel.is_some() || environment.initramfs.is_some() {
        return Templates::Off("MOTE_KERNEL or MOTE_INITRAMFS names others than mote's own".into());
    }
    if environment.virtiofsd.is_some() {
        return Templates::Off("MOTE_VIRTIOFSD names another virtiofsd".into());
    }
    let place = real(&directory);
    if let Some(guests) = guests.iter().find(|guests| place.starts_with(guests)) {
        let (directory, guests) = (directory.display(), guests.display());
        report.warn(
            VARIABLE,
            format!("the templates in {directory} are inside {guests}, where the guest could write one for your other boxes; set {VARIABLE} to a directory outside, or to off"),
        );
        return Templates::Off("the guest can write to them".into());
    }
    Templates::In(directory)
}

/// The path without symbolic links, as far as it exists.
fn real(path: &Path) -> PathBuf {
    for ancestor in path.ancestors() {
        if let Ok(real) = fs::canonicalize(ancestor) {
            return real.join(path.strip_prefix(ancestor).unwrap_or(Path::new("")));
        }
    }
    path.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(environment: Environment, guests: &[PathBuf]) -> (Templates, Report) {
        let mut report = Report::default();
        (plan(&environment, guests, &mut report), report)
    }

    #[test]
    fn the_directory_is_the_users_cache_or_what_the_variable_names() {
        let cache = Some("/home/u/.cache".into());
        let environment = Environment { cache, ..Environment::default() };
        let of_user = Templates::In("/home/u/.cache/mote/templates".into());
        assert_eq!(planned(environment.clone(), &[]).0, of_user);
        for (value, expected) in [
            ("/srv/t", Templates::In("/srv/t".into())),
            ("off", Templates::Off("MOTE_TEMPLATES is off".into())),
        ] {
            let environment = Environment { templates: Some(value.into()), ..environment.clone() };
            assert_eq!(planned(environment, &[]).0, expected);
        }
        assert!(matches!(planned(Environment::default(), &[]).0, Templates::Off(_)));
        let environment = Environment { templates: Some("t".into()), ..environment };
        let (_, report) = planned(environment, &[]);
        assert!(report.errors[0].to_string().starts_with("MOTE_TEMPLATES: is \"t\", must be"));
    }

    #[test]
    fn a_guest_that_could_write_templates_uses_none() {
        let templates = Some("/tmp/no/such/templates".into());
        let environment = Environment { templates, ..Environment::default() };
        let guests = [fs::canonicalize("/tmp").expect("there is a /tmp")];
        let (templates, report) = planned(environment, &guests);
        assert_eq!(templates, Templates::Off("the guest can write to them".into()));
        assert!(report.warnings[0].to_string().contains("the guest could write one"));
    }
}
