//! Build script: compiles the agent's BPF programs with clang, which `make tools` installs.

use std::error::Error;
use std::path::PathBuf;
use std::process::Command;
use std::{env, io};

const SOURCE: &str = "bpf/tsi.bpf.c";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={SOURCE}");
    compile("tsi.bpf.o", &[])?;
    compile("tsi-all.bpf.o", &["-DWITH_RESOLVERS", "-DWITH_CLIENTS"])?;
    compile("tsi-clients.bpf.o", &["-DWITH_CLIENTS", "-DHAS_OWN_NETWORK=true"])
}

fn compile(name: &str, options: &[&str]) -> Result<(), Box<dyn Error>> {
    let object = PathBuf::from(env::var("OUT_DIR")?).join(name);
    // Debian's headers of the kernel's own types are below the architecture's directory. No debug
    // information: it would only make the agent larger, and the kernel has no BTF to match.
    let status = Command::new("clang")
        .args(["-target", "bpf", "-mcpu=v3", "-O2", "-Wall", "-Wextra", "-Werror"])
        .args(options)
        .args(["-I", "/usr/include/x86_64-linux-gnu", "-c", SOURCE, "-o"])
        .arg(&object)
        .status()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => "clang is missing; run 'make tools'".into(),
            _ => format!("run clang: {error}"),
        })?;
    if !status.success() {
        return Err(format!(
            "clang could not compile {SOURCE}; its message is above (headers missing? run 'make tools')"
        )
        .into());
    }
    Ok(())
}
