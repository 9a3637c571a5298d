"""A whole run from the command line: what it leaves, and what it says when it cannot."""

import fcntl
import json
import random
import signal
import time

import pytest
import torch
from run_cases import (
    RECIPE,
    StopAt,
    assert_same,
    do,
    make_recipe,
    quiet_run,
    tool,
    transformers,
    weights,
    write_teacher,
)

import distill
from distill.__main__ import main
from distill.data.capture import load_model
from distill.errors import DistillError, Interrupted
from distill.training.parallel import make_accelerator
from distill.training.recipe import LogConfig, LoopConfig, Recipe, presets
from xlstm_kernels.testing import relative_error

psutil = pytest.importorskip("psutil", reason="psutil is not installed: the extra `distill`")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def command(capsys, tmp_path, teacher, corpus, *more):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    given = [tmp_path / "recipe.yaml", f"teacher.path={teacher}", f"data.corpus={corpus}"]
    status = main([str(x) for x in ("run", *given, "--run-dir", tmp_path / "run", *more)])
    return status, *capsys.readouterr()


def metrics(run):
    """Lines of training, and of held-out files."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "losses" in x], [x for x in lines if "heldout" in x]


@pytest.mark.parametrize("family", ["Llama", pytest.param("Qwen2", marks=pytest.mark.slow)])
def test_a_run_leaves_a_student(capsys, tmp_path, corpus_dir, family):
    teacher = write_teacher(tmp_path / "teacher", family)
    status, out, err = command(capsys, tmp_path, teacher, corpus_dir)
    assert status == 0, err
    assert "distill  5/5  loss" in out and "topk_kl" in out
    run = tmp_path / "run"
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "student")
    student = load_model(run / "student")
    ids = torch.tensor([tokenizer("def ")["input_ids"]])
    assert student.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 8)
    steps, heldout = metrics(run)
    assert [(x["stage"], x["step"]) for x in steps[2:4]] == [("align", 3), ("distill", 1)]
    assert steps[-1]["losses"].keys() == {"ce", "topk_kl"}
    assert steps[-1]["losses"]["ce"] < steps[3]["losses"]["ce"]
    assert [(x["stage"], x["step"]) for x in heldout] == [
        *(("align", 0), ("align", 3)),
        *(("distill", 0), ("distill", 3), ("distill", 5)),
    ]
    first, last = heldout[0]["heldout"], heldout[-1]["heldout"]
    assert last["bits_per_byte"] < first["bits_per_byte"] and 0 <= last["agreement"] <= 1
    kept = sorted(x.name for x in (run / "checkpoints" / "distill").iterdir())
    assert kept == ["step-00000004", "step-00000005", "student"]


@pytest.mark.medium
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, teacher, corpus_dir):
    steps = ("stages.0.steps=2", "stages.1.steps=3", "loop.heldout_every=2")
    recipe = make_recipe(tmp_path, teacher, corpus_dir, *steps)
    do(recipe, tmp_path / "whole")
    for looks in (1, 2):
        with pytest.raises(Interrupted):
            do(recipe, tmp_path / "run", resume=True, interrupt=StopAt(looks))
    do(recipe, tmp_path / "run", resume=True)
    assert_same(weights(tmp_path / "run/student"), weights(tmp_path / "whole/student"))
    (steps, heldout), (want, want_heldout) = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    assert heldout == want_heldout
    assert [x["losses"] for x in steps] == [x["losses"] for x in want]


def test_dry_run_writes_nothing(capsys, tmp_path, teacher, corpus_dir):
    status, out, err = command(capsys, tmp_path, teacher, corpus_dir, "--dry-run")
    assert status == 0, err
    for part in ("align: 3 steps of 192 tokens", "frozen", "memory", "nats a word"):
        assert part in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["hybridize", "compress"])
def test_a_student_begins_with_the_weights_as_they_are_stored(tmp_path, teacher, corpus_dir, kind):
    """A teacher that runs in 16 bits is rounded, its student is not."""
    changes = ["teacher.dtype=bfloat16", f"student.kind={kind}", "student.options={}"]
    recipe = make_recipe(tmp_path, teacher, corpus_dir, *changes)
    shared = quiet_run(recipe, tmp_path / "run")
    assert shared.teacher.dtype == torch.bfloat16
    stored = dict(load_model(teacher, torch.float32).named_parameters())
    found = dict(shared.first_student().named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in stored.items())


def test_a_run_is_not_written_over(capsys, tmp_path, teacher, corpus_dir):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    status, _, err = command(capsys, tmp_path, teacher, corpus_dir)
    assert status == 1 and "holds a run; pass --resume" in err


@pytest.mark.medium
def test_a_finished_stage_of_other_settings_is_refused(capsys, tmp_path, teacher, corpus_dir):
    assert command(capsys, tmp_path, teacher, corpus_dir, "--resume")[0] == 0
    status, _, err = command(capsys, tmp_path, teacher, corpus_dir, "--resume", "stages.0.lr=0.5")
    assert status == 1 and "is of other settings (stages.align.lr 0.01 there, 0.5 here)" in err


@pytest.mark.medium
def test_a_teacher_of_other_weights_is_refused(tmp_path, corpus_dir):
    teacher = write_teacher(tmp_path / "teacher")
    recipe = make_recipe(tmp_path, teacher, corpus_dir, "stages.0.steps=1", "stages.1.steps=1")
    distill.run(recipe, str(tmp_path / "run"))
    model = load_model(teacher)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    model.save_pretrained(teacher)
    with pytest.raises(DistillError, match=r"is of other settings \(teacher.weights .* there"):
        distill.run(recipe, str(tmp_path / "run"), resume=True)


def test_what_no_command_can_do_is_one_line(capsys, tmp_path, teacher, corpus_dir):
    for change, why in (
        ("log.trackers=[nothing]", "log.trackers must be of those installed"),
        ("data.heldout_fraction=0.99", "must leave one of"),
    ):
        status, _, err = command(capsys, tmp_path, teacher, corpus_dir, change)
        assert status == 1 and why in err and err.count("\n") == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_one_process_computes_in_the_recipe_s_precision(tmp_path, parallel):
    for precision, want in (("bfloat16", "bf16"), ("float32", "no")):
        loop = LoopConfig(precision=precision, parallel=parallel)
        accelerator = make_accelerator(loop, LogConfig(trackers=[]), tmp_path)
        assert accelerator.mixed_precision == want


def kill_after(process, run, lines):
    """kill -9 of the command and its ranks once it has logged so many lines more."""
    path = run / "metrics.jsonl"

    def written():
        return path.read_text().count("\n") if path.exists() else 0

    begun = written()
    while process.poll() is None and written() < begun + lines:
        time.sleep(0.005)
    if process.poll() is None:
        # Ranks are in sessions of their own, and outlive the launcher.
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
    return process.communicate()[1]


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, teacher, corpus_dir):
    steps = ["stages.0.steps=40", "stages.1.steps=40", "loop.checkpoint_every=3"]
    do(make_recipe(tmp_path, teacher, corpus_dir, *steps), tmp_path / "whole")
    given = [f"teacher.path={teacher}", f"data.corpus={corpus_dir}", *steps, "--resume"]
    run, draw = tmp_path / "run", random.Random(0)
    for lines in [*(draw.randrange(2, 40) for _ in range(3)), 10_000]:
        process = tool(tmp_path, *given, "--run-dir", run)
        err = kill_after(process, run, lines)
        assert process.returncode == (0 if lines == 10_000 else -signal.SIGKILL), err
    assert_same(weights(run / "student"), weights(tmp_path / "whole/student"))
    (steps, heldout), (want, want_heldout) = metrics(run), metrics(tmp_path / "whole")
    assert heldout == want_heldout
    assert [x["losses"] for x in steps] == [x["losses"] for x in want]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_train_what_one_does(tmp_path, teacher, corpus_dir, parallel):
    changes = ["stages.1.steps=80", "loop.checkpoint_every=4", "data.boundaries=true"]
    do(make_recipe(tmp_path, teacher, corpus_dir, *changes), tmp_path / "whole")
    given = [f"teacher.path={teacher}", f"data.corpus={corpus_dir}", *changes, "--resume"]
    run = tmp_path / "run"
    given.append(f"loop.parallel={parallel}")
    for ranks, lines in ((2, 10), (1, 8), (2, 10_000)):
        process = tool(tmp_path, *given, "--run-dir", run, ranks=ranks)
        err = kill_after(process, run, lines)
        assert process.returncode == (0 if lines == 10_000 else -signal.SIGKILL), err
    got, want = weights(run / "student"), weights(tmp_path / "whole/student")
    assert got.keys() == want.keys()
    # Sums over ranks round otherwise, and Adam makes steps of what is almost nothing.
    assert max(float(relative_error(got[name], x)) for name, x in want.items()) <= 1e-2
    (steps, heldout), (expected, expected_heldout) = metrics(run), metrics(tmp_path / "whole")
    assert [x["step"] for x in steps] == [x["step"] for x in expected]
    for a, b in zip(steps, expected, strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-3, abs=1e-4)
    for a, b in zip(heldout, expected_heldout, strict=True):
        assert a["heldout"]["bits_per_byte"] == pytest.approx(b["heldout"]["bits_per_byte"], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_go_on_bit_for_bit(tmp_path, teacher, corpus_dir, parallel):
    make_recipe(tmp_path, teacher, corpus_dir)
    given = [f"teacher.path={teacher}", f"data.corpus={corpus_dir}", f"loop.parallel={parallel}"]
    given += ["stages.1.steps=15", "loop.checkpoint_every=4", "--resume", "--run-dir"]
    for name, kills in (("whole", []), ("run", [8])):
        for lines in [*kills, 10_000]:
            process = tool(tmp_path, *given, tmp_path / name, ranks=2)
            err = kill_after(process, tmp_path / name, lines)
            assert process.returncode == (0 if lines == 10_000 else -signal.SIGKILL), err
    assert_same(weights(tmp_path / "run/student"), weights(tmp_path / "whole/student"))
    steps, want = (metrics(tmp_path / name)[0] for name in ("run", "whole"))
    assert [x["losses"] for x in steps] == [x["losses"] for x in want]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_leaves_a_checkpoint(tmp_path, teacher, corpus_dir, ranks):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    given = [f"teacher.path={teacher}", f"data.corpus={corpus_dir}", "stages.0.steps=100000"]
    given += ["loop.checkpoint_every=0", "--run-dir", tmp_path / "run"]
    process = tool(tmp_path, *given, ranks=ranks)
    for line in process.stdout:
        if line.startswith("align  "):
            break
    if ranks == 1:
        process.send_signal(signal.SIGTERM)
    else:  # as Ctrl-C of a terminal, to the launcher and its ranks
        for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
            each.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == (128 + signal.SIGTERM if ranks == 1 else 1), err
    launch = "-m torch.distributed.run --nproc_per_node=2 " if ranks == 2 else ""
    assert err.count(f"stopped; continue with: python {launch}-m distill run") == 1
    assert "--resume" in err
    assert len(list((tmp_path / "run/checkpoints/align").glob("step-*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets())
def test_presets_run(capsys, tmp_path, teacher, corpus_dir, preset):
    stages = Recipe.load(preset).stages
    given = [f"teacher.path={teacher}", f"data.corpus={corpus_dir}", "data.pattern=*.py"]
    given += ["data.length=24", "loop.rows=4", "loop.micro_rows=2", "teacher.dtype=float32"]
    for at, stage in enumerate(stages):
        given += [f"stages.{at}.tokens=null", f"stages.{at}.steps=2", f"stages.{at}.warmup=1"]
        assert stage.steps or stage.tokens
    status = main(["run", preset, *given, "--run-dir", str(tmp_path / "run")])
    assert status == 0, capsys.readouterr().err
    assert load_model(tmp_path / "run/student").config.vocab_size == 264
    assert list((tmp_path / "run/logs").rglob("events*"))


def test_a_folder_is_written_by_one(capsys, tmp_path, teacher, corpus_dir):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, err = command(capsys, tmp_path, teacher, corpus_dir)
    assert status == 1 and "another process is writing to" in err


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("log.trackers=[nosuch]", ["log.trackers", "nosuch"]),
        ("teacher.path=null", ["teacher.path must be a folder"]),
        ("data.corpus=null", ["data.corpus must be a folder"]),
        ("student.options.windw=3", ["windw"]),
        ("student.kind=load", ["student.path must be a folder"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_recipes_are_one_line(capsys, tmp_path, teacher, corpus_dir, change, parts):
    status, _, err = command(capsys, tmp_path, teacher, corpus_dir, change)
    assert status == 1 and err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_another_tokenizer_is_refused(capsys, tmp_path, teacher, corpus_dir):
    student = write_teacher(tmp_path / "student")
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(["def "])
    tokenizer.save_pretrained(student)
    given = ("student.kind=load", f"student.path={student}")
    status, _, err = command(capsys, tmp_path, teacher, corpus_dir, *given)
    assert status == 1 and "'def ' is 257 there and None here" in err
