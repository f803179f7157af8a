"""A GPT on text, on one rank or any mesh: python -m minidist.examples.gpt"""

from .generate import generate
from .model import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig", "generate"]
