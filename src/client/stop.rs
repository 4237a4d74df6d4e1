//! The errors of client commands.

/// Why a client command ends without an exit code from the guest.
#[derive(Debug)]
pub enum Stop {
    /// The box cannot be reached, or the connection to it is lost.
    Failed(anyhow::Error),
    /// A file cannot be copied.
    Refused(anyhow::Error),
    /// The guest has ended the command, or not started it: the exit code that it says, and why.
    Ended(u8, String),
    /// The reader of the output has gone, or a signal came: ends with this code, without a message.
    Quiet(u8),
}

impl From<anyhow::Error> for Stop {
    fn from(error: anyhow::Error) -> Self {
        Stop::Failed(error)
    }
}

impl Stop {
    /// Adds to the error what was being done.
    pub(super) fn context(self, what: String) -> Stop {
        match self {
            Stop::Failed(error) => Stop::Failed(error.context(what)),
            Stop::Refused(error) => Stop::Refused(error.context(what)),
            Stop::Ended(..) | Stop::Quiet(_) => self,
        }
    }
}
