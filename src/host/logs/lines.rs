//! Lines out of a stream.

/// Longest line that is kept as one, in bytes. The runtime has no limit, and a guest has no end.
const MAX_LINE: usize = 1 << 20;

/// The end of a stream that is no whole line yet.
#[derive(Debug, Default)]
pub struct Lines(Vec<u8>);

impl Lines {
    /// Takes the stream's next bytes, and gives each line that they end to `line`, with `\n` at its end and
    /// without `\r` before that. A line that is too long comes in parts, all but the last without `\n`.
    pub fn take(&mut self, bytes: &[u8], mut line: impl FnMut(&[u8])) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.0.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                self.end(&mut line);
            }
            while self.0.len() > MAX_LINE {
                // Not in the middle of a character.
                let starts = |at: &usize| self.0[*at] & 0xc0 != 0x80;
                let cut = (MAX_LINE - 3..=MAX_LINE).rev().find(starts).unwrap_or(MAX_LINE);
                line(&self.0[..cut]);
                self.0.drain(..cut);
            }
        }
    }

    /// The stream's end: gives what it ends with to `line`, as a line.
    pub fn finish(&mut self, mut line: impl FnMut(&[u8])) {
        if !self.0.is_empty() {
            self.end(&mut line);
        }
    }

    fn end(&mut self, line: &mut impl FnMut(&[u8])) {
        while let [.., b'\n' | b'\r'] = self.0[..] {
            self.0.pop();
        }
        self.0.push(b'\n');
        line(&self.0);
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        let mut lines = Lines::default();
        for chunk in chunks {
            lines.take(chunk, |line| found.push(line.to_vec()));
        }
        lines.finish(|line| found.push(line.to_vec()));
        found
    }

    #[test]
    fn lines_are_whole_however_they_come() {
        let expected: [&[u8]; 4] = [b"one\n", b"\n", b"two\n", b"three\n"];
        assert_eq!(lines(&[b"one\n\r\ntwo\r\r\nthree"]), expected);
        assert_eq!(lines(&[b"on", b"e\n\r", b"\ntwo", b"\r\r\n", b"three", b"\r"]), expected);
        assert_eq!(lines(&[b"", b""]), Vec::<Vec<u8>>::new());
    }

    #[test]
    fn an_endless_line_comes_in_parts_of_whole_characters() {
        let text = "€".repeat(MAX_LINE);
        let chunks: Vec<&[u8]> = text.as_bytes().chunks(65_536).collect();
        let found = lines(&chunks);
        assert_eq!(found.len(), text.len().div_ceil(MAX_LINE) + 1);
        for part in &found {
            assert!(part.len() <= MAX_LINE + 1 && std::str::from_utf8(part).is_ok());
        }
        assert_eq!(found.concat(), [text.as_bytes(), b"\n"].concat());
        let (last, others) = found.split_last().expect("parts");
        assert!(last.ends_with(b"\n") && others.iter().all(|part| !part.ends_with(b"\n")));
    }
}
