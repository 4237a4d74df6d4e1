//! Build script: makes the guest's two files, which [`image`](../src/image.rs) embeds. The kernel
//! comes from `kernel.sh` (cached per machine), the initramfs holds the agent, built here as its own
//! static program.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

#[path = "../src/cpio.rs"]
mod cpio;

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    for input in [
        "guest",
        "Cargo.lock",
        "src/cpio.rs",
        "resources/build.rs",
        "resources/kernel.sh",
        "resources/kernel.config",
    ] {
        println!("cargo::rerun-if-changed={input}");
    }
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let kernel = build_kernel(&root)?;
    println!("cargo::rustc-env=MOTE_BUILT_KERNEL={kernel}");

    let initramfs = out.join("initramfs.cpio");
    fs::write(&initramfs, initramfs_of(&fs::read(build_agent(&root, &out)?)?))?;
    println!("cargo::rustc-env=MOTE_BUILT_INITRAMFS={}", initramfs.display());
    Ok(())
}

fn build_kernel(root: &Path) -> Result<String, Box<dyn Error>> {
    let output = Command::new("bash")
        .arg(root.join("resources/kernel.sh"))
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err("resources/kernel.sh failed; its message is above".into());
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn build_agent(root: &Path, out: &Path) -> Result<PathBuf, Box<dyn Error>> {
    // A directory of its own: the outer cargo holds the lock of the usual one. All profiles share it.
    let target_dir = out
        .ancestors()
        .find(|dir| dir.file_name().is_some_and(|name| name == TARGET))
        .and_then(Path::parent)
        .unwrap_or(out)
        .join("agent");
    let cargo_home = env::var("CARGO_HOME").unwrap_or_default();
    // Not position-independent: PID 1 of a private machine gains nothing from relocating itself.
    // The remapped paths make the bytes the same in every checkout.
    let mut flags = vec![
        "-Ctarget-feature=+crt-static".to_owned(),
        "-Crelocation-model=static".to_owned(),
        format!("--remap-path-prefix={}=/mote", root.display()),
    ];
    if !cargo_home.is_empty() {
        flags.push(format!("--remap-path-prefix={cargo_home}=/cargo"));
    }
    let status = Command::new(env::var("CARGO")?)
        .current_dir(root)
        .args(["build", "--quiet", "--locked", "--package", "mote-agent", "--profile", "release"])
        .args(["--config", "profile.release.opt-level=\"z\"", "--target", TARGET])
        .arg("--target-dir")
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status()?;
    if !status.success() {
        return Err("building mote-agent failed; cargo's message is above".into());
    }
    Ok(target_dir.join(TARGET).join("release/mote-agent"))
}

fn initramfs_of(agent: &[u8]) -> Vec<u8> {
    let mut archive = cpio::Archive::new();
    archive.directory("dev", 0o755);
    // The kernel opens it as the agent's standard streams, before anything is mounted.
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file("init", 0o755, agent);
    archive.finish()
}
