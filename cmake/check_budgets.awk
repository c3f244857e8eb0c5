# Checks what ptxas reports against csrc/kernels/budgets.h: awk -f check_budgets.awk budgets.h REPORT...
# Prints each overrun, and with -v complete=1 also kernels without a row and rows without a kernel; exits 1 if any.
# Run by compile_kernel.sh at each compilation and by the tests over all reports.

function complain(text) {
  print text
  failed = 1
}

# Whether the mangled name holds every part of "path::kernel".
function is_named(mangled, kernel,    parts, count, i) {
  count = split(kernel, parts, "::")
  for (i = 1; i <= count; i++) {
    if (index(mangled, length(parts[i]) parts[i]) == 0) return 0
  }
  return 1
}

# Number of the kernel's row, 0 where it has none.
function row_of(mangled, target,    i) {
  for (i = 1; i <= rows; i++) {
    if ((row_target[i] == "all" || row_target[i] == target) && is_named(mangled, row_kernel[i])) return i
  }
  return 0
}

FILENAME == ARGV[1] {
  if ($0 ~ /^ *\{"/) {
    split($0, quoted, "\"")
    split(quoted[5], numbers, ",")
    rows++
    row_kernel[rows] = quoted[2]
    row_target[rows] = quoted[4]
    row_registers[rows] = numbers[2] + 0
    row_shared[rows] = numbers[3] + 0
  }
  next
}

/Compiling entry function '/ {
  split($0, quoted, "'")
  mangled = quoted[2]
  target = quoted[4]
  row = row_of(mangled, target)
  used[row] = 1
  if (row == 0 && complete) complain(FILENAME ": " mangled " for " target " has no row in csrc/kernels/budgets.h")
}

/bytes stack frame/ {
  if ($0 !~ /^ *0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads/) {
    complain(FILENAME ": " mangled " for " target " keeps data in local memory:" $0)
  }
}

/: Used [0-9]+ registers/ {
  match($0, /Used [0-9]+/)
  registers = substr($0, RSTART + 5, RLENGTH - 5) + 0
  shared = 0
  if (match($0, /[0-9]+ bytes smem/)) shared = substr($0, RSTART, RLENGTH - 11) + 0
  if (row > 0 && registers > row_registers[row]) {
    complain(FILENAME ": " mangled " for " target " takes " registers " registers, its budget is " row_registers[row])
  }
  if (row > 0 && shared > row_shared[row]) {
    complain(FILENAME ": " mangled " for " target " takes " shared " bytes of static shared memory, its budget is " \
             row_shared[row])
  }
}

END {
  if (rows == 0) complain(ARGV[1] ": holds no row")
  if (complete) {
    for (i = 1; i <= rows; i++) {
      if (!used[i]) complain(ARGV[1] ": no kernel was compiled for the row " row_kernel[i] ", " row_target[i])
    }
  }
  exit failed
}
