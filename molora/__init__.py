"""molora: several LoRA experts for the price of one.

>>> model = molora.inject(model, {"num_experts": 4, "top_k": 2, "lora_r": 32})  # doctest: +SKIP
>>> molora.save_adapter(model, "out")                                          # doctest: +SKIP
>>> model, tokenizer = molora.load("out")                                      # doctest: +SKIP
>>> molora.remove(model)                                                       # doctest: +SKIP
"""

from molora.adapter import load, save_adapter
from molora.config import Config, Injection, MoE
from molora.errors import UserError
from molora.patch import inject, parameter_groups, remove

__all__ = ["Config", "Injection", "MoE", "UserError", "inject", "load", "parameter_groups", "remove", "save_adapter"]
__version__ = "0.1.0"
