//! The system calls that programs of a box are refused under `A3S_SEC_SECCOMP=default` (contract §7.2
//! step 8), as a classic BPF program (seccomp(2)).

use std::mem::offset_of;

/// Refused with `EPERM`: each reaches beyond the calling program, to the whole guest.
const REFUSED: [libc::c_long; 16] = [
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_acct,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_personality,
    libc::SYS_keyctl,
    libc::SYS_perf_event_open,
    libc::SYS_bpf,
    libc::SYS_userfaultfd,
];

/// `AUDIT_ARCH_X86_64` (linux/audit.h).
const ARCH: u32 = 0xc000_003e;
/// Numbers from here on are the x32 ABI's, which would be a way around the list.
const X32: u32 = 0x4000_0000;

/// The filter.
pub fn filter() -> Vec<libc::sock_filter> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let jump = |test: u32, k: u32, jt: usize, jf: usize| libc::sock_filter {
        code: (libc::BPF_JMP | test | libc::BPF_K) as u16,
        jt: jt as u8,
        jf: jf as u8,
        k,
    };
    let load = |offset: usize| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset as u32);
    let answer = |action: u32| statement(libc::BPF_RET | libc::BPF_K, action);
    // Jumps count from the next instruction; the refusal comes after the list and the permission.
    let count = REFUSED.len();
    let mut program = vec![
        load(offset_of!(libc::seccomp_data, arch)),
        jump(libc::BPF_JEQ, ARCH, 0, count + 3),
        load(offset_of!(libc::seccomp_data, nr)),
        jump(libc::BPF_JGE, X32, count + 1, 0),
    ];
    for (at, number) in REFUSED.into_iter().enumerate() {
        program.push(jump(libc::BPF_JEQ, number as u32, count - at, 0));
    }
    program.push(answer(libc::SECCOMP_RET_ALLOW));
    program.push(answer(libc::SECCOMP_RET_ERRNO | libc::EPERM as u32));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the filter answers, by the rules of its few instructions.
    fn verdict(arch: u32, number: u32) -> u32 {
        let program = filter();
        let (mut at, mut value) = (0, 0);
        loop {
            let instruction = program[at];
            let code = u32::from(instruction.code);
            at += 1;
            if code == libc::BPF_RET | libc::BPF_K {
                return instruction.k;
            }
            if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS {
                value = if instruction.k == 0 { number } else { arch };
                continue;
            }
            let holds = match code & 0xf0 {
                libc::BPF_JEQ => value == instruction.k,
                _ => value >= instruction.k,
            };
            at += usize::from(if holds { instruction.jt } else { instruction.jf });
        }
    }

    #[test]
    fn the_list_is_refused_and_nothing_else() {
        let refused = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
        for number in 0..500 {
            let listed = REFUSED.contains(&libc::c_long::from(number));
            let expected = if listed { refused } else { libc::SECCOMP_RET_ALLOW };
            assert_eq!(verdict(ARCH, number), expected, "{number}");
        }
        assert_eq!(verdict(ARCH, X32 | 1), refused);
        assert_eq!(verdict(0x4000_0003, 1), refused);
    }
}
