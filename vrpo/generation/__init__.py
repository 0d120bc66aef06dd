"""Decoding: the sampler, and answers to prompts and files."""

from vrpo.generation.sampler import SamplerConfig, generate, trim_response

__all__ = ["SamplerConfig", "generate", "trim_response"]
