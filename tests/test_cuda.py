"""The CUDA extension: what is inside, what it says without a driver, and a kernel of it, on devices
and on the emulator."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from xlstm_kernels import backends
from xlstm_kernels.backends import CUDA_EMULATOR, Backend, load_cuda
from xlstm_kernels.testing import check

needs_extension = pytest.mark.skipif(
    importlib.util.find_spec("xlstm_kernels._cuda") is None,
    reason="xlstm_kernels._cuda is not built: nvcc was not found",
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
has_device = torch.cuda.is_available()
needs_device = pytest.mark.skipif(not has_device, reason="needs a CUDA device")
ON_DEVICE = [pytest.mark.gpu, needs_device, needs_extension]
EMULATED = pytest.mark.skipif(
    CUDA_EMULATOR is None, reason="the emulator is built by `make emulated`"
)
EVERY_DEVICE = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=ON_DEVICE), pytest.param("cpu", marks=EMULATED)]
)


def scale_rows(x: torch.Tensor, scale: torch.Tensor) -> None:
    on_device = x.device.type == "cuda"
    load_cuda(emulated=not on_device).scale_rows(
        DTYPES.index(x.dtype),
        tuple(x.shape),
        x.data_ptr(),
        x.stride(0),
        scale.data_ptr(),
        torch.cuda.current_stream().cuda_stream if on_device else 0,
    )


@needs_extension
def test_says_what_is_inside() -> None:
    cuda = load_cuda()
    assert cuda.archs() and all(arch.rstrip("af").isdigit() for arch in cuda.archs())
    major, minor = cuda.runtime_version.split(".")
    assert int(major) >= 12 and minor.isdigit()


@needs_extension
@pytest.mark.skipif(has_device, reason="there is a CUDA device")
def test_without_a_device_a_call_raises_cudas_message() -> None:
    with pytest.raises(RuntimeError, match=r"^cudaGetDeviceCount: \w+"):
        load_cuda().devices()
    # Nobody reads the address: the launch fails first.
    with pytest.raises(RuntimeError, match=r"^scale_rows: \w+"):
        load_cuda().scale_rows(1, (2, 3), 0, 3, 0, 0)


@pytest.mark.medium
@needs_extension
def test_auto_goes_on_where_the_driver_is_too_old(monkeypatch) -> None:
    """For the runtime that is linked in, and not for torch's; torch.compile folds the choice."""
    why = "cudaGetDeviceCount: CUDA driver version is insufficient for CUDA runtime version"
    asked = []

    class Extension:
        def devices(self) -> None:
            asked.append(why)
            raise RuntimeError(why)

    backends._ask_cuda.cache_clear()
    monkeypatch.setattr(backends, "load_cuda", lambda *, emulated=False: Extension())
    device = torch.device("cuda")
    x, r = (SimpleNamespace(device=device, dtype=torch.float32, shape=(4,) * 5) for _ in range(2))
    recurrence = backends.OPS["recurrence"]
    try:
        assert recurrence.resolve("auto", x, r, "slstm") in (Backend.TRITON, Backend.REFERENCE)
        with pytest.raises(NotImplementedError, match=f"slstm: backend 'cuda' cannot .* {why}"):
            recurrence.resolve("cuda", x, r, "slstm", function="slstm")
        if backends.CUDA_EMULATOR is None:
            assert backends.available_backends()["slstm"]["cuda"] == why

        def refusal(_: torch.Tensor) -> bool:
            return backends.cuda_refuses("x", device) == why

        assert torch.compile(refusal, fullgraph=True, backend="eager")(torch.ones(1))
        assert len(asked) <= 2  # for the calls, and for the table
    finally:
        backends._ask_cuda.cache_clear()


@pytest.mark.gpu
@needs_device
@needs_extension
def test_devices_are_those_of_torch() -> None:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    assert [device["name"] for device in load_cuda().devices()] == names


@EVERY_DEVICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "V"),
    [
        *((0, 5), (1, 1), (3, 257), (65, 4099)),
        pytest.param(2, 600_000, marks=pytest.mark.slow),
    ],
)
def test_scale_rows(N: int, V: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(N * V)
    wide = torch.randn(N, V + 3, generator=generator).to(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.randn(N, generator=generator, dtype=compute)
    got = wide.to(device, copy=True)
    if device == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            scale_rows(got[:, :V], scale.cuda())
        stream.synchronize()
    else:
        scale_rows(got[:, :V], scale)
    exact = wide[:, :V].double() * scale.double()[:, None]
    plain = (wide[:, :V].to(compute) * scale[:, None]).to(dtype)
    check("x", got[:, :V].cpu(), exact, plain)
    assert torch.equal(got[:, V:].cpu(), wide[:, V:])
