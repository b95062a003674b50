"""Builds the C libraries beside the package. An installation without a compiler or their headers works without them."""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WARNINGS = ["-std=c11", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra"]


class BuildLibrary(build_ext):
    """A plain shared library: it is loaded with dlopen, not imported, and is the same for every Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


setup(
    ext_modules=[
        Extension(
            "silofs.mount.extension.dispatch",
            ["silofs/mount/extension/dispatch.c"],
            libraries=["fuse3", "dl"],
            extra_compile_args=WARNINGS,
            optional=True,
        ),
        Extension(
            "silofs.layers.native.objects",
            ["silofs/layers/native/objects.c"],
            libraries=["xxhash"],
            extra_compile_args=WARNINGS,
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildLibrary},
)
