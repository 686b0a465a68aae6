"""Package metadata and the version ranges that glioforge works with; `constraints.txt` pins what is tested."""

from pathlib import Path

from setuptools import find_packages, setup

EXPORT = ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"]

setup(
    name="glioforge",
    version="0.1.0",
    description="Training engine for 3D brain-tumour segmentation: UNETR, DALI, DeepSpeed, parity with MONAI",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["engine*", "kernels", "launch", "models", "pipelines*"]),
    package_data={"kernels": ["priors.json"], "launch": ["configs/*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6",
        "monai>=1.5",
        "nvidia-dali-cuda130>=2.0",
        "deepspeed>=0.18",
        "numpy>=2.0",
        "nibabel>=5.3",
        "isal>=1.7",
        "jsonargparse[signatures]>=4.49",
        "rich>=13",
        "matplotlib>=3.9",
        "psutil>=5.9",
        "pyyaml>=6",
        "safetensors>=0.5",
        "scipy>=1.14",
        "tensorboard>=2.17",
    ],
    extras_require={
        "dev": ["einops", "mypy", "ninja", "pytest", "pytest-benchmark", "pytest-xdist", "ruff", *EXPORT],
        "export": EXPORT,
    },
)
