#!/bin/sh
# Runs one nvcc command (the arguments) for CMake, as CUDA_COMPILER_LAUNCHER.
# Keeps what ptxas reports (registers, shared memory, spills) in OBJECT.ptxas.txt, and says nothing when all is well.
# Fails also on the notes numbered C75xx (wgmma serialised, setmaxnreg dropped), which nvcc does not count as warnings,
# and where a kernel overruns its budget in csrc/kernels/budgets.h.
here=$(dirname "$0")
object=
previous=
for argument in "$@"; do
  if [ "$previous" = "-o" ]; then object=$argument; fi
  previous=$argument
done
if [ -z "$object" ]; then exec "$@"; fi

report=$object.ptxas.txt
"$@" >"$report" 2>&1
status=$?
if [ $status -ne 0 ]; then
  # Without the per-kernel resource lines, so that the error is what is read.
  grep -v -e '^ptxas info' -e 'bytes stack frame' "$report" >&2
  exit $status
fi
if grep -e 'C75[0-9][0-9]' "$report" >&2; then
  echo "$object: ptxas note C75xx: the kernel lost its asynchronous schedule" >&2
  rm -f "$object"
  exit 1
fi
if ! awk -f "$here/check_budgets.awk" "$here/../csrc/kernels/budgets.h" "$report" >&2; then
  rm -f "$object"
  exit 1
fi
