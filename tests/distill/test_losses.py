"""Each loss against plain torch in float64, and what a training step asks of them together."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hybrid_cases import families, hybrid, make_teacher, stages, stir, tokens, transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from distill.data.words import Likeliest, TopK
from distill.errors import DistillError
from distill.losses.module import LOSSES, DistillModule, LossSpec, register_loss
from distill.losses.taps import PLAIN_HEADS, Run
from distill.models import recurrent  # noqa: F401 - makes its type known
from xlstm_kernels.testing import relative_error

PROMPT = 5  # words of the first row that do not count


def models(vocab_size=60, hidden_size=32, layers=3):
    """A student and a teacher in float64, whose vocabulary, width and depth may be others."""
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": layers}
    student = copy.deepcopy(make_teacher()).double()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    return student, make_teacher(**sizes).double()


def batch(T=12):
    """Words, and labels whose prompt and padding do not count."""
    ids = tokens(T)
    labels = ids.clone()
    labels[0, :PROMPT] = -100
    labels[1, -2:] = -100
    return ids, labels


def log_softmaxes(student, teacher, ids, temperature=1.0):
    """Of the words that the student has, at the tokens that have a next one."""
    vocabulary = student.config.vocab_size
    return [
        (x(ids, use_cache=False).logits[:, :-1, :vocabulary] / temperature).log_softmax(-1)
        for x in (student, teacher)
    ]


def counted(values, labels):
    """The sum over the tokens whose next word counts."""
    return values[labels[:, 1:] != -100].sum()


def plain_ce(student, teacher, ids, labels):
    logits = student(ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def plain_kl(student, teacher, ids, labels):
    log_q, log_p = log_softmaxes(student, teacher, ids, temperature=2.0)
    return 4 * counted((log_p.exp() * (log_p - log_q)).sum(-1), labels)


def plain_topk_kl(student, teacher, ids, labels):
    log_q, log_p = log_softmaxes(student, teacher, ids)
    top, at = log_p.topk(8)
    rest_p, rest_q = (1 - x.exp().sum(-1) for x in (top, log_q.gather(-1, at)))
    inside = (top.exp() * (top - log_q.gather(-1, at))).sum(-1)
    return counted(inside + rest_p * (rest_p / rest_q).log(), labels)


def plain_logit_mse(student, teacher, ids, labels):
    pair = [x(ids, use_cache=False).logits[:, :-1] for x in (student, teacher)]
    width = min(x.shape[-1] for x in pair)
    return counted((pair[0][..., :width] - pair[1][..., :width]).square().mean(-1), labels)


def plain_layers(student, teacher, ids, labels, distance):
    """The first two of three layers, whose outputs transformers itself returns."""
    states = [
        x(ids, use_cache=False, output_hidden_states=True).hidden_states for x in (student, teacher)
    ]
    return sum(counted(distance(*(x[at][:, :-1] for x in states)), labels) for at in (1, 2))


def plain_hidden_mse(*given):
    return plain_layers(*given, lambda a, b: (a - b).square().mean(-1))


def plain_hidden_cosine(*given):
    return plain_layers(
        *given, lambda a, b: 1 - (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)
    )


def plain_embedding(student, teacher, ids, labels):
    pair = [x.get_input_embeddings().weight[ids[:, :-1]] for x in (student, teacher)]
    return counted((pair[0] - pair[1]).square().mean(-1), labels)


TWO_LAYERS = {"layers": [[0, 0], [-2, 1]]}
PLAIN = {
    "ce": (plain_ce, {}),
    "kl": (plain_kl, {"temperature": 2.0}),
    "topk_kl": (plain_topk_kl, {"k": 8}),
    "logit_mse": (plain_logit_mse, {}),
    "hidden_mse": (plain_hidden_mse, TWO_LAYERS),
    "hidden_cosine": (plain_hidden_cosine, TWO_LAYERS),
    "embedding": (plain_embedding, {}),
}


def gradients(loss, student):
    student.zero_grad()
    loss.backward()
    return [p.grad for p in student.parameters() if p.grad is not None]


def assert_same(got, want, student, tolerance=1e-6):
    assert relative_error(got, want) <= tolerance
    pairs = zip(gradients(got, student), gradients(want, student), strict=True)
    assert all(relative_error(a, b) <= tolerance for a, b in pairs)


@pytest.mark.parametrize("name", PLAIN)
def test_loss_against_plain_torch(name):
    """Prompt and padding do not count, and each token learns from the word after it."""
    student, teacher = models()
    ids, labels = batch()
    plain, args = PLAIN[name]
    module = DistillModule(student, teacher, [LossSpec(name, args=args)])
    total, count = module(ids, labels)[name]
    pairs = len(args.get("layers", "1"))
    assert count.item() == pairs * ((12 - PROMPT) + (12 - 3))
    # A cache's words, and so those of a teacher, are float32.
    assert_same(total, plain(student, teacher, ids, labels), student, 1e-5)


@pytest.mark.parametrize("theirs", [64, 56])
@pytest.mark.parametrize("name", ["kl", "topk_kl", "logit_mse"])
def test_vocabularies_of_other_sizes(name, theirs):
    """Words that one of both lacks have no mass there; those of both decide."""
    student, teacher = models(vocab_size=theirs)
    ids = tokens(12) % 56
    if theirs > 60:
        plain, args = PLAIN[name]
        module = DistillModule(student, teacher, [LossSpec(name, args=args)])
        assert_same(module(ids, ids)[name][0], plain(student, teacher, ids, ids), student, 1e-5)
    else:
        module = DistillModule(student, teacher, [LossSpec(name)])
        total, _ = module(ids, ids)[name]
        assert total.isfinite() and all(x.isfinite().all() for x in gradients(total, student))


def test_cached_words_are_those_of_the_teacher():
    student, teacher = models(vocab_size=64)
    ids, labels = batch()
    spec = LossSpec("topk_kl", args={"k": 64})
    online, _ = DistillModule(student, teacher, [spec])(ids, labels)["topk_kl"]
    words = stages.topk_targets(teacher, ids, k=64)
    offline = DistillModule(student, None, [spec])
    for given in (words, TopK(*(x.flatten(0, 1) for x in words))):
        got, _ = offline(ids, labels, words=given)["topk_kl"]
        assert relative_error(got, online) <= 1e-5
    with pytest.raises(DistillError, match="words must be given"):
        offline(ids, labels)
    with pytest.raises(DistillError, match="words must be of 24 tokens, got 3"):
        offline(ids, labels, words=Likeliest(8).words(torch.randn(3, 60)))
    with pytest.raises(DistillError, match="words must have float32 log-probabilities"):
        offline(ids, labels, words=words._replace(logprobs=words.logprobs.bfloat16()))


@pytest.mark.parametrize("name", ["kl", "topk_kl"])
@pytest.mark.parametrize("logits", [False, True])
def test_one_pass_is_both_losses(name, logits):
    student, teacher = models()
    ids, labels = batch()
    specs = [
        LossSpec("ce", args={"label_smoothing": 0.1}),
        LossSpec(name, args={"temperature": 2.0}),
    ]
    specs += [LossSpec("logit_mse")] if logits else []
    module = DistillModule(student, teacher, specs)
    weights = {"ce": 0.9, name: 0.1, "logit_mse": 0.01}
    apart, together = module(ids, labels), module(ids, labels, weights=weights)
    for key in apart:
        assert relative_error(together[key][0], apart[key][0]) <= 1e-6
    totals = [sum(weights[k] * x for k, (x, _) in found.items()) for found in (together, apart)]
    assert_same(*totals, student)


@families
def test_hybrid_students_of_all_families(family):
    """Tied heads among them, whose gradient has two parts."""
    teacher = make_teacher(family).double()
    student = stir(hybrid.hybridize(teacher, window=4, copy_weights=True)).double()
    ids, labels = batch()
    module = DistillModule(student, teacher, [LossSpec("ce"), LossSpec("kl", 2.0)])
    found = module(ids, labels, weights={"ce": 1.0, "kl": 2.0})
    log_q, log_p = log_softmaxes(student, teacher, ids)
    kl = counted((log_p.exp() * (log_p - log_q)).sum(-1), labels)
    want = plain_ce(student, teacher, ids, labels) + 2 * kl
    assert_same(found["ce"][0] + 2 * found["kl"][0], want, student)


def test_widths_are_projected_and_not_exported(tmp_path):
    student, teacher = models(hidden_size=48, layers=6)
    names = ["hidden_mse", "hidden_cosine", "embedding"]
    module = DistillModule(student, teacher, [LossSpec(name) for name in names])
    assert [len(module.projections[name]) for name in names] == [3, 3, 1]
    again = DistillModule(student, teacher, [LossSpec(name) for name in names])
    for a, b in zip(module.projections.parameters(), again.projections.parameters(), strict=True):
        assert torch.equal(a, b) and a.shape == (48, 32)
    found = module(*batch())
    sum(x for x, _ in found.values()).backward()
    assert all(p.grad.norm() > 0 for p in module.projections.parameters())
    theirs = {id(p) for p in teacher.parameters()}
    assert not any(id(p) in theirs for p in module.parameters())
    student.save_pretrained(tmp_path)
    assert not any("projection" in name for name in student.state_dict())


def test_packed_documents_are_apart():
    """The first word of a document is nobody's next one, and no layer looks across."""
    student, teacher = models()
    ids = tokens(20, B=1)
    names = ["ce", "kl", "hidden_mse"]
    module = DistillModule(student, teacher, [LossSpec(name) for name in names])
    cu_seqlens = torch.tensor([0, 8, 20], dtype=torch.int32)
    packed = module(ids, ids, cu_seqlens=cu_seqlens)
    apart = [module(part, part) for part in ids.split([8, 12], dim=1)]
    for name in names:
        total, count = (sum(x[name][at] for x in apart) for at in (0, 1))
        assert relative_error(packed[name][0], total) <= 1e-5
        assert packed[name][1] == count
    assert packed["ce"][1] == 18


