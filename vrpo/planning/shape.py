"""A model's sizes, from config.json: LLaDA's original names, Llama's, and mixtures of experts (LLaDA2)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Size here -> its keys: transformers' first, then LLaDA's original ones.
_KEYS = {
    "num_layers": ("num_hidden_layers", "n_layers"),
    "hidden_size": ("hidden_size", "d_model"),
    "num_heads": ("num_attention_heads", "n_heads"),
    "vocab_size": ("embedding_size", "vocab_size"),
}
_LINEAR = {"attn_out": "o_proj", "ff_proj": "gate_proj", "ff_out": "down_proj"}  # LLaDA's -> transformers'
_LARGEST = 2**31


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like model with SwiGLU layers, dense or with experts.

    With experts (num_experts > 0), the first dense_layers layers have an MLP of intermediate_size, the others
    num_experts of expert_size, of which a token meets experts_per_token, and shared_experts that it always
    meets.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_head: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    shared_experts: int = 0
    expert_size: int = 0
    dense_layers: int = 0

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.dense_layers if self.num_experts else 0

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Keys and values of one token together."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def attention_parameters(self) -> int:
        """Of one layer: the projections q, k, v, o."""
        return self.hidden_size * (2 * self.query_size + self.key_value_size)

    @property
    def _expert_parameters(self) -> int:
        return 3 * self.hidden_size * self.expert_size

    def layer_parameters(self, *, moe: bool, active: bool = False) -> int:
        """Weights of one layer's matmuls; active: those that one token meets."""
        if not moe:
            return self.attention_parameters + 3 * self.hidden_size * self.intermediate_size
        routed = self.experts_per_token if active else self.num_experts
        router = self.hidden_size * self.num_experts
        return self.attention_parameters + router + (routed + self.shared_experts) * self._expert_parameters

    @property
    def upper_parameters(self) -> int:
        """Weights that one token meets above the attention of the last layer: projection o and MLP."""
        layer = self.layer_parameters(moe=self.num_moe_layers > 0, active=True)
        return layer - self.hidden_size * (self.query_size + self.key_value_size)

    def body_parameters(self, *, active: bool = False) -> int:
        """Weights of the matmuls of all layers."""
        dense = self.num_layers - self.num_moe_layers
        return dense * self.layer_parameters(moe=False) + self.num_moe_layers * self.layer_parameters(
            moe=True, active=active
        )

    @property
    def largest_layer_parameters(self) -> int:
        return self.layer_parameters(moe=self.num_moe_layers > 0)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def norm_parameters(self) -> int:
        return (2 * self.num_layers + 1) * self.hidden_size

    @property
    def total_parameters(self) -> int:
        """All weights; a tied head counts once."""
        ends = self.head_parameters * (1 if self.tied_head else 2)
        return self.body_parameters() + self.norm_parameters + ends

    @property
    def active_parameters(self) -> int:
        """The weights that one token meets, embedding and head included."""
        return self.total_parameters - self.body_parameters() + self.body_parameters(active=True)

    @property
    def active_mlp_size(self) -> float:
        """Intermediate features of one token, mean over the layers."""
        if not self.num_experts:
            return self.intermediate_size
        met = (self.experts_per_token + self.shared_experts) * self.expert_size
        dense = self.dense_layers * self.intermediate_size
        return (dense + self.num_moe_layers * met) / self.num_layers

    @property
    def last_mlp_size(self) -> int:
        """Intermediate features of one token in the last layer."""
        met = (self.experts_per_token + self.shared_experts) * self.expert_size
        return met if self.num_moe_layers else self.intermediate_size

    @property
    def largest_mlp_size(self) -> int:
        """Intermediate features of one token in the layer that has most."""
        met = (self.experts_per_token + self.shared_experts) * self.expert_size
        return max(met if self.num_moe_layers else 0, self.intermediate_size if self._has_dense else 0)

    @property
    def _has_dense(self) -> bool:
        return self.num_moe_layers < self.num_layers

    def lora_parameters(self, rank: int, num_layers: int, targets: tuple[str, ...] | None = None) -> int:
        """Weights of adapters on the linear layers of the top num_layers layers: rank * (in + out) each.

        targets: names of the layers, transformers' or LLaDA's original ones; None, or a name that is none of
            them, for all.
        Of a layer with experts, the attention and the shared expert are adapted: an adapter on each routed
        expert would be a tenth of the model.
        """
        hidden, shared = self.hidden_size, self.shared_experts * self.expert_size
        ends = {"q_proj": self.query_size, "o_proj": self.query_size}
        ends |= dict.fromkeys(("k_proj", "v_proj"), self.key_value_size // 2)
        mlp = ("gate_proj", "up_proj", "down_proj")
        targets = {_LINEAR.get(name, name) for name in targets or ()}
        if not targets or not targets <= {*ends, *mlp}:
            targets = {*ends, *mlp}
        attention = sum(hidden + size for name, size in ends.items() if name in targets)
        in_mlp = sum(name in targets for name in mlp)
        moe = min(num_layers, self.num_moe_layers)
        of_moe = in_mlp * (hidden + shared) if shared else 0
        of_dense = in_mlp * (hidden + self.intermediate_size)
        return rank * (num_layers * attention + moe * of_moe + (num_layers - moe) * of_dense)


def read_shape(path: str | Path) -> ModelShape:
    """From a config.json, or a folder with one.

    Errors: OSError if there is none; ValueError if it is no JSON object or lacks a size.
    """
    path = Path(path).expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON file: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(
            f"{str(path)!r} must hold a JSON object of a model's sizes, got {type(config).__name__}"
        )
    return shape_of(config)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """From the keys of a config.json. Errors: ValueError naming the key that is missing or no count."""
    sizes = {name: _count(config, keys) for name, keys in _KEYS.items()}
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(f"{_KEYS['hidden_size'][0]} {hidden} does not divide into {heads} heads")
    experts = _experts(config, sizes["num_layers"])
    return ModelShape(
        **sizes,
        num_kv_heads=_count(config, ("num_key_value_heads", "n_kv_heads"), default=heads),
        head_dim=_count(config, ("head_dim",), default=hidden // heads),
        intermediate_size=_intermediate_size(config, hidden),
        tied_head=bool(config.get("tie_word_embeddings", config.get("weight_tying", False))),
        **experts,
    )


def _intermediate_size(config: Mapping[str, Any], hidden_size: int) -> int:
    keys = ("intermediate_size", "mlp_hidden_size")
    ratio = config.get("mlp_ratio")
    if all(config.get(key) is None for key in keys) and isinstance(ratio, int | float):
        return _count({"mlp_ratio": int(ratio * hidden_size)}, ("mlp_ratio",))
    return _count(config, keys)


def _experts(config: Mapping[str, Any], num_layers: int) -> dict[str, int]:
    if not config.get("num_experts"):
        return {}
    dense = config.get("first_k_dense_replace") or 0
    if type(dense) is not int or not 0 <= dense <= num_layers:
        raise ValueError(f"first_k_dense_replace must be in [0, {num_layers}], the layers, got {dense!r}")
    found = {
        "num_experts": _count(config, ("num_experts",)),
        "experts_per_token": _count(config, ("num_experts_per_tok",)),
        "expert_size": _count(config, ("moe_intermediate_size",)),
        "shared_experts": _count(config, ("num_shared_experts",), default=0, least=0),
        "dense_layers": dense,
    }
    if found["experts_per_token"] > found["num_experts"]:
        raise ValueError(
            f"num_experts_per_tok must be at most num_experts = {found['num_experts']}, got "
            f"{found['experts_per_token']}"
        )
    return found


def _count(
    config: Mapping[str, Any], keys: tuple[str, ...], *, default: int | None = None, least: int = 1
) -> int:
    """The first of the keys that has a value."""
    key, value = next(((key, config[key]) for key in keys if config.get(key) is not None), (keys[0], default))
    if value is None:
        raise ValueError(f"the model's config.json has no {' or '.join(keys)}")
    if type(value) is not int or not least <= value < _LARGEST:
        raise ValueError(f"{key} of the model's config.json must be a count from {least}, got {value!r}")
    return value
