"""Memory of one GPU at the peak of a training step, part by part, in bytes.

The activations are a count of what autograd keeps of one token in one layer, D hidden features and I of the
MLP, in the numbers of features:

    input of the layer, of the MLP: 2 D | outputs of the two norms: 2 D | q, k, v, attention: 4 D | gate, up,
    silu, product: 4 I | where the norms train, their quotients: 2 D | while its backward runs: D + 2 I more

Of the last layer, what lies above its attention is kept of the masked rows alone, with a copy of their
attention. All layers share the angles of the positions. With checkpointing a layer keeps its input, D, and
one layer at a time all of it. Counted from vrpo/models and transformers' Llama layers; held against measured
peaks in tests/planning.
"""

from vrpo.planning.setup import Machine, TrainingSetup
from vrpo.planning.shape import ModelShape

OPTIMIZER_BYTES = 8  # AdamW: two float32 moments of each trained weight
MASTER_BYTES = 4  # DeepSpeed keeps float32 weights beside the 16-bit ones
LORA_BYTES = 4  # adapters and their gradients stay in float32
KEPT_TILE_BYTES = 2**30  # logits of a trained head up to so many are kept (vrpo_kernels.linear_cross_entropy)


def trained_layers(shape: ModelShape, setup: TrainingSetup) -> int:
    """How many of the uppermost layers train."""
    top = setup.train_top_layers
    if top is not None and top > shape.num_layers:
        raise ValueError(
            f"train_top_layers must be at most {shape.num_layers}, the model's layers, got {top}"
        )
    return shape.num_layers if top is None else top


def trained_parameters(shape: ModelShape, setup: TrainingSetup) -> int:
    """How many weights get a gradient: the adapters, all, or the top layers with the last norm and the head.

    train_top_layers freezes the embedding, also where it names every layer.
    """
    layers = trained_layers(shape, setup)
    if setup.lora_rank:
        return shape.lora_parameters(setup.lora_rank, layers, setup.lora_targets)
    if setup.train_top_layers is None:
        return shape.total_parameters
    frozen = shape.num_layers - layers
    below = _lowest_layers(shape, frozen) + 2 * frozen * shape.hidden_size
    return shape.total_parameters - below - shape.head_parameters


def trained_head(shape: ModelShape, setup: TrainingSetup) -> int:
    """How many weights of the head train; one that is tied to a frozen embedding is frozen with it."""
    is_frozen = shape.tied_head and setup.train_top_layers is not None
    return 0 if setup.lora_rank or is_frozen else shape.head_parameters


def _lowest_layers(shape: ModelShape, number: int) -> int:
    dense = min(number, shape.num_layers - shape.num_moe_layers)
    moe = (number - dense) * shape.layer_parameters(moe=True) if number > dense else 0
    return dense * shape.layer_parameters(moe=False) + moe


def packs_per_step(shape: ModelShape, setup: TrainingSetup, machine: Machine) -> float:
    """Packs of one GPU in one optimizer step; at least one, where GPUs are more than examples too."""
    batches = setup.pairs_per_step / machine.num_gpus / setup.per_device_train_batch_size
    return max(1.0, batches * setup.packs_per_batch)


def _quantized(shape: ModelShape, setup: TrainingSetup) -> int:
    """How many weights are quantized."""
    return shape.body_parameters() if setup.quantized_bytes else 0


def saved_bytes(
    shape: ModelShape, setup: TrainingSetup, mlp_size: float, *, wide: int, norm_keeps: int | None = None
) -> tuple[float, float]:
    """What autograd keeps of one token in one layer: up to its attention, and above.

    wide: bytes of a feature of the residual stream. norm_keeps: tensors of its size that a norm keeps beside
    its input; None: its quotient where it trains, as on a GPU. vrpo_kernels.rms_norm, in float32 on a CPU,
    keeps none.
    """
    narrow, hidden = setup.compute_bytes, shape.hidden_size
    # Each of the two norms: its input, its output, its quotient where it trains. Where autocast narrows what
    # a norm returns, each projection keeps its own copy.
    copies = (3, 2) if wide > narrow else (1, 1)
    norm = wide * (1 + (not setup.lora_rank if norm_keeps is None else norm_keeps))
    attention = (2 * shape.query_size + shape.key_value_size) * narrow + 4 * shape.num_heads
    dispatched = 2 * shape.experts_per_token * hidden * narrow if shape.num_experts else 0
    lower = hidden * (norm + copies[0] * narrow) + attention
    return lower, hidden * (norm + copies[1] * narrow) + 4 * mlp_size * narrow + dispatched


