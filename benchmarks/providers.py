"""Ours and every rival, on one contract: nll per row, backward with an arbitrary gradient per row."""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import vrpo_kernels
from benchmarks.cases import Case

Op = Callable[..., Tensor]
"""(hidden, weight, targets) -> nll, or (hidden, weight, targets, bias) -> nll for a head with a bias."""


@dataclass(frozen=True)
class Provider:
    """A way to compute nll (N,) from (hidden, weight, targets) and, if the head has one, a bias.

    Attributes:
        make: returns the op for a case; its soft-cap is the case's.
        missing: returns why the provider cannot run a case, or None.
        per_row: False if it only accepts one gradient for all rows (a ceiling, not a rival on our contract).
        stage: on a GPU the stages of a case are measured one after the other and written after each, so that
            what waits on locks in device memory (2), needs most memory (3) or is slow to compile (4) cannot
            take the others' figures along.
        start_seconds: what compiling takes there, until a run knows better; not started with less time left.
    """

    make: Callable[[Case], Op]
    missing: Callable[[Case], str | None] = lambda case: None
    per_row: bool = True
    stage: int = 1
    start_seconds: float = 5.0


def _make_vrpo(**options: int) -> Callable[[Case], Op]:
    def make(case: Case) -> Op:
        def op(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
            head = {} if case.head == "plain" else {"bias": bias, "softcap": case.softcap}
            return vrpo_kernels.linear_cross_entropy(hidden, weight, targets, **head, **options)

        return op

    return make


def _make_eager(case: Case) -> Op:
    softcap = case.softcap

    def op(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight, bias).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    return op


def _keep_all_graphs() -> None:
    """Three heads, each with its gate and grad modes, are more than the 8 graphs of one function that
    torch.compile keeps before it falls back to eager: a rival would be slow for no fault of its own.
    """
    torch._dynamo.config.recompile_limit = 64


def _make_compiled(case: Case) -> Op:
    _keep_all_graphs()
    return torch.compile(_make_eager(case), dynamic=False)


def _torch_native(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    more = {} if bias is None else {"linear_bias": bias}
    return torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="none", **more)


def _make_trl(chunk: int) -> Callable[[Case], Op]:
    def make(case: Case) -> Op:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def op(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
            settings = (1.0, chunk, case.softcap, 1.0, ())
            return -ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *settings)[0]

        return op

    return make


def _make_liger(case: Case) -> Op:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, targets, bias=None: liger_fused_linear_cross_entropy(
        hidden, weight, targets, bias, reduction="none", softcap=case.softcap
    )


def _make_cce(exact: bool) -> Callable[[Case], Op]:
    def make(case: Case) -> Op:
        from cut_cross_entropy import linear_cross_entropy

        _keep_all_graphs()
        options = {"reduction": "none", "impl": "cce" if case.device == "cuda" else "torch_compile"}
        if exact and case.device == "cuda":
            options["filter_eps"] = None

        def op(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
            more = {} if bias is None else {"bias": bias}
            return linear_cross_entropy(hidden, weight, targets, softcap=case.softcap, **options, **more)

        return op

    return make


def _make_quack(case: Case) -> Op:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def op(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(hidden, weight, targets, reduction="sum")

    return op


def _needs(module: str, *, cuda: bool = False, why_cuda: str = "") -> Callable[[Case], str | None]:
    def missing(case: Case) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"package {module} is not installed"
        if cuda and case.device != "cuda":
            return why_cuda
        return None

    return missing


def _needs_native(case: Case) -> str | None:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy"
    return None if case.softcap is None else "it takes no soft-cap"


def _needs_cce(case: Case) -> str | None:
    missing = _needs("cut_cross_entropy")(case)
    if missing is None and case.head == "bias":
        from cut_cross_entropy import linear_cross_entropy

        if "bias" not in inspect.signature(linear_cross_entropy).parameters:
            return "its linear_cross_entropy takes no bias"
    return missing


def _needs_cce_on_cuda(case: Case) -> str | None:
    missing = _needs_cce(case)
    if missing is None and case.device != "cuda":
        return "its filter exists in its CUDA kernels only; on a CPU both forms are the row above"
    return missing


def _needs_quack(case: Case) -> str | None:
    missing = _needs("quack", cuda=True, why_cuda="GPU only")(case)
    return missing or (None if case.head == "plain" else "it takes neither a bias nor a soft-cap")


PROVIDERS: dict[str, Provider] = {
    "vrpo": Provider(_make_vrpo()),
    "vrpo, tiles recomputed": Provider(_make_vrpo(kept_tile_bytes=0)),
    "torch eager": Provider(_make_eager, stage=3),
    "torch.compile": Provider(_make_compiled, stage=4, start_seconds=15.0),
    "F.linear_cross_entropy": Provider(lambda case: _torch_native, _needs_native),
    "TRL chunked, chunk 4096": Provider(_make_trl(4096), _needs("trl")),
    "TRL chunked, chunk 32768": Provider(_make_trl(32768), _needs("trl")),
    "Liger": Provider(
        _make_liger,
        _needs("liger_kernel", cuda=True, why_cuda="its Triton kernels run on a CPU in the interpreter only"),
    ),
    "CCE, exact": Provider(_make_cce(True), _needs_cce, stage=2),
    "CCE, default filter": Provider(_make_cce(False), _needs_cce_on_cuda, stage=2, start_seconds=15.0),
    "quack, sum only": Provider(_make_quack, _needs_quack, per_row=False),
}


def stages(wanted: list[str], device: str) -> list[list[str]]:
    """The wanted providers in the groups that are timed together: all at once on a CPU, else by stage."""
    if device == "cpu":
        return [wanted]
    numbers = sorted({PROVIDERS[name].stage for name in wanted})
    return [[name for name in wanted if PROVIDERS[name].stage == number] for number in numbers]
