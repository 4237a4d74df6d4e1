//! The spec's environment, read by name.

use crate::spec;
use crate::spec::json::Report;

/// The spec's environment.
#[derive(Clone, Copy)]
pub(super) struct Variables<'a> {
    entrypoint: &'a spec::Entrypoint,
    /// Whether values of `BOX_EXEC_*` are in base64 (later contract versions).
    encoded: bool,
}

impl<'a> Variables<'a> {
    pub fn new(entrypoint: &'a spec::Entrypoint) -> Self {
        let vars = Variables { entrypoint, encoded: false };
        Variables { encoded: vars.value("BOX_EXEC_B64") == Some("1"), ..vars }
    }

    /// The index of a variable in the spec's list.
    pub fn index(&self, name: &str) -> Option<usize> {
        self.entrypoint.variable(name)
    }

    pub fn value(&self, name: &str) -> Option<&'a str> {
        self.index(name).map(|index| self.entrypoint.env[index].1.as_str())
    }

    /// All names and values.
    pub fn all(&self) -> &'a [(String, String)] {
        &self.entrypoint.env
    }

    /// The values of `NAME_0`, `NAME_1`, … up to the first gap, with their indexes in the environment.
    pub fn numbered(&self, name: &str) -> impl Iterator<Item = (usize, &'a str)> {
        (0..).map_while(move |n| {
            let index = self.index(&format!("{name}_{n}"))?;
            Some((index, self.entrypoint.env[index].1.as_str()))
        })
    }

    /// Complains of a variable, whose name goes before the problem.
    pub fn complain(&self, name: &str, problem: &str, report: &mut Report) {
        let place = self.index(name).map_or(String::new(), |index| format!("[{index}]"));
        report.error(format!("entrypoint.env{place}"), format!("{name} {problem}"));
    }

    /// The text that a value of `BOX_EXEC_*` stands for; `None` if it is none.
    pub fn text_of(&self, value: &str) -> Option<String> {
        if !self.encoded {
            return Some(value.to_owned());
        }
        mote_agent::exec::from_base64url(value).filter(|text| !text.contains('\0'))
    }

    /// The value of the variable at this index, decoded.
    pub fn decoded(&self, index: usize, report: &mut Report) -> String {
        let (name, value) = &self.entrypoint.env[index];
        self.text_of(value).unwrap_or_else(|| {
            report.error(
                format!("entrypoint.env[{index}]"),
                format!("{name} is not text without NUL in base64url, as BOX_EXEC_B64=1 says"),
            );
            String::new()
        })
    }
}
