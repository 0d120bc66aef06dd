"""Away from the usual run on a GPU: other streams, views, edges of tiles, shards of the head, whole ELBOs."""

import pytest
import torch
import torch.distributed as dist
from gpu_support import (
    HALF_FORMS,
    KEEP,
    MARKS,
    RECOMPUTE,
    gradients,
    hold,
    make_inputs,
    make_modes,
    make_op,
    name_of,
    use_small_tiles,
)
from shards import sharded_ratios

from vrpo_kernels import elbo_from_hidden, elbo_from_logits, testing, vocab_parallel_linear_cross_entropy

pytestmark = MARKS
OUTPUTS = ("nll", "dhidden", "dweight")
EDGES = [(1, 8193), (127, 8192), (128, 8191), (129, 32769), (1025, 8192), (1025, 32769)]


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
@pytest.mark.parametrize(("N", "V"), EDGES, ids=lambda value: str(value))
def test_linear_cross_entropy__edges_of_tiles(gemm, N, V, monkeypatch, record_property):
    # Tiles of 1024 x 8192, sweeps of 1024 x 4096, output blocks of 128 x 256: one less, equal, one more.
    use_small_tiles(monkeypatch)
    hidden, weight, targets, upstream = make_inputs(N, V, 64, torch.bfloat16, scale=2.0)
    targets[0], targets[-1] = 0, V - 1
    ratios = {}
    for mode, op in make_modes(gemm).items():
        with testing.poisoned_empty():
            found = gradients(op, hidden, weight, targets, upstream)
        measured = testing.linear_cross_entropy_ratios(*found, hidden, weight, targets, upstream)
        ratios |= {f"{mode} {output}": ratio for output, ratio in measured.items()}
    hold(ratios, record_property)


