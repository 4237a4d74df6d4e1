//! Messages that clients have for a program of the box (contract §6.5): it serves HTTP on a port of loopback.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::budget::Budget;

/// Where the program listens.
const PORT: u16 = 8080;
/// How long it may say nothing.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long its whole answer may take.
const LIMIT: Duration = Duration::from_secs(600);
/// Longest message and longest answer.
const MAX_LEN: usize = 1 << 20;

/// What the answers of all clients may take at once.
static ANSWERS: Budget = Budget::new(16 * MAX_LEN);

/// A message to the program.
#[derive(Debug, Deserialize, Serialize)]
pub struct Message {
    session_id: String,
    content: String,
    #[serde(default = "process_message")]
    request_type: String,
}

fn process_message() -> String {
    "process_message".into()
}

/// What the client is told.
#[derive(Debug, Serialize)]
pub struct Answer {
    session_id: String,
    content: String,
    /// Whether there was an answer.
    pub success: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Message {
    /// Sends it, and waits for the answer.
    pub fn deliver(self) -> Answer {
        let answer = ask(SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)), &self);
        let (content, error) = match answer {
            Ok(content) => (content, None),
            Err(reason) => (String::new(), Some(reason)),
        };
        Answer { session_id: self.session_id, content, success: error.is_none(), error }
    }
}

fn ask(at: SocketAddr, message: &Message) -> Result<String, String> {
    let failed = |doing: &'static str| move |e: io::Error| format!("{doing}: {e}");
    let deadline = Instant::now() + LIMIT;
    let part = ANSWERS.take(MAX_LEN, Some(Instant::now() + PATIENCE));
    let _part = part.ok_or("Too many messages wait for the agent's answer")?;
    let body = serde_json::to_vec(message)
        .map_err(|e| format!("Failed to serialize agent request: {e}"))?;
    if body.len() > MAX_LEN {
        return Err(format!("Agent request is longer than {MAX_LEN} bytes"));
    }
    let mut stream = TcpStream::connect_timeout(&at, PATIENCE)
        .map_err(|e| format!("Cannot connect to agent at {at}: {e}"))?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
        .map_err(failed("Failed to set the time-outs"))?;
    // Of HTTP/1.0, so that the answer ends with the connection and is in one piece.
    let head = format!(
        "POST /process HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).map_err(failed("Failed to write to agent"))?;
    stream.write_all(&body).map_err(failed("Failed to write payload to agent"))?;

    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => answer.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("Failed to read agent response: {error}")),
        }
        if answer.len() > MAX_LEN {
            return Err(format!("Agent response is longer than {MAX_LEN} bytes"));
        }
        if Instant::now() >= deadline {
            return Err(format!("Agent response took longer than {} s", LIMIT.as_secs()));
        }
    }
    const END_OF_HEAD: &[u8] = b"\r\n\r\n";
    let body = answer.windows(END_OF_HEAD.len()).position(|bytes| bytes == END_OF_HEAD);
    let body = &answer[body.map_or(0, |at| at + END_OF_HEAD.len())..];
    let body: serde_json::Value =
        serde_json::from_slice(body).map_err(|e| format!("Invalid agent response JSON: {e}"))?;
    match body.get("content") {
        Some(serde_json::Value::String(content)) => Ok(content.clone()),
        _ => Err("Agent response missing 'content' field".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    /// What a client is told when the program answers so, and what the program was sent.
    fn answered(answer: &[u8]) -> (Result<String, String>, String) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let at = listener.local_addr().expect("an address");
        let answer = answer.to_vec();
        let program = thread::spawn(move || {
            let (mut client, _) = listener.accept().expect("a client");
            let mut request = Vec::new();
            while !request.ends_with(b"}") {
                let mut byte = [0];
                client.read_exact(&mut byte).expect("a request");
                request.extend(byte);
            }
            // What is too long is not read to its end.
            let _ = client.write_all(&answer);
            String::from_utf8(request).expect("text")
        });
        let message: Message =
            serde_json::from_str(r#"{"session_id":"s","content":"hi"}"#).expect("a message");
        (ask(at, &message), program.join().expect("ended"))
    }

    #[test]
    fn a_message_is_posted_and_its_answer_returned() {
        let (answer, request) =
            answered(b"HTTP/1.0 200 OK\r\nA: b\r\n\r\n{\"content\":\"there\",\"x\":1}");
        assert_eq!(answer, Ok("there".into()));
        assert!(request.starts_with("POST /process HTTP/1.0\r\nHost: localhost\r\n"), "{request}");
        let body = r#"{"session_id":"s","content":"hi","request_type":"process_message"}"#;
        assert!(request.ends_with(&format!(
            "Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )));
    }

    #[test]
    fn what_is_no_answer_is_named() {
        let error = |answer: &[u8]| answered(answer).0.expect_err("no answer");
        assert!(
            error(b"HTTP/1.0 500 No\r\n\r\nsorry").starts_with("Invalid agent response JSON: ")
        );
        assert!(error(b"").starts_with("Invalid agent response JSON: "));
        assert_eq!(error(b"\r\n\r\n{}"), "Agent response missing 'content' field");
        let long = vec![b'x'; MAX_LEN + 1];
        assert_eq!(error(&long), "Agent response is longer than 1048576 bytes");
    }
}
