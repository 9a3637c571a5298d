"""Inputs of the linear losses' tests, and the judgement of one call."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields

import torch
from kl_div_cases import DEVICES, short
from torch import Tensor

import xlstm_kernels as xk
from xlstm_kernels.ops.linear_kl_div.op import LINEAR_KL_DIV
from xlstm_kernels.testing import Results, check_results, lay_out

# All of them: conftest.py skips those that cannot run here, with the reason.
BACKENDS = [backend.value for backend in LINEAR_KL_DIV.table]
EVERYWHERE = ["reference", *BACKENDS]
FUNCTIONS = LINEAR_KL_DIV.functions
HEAD = ("hidden", "weight", "bias")


@dataclass(frozen=True)
class Case:
    """One call over (2, N) rows; `str` names it and seeds its inputs. weight_dtype None: `dtype`;
    teacher_V None: V; teacher_dtype None: those of the student."""

    backend: str = "cpu"
    function: str = "linear_kl_div"
    dtype: torch.dtype = torch.float32
    N: int = 9
    E: int = 20
    V: int = 300
    weight_dtype: torch.dtype | None = None
    teacher_E: int = 28
    teacher_V: int | None = None
    support: str = "tail"
    divergence: str = "forward"
    temperature: float = 1.0
    ce_weight: float = 0.0
    reduction: str = "mean"
    weighted: bool = False
    bias: bool = False
    chunk_rows: int | None = None
    layout: str = "contiguous"
    teacher_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        said = [self.backend, self.function, short(self.dtype), f"N{self.N}", f"E{self.E}"]
        said.append(f"V{self.V}")
        for field in fields(self)[6:]:
            value = getattr(self, field.name)
            if value != field.default:
                said.append(f"{field.name}={short(value)}")
        return "-".join(said)


def inputs(case: Case) -> dict[str, Tensor]:
    """What the case's function takes by name, and `dloss`. Logits have a spread of 3, and
    probabilities in common, as after some training."""
    g = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    N, E, V = case.N, case.E, case.V
    weight_dtype = case.weight_dtype or case.dtype
    found = {
        "hidden": lay_out(normal(2, N, 1, E).to(case.dtype), case.layout).flatten(2),
        "weight": (3 * normal(V, E) / E**0.5).to(weight_dtype),
    }
    if case.bias:
        found["bias"] = normal(V).to(weight_dtype)
    if case.function == "linear_kl_div":
        wide = case.teacher_V or V
        teacher_dtype = case.teacher_dtype or case.dtype
        found["teacher_hidden"] = normal(2, N, case.teacher_E).to(teacher_dtype)
        weight = 3 * normal(wide, case.teacher_E) / case.teacher_E**0.5
        found["teacher_weight"] = weight.to(case.teacher_dtype or weight_dtype)
        if case.bias:
            found["teacher_bias"] = normal(wide).to(weight_dtype)
    if case.function == "linear_topk_kl_div":
        logprobs = (3 * normal(2, N, V)).log_softmax(-1)
        found["topk_logprobs"], found["topk_ids"] = logprobs.topk(min(V, 8), sorted=False)
        if case.support == "tail":  # what was cut off a wider vocabulary, too
            mass = found["topk_logprobs"].exp().sum(-1)
            found["tail_logmass"] = (1.01 - mass).log()
    if case.ce_weight or case.function == "linear_cross_entropy":
        found["labels"] = torch.randint(0, V, (2, N), generator=g)
        found["labels"][:, ::4] = -100
    if case.weighted:
        found["row_weight"] = torch.rand(2, N, generator=g, dtype=torch.float64)
        found["row_weight"][0, -1:] = 0
    found["dloss"] = normal(2, N) if case.reduction == "none" else normal(1)[0]
    return found


def call(case: Case, tensors: Results, backend: str) -> Tensor:
    """The case's function on these tensors."""
    t = dict(tensors)
    how = {"chunk_rows": case.chunk_rows, "reduction": case.reduction, "backend": backend}
    how["row_weight"] = t.get("row_weight")
    if case.function == "linear_cross_entropy":
        return xk.linear_cross_entropy(
            t["hidden"], t["weight"], t["labels"], bias=t.get("bias"), **how
        )
    how |= {
        "divergence": case.divergence,
        "temperature": case.temperature,
        "ce_weight": case.ce_weight,
        "kl_weight": 0.7,
        "student_bias": t.get("bias"),
    }
    if case.function == "linear_topk_kl_div":
        names = ("hidden", "weight", "topk_logprobs", "topk_ids")
        how |= {"support": case.support, "tail_logmass": t.get("tail_logmass")}
        return xk.linear_topk_kl_div(*(t[name] for name in names), t.get("labels"), **how)
    return xk.linear_kl_div(
        *(t[name] for name in ("hidden", "weight", "teacher_hidden", "teacher_weight")),
        t.get("labels"),
        teacher_bias=t.get("teacher_bias"),
        **how,
    )


def run(case: Case, tensors: Results, backend: str, device: str = "") -> dict[str, Tensor]:
    """The loss, and the gradients by hidden, weight and bias, on the CPU."""
    device = device or DEVICES.get(backend, "cpu")
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    leaves = {name: tensors[name].detach().requires_grad_() for name in HEAD if name in tensors}
    loss = call(case, {**tensors, **leaves}, backend)
    grads = torch.autograd.grad(loss, tuple(leaves.values()), tensors["dloss"].to(loss.dtype))
    named = {f"d{name}": grad.cpu() for name, grad in zip(leaves, grads, strict=True)}
    return {"loss": loss.detach().cpu(), **named}


def check_case(case: Case, device: str = "") -> None:
    """The backend against the float64 reference, within what plain torch's error earns."""
    tensors = inputs(case)
    exactly = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    exact = run(case, exactly, "reference")
    got = run(case, tensors, case.backend, device)
    check_results(got, exact, iter([run(case, tensors, "reference")]))
