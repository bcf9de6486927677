"""The compiled part of the package; everything else is in ``pyproject.toml``."""

from setuptools import Extension, setup

# Optional: without a C compiler Pillow resizes, with the same pixels. The library contains nothing
# of Python, so one wheel serves all versions (abi3).
setup(
    ext_modules=[
        Extension(
            "encoders._resize",
            ["encoders/resize.c"],
            extra_compile_args=["-O3"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
