//! An exec session (contract §4): one request, whoever carries it out, and the reply.

use std::time::Duration;

use mote_agent::exec::{
    DEFAULT_TIMEOUT_NS, ExecRequest, FileOp, FileResponse, MAX_ONE_SHOT_OUTPUT, Request, control,
    kind,
};
use mote_agent::files::{self, FilesystemOp, FilesystemResponse};
use mote_agent::frame;
use serde::Serialize;

use crate::connection::{Connection, PATIENCE};
use crate::journal::{Claim, Journal, Key};
use crate::launch::{self, Program};
use crate::reply::Reply;
use crate::session::Context;
use crate::spawn::Release;
use crate::sys::files::become_root;
use crate::{command, directory, sys, transfer};

/// How much longer than a command may run a repeated request waits for its answer.
const SLACK: Duration = Duration::from_secs(10);

/// Signals that end no process that has no handler for them (signal(7)).
const NOT_ENDING: [i32; 8] = [
    libc::SIGCHLD,
    libc::SIGCONT,
    libc::SIGSTOP,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGURG,
    libc::SIGWINCH,
];

/// What is left to send to the client: bytes, or the text of an error; `None` if there is nobody to send it to.
type Answer = Result<Option<Vec<u8>>, String>;

/// Serves one connection to its end.
pub fn session(mut connection: Connection, context: &Context<'_>, journal: Option<&Journal>) {
    let Some(first) = connection.wait_for_frame() else { return };
    let answer = match first.kind {
        kind::HEARTBEAT => Ok(Some(frame::encode(kind::HEARTBEAT, &first.payload))),
        kind::CONTROL if first.payload == control::START => start(context),
        kind::CONTROL => signal_main(&first.payload, context),
        _ => Request::parse(&first.payload).and_then(|request| {
            drop(first);
            carry_out(&request, &mut connection, context, journal)
        }),
    };
    match answer {
        Ok(Some(bytes)) => connection.send(&bytes),
        Ok(None) => return,
        Err(text) => connection.send(&frame::encode(kind::ERROR, text.as_bytes())),
    }
    connection.finish();
}

/// Has the entrypoint start.
fn start(context: &Context<'_>) -> Answer {
    let started = || "The entrypoint has been started before".to_owned();
    let held = context.held.ok_or_else(started)?;
    match (held.state(), held.release()) {
        (Release::Waiting, Ok(Release::Running)) => {
            Ok(Some(frame::encode(kind::CONTROL, control::START_ACK)))
        }
        (Release::Waiting, Ok(Release::Failed(error))) => {
            Err(launch::explain_held(&Program::of_entrypoint(context.instance), error).reason)
        }
        (Release::Waiting, _) => Err("The entrypoint has ended before it started".into()),
        _ => Err(started()),
    }
}

/// An instruction in the place of a request.
fn signal_main(instruction: &[u8], context: &Context<'_>) -> Answer {
    if !instruction.starts_with(control::SIGNAL_MAIN) {
        return Err("Expected Data frame".into());
    }
    // As the reference takes what is no number.
    let number = control::signal(instruction.trim_ascii_end(), control::SIGNAL_MAIN);
    let number = number.unwrap_or(libc::SIGTERM);
    let waits = context.held.is_some_and(|held| matches!(held.state(), Release::Waiting));
    // As process 1 it gets no signal that it has no handler for, and one that waits has none.
    let ends = waits && !NOT_ENDING.contains(&number);
    sys::signal(context.entrypoint, if ends { libc::SIGKILL } else { number });
    Ok(Some(frame::encode(kind::CONTROL, control::SIGNAL_MAIN_ACK)))
}

