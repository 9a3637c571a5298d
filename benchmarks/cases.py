"""Every case, once. To measure another shape, add it here; the rest iterates this list."""

from __future__ import annotations

import torch

from . import attention, kl_div, linear_kl_div, mlstm, models, recurrence
from .problem import FORWARD, FORWARD_BACKWARD, Case

OPS = (
    "mlstm", "mlstm_step", "slstm", "lstm", "kl_div", "topk_kl_div", "linear_kl_div",
    "linear_topk_kl_div", "linear_cross_entropy", "sliding_window_attention", "replace",
)  # fmt: skip

# (B, T, H, K, V)
MEMORIES = ((1, 1024, 4, 128, 256), (1, 8192, 4, 128, 256))
# (B, T, H, K, V)
TOKENS = ((1, 1, 8, 256, 512), (8, 1, 8, 256, 512))
DRAFTS = ((8, 8, 8, 256, 512),)
# (B, T, H, D)
SEQUENCES = ((8, 512, 4, 64), (16, 256, 8, 64), (32, 128, 4, 256))
LAYERS = ((8, 512, 1, 256),)
# (H, D)
STEPS = ((4, 64), (4, 128))
# (N, V)
LOGITS = ((1024, 32000), (512, 128256))
# (N, V, K)
WORDS = ((1024, 32000, 256),)
# (N, E, V)
HEADS = ((1024, 1024, 32000),)

# (B, T, H, D, window)
WINDOWS = ((1, 4096, 8, 64, 512),)

# (B, T, D)
LOOPS = ((8, 512, 128),)
TORCH_LAYERS = ((1, 512, 256), (8, 512, 256))
# (B, T, width, heads)
BLOCKS = ((8, 512, 256, 4),)
# (T, layers, hidden size, heads)
PROMPTS = ((1, 4, 512, 4), (513, 4, 512, 4))
TRAINED = ((512, 4, 512, 4),)

QUICK_MEMORIES = ((2, 64, 2, 16, 24),)
QUICK_TOKENS = ((2, 1, 2, 16, 24),)
QUICK_DRAFTS = ((2, 4, 2, 16, 24),)
QUICK_SEQUENCES = ((2, 8, 2, 16),)
QUICK_LAYERS = ((2, 8, 1, 16),)
QUICK_STEPS = ((2, 16),)
QUICK_LOGITS = ((16, 500),)
QUICK_WORDS = ((16, 500, 20),)
QUICK_HEADS = ((16, 24, 500),)
QUICK_WINDOWS = ((2, 300, 2, 16, 64),)
QUICK_LOOPS = ((2, 9, 16),)
QUICK_TORCH_LAYERS = ((2, 9, 16),)
QUICK_BLOCKS = ((2, 9, 32, 2),)
QUICK_PROMPTS = ((1, 1, 128, 2),)
QUICK_TRAINED = ((64, 1, 128, 2),)


def cases(quick: bool = False) -> list[Case]:
    """All cases in the order of the tables; `quick` has the same kinds on tiny shapes."""
    sequences = QUICK_SEQUENCES if quick else SEQUENCES
    layers = QUICK_LAYERS if quick else LAYERS
    found: list[Case] = []
    for memory in QUICK_MEMORIES if quick else MEMORIES:
        for dtype in (torch.float32, torch.bfloat16):
            found += [mlstm.sequence(memory, dtype, d) for d in (FORWARD, FORWARD_BACKWARD)]
    tokens, drafts = (QUICK_TOKENS, QUICK_DRAFTS) if quick else (TOKENS, DRAFTS)
    found += [mlstm.step(*token) for token in (*tokens, *drafts)]
    found += [mlstm.step(*token, torch.bfloat16) for token in tokens[-1:]]
    for op in ("slstm", "lstm"):
        for shape in sequences:
            found += [recurrence.sequence(op, shape, d) for d in (FORWARD, FORWARD_BACKWARD)]
        if op == "lstm":
            for shape in layers:
                found += [recurrence.layer(shape, d) for d in (FORWARD, FORWARD_BACKWARD)]
        found += [recurrence.step(op, H, D) for H, D in (QUICK_STEPS if quick else STEPS)]
    for N, V in QUICK_LOGITS if quick else LOGITS:
        found += [kl_div.loss_and_gradient(N, V, d) for d in (torch.float32, torch.bfloat16)]
    N, V = (QUICK_LOGITS if quick else LOGITS)[0]
    for dtype in (torch.float32, torch.bfloat16):
        found += [kl_div.loss_and_gradient(N, V, dtype, name) for name in ("js", "tv")]
        for words in QUICK_WORDS if quick else WORDS:
            found.append(kl_div.topk_loss_and_gradient(*words, dtype))
    for op in linear_kl_div.TARGETS:
        for head in QUICK_HEADS if quick else HEADS:
            for dtype in (torch.float32, torch.bfloat16):
                found.append(linear_kl_div.loss_and_gradients(op, *head, dtype))
    for window in QUICK_WINDOWS if quick else WINDOWS:
        for dtype in (torch.float32, torch.bfloat16):
            found += [attention.sequence(window, dtype, d) for d in (FORWARD, FORWARD_BACKWARD)]
    for loop in QUICK_LOOPS if quick else LOOPS:
        found += [models.python_loop(loop, d) for d in (FORWARD, FORWARD_BACKWARD)]
    for layer in QUICK_TORCH_LAYERS if quick else TORCH_LAYERS:
        found += [models.torch_lstm(layer, d) for d in (FORWARD, FORWARD_BACKWARD)]
    if models.has("xlstm"):
        blocks = QUICK_BLOCKS if quick else BLOCKS
        found += [models.slstm_block(block, FORWARD_BACKWARD) for block in blocks]
    if models.has("transformers"):
        prompts, trained = (QUICK_PROMPTS, QUICK_TRAINED) if quick else (PROMPTS, TRAINED)
        found += [models.hugging_face(prompt, FORWARD) for prompt in prompts]
        found += [models.hugging_face(step, FORWARD_BACKWARD) for step in trained]
    return found


def select(ops: list[str], substring: str = "", quick: bool = False) -> list[Case]:
    """The cases of `ops` (all when empty) whose id contains `substring`."""
    return [case for case in cases(quick) if (not ops or case.op in ops) and substring in case.id]
