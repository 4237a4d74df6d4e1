//! The terminal protocol (contract §5): the same framing as exec, with frame types of its own. Used
//! by the agent's server and by `mote pty`.

use serde::{Deserialize, Serialize};

use crate::instance::Process;
use crate::text::Text;

/// Frame types.
pub mod kind {
    /// Start a session ([`super::PtyRequest`]). Later ones count as [`DATA`]: the 0.8.0 command line
    /// sends keystrokes so.
    pub const REQUEST: u8 = 0x01;
    /// Terminal bytes, both ways.
    pub const DATA: u8 = 0x02;
    /// The terminal has a new size ([`super::PtyResize`]).
    pub const RESIZE: u8 = 0x03;
    /// The command has ended ([`super::PtyExit`]).
    pub const EXIT: u8 = 0x04;
    /// From the guest a text: why there is no session. From the client, later: an end of the session, if
    /// it is empty, or [`crate::exec::control::SIGNAL`] with a number.
    pub const ERROR: u8 = 0x05;
    /// mote's own, to clients that ask for it ([`super::PtyRequest::announce`]): the command runs.
    pub const STARTED: u8 = 0x06;
}

/// Longest payload towards the guest.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// Longest payload that a client accepts from the guest.
pub const MAX_REPLY_PAYLOAD: usize = 16 << 20;

/// Longest [`kind::DATA`] payload from the guest.
pub const MAX_DATA: usize = 4096;

/// Run a command on a new terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PtyRequest {
    /// Program and arguments.
    pub cmd: Vec<Text>,
    /// `NAME=value` entries over the box's own environment.
    #[serde(default)]
    pub env: Vec<Text>,
    /// Directory to start in; the box's own by default.
    #[serde(default)]
    pub working_dir: Option<Text>,
    /// Directory of the guest that is the command's root; the box's own by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rootfs: Option<Text>,
    /// `uid`, `uid:gid`, `name` or `name:group`; root by default.
    #[serde(default)]
    pub user: Option<String>,
    /// Width in characters.
    pub cols: u16,
    /// Height in characters.
    pub rows: u16,
    /// mote's own: whether a command that cannot be started is told of by [`PtyExit::reason`], not on the
    /// terminal, and a directory that cannot be entered is such a case.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub explain: bool,
    /// mote's own: whether [`kind::STARTED`] is sent when the command runs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub announce: bool,
    /// mote's own: as [`crate::exec::ExecRequest::process`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
}

/// The terminal's new size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PtyResize {
    /// Width in characters.
    pub cols: u16,
    /// Height in characters.
    pub rows: u16,
}

/// The command's end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PtyExit {
    /// Its exit code; 128+n if signal n killed it.
    pub exit_code: i32,
    /// As [`crate::exec::ExecExit::oom_killed`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub oom_killed: bool,
    /// mote's own, for requests with `explain`: as [`crate::exec::ExecExit::reason`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::encode;

    /// The examples of contract §5, byte for byte.
    #[test]
    fn the_contracts_bytes() {
        let request = PtyRequest {
            cmd: vec!["/bin/sh".into()],
            env: vec![],
            working_dir: None,
            rootfs: None,
            user: None,
            cols: 80,
            rows: 24,
            explain: false,
            announce: false,
            process: None,
        };
        let text =
            r#"{"cmd":["/bin/sh"],"env":[],"working_dir":null,"user":null,"cols":80,"rows":24}"#;
        assert_eq!(serde_json::to_string(&request).expect("serialises"), text);
        assert_eq!(serde_json::from_str::<PtyRequest>(text).expect("parses"), request);
        assert_eq!(encode(kind::REQUEST, text.as_bytes())[..5], [1, 0, 0, 0, 0x4f]);
        let resize = serde_json::to_string(&PtyResize { cols: 120, rows: 40 }).expect("serialises");
        assert_eq!(encode(kind::RESIZE, resize.as_bytes())[..5], [3, 0, 0, 0, 0x16]);
        let exit = PtyExit { exit_code: 0, oom_killed: false, reason: None };
        let exit = serde_json::to_string(&exit).expect("serialises");
        assert_eq!(encode(kind::EXIT, exit.as_bytes()), b"\x04\0\0\0\x0f{\"exit_code\":0}");
    }
}
