"""What is trained, how, and on which machine: the inputs of the cost model, checked."""

from dataclasses import dataclass
from typing import Any

ENGINES = ("single", "ddp", "zero2", "zero3", "fsdp2")
REFERENCES = ("model", "adapter", "precomputed", "none")
GRADIENT_MODES = ("auto", "joint", "replay")


@dataclass(frozen=True)
class TrainingSetup:
    """One training, in the names of VRPOConfig where it has them.

    prompt_length, response_length: tokens, means; all sequences count as equally long.
    pairs_per_step: examples of one optimizer step, over all GPUs. num_sides: responses of an example.
    mask_ratio: masked share of the responses, mean; 1/2 in expectation for every design.
    lora_rank: 0 trains all weights. reference: "model" (a frozen copy), "adapter" (the model with its adapter
        off), "precomputed" or "none".
    train_top_layers: None for all. weight_bytes: 4 for float32, 2 for bfloat16 weights.
    compute_bytes: 2 under bf16 autocast, and with 16-bit weights; else 4.
    """

    num_samples: int = 8
    prompt_length: int = 512
    response_length: int = 512
    pairs_per_step: int = 64
    per_device_train_batch_size: int = 8
    num_sides: int = 2
    mask_ratio: float = 0.5
    max_tokens_per_pack: int = 65536
    gradient_mode: str = "auto"
    lora_rank: int = 0
    reference: str = "model"
    train_top_layers: int | None = None
    gradient_checkpointing: bool = False
    weight_bytes: int = 4
    compute_bytes: int = 2

    def __post_init__(self) -> None:
        for name in ("num_samples", "prompt_length", "response_length", "pairs_per_step"):
            _check_count(name, getattr(self, name))
        for name in ("per_device_train_batch_size", "num_sides", "max_tokens_per_pack"):
            _check_count(name, getattr(self, name))
        _check_count("lora_rank", self.lora_rank, least=0)
        if self.train_top_layers is not None:
            _check_count("train_top_layers", self.train_top_layers)
        _check_choice("gradient_mode", self.gradient_mode, GRADIENT_MODES)
        _check_choice("reference", self.reference, REFERENCES)
        for name in ("weight_bytes", "compute_bytes"):
            _check_choice(name, getattr(self, name), (2, 4))
        if not 0 < self.mask_ratio <= 1:
            raise ValueError(f"mask_ratio must be in (0, 1], got {self.mask_ratio}")
        if self.reference == "adapter" and not self.lora_rank:
            raise ValueError(
                "reference 'adapter' needs lora_rank > 0: without an adapter there is none to switch off"
            )

    @property
    def segment_length(self) -> int:
        """Tokens of one masked copy."""
        return self.prompt_length + self.response_length

    @property
    def pair_tokens(self) -> int:
        """Tokens of all masked copies of one example."""
        return self.num_sides * self.num_samples * self.segment_length

    @property
    def replays(self) -> bool:
        """Whether an example is cut, so that the step runs twice."""
        fits = self.pair_tokens <= self.max_tokens_per_pack
        return self.gradient_mode == "replay" or (self.gradient_mode == "auto" and not fits)

    @property
    def pack_tokens(self) -> int:
        """Tokens of the largest pack: as many examples, or masked copies of one, as the budget holds."""
        unit = self.segment_length if self.replays else self.pair_tokens
        held = max(1, self.max_tokens_per_pack // unit)
        return min(held * unit, self.per_device_train_batch_size * self.pair_tokens)

    @property
    def masked_rows(self) -> float:
        """Rows of the largest pack that meet the head."""
        return self.mask_ratio * self.pack_tokens * self.response_length / self.segment_length


@dataclass(frozen=True)
class Machine:
    """GPUs and what ties them together. The defaults are an H100's.

    engine: single, ddp, zero2, zero3 (DeepSpeed) or fsdp2. gpu_memory: GiB that torch sees.
    matmul_tflops, copy_bandwidth (GB/s): bf16 GEMM of 8192^3, and a device copy, read plus written; measured
        on one H100 (benchmarks/results/gpu). link_bandwidth: GB/s per GPU and direction that a collective
        reaches inside a node; network_bandwidth: the same between nodes. Not measured here.
    """

    num_gpus: int = 1
    engine: str = "single"
    gpus_per_node: int = 8
    gpu_memory: float = 79.1
    matmul_tflops: float = 790.0
    copy_bandwidth: float = 3000.0
    link_bandwidth: float = 300.0
    network_bandwidth: float = 40.0

    def __post_init__(self) -> None:
        _check_count("num_gpus", self.num_gpus)
        _check_count("gpus_per_node", self.gpus_per_node)
        _check_choice("engine", self.engine, ENGINES)
        if (self.num_gpus > 1) == (self.engine == "single"):
            raise ValueError(
                f"engine {self.engine!r} does not go with {self.num_gpus} GPUs: one GPU is 'single', several "
                f"are one of {ENGINES[1:]}"
            )
        rates = ("gpu_memory", "matmul_tflops", "copy_bandwidth", "link_bandwidth", "network_bandwidth")
        for name in rates:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def shards_weights(self) -> bool:
        return self.engine in ("zero3", "fsdp2")

    @property
    def is_deepspeed(self) -> bool:
        return self.engine in ("zero2", "zero3")

    @property
    def collective_bandwidth(self) -> float:
        """Bytes per second of each GPU in a collective over all of them."""
        inside = self.num_gpus <= self.gpus_per_node
        return 1e9 * (self.link_bandwidth if inside else self.network_bandwidth)


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
