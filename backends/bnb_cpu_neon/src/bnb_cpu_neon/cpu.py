"""What this CPU can do, found without running any native code of this package: a wrong instruction would end the process."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Dict, FrozenSet, NamedTuple, Tuple

#: Best last; each includes those before it. The order is that of `Tier` in native/tier.hpp.
TIERS = ("baseline", "dotprod", "i8mm")

#: What a CPU needs for each tier, by architecture; on x86-64 the kernels are emulated, and every tier needs the same.
_NEEDED: Dict[str, Dict[str, FrozenSet[str]]] = {
    "aarch64": {
        "baseline": frozenset({"asimd"}),
        "dotprod": frozenset({"asimd", "asimddp"}),
        "i8mm": frozenset({"asimd", "asimddp", "i8mm", "bf16"}),
    },
    "x86_64": {tier: frozenset({"avx2", "fma", "f16c"}) for tier in TIERS},
}

# From the kernel's asm/hwcap.h: number of the auxiliary vector's entry, bit, and name as in /proc/cpuinfo.
_AT_HWCAP, _AT_HWCAP2 = 16, 26
_HWCAPS = (
    (_AT_HWCAP, 1, "asimd"),
    (_AT_HWCAP, 9, "fphp"),
    (_AT_HWCAP, 10, "asimdhp"),
    (_AT_HWCAP, 20, "asimddp"),
    (_AT_HWCAP2, 13, "i8mm"),
    (_AT_HWCAP2, 14, "bf16"),
)

#: Cores by implementer and part, as in /proc/cpuinfo: those of Jetson boards, and the usual others.
_CORES = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD83): "Neoverse-V3AE",
    (0x46, 0x001): "Fujitsu A64FX",
    (0x4E, 0x004): "NVIDIA Carmel",
}


class Cpu(NamedTuple):
    """A CPU, as far as kernels are concerned."""

    architecture: str
    """`platform.machine()`."""
    core: str
    """Name of the first core."""
    features: FrozenSet[str]
    """Of those that tiers ask for, and `fphp` and `asimdhp`."""

    def lacks(self, tier: str) -> Tuple[str, ...]:
        """Name the features that the CPU would need for a tier; empty if it has all."""
        return tuple(sorted(_NEEDED[self.architecture][tier] - self.features))

    @property
    def best_tier(self) -> str:
        """The best tier that the CPU can run; empty if it can run none."""
        if self.architecture not in _NEEDED:
            return ""
        return next((tier for tier in reversed(TIERS) if not self.lacks(tier)), "")


def this_cpu() -> Cpu:
    """Look at the CPU of this machine."""
    architecture = platform.machine()
    fields = _cpuinfo()
    if architecture == "aarch64":
        features = frozenset(name for entry, bit, name in _HWCAPS if _getauxval(entry) >> bit & 1)
        implementer, part = (int(fields.get(name, "0"), 0) for name in ("CPU implementer", "CPU part"))
        core = _CORES.get((implementer, part), f"core {implementer:#04x}/{part:#05x}")
    else:
        features = frozenset(fields.get("flags", "").split())
        core = fields.get("model name", platform.processor())
    return Cpu(architecture, core, features)


def choose_tier(cpu: Cpu) -> str:
    """Return the best tier of the CPU, or the one that `BNB_NEON_FEATURES` asks for.

    Raises:
        ValueError: the CPU can run no tier, or not that one, or there is none of that name.
    """
    if not cpu.best_tier:
        needs = "AVX2, FMA and F16C" if cpu.architecture == "x86_64" else "a 64-bit ARM CPU with NEON"
        raise ValueError(f"the kernels need {needs}; this is {cpu.architecture} ({cpu.core})")
    wanted = os.environ.get("BNB_NEON_FEATURES", "")
    if not wanted:
        return cpu.best_tier
    if wanted not in TIERS:
        raise ValueError(f"BNB_NEON_FEATURES={wanted!r} is not one of {', '.join(TIERS)}; set one of these or unset it")
    if cpu.lacks(wanted):
        raise ValueError(f"BNB_NEON_FEATURES={wanted!r} needs {', '.join(cpu.lacks(wanted))}, which {cpu.core} lacks; unset it")
    return wanted


def _getauxval(entry: int) -> int:
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return int(getauxval(entry))


def _cpuinfo() -> Dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo; none where there is no such file."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first, _, _ = file.read().strip().partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
