"""cross_entropy: checks, what is saved for backward, registration with torch.library.

A fused backend is a module (`cpu.py`, `kernel.py`) with the functions `forward` and `backward` of `cpu.py`.
"""

from types import ModuleType

import torch
from torch import Tensor

from vrpo_kernels import checks
from vrpo_kernels.backend import choose
from vrpo_kernels.cross_entropy import reference


def _choose(logits: Tensor, requested: str) -> str:
    return choose("cross_entropy", device=logits.device.type, dtype=logits.dtype, requested=requested)


def _module(name: str) -> ModuleType:
    if name == "triton":
        from vrpo_kernels.cross_entropy import kernel as module
    else:
        from vrpo_kernels.cross_entropy import cpu as module
    return module


def _nll_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _selected(logits_MV: Tensor, row_N: Tensor | None) -> Tensor:
    """The rows to score, for the reference backend: at least fp32, so that its nll is exact too."""
    rows = logits_MV if row_N is None else logits_MV.index_select(0, row_N)
    return rows.to(_nll_dtype(logits_MV))


def _check_values(logits_MV: Tensor, target_N: Tensor, row_N: Tensor | None) -> None:
    num_rows, num_classes = logits_MV.shape
    if target_N.numel() and not 0 <= int(target_N.min()) <= int(target_N.max()) < num_classes:
        raise ValueError(
            f"targets must lie in [0, V) = [0, {num_classes}), got {int(target_N.min())} to "
            f"{int(target_N.max())}; leave rows without a target out with `rows`"
        )
    if row_N is not None and row_N.numel():
        if not 0 <= int(row_N.min()) <= int(row_N.max()) < num_rows:
            raise ValueError(
                f"rows must lie in [0, {num_rows}), got {int(row_N.min())} to {int(row_N.max())}"
            )
        if row_N.unique().numel() != row_N.numel():
            raise ValueError("rows must be all different")


@torch.library.custom_op("vrpo_kernels::cross_entropy_forward", mutates_args=())
def _forward(
    logits_MV: Tensor, target_N: Tensor, row_N: Tensor | None, in_place: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """(nll_N, statistics (2, N)); see `cpu.forward`. in_place is what backward may do with the logits."""
    name = _choose(logits_MV, backend)
    if logits_MV.device.type == "cpu":
        _check_values(logits_MV, target_N, row_N)
    if name == "reference":
        nll_N = reference.cross_entropy(_selected(logits_MV, row_N), target_N)
        return nll_N, nll_N.new_zeros(2, nll_N.shape[0])  # recomputed in backward
    return _module(name).forward(logits_MV, target_N, row_N)


@_forward.register_fake
def _(logits_MV, target_N, row_N, in_place, backend):
    num_rows, dtype = target_N.shape[0], _nll_dtype(logits_MV)
    return logits_MV.new_empty(num_rows, dtype=dtype), logits_MV.new_empty(2, num_rows, dtype=dtype)


def _write_gradient(
    dnll_N: Tensor,
    logits_MV: Tensor,
    target_N: Tensor,
    row_N: Tensor | None,
    statistics: Tensor,
    out_MV: Tensor,
    backend: str,
) -> None:
    name = _choose(logits_MV, backend)
    if name == "reference":
        dlogits = reference.gradient(dnll_N, _selected(logits_MV, row_N), target_N).to(logits_MV.dtype)
        if row_N is None:
            out_MV.copy_(dlogits)
        else:
            out_MV.zero_().index_copy_(0, row_N, dlogits)
        return
    owner_M = None
    if row_N is not None:
        owner_M = row_N.new_full((logits_MV.shape[0],), -1)
        owner_M[row_N] = torch.arange(row_N.shape[0], device=row_N.device)
    _module(name).backward(dnll_N, logits_MV, target_N, owner_M, statistics, out_MV)


@torch.library.custom_op("vrpo_kernels::cross_entropy_backward", mutates_args=())
def _backward(
    dnll_N: Tensor,
    logits_MV: Tensor,
    target_N: Tensor,
    row_N: Tensor | None,
    statistics: Tensor,
    backend: str,
) -> Tensor:
    """dlogits_MV in fresh memory."""
    out_MV = torch.empty(logits_MV.shape, dtype=logits_MV.dtype, device=logits_MV.device)
    _write_gradient(dnll_N, logits_MV, target_N, row_N, statistics, out_MV, backend)
    return out_MV


@_backward.register_fake
def _(dnll_N, logits_MV, target_N, row_N, statistics, backend):
    return torch.empty(logits_MV.shape, dtype=logits_MV.dtype, device=logits_MV.device)


@torch.library.custom_op("vrpo_kernels::cross_entropy_backward_", mutates_args=("logits_MV",))
def _backward_(
    dnll_N: Tensor,
    logits_MV: Tensor,
    target_N: Tensor,
    row_N: Tensor | None,
    statistics: Tensor,
    backend: str,
) -> None:
    """dlogits_MV in the memory of the logits."""
    _write_gradient(dnll_N, logits_MV, target_N, row_N, statistics, logits_MV, backend)


def _setup_context(ctx, inputs, output):
    logits_MV, target_N, row_N, ctx.in_place, ctx.backend = inputs
    _nll_N, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_MV, target_N, row_N, statistics)