fn carry_out(
    request: &Request,
    connection: &mut Connection,
    context: &Context<'_>,
    journal: Option<&Journal>,
) -> Answer {
    match request {
        Request::Exec(request) => run(request, connection, context, journal),
        Request::File(request) => Ok(Some(encode(&transfer::carry_out(request)))),
        Request::Enveloped(files::Request::File(request)) => respond(
            // To do a look twice harms nobody.
            request.request_id.as_deref().filter(|_| request.op == FileOp::Upload),
            |id| Key::new("file", id, request),
            (connection, journal),
            || transfer::carry_out_enveloped(request),
            |error| FileResponse { error: Some(error), ..FileResponse::default() },
        ),
        Request::Enveloped(files::Request::Filesystem(request)) => respond(
            request
                .request_id
                .as_deref()
                .filter(|_| !matches!(request.op, FilesystemOp::Stat | FilesystemOp::ListDir)),
            |id| Key::new("filesystem", id, request),
            (connection, journal),
            || directory::carry_out(request),
            |error| FilesystemResponse { error: Some(error), ..FilesystemResponse::default() },
        ),
    }
}

fn run(
    request: &ExecRequest,
    connection: &mut Connection,
    context: &Context<'_>,
    journal: Option<&Journal>,
) -> Answer {
    let Some(id) = &request.request_id else {
        let mut reply = match request.is_bounded() {
            _ if request.streaming => Reply::Streaming,
            true => Reply::bounded(MAX_ONE_SHOT_OUTPUT),
            false => Reply::whole(),
        };
        let Some(exit) = command::run(request, connection, &mut reply, context) else {
            return Ok(None);
        };
        reply.finish(&exit, |piece| connection.send(piece));
        return Ok(Some(Vec::new()));
    };
    if request.streaming {
        return Err("Idempotent request IDs are supported only for one-shot exec".into());
    }
    let limit_ns = if request.timeout_ns == 0 { DEFAULT_TIMEOUT_NS } else { request.timeout_ns };
    let patience = Duration::from_nanos(limit_ns) + SLACK;
    let key = Key::new("exec", id, request)?;
    once(&key, patience, connection, journal, |connection| {
        let mut reply = Reply::bounded(MAX_ONE_SHOT_OUTPUT);
        // It runs to its end, whether or not its client is there.
        let exit = command::run(request, connection, &mut reply, context).unwrap_or_default();
        let mut bytes = Vec::new();
        reply.finish(&exit, |piece| bytes.extend_from_slice(piece));
        bytes
    })
}

/// Answers a request whose failures are responses too; with an id, only once.
fn respond<'a, R: Serialize>(
    id: Option<&'a str>,
    key: impl FnOnce(&'a str) -> Result<Key<'a>, String>,
    (connection, journal): (&mut Connection, Option<&Journal>),
    work: impl FnOnce() -> R,
    refuse: impl FnOnce(String) -> R,
) -> Answer {
    let Some(id) = id.filter(|id| !id.is_empty()) else { return Ok(Some(encode(&work()))) };
    let answer =
        key(id).and_then(|key| once(&key, PATIENCE, connection, journal, |_| encode(&work())));
    Ok(answer.unwrap_or_else(|error| Some(encode(&refuse(error)))))
}

/// Does the work unless it has been done for this key, and gives the answer of when it was.
fn once(
    key: &Key<'_>,
    patience: Duration,
    connection: &mut Connection,
    journal: Option<&Journal>,
    work: impl FnOnce(&mut Connection) -> Vec<u8>,
) -> Answer {
    let journal = journal.ok_or("request IDs need a guest kernel with tmpfs")?;
    match journal.claim(key, Some(patience), || !connection.is_hung_up())? {
        Claim::Answered(answer) => Ok(Some(answer)),
        Claim::Forgotten => Ok(None),
        Claim::Ours(entry) => {
            let answer = work(connection);
            // Where it cannot be kept, this client gets it all the same.
            let _ = become_root().and_then(|()| journal.answer(entry, &answer));
            Ok(Some(answer))
        }
    }
}

/// The frame of a response, which is plain data and always serialises.
fn encode(response: &impl Serialize) -> Vec<u8> {
    frame::encode(kind::DATA, &serde_json::to_vec(response).unwrap_or_default())
}
