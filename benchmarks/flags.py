"""Command-line values that several benchmarks check alike."""

import argparse

import torch


def positive(text: str) -> int:
    """A whole number from 1, as a `type` of argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends the program with a message where CUDA is asked for and is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