def _autograd_backward(ctx, dnll_N, _dstatistics):
    if dnll_N is None or not ctx.needs_input_grad[0]:
        return (None,) * 5
    # Reading a saved tensor checks its version: after an in-place backward a second one raises.
    logits_MV, target_N, row_N, statistics = ctx.saved_tensors
    if not ctx.in_place:
        dlogits_MV = _backward(dnll_N, logits_MV, target_N, row_N, statistics, ctx.backend)
        return dlogits_MV, None, None, None, None
    dlogits_MV = logits_MV.detach()
    _backward_(dnll_N, dlogits_MV, target_N, row_N, statistics, ctx.backend)
    return dlogits_MV, None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def _as_matrix(logits: Tensor) -> Tensor:
    """logits [..., V] as a view (M, V). A copy would cost what this op exists to save, so it is refused."""
    shape, stride = logits.shape, logits.stride()
    viewable = stride[-1] == 1 or shape[-1] == 1
    for axis in range(logits.dim() - 2):
        viewable = viewable and (
            shape[axis] == 1 or shape[axis + 1] == 1 or stride[axis] == stride[axis + 1] * shape[axis + 1]
        )
    if logits.numel() and not viewable:
        raise ValueError(
            "logits must be viewable as (M, V) rows of contiguous classes, got shape "
            f"{tuple(shape)} with strides {tuple(stride)}; pass the unsliced logits and choose rows with "
            "`rows`, or call .contiguous() if the copy is wanted"
        )
    return logits.view(-1, shape[-1]) if logits.numel() else logits.reshape(-1, shape[-1])


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    rows: Tensor | None = None,
    *,
    in_place: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Negative log-likelihood of one target per row of logits that exist already.

        nll_n = logsumexp_v(z_nv) - z_n,target_n,   z_n = row rows[n] of the logits

    Only the selected rows are read, once; backward reads them once and writes the gradient once. No fp32
    copy of the logits exists at any time. If you have the hidden states and the head, do not make logits:
    `linear_cross_entropy` needs no (rows x V) memory.

    Args:
        logits: (..., V) float32, bfloat16 or float16 (float64: reference only), viewable as (M, V): leading
            axes flatten without a copy, classes are contiguous. Entries are finite or -inf.
        targets: int64 in [0, V); shape (N,) with rows, else the leading shape of the logits.
        rows: (N,) int64, all different, in [0, M): which rows to score, as indices into the flattened
            leading axes. None scores all of them.
        in_place: if True, backward writes the gradient over the logits themselves, which saves their
            size in memory. The logits' values are lost then; a second backward, or another op that saved
            them, raises. Ignored under torch.compile, which plans its own memory.
        backend: "auto", "triton", "cpu" or "reference".
    Returns:
        nll, float32 (float64 for float64), nats, >= 0, of the shape of targets. Each row may receive any
        upstream gradient. N = 0 gives an empty tensor and zero gradients.
    Numerics:
        Sums in fp32 also for 16-bit logits; softplus of the log-odds, so that rows with p close to 1 keep
        their relative accuracy. Bitwise the same with and without gradients and from run to run. The
        gradient is rounded to the logits' dtype once; rows that are not selected get exact zeros.
    Errors:
        ValueError naming the argument, what it got and what it needs, or every reason against a requested
        backend. Values of targets and rows are checked for CPU tensors only.
    Source: per-term log-probability of the l-form ELBO, arXiv 2505.19223, Eq. (14)-(15).
    """
    checks.require_plain("logits", logits)
    checks.require_floating("logits", logits)
    checks.require_int64("targets", targets)
    checks.require_same("device", "logits", logits.device, "targets", targets.device)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., V) with V >= 1, got shape {tuple(logits.shape)}")
    if rows is None:
        leading = tuple(logits.shape[:-1])
        checks.require_same("shape", "targets", tuple(targets.shape), "logits without V", leading)
    else:
        checks.require_dim("rows", rows, "N")
        checks.require_int64("rows", rows)
        checks.require_same("device", "rows", rows.device, "logits", logits.device)
        checks.require_same("shape", "targets", tuple(targets.shape), "rows", tuple(rows.shape))
    if in_place and logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "in_place would overwrite a leaf tensor with its own gradient; logits must be computed"
        )
    overwrite = in_place and not torch.compiler.is_compiling()
    nll, _statistics = _forward(_as_matrix(logits), targets.reshape(-1), rows, overwrite, backend)
    return nll.view(targets.shape)
