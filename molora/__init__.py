"""molora: routed mixtures of LoRA experts for Llama-family models, from kernels to recipe.

In Python::

    model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
    molora.inject(model, {"num_experts": 4, "top_k": 2, "lora_r": 32, "lora_alpha": 64})
    groups = molora.parameter_groups(model)  # {"router": [(name, parameter), ...], "lora": ..., "attn_lora": ...}
    optimizer = torch.optim.AdamW([{"params": members} for members in groups.values() if members], lr=1e-4)
    model.train()
    model(**batch).loss.backward()  # the router losses are in it
    optimizer.step()
    molora.save_adapter(model, "adapter")
    molora.remove(model)  # the base model again
    model, tokenizer = molora.load("adapter")

Commands, each with ``--help``::

    python -m molora.prepare      models and data sets, made ready as files
    python -m molora.quickstart   both stages of the recipe on a small real model, measured before and after
    python -m molora.train        one stage of training from a preset
    python -m molora.evaluate     loss, perplexity and exact match on held-out rows
    python -m molora.verdict      what two stages did to a model, in words
    python -m molora.generate     answers of a model on the terminal
    python -m molora.report       what routers did and how runs went, on one page
    python -m molora.convert      adapters in and out: export, merge, import
    python -m molora.exercise     two stages or one, a mixture or one LoRA, with equal tokens
"""

from molora.adapter import load, save_adapter
from molora.config import Config, Injection, MoE
from molora.errors import UserError
from molora.patch import inject, parameter_groups, remove

__all__ = ["Config", "Injection", "MoE", "UserError", "inject", "load", "parameter_groups", "remove", "save_adapter"]
__version__ = "0.1.0"
