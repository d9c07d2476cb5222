"""Builds the extensions, one of each src/pgbgw/*.pyx; everything else is in pyproject.toml.

Switches, by environment: PGBGW_SANITIZE=1 (address and undefined behaviour), PGBGW_COVERAGE=1
(lines of the .pyx, for Cython.Coverage).  Keep such builds away from the ordinary one: give them
a --build-base and a --build-lib of their own.
"""

import os
import sys
from glob import glob
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup


def switch(name: str) -> bool:
    return os.environ.get(f"PGBGW_{name}", "0") not in ("", "0")


def extensions() -> list[Extension]:
    compile_args = ["-std=c11", "-O2", "-g0", "-Wall", "-Wextra", "-Werror=implicit"]
    compile_args += ["-Werror=int-conversion", "-Werror=incompatible-pointer-types"]
    # Cython's own code has these in plenty.
    compile_args += ["-Wno-unused-parameter", "-Wno-missing-field-initializers"]
    link_args, macros = [], []
    if switch("SANITIZE"):
        link_args = ["-fsanitize=address,undefined"]
        compile_args += [*link_args, "-fno-sanitize-recover=undefined", "-O1", "-g"]
        compile_args += ["-fno-omit-frame-pointer"]
    if switch("COVERAGE"):
        macros += [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1")]
    options = {
        "depends": glob("src/pgbgw/*.h"),
        "extra_compile_args": compile_args,
        "extra_link_args": link_args,
        "define_macros": macros,
    }
    pyx = sorted(Path("src/pgbgw").glob("*.pyx"))
    # No build_dir: with one, setuptools leaves the .pyx out of the source distribution.
    return cythonize(
        [Extension(f"pgbgw.{path.stem}", [str(path)], **options) for path in pyx],
        nthreads=os.cpu_count() or 1,
        force=switch("COVERAGE"),
        compiler_directives={"language_level": 3, "linetrace": switch("COVERAGE")},
    )


if __name__ == "__main__":
    if sys.platform != "linux" or sys.maxsize < 2**32:
        sys.exit("pgbgw runs on 64-bit Linux only")
    setup(ext_modules=extensions(), options={"build_ext": {"parallel": os.cpu_count() or 1}})
