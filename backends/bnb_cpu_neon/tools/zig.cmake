# CMake toolchain: Linux on the processor that BNB_ZIG_MACHINE names, with glibc 2.17 or newer, compiled by zig (the package
# `ziglang`) on any machine.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR $ENV{BNB_ZIG_MACHINE})
set(CMAKE_CXX_COMPILER ${CMAKE_CURRENT_LIST_DIR}/zig-c++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
# The headers of the Python that builds serve: they are the same on every Linux. `headers/` has what they ask of old systems.
include_directories(SYSTEM ${CMAKE_CURRENT_LIST_DIR}/headers)
# What nanobind leaves to other headers, which zig's do not include.
set(CMAKE_CXX_FLAGS_INIT "-include stdio.h")