def test_mixers_are_aligned_in_the_same_module():
    student = stir(hybrid.hybridize(make_teacher(), window=6))
    ids, labels = batch(20)
    module = DistillModule(student, None, [LossSpec("mixer_mse", args={"tokens": "all"})])
    total, count = module(ids, labels)["mixer_mse"]
    want, number = stages.align_loss(student, ids)
    assert count == number == 40 and relative_error(total, want) <= 1e-6
    nothing = torch.full_like(labels, -100)
    relative = DistillModule(student, None, [LossSpec("mixer_mse", args={"relative": True})])
    assert relative(ids, nothing)["mixer_mse"] == (0, 0)
    total.backward()
    with_grad = {name for name, p in student.named_parameters() if p.grad is not None}
    assert with_grad == hybrid.new_parameters(student).keys()


@pytest.mark.parametrize("reentrant", [False, True])
def test_taps_fire_once_under_checkpointing(reentrant):
    student, teacher = models()
    ids, labels = batch()
    names = ["ce", "hidden_mse"]
    module = DistillModule(student.train(), teacher, [LossSpec(name) for name in names])

    def both():
        return sum(x for x, _ in module(ids, labels).values())

    want = both()
    hooks = [len(layer._forward_hooks) for layer in student.model.layers]
    student.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(both(), want, student)
    assert hooks == [len(layer._forward_hooks) for layer in student.model.layers] == [0, 0, 0]


