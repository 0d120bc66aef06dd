"""Fused ELBO operations for masked-diffusion language models."""