def _last_bytes(shape: ModelShape, setup: TrainingSetup, *, wide: int, norm_keeps: int | None) -> float:
    """What autograd keeps of one token in the last layer, mean over masked and other ones."""
    lower, upper = saved_bytes(shape, setup, shape.last_mlp_size, wide=wide, norm_keeps=norm_keeps)
    if not setup.trims_last_layer:
        return lower + upper
    return lower + setup.last_layer_share * (upper + shape.query_size * setup.compute_bytes)


def stream_bytes(setup: TrainingSetup, machine: Machine) -> int:
    """Bytes of a feature of the residual stream: that of the weights where autocast narrows only matmuls."""
    autocast = machine.engine in ("single", "ddp")
    return max(setup.weight_bytes, setup.compute_bytes) if autocast else setup.compute_bytes


def activation_bytes(
    shape: ModelShape, setup: TrainingSetup, machine: Machine, *, norm_keeps: int | None = None
) -> tuple[float, float]:
    """(kept until the backward pass, more while one layer's backward runs), of the largest pack."""
    wide, tokens = stream_bytes(setup, machine), setup.pack_tokens
    layers = trained_layers(shape, setup)
    mean = sum(saved_bytes(shape, setup, shape.active_mlp_size, wide=wide, norm_keeps=norm_keeps))
    largest = sum(saved_bytes(shape, setup, shape.largest_mlp_size, wide=wide, norm_keeps=norm_keeps))
    last = _last_bytes(shape, setup, wide=wide, norm_keeps=norm_keeps)
    entry = shape.hidden_size * wide
    features = 2 * setup.compute_bytes
    backward = entry + features * shape.largest_mlp_size
    of_last = entry + features * shape.last_mlp_size * setup.last_layer_share
    trunk = entry if layers < shape.num_layers else 0
    angles = 2 * 4 * shape.head_dim  # cosines and sines of the positions, float32
    if setup.gradient_checkpointing:
        kept, of_last, gone = layers * entry, last - entry + of_last, entry
        backward += largest - entry
    else:
        kept, gone = (layers - 1) * mean + last, last
    # The last layer's backward runs first. Where another's does, what the last one kept is gone.
    more = of_last if layers == 1 else max(of_last, backward - gone)
    return tokens * (kept + trunk + angles), tokens * more


def memory_parts(
    shape: ModelShape, setup: TrainingSetup, machine: Machine, *, norm_keeps: int | None = None
) -> dict[str, float]:
    """Bytes of one GPU at the moment of the step that needs most, by part.

    weights, reference, optimizer: resident. gradients: of what is trained, with the copies that the engine
    makes of them. gathered: what sharded weights are gathered into. casts: 16-bit copies that autocast makes
    of float32 weights, and the matrix of quantized weights that is unpacked. activations: kept for the
    backward pass. layer: while one layer's backward runs.
    head: the masked rows, the logits that a trained head keeps of them, and its new gradient.
    """
    if setup.quantized_bytes and machine.engine not in ("single", "ddp"):
        raise ValueError(
            f"a quantized model is not supported under {machine.engine}, which would cut or cast its packed "
            "bits: use one GPU, or ddp"
        )
    shards = machine.num_gpus if machine.shards_weights else 1
    trained = trained_parameters(shape, setup)
    adapters = trained * LORA_BYTES if setup.lora_rank else 0
    quantized = _quantized(shape, setup)
    whole = shape.total_parameters - quantized
    weights = whole * weight_bytes_of(setup, machine) + quantized * setup.quantized_bytes + adapters
    resident = {
        "weights": weights / shards,
        "reference": _reference(shape, setup, machine),
        "optimizer": _optimizer(setup, machine, trained),
        "gathered": _gathered(shape, setup, machine),
        "casts": _casts(shape, setup, machine),
    }
    kept, layer = activation_bytes(shape, setup, machine, norm_keeps=norm_keeps)
    return resident | _moment(shape, setup, machine, kept, layer)