def test_modules_that_cannot_be():
    student, teacher = models()
    with pytest.raises(DistillError, match="loss kl: needs a teacher"):
        DistillModule(student, None, [LossSpec("kl")])
    with pytest.raises(DistillError, match="loss mixer_mse: needs a student of `hybridize`"):
        DistillModule(student, None, [LossSpec("mixer_mse")])
    with pytest.raises(DistillError, match="each must be named once"):
        DistillModule(student, teacher, [LossSpec("ce"), LossSpec("ce")])
    with pytest.raises(DistillError, match="must not train weights that are the teacher's"):
        DistillModule(teacher, teacher, [LossSpec("kl")])(*batch())
    with pytest.raises(DistillError, match="tokens must be 'labelled' or 'all'"):
        spec = LossSpec("hidden_mse", args={"tokens": "some"})
        DistillModule(student, teacher, [spec])(*batch())
    for name, option in (("kl", {"temperature": "hot"}), ("topk_kl", {"support": "all"})):
        with pytest.raises(DistillError, match=f"loss {name}: .*{next(iter(option))} must be"):
            DistillModule(student, teacher, [LossSpec(name, args=option)])(*batch())
    with pytest.raises(DistillError, match="name must be a new identifier"):
        register_loss("kl")
    with pytest.raises(DistillError, match="needs must be of"):
        register_loss("mine", needs=("luck",))


