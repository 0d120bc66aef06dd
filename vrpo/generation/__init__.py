"""Decoding: the sampler, and answers to prompts and files."""

from vrpo.generation.config import SamplerConfig
from vrpo.generation.sampler import generate, trim_response

__all__ = ["SamplerConfig", "generate", "trim_response"]
