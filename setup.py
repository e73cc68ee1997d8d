"""Builds fastnorm._core: one Cython module and the C kernels, each instruction set with its flags;
and fastnorm._cuda, which finds the CUDA driver at run time and needs nothing of CUDA here.

All else about the project is in pyproject.toml. Switches, read from the environment:

    FASTNORM_BUILD_OPENMP=0                     without OpenMP: one thread
    FASTNORM_BUILD_WERROR=1                     warnings in src_c are errors
    FASTNORM_BUILD_SANITIZE=address,undefined   gcc's and clang's sanitizers
    FASTNORM_BUILD_COVERAGE=1                   for gcov
"""

import os
import sys
import sysconfig
from glob import glob
from pathlib import Path

import numpy as np
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

# The plain C kernels are the last resort of CPUs without SIMD, and every wheel carries them: small
# counts for more than fast.
SCALAR = ["-Os"]
# So it does for what does no arithmetic on elements, and is no matter next to that.
LOGIC = {name: ["-Os"] for name in ("channels_last", "dispatch", "parallel", "pool", "weights")}
ISA_FLAGS = {
    "x86_64": {
        "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mbmi2"],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "scalar": SCALAR,
    },
    "aarch64": {"neon": [], "scalar": SCALAR},
}

# The results are defined to the bit: a fused multiply-add stands where it is written and nowhere
# else.
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

# Nothing in C throws: tables for unwinding would be a tenth of the kernels' size. Where a jump
# leads that is no loop, padding gains nothing. (clang, which pads nothing there, would warn of the
# flag.)
COMPACT = [
    *["-fno-asynchronous-unwind-tables", "-fno-unwind-tables"],
    *["-fno-align-jumps", "-fno-align-functions", "-Wno-ignored-optimization-argument"],
]

# Python's own flags may name the CPU that Python was built for. What is outside the kernels must
# run on every CPU; which kernels run is decided at run time.
BASELINE = {"x86_64": ["-march=x86-64", "-mtune=generic"]}

WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wstrict-prototypes"]


def switch(name, default):
    value = os.environ.get(name, default)
    if value not in ("0", "1"):
        raise SystemExit(f"{name}: got {value!r}, wanted 0 or 1")
    return value == "1"


def machine():
    name = sysconfig.get_platform().rpartition("-")[2]
    return "aarch64" if name == "arm64" else name


def kernel_sources():
    """The C files of this machine's build, each with the flags that it alone gets."""
    isas = ISA_FLAGS.get(machine(), {"scalar": SCALAR})
    common = {"src_c/channels.c": [], **{f"src_c/{name}.c": LOGIC[name] for name in LOGIC}}
    return common | {f"src_c/isa_{isa}.c": flags for isa, flags in isas.items()}


# What fastnorm/_core.pyx includes, and its C declarations.
CYTHON_ROOMS = sorted(["fastnorm/_core.pxd", *glob("fastnorm/_core_*.pxi")])

OPENMP = ["-fopenmp"] if switch("FASTNORM_BUILD_OPENMP", "1") else []
WERROR = ["-Werror"] if switch("FASTNORM_BUILD_WERROR", "0") else []
COVERAGE = ["--coverage"] if switch("FASTNORM_BUILD_COVERAGE", "0") else []
SANITIZERS = os.environ.get("FASTNORM_BUILD_SANITIZE")
SANITIZE = (
    [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    if SANITIZERS
    else []
)
INSTRUMENTS = COVERAGE + SANITIZE

COMPILE_FLAGS = [
    *(["-O1", "-g"] if INSTRUMENTS else ["-O2"]),
    *(["-fstack-clash-protection"] if sys.platform == "linux" else []),
    *["-std=gnu11", "-fvisibility=hidden", f"-ffile-prefix-map={os.getcwd()}=."],
    *[*ARITHMETIC, *BASELINE.get(machine(), []), *OPENMP, *INSTRUMENTS],
]
STRIP = ["-Wl,-s"] if sys.platform == "linux" and not INSTRUMENTS else []
LINK_FLAGS = [*OPENMP, *INSTRUMENTS, *STRIP]


class BuildKernels(build_ext):
    def initialize_options(self):
        super().initialize_options()
        self.cython_c_in_temp = True  # no generated C beside the sources

    def build_extension(self, ext):
        if self.compiler.compiler_type != "unix":
            raise CompileError("fastnorm is written for gcc and clang")
        self.forget_where_python_lies()
        ext.depends.append(self.record_of_flags())
        if ext.name == "fastnorm._core":
            ext.extra_objects = [
                self.kernel_object(source, flags, ext.depends)
                for source, flags in kernel_sources().items()
            ]
        super().build_extension(ext)

    def forget_where_python_lies(self):
        """Some Pythons link every extension with a search path to their own folder."""
        lib = sysconfig.get_config_var("LIBDIR") or ""
        path = {f"-Wl,-rpath,{lib}", f"-Wl,-rpath={lib}"}
        self.compiler.linker_so = [word for word in self.compiler.linker_so if word not in path]

    def record_of_flags(self):
        """A file that is newer than what was built with other flags."""
        flags = repr((COMPILE_FLAGS, LINK_FLAGS, self.compiler.compiler_so))
        record = Path(self.build_temp, "flags.txt")
        if not record.exists() or record.read_text() != flags:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(flags)
        return str(record)

    def kernel_object(self, source, flags, depends):
        [path] = self.compiler.object_filenames([source], output_dir=self.build_temp)
        headers = [name for name in depends if not name.endswith((".c", ".pxd", ".pxi"))]
        if self.force or newer_group([source, *headers], path):
            self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                extra_postargs=[*COMPILE_FLAGS, *COMPACT, *flags, *WARNINGS, *WERROR],
            )
        return path


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "fastnorm._core",
            sources=["fastnorm/_core.pyx"],
            depends=["setup.py", *CYTHON_ROOMS, *glob("src_c/*.h"), *kernel_sources()],
            include_dirs=["src_c", np.get_include()],
            define_macros=[
                ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
                ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION"),
            ],
            libraries=["m"],
            extra_compile_args=COMPILE_FLAGS,
            extra_link_args=LINK_FLAGS,
        ),
        Extension(
            "fastnorm._cuda",
            sources=["fastnorm/_cuda.pyx"],
            depends=["setup.py", *glob("fastnorm/_cuda_*.pxi")],
            libraries=["dl", "pthread"] if sys.platform == "linux" else [],
            extra_compile_args=COMPILE_FLAGS,
            extra_link_args=LINK_FLAGS,
        ),
    ],
)
