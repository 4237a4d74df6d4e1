//! See `src/fuzz/template.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(init: mote::fuzz::prepare(), |data: &[u8]| mote::fuzz::run("template", data));
