"""Test the native CPU operator against the reference, and its registration with torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detrs.ops import deform_attn, deform_attn_reference, native_status
from fresh_interpreter import run_python
from sampling import assert_close_to_largest, random_inputs

pytestmark = pytest.mark.skipif("cpu" not in native_status().devices, reason=native_status().reason)
SHAPES = ((5, 7), (3, 2), (1, 1))


def forward_and_gradients(function, shapes, inputs, grad_out=None):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(inputs[0], shapes, inputs[1], inputs[2])
    if grad_out is None:
        grad_out = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5).map(tuple),
    num_images=st.integers(0, 3),
    num_heads=st.integers(1, 5),
    num_channels=st.sampled_from([1, 3, 4, 8, 12, 16, 20, 32, 36, 64, 100, 128, 132]),
    num_queries=st.integers(0, 70),
    num_points=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
def test_equals_the_reference_at_any_size(shapes, num_queries, dtype, **sizes):
    inputs = random_inputs(shapes, num_queries=num_queries, dtype=torch.float64, **sizes)
    expected = forward_and_gradients(deform_attn_reference, shapes, inputs)
    found = forward_and_gradients(deform_attn, shapes, [tensor.to(dtype) for tensor in inputs])
    if dtype == torch.float32:  # rounding may move a location over a kink, where its gradient jumps
        expected[2], found[2] = expected[2] * 0, found[2] * 0
    assert_close_to_largest(found, expected, 1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("num_channels", [16, 24, 32])
def test_large_inputs_that_are_packed_by_head(num_channels):
    shapes = ((60, 70), (30, 35), (15, 18))
    inputs = random_inputs(
        shapes, num_images=1, num_heads=4, num_channels=num_channels, num_queries=6000, num_points=4
    )
    expected = forward_and_gradients(deform_attn_reference, shapes, inputs)
    assert_close_to_largest(forward_and_gradients(deform_attn, shapes, inputs), expected, 1e-12)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_is_rounded_once(dtype, unit):
    """Sums are float32: the result is the float32 result for the same inputs, rounded to nearest."""
    value, locations, weights = random_inputs(SHAPES, num_channels=40, dtype=torch.float32)
    value = value.to(dtype)
    grad_out = torch.randn(2, 5, 120).to(dtype)
    exact = forward_and_gradients(deform_attn, SHAPES, [value.float(), locations, weights], grad_out.float())
    found = forward_and_gradients(deform_attn, SHAPES, [value, locations, weights], grad_out)
    assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32, torch.float32]
    assert torch.equal(found[0], exact[0].to(dtype))
    assert torch.equal(found[1], exact[1].to(dtype))
    assert_close_to_largest(found[2:], exact[2:], 1e-6)
    all_half = forward_and_gradients(
        deform_attn, SHAPES, [value, locations.to(dtype), weights.to(dtype)], grad_out
    )
    assert {tensor.dtype for tensor in all_half} == {dtype}
    rounded = forward_and_gradients(
        deform_attn, SHAPES, [value.float(), locations.to(dtype).float(), weights.to(dtype).float()]
    )
    assert_close_to_largest(all_half[:1], rounded[:1], 2 * unit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_survives(dtype):
    """A sample at the center of a pixel with weight 1 copies it: both conversions are exact."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers.where(numbers.isfinite(), 0)
    value = numbers.reshape(1, 1, 2**14, 4)
    ones = torch.ones(1, 1, 2**14, 1, 1)
    out = deform_attn(value, ((1, 1),), ones.unsqueeze(-1) / 2 * torch.ones(2), ones)
    torch.testing.assert_close(out.flatten(), numbers, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_as_torch_does(dtype):
    numbers = torch.cat([torch.randn(4096) * 10.0**power for power in range(-9, 8)]).reshape(1, 1, -1, 4)
    ones = torch.ones(1, 1, numbers.shape[2], 1, 1)
    value = torch.ones_like(numbers, dtype=dtype)
    weights = numbers[..., :1, None].float()
    out = deform_attn(value, ((1, 1),), ones.unsqueeze(-1) / 2 * torch.ones(2), weights)
    expected = weights.expand(-1, -1, -1, 4, 1).flatten().to(dtype)
    assert torch.equal(out.flatten(), expected)


def test_pixel_edges_and_borders():
    """Test positions at centers, edges and corners of pixels, and one step of float64 to each side."""
    shapes = ((2, 3),)
    places = torch.tensor([-0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5], dtype=torch.float64)
    near = torch.cat([places, torch.nextafter(places, places - 1), torch.nextafter(places, places + 1)])
    grid = torch.cartesian_prod(near / 3, near / 2).reshape(1, -1, 1, 1, 1, 2)
    value = torch.randn(1, 6, 1, 4, dtype=torch.float64)
    weights = torch.ones(grid.shape[:-1], dtype=torch.float64)
    found = forward_and_gradients(deform_attn, shapes, [value, grid, weights])
    expected = forward_and_gradients(deform_attn_reference, shapes, [value, grid, weights])
    for index in (0, 1, 3):  # at a center, the gradient of the location depends on the last bit
        torch.testing.assert_close(found[index], expected[index], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [-1.0, 2.0, 1e9, -1e30, float("inf"), -float("inf"), float("nan")])
def test_samples_outside_read_zero_and_have_no_gradient(dtype, far):
    value, locations, weights = random_inputs(SHAPES, dtype=dtype)
    locations[:, 1::2, ..., 0] = far
    locations[:, 2, ..., 1] = far
    found = forward_and_gradients(deform_attn, SHAPES, [value, locations, weights])
    kept = weights.clone()
    kept[:, 1:4] = 0
    kept_locations = locations.clone()
    kept_locations[:, 1:4] = 0.5
    expected = forward_and_gradients(deform_attn, SHAPES, [value, kept_locations, kept])
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert torch.count_nonzero(found[0][:, 1:4]) == 0
    assert torch.count_nonzero(found[2][:, 1:4]) == 0
    assert torch.count_nonzero(found[3][:, 1:4]) == 0


def test_strides_do_not_matter():
    value, locations, weights = random_inputs(SHAPES)
    expected = forward_and_gradients(deform_attn, SHAPES, [value, locations, weights])
    strided = [
        value.transpose(1, 3).contiguous().transpose(1, 3),
        locations.flip(5).contiguous().flip(5)[:, :, :, :, :],
        torch.stack([weights, weights], dim=-1)[..., 1],
    ]
    grad_out = torch.ones(1, dtype=torch.float64).expand(2, 5, 24)
    assert not strided[0].is_contiguous()
    assert not strided[2].is_contiguous()
    assert torch.equal(forward_and_gradients(deform_attn, SHAPES, strided)[0], expected[0])
    dense = forward_and_gradients(deform_attn, SHAPES, [value, locations, weights], grad_out.contiguous())
    for one, other in zip(forward_and_gradients(deform_attn, SHAPES, strided, grad_out), dense, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("num_channels", [32, 36])
@pytest.mark.parametrize("num_queries", [100, 2600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_does_not_change_a_bit(dtype, num_queries, num_channels):
    shapes = ((40, 50), (20, 25), (10, 13))
    sizes = {"num_channels": num_channels, "num_queries": num_queries, "num_points": 4}
    inputs = random_inputs(shapes, dtype=torch.float32, **sizes)
    inputs = [inputs[0].to(dtype), *inputs[1:]]
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 3, 7, 16):  # there are 6 heads
        torch.set_num_threads(num_threads)
        results.append(forward_and_gradients(deform_attn, shapes, inputs))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


THREADS = """
from pathlib import Path
import torch
from detrs.ops import deform_attn
from sampling import random_inputs

def processor_times():
    # nanoseconds of each thread
    return {path.parent.name: int(path.read_text().split()[0]) for path in Path("/proc/self/task").glob("*/schedstat")}

torch.set_num_threads(2)
shapes = ((40, 50), (20, 25))
inputs = random_inputs(shapes, num_images=1, num_heads=1, num_channels=32, num_queries=QUERIES, dtype=torch.float32)
leaves = [tensor.requires_grad_() for tensor in inputs]

def run(backward):
    for _ in range(40):
        out = deform_attn(leaves[0], shapes, *leaves[1:])
        if backward:
            torch.ops.detrs.deform_attn_backward(
                grad_out, leaves[0], [40, 50, 20, 25], leaves[1], leaves[2]
            )

with torch.no_grad():
    grad_out = torch.ones_like(deform_attn(leaves[0], shapes, *leaves[1:]))
    for backward in (False, True):
        run(backward)
        before = processor_times()
        run(backward)
        spent = {thread: time - before.get(thread, 0) for thread, time in processor_times().items()}
        print(sorted(spent.values())[-2] / sum(spent.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
@pytest.mark.parametrize("num_queries", [300, 3000])
def test_one_head_of_one_image_is_divided_among_threads(num_queries):
    result = run_python(THREADS.replace("QUERIES", str(num_queries)), OMP_WAIT_POLICY="passive")
    assert result.returncode == 0, result.stderr
    shares = [float(line) for line in result.stdout.splitlines()]
    assert len(shares) == 2
    assert min(shares) > 0.05, shares  # 0 if one thread computes all


def test_the_cpu_has_no_limit_of_levels():
    """CUDA has one, of 32."""
    shapes = tuple((1 + i % 3, 1 + i % 2) for i in range(40))
    value, *samples = random_inputs(shapes)
    expected = deform_attn_reference(value, shapes, *samples)
    torch.testing.assert_close(deform_attn(value, shapes, *samples), expected)


def test_gradcheck():
    inputs = [
        tensor.requires_grad_()
        for tensor in random_inputs(SHAPES[1:], num_images=1, num_queries=2, num_channels=5)
    ]
    assert torch.autograd.gradcheck(lambda *args: deform_attn(args[0], SHAPES[1:], *args[1:]), inputs)


def test_a_second_derivative_is_an_error():
    value, locations, weights = (tensor.requires_grad_() for tensor in random_inputs(SHAPES))
    out = deform_attn(value, SHAPES, locations, weights)
    (gradient,) = torch.autograd.grad(out.sum(), locations, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"no second derivative; detrs\.ops\.deform_attn_reference has one"
    ):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    value, locations, weights = random_inputs(SHAPES, dtype=torch.float32)
    sizes = [size for shape in SHAPES for size in shape]
    grad_out = torch.randn(2, 5, 24).to(dtype)
    samples = (value.to(dtype), sizes, locations, weights)
    results = torch.library.opcheck(torch.ops.detrs.deform_attn_backward.default, (grad_out, *samples))
    assert set(results.values()) == {"SUCCESS"}
    for tensor in (samples[0], locations, weights):
        tensor.requires_grad_()
    results = torch.library.opcheck(torch.ops.detrs.deform_attn.default, samples)
    assert set(results.values()) == {"SUCCESS"}


def test_a_direct_call_cannot_read_out_of_bounds():
    value, locations, weights = random_inputs(SHAPES, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="shapes do not add up"):
        torch.ops.detrs.deform_attn(value, [5, 7, 3, 2, 1, 2], locations, weights)
    with pytest.raises(RuntimeError, match="disagree"):
        torch.ops.detrs.deform_attn(value, [5, 7, 3, 2, 1, 1], locations[:1], weights)
    with pytest.raises(RuntimeError, match="float64"):
        torch.ops.detrs.deform_attn(value, [5, 7, 3, 2, 1, 1], locations.double(), weights)


COMPILED = """
import torch
from detrs.ops import deform_attn
from sampling import assert_close_to_largest, random_inputs

class Scaled(torch.nn.Module):
    def forward(self, value, locations, weights):
        return 2 * deform_attn(value, ((5, 7), (3, 2)), locations, weights)

def results(module):
    leaves = [tensor.requires_grad_() for tensor in random_inputs(((5, 7), (3, 2)))]
    out = module(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]

eager = results(Scaled())
compiled = results(torch.compile(Scaled(), fullgraph=True, backend="aot_eager"))
assert all(torch.equal(one, other) for one, other in zip(eager, compiled, strict=True))
inputs = random_inputs(((5, 7), (3, 2)))
assert torch.equal(torch.export.export(Scaled(), inputs).module()(*inputs), eager[0])
print("same")
"""


def test_compiles_into_one_graph_and_exports():
    """Run in a fresh interpreter, without the run-time type checker of this test run."""
    result = run_python(COMPILED)
    assert result.stdout == "same\n", result.stderr


def test_autocast_changes_nothing():
    inputs = random_inputs(SHAPES, dtype=torch.float32)
    expected = deform_attn(inputs[0], SHAPES, *inputs[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(deform_attn(inputs[0], SHAPES, *inputs[1:]), expected)
        assert deform_attn(inputs[0].bfloat16(), SHAPES, *inputs[1:]).dtype == torch.bfloat16


PATH_ENTRY = "sys.path.append(folder)"
EDITABLE = """
class Finder:
    def find_spec(name, path, target=None):
        if name == "detrs":
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations.append(folder + "/detrs")
            return spec
sys.meta_path.append(Finder)
"""


@pytest.mark.parametrize(
    ("install", "change", "is_found"),
    [
        (PATH_ENTRY, None, True),
        (EDITABLE, None, True),
        (PATH_ENTRY, "csrc/library.cpp", False),
        (PATH_ENTRY, "csrc/cpu/new.h", False),
        (PATH_ENTRY, "csrc/library.cpp~", True),
    ],
    ids=["as it is", "editable", "changed", "with another header", "with a backup"],
)
def test_a_checkout_without_a_library_takes_an_installed_one_of_the_same_sources(
    tmp_path, install, change, is_found
):
    """As a job does, whose upload has no library, on nodes on which the package is installed."""
    root = Path(__file__).parents[3]
    leave_out = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(root / "models", tmp_path / "models", ignore=leave_out)
    shutil.copytree(root / "csrc", tmp_path / "csrc")
    installed = tmp_path / "site-packages" / "detrs" / "ops"
    installed.mkdir(parents=True)
    for name in ("_C.so", "_C.sources"):
        shutil.copy(root / "models" / "detrs" / "ops" / name, installed)
    if change is not None:
        with (tmp_path / change).open("a") as file:
            file.write("// changed\n")
    code = f"""
import sys, warnings
from importlib.machinery import ModuleSpec
warnings.simplefilter("ignore")
# Without the environment's own editable install
sys.meta_path[:] = [finder for finder in sys.meta_path if "_EditableFinder" not in str(finder)]
folder = {str(tmp_path / "site-packages")!r}
{install}
from detrs.ops import native_status
print(native_status().library, native_status().devices)
"""
    done = run_python(code, models=tmp_path / "models")
    if is_found:
        assert done.stdout.strip() == f"{installed / '_C.so'} {native_status().devices}", done.stderr
    else:
        assert done.stdout.strip() == f"{tmp_path / 'models/detrs/ops/_C.so'} ()", done.stderr
