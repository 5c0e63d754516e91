"""Lion, with 32-bit and 8-bit states."""

from bitsandbytes.optim._classes import subclasses

Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit = subclasses(
    __name__, "Lion", "Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit"
)

__all__ = ["Lion", "Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit"]
