"""What cx_Freeze's launcher runs as `__startup__`, so that it is a Python: for `-c CODE`, `-m MODULE`, or a script.

The launcher holds CPython's interpreter. Beside it lies `lib`, with the standard library.
"""

import os
import runpy
import sys
from itertools import dropwhile


def init():
    """Have modules looked for where a Python would."""
    (library,) = (path for path in sys.path if path.endswith("/lib"))
    sys.path[:] = [*os.environ["PYTHONPATH"].split(os.pathsep), library, f"{library}/lib-dynload"]


def run():
    """Do what the command line asks for."""
    option, *rest = dropwhile(lambda argument: argument[0] == "-" and argument not in ("-c", "-m"), sys.argv[1:])
    if option == "-c":
        code, *rest = rest
        sys.argv[:] = ["-c", *rest]
        exec(code, {"__name__": "__main__"})
    elif option == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = [option, *rest]
        runpy.run_path(option, run_name="__main__")