def test_a_registered_loss():
    @register_loss("length", needs=("logits",))
    def length(ctx, *, power=1.0):
        return ctx.student.logits_NV.square().sum() ** power, ctx.count

    try:
        student, _ = models()
        module = DistillModule(student, None, [LossSpec("length", args={"power": 0.5})])
        total, _ = module(*batch())["length"]
        assert relative_error(total, student(batch()[0]).logits.norm()) <= 1e-6
    finally:
        del LOSSES["length"]


HEADS = {"intermediate_size": 48, "num_key_value_heads": 2}
SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def of_type(model_type, **changes):
    config = transformers.CONFIG_MAPPING[model_type](**SMALL | changes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval().double()


@pytest.mark.parametrize("model_type", sorted(PLAIN_HEADS))
def test_logits_of_plain_heads_are_those_of_the_model(model_type):
    sizes = {"gpt2": {}, "ministral": HEADS | {"head_dim": 12}}.get(model_type, HEADS)
    student, ids = of_type(model_type, **sizes), tokens(12)
    run = Run(student, ids, {})
    assert run.is_linear
    with torch.no_grad():
        want = student(ids).logits.flatten(0, 1)
        assert relative_error(run.logits_NV, want) <= 1e-6


def test_other_models_give_their_own_logits():
    """Granite divides its logits: what starts from the head would not see it."""
    student, teacher = of_type("granite", logits_scaling=3.0, **HEADS), make_teacher().double()
    ids, labels = batch()
    module = DistillModule(student, teacher, [LossSpec("ce"), LossSpec("kl"), LossSpec("topk_kl")])
    found = module(ids, labels, weights={"ce": 0.5, "kl": 0.5})
    assert relative_error(found["ce"][0], plain_ce(student, teacher, ids, labels)) <= 1e-6
    assert found["topk_kl"][0].isfinite()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_losses_under_autocast(dtype):
    student, teacher = (model.float() for model in models(hidden_size=48))
    student = stir(hybrid.hybridize(student, window=4, copy_weights=True))
    ids, labels = batch()
    names = [*PLAIN, "attention", "mixer_mse"]
    module = DistillModule(student, teacher, [LossSpec(name) for name in names])
    weights = dict.fromkeys(names, 1.0)
    want = module(ids, labels, weights=weights)
    with torch.autocast("cpu", dtype):
        got = module(ids, labels, weights=weights)
    for name in names:
        assert got[name][0].dtype == torch.float32
        assert relative_error(got[name][0], want[name][0]) <= 0.1, name
    sum(total for total, _ in got.values()).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("logits", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "weights", [dict.fromkeys(LOSSES, 1.0), pytest.param(None, marks=pytest.mark.slow)]
)
def test_no_loss_reads_from_the_device(logits, weights):
    """A tensor without values refuses to be read, as a GPU would be waited for."""
    student = stir(hybrid.hybridize(make_teacher(), window=4, copy_weights=True))
    specs = [LossSpec(name) for name in LOSSES if logits or name != "logit_mse"]
    module = DistillModule(student, make_teacher(hidden_size=48), specs)
    ids, labels = batch()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = module(mode.from_tensor(ids), mode.from_tensor(labels), weights=weights)
    assert all(isinstance(x, FakeTensor) for pair in found.values() for x in pair)


def test_a_pass_without_gradients_leaves_those_of_the_next():
    """Autocast keeps what it has cast: weights cast without gradients would have none after."""
    student = stir(hybrid.hybridize(make_teacher(), window=4, copy_weights=True))
    ids, labels = batch()
    module = DistillModule(student, None, [LossSpec("mixer_mse"), LossSpec("ce")])
    with torch.autocast("cpu", torch.bfloat16):
        module(ids, labels)["ce"][0].backward()
    assert all(p.grad.norm() > 0 for p in student.parameters())
