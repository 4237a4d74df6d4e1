#!/usr/bin/env bash
# Fuzzes what a guest, a client or passt drives: every target of tests/fuzz, or the ones named, for
# FUZZ_S seconds each, starting from the committed corpus. Prints one table; fails when a target finds
# something, and says how to see it again.
#   fuzz.sh [TARGET...]       fuzz (FUZZ_S=10)
#   fuzz.sh TARGET FILE       run one input, with a stack trace of what it finds
#   fuzz.sh --merge TARGET    add to the committed corpus what reaches more code from the working one
# New inputs are kept in target/fuzz/corpus and go on from there the next time.
set -euo pipefail

cd "$(dirname "$0")/.."
work=target/fuzz
seconds=${FUZZ_S:-10}
# The unstable options are those that fuzzing needs of any compiler: coverage and the sanitizer.
export RUSTC_BOOTSTRAP=1
cargo_fuzz=$(resources/tools.sh fuzz)
# Limits of one input: far above what any takes, so that one that hangs or grows is a finding.
limits=(-timeout=20 -rss_limit_mb=2048 -max_len=4096)

build() { "$cargo_fuzz" build --fuzz-dir tests/fuzz --target-dir "$work" "$@"; }
binary() { echo "$work/x86_64-unknown-linux-gnu/release/$1"; }
dictionary() { [ ! -e "tests/fuzz/$1.dict" ] || echo "-dict=tests/fuzz/$1.dict"; }

if [ "${1:-}" = --merge ]; then
    target=$2
    build "$target"
    exec "$(binary "$target")" -merge=1 -use_counters=0 "tests/fuzz/corpus/$target" "$work/corpus/$target"
fi
if [ $# = 2 ] && [ -f "$2" ]; then
    build "$1"
    exec "$(binary "$1")" "${limits[@]}" "$2"
fi

mapfile -t targets < <([ $# -gt 0 ] && printf '%s\n' "$@" || "$cargo_fuzz" list --fuzz-dir tests/fuzz)
build
mkdir -p "$work/findings"
failed=()
printf '%-9s %12s %8s %9s   %s\n' target inputs edges features result
for target in "${targets[@]}"; do
    mkdir -p "$work/corpus/$target"
    log=$work/$target.log
    result=none
    "$(binary "$target")" "$work/corpus/$target" "tests/fuzz/corpus/$target" "${limits[@]}" \
        $(dictionary "$target") -max_total_time="$seconds" -print_final_stats=1 \
        -artifact_prefix="$work/findings/$target-" >"$log" 2>&1 || result=found
    inputs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    read -r edges features < <(sed -n 's/.* cov: \([0-9]*\) ft: \([0-9]*\) .*/\1 \2/p' "$log" | tail -n 1) || true
    if [ $result = found ]; then
        file=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
        result=${file:-"ended, see $log"}
        failed+=("$target${file:+ $file}")
    fi
    printf '%-9s %12s %8s %9s   %s\n' "$target" "${inputs:--}" "${edges:--}" "${features:--}" "$result"
done
for finding in "${failed[@]}"; do
    echo "fuzz: $finding: run 'tests/fuzz.sh $finding' to see it again" >&2
done
[ ${#failed[@]} = 0 ]
