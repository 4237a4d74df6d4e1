//! The fault matrix: what a failing host, a careless caller or a dying back-end does to a box, and what
//! is promised then: the exit code, a line that says why, and nothing left behind. Rows that belong to
//! one feature are with that feature's tests.

mod back_ends;
mod callers;
mod ends;
mod host;
