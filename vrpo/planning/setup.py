"""What is trained, how, and on which machine: the inputs of the cost model, checked."""

import math
from dataclasses import dataclass
from typing import Any

ENGINES = ("single", "ddp", "zero2", "zero3", "fsdp2")
REFERENCES = ("model", "synced", "adapter", "precomputed", "none")
GRADIENT_MODES = ("auto", "joint", "replay")


@dataclass(frozen=True)
class TrainingSetup:
    """One training, in the names of VRPOConfig where it has them.

    prompt_length, response_length: tokens, means; all sequences count as equally long.
    pairs_per_step: examples of one optimizer step, over all GPUs. num_sides: responses of an example.
    mask_ratio: masked share of the responses, mean: `masking.masked_share`, 1/2 for uniform levels.
    is_linear: the loss is linear in the ELBOs (SFT), so that what is cut into packs is passed once all the
        same. whole_batches: the loss needs all ELBOs of a batch at once (KTO).
    lora_rank: 0 trains all weights. lora_targets: names of the linear layers with adapters; None for all.
    reference: "model" (a frozen copy), "synced" (one that follows the policy), "adapter" (the model with its
        adapter off), "precomputed" or "none". share_trunk: where the lowest layers are frozen, policy and
        reference compute them once.
    train_top_layers: None for all. weight_bytes: 4 for float32, 2 for bfloat16 weights. quantized_bytes: of a
        weight of the body's linear layers with its share of the scales, under adapters; 0: not quantized.
    compute_bytes: 2 under bf16 autocast, and with 16-bit weights; else 4.
    trims_last_layer: above its attention the last layer runs on masked rows alone, as it does here. False: on
        all tokens, as in steps that were measured before it did.
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
    is_linear: bool = False
    whole_batches: bool = False
    lora_rank: int = 0
    lora_targets: tuple[str, ...] | None = None
    reference: str = "model"
    share_trunk: bool = True
    train_top_layers: int | None = None
    gradient_checkpointing: bool = False
    weight_bytes: int = 4
    quantized_bytes: float = 0.0
    compute_bytes: int = 2
    trims_last_layer: bool = True

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
        if self.quantized_bytes and not self.lora_rank:
            raise ValueError("quantized_bytes needs lora_rank > 0: a quantized base is frozen")
        if not 0 <= self.quantized_bytes <= 2:
            raise ValueError(f"quantized_bytes must be in [0, 2], got {self.quantized_bytes}")

    @property
    def segment_length(self) -> int:
        """Tokens of one masked copy."""
        return self.prompt_length + self.response_length

    @property
    def pair_tokens(self) -> int:
        """Tokens of all masked copies of one example."""
        return self.num_sides * self.num_samples * self.segment_length

    @property
    def batch_tokens(self) -> int:
        """Tokens of all masked copies of one batch of a GPU."""
        return self.per_device_train_batch_size * self.pair_tokens

    @property
    def graph_tokens(self) -> int:
        """Tokens of what one graph has to hold where nothing is cut: an example, or a whole batch."""
        return self.batch_tokens if self.whole_batches else self.pair_tokens

    @property
    def is_cut(self) -> bool:
        """Whether packs divide an example (or batch), down to one masked copy."""
        fits = self.graph_tokens <= self.max_tokens_per_pack
        return self.gradient_mode == "replay" or (self.gradient_mode == "auto" and not fits)

    @property
    def replays(self) -> bool:
        """Whether the policy runs twice: a first pass gives the loss, a second one its gradient."""
        return self.is_cut and not self.is_linear

    @property
    def runs_reference(self) -> bool:
        """Whether a step runs a reference."""
        return self.reference in ("model", "synced", "adapter")

    @property
    def keeps_reference(self) -> bool:
        """Whether a second model is resident."""
        return self.reference in ("model", "synced")

    @property
    def _held(self) -> int:
        """Examples, or masked copies where examples are cut, of the largest pack."""
        unit = self.segment_length if self.is_cut else self.graph_tokens
        return max(1, self.max_tokens_per_pack // unit)

    @property
    def pack_tokens(self) -> int:
        """Tokens of the largest pack: as many examples, or masked copies of one, as the budget holds."""
        unit = self.segment_length if self.is_cut else self.graph_tokens
        # "replay" takes a batch as one; "auto" cuts each example that does not fit by itself.
        whole = self.batch_tokens if self.gradient_mode == "replay" or not self.is_cut else self.graph_tokens
        return min(self._held * unit, whole)

    @property
    def packs_per_batch(self) -> int:
        """Packs of one batch of a GPU."""
        if not self.is_cut:
            return math.ceil(self.batch_tokens / self.graph_tokens / self._held)
        whole = self.batch_tokens if self.gradient_mode == "replay" else self.graph_tokens
        parts = self.batch_tokens // whole
        return parts * math.ceil(whole // self.segment_length / self._held)

    @property
    def masked_share(self) -> float:
        """Masked rows, those that meet the head, as a share of the tokens of a pack."""
        return self.mask_ratio * self.response_length / self.segment_length

    @property
    def masked_rows(self) -> float:
        """Masked rows of the largest pack."""
        return self.masked_share * self.pack_tokens

    @property
    def last_layer_share(self) -> float:
        """The share of its tokens that the last layer computes above its attention."""
        return self.masked_share if self.trims_last_layer else 1.0


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
