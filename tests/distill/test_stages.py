"""Stage I and stage II: their losses against plain torch, whom they train, and that they do."""

import pytest
import torch
from hybrid_cases import families, hybrid, make_teacher, stages, stir, tokens
from ranks import run_on_ranks

from distill.errors import DistillError
from xlstm_kernels.testing import relative_error


def attention_outputs(model, ids, **inputs):
    """What each layer's output projection gets."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for name, module in model.named_modules()
        if name.endswith(("self_attn.o_proj", "attn.c_proj"))
    ]
    model(ids, use_cache=False, **inputs)
    for hook in hooks:
        hook.remove()
    return seen


def first_layer(family, **options):
    teacher = make_teacher(family)
    return teacher, stir(hybrid.hybridize(teacher, window=6, layers=[0], **options))


@families
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_align_loss_of_one_layer(family, implementation):
    teacher, student = first_layer(family)
    for model in (teacher, student):
        model.set_attn_implementation(implementation)
    ids = tokens(20)
    with torch.no_grad():
        want = attention_outputs(teacher, ids)[0]
        error = (attention_outputs(student, ids)[0] - want).square().sum()
    total, count = stages.align_loss(student.train(), ids)
    assert student.training
    assert count == 40
    assert relative_error(total, error) <= 1e-4
    relative, _ = stages.align_loss(student, ids, relative=True)
    assert relative_error(relative / count, error / want.square().sum()) <= 1e-4


@torch.no_grad()
def test_later_layers_are_aligned_on_the_teachers_activations():
    teacher, ids = make_teacher(), tokens(20)
    together, _ = stages.align_loss(hybrid.hybridize(teacher, window=6), ids)
    apart = [
        stages.align_loss(hybrid.hybridize(teacher, window=6, layers=[layer]), ids)[0]
        for layer in range(3)
    ]
    assert relative_error(together, sum(apart)) <= 1e-5


@torch.no_grad()
def test_align_loss_of_packed_documents():
    _, student = first_layer("llama")
    ids, cu_seqlens = tokens(20, B=1), torch.tensor([0, 8, 20], dtype=torch.int32)
    packed, _ = stages.align_loss(student, ids, cu_seq_lens_q=cu_seqlens)
    apart = [stages.align_loss(student, part)[0] for part in ids.split([8, 12], dim=1)]
    assert relative_error(packed, sum(apart)) <= 1e-4


@pytest.mark.parametrize("grouped_heads", ["repeat", "share"])
def test_stage_one_trains_the_mixers_alone(grouped_heads):
    student = hybrid.hybridize(make_teacher(), window=6, grouped_heads=grouped_heads)
    new = hybrid.new_parameters(student)
    optimizer = torch.optim.AdamW(new.values(), lr=1e-2)
    losses = []
    for _ in range(30):
        total, count = stages.align_loss(student, tokens(20))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.8 * losses[0]
    with_grad = {name for name, p in student.named_parameters() if p.grad is not None}
    assert with_grad == new.keys()


@pytest.mark.parametrize("grouped_heads", ["repeat", "share"])
@families
@torch.no_grad()
def test_calibrated_gates(family, grouped_heads):
    """Against the attention weights that transformers itself returns."""
    teacher, ids = make_teacher(family), tokens(20)
    teacher.set_attn_implementation("eager")
    student = hybrid.hybridize(teacher, window=6, sinks=2, grouped_heads=grouped_heads)
    stages.calibrate_gates(student, ids)
    mixers = [m for m in student.modules() if isinstance(m, hybrid.HybridMixer)]
    attentions = teacher(ids, output_attentions=True, use_cache=False).attentions
    for mixer, weights in zip(mixers, attentions, strict=True):
        for head, rows in enumerate(weights.double().transpose(0, 1)):
            unseen = [rows[:, t, 2 : t - 5].sum(-1) for t in range(8, 20)]
            share = torch.stack(unseen).mean().clamp_min(0.01)
            assert relative_error(mixer.output_bias[head].sigmoid(), share) <= 1e-4
        for state, rows in enumerate(weights.double().transpose(0, 1).chunk(mixer.states)):
            far = [(rows[..., t, 2 : t + 1] * range_down(t - 2)).sum() for t in range(2, 20)]
            distance = sum(far) / rows[..., 2:].sum()
            forget = mixer.gates.bias[mixer.states + state].double().sigmoid()
            assert relative_error(forget**distance, torch.tensor(0.5)) <= 1e-4


def range_down(first):
    return torch.arange(first, -1, -1)


def test_calls_that_cannot_be():
    with pytest.raises(DistillError, match="align_loss: student must have mixers"):
        stages.align_loss(make_teacher(), tokens(9))
    with pytest.raises(DistillError, match=r"calibrate_gates: .*longer than .*6 \+ 2, got T = 8"):
        stages.calibrate_gates(hybrid.hybridize(make_teacher(), window=6, sinks=2), tokens(8))


def test_sparse_loss_of_all_words_is_the_dense_one():
    """With k the vocabulary, top-k KL is KL."""
    teacher = make_teacher()
    student = stir(hybrid.hybridize(teacher, window=3, copy_weights=True))
    ids, labels = tokens(20), tokens(20).clone()
    labels[0, :5] = -100
    words = stages.topk_targets(teacher, ids, k=1000)
    total, count = stages.sparse_loss(student, ids, words, labels, temperature=1.0)
    total.backward()
    got = [p.grad for p in student.parameters()]
    student.zero_grad()
    logits, targets = student(ids, use_cache=False).logits[:, :-1], labels[:, 1:]
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    log_p = teacher(ids).logits[:, :-1].log_softmax(-1).detach()
    kl = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)
    want = 0.9 * ce + 0.1 * kl[targets != -100].sum()
    want.backward()
    assert count == 2 * 19 - 4
    assert relative_error(total, want) <= 1e-5
    grads = [p.grad for p in student.parameters()]
    assert all(relative_error(a, b) <= 1e-3 for a, b in zip(got, grads, strict=True))


def test_sparse_loss_of_packed_documents():
    teacher, ids = make_teacher(), tokens(20, B=1)
    student = hybrid.hybridize(teacher, window=3)
    words = stages.topk_targets(teacher, ids, k=8)
    packed = {"cu_seq_lens_q": torch.tensor([0, 8, 20], dtype=torch.int32)}
    _, count = stages.sparse_loss(student, ids, words, **packed)
    assert count == 18


def test_stage_two_trains_everything():
    teacher = make_teacher()
    student = hybrid.hybridize(teacher, window=3, copy_weights=True).train()
    ids = tokens(20)
    words = stages.topk_targets(teacher, ids, k=8)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        total, count = stages.sparse_loss(student, ids, words)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in student.parameters())


class BothLosses(torch.nn.Module):
    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, ids, words):
        error, tokens_seen = stages.align_loss(self.student, ids)
        total, words_seen = stages.sparse_loss(self.student, ids, words)
        return error + total, tokens_seen + words_seen


def gradients(rank, ranks):
    """Of both losses over four rows, which ranks share; wrapped as a whole, so that DDP sees it."""
    teacher = make_teacher()
    student = stir(hybrid.hybridize(teacher, window=3, copy_weights=True))
    ids = tokens(12, B=4)[rank::ranks]
    losses = BothLosses(student)
    if ranks > 1:
        losses = torch.nn.parallel.DistributedDataParallel(losses)
    total, count = losses(ids, stages.topk_targets(teacher, ids, k=8))
    # Ranks have equal counts, so the mean over ranks that DDP takes is the mean over all rows.
    (total / count).backward()
    return {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.slow
def test_two_ranks_are_one():
    want = gradients(0, 1)
    for got in run_on_ranks(2, gradients, 2):
        assert got.keys() == want.keys()
        assert all(relative_error(got[name], grad) <= 1e-5 for name, grad in want.items())
