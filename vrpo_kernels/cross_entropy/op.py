"""cross_entropy: checks, what is saved for backward, registration with torch.library.

A fused backend is a module (`cpu.py`, `kernel.py`) with the functions `forward` and `backward` of `cpu.py`.
"""

import itertools
from types import ModuleType

import torch
from torch import Tensor

from vrpo_kernels import autograd, checks
from vrpo_kernels.backend import choose
from vrpo_kernels.cross_entropy import reference


def _module(name: str) -> ModuleType:
    if name == "triton":
        from vrpo_kernels.cross_entropy import kernel as module
    else:
        from vrpo_kernels.cross_entropy import cpu as module
    return module


def _check_values(target_N: Tensor, row_N: Tensor | None, num_rows: int, num_classes: int) -> None:
    if checks.values_are_checked(target_N.device):
        checks.require_targets(target_N, num_classes)
        if row_N is not None:
            checks.require_rows("rows", row_N, num_rows)


def _known(target_N: Tensor, row_N: Tensor | None, num_rows: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """(targets, rows) with -1 where they are out of range, unless values are checked: then ValueError."""
    _check_values(target_N, row_N, num_rows, num_classes)
    row_N = torch.arange(num_rows, device=target_N.device) if row_N is None else row_N
    return checks.in_range(target_N, num_classes), checks.in_range(row_N, num_rows)


# The same for torch.compile and torch.func, so that it looks at run time.
_known_op = torch.library.custom_op("vrpo_kernels::cross_entropy_known", _known, mutates_args=())
_known_op.register_fake(lambda target_N, *_: (torch.empty_like(target_N), torch.empty_like(target_N)))
autograd.register_loop(_known_op)


def _by_formula(logits_MV: Tensor, target_N: Tensor, row_N: Tensor | None) -> Tensor:
    """nll_N in plain PyTorch, differentiable as often and in whatever mode is wanted."""
    look = _known_op if autograd.is_managed() else _known
    target_N, known_N = look(target_N, row_N, *logits_MV.shape)
    rows = logits_MV if row_N is None else logits_MV.index_select(0, known_N.clamp(min=0))
    # At least fp32, so that its nll is exact too.
    rows = rows.to(torch.promote_types(logits_MV.dtype, torch.float32))
    nll_N = reference.cross_entropy(rows, target_N.clamp(min=0))
    # On a GPU a bad value makes NaN of its row, forward and backward.
    good_N = (target_N >= 0) & (known_N >= 0)
    return nll_N * torch.where(good_N, 1.0, float("nan")).to(nll_N.dtype)


@torch.library.custom_op("vrpo_kernels::cross_entropy_forward", mutates_args=())
def _forward(
    logits_MV: Tensor, target_N: Tensor, row_N: Tensor | None, in_place: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """(nll_N, statistics (2, N)); see `cpu.forward`. in_place is what backward may do with the logits."""
    _check_values(target_N, row_N, *logits_MV.shape)
    return _module(backend).forward(logits_MV, target_N, row_N)


@_forward.register_fake
def _(logits_MV, target_N, row_N, in_place, backend):
    num_rows, dtype = target_N.shape[0], torch.float32
    return logits_MV.new_empty(num_rows, dtype=dtype), logits_MV.new_empty(2, num_rows, dtype=dtype)


def _owners(row_N: Tensor, dnll_N: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """owner_M, the index n that scores row m or -1, and dnll_N with NaN where two n score the same row.

    Rows out of range are nobody's. Neither happens where values are checked.
    """
    # One place more than rows: that is where rows out of range go.
    place_N = checks.in_range(row_N, num_rows, otherwise=num_rows)
    owner_M = row_N.new_full((num_rows + 1,), -1)
    owner_M[place_N] = torch.arange(row_N.shape[0], device=row_N.device)
    if not checks.values_are_checked(row_N.device):
        count_M = torch.zeros_like(owner_M).index_add_(0, place_N, torch.ones_like(place_N))
        dnll_N = torch.where(count_M[place_N] > 1, float("nan"), dnll_N)
    return owner_M[:num_rows], dnll_N


def _write_gradient(
    dnll_N: Tensor,
    logits_MV: Tensor,
    target_N: Tensor,
    row_N: Tensor | None,
    statistics: Tensor,
    out_MV: Tensor,
    backend: str,
) -> None:
    owner_M = None
    if row_N is not None:
        owner_M, dnll_N = _owners(row_N, dnll_N, logits_MV.shape[0])
    _module(backend).backward(dnll_N, logits_MV, target_N, owner_M, statistics, out_MV)


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


def _autograd_backward(ctx, saved, dnll_N, _dstatistics):
    if dnll_N is None or not ctx.needs_input_grad[0]:
        return (None,) * 5
    # Reading a saved tensor checked its version: after an in-place backward a second one raises.
    logits_MV, target_N, row_N, statistics = saved
    if not ctx.in_place:
        dlogits_MV = _backward(dnll_N, logits_MV, target_N, row_N, statistics, ctx.backend)
        return dlogits_MV, None, None, None, None
    dlogits_MV = logits_MV.detach()
    _backward_(dnll_N, dlogits_MV, target_N, row_N, statistics, ctx.backend)
    return dlogits_MV, None, None, None, None


_fused = autograd.register(
    _forward,
    "cross_entropy",
    autograd.once_differentiable("cross_entropy", _autograd_backward),
    _setup_context,
)
autograd.register_loop(_backward)


@_backward_.register_vmap
def _(info, in_dims, *args):
    raise RuntimeError(
        "cross_entropy(in_place=True) has memory for one gradient, and vmap asks for several; leave it out"
    )


class _IntoLogits(torch.autograd.Function):
    """A copy of the logits, whose gradient is written over them: what in_place is to the reference."""

    @staticmethod
    def forward(ctx, logits_MV):
        ctx.save_for_backward(logits_MV)
        return logits_MV.clone()

    @staticmethod
    def backward(ctx, dlogits_MV):
        return _overwrite(ctx, dlogits_MV)


def _overwrite_logits(ctx, saved, dlogits_MV):
    return (saved[0].detach().copy_(dlogits_MV),)


_overwrite = autograd.once_differentiable("cross_entropy(in_place=True)", _overwrite_logits)


def _require_own_memory(logits: Tensor, logits_MV: Tensor) -> None:
    """What in_place needs: rows that share no memory, and memory that is no parameter's."""
    num_rows, num_classes = logits_MV.shape
    if num_rows > 1 and logits_MV.stride(0) < num_classes:
        raise ValueError(
            "in_place needs logits whose rows share no memory, got shape "
            f"{tuple(logits.shape)} with strides {logits.stride()}; leave in_place out, or pass a copy"
        )
    if logits.is_neg():
        raise ValueError("in_place needs logits that lie in memory as they are, got a lazily negated view")
    base = logits if logits._base is None else logits._base
    if logits.requires_grad and base.is_leaf:
        raise ValueError(
            "in_place would overwrite a leaf tensor with its own gradient; logits must be computed, and not "
            "be a view of a leaf"
        )


def _as_matrix(logits: Tensor) -> Tensor:
    """logits [..., V] as a view (M, V). A copy would cost what this op exists to save, so it is refused."""
    shape, stride = logits.shape, logits.stride()
    viewable = stride[-1] == 1 or shape[-1] == 1
    leading = [axis for axis in range(logits.dim() - 1) if shape[axis] != 1]
    for outer, inner in itertools.pairwise(leading):
        viewable = viewable and stride[outer] == stride[inner] * shape[inner]
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
            them, raises. Rows must not share memory with each other, nor logits with a leaf. Ignored under
            torch.compile and torch.func transforms, which plan memory themselves.
        backend: "auto", "triton", "cpu" or "reference".
    Returns:
        nll, float32 (float64 for float64), nats, >= 0, of the shape of targets. Each row may receive any
        upstream gradient. N = 0 gives an empty tensor and zero gradients.
    Numerics:
        Sums in fp32 also for 16-bit logits; softplus of the log-odds, so that rows with p close to 1 keep
        their relative accuracy. Bitwise the same with and without gradients and from run to run. The
        gradient is rounded to the logits' dtype once; rows that are not selected get exact zeros.
    Differentiation:
        Once, in reverse mode, `torch.func` and vmap included; backend "reference" (not in place) as often as
        wanted and in forward mode. What a backend cannot differentiate raises a RuntimeError.
    Errors:
        ValueError naming the argument, what it got and what it needs, or every reason against a requested
        backend. A target or row out of range, or a row given twice, is a ValueError on the CPU, and on a GPU
        after `vrpo_kernels.set_debug(True)`; without it a GPU gives NaN: nll of what is out of range, and
        the gradient of a row given twice.
    Source: per-term log-probability of the l-form ELBO, arXiv 2505.19223, Eq. (14)-(15).
    """
    for name, tensor in (("logits", logits), ("targets", targets), ("rows", rows)):
        if tensor is not None:
            checks.require_plain(name, tensor)
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
    chosen = choose("cross_entropy", device=logits.device.type, dtype=logits.dtype, requested=backend)
    logits_MV, target_N = _as_matrix(logits), targets.reshape(-1)
    overwrite = in_place and not autograd.is_managed()
    if overwrite:
        _require_own_memory(logits, logits_MV)
    if chosen == "reference":
        logits_MV = _IntoLogits.apply(logits_MV) if overwrite else logits_MV
        return _by_formula(logits_MV, target_N, rows).view(targets.shape)
    nll, _statistics = _fused(logits_MV, target_N, rows, overwrite, chosen)
    return nll.view(targets.shape)
