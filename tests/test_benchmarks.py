"""The benchmarks: statistics, gate, storage, report, command line. No test asserts a time."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the extra `bench` is not installed")
pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")

from benchmarks import report, rows, scaling, timing
from benchmarks.__main__ import main
from benchmarks.cases import OPS, cases
from benchmarks.ceilings import Ceilings
from benchmarks.entries import entries
from benchmarks.gate import Gate
from benchmarks.machine import ROOT, Machine
from benchmarks.problem import Bound, Case, Trial, UnavailableError, Variant, tracked
from benchmarks.runner import Run, run_case
from benchmarks.table import duration, ratio

HERE = Machine("CPU", "Some(R) CPU @ 2.10GHz", 2, "avx2", "2.13.0", "3.11.0", "abc", False, 0.1)
ROOF = Ceilings(copy_gb_s=10.0, sgemm_gflop_s=100.0, fresh_clone_gb_s=5.0)
QUICK_RUN = Run("2026-01-02T03:04:05+00:00", HERE, ROOF, True, budget_s=0.01, quick=True)
BLOCKS = "".join(
    f"<!-- BEGIN GENERATED: {marker} -->\nstale\n<!-- END GENERATED: {marker} -->\nkept\n"
    for marker in (*report.GROUPS, scaling.NAME)
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quick_case(op: str, **changes: object) -> Case:
    case = next(case for case in cases(quick=True) if case.op == op)
    return dataclasses.replace(case, **changes)


def row(**changes: object) -> rows.Row:
    """A row of our slstm kernel that took 1000 us, with `changes`."""
    values = {field.name: 0 for field in dataclasses.fields(rows.Row)} | {
        "date": "2026-01-02T03:04:05+00:00",
        "complete": True,
        "op": "slstm",
        "case": "slstm-fwd-B1-f32",
        "backend": "cpu",
        "ours": True,
        "direction": "fwd",
        "dtype": "f32",
        "shape": "B1",
        "reason": "",
        "time_us": 1000.0,
        "bound": "compute",
        "roofline_percent": 70.0,
        "worst": "h",
        "error": 1e-7,
        "budget": 5e-7,
        "device": "CPU",
        "machine": "Some CPU",
        "isa": "avx2",
        "torch": "2.13.0",
        "python": "3.11.0",
        "commit": "abc",
        "dirty": False,
    }
    types = {field.name: str(field.type) for field in dataclasses.fields(rows.Row)}
    values |= {name: float(v) for name, v in values.items() if types[name] == "float"}
    return rows.Row(**(values | changes))


def peer(backend: str, time_us: float, **changes: object) -> rows.Row:
    return row(backend=backend, ours=False, time_us=time_us, **changes)


class TestTiming:
    def test_percentiles_interpolate(self):
        assert timing.percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
        assert timing.percentile([10.0, 20.0], 20) == 12.0
        assert timing.percentile([7.0], 80) == 7.0

    def test_summary_has_median_p20_p80(self):
        summary = timing.summarize([float(n) for n in range(11)])
        assert summary == timing.Summary(time_us=5.0, p20_us=2.0, p80_us=8.0, samples=11)

    def test_subjects_take_turns_and_the_first_changes(self):
        order: list[str] = []
        subjects = [timing.Subject(n, lambda n=n: order.append(n), lambda: None) for n in "ab"]
        timing.interleave(subjects, budget_s=0.0, min_samples=4)
        assert "".join(order[-8:]) == "abbaabba"

    def test_slow_subject_sits_rounds_out(self):
        subjects = [timing.Subject(n, lambda: None) for n in ("fast", "slow")]
        timing.schedule(subjects, [10.0, 800.0])
        assert [(s.calls, s.turn) for s in subjects] == [(10, 1), (1, 10)]

    def test_reset_runs_before_each_call(self):
        log: list[str] = []
        subject = timing.Subject("x", lambda: log.append("run"), lambda: log.append("reset"))
        times = timing.interleave([subject], budget_s=0.0, min_samples=3)
        assert times["x"].samples == 3
        assert log == ["reset", "run"] * (len(log) // 2)

    def test_units(self):
        assert [duration(t) for t in (9.314, 3050, 2.93e6)] == ["9.31 us", "3.05 ms", "2.93 s"]
        assert [ratio(t, 10.0) for t in (9.4, 32, 410)] == ["0.94x", "3.2x", "41x"]

    def test_roofline_takes_the_longer_floor(self):
        assert ROOF.bound(flops=10**9, moved_bytes=10**7) == ("compute", 10000.0)
        assert ROOF.bound(flops=0, moved_bytes=10**7) == ("memory", 1000.0)
        assert ROOF.bound(flops=0, moved_bytes=10**6)[0] == "latency"


class TestCases:
    @pytest.mark.parametrize("quick", [False, True])
    def test_ids_are_unique_and_every_op_has_ours_and_peers(self, quick):
        found = cases(quick)
        assert len({case.id for case in found}) == len(found)
        assert {case.op for case in found} == set(OPS)
        for case in found:
            assert case.variants[0].ours
            assert any(not variant.ours for variant in case.variants)

    @pytest.mark.parametrize("op", OPS)
    def test_moved_bytes_are_the_sizes_of_inputs_and_results(self, op):
        for case in (case for case in cases(quick=True) if case.op == op):
            inputs = case.prepare()
            results = case.reference(case, tracked(case, inputs))
            if case.direction == "fwd":
                del inputs["dh"]
            results.pop("loss", None)  # one number
            every = [*inputs.values(), *results.values()]
            assert case.moved_bytes == sum(t.nbytes for t in every), case.id

    def test_directions_share_inputs(self):
        fwd, both = cases(quick=True)[:2]
        assert fwd.direction != both.direction
        assert torch.equal(fwd.prepare()["q"], both.prepare()["q"])

    def test_overwritten_inputs_are_put_back(self):
        case = quick_case("kl_div")
        tensors = tracked(case, case.prepare())
        trial = Trial(case, next(v for v in case.variants if v.name == "cpu in place"), tensors)
        first, second = trial.results(), trial.results()
        assert torch.equal(first["loss"], second["loss"])
        (_, gradient) = trial.run()
        assert gradient.data_ptr() == tensors["student"].data_ptr()


def planted(name: str, spoil) -> Variant:
    """Our slstm variant with spoiled outputs."""
    right = quick_case("slstm").variants[0]

    def bind(case: Case, tensors: dict[str, torch.Tensor]) -> Bound:
        bound = right.bind(case, tensors)
        return Bound(lambda: spoil(bound.call()), bound.wrt)

    return Variant(name, bind, ours=True)


class TestGate:
    @pytest.mark.parametrize("op", OPS)
    def test_ours_pass(self, op):
        for case in (case for case in cases(quick=True) if case.op == op):
            gate = Gate.of(case, quick=True)
            assert [v.name for v in case.variants if v.ours and v.name not in gate.trials] == []

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda out: (out[0] * 1.001, *out[1:]),
            lambda out: (out[0] * math.nan, *out[1:]),
            lambda out: (out[0][:, :1], *out[1:]),
        ],
        ids=["one part in a thousand", "NaN", "shape"],
    )
    def test_wrong_kernel_is_not_timed(self, spoil):
        case = quick_case("slstm")
        case = dataclasses.replace(case, variants=(planted("wrong", spoil), *case.variants))
        found = run_case(QUICK_RUN, case)
        assert not any(r.measured for r in found)
        assert found[0].reason.startswith("parity: h has relative error")
        assert found[1].reason == "wrong fails its parity test"

    def test_wrong_gradient_is_found(self):
        case = next(c for c in cases(quick=True) if c.id.startswith("slstm-fwd+bwd"))

        def bind(case, tensors):
            bound = case.variants[1].bind(case, tensors)
            spoiled = dict(tensors, x=tensors["x"] * 1.0)
            spoiled["x"].register_hook(lambda g: g * 1.01)
            return Bound(case.variants[1].bind(case, spoiled).call, bound.wrt)

        case = dataclasses.replace(case, variants=(Variant("wrong", bind, True), case.variants[1]))
        assert Gate.of(case, quick=True).verdicts["wrong"].worst == "dx"

    def test_missing_baseline_is_a_row_with_its_reason(self):
        def missing(case, tensors):
            raise UnavailableError("needs a library that is not here")

        case = quick_case("slstm")
        ours = case.variants[0]
        case = dataclasses.replace(case, variants=(ours, Variant("library", missing)))
        found = run_case(QUICK_RUN, case)
        assert [r.measured for r in found] == [True, False]
        assert found[1].reason == "needs a library that is not here"
        assert (found[1].backend, found[1].samples) == ("library", 0)


class TestRows:
    def test_what_is_appended_is_read_back(self, tmp_path):
        path = tmp_path / "machine" / "slstm.csv"
        first, second = row(), peer("eager", math.nan, reason='needs "gcc", not found', dirty=True)
        rows.append(path, [first])
        rows.append(path, [second])
        got = rows.read(path, rows.Row)
        assert got[0] == first
        assert math.isnan(got[1].time_us) and not got[1].measured
        assert dataclasses.replace(got[1], time_us=0.0) == dataclasses.replace(second, time_us=0.0)

    def test_other_columns_are_refused(self, tmp_path):
        path = tmp_path / "slstm.csv"
        path.write_text("op,time\nslstm,1\n")
        with pytest.raises(ValueError, match="columns are not those"):
            rows.append(path, [row()])
        assert path.read_text() == "op,time\nslstm,1\n"

    def test_newest_complete_run_counts(self):
        old, new = row(date="2026-01-01"), row(date="2026-01-02")
        partial = row(date="2026-01-03", complete=False)
        assert rows.newest_complete([old, new, partial]) == [new]
        assert rows.newest_complete([partial]) == []

    def test_machine_folder(self):
        assert HERE.folder == "some"
        xeon = dataclasses.replace(HERE, name="Intel(R) Xeon(R) Processor")
        assert xeon.folder == "intel-xeon-processor"


class TestReport:
    def results(self, tmp_path: Path) -> Path:
        folder = tmp_path / "results" / "some-cpu"
        older = [row(date="2026-01-01", time_us=9e9), peer("eager", 1.0, date="2026-01-01")]
        newer = [
            row(),
            peer("eager", 12000.0),
            peer("nn.LSTM", 900.0),
            peer("torch.compile", math.nan, reason="no compiler"),
        ]
        rows.append(folder / "slstm.csv", older + newer)
        return folder.parent

    def test_ratios_come_from_one_run(self, tmp_path):
        every = rows.read(self.results(tmp_path) / "some-cpu" / "slstm.csv", rows.Row)
        last = entries(rows.newest_complete(every))
        assert [entry.speed_up("eager") for entry in last] == [12.0]
        assert [entry.speed_up("eager") for entry in entries(every)] == [1 / 9e9, 12.0]

    def test_the_fastest_of_a_family_of_peers_counts(self):
        sizes = {64: 3000.0, 128: 2000.0, 256: 5000.0}
        found = [peer(f"eager, chunks of {size}", time_us) for size, time_us in sizes.items()]
        (entry,) = entries([row(), *found, peer("library", 9000.0)])
        assert {name: r.time_us for name, r in entry.peers.items()} == {
            "eager": 2000.0,
            "library": 9000.0,
        }
        missing = [peer("library", math.nan, reason="not here", case=case) for case in "ab"]
        assert "Not timed: library, 2 rows: not here" in report.markdown([row(), *missing], [entry])

    def test_fills_the_markers_twice_alike(self, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text(BLOCKS)
        results = self.results(tmp_path)
        written = report.write(results, readme)
        first = readme.read_text(), written[0].read_bytes()
        assert report.write(results, readme) == written
        assert (readme.read_text(), written[0].read_bytes()) == first
        text = first[0]
        assert "stale" not in text and text.count("kept") == len(report.GROUPS) + 1
        assert "(results/some-cpu/speed-recurrence.svg)" in text
        assert "| **1 ms** | 12 ms (12x) | 900 us (0.90x) | 70 % sgemm |" in text
        assert "Not timed: torch.compile, slstm-fwd-B1-f32: no compiler" in text
        assert "CPU measurement, 2026-01-02" in text and report.NOT_MEASURED in text

    def test_missing_markers_are_an_error_and_nothing_is_written(self, tmp_path, capsys):
        readme = tmp_path / "README.md"
        readme.write_text("# No markers\n")
        arguments = ["--readme", str(readme), "--results", str(self.results(tmp_path))]
        assert main(["report", *arguments]) == 1
        assert "<!-- BEGIN GENERATED: speed-mlstm -->" in capsys.readouterr().err
        assert readme.read_text() == "# No markers\n"
        assert not list(tmp_path.rglob("*.svg"))

    def test_no_results_are_an_error_and_the_readme_stays(self, tmp_path, capsys):
        readme = tmp_path / "README.md"
        readme.write_text(BLOCKS)
        arguments = ["--readme", str(readme), "--results", str(tmp_path / "nowhere")]
        assert main(["report", *arguments]) == 1
        assert "nowhere holds no measurement" in capsys.readouterr().err
        assert readme.read_text() == BLOCKS


class TestScaling:
    @pytest.mark.slow
    def test_points_are_plotted_beside_the_tables(self, tmp_path, monkeypatch):
        monkeypatch.setattr(scaling, "VARIANTS", {"cpu": 128})
        readme = tmp_path / "README.md"
        readme.write_text(BLOCKS)
        arguments = ["--quick", "--longest", "128", "--save", "--threads", "1"]
        assert main(["scaling", *arguments, "--results", str(tmp_path)]) == 0
        (path,) = tmp_path.rglob("scaling.csv")
        points = rows.read(path, scaling.Point)
        assert [(p.backend, p.direction) for p in points[:2]] == [
            ("cpu", "fwd"),
            ("cpu", "fwd+bwd"),
        ]
        assert all(p.passes and p.peak_bytes >= 0 and p.time_us > 0 for p in points)
        wrong = dataclasses.replace(points[0], T=256, error=math.nan)
        rows.append(path, [wrong])
        assert report.write(tmp_path, readme) == [path.with_suffix(".svg"), readme]
        text = readme.read_text()
        assert "| 0.125 k | " in text and "| 0.25 k | error nan, budget" in text

    @pytest.mark.slow
    def test_a_process_that_fails_is_an_error(self, monkeypatch, capsys):
        monkeypatch.setattr(scaling, "VARIANTS", {"no such variant": 128})
        assert main(["scaling", "--quick"]) == 1
        assert "no such variant fwd at T = 128: StopIteration" in capsys.readouterr().err


class TestCommandLine:
    @pytest.mark.medium
    @pytest.mark.parametrize(
        "op", [pytest.param(op, marks=[] if op == "slstm" else pytest.mark.slow) for op in OPS]
    )
    def test_quick_run_prints_a_table_and_saves_nothing(self, op, tmp_path, capsys):
        arguments = ["--op", op, "--quick", "--no-save", "--budget-s", "0.01", "--threads", "1"]
        assert main(["run", *arguments, "--results", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert f"{op}-fwd" in out and "eager" in out and "GFLOP/s" in out
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.medium
    def test_saved_quick_run_is_not_complete(self, tmp_path):
        arguments = ["--op", "slstm", "--case", "T8", "--quick", "--save", "--budget-s", "0.01"]
        assert main(["run", *arguments, "--results", str(tmp_path)]) == 0
        (path,) = tmp_path.rglob("slstm.csv")
        assert {r.complete for r in rows.read(path, rows.Row)} == {False}

    def test_unknown_op_names_the_known_ones(self, capsys):
        assert main(["run", "--op", "gru"]) == 2
        assert capsys.readouterr().err == (
            f"benchmarks: unknown --op 'gru'; known: {', '.join(OPS)}\n"
        )

    def test_no_such_case(self, capsys):
        assert main(["run", "--case", "B999"]) == 2
        assert "no case has 'B999'" in capsys.readouterr().err

    def test_errors_of_every_variant(self, capsys):
        assert main(["errors", "--op", "mlstm", "--case", "fwd+bwd", "--quick"]) == 0
        out = capsys.readouterr().out
        assert all(f" {name} " in out for name in ("h", "dq", "df", "cpu", "eager, chunks of 64"))
        # Each peer has its line, or a reason why not.
        assert "transformers, chunks of 64" in out and "mlstm_kernels custbw, chunks of 64" in out

    @pytest.mark.medium
    def test_list(self, capsys):
        assert main(["list", "--op", "lstm"]) == 0
        assert "lstm-fwd+bwd-layer-B8-T512-H1-D256-f32" in capsys.readouterr().out.split()


@pytest.mark.slow
def test_cases_run_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark", reason="the extra `bench` is not installed")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--quick", "-q"]
    # pytest-benchmark does not time in a process that says it is a worker of pytest-xdist.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "-k", "kl_div and not (linear or topk or js or tv)"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kl_div-fwd+bwd-N16-V500-bf16-cpu in place" in done.stdout
    assert "6 passed, 2 skipped" in done.stdout
