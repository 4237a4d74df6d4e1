//! The spec's `tee_config` and its file, checked (contract §1.7).

use std::fmt;
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::Value;

use crate::spec::Spec;
use crate::spec::json::Report;

/// Most bytes of the file.
const MAX_BYTES: u64 = 64 << 10;
/// Its members.
const MEMBERS: [&str; 6] = ["workload_id", "cpus", "ram_mib", "tee", "tee_data", "attestation_url"];
/// Generations of processors with SEV-SNP that the runtime knows, in `tee_data`.
const GENERATIONS: [&str; 2] = ["milan", "genoa"];

/// By what a VM is protected from its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Technology {
    /// AMD's SEV-SNP.
    SevSnp,
    /// Intel's TDX.
    Tdx,
}

impl Technology {
    /// All that there are.
    pub const ALL: [Technology; 2] = [Technology::SevSnp, Technology::Tdx];

    /// Its name in `tee_config` and in the file of that.
    pub fn name(self) -> &'static str {
        match self {
            Technology::SevSnp => "snp",
            Technology::Tdx => "tdx",
        }
    }
}

impl fmt::Display for Technology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Technology::SevSnp => "SEV-SNP",
            Technology::Tdx => "TDX",
        })
    }
}

/// By what the box is to be protected from its host, if it is.
pub(super) fn plan(spec: &Spec, report: &mut Report) -> Option<Technology> {
    let config = spec.tee_config.as_ref()?;
    let technology = match config.tee_type.as_str() {
        "snp" | "sev_snp" => Some(Technology::SevSnp),
        "tdx" => Some(Technology::Tdx),
        other => {
            let known = "must be \"snp\" or \"tdx\"";
            report.error("tee_config.tee_type", format!("is \"{other}\", {known}"));
            None
        }
    };
    let path = &config.config_path;
    let checked = read(path).and_then(|text| check(&text, spec, technology));
    if let Err(problems) = checked {
        for problem in problems {
            report.error("tee_config.config_path", format!("{} {problem}", path.display()));
        }
        return None;
    }
    technology
}

fn read(path: &Path) -> Result<String, Vec<String>> {
    let read = || -> std::io::Result<Result<String, String>> {
        // Not to wait for the other end of a FIFO.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        if !file.metadata()?.is_file() {
            return Ok(Err("is no regular file".into()));
        }
        let mut text = String::new();
        let len = file.take(MAX_BYTES + 1).read_to_string(&mut text)? as u64;
        Ok(if len > MAX_BYTES { Err(format!("has more than {MAX_BYTES} bytes")) } else { Ok(text) })
    };
    let text = read().unwrap_or_else(|error| Err(format!("cannot be read: {error}")));
    text.map_err(|problem| vec![problem])
}