@pytest.mark.parametrize("kept_tile_bytes", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("gemm", "dtype"), HALF_FORMS, ids=name_of)
def test_linear_cross_entropy__same_bits_on_another_stream(gemm, dtype, kept_tile_bytes):
    inputs = make_inputs(300, 9000, 128, dtype)
    op = make_op(gemm, kept_tile_bytes)
    expected = gradients(op, *inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # The inputs come late, from this stream: what ran ahead on another would read zeros.
        late = [torch.zeros_like(tensor) for tensor in inputs]
        busy = torch.ones(2**28, device="cuda")
        for _ in range(20):
            busy.mul_(1.0)
        for tensor, value in zip(late, inputs, strict=True):
            tensor.copy_(value)
        found = gradients(op, *late)
    torch.cuda.current_stream().wait_stream(side)
    for value, wanted, name in zip(found, expected, OUTPUTS, strict=True):
        testing.assert_bitwise_equal(value, wanted, name)


def _view_of(matrix, offset, padding):
    """The same values at an element offset into a larger buffer, rows further apart."""
    rows, cols = matrix.shape
    buffer = torch.full((offset + rows * (cols + padding),), float("nan"), device="cuda").to(matrix.dtype)
    view = buffer[offset:].view(rows, cols + padding)[:, :cols]
    view.copy_(matrix)
    return view


@pytest.mark.parametrize("kept_tile_bytes", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("offset", "padding"), [(1, 0), (8, 0), (0, 1), (8, 8)], ids=lambda value: str(value)
)
@pytest.mark.parametrize(("gemm", "dtype"), HALF_FORMS, ids=name_of)
def test_linear_cross_entropy__views_of_any_alignment(
    gemm, dtype, offset, padding, kept_tile_bytes, record_property
):
    # TMA descriptors need 16-byte bases and rows: offset 8 and padding 8 keep them, 1 does not.
    hidden, weight, targets, upstream = make_inputs(200, 9000, 128, dtype)
    views = _view_of(hidden, offset, padding), _view_of(weight, offset, padding)
    late_targets = torch.cat([targets[:1], targets])[1:]  # 8 bytes into its buffer
    late_upstream = torch.cat([upstream[:1], upstream])[1:]
    found = gradients(make_op(gemm, kept_tile_bytes), *views, late_targets, late_upstream)
    hold(
        testing.linear_cross_entropy_ratios(*found, hidden, weight, targets, upstream),
        record_property,
    )


@pytest.mark.parametrize("kept_tile_bytes", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
def test_linear_cross_entropy__one_gradient_for_all_rows(kept_tile_bytes):
    hidden, weight, targets, _ = make_inputs(200, 9000, 128, torch.bfloat16)
    op = make_op("cublas", kept_tile_bytes)
    found = gradients(op, hidden, weight, targets, torch.ones(1, device="cuda").expand(200))  # stride 0
    expected = gradients(op, hidden, weight, targets, torch.ones(200, device="cuda"))
    for value, wanted, name in zip(found, expected, OUTPUTS, strict=True):
        testing.assert_bitwise_equal(value, wanted, name)


@pytest.fixture(params=["nccl", "gloo"])
def group_of_one(request, tmp_path):
    options = {"device_id": torch.device("cuda", 0)} if request.param == "nccl" else {}
    dist.init_process_group(
        request.param, init_method=f"file://{tmp_path}/store", rank=0, world_size=1, **options
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.filterwarnings("default")  # what process groups warn of is not ours to judge
@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_vocab_parallel__alone_it_is_the_whole_head(gemm, group_of_one, record_property):
    hidden, weight, targets, upstream = make_inputs(200, 9000, 128, torch.bfloat16)

    def op(hidden, weight, targets):
        return vocab_parallel_linear_cross_entropy(
            hidden, weight, targets, group=group_of_one, first_class=0, gemm=gemm
        )

    found = gradients(op, hidden, weight, targets, upstream)
    with torch.no_grad():
        testing.assert_bitwise_equal(op(hidden, weight, targets), found[0], "nll without gradients")
    hold(
        testing.linear_cross_entropy_ratios(*found, hidden, weight, targets, upstream),
        record_property,
    )


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_backend__shards_of_the_head_add_up(gemm, record_property):
    inputs = make_inputs(200, 9000, 128, torch.bfloat16, scale=2.0)
    hold(sharded_ratios(gemm, (3000, len(inputs[1])), *inputs), record_property)


def _elbo_batch(B, L, V, D):
    """(hidden, head, tokens, masked, row_weights) as a response of B sequences has them; one has no mask."""
    generator = torch.Generator().manual_seed(B + L)
    hidden = torch.randn(B, L, D, generator=generator).mul_(2 * D**-0.5).bfloat16()
    head = torch.randn(V, D, generator=generator).bfloat16()
    tokens = torch.randint(V, (B, L), generator=generator)
    share = torch.rand(B, 1, generator=generator)
    share[1] = 0.0
    masked = torch.rand(B, L, generator=generator) < share
    weights = L / masked.sum(1).clamp(min=1)
    return hidden, head, tokens, masked, weights.float()


def _flatten(hidden, head, tokens, masked, weights, boundary):
    """The batch as one pack, in sequences that end at `boundary`."""
    cu_seqlens = torch.tensor([0, *boundary], dtype=torch.int32)
    per_token = weights.repeat_interleave(tokens.shape[1])
    return hidden.flatten(0, 1), head, tokens.flatten(), masked.flatten(), per_token, cu_seqlens


def _elbo_gradients(function, device, dtype, arguments, upstream, **options):
    """(elbo, gradients of the floating arguments), on the device, in the dtype."""
    values = [tensor.to(device) for tensor in arguments]
    leaves = []
    for index, value in enumerate(values):
        if value.dtype is torch.bfloat16:
            values[index] = value.to(dtype).requires_grad_()
            leaves.append(values[index])
    elbo = function(*values, **{name: value.to(device) for name, value in options.items()})
    return elbo.detach().cpu(), *(
        grad.cpu() for grad in torch.autograd.grad(elbo, leaves, upstream.to(device, elbo.dtype))
    )


def _reference_elbo(function):
    return lambda *arguments, **options: function(*arguments, backend="reference", **options)


def _through_rounded_logits(hidden, head, tokens, masked, row_weights, **options):
    """The baseline of the gradients: logits and gradients in the input dtype, as plain PyTorch forms them."""
    logits = hidden @ head.T
    return _reference_elbo(elbo_from_logits)(logits, tokens, masked, row_weights, **options)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_elbo_from_hidden__agrees_with_the_reference(layout, record_property):
    batch, options = _elbo_batch(4, 300, 9000, 128), {}
    if layout == "packed":
        *batch, cu_seqlens = _flatten(*batch, (1, 299, 299, 900, 1200))
        options = {"cu_seqlens": cu_seqlens}
    num_sequences = 4 if layout == "padded" else 5
    upstream = testing.wide_range_upstream(num_sequences, torch.Generator().manual_seed(1), decades=1.0)
    found = _elbo_gradients(elbo_from_hidden, "cuda", torch.bfloat16, batch, upstream, **options)
    exact = _reference_elbo(elbo_from_hidden)
    truth = _elbo_gradients(exact, "cpu", torch.float64, batch, upstream, **options)
    baseline32 = _elbo_gradients(exact, "cpu", torch.float32, batch, upstream, **options)
    rounded = _elbo_gradients(_through_rounded_logits, "cpu", torch.bfloat16, batch, upstream, **options)
    hidden_size = batch[0].shape[-1]
    matrices = [tensor.reshape(-1, hidden_size) for tensor in (found[1], truth[1], rounded[1])]
    hold(
        {
            "elbo": testing.fp32_error_ratio(found[0], truth[0], baseline32[0]),
            "dhidden": testing.matrix_error_ratio(*matrices),
            "dweight": testing.matrix_error_ratio(found[2], truth[2], rounded[2]),
        },
        record_property,
    )
    masked = batch[3].reshape(-1)
    assert torch.equal(matrices[0][~masked], torch.zeros_like(matrices[0][~masked]))


def test_elbo_from_logits__agrees_with_the_reference(record_property):
    hidden, head, *rest = _elbo_batch(4, 300, 9000, 128)
    logits = (hidden @ head.T).mul_(2)
    upstream = testing.wide_range_upstream(4, torch.Generator().manual_seed(1), decades=1.0)
    batch = (logits, *rest)
    found = _elbo_gradients(elbo_from_logits, "cuda", torch.bfloat16, batch, upstream)
    exact = _reference_elbo(elbo_from_logits)
    truth = _elbo_gradients(exact, "cpu", torch.float64, batch, upstream)
    baseline32 = _elbo_gradients(exact, "cpu", torch.float32, batch, upstream)
    matrices = [found[1], truth[1], baseline32[1].bfloat16()]
    hold(
        {
            "elbo": testing.fp32_error_ratio(found[0], truth[0], baseline32[0]),
            "dlogits": testing.matrix_error_ratio(*(matrix.flatten(0, 1) for matrix in matrices)),
        },
        record_property,
    )


def test_elbo_from_hidden__never_waits_for_the_device_if_the_count_is_known():
    hidden, head, tokens, masked, weights = (tensor.cuda() for tensor in _elbo_batch(4, 300, 9000, 128))
    num_masked = int(masked.sum())
    hidden.requires_grad_()

    def run():
        elbo = elbo_from_hidden(hidden, head, tokens, masked, weights, num_masked=num_masked)
        return elbo.detach(), *torch.autograd.grad(elbo.sum(), hidden)

    expected = run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for value, wanted, name in zip(found, expected, ("elbo", "dhidden"), strict=True):
        testing.assert_bitwise_equal(value, wanted, name)
