//! Why a client command ends without a code from the guest.

/// Why a client command ends without a code from the guest.
#[derive(Debug)]
pub enum Stop {
    /// The box cannot be reached, or broke off.
    Failed(anyhow::Error),
    /// A file cannot be moved.
    Refused(anyhow::Error),
    /// The reader of the output has gone, or a signal came: ends with this code, without a word.
    Quiet(u8),
}

impl From<anyhow::Error> for Stop {
    fn from(error: anyhow::Error) -> Self {
        Stop::Failed(error)
    }
}

impl Stop {
    /// Adds what was being done.
    pub(super) fn context(self, what: String) -> Stop {
        match self {
            Stop::Failed(error) => Stop::Failed(error.context(what)),
            Stop::Refused(error) => Stop::Refused(error.context(what)),
            Stop::Quiet(code) => Stop::Quiet(code),
        }
    }
}
