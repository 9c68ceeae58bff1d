"""Packages, found: every folder of the roots that holds Python files imports under ``compile_sparse``."""

from setuptools import find_packages, setup

ROOTS = ("compiler", "passes", "backends")

setup(
    packages=[
        "compile_sparse",
        *(f"compile_sparse.{name}" for name in find_packages("compiler/_root")),
        *(f"compile_sparse.{root}" for root in ROOTS),
        *(
            f"compile_sparse.{root}.{name}"
            for root in ROOTS
            for name in find_packages(root, exclude=["_root", "_root.*"])
        ),
    ]
)
