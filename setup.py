# Copyright (c) focal_plugin authors. Licensed under the Apache License, Version 2.0.
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def version() -> str:
    """Read, not imported: importing the package needs Detectron2, building it must not."""
    return re.search(r'^__version__ = "(.+)"$', read("focal_plugin/__init__.py"), re.MULTILINE).group(1)


setup(
    name="focal_plugin",
    version=version(),
    description="Focal loss and online hard example mining, side by side, for Detectron2's RetinaNet",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    # The repository's top-level configs/ is installed as focal_plugin/configs/: to setuptools it is one more
    # package, without modules, that happens to live elsewhere.
    packages=[*find_packages(include=["focal_plugin", "focal_plugin.*"]), "focal_plugin.configs"],
    package_dir={"focal_plugin.configs": "configs"},
    package_data={
        "focal_plugin.configs": ["**/*.yaml", "**/*.py"],
        "focal_plugin.eval": ["templates/*"],
        "focal_plugin.experiments": ["*.yaml"],
    },
    # Neither detectron2 nor torch is listed. Detectron2 is not on the index under its own name, so pip
    # could not install it; and pip must never exchange the torch that Detectron2 was compiled against.
    install_requires=[
        "filelock",
        "jinja2",
        "matplotlib",
        "numpy",
        "pandas",
        "pillow",
        "pycocotools",
        "pyyaml",
        "scikit-learn",
        "scipy",
        "tabulate",
        "tqdm",
    ],
    extras_require={"export": ["onnx", "onnxruntime"], "slurm": ["submitit"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
