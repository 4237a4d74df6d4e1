//! See `src/fuzz/oci.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(init: mote::fuzz::prepare(), |data: &[u8]| mote::fuzz::run("oci", data));