def _moment(
    shape: ModelShape, setup: TrainingSetup, machine: Machine, kept: float, layer: float
) -> dict[str, float]:
    """The parts that come and go, at the worst of three moments of a backward pass."""
    wide = stream_bytes(setup, machine)
    gradients = _gradients(shape, setup, machine)
    buckets = gradients if machine.engine == "ddp" else 0.0  # DDP's copy, there from the start
    trains_head = trained_head(shape, setup) > 0
    new_head = shape.head_parameters * setup.weight_bytes if trains_head else 0
    # Rows as they enter the head and their gradients, and nll, statistics and weights of all.
    head = setup.masked_rows * (shape.hidden_size * 2 * wide + 24)
    tiles = setup.masked_rows * shape.vocab_size * setup.compute_bytes
    if trains_head and not setup.replays and tiles <= KEPT_TILE_BYTES:
        head += tiles
    if packs_per_step(shape, setup, machine) > 1:
        there, new_layer, below = gradients, _new_gradient(shape, setup), gradients
    else:
        # The first gradients of a step: they come while activations go, the embedding's when both are done.
        there, new_layer, below = 0.0, 0, gradients - new_head
    top = {"gradients": max(there, new_head) + new_layer, "activations": kept, "layer": layer, "head": 0.0}
    moments = (
        {"gradients": there, "activations": kept, "layer": 0.0, "head": head + new_head},
        top,
        {"gradients": below + new_layer, "activations": 0.0, "layer": layer, "head": 0.0},
        {"gradients": gradients, "activations": 0.0, "layer": 0.0, "head": 0.0},
    )
    worst = max(moments, key=lambda parts: sum(parts.values()))
    return worst | {"gradients": worst["gradients"] + buckets}


def _new_gradient(shape: ModelShape, setup: TrainingSetup) -> int:
    """The largest gradient of a layer before it is added to the one that is there."""
    if setup.lora_rank:
        return 0
    return shape.hidden_size * max(shape.intermediate_size, shape.query_size) * setup.weight_bytes


def weight_bytes_of(setup: TrainingSetup, machine: Machine) -> int:
    return setup.compute_bytes if machine.is_deepspeed else setup.weight_bytes


def _reference(shape: ModelShape, setup: TrainingSetup, machine: Machine) -> float:
    if not setup.keeps_reference:
        return 0.0
    if machine.shards_weights:
        return shape.total_parameters * setup.weight_bytes / machine.num_gpus
    # A frozen copy shares the weights that do not train, unless an engine takes hold of them.
    own = shape.total_parameters if setup.lora_rank else trained_parameters(shape, setup)
    whole = machine.is_deepspeed
    return (shape.total_parameters if whole else own) * weight_bytes_of(setup, machine)


def _optimizer(setup: TrainingSetup, machine: Machine, trained: int) -> float:
    shards = machine.num_gpus if machine.shards_weights or machine.is_deepspeed else 1
    if machine.is_deepspeed and setup.compute_bytes == 2:
        return trained * (OPTIMIZER_BYTES + MASTER_BYTES) / shards
    # Moments have the dtype of the weights.
    scale = 1.0 if setup.lora_rank else setup.weight_bytes / 4
    return trained * OPTIMIZER_BYTES * scale / shards


def _gradients(shape: ModelShape, setup: TrainingSetup, machine: Machine) -> float:
    """All gradients of one GPU, without DDP's buckets."""
    trained = trained_parameters(shape, setup)
    size = trained * (LORA_BYTES if setup.lora_rank else setup.weight_bytes)
    if machine.engine in ("single", "ddp"):
        return size
    if machine.is_deepspeed:
        return trained * setup.compute_bytes / machine.num_gpus
    return size / machine.num_gpus  # FSDP2: reduced after every pack, added up in the dtype of the weights


def _gathered(shape: ModelShape, setup: TrainingSetup, machine: Machine) -> float:
    """The layer that runs and the next one, the head, and a layer's gradients on their way."""
    if not machine.shards_weights:
        return 0.0
    layer = shape.largest_layer_parameters
    gathered = (2 * layer + shape.head_parameters) * setup.compute_bytes
    return gathered + (0 if setup.lora_rank else layer * setup.compute_bytes)


def _casts(shape: ModelShape, setup: TrainingSetup, machine: Machine) -> float:
    narrowed = machine.engine in ("single", "ddp") and setup.weight_bytes > setup.compute_bytes
    head = shape.head_parameters * setup.compute_bytes if narrowed else 0.0
    if setup.quantized_bytes:
        return head + shape.hidden_size * max(shape.largest_mlp_size, shape.query_size) * setup.compute_bytes
    if not narrowed:
        return 0.0
    layers = trained_layers(shape, setup) / shape.num_layers
    # Copies of trained weights live to the end of the forward pass; a graph keeps those of frozen ones too.
    lives = not setup.lora_rank or not setup.gradient_checkpointing
    body = layers * shape.body_parameters() if lives else shape.largest_layer_parameters
    return head + body * setup.compute_bytes
