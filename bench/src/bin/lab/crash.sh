# SPDX-License-Identifier: Apache-2.0 OR MIT
# Runs after the kernel cases. Reports a crash of the test program: its stack, and the memory to
# which the registers of glibc's allocator point. Glibc has found the heap damaged, rarely; this
# memory says with what.
if [ -e /run/core.vm ] && command -v gdb >/dev/null; then
    # Frames 0 to 4 are abort(3) and the message.
    asked=(-ex 'bt 16' -ex 'frame 5' -ex 'info registers')
    for register in rbx rbp r12 r13 r14 r15; do
        asked+=(-ex "echo \$$register\\n" -ex "x/16gx \$$register - 32")
    done
    gdb -batch -nx "${asked[@]}" "$(command -v vm)" /run/core.vm 2>&1 | grep -v '^Cannot access'
fi
