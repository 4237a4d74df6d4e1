//! `mote probe`: says whether this host can run boxes, and if not, what to change.

use std::io::{self, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result};

use crate::confine::{Isolation, NetworkAccess};
use crate::kvm::{self, cpu, self_test, vcpu};
use crate::memory;
use crate::plan::{self, Environment, Technology, Templates};
use crate::spec::json::Report;
use crate::tee;
use crate::template::cache;

/// Checks everything and prints a line for each. `true` when the host is ready.
pub fn run(environment: &Environment) -> bool {
    let network = NetworkAccess { connects: true, answers: true, stays: false };
    let confined = Ok(format!("boxes are confined by {}", Isolation::of_host(network)));
    let checks = [("kvm", kvm()), ("virtiofsd", virtiofsd(environment)), ("sandbox", confined)];
    let ready = checks.iter().all(|(_, result)| result.is_ok());
    let mut text = String::new();
    for (name, result) in checks {
        let line = match result {
            Ok(found) => format!("{name:<10} ok: {found}\n"),
            Err(problem) => format!("{name:<10} NOT READY: {problem}\n"),
        };
        text += &line;
    }
    for technology in Technology::ALL {
        let name = technology.to_string().to_lowercase();
        text += &format!("{name:<10} not offered: {}\n", tee::missing(technology));
    }
    let templates = match plan::templates(environment, &[], &mut Report::default()) {
        Templates::Off(why) => format!("none are used: {why}"),
        Templates::In(directory) => cache::describe(&directory),
    };
    text += &format!("{:<10} {templates}\n", "templates");
    text += if ready { "ready\n" } else { "not ready\n" };
    let _ = io::stdout().write_all(text.as_bytes());
    ready
}

fn kvm() -> std::result::Result<String, String> {
    test_kvm().map_err(|error| format!("{error:#}"))?;
    Ok(format!("{} ran a test guest", kvm::DEVICE))
}

/// Opens KVM and runs the self-test in a VM of its own.
fn test_kvm() -> Result<()> {
    let kvm = kvm::open()?;
    let vm = kvm::create_vm(&kvm)?;
    let ram = memory::create_ram(2 << 20)?;
    memory::add_ram(&vm, &ram)?;
    let cpuid = cpu::cpuid(&kvm::supported_cpuid(&kvm)?, 0, 1, true);
    let mut vcpu = vcpu::create(&vm, 0, &cpuid)?;
    // There is no kernel to enter, and the vCPU does not run on.
    vcpu::prepare_boot(&vcpu, &cpuid, &ram, 0)?;
    let (sender, result) = mpsc::channel();
    thread::Builder::new()
        .name("kvm-self-test".into())
        // Sending fails if the test took too long and nobody waits for it any more.
        .spawn(move || drop(sender.send(self_test::run(&mut vcpu))))
        .context("start the KVM self-test")?;
    self_test::wait(&result)
}

fn virtiofsd(environment: &Environment) -> std::result::Result<String, String> {
    let mut report = Report::default();
    let Some(program) = plan::virtiofsd(environment, &mut report) else {
        return Ok(format!("built in (virtiofsd {})", mote_virtiofsd::VERSION));
    };
    if !report.errors.is_empty() {
        return Err(report.errors.iter().map(|fault| fault.problem.clone()).collect());
    }
    let output = Command::new(&program).arg("--version").stdin(Stdio::null()).output();
    let program = program.display();
    let output = output.map_err(|error| format!("run virtiofsd ({program}) --version: {error}"))?;
    let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if output.status.success() {
        Ok(format!("{program} ({version})"))
    } else {
        Err(format!("virtiofsd ({program}) --version failed: {}", output.status))
    }
}
