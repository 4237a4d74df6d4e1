//! The spec's `egress`, checked: rules, and what is done with the rest.

use std::net::Ipv4Addr;

use crate::policy::DNS_PORT;
use crate::policy::rules::{Action, Rule, Rules};
use crate::spec::json::Report;

/// Most rules: each connection is held against them one by one.
const MAX_RULES: usize = 1024;

/// Reads the rules of a box with this gateway, if it has a network of its own. Without `egress`, everything above
/// the floor is allowed ([`crate::policy`]).
pub(super) fn plan(
    entries: Option<&[String]>,
    gateway: Option<Ipv4Addr>,
    report: &mut Report,
) -> Rules {
    let Some(entries) = entries else { return Rules::default() };
    if entries.is_empty() {
        report.error(
            "egress",
            "is empty; leave it out to allow what is allowed without rules, or write [\"deny\"] to deny everything",
        );
    } else if entries.len() > MAX_RULES {
        report.error("egress", format!("has {} rules, at most {MAX_RULES}", entries.len()));
        return Rules::default();
    }
    let (default, entries) = match entries.split_last() {
        Some((last, rest)) if last == "allow" => (Some(Action::Allow), rest),
        Some((last, rest)) if last == "deny" => (Some(Action::Deny), rest),
        _ => (None, entries),
    };
    let mut rules: Vec<Rule> = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let path = format!("egress[{index}]");
        if entry == "allow" || entry == "deny" {
            report
                .error(path, format!("is \"{entry}\" for everything, which must be the last rule"));
            continue;
        }
        match entry.parse::<Rule>() {
            Ok(rule) => {
                warn_of_no_effect(&rules, &rule, gateway, &path, report);
                rules.push(rule);
            }
            Err(problem) => report.error(
                path,
                format!("is \"{entry}\": {problem}; write allow|deny:CIDR[:tcp|udp[:PORT]]"),
            ),
        }
    }
    let all_are_read = rules.len() == entries.len();
    let all_deny = rules.iter().all(|rule| rule.action == Action::Deny);
    if default.is_none() && !rules.is_empty() && all_are_read && all_deny {
        report.warn(
            "egress",
            "denies everything: what no rule is about is denied; end it with \"allow\" to allow the rest",
        );
    }
    Rules { rules, default: default.unwrap_or(Action::Deny) }
}

/// Warns of a rule that never decides anything.
fn warn_of_no_effect(
    earlier: &[Rule],
    rule: &Rule,
    gateway: Option<Ipv4Addr>,
    path: &str,
    report: &mut Report,
) {
    let is_gateway = rule.to.is_single() && gateway.is_some_and(|ip| rule.to.contains(ip.into()));
    let is_dns = matches!(rule.by, Some((_, Some(port))) if port.get() == DNS_PORT);
    if rule.action == Action::Allow && (rule.to.is_loopback() || is_gateway) && !is_dns {
        let what = if is_gateway { ", nor what passt can take for it" } else { "" };
        report.warn(
            path,
            format!("{rule} opens nothing but a name server there: no rule opens the host's loopback{what}"),
        );
    }
    // A rule that names an address of the host opens it, which a wider one does not.
    let opens = |rule: &Rule, wider: &Rule| {
        rule.action == Action::Allow
            && wider.action == Action::Allow
            && rule.to.names(rule.to.first())
            && !wider.to.names(rule.to.first())
    };
    let shadow = earlier.iter().position(|wider| wider.covers(rule) && !opens(rule, wider));
    if let Some(index) = shadow {
        report.warn(
            path,
            format!("{rule} has no effect: egress[{index}], {}, comes first", earlier[index]),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rules as the plan shows them, and what is said about them.
    fn plan(entries: &[&str]) -> (String, Vec<String>, Vec<String>) {
        let entries: Vec<String> = entries.iter().map(|entry| (*entry).into()).collect();
        let mut report = Report::default();
        let rules = super::plan(Some(&entries), Some([10, 88, 0, 1].into()), &mut report);
        let texts =
            |faults: &[crate::spec::json::Fault]| faults.iter().map(|f| f.to_string()).collect();
        (rules.to_string(), texts(&report.errors), texts(&report.warnings))
    }

    #[test]
    fn what_no_rule_is_about_is_denied_unless_the_last_says_otherwise() {
        for (entries, expected) in [
            (&["allow:10.0.0.0/8"][..], "allow:10.0.0.0/8, deny"),
            (&["deny:10.0.0.0/8", "allow"], "deny:10.0.0.0/8, allow"),
            (&["allow:10.0.0.0/8:tcp:80", "deny"], "allow:10.0.0.0/8:tcp:80, deny"),
            (&["deny"], "deny"),
            (&["allow"], "allow"),
        ] {
            assert_eq!(plan(entries), (expected.into(), vec![], vec![]));
        }
        assert_eq!(super::plan(None, None, &mut Report::default()), Rules::default());
    }

    #[test]
    fn wrong_rules_are_named() {
        let (_, errors, _) = plan(&["allow:10.0.0.0/8", "permit:1.2.3.4", "deny", "allow:x"]);
        for (error, start) in errors.iter().zip([
            "egress[1]: is \"permit:1.2.3.4\": \"permit\" is no action, must be allow or deny; write",
            "egress[2]: is \"deny\" for everything, which must be the last rule",
            "egress[3]: is \"allow:x\": \"x\" is no IPv4 or IPv6 address; names cannot be matched; write",
        ]) {
            assert!(error.starts_with(start), "{error}");
        }
        assert_eq!(errors.len(), 3);
        assert!(plan(&[]).1[0].starts_with("egress: is empty; leave it out"));
        let many = vec!["deny:10.0.0.0/8"; 10_000];
        assert_eq!(plan(&many).1, ["egress: has 10000 rules, at most 1024"]);
        assert_eq!(plan(&many[..MAX_RULES]).1, Vec::<String>::new());
    }

    #[test]
    fn rules_without_effect_are_named() {
        let shadowed = |entries: &[&str]| {
            let (_, errors, warnings) = plan(entries);
            assert_eq!(errors, Vec::<String>::new());
            warnings
        };
        assert_eq!(
            shadowed(&["deny:10.0.0.0/8", "allow:192.0.2.0/24", "allow:10.1.0.0/16:tcp:80"]),
            [
                "egress[2]: allow:10.1.0.0/16:tcp:80 has no effect: egress[0], deny:10.0.0.0/8, comes first"
            ]
        );
        assert_eq!(shadowed(&["allow:10.0.0.0/8", "allow:10.1.0.0/16"]).len(), 1);
        // It opens that address even if it is the host's own.
        assert_eq!(shadowed(&["allow:10.0.0.0/8", "allow:10.1.2.3"]), Vec::<String>::new());
        assert_eq!(shadowed(&["allow:10.1.2.3", "allow:10.1.2.3"]).len(), 1);
        assert!(shadowed(&["deny:10.0.0.0/8"])[0].starts_with("egress: denies everything"));
        for entry in ["allow:127.0.0.0/8", "allow:10.88.0.1"] {
            assert!(shadowed(&[entry])[0].contains("no rule opens the host's loopback"), "{entry}");
        }
        assert_eq!(shadowed(&["allow:10.88.0.1:udp:53"]), Vec::<String>::new());
    }
}
