from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

setup(
    name="molora",
    version="0.1.0",
    description="Routed mixtures of LoRA experts: kernels, patching layer and a two-stage reasoning recipe",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *find_packages(include=["molora", "molora.*", "molora_kernels", "molora_kernels.*"]),
        # The presets live where people look for them, and are installed where molora.config finds them.
        "molora.presets.quickstart",
        "molora.presets.reasoning",
    ],
    package_dir={"molora.presets": "configs/presets"},
    package_data={
        "molora": ["py.typed", "report/page.html"],
        "molora_kernels": ["py.typed", "*.h", "*/*.cpp"],
        "molora.presets.quickstart": ["*.yml"],
        "molora.presets.reasoning": ["*.yml"],
    },
    python_requires=">=3.10",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)],
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "safetensors>=0.5",
        "pyyaml>=6",
        "pydantic>=2.10",
        "tqdm>=4.66",
        "rich>=13",
    ],
    extras_require={
        # Triton has no wheel for every platform; molora runs without it.
        "triton": ["triton>=3.6"],
        "report": ["matplotlib>=3.8", "jinja2>=3.1"],
        "quickstart": [
            "chatterbot-corpus==1.3.3",
            "reasoning-gym==0.1.25",
            "gguf>=0.17",
            "accelerate>=1.0",  # transformers reads GGUF files with it
            "math-verify>=0.8",
            "matplotlib>=3.8",
        ],
        "eval": ["lm-eval[hf]>=0.4.9", "math-verify>=0.8"],
        "data": ["datasets>=4", "math-verify>=0.8", "matplotlib>=3.8"],
        "quantize": ["bitsandbytes>=0.46"],
        # What benchmarks compare with. moe-peft 2.0.2 runs too, but pins an old torch: pip install --no-deps.
        "peers": ["peft>=0.21", "eulerforge==0.1.0", "mixlora==0.2.3"],
        "docs": ["zensical>=0.0.67", "mkdocstrings[python]>=1.0"],
        "peft": ["peft>=0.21"],
        "track": ["tensorboard>=2.16", "wandb>=0.25"],
        "dev": [
            "bitsandbytes>=0.46",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "accelerate>=1.0",
            "eulerforge==0.1.0",  # whose checkpoints convert imports: its tests hold it to the real one
            "trl>=1.14",
            "peft>=0.21",
            "tensorboard>=2.16",
            "wandb>=0.25",
            "ruff>=0.12",
            "pyright[nodejs]>=1.1.400",
            "clang-format>=18",
            "pre-commit>=4",
            "build>=1.2",
        ],
    },
)
