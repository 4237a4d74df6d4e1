//! What the agent and the attestation server, a program of its own (`guest/attest`), agree on: how the one starts
//! the other, and the variables that clients of the server have set for commands of the box (contract §6.5).

/// Where the agent finds the program in its initramfs.
pub const PATH: &str = "/mote/attest";

/// Descriptor of the directory in memory that becomes [`SECRETS`]. The listening socket is the standard input.
pub const SECRETS_FD: i32 = 3;
/// Descriptor of the directory in memory with [`VARIABLES`], which nothing else of the box can name.
pub const VARIABLES_FD: i32 = 4;

/// Where programs of the box find secrets.
pub const SECRETS: &str = "/run/secrets";
/// Most secrets.
pub const MAX_SECRETS: u64 = 1024;
/// Most bytes of all of them; each takes whole pages. As long as the longest request.
pub const MAX_SECRETS_LEN: u64 = 16 << 20;

/// Name of the file with the variables, each as `NAME=VALUE` and a NUL.
pub const VARIABLES: &str = "variables";
/// Longest such file: what a command's arguments leave room for (execve(2)).
pub const MAX_VARIABLES_LEN: u64 = 256 << 10;

/// What the server is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Whether it makes reports up where the guest's kernel has none.
    pub simulated: bool,
    /// What the report says that the box is bound to, beside the server's key.
    pub binding: Option<[u8; 32]>,
}

const SIMULATE: &str = "--simulate";
const BINDING: &str = "--binding";

impl Options {
    /// The program's arguments.
    pub fn arguments(&self) -> Vec<String> {
        let binding = self.binding.map(|binding| {
            let hex = binding.iter().map(|byte| format!("{byte:02x}")).collect();
            [BINDING.to_owned(), hex]
        });
        let simulate = self.simulated.then(|| SIMULATE.to_owned());
        simulate.into_iter().chain(binding.into_iter().flatten()).collect()
    }

    /// The same, read.
    ///
    /// # Errors
    /// If they are other arguments.
    pub fn from_arguments(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Options { simulated: false, binding: None };
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                SIMULATE => options.simulated = true,
                BINDING => {
                    let hex = arguments.next().unwrap_or_default();
                    options.binding = parse_binding(&hex);
                    options.binding.ok_or_else(|| format!("{BINDING} '{hex}' is no binding"))?;
                }
                other => return Err(format!("'{other}' is not an argument of this program")),
            }
        }
        Ok(options)
    }
}

/// A binding as the runtime writes it, in 64 lower-case hexadecimal digits.
pub fn parse_binding(hex: &str) -> Option<[u8; 32]> {
    let digits = hex.bytes().map(|digit| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    });
    let digits: Vec<u8> = digits.collect::<Option<_>>()?;
    let bytes: Vec<u8> =
        digits.chunks(2).map(|pair| pair.iter().fold(0, |n, d| n << 4 | d)).collect();
    (hex.len() == 64).then_some(bytes)?.try_into().ok()
}

/// The names and values in a file of [`VARIABLES`].
pub fn variables(file: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    file.split(|byte| *byte == 0).filter_map(|entry| {
        let equals = entry.iter().position(|byte| *byte == b'=')?;
        Some((&entry[..equals], &entry[equals + 1..]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_survive_as_arguments() {
        let binding = Some(std::array::from_fn(|index| 8 * index as u8));
        for options in [
            Options { simulated: false, binding: None },
            Options { simulated: true, binding: None },
            Options { simulated: true, binding },
        ] {
            let read = Options::from_arguments(options.arguments().into_iter());
            assert_eq!(read, Ok(options));
        }
        let refused = |arguments: &[&str]| {
            Options::from_arguments(arguments.iter().map(ToString::to_string)).is_err()
        };
        assert!(refused(&["x"]) && refused(&["--binding"]) && refused(&["--binding", "0"]));
        for hex in ["A".repeat(64), "a".repeat(63), "a".repeat(66), "é".repeat(32), String::new()]
        {
            assert_eq!(parse_binding(&hex), None, "{hex}");
        }
    }

    #[test]
    fn variables_may_have_any_value() {
        let read: Vec<_> = variables(b"A=1\0B=x=\n\0C=\0").collect();
        assert_eq!(read, [(&b"A"[..], &b"1"[..]), (b"B", b"x=\n"), (b"C", b"")]);
        assert_eq!(variables(b"").count(), 0);
    }
}
