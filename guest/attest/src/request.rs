//! What a client may ask (contract §6.5), and the answers.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::process::Message;
use crate::report::Identity;
use crate::sealing;
use crate::secrets::{self, Secrets};

/// What answers are made from.
#[derive(Debug)]
pub struct Service {
    /// Who the report says that this guest is.
    pub identity: Identity,
    /// The box's secrets.
    pub secrets: Secrets,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Route {
    Status,
    Secrets,
    Seal,
    Unseal,
    Process,
}

#[derive(Debug, Deserialize)]
struct Request<'a> {
    route: Route,
    #[serde(borrow, default)]
    payload: Option<&'a RawValue>,
}

#[derive(Debug, Serialize)]
struct Status {
    status: &'static str,
    tee: bool,
}

#[derive(Debug, Deserialize)]
struct Seal<'a> {
    #[serde(borrow)]
    data: Cow<'a, str>,
    #[serde(borrow)]
    context: Cow<'a, str>,
    #[serde(borrow, default = "default_policy")]
    policy: Cow<'a, str>,
}

#[derive(Debug, Deserialize)]
struct Unseal<'a> {
    #[serde(borrow)]
    blob: Cow<'a, str>,
    #[serde(borrow)]
    context: Cow<'a, str>,
    #[serde(borrow, default = "default_policy")]
    policy: Cow<'a, str>,
}

#[derive(Debug, Serialize)]
struct Sealed<'a> {
    blob: String,
    policy: &'a str,
    context: &'a str,
}

#[derive(Debug, Serialize)]
struct Unsealed {
    data: String,
}

fn default_policy() -> Cow<'static, str> {
    sealing::DEFAULT_POLICY.into()
}

/// What comes of a request.
#[derive(Debug)]
pub enum Reply {
    /// The answer, as JSON.
    Ready(Vec<u8>),
    /// A message, whose answer may take long, and needs nothing of the request any more.
    Message(Message),
}

impl Service {
    /// The reply to a request.
    ///
    /// # Errors
    /// The text that the client is sent instead.
    pub fn answer(&self, request: &[u8]) -> Result<Reply, String> {
        let Request { route, payload } =
            serde_json::from_slice(request).map_err(|e| format!("Invalid request JSON: {e}"))?;
        // One that is not there is null.
        let payload = payload.map_or("null", RawValue::get);
        let answer = match route {
            Route::Process => return parse(payload, "process").map(Reply::Message),
            Route::Status => json(&Status { status: "ok", tee: true }),
            Route::Secrets => {
                let request: secrets::Request<'_> = parse(payload, "secrets")?;
                json(&self.secrets.inject(&request)?)
            }
            Route::Seal => {
                let Seal { data, context, policy } = parse(payload, "seal")?;
                let blob = sealing::seal(&self.identity, &data, &context, &policy)?;
                json(&Sealed { blob, policy: &policy, context: &context })
            }
            Route::Unseal => {
                let Unseal { blob, context, policy } = parse(payload, "unseal")?;
                let data = sealing::unseal(&self.identity, &blob, &context, &policy)?;
                json(&Unsealed { data })
            }
        };
        answer.map(Reply::Ready)
    }
}

/// The answer to a message.
///
/// # Errors
/// The text that the client is sent instead: JSON too.
pub fn deliver(message: Message) -> Result<Vec<u8>, String> {
    let answer = message.deliver();
    let text = json(&answer)?;
    if answer.success { Ok(text) } else { Err(String::from_utf8_lossy(&text).into_owned()) }
}

fn parse<'a, T: Deserialize<'a>>(payload: &'a str, route: &str) -> Result<T, String> {
    serde_json::from_str(payload).map_err(|e| format!("Invalid {route} payload: {e}"))
}

fn json(answer: &impl Serialize) -> Result<Vec<u8>, String> {
    serde_json::to_vec(answer).map_err(|e| format!("Failed to serialize the answer: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{DATA_LEN, Report};
    use std::fs::File;
    use std::os::fd::OwnedFd;

    fn answer(request: &str) -> Result<String, String> {
        let directory = || OwnedFd::from(File::open("/proc/self/ns").expect("a directory"));
        let service = Service {
            identity: Report::simulated(&[0; DATA_LEN]).identity(),
            secrets: Secrets::new(directory(), directory()).expect("none"),
        };
        service.answer(request.as_bytes()).map(|reply| match reply {
            Reply::Ready(json) => String::from_utf8(json).expect("text"),
            Reply::Message(message) => panic!("{message:?}"),
        })
    }

    #[test]
    fn status_needs_no_payload() {
        for request in [r#"{"route":"status"}"#, r#"{"payload":null,"route":"status"}"#] {
            assert_eq!(answer(request), Ok(r#"{"status":"ok","tee":true}"#.into()));
        }
    }

    #[test]
    fn what_was_sealed_opens() {
        // With an escape, so that nothing of it is as it was written.
        let sealed =
            answer(r#"{"route":"seal","payload":{"data":"aGk\u003d","context":"\u0063"}}"#);
        let sealed: serde_json::Value =
            serde_json::from_str(&sealed.expect("sealed")).expect("JSON");
        assert_eq!(
            (&sealed["policy"], &sealed["context"]),
            (&"MeasurementAndChip".into(), &"c".into())
        );
        let request = serde_json::json!({"route": "unseal", "payload": sealed});
        assert_eq!(answer(&request.to_string()), Ok(r#"{"data":"aGk="}"#.into()));
    }

    #[test]
    fn what_is_no_request_is_named() {
        for (request, expected) in [
            ("", "Invalid request JSON: EOF while parsing"),
            ("{}", "Invalid request JSON: missing field `route`"),
            (
                r#"{"route":"nothing"}"#,
                "Invalid request JSON: unknown variant `nothing`, expected one of `status`, `secrets`, `seal`, `unseal`, `process`",
            ),
            (r#"{"route":"seal"}"#, "Invalid seal payload: invalid type: null"),
            (r#"{"route":"unseal","payload":{"blob":"","context":"c"}}"#, "Sealed blob too short"),
            (
                r#"{"route":"secrets","payload":{"secrets":[{"name":"a"}]}}"#,
                "Invalid secrets payload: missing field `value`",
            ),
            (
                r#"{"route":"process","payload":{"content":""}}"#,
                "Invalid process payload: missing field `session_id`",
            ),
        ] {
            let error = answer(request).expect_err("refused");
            assert!(error.starts_with(expected), "{request}: {error}");
        }
    }
}
