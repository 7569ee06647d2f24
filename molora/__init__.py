"""molora: several LoRA experts for the price of one.

:func:`inject` puts them into a model, :func:`remove` takes them out again, :func:`save_adapter` and :func:`load` keep
them on disk; README.md has the whole example.
"""

from molora.adapter import load, save_adapter
from molora.config import Config, Injection, MoE
from molora.errors import UserError
from molora.patch import inject, parameter_groups, remove

__all__ = ["Config", "Injection", "MoE", "UserError", "inject", "load", "parameter_groups", "remove", "save_adapter"]
__version__ = "0.1.0"