/// Checks the file against the spec; everything that is wrong with it.
fn check(text: &str, spec: &Spec, technology: Option<Technology>) -> Result<(), Vec<String>> {
    let value: Value =
        serde_json::from_str(text).map_err(|error| vec![format!("is not JSON: {error}")])?;
    let members = value.as_object().ok_or_else(|| vec!["is no JSON object".to_owned()])?;
    let mut problems: Vec<String> = members
        .keys()
        .filter(|name| !MEMBERS.contains(&name.as_str()))
        .map(|name| format!("has a member \"{name}\", which mote does not know"))
        .collect();
    for (name, wanted, of) in [
        ("cpus", u64::from(spec.vcpus), "vcpus"),
        ("ram_mib", spec.memory_mib.into(), "memory_mib"),
    ] {
        match members.get(name).map(Value::as_u64) {
            Some(Some(number)) if number == wanted => {}
            Some(Some(number)) => problems.push(format!(
                "says {name} {number}, but {of} of the spec is {wanted}; make them the same"
            )),
            _ => problems.push(format!("has no number {name}, which is to be {wanted}")),
        }
    }
    let mut text_of = |name: &str| {
        let text = members.get(name).and_then(Value::as_str);
        if text.is_none() {
            problems.push(format!("has no string {name}"));
        }
        text
    };
    text_of("workload_id");
    text_of("attestation_url");
    let (tee, data) = (text_of("tee"), text_of("tee_data"));
    if let (Some(tee), Some(technology)) = (tee, technology)
        && tee != technology.name()
    {
        let wanted = technology.name();
        problems.push(format!("says tee \"{tee}\", but tee_type of the spec means \"{wanted}\""));
    }
    if let Some(data) = data {
        problems.extend(data_problem(data, technology));
    }
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// What is wrong with `tee_data`, JSON in a string.
fn data_problem(data: &str, technology: Option<Technology>) -> Option<String> {
    let Ok(Value::Object(data)) = serde_json::from_str(data) else {
        return Some(format!("has the tee_data \"{data}\", which is no JSON object"));
    };
    if technology != Some(Technology::SevSnp) {
        return None;
    }
    match data.get("gen").and_then(Value::as_str) {
        Some(known) if GENERATIONS.contains(&known) => None,
        Some(other) => Some(format!(
            "has tee_data with the gen \"{other}\", must be \"{}\"",
            GENERATIONS.join("\" or \"")
        )),
        None => Some("has tee_data without a string gen, a generation of processors".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::testing;
    use crate::spec::TeeConfig;
    use std::path::PathBuf;

    const GOOD: &str = r#"{"workload_id":"w","cpus":1,"ram_mib":256,"tee":"snp",
        "tee_data":"{\"gen\":\"milan\"}","attestation_url":""}"#;

    struct File(PathBuf);

    impl File {
        fn new(name: &str, text: &str) -> File {
            let path = std::env::temp_dir().join(format!("mote-tee-{name}-{}", std::process::id()));
            std::fs::write(&path, text).expect("written");
            File(path)
        }
    }

    impl Drop for File {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn asking(tee_type: &str, config_path: &Path) -> impl FnOnce(&mut Spec) {
        let config = TeeConfig { config_path: config_path.into(), tee_type: tee_type.into() };
        move |spec| spec.tee_config = Some(config)
    }

    #[test]
    fn what_the_runtime_writes_is_taken() {
        let file = File::new("good", GOOD);
        for name in ["snp", "sev_snp"] {
            let plan = testing::plan(asking(name, &file.0)).expect("a plan");
            assert_eq!(plan.tee, Some(Technology::SevSnp));
        }
        let tdx = GOOD.replace("\"snp\"", "\"tdx\"").replace(r#"{\"gen\":\"milan\"}"#, "{}");
        let file = File::new("tdx", &tdx);
        let plan = testing::plan(asking("tdx", &file.0)).expect("a plan");
        assert_eq!(plan.tee, Some(Technology::Tdx));
        assert_eq!(testing::plan(|_| ()).expect("a plan").tee, None);
    }

    #[test]
    fn what_contradicts_the_spec_or_is_no_such_file_is_named() {
        let many = "x".repeat(1 << 17);
        for (text, expected) in [
            ("", "is not JSON: "),
            ("[]", "is no JSON object"),
            (many.as_str(), "has more than 65536 bytes"),
            (&GOOD.replace("\"cpus\":1", "\"cpus\":2"), "says cpus 2, but vcpus of the spec is 1"),
            (&GOOD.replace("256", "\"256\""), "has no number ram_mib, which is to be 256"),
            (&GOOD.replace("\"workload_id\":\"w\",", ""), "has no string workload_id"),
            (&GOOD.replace("\"snp\"", "\"sev\""), "says tee \"sev\", but tee_type of the spec"),
            (
                &GOOD.replace("milan", "rome"),
                "has tee_data with the gen \"rome\", must be \"milan\" or",
            ),
            (&GOOD.replace(r#"{\"gen\":\"milan\"}"#, "{}"), "has tee_data without a string gen"),
            (
                &GOOD.replace(r#"{\"gen\":\"milan\"}"#, "gen"),
                "has the tee_data \"gen\", which is no",
            ),
            (&GOOD.replace("attestation_url", "url"), "has a member \"url\", which mote does not"),
        ] {
            let file = File::new("bad", text);
            let errors = testing::errors(asking("snp", &file.0));
            let start = format!("tee_config.config_path: {} {expected}", file.0.display());
            assert!(errors[0].starts_with(&start), "{start}: {errors:?}");
        }
        let file = File::new("type", GOOD);
        let errors = testing::errors(asking("sgx", &file.0));
        assert_eq!(errors, ["tee_config.tee_type: is \"sgx\", must be \"snp\" or \"tdx\""]);
        for (path, expected) in [
            ("/no/file", "cannot be read: No such file"),
            ("/dev", "is no regular file"),
            ("/dev/zero", "is no regular file"),
        ] {
            let errors = testing::errors(asking("snp", Path::new(path)));
            assert!(errors[0].contains(&format!("{path} {expected}")), "{errors:?}");
        }
    }
}
