#!/usr/bin/env bash
# Runs the fuzz program under compute-sanitizer on a machine with a GPU, after negative controls that must fail.
#
#   sanitize.sh BUILD_FOLDER [CASES_PER_FAMILY]
#
# The folder holds w4a16 and tests/native/{fuzz,sanitizer_control}, built with -DW4A16_TESTS=ON -DW4A16_RACECHECK=ON:
# racecheck does not see that one lane's arrival on a barrier stands for its warp (S2 in gemm_wgmma.cuh and
# gemm_persistent.cuh), and without it gemm_wgmma.cuh's clusters never end (S5).
set -uo pipefail
build=$1
cases=${2:-40}
failed=0

check() { # check LABEL WANTED_STATUS COMMAND...
  local label=$1 wanted=$2
  shift 2
  local log
  log=$(mktemp)
  "$@" >"$log" 2>&1
  local status=$?
  local summary
  summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -1 | sed 's/========= //')
  if { [ "$wanted" = clean ] && [ $status -eq 0 ]; } || { [ "$wanted" = faulty ] && [ $status -ne 0 ]; }; then
    echo "ok      $label: ${summary:-exit status $status} $(grep -E '^fuzz:' "$log")"
  else
    echo "FAILED  $label: wanted $wanted, exit status $status ${summary:-} $(grep -E '^fuzz:' "$log")"
    # Every kind of finding once, with how often: what was found, and the code that the tool blames.
    grep -E '^=========  *(Warning|Error|Invalid|Program|Write|Read|Access|at |by )' "$log" |
      sed -E 's/0x[0-9a-f]+|\([0-9]+,[0-9]+,[0-9]+\)/./g' | sort | uniq -c | sort -rn | head -40
    head -20 "$log"
    failed=1
  fi
  rm -f "$log"
}

memcheck=(compute-sanitizer --tool memcheck --error-exitcode 9)
racecheck=(compute-sanitizer --tool racecheck --racecheck-report all --error-exitcode 9)

check "memcheck, negative control" faulty "${memcheck[@]}" "$build/tests/native/sanitizer_control" oob
check "racecheck, negative control" faulty "${racecheck[@]}" "$build/tests/native/sanitizer_control" race
for family in decode wgmma persistent cutlass ragged_decode ragged_wgmma ragged_persistent; do
  fuzz=("$build/tests/native/fuzz" --device cuda --cases "$cases" --family "$family")
  check "memcheck, $family" clean "${memcheck[@]}" "${fuzz[@]}"
  check "racecheck, $family" clean "${racecheck[@]}" "${fuzz[@]}"
done
check "memcheck, program" clean "${memcheck[@]}" "$build/w4a16" 64 4096 4096 --sweep --repeats 0
exit $failed
