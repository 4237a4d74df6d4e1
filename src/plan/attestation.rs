//! Whether the box has an attestation server of mote's, and what kind (contract §6).

use mote_agent::attestation::{Options, parse_binding};

use super::Plan;
use super::guest_init;
use super::variables::Variables;
use crate::spec::Spec;
use crate::spec::json::Report;

/// Asks for the server, and with these values for reports that are made up.
const SIMULATE: &str = "A3S_TEE_SIMULATE";
/// What the report is to say that the box is bound to.
const BINDING: &str = "A3S_RUNTIME_ATTESTATION_BINDING";

/// The server that the spec's environment asks for; an init of the image's own has its own. Without a socket no
/// client could come.
pub(super) fn plan(spec: &Spec, report: &mut Report) -> Option<Options> {
    let vars = Variables::new(&spec.entrypoint);
    let value = vars.value(SIMULATE)?;
    if guest_init::is_of_image(spec) || spec.attest_socket_path.as_os_str().is_empty() {
        return None;
    }
    let simulated = value == "1" || value.eq_ignore_ascii_case("true");
    if !simulated {
        report.warn(
            "entrypoint.env",
            format!(
                "{SIMULATE} is \"{value}\", which asks for reports of the guest's processor, and a guest of mote has none: clients of attest_socket_path are closed; 1 simulates them"
            ),
        );
    }
    let binding = vars.value(BINDING).and_then(|hex| {
        let binding = parse_binding(hex);
        if binding.is_none() {
            vars.complain(
                BINDING,
                &format!("is \"{hex}\", must be a SHA-256 in 64 lower-case hexadecimal digits"),
                report,
            );
        }
        binding
    });
    Some(Options { simulated, binding })
}

impl Plan {
    /// Whether reports about the box that its clients get are made up.
    pub fn simulates_attestation(&self) -> bool {
        self.attestation.is_some_and(|options| options.simulated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::testing::{errors, plan};

    fn asking(env: &[(&str, &str)]) -> impl FnOnce(&mut Spec) {
        let env = env.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        move |spec| {
            spec.attest_socket_path = "/tmp/attest".into();
            spec.entrypoint.env = env;
        }
    }

    #[test]
    fn only_a_box_that_asks_has_a_server() {
        let asked = |env: &[(&str, &str)]| {
            let plan = plan(asking(env)).expect("a plan");
            (plan.attestation, plan.sockets[0].guest_port.is_some())
        };
        let server = |simulated| (Some(Options { simulated, binding: None }), true);
        assert_eq!(asked(&[]), (None, false));
        assert_eq!(asked(&[(SIMULATE, "1")]), server(true));
        assert_eq!(asked(&[(SIMULATE, "TRUE")]), server(true));
        assert_eq!(asked(&[(SIMULATE, "0")]), server(false));
        assert_eq!(asked(&[(SIMULATE, "")]), server(false));
        // An init that the image lacks is mote's agent.
        assert_eq!(asked(&[(SIMULATE, "1"), ("BOX_EXEC_EXEC", "true")]), (None, true));
        let plan = plan(|s| s.entrypoint.env = vec![(SIMULATE.into(), "1".into())]);
        assert_eq!(plan.expect("a plan").attestation, None);
    }

    #[test]
    fn a_simulation_is_called_one() {
        let text = |value| plan(asking(&[(SIMULATE, value)])).expect("a plan").to_string();
        assert!(text("1").contains("\nattestation  SIMULATED: proves nothing\n"), "{}", text("1"));
        assert!(!text("0").contains("SIMULATED"));
    }

    #[test]
    fn a_binding_is_a_hash() {
        let hash = "0f".repeat(32);
        let plan = plan(asking(&[(SIMULATE, "1"), (BINDING, &hash)])).expect("a plan");
        let attestation = plan.attestation.expect("a server");
        assert_eq!(attestation.binding, Some([0x0f; 32]));
        let errors = errors(asking(&[(SIMULATE, "1"), (BINDING, "0F")]));
        assert_eq!(
            errors,
            [
                "entrypoint.env[1]: A3S_RUNTIME_ATTESTATION_BINDING is \"0F\", must be a SHA-256 in 64 lower-case hexadecimal digits"
            ]
        );
    }
}
